"""`clipo methods`: every baseline and plug-in with its paper and options, as its class declares them."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields

from clipo_megatron.algorithms.methods.registry import BASELINES, PLUGINS, Method
from clipo_megatron.config import reference
from clipo_megatron.config.errors import ConfigError, spell

DESCRIPTION = "Every baseline and plug-in, with its paper and options."
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
    known = {**BASELINES, **PLUGINS}
    for name in names:
        if name not in known and name != CLIPO:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]}?" if close else "`clipo methods` lists them all."
            raise ConfigError(f"there is no method {name!r}. {hint}")
    for title, table in (
        ("baselines: algorithm.name is one of", BASELINES),
        ("plug-ins: algorithm.plugins lists any of", PLUGINS),
    ):
        chosen = [name for name in table if not names or name in names]
        if chosen:
            yield title
            yield ""
            for name in chosen:
                yield from _method(name, table[name], baseline=table is BASELINES)
                yield ""
    if not names or CLIPO in names:
        yield _CLIPO


def _method(name: str, method: Method, *, baseline: bool) -> Iterator[str]:
    yield f"  {name:<22} {method.summary} ({method.source})"
    if baseline:
        yield f"{'':<25}{_shared(method)}"
    if needs := list(_needs(method)):
        yield f"{'':<25}needs {', '.join(needs)}"
    if method.options is None:
        return
    comments, types = reference.comments(sys.modules[method.options.__module__]), reference.hints(method.options)
    for option in fields(method.options):
        kind = reference.describe(types[option.name])
        yield f"    {option.name:<20} {kind}; default {spell(option.default)}"
        comment = comments[method.options.__name__].get(option.name, "")
        yield from textwrap.wrap(comment, WIDTH, initial_indent=" " * 25 + "# ", subsequent_indent=" " * 25 + "# ")


def _needs(method: Method) -> Iterator[str]:
    """What a run has to have or to do for it, beyond what every run has and does."""
    if method.critic:
        yield "a critic, which is a second model beside the policy: `clipo settings critic`"
    if method.reference:
        yield "log-probs of the policy that the run began with, which is kept beside the one that learns"
    if method.demonstrations:
        yield "worked solutions in the rows of training prompts"
    if method.forwards:
        yield f"{method.forwards} more forward{'s' * (method.forwards > 1)} over the rollouts of each step"
    if method.replays:
        yield f"the rollouts of {method.replays} former step{'s' * (method.replays > 1)}, to update on again"


def _shared(method: Method) -> str:
    """Its defaults of settings that all baselines have."""
    clips = "no clip" if method.clip is None else f"clip_low {method.clip[0]:g}, clip_high {method.clip[1]:g}"
    parts = [clips, f"aggregation {method.aggregation.value if method.aggregation else 'over groups'}"]
    if method.max_refill_rounds:
        parts.append(f"rollout.max_refill_rounds {method.max_refill_rounds}")
    if method.windows:
        parts.append("rollout.window_tokens may be set")
    return ", ".join(parts)
