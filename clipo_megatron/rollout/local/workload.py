"""What a local engine has to decode and how far it is: requests, waves, and rollouts that have begun.

Between two forwards a wave can be cut: what it has becomes partial rollouts, which go on from their tokens. That is how
rollouts go on under new weights, and how they are handed back when they are stopped.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rollout.continuation import Decode, append_tokens, if_finished, missing_samples
from clipo_megatron.rollout.engine import Request, SamplingParams, ignore
from clipo_megatron.rollout.local.decoding import DecodeBatch, prefill
from clipo_megatron.rollout.local.sampling import rollout_uniforms


@dataclass(slots=True)
class LoadedModel:
    """A transformers decoder and what it holds."""

    model: nn.Module
    decode_text: Decode
    batch_size: int  # sequences decoded at once
    version: int = -1  # of its weights; -1: they are not complete
    paused: bool = False  # whether no thread decodes until the engine is resumed

    @property
    def can_generate(self) -> bool:
        return self.version >= 0 and not self.paused


class _Line(NamedTuple):
    """Tokens that one or more samples of a request continue."""

    index: int  # of the request in the workload
    prompt: Prompt
    tokens: Tensor  # [P] int64: the prompt's tokens, and those of a partial rollout
    samples: tuple[int, ...]
    limit: int  # new tokens of each sample, at most
    begun: Rollout | None = None
    drawn: int = 0  # of the tokens, those drawn by random numbers of the same sequence


class _Wave(NamedTuple):
    """Lines with the same number of samples, longest first, that are decoded together."""

    lines: list[_Line]
    params: SamplingParams


@dataclass(slots=True)
class _UnderWay:
    """The wave that is decoded now."""

    wave: _Wave
    version: int  # of the weights that its cache was computed with
    start: int = 0  # samples of each line that are complete, or in `batch`
    rows: list[tuple[_Line, int]] = field(default_factory=list)  # line and sample of each row of `batch`
    batch: DecodeBatch | None = None


@dataclass(slots=True)
class _Open:
    """A request without all its rollouts, and those that it has."""

    request: Request
    samples: int
    rollouts: dict[int, Rollout]  # by sample
    on_group: Callable[[RolloutGroup], None] = ignore  # called once it has all


class _NewWeights(Exception):
    """The weights changed since the cache of the wave under way was computed."""


class Workload:
    """The requests of one or more calls, decoded in the order of the calls; one thread at a time uses it.

    Attributes:
        check: called before each forward; it may raise, which ends the decoding, or wait while the weights change.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.check: Callable[[], None] = lambda: None
        self._open: dict[int, _Open] = {}
        self._numbers = count()
        self._ready: deque[RolloutGroup] = deque()
        self._waves: deque[_Wave] = deque()
        self._under_way: _UnderWay | None = None
        self._finished: Iterator[list[tuple[int, Rollout]]] = iter(())

    @property
    def unanswered(self) -> list[Request]:
        """The requests whose groups are not complete."""
        return [each.request for each in self._open.values()]

    @property
    def version(self) -> int:
        """The version of the weights that the wave under way is decoded with."""
        return self._under_way.version if self._under_way else self.loaded.version

    @property
    def has_work(self) -> bool:
        """Whether `next_group` has something to do."""
        return bool(self._ready or self._waves or self._under_way)

    def add(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Append requests; their rollouts that are complete already count."""
        lines: list[_Line] = []
        for request in requests:
            index = next(self._numbers)
            self._open[index] = _Open(request, params.samples, {})
            lines += _lines(index, request, params)
            for begun in request.begun:
                if (rollout := if_finished(begun, params)) is not None:
                    self._finish(index, rollout)
        self._waves.extend(_waves(lines, params, self.loaded.batch_size))

    def tell(self, on_group: Callable[[RolloutGroup], None]) -> None:
        """Let whoever decodes call `on_group` with each group as it gets complete, of the requests that are here."""
        for each in self._open.values():
            each.on_group = on_group

    def next_group(self) -> RolloutGroup | None:
        """Decode until a group is complete; None if nothing is left.

        Raises:
            NonFiniteLogits: a log-prob is not finite.
        """
        while not self._ready:
            if (found := next(self._finished, None)) is not None:
                for index, rollout in found:
                    self._finish(index, rollout)
            elif self._waves:
                self._finished = self._decode_waves()
            else:
                return None
        return self._ready.popleft()

    def stop(self) -> list[RolloutGroup]:
        """Remove all requests; return complete groups that nobody took, and those with at least one token."""
        self._cut()
        for line in (line for wave in self._waves for line in wave.lines):
            if line.begun is not None:
                self._open[line.index].rollouts[line.begun.sample] = line.begun
        groups = [*self._ready, *(_group(each) for each in self._open.values() if each.rollouts)]
        self.clear()
        return groups

    def clear(self) -> None:
        """Remove all requests, and free the cache."""
        self._open, self._ready, self._waves, self._under_way = {}, deque(), deque(), None
        self._finished = iter(())

    def _finish(self, index: int, rollout: Rollout) -> None:
        open_ = self._open[index]
        open_.rollouts[rollout.sample] = rollout
        if len(open_.rollouts) == open_.samples:
            group = _group(self._open.pop(index))
            open_.on_group(group)
            self._ready.append(group)

    def _decode_waves(self) -> Iterator[list[tuple[int, Rollout]]]:
        while self._waves:
            under_way = self._under_way = _UnderWay(self._waves.popleft(), self.loaded.version)
            try:
                yield from self._decode(under_way)
            except _NewWeights:
                self._cut()
            self._under_way = None

    def _decode(self, under_way: _UnderWay) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield (index of the request, rollout) of the samples that finish with a token, all of them at once."""
        (lines, params), size = under_way.wave, self.loaded.batch_size

        def check() -> None:
            self.check()
            if self.loaded.version != under_way.version:
                raise _NewWeights

        prefilled = prefill(self.loaded.model, [line.tokens for line in lines], check)
        for start in range(0, len(lines[0].samples), size):
            rows = [(line, sample) for line in lines for sample in line.samples[start : start + size]]
            limits = [line.limit for line, _ in rows]
            uniforms = None
            if params.temperature > 0:
                uniforms = np.stack([_uniforms(line, sample, params, max(limits)) for line, sample in rows])
            batch = DecodeBatch(self.loaded.model, prefilled, len(rows) // len(lines), params, limits, uniforms)
            under_way.start, under_way.rows, under_way.batch = start + size, rows, batch
            while batch.live:
                check()
                yield [
                    (rows[row][0].index, self._rollout(under_way, row, "stop" if stopped else "length"))
                    for row, stopped in batch.step()
                ]

    def _rollout(self, under_way: _UnderWay, row: int, finish: Literal["stop", "length", "abort"]) -> Rollout:
        """What a row of the batch has drawn, with the tokens that it went on from."""
        batch, (line, sample) = under_way.batch, under_way.rows[row]
        return append_tokens(
            line.begun,
            # Clones, so that a short response does not keep the whole batch's tensors alive.
            batch.tokens[row, : batch.length].clone().cpu(),
            batch.logprobs[row, : batch.length].clone().cpu(),
            torch.full((batch.length,), under_way.version),
            sample=sample,
            finish=finish,
            params=under_way.wave.params,
            decode=self.loaded.decode_text,
            support=None if batch.support is None else batch.support[row, : batch.length].clone().cpu(),
        )

    def _cut(self) -> None:
        """Put what is left of the wave under way back in front of the others; its rollouts go on from their tokens."""
        if (under_way := self._under_way) is None:
            return
        (lines, params), batch, start = under_way.wave, under_way.batch, under_way.start
        begun: list[_Line] = []
        if batch is not None and batch.length:
            for row in batch.live_rows:
                line, sample = under_way.rows[row]
                partial = self._rollout(under_way, row, "abort")
                begun.append(
                    line._replace(
                        tokens=torch.cat((line.prompt.tokens, partial.tokens)),
                        samples=(sample,),
                        limit=line.limit - batch.length,
                        begun=partial,
                        drawn=line.drawn + batch.length,
                    )
                )
        elif batch is not None:
            start -= self.loaded.batch_size
        rest = [line._replace(samples=line.samples[start:]) for line in lines if line.samples[start:]]
        size = self.loaded.batch_size
        self._waves.extendleft(reversed([*_waves(begun, params, size), *_waves(rest, params, size)]))
        self._under_way = None


def _group(open_: _Open) -> RolloutGroup:
    rollouts = [open_.rollouts[sample] for sample in sorted(open_.rollouts)]
    return RolloutGroup(open_.request.position, open_.request.prompt, rollouts)


def _lines(index: int, request: Request, params: SamplingParams) -> Iterator[_Line]:
    """The tokens from which a request's unfinished samples are decoded."""
    prompt = request.prompt
    if missing := missing_samples(request, params):
        yield _Line(index, prompt, prompt.tokens, tuple(missing), params.token_limit())
    for begun in request.begun:
        if if_finished(begun, params) is None:
            limit = params.token_limit(begun.trained) - begun.tokens.numel()
            yield _Line(index, prompt, torch.cat((prompt.tokens, begun.tokens)), (begun.sample,), limit, begun)


def _waves(lines: Sequence[_Line], params: SamplingParams, batch_size: int) -> Iterator[_Wave]:
    """Group lines with the same number of samples, longest first, into waves that fill the batch.

    A line with more samples than the batch has rows is a wave by itself.
    """
    by_samples: dict[int, list[_Line]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line.tokens.numel(), reverse=True):
        by_samples[len(line.samples)].append(line)
    for samples, alike in sorted(by_samples.items(), reverse=True):
        size = max(1, batch_size // samples)
        for start in range(0, len(alike), size):
            yield _Wave(alike[start : start + size], params)


def _uniforms(line: _Line, sample: int, params: SamplingParams, most: int) -> np.ndarray:
    """The numbers that select the next `most` tokens of a sample, [most] float64."""
    prompt = line.prompt
    whole = rollout_uniforms(
        line.drawn + most,
        seed=params.seed,
        step=params.step,
        prompt_id=prompt.id,
        sample=sample,
        occurrence=prompt.occurrence,
    )
    return whole[line.drawn :]
