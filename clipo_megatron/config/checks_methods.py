"""Checks of the algorithm's section: names of methods, their options, and settings that a method does not read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import Problem
from clipo_megatron.config.load import option_problems, typed_options
from clipo_megatron.config.methods import BASELINES, PLUGINS, Method, baseline, is_import_path
from clipo_megatron.config.option_limits import limit_problems
from clipo_megatron.config.schema import Aggregation, CriticConfig, RunConfig


def method_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything about methods that can be said without importing one."""
    algorithm = config.algorithm
    yield from _named("algorithm", algorithm.name, algorithm.options, BASELINES)
    for index, plugin in enumerate(algorithm.plugins):
        yield from _named(f"algorithm.plugins[{index}]", plugin.name, plugin.options, PLUGINS)
    names = [plugin.name for plugin in algorithm.plugins]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("algorithm.plugins", f"{name} is there {names.count(name)} times", "Keep one", show_value=False)
    method = baseline(algorithm)
    for key in ("clip_low", "clip_high"):
        if method.clip is None and getattr(algorithm, key) is not None:
            reason = f"{algorithm.name} clips no ratio, so it would be ignored"
            yield Problem(f"algorithm.{key}", reason, "Set it to null", getattr(algorithm, key))
    aggregation = algorithm.aggregation or method.aggregation
    if method.aggregation is None and algorithm.aggregation is not None:
        reason = f"the loss of {algorithm.name} is over whole groups, so it would be ignored"
        yield Problem("algorithm.aggregation", reason, "Set it to null", algorithm.aggregation.value)
    if algorithm.constant_length is not None and aggregation is not Aggregation.constant:
        reason = "only the aggregation `constant` reads it"
        remedy = "Set it to null, or algorithm.aggregation to constant"
        yield Problem("algorithm.constant_length", reason, remedy, algorithm.constant_length)
    if algorithm.clip_low is not None and method.clip and method.below_one and algorithm.clip_low >= 1:
        reason = "the probability ratio is held above 1 - clip_low, which must stay positive"
        yield Problem("algorithm.clip_low", reason, "Set it below 1; 0.2 is usual", algorithm.clip_low)
    yield from _critic(config)


def _critic(config: RunConfig) -> Iterator[Problem]:
    settings, algorithm = config.critic, config.algorithm
    if settings.clip is not None and not settings.clip > 0:
        yield Problem(
            "critic.clip", "values could not move at all", "Set it above 0, or to null for no clipping", settings.clip
        )
    own = is_import_path(algorithm.name) or any(is_import_path(plugin.name) for plugin in algorithm.plugins)
    if settings != CriticConfig() and not own and not baseline(algorithm).critic:
        reason = f"{algorithm.name} has no critic, so the section would be ignored"
        yield Problem("critic", reason, "Remove it, or set algorithm.name to ppo", show_value=False)


def _named(key: str, name: str, options: dict[str, Any], known: Mapping[str, Method]) -> Iterator[Problem]:
    if is_import_path(name):
        place, _, stage = name.rpartition(":")
        if not stage.isidentifier():
            yield Problem(f"{key}.name", "no class is named after the colon", "Write file.py:Class", name)
        elif place.endswith(".py") and not Path(place).is_file():
            reason = "there is no such file" + ("" if Path(place).is_absolute() else f" below {Path.cwd()}")
            yield Problem(f"{key}.name", reason, "Correct the path", name)
        return
    if name not in known:
        other = BASELINES if known is PLUGINS else PLUGINS
        if name in other:
            section = "algorithm.name" if other is BASELINES else "algorithm.plugins"
            yield Problem(f"{key}.name", f"{name} belongs into {section}", "Move it there", name)
            return
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(known)}, or file.py:Class"
        yield Problem(f"{key}.name", "`clipo methods` shows no such method", remedy, name)
        return
    problems = list(option_problems(known[name].options, options, f"{key}.options.", owner=name))
    yield from problems or limit_problems(name, typed_options(known[name].options, options), f"{key}.options.")
