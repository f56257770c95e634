"""The training problems and the held-out problems of a run, which are disjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clipo_megatron.config.schema import RunConfig, SourceConfig
from clipo_megatron.data.golds import without_answer
from clipo_megatron.data.prompts import load_prompts
from clipo_megatron.data.sources import DataError, distinct, source_of, without
from clipo_megatron.flow import Prompt


def held_out_problems(
    config: RunConfig, tokenizer: Any, say: Callable[[str], None], seen: set[str] | None = None
) -> list[Prompt]:
    """Evaluation prompts, none of a source twice; `say` is told what is left out.

    The data sources of all rows that are read are added to `seen`.

    Raises:
        DataError: a source cannot be read.
    """
    if not config.data.eval:
        return []
    return _once(_load(config, config.data.eval, tokenizer, "evaluation", say, seen), say)


def training_problems(
    config: RunConfig,
    tokenizer: Any,
    held_out: Sequence[Prompt],
    say: Callable[[str], None],
    seen: set[str] | None = None,
) -> list[Prompt]:
    """Training prompts, without those of `held_out` unless data.hold_out is false; `say` is told what is left out.

    The data sources of all rows that are read are added to `seen`.

    Raises:
        DataError: a source cannot be read, or nothing is left to train on.
    """
    found = _load(config, config.data.train, tokenizer, "training", say, seen)
    train = without(found, held_out) if config.data.hold_out else found
    if not train:
        raise DataError(
            f"all {len(found)} training problems are also evaluation problems, and data.hold_out leaves those out. "
            "Give other problems to data.train or data.eval, or set data.hold_out=false"
        )
    if len(train) < len(found):
        say(
            f"{len(found) - len(train)} of {len(found)} training problems are also evaluation problems and are left "
            "out (data.hold_out)"
        )
    return train


def _load(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    purpose: str,
    say: Callable[[str], None],
    seen: set[str] | None,
) -> list[Prompt]:
    limit = config.data.max_prompt_tokens
    found = load_prompts(sources, tokenizer, system_prompt=config.model.system_prompt, max_prompt_tokens=limit)
    if found.too_long:
        say(f"{found.too_long} {purpose} prompts are longer than data.max_prompt_tokens = {limit} and are left out")
    if seen is not None:
        seen |= found.data_sources
    answered, unanswered = without_answer(found.prompts)
    if unanswered:
        names = ", ".join(prompt.id for prompt in unanswered[:5])
        say(f"{len(unanswered)} {purpose} problems have an empty \\boxed{{}} as answer and are left out: {names}")
    return answered


def _once(prompts: Sequence[Prompt], say: Callable[[str], None]) -> list[Prompt]:
    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(source_of(prompt.id), []).append(prompt)
    kept: list[Prompt] = []
    for source, found in by_source.items():
        first = distinct(found)
        if len(first) < len(found):
            say(
                f"{len(found) - len(first)} of {len(found)} evaluation problems of {source} repeat others and are left "
                "out: a paired test counts each problem once"
            )
        kept += first
    return kept
