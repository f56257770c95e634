"""Requests on their way: each is asked of one server after another until one gives a whole answer.

Jobs run on the pool's event loop; a `PoolGeneration` hands their groups to the caller's thread.
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
    never,
)
from clipo_megatron.rollout.servers.http import EventLoop
from clipo_megatron.rollout.servers.membership import Members, NoServer, PoolMember
from clipo_megatron.rollout.servers.server import Fault, Server, ServerError, sample_id

GRACE_S = 15.0  # without a usable server before generation is lost
GRACE_PERIOD_S = 30.0  # for servers to hand over what they have of unfinished requests
_LOOK_UP_S = 0.5  # between two looks at whether generation is given up
_ASK_AGAIN_S = 1.0  # before an abort is repeated: the request may have reached the server after it
_LISTED = 8  # names spelled out in a message
_REQUEST_AT_FAULT = {400, 401, 403, 413, 422}  # statuses that say nothing against the server


class PendingRequest:
    """One request until it is answered."""

    def __init__(self, request: Request, params: SamplingParams, results: queue.SimpleQueue):
        self.request, self.params = request, params
        self.results = results  # gets (job, rollouts or an exception)
        self.words: list[str] = []  # what servers said that failed
        self.task: asyncio.Task | None = None
        self.member: PoolMember | None = None  # that it is asked of now
        self.name = ""  # of the call
        self.left = False  # goes on across an update of the weights
        self.stopping = False  # whatever there is will do

    @property
    def ids(self) -> list[str]:
        """Of the samples of the call."""
        return [sample_id(self.name, sample) for sample in range(self.params.samples)]

    def group(self, rollouts: Sequence[Rollout]) -> RolloutGroup:
        """The request's group with these rollouts."""
        return RolloutGroup(self.request.position, self.request.prompt, list(rollouts))


class RequestDispatcher:
    """Runs jobs on the servers of `members`, a bounded number at a time; lives on the event loop.

    Args:
        members: who may be asked.
        config: bounds, deadlines and attempts.
        router: answers requests in place of the members, where there is one.
        counts: of what happened, for reports.
    """

    def __init__(self, members: Members, config: PoolConfig, *, router: Server | None, counts: Counter[str]):
        self._members, self._config, self._counts = members, config, counts
        self._router = None if router is None else PoolMember(router)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._chores: set[asyncio.Task] = set()

    def start(self, job: PendingRequest) -> None:
        """Begin a job."""
        job.task = asyncio.create_task(self._run(job))

    async def _run(self, job: PendingRequest) -> None:
        try:
            async with self._slots:
                result: Any = await self._answer(job)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            result = error
        job.results.put((job, result))

    async def _answer(self, job: PendingRequest) -> list[Rollout]:
        """A whole answer.

        Raises:
            NoServer: nobody is left to ask.
            EngineError: so many attempts failed as are allowed.
        """
        tried: set[str] = set()
        for attempt in range(self._config.attempts):
            if attempt:
                self._counts["retries"] += 1
                await asyncio.sleep(self._config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            member = await self._members.choose(job.request.prompt.id, excluded=tried, grace_s=GRACE_S)
            member = self._router or member
            try:
                return await self._ask(job, member)
            except ServerError as error:
                job.words.append(str(error))
                if job.stopping:
                    return list(job.request.begun)
                if error.fault is Fault.unsupported:  # nor can any other server
                    raise
                tried.add(member.url)
                self._blame(member, error)
        raise EngineError(
            f"Prompt {job.request.prompt.id} has no answer after {self._config.attempts} attempts: "
            + "; ".join(job.words[-self._config.attempts :])
            + ". Look at the servers' logs; rollout.pool.attempts bounds the attempts."
        )

    async def _ask(self, job: PendingRequest, member: PoolMember) -> list[Rollout]:
        version = self._members.version
        job.member, job.name = member, uuid.uuid4().hex
        member.in_flight += 1
        self._counts["requests"] += 1
        whole = False
        try:
            rollouts = await member.server.generate(
                job.request,
                job.params,
                version=version,
                name=job.name,
                deadline_s=self._config.request_deadline_s,
            )
            whole = True
        finally:
            member.in_flight -= 1
            job.member = None
            if not whole:  # the server may not know that nobody waits any more
                self._chore(self._abort(member, job.ids))
        newest = max((int(each.versions[-1]) for each in rollouts), default=-1)
        if newest > (max(version, self._members.version + 1) if job.left else version):
            raise ServerError(member.url, Fault.stale, f"it answered with version {newest}, not {version}")
        if not job.stopping and sum(each.finish != "abort" for each in rollouts) < job.params.samples:
            raise ServerError(member.url, Fault.aborted, "the request was interrupted on the server")
        member.strikes = 0
        return rollouts

    def _blame(self, member: PoolMember, error: ServerError) -> None:
        """Draw the consequences of a failure for the server."""
        self._counts[f"fault_{error.fault.value}"] += 1
        if error.fault is Fault.aborted or error.status in _REQUEST_AT_FAULT:
            return
        if member is not self._router:
            self._members.suspect(member, error)
            return
        for each in self._members.usable():  # which of them failed, the router does not say
            self._members.suspect(each, error)

    # --- interrupting --------------------------------------------------------------------------------------------

    async def cancel(self, jobs: Sequence[PendingRequest]) -> None:
        """End jobs and forget them."""
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs if job.task is not None), return_exceptions=True)

    async def stop(self, jobs: Sequence[PendingRequest]) -> None:
        """End jobs; those that run on a server that keeps unfinished samples put what it has among their results."""
        for job in jobs:
            job.stopping = True
        waiting = {job.task: job for job in jobs if job.task is not None and not job.task.done()}
        idle = [job for job in waiting.values() if job.member is None or not job.member.server.keeps_unfinished]
        await self.cancel(idle)
        deadline = time.monotonic() + GRACE_PERIOD_S
        while running := {task for task in waiting if not task.done()}:
            if time.monotonic() >= deadline:
                break
            calls: dict[PoolMember, list[str]] = {}
            for task in running:
                if (member := waiting[task].member) is not None:
                    for asked in self._members.all() if member is self._router else [member]:
                        calls.setdefault(asked, []).extend(waiting[task].ids)
            await asyncio.gather(*(self._abort(member, ids) for member, ids in calls.items()))
            await asyncio.wait(running, timeout=_ASK_AGAIN_S)
        await self.cancel([waiting[task] for task in waiting if not task.done()])

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def last_words(self) -> str:
        """What each server last did wrong, for messages."""
        members = [*self._members.all(), *([self._router] if self._router else [])]
        return " ".join(f"Last word: {each.words}." for each in members if each.words)

    async def close(self) -> None:
        """End chores, and the connections to a router."""
        for chore in self._chores:
            chore.cancel()
        if self._router is not None:
            await self._router.server.close()

    async def _abort(self, member: PoolMember, ids: Sequence[str]) -> None:
        with suppress(ServerError):  # a closed connection ends a call too, only later
            await member.server.abort(ids, deadline_s=5.0)


class PoolGeneration(Generation):
    """Groups of the jobs of one `generate`, and of those that the one before it left running."""

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
        self._pending: dict[PendingRequest, None] = {}  # not yet handed on, in order
        self._ready: deque[RolloutGroup] = deque()
        self._error: EngineError | None = None
        self.left = False

    def begin(self, requests: Sequence[Request], params: SamplingParams, left: PoolGeneration | None) -> None:
        """Start the jobs, and take over those that `left` was left with."""
        self._loop.run(self._begin(requests, params, left), deadline_s=60.0)

    async def _begin(self, requests: Sequence[Request], params: SamplingParams, left: PoolGeneration | None) -> None:
        if left is not None:
            self._pending |= left._pending
            left._pending = {}
            for job in self._pending:
                job.results = self._results
            with suppress(queue.Empty):
                while True:
                    self._results.put(left._results.get_nowait())
        for request in requests:
            job = PendingRequest(request, params, self._results)
            self._pending[job] = None
            self._dispatcher.start(job)

    def __next__(self) -> RolloutGroup:
        while not self._ready and self._pending and self._error is None:
            if self._should_cancel():
                self.close()
                raise Cancelled
            left = self._deadline - time.monotonic()
            try:
                job, result = self._results.get(timeout=max(0.0, min(left, _LOOK_UP_S)))
            except queue.Empty:
                if left > _LOOK_UP_S:
                    continue
                self._fail(None)
                break
            if job not in self._pending:
                continue
            if isinstance(result, BaseException):
                self._fail(result)
            else:
                del self._pending[job]
                self._ready.append(job.group(result))
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def stop(self) -> list[RolloutGroup]:
        """End what still runs, and return what there is of it; complete groups not yet handed on are among it."""
        if self._pending:
            self._loop.run(self._dispatcher.stop(list(self._pending)), deadline_s=GRACE_PERIOD_S + 10)
        found = self._drain()
        found += [job.group(job.request.begun) for job in self._pending]
        self._pending, self._ready = {}, deque()
        return [group for group in found if group.rollouts]

    def leave(self) -> None:
        """Let what still runs go on; the pool's next `generate` takes it over."""
        self.left = True
        for job in self._pending:
            job.left = True

    def close(self) -> None:
        """End what still runs and forget it. Idempotent."""
        if self._pending and not self._loop.closed:
            self._loop.run(self._dispatcher.cancel(list(self._pending)), deadline_s=10.0)
        self._pending, self._ready, self._error = {}, deque(), None

    def _drain(self) -> list[RolloutGroup]:
        """Groups that are there and were not handed on."""
        found = list(self._ready)
        self._ready = deque()
        with suppress(queue.Empty):
            while True:
                job, result = self._results.get_nowait()
                if job in self._pending and not isinstance(result, BaseException):
                    del self._pending[job]
                    found.append(job.group(result))
        return found

    def _fail(self, cause: BaseException | None) -> None:
        """End everything; groups that are complete are still handed on, then the error is raised."""
        self._loop.run(self._dispatcher.cancel(list(self._pending)), deadline_s=10.0)
        self._ready = deque(self._drain())
        if not self._pending:
            return
        missing, said = self._names(), self._words()
        if isinstance(cause, NoServer):
            self._error = EngineLostError(
                f"No rollout server is left that has the weights and answers; {missing}. {said}",
                [job.request for job in self._pending],
            )
        elif cause is None:
            self._error = EngineError(
                f"Generation passed its deadline of {self._deadline_s:g} s; {missing}. {said}"
                " Raise rollout.deadline_s, add servers, or lower rollout.max_new_tokens or data.prompts_per_step."
            )
        elif isinstance(cause, EngineError):
            self._error = EngineError(f"{cause} In all {missing}.")
        else:
            self._error = EngineError(f"Generation failed: {type(cause).__name__}: {cause}; {missing}.")
            self._error.__cause__ = cause
        self._pending = {}

    def _names(self) -> str:
        names = [job.request.prompt.id for job in self._pending]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return f"without an answer: {', '.join(names[:_LISTED])}{more}"

    def _words(self) -> str:
        return self._loop.run(self._dispatcher.last_words(), deadline_s=10.0)
