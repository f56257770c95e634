"""The servers of one update: what is asked of all of them at once, how long each may take, and who is to blame."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from clipo_megatron.rollout.servers.server import Fault, Server, ServerError, ServerState

T = TypeVar("T")


class Servers(Protocol):
    """What the coordinator needs of the pool; `admit` is called on every rank that has one."""

    def discover(self) -> Sequence[tuple[Server, ServerState]]:
        """Servers that answer now."""
        ...

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """Run a coroutine on the loop that the servers' clients live in; from any thread."""
        ...

    def admit(self, urls: Sequence[str], version: int) -> None:
        """These, and no others, have the weights of this version."""
        ...


@dataclass(frozen=True, slots=True)
class SyncTarget:
    """A server as it was found at the start of an attempt."""

    server: Server
    state: ServerState

    @property
    def url(self) -> str:
        """Names it."""
        return self.server.url

    @property
    def life(self) -> tuple[str, str, int]:
        """Differs after a restart, where the server can tell."""
        return self.url, self.state.boot, self.state.tp


@dataclass(frozen=True, slots=True)
class Limits:
    """How the deadline of an update is divided: in the worst case one call stalls, and the others get another try."""

    total_s: float

    @property
    def call_s(self) -> float:
        """For one call to one server, for the members of a group to meet, and for one broadcast."""
        return self.total_s / 4

    @property
    def settle_s(self) -> float:
        """After a group broke, for the servers in it to notice and answer."""
        return max(1.0, self.total_s / 20)


class UpdateFailed(Exception):
    """Servers failed in a phase. `blamed`: those to leave out, with the reason. `silent`: they no longer answer, rather
    than say no. `answers`: what the others answered."""

    def __init__(self, phase: str, blamed: Mapping[str, str], *, silent: bool, answers: Mapping[str, Any]):
        super().__init__("; ".join(blamed.values()))
        self.phase, self.blamed, self.silent, self.answers = phase, dict(blamed), silent, dict(answers)


class Attempt:
    """One pass over a set of servers. `on_failure` is called as soon as the first of them fails."""

    def __init__(self, members: Sequence[SyncTarget], limits: Limits, on_failure: Callable[[], None]):
        self.members, self.limits = tuple(members), limits
        self.seconds: dict[str, float] = {}
        self.failed = False
        self._on_failure = on_failure
        self._end = time.monotonic() + limits.total_s

    def deadline(self, *, settling: bool = False) -> float:
        """Seconds that a call starting now may take; `settling`: it ends with a group's, a little later."""
        call = self.limits.call_s + (self.limits.settle_s if settling else 0.0)
        return max(0.1, min(call, self._end - time.monotonic()))

    async def each(
        self, phase: str, call: Callable[[SyncTarget], Awaitable[T]], *, grouped: bool = False
    ) -> dict[str, T]:
        """Ask all members at once, and wait until the last has answered or failed.

        Args:
            phase: what it is called in reports.
            call: of one member; keeps to `deadline`.
            grouped: the members share a process group, so that one that fails takes others with it.

        Returns:
            Their answers by URL.

        Raises:
            UpdateFailed: at least one failed.
        """
        start = time.monotonic()
        failures: dict[str, tuple[float, Exception]] = {}

        answers: dict[str, T] = {}

        async def one(member: SyncTarget) -> None:
            try:
                answers[member.url] = await call(member)
            except Exception as error:
                failures[member.url] = (time.monotonic(), error)
                self.failed = True
                self._on_failure()

        await asyncio.gather(*(one(member) for member in self.members))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start
        if failures:
            blamed, silent = _blame(failures, grouped)
            words = {url: f"{phase}: {_words(failures[url][1])}" for url in blamed}
            raise UpdateFailed(phase, words, silent=silent, answers=answers)
        return answers


def _blame(failures: Mapping[str, tuple[float, Exception]], grouped: bool) -> tuple[set[str], bool]:
    """Whom to leave out, and whether they are silent.

    In a group, one that still answers, if only to say no, may be another one's victim: then the silent are to blame,
    and where all answer, the one that failed first.
    """
    silent = {url for url, (_, error) in failures.items() if not _says_no(error)}
    if not grouped:
        return set(failures), bool(silent)
    return silent or {min(failures, key=lambda url: failures[url][0])}, bool(silent)


def _says_no(error: Exception) -> bool:
    return isinstance(error, ServerError) and error.fault is Fault.status


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
