"""An algorithm: its stages, run in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.base import Signal, Stage, TokenBatch
from clipo_megatron.algorithms.clipo.stage import Clipo
from clipo_megatron.algorithms.correction import OffPolicyCorrection
from clipo_megatron.algorithms.grpo import GRPO, ClippedPolicyLoss, DrGRPO
from clipo_megatron.algorithms.kl import EntropyBonus, KLLoss, KLReward
from clipo_megatron.config.schema import Aggregation, AlgorithmName, CorrectionKind, KLPlace, RunConfig
from clipo_megatron.flow import RolloutTable


class Algorithm:
    """Runs the stages of one step. All methods but `loss`, with the importance weights in it, see the whole step and
    give the same on every rank."""

    def __init__(self, stages: Sequence[Stage]):
        self.stages = list(stages)

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that some stage reads."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    def stage(self, kind: type[Stage]) -> Stage | None:
        """The first stage of a class, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    @property
    def learns_without_advantage(self) -> bool:
        """Whether rollouts with advantage 0 have a gradient."""
        return any(stage.learns_without_advantage for stage in self.stages)

    @property
    def policy_learns(self) -> bool:
        """Whether the policy is updated in the next step."""
        return not any(stage.holds_policy for stage in self.stages)

    @property
    def last_bonus(self) -> Tensor | None:
        """[B] float32, what the contrastive losses paid in this step; None without CLIPO."""
        clipo = self.stage(Clipo)
        return clipo.last_bonus if isinstance(clipo, Clipo) else None

    def select(self, table: RolloutTable) -> Tensor:
        """Rows that train, [B] bool: graded, and wanted by every stage."""
        keep = table.graded.clone()
        for stage in self.stages:
            if (chosen := stage.select(table)) is not None:
                keep &= chosen
        return keep

    def shape_reward(self, table: RolloutTable) -> Tensor:
        """The grader's rewards, shaped by each stage in turn; [B] float32."""
        reward = table.reward
        for stage in self.stages:
            reward = stage.shape_reward(table, reward)
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        return self._the_only("advantage", [stage.advantage(table, reward) for stage in self.stages])

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """Weight of each response token of the mini-batch `rows`, [B] float32."""
        return self._the_only("token_weight", [stage.token_weight(table, rows) for stage in self.stages])

    def loss(self, tokens: TokenBatch) -> Tensor:
        """Per-token loss, [N] float32."""
        factors = [factor for stage in self.stages if (factor := stage.importance(tokens)) is not None]
        tokens.importance = torch.stack(factors).prod(0) if factors else None
        terms = [term for stage in self.stages if (term := stage.loss(tokens)) is not None]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def after_update(self, table: RolloutTable) -> None:
        """Let every stage move its state on."""
        for stage in self.stages:
            stage.after_update(table)

    def state_dict(self) -> dict[str, Any]:
        """State of every stage, by its place and class."""
        return {f"{index}.{type(stage).__name__}": stage.state_dict() for index, stage in enumerate(self.stages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: the checkpoint is of another algorithm.
        """
        mine = [f"{index}.{type(stage).__name__}" for index, stage in enumerate(self.stages)]
        if mine != list(state):
            raise ValueError(f"the checkpoint's algorithm has stages {list(state)}, this run's has {mine}")
        for name, stage in zip(mine, self.stages, strict=True):
            stage.load_state_dict(state[name])

    @staticmethod
    def _the_only(hook: str, answers: list[Tensor | None]) -> Tensor:
        given = [answer for answer in answers if answer is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one stage must give `{hook}`, {len(given)} do")
        return given[0]


def build_algorithm(config: RunConfig) -> Algorithm:
    """The algorithm that a configuration names: a baseline, its KL and entropy terms, and CLIPO's reward."""
    settings = config.algorithm
    unbiased = settings.name is AlgorithmName.dr_grpo
    baseline: type[ClippedPolicyLoss] = DrGRPO if unbiased else GRPO
    stages: list[Stage] = [
        baseline(
            settings.clip_low,
            settings.clip_high,
            settings.aggregation or (Aggregation.constant if unbiased else Aggregation.token_mean),
            settings.constant_length or config.rollout.max_new_tokens,
        )
    ]
    if settings.correction.kind is not CorrectionKind.none:
        stages.append(OffPolicyCorrection(settings.correction))
    if settings.kl.coefficient:
        kind = KLLoss if settings.kl.place is KLPlace.loss else KLReward
        stages.append(kind(settings.kl.coefficient, settings.kl.kind))
    if settings.entropy_coefficient:
        stages.append(EntropyBonus(settings.entropy_coefficient))
    if config.clipo.enabled:
        stages.append(Clipo(config.clipo))
    return Algorithm(stages)
