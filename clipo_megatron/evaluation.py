"""Accuracy on held-out problems, problem by problem, so that two evaluations can be compared pairwise.

An answer that could not be graded counts as not solved: leaving it out would let a model gain by answers that hang the
grader. The share of such answers is part of every evaluation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch.distributed as dist

from clipo_megatron.config.schema import EvalConfig, RolloutConfig
from clipo_megatron.data.sources import source_of
from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.asking import ask
from clipo_megatron.rollout.engine import Engine, Request, SamplingParams, never


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation, identical on every rank."""

    step: int
    correct: dict[str, float]  # problem id -> share of its samples that are correct; ungraded ones are not
    truncated: float  # share of responses cut at the length limit
    ungraded: float  # share of responses without a verdict, counted as not solved
    length: float  # mean response tokens

    @property
    def accuracy(self) -> float:
        """Mean over problems; 0 without any."""
        return sum(self.correct.values()) / max(len(self.correct), 1)

    def by_source(self) -> dict[str, float]:
        """Accuracy of each source of problems."""
        groups: dict[str, list[float]] = {}
        for name, value in self.correct.items():
            groups.setdefault(source_of(name), []).append(value)
        return {source: sum(values) / len(values) for source, values in groups.items()}


def evaluate(
    engine: Engine,
    pool: GraderPool,
    prompts: Sequence[Prompt],
    mine: Sequence[int],
    params: SamplingParams,
    *,
    step: int,
    deadline_s: float,
    recover: Callable[[], None] = lambda: None,
    give_up: Callable[[], bool] = never,
) -> Evaluation:
    """Answer and grade `prompts`, whose ids differ; collective.

    Args:
        engine: with the weights to evaluate.
        pool: the graders.
        prompts: all problems, the same on every rank.
        mine: indices of those that this rank answers; the ranks' shares make up all.
        params: temperature 0 for greedy.
        step: recorded in the result.
        deadline_s: for this rank's generation.
        recover: collective; gives an engine that was lost and came back the current weights.
        give_up: whether this rank is to generate no longer.

    Raises:
        Abandoned: on every rank, because a rank gave up.
    """

    def take(group: RolloutGroup) -> bool:
        pool.submit(group)
        return False

    requests = [Request(index, prompts[index]) for index in mine]
    deadline = time.monotonic() + deadline_s
    ask(engine, requests, params, take=take, recover=recover, deadline=deadline, give_up=give_up)
    rows = [
        (
            scored.group.prompt.id,
            [verdict.correct for verdict in scored.verdicts],
            [rollout.finish == "length" for rollout in scored.group.rollouts],
            [rollout.tokens.numel() for rollout in scored.group.rollouts],
        )
        for scored in pool.collect()
    ]
    shared: list = [None] * dist.get_world_size()
    dist.all_gather_object(shared, rows)
    everything = sorted((row for part in shared for row in part), key=lambda row: row[0])
    verdicts = [verdict for _, each, _, _ in everything for verdict in each]
    cut = [flag for _, _, flags, _ in everything for flag in flags]
    lengths = [length for _, _, _, each in everything for length in each]
    count = max(len(verdicts), 1)
    return Evaluation(
        step=step,
        correct={name: sum(v is True for v in each) / max(len(each), 1) for name, each, _, _ in everything},
        truncated=sum(cut) / count,
        ungraded=sum(verdict is None for verdict in verdicts) / count,
        length=sum(lengths) / count,
    )


def evaluation_params(
    config: EvalConfig, rollout: RolloutConfig, stop_ids: tuple[int, ...], seed: int
) -> SamplingParams:
    """How evaluation samples; its own stream of random numbers, the same at every step."""
    return SamplingParams(
        samples=config.samples,
        max_new_tokens=config.max_new_tokens or rollout.max_new_tokens,
        temperature=config.temperature,
        top_p=1.0,
        stop_ids=stop_ids,
        seed=seed,
        step=-1,
    )


def write_evaluation(folder: Path, result: Evaluation) -> None:
    """Keep a result as step_<n>.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**asdict(result), "accuracy": result.accuracy, "by_source": result.by_source()}
    file = folder / f"step_{result.step:06d}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1))
    os.replace(temporary, file)


def read_evaluations(folder: Path) -> list[Evaluation]:
    """All results of a run, by step."""
    facts = [json.loads(file.read_text()) for file in folder.glob("step_*.json")]
    found = [Evaluation(**{field.name: each[field.name] for field in fields(Evaluation)}) for each in facts]
    return sorted(found, key=lambda each: each.step)


def remove_evaluations(folder: Path, *, after: int) -> None:
    """Remove the results of steps that a resumed run does anew."""
    for each in read_evaluations(folder):
        if each.step > after:
            (folder / f"step_{each.step:06d}.json").unlink()


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, paired over the problems that both answered."""

    problems: int
    before: float  # mean accuracy on these problems
    after: float
    gained: int  # not solved before, solved after
    lost: int
    p_value: float  # exact McNemar test, two-sided: could gains and losses be a fair coin?


def compare(before: Evaluation, after: Evaluation, *, source: str | None = None) -> Comparison:
    """Pair two evaluations by problem; a problem counts as solved when more than half of its samples are correct.

    With `source`, the problems of that source alone.
    """
    names = sorted(before.correct.keys() & after.correct.keys())
    names = [name for name in names if source is None or source_of(name) == source]
    first = [before.correct[name] > 0.5 for name in names]
    second = [after.correct[name] > 0.5 for name in names]
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    means = [sum(each.correct[name] for name in names) / max(len(names), 1) for each in (before, after)]
    return Comparison(len(names), *means, gained, lost, mcnemar_p_value(gained, lost))


def comparison_table(before: Evaluation, after: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people: a row a source, and one for all where there are several."""
    sources = sorted({source_of(name) for name in before.correct.keys() & after.correct.keys()})
    rows = []
    for source in [*sources, *([None] if len(sources) > 1 else [])]:
        paired = compare(before, after, source=source)
        rows.append(
            [
                source or "all",
                str(paired.problems),
                f"{paired.before:.1%}",
                f"{paired.after:.1%}",
                f"{100 * (paired.after - paired.before):+.1f}",
                str(paired.gained),
                str(paired.lost),
                f"{paired.p_value:.2g}",
            ]
        )
    return ["source", "problems", "before", "after", "points", "gained", "lost", "p"], rows


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: 2 * P(Binomial(gained + lost, 1/2) <= min), at most 1. McNemar, 1947."""
    trials = gained + lost
    if trials == 0:
        return 1.0
    tail = ways = 1  # of k = 0 heads; whole numbers, so that nothing is lost far out
    for k in range(min(gained, lost)):
        ways = ways * (trials - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**trials)
