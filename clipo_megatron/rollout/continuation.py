"""Continuing partial rollouts: which samples of a request still need tokens, and how new tokens are appended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.engine import Request, SamplingParams

Decode = Callable[[Sequence[int]], str]  # token ids -> text without control tokens


def missing_samples(request: Request, params: SamplingParams) -> list[int]:
    """Samples without any rollout yet, which start from the prompt."""
    begun = {rollout.sample for rollout in request.begun}
    return [sample for sample in range(params.samples) if sample not in begun]


def if_finished(rollout: Rollout, params: SamplingParams) -> Rollout | None:
    """The rollout with its final finish if it needs no more tokens; None if it has to continue."""
    if rollout.finish != "abort":
        return rollout
    if rollout.tokens.numel() < params.token_limit(rollout.trained):
        return None
    return replace(rollout, finish=params.finish_at(rollout.tokens.numel()))


def append_tokens(
    begun: Rollout | None,
    tokens: Tensor,
    logprobs: Tensor,
    versions: Tensor,
    *,
    sample: int,
    finish: Literal["stop", "length", "abort"],
    params: SamplingParams,
    decode: Decode,
    support: Tensor | None = None,
    routes: Tensor | None = None,
) -> Rollout:
    """A partial rollout (None: a new one) with `tokens`, `logprobs` and `versions` [n] appended, and `support` [n, S].

    `routes` follow those that it has.

    The text is decoded from all tokens at once: engines decode as they go, and lose or add bytes of a character that
    several tokens share.
    """
    if begun is not None and begun.routes is not None:
        routes = begun.routes if routes is None else torch.cat((begun.routes, routes))
    if begun is not None:
        tokens = torch.cat((begun.tokens, tokens))
        logprobs = torch.cat((begun.logprobs, logprobs))
        versions = torch.cat((begun.versions, versions))
        if begun.support is not None and support is not None:
            width = max(begun.support.shape[1], support.shape[1])
            support = torch.cat([pad(each, (0, width - each.shape[1]), value=-1) for each in (begun.support, support)])
    return Rollout(
        tokens=tokens,
        logprobs=logprobs,
        text=decode(tokens.tolist()),
        finish=params.finish_at(tokens.numel()) if finish == "length" else finish,
        versions=versions,
        sample=sample,
        trained=0 if begun is None else begun.trained,
        support=support,
        routes=routes,
    )
