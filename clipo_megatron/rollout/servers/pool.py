"""The engine contract over servers: every data-parallel head has a pool and sends its own prompts."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from clipo_megatron.config.schema import EngineKind, PoolConfig, RunConfig
from clipo_megatron.rollout.engine import EngineError, Generation, InFlight, Memory, Request, SamplingParams, never
from clipo_megatron.rollout.servers.dispatch import PoolGeneration, RequestDispatcher
from clipo_megatron.rollout.servers.hf_folder import write_folder
from clipo_megatron.rollout.servers.http import EventLoop
from clipo_megatron.rollout.servers.membership import PROBE_S, Members, PoolMember
from clipo_megatron.rollout.servers.registry import FOLDER, Registry, Status
from clipo_megatron.rollout.servers.response_checks import Decode
from clipo_megatron.rollout.servers.server import Server, ServerError, ServerState
from clipo_megatron.rollout.servers.sglang import SGLangServer
from clipo_megatron.rollout.servers.vllm import VLLMServer

T = TypeVar("T")

_CLIENTS = {EngineKind.sglang: SGLangServer, EngineKind.vllm: VLLMServer}
_CONTROL_S = 120.0  # for a server to pause, go on, or move memory
_LOOK_AGAIN_S = 1.0  # while waiting for servers to appear


class Live(NamedTuple):
    """A server that answers."""

    server: Server
    state: ServerState


class ServerPool:
    """The `Engine` contract over all servers of a run.

    Only admitted servers get prompts: `admit` is called on every rank that has a pool once the servers have new
    weights, and a server that was restarted gets nothing until it was given weights and admitted again.

    Args:
        kind: sglang or vllm.
        decode: token ids to text, without special tokens.
        config: bounds, deadlines and attempts.
        endpoints: URLs of the servers; none: those in the registry.
        registry: folder in which servers are registered.
        router: URL that prompts go to in place of the servers.
        api_key_env: environment variable with the servers' key.
        model: Hugging Face folder of the model, whose vocabulary and weight names are checked.
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
        self._members = Members(self._connect, slack=config.affinity_slack, counts=self._counts)
        self._dispatcher = RequestDispatcher(
            self._members, config, router=self._connect(router, routed=True) if router else None, counts=self._counts
        )
        self._generation: PoolGeneration | None = None

    @classmethod
    def from_config(cls, config: RunConfig, decode: Decode) -> ServerPool:
        """The pool that a configuration asks for."""
        rollout = config.rollout
        return cls(
            rollout.engine,
            decode=decode,
            config=rollout.pool,
            endpoints=rollout.endpoints,
            registry=Path(config.train.output) / FOLDER,
            router=rollout.router,
            api_key_env=rollout.api_key_env,
            model=config.model.path,
        )

    def _connect(self, url: str, **options: bool) -> Server:
        return _CLIENTS[self.kind](url, api_key_env=self._api_key_env, decode=self._decode, **options)

    # --- who serves ----------------------------------------------------------------------------------------------

    def urls(self) -> list[str]:
        """Of the servers that should be there: the endpoints, or those registered as ready."""
        if self._endpoints or self._registry is None:
            return self._endpoints
        return [
            entry.url.rstrip("/")
            for entry in self._registry.entries()
            if entry.status is Status.ready and entry.engine == self.kind.value
        ]

    def discover(self, *, deadline_s: float = PROBE_S) -> list[Live]:
        """The servers that answer now, admitted or not; asked all at once."""
        found = self.run(self._members.live(self.urls(), deadline_s=deadline_s), deadline_s=deadline_s)
        return [Live(member.server, state) for member, state in found]

    def join(self, count: int = 1, *, deadline_s: float | None = None) -> list[Live]:
        """Wait until so many servers answer.

        Raises:
            EngineError: fewer did in time; says what those that are expected last said.
        """
        deadline_s = self._config.join_deadline_s if deadline_s is None else deadline_s
        deadline = time.monotonic() + deadline_s
        while len(found := self.discover()) < count:
            if time.monotonic() >= deadline:
                words = f"{said} " if (said := self._words()) else ""
                where = "rollout.endpoints" if self._endpoints else f"the registry {self._registry.folder}"
                raise EngineError(
                    f"{len(found)} of {count} rollout servers answered within {deadline_s:g} s, out of "
                    f"{len(self.urls())} in {where}. {words}Start them with `clipo serve`, or raise "
                    "rollout.pool.join_deadline_s."
                )
            time.sleep(_LOOK_AGAIN_S)
        return found

    def admit(self, urls: Iterable[str], version: int) -> None:
        """Send prompts to these servers and no others; they have the weights of that version."""
        self.run(self._members.admit(list(urls), version), deadline_s=PROBE_S)

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """Run a client's coroutine on the pool's event loop."""
        try:
            self._open()
        except EngineError:
            coroutine.close()
            raise
        return self.loop.run(coroutine, deadline_s=deadline_s)

    # --- the contract --------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the weights that generate; -1 before the first."""
        return self._members.version

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """One group a request, as each finishes, and those of requests that the generation before was left with.

        Raises:
            EngineLostError: no admitted server answers, and none came back for a while.
            EngineError: the deadline passed, a request failed on so many servers as may be asked, or a prompt is no
                prompt of the model; names the prompts without an answer and what servers said.
            Abandoned: `should_cancel` said so; the servers are told.
        """
        self._open()
        self._check(requests, params)
        before, self._generation = self._generation, None
        if before is not None and not before.left:
            before.close()
        generation = PoolGeneration(self.loop, self._dispatcher, deadline_s=deadline_s, should_cancel=should_cancel)
        generation.begin(requests, params, before)
        self._generation = generation
        return generation

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Write safetensors into a temporary folder and have all servers that answer read them.

        This is the contract's plain way; training uses the transports in `sync`.

        Raises:
            EngineError: names or shapes are not the model's, no server answers, or none could read them.
        """
        live = self.join()
        with tempfile.TemporaryDirectory(prefix="clipo-weights-") as folder:
            write_folder(Path(folder), tensors, None if self._model is None else Path(self._model))
            deadline_s = _CONTROL_S * 4
            calls = (each.server.load_folder(folder, version, deadline_s=deadline_s) for each in live)
            results = self.run(_settle(calls), deadline_s=deadline_s)
        failures = [str(result) for result in results if isinstance(result, BaseException)]
        if len(failures) == len(live):
            raise EngineError(f"No server took the weights of version {version}: {'; '.join(failures)}")
        urls = [each.server.url for each, result in zip(live, results, strict=True) if result is None]
        self.admit(urls, version)

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Generate nothing until `resume`. Idempotent."""
        self._everywhere(lambda server: server.pause(in_flight, deadline_s=_CONTROL_S))

    def resume(self) -> None:
        """Go on after `pause`. Idempotent."""
        self._everywhere(lambda server: server.resume(deadline_s=_CONTROL_S))

    def offload(self, *what: Memory) -> None:
        """Give GPU memory back; nothing is in flight. Idempotent."""
        self._everywhere(lambda server: server.offload(what or tuple(Memory), deadline_s=_CONTROL_S))

    def onload(self, *what: Memory) -> None:
        """Take the memory again. Idempotent."""
        self._everywhere(lambda server: server.onload(what or tuple(Memory), deadline_s=_CONTROL_S))

    def health(self) -> None:
        """Return when at least one admitted server can generate.

        Raises:
            EngineError: none can; says what each said.
        """
        self._open()
        usable = self._members.usable()
        results = self.run(_settle(each.server.health(deadline_s=PROBE_S) for each in usable), deadline_s=PROBE_S)
        if not any(result is None for result in results):
            said = " ".join(str(result) for result in results) or self._words()
            raise EngineError(f"No rollout server with weights is well. {said}")

    def close(self) -> None:
        """End what runs and the connections; the servers go on. Idempotent."""
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
        """What happened since the last call, for the report."""
        return self.run(self._take_statistics(), deadline_s=10.0)

    async def _take_statistics(self) -> dict[str, float]:
        names = {"requests", "retries", "suspected", *self._counts}
        found = {f"rollout/{name}": float(self._counts[name]) for name in sorted(names)}
        self._counts.clear()
        return found

    def usable(self) -> list[str]:
        """URLs of the admitted servers that requests go to now."""

        async def look() -> list[str]:
            return [member.url for member in self._members.usable()]

        return self.run(look(), deadline_s=10.0)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.loop.closed:
            raise EngineError("The pool of servers is closed; construct a new one.")

    def _words(self) -> str:
        return self.run(self._dispatcher.last_words(), deadline_s=10.0)

    def _everywhere(self, call: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """The same call to every server that answers; one that fails must be given weights again."""
        members = [self._members.get(live.server.url) for live in self.discover()]
        results = self.run(_settle(call(each.server) for each in members), deadline_s=_CONTROL_S)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(members):
            raise EngineError("; ".join(map(str, errors)) or f"No rollout server answers. {self._words()}")
        failed = [each for each, result in zip(members, results, strict=True) if result is not None]
        self.run(self._expel(failed, errors), deadline_s=10.0)

    async def _expel(self, members: Sequence[PoolMember], errors: Sequence[BaseException]) -> None:
        for member, error in zip(members, errors, strict=True):
            self._members.expel(member, str(error))

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """What no server should be asked: some die of it."""
        params.check()
        for request in requests:
            tokens = request.prompt.tokens
            if not tokens.numel():
                raise EngineError(f"Prompt {request.prompt.id} has no tokens; give it a message.")
            if int(tokens.min()) < 0 or (self._vocabulary and int(tokens.max()) >= self._vocabulary):
                raise EngineError(
                    f"Prompt {request.prompt.id} has a token outside the model's vocabulary of {self._vocabulary}; "
                    "tokenise it with the tokenizer of the same folder."
                )


async def _settle(calls: Iterable[Coroutine[Any, Any, None]]) -> list[Any]:
    """None or the `ServerError` of each call."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ServerError):
            raise result
    return results


def _vocabulary(model: str | Path | None) -> int:
    """Tokens that the model's embedding has; 0 where that is not known."""
    file = None if model is None else Path(model) / "config.json"
    if file is None or not file.is_file():
        return 0
    found = json.loads(file.read_text())
    return int(found.get("vocab_size") or found.get("text_config", {}).get("vocab_size") or 0)
