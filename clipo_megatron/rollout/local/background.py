"""Generation by the local engine: while its caller waits, or in a thread of its own once the caller has detached it."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from clipo_megatron.flow import RolloutGroup
from clipo_megatron.rollout.engine import (
    Cancelled,
    EngineError,
    Generation,
    Request,
    SamplingParams,
    ignore,
    name_prompts,
    never,
)
from clipo_megatron.rollout.local.decoding import NonFiniteLogits
from clipo_megatron.rollout.local.workload import LoadedModel, Workload

_POLL_S = 0.5  # between two looks at whether generation was cancelled


class _Ended(Exception):
    """The thread is to end."""


class Turns:
    """Lets others use the model between two forwards of a thread."""

    def __init__(self, workload: Workload):
        self._workload = workload
        self._changed = threading.Condition()
        self._computing = self._ended = False
        self._holders = 0

    def give(self) -> None:
        """Called by the thread between two forwards: wait while others hold it, or while there is nothing to do.

        Raises:
            _Ended: the thread is to end.
        """
        with self._changed:
            self._computing = False
            self._changed.notify_all()
            self._changed.wait_for(self._may_compute)
            if self._ended:
                raise _Ended
            self._computing = True

    def _may_compute(self) -> bool:
        works = self._workload.loaded.can_generate and self._workload.has_work
        return self._ended or (works and not self._holders)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the thread computes nothing: entering waits for the forward under way."""
        with self._changed:
            self._holders += 1
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._computing)
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let the thread end before its next forward."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def left(self) -> None:
        """Called by the thread as it ends."""
        with self._changed:
            self._computing, self._ended = False, True
            self._changed.notify_all()


class Background:
    """A thread that decodes a workload until it is ended, or until nobody refers to this object any more.

    Attributes:
        results: receives each complete group, and the exception that ended the thread if there was one.
    """

    def __init__(self, workload: Workload):
        self.turns = Turns(workload)
        self.results: queue.SimpleQueue[RolloutGroup | BaseException] = queue.SimpleQueue()
        workload.check = self.turns.give
        # A daemon, so that a process which ends without closing its engine does not wait for all rollouts.
        thread = threading.Thread(
            target=_decode, args=(workload, self.turns, self.results), name="local rollouts", daemon=True
        )
        self._end = weakref.finalize(self, _end, self.turns, thread)  # also when the interpreter exits
        thread.start()

    def end(self) -> None:
        """End the thread after the forward under way. Idempotent."""
        self._end()


def _decode(workload: Workload, turns: Turns, results: queue.SimpleQueue) -> None:
    try:
        while True:
            turns.give()
            if (group := workload.next_group()) is not None:
                results.put(group)
    except _Ended:
        pass
    except BaseException as error:  # the caller raises it
        results.put(error)
    finally:
        turns.left()


def _end(turns: Turns, thread: threading.Thread) -> None:
    turns.end()
    if thread is not threading.current_thread():  # objects are collected in any thread
        thread.join()


class LocalGeneration(Generation):
    """The groups of one `generate`, and of the requests that an earlier, detached generation took along.

    Until it is detached, its caller's thread decodes.

    Args:
        loaded: what generates.
        before: a detached generation, with whose requests this one goes on; it is left without any.
        deadline_s: when all groups have to be there, from now on.
        should_cancel: asked before each forward, and twice a second while a thread decodes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        before: LocalGeneration | None,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ):
        self._should_cancel = should_cancel
        self._deadline_s, self._deadline = deadline_s, time.monotonic() + deadline_s
        self._workload, self._left = Workload(loaded), 0  # groups that were not yielded yet
        self._background: Background | None = None
        self.detached = False
        if before is None:
            self._workload.check = self._check
        else:
            self._workload, before._workload = before._workload, self._workload
            self._background, before._background = before._background, None
            self._left, before._left = before._left, 0

    @property
    def in_background(self) -> bool:
        """Whether a thread of its own decodes."""
        return self._background is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no thread decodes: entering waits for the forward under way."""
        if self._background is None:
            yield
        else:
            with self._background.turns.held():
                yield

    def add(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Append requests to those that it has."""
        with self.held():
            self._workload.add(requests, params)
        self._left += len(requests)

    def __next__(self) -> RolloutGroup:
        if not self._left:
            raise StopIteration
        try:
            group = self._decoded() if self._background is None else self._received(self._background)
        except BaseException as error:
            self._fail(error)
        self._left -= 1
        if not self._left:
            self.close()
        return group

    def _decoded(self) -> RolloutGroup:
        group = self._workload.next_group()
        assert group is not None, "a workload has a group for each request"
        return group

    def _received(self, background: Background) -> RolloutGroup:
        while True:
            if self._should_cancel():
                raise Cancelled
            try:
                seconds = min(_POLL_S, max(0.0, self._deadline - time.monotonic()))
                return _group_of(background.results.get(timeout=seconds))
            except queue.Empty:
                self._check()

    def _check(self) -> None:
        if self._should_cancel():
            raise Cancelled
        if time.monotonic() >= self._deadline:
            raise EngineError(
                f"Generation passed its deadline of {self._deadline_s:g} s; without an answer: "
                f"{name_prompts(self._workload.unanswered)}. "
                "Raise rollout.deadline_s, or lower rollout.max_new_tokens or data.prompts_per_step."
            )

    def _fail(self, error: BaseException) -> NoReturn:
        """End everything after an error of the decoding, and tell the caller of it."""
        loaded, version = self._workload.loaded, self._workload.version
        missing = f"without an answer: {name_prompts(self._workload.unanswered)}"
        self.close()
        if isinstance(error, NonFiniteLogits):
            raise EngineError(
                f"The weights of version {version} give log-probs that are not finite; {missing}. "
                "Look at the last updates' gradient norms."
            ) from error
        if isinstance(error, RuntimeError) and not isinstance(error, (EngineError, Cancelled)):
            raise EngineError(
                f"Decoding up to {loaded.batch_size} sequences at once failed; {missing}. "
                f"If memory ran out, lower rollout.batch_size. The cause: {error}"
            ) from error
        raise error

    def stop(self) -> list[RolloutGroup]:
        """See `Generation.stop`; complete groups that were not yielded yet are among the result.

        Raises:
            EngineError: the thread has failed.
        """
        complete: list[RolloutGroup] = []
        if self._background is not None:
            self._background.end()
            try:
                while True:
                    complete.append(_group_of(self._background.results.get_nowait()))
            except queue.Empty:
                pass
            except BaseException as error:
                self._fail(error)
        partial = self._workload.stop()
        self.close()
        return [*complete, *partial]

    def detach(self, on_group: Callable[[RolloutGroup], None] = ignore) -> None:
        """See `Generation.detach`: a thread goes on with what this one has begun."""
        self.detached = True
        with self.held():
            self._workload.tell(on_group)
        if self._background is None and self._left:
            self._background = Background(self._workload)

    def close(self) -> None:
        if self._background is not None:
            self._background.end()
            self._background = None
        self._workload.clear()
        self._left = 0


def _group_of(result: RolloutGroup | BaseException) -> RolloutGroup:
    if isinstance(result, BaseException):
        raise result
    return result
