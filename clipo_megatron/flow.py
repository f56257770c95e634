"""The types that flow through a training step, in the order in which a step produces them.

    Prompt -> RolloutGroup -> ScoredGroup -> RolloutTable + Samples -> MiniBatches of MicroBatches -> Experience
           -> StepReport

Shapes use the same letters everywhere:

    P  tokens of one prompt               R  tokens of one response
    G  rollouts of one prompt (a group)   B  rollouts of one step, over all ranks
    M  rollouts of one mini-batch         K  rollouts of one packed micro-batch
    T  tokens of one packed micro-batch   N  of these, the targets: response tokens to predict
    H  hidden size                        d  size of the contrastive embedding
    S  tokens of the largest support: what top-p and top-k leave to draw a token from
    L  layers of the model                E  experts that a token is sent to

Worked example: prompt ids [5, 6, 7] (P = 3), response ids [8, 9] (R = 2). The packed segment is
[5, 6, 7, 8, 9]. The positions that *predict* the response are 2 and 3 (P-1 .. P+R-2), with targets 8 and 9;
the positions whose hidden states *represent* the response are 3 and 4 (P .. P+R-1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Finish = Literal["stop", "length", "window", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. Its `id` never changes: seeds of sampling and of the draw of positives derive from it."""

    id: str  # "<source name>/<row>", unique within a run
    messages: tuple[Mapping[str, str], ...]  # chat turns: {"role": ..., "content": ...}
    tokens: Tensor  # [P] int64, chat template applied, generation prompt included
    data_source: str  # decides which grader is used
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's `extra_info`, or a generator's entry
    forms: tuple[str, ...] | None = None  # of the answer, as its text asks for them (data/asked.py); None: not known
    thinking: bool = False  # whether its text ends with thinking that it opened
    occurrence: int = 0  # tells copies of it in one step apart: the first is 0, and each draws differently


@dataclass(slots=True)
class Rollout:
    """One sampled response, as the engine produced it. Its text is never tokenised again."""

    tokens: Tensor  # [R] int64, the stop token included when one was produced; R >= 1
    logprobs: Tensor  # [R] float32, under the distribution that the tokens were drawn from
    text: str  # decoded without control tokens; tags such as </think> stay
    finish: Finish  # "window": it goes on in the next step; "abort": interrupted, a later request can go on
    versions: Tensor  # [R] int64, version of the weights that produced each token; never decreasing
    sample: int  # 0 .. G-1 within its group
    trained: int = 0  # how many of its first tokens trained in earlier steps, in their windows
    # [R, S] int32, the token ids that top-p and top-k left to draw from, padded with -1; None: they are off
    support: Tensor | None = None
    # [P + R - 1, L, E] int16, the experts of each layer that the engine sent each token but the last to, those of the
    # prompt first; None: nobody asked. An interrupted rollout may have fewer
    routes: Tensor | None = None

    @property
    def version(self) -> int:
        """The version of the oldest weights that produced a token of it."""
        return int(self.versions[0])

    @property
    def spent(self) -> bool:
        """Whether it ended in an earlier step, while other rollouts of its group go on."""
        return self.trained == self.tokens.numel()


@dataclass(slots=True)
class RolloutGroup:
    """The G rollouts of one prompt. `position` is the prompt's place in the step's global batch."""

    position: int
    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A grader's judgement of one response. `correct` stays as the verifier said, however rewards are shaped.

    `correct is None` means ungraded (deadline, crash, exception): such a rollout has no reward, takes no part in
    baselines or losses, and is counted in the report.
    """

    correct: bool | None
    reward: float
    reason: str = ""  # why it is ungraded, else empty
    seconds: float = 0.0  # grading took


@dataclass(slots=True)
class ScoredGroup:
    """A rollout group with one verdict for each rollout, in the same order."""

    group: RolloutGroup
    verdicts: list[Verdict]


@dataclass(slots=True)
class RolloutTable:
    """The facts of all B rollouts of a step as columns, identical on every rank, ordered by (prompt, sample).

    Rewards and advantages are computed from it, so they cannot depend on the layout. Tokens stay with the ranks that
    train them (`Sample`).
    """

    prompt_ids: list[str]  # one for each group, in order of position
    group: Tensor  # [B] int64, index into prompt_ids
    correct: Tensor  # [B] bool, the verifier's verdict (False where ungraded)
    graded: Tensor  # [B] bool
    reward: Tensor  # [B] float32, the grader's reward (0 where ungraded)
    prompt_length: Tensor  # [B] int64, tokens of earlier windows included
    response_length: Tensor  # [B] int64, in this step's window where rollouts grow in windows
    truncated: Tensor  # [B] bool, finish == "length"
    version: Tensor  # [B] int64, of the oldest weights that produced one of the `response_length` tokens
    step: int = 0
    newest: Tensor | None = None  # [B] int64, version of the newest such weights; None: equal to `version`
    goes_on: Tensor | None = None  # [B] bool, finish == "window": not ended, without a verdict; None: none goes on
    signals: dict[str, Tensor] = field(default_factory=dict)  # [B, ...] each: what hooks need (algorithms.hook.Signal)
    text_columns: dict[str, list[str]] = field(default_factory=dict)  # B texts each: what hooks observed

    @property
    def size(self) -> int:
        return self.group.numel()

    @property
    def unfinished(self) -> Tensor:
        """Which rollouts go on in the next step, [B] bool."""
        return self.graded.new_zeros(self.size) if self.goes_on is None else self.goes_on

    @property
    def fresh(self) -> Tensor:
        """Rollouts of which all tokens were drawn under the weights that this step began with, [B] bool."""
        return self.version == self.step

    @property
    def mixed_versions(self) -> Tensor:
        """Rollouts whose tokens were drawn under more than one set of weights, [B] bool."""
        return self.correct.new_zeros(self.size) if self.newest is None else self.newest > self.version


@dataclass(slots=True)
class Sample:
    """What training needs of one rollout; `row` is its row in the RolloutTable, `group` its group there."""

    row: int
    group: int
    prompt: Tensor  # [P] int64, followed by the tokens of earlier windows
    response: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32, from the engine
    support: Tensor | None = None  # [R, S] int32, see `Rollout`; S is the same in all rollouts of a step
    routes: Tensor | None = None  # [P + R, L, E] int16, see `Rollout`; -1 where no expert is named

    @property
    def length(self) -> int:
        return self.prompt.numel() + self.response.numel()


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to learn as it stands, in place of a group's rollouts: its loss is the mean of -log pi over its
    tokens."""

    group: int
    prompt: Tensor  # [P] int64
    response: Tensor  # [R] int64
    weight: float  # of this loss, against 1 for the rollouts of a group


class Segment(NamedTuple):
    """Consecutive tokens of a packed row. Each attends to the context's tokens and to its own segment up to itself."""

    start: int
    length: int
    context_start: int = 0
    context_length: int = 0


@dataclass(slots=True)
class MicroBatch:
    """Rollouts packed into one row without padding between them, and the columns of their targets.

    Without shared prompts a segment is a rollout, [prompt, response]. With them all prompts come first, each once, as
    the context of its group's responses, and all responses follow. `tokens` is padded only at the end, to the
    tensor-parallel multiple; the padding is a segment of its own that nothing reads.

    Worked example: prompt [5, 6, 7], responses [8, 9] and [10]. Shared: tokens [5, 6, 7, 8, 9, 10], positions
    [0, 1, 2, 3, 4, 3], segments (0, 3), (3, 2 | context 0, 3), (5, 1 | context 0, 3), predict [2, 3, 2],
    targets [8, 9, 10], states [3, 4, 5], rollout [0, 0, 1].
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, within prompt and response
    segments: tuple[Segment, ...]  # in order; together they cover all tokens
    samples: tuple[Sample, ...]  # the packed rollouts
    rows: Tensor  # [K] int64, table row of each rollout
    predict: Tensor  # [N] int64, places in `tokens` whose hidden state predicts a response token
    states: Tensor  # [N] int64, places of the response tokens themselves
    targets: Tensor  # [N] int64, the response tokens
    rollout: Tensor  # [N] int64, index into `rows` of each target
    rollout_logprobs: Tensor  # [N] float32, from the engine
    support: Tensor | None = None  # [N, S] int32, see `Rollout`; on the CPU until log-probs are computed
    routes: Tensor | None = None  # [T, L, E] int16, see `Sample`; on the CPU until a stage takes its layers
    # Filled in by scoring, on the last pipeline stage only:
    old_logprobs: Tensor | None = None  # [N] float32
    reference_logprobs: Tensor | None = None  # [N] float32
    signals: dict[str, Tensor] = field(default_factory=dict)  # [N] each: what hooks need (algorithms.hook.Signal)
    # Filled in by hooks that give tokens advantages of their own, on the last pipeline stage only:
    token_advantages: Tensor | None = None  # [N] float32; None: all tokens have their rollout's advantage
    returns: Tensor | None = None  # [N] float32, what the critic learns
    # Filled in for an update:
    advantages: Tensor | None = None  # [N] float32
    weights: Tensor | None = None  # [N] float32, weight of each token in the loss over all ranks
    padding: int = 0  # tokens added to reach the tensor-parallel multiple
    demonstrated: bool = False  # its targets are demonstrations, which were neither sampled nor scored

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on the device, or the micro-batch itself if it is there already."""
        from torch import Tensor  # here, since the command line reads what methods need without torch

        if self.tokens.device == device:
            return self
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        del columns["support"], columns["routes"]  # large, and each stage reads a part
        moved = {name: value.to(device) for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, **moved, signals={name: signal.to(device) for name, signal in self.signals.items()})


@dataclass(slots=True)
class MiniBatch:
    """What one optimizer step learns from: table rows [M] int64 over all ranks, and this rank's share, packed."""

    rows: Tensor
    micro_batches: list[MicroBatch]


@dataclass(slots=True)
class Experience:
    """What the policy is updated on: a step's rollouts with their rewards and advantages. Columns are the same on every
    rank; advantages and returns of single tokens, where an algorithm has them, are columns of the micro-batches."""

    table: RolloutTable
    mini_batches: list[MiniBatch]
    reward: Tensor  # [B] float32, shaped, bonus included unless it is in the advantage (clipo.place)
    advantage: Tensor  # [B] float32
    keep: Tensor  # [B] bool, rows that train
    bonus: Tensor | None = None  # [B] float32, the hooks' bonus in `reward` or `advantage`; None if none pays any
    demonstrations: dict[int, Demonstration] = field(default_factory=dict)  # by group, in place of its rollouts

    def to(self, device: torch.device) -> Experience:
        """A copy whose micro-batches are on the device."""
        moved = [
            MiniBatch(batch.rows, [each.to(device) for each in batch.micro_batches]) for batch in self.mini_batches
        ]
        return replace(self, mini_batches=moved)


@dataclass(slots=True)
class StepReport:
    """One line of metrics.jsonl: the step's number and its metrics, with SI units in their names
    ("time/generate_s")."""

    step: int
    metrics: dict[str, float]
