"""Runs that are asked to end again and again, by any signal to any of their processes, and started again until done."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from progress import wait_until
from small_runs import SmallRun

from clipo_megatron.runtime.stop_requests import SIGNALS

WHOM = ("the first process", "rank 0", "rank 1", "both ranks", "every process")
WHEN = ("starting", "working", "writing a checkpoint")
LONGEST_S = 3.0  # between the start of a run's work, or of its processes, and the first signal
WITHIN_S = 1.0  # of which all signals of a request come


@dataclass
class Stops:
    """Asks one run to end at random moments, and starts it again.

    Args:
        config: the configuration file, by `small_runs.write_config`.
        output: the run's output folder.
        overrides: settings of the run, which has two ranks.
        seed: seed of everything drawn.
    """

    config: Path
    output: Path
    overrides: tuple[str, ...]
    seed: int
    asked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def until_done(self, most: int) -> None:
        """Start the run, ask it to end, start it again; after so many requests it is left alone."""
        while self.asked.total() < most:
            run = SmallRun(self.config, self.output, *self.overrides)
            try:
                self._ask(run)
            finally:
                if run.process.poll() is None or run.pids():
                    run.kill()
            if run.process.returncode == 0:
                return
        SmallRun(self.config, self.output, *self.overrides).wait()

    def _ask(self, run: SmallRun) -> None:
        """Ask a run to end as the dice say, and judge how it ends."""
        dice = self.dice
        when, whom = dice.choice(WHEN), dice.choice(WHOM)
        numbers = [dice.choice(SIGNALS) for _ in range(dice.choice((1, 1, 2, 5)))]
        story = f"{'+'.join(signal.Signals(number).name for number in numbers)} to {whom}, {when}"
        before = {path.name for path in (self.output / "checkpoints").glob("step_*")}
        moment = dice.uniform(0.0, LONGEST_S)
        if not self._await(run, when, moment):
            wait_until(lambda: run.process.poll() is not None, "the end of the run", run.pids)
            assert run.process.returncode == 0, run.said
            return
        pauses = [dice.uniform(0.0, WITHIN_S / len(numbers)) for _ in numbers]
        for number, pause in zip(numbers, pauses, strict=True):
            for pid in chosen(run, whom):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(pause)
        wait_until(lambda: run.process.poll() is not None, f"the end after {story}", run.pids, story=lambda: run.said)
        wait_until(lambda: not run.pids(), "its processes to be gone")
        self.asked[f"{whom}, {when}"] += 1
        self._judge(run, story, numbers, before)

    def _judge(self, run: SmallRun, story: str, numbers: list[int], before: set[str]) -> None:
        said = f"{story}\n{run.said}"
        print(f"{story}: {run.process.returncode}", flush=True)
        assert run.process.returncode in (0, *(128 + number for number in numbers)), said
        assert "Starting the ranks again" not in said and "Traceback" not in said, said
        if run.process.returncode != 0:
            assert "stopped by" in said or "ranks are not started" in said, said
        after = {path.name for path in (self.output / "checkpoints").glob("step_*")}
        if "the state is saved" in said:
            assert after, said
        assert not before or max(after) >= max(before), said
        assert not any((self.output / "checkpoints").glob(".step_*.partial")), said

    def _await(self, run: SmallRun, when: str, moment: float) -> bool:
        """Wait for a moment; False if the run was over before."""
        began = time.monotonic()
        wait_until(lambda: run.process.poll() is not None or handles_signals(run.process.pid), "its first lines")
        if when == "starting":
            time.sleep(moment / 3)
            return run.process.poll() is None
        while "small: model" not in run.said:  # the first line of ranks that have begun
            if run.process.poll() is not None or time.monotonic() - began > 60.0:
                return False
            time.sleep(0.02)
        if when == "working":
            time.sleep(moment / 2)
        else:
            until = time.monotonic() + 10.0
            while not any((self.output / "checkpoints").glob(".step_*.partial")) and time.monotonic() < until:
                if run.process.poll() is not None:
                    return False
                time.sleep(0.001)
        return run.process.poll() is None


def chosen(run: SmallRun, whom: str) -> list[int]:
    """The processes of a run that are meant; its first one where the others are not there yet."""
    if whom == "the first process":
        return [run.process.pid]
    pids = run.pids()
    if whom == "every process":
        return pids or [run.process.pid]
    ranks = {rank: pid for pid in pids if (rank := _rank(pid)) is not None}
    wanted = ("0", "1") if whom == "both ranks" else (whom[-1],)
    return [pid for rank, pid in ranks.items() if rank in wanted] or [run.process.pid]


def handles_signals(pid: int) -> bool:
    """Whether a process has come to its first lines; until then a signal ends it, and there is nothing to lose."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def _rank(pid: int) -> str | None:
    """The rank that a process is; None for a grader, which has its rank's environment, and for all others."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    found = [entry[5:].decode() for entry in environment.split(b"\0") if entry.startswith(b"RANK=")]
    return found[0] if found and b"clipo_megatron.cli" in command else None
