"""What a server's answer must be to become a rollout, whatever engine gave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from clipo_megatron.flow import Finish, Rollout
from clipo_megatron.rollout.engine import Request, SamplingParams

Decode = Callable[[Sequence[int]], str]  # token ids -> text without special tokens

_ABOVE_ZERO = 1e-4  # that rounding may put a log-prob above 0


class BadAnswer(ValueError):
    """An answer that cannot be what was asked for; the message is part of a sentence."""


@dataclass(slots=True)
class Continuation:
    """Tokens that one call added to one sample."""

    tokens: np.ndarray  # [n] int64
    logprobs: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int64
    finish: Finish
    text: str  # of these tokens, as the engine decoded them


def checked(
    tokens: Any,
    logprobs: Any,
    versions: np.ndarray,
    text: Any,
    *,
    finish: Any,
    matched: Any = None,
    budget: int,
    stop_ids: Sequence[int],
) -> Continuation:
    """A piece out of what a server said, each part of it judged.

    Args:
        tokens: ids, in order.
        logprobs: one a token.
        versions: [n] int64, one a token.
        text: of the tokens.
        finish: the reason the engine gives: "stop", "length" or "abort".
        matched: the token that the engine says it stopped at, where it says so.
        budget: tokens that were asked for at most.
        stop_ids: tokens that end a response.

    Raises:
        BadAnswer: naming the first thing that cannot be.
    """
    ids = _array(tokens, "token ids", np.integer)
    values = _array(logprobs, "log-probs", np.number).astype(np.float32)
    count = ids.size
    if count and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise BadAnswer(f"token id {ids.min() if ids.min() < 0 else ids.max()}, which is no id")
    if values.size != count:
        raise BadAnswer(f"{count} tokens with {values.size} log-probs")
    if not np.isfinite(values).all() or (count and values.max() > _ABOVE_ZERO):
        wrong = values[~np.isfinite(values) | (values > _ABOVE_ZERO)][0]
        raise BadAnswer(f"the log-prob {wrong}")
    if versions.size != count:
        raise BadAnswer(f"{count} tokens with versions of {versions.size}")
    if count > budget:
        raise BadAnswer(f"{count} tokens where at most {budget} were asked for")
    if not isinstance(text, str):
        raise BadAnswer(f"a text that is a {type(text).__name__}")
    if finish not in ("stop", "length", "abort"):
        raise BadAnswer(f"the finish reason {str(finish)[:40]!r}")
    ends = np.isin(ids, np.asarray(stop_ids, dtype=np.int64)) | (ids == matched if type(matched) is int else False)
    if ends[:-1].any():
        raise BadAnswer(f"tokens after the stop token {ids[int(ends.argmax())]}")
    stopped = bool(count and ends[-1])
    if finish == "stop" and not stopped:
        raise BadAnswer(f"a stop without a stop token at the end ({matched!r} matched)")
    if finish == "length" and count < budget:
        raise BadAnswer(f"a cut after {count} of {budget} tokens; is the server's context long enough?")
    if finish == "abort" and (stopped or count == budget):  # interrupted at the very end
        finish = "stop" if stopped else "length"
    return Continuation(ids.astype(np.int64), values, versions, cast(Finish, finish), text)


def missing_samples(request: Request, params: SamplingParams) -> list[int]:
    """Samples of which nothing is there yet, to be asked for from the beginning."""
    begun = {rollout.sample for rollout in request.begun}
    return [sample for sample in range(params.samples) if sample not in begun]


def settled(rollout: Rollout, params: SamplingParams) -> Rollout | None:
    """A begun rollout that needs no more tokens, as it then stands; None if it has to go on."""
    if rollout.finish != "abort":
        return rollout
    if rollout.tokens.numel() < params.limit(rollout.trained):
        return None
    return replace(rollout, finish=params.cut(rollout.tokens.numel()))


def joined(
    begun: Rollout | None, piece: Continuation, sample: int, params: SamplingParams, decode: Decode | None
) -> Rollout | None:
    """The rollout of a sample after one more piece; None if there is not one token.

    Its text is decoded from all its tokens. Engines decode as they go, and lose or add bytes that are no character;
    theirs is taken only where there is no `decode`.

    Raises:
        BadAnswer: its versions are older than those of the tokens before.
    """
    if begun is None and not piece.tokens.size:
        return None
    tokens, logprobs, versions = (torch.from_numpy(each) for each in (piece.tokens, piece.logprobs, piece.versions))
    if begun is not None:
        if versions.numel() and int(versions[0]) < int(begun.versions[-1]):
            raise BadAnswer(f"tokens of version {int(versions[0])} after ones of {int(begun.versions[-1])}")
        tokens = torch.cat((begun.tokens, tokens))
        logprobs = torch.cat((begun.logprobs, logprobs))
        versions = torch.cat((begun.versions, versions))
    text = piece.text if decode is None else decode(tokens.tolist())
    finish = params.cut(tokens.numel()) if piece.finish == "length" else piece.finish
    return Rollout(tokens, logprobs, text, finish, versions, sample, 0 if begun is None else begun.trained)


def version_number(said: Any) -> int:
    """A version as a server spells it; -1 for one that was never given by a trainer."""
    return int(said) if isinstance(said, str) and said.isdecimal() else -1


def _array(values: Any, what: str, kind: type) -> np.ndarray:
    if not isinstance(values, (list, tuple)):
        raise BadAnswer(f"no list of {what}")
    try:
        array = np.asarray(values) if values else np.empty(0, dtype=np.int64)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or not np.issubdtype(array.dtype, kind):
        raise BadAnswer(f"{what} that are not numbers")
    return array
