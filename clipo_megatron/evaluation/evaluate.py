"""Evaluates the engine's weights on held-out problems, over all ranks.

A response that could not be graded counts as wrong: if it were left out, a model could gain by responses that hang the
grader. The share of such responses is part of every evaluation.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch.distributed as dist

from clipo_megatron.config.schema import EvalConfig, RolloutConfig
from clipo_megatron.evaluation.results import Evaluation, EvaluationSettings, ProblemResult, digest_of, ks_of
from clipo_megatron.flow import Prompt, RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool, Grading, asked_by
from clipo_megatron.rewards.voting import answer_key
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.source import RolloutSource

log = logging.getLogger(__name__)


def evaluate(
    source: RolloutSource,
    graders: GraderPool,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    step: int,
    deadline_s: float,
    ks: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, wanted: None,
) -> Evaluation:
    """Generate and grade responses to all problems; collective, and the same result on every rank.

    Args:
        source: its engines have the weights to evaluate.
        graders: this rank's.
        prompts: all problems, the same on every rank; their ids differ.
        params: how to sample; temperature 0 is greedy.
        step: recorded in the result.
        deadline_s: time for this rank's generation.
        ks: the values of k of pass@k and maj@k; (): the powers of two.
        progress: called with this rank's numbers of responses that are there and that are wanted.

    Raises:
        Cancelled: on every rank, because the source of one cancelled.
    """

    requests = source.share([Request(index, prompt) for index, prompt in enumerate(prompts)])
    begun: list[Grading] = []

    def take(group: RolloutGroup) -> bool:
        begun.append(graders.grade(group))
        progress(len(begun) * params.samples, len(requests) * params.samples)
        return False

    source.generate_all(requests, params, take=take, deadline=time.monotonic() + deadline_s)
    graded = [each.result() for each in sorted(begun, key=lambda each: each.group.position)]
    reasons = [verdict.reason for scored in graded for verdict in scored.verdicts]
    if reasons and all(reasons):
        log.warning("none of %d responses could be graded: %s", len(reasons), reasons[0])
    mine = {scored.group.prompt.id: count(scored, graders) for scored in graded}
    results: list[dict[str, ProblemResult]] = [{}] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    settings = EvaluationSettings(
        params.samples,
        params.temperature,
        params.top_p,
        params.top_k,
        params.max_new_tokens,
        params.seed,
        ks_of(ks, params.samples),
    )
    found = {name: each for part in results for name, each in part.items()}
    return Evaluation(step, found, settings)


def count(scored: ScoredGroup, graders: GraderPool) -> ProblemResult:
    """Count the right, ungraded and truncated responses to one problem, and the votes for each wrong answer."""
    group, verdicts = scored.group, scored.verdicts
    prompt, mode = group.prompt, graders.mode_of(group.prompt.data_source)
    asked = asked_by(prompt)
    answers = Counter(
        answer_key(rollout.text, data_source=prompt.data_source, mode=mode, asked=asked)
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
    """How an evaluation samples: with the same random numbers at every step, which training does not use."""
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
