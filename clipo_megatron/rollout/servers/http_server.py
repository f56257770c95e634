"""What the clients of all engines share: which samples of a request still need tokens, and what becomes of answers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.servers.http import JsonClient, together
from clipo_megatron.rollout.servers.memory_state import Released
from clipo_megatron.rollout.servers.response_checks import (
    BadAnswer,
    Continuation,
    Decode,
    joined,
    missing_samples,
    settled,
)
from clipo_megatron.rollout.servers.server import BucketNames, Fault, RankChecksums, ServerError, UpdateGroup, sample_id


@dataclass(frozen=True, slots=True)
class Call:
    """Samples that go on from the same tokens, asked for at once."""

    inputs: list[int]  # the prompt, and what the sample has so far
    ids: list[str]  # one a sample
    params: SamplingParams
    budget: int  # tokens a sample, at most
    version: int  # that the weights should have at least
    end: float  # of its time, on the monotonic clock

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return left(self.end)


class HttpServer(ABC):
    """The part of the `Server` protocol that is the same for every engine. Calls about weights that an engine does not
    have are refused.

    Args:
        url: of the server, or of a router that passes generation on.
        api_key_env: environment variable with its key.
        decode: token ids to text without special tokens; None: the engine's text, of the last piece.
        routed: whether the URL is that of a router.
    """

    keeps_unfinished = True

    def __init__(self, url: str, *, api_key_env: str = "", decode: Decode | None = None, routed: bool = False):
        self._http = JsonClient(url, api_key_env)
        self._decode, self._routed = decode, routed
        self._memory = Released()

    @property
    def url(self) -> str:
        """Of the server."""
        return self._http.url

    async def close(self) -> None:
        """Close the client's connections; the server goes on."""
        await self._http.close()

    # --- generation ----------------------------------------------------------------------------------------------

    @abstractmethod
    async def _pieces(self, call: Call) -> list[Continuation]:
        """The tokens of each sample, in order."""

    async def _accept(self, params: SamplingParams, deadline_s: float) -> None:  # noqa: B027
        """Refuse parameters under which the engine's answers would not be what was asked for."""

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """All rollouts of one request; see `Server.generate`."""
        end = time.monotonic() + deadline_s
        await self._accept(params, deadline_s)
        prompt = request.prompt.tokens.tolist()

        async def ask(samples: Sequence[int], begun: Rollout | None = None) -> list[Rollout]:
            so_far, trained = ([], 0) if begun is None else (begun.tokens.tolist(), begun.trained)
            ids = [sample_id(name, sample) for sample in samples]
            call = Call(prompt + so_far, ids, params, params.limit(trained) - len(so_far), version, end)
            pieces = await self._pieces(call)
            try:
                found = [
                    joined(begun, piece, each, params, self._decode)
                    for piece, each in zip(pieces, samples, strict=True)
                ]
            except BadAnswer as reason:
                raise self._http.fail(Fault.stale, f"it answered {reason}") from None
            return [rollout for rollout in found if rollout is not None]

        done = {rollout.sample: rollout for rollout in request.begun}
        calls = []
        if fresh := missing_samples(request, params):
            calls.append(ask(fresh))
        for rollout in request.begun:
            if (finished := settled(rollout, params)) is not None:
                done[rollout.sample] = finished
            else:
                calls.append(ask([rollout.sample], rollout))
        for rollouts in await together(calls):
            done |= {rollout.sample: rollout for rollout in rollouts}
        return [done[sample] for sample in sorted(done)]

    # --- weights -------------------------------------------------------------------------------------------------

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        """Refused."""
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        """Refused."""
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def begin_update(self, *, deadline_s: float) -> None:  # noqa: B027
        """Nothing to do."""

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        """Refused."""
        raise self._lacks("buckets of weights; set rollout.sync.transport=disk")

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        """Refused."""
        raise self._lacks("handles of weights; set rollout.sync.transport=disk")

    def _lacks(self, what: str) -> ServerError:
        return self._http.fail(Fault.unsupported, f"this engine is not asked for {what}")


def left(end: float) -> float:
    """Seconds until a moment of the monotonic clock, at least 0."""
    return max(0.0, end - time.monotonic())


def rank_checksums(place: dict[str, Any], checksums: dict[str, Any]) -> RankChecksums:
    """One rank's part of an answer.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is no such part.
    """
    return RankChecksums(
        int(place["tp_rank"]), int(place["tp_size"]), {str(name): str(value) for name, value in checksums.items()}
    )
