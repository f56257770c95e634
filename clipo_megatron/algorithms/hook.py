"""The parts of an algorithm, and the order in which a step calls their methods.

    rollouts     observe -> (exchange) -> variants -> (scoring forwards)
    rewards      shape_reward -> bonus -> shape_bonus
    advantages   advantage * -> shape_advantage -> demonstrate -> select -> token_reward -> token_advantage
    update       replay * -> token_weight * -> scores *, group_loss * -> importance -> loss
    afterwards   after_update

An algorithm is a list of hooks. A hook implements the methods it is about and leaves the others alone; a hook with
state keeps it in `state_dict`. Methods marked * belong to hooks with a part of their own: `PolicyLoss`, the base
method, of which an algorithm has exactly one (`advantage`, `token_weight`); `GroupLoss`, a base method whose loss
compares whole rollouts (`scores`, `group_loss`); and `Replay`, which brings former experiences back (`replay`).

A method that takes the `RolloutTable` sees the whole step, identical on every rank, so what it returns cannot depend on
the layout. `token_reward` and `token_advantage` see the tokens of this rank's rollouts; `scores`, `importance` and
`loss` those of one micro-batch. Both hold whole rollouts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Demonstration, Experience, Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Signal(str, Enum):
    """What a hook can ask for in `needs`. Columns of the table have B entries, those of tokens N."""

    pooled_states = "pooled_states"  # table.signals["pooled_states"], [B, H] float32: mean states of the response
    contrastive = "contrastive"  # table.signals["contrastive_loss"], ["contrastive_valid"]; some forms: "..._score"
    embeddings = "embeddings"  # table.signals["embeddings"], [B, d] float32: the head's before its step; needs CLIPO
    entropy = "entropy"  # TokenBatch.entropy with gradient; includes scored_entropy
    scored_entropy = "scored_entropy"  # the tokens' signals["entropy"], under the policy that scored them
    logprob_sums = "logprob_sums"  # table.signals["logprob_sum"], float64, under the policy that scored them
    reference_logprobs = "reference_logprobs"  # of the tokens, under the policy that the run began with
    reference_kl = "reference_kl"  # table.signals["kl"], float32: algorithm.kl.kind summed over the response
    answers = "answers"  # table.text_columns["answer"]: the final answer of each rollout, "" if it has none
    values = "values"  # the tokens' signals["value"] and ["next_value"], given by a critic; see policy.critic
    demonstrations = "demonstrations"  # worked solutions in the rows of the training prompts


@dataclass(slots=True)
class TokenBatch:
    """The targets of one packed micro-batch, as a loss sees them.

    Columns are [N]. Gradients flow through `logprobs`, and through `entropy` where a hook needs it.
    """

    logprobs: Tensor  # float32, under the policy being trained
    old_logprobs: Tensor  # float32, under the policy that scored the rollouts before the update
    advantages: Tensor  # float32
    weights: Tensor  # float32; the loss of the step is sum(weights * per-token loss) over all ranks
    rollout: Tensor  # int64, number of the rollout within the micro-batch
    rollout_logprobs: Tensor  # float32, from the engine that generated the rollout
    rows: Tensor | None = None  # int64, row of the table
    reference_logprobs: Tensor | None = None  # float32
    entropy: Tensor | None = None  # float32
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # from the scoring forwards, without gradient
    importance: Tensor | None = None  # float32, multiplies the policy gradient; the product over all hooks
    score_gradient: Tensor | None = None  # [N, C] float32, derivative of the group loss by the rollout's scores
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalar sums weighted by `weights`; losses fill them in

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` [N] over each rollout, repeated on each of its tokens: [N]."""
        return sum_by_rollout(values, self.rollout)[self.rollout]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` [N] over each rollout, repeated on each of its tokens: [N]."""
        return self.total(values) / self.length

    @property
    def length(self) -> Tensor:
        """The response length of each token's rollout, [N] int64."""
        return self.rollout.bincount()[self.rollout]


@dataclass(slots=True)
class ScoredTokens:
    """The targets of all rollouts that this rank trains in a step, on the last pipeline stage. The tokens of a rollout
    stand together and in order. Columns are [N], without gradient."""

    rows: Tensor  # int64, row of the table
    rollout: Tensor  # int64, 0, 1, ...: number of the rollout among this rank's
    old_logprobs: Tensor  # float32
    signals: Mapping[str, Tensor]  # from the scoring forwards
    sum_over_ranks: Callable[[Tensor], Tensor]  # over data-parallel ranks, each of which must call it equally often
    reference_logprobs: Tensor | None = None  # float32
    rewards: Tensor | None = None  # float32, rewards of single tokens beside the rollouts'; the sum over all hooks
    returns: Tensor | None = None  # float32, what a critic learns; set by the `token_advantage` that computes them


def sum_by_rollout(values: Tensor, rollout: Tensor) -> Tensor:
    """Sum over each rollout's tokens, [N] or [N, C] -> [K] or [K, C], in the dtype of `values`; differentiable."""
    count = int(rollout.max()) + 1 if rollout.numel() else 0
    return values.new_zeros(count, *values.shape[1:]).index_add(0, rollout, values)


@dataclass(frozen=True)
class HookContext:
    """What a hook may use of the run it belongs to.

    Attributes:
        config: the run's configuration.
        prompts: the training prompts by id.
        encode: turns chat messages into prompt tokens [P] int64, by the run's chat template.
        tokenize: turns text into token ids [n] int64, without special tokens.
        answer: reads the final answer of a response as text; "" if there is none.
        mask_id: the token that stands in for a hidden one.
        end_id: the token that ends a response.
    """

    config: RunConfig
    prompts: Mapping[str, Prompt]
    encode: Callable[[Sequence[Mapping[str, str]]], Tensor]
    tokenize: Callable[[str], Tensor]
    answer: Callable[[Prompt, Rollout], str]
    mask_id: int
    end_id: int


@dataclass
class MethodOptions:
    """Base of the options of a method: a dataclass of numbers, texts, truth values and enums, each with a default.

    A number gets its range by `config.ranges.within`, an option its help by the comment on its line. The class itself
    stands for a method without options.
    """

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        """What is wrong with the values beyond types and ranges; the key of a problem is the name of the option."""
        yield from ()


class Hook:
    """One part of an algorithm. The docstring of a method names its paper and what it assumes."""

    source: ClassVar[str] = ""  # paper or place the method comes from
    summary: ClassVar[str] = ""  # what it does, in half a line
    options_class: ClassVar[type[MethodOptions]] = MethodOptions
    needs: frozenset[str] = frozenset()  # signals, and names that other hooks provide
    provides: frozenset[str] = frozenset()  # names that `observe` gives
    prompt_variants: ClassVar[frozenset[str]] = frozenset()  # names that `variants` gives; each costs a forward
    supports_windows: ClassVar[bool] = False  # whether it takes rollouts that go on in the next step
    learns_without_advantage = False  # whether `loss` has a gradient where the advantage is 0
    freezes_policy = False  # whether the next step leaves the policy as it is, while something else learns

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_class() if options is None else options

    def bind(self, context: HookContext) -> None:
        """Called once, before the first step.

        Raises:
            ConfigError: the run lacks what this hook needs.
        """

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """Notes facts of one rollout on the rank that generated it, under the same names for every rollout.

        Numbers become table.signals[name] [B] float64, texts become table.text_columns[name].
        """
        return {}

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Other prompts after which the same responses are scored too: name -> group -> tokens [P'].

        The log-probs [N] of each become the tokens' signals[name]; groups that are left out keep their prompt. All
        names must be given in every step. A name without groups costs no forward, and there is no such signal then.
        """
        return {}

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """New rewards [B] float32 from the rewards so far, which begin as the grader's."""
        return reward

    def bonus(self, table: RolloutTable) -> Tensor | None:
        """What is added to the shaped rewards, or to the advantages (clipo.place), and reported as the bonus, [B]
        float32; None if this hook pays none."""
        return None

    def shape_bonus(self, table: RolloutTable, bonus: Tensor) -> Tensor:
        """New bonuses [B] float32 from the sum of those of all hooks; not called where no hook pays any."""
        return bonus

    def shape_advantage(self, table: RolloutTable, reward: Tensor, advantage: Tensor) -> Tensor:
        """New advantages [B] float32 from the advantages so far, which begin as the base method's."""
        return advantage

    def demonstrate(self, table: RolloutTable) -> dict[int, Demonstration]:
        """Responses to learn as they stand in place of a group's rollouts, by group. The base method must give those
        rollouts no weight; no `select` leaves them out, so that their group stays part of its mini-batch."""
        return {}

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor | None:
        """Rows that train, [B] bool; None selects all. A row trains if every hook selects it."""
        return None

    def token_reward(self, tokens: ScoredTokens, table: RolloutTable) -> Tensor | None:
        """Rewards of single tokens [N] float32, on the last pipeline stage; those of all hooks add up.

        Only a base method that `reads_token_rewards` sees them, so a hook needs another form for all others.
        """
        return None

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """The advantage of each token [N] float32 from those so far, on the last pipeline stage, before the update."""
        return advantage

    @property
    def assigns_token_advantages(self) -> bool:
        """Whether `token_advantage` changes anything in this run: where a class implements it, unless it says no."""
        return type(self).token_advantage is not Hook.token_advantage

    def importance(self, tokens: TokenBatch) -> Tensor | None:
        """Factors [N] float32 of the policy gradient, without gradient; None for 1. Those of all hooks multiply."""
        return None

    def loss(self, tokens: TokenBatch) -> Tensor | None:
        """Per-token loss [N] float32, before weights; those of all hooks add up."""
        return None

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        """Moves the hook's state on at the end of a step; `learned` is False where a hook froze the policy."""

    def state_dict(self) -> dict[str, Any]:
        """The state that checkpoints keep: tensors, numbers, texts, and lists and dictionaries of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class Replay(Hook):
    """A hook that updates the policy on a former experience once more.

    Attributes:
        previous: the experience that the next step may give again, micro-batches in host memory. Checkpoints keep it
            (policy.batch.replay), beside the `state_dict`.
    """

    previous: Experience | None = None

    def replay(self, experience: Experience) -> Experience | None:
        """The experience that the policy is updated on after this step's `experience`; None if there is none.

        It changes no state: `after_update` does.
        """
        raise NotImplementedError
