"""`clipo compare`: two results of `clipo eval`, problem by problem."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipo_megatron.cli.evaluate import add_sets
from clipo_megatron.cli.numbers import whole
from clipo_megatron.config.schema.training import LARGEST_SEED
from clipo_megatron.evaluation.comparing import Comparison, comparisons, refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import RESAMPLES
from clipo_megatron.evaluation.results import Evaluation, read_result
from clipo_megatron.evaluation.tables import comparison_table, lines_of
from clipo_megatron.runtime.durable_files import write_output

_MOST_RESAMPLES = 1_000_000  # beyond, an interval is no better and takes minutes
DESCRIPTION = """\
Two results of `clipo eval`, problem by problem: is B better than A, and could that be luck?

For each set that both have, and over all: pass@1 of each, B - A in points with its 95% interval (bootstrap over
problems), and the problems that only A or only B solves (more than half of the samples are correct). Where both took
one sample per problem, also the exact McNemar p, two-sided. Sets whose problems differ are refused.
"""
EXAMPLES = """\
examples:
  clipo compare runs/grpo/results/step_000084.json runs/clipo/results/step_000084.json
  clipo compare runs/mine/eval/step_000000.json runs/mine/eval/step_000084.json    before and after training
  clipo compare a.json b.json --set test_math --json difference.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A.json", type=Path, help="a result of `clipo eval`, or of a run's eval/")
    parser.add_argument("second", metavar="B.json", type=Path, help="another one, of the same problems")
    add_sets(parser)
    parser.add_argument(
        "--seed", metavar="N", type=whole(0, LARGEST_SEED), default=0, help="seed of the bootstrap; default 0"
    )
    parser.add_argument(
        "--resamples",
        metavar="N",
        type=whole(100, _MOST_RESAMPLES),
        default=RESAMPLES,
        help=f"bootstrap samples; default {RESAMPLES}",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")


def run(options: argparse.Namespace) -> int:
    """Print the comparison, and write it where --json says.

    Raises:
        EvaluationError: a file holds no result, or the problems differ.
    """
    first, second = read_result(options.first), read_result(options.second)
    refuse_other_problems(*(_with_sets(each, options.sets) for each in (first, second)), ("A", "B"))
    for source in sorted({*first.sources} ^ {*second.sources}) if not options.sets else ():
        print(f"{source} is in {'A' if source in first.sources else 'B'} alone, and is left out")
    shared = [each for each in first.sources if each in second.sources and (not options.sets or each in options.sets)]
    first, second = first.of(shared), second.of(shared)
    for letter, file, each in (("A", options.first, first), ("B", options.second, second)):
        print(f"{letter}  {file}: {_summary(each)}")
    if _sampling(first) != _sampling(second):
        print("They sampled differently: a part of the difference may come from that.")
    found = comparisons(first, second, resamples=options.resamples, seed=options.seed)
    print()
    print("\n".join(lines_of(comparison_table(found))))
    if options.json:
        facts = {"A": str(options.first), "B": str(options.second), "seed": options.seed,
                 "resamples": options.resamples, "comparisons": list(map(_as_json, found))}  # fmt: skip
        try:
            text = json.dumps(facts, indent=1)
            write_output(options.json, text, begins=text[:6])  # {"A":
        except OSError as error:
            raise EvaluationError(f"{options.json} cannot be written: {error}. Choose another file.") from error
    return 0


def _sampling(result: Evaluation) -> tuple[float, ...]:
    """The settings of sampling that decide how good answers are."""
    how = result.settings
    return how.samples, how.temperature, how.top_p, how.top_k, how.max_new_tokens


def _as_json(each: Comparison) -> dict[str, Any]:
    facts = {**asdict(each), "difference": each.difference}
    return facts if each.has_interval else {**facts, "low": None, "high": None}


def _with_sets(result: Evaluation, sets: Sequence[str]) -> Evaluation:
    for name in sets:
        if name not in result.sources:
            raise EvaluationError(f"there is no set {name!r} in one of the results; it has {', '.join(result.sources)}")
    return result.of(sets) if sets else result


def _summary(result: Evaluation) -> str:
    how = result.settings
    drawn = "greedy" if how.greedy else f"{how.samples} samples, temperature {how.temperature:g}, top-p {how.top_p:g}"
    return f"{result.checkpoint or result.model}, {result.step} steps; {drawn}, at most {how.max_new_tokens} tokens"
