"""JSON over HTTP: an event loop in its own thread, and calls to one server that always end by their deadline."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import orjson

from clipo_megatron.rollout.engine import EngineError
from clipo_megatron.rollout.servers.response_checks import BadAnswer
from clipo_megatron.rollout.servers.server import Fault, ServerError

T = TypeVar("T")

_QUOTED = 300  # characters of a server's answer that a message quotes
CONTROL_BYTES, CHECKSUM_BYTES = 4 << 20, 64 << 20  # of one answer that has no tokens
_ERROR_BYTES = 1 << 16  # of the body of an HTTP error
_BODY_S = 60.0  # from the first byte of an answer to its last, for servers send it when it is complete
_OVERTIME_S = 5.0  # for a coroutine to end after the deadline that it keeps itself
_KEEPALIVE_S = 2.0  # servers close idle connections after 5 s, and lose a call that arrives at that moment


class EventLoop:
    """An asyncio loop in a daemon thread, for callers that are not coroutines."""

    def __init__(self, name: str = "servers"):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """Wait for the coroutine's result. It should keep the deadline itself; it is cancelled if it does not.

        Raises:
            EngineError: it had not ended a few seconds after its deadline.
        """
        future = self.submit(coroutine)
        try:
            return future.result(deadline_s + _OVERTIME_S)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            name = getattr(coroutine, "__qualname__", "a call")
            raise EngineError(f"{name} did not end within {deadline_s + _OVERTIME_S:g} s and was given up.") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel all coroutines and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            with contextlib.suppress(
                concurrent.futures.TimeoutError
            ):  # a task that cannot be cancelled ends with the thread
                self.submit(_cancel_others()).result(_OVERTIME_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_OVERTIME_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def all_or_none(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls, run at once. When one raises, the others are cancelled before its error is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class JsonClient:
    """Calls to one server; each returns parsed JSON or raises `ServerError` with its kind of fault.

    Args:
        url: the server's URL, without a path.
        api_key_env: environment variable that holds the key. If set, the key is sent as a bearer token; it is removed
            from every message.
    """

    def __init__(self, url: str, api_key_env: str = ""):
        self.url = url.rstrip("/")
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if not self._key.isprintable() or not self._key.isascii():
            raise EngineError(f"The key in ${api_key_env} holds characters that no HTTP header can carry.")
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"JsonClient({self.url!r})"

    async def post(
        self, path: str, body: Any = None, *, deadline_s: float, most_bytes: int = CONTROL_BYTES, **query: str
    ) -> Any:
        """POST JSON ({} by default) and return the answer's JSON, None if its body is empty."""
        answer = await self._fetch("POST", path, {} if body is None else body, query, deadline_s, most_bytes)
        return self._parsed(path, answer, most_bytes)

    async def post_and_read(
        self, path: str, body: Any, read: Callable[[Any], T], *, deadline_s: float, most_bytes: int
    ) -> T:
        """POST JSON, and return what `read` makes of the answer's JSON, which may be large.

        A large answer is many small lists. While they are made, garbage collection would walk all objects of the
        process several times, ten times the work of parsing; it is off until `read` has returned.
        """
        answer = await self._fetch("POST", path, body, {}, deadline_s, most_bytes)
        collects = gc.isenabled()
        gc.disable()
        try:
            with self.reading(path):
                return read(self._parsed(path, answer, most_bytes))
        finally:
            if collects:
                gc.enable()

    async def get(self, path: str, *, deadline_s: float, **query: str) -> Any:
        """GET the answer's JSON, None if its body is empty."""
        return self._parsed(path, await self._fetch("GET", path, None, query, deadline_s, CONTROL_BYTES), CONTROL_BYTES)

    async def get_text(self, path: str, *, deadline_s: float) -> str:
        """GET the answer as text."""
        return (await self._fetch("GET", path, None, {}, deadline_s, CONTROL_BYTES)).decode(errors="replace")

    @contextlib.contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """A context in which an answer is read: whatever its contents make go wrong is a fault of this server."""
        try:
            yield
        except BadAnswer as reason:
            raise self.fail(Fault.garbage, f"{what} answered {reason}") from None
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:_QUOTED]}"
            raise self.fail(Fault.garbage, f"{what} answered something of another form ({reason})") from None

    def fail(self, fault: Fault, message: str, status: int = 0) -> ServerError:
        """Make an error of this server, with the key removed; the caller raises it."""
        return ServerError(self.url, fault, message.replace(self._key, "***") if self._key else message, status)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _parsed(self, path: str, answer: bytes | bytearray, most_bytes: int) -> Any:
        if not answer.strip():
            return None
        # Parsed, an empty list takes twenty times the bytes that it has in JSON.
        if answer.count(b"[") + answer.count(b"{") > 1024 + most_bytes // 64 or answer.count(b",") > most_bytes // 8:
            raise self.fail(Fault.garbage, f"{path} answered far more lists, objects or values than were asked for")
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError:
            raise self.fail(Fault.garbage, f"{path} answered something that is not JSON: {_excerpt(answer)}") from None

    async def _fetch(
        self, method: str, path: str, body: Any, query: Mapping[str, str], deadline_s: float, most_bytes: int
    ) -> bytearray:
        """The body of an answer, which is given up as soon as it is larger than `most_bytes`."""
        if self._session is None or self._session.closed:
            self._session = self._open()
        try:
            async with (
                asyncio.timeout(deadline_s) as patience,
                self._session.request(
                    method,
                    self.url + path,
                    params=query or None,
                    data=None if body is None else orjson.dumps(body),
                    allow_redirects=False,  # a redirect would send the key to another host
                ) as response,
            ):
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise self.fail(Fault.garbage, f"{path} answered with a compressed body, which was not asked for")
                answer = await self._body(path, response, patience, most_bytes)
        except TimeoutError:
            raise self.fail(Fault.deadline, f"{path} gave no complete answer within {deadline_s:g} s") from None
        except (aiohttp.ClientResponseError, ValueError) as error:
            reason = " ".join(str(getattr(error, "message", "") or error).split())
            raise self.fail(Fault.garbage, f"{path} answered something that is not HTTP: {reason[:_QUOTED]}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self.fail(Fault.refused, f"{path} was cut off: {error or type(error).__name__}") from None
        if response.status != 200:
            reason = _error_message(answer) or (response.reason or "")[:_QUOTED]
            raise self.fail(Fault.status, f"{path} answered {response.status}: {reason}", response.status)
        return answer

    async def _body(
        self, path: str, response: aiohttp.ClientResponse, patience: asyncio.Timeout, most_bytes: int
    ) -> bytearray:
        answer = bytearray()
        async for part in response.content.iter_any():
            if not answer:
                latest = asyncio.get_running_loop().time() + _BODY_S
                patience.reschedule(min(latest, patience.when() or latest))
            answer += part
            if response.status != 200 and len(answer) > _ERROR_BYTES:
                response.close()
                break
            if len(answer) > most_bytes:
                raise self.fail(Fault.garbage, f"{path} answered more than {most_bytes} bytes, the most it could need")
        return answer

    def _open(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            # No limit: the pool bounds the requests in flight.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # each call has its own deadline
            headers=headers,
            auto_decompress=False,  # a few bytes could become gigabytes
            cookie_jar=aiohttp.DummyCookieJar(),
        )


def _error_message(answer: bytes | bytearray) -> str:
    """The message in the body of an HTTP error, which may be JSON or text."""
    try:
        found = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return _excerpt(answer)
    while isinstance(found, dict) and found:
        found = next((found[key] for key in ("error", "message", "detail", "msg") if found.get(key)), str(found))
    return " ".join(str(found).split())[:_QUOTED]


def _excerpt(answer: bytes | bytearray) -> str:
    return " ".join(answer[:_QUOTED].decode(errors="replace").split())
