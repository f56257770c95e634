"""Sampling: the uniform random numbers of a rollout, and how a number selects a token.

The numbers depend only on (seed, step, prompt id, occurrence, sample), so the same policy gives the same responses
whatever the batch, its order and the rank that generates.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256  # tokens in a block of `_inverse_cdf`
_CPU_CHUNK = 2**19  # logits that are processed at once on a CPU
_TOP_P_CANDIDATES = 1024  # tried first: sorting the whole vocabulary takes about seven times as long


def rollout_uniforms(
    count: int, *, seed: int, step: int, prompt_id: str, sample: int, occurrence: int = 0
) -> np.ndarray:
    """The numbers in [0, 1) that select a rollout's tokens, [count] float64.

    A larger count extends the sequence without changing its beginning. Philox takes the whole 128-bit hash as its key,
    so that two rollouts of a run never share a sequence. A prompt id ends with a number, "<source>/<row>", so no id
    equals another one with its `occurrence`.
    """
    copy = f"#{occurrence}" if occurrence else ""
    name = f"{seed}/{step}/{sample}/{prompt_id}{copy}".encode()
    key = int.from_bytes(blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def draw(
    logits: Tensor, uniforms: Tensor | None, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token for each row.

    Args:
        logits: [n, V], any floating dtype.
        uniforms: [n] float64 in [0, 1); unused if greedy.
        temperature: 0 is greedy, with log-probs of temperature 1.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: of these, keeps the smallest set of most likely tokens whose renormalised mass reaches top_p.

    Returns:
        Tokens [n] int64; their log-probs [n] float32 under the distribution that they are drawn from; and with top_k,
        unless greedy, its support [n, top_k] int32: ids of the tokens that are kept, padded with -1.
    """
    rows, vocabulary = logits.shape
    # Small chunks reuse small buffers; buffers for a whole batch would be mapped anew for every token.
    chunk = max(1, _CPU_CHUNK // vocabulary) if logits.device.type == "cpu" else rows
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    support = logits.new_empty(rows, min(top_k, vocabulary), dtype=torch.int32) if top_k and temperature else None
    for start in range(0, rows, chunk):
        some = slice(start, start + chunk)
        share = None if uniforms is None else uniforms[some]
        tokens[some], logprobs[some], kept = _draw(logits[some].float(), share, temperature, top_k, top_p)
        if support is not None:
            support[some] = kept
    return tokens, logprobs, support


def _draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    if temperature not in (0, 1):
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    elif top_k or top_p < 1:
        tokens, kept, support = _draw_truncated(logprobs.exp(), uniforms, top_k or _TOP_P_CANDIDATES, top_k, top_p)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0] - kept.log(), support
    else:
        tokens = _inverse_cdf(logprobs.exp(), uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], None


def _draw_truncated(
    probs: Tensor, uniforms: Tensor, candidates: int, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw among the `candidates` most likely tokens, or among all in rows where these lack the mass for top_p.

    Returns:
        Tokens [n] int64, the mass [n] float64 that is kept, and the ids of the tokens with it [n, candidates] int32.
    """
    vocabulary = probs.shape[1]
    mass, tokens = probs.topk(min(candidates, vocabulary), dim=-1)
    total = mass.sum(-1, dtype=torch.float64) if top_k else torch.ones_like(uniforms)
    if top_p < 1:
        before = mass.cumsum(-1, dtype=torch.float64) - mass
        mass = mass.masked_fill(before >= top_p * total[:, None], 0.0)
    drawn = tokens.gather(1, _inverse_cdf(mass, uniforms)[:, None])[:, 0]
    kept = mass.sum(-1, dtype=torch.float64)
    if not top_k and candidates < vocabulary:
        # Row by row, so that a row's token does not depend on its neighbours even if probabilities tie.
        short = (kept < top_p).nonzero()[:, 0]
        if short.numel():
            drawn[short], kept[short], _ = _draw_truncated(probs[short], uniforms[short], vocabulary, top_k, top_p)
    return drawn, kept, tokens.int().masked_fill_(mass <= 0, -1)


def _inverse_cdf(mass: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulative mass [n, V] exceeds the share `uniforms` [n] of its total; [n] int64.

    It searches the blocks first, then the tokens of one block: a float64 cumulative sum over a whole vocabulary would
    take longer than the softmax. An index without mass is never returned.
    """
    width = mass.shape[1]
    whole = width - width % _BLOCK
    sums = mass[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1) if whole else mass[:, :0]
    if whole < width:
        sums = torch.cat((sums, mass[:, whole:].sum(-1, keepdim=True)), dim=1)
    edges = sums.cumsum(-1, dtype=torch.float64)
    share = (uniforms * edges[:, -1])[:, None]
    block = _first_above(edges, share)
    start = torch.where(block > 0, edges.gather(1, (block - 1).clamp(min=0)), 0.0)

    columns = block * _BLOCK + torch.arange(min(_BLOCK, width), device=mass.device)
    inside = mass.gather(1, columns.clamp(max=width - 1)).masked_fill(columns >= width, 0.0)
    index = block * _BLOCK + _first_above(inside.cumsum(-1, dtype=torch.float64), share - start)
    return index.clamp(max=width - 1)[:, 0]  # only a row with a non-finite value gets past the end


def _first_above(edges: Tensor, share: Tensor) -> Tensor:
    """The first column of non-decreasing `edges` [n, m] above `share` [n, 1], at most the column of the last rise."""
    below_total = torch.nextafter(edges[:, -1:], torch.zeros_like(share))
    index = torch.searchsorted(edges, torch.minimum(share, below_total), right=True)
    return index.clamp(max=edges.shape[1] - 1)
