"""The types that flow through a training step, in the order in which a step produces them.

    Prompt -> RolloutGroup -> ScoredGroup -> RolloutTable + Samples -> MiniBatch (MicroBatches) -> Experience
           -> StepReport

Shapes use the same letters everywhere:

    P  prompt tokens of one prompt        R  response tokens of one rollout
    G  rollouts of one prompt (a group)   B  rollouts of one step, over all ranks
    T  tokens of one packed micro-batch   N  of these, the ones that predict a response token
    K  rollouts of one packed micro-batch
    H  hidden size                        d  size of the contrastive embedding

Worked example: prompt ids [5, 6, 7] (P = 3), response ids [8, 9] (R = 2). The packed segment is
[5, 6, 7, 8, 9]. The positions that *predict* the response are 2 and 3 (P-1 .. P+R-2), with targets 8 and 9;
the positions whose hidden states *represent* the response are 3 and 4 (P .. P+R-1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Finish = Literal["stop", "length", "window", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. Its `id` never changes: sampling seeds and the draw of positives derive from it."""

    id: str  # "<source name>/<row>", unique within a run
    messages: tuple[Mapping[str, str], ...]  # chat turns: {"role": ..., "content": ...}
    tokens: Tensor  # [P] int64, chat template applied, generation prompt included
    data_source: str  # chooses the grader
    ground_truth: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's `extra_info`, or a generator's entry


@dataclass(slots=True)
class Rollout:
    """One sampled response, as the engine produced it; text is never tokenised again."""

    tokens: Tensor  # [R] int64, the stop token included when one was produced; R >= 1
    logprobs: Tensor  # [R] float32, under the temperature-scaled policy, before top-p / top-k truncation
    text: str  # decoded without special tokens
    finish: Finish  # "window": goes on in the next step; "abort": interrupted, a later request can go on
    versions: Tensor  # [R] int64, of the weights that produced each token; they never decrease
    sample: int  # 0 .. G-1 within its group
    trained: int = 0  # of its tokens, the first ones: they trained in earlier steps, in their windows

    @property
    def version(self) -> int:
        """Of the oldest weights in it."""
        return int(self.versions[0])

    @property
    def spent(self) -> bool:
        """Whether it ended in an earlier step, while others of its group go on."""
        return self.trained == self.tokens.numel()


@dataclass(slots=True)
class RolloutGroup:
    """The G rollouts of one prompt. `position` is the prompt's place in the step's global batch."""

    position: int
    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grader says of one response. `correct` stays the verifier's word, whatever happens to rewards.

    `correct is None` means ungraded (deadline, crash, exception): such a rollout has no reward, takes no part in
    baselines or losses, and is counted in the report.
    """

    correct: bool | None
    reward: float
    reason: str = ""  # why ungraded; empty otherwise
    seconds: float = 0.0


@dataclass(slots=True)
class ScoredGroup:
    """A rollout group with one verdict a rollout, in the same order."""

    group: RolloutGroup
    verdicts: list[Verdict]


@dataclass(slots=True)
class RolloutTable:
    """The facts of all B rollouts of a step as columns, identical on every rank, ordered by (prompt, sample).

    Advantages and rewards are computed from it, so they cannot depend on the layout. Token-level data stays with the
    ranks that train it (`Sample`).
    """

    prompt_ids: list[str]  # one a group, in order of position
    group: Tensor  # [B] int64, index into prompt_ids
    correct: Tensor  # [B] bool, the verifier's verdict (False where ungraded)
    graded: Tensor  # [B] bool
    reward: Tensor  # [B] float32, the grader's reward (0 where ungraded)
    prompt_length: Tensor  # [B] int64, with the tokens of earlier windows
    response_length: Tensor  # [B] int64, of this step's window where rollouts grow in windows
    truncated: Tensor  # [B] bool, finish == "length"
    version: Tensor  # [B] int64, of the weights that produced the first token of `response_length`, the oldest of these
    step: int = 0
    newest: Tensor | None = None  # [B] int64, of the weights that produced the rollout's last token; None: as `version`
    goes_on: Tensor | None = None  # [B] bool, finish == "window": no verdict yet, and no end; None: nowhere
    signals: dict[str, Tensor] = field(default_factory=dict)  # [B, ...] each: what stages asked for (algorithms.base)
    words: dict[str, list[str]] = field(default_factory=dict)  # B texts each: what stages observed

    @property
    def size(self) -> int:
        """B."""
        return self.group.numel()

    @property
    def unfinished(self) -> Tensor:
        """[B] bool: the next step goes on with it."""
        return torch.zeros_like(self.graded) if self.goes_on is None else self.goes_on

    @property
    def fresh(self) -> Tensor:
        """[B] bool: every token was drawn under the weights that this step began with."""
        return self.version == self.step

    @property
    def mixed_versions(self) -> Tensor:
        """[B] bool: tokens were drawn under more than one set of weights."""
        return torch.zeros_like(self.correct) if self.newest is None else self.newest > self.version


@dataclass(slots=True)
class Sample:
    """What training needs of one rollout; `row` is its row in the RolloutTable, `group` its group there."""

    row: int
    group: int
    prompt: Tensor  # [P] int64, and behind it the tokens of earlier windows
    response: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32, the engine's

    @property
    def length(self) -> int:
        """P + R."""
        return self.prompt.numel() + self.response.numel()


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to a group's prompt to learn as it stands, whatever its rollouts were."""

    group: int
    prompt: Tensor  # [P] int64
    response: Tensor  # [R] int64
    weight: float  # of each token's -log pi in the loss


class Segment(NamedTuple):
    """A run of tokens in a packed row: each attends to the context's tokens and to its own segment up to itself."""

    start: int
    length: int
    context_start: int = 0
    context_length: int = 0


@dataclass(slots=True)
class MicroBatch:
    """A table of segments packed without padding between them, and what each of its targets carries.

    Without shared prompts a segment is a rollout, [prompt, response]. With them a prompt stands once, followed by the
    responses to it, whose context it is: its layers are computed once for the whole group. `tokens` is padded at the
    end to the tensor-parallel multiple only; the padding is a segment of its own that nothing reads.

    Worked example: prompt [5, 6, 7], responses [8, 9] and [10]. Shared: tokens [5, 6, 7, 8, 9, 10], positions
    [0, 1, 2, 3, 4, 3], segments (0, 3), (3, 2 | context 0, 3), (5, 1 | context 0, 3), predict [2, 3, 2],
    targets [8, 9, 10], states [3, 4, 5], rollout [0, 0, 1].
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, within prompt and response
    segments: tuple[Segment, ...]  # cover the tokens, in order
    samples: tuple[Sample, ...]  # what was packed
    rows: Tensor  # [K] int64, table row of each rollout
    predict: Tensor  # [N] int64, places in `tokens` whose hidden state predicts a response token
    states: Tensor  # [N] int64, places of the response tokens themselves
    targets: Tensor  # [N] int64, the response tokens
    rollout: Tensor  # [N] int64, index into `rows` of each target
    rollout_logprobs: Tensor  # [N] float32, the engine's
    old_logprobs: Tensor | None = None  # [N] float32, filled in by the scoring forward (last stage only)
    reference_logprobs: Tensor | None = None  # [N] float32
    signals: dict[str, Tensor] = field(default_factory=dict)  # [N] each: what stages asked for (algorithms.base)
    advantages: Tensor | None = None  # [N] float32
    weights: Tensor | None = None  # [N] float32, share of each token in the loss; global counts are already in it
    padding: int = 0  # tokens added to reach the tensor-parallel multiple
    demonstrated: bool = False  # its targets are demonstrations: none was sampled or scored

    def to(self, device: torch.device) -> MicroBatch:
        """The same there; itself if it is there."""
        if self.tokens.device == device:
            return self
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        moved = {name: value.to(device) for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, **moved, signals={name: signal.to(device) for name, signal in self.signals.items()})


@dataclass(slots=True)
class MiniBatch:
    """What one optimizer step learns from: rows [M] int64 of the table, and this rank's packed share of them."""

    rows: Tensor
    micro_batches: list[MicroBatch]


@dataclass(slots=True)
class Experience:
    """What the policy is updated on: a step's rollouts, and what each is worth. The columns are the same on every rank.

    Advantages of single tokens, where an algorithm has them, are the micro-batches' signals["advantage"].
    """

    table: RolloutTable
    mini_batches: list[MiniBatch]
    reward: Tensor  # [B] float32, shaped
    advantage: Tensor  # [B] float32
    keep: Tensor  # [B] bool, rows that train
    replayed: bool = False  # it is a former step's

    def to(self, device: torch.device) -> Experience:
        """The same with its micro-batches there."""
        moved = [
            MiniBatch(batch.rows, [each.to(device) for each in batch.micro_batches]) for batch in self.mini_batches
        ]
        return replace(self, mini_batches=moved)


@dataclass(slots=True)
class StepReport:
    """One line of metrics.jsonl: the step's number and its metrics, SI units in the names ("time/generate_s")."""

    step: int
    metrics: dict[str, float]
