"""A proxy before a real server that breaks connections, bytes or the contents of answers, as planned."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
from aiohttp import web

from clipo_megatron.rollout.servers.http import EventLoop

GENERATION = ("/generate", "/inference/v1/generate")


def _sample(change: Callable[[dict], None]) -> Callable[[Any], Any]:
    """Changes the last sample of an SGLang answer."""

    def changed(answer: Any) -> Any:
        change(answer[-1] if isinstance(answer, list) else answer)
        return answer

    return changed


def _set_logprob(value: Any) -> Callable[[Any], Any]:
    return _sample(lambda sample: sample["meta_info"]["output_token_logprobs"][0].__setitem__(0, value))


def _set_version(version: str) -> Callable[[Any], Any]:
    def change(sample: dict) -> None:
        sample["meta_info"]["weight_version"] = version
        for span in sample["meta_info"].get("weight_versions", []):
            span["version"] = version

    return _sample(change)


def _abort(sample: dict) -> None:
    meta = sample["meta_info"]
    meta["finish_reason"] = {"type": "abort", "message": "planted"}
    sample["output_ids"].pop()
    meta["output_token_logprobs"].pop()
    meta["weight_versions"][-1]["end"] -= 1


# Changes of an SGLang answer that leave it valid JSON.
LIES: dict[str, Callable[[Any], Any]] = {
    "another object": lambda answer: {"hello": 1},
    "nothing": lambda answer: None,
    "a number": lambda answer: 7,
    "one sample less": lambda answer: answer[:-1] if isinstance(answer, list) else [],
    "one sample more": lambda answer: [*answer, answer[0]] if isinstance(answer, list) else [answer, answer],
    "other ids": _sample(lambda sample: sample["output_ids"].__setitem__(0, sample["output_ids"][0] + 1)),
    "ids that are text": _sample(lambda sample: sample.__setitem__("output_ids", "abc")),
    "one log-prob less": _sample(lambda sample: sample["meta_info"]["output_token_logprobs"].pop()),
    "a log-prob above 0": _set_logprob(0.5),
    "a log-prob that is null": _set_logprob(None),
    "a log-prob that is huge": _set_logprob(-1e400),
    "no finish reason": _sample(lambda sample: sample["meta_info"].__setitem__("finish_reason", None)),
    "an odd finish reason": _sample(lambda sample: sample["meta_info"].__setitem__("finish_reason", {"type": "x"})),
    "versions of other tokens": _sample(
        lambda sample: sample["meta_info"].__setitem__("weight_versions", [{"version": "0", "start": 1, "end": 2}])
    ),
}
FAULTS = {
    "cut", "half", "stall", "delay", "garbage", "no json", "error 500", "empty", "stale", "newer", "aborted", *LIES
}  # fmt: skip


class FaultyProxy:
    """Forwards all calls to `target`, with planned faults in generation calls.

    `plan` sets the fault of each following call; calls without a fault are forwarded. `down` refuses connections until
    `up`.
    """

    def __init__(self, target: str, *, delay_s: float = 1.0):
        self.target, self.delay_s = target, delay_s
        self.happened: Counter[str] = Counter()
        self.calls = 0  # generation calls so far
        self.in_flight = self.most_in_flight = 0  # generation calls
        self.headers: list[dict[str, str]] = []  # of every call
        self._planned: list[str] = []
        self._always: str | None = None
        self._loop = EventLoop("proxy")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self.up()

    def plan(self, faults: Iterable[str]) -> None:
        """Plan the faults of the next generation calls, one each; "" is none."""
        faults = list(faults)
        assert set(faults) <= FAULTS | {""}, faults
        self._planned += faults

    def always(self, fault: str | None) -> None:
        """Set the fault of every generation call without a plan."""
        self._always = fault

    def down(self) -> None:
        """Refuse connections, and cut existing ones."""
        self._loop.run(self._down(), deadline_s=20)

    def up(self) -> None:
        self._loop.run(self._up(), deadline_s=20)

    def close(self) -> None:
        self.down()
        self._loop.close()

    async def _up(self) -> None:
        if self._runner is None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()

    async def _down(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await self._session.close()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        sent = await request.read()
        self.in_flight += request.path in GENERATION
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._pass_on(request, sent)
        finally:
            self.in_flight -= request.path in GENERATION

    async def _pass_on(self, request: web.Request, sent: bytes) -> web.StreamResponse:
        fault = ""
        if request.path in GENERATION and b'"max_new_tokens":0' not in sent:
            self.calls += 1
            fault = self._planned.pop(0) if self._planned else (self._always or "")
        if fault:
            self.happened[fault] += 1
        if fault in ("cut", "garbage", "empty"):
            if fault == "garbage":
                request.transport.write(b"\x00\xff\x17 this is no HTTP\r\n\r\n")
            elif fault == "empty":
                return web.Response(body=b"")
            request.transport.close()
            return web.Response()
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "delay":
            await asyncio.sleep(self.delay_s)
        if fault == "error 500":
            return web.json_response({"error": {"message": "planted trouble"}}, status=500)
        if fault == "no json":
            return web.Response(body=b'{"text": "and then it brea', content_type="application/json")
        try:
            async with self._session.request(
                request.method, self.target + request.path_qs, data=sent,
                headers={"Content-Type": "application/json"},
            ) as answer:  # fmt: skip
                body = await answer.read()
                status = answer.status
        except aiohttp.ClientError:
            request.transport.close()
            return web.Response()
        if fault == "half":
            response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "text/plain"})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            request.transport.close()
            return response
        if fault in ("stale", "newer"):
            body = _changed(body, _set_version("default" if fault == "stale" else "987654"))
        elif fault == "aborted":
            body = _changed(body, _sample(_abort))
        elif fault in LIES:
            body = _changed(body, LIES[fault])
        return web.Response(body=body, status=status, content_type="application/json")


def _changed(body: bytes, change: Callable[[Any], Any]) -> bytes:
    return json.dumps(change(json.loads(body))).encode()
