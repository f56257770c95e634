"""The stages of an algorithm, in the order in which a step runs them.

    observe -> variants -> shape_reward -> advantage -> shape_advantage -> select, retain -> token_reward
            -> token_advantage -> replay -> token_weight, demonstrate -> scores, group_loss -> importance -> loss
            -> learned -> after_update

An algorithm is a list of stages. Each stage implements the hooks it is about and leaves the others alone; a stage with
state keeps it in `state_dict`. `needs` declares the signals a stage reads, and nothing is computed unasked.

Hooks that take a `RolloutTable` see the whole step, identical on every rank, so what they give cannot depend on the
layout. `token_reward` and `token_advantage` see the tokens of this rank's rollouts, `scores`, `importance` and `loss`
those of one micro-batch; both hold whole rollouts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Demonstration, Experience, Prompt, Rollout, RolloutTable


class Signal(str, Enum):
    """What a stage can ask for. Columns of the table are [B], the tokens' [N]."""

    pooled_states = "pooled_states"  # table.signals["pooled_states"] [B, H] float32: mean response states
    contrastive = "contrastive"  # table.signals["contrastive_loss"], ["contrastive_valid"]
    entropy = "entropy"  # TokenBatch.entropy, with gradient, and scored_entropy
    scored_entropy = "scored_entropy"  # the tokens' signals["entropy"], of the policy that was scored
    logprob_sums = "logprob_sums"  # table.signals["logprob_sum"], float64, of the policy that was scored
    reference_logprobs = "reference_logprobs"  # of the tokens
    reference_kl = "reference_kl"  # table.signals["kl"] float32, of algorithm.kl.kind, of the policy that was scored
    answers = "answers"  # table.words["answer"]: the final answer of each rollout as text, "" where it has none
    values = "values"  # the tokens' signals["value"] and ["next_value"], of a critic; see policy.critic
    demonstrations = "demonstrations"  # a worked solution in the rows of training prompts


@dataclass(slots=True)
class TokenBatch:
    """The targets of one packed micro-batch, as the loss sees them. All [N]; gradients flow through `logprobs`
    (and `entropy` where asked for)."""

    logprobs: Tensor  # float32, under the policy being trained
    old_logprobs: Tensor  # float32, under the policy that was scored before the update
    advantages: Tensor  # float32
    weights: Tensor  # float32; the step's loss is sum(weights * per-token loss) over all ranks
    rollout: Tensor  # int64, which rollout of the micro-batch
    rollout_logprobs: Tensor  # float32, the engine's
    rows: Tensor | None = None  # int64, row of the table
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # what the scoring forwards gave, without gradient
    importance: Tensor | None = None  # float32, multiplies the policy gradient; the product over stages
    score_gradient: Tensor | None = None  # [N, C] float32, derivative of the group loss by the rollout's scores
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalar sums weighted by `weights`, filled by losses

    def total(self, values: Tensor) -> Tensor:
        """Sum over each rollout, on each of its tokens: [N] -> [N]."""
        return sum_of(values, self.rollout)[self.rollout]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each rollout, on each of its tokens: [N] -> [N]."""
        return self.total(values) / self.length

    @property
    def length(self) -> Tensor:
        """[N] int64, response tokens of each target's rollout."""
        return torch.bincount(self.rollout)[self.rollout]


@dataclass(slots=True)
class ScoredTokens:
    """The targets of all rollouts that this rank trains in a step, on the last pipeline stage; whole rollouts, each in
    its order. All [N], without gradient."""

    rows: Tensor  # int64, row of the table
    rollout: Tensor  # int64, 0, 1, ...: number of the rollout among this rank's
    old_logprobs: Tensor  # float32
    signals: Mapping[str, Tensor]  # what the scoring forwards gave
    sum_over_ranks: Callable[[Tensor], Tensor]  # over data-parallel ranks; all of them call it equally often
    reference_logprobs: Tensor | None = None  # float32
    rewards: Tensor | None = None  # float32, of single tokens, beside the rollouts'; the sum over stages
    returns: Tensor | None = None  # float32, what a critic shall learn; set by the stage that needs one


def sum_of(values: Tensor, rollout: Tensor) -> Tensor:
    """Sum over each rollout's tokens, [N] or [N, C] -> [K] or [K, C], in the dtype of `values`; differentiable."""
    count = int(rollout.max()) + 1 if rollout.numel() else 0
    return values.new_zeros(count, *values.shape[1:]).index_add(0, rollout, values)


@dataclass(frozen=True)
class HookContext:
    """What a stage may use of the run it belongs to.

    Attributes:
        config: of the run.
        prompts: the training prompts, by id.
        encode: chat turns to prompt tokens [P] int64, by the run's template.
        tokenize: text to token ids [n] int64, without special tokens.
        answer: the final answer of a response as text; "" if there is none.
        mask_id: token that stands for one that is not to be seen.
        end_id: token that ends a response.
    """

    config: RunConfig
    prompts: Mapping[str, Prompt]
    encode: Callable[[Sequence[Mapping[str, str]]], Tensor]
    tokenize: Callable[[str], Tensor]
    answer: Callable[[Prompt, Rollout], str]
    mask_id: int
    end_id: int


class Hook:
    """One part of an algorithm. Subclasses name their paper and assumptions in their docstring."""

    needs: frozenset[str] = frozenset()  # signals; those of other stages too, by name
    provides: frozenset[str] = frozenset()  # names that `observe` or `variants` gives
    learns_without_advantage = False  # whether there is a gradient where the advantage is 0
    credits_tokens = False  # whether `token_advantage` does something
    reads_token_rewards = False  # of a baseline: whether `token_advantage` reads tokens.rewards, as a KL in the reward
    replays = 0  # further times that `replay` gives an experience, at most; then `previous` is kept in checkpoints
    previous: Experience | None = None  # what `replay` will give again, its micro-batches in host memory
    holds_policy = False  # whether the policy waits in the next step, while this stage's own part learns

    def bind(self, context: HookContext) -> None:
        """Once, before the first step.

        Raises:
            ConfigError: the run cannot give what this stage needs.
        """

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """Facts of one rollout, on the rank that generated it: numbers become table.signals[name] [B] float64, texts
        table.words[name]. The same names for every rollout."""
        return {}

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Other prompts before the same responses, each scored by a forward of its own: name -> group -> tokens [P'].

        The log-probs [N] are the tokens' signals[name]. Groups that are left out keep their prompt. A name is given in
        every step or in none; {} of groups costs nothing, and there is no such signal then.
        """
        return {}

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """New rewards [B] float32 from the rewards so far."""
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor | None:
        """Advantages [B] float32; exactly one stage of an algorithm gives them."""
        return None

    def shape_advantage(self, table: RolloutTable, reward: Tensor, advantage: Tensor) -> Tensor:
        """New advantages [B] float32 from the advantages so far."""
        return advantage

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor | None:
        """Rows that train, [B] bool; None leaves all."""
        return None

    def force_keep(self, table: RolloutTable) -> Tensor | None:
        """Rows [B] bool that no stage's `select` leaves out: hooks that see a mini-batch's rows see them, whatever they
        weigh. None: no such rows."""
        return None

    def token_reward(self, tokens: ScoredTokens, table: RolloutTable) -> Tensor | None:
        """Rewards of single tokens [N] float32, on the last pipeline stage; stages add up. For a baseline with
        `reads_token_rewards`: no other sees them, so a stage that rewards tokens needs a form for whole rollouts."""
        return None

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """Advantage of each token [N] float32 from those so far, on the last pipeline stage; before the update."""
        return advantage

    def replay(self, experience: Experience) -> Sequence[Experience]:
        """What the policy is updated on in this step, in order. A question: `learned` is where a stage keeps it."""
        return [experience]

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor | None:
        """Weight of each response token of every rollout, [B] float32, zero outside `rows` ([M] int64, one
        mini-batch); exactly one stage gives them. Summed over all tokens of `rows` they are the loss's denominator."""
        return None

    def demonstrate(self, table: RolloutTable, rows: Tensor) -> Sequence[Demonstration]:
        """Responses to learn beside those of the mini-batch `rows`; their loss is their weighted -log pi."""
        return []

    def scores(self, tokens: TokenBatch) -> Tensor | None:
        """What each token adds to the scores of its rollout, [N, C] float32, with gradient; at most one stage.

        A group loss is a function of the scores of many rollouts, which no micro-batch holds together. So it takes two
        passes: scores without gradient, `group_loss` on them, and then its derivative by each score as the weight of
        that score's own gradient. Any micro-batching and layout gives the same.
        """
        return None

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """The loss of a mini-batch, a scalar, from its scores [M, C] float64; `rows` [M] int64 of the table."""
        raise NotImplementedError

    def importance(self, tokens: TokenBatch) -> Tensor | None:
        """Factors [N] float32 of the policy-gradient term, without gradient; None for 1. Stages multiply."""
        return None

    def loss(self, tokens: TokenBatch) -> Tensor | None:
        """Per-token loss [N] float32, before weights; stages add up."""
        return None

    def learned(self, experience: Experience) -> None:
        """After the policy's update on a step's own experience; not in steps in which a stage holds the policy."""

    def after_update(self, table: RolloutTable) -> None:
        """After the policy's update, or where it would be: move state on."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
