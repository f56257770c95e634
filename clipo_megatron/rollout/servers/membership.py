"""The servers that a pool knows: which of them have the weights, answer, and are least busy.

Everything here runs on the pool's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from clipo_megatron.rollout.servers.routing import choose
from clipo_megatron.rollout.servers.server import Server, ServerError, ServerState

PROBE_S = 10.0  # for a server to say how it is
_FIRST_PROBE_S = 0.5  # after a failure; doubles with each further one
_LAST_PROBE_S = 5.0


class NoServer(Exception):
    """No server that has the weights answers."""


@dataclass(slots=True, eq=False)
class PoolMember:
    """One server, as this pool sees it."""

    server: Server
    version: int = -1  # of the weights it was admitted with; -1: it gets no requests
    suspected: bool = False  # it failed, and has not shown since that it is well
    in_flight: int = 0  # requests of this pool
    strikes: int = 0  # times it was suspected since it last answered a request
    words: str = ""  # what it last said or did wrong
    _probe: asyncio.Task | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Of the server."""
        return self.server.url


class Members:
    """Who may be asked. A server is admitted with a version, suspected when it fails, and probed until it is well.

    Args:
        connect: makes a client for a URL.
        slack: requests that a prompt's own server may be busier than the idlest one.
        counts: of what happened, for reports.
    """

    def __init__(self, connect: Callable[[str], Server], *, slack: int, counts: Counter[str]):
        self._connect, self._slack, self._counts = connect, slack, counts
        self._known: dict[str, PoolMember] = {}
        self._changed = asyncio.Event()
        self._unusable_since = time.monotonic()
        self.version = -1

    def get(self, url: str) -> PoolMember:
        """The member of that URL, which is new if it has to be."""
        url = url.rstrip("/")
        if url not in self._known:
            self._known[url] = PoolMember(self._connect(url))
        return self._known[url]

    def all(self) -> list[PoolMember]:
        """Every server met so far."""
        return list(self._known.values())

    def usable(self) -> list[PoolMember]:
        """Those that may be asked now."""
        return [each for each in self._known.values() if each.version == self.version >= 0 and not each.suspected]

    async def admit(self, urls: Iterable[str], version: int) -> None:
        """Let these servers, and no others, answer requests, each once it says itself that it has the version."""
        self.version = version
        admitted = [self.get(url) for url in urls]
        for member in self._known.values():
            member.version = version if member in admitted else -1
        await asyncio.gather(*(self._look(member) for member in admitted))
        self._announce()

    def expel(self, member: PoolMember, words: str) -> None:
        """Ask it no more until it is admitted again."""
        member.version, member.words = -1, words
        self._announce()

    def suspect(self, member: PoolMember, error: ServerError) -> None:
        """Ask it nothing until it says that it is well and has the right weights."""
        member.words = str(error)
        if not member.suspected:  # else it is one of many requests that fail for the same reason
            member.suspected = True
            member.strikes += 1
            self._counts["suspected"] += 1
        if member._probe is None or member._probe.done():
            member._probe = asyncio.create_task(self._probe(member))
        self._announce()

    async def _probe(self, member: PoolMember) -> None:
        wait = min(_LAST_PROBE_S, _FIRST_PROBE_S * 2 ** (member.strikes - 1))
        while member.suspected and member.version >= 0:
            await asyncio.sleep(wait)
            wait = min(_LAST_PROBE_S, 2 * wait)
            await self._look(member)
        self._announce()

    async def _look(self, member: PoolMember) -> None:
        """Ask a member how it is, and believe it."""
        expected = member.version
        try:
            state = await member.server.state(deadline_s=PROBE_S)
        except ServerError as error:
            if member.version == expected:
                if member.suspected:
                    member.words = str(error)
                else:
                    self.suspect(member, error)
            return
        if member.version != expected:  # somebody decided about it in the meantime
            return
        if state.version == expected:
            member.suspected = False
        else:
            said = "those it was started with" if state.version is None else f"version {state.version}"
            self.expel(member, f"{member.url}: its weights are {said}, not version {expected}")

    async def choose(self, prompt_id: str, *, excluded: Set[str], grace_s: float) -> PoolMember:
        """The server for a request, once there is one.

        Raises:
            NoServer: none has been usable for `grace_s`, or none that could become so is left.
        """
        while not (usable := self.usable()):
            left = grace_s - (time.monotonic() - self._unusable_since)
            if left <= 0 or not any(each.version == self.version >= 0 for each in self._known.values()):
                raise NoServer
            changed = self._changed
            try:
                async with asyncio.timeout(left):
                    await changed.wait()
            except TimeoutError:
                continue
        busy = {each.url: each.in_flight for each in usable}
        return self._known[choose(prompt_id, busy, slack=self._slack, excluded=excluded)]

    def _announce(self) -> None:
        """Wake whoever waits for a server, and note since when there is none."""
        if self.usable():
            self._unusable_since = float("inf")
        elif self._unusable_since == float("inf"):
            self._unusable_since = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def live(self, urls: Iterable[str], *, deadline_s: float) -> list[tuple[PoolMember, ServerState]]:
        """Which of these servers answer, with what they say of themselves."""
        asked = [self.get(url) for url in urls]
        states = await asyncio.gather(
            *(each.server.state(deadline_s=deadline_s) for each in asked), return_exceptions=True
        )
        found = []
        for member, state in zip(asked, states, strict=True):
            if isinstance(state, ServerError):
                member.words = str(state)
            elif isinstance(state, BaseException):
                raise state
            else:
                found.append((member, state))
        return found

    async def close(self) -> None:
        """End probes and connections."""
        for member in self._known.values():
            if member._probe is not None:
                member._probe.cancel()
        await asyncio.gather(*(each.server.close() for each in self._known.values()), return_exceptions=True)
