"""One attempt to update a set of servers: calls to all of them at once, their deadlines, and which server failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from clipo_megatron.rollout.servers.server import Fault, LiveServer, ServerError

T = TypeVar("T")


class UpdatableServers(Protocol):
    """The part of the pool that the weight sync uses. `admit` is called on every rank that has a pool."""

    def discover(self) -> Sequence[LiveServer]:
        """The servers that answer now."""
        ...

    def run(self, coroutine: Coroutine[Any, Any, T], *, deadline_s: float) -> T:
        """Run a coroutine on the event loop of the servers' clients; may be called from any thread."""
        ...

    def admit(self, urls: Sequence[str], version: int) -> None:
        """Send prompts to these servers, which have the weights of this version, and to no others."""
        ...


@dataclass(frozen=True, slots=True)
class UpdateDeadlines:
    """Divides the deadline of an update, so that after one stalled call the other servers get another attempt."""

    total_s: float

    @property
    def call_s(self) -> float:
        """Seconds for one call to one server, for the members of a group to join, and for one broadcast."""
        return self.total_s / 4

    @property
    def notice_s(self) -> float:
        """Seconds for the servers of a broken group to notice and answer."""
        return max(1.0, self.total_s / 20)


class UpdateFailed(Exception):
    """Servers failed in a phase of an update.

    Attributes:
        blamed: the servers to leave out, each with the reason.
        silent: whether they no longer answer, rather than refuse.
        answers: what the other servers answered.
    """

    def __init__(self, phase: str, blamed: Mapping[str, str], *, silent: bool, answers: Mapping[str, Any]):
        super().__init__("; ".join(blamed.values()))
        self.phase, self.blamed, self.silent, self.answers = phase, dict(blamed), silent, dict(answers)


class Attempt:
    """One pass over a set of servers. `on_failure` is called whenever one of them fails."""

    def __init__(self, targets: Sequence[LiveServer], deadlines: UpdateDeadlines, on_failure: Callable[[], None]):
        self.targets, self.deadlines = tuple(targets), deadlines
        self.seconds: dict[str, float] = {}
        self.failed = False
        self._on_failure = on_failure
        self._end = time.monotonic() + deadlines.total_s

    def deadline(self, *, in_group: bool = False) -> float:
        """Seconds that a call starting now may take; `in_group`: the call fails only after its process group does."""
        call = self.deadlines.call_s + (self.deadlines.notice_s if in_group else 0.0)
        return max(0.1, min(call, self._end - time.monotonic()))

    async def each(
        self, phase: str, call: Callable[[LiveServer], Awaitable[T]], *, grouped: bool = False
    ) -> dict[str, T]:
        """Call all servers at once, and wait until each has answered or failed.

        Args:
            phase: the phase's name in reports.
            call: calls one server, within `deadline`.
            grouped: whether the servers share a process group, in which one that fails makes others fail.

        Returns:
            The answers by URL.

        Raises:
            UpdateFailed: at least one server failed.
        """
        start = time.monotonic()
        failures: dict[str, tuple[float, Exception]] = {}

        answers: dict[str, T] = {}

        async def one(target: LiveServer) -> None:
            try:
                answers[target.url] = await call(target)
            except Exception as error:
                failures[target.url] = (time.monotonic(), error)
                self.failed = True
                self._on_failure()

        await asyncio.gather(*(one(target) for target in self.targets))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start
        if failures:
            blamed, silent = _blame(failures, grouped)
            reasons = {url: f"{phase}: {_describe(failures[url][1])}" for url in blamed}
            raise UpdateFailed(phase, reasons, silent=silent, answers=answers)
        return answers


def _blame(failures: Mapping[str, tuple[float, Exception]], grouped: bool) -> tuple[set[str], bool]:
    """The servers to leave out, and whether they are silent.

    In a group, a server that answers with a failure may be the victim of another. So the silent servers are to blame;
    if all answer, the one that failed first.
    """
    silent = {url for url, (_, error) in failures.items() if not _is_refusal(error)}
    if not grouped:
        return set(failures), bool(silent)
    return silent or {min(failures, key=lambda url: failures[url][0])}, bool(silent)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, ServerError) and error.fault is Fault.status


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
