"""Requests in flight: each is sent to one server after another until one gives a complete answer.

Requests run as tasks on the pool's event loop; a `PoolGeneration` passes their groups to the caller's thread.
"""

from __future__ import annotations

import asyncio
import queue
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from clipo_megatron.config.schema import PoolConfig
from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.rollout.engine import (
    Cancelled,
    EngineError,
    EngineLostError,
    Generation,
    Request,
    SamplingParams,
    ignore,
    name_prompts,
    never,
)
from clipo_megatron.rollout.servers.http import EventLoop
from clipo_megatron.rollout.servers.membership import Membership, NoServer, PoolMember
from clipo_megatron.rollout.servers.server import Fault, Server, ServerError, sample_id

GRACE_S = 15.0  # time without a usable server after which the engine counts as lost
_STOP_S = 30.0  # for servers to return the partial rollouts of stopped requests
_POLL_S = 0.5  # between two looks at whether generation was cancelled
_ABORT_EVERY_S = 1.0  # an abort is repeated, because the request may reach the server after it
_REQUEST_AT_FAULT = {400, 401, 403, 413, 422}  # HTTP statuses that say nothing against the server


class PendingRequest:
    """One request until it is answered."""

    def __init__(self, request: Request, params: SamplingParams, results: queue.SimpleQueue):
        self.request, self.params = request, params
        self.results = results  # receives (this object, its rollouts or an exception)
        self.errors: list[str] = []  # of failed attempts
        self.task: asyncio.Task | None = None
        self.member: PoolMember | None = None  # the server of the current attempt
        self.name = ""  # of the current attempt, see `sample_id`
        self.detached = False  # continues across an update of the weights
        self.on_group: Callable[[RolloutGroup], None] = ignore  # see `Generation.detach`
        self.stopping = False  # partial rollouts are enough

    @property
    def ids(self) -> list[str]:
        """The ids of the samples of the current attempt."""
        return [sample_id(self.name, sample) for sample in range(self.params.samples)]

    def group(self, rollouts: Sequence[Rollout]) -> RolloutGroup:
        return RolloutGroup(self.request.position, self.request.prompt, list(rollouts))


class RequestDispatcher:
    """Sends pending requests to servers, a bounded number at a time; lives on the event loop.

    Args:
        members: the servers that may be asked.
        config: bounds, deadlines and number of attempts.
        router: receives the requests in place of the members, if there is one.
        counts: counters for the step's report.
    """

    def __init__(self, members: Membership, config: PoolConfig, *, router: Server | None, counts: Counter[str]):
        self._members, self._config, self._counts = members, config, counts
        self._router = None if router is None else PoolMember(router)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._background: set[asyncio.Task] = set()

    def start(self, pending: PendingRequest) -> None:
        pending.task = asyncio.create_task(self._run(pending))

    async def _run(self, pending: PendingRequest) -> None:
        try:
            async with self._slots:
                result: Any = await self._answer(pending)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            result = error
        else:
            if not pending.stopping:  # else rollouts may be partial
                pending.on_group(pending.group(result))
        pending.results.put((pending, result))

    async def _answer(self, pending: PendingRequest) -> list[Rollout]:
        """Try servers until one gives a complete answer.

        Raises:
            NoServer: no usable server is left.
            EngineError: all attempts failed.
        """
        tried: set[str] = set()
        for attempt in range(self._config.attempts):
            if attempt:
                self._counts["retries"] += 1
                await asyncio.sleep(self._config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            member = await self._members.choose(pending.request.prompt.id, excluded=tried, grace_s=GRACE_S)
            member = self._router or member
            try:
                return await self._attempt(pending, member)
            except ServerError as error:
                pending.errors.append(str(error))
                if pending.stopping:
                    return list(pending.request.begun)
                if error.fault is Fault.unsupported:  # by all servers alike
                    raise
                tried.add(member.url)
                self._blame(member, error)
        raise EngineError(
            f"Prompt {pending.request.prompt.id} has no answer after {self._config.attempts} attempts: "
            + "; ".join(pending.errors[-self._config.attempts :])
            + ". Look at the servers' logs; rollout.pool.attempts bounds the attempts."
        )

    async def _attempt(self, pending: PendingRequest, member: PoolMember) -> list[Rollout]:
        version = self._members.version
        pending.member, pending.name = member, uuid.uuid4().hex
        member.in_flight += 1
        self._counts["requests"] += 1
        answered = False
        try:
            rollouts = await member.server.generate(
                pending.request,
                pending.params,
                version=version,
                name=pending.name,
                deadline_s=self._config.request_deadline_s,
            )
            answered = True
        finally:
            member.in_flight -= 1
            pending.member = None
            if not answered:  # the server may not notice that nobody waits for the answer
                self._in_background(self._abort(member, pending.ids))
        newest = max((int(each.versions[-1]) for each in rollouts), default=-1)
        if newest > (max(version, self._members.version + 1) if pending.detached else version):
            raise ServerError(member.url, Fault.stale, f"it answered with version {newest}, not {version}")
        if not pending.stopping and sum(each.finish != "abort" for each in rollouts) < pending.params.samples:
            raise ServerError(member.url, Fault.aborted, "the request was interrupted on the server")
        for each in [member] if member is not self._router else self._members.usable():
            self._members.trust(each)
        return rollouts

    def _blame(self, member: PoolMember, error: ServerError) -> None:
        """Count a failure, and suspect the server unless the request was at fault."""
        self._counts[f"fault_{error.fault.value}"] += 1
        if error.fault is Fault.aborted or error.status in _REQUEST_AT_FAULT:
            return
        if member is not self._router:
            self._members.suspect(member, error)
            return
        for each in self._members.usable():  # the router does not say which of them failed
            self._members.suspect(each, error)

    # --- interrupting --------------------------------------------------------------------------------------------

    async def cancel(self, requests: Sequence[PendingRequest]) -> None:
        """End requests and discard what they have."""
        tasks = [each.task for each in requests if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, requests: Sequence[PendingRequest]) -> None:
        """End requests; those that are on a server put their partial rollouts among their results."""
        for each in requests:
            each.stopping = True
        by_task = {each.task: each for each in requests if each.task is not None and not each.task.done()}
        await self.cancel([each for each in by_task.values() if each.member is None])
        deadline = time.monotonic() + _STOP_S
        while running := {task for task in by_task if not task.done()}:
            if time.monotonic() >= deadline:
                break
            ids: dict[PoolMember, list[str]] = {}
            for task in running:
                if (member := by_task[task].member) is not None:
                    for asked in self._members.all() if member is self._router else [member]:
                        ids.setdefault(asked, []).extend(by_task[task].ids)
            await asyncio.gather(*(self._abort(member, theirs) for member, theirs in ids.items()))
            await asyncio.wait(running, timeout=_ABORT_EVERY_S)
        await self.cancel([each for task, each in by_task.items() if not task.done()])

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def last_errors(self) -> str:
        """Each server's last error, for messages."""
        members = [*self._members.all(), *([self._router] if self._router else [])]
        return " ".join(f"Last error: {each.last_error}." for each in members if each.last_error)

    async def close(self) -> None:
        """End background tasks, and the connections to a router."""
        for task in self._background:
            task.cancel()
        if self._router is not None:
            await self._router.server.close()

    async def _abort(self, member: PoolMember, ids: Sequence[str]) -> None:
        with suppress(ServerError):  # the closed connection ends the call too, only later
            await member.server.abort(ids, deadline_s=5.0)


class PoolGeneration(Generation):
    """The groups of one `generate`, and of the requests that an earlier, detached generation took along."""

    def __init__(
        self,
        loop: EventLoop,
        dispatcher: RequestDispatcher,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ):
        self._loop, self._dispatcher, self._should_cancel = loop, dispatcher, should_cancel
        self._deadline_s, self._deadline = deadline_s, time.monotonic() + deadline_s
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._pending: dict[PendingRequest, None] = {}  # an ordered set: those whose groups were not yielded yet
        self._ready: deque[RolloutGroup] = deque()
        self._error: EngineError | None = None
        self.detached = False

    def begin(self, requests: Sequence[Request], params: SamplingParams, detached: PoolGeneration | None) -> None:
        """Send the requests, and take over those of a detached generation."""
        self._loop.run(self._begin(requests, params, detached), deadline_s=60.0)

    async def _begin(
        self, requests: Sequence[Request], params: SamplingParams, detached: PoolGeneration | None
    ) -> None:
        if detached is not None:
            self._pending |= detached._pending
            detached._pending = {}
            for pending in self._pending:
                pending.results = self._results
            with suppress(queue.Empty):
                while True:
                    self._results.put(detached._results.get_nowait())
        for request in requests:
            pending = PendingRequest(request, params, self._results)
            self._pending[pending] = None
            self._dispatcher.start(pending)

    def __next__(self) -> RolloutGroup:
        while not self._ready and self._pending and self._error is None:
            if self._should_cancel():
                self.close()
                raise Cancelled
            seconds_left = self._deadline - time.monotonic()
            try:
                pending, result = self._results.get(timeout=max(0.0, min(seconds_left, _POLL_S)))
            except queue.Empty:
                if seconds_left > _POLL_S:
                    continue
                self._fail(None)
                break
            if pending not in self._pending:
                continue
            if isinstance(result, BaseException):
                self._fail(result)
            else:
                del self._pending[pending]
                self._ready.append(pending.group(result))
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def stop(self) -> list[RolloutGroup]:
        """See `Generation.stop`; complete groups that were not yielded yet are among the result."""
        if self._pending:
            self._loop.run(self._dispatcher.stop(list(self._pending)), deadline_s=_STOP_S + 10)
        found = self._take_ready()
        found += [pending.group(pending.request.begun) for pending in self._pending]
        self._pending, self._ready = {}, deque()
        return [group for group in found if group.rollouts]

    def detach(self, on_group: Callable[[RolloutGroup], None] = ignore) -> None:
        """See `Generation.detach`; the pool's next `generate` takes the requests over."""
        self.detached = True
        for pending in self._pending:
            pending.detached, pending.on_group = True, on_group

    def close(self) -> None:
        if self._pending and not self._loop.closed:
            self._loop.run(self._dispatcher.cancel(list(self._pending)), deadline_s=10.0)
        self._pending, self._ready, self._error = {}, deque(), None

    def _take_ready(self) -> list[RolloutGroup]:
        """Remove and return the groups that are complete and were not yielded yet."""
        found = list(self._ready)
        self._ready = deque()
        with suppress(queue.Empty):
            while True:
                pending, result = self._results.get_nowait()
                if pending in self._pending and not isinstance(result, BaseException):
                    del self._pending[pending]
                    found.append(pending.group(result))
        return found

    def _fail(self, cause: BaseException | None) -> None:
        """End all requests. Complete groups are still yielded, then the error is raised. None: the deadline passed."""
        self._loop.run(self._dispatcher.cancel(list(self._pending)), deadline_s=10.0)
        self._ready = deque(self._take_ready())
        if not self._pending:
            return
        missing = f"without an answer: {name_prompts(pending.request for pending in self._pending)}"
        last_errors = self._loop.run(self._dispatcher.last_errors(), deadline_s=10.0)
        if isinstance(cause, NoServer):
            self._error = EngineLostError(
                f"No rollout server is left that has the weights and answers; {missing}. {last_errors}",
                [pending.request for pending in self._pending],
            )
        elif cause is None:
            self._error = EngineError(
                f"Generation passed its deadline of {self._deadline_s:g} s; {missing}. {last_errors}"
                " Raise rollout.deadline_s, add servers, or lower rollout.max_new_tokens or data.prompts_per_step."
            )
        elif isinstance(cause, EngineError):
            self._error = EngineError(f"{cause} In all {missing}.")
        else:
            self._error = EngineError(f"Generation failed: {type(cause).__name__}: {cause}; {missing}.")
            self._error.__cause__ = cause
        self._pending = {}
