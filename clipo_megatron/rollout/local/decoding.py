"""One wave of the local engine: its prompts are prefilled once, then their samples are decoded together.

The columns of the cache are the same for all rows of a wave (c: shared prefix, L: longest prompt, t: tokens drawn):

    [ shared prefix 0 .. c-1 | masked | the prompt's own tokens .. L-1 | response L .. L+t-1 ]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clipo_megatron.rollout.engine import SamplingParams
from clipo_megatron.rollout.local.kv_cache import KVCache, PrefilledBatch, room_for
from clipo_megatron.rollout.local.sampling import draw

PREFILL_TOKENS = 4096  # of one prefill forward, padding included; a longer prompt gets a forward of its own
_HEAD_SLICE = 2048  # rows of the LM head that are multiplied at once on a CPU
_MIN_SHARED_PREFIX = 8  # tokens; a shorter prefix is not worth a forward of its own


class NonFiniteLogits(RuntimeError):
    """The model produced NaN or infinite log-probs."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompts of a wave after their prefill, in order."""

    parts: list[PrefilledBatch]
    logits: Tensor  # [P, V] after each prompt's last token
    lengths: Tensor  # [P] int64
    shared: int  # c
    longest: int  # L


@torch.inference_mode()
def prefill(model: nn.Module, prompts: Sequence[Tensor], check: Callable[[], None]) -> Prefilled:
    """Run every prompt ([P_i] int64, longest first) through the model once, similar lengths in one forward.

    `check` is called before each forward, and may raise.
    """
    device = model.device
    shared = shared_prefix(prompts)
    prefix = None
    if shared:
        check()
        prefix = KVCache(model.config.num_hidden_layers)
        _forward(model, prompts[0][None, :shared].to(device), torch.arange(shared, device=device)[None], None, prefix)
    parts, states = [], []
    for start, stop in _similar_lengths([prompt.numel() - shared for prompt in prompts]):
        check()
        part, last = _prefill_part(model, [prompt[shared:] for prompt in prompts[start:stop]], shared, prefix)
        parts.append(part)
        states.append(last)
    lengths = torch.tensor([prompt.numel() for prompt in prompts], device=device)
    return Prefilled(parts, Head(model, len(prompts))(torch.cat(states)), lengths, shared, int(lengths.max()))


def window_of(model: nn.Module) -> int | None:
    """The length of the model's sliding window, the token itself included; None if attention is not limited."""
    return getattr(model.config, "sliding_window", None)


def shared_prefix(prompts: Sequence[Tensor]) -> int:
    """The length of the prefix that all prompts share, or 0 if it is not worth a forward of its own.

    Every prompt keeps at least one token of its own, whose logits are needed.
    """
    if len(prompts) < 2:
        return 0
    shared = min(prompt.numel() for prompt in prompts) - 1
    for prompt in prompts[1:]:
        differs = (prompt[:shared] != prompts[0][:shared]).nonzero()
        if differs.numel():
            shared = int(differs[0])
    return shared if shared >= _MIN_SHARED_PREFIX else 0


def _similar_lengths(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive prompts (longest first) that fit into a padded forward of `PREFILL_TOKENS`."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, PREFILL_TOKENS // lengths[start]))
        yield start, stop
        start = stop


def _prefill_part(
    model: nn.Module, own: Sequence[Tensor], shared: int, prefix: KVCache | None
) -> tuple[PrefilledBatch, Tensor]:
    """Prefill the prompts' own tokens, padded on the left, after the prefix; also returns their last states [n, H]."""
    device, rows, width = model.device, len(own), own[0].numel()
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    for row, prompt in enumerate(own):
        tokens[row, width - prompt.numel() :] = prompt
    padding = torch.tensor([width - prompt.numel() for prompt in own], device=device)[:, None]
    column = torch.arange(width, device=device)
    positions = shared + (column - padding).clamp(min=0)

    mask = None  # without padding or prefix attention is plain causal, for which kernels need no mask
    window = window_of(model)
    if prefix is not None or bool(padding.any()):
        visible = (column >= padding)[:, None, :] & (column <= column[:, None])
        if window is not None:
            visible &= column > column[:, None] - window
        visible |= torch.eye(width, dtype=torch.bool, device=device)  # a fully masked row would give NaN
        before = torch.ones(rows, width, shared, dtype=torch.bool, device=device)
        if window is not None:
            before &= torch.arange(shared, device=device) > positions[..., None] - window
        mask = torch.cat((before, visible), dim=-1)[:, None]
    cache = KVCache(model.config.num_hidden_layers) if prefix is None else prefix.repeated(rows, room=shared + width)
    return PrefilledBatch(cache, width), _forward(model, tokens.to(device), positions, mask, cache)


def _forward(model: nn.Module, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
    """The last tokens' final states [n, H] for tokens [n, l]; `mask` [n, 1, l, columns] is True where visible."""
    outputs = model.get_decoder()(
        input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    )
    return outputs.last_hidden_state[:, -1]


class Head:
    """The LM head, which writes into a buffer that every call reuses.

    On a CPU it multiplies slices of the vocabulary that fit into the processor's cache. Together with the buffer this
    halves its time at V = 49,152.
    """

    def __init__(self, model: nn.Module, rows: int):
        weight = model.get_output_embeddings().weight
        self._slices = weight.split(_HEAD_SLICE if weight.device.type == "cpu" else weight.shape[0])
        self._buffer = weight.new_empty(rows, weight.shape[0])

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [n, V] of states [n, H]; they are valid until the next call."""
        logits = self._buffer[: states.shape[0]]
        start = 0
        for part in self._slices:
            torch.mm(states, part.t(), out=logits[:, start : start + part.shape[0]])
            start += part.shape[0]
        return logits


class DecodeBatch:
    """Rows that are decoded together: `repeats` neighbouring rows for each prompt of the wave.

    Args:
        model: a transformers decoder.
        prompts: the wave's prompts after their prefill.
        repeats: how many samples of each prompt are drawn.
        params: how to sample.
        limits: the largest number of new tokens of each row.
        uniforms: random numbers [rows, longest limit] float64; None if greedy.

    `tokens` (int64) and `logprobs` (float32), both [rows, longest limit], fill up from the left with each `step`, as
    does `support` (int32) [rows, longest limit, top_k], which is None unless `params` ask for it.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prefilled,
        repeats: int,
        params: SamplingParams,
        limits: Sequence[int],
        uniforms: np.ndarray | None,
    ):
        self._model, self._params, self._most = model, params, max(limits)
        device = model.device
        count = prompts.lengths.numel() * repeats
        self.length = 0  # t
        self.tokens = torch.zeros(count, self._most, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(count, self._most, dtype=torch.float32, device=device)
        self.support: Tensor | None = None
        if params.wants_support:
            width = min(params.top_k, model.config.vocab_size)
            self.support = torch.full((count, self._most, width), -1, dtype=torch.int32, device=device)
        self._limits = torch.tensor(limits, device=device)
        self._uniforms = None if uniforms is None else torch.from_numpy(uniforms).to(device)
        self._stop = torch.tensor(params.stop_ids, dtype=torch.int64, device=device)
        self._live = torch.arange(count, device=device)  # index in the batch -> row
        self._start(prompts, repeats)

    @property
    def live(self) -> int:
        """The number of rows that have not finished."""
        return self._live.numel()

    @property
    def live_rows(self) -> list[int]:
        """The rows that have not finished, in order."""
        return sorted(self._live.tolist())

    @torch.inference_mode()
    def _start(self, prompts: Prefilled, repeats: int) -> None:
        self._longest, self._shared, self._window = prompts.longest, prompts.shared, window_of(self._model)
        self._prompt_length = prompts.lengths.repeat_interleave(repeats)
        self._logits = prompts.logits.repeat_interleave(repeats, dim=0)
        self._head = Head(self._model, self._logits.shape[0])
        most = prompts.longest + self._most
        self._cache = KVCache.assembled(
            prompts.parts,
            repeats=repeats,
            shared=prompts.shared,
            length=prompts.longest,
            room=min(most, room_for(prompts.longest)),
        )
        own = prompts.longest - self._prompt_length + prompts.shared  # first column of each prompt's own tokens
        column = torch.arange(most, device=own.device)
        self._visible = ((column < prompts.shared) | (column >= own[:, None]))[:, None, None, :]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, bool]]:
        """Draw the next token of every live row.

        Returns:
            The rows that finished, each with whether a stop token ended it.

        Raises:
            NonFiniteLogits: a log-prob is not finite.
        """
        if self.length:
            self._advance()
        live, params = self._live, self._params
        drawn, logprobs, support = draw(
            self._logits,
            None if self._uniforms is None else self._uniforms[live, self.length],
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        if not bool(logprobs.isfinite().all()):
            raise NonFiniteLogits
        self.tokens[live, self.length] = drawn
        self.logprobs[live, self.length] = logprobs
        if self.support is not None:
            self.support[live, self.length] = support
        self.length += 1
        stopped = torch.isin(drawn, self._stop)
        done = stopped | (self._limits[live] <= self.length)
        if not bool(done.any()):
            return []
        finished = list(zip(live[done].tolist(), stopped[done].tolist(), strict=True))
        self._drop(done)
        return finished

    def _visible_now(self) -> Tensor:
        """Which columns the newest token of each live row attends to, [live, 1, 1, columns] bool."""
        live, column = self._live, self._longest + self.length - 1
        visible = self._visible[: live.numel(), :, :, : column + 1]
        if self._window is None or self._window > column:
            return visible
        # Distances are correct once the columns of the shared prefix are moved next to the prompt's own tokens.
        moved = torch.arange(column + 1, device=live.device).repeat(live.numel(), 1)
        moved[:, : self._shared] += (self._longest - self._prompt_length[live])[:, None]
        return visible & (moved > column - self._window)[:, None, None, :]

    def _advance(self) -> None:
        live = self._live
        states = _forward(
            self._model,
            self.tokens[live, self.length - 1][:, None],
            (self._prompt_length[live] + self.length - 1)[:, None],
            self._visible_now(),
            self._cache,
        )
        self._logits = self._head(states)

    def _drop(self, done: Tensor) -> None:
        """Remove finished rows by moving the last live ones into their places; no other row is copied."""
        kept = int((~done).sum())
        if kept:
            holes = done[:kept].nonzero()[:, 0]
            sources = kept + (~done[kept:]).nonzero()[:, 0]
            self._live[holes] = self._live[sources]
            self._visible[holes] = self._visible[sources]
            self._cache.move_rows(holes, sources, kept)
        self._live = self._live[:kept]
