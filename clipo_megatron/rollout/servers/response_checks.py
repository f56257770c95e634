"""Checks that turn the answer of any engine's server into tokens of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_ROUNDING = 1e-4  # by which rounding may put a log-prob above 0


class BadAnswer(ValueError):
    """The server answered something that cannot be what was asked for; the message is part of a sentence."""


@dataclass(slots=True)
class Continuation:
    """Tokens that one call added to one sample."""

    tokens: np.ndarray  # [n] int64
    logprobs: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int64, of the weights that produced each token
    finish: Literal["stop", "length", "abort"]


def checked(
    tokens: Any,
    logprobs: Any,
    versions: np.ndarray,
    *,
    finish: Any,
    matched: Any = None,
    budget: int,
    stop_ids: Sequence[int],
) -> Continuation:
    """Check every part of a server's answer for one sample and return it as a continuation.

    Args:
        tokens: token ids, in order.
        logprobs: one for each token.
        versions: [n] int64, one for each token.
        finish: the reason the engine gives: "stop", "length" or "abort".
        matched: the token that the engine says it stopped at, if it says so.
        budget: the largest number of tokens that was asked for.
        stop_ids: tokens that end a response.

    Raises:
        BadAnswer: names the first part that is wrong.
    """
    ids = _array(tokens, "token ids", np.integer)
    values = _array(logprobs, "log-probs", np.number).astype(np.float32)
    count = ids.size
    if count and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise BadAnswer(f"token id {ids.min() if ids.min() < 0 else ids.max()}, which is no id")
    if values.size != count:
        raise BadAnswer(f"{count} tokens with {values.size} log-probs")
    if not np.isfinite(values).all() or (count and values.max() > _ROUNDING):
        wrong = values[~np.isfinite(values) | (values > _ROUNDING)][0]
        raise BadAnswer(f"the log-prob {wrong}")
    if versions.size != count:
        raise BadAnswer(f"{count} tokens with versions of {versions.size}")
    if count > budget:
        raise BadAnswer(f"{count} tokens where at most {budget} were asked for")
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
    return Continuation(ids.astype(np.int64), values, versions, finish)


def version_number(said: Any) -> int:
    """The number in a server's spelling of a version; -1 for weights that no trainer has numbered."""
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
