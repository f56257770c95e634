"""`clipo eval` and `clipo compare`: what they take, which run they mean, what `compare` prints. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipo_megatron.checks.run import source_name
from clipo_megatron.config.load import load
from clipo_megatron.config.model_folder import is_checkpoint, is_run_settings
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.evaluation.comparing import Comparison, comparisons, refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import RESAMPLES
from clipo_megatron.evaluation.results import Evaluation, read_result
from clipo_megatron.evaluation.tables import comparison_table, lines_of
from clipo_megatron.runtime.durable_files import write_durably

_SETTINGS = "config.json"  # of a run's output folder, and of a model
_CHECKPOINTS = "checkpoints"  # of a run's output folder
_YAML = (".yaml", ".yml")
_MOST_NAMED = 8  # checkpoints in a refusal
_SEEDS = 2**32
_EVAL = """\
How many held-out problems a model solves. TARGET is one of

  a configuration        the newest checkpoint in its train.output, or its model where there is none
  a run's output folder  its newest checkpoint, as the run was configured
  a checkpoint's folder  that one: runs/mine/checkpoints/step_000100

Each set of data.eval is asked at once, greedily or eval.samples times at eval.temperature, and reported by itself:
pass@1 with its standard error (problems are the unit), pass@k, maj@k, tokens of a response, responses cut at the length
limit, and responses that could not be graded. The result, problem by problem, is written to
train.output/results/step_<n>.json, or where --output says; `clipo compare` reads two of them. Other settings or sets
get a file beside it, step_<n>-2.json. Ranks are started as for `clipo train`; servers are those of `clipo serve`.
"""
_EVAL_EXAMPLES = """\
examples:
  clipo eval run.yaml                                     greedy, once
  clipo eval runs/mine/checkpoints/step_000100 --output step_100.json
  clipo eval runs/mine eval.samples=16 eval.temperature=0.6 eval.top_p=0.95
  clipo eval runs/mine --set test_math --set test_aime    two of its sets
  clipo eval runs/mine 'data.eval=[{path: other.parquet}]'
  clipo eval run.yaml model.path=models/Other train.output=runs/other    a model that was not trained here
"""
_COMPARE = """\
Two results of `clipo eval`, problem by problem: is B better than A, and could that be luck?

For each set that both have, and over all: pass@1 of each, B - A in points with its 95% interval (bootstrap over
problems), and the problems that only A or only B solves (more than half of the samples are correct). Where both took
one sample a problem, also the exact McNemar p, two-sided. Sets whose problems differ are refused.
"""
_COMPARE_EXAMPLES = """\
examples:
  clipo compare runs/grpo/results/step_000084.json runs/clipo/results/step_000084.json
  clipo compare runs/mine/eval/step_000000.json runs/mine/eval/step_000084.json    before and after training
  clipo compare a.json b.json --set test_math --json difference.json
"""


@dataclass(frozen=True)
class Target:
    """What is to be evaluated. `checkpoint` None: the newest of the run, or the model where there is none."""

    config: RunConfig
    checkpoint: Path | None


# ---------------------------------------------------------------- clipo eval


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `clipo eval`."""
    _teach(parser, _EVAL, _EVAL_EXAMPLES)
    parser.add_argument("config", metavar="TARGET", help="YAML file, a run's output folder, or a checkpoint's folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the run's")
    _add_sets(parser)
    parser.add_argument("--output", metavar="FILE", help="where the result goes; default: in train.output/results")


def words_of(options: argparse.Namespace) -> list[str]:
    """The arguments again, for the ranks that `clipo eval` starts."""
    sets = [word for name in options.sets for word in ("--set", name)]
    return [options.config, *options.overrides, *sets, *(["--output", options.output] if options.output else [])]


def find_target(options: argparse.Namespace) -> Target:
    """What the arguments of `clipo eval` mean.

    Raises:
        ConfigError: the configuration cannot be used.
        EvaluationError: the target is none, or there is nothing to evaluate on.
    """
    place = Path(options.config)
    checkpoint = place if is_checkpoint(place) else None
    _refuse_no_target(place)
    if options.output:
        _refuse_no_file(Path(options.output))
    if place.is_dir():
        folder = place if checkpoint is None else place.absolute().parent.parent
        config = load(_settings_of(folder, place), [f"train.output={json.dumps(str(folder))}", *options.overrides])
    else:
        config = load(place, options.overrides)
    if not config.data.eval:
        raise EvaluationError(
            "data.eval is empty, so there is nothing to evaluate on. Add a source: 'data.eval=[{path: test.parquet}]'."
        )
    if options.sets:
        config = replace(config, data=replace(config.data, eval=_chosen(config, options.sets)))
    return Target(config, checkpoint)


def _refuse_no_target(place: Path) -> None:
    """Say which checkpoints there are where a path means one, or all of them."""
    beside = place if place.is_dir() else place.parent
    names = sorted(path.name for path in beside.glob("step_*") if is_checkpoint(path))
    if place.name == _CHECKPOINTS and names:
        raise EvaluationError(
            f"{place} holds the checkpoints {_among(names)}. Give one of these, or {place.absolute().parent} for the "
            "newest."
        )
    if place.exists() or place.suffix in _YAML:
        return
    there = f"{beside} has {_among(names)}" if names else f"{beside} has no checkpoint"
    if beside.name == _CHECKPOINTS:
        raise EvaluationError(f"there is no checkpoint {place}: {there}. Choose one that is there.")
    raise EvaluationError(f"there is no {place}. Give a YAML file, a run's output folder, or a checkpoint's folder.")


def _among(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{names[0]} to {names[-1]}"


def _refuse_no_file(file: Path) -> None:
    """Before hours of answers: where their figures are to go must take them."""
    if file.is_dir():
        raise EvaluationError(f"--output {file} is a folder. Name a file, such as {file / 'result.json'}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"{file.parent} is not writable")
    except OSError as error:
        raise EvaluationError(f"--output {file} cannot be written: {error}. Choose another file.") from error


def _settings_of(folder: Path, target: Path) -> Path:
    """The resolved configuration in a run's output folder."""
    file = folder / _SETTINGS
    try:
        facts = json.loads(file.read_text())
        if not isinstance(facts, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        reason = f"there is no {file}, where a run keeps its configuration"
    except (OSError, ValueError) as error:
        reason = f"{file} cannot be read ({error})"
    else:
        if is_run_settings(facts):
            return file
        reason = f"{file} is a model's configuration, not a run's"
    raise EvaluationError(
        f"{target} is no run to evaluate: {reason}. Give a configuration file, with model.path={target} if that is the "
        "model to evaluate."
    )


def _chosen(config: RunConfig, names: Sequence[str]) -> list[Any]:
    known = {source_name(source): source for source in config.data.eval}
    for name in names:
        if name not in known:
            raise EvaluationError(f"data.eval has no set {name!r}; it has {', '.join(known)}. Choose among these.")
    return [known[name] for name in dict.fromkeys(names)]


# ---------------------------------------------------------------- clipo compare


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `clipo compare`."""
    _teach(parser, _COMPARE, _COMPARE_EXAMPLES)
    parser.add_argument("first", metavar="A.json", type=Path, help="a result of `clipo eval`, or of a run's eval/")
    parser.add_argument("second", metavar="B.json", type=Path, help="another one, of the same problems")
    _add_sets(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default 0")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap; default {RESAMPLES}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    parser.set_defaults(run=compare_command)


def compare_command(options: argparse.Namespace) -> int:
    """Print the comparison.

    Raises:
        EvaluationError: a file holds no result, or the problems differ.
    """
    if not 0 <= options.seed < _SEEDS:
        raise EvaluationError(f"--seed {options.seed}: a seed is between 0 and {_SEEDS - 1}")
    if options.resamples < 100:
        raise EvaluationError(f"--resamples {options.resamples}: an interval needs 100 or more; 10000 are usual")
    first, second = read_result(options.first), read_result(options.second)
    refuse_other_problems(*(_with_sets(each, options.sets) for each in (first, second)), ("A", "B"))
    for source in sorted({*first.sources} ^ {*second.sources}) if not options.sets else ():
        print(f"{source} is in {'A' if source in first.sources else 'B'} alone, and is left out")
    shared = [each for each in first.sources if each in second.sources and (not options.sets or each in options.sets)]
    first, second = first.of(shared), second.of(shared)
    for letter, file, each in (("A", options.first, first), ("B", options.second, second)):
        print(f"{letter}  {file}: {_spoken(each)}")
    if _sampling(first) != _sampling(second):
        print("They sampled differently: a part of the difference may come from that.")
    found = comparisons(first, second, resamples=options.resamples, seed=options.seed)
    print()
    print("\n".join(lines_of(comparison_table(found))))
    if options.json:
        facts = {"A": str(options.first), "B": str(options.second), "seed": options.seed,
                 "resamples": options.resamples, "comparisons": list(map(_as_json, found))}  # fmt: skip
        try:
            write_durably(options.json, json.dumps(facts, indent=1))
        except OSError as error:
            raise EvaluationError(f"{options.json} cannot be written: {error}. Choose another file.") from error
    return 0


def _sampling(result: Evaluation) -> tuple[float, ...]:
    """What decides how good answers are; not the seed of the draws, nor for which k figures are given."""
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


def _spoken(result: Evaluation) -> str:
    how = result.settings
    drawn = "greedy" if how.greedy else f"{how.samples} samples, temperature {how.temperature:g}, top-p {how.top_p:g}"
    return f"{result.checkpoint or result.model}, {result.step} steps; {drawn}, at most {how.max_new_tokens} tokens"


def _add_sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="NAME", help="this set alone; may be repeated"
    )


def _teach(parser: argparse.ArgumentParser, description: str, examples: str) -> None:
    parser.description, parser.epilog = description, examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
