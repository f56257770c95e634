"""The base class of the engines' clients: it turns a request into calls, and their answers into rollouts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.continuation import Decode, append_tokens, if_finished, missing_samples
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.servers.http import JsonClient, all_or_none
from clipo_megatron.rollout.servers.memory_state import MemoryState
from clipo_megatron.rollout.servers.response_checks import BadAnswer, Continuation, most_bytes, number_of
from clipo_megatron.rollout.servers.server import BucketNames, Fault, RankChecksums, ServerError, UpdateGroup, sample_id


@dataclass(frozen=True, slots=True)
class Call:
    """Samples that continue the same tokens and are asked for together."""

    inputs: list[int]  # the prompt, and the tokens that the sample has so far
    ids: list[str]  # one for each sample
    params: SamplingParams
    budget: int  # new tokens of each sample, at most
    version: int  # the oldest version that the weights may have
    vocabulary: int  # ids of tokens are below it; 0 if it is unknown
    end: float  # deadline on the monotonic clock
    routed: int = 0  # of the inputs, so many tokens have routes

    @property
    def seconds_left(self) -> float:
        return seconds_until(self.end)

    @property
    def most_bytes(self) -> int:
        """The size that its answer may have."""
        support = self.params.most_support if self.params.wants_support else 0
        routing = self.params.routing
        return most_bytes(
            samples=len(self.ids),
            prompt=len(self.inputs),
            tokens=self.budget,
            support=support,
            experts=routing.layers * routing.per_token if routing else 0,
        )


class HttpServer(ABC):
    """The part of the `Server` protocol that is the same for every engine. By default it refuses to receive weights
    through groups or handles.

    Args:
        url: URL of the server, or of a router that forwards generation calls.
        decode: turns token ids into text without control tokens.
        api_key_env: environment variable that holds the server's key.
        routed: whether the URL is that of a router.
        vocabulary: the number of token ids that the model has; 0 if it is unknown.
    """

    def __init__(self, url: str, *, decode: Decode, api_key_env: str = "", routed: bool = False, vocabulary: int = 0):
        self._http = JsonClient(url, api_key_env)
        self._decode, self._routed, self._vocabulary = decode, routed, vocabulary
        self._memory = MemoryState()

    @property
    def url(self) -> str:
        return self._http.url

    async def close(self) -> None:
        """Close the client's connections; the server keeps running."""
        await self._http.close()

    # --- generation ----------------------------------------------------------------------------------------------

    @abstractmethod
    async def _continue(self, call: Call) -> list[Continuation]:
        """Generate the call's samples; returns the new tokens of each, in order."""

    async def _check_params(self, params: SamplingParams, deadline_s: float) -> None:  # noqa: B027
        """Raise ServerError for parameters that this engine, as it was started, would not follow."""

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """See `Server.generate`."""
        end = time.monotonic() + deadline_s
        await self._check_params(params, deadline_s)
        prompt = request.prompt.tokens.tolist()

        async def ask(samples: Sequence[int], begun: Rollout | None = None) -> list[Rollout]:
            so_far, trained = ([], 0) if begun is None else (begun.tokens.tolist(), begun.trained)
            ids = [sample_id(name, sample) for sample in samples]
            budget = params.token_limit(trained) - len(so_far)
            routed = 0 if begun is None or begun.routes is None else len(begun.routes)
            call = Call(prompt + so_far, ids, params, budget, version, self._vocabulary, end, routed)
            found = await self._continue(call)
            self._check_versions(found, version)
            with self._http.reading("its tokens"):
                news = zip(found, samples, strict=True)
                rollouts = [self._append(begun, new, sample, params) for new, sample in news]
            return [rollout for rollout in rollouts if rollout is not None]

        by_sample = {rollout.sample: rollout for rollout in request.begun}
        calls = []
        if missing := missing_samples(request, params):
            calls.append(ask(missing))
        for rollout in request.begun:
            if (finished := if_finished(rollout, params)) is not None:
                by_sample[rollout.sample] = finished
            else:
                calls.append(ask([rollout.sample], rollout))
        for rollouts in await all_or_none(calls):
            by_sample |= {rollout.sample: rollout for rollout in rollouts}
        return [by_sample[sample] for sample in sorted(by_sample)]

    def _check_versions(self, found: Sequence[Continuation], oldest: int) -> None:
        for versions in (each.versions for each in found):
            if versions.size and (np.diff(versions).min(initial=0) < 0 or versions[0] < oldest):
                raise self._http.fail(
                    Fault.stale, f"it answered with weights of version {versions.min()}, not {oldest}"
                )

    def _append(self, begun: Rollout | None, new: Continuation, sample: int, params: SamplingParams) -> Rollout | None:
        """The sample's rollout with its new tokens; None if it has no token at all."""
        if begun is None and not new.tokens.size:
            return None
        if begun is not None and new.versions.size and new.versions[0] < begun.versions[-1]:
            older, newer = int(new.versions[0]), int(begun.versions[-1])
            raise self._http.fail(Fault.stale, f"it answered tokens of version {older} after ones of {newer}")
        tensors = (torch.from_numpy(each) for each in (new.tokens, new.logprobs, new.versions))
        support, routes = (None if each is None else torch.from_numpy(each) for each in (new.support, new.routes))
        return append_tokens(
            begun,
            *tensors,
            sample=sample,
            finish=new.finish,
            params=params,
            decode=self._decode,
            support=support,
            routes=routes,
        )

    # --- weights -------------------------------------------------------------------------------------------------

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def keep_tensors(self, *, deadline_s: float) -> None:
        raise self._lacks("changes of weights; set rollout.sync.delta=false")

    async def begin_update(self, *, changes: bool = False, deadline_s: float) -> None:  # noqa: B027
        """Does nothing: by default a server need not be told that an update begins."""

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        raise self._lacks("buckets of weights; set rollout.sync.transport=disk")

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        raise self._lacks("handles of weights; set rollout.sync.transport=disk")

    def _lacks(self, what: str) -> ServerError:
        return self._http.fail(Fault.unsupported, f"this engine is not asked for {what}")


def seconds_until(end: float) -> float:
    """Seconds until a moment on the monotonic clock, at least 0."""
    return max(0.0, end - time.monotonic())


def rank_checksums(place: dict[str, Any], checksums: dict[str, Any]) -> RankChecksums:
    """Checksums of one rank, out of a server's answer; raises, as any code would, where it has another form."""
    size, rank = number_of("ranks", place["tp_size"]), number_of("ranks", place["tp_rank"] + 1) - 1
    if rank >= size:
        raise BadAnswer(f"rank {rank} of {size}")
    return RankChecksums(rank, size, {str(name): str(value) for name, value in checksums.items()})
