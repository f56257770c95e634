"""Checks of the section `megatron`: whether the installed release has the fields, and whether they may be set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.megatron import OWNED, SECTIONS, fields
from clipo_megatron.config.packages import not_installed
from clipo_megatron.config.schema import RunConfig

RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")


def megatron_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Problems of each field: its name, what decides it already, its type, and what it needs."""
    given = config.megatron
    if not given:
        return
    known = fields()
    if known is None:
        reason, remedy = not_installed("megatron-core")
        yield ConfigProblem("megatron", f"{reason}, which has these fields", remedy, show_value=False, absent=True)
        return
    for name, value in given.items():
        key = f"megatron.{name}"
        if name in OWNED:
            yield ConfigProblem(key, f"it is decided by {OWNED[name]}", "Remove it", value)
        elif name not in known:
            close = difflib.get_close_matches(str(name), [each for each in known if each not in OWNED], n=1)
            remedy = f"Did you mean {close[0]}?" if close else "Remove it"
            yield ConfigProblem(key, f"the installed megatron-core has no such field in {_listed()}", remedy, value)
        elif not (words := known[name].words):
            yield ConfigProblem(key, "its values are objects of Python, which a file cannot name", "Remove it", value)
        elif not known[name].takes(value):
            yield ConfigProblem(key, f"{words} was expected", "Correct it, or remove it for the default", value)
        elif name in RECOMPUTE and config.model.recompute:
            reason = "model.recompute is true, which recomputes every layer whole"
            yield ConfigProblem(key, reason, "Remove it, or set model.recompute=false", value)
    if given.get("overlap_param_gather") is True and config.optimizer.overlap_grad_reduce is False:
        reason = "Megatron gathers weights late only where gradients are reduced early"
        yield ConfigProblem(
            "megatron.overlap_param_gather", reason, "Remove it, or optimizer.overlap_grad_reduce", True
        )


def _listed() -> str:
    return f"{', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}"
