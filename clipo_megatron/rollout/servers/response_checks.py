"""Checks that turn the answer of any engine's server into tokens of a rollout.

Every field is bounded by what was asked for, because a server may be broken, or another program, or hostile.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipo_megatron.rollout.engine import Routing, SamplingParams

_ROUNDING = 1e-4  # by which rounding may put a log-prob above 0
# No float32 is as small as exp(-104), so nothing that is drawn by its probability has a smaller log-prob. Evaluation
# asks for log-probs of another temperature than it draws with, and does not read them.
_LEAST_DRAWN, _LEAST = -104.0, -1e4
_MOST = 1 << 16  # ranks of one server, or requests that it computes at once
# Bytes of an answer: of a token its numbers and its text, which may be 128 escaped characters; of a sample the rest.
_TOKEN_BYTES, _PROMPT_TOKEN_BYTES, _SAMPLE_BYTES = 512, 16, 16_384
_SUPPORT_BYTES = 96  # of one token in a support: its id, log-prob and rank, with their names
_ROUTE_BYTES = 6  # of one expert of a token: four bytes in base64


class BadAnswer(ValueError):
    """The server answered something that cannot be what was asked for; the message is part of a sentence."""


def most_bytes(*, samples: int, prompt: int, tokens: int, support: int = 0, experts: int = 0) -> int:
    """The size that an answer with so many samples of a prompt may have, each of so many new tokens at most, with
    supports of at most so many, and routes that name so many experts for each token."""
    routes = (prompt + tokens) * experts * _ROUTE_BYTES
    token = _TOKEN_BYTES + support * _SUPPORT_BYTES
    return samples * (_SAMPLE_BYTES + prompt * _PROMPT_TOKEN_BYTES + tokens * token + routes)


@dataclass(slots=True)
class Continuation:
    """Tokens that one call added to one sample."""

    tokens: np.ndarray  # [n] int64
    logprobs: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int64, of the weights that produced each token
    finish: Literal["stop", "length", "abort"]
    support: np.ndarray | None = None  # [n, S] int32, see `Rollout.support`
    routes: np.ndarray | None = None  # [rows, L, E] int16, see `Rollout.routes`


def checked(
    tokens: Any,
    logprobs: Any,
    versions: np.ndarray,
    *,
    finish: Any,
    matched: Any = None,
    budget: int,
    vocabulary: int,
    params: SamplingParams,
    support: Any = None,
) -> Continuation:
    """Check every part of a server's answer for one sample and return it as a continuation.

    Args:
        tokens: token ids, in order.
        logprobs: one for each token.
        versions: [n] int64, one for each token.
        finish: the reason the engine gives: "stop", "length" or "abort".
        matched: the token that the engine says it stopped at, if it says so.
        budget: the largest number of tokens that was asked for.
        vocabulary: the number of token ids that the model has; 0 if it is unknown.
        params: how sampling was asked for; has the tokens that end a response.
        support: the ids among which each token was drawn, where `params` ask for them.

    Raises:
        BadAnswer: names the first part that is wrong.
    """
    ids = _array(tokens, "token ids", {int}, np.int64)
    values = _array(logprobs, "log-probs", {int, float}, np.float32)
    count = ids.size
    if count and (ids.min() < 0 or ids.max() >= (vocabulary or np.iinfo(np.int32).max)):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise BadAnswer(f"token id {wrong}, which is none of {vocabulary or 'any vocabulary'}")
    if values.size != count:
        raise BadAnswer(f"{count} tokens with {values.size} log-probs")
    least = _LEAST_DRAWN if params.exact_logprobs else _LEAST
    possible = (values >= least) & (values <= _ROUNDING)  # false for what is not finite
    if not possible.all():
        raise BadAnswer(f"the log-prob {values[~possible][0]}")
    if versions.size != count:
        raise BadAnswer(f"{count} tokens with versions of {versions.size}")
    if count > budget:
        raise BadAnswer(f"{count} tokens where at most {budget} were asked for")
    if finish not in ("stop", "length", "abort"):
        raise BadAnswer(f"the finish reason {str(finish)[:40]!r}")
    ends = np.isin(ids, np.asarray(params.stop_ids, dtype=np.int64))
    if type(matched) is int:
        ends |= ids == matched
    if ends[:-1].any():
        raise BadAnswer(f"tokens after the stop token {ids[int(ends.argmax())]}")
    stopped = bool(count and ends[-1])
    if finish == "stop" and not stopped:
        raise BadAnswer(f"a stop without a stop token at the end ({matched!r} matched)")
    if finish == "length" and count < budget:
        raise BadAnswer(f"a cut after {count} of {budget} tokens; is the server's context long enough?")
    if finish == "abort" and (stopped or count == budget):  # interrupted at the very end
        finish = "stop" if stopped else "length"
    return Continuation(
        ids, values, versions, finish, _supports(support, ids, params) if params.wants_support else None
    )


def version_number(said: Any) -> int:
    """The number in a server's spelling of a version; -1 for weights that no trainer has numbered."""
    is_number = isinstance(said, str) and said.isascii() and said.isdecimal() and len(said) <= 18
    return int(said) if is_number else -1


def versions_of_spans(spans: Any, count: int) -> np.ndarray:
    """The version of each token, [count] int64, out of spans of tokens that follow each other.

    Raises:
        BadAnswer: the spans are no such list, or are not those of `count` tokens.
    """
    versions, filled = np.empty(count, dtype=np.int64), 0
    try:
        for span in spans:
            start, end = span["start"], span["end"]
            if not type(start) is type(end) is int or start != filled or not start <= end <= count:
                raise BadAnswer(f"spans of versions that do not follow each other up to {count} tokens")
            versions[start:end] = version_number(span["version"])
            filled = end
    except (KeyError, TypeError):
        raise BadAnswer("malformed spans of versions") from None
    if filled != count:
        raise BadAnswer(f"spans of versions for {filled} of {count} tokens")
    return versions


def number_of(what: str, said: Any) -> int:
    """How many of something a server says it has: its ranks, or the requests that it computes at once.

    Raises:
        BadAnswer: it cannot have so many.
    """
    if type(said) is not int or not 0 < said <= _MOST:
        raise BadAnswer(f"the number of {what} {str(said)[:40]!r}")
    return said


def checked_routes(said: Any, routing: Routing, rows: int) -> np.ndarray:
    """The experts that tokens were sent to, [rows, layers, per_token] int16, from int32 numbers in base64.

    Raises:
        BadAnswer: it names no experts, none that the model has, or those of other tokens.
    """
    try:
        found = np.frombuffer(base64.b64decode(said, validate=True), dtype=np.int32)
        found = found.reshape(rows, routing.layers, routing.per_token)
    except (TypeError, ValueError):
        raise BadAnswer(
            f"no experts of {rows} tokens in {routing.layers} layers; does it run with --enable-return-routed-experts?"
        ) from None
    if found.size and not 0 <= found.min() <= found.max() < routing.experts:
        raise BadAnswer(f"an expert {found.min()} or {found.max()} of {routing.experts}")
    return found.astype(np.int16)


def _supports(said: Any, ids: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The supports of tokens `ids` [n], as [n, S] int32 padded with -1."""
    if not isinstance(said, list) or len(said) != ids.size or not all(isinstance(each, list) for each in said):
        raise BadAnswer(f"{ids.size} tokens without as many lists of those that top-p and top-k left to draw from")
    flat = _array([token for each in said for token in each], "kept token ids", {int}, np.int32)
    lengths = np.array([len(each) for each in said], dtype=np.int64)
    width = int(lengths.max(initial=0))
    if width > params.most_support + 1:
        raise BadAnswer(f"{width} tokens to draw one from, with top_k = {params.top_k}")
    if flat.size and flat.min() < 0:
        raise BadAnswer(f"the kept token id {flat.min()}")
    found = np.full((ids.size, width), -1, dtype=np.int32)
    found[np.arange(width) < lengths[:, None]] = flat
    if not (found == ids[:, None]).any(axis=1).all():
        raise BadAnswer("a token that is not among those that it was drawn from")
    ordered = np.sort(found, axis=1)
    if ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any():
        raise BadAnswer("a token twice among those that one was drawn from")
    return found


def _array(values: Any, what: str, kinds: set[type], dtype: type) -> np.ndarray:
    if not isinstance(values, list):
        raise BadAnswer(f"no list of {what}")
    if not set(map(type, values)) <= kinds:  # also true and false, which numpy would take for numbers
        raise BadAnswer(f"{what} that are not numbers")
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return np.asarray(values, dtype=dtype)
    except OverflowError:
        raise BadAnswer(f"{what} that are no {np.dtype(dtype).name}") from None
