"""JSON over HTTP for clients of servers: an event loop in a thread of its own, and calls that always end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import orjson

from clipo_megatron.rollout.engine import EngineError
from clipo_megatron.rollout.servers.server import Fault, ServerError

T = TypeVar("T")

_WORDS = 300  # characters of a server's own words in a message
_MOST_BYTES = 1 << 30  # of one answer
_BEYOND_S = 5.0  # that a coroutine may take past the deadline it keeps itself
_KEPT_S = 2.0  # idle connections; servers close theirs after 5 s, and lose a call that is on its way just then


class EventLoop:
    """An asyncio loop in a daemon thread, for callers that do not await."""

    def __init__(self, name: str = "servers"):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it no longer runs anything."""
        return self._loop.is_closed()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """The coroutine's result. It is expected to keep the deadline itself; if it does not, it is cancelled.

        Raises:
            EngineError: it was not done a few seconds after its deadline.
        """
        future = self.submit(coroutine)
        try:
            return future.result(deadline_s + _BEYOND_S)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            name = getattr(coroutine, "__qualname__", "a call")
            raise EngineError(f"{name} did not end within {deadline_s + _BEYOND_S:g} s and was given up.") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            with contextlib.suppress(concurrent.futures.TimeoutError):  # a task that resists ends with the thread
                self.submit(_cancel_others()).result(_BEYOND_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_BEYOND_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all calls; when one fails, the others are cancelled and their end awaited."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class JsonClient:
    """Calls to one server; each returns parsed JSON or raises `ServerError` with the right fault.

    Args:
        url: of the server, without a path.
        api_key_env: environment variable with the key, sent as a bearer token if it is set. It is in no message.
    """

    def __init__(self, url: str, api_key_env: str = ""):
        self.url = url.rstrip("/")
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if not self._key.isprintable() or not self._key.isascii():
            raise EngineError(f"The key in ${api_key_env} holds characters that no HTTP header can carry.")
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"JsonClient({self.url!r})"

    async def post(self, path: str, body: Any = None, *, deadline_s: float, **query: str) -> Any:
        """Send JSON ({} by default); the answer's JSON, None where its body is empty."""
        return self._parsed(path, await self._fetch("POST", path, {} if body is None else body, query, deadline_s))

    async def post_and_read(self, path: str, body: Any, read: Callable[[Any], T], *, deadline_s: float) -> T:
        """Send JSON; what `read` makes of the answer's JSON, which is a large one.

        A large answer is many small lists, and the garbage collector looks at all objects of the process several
        times while they are made: ten times the work of making them. It waits until `read` has dropped them.
        """
        answer = await self._fetch("POST", path, body, {}, deadline_s)
        collects = gc.isenabled()
        gc.disable()
        try:
            return read(self._parsed(path, answer))
        finally:
            if collects:
                gc.enable()

    async def get(self, path: str, *, deadline_s: float, **query: str) -> Any:
        """The answer's JSON, None where its body is empty."""
        return self._parsed(path, await self._fetch("GET", path, None, query, deadline_s))

    async def get_text(self, path: str, *, deadline_s: float) -> str:
        """The answer as it is."""
        return (await self._fetch("GET", path, None, {}, deadline_s)).decode(errors="replace")

    def fail(self, fault: Fault, message: str, status: int = 0) -> ServerError:
        """An error of this server, to be raised."""
        return ServerError(self.url, fault, message.replace(self._key, "***") if self._key else message, status)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _parsed(self, path: str, answer: bytes) -> Any:
        if not answer.strip():
            return None
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError:
            raise self.fail(Fault.garbage, f"{path} answered something that is no JSON: {_shown(answer)}") from None

    async def _fetch(self, method: str, path: str, body: Any, query: Mapping[str, str], deadline_s: float) -> bytes:
        if self._session is None or self._session.closed:
            self._session = self._open()
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._session.request(
                    method,
                    self.url + path,
                    params=query or None,
                    data=None if body is None else orjson.dumps(body),
                    allow_redirects=False,  # the key goes to nobody else
                ) as response,
            ):
                parts, size = [], 0
                async for part in response.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > _MOST_BYTES:
                        raise self.fail(Fault.garbage, f"{path} answered more than {_MOST_BYTES} bytes")
                answer = b"".join(parts)
        except TimeoutError:
            raise self.fail(Fault.deadline, f"{path} gave no answer within {deadline_s:g} s") from None
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL, UnicodeDecodeError) as error:
            reason = " ".join(str(getattr(error, "message", "") or error).split())
            raise self.fail(Fault.garbage, f"{path} answered something that is no HTTP: {reason[:_WORDS]}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self.fail(Fault.refused, f"{path} was cut off: {error or type(error).__name__}") from None
        if response.status != 200:
            words = _words_of(answer) or response.reason or ""
            raise self.fail(Fault.status, f"{path} answered {response.status}: {words}", response.status)
        return answer

    def _open(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            # The pool limits what is in flight.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # each call has its own
            headers=headers,
        )


def _words_of(answer: bytes) -> str:
    """What a refusal says, out of its JSON where it is JSON."""
    try:
        found = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return _shown(answer)
    while isinstance(found, dict) and found:
        found = next((found[key] for key in ("error", "message", "detail", "msg") if found.get(key)), str(found))
    return " ".join(str(found).split())[:_WORDS]


def _shown(answer: bytes) -> str:
    return " ".join(answer[:_WORDS].decode(errors="replace").split())
