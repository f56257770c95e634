"""What all transports to servers share: attempts until somebody has the new weights, and agreement among all ranks."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from clipo_megatron.config.schema import SyncConfig
from clipo_megatron.rollout.engine import EngineError, InFlight
from clipo_megatron.rollout.servers.server import Fault, RankChecksums, ServerError
from clipo_megatron.runtime.platform import SharedGroupError, platform
from clipo_megatron.sync.attempt import Attempt, Limits, Servers, SyncTarget, UpdateFailed
from clipo_megatron.sync.checksums import ChecksumError, Kind, Sums, compare
from clipo_megatron.sync.consensus import SyncError, gather, share
from clipo_megatron.sync.shard import Shard

T = TypeVar("T")

_LOOK_EVERY_S = 1.0  # while no server is there
_TRIES_A_SERVER = 2  # attempts of one update that one server may spoil before it is not asked again
_TRIES_UNBLAMED = 3  # attempts of one update that may fail without anybody to blame

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What an update was like; the same on every rank."""

    version: int
    seconds: float
    nbytes: int  # of tensors, counted once
    servers: tuple[str, ...]  # that have the new weights
    left_out: Mapping[str, str]  # server -> what happened to it
    attempts: int
    phases: Mapping[str, float] = field(default_factory=dict)  # name -> seconds, of the attempt that succeeded
    unproven: tuple[str, ...] = ()  # tensors of the servers that the trainer has no checksum for

    @property
    def metrics(self) -> dict[str, float]:
        """For the step's report."""
        return {
            "sync/seconds": self.seconds,
            "sync/bytes_per_second": self.nbytes / max(self.seconds, 1e-9),
            "sync/servers": float(len(self.servers)),
            "sync/left_out": float(len(self.left_out)),
            "sync/attempts": float(self.attempts),
            **{f"sync/{name}_s": seconds for name, seconds in self.phases.items()},
        }


@dataclass(frozen=True, slots=True)
class Order:
    """What every rank must know of an attempt before it begins."""

    number: int  # of the attempt, counted over all updates
    version: int
    tp_sizes: tuple[int, ...]  # of the servers, each size once
    ranks: int  # of all servers together
    regroup: bool  # whether the servers are not those of the last update
    verify: bool
    kind: Kind  # how the servers compute checksums


@dataclass(frozen=True, slots=True)
class _Verdict:
    failed: bool = False
    fatal: str = ""  # a fault of the trainer's own: no further attempt
    mismatch: str = ""  # a checksum that is not the trainer's


@dataclass
class _UpdateCounters:
    """What the coordinator remembers of one update."""

    left_out: dict[str, str] = field(default_factory=dict)
    blamed: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    unblamed: int = 0
    nobody_since: float | None = None
    last_words: str = "no server was found"


class _AttemptFailed(Exception):
    """Not this time; another attempt follows."""


class ServedSync(ABC):
    """Gives servers the newest weights. `update_weights` is collective over all ranks of the default group.

    The coordinator, global rank 0, alone talks to the servers. The others send what they own, or take part in the
    agreement on how it ended.

    Args:
        shard: this rank's part of the policy.
        servers: the pool; None on ranks that have none. The coordinator has one.
        config: `rollout.sync`.
        in_flight: what becomes of generation in flight.
        join_deadline_s: how long to wait for a server when there is none.
    """

    def __init__(
        self,
        shard: Shard,
        servers: Servers | None,
        config: SyncConfig,
        *,
        in_flight: InFlight = InFlight.abort,
        join_deadline_s: float = 900.0,
    ):
        if shard.is_coordinator and servers is None:
            raise ValueError("rank 0 coordinates the update of the servers, and has no pool of servers")
        self.shard, self.servers, self.config = shard, servers, config
        self.in_flight, self.join_deadline_s = in_flight, join_deadline_s
        self.limits = Limits(config.deadline_s)
        self.plan = shard.plan(config.bucket_mb * 2**20)
        self._attempts, self._updates = 0, 0
        self._members: tuple[SyncTarget, ...] = ()  # of the current attempt; coordinator only
        self._formed: tuple[Any, ...] | None = None  # who was updated last, if nothing broke since
        self._last_version: int | None = None
        self._tally = _UpdateCounters()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update of the servers")

    @abstractmethod
    def _transfer(self, order: Order, attempt: Attempt | None) -> Sums | None:
        """Bring the weights to all servers, from pausing them to the end of their update; collective.

        Returns:
            The checksums of what this rank sent, where `order.verify`.
        """

    def _begin(self, version: int) -> None:  # noqa: B027  (a transport need not have anything to do)
        """Before the first attempt of an update; collective."""

    def _finish(self, version: int) -> None:  # noqa: B027
        """After an update that succeeded; collective."""

    def update_weights(self, version: int) -> SyncReport:
        """Update all servers that answer, and leave out those that fail; collective.

        Returns:
            The same report on every rank.

        Raises:
            SyncError: no server could be updated, and none came within `join_deadline_s`; on every rank.
            ChecksumError: a server holds a tensor that is not the trainer's; on every rank.
        """
        start = time.monotonic()
        self._tally = _UpdateCounters()
        self._begin(version)
        tries = 0
        while True:
            order = share(lambda: self._next_order(version))
            if isinstance(order, str):
                raise SyncError(order)
            if order is None:
                continue
            tries += 1
            attempt = self._new_attempt() if self.shard.is_coordinator else None
            try:
                sums = self._transfer(order, attempt)
                unproven = self._prove(order, attempt, sums)
                break
            except _AttemptFailed:
                self._formed = None
        self._finish(version)
        self._updates += 1
        self._last_version = version
        report = share(
            lambda: SyncReport(
                version=version,
                seconds=time.monotonic() - start,
                nbytes=self.plan.nbytes,
                servers=tuple(member.url for member in attempt.members),
                left_out=dict(self._tally.left_out),
                attempts=tries,
                phases=dict(attempt.seconds),
                unproven=unproven,
            )
        )
        if self.shard.is_coordinator:
            self._formed = self._signature(self._members) if len(attempt.members) == len(self._members) else None
        if self.servers is not None:
            self.servers.admit(report.servers, version)
        return report

    def offload(self) -> None:  # noqa: B027
        """Nothing to do: the servers have GPUs of their own."""

    def close(self) -> None:
        """Free what the updates hold. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- attempts ------------------------------------------------------------------------------------------------

    def _next_order(self, version: int) -> Order | str | None:
        """Coordinator only: the next attempt; None: nobody is there yet; text: it is of no use to go on."""
        tally = self._tally
        if tally.unblamed >= _TRIES_UNBLAMED:
            return f"version {version} reached no server in {tally.unblamed} attempts: {tally.last_words}"
        try:
            found = [SyncTarget(*each) for each in self.servers.discover()]
        except EngineError as error:
            found, tally.last_words = [], str(error)
        members = [member for member in found if not tally.blamed[member.life]]
        if not members:
            now = time.monotonic()
            tally.nobody_since = tally.nobody_since or now
            members = [member for member in found if tally.blamed[member.life] < _TRIES_A_SERVER]
            if not members and now - tally.nobody_since > self.join_deadline_s:
                words = "; ".join(f"{url}: {reason}" for url, reason in tally.left_out.items()) or tally.last_words
                return (
                    f"no server took the weights of version {version} within {self.join_deadline_s:.0f} s "
                    f"(rollout.pool.join_deadline_s): {words}"
                )
            if not members:
                time.sleep(_LOOK_EVERY_S)
                return None
        for member in members:
            tally.left_out.pop(member.url, None)
        self._members = tuple(sorted(members, key=lambda member: member.url))
        self._attempts += 1
        every = self.config.verify_every
        return Order(
            number=self._attempts,
            version=version,
            tp_sizes=tuple(sorted({member.state.tp for member in members})),
            ranks=sum(member.state.tp for member in members),
            regroup=self._formed is None or self._formed != self._signature(self._members),
            verify=every > 0 and self._updates % every == 0,
            kind=_kind(members),
        )

    def _signature(self, members: tuple[SyncTarget, ...]) -> tuple[Any, ...]:
        """Of a set of servers that have not been restarted since they were last updated."""
        return tuple(member.life for member in members)

    def _new_attempt(self) -> Attempt:
        return Attempt(self._members, self.limits, self._on_failure)

    def _on_failure(self) -> None:  # noqa: B027
        """A server failed, and others may be waiting for it; on the coordinator, in the thread of the clients."""

    def _together(
        self,
        mine: Callable[[], T],
        drive: Callable[[Attempt], Coroutine[Any, Any, Any]] | None,
        attempt: Attempt | None,
        *,
        reused: bool = False,
    ) -> list[T]:
        """Run `mine` on every rank while the coordinator drives the servers; agree on how it went.

        Args:
            mine: this rank's part.
            drive: what the coordinator does with the servers meanwhile, in another thread.
            attempt: the coordinator's; None elsewhere.
            reused: the servers' groups are those of an earlier update. What is wrong may then be the group.

        Returns:
            What `mine` returned on each rank, on the coordinator; [] elsewhere.
        """
        future: Future[Any] | None = None
        if attempt is not None and drive is not None:
            future = self._thread.submit(self.servers.run, drive(attempt), deadline_s=2 * self.limits.total_s)
        result, broken, fatal, cause = None, "", "", None
        try:
            result = mine()
        except SharedGroupError as error:
            broken = str(error)
        except Exception as error:
            fatal, cause = f"rank {self.shard.rank}: {type(error).__name__}: {error}", error
        if broken or fatal:
            self._should_cancel()
        refused: UpdateFailed | None = None
        mismatch = ""
        if future is not None:
            try:
                future.result()
            except UpdateFailed as error:
                refused = error
            except ChecksumError as error:
                mismatch, cause = str(error), error
            except Exception as error:
                fatal, cause = fatal or f"rank 0: {type(error).__name__}: {error}", cause or error
        gathered = gather((result, broken, fatal))

        def judge() -> _Verdict:
            fatals = [each for _, _, each in gathered if each]
            breaks = [each for _, each, _ in gathered if each]
            if fatals or mismatch:
                return _Verdict(fatal="; ".join(fatals), mismatch=mismatch)
            if not refused and not breaks:
                return _Verdict()
            self._remember(refused, breaks, reused)
            return _Verdict(failed=True)

        verdict = share(judge)
        if verdict.fatal:
            raise SyncError(f"the update of the servers failed: {verdict.fatal}") from cause
        if verdict.mismatch:
            raise cause if isinstance(cause, ChecksumError) else ChecksumError(verdict.mismatch)
        if verdict.failed:
            raise _AttemptFailed
        return [each for each, _, _ in gathered]

    def _remember(self, refused: UpdateFailed | None, breaks: list[str], reused: bool) -> None:
        """Leave out whoever is to blame for a failed attempt."""
        tally = self._tally
        tally.last_words = str(refused) if refused else breaks[0]
        blamed = {} if refused is None or (reused and not refused.silent) else refused.blamed
        tally.unblamed += not blamed
        self._leave_out(blamed)

    def _leave_out(self, blamed: Mapping[str, str]) -> None:
        self._tally.left_out |= blamed
        self._tally.blamed.update(member.life for member in self._members if member.url in blamed)
        for reason in blamed.values():
            log.warning("left out of the update: %s", reason)

    def _should_cancel(self) -> None:  # noqa: B027
        """This rank's part failed: whoever waits for it should know."""

    def _prove(self, order: Order, attempt: Attempt | None, sums: Sums | None) -> tuple[str, ...]:
        """Compare checksums, then let the servers go on; those that fail here are left out. Collective."""
        gathered = gather(sums)
        unproven: set[str] = set()

        async def prove(attempt: Attempt) -> None:
            if order.verify:
                held = await self._surviving(attempt, "verify", partial(_checksums, attempt))
                mine = Sums(self.shard.spec, order.tp_sizes).merged(gathered)
                for url, ranks in held.items():
                    if ranks is None:
                        unproven.add(f"{url}: everything; this server cannot compute checksums")
                    else:
                        unproven.update(compare(url, ranks, mine))
            await self._surviving(attempt, "resume", lambda member: member.server.resume(deadline_s=attempt.deadline()))

        self._together(lambda: None, prove, attempt)
        return tuple(sorted(unproven))

    async def _surviving(self, attempt: Attempt, phase: str, call: Callable[[SyncTarget], Any]) -> dict[str, Any]:
        """As `Attempt.each`, but those that fail are left out and the others go on.

        Raises:
            UpdateFailed: all failed.
        """
        try:
            return await attempt.each(phase, call)
        except UpdateFailed as error:
            attempt.members = tuple(member for member in attempt.members if member.url not in error.blamed)
            if not attempt.members:
                raise
            self._leave_out(error.blamed)
            return error.answers


def _kind(members: Sequence[SyncTarget]) -> Kind:
    """Servers and trainer compute on the same kind of device, and all servers run the same engine."""
    if not all(member.state.engine.startswith("SGLang") for member in members):
        return "plain"
    return "sglang on a gpu" if platform().has_gpu else "sglang on a cpu"


async def _checksums(attempt: Attempt, member: SyncTarget) -> list[RankChecksums] | None:
    """A server's; None where it has no such call."""
    try:
        return await member.server.checksums(deadline_s=attempt.deadline())
    except ServerError as error:
        if error.fault is Fault.unsupported:
            return None
        raise
