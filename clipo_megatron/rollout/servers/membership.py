"""The servers that a pool knows: which of them have the current weights, which answer, and which is least busy.

Everything here runs on the pool's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from clipo_megatron.rollout.servers.routing import choose
from clipo_megatron.rollout.servers.server import Fault, LiveServer, Server, ServerError

STATE_S = 10.0  # for a server to answer with its state
_FIRST_PROBE_AFTER_S = 0.5  # after a failure; doubles with each further failure
_MAX_PROBE_EVERY_S = 5.0
_LIES = (Fault.garbage, Fault.stale)
MOST_LIES = 4  # in a row, each after a probe that found the server well
log = logging.getLogger(__name__)


class NoServer(Exception):
    """No server with the current weights answers."""


@dataclass(slots=True, eq=False)
class PoolMember:
    """One server, as this pool sees it."""

    server: Server
    version: int = -1  # version of the weights it was admitted with; -1: it gets no requests
    suspected: bool = False  # it failed, and no probe has succeeded since
    in_flight: int = 0  # requests of this pool
    failures: int = 0  # times it was suspected since it last answered a request
    lies: int = 0  # of these times, those for an answer that could not be true
    last_error: str = ""
    _probe: asyncio.Task | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return self.server.url


class Membership:
    """Decides which servers get requests.

    A server is admitted with a version of the weights, suspected when it fails, and then probed until it answers. One
    that describes itself well and answers every request with a lie is expelled.

    Args:
        connect: makes the client for a URL.
        slack: how much busier than the idlest a prompt's preferred server may be; see `routing.choose`.
        counts: counters for the step's report.
    """

    def __init__(self, connect: Callable[[str], Server], *, slack: int, counts: Counter[str]):
        self._connect, self._slack, self._counts = connect, slack, counts
        self._known: dict[str, PoolMember] = {}
        self._changed = asyncio.Event()
        self._unusable_since = time.monotonic()
        self.version = -1

    def get(self, url: str) -> PoolMember:
        """The member with that URL, created if it is new."""
        url = url.rstrip("/")
        if url not in self._known:
            self._known[url] = PoolMember(self._connect(url))
        return self._known[url]

    def all(self) -> list[PoolMember]:
        """Every server that this pool has met."""
        return list(self._known.values())

    def usable(self) -> list[PoolMember]:
        """Servers that have the current weights and are not suspected."""
        return [each for each in self._known.values() if each.version == self.version >= 0 and not each.suspected]

    async def admit(self, urls: Iterable[str], version: int) -> None:
        """Send requests to these servers and no others, once each reports this version."""
        self.version = version
        admitted = [self.get(url) for url in urls]
        for member in self._known.values():
            member.version = version if member in admitted else -1
        await asyncio.gather(*(self._check(member) for member in admitted))
        self._announce()

    def expel(self, member: PoolMember, reason: str) -> None:
        """Send it no requests until it is admitted again."""
        member.version, member.last_error = -1, reason
        self._announce()

    def trust(self, member: PoolMember) -> None:
        """Forget what it was suspected for: it has answered a request."""
        member.failures = member.lies = 0

    def suspect(self, member: PoolMember, error: ServerError) -> None:
        """Send it no requests until a probe finds it well and with the right weights."""
        member.last_error = str(error)
        if not member.suspected:  # otherwise this is one of many requests that fail for the same reason
            member.suspected = True
            member.failures += 1
            member.lies += error.fault in _LIES
            self._counts["suspected"] += 1
            if member.lies >= MOST_LIES and member.version >= 0:
                log.warning("server %s is asked no more until it has new weights: it only lies", member.last_error)
                self.expel(member, str(error))
                return
        if member._probe is None or member._probe.done():
            member._probe = asyncio.create_task(self._probe(member))
        self._announce()

    async def _probe(self, member: PoolMember) -> None:
        wait = min(_MAX_PROBE_EVERY_S, _FIRST_PROBE_AFTER_S * 2 ** (member.failures - 1))
        while member.suspected and member.version >= 0:
            await asyncio.sleep(wait)
            wait = min(_MAX_PROBE_EVERY_S, 2 * wait)
            await self._check(member)
        self._announce()

    async def _check(self, member: PoolMember) -> None:
        """Ask a member for its state: suspect it if it fails, clear it if its version is right, else expel it."""
        expected = member.version
        try:
            state = await member.server.state(deadline_s=STATE_S)
        except ServerError as error:
            if member.version == expected:
                if member.suspected:
                    member.last_error = str(error)
                else:
                    self.suspect(member, error)
            return
        if member.version != expected:  # it was admitted or expelled in the meantime
            return
        if state.version == expected:
            member.suspected = False
        else:
            found = "those it was started with" if state.version is None else f"version {state.version}"
            self.expel(member, f"{member.url}: its weights are {found}, not version {expected}")

    async def choose(self, prompt_id: str, *, excluded: Set[str], grace_s: float) -> PoolMember:
        """Wait until a server is usable and return the one for this prompt.

        Raises:
            NoServer: no server was usable for `grace_s`, or all were expelled.
        """
        while not (usable := self.usable()):
            seconds_left = grace_s - (time.monotonic() - self._unusable_since)
            if seconds_left <= 0 or not any(each.version == self.version >= 0 for each in self._known.values()):
                raise NoServer
            changed = self._changed
            try:
                async with asyncio.timeout(seconds_left):
                    await changed.wait()
            except TimeoutError:
                continue
        busy = {each.url: each.in_flight for each in usable}
        return self._known[choose(prompt_id, busy, slack=self._slack, excluded=excluded)]

    def _announce(self) -> None:
        """Wake the callers that wait for a server, and record since when there is none."""
        if self.usable():
            self._unusable_since = float("inf")
        elif self._unusable_since == float("inf"):
            self._unusable_since = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def live(self, urls: Iterable[str], *, deadline_s: float) -> list[LiveServer]:
        """The servers among these that answer, asked all at once."""
        asked = [self.get(url) for url in urls]
        states = await asyncio.gather(
            *(each.server.state(deadline_s=deadline_s) for each in asked), return_exceptions=True
        )
        found = []
        for member, state in zip(asked, states, strict=True):
            if isinstance(state, ServerError):
                member.last_error = str(state)
            elif isinstance(state, BaseException):
                raise state
            else:
                found.append(LiveServer(member.server, state))
        return found

    async def close(self) -> None:
        """End probes and close connections."""
        for member in self._known.values():
            if member._probe is not None:
                member._probe.cancel()
        await asyncio.gather(*(each.server.close() for each in self._known.values()), return_exceptions=True)
