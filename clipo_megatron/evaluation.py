"""Accuracy on held-out problems, problem by problem, so that two evaluations can be compared pairwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch.distributed as dist

from clipo_megatron.config.schema import EvalConfig, RolloutConfig
from clipo_megatron.flow import Prompt
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Engine, SamplingParams


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation, identical on every rank."""

    step: int
    correct: dict[str, float]  # problem id -> share of its graded samples that are correct
    truncated: float  # share of responses cut at the length limit
    ungraded: float  # share of responses without a verdict
    length: float  # mean response tokens

    @property
    def accuracy(self) -> float:
        """Mean over problems; 0 without any."""
        return sum(self.correct.values()) / max(len(self.correct), 1)

    def by_source(self) -> dict[str, float]:
        """Accuracy of each source of problems."""
        groups: dict[str, list[float]] = {}
        for name, value in self.correct.items():
            groups.setdefault(name.rsplit("/", 1)[0], []).append(value)
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
) -> Evaluation:
    """Answer and grade `prompts`; collective.

    Args:
        engine: with the weights to evaluate.
        pool: the graders.
        prompts: all problems, the same on every rank.
        mine: indices of those that this rank answers; the ranks' shares make up all.
        params: temperature 0 for greedy.
        step: recorded in the result.
        deadline_s: for this rank's generation.
    """
    for group in engine.generate([(index, prompts[index]) for index in mine], params, deadline_s=deadline_s):
        pool.submit(group)
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
        correct={name: _share([v for v in each if v is not None]) for name, each, _, _ in everything},
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


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same problems, paired."""

    problems: int
    before: float
    after: float
    gained: int  # wrong before, right after
    lost: int
    p_value: float  # exact McNemar test, two-sided: could gains and losses be a fair coin?


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Pair two evaluations by problem; a problem counts as solved when more than half of its samples are correct."""
    names = sorted(before.correct.keys() & after.correct.keys())
    first = [before.correct[name] > 0.5 for name in names]
    second = [after.correct[name] > 0.5 for name in names]
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return Comparison(len(names), before.accuracy, after.accuracy, gained, lost, mcnemar_p_value(gained, lost))


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: 2 * P(Binomial(gained + lost, 1/2) <= min), at most 1. McNemar, 1947."""
    trials = gained + lost
    if trials == 0:
        return 1.0
    tail = sum(comb(trials, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**trials)


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 0.0
