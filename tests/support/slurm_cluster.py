"""A real Slurm cluster of four nodes on this machine, with a configuration, a munge and ports of its own.

python tests/support/slurm_cluster.py FOLDER     keeps one up until Ctrl-C, and says how to talk to it
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from progress import marked, wait_until

from clipo_megatron.runtime.launch import dies_with_this_process

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

_CONFIGURATION = """\
ClusterName=clipo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmUser={user}
SlurmdUser={user}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
KillWait={kill_wait}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,defer_batch
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=6000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Why no cluster can be started here, such as a missing program; empty if one can."""
    for program in PROGRAMS:
        if not shutil.which(program, path=SEARCHED):
            return f"there is no {program} here (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "daemons of Slurm are started by root here"


class Cluster:
    """A cluster of four nodes; run Slurm's commands with its `environment`.

    Args:
        folder: folder for state, logs and sockets; a short path, since socket paths are limited.
        kill_wait_s: seconds between SIGTERM and SIGKILL to a job that Slurm ends.
        unshared: a folder, and the nodes on which it is replaced by an empty one.
    """

    def __init__(self, folder: Path, *, kill_wait_s: int = 30, unshared: tuple[Path, Sequence[str]] | None = None):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self._unshared = unshared or (Path("/nowhere"), ())
        self._kill_wait_s = kill_wait_s
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--quiet", "--user", getpass.getuser(), "--signal=KILL", "--full")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)
        for pid in self.pids():  # steps outlive their slurmd
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        control, first = _free_ports(1)[0], _free_ports(4)[0]
        self.folder.joinpath("slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                user=getpass.getuser(),
                control=control,
                first=first,
                last=first + 3,
                kill_wait=self._kill_wait_s,
            )
        )
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munge")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            folder, nodes = self._unshared
            alone = f"mount -t tmpfs tmpfs {folder} && exec slurmd -D -N {node}"
            self._daemon(
                *(("unshare", "--mount", "sh", "-c", alone) if node in nodes else ("slurmd", "-D", "-N", node))
            )
        self._wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "4", "four idle nodes")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=dies_with_this_process(),
                )
            )

    def _wait_for(self, condition, what: str) -> None:
        wait_until(condition, what, self.pids, story=lambda: (self.folder / "daemons.log").read_text())

    def pids(self) -> list[int]:
        """Processes of the cluster and its jobs, but for this one."""
        return [pid for pid in marked(f"SLURM_CONF={self.folder / 'slurm.conf'}") if pid != os.getpid()]

    def run(self, *command: str) -> str:
        """The output of a Slurm command, with its errors if it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return (done.stdout + (done.stderr if done.returncode else "")).strip()

    def state(self, job: str) -> str:
        """State of a job: PENDING, RUNNING, COMPLETED...; "" once the controller has forgotten it."""
        for _ in range(10):  # on a busy machine the controller misses a call now and then
            answer = self.run("scontrol", "--oneliner", "show", "job", job)
            if found := [word.partition("=")[2] for word in answer.split() if word.startswith("JobState=")]:
                return found[0]
            if "Invalid job id" in answer:
                return ""
            time.sleep(0.5)
        raise AssertionError(f"the controller does not tell of job {job}: {answer}")

    def wait(self, job: str, *states: str) -> str:
        """Wait until a job is in one of these states, or over; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")
        self._wait_for(lambda: self.state(job) in (states or over), f"the end of job {job}")
        return self.state(job)


def _free_ports(count: int) -> list[int]:
    """So many ports in a row that nothing listens on, below the ephemeral ones."""
    for _ in range(200):
        first = random.SystemRandom().randrange(12_000, 19_000)
        ports = list(range(first, first + count))
        with contextlib.ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return ports
    raise AssertionError("no free ports")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
