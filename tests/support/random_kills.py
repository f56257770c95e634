"""Runs whose processes are killed at random moments, and started again until they are done.

What is killed is drawn from all processes of a run, supervisor, ranks and graders, or is all of them; when is drawn
too, and half of the kills wait for a checkpoint that is being written. By hand, 40 kills on two ranks:

    python tests/support/random_kills.py --kills 40 --seed 7 layout.pp=2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from progress import begin_session, wait_until
from small_runs import SmallRun, assert_same_run, metrics, write_config, write_model

PACE = (
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "eval.every=4",
    "faults.max_restarts=4",
    "faults.heartbeat_timeout_s=20",
)
LONGEST_S = 2.0  # between the start of a run's work and a kill; a small run works for little longer


@dataclass
class Kills:
    """Kills processes of one run at random moments until the run is done.

    Args:
        config: the configuration file, by `small_runs.write_config`.
        output: the run's output folder.
        overrides: settings of the run.
        seed: seed of everything drawn.
    """

    config: Path
    output: Path
    overrides: tuple[str, ...]
    seed: int
    struck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def until_done(self, most: int) -> None:
        """Start the run, kill, start again; after `most` kills it is left alone."""
        while True:
            run = SmallRun(self.config, self.output, *self.overrides)
            try:
                while run.process.poll() is None and self.struck.total() < most:
                    if self._kill(run):
                        self._sound()
                if self.struck.total() >= most:
                    wait_until(lambda run=run: run.process.poll() is not None, "the end of the run", run.pids)
                    if run.process.returncode == 0:
                        return
                elif run.process.returncode == 0:
                    return
            finally:
                if run.process.poll() is None or run.pids():
                    run.kill()

    def _kill(self, run: SmallRun) -> bool:
        """Wait for a moment, and kill something; False if the run was over before."""
        checkpoints = self.output / "checkpoints"
        # The first kill waits for a write, so a run cannot be over before all of them.
        in_a_write, moment = self.dice.random() < 0.5 or not self.struck, self.dice.uniform(0.0, LONGEST_S)
        which, patience = self.dice.random(), time.monotonic() + 60.0
        while not self._works(run):
            if run.process.poll() is not None or time.monotonic() > patience:
                return False
            time.sleep(0.02)
        if in_a_write:  # a hundredth of the moment into it
            until = time.monotonic() + 20.0
            while not any(checkpoints.glob(".step_*.partial")) and time.monotonic() < until:
                if run.process.poll() is not None:
                    return False
                time.sleep(0.001)
            time.sleep(moment / 100)
        else:
            time.sleep(moment)
        writing = any(checkpoints.glob(".step_*.partial"))
        pids = sorted(run.pids())
        if run.process.poll() is not None or not pids:
            return False
        victims = pids if which < 0.3 else [pids[int((which - 0.3) / 0.7 * len(pids))]]
        kind = "everything" if len(victims) > 1 else _kind(victims[0], run.process.pid)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.struck[kind + (", in the write of a checkpoint" if writing else "")] += 1
        time.sleep(0.2)
        return True

    def _works(self, run: SmallRun) -> bool:
        """Whether its ranks have begun: they print their first line before the first step."""
        return "small: model" in run.said.rpartition("Starting the ranks again")[2]

    def _sound(self) -> None:
        """Assert that no step is logged twice or left out, whatever was killed."""
        if (self.output / "metrics.jsonl").exists():
            text = (self.output / "metrics.jsonl").read_text()
            steps = [line.partition(",")[0] for line in text.splitlines()[: text.count("\n")]]
            assert steps == [f'{{"step": {number}' for number in range(len(steps))], steps


def _kind(pid: int, supervisor: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return "a process that was ending"
    if b"rewards.worker" in command:
        return "a grader"
    if pid == supervisor:
        return "the first process"
    found = [entry for entry in environment.split(b"\0") if entry.startswith(b"RANK=")]
    return f"rank {found[0].decode()[5:]}" if found else "another process"


def main() -> None:
    """Kill until so many kills have happened, over as many runs as that takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--a-run", type=int, default=10, help="kills of one run at most")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    begin_session()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder, write_model(folder / "model"))
        overrides = (*PACE, f"train.steps={options.steps}", *options.overrides)
        undisturbed = folder / "undisturbed"
        SmallRun(config, undisturbed, *overrides).wait()
        struck: Counter[str] = Counter()
        while struck.total() < options.kills:
            kills = Kills(config, output := folder / "run", overrides, options.seed + struck.total())
            kills.until_done(min(options.a_run, options.kills - struck.total()))
            assert_same_run(output, undisturbed, options.steps)
            assert [line["step"] for line in metrics(output)] == list(range(options.steps))
            struck += kills.struck
            print(f"{struck.total()} kills so far, the run is the undisturbed one: {dict(kills.struck)}", flush=True)
            shutil.rmtree(output)
        print(f"{struck.total()} kills, nothing lost: {dict(struck)}")


if __name__ == "__main__":
    main()
