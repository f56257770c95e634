"""How the rollouts of a step reach the ranks that score them, and then those that train them.

Facts (verdicts, rewards, lengths), a few numbers for each rollout, go to every rank. Tokens go point to point, from the
rank that generated a rollout to the head of the model replica that trains it, and from there to the replica's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from clipo_megatron.flow import MicroBatch, Prompt, Rollout, RolloutTable, Sample, ScoredGroup
from clipo_megatron.policy.batch.columns import by_rollout, columns_of
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform

_Header = tuple[int, int, int, int]  # row and group of a rollout, and how many tokens its prompt and response have
Observe = Callable[[Prompt, Rollout], dict[str, float | str]]


def build_table(
    groups: Sequence[ScoredGroup], *, step: int, observe: Observe = lambda prompt, rollout: {}
) -> tuple[RolloutTable, list[Sample]]:
    """Gather the facts of every rank's rollouts; collective.

    Tokens of a rollout's earlier windows become part of its prompt: only the tokens of this step train.

    Args:
        groups: what this rank generated; may be empty.
        step: number of the step.
        observe: further facts of one rollout, under the same names for each; numbers become signals, texts text
            columns.

    Returns:
        The table, identical on every rank, and this rank's rollouts with their rows in it.

    Raises:
        RuntimeError: two ranks hold the same rollout, or no rank holds any.
    """
    local = [
        (
            scored.group.position,
            rollout.sample,
            verdict.correct is True,
            verdict.correct is not None,
            verdict.reward if verdict.correct is not None else 0.0,
            scored.group.prompt.tokens.numel() + rollout.trained,
            rollout.tokens.numel() - rollout.trained,
            rollout.finish == "length",
            int(rollout.versions[rollout.trained]),
            int(rollout.versions[-1]),
            rollout.finish == "window",
        )
        for scored in groups
        for rollout, verdict in zip(scored.group.rollouts, scored.verdicts, strict=True)
    ]
    names = {scored.group.position: scored.group.prompt.id for scored in groups}
    observed = [observe(scored.group.prompt, rollout) for scored in groups for rollout in scored.group.rollouts]
    shared: list[tuple[np.ndarray, dict[int, str], list[dict[str, float | str]]]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(shared, (np.array(local, dtype=np.float64).reshape(-1, 11), names, observed))
    facts = np.concatenate([part for part, _, _ in shared])
    if not len(facts):
        raise RuntimeError("no rank generated a rollout in this step")
    order = np.lexsort((facts[:, 1], facts[:, 0]))
    facts = facts[order]
    notes = [note for _, _, part in shared for note in part]
    signals, text_columns = _columns([notes[row] for row in order])
    keys = facts[:, :2].astype(np.int64)
    if len(np.unique(keys, axis=0)) != len(keys):
        raise RuntimeError("a rollout is held by two ranks")
    positions = np.unique(keys[:, 0])
    prompt_ids = {position: name for _, part, _ in shared for position, name in part.items()}

    def column(index: int, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(facts[:, index].copy()).to(dtype)

    table = RolloutTable(
        prompt_ids=[prompt_ids[int(position)] for position in positions],
        group=torch.from_numpy(np.searchsorted(positions, keys[:, 0])),
        correct=column(2, torch.bool),
        graded=column(3, torch.bool),
        reward=column(4, torch.float32),
        prompt_length=column(5, torch.int64),
        response_length=column(6, torch.int64),
        truncated=column(7, torch.bool),
        version=column(8, torch.int64),
        step=step,
        newest=column(9, torch.int64),
        goes_on=column(10, torch.bool),
        signals=signals,
        text_columns=text_columns,
    )
    row_of = {(int(position), int(sample)): row for row, (position, sample) in enumerate(keys)}
    samples = []
    for scored in groups:
        for rollout in scored.group.rollouts:
            row, before = row_of[scored.group.position, rollout.sample], rollout.trained
            prompt = torch.cat([scored.group.prompt.tokens, rollout.tokens[:before]])
            support = None if rollout.support is None else rollout.support[before:]
            # The last token went through no layer: nothing was drawn behind it.
            routes = None if rollout.routes is None else pad(rollout.routes, (0, 0, 0, 0, 0, 1), value=-1)
            tokens, logprobs = rollout.tokens[before:], rollout.logprobs[before:]
            samples.append(Sample(row, int(table.group[row]), prompt, tokens, logprobs, support, routes))
    return table, samples


def _columns(notes: Sequence[dict[str, float | str]]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The observed facts of all rows as columns: numbers as float64 tensors, texts as lists."""
    signals: dict[str, Tensor] = {}
    text_columns: dict[str, list[str]] = {}
    for name, first in notes[0].items():
        values = [note[name] for note in notes]
        if isinstance(first, str):
            text_columns[name] = values
        else:
            signals[name] = torch.tensor(values, dtype=torch.float64)
    return signals, text_columns


def deliver(samples: Sequence[Sample], table: RolloutTable, owner: Tensor, layout: Layout) -> dict[int, Sample]:
    """Move every rollout to the model replica that trains it; collective.

    Args:
        samples: this rank's rollouts.
        table: the step's facts.
        owner: [B] int64, the data-parallel rank that trains each row; -1 for none.
        layout: this rank's place in the parallel layout.

    Returns:
        The rollouts of this rank's replica, by row; the same on all its ranks.
    """
    by_head: list[list[Sample]] = [[] for _ in range(layout.world)]
    for sample in sorted(samples, key=lambda s: s.row):
        if (dp_rank := int(owner[sample.row])) >= 0:
            by_head[layout.head_of(dp_rank)].append(sample)
    rows_sent = [[sample.row for sample in part] for part in by_head]
    told: list[tuple[list[list[int]], _Extras]] = [None] * layout.world  # type: ignore[list-item]
    dist.all_gather_object(told, (rows_sent, _Extras.of(samples)))
    rows_from = [rows for rows, _ in told]
    extras = _Extras(max(each.support for _, each in told), max(each.routes for _, each in told))

    def word_count(rows: Sequence[int]) -> int:
        return sum(sum(_word_counts(table, row, extras)) for row in rows)

    # One int32 word a token id, also of supports, one a log-prob (its bits), and one for two numbers of experts.
    outgoing = [_encode(sample, extras) for part in by_head for sample in part]
    sent = torch.cat(outgoing) if outgoing else torch.empty(0, dtype=torch.int32)
    send_sizes = [word_count(rows) for rows in rows_sent]
    receive_sizes = [word_count(rows_from[source][layout.rank]) for source in range(layout.world)]
    device = platform().device
    received = torch.empty(sum(receive_sizes), dtype=torch.int32, device=device)
    dist.all_to_all_single(received, sent.to(device), receive_sizes, send_sizes)

    head = layout.head_of(layout.dp_rank)
    order = [row for source in range(layout.world) for row in rows_from[source][head]]
    if layout.tp * layout.cp * layout.pp > 1:
        if not layout.is_head:
            received = torch.empty(word_count(order), dtype=torch.int32, device=device)
        if layout.share.rank == 0:
            dist.broadcast(received, src=head, group=layout.replica_group)
        if layout.cp > 1:
            dist.broadcast(received, group=layout.share.group, group_src=0)
    return _decode(received.cpu(), order, table, extras)


def redistribute(micro_batches: Sequence[MicroBatch], owner: Tensor, layout: Layout) -> ScoredSamples:
    """Move scored rollouts, with their columns, between replicas; collective over the data-parallel ranks.

    Args:
        micro_batches: this rank's, of which each is scored or none is.
        owner: [B] int64, the data-parallel rank that each row goes to; -1 for none.
        layout: this rank's place in the parallel layout.

    Returns:
        The rollouts that this rank then has.
    """
    nothing = {name: values[:0].cpu() for name, values in columns_of(micro_batches[0]).items()}
    found = ScoredSamples({}, {name: {} for name in nothing}, nothing)
    extras = _Extras.of(micro_batches[0].samples)
    headers: list[list[_Header]] = [[] for _ in range(layout.dp)]  # of what goes to each rank
    outgoing: list[list[Tensor]] = [[torch.empty(0, dtype=torch.uint8)] for _ in range(layout.dp)]
    for micro in micro_batches:
        for sample, parts in by_rollout(micro.to(torch.device("cpu"))):
            if (target := int(owner[sample.row])) == layout.dp_rank:
                found.add(sample, parts)
            elif target >= 0:
                headers[target].append((sample.row, sample.group, sample.prompt.numel(), sample.response.numel()))
                outgoing[target].append(_bytes_of(sample, parts))
    if layout.dp == 1:
        return found
    everybodys: list[list[list[_Header]]] = [None] * layout.dp  # type: ignore[list-item]
    dist.all_gather_object(everybodys, headers, group=layout.dp_group)
    incoming = [each[layout.dp_rank] for each in everybodys]  # from each rank
    sent = [torch.cat(each) for each in outgoing]
    sizes = [[_byte_count(header, extras, nothing) for header in each] for each in incoming]
    received = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=platform().device)
    dist.all_to_all_single(
        received,
        torch.cat(sent).to(received.device),
        list(map(sum, sizes)),
        [data.numel() for data in sent],
        group=layout.dp_group,
    )
    pieces = received.cpu().split([size for each in sizes for size in each])
    for header, data in zip([header for each in incoming for header in each], pieces, strict=True):
        found.add(*_from_bytes(data, header, extras, nothing))
    return found


@dataclass(frozen=True, slots=True)
class ScoredSamples:
    """Rollouts by row, with their parts of each column, and a part without elements of each."""

    samples: dict[int, Sample]
    parts: dict[str, dict[int, Tensor]]
    nothing: dict[str, Tensor]

    def add(self, sample: Sample, parts: Mapping[str, Tensor]) -> None:
        self.samples[sample.row] = sample
        for name, values in parts.items():
            self.parts[name][sample.row] = values


def _bytes_of(sample: Sample, parts: Mapping[str, Tensor]) -> Tensor:
    extras = [each for each in (sample.support, sample.routes) if each is not None]
    pieces = (sample.prompt.int(), sample.response.int(), sample.logprobs.float(), *extras, *parts.values())
    return torch.cat([piece.contiguous().view(-1).view(torch.uint8) for piece in pieces])


def _kinds(
    header: _Header, extras: _Extras, nothing: Mapping[str, Tensor]
) -> list[tuple[int, torch.dtype, Sequence[int]]]:
    """The number, dtype and trailing shape of the elements in each piece of a rollout's bytes."""
    _, _, prompt, response = header
    own = [(prompt, torch.int32, ()), (response, torch.int32, ()), (response, torch.float32, ())]
    own += [(response, torch.int32, (extras.support,))] if extras.support else []
    own += [(prompt + response, torch.int16, extras.routes)] if extras.routes else []
    return own + [(response, values.dtype, values.shape[1:]) for values in nothing.values()]


def _byte_count(header: _Header, extras: _Extras, nothing: Mapping[str, Tensor]) -> int:
    return sum(count * dtype.itemsize * prod(shape) for count, dtype, shape in _kinds(header, extras, nothing))


def _from_bytes(
    data: Tensor, header: _Header, extras: _Extras, nothing: Mapping[str, Tensor]
) -> tuple[Sample, dict[str, Tensor]]:
    kinds = _kinds(header, extras, nothing)
    nbytes = [count * dtype.itemsize * prod(shape) for count, dtype, shape in kinds]
    # A copy begins where any dtype may.
    tokens, targets, logprobs, *columns = (
        piece.clone().view(dtype).view(count, *shape)
        for piece, (count, dtype, shape) in zip(data.split(nbytes), kinds, strict=True)
    )
    row, group, *_ = header
    support = columns.pop(0) if extras.support else None
    routes = columns.pop(0) if extras.routes else None
    sample = Sample(row, group, tokens.long(), targets.long(), logprobs, support, routes)
    return sample, dict(zip(nothing, columns, strict=True))


class _Extras(NamedTuple):
    """The trailing shapes of what rollouts may have beside tokens and log-probs; 0 and (): they have none."""

    support: int = 0
    routes: tuple[int, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Extras:
        """Those of some rollouts, of which the widest support counts."""
        widths = [sample.support.shape[1] for sample in samples if sample.support is not None]
        shapes = [tuple(sample.routes.shape[1:]) for sample in samples if sample.routes is not None]
        return cls(max(widths, default=0), max(shapes, default=()))


def _word_counts(table: RolloutTable, row: int, extras: _Extras) -> list[int]:
    """The words of a rollout's prompt, response, log-probs, supports and routes."""
    prompt, response = int(table.prompt_length[row]), int(table.response_length[row])
    experts = (prompt + response) * prod(extras.routes) if extras.routes else 0
    return [prompt, response, response, extras.support * response, -(-experts // 2)]


def _numbers(words: Tensor, tokens: int, shape: tuple[int, ...]) -> Tensor:
    """Routes [tokens, *shape] int16 out of words that hold two numbers each."""
    return words.contiguous().view(torch.int16)[: tokens * prod(shape)].view(tokens, *shape)


def _encode(sample: Sample, extras: _Extras) -> Tensor:
    words = [sample.prompt.int(), sample.response.int(), sample.logprobs.float().view(torch.int32)]
    if extras.support:
        words.append(pad(sample.support, (0, extras.support - sample.support.shape[1]), value=-1).flatten())
    if extras.routes:
        numbers = sample.routes.flatten()
        words.append(pad(numbers, (0, numbers.numel() % 2)).view(torch.int32))
    return torch.cat(words)


def _decode(words: Tensor, order: Sequence[int], table: RolloutTable, extras: _Extras) -> dict[int, Sample]:
    samples, place = {}, 0
    for row in order:
        sizes = _word_counts(table, row, extras)
        prompt, response, *_ = sizes
        tokens, targets, logprobs, support, routes = words[place : place + sum(sizes)].split(sizes)
        samples[row] = Sample(
            row,
            int(table.group[row]),
            tokens.long(),
            targets.long(),
            logprobs.view(torch.float32),
            support.view(response, extras.support) if extras.support else None,
            _numbers(routes, prompt + response, extras.routes) if extras.routes else None,
        )
        place += sum(sizes)
    return samples


def share_from_last_stage(values: Tensor, layout: Layout, *, sum_over_dp: bool) -> Tensor:
    """Give every rank the values of the last pipeline stage; collective.

    Args:
        values: any shape, on the CPU or the device; the same shape on every rank, read on last-stage ranks only.
        sum_over_dp: whether to add them up over data-parallel ranks first.

    Returns:
        The values on the CPU, identical on every rank.
    """
    tensor = values.to(platform().device)
    if layout.is_last_stage and sum_over_dp and layout.dp > 1:
        dist.all_reduce(tensor, group=layout.dp_group)
    if layout.pp > 1:
        dist.broadcast(tensor, src=layout.last_stage_rank, group=layout.pp_group)
    return tensor.cpu()


def from_last_stage(facts: Any, layout: Layout) -> Any:
    """Give every rank of a pipeline a small object of its last stage; collective."""
    if layout.pp == 1:
        return facts
    box = [facts]
    dist.broadcast_object_list(box, src=layout.last_stage_rank, group=layout.pp_group)
    return box[0]
