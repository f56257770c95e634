"""Checks of what is asked and graded: every data source has a grader, and its gold answers are right by it.

A sample of each source is judged; what costs little is checked in every row (`data/golds.py` as it is read).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RewardConfig, RunConfig, SourceConfig
from clipo_megatron.data.asked import Asked
from clipo_megatron.data.prompt_table import RenderedRow
from clipo_megatron.data.sources import DataError, source_of
from clipo_megatron.rewards.gradable import why_no_short_answer, why_not_gradable

SAMPLE = 48  # rows of each data source of a file whose gold answers are judged


def check_answers(config: RunConfig, rows: Sequence[RenderedRow]) -> None:
    """Refuse problems that no response could answer rightly.

    Args:
        config: the run's; its modes and sources.
        rows: the rows that became prompts, with what these ask for.

    Raises:
        DataError: a source's rows ask for no form that is read, or its gold answers are not right by its grader; the
            message names file, row and remedy.
    """
    paths = {source.label: source for source in [*config.data.train, *config.data.eval]}
    for name, source, places in _by_source(rows):
        mode = _mode(config.reward, source)
        for place in places:
            row = rows[place]
            if row.ground_truth.startswith(("[", "{")) and why_no_short_answer(row.ground_truth) is not None:
                _judge(row, mode, paths.get(name), 0)
        step = max(1, len(places) // SAMPLE)
        for place in [*places[::step][:SAMPLE], places[-1]]:
            _judge(rows[place], mode, paths.get(name), len(places))


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


def _by_source(rows: Iterable[RenderedRow]) -> Iterator[tuple[str, str, list[int]]]:
    """The places of the rows of each file and data source."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((source_of(row.id), row.data_source), []).append(place)
    for (name, source), places in groups.items():
        yield name, source, places


def _mode(reward: RewardConfig, data_source: str) -> str:
    mode = reward.by_source.get(data_source, reward.mode)
    return str(getattr(mode, "value", mode))


def _judge(row: RenderedRow, mode: str, source: SourceConfig | None, rows: int) -> None:
    asked = Asked.by_turns(row.messages, forms=row.forms, thinking=row.thinking)
    reason = why_not_gradable(row.ground_truth, data_source=row.data_source, mode=mode, asked=asked, extra=row.extra)
    if reason is not None:
        place = (source.path or source.generator) if source else source_of(row.id)
        count = f" (one of {rows} of this source)" if rows > 1 else ""
        raise DataError(f"{place}, row {row.id.rpartition('/')[2]}{count}, field reward_model.ground_truth: {reason}.")
