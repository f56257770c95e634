"""Small runs as jobs of a real cluster, and the events that can interrupt them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from progress import wait_until
from slurm_cluster import Cluster
from small_runs import steps_logged


class SlurmRun:
    """One `clipo submit`, from a folder that has nothing to do with the run.

    Ranks get one core, as runs have that they are compared with, unless `defaults` leaves that to the command.
    """

    def __init__(self, cluster: Cluster, config: Path, output: Path, *arguments: str, defaults: bool = False):
        self.cluster, self.output = cluster, output
        self.elsewhere = output.with_name(f"{output.name}.elsewhere")
        self.elsewhere.mkdir(exist_ok=True)
        cores = () if defaults else ("--cpus-per-rank", "1")
        command = ("submit", str(config), f"train.output={output}", *cores, *arguments)
        self.printed = clipo(cluster, self.elsewhere, *command)
        found = re.match(r"job (\d+): ", self.printed)
        assert found, self.printed
        self.job, self.folder = found[1], output / "jobs" / "001"

    @property
    def log(self) -> str:
        """The script's messages."""
        file = self.folder / "job.log"
        return file.read_text() if file.exists() else ""

    @property
    def story(self) -> str:
        """Everything that may explain a failure."""
        logs = "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("logs/*")))
        return f"{self.log}{logs}"

    def outcomes(self) -> list[str]:
        """Outcomes of the attempts, as the job noted them."""
        file = self.folder / "attempts"
        return re.findall(r"outcome=(\S+)", file.read_text()) if file.exists() else []

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll for something that happens while the job is there."""

        def reached() -> bool:
            if condition():
                return True
            state = self.cluster.state(self.job)
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state} before {what}\n{self.story}"
            return False

        wait_until(reached, what, self.cluster.pids, story=lambda: self.story)

    def wait_for_step(self, steps: int) -> None:
        """Wait until this many steps are logged."""
        self.wait_for(lambda: steps_logged(self.output) >= steps, f"step {steps}")

    def begin_again(self) -> None:
        """Wait until the requeued job starts again, without Slurm's delay of two minutes."""
        self.wait_for(lambda: self.cluster.state(self.job) == "PENDING", "the job to be requeued")
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now")
        self.wait_for(lambda: self.cluster.state(self.job) == "RUNNING", "the job to start again")

    def end(self, state: str = "COMPLETED") -> None:
        """Wait until the job has ended in `state`."""
        assert self.cluster.wait(self.job) == state, self.story

    # --- what happens to it --------------------------------------------------------------------------------------

    def requeue(self) -> None:
        """Requeue the job, as an administrator or a preemption does."""
        self.cluster.run("scontrol", "requeue", self.job)
        self.begin_again()

    def near_the_walltime(self) -> None:
        """Send the signal that Slurm sends some time before the walltime."""
        heard = self.log.count("USR1: ")
        with self.standing_still():
            self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
            self.wait_for(lambda: self.log.count("USR1: ") > heard, "the job to hear the signal")
        self.begin_again()

    def cancel_the_ranks(self) -> None:
        """Cancel the step of the ranks; the job keeps its nodes."""
        done = len(self.outcomes())
        self.wait_for(lambda: bool(self.steps("ranks")), "the ranks to start")
        with self.standing_still():
            self.cluster.run("scancel", *self.steps("ranks"))
        self.wait_for(lambda: len(self.outcomes()) > done, "the end of the step")

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop the ranks meanwhile: a busy machine's Slurm may take longer for a command than they for all steps."""
        ranks = [pid for node in ("n1", "n2") for pid in self.pids(node)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                yield

    def steps(self, name: str) -> list[str]:
        """Ids of the job's steps with this name."""
        command = ("squeue", "--noheader", "--steps", "--jobs", self.job, "--format", "%i %j")
        return [line.split()[0] for line in self.cluster.run(*command).splitlines() if line.split()[1:] == [name]]

    def lose(self, node: str) -> None:
        """Kill the job's processes on a node, except Slurm's and the script."""
        done = len(self.outcomes())
        self.wait_for(lambda: bool(self.pids(node)), "the ranks to start")
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: len(self.outcomes()) > done, "the end of the attempt")

    def pids(self, node: str) -> list[int]:
        """Process ids of the ranks on a node."""
        found = []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                variables = (place / "environ").read_bytes().split(b"\0") if place.name.isdigit() else []
                mine = (
                    f"CLIPO_JOB={self.folder}".encode() in variables and f"SLURMD_NODENAME={node}".encode() in variables
                )
                if mine and any(word.startswith(b"SLURM_STEP_NUM_TASKS=") for word in variables):
                    found.append(int(place.name))
        return found


def clipo(cluster: Cluster, folder: Path, *arguments: str, code: int = 0) -> str:
    """The output of a `clipo` command that runs in a folder, with the cluster's environment."""
    done = subprocess.run(
        [sys.executable, "-m", "clipo_megatron.cli", *arguments],
        cwd=folder,
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
