"""The engine contract over servers. The first rank of each data-parallel replica has a pool for its own prompts."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipo_megatron.config.schema import EngineKind, PoolConfig
from clipo_megatron.rollout.continuation import Decode
from clipo_megatron.rollout.engine import (
    EngineError,
    Generation,
    InFlight,
    Memory,
    Request,
    SamplingParams,
    check_prompts,
    never,
)
from clipo_megatron.rollout.servers.dispatch import PoolGeneration, RequestDispatcher
from clipo_megatron.rollout.servers.hf_folder import write_folder
from clipo_megatron.rollout.servers.http import EventLoop
from clipo_megatron.rollout.servers.membership import STATE_S, Membership, PoolMember
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.rollout.servers.server import LiveServer, Server, ServerError
from clipo_megatron.rollout.servers.sglang import SGLangServer
from clipo_megatron.rollout.servers.vllm import VLLMServer

T = TypeVar("T")

_CLIENTS = {EngineKind.sglang: SGLangServer, EngineKind.vllm: VLLMServer}
_CONTROL_S = 120.0  # for a server to pause, resume, or move memory
_LOAD_S = 480.0  # for servers to load a folder of weights
_DISCOVER_EVERY_S = 1.0  # while waiting for servers to appear


class ServerPool:
    """The `Engine` contract over all servers of a run.

    Only admitted servers get prompts. `admit` is called on every rank that has a pool once servers have new weights; a
    server that was restarted gets no prompts until it has been given weights and is admitted again.

    Args:
        kind: sglang or vllm.
        decode: turns token ids into text without control tokens.
        config: bounds, deadlines and number of attempts.
        endpoints: URLs of the servers; if empty, the servers in the registry are used.
        registry: folder in which servers are registered.
        router: URL that prompts are sent to in place of the servers.
        api_key_env: environment variable that holds the servers' key.
        model: Hugging Face folder; prompts are checked against its vocabulary, `load_weights` against its tensors.
    """

    def __init__(
        self,
        kind: EngineKind,
        *,
        decode: Decode,
        config: PoolConfig,
        endpoints: Sequence[str] = (),
        registry: str | Path | None = None,
        router: str | None = None,
        api_key_env: str = "",
        model: str | Path | None = None,
    ):
        if kind not in _CLIENTS:
            raise EngineError(f"A pool of servers cannot be of kind {kind.value}; choose sglang or vllm.")
        if not endpoints and registry is None:
            raise EngineError("A pool needs the URLs of servers, or the folder in which they are registered.")
        self.kind, self._config = kind, config
        self._endpoints = [url.rstrip("/") for url in endpoints]
        self._registry = None if registry is None else Registry(registry)
        self._decode, self._api_key_env, self._model = decode, api_key_env, model
        self._vocabulary = _vocabulary(model)
        self._counts: Counter[str] = Counter()
        self.loop = EventLoop()
        self._members = Membership(self._connect, slack=config.affinity_slack, counts=self._counts)
        self._dispatcher = RequestDispatcher(
            self._members, config, router=self._connect(router, routed=True) if router else None, counts=self._counts
        )
        self._generation: PoolGeneration | None = None

    def _connect(self, url: str, **options: bool) -> Server:
        return _CLIENTS[self.kind](
            url, api_key_env=self._api_key_env, decode=self._decode, vocabulary=self._vocabulary, **options
        )

    # --- servers -------------------------------------------------------------------------------------------------

    def urls(self) -> list[str]:
        """The URLs of the expected servers: the endpoints, or the servers that are registered as ready."""
        if self._endpoints or self._registry is None:
            return self._endpoints
        return [record.url.rstrip("/") for record in self._registered(Status.ready)]

    def discover(self) -> list[LiveServer]:
        """The expected servers that answer now, whether admitted or not."""
        found = self.run(self._members.live(self.urls(), deadline_s=STATE_S), deadline_s=STATE_S)
        records = {each.url.rstrip("/"): each for each in self._registered()}
        return [_as_registered(each, records.get(each.url)) for each in found]

    def _registered(self, *statuses: Status) -> list[ServerRecord]:
        """The registered servers of this engine, or those of them that have one of these statuses."""
        return [
            record
            for record in (self._registry.records() if self._registry is not None else ())
            if record.engine == self.kind.value and (not statuses or record.status in statuses)
        ]

    def join(self, count: int = 1, *, deadline_s: float | None = None) -> list[LiveServer]:
        """Wait until at least `count` servers answer.

        Raises:
            EngineError: fewer answered in time; the message has each server's last error.
        """
        deadline_s = self._config.join_deadline_s if deadline_s is None else deadline_s
        deadline = time.monotonic() + deadline_s
        while len(found := self.discover()) < count:
            if time.monotonic() >= deadline:
                errors = f"{found_errors} " if (found_errors := self._last_errors()) else ""
                where = "rollout.endpoints" if self._endpoints else f"the registry {self._registry.folder}"
                raise EngineError(
                    f"{len(found)} of {count} rollout servers answered within {deadline_s:g} s, out of "
                    f"{len(self.urls())} in {where}. {errors}Start them with `clipo serve`, or raise "
                    "rollout.pool.join_deadline_s."
                )
            time.sleep(_DISCOVER_EVERY_S)
        return found

    def admit(self, urls: Iterable[str], version: int) -> None:
        """Send prompts to these servers, which have the weights of this version, and to no others."""
        self.run(self._members.admit(list(urls), version), deadline_s=STATE_S)

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """Run a coroutine of the servers' clients on the pool's event loop; may be called from any thread."""
        try:
            self._open()
        except EngineError:
            coroutine.close()
            raise
        return self.loop.run(coroutine, deadline_s=deadline_s)

    # --- the contract --------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        return self._members.version

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """See `Engine.generate`; groups of a detached generation are yielded too.

        Raises:
            EngineLostError: no admitted server answers, and none came back for a while.
            EngineError: the deadline passed, all attempts of a request failed, or a prompt does not fit the model; the
                message names the prompts without an answer and the servers' last errors.
            Cancelled: `should_cancel` returned True; the servers have been told to end the requests.
        """
        self._open()
        params.check()
        check_prompts(requests, self._vocabulary)  # servers crash on some of these
        before, self._generation = self._generation, None
        if before is not None and not before.detached:
            before.close()
        generation = PoolGeneration(self.loop, self._dispatcher, deadline_s=deadline_s, should_cancel=should_cancel)
        generation.begin(requests, params, before)
        self._generation = generation
        return generation

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Write safetensors into a temporary folder and let all servers that answer load them.

        Training uses the transports in `sync` instead.

        Raises:
            EngineError: names or shapes do not fit the model, no server answers, or none could load the folder.
        """
        live = self.join()
        with tempfile.TemporaryDirectory(prefix="clipo-weights-") as folder:
            write_folder(Path(folder), tensors, None if self._model is None else Path(self._model))
            calls = (each.server.load_folder(folder, version, deadline_s=_LOAD_S) for each in live)
            results = self.run(_results(calls), deadline_s=_LOAD_S)
        failures = [str(result) for result in results if isinstance(result, BaseException)]
        if len(failures) == len(live):
            raise EngineError(f"No server took the weights of version {version}: {'; '.join(failures)}")
        urls = [each.url for each, result in zip(live, results, strict=True) if result is None]
        self.admit(urls, version)

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        self._everywhere(lambda server: server.pause(in_flight, deadline_s=_CONTROL_S))

    def resume(self) -> None:
        self._everywhere(lambda server: server.resume(deadline_s=_CONTROL_S))

    def offload(self, *what: Memory) -> None:
        self._await_starting()  # those would take the memory all the same
        self._everywhere(lambda server: server.offload(what or tuple(Memory), deadline_s=_CONTROL_S))

    def onload(self, *what: Memory) -> None:
        self._everywhere(lambda server: server.onload(what or tuple(Memory), deadline_s=_CONTROL_S))

    def health(self) -> None:
        """Raise EngineError, with the servers' errors, unless at least one admitted server can generate."""
        self._open()
        usable = self._members.usable()
        results = self.run(_results(each.server.health(deadline_s=STATE_S) for each in usable), deadline_s=STATE_S)
        if not any(result is None for result in results):
            errors = " ".join(str(result) for result in results) or self._last_errors()
            raise EngineError(f"No rollout server with weights can generate. {errors}")

    def close(self) -> None:
        """End unfinished requests and close the connections; the servers keep running. Idempotent."""
        if self.loop.closed:
            return
        if self._generation is not None:
            self._generation.close()
        self.loop.run(self._close(), deadline_s=10.0)
        self.loop.close()

    async def _close(self) -> None:
        await self._dispatcher.close()
        await self._members.close()

    # --- reports -------------------------------------------------------------------------------------------------

    def take_statistics(self) -> dict[str, float]:
        return self.run(self._take_statistics(), deadline_s=10.0)

    async def _take_statistics(self) -> dict[str, float]:
        names = {"requests", "retries", "suspected", *self._counts}
        found = {f"rollout/{name}": float(self._counts[name]) for name in sorted(names)}
        self._counts.clear()
        return found

    def usable(self) -> list[str]:
        """The URLs of the admitted servers that get requests now."""

        async def urls() -> list[str]:
            return [member.url for member in self._members.usable()]

        return self.run(urls(), deadline_s=10.0)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.loop.closed:
            raise EngineError("The pool of servers is closed; construct a new one.")

    def _last_errors(self) -> str:
        return self.run(self._dispatcher.last_errors(), deadline_s=10.0)

    def _await_starting(self) -> None:
        """Wait for registered servers that are starting, but for none longer than for servers at all."""
        patience = self._config.join_deadline_s
        while any(time.time() - each.updated_at < patience for each in self._registered(Status.starting)):
            time.sleep(_DISCOVER_EVERY_S)

    def _everywhere(self, call: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """Make the same call to every server that answers; a server that fails must be given weights again."""
        members = [self._members.get(live.url) for live in self.discover()]
        results = self.run(_results(call(each.server) for each in members), deadline_s=_CONTROL_S)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(members):
            raise EngineError("; ".join(map(str, errors)) or f"No rollout server answers. {self._last_errors()}")
        failed = [each for each, result in zip(members, results, strict=True) if result is not None]
        self.run(self._expel(failed, errors), deadline_s=10.0)

    async def _expel(self, members: Sequence[PoolMember], errors: Sequence[BaseException]) -> None:
        for member, error in zip(members, errors, strict=True):
            self._members.expel(member, str(error))


async def _results(calls: Iterable[Coroutine[Any, Any, None]]) -> list[Any]:
    """Run all calls; returns None, or the `ServerError`, of each."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ServerError):
            raise result
    return results


def _as_registered(live: LiveServer, record: ServerRecord | None) -> LiveServer:
    """The server with what its supervisor, but not the server itself, tells about it."""
    if record is None:
        return live
    return replace(live, gpus=tuple(filter(None, record.gpus.split(","))), collectives=record.collectives)


def _vocabulary(model: str | Path | None) -> int:
    """The number of rows of the model's embedding; 0 if it is unknown."""
    file = None if model is None else Path(model) / "config.json"
    if file is None or not file.is_file():
        return 0
    found = json.loads(file.read_text())
    return int(found.get("vocab_size") or found.get("text_config", {}).get("vocab_size") or 0)
