"""Results of an evaluation: the counts of each problem, figures of each set, and the file format. Imports no torch.

The file is JSON, schema 1:

    schema       1
    step         training steps behind the weights
    model        model.path of the run; `checkpoint`: the folder that was evaluated, "" for the policy in training
    settings     samples, temperature, top_p, top_k, max_new_tokens, seed, ks
    accuracy     pass@1 over all problems; `by_source`: that of each set; truncated, ungraded, length of responses
    all          figures of all problems: problems, samples, pass@1, pass@1 error, pass@k and maj@k by k, length,
                 truncated, ungraded
    sets         the same figures of each set; `mean of sets`: pass@1 and its error, every set weighing the same
    left_out     problems of each set that were not asked, because their prompts exceed data.max_prompt_tokens
    problems     by id, "<set>/<row>": samples, correct, ungraded, truncated, tokens, votes, digest

The figures are for people and scripts; reading the file computes them again from `problems`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from clipo_megatron.config.ranges import LARGEST_WHOLE
from clipo_megatron.data.sources import source_of
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import majority_at, mean_and_error, pass_at_k, usual_ks
from clipo_megatron.runtime.durable_files import text_of, write_output
from clipo_megatron.runtime.run_dir import STEP_NAMES, step_name

SCHEMA = 1
BEGINS = '{\n "schema":'  # how the text of a result begins


@dataclass(frozen=True)
class EvaluationSettings:
    """How the responses were sampled. `ks`, each at most `samples`, is for pass@k and maj@k."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0
    ks: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Raise ValueError for a value of the wrong type or range."""
        _counts("settings", self, least={"samples": 1, "top_k": 0, "max_new_tokens": 1, "seed": 0})
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"settings have {name} = {value!r}")
        if not all(_is_count(k, 1) for k in self.ks):
            raise ValueError(f"settings have ks = {self.ks!r}")

    @property
    def greedy(self) -> bool:
        """Whether there is one deterministic response to each problem."""
        return self.samples == 1 and self.temperature == 0


@dataclass(frozen=True)
class ProblemResult:
    """Counts of the responses to one problem. Those that are neither correct nor in `votes` gave no answer."""

    samples: int
    correct: int
    ungraded: int = 0  # without a verdict; they count as wrong
    truncated: int = 0  # cut at the length limit
    tokens: int = 0  # in all responses
    votes: tuple[int, ...] = ()  # for each wrong answer, how many responses agree on it; descending
    digest: str = ""  # hash of question and ground truth, by which two files recognise the same problem

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no responses can have."""
        _counts("a problem", self, least={"samples": 1, "correct": 0, "ungraded": 0, "truncated": 0, "tokens": 0})
        if not all(_is_count(size, 1) for size in self.votes):
            raise ValueError(f"a problem has votes = {self.votes!r}")
        counted = max(self.correct + sum(self.votes), self.correct + self.ungraded, self.truncated)
        if counted > self.samples:
            raise ValueError(
                f"a problem has {self.correct} correct, {self.ungraded} ungraded and {self.truncated} cut responses "
                f"and votes {self.votes!r} of {self.samples} samples"
            )

    @property
    def share(self) -> float:
        """The share of correct samples."""
        return self.correct / max(self.samples, 1)


@dataclass(frozen=True)
class Figures:
    """Accuracy and other figures of a set of problems."""

    problems: int
    samples: int  # per problem
    accuracy: float  # pass@1: the mean over problems
    error: float | None  # standard error of the accuracy over problems
    pass_at: Mapping[int, float]
    majority_at: Mapping[int, float]
    length: float  # mean response tokens
    truncated: float  # share of responses cut at the length limit
    ungraded: float  # share of responses without a verdict, which count as wrong


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    step: int
    problems: Mapping[str, ProblemResult]
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    model: str = ""
    checkpoint: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)  # by set: problems whose prompts are too long

    @cached_property
    def correct(self) -> dict[str, float]:
        """The share of correct samples by problem id; ungraded ones count as wrong."""
        return {name: each.share for name, each in self.problems.items()}

    @cached_property
    def sources(self) -> list[str]:
        """The names of the sets, sorted."""
        return sorted({source_of(name) for name in self.problems})

    @property
    def accuracy(self) -> float:
        """pass@1: the mean over problems; 0 without problems."""
        return self.figures().accuracy

    @property
    def truncated(self) -> float:
        """The share of responses cut at the length limit."""
        return self.figures().truncated

    @property
    def ungraded(self) -> float:
        """The share of responses without a verdict, which count as wrong."""
        return self.figures().ungraded

    @property
    def length(self) -> float:
        """The mean number of response tokens."""
        return self.figures().length

    def by_source(self) -> dict[str, float]:
        """The accuracy of each set."""
        return {source: self.figures(source).accuracy for source in self.sources}

    @property
    def mean_of_sets(self) -> tuple[float, float | None]:
        """The mean of the sets' accuracies and its standard error; the error is None if a set has none."""
        found = [self.figures(source) for source in self.sources]
        count = max(len(found), 1)
        errors = [each.error for each in found]
        error = None if None in errors or not errors else math.hypot(*errors) / count
        return sum(each.accuracy for each in found) / count, error

    def of(self, sources: Sequence[str]) -> Evaluation:
        """This evaluation restricted to some sets."""
        kept = {name: each for name, each in self.problems.items() if source_of(name) in sources}
        left_out = {source: count for source, count in self.left_out.items() if source in sources}
        return Evaluation(self.step, kept, self.settings, self.model, self.checkpoint, left_out)

    def figures(self, source: str | None = None) -> Figures:
        """The figures of one set, or of all problems."""
        return self._figures[source]

    @cached_property
    def _figures(self) -> dict[str | None, Figures]:
        by_source: dict[str | None, list[ProblemResult]] = {None: list(self.problems.values())}
        for name, each in self.problems.items():
            by_source.setdefault(source_of(name), []).append(each)
        return {source: figures_of(found, self.settings.ks) for source, found in by_source.items()}


def figures_of(problems: Sequence[ProblemResult], ks: Sequence[int]) -> Figures:
    """Compute the figures of problems; a k that exceeds the samples of any problem is left out."""
    least = min((each.samples for each in problems), default=0)
    ks = [k for k in ks if k <= least]
    accuracy, error = mean_and_error([each.share for each in problems])
    passed = {k: [pass_at_k(each.samples, each.correct, k) for each in problems] for k in ks}
    votes = [majority_at(each.samples, each.correct, each.votes, tuple(ks)) for each in problems]
    responses = max(sum(each.samples for each in problems), 1)
    return Figures(
        problems=len(problems),
        samples=least,
        accuracy=accuracy,
        error=error,
        pass_at={k: math.fsum(found) / len(found) for k, found in passed.items()},
        majority_at={k: math.fsum(each[k] for each in votes) / len(votes) for k in ks},
        length=sum(each.tokens for each in problems) / responses,
        truncated=sum(each.truncated for each in problems) / responses,
        ungraded=sum(each.ungraded for each in problems) / responses,
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_WHOLE


def _counts(what: str, of: Any, *, least: Mapping[str, int]) -> None:
    for name, lowest in least.items():
        if not _is_count(value := getattr(of, name), lowest):
            raise ValueError(f"{what} has {name} = {value!r}")


def digest_of(messages: Sequence[Mapping[str, str]], ground_truth: str) -> str:
    """A hash of turns and ground truth, sixteen hexadecimal digits."""
    text = json.dumps([[[turn["role"], turn["content"]] for turn in messages], ground_truth])
    return blake2b(text.encode(), digest_size=8).hexdigest()


def ks_of(wanted: Sequence[int], samples: int) -> tuple[int, ...]:
    """The values of k: those of `eval.ks`, or the default ones."""
    return tuple(sorted(set(wanted))) if wanted else usual_ks(samples)


# ---------------------------------------------------------------- files


def as_json(result: Evaluation) -> dict[str, Any]:
    """The content of the file, as the module describes it."""
    return {
        "schema": SCHEMA,
        "step": result.step,
        "model": result.model,
        "checkpoint": result.checkpoint,
        "settings": {**asdict(result.settings), "ks": list(result.settings.ks)},
        "accuracy": result.accuracy,
        "by_source": result.by_source(),
        "truncated": result.truncated,
        "ungraded": result.ungraded,
        "length": result.length,
        "all": _spelled(result.figures()),
        "sets": {source: _spelled(result.figures(source)) for source in result.sources},
        "mean of sets": dict(zip(("pass@1", "pass@1 error"), result.mean_of_sets, strict=True)),
        "left_out": dict(result.left_out),
        "problems": {name: {**asdict(each), "votes": list(each.votes)} for name, each in result.problems.items()},
    }


def _spelled(figures: Figures) -> dict[str, Any]:
    return {
        "problems": figures.problems,
        "samples": figures.samples,
        "pass@1": figures.accuracy,
        "pass@1 error": figures.error,
        "pass@k": {str(k): value for k, value in figures.pass_at.items()},
        "maj@k": {str(k): value for k, value in figures.majority_at.items()},
        "length": figures.length,
        "truncated": figures.truncated,
        "ungraded": figures.ungraded,
    }


def write_result(file: Path, result: Evaluation) -> None:
    """Write a result completely or not at all.

    Raises:
        EvaluationError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_output(file, json.dumps(as_json(result), indent=1))
    except OSError as error:
        raise EvaluationError(f"{file} cannot be written: {error}. Choose another file with --output.") from error


def read_result(file: Path) -> Evaluation:
    """Inverse of `write_result`.

    Raises:
        EvaluationError: the file cannot be read, has another schema, or is damaged.
    """
    try:
        facts = json.loads(text_of(file))
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be read: {error.strerror or error}. Give a result of `clipo eval`."
        ) from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{file} is no JSON: {error}. Give a result of `clipo eval`.") from None
    if not isinstance(facts, dict) or "schema" not in facts:
        raise EvaluationError(f"{file} is no result of an evaluation. Give one that `clipo eval` wrote.")
    if facts["schema"] != SCHEMA:
        raise EvaluationError(
            f"{file} holds a result of schema {facts['schema']!r}, and this version reads {SCHEMA}. Evaluate again."
        )
    try:
        settings = EvaluationSettings(**{**facts["settings"], "ks": tuple(facts["settings"]["ks"])})
        problems = {
            name: ProblemResult(**{**each, "votes": tuple(each["votes"])}) for name, each in facts["problems"].items()
        }
        if not _is_count(facts["step"], 0):
            raise ValueError(f"step is {facts['step']!r}")
        left_out = {str(name): int(count) for name, count in facts.get("left_out", {}).items()}
        return Evaluation(facts["step"], problems, settings, str(facts["model"]), str(facts["checkpoint"]), left_out)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EvaluationError(f"{file} is damaged ({error}). Evaluate again.") from None


def free_name(folder: Path, result: Evaluation) -> Path:
    """The file for a result of `clipo eval`: step_<n>.json, or step_<n>-2.json and so on if that holds another result.

    An earlier result of the same model, settings and problems may be overwritten.
    """
    name = step_name(result.step)
    file, number = folder / f"{name}.json", 1
    while file.exists() and not _holds(file, result):
        number += 1
        file = folder / f"{name}-{number}.json"
    return file


def _holds(file: Path, result: Evaluation) -> bool:
    try:
        return _identity(read_result(file)) == _identity(result)
    except EvaluationError:
        return False


def _identity(result: Evaluation) -> tuple[Any, ...]:
    return result.step, result.model, result.settings, {name: each.digest for name, each in result.problems.items()}


def write_evaluation(folder: Path, result: Evaluation) -> None:
    """Write a result of training to step_<n>.json."""
    write_result(folder / f"{step_name(result.step)}.json", result)


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Read all results of training, by step; files of another schema are left out."""
    found = []
    for file in folder.glob(f"{STEP_NAMES}.json"):
        try:
            found.append(read_result(file))
        except EvaluationError:
            continue
    return sorted(found, key=lambda each: each.step)


def remove_evaluations(folder: Path, *, after: int) -> None:
    """Remove the results of steps after `after`, which a resumed run repeats."""
    for file in folder.glob(f"{STEP_NAMES}.json"):
        step = file.stem.removeprefix("step_")
        if step.isdigit() and int(step) > after:
            file.unlink()
