"""Grading in worker processes that can be killed, while the engine still generates.

    with GraderPool(config.reward) as pool:
        for group in engine.generate(...):
            pool.submit(group)              # returns at once
        scored = pool.collect()             # waits for what is left

Every answer has a deadline. A worker that misses it is killed and replaced; so is one that crashes or runs out of
memory. In each case, and when the grader raises, the answer is *ungraded*, with the reason; it is never wrong in
silence.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass
from typing import Any

from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.flow import RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.modes import describe, mode_for
from clipo_megatron.rewards.process import GraderFailure, GraderProcess

_ATTEMPTS = 2  # a worker that fails before it starts on an answer is replaced, and the answer asked once more
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to judge."""

    response: str
    ground_truth: str
    data_source: str
    extra: Mapping[str, Any] | None = None  # the reasoning-gym entry, for that mode


@dataclass(slots=True)
class GraderStatistics:
    """What happened since the last call of `GraderPool.take_statistics`."""

    answers: int = 0
    ungraded: int = 0  # of these
    timeouts: int = 0  # workers killed at a deadline
    deaths: int = 0  # workers that crashed or were killed by others
    seconds: float = 0.0  # of grading, summed over answers


@dataclass(slots=True)
class _GradingTask:
    answer: Answer
    verdict: Future[Verdict]


class GraderPool:
    """Worker processes that judge answers; see the module for the life of one.

    Args:
        config: mode, modes by source, number of workers, deadline of one answer, rewards of right and wrong.
        memory_bytes: address space of one worker; beyond it an answer is ungraded with a MemoryError.
        start_deadline_s: seconds for a worker to start and load its libraries; not part of an answer's deadline.

    Raises:
        ValueError: the configuration has no worker or no time.
    """

    def __init__(self, config: RewardConfig, *, memory_bytes: int = 2 << 30, start_deadline_s: float = 120.0):
        if config.workers < 1:
            raise ValueError(f"reward.workers is {config.workers}: grading needs at least one worker process; set 1")
        if config.deadline_s <= 0:
            raise ValueError(f"reward.deadline_s is {config.deadline_s}: give an answer at least some 0.1 s")
        self._config = config
        self._modes = {source: GraderMode(mode).value for source, mode in config.by_source.items()}
        self._default_mode = GraderMode(config.mode).value
        self._memory_bytes = memory_bytes
        self._start_deadline_s = start_deadline_s
        self._tasks: queue.SimpleQueue[_GradingTask | None] = queue.SimpleQueue()
        self._submitted: list[tuple[RolloutGroup, list[Future[Verdict]]]] = []
        self._statistics = GraderStatistics()
        self._lock = threading.Lock()
        self._closing = False
        self._processes: dict[int, GraderProcess] = {}  # by thread number
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"grader-{number}", daemon=True)
            for number in range(config.workers)
        ]
        for thread in self._threads:
            thread.start()

    def mode_of(self, data_source: str) -> str:
        """The mode in which answers of a data source are judged; never `auto`."""
        mode = self._modes.get(data_source, self._default_mode)
        return mode_for(data_source) if mode == "auto" else mode

    def submit(self, group: RolloutGroup) -> None:
        """Start to grade the rollouts of `group`; does not wait. `collect` returns the verdicts.

        Rollouts that go on in the next step are not graded yet, and those that ended in an earlier one were.
        """
        prompt = group.prompt
        verdicts = [
            _no_verdict()
            if rollout.finish == "window" or rollout.spent
            else self.submit_answer(Answer(rollout.text, prompt.ground_truth, prompt.data_source, prompt.extra))
            for rollout in group.rollouts
        ]
        self._submitted.append((group, verdicts))

    def finished(self) -> list[ScoredGroup]:
        """The groups whose verdicts are all in by now, by position; does not wait. `collect` returns the others.

        Raises:
            UnknownGraderError: a data source has no grader; the configuration must change.
        """
        graded, waiting = [], []
        for each in self._submitted:
            (graded if all(verdict.done() for verdict in each[1]) else waiting).append(each)
        self._submitted = waiting
        return _scored(graded)

    def collect(self, deadline_s: float | None = None) -> list[ScoredGroup]:
        """All groups submitted since the last call, by position, each rollout with its verdict.

        Args:
            deadline_s: seconds to wait; answers unfinished by then are ungraded. None: as long as the deadlines of
                the single answers allow.

        Raises:
            UnknownGraderError: a data source has no grader; the configuration must change.
        """
        groups, self._submitted = self._submitted, []
        self._await([verdict for _, verdicts in groups for verdict in verdicts], deadline_s)
        return _scored(groups)

    def grade_many(self, answers: Iterable[Answer], deadline_s: float | None = None) -> list[Verdict]:
        """Verdicts of `answers`, in their order. Arguments and exceptions as for `collect`."""
        verdicts = [self.submit_answer(answer) for answer in answers]
        self._await(verdicts, deadline_s)
        return [verdict.result() for verdict in verdicts]

    def submit_answer(self, answer: Answer) -> Future[Verdict]:
        """Start to grade one answer; does not wait."""
        if self._closing:
            raise RuntimeError("the grader pool is closed; grade inside its `with` block")
        task = _GradingTask(answer, Future())
        self._tasks.put(task)
        return task.verdict

    def take_statistics(self) -> GraderStatistics:
        """The counts since the last call, which starts them anew."""
        with self._lock:
            taken, self._statistics = self._statistics, GraderStatistics()
        return taken

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        with self._lock:
            return [process.pid for process in self._processes.values()]

    def close(self) -> None:
        """Kill the workers; answers that wait are ungraded. May be called twice."""
        with self._lock:
            self._closing = True
            for process in self._processes.values():
                process.interrupt()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await(self, verdicts: list[Future[Verdict]], deadline_s: float | None) -> None:
        if deadline_s is None:
            waves = math.ceil((len(verdicts) + self._tasks.qsize()) / self._config.workers) + 1
            deadline_s = waves * _ATTEMPTS * (self._config.deadline_s + self._start_deadline_s)
        late = wait(verdicts, timeout=deadline_s).not_done
        for verdict in late:
            try:
                verdict.set_result(self._ungraded(f"not graded within the {deadline_s:g} s of the collection"))
            except InvalidStateError:  # it arrived between the wait and this line
                continue

    # Below: the threads. Each owns one process, and the process dies with it.

    def _work(self, number: int) -> None:
        process: GraderProcess | None = None
        try:
            while not self._closing:
                process = process or self._start(number)
                task = self._tasks.get()
                if task is None:
                    break
                if task.verdict.done():  # given up by the collection
                    continue
                try:
                    process = self._grade(task, process, number)
                except Exception as error:  # an entry that JSON cannot carry; the thread must go on
                    process = self._discard(process, number)
                    self._publish(task, self._ungraded(describe(error)))
        finally:
            self._discard(process, number)
            self._drain()

    def _grade(self, task: _GradingTask, process: GraderProcess | None, number: int) -> GraderProcess | None:
        """Settle `task`; returns the process if it can go on."""
        answer, begun = task.answer, time.monotonic()
        mode = self.mode_of(answer.data_source)
        request = {
            "mode": mode,
            "response": answer.response,
            "ground_truth": answer.ground_truth,
            "data_source": answer.data_source,
            "extra": dict(answer.extra) if answer.extra and mode == "reasoning_gym" else None,
            "deadline_s": self._config.deadline_s,
        }
        reason = "the grader process could not be started"
        for _ in range(_ATTEMPTS):
            process = process or self._start(number)
            if process is None:
                break
            try:
                reply = process.ask(
                    request, deadline_s=self._config.deadline_s, start_deadline_s=self._start_deadline_s
                )
            except GraderFailure as failure:
                process, reason = self._discard(process, number), str(failure)
                self._count(timeouts=failure.timeout, deaths=not failure.timeout)
                if failure.started or self._closing:
                    break
            else:
                self._settle(task, reply)
                return process
        self._publish(task, self._ungraded(reason, time.monotonic() - begun))
        return process

    def _settle(self, task: _GradingTask, reply: dict[str, Any]) -> None:
        seconds = reply["seconds"]
        if reply["event"] == "graded":
            correct = reply["score"] == 1.0
            reward = self._config.correct_reward if correct else self._config.wrong_reward
            self._publish(task, Verdict(correct, reward, "", seconds))
        elif reply["event"] == "misconfigured":
            if not task.verdict.done():
                task.verdict.set_exception(UnknownGraderError(reply["reason"]))
        else:
            self._publish(task, self._ungraded(reply["reason"], seconds))

    def _publish(self, task: _GradingTask, verdict: Verdict) -> None:
        self._count(answers=1, ungraded=verdict.correct is None, seconds=verdict.seconds)
        try:
            task.verdict.set_result(verdict)
        except InvalidStateError:  # the collection gave it up in the meantime
            return

    @staticmethod
    def _ungraded(reason: str, seconds: float = 0.0) -> Verdict:
        return Verdict(None, 0.0, reason, seconds)

    def _count(self, **counts: float) -> None:
        with self._lock:
            for name, value in counts.items():
                setattr(self._statistics, name, getattr(self._statistics, name) + value)

    def _start(self, number: int) -> GraderProcess | None:
        try:
            process = GraderProcess(
                memory_bytes=self._memory_bytes, warm="math" if self._default_mode == "auto" else self._default_mode
            )
        except OSError:  # no memory or no process left; the next answer tries again
            return None
        process.warm_up()
        with self._lock:
            self._processes[number] = process
            if self._closing:
                process.interrupt()
        return process

    def _discard(self, process: GraderProcess | None, number: int) -> None:
        with self._lock:
            self._processes.pop(number, None)
        if process is not None:
            process.kill()

    def _drain(self) -> None:
        """The last answers of a closed pool: nobody will grade them."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            if task is None:
                self._tasks.put(None)  # another thread's signal
                return
            self._publish(task, self._ungraded("the grader pool was closed"))


def _no_verdict() -> Future[Verdict]:
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(None, 0.0, "it does not end in this step"))
    return verdict


def _scored(groups: Iterable[tuple[RolloutGroup, list[Future[Verdict]]]]) -> list[ScoredGroup]:
    scored = [ScoredGroup(group, [verdict.result() for verdict in verdicts]) for group, verdicts in groups]
    return sorted(scored, key=lambda each: each.group.position)
