"""An algorithm: its hooks, called in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext, Replay, ScoredTokens, Signal, TokenBatch
from clipo_megatron.algorithms.policy_loss import GroupLoss, PolicyLoss
from clipo_megatron.config.errors import ConfigError, is_for_users
from clipo_megatron.config.schema import BonusPlace
from clipo_megatron.flow import Experience, MiniBatch, Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Algorithm:
    """Calls the hooks of one step. Every method returns the same on every rank, except `observe`, `token_advantage`,
    `scores`, `loss` and `objective`, which see a part of the step.

    Args:
        hooks: the parts, in order.
        place: what the bonus of the hooks is added to.

    Raises:
        ConfigError: a hook needs what nothing provides.
    """

    def __init__(self, hooks: Sequence[Hook], place: BonusPlace = BonusPlace.reward):
        self.hooks, self.place = list(hooks), place
        provided = {signal.value for signal in Signal}
        provided = provided.union(*(hook.provides | hook.prompt_variants for hook in self.hooks))
        for hook in self.hooks:
            if missing := sorted(set(hook.needs) - provided):
                raise ConfigError(
                    f"{type(hook).__name__} needs {', '.join(missing)}, which nothing provides. There are "
                    f"{', '.join(sorted(provided))}; or add the hook that provides it to algorithm.plugins."
                )

    @property
    def base_method(self) -> PolicyLoss:
        """The hook that gives advantages and weighs tokens.

        Raises:
            ValueError: there is none, or more than one.
        """
        found = [hook for hook in self.hooks if isinstance(hook, PolicyLoss)]
        if len(found) != 1:
            names = ", ".join(type(hook).__name__ for hook in self.hooks)
            raise ValueError(
                f"an algorithm has exactly one base method (a PolicyLoss), {len(found)} of {names} are one"
            )
        return found[0]

    @property
    def needs(self) -> frozenset[str]:
        """The signals that at least one hook reads."""
        return frozenset().union(*(hook.needs for hook in self.hooks))

    @property
    def assigns_token_advantages(self) -> bool:
        """Whether tokens have advantages of their own."""
        return any(hook.assigns_token_advantages for hook in self.hooks)

    @property
    def learns_without_advantage(self) -> bool:
        """Whether rollouts whose advantage is 0 can have a gradient."""
        return self.assigns_token_advantages or any(hook.learns_without_advantage for hook in self.hooks)

    @property
    def replays(self) -> int:
        """The most former experiences that a step can add to its own."""
        return sum(isinstance(hook, Replay) for hook in self.hooks)

    @property
    def policy_learns(self) -> bool:
        """Whether the policy is updated in the next step."""
        return not any(hook.freezes_policy for hook in self.hooks)

    def bind(self, context: HookContext) -> None:
        """Let every hook look at the run it belongs to.

        Raises:
            ConfigError: the run lacks what a hook needs.
        """
        for hook in self.hooks:
            try:
                hook.bind(context)
            except Exception as error:  # of a user's hook, which can raise anything
                if is_for_users(error) or type(hook).__module__.startswith("clipo_megatron."):
                    raise
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(f"{type(hook).__name__}.bind raises {reason}. Correct it.") from error

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """The facts that the hooks note of one rollout, by name."""
        return self._merged([hook.observe(prompt, rollout) for hook in self.hooks])

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Other prompts after which the step's responses are scored too: name -> group -> tokens [P']."""
        return self._merged([hook.variants(table) for hook in self.hooks])

    # --- rewards and advantages --------------------------------------------------------------------------------------

    def assign_advantages(self, table: RolloutTable, mini_batches: list[MiniBatch]) -> Experience:
        """The step's experience: rewards, advantages, demonstrations, and which rollouts train."""
        reward, bonus = self.shape_reward(table), self.bonus(table)
        if bonus is not None and self.place is BonusPlace.reward:
            reward = reward + bonus
        advantage = self.advantage(table, reward, bonus if self.place is BonusPlace.advantage else None)
        demonstrations = self._merged([hook.demonstrate(table) for hook in self.hooks])
        keep = self.select(table, advantage, demonstrations)
        return Experience(table, mini_batches, reward, advantage, keep, bonus, demonstrations)

    def shape_reward(self, table: RolloutTable) -> Tensor:
        """The grader's rewards, shaped by each hook in turn; [B] float32, without the bonus."""
        reward = table.reward
        for hook in self.hooks:
            reward = hook.shape_reward(table, reward)
        return reward

    def bonus(self, table: RolloutTable) -> Tensor | None:
        """The sum of the hooks' bonuses, shaped by each hook in turn, [B] float32; None if no hook pays any."""
        paid = [bonus for hook in self.hooks if (bonus := hook.bonus(table)) is not None]
        if not paid:
            return None
        bonus = torch.stack(paid).sum(0) if len(paid) > 1 else paid[0]
        for hook in self.hooks:
            bonus = hook.shape_bonus(table, bonus)
        return bonus

    def advantage(self, table: RolloutTable, reward: Tensor, bonus: Tensor | None = None) -> Tensor:
        """The base method's advantages plus `bonus` [B], shaped by each hook in turn; [B] float32."""
        advantage = self.base_method.advantage(table, reward)
        if bonus is not None:
            advantage = advantage + bonus
        for hook in self.hooks:
            advantage = hook.shape_advantage(table, reward, advantage)
        return advantage

    def select(self, table: RolloutTable, advantage: Tensor, demonstrated: Collection[int] = ()) -> Tensor:
        """Which rollouts train, [B] bool: of the graded and the unfinished ones those that every hook selects, and all
        those of the groups `demonstrated`."""
        usable = table.graded | table.unfinished
        keep = usable.clone()
        for hook in self.hooks:
            if (chosen := hook.select(table, advantage)) is not None:
                keep &= chosen
        in_demonstrated = torch.isin(table.group, torch.tensor(list(demonstrated), dtype=torch.int64))
        return keep | (usable & in_demonstrated)

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """The advantage of each token, [N] float32: its rollout's in `advantage` [B], changed by each hook in turn."""
        values = advantage.to(tokens.rows.device)[tokens.rows]
        rewards = [given for hook in self.hooks if (given := hook.token_reward(tokens, table)) is not None]
        tokens.rewards = torch.stack(rewards).sum(0) if rewards else None
        for hook in self.hooks:
            values = hook.token_advantage(tokens, table, values)
        return values

    # --- update ------------------------------------------------------------------------------------------------------

    def replay(self, experience: Experience) -> list[Experience]:
        """What the policy is updated on in this step, in order; nothing while a hook freezes the policy."""
        if not self.policy_learns:
            return []
        former = [hook.replay(experience) for hook in self.hooks if isinstance(hook, Replay)]
        return [experience, *(each for each in former if each is not None)]

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """The weight of each response token of the mini-batch `rows` [M] int64: [B] float32."""
        return self.base_method.token_weight(table, rows)

    @property
    def has_group_loss(self) -> bool:
        """Whether the loss compares rollouts of different micro-batches."""
        return any(isinstance(hook, GroupLoss) for hook in self.hooks)

    def scores(self, tokens: TokenBatch) -> Tensor:
        """What each token adds to the scores of its rollout, [N, C] float32."""
        return self._group_loss().scores(tokens)

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> tuple[float, Tensor]:
        """The loss of a mini-batch by its scores [B, C] float64, and its derivative by each of them, [B, C] float32."""
        scores = scores.detach().double().requires_grad_()
        with torch.enable_grad():
            loss = self._group_loss().group_loss(scores[rows], experience, rows)
        if loss.requires_grad:
            loss.backward()
        gradient = torch.zeros_like(scores) if scores.grad is None else scores.grad
        return float(loss.detach()), gradient.float()

    def loss(self, tokens: TokenBatch) -> Tensor:
        """Per-token loss, [N] float32, without the part of a group loss."""
        factors = [factor for hook in self.hooks if (factor := hook.importance(tokens)) is not None]
        tokens.importance = torch.stack(factors).prod(0) if factors else None
        terms = [term for hook in self.hooks if (term := hook.loss(tokens)) is not None]
        if not terms:
            return torch.zeros_like(tokens.weights)
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def objective(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """What a micro-batch adds to the loss: a scalar to differentiate, and its value without gradient.

        They differ by the group loss: its derivative divides among micro-batches, its value does not. Tokens of weight
        0 enter with a ratio of 1, so that one that is far off cannot turn 0 into "not a number".
        """
        counted = replace(tokens, logprobs=torch.where(tokens.weights == 0, tokens.old_logprobs, tokens.logprobs))
        weighted = (tokens.weights * self.loss(counted)).sum()
        if tokens.score_gradient is None:
            return weighted, weighted.detach()
        return weighted + (tokens.score_gradient * self.scores(tokens)).sum(), weighted.detach()

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        """Let every hook move its state on; `learned` is False where a hook froze the policy in this step."""
        for hook in self.hooks:
            hook.after_update(experience, learned=learned)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of every hook, under "<index>.<class name>"."""
        return {name: hook.state_dict() for name, hook in zip(self._names(), self.hooks, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the checkpoint belongs to another algorithm.
        """
        if self._names() != list(state):
            raise ValueError(f"the checkpoint's algorithm has the hooks {list(state)}, this run's has {self._names()}")
        for name, hook in zip(self._names(), self.hooks, strict=True):
            hook.load_state_dict(state[name])

    def _names(self) -> list[str]:
        return [f"{index}.{type(hook).__name__}" for index, hook in enumerate(self.hooks)]

    def _group_loss(self) -> GroupLoss:
        (found,) = (hook for hook in self.hooks if isinstance(hook, GroupLoss))
        return found

    def _merged(self, parts: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for hook, part in zip(self.hooks, parts, strict=True):
            if twice := sorted(merged.keys() & part.keys()):
                given = ", ".join(map(str, twice))
                raise ValueError(
                    f"{type(hook).__name__} gives {given}, as a hook before it does; leave one of them out"
                )
            merged |= part
        return merged
