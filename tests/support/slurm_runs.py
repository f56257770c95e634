"""Small runs as jobs of a real cluster, and what can happen to them there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from progress import wait_until
from slurm_cluster import Cluster
from small_runs import steps_logged


class SlurmRun:
    """One `clipo submit`, from a folder that has nothing to do with the run."""

    def __init__(self, cluster: Cluster, config: Path, output: Path, *arguments: str):
        self.cluster, self.output = cluster, output
        self.elsewhere = output.with_name(f"{output.name}.elsewhere")
        self.elsewhere.mkdir()
        self.said = clipo(cluster, self.elsewhere, "submit", str(config), f"train.output={output}", *arguments)
        found = re.match(r"job (\d+): ", self.said)
        assert found, self.said
        self.job, self.folder = found[1], output / "jobs" / "001"

    @property
    def log(self) -> str:
        """What the script said."""
        file = self.folder / "job.log"
        return file.read_text() if file.exists() else ""

    @property
    def story(self) -> str:
        """Everything that may explain a failure."""
        logs = "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("logs/*")))
        return f"{self.log}{logs}"

    def outcomes(self) -> list[str]:
        """Of the attempts, as the job noted them."""
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
        """Until so many steps are logged."""
        self.wait_for(lambda: steps_logged(self.output) >= steps, f"step {steps}")

    def begin_again(self) -> None:
        """Until the job has been requeued; Slurm would let it wait for two minutes more."""
        self.wait_for(lambda: self.cluster.state(self.job) == "PENDING", "the job to be requeued")
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now")
        self.wait_for(lambda: self.cluster.state(self.job) == "RUNNING", "the job to start again")

    def end(self, state: str = "COMPLETED") -> None:
        """Wait for its last end."""
        assert self.cluster.wait(self.job) == state, self.story

    # --- what happens to it --------------------------------------------------------------------------------------

    def requeue(self) -> None:
        """As an administrator, or a job that is worth more, does it."""
        self.cluster.run("scontrol", "requeue", self.job)
        self.begin_again()

    def near_the_walltime(self) -> None:
        """What Slurm sends some time before."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
        self.begin_again()

    def cancel_the_ranks(self) -> None:
        """The step alone; the job keeps its nodes."""
        done = len(self.outcomes())
        self.wait_for(lambda: bool(self.steps("ranks")), "the ranks to start")
        self.cluster.run("scancel", *self.steps("ranks"))
        self.wait_for(lambda: len(self.outcomes()) > done, "the end of the step")

    def steps(self, name: str) -> list[str]:
        """Numbers of the job's steps of that name."""
        command = ("squeue", "--noheader", "--steps", "--jobs", self.job, "--format", "%i %j")
        return [line.split()[0] for line in self.cluster.run(*command).splitlines() if line.split()[1:] == [name]]

    def lose(self, node: str) -> None:
        """Every process that runs for the job on a node, but for Slurm's and the script."""
        done = len(self.outcomes())
        self.wait_for(lambda: bool(self.pids(node)), "the ranks to start")
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: len(self.outcomes()) > done, "the end of the attempt")

    def pids(self, node: str) -> list[int]:
        """Processes of the ranks on a node."""
        found = []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (place / "environ").read_bytes().split(b"\0") if place.name.isdigit() else []
                mine = f"CLIPO_JOB={self.folder}".encode() in words and f"SLURMD_NODENAME={node}".encode() in words
                if mine and any(word.startswith(b"SLURM_STEP_NUM_TASKS=") for word in words):
                    found.append(int(place.name))
        return found


def clipo(cluster: Cluster, folder: Path, *arguments: str, code: int = 0) -> str:
    """What a command says when it is run in a folder of the cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "clipo_megatron.cli", *arguments],
        cwd=folder,
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
