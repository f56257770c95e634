"""Checks of what is asked and graded: every data source has a grader, and its gold answers are right by it.

A sample of each source is judged; what costs little is checked in every row (`data/golds.py` as it is read).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RewardConfig, RunConfig, SourceConfig
from clipo_megatron.data.asked import Asked, asked_forms, opens_thinking
from clipo_megatron.data.sources import DataError, source_of
from clipo_megatron.rewards.gradable import why_no_short_answer, why_not_gradable

SAMPLE = 48  # rows of each data source of a file whose gold answers are judged


class Problem(Protocol):
    """A row, or the prompt that it became."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    data_source: str
    ground_truth: str
    extra: Mapping[str, Any]


def check_answers(config: RunConfig, problems: Sequence[Problem], *, template: str = "") -> None:
    """Refuse problems that no response could answer rightly.

    Args:
        config: the run's; its modes, system prompt and sources.
        problems: rows or prompts.
        template: the chat template, whose default system prompt may ask for a form; prompts know already.

    Raises:
        DataError: a source's rows ask for no form that is read, or its gold answers are not right by its grader; the
            message names file, row and remedy.
    """
    paths = {source.label: source for source in [*config.data.train, *config.data.eval]}
    for name, source, rows in _by_source(problems):
        mode = _mode(config.reward, source)
        for index in rows:
            row = problems[index]
            if row.ground_truth.startswith(("[", "{")) and why_no_short_answer(row.ground_truth) is not None:
                _judge(config, row, mode, template, paths.get(name), 0)
        step = max(1, len(rows) // SAMPLE)
        for index in [*rows[::step][:SAMPLE], rows[-1]]:
            _judge(config, problems[index], mode, template, paths.get(name), len(rows))


def source_problems(reward: RewardConfig, data_sources: Iterable[str]) -> Iterator[ConfigProblem]:
    """Keys of reward.by_source that no row of the run has."""
    known = sorted(set(data_sources))
    for source, mode in reward.by_source.items():
        if source not in known:
            close = difflib.get_close_matches(source, known, n=1, cutoff=0.5)
            guess = f"Did you mean {close[0]!r}?" if close else "Correct or remove it."
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            reason = f"no row has the data source {source!r}; rows have {shown}"
            yield ConfigProblem("reward.by_source", reason, guess, f"{source}: {getattr(mode, 'value', mode)}")


def template_text(folder: Any) -> str:
    """The chat template of a model's folder as text; "" where there is none to read."""
    try:
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text(errors="replace")
        found = json.loads((folder / "tokenizer_config.json").read_text(errors="replace")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


def _by_source(problems: Iterable[Problem]) -> Iterator[tuple[str, str, list[int]]]:
    """The indices of the problems of each file and data source."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, problem in enumerate(problems):
        groups.setdefault((source_of(problem.id), problem.data_source), []).append(index)
    for (name, source), rows in groups.items():
        yield name, source, rows


def _mode(reward: RewardConfig, data_source: str) -> str:
    mode = reward.by_source.get(data_source, reward.mode)
    return str(getattr(mode, "value", mode))


def _judge(config: RunConfig, row: Problem, mode: str, template: str, source: SourceConfig | None, rows: int) -> None:
    asked = _asked(config, row, template)
    reason = why_not_gradable(row.ground_truth, data_source=row.data_source, mode=mode, asked=asked, extra=row.extra)
    if reason is not None:
        place = (source.path or source.generator) if source else source_of(row.id)
        count = f" (one of {rows} of this source)" if rows > 1 else ""
        raise DataError(f"{place}, row {row.id.rpartition('/')[2]}{count}, field reward_model.ground_truth: {reason}.")


def _asked(config: RunConfig, row: Problem, template: str) -> Asked:
    """What a row asks for: as its rendered prompt said, or as its turns and the settings say."""
    forms = getattr(row, "forms", None)
    if forms is not None:
        return Asked.by_turns(row.messages, forms=forms, thinking=getattr(row, "thinking", False))
    system = config.model.system_prompt
    turns = [turn["content"] for turn in row.messages if system is None or turn["role"] != "system"]
    said = "\n".join([*turns, system if system is not None else template])
    return Asked.by_turns(row.messages, forms=asked_forms(said), thinking=opens_thinking(said))
