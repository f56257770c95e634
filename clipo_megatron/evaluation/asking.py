"""Held-out problems answered by the engine and graded, over all ranks.

An answer that could not be graded counts as not solved: leaving it out would let a model gain by answers that hang the
grader. The share of such answers is part of every evaluation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch.distributed as dist

from clipo_megatron.config.schema import EvalConfig, RolloutConfig
from clipo_megatron.evaluation.results import Evaluation, EvaluationSettings, ProblemResult, digest_of, ks_of
from clipo_megatron.flow import Prompt, RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rewards.voting import answer_key
from clipo_megatron.rollout.engine import Engine, Request, SamplingParams, never
from clipo_megatron.rollout.generate_all import generate_all


def evaluate(
    engine: Engine | None,
    pool: GraderPool,
    prompts: Sequence[Prompt],
    mine: Sequence[int],
    params: SamplingParams,
    *,
    step: int,
    deadline_s: float,
    ks: Sequence[int] = (),
    resync: Callable[[], None] = lambda: None,
    should_cancel: Callable[[], bool] = never,
) -> Evaluation:
    """Answer and grade `prompts`, whose ids differ; collective.

    Args:
        engine: with the weights to evaluate; None on ranks that ask for nothing.
        pool: the graders.
        prompts: all problems, the same on every rank.
        mine: indices of those that this rank answers; the ranks' shares make up all.
        params: temperature 0 for greedy.
        step: recorded in the result.
        deadline_s: for this rank's generation.
        ks: for pass@k and maj@k; (): the usual ones.
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
    generate_all(engine, requests, params, take=take, resync=resync, deadline=deadline, should_cancel=should_cancel)
    counted = {scored.group.prompt.id: count(scored, pool) for scored in pool.collect()}
    shared: list = [None] * dist.get_world_size()
    dist.all_gather_object(shared, counted)
    settings = EvaluationSettings(
        params.samples,
        params.temperature,
        params.top_p,
        params.top_k,
        params.max_new_tokens,
        params.seed,
        ks_of(ks, params.samples),
    )
    return Evaluation(step, {name: each for part in shared for name, each in part.items()}, settings)


def count(scored: ScoredGroup, pool: GraderPool) -> ProblemResult:
    """The counts of one problem."""
    group, verdicts = scored.group, scored.verdicts
    prompt, mode = group.prompt, pool.mode_of(group.prompt.data_source)
    answers = Counter(
        answer_key(rollout.text, data_source=prompt.data_source, mode=mode)
        for rollout, verdict in zip(group.rollouts, verdicts, strict=True)
        if not verdict.correct
    )
    answers.pop(None, None)
    return ProblemResult(
        samples=len(verdicts),
        correct=sum(verdict.correct is True for verdict in verdicts),
        ungraded=sum(verdict.correct is None for verdict in verdicts),
        truncated=sum(rollout.finish == "length" for rollout in group.rollouts),
        tokens=sum(rollout.tokens.numel() for rollout in group.rollouts),
        votes=tuple(sorted(answers.values(), reverse=True)),
        digest=digest_of(prompt.messages, prompt.ground_truth),
    )


def evaluation_params(
    config: EvalConfig, rollout: RolloutConfig, stop_ids: tuple[int, ...], seed: int
) -> SamplingParams:
    """How evaluation samples; its own stream of random numbers, the same at every step."""
    return SamplingParams(
        samples=config.samples,
        max_new_tokens=config.max_new_tokens or rollout.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_ids=stop_ids,
        seed=seed,
        step=-1,
        exact_logprobs=False,
    )
