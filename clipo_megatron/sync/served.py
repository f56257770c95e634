"""The base of all transports to servers: attempts until at least one server has the new weights."""

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
from clipo_megatron.rollout.servers.server import Fault, LiveServer, ServerError
from clipo_megatron.runtime.shared_group import SharedGroupError
from clipo_megatron.sync.attempt import Attempt, UpdatableServers, UpdateDeadlines, UpdateFailed
from clipo_megatron.sync.checksums import ChecksumError, ChecksumKind, Sums, checksum_kind, compare, held_checksums
from clipo_megatron.sync.consensus import SyncError, gather, share
from clipo_megatron.sync.report import SyncReport
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.delta import LastSent

T = TypeVar("T")

_DISCOVER_EVERY_S = 1.0  # while no server answers
_MAX_FAILURES_A_SERVER = 2  # failed attempts of one update after which a server is left out for good
_MAX_UNEXPLAINED = 3  # attempts of one update that may fail without a server to blame

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """What every rank has to know about an attempt before it begins."""

    number: int  # counted over all updates
    version: int
    tp_sizes: tuple[int, ...]  # the servers' numbers of ranks, each once
    ranks: int  # of all servers together
    regroup: bool  # whether the servers differ from those of the last update
    changes: bool  # whether only what has changed since the last update is sent
    verify: bool
    kind: ChecksumKind


@dataclass(frozen=True, slots=True)
class _PhaseOutcome:
    failed: bool = False
    fatal: str = ""  # an error of the trainer itself, after which there is no further attempt
    mismatch: str = ""  # a server's checksum differs from the trainer's


@dataclass
class _UpdateState:
    """What the coordinator remembers during one update."""

    left_out: dict[str, str] = field(default_factory=dict)  # URL -> reason
    failures: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # by `LiveServer.life`
    unexplained: int = 0  # failed attempts without a server to blame
    nobody_since: float | None = None  # when no server was left to ask
    last_error: str = "no server was found"
    sent: int = 0  # bytes of the current attempt
    paused_at: float | None = None  # when servers were first told to stop generating


class _AttemptFailed(Exception):
    """The attempt failed, and another one follows."""


class ServedSync(ABC):
    """Gives servers the newest weights.

    Only the coordinator, global rank 0, talks to the servers. The other ranks send their part of the weights, or only
    take part in the decision how an attempt ended.

    Args:
        shard: this rank's part of the policy.
        servers: the pool of servers; None on ranks other than the coordinator that have none.
        config: the settings `rollout.sync`.
        in_flight: what happens to requests in flight.
        join_deadline_s: how long to wait for a server if none answers.
    """

    def __init__(
        self,
        shard: Shard,
        servers: UpdatableServers | None,
        config: SyncConfig,
        *,
        in_flight: InFlight = InFlight.abort,
        join_deadline_s: float = 900.0,
    ):
        if shard.is_coordinator and servers is None:
            raise ValueError("rank 0 coordinates the update of the servers, and has no pool of servers")
        self.shard, self.servers, self.config = shard, servers, config
        self.in_flight, self.join_deadline_s = in_flight, join_deadline_s
        self.deadlines = UpdateDeadlines(config.deadline_s)
        self.export_plan = shard.plan(config.bucket_mb * 2**20)
        self._attempts, self._updates = 0, 0
        self._targets: tuple[LiveServer, ...] = ()  # the servers of the current attempt; coordinator only
        self._formed: tuple[Any, ...] | None = None  # the servers of the last update, if nothing has failed since
        self._state = _UpdateState()
        self._last_sent = LastSent(self.export_plan, shard.holder)  # empty, unless config.delta
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update of the servers")

    @abstractmethod
    def _transfer(self, plan: AttemptPlan, attempt: Attempt | None) -> Sums | None:
        """Pause all servers, transfer the weights, and end the servers' update; collective.

        Returns:
            The checksums of what this rank sent, if `plan.verify`.
        """

    def _begin(self, version: int) -> None:  # noqa: B027
        """Prepare an update, before its first attempt; collective."""

    def _finish(self, version: int) -> None:  # noqa: B027
        """Clean up after a successful update; collective."""

    def update_weights(self, version: int) -> SyncReport:
        """Update all servers that answer, and leave out those that fail; collective over all ranks.

        Returns:
            The same report on every rank.

        Raises:
            SyncError: on every rank, because no server could be updated and none joined within `join_deadline_s`.
            ChecksumError: on every rank, because a server's tensor differs from the trainer's.
        """
        start = time.monotonic()
        self._state = _UpdateState()
        self._begin(version)
        attempts = 0
        while True:
            plan = share(lambda: self._plan_attempt(version))
            if isinstance(plan, str):
                raise SyncError(plan)
            if plan is None:
                continue
            attempts += 1
            attempt = None
            if self.shard.is_coordinator:
                attempt = Attempt(self._targets, self.deadlines, self._on_failure)
            try:
                sums = self._transfer(plan, attempt)
                unverified = self._verify_and_resume(plan, attempt, sums)
                break
            except _AttemptFailed:
                self._formed = None
        self._finish(version)
        self._updates += 1
        report = share(
            lambda: SyncReport(
                version=version,
                seconds=time.monotonic() - start,
                nbytes=self.export_plan.nbytes,
                sent=self._state.sent,
                servers=tuple(target.url for target in attempt.targets),
                left_out=dict(self._state.left_out),
                attempts=attempts,
                phases=dict(attempt.seconds),
                unverified=unverified,
            )
        )
        if self.shard.is_coordinator:
            self._formed = _lives(self._targets) if len(attempt.targets) == len(self._targets) else None
        if self.servers is not None:
            self.servers.admit(report.servers, version)
        return report

    def offload(self) -> None:  # noqa: B027
        """Does nothing: the servers have GPUs of their own."""

    def close(self) -> None:
        """Free what is kept between updates. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _pause(self, attempt: Attempt, changes: bool) -> None:
        """Let all servers stop generating; they go on when the update has succeeded. If what follows are no changes,
        but changes of it may follow, they keep it.

        Raises:
            SyncError: a server was not started for keeping tensors.
        """
        self._state.paused_at = self._state.paused_at or time.monotonic()
        await attempt.each("pausing", lambda each: each.server.pause(self.in_flight, deadline_s=attempt.deadline()))
        if changes or not self.config.delta:
            return
        unable: list[str] = []

        async def keep(target: LiveServer) -> None:
            try:
                await target.server.keep_tensors(deadline_s=attempt.deadline())
            except ServerError as error:
                if error.fault is not Fault.unsupported:
                    raise
                unable.append(str(error))

        await attempt.each("keep", keep)
        if unable:
            self._on_failure()  # nobody is to wait for these servers
            raise SyncError("; ".join(unable))

    # --- attempts ------------------------------------------------------------------------------------------------

    def _plan_attempt(self, version: int) -> AttemptPlan | str | None:
        """Coordinator only: the next attempt, None if no server answers yet, or the reason why there is no attempt."""
        state = self._state
        if state.unexplained >= _MAX_UNEXPLAINED:
            return f"version {version} reached no server in {state.unexplained} attempts: {state.last_error}"
        try:
            found = self.servers.discover()
        except EngineError as error:
            found, state.last_error = [], str(error)
        for target in found:
            if reason := self._unfit(target):
                return f"{target.url} cannot be updated: {reason}"
        targets = [target for target in found if not state.failures[target.life]]
        if not targets:
            now = time.monotonic()
            state.nobody_since = state.nobody_since or now
            targets = [target for target in found if state.failures[target.life] < _MAX_FAILURES_A_SERVER]
            if not targets and now - state.nobody_since > self.join_deadline_s:
                reasons = "; ".join(f"{url}: {reason}" for url, reason in state.left_out.items()) or state.last_error
                return (
                    f"no server took the weights of version {version} within {self.join_deadline_s:.0f} s "
                    f"(rollout.pool.join_deadline_s): {reasons}"
                )
            if not targets:
                time.sleep(_DISCOVER_EVERY_S)
                return None
        for target in targets:
            state.left_out.pop(target.url, None)
        self._targets = tuple(sorted(targets, key=lambda target: target.url))
        self._attempts += 1
        every = self.config.verify_every
        regroup = self._formed is None or self._formed != _lives(self._targets)
        return AttemptPlan(
            number=self._attempts,
            version=version,
            tp_sizes=tuple(sorted({target.state.tp for target in targets})),
            ranks=sum(target.state.tp for target in targets),
            regroup=regroup,
            changes=self.config.delta and not regroup,  # all servers hold what was sent last
            verify=every > 0 and self._updates % every == 0,
            kind=checksum_kind(targets),
        )

    def _unfit(self, target: LiveServer) -> str:
        """Why this transport cannot update a server as it was started, and what to do; "" if it can.

        In SGLang's updates a rank is known by its tensor-parallel number alone (0.5.23: `WeightUpdater` in
        srt/model_executor/model_runner_components), so that of all stages one would be reached.
        """
        if target.state.pp == 1:
            return ""
        return f"it has {target.state.pp} pipeline stages; start it with one, or set rollout.sync.transport=disk"

    def _on_failure(self) -> None:  # noqa: B027
        """Called when a server (in the clients' thread) or this rank has failed and others may be waiting for it."""

    def _run_phase(
        self,
        mine: Callable[[], T],
        drive: Callable[[Attempt], Coroutine[Any, Any, Any]] | None,
        attempt: Attempt | None,
        *,
        reused: bool = False,
    ) -> list[T]:
        """Run `mine` on every rank while the coordinator drives the servers, and decide how it went; collective.

        Args:
            mine: this rank's part.
            drive: the coordinator's calls to the servers, made meanwhile in another thread.
            attempt: the attempt on the coordinator; None elsewhere.
            reused: whether the servers' groups are those of an earlier update, so that a group may be at fault.

        Returns:
            What `mine` returned on each rank, on the coordinator; [] elsewhere.

        Raises:
            SyncError, ChecksumError: on every rank.
        """
        future: Future[Any] | None = None
        if attempt is not None and drive is not None:
            future = self._thread.submit(self.servers.run, drive(attempt), deadline_s=2 * self.deadlines.total_s)
        result, broken, fatal, cause = None, "", "", None
        try:
            result = mine()
        except SharedGroupError as error:
            broken = str(error)
        except Exception as error:
            fatal, cause = f"rank {self.shard.rank}: {type(error).__name__}: {error}", error
        if broken or fatal:
            self._on_failure()
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

        def decide() -> _PhaseOutcome:
            fatals = [each for _, _, each in gathered if each]
            breaks = [each for _, each, _ in gathered if each]
            if fatals or mismatch:
                return _PhaseOutcome(fatal="; ".join(fatals), mismatch=mismatch)
            if not refused and not breaks:
                return _PhaseOutcome()
            self._record_failure(refused, breaks, reused)
            return _PhaseOutcome(failed=True)

        outcome = share(decide)
        if outcome.fatal:
            raise SyncError(f"the update of the servers failed: {outcome.fatal}") from cause
        if outcome.mismatch:
            raise cause if isinstance(cause, ChecksumError) else ChecksumError(outcome.mismatch)
        if outcome.failed:
            raise _AttemptFailed
        return [each for each, _, _ in gathered]

    def _record_failure(self, refused: UpdateFailed | None, breaks: list[str], reused: bool) -> None:
        """Leave out the servers that are to blame for a failed attempt."""
        state = self._state
        state.last_error = str(refused) if refused else breaks[0]
        blamed = {} if refused is None or (reused and not refused.silent) else refused.blamed
        state.unexplained += not blamed
        self._leave_out(blamed)

    def _leave_out(self, blamed: Mapping[str, str]) -> None:
        self._state.left_out |= blamed
        self._state.failures.update(target.life for target in self._targets if target.url in blamed)
        for reason in blamed.values():
            log.warning("left out of the weight update: %s", reason)

    def _verify_and_resume(self, plan: AttemptPlan, attempt: Attempt | None, sums: Sums | None) -> tuple[str, ...]:
        """Compare checksums, then let the servers generate; collective. Servers that fail here are left out."""
        gathered = gather(sums)
        unverified: set[str] = set()

        async def verify(attempt: Attempt) -> None:
            if plan.verify:
                held = await self._each_surviving(attempt, "verify", partial(held_checksums, attempt))
                mine = Sums(self.shard.spec, plan.tp_sizes).merged(gathered)
                for url, ranks in held.items():
                    if ranks is None:
                        unverified.add(f"{url}: everything; this server cannot compute checksums")
                    else:
                        unverified.update(compare(url, ranks, mine))
            await self._each_surviving(
                attempt, "resume", lambda target: target.server.resume(deadline_s=attempt.deadline())
            )
            if self._state.paused_at is not None:
                attempt.seconds["pause"] = time.monotonic() - self._state.paused_at

        self._run_phase(lambda: None, verify, attempt)
        return tuple(sorted(unverified))

    async def _each_surviving(self, attempt: Attempt, phase: str, call: Callable[[LiveServer], Any]) -> dict[str, Any]:
        """Like `Attempt.each`, but servers that fail are left out and the others continue.

        Raises:
            UpdateFailed: all servers failed.
        """
        try:
            return await attempt.each(phase, call)
        except UpdateFailed as error:
            attempt.targets = tuple(target for target in attempt.targets if target.url not in error.blamed)
            if not attempt.targets:
                raise
            self._leave_out(error.blamed)
            return error.answers


def _lives(targets: Sequence[LiveServer]) -> tuple[Any, ...]:
    """Identifies these starts of these servers: it changes when one joins, leaves or is restarted."""
    return tuple(target.life for target in targets)
