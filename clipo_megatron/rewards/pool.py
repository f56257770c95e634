"""Grading in worker processes that can be killed, while the engine still generates.

    with GraderPool(config.reward) as pool:
        begun = [pool.grade(group) for group in engine.generate(...)]    # returns at once
        scored = [each.result() for each in begun]                       # waits for the verdicts that are not in yet

Every answer has a deadline. A worker that misses it is killed and replaced; so is one that crashes or runs out of
memory. In each case, and when the grader raises, the answer is *ungraded*, with the reason; it is never counted as
wrong.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from clipo_megatron.config.schema import GraderMode, GraderSandbox, RewardConfig
from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.flow import Prompt, RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.modes import describe, mode_for
from clipo_megatron.rewards.process import GraderFailure, GraderProcess, GraderStartError
from clipo_megatron.rewards.sandbox import SandboxError


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to judge."""

    response: str
    ground_truth: str
    data_source: str
    extra: Mapping[str, Any] | None = None  # the reasoning-gym entry, for that mode
    asked: Asked = NOTHING  # what the prompt asks for


@dataclass(frozen=True, slots=True)
class Grading:
    """A group whose rollouts are being judged."""

    group: RolloutGroup
    verdicts: list[Future[Verdict]]  # one for each rollout

    def done(self) -> bool:
        """Whether all verdicts are in."""
        return all(verdict.done() for verdict in self.verdicts)

    def result(self) -> ScoredGroup:
        """Wait for the verdicts.

        Raises:
            UnknownGraderError, SandboxError: a data source has no grader, or this machine not the sandbox that
                `reward.sandbox` requires; the configuration must change.
            GraderStartError: no grader process can be started here.
        """
        return ScoredGroup(self.group, [verdict.result() for verdict in self.verdicts])


@dataclass(slots=True)
class GraderStatistics:
    """What happened since the last call of `GraderPool.take_statistics`."""

    answers: int = 0
    ungraded: int = 0  # answers without a verdict
    timeouts: int = 0  # workers killed at a deadline
    deaths: int = 0  # workers that crashed, were killed by others, or could not be started
    seconds: float = 0.0  # time spent grading, summed over answers


class GraderPool:
    """Worker processes that judge answers, each one answer at a time.

    Args:
        config: mode, modes by source, number of workers, deadline of one answer, rewards of right and wrong.
        memory_bytes: address space of one worker; beyond it an answer is ungraded with a MemoryError.

    Raises:
        ValueError: the configuration has no worker or no time.
    """

    def __init__(self, config: RewardConfig, *, memory_bytes: int = 2 << 30):
        if config.workers < 1:
            raise ValueError(f"reward.workers is {config.workers}: grading needs at least one worker process; set 1")
        if config.deadline_s <= 0:
            raise ValueError(f"reward.deadline_s is {config.deadline_s}: give an answer at least some 0.1 s")
        self._config = config
        self._modes = {source: GraderMode(mode).value for source, mode in config.by_source.items()}
        self._default_mode = GraderMode(config.mode).value
        self._statistics = GraderStatistics()
        self._lock = threading.Lock()  # of the statistics
        first_mode = "math" if self._default_mode == "auto" else self._default_mode
        self._processes = [
            GraderProcess(memory_bytes=memory_bytes, sandbox=GraderSandbox(config.sandbox), first_mode=first_mode)
            for _ in range(config.workers)
        ]
        self._idle: queue.SimpleQueue[GraderProcess] = queue.SimpleQueue()
        # As many threads as processes, so a thread never waits for an idle one.
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="grader")
        self._closed = False
        self._any_started = False  # whether a process has ever begun to judge an answer
        for process in self._processes:
            self._idle.put(process)
            self._threads.submit(process.start)

    def mode_of(self, data_source: str) -> str:
        """The mode in which answers of a data source are judged; never `auto`."""
        mode = self._modes.get(data_source, self._default_mode)
        return mode_for(data_source) if mode == "auto" else mode

    def grade(self, group: RolloutGroup) -> Grading:
        """Start to grade the rollouts of a group; does not wait. Any thread may call it.

        Rollouts that continue in the next step are not graded yet, and those that ended in an earlier one already were.
        """
        prompt = group.prompt
        asked = asked_by(prompt)
        verdicts = [
            _no_verdict()
            if rollout.finish == "window" or rollout.spent
            else self.submit_answer(Answer(rollout.text, prompt.ground_truth, prompt.data_source, prompt.extra, asked))
            for rollout in group.rollouts
        ]
        return Grading(group, verdicts)

    def submit_answer(self, answer: Answer) -> Future[Verdict]:
        """Start to grade one answer; does not wait."""
        if self._closed:
            raise RuntimeError("the grader pool is closed; grade inside its `with` block")
        return self._threads.submit(self._grade, answer)

    def take_statistics(self) -> GraderStatistics:
        """The counts since the last call; they start again from zero."""
        with self._lock:
            taken, self._statistics = self._statistics, GraderStatistics()
        return taken

    def close(self) -> None:
        """Kill the workers; answers without a verdict are ungraded. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for process in self._processes:
            process.close()
        self._threads.shutdown()
        for process in self._processes:
            process.release()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs in the threads.

    def _grade(self, answer: Answer) -> Verdict:
        process, begun = self._idle.get(), time.monotonic()
        try:
            verdict = self._verdict(self._ask(process, answer))
        except (UnknownGraderError, SandboxError, GraderStartError):
            raise
        except GraderFailure as failure:
            self._count_failure(failure)
            verdict = Verdict(None, 0.0, str(failure), time.monotonic() - begun)
        except Exception as error:  # JSON cannot carry the answer's entry
            verdict = Verdict(None, 0.0, describe(error))
        finally:
            self._idle.put(process)
        self._count(answers=1, ungraded=verdict.correct is None, seconds=verdict.seconds)
        return verdict

    def _ask(self, process: GraderProcess, answer: Answer) -> dict[str, Any]:
        mode, deadline_s = self.mode_of(answer.data_source), self._config.deadline_s
        arguments = {
            "response": answer.response,
            "ground_truth": answer.ground_truth,
            "data_source": answer.data_source,
            "extra": dict(answer.extra) if answer.extra and mode == "reasoning_gym" else None,
            "asked": answer.asked.as_json(),
        }
        request = {"mode": mode, "deadline_s": deadline_s, "answer": arguments}
        for is_last in (False, True):  # a new process is asked: the answer did not cause the failure
            try:
                reply = process.ask(request, deadline_s=deadline_s)
            except GraderFailure as failure:
                self._any_started |= failure.started
                if failure.started or self._closed or (is_last and self._any_started):
                    raise
                self._count_failure(failure)
                reason = str(failure)
            else:
                self._any_started = True
                return reply
        raise GraderStartError(
            f"no grader process begins to judge answers on this machine, so none would get a verdict: {reason}. Free "
            "memory and processes, or mend this Python environment, and start again"
        )

    def _verdict(self, reply: dict[str, Any]) -> Verdict:
        if reply["event"] == "misconfigured":
            raise UnknownGraderError(reply["reason"])
        if reply["event"] == "failed":
            return Verdict(None, 0.0, reply["reason"], reply["seconds"])
        correct = reply["score"] == 1.0
        reward = self._config.correct_reward if correct else self._config.wrong_reward
        return Verdict(correct, reward, "", reply["seconds"])

    def _count_failure(self, failure: GraderFailure) -> None:
        if not self._closed:
            self._count(timeouts=failure.timeout, deaths=not failure.timeout)

    def _count(self, **counts: float) -> None:
        with self._lock:
            for name, value in counts.items():
                setattr(self._statistics, name, getattr(self._statistics, name) + value)


def asked_by(prompt: Prompt) -> Asked:
    """What a prompt asks for, as its rendered text and its turns say."""
    return Asked.by_turns(prompt.messages, forms=prompt.forms, thinking=prompt.thinking)


def _no_verdict() -> Future[Verdict]:
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(None, 0.0, "it does not end in this step"))
    return verdict
