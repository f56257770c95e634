"""What values the options of methods may have, beyond their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import range_violation
from clipo_megatron.config.schema import RunConfig


def value_problems(
    name: str, section: type | None, options: dict[str, Any], prefix: str, config: RunConfig
) -> Iterator[ConfigProblem]:
    """What is wrong with the values of a method's options, those of the dataclass `section`, defaults included; types
    have been checked."""
    for option in fields(section) if section else ():
        if expected := range_violation(option, options[option.name]):
            yield ConfigProblem(f"{prefix}{option.name}", expected, "Change it", options[option.name])
    if name in FURTHER:
        yield from FURTHER[name](options, prefix, config)


def place_problems(key: str, place: str, kind: str) -> Iterator[ConfigProblem]:
    """What can be said of "file.py:name" or "package.module:name" without importing it; `kind`: of what is named."""
    source, _, name = place.rpartition(":")
    if not source or not name.isidentifier():
        reason = f"no {kind.lower()} is named after a colon"
        yield ConfigProblem(key, reason, f"Write file.py:{kind} or package.module:{kind}", place)
    elif source.endswith(".py") and not Path(source).is_file():
        reason = "there is no such file" + ("" if Path(source).is_absolute() else f" below {Path.cwd()}")
        yield ConfigProblem(key, reason, "Correct the path", place)


def _riskpo(options: dict[str, Any], prefix: str, config: RunConfig) -> Iterator[ConfigProblem]:
    if options["alpha"] >= options["beta"]:
        reason = f"it is the lower level, and beta is {options['beta']}"
        yield ConfigProblem(f"{prefix}alpha", reason, "Lower it; 0.2 and 0.9 are usual", options["alpha"])


def _dapo(options: dict[str, Any], prefix: str, config: RunConfig) -> Iterator[ConfigProblem]:
    window, longest, cushion = config.rollout.max_new_tokens, options["longest"], options["cushion"]
    whole = window if longest is None else longest
    if not options["penalty"]:
        return
    if cushion is not None and cushion > whole:
        held = "rollout.max_new_tokens" if longest is None else f"{prefix}longest"
        reason = f"it begins so many tokens below {held} = {whole}, so every response would be penalised"
        yield ConfigProblem(f"{prefix}cushion", reason, "Lower it, or set it to null for a fifth", cushion)
    elif longest is not None and longest - (longest // 5 if cushion is None else cushion) >= window:
        reason = f"no response is longer than rollout.max_new_tokens = {window}, so none would ever be penalised"
        yield ConfigProblem(
            f"{prefix}longest", reason, "Lower it, or set it to null for rollout.max_new_tokens", longest
        )


def _gcpo(options: dict[str, Any], prefix: str, config: RunConfig) -> Iterator[ConfigProblem]:
    try:
        re.compile(options["pattern"])
    except re.error as error:
        reason = f"it is no regular expression: {error}"
        yield ConfigProblem(f"{prefix}pattern", reason, "Correct it", options["pattern"])


def _cepo(options: dict[str, Any], prefix: str, config: RunConfig) -> Iterator[ConfigProblem]:
    if "{answer}" not in options["hint"]:
        yield ConfigProblem(f"{prefix}hint", "it has no {answer} in it", "Say where the answer goes", options["hint"])


def _c_grpo(options: dict[str, Any], prefix: str, config: RunConfig) -> Iterator[ConfigProblem]:
    if options["score"] is not None:
        yield from place_problems(f"{prefix}score", options["score"], "function")


# What is to be said of a method's options beyond the range of each.
FURTHER: dict[str, Callable[[dict[str, Any], str, RunConfig], Iterator[ConfigProblem]]] = {
    "riskpo": _riskpo,
    "dapo": _dapo,
    "gcpo": _gcpo,
    "cepo": _cepo,
    "c_grpo": _c_grpo,
}
