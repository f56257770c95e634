"""`clipo eval`: finds the run and checkpoint that are meant, and evaluates them. Imports torch only to evaluate."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.cli.ranks import on_ranks
from clipo_megatron.config.load import load
from clipo_megatron.config.model_folder import is_checkpoint, is_run_settings, read_object
from clipo_megatron.config.schema import RunConfig, SourceConfig
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.runtime.durable_files import refuse_special
from clipo_megatron.runtime.run_dir import CHECKPOINTS, SETTINGS, STEP_NAMES

_YAML = (".yaml", ".yml")
_MOST_NAMED = 8  # checkpoints that an error message lists
DESCRIPTION = """\
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
EXAMPLES = """\
examples:
  clipo eval run.yaml                                     greedy, once
  clipo eval runs/mine/checkpoints/step_000100 --output step_100.json
  clipo eval runs/mine eval.samples=16 eval.temperature=0.6 eval.top_p=0.95
  clipo eval runs/mine --set test_math --set test_aime    two of its sets
  clipo eval runs/mine 'data.eval=[{path: other.parquet}]'
  clipo eval run.yaml model.path=models/Other train.output=runs/other    a model that was not trained here
"""


@dataclass(frozen=True)
class Target:
    """What is to be evaluated. Without a checkpoint it is the newest of the run, or else the run's model."""

    config: RunConfig
    checkpoint: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "YAML file, a run's output folder, or a checkpoint's folder"
    add_config(parser, "TARGET", what=what, over="the run's")
    add_sets(parser)
    parser.add_argument("--output", metavar="FILE", help="where the result goes; default: in train.output/results")


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Give a parser --set, whose values are `options.sets`."""
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="NAME", help="only this set; may be repeated"
    )


def run(options: argparse.Namespace) -> int:
    from clipo_megatron.checks.run import check
    from clipo_megatron.runtime import launcher_env

    place = launcher_env.this_process()
    options.is_reported_by_another = launcher_env.is_reported_by_another()
    target = find_target(options)
    check(target.config, ranks=place.world if place else None, trains=False)

    def work() -> None:
        from clipo_megatron.training.eval_run import evaluate_run

        file = Path(options.output) if options.output else None
        evaluate_run(target.config, checkpoint=target.checkpoint, file=file)

    return on_ranks(options, target.config, place, work, ["eval", *words_of(options)], restarts=0)


def words_of(options: argparse.Namespace) -> list[str]:
    """The parsed arguments as a command line again, for the ranks that `clipo eval` starts."""
    sets = [word for name in options.sets for word in ("--set", name)]
    return [options.config, *options.overrides, *sets, *(["--output", options.output] if options.output else [])]


def find_target(options: argparse.Namespace) -> Target:
    """The configuration and the checkpoint that the arguments mean.

    Raises:
        ConfigError: the configuration cannot be used.
        EvaluationError: TARGET cannot be evaluated, or there are no problems to evaluate on.
    """
    place = Path(options.config)
    _refuse_no_target(place)
    checkpoint = place if is_checkpoint(place) else None
    if options.output:
        _refuse_no_file(Path(options.output))
    if place.is_dir():
        folder = place if checkpoint is None else place.absolute().parent.parent
        here = f"train.output={json.dumps(str(folder))}"
        config = load(_settings_of(folder, place), [here, *options.overrides], resolved=True)
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
    """Refuse a path that does not exist or holds several checkpoints; the message names those there are."""
    try:
        place.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, a folder that nobody may enter
        raise EvaluationError(f"{place} cannot be read: {error.strerror}. Give another TARGET.") from error
    beside = place if place.is_dir() else place.parent
    names = sorted(path.name for path in beside.glob(STEP_NAMES) if is_checkpoint(path))
    if place.name == CHECKPOINTS and names:
        raise EvaluationError(
            f"{place} holds the checkpoints {_among(names)}. Give one of these, or {place.absolute().parent} for the "
            "newest."
        )
    if place.exists() or place.suffix in _YAML:
        return
    there = f"{beside} has {_among(names)}" if names else f"{beside} has no checkpoint"
    if beside.name == CHECKPOINTS:
        raise EvaluationError(f"there is no checkpoint {place}: {there}. Choose one that is there.")
    raise EvaluationError(f"there is no {place}. Give a YAML file, a run's output folder, or a checkpoint's folder.")


def _among(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{names[0]} to {names[-1]}"


def _refuse_no_file(file: Path) -> None:
    """Refuse a result file that cannot be written, before hours of generation."""
    from clipo_megatron.evaluation.results import BEGINS

    try:
        if file.is_dir():
            raise EvaluationError(f"--output {file} is a folder. Name a file, such as {file / 'result.json'}.")
        refuse_special(file, BEGINS)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"{file.parent} is not writable")
    except OSError as error:
        raise EvaluationError(f"--output {file} cannot be written: {error}. Choose another file.") from error


def _settings_of(folder: Path, target: Path) -> Path:
    """The file with the resolved configuration in a run's output folder.

    Raises:
        EvaluationError: there is none, or it is a model's.
    """
    file = folder / SETTINGS
    try:
        facts = read_object(file)
    except FileNotFoundError:
        reason = f"there is no {file}, where a run keeps its configuration"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        if is_run_settings(facts):
            return file
        reason = f"{file} is a model's configuration, not a run's"
    raise EvaluationError(
        f"{target} is no run to evaluate: {reason}. Give a configuration file, with model.path={target} if that is the "
        "model to evaluate."
    )


def _chosen(config: RunConfig, names: Sequence[str]) -> list[SourceConfig]:

    known = {source.label: source for source in config.data.eval}
    for name in names:
        if name not in known:
            raise EvaluationError(f"data.eval has no set {name!r}; it has {', '.join(known)}. Choose among these.")
    return [known[name] for name in dict.fromkeys(names)]
