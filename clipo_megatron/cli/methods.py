"""`clipo methods`: every base method and plug-in with its paper and options, as its class declares them."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Iterator, Sequence

from clipo_megatron.algorithms.hook import Hook, Replay, Signal
from clipo_megatron.algorithms.methods.registry import BASE_METHODS, PLUGINS, base_method_class, plugin_class
from clipo_megatron.algorithms.policy_loss import PolicyLoss
from clipo_megatron.config.errors import ConfigError, counted, spell
from clipo_megatron.config.reference import settings

DESCRIPTION = "Every base method and plug-in, with its paper and options."
EXAMPLES = """\
examples:
  clipo methods                  all of them
  clipo methods dapo hapo        these two
"""
WIDTH = 120
CLIPO = "clipo"
_CLIPO = "clipo.enabled puts the contrastive head and its reward on top of any method: `clipo settings clipo`."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="METHOD", nargs="*", help="show only these, such as dapo hapo")


def run(options: argparse.Namespace) -> int:
    print("\n".join(listing(options.names)))
    return 0


def listing(names: Sequence[str] = ()) -> Iterator[str]:
    """Lines of the methods called `names`; without names, of all. CLIPO is no method but goes on top of any.

    Raises:
        ConfigError: there is no method of one of these names.
    """
    known = {**BASE_METHODS, **PLUGINS}
    for name in names:
        if name not in known and name != CLIPO:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]}?" if close else "`clipo methods` lists them all."
            raise ConfigError(f"there is no method {name!r}. {hint}")
    for title, table, class_of in (
        ("base methods: algorithm.name is one of", BASE_METHODS, base_method_class),
        ("plug-ins: algorithm.plugins lists any of", PLUGINS, plugin_class),
    ):
        chosen = [name for name in table if not names or name in names]
        if chosen:
            yield title
            yield ""
            for name in chosen:
                yield from _method(name, class_of(name))
                yield ""
    if not names or CLIPO in names:
        yield _CLIPO


def _method(name: str, method: type[Hook]) -> Iterator[str]:
    yield f"  {name:<22} {method.summary} ({method.source})"
    if issubclass(method, PolicyLoss):
        yield f"{'':<25}{_shared(method)}"
    if needs := list(_needs(method)):
        yield f"{'':<25}needs {', '.join(needs)}"
    for option in settings(method.options_class):
        yield f"    {option.key:<20} {option.type}; default {spell(option.default)}"
        notes = [option.comment, *(f"{value}: {meaning}" for value, meaning in option.choices.items())]
        for note in filter(None, notes):
            yield from textwrap.wrap(note, WIDTH, initial_indent=" " * 25 + "# ", subsequent_indent=" " * 25 + "# ")


def _needs(method: type[Hook]) -> Iterator[str]:
    """What a run must have or do for a method, beyond what every run has and does."""
    if Signal.values in method.needs:
        yield "a critic, which is a second model beside the policy: `clipo settings critic`"
    if Signal.reference_logprobs in method.needs:
        yield "log-probs of the policy that the run began with, which is kept beside the one that learns"
    if Signal.demonstrations in method.needs:
        yield "worked solutions in the rows of training prompts"
    if forwards := len(method.prompt_variants):
        yield f"{counted(forwards, 'more forward')} over the rollouts of each step"
    if issubclass(method, Replay):
        yield "the rollouts of the step before, to update on again"


def _shared(method: type[PolicyLoss]) -> str:
    """The method's defaults of settings that all base methods have."""
    clip, aggregation = method.default_clip, method.default_aggregation
    parts = ["no clip" if clip is None else f"clip_low {clip[0]:g}, clip_high {clip[1]:g}"]
    parts.append(f"aggregation {aggregation.value if aggregation else 'over groups'}")
    if method.default_max_refill_rounds:
        parts.append(f"rollout.max_refill_rounds {method.default_max_refill_rounds}")
    if method.supports_windows:
        parts.append("rollout.window_tokens may be set")
    return ", ".join(parts)
