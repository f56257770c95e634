"""A policy with the engine that generates with its weights: what training and `clipo eval` share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Generic, TypeVar

from clipo_megatron.evaluation.evaluate import evaluate, evaluation_params
from clipo_megatron.evaluation.results import Evaluation
from clipo_megatron.policy.policy import Policy
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.source import RolloutSource
from clipo_megatron.training.engine_factory import build_engine, build_sync, rollout_ranks
from clipo_megatron.training.session import Session

P = TypeVar("P", bound=Policy)


class PolicyEngine(Generic[P]):
    """The engine, the graders, the policy, and the weight sync between policy and engine; constructed collectively.

    The engine is built first, because colocated servers give the policy room on their GPUs. It has no weights before
    the first `update_weights`.

    Args:
        session: this rank's session.
        build_policy: called once the engine exists.
    """

    def __init__(self, session: Session, build_policy: Callable[[], P]):
        config = session.config
        self.session = session
        with ExitStack() as opened:  # closes what was opened if something later fails
            self.engine = build_engine(config, session.layout, session.tokenizer, session.reporter.say)
            if self.engine is not None:
                opened.callback(self.engine.close)
            self.graders = GraderPool(config.reward)
            opened.callback(self.graders.close)
            self.policy = build_policy()
            self._sync = build_sync(config, self.policy, self.engine)
            opened.callback(self._sync.close)
            self._opened = opened.pop_all()
        ranks = rollout_ranks(config, session.layout)
        self.source = RolloutSource(self.engine, ranks, self.resync, session.stop.should_cancel)
        self._version = -1  # of the engine's weights

    def update_weights(self, version: int) -> dict[str, float]:
        """Give the engine the policy's weights, and return metrics of that; collective."""
        self._version = version
        report = self._sync.update_weights(version)
        return report.metrics if report else {}

    def resync(self) -> None:
        """Give the current weights to engines that came back; collective."""
        self.update_weights(self._version)

    def offload(self) -> None:
        """Let colocated servers give their GPU memory to training, until the next update of weights; collective."""
        self._sync.offload()

    def evaluate(self, step: int) -> Evaluation:
        """Answer the held-out problems with the engine's weights; collective.

        Raises:
            Cancelled: on every rank, because the run is to end and the answers took too long.
        """
        session, config = self.session, self.session.config
        session.heartbeat.phase("evaluate")
        seed = config.train.seed if config.eval.seed is None else config.eval.seed
        result = evaluate(
            self.source,
            self.graders,
            session.eval_prompts,
            evaluation_params(config.eval, config.rollout, session.stop_ids, seed),
            step=step,
            deadline_s=config.rollout.deadline_s,
            ks=config.eval.ks,
            progress=session.reporter.progress.answers,
        )
        left_out = dict(session.held_out.too_long_by_source) if session.held_out is not None else {}
        return replace(result, model=config.model.path, left_out=left_out)

    def close(self) -> None:
        """Close the sync, the graders and the engine; calling it again does nothing."""
        self._opened.close()
