"""The supervisor with small real processes: when servers are restarted, given up or left alone."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from paths import SUPPORT
from progress import wait_until

from clipo_megatron.config.schema import EngineKind
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime import stop_requests
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.serving import supervisor
from clipo_megatron.serving.commands import ServerCommand
from clipo_megatron.serving.errors import ServingError
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.process import ServerProcess
from clipo_megatron.serving.supervisor import ServerLimits, ServerSpec, Supervisor, only_one

PROGRAM = SUPPORT / "fake_server.py"
UNRESPONSIVE_S = 4.0  # a loaded machine may be slow to answer for a second or two
LIMITS = ServerLimits(
    startup_timeout_s=30,
    health_timeout_s=UNRESPONSIVE_S,
    engine_timeout_s=2 * UNRESPONSIVE_S,
    max_restarts=2,
    backoff_s=0.2,
    grace_period_s=1.0,
)


class Fakes:
    """Some fake servers under one supervisor, which runs in this thread while a scenario acts on it from another."""

    def __init__(self, tmp_path: Path, count: int = 1, limits: ServerLimits = LIMITS, secret: str = ""):
        self.said: list[str] = []
        self.folders = [tmp_path / f"server-{index}" for index in range(count)]
        for folder in self.folders:
            folder.mkdir()
        self.registry = Registry(tmp_path / "servers")
        self.logs = [tmp_path / "logs" / f"{index}.log" for index in range(count)]
        self.supervisor = Supervisor(
            [self._spec(index) for index in range(count)],
            self.registry,
            limits,
            secrets=[secret],
            say=self.said.append,
        )

    def _spec(self, index: int) -> ServerSpec:
        def url(port: int) -> str:
            return f"http://127.0.0.1:{port}"

        port, folder = free_port(), self.folders[index]
        return ServerSpec(
            record=ServerRecord(f"server-{index}", url(port), "vllm", 1, "here", 0, "", Status.starting),
            port=port,
            command=lambda port, _scratch: ServerCommand(
                (sys.executable, "-S", str(PROGRAM), str(port), str(folder)), {}
            ),
            url=url,
            probe=lambda address: Probe(address, EngineKind.vllm),
            log=self.logs[index],
        )

    def tell(self, word: str, index: int = 0) -> None:
        (self.folders[index] / word).touch()

    def untell(self, word: str, index: int = 0) -> None:
        (self.folders[index] / word).unlink()

    def starts(self, index: int = 0) -> list[float]:
        """When it was started."""
        file = self.folders[index] / "starts"
        return [float(line.split()[1]) for line in file.read_text().splitlines()] if file.exists() else []

    def record(self, index: int = 0) -> ServerRecord | None:
        found = {record.name: record for record in self.registry.records()}
        return found.get(f"server-{index}")

    def ready(self, index: int = 0, besides: str = "") -> ServerRecord:
        """Its record once it is ready, with another boot than `besides`."""

        def is_ready() -> bool:
            record = self.record(index)
            return record is not None and record.status is Status.ready and record.boot != besides

        wait_until(is_ready, "a server to be ready")
        return self.record(index)

    def child(self, index: int = 0) -> int:
        return int((self.folders[index] / "child").read_text())

    def run(self, scenario, *, signals=(signal.SIGINT,)) -> int:
        """Run the scenario, then send the signals; the supervisor's result."""
        failures: list[BaseException] = []

        def act() -> None:
            try:
                scenario()
            except BaseException as error:
                failures.append(error)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        actor = threading.Thread(target=act)
        actor.start()
        try:
            return self.supervisor.run()
        finally:
            actor.join(90)
            if failures:
                raise failures[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_server_lives_from_start_to_signal(tmp_path):
    fakes = Fakes(tmp_path, count=2)
    pids = []

    def scenario():
        for index in (0, 1):
            record = fakes.ready(index)
            pids.extend([record.pid, fakes.child(index)])
            assert Probe(record.url, EngineKind.vllm).generates(5)

    assert fakes.run(scenario) == 130
    assert [record.status for record in fakes.registry.records()] == [Status.stopped] * 2
    assert not any(map(alive, pids)) and len(pids) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert any("2 servers ready" in line for line in fakes.said), fakes.said


def test_the_result_names_the_signal(tmp_path):
    fakes = Fakes(tmp_path)
    assert fakes.run(lambda: fakes.ready(), signals=(signal.SIGTERM,)) == 143


def test_a_signal_that_was_ignored_before_is_left_alone(tmp_path):
    """As in a Slurm job, which sends SIGTERM to the ranks and also to the servers that they still need."""
    fakes = Fakes(tmp_path)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert fakes.run(lambda: fakes.ready(), signals=(signal.SIGTERM, signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("who", ["leader", "all"])
def test_a_dead_server_is_started_again_under_its_url(tmp_path, who):
    fakes = Fakes(tmp_path)

    def scenario():
        before, child = fakes.ready(), fakes.child()
        if who == "leader":
            os.kill(before.pid, signal.SIGKILL)
        else:
            os.killpg(before.pid, signal.SIGKILL)
        after = fakes.ready(besides=before.boot)
        assert (after.url, after.name) == (before.url, before.name) and after.pid != before.pid
        assert not alive(child), "what the leader left behind has to go first"

    fakes.run(scenario)
    assert any("was killed by SIGKILL; starting it again" in line for line in fakes.said), fakes.said


def test_deaths_of_a_server_that_was_ready_are_not_counted(tmp_path):
    fakes = Fakes(tmp_path)

    def scenario():
        boot = ""
        for _ in range(LIMITS.max_restarts + 3):
            record = fakes.ready(besides=boot)
            boot = record.boot
            os.killpg(record.pid, signal.SIGKILL)
        fakes.ready(besides=boot)

    assert fakes.run(scenario) == 130
    assert len(fakes.starts()) == LIMITS.max_restarts + 4


def test_servers_that_hang_are_killed_and_started_again(tmp_path):
    """One is stopped, one has a child that is stopped, and one is deaf, all at the same time."""
    fakes = Fakes(tmp_path, count=3)

    def scenario():
        before, children = [fakes.ready(index) for index in range(3)], [fakes.child(index) for index in range(3)]
        os.killpg(before[0].pid, signal.SIGSTOP)
        os.kill(children[1], signal.SIGSTOP)
        fakes.tell("deaf", index=2)
        wait_until(lambda: not any(alive(each.pid) for each in before), "the hanging servers to be killed")
        fakes.untell("deaf", index=2)
        for index, record in enumerate(before):
            fakes.ready(index, besides=record.boot)
        assert not any(map(alive, children))

    assert fakes.run(scenario) == 130
    silent = [re.search(r" for (\d+) s; starting it again", line) for line in fakes.said]
    assert [int(each[1]) >= UNRESPONSIVE_S for each in silent if each] == [True] * 3, "not before its time"


def test_a_busy_engine_is_left_alone_for_as_long_as_it_may_take(tmp_path):
    fakes = Fakes(tmp_path)

    def scenario():
        before = fakes.ready()
        fakes.tell("busy")
        time.sleep(1.4 * UNRESPONSIVE_S)
        assert fakes.record() == before and alive(before.pid), "its HTTP process answers"
        fakes.untell("busy")
        time.sleep(0.2 * LIMITS.engine_timeout_s + 0.2)  # until its engine is asked again
        fakes.tell("busy")
        began = time.monotonic()
        wait_until(lambda: not alive(before.pid), "the silent engine to be killed")
        assert time.monotonic() - began > 0.7 * LIMITS.engine_timeout_s, "its answer in between counts"
        fakes.untell("busy")
        fakes.ready(besides=before.boot)

    assert fakes.run(scenario) == 130
    assert any("its engine has not" in line for line in fakes.said), fakes.said


def test_failed_starts_back_off_and_end(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.tell("exit-7")
    with pytest.raises(ServingError, match=r"(?s)failed 3 times in a row.*exit code 7.*something is wrong"):
        fakes.run(lambda: None, signals=())
    starts = fakes.starts()
    first, second = (later - earlier for earlier, later in pairwise(starts))
    assert len(starts) == LIMITS.max_restarts + 1 and first >= 0.2 and second >= 0.4
    assert fakes.record().status is Status.failed


def test_wrong_options_are_not_tried_again(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.tell("exit-2")
    with pytest.raises(ServingError, match="its options are wrong"):
        fakes.run(lambda: None, signals=())
    assert len(fakes.starts()) == 1


def test_a_server_that_is_stopped_while_it_starts_is_started_again(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.tell("start-slowly")

    def scenario():
        wait_until(lambda: (record := fakes.record()) is not None and alive(record.pid), "a server to be starting")
        before = fakes.record()
        os.killpg(before.pid, signal.SIGSTOP)
        fakes.untell("start-slowly")
        fakes.ready(besides=before.boot)
        assert any("stopped for" in line and "while starting" in line for line in fakes.said), fakes.said

    assert fakes.run(scenario) == 130


def test_a_start_has_a_deadline(tmp_path):
    limits = ServerLimits(startup_timeout_s=1.5, health_timeout_s=1, engine_timeout_s=1, max_restarts=0)
    fakes = Fakes(tmp_path, limits=limits)
    fakes.tell("start-slowly")
    with pytest.raises(ServingError, match="was not ready after 2 s"):
        fakes.run(lambda: None, signals=())
    assert not alive(fakes.child())


def test_one_server_given_up_leaves_the_others(tmp_path):
    fakes = Fakes(tmp_path, count=2)
    fakes.tell("exit-2", index=1)

    def scenario():
        wait_until(lambda: any("The other servers go on" in line for line in fakes.said), "one to be given up")
        fakes.ready(0)

    assert fakes.run(scenario) == 130
    assert [record.status for record in fakes.registry.records()] == [Status.stopped, Status.failed]


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path):
    fakes = Fakes(tmp_path)
    thief = socket.socket()

    def scenario():
        before = fakes.ready()
        fakes.tell("exit-9")  # so that it is down for a while
        os.killpg(before.pid, signal.SIGKILL)
        wait_until(lambda: len(fakes.starts()) >= 2, "a failed start")
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(before.url.rpartition(":")[2])))
        thief.listen()
        fakes.untell("exit-9")
        assert fakes.ready(besides=before.boot).url != before.url

    with thief:
        assert fakes.run(scenario) == 130


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.tell("stubborn")
    pids = []
    assert fakes.run(lambda: pids.append(fakes.ready().pid)) == 130
    assert not alive(pids[0])


def test_another_signal_later_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_requests, "AGAIN_AFTER_S", 0.3)
    fakes = Fakes(tmp_path, limits=ServerLimits(30, 30, 30, 2, grace_period_s=60.0))
    fakes.tell("stubborn")
    pids, ready_at = [], []

    def scenario():
        pids.append(fakes.ready().pid)
        ready_at.append(time.monotonic())

    assert fakes.run(scenario, signals=(signal.SIGINT, signal.SIGINT)) == 130
    assert not alive(pids[0]) and time.monotonic() - ready_at[0] < 60, "it waited for stop_s"


def test_the_log_never_holds_the_key(tmp_path):
    fakes = Fakes(tmp_path, secret="s3cret-key")
    fakes.tell("say-s3cret-key")
    fakes.run(lambda: fakes.ready())
    assert fakes.logs[0].read_text() == "the word is <redacted>!\n"


def test_the_file_with_the_key_is_private_and_removed(tmp_path):
    file = tmp_path / "key.yaml"
    command = ServerCommand((sys.executable, "-c", "import time; time.sleep(60)"), {}, (file, "api-key: x\n"))
    process = ServerProcess(command, tmp_path / "log")
    try:
        assert file.read_text() == "api-key: x\n" and file.stat().st_mode & 0o777 == 0o600
        process.forget_secret()
        assert not file.exists()
    finally:
        process.kill()


def test_a_second_clipo_serve_of_a_run_is_refused(tmp_path):
    with (
        only_one(tmp_path / "servers"),
        pytest.raises(ServingError, match=f"process {os.getpid()} runs servers"),
        only_one(tmp_path / "servers"),
    ):
        pass
    with only_one(tmp_path / "servers"):
        pass


def test_a_supervisor_that_was_stopped_blames_no_server(tmp_path):
    script = f"""
import sys
sys.path[:0] = [{str(PROGRAM.parent)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_serving_supervisor import Fakes, ServerLimits
fakes = Fakes(Path({str(tmp_path)!r}), limits=ServerLimits(30, {UNRESPONSIVE_S}, {UNRESPONSIVE_S}, 0))
sys.exit(fakes.supervisor.run())
"""
    registry = Registry(tmp_path / "servers")

    def ready() -> bool:
        return [record.status for record in registry.records()] == [Status.ready]

    running = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(ready, "the server to be ready")
        (before,) = registry.records()
        running.send_signal(signal.SIGSTOP)
        time.sleep(supervisor._PAUSED_S + 1.0)
        running.send_signal(signal.SIGCONT)
        time.sleep(UNRESPONSIVE_S)
        assert alive(before.pid) and registry.records() == [before]
    finally:
        running.kill()
        running.wait()
    child = int((tmp_path / "server-0" / "child").read_text())
    wait_until(lambda: not alive(before.pid) and not alive(child), "the server to die with its supervisor")
