"""An algorithm: its stages, run in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.clipo.stage import Clipo
from clipo_megatron.algorithms.hook import Hook, HookContext, ScoredTokens, Signal, TokenBatch
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.flow import Demonstration, Experience, MiniBatch, Prompt, Rollout, RolloutTable


class Algorithm:
    """Runs the stages of one step. All methods but `observe`, `token_advantage`, `scores` and `loss` see the whole step
    and give the same on every rank.

    Raises:
        ConfigError: a stage needs what nothing provides.
    """

    def __init__(self, stages: Sequence[Hook]):
        self.stages = list(stages)
        provided = {signal.value for signal in Signal}.union(*(stage.provides for stage in self.stages))
        for stage in self.stages:
            if missing := sorted(set(stage.needs) - provided):
                raise ConfigError(
                    f"{type(stage).__name__} needs {', '.join(missing)}, which nothing provides. There are "
                    f"{', '.join(sorted(provided))}; or add the stage that provides it to algorithm.plugins."
                )

    @property
    def needs(self) -> frozenset[str]:
        """Signals that some stage reads."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    def stage(self, kind: type[Hook]) -> Hook | None:
        """The first stage of a class, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    @property
    def learns_without_advantage(self) -> bool:
        """Whether rollouts with advantage 0 have a gradient."""
        return any(stage.learns_without_advantage or stage.credits_tokens for stage in self.stages)

    @property
    def credits_tokens(self) -> bool:
        """Whether tokens have advantages of their own."""
        return any(stage.credits_tokens for stage in self.stages)

    @property
    def replays(self) -> int:
        """How often an experience can be trained again in later steps."""
        return sum(stage.replays for stage in self.stages)

    @property
    def policy_learns(self) -> bool:
        """Whether the policy is updated in the next step."""
        return not any(stage.holds_policy for stage in self.stages)

    @property
    def last_bonus(self) -> Tensor | None:
        """[B] float32, what the contrastive losses paid in this step; None without CLIPO."""
        clipo = self.stage(Clipo)
        return clipo.last_bonus if isinstance(clipo, Clipo) else None

    def bind(self, context: HookContext) -> None:
        """Let every stage look at the run it belongs to.

        Raises:
            ConfigError: the run cannot give what a stage needs.
        """
        for stage in self.stages:
            stage.bind(context)

    # --- the rollouts ------------------------------------------------------------------------------------------------

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """What the stages note of one rollout."""
        return self._merged([stage.observe(prompt, rollout) for stage in self.stages])

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Prompts to score the step's responses behind: name -> group -> tokens [P']."""
        return self._merged([stage.variants(table) for stage in self.stages])

    # --- what they are worth -----------------------------------------------------------------------------------------

    def assign_advantages(self, table: RolloutTable, mini_batches: list[MiniBatch]) -> Experience:
        """Rewards, advantages, and which rollouts train."""
        reward = self.shape_reward(table)
        advantage = self.advantage(table, reward)
        keep = self.select(table, advantage)
        return Experience(table, mini_batches, reward, advantage, keep)

    def shape_reward(self, table: RolloutTable) -> Tensor:
        """The grader's rewards, shaped by each stage in turn; [B] float32."""
        reward = table.reward
        for stage in self.stages:
            reward = stage.shape_reward(table, reward)
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32: the baseline's, shaped by each stage in turn."""
        advantage = self._the_only("advantage", [stage.advantage(table, reward) for stage in self.stages])
        for stage in self.stages:
            advantage = stage.shape_advantage(table, reward, advantage)
        return advantage

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor:
        """Rows that train, [B] bool: graded or going on, and wanted by every stage or retained by one."""
        there = table.graded | table.unfinished
        keep, force_kept = there.clone(), torch.zeros_like(there)
        for stage in self.stages:
            if (chosen := stage.select(table, advantage)) is not None:
                keep &= chosen
            if (held := stage.force_keep(table)) is not None:
                force_kept |= held
        return keep | (there & force_kept)

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[N] float32: the rollouts' `advantage` [B], made one of each token by each stage in turn."""
        values = advantage.to(tokens.rows.device)[tokens.rows]
        rewards = [given for stage in self.stages if (given := stage.token_reward(tokens, table)) is not None]
        tokens.rewards = torch.stack(rewards).sum(0) if rewards else None
        for stage in self.stages:
            values = stage.token_advantage(tokens, table, values)
        return values

    def replay(self, experience: Experience) -> list[Experience]:
        """What the policy is updated on in this step, in order; nothing while a stage holds it."""
        if not self.policy_learns:
            return []
        plan = [experience]
        for stage in self.stages:
            plan = [each for given in plan for each in (stage.replay(given) if given is experience else [given])]
        return plan

    # --- the update --------------------------------------------------------------------------------------------------

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """Weight of each response token of the mini-batch `rows`, [B] float32."""
        return self._the_only("token_weight", [stage.token_weight(table, rows) for stage in self.stages])

    def demonstrate(self, table: RolloutTable, rows: Tensor) -> list[Demonstration]:
        """Responses to learn beside those of the mini-batch `rows`."""
        return [each for stage in self.stages for each in stage.demonstrate(table, rows)]

    @property
    def has_group_loss(self) -> bool:
        """Whether the loss compares rollouts of different micro-batches."""
        return any(type(stage).scores is not Hook.scores for stage in self.stages)

    def scores(self, tokens: TokenBatch) -> Tensor:
        """What each token adds to the scores of its rollout, [N, C] float32."""
        return self._the_only("scores", [stage.scores(tokens) for stage in self.stages])

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> tuple[float, Tensor]:
        """The loss of a mini-batch by its scores [B, C] float64, and its derivative by each of them, [B, C] float32."""
        scores = scores.detach().double().requires_grad_()
        (stage,) = (stage for stage in self.stages if type(stage).scores is not Hook.scores)
        with torch.enable_grad():
            loss = stage.group_loss(scores[rows], experience, rows)
        if loss.requires_grad:
            loss.backward()
        gradient = torch.zeros_like(scores) if scores.grad is None else scores.grad
        return float(loss.detach()), gradient.float()

    def loss(self, tokens: TokenBatch) -> Tensor:
        """Per-token loss, [N] float32, without the part of a group loss."""
        factors = [factor for stage in self.stages if (factor := stage.importance(tokens)) is not None]
        tokens.importance = torch.stack(factors).prod(0) if factors else None
        terms = [term for stage in self.stages if (term := stage.loss(tokens)) is not None]
        if not terms:
            return torch.zeros_like(tokens.weights)
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def objective(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """What a micro-batch adds to the loss: a scalar to differentiate, and its value.

        They differ by the group loss, whose value is nobody's part: only its derivative can be divided.
        """
        weighted = (tokens.weights * self.loss(tokens)).sum()
        if tokens.score_gradient is None:
            return weighted, weighted.detach()
        return weighted + (tokens.score_gradient * self.scores(tokens)).sum(), weighted.detach()

    def after_update(self, table: RolloutTable, learned: Experience | None = None) -> None:
        """Let every stage move its state on; `learned` is what the policy learned from, None where it was held."""
        for stage in self.stages:
            if learned is not None:
                stage.learned(learned)
            stage.after_update(table)

    # --- state -------------------------------------------------------------------------------------------------------

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

    def _merged(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for stage, part in zip(self.stages, parts, strict=True):
            if twice := sorted(merged.keys() & part.keys()):
                raise ValueError(f"{type(stage).__name__} gives {', '.join(twice)}, as a stage before it does")
            merged |= part
        return merged
