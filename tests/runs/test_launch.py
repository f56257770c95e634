"""Launching: rank numbers from the environment, and starting, watching and ending ranks on this machine."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from progress import end_of, wait_until

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.runtime import launch
from clipo_megatron.runtime import slurm_env as slurm
from clipo_megatron.runtime.launch import RankCommand, RankError, supervise, supervise_again
from clipo_megatron.runtime.launcher_env import Launch, export_environment, from_environment
from clipo_megatron.runtime.ports import PORTS
from clipo_megatron.runtime.stop_requests import StopRequests


def python(program, log=None, **environment):
    return RankCommand([sys.executable, "-S", "-c", textwrap.dedent(program)], environment, log)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# ---------------------------------------------------------------- who am I


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, Launch(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
        # the shell of a batch script, and one inside an allocation
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_place(environment, expected):
    assert from_environment(environment) == expected


@pytest.mark.parametrize("rank", ["8", "-1", "x", ""])
def test_impossible_place(rank):
    with pytest.raises(ConfigError, match="WORLD_SIZE=8"):
        from_environment({"RANK": rank, "WORLD_SIZE": "8"})


def test_ranks_of_a_slurm_step_have_one_rendezvous_address(monkeypatch):
    monkeypatch.setattr(slurm, "reachable", lambda node: node)
    meetings = set()
    for rank in range(4):
        environment = {
            "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_LOCALID": str(rank % 2),
            "SLURM_JOB_ID": "123456",
            "SLURM_STEP_ID": "2",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
        }
        export_environment(from_environment(environment), environment)
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), "4")
        assert environment["LOCAL_RANK"] == str(rank % 2)
        meetings.add((environment["MASTER_ADDR"], environment["MASTER_PORT"]))
    ((address, port),) = meetings
    assert address == "gpu07" and int(port) in PORTS


def test_several_ranks_without_a_rendezvous_address_are_an_error():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        export_environment(Launch(1, 2, 1), {"RANK": "1", "WORLD_SIZE": "2"})


def test_a_single_rank_uses_loopback():
    environment = {}
    export_environment(Launch(0, 1, 0), environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) in PORTS
    assert environment["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("a-[3,5]-x[1-2],b", "a-3-x1"),
        ("login,gpu[1-2]", "login"),
        ("n1.cluster,n2.cluster", "n1.cluster"),
    ],
)
def test_first_host(nodes, host):
    assert slurm.first_host(nodes) == host


def test_an_unknown_node_name_is_replaced_by_slurms_address():
    asked = []

    def controller(node):
        asked.append(node)
        return "127.0.0.1" if node == "n1.invalid" else None

    assert slurm.reachable("localhost", controller) == "localhost" and not asked
    assert slurm.reachable("n1.invalid", controller) == "127.0.0.1" and asked == ["n1.invalid"]
    with pytest.raises(ConfigError, match=r"the ranks are to rendezvous on n2.invalid, .* Set MASTER_ADDR"):
        slurm.reachable("n2.invalid", controller)


def test_local_commands(tmp_path):
    commands = launch.local_commands(["train"], 3, logs=tmp_path, environment={})
    assert [command.environment["RANK"] for command in commands] == ["0", "1", "2"]
    assert len({command.environment["MASTER_PORT"] for command in commands}) == 1
    assert int(commands[0].environment["MASTER_PORT"]) in PORTS
    assert [command.log for command in commands] == [None, tmp_path / "rank1.log", tmp_path / "rank2.log"]
    assert int(commands[0].environment["OMP_NUM_THREADS"]) == max(1, launch.cores() // 3)
    kept = launch.local_commands(["train"], 3, logs=tmp_path, environment={"OMP_NUM_THREADS": "5"})
    assert kept[0].environment["OMP_NUM_THREADS"] == "5"
    with pytest.raises(ConfigError, match="srun or torchrun"):
        launch.local_commands(["train"], 100_000, logs=tmp_path)


def test_supervising_imports_no_torch():
    program = "import sys; sys.modules['torch'] = None; import clipo_megatron.runtime.launch, clipo_megatron.cli.main"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------- supervision


def test_all_ranks_succeed(tmp_path):
    log = tmp_path / "logs" / "rank1.log"
    log.parent.mkdir()
    log.write_text("from an earlier run\n")
    tell = "import os, sys; print('out', os.environ['RANK']); print('err', file=sys.stderr)"
    assert supervise([python("pass", RANK="0"), python(tell, log, RANK="1")]) == 0
    assert sorted(log.read_text().splitlines()) == ["err", "from an earlier run", "out 1"]


def test_the_first_failure_is_reported_with_its_log_and_ends_the_others(tmp_path):
    pid = tmp_path / "pid"
    log = tmp_path / "rank1.log"
    log.write_text("an earlier run's words\n")
    waits = f"""
        import os, time
        open({str(pid)!r}, "w").write(str(os.getpid()))
        time.sleep(600)
    """
    fails = f"""
        import os, sys, time
        while not os.path.exists({str(pid)!r}):
            time.sleep(0.01)
        for number in range(50):
            print("line", number, file=sys.stderr)
        sys.exit(3)
    """
    with pytest.raises(RankError) as caught:  # long before the other has slept enough
        supervise([python(waits), python(fails, log)], settle_s=0.1, grace_s=0.2)
    message = str(caught.value)
    assert "Rank 1 of 2 ended with exit code 3" in message and caught.value.exit_code == 3
    assert message.endswith("  | line 49") and "line 30" in message and "line 29" not in message
    assert "earlier" not in message
    assert not alive(int(pid.read_text()))


def test_a_rank_killed_by_a_signal_and_one_that_ignores_sigterm(tmp_path):
    ready, log = tmp_path / "ready", tmp_path / "rank1.log"
    stubborn = f"""
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(ready)!r}, "w").write("x")
        time.sleep(600)
    """
    dies = f"""
        import os, signal, time
        while not os.path.exists({str(ready)!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(RankError, match=r"Rank 1 of 2 was killed by SIGKILL.*memory") as caught:
        supervise([python(stubborn), python(dies, log)], settle_s=0.1, grace_s=0.5)
    assert caught.value.exit_code == 137
    assert "(nothing)" in str(caught.value)


def test_the_first_of_several_failures_is_reported(tmp_path):
    later = python("import time, sys; time.sleep(0.4); sys.exit(5)", tmp_path / "rank1.log")
    first = python("import sys; sys.exit(4)", tmp_path / "rank2.log")
    with pytest.raises(RankError, match="Rank 2 of 3 ended with exit code 4"):
        supervise([python("import time; time.sleep(600)"), later, first], settle_s=1.0, grace_s=0.2)


def test_an_error_that_rank_0_has_reported_is_not_repeated(tmp_path):
    wrong = "import sys; sys.exit(2)"
    assert supervise([python(wrong), python(wrong, tmp_path / "rank1.log")]) == 2


def test_child_processes_of_ended_ranks_are_killed(tmp_path):
    pid = tmp_path / "pid"
    leaves = f"""
        import subprocess, sys
        worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        open({str(pid)!r}, "w").write(str(worker.pid))
    """
    assert supervise([python(leaves)]) == 0
    wait_until(lambda: not alive(int(pid.read_text())), "the process left behind to be gone")


DRIVER = """
    import sys
    from pathlib import Path
    from clipo_megatron.runtime import stop_requests
    from clipo_megatron.runtime.launch import RankCommand, supervise
    stop_requests.AGAIN_AFTER_S = 0.4
    room, rank = Path(sys.argv[1]), sys.argv[2]
    ranks = [RankCommand([sys.executable, "-S", "-c", rank, str(room / str(number))]) for number in range(2)]
    sys.exit(supervise(ranks, grace_s=0.5))
"""
# Notes its pid; at the first SIGINT or SIGTERM it notes that and ends well, as a trainer does after its step.
WELL_BEHAVED = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
def end(number, frame):
    open(sys.argv[1] + ".signal", "w").write(str(number))
    sys.exit(0)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


@pytest.fixture
def driven(tmp_path):
    """Start a supervising process over two ranks; gives it and the ranks' pids once both run."""
    drivers = []

    def start(rank):
        command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), rank]
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        drivers.append(driver)
        wait_until(lambda: all((tmp_path / name).exists() for name in "01"), "both ranks to run")
        return driver, [int((tmp_path / name).read_text()) for name in "01"]

    yield start
    for driver in drivers:
        driver.kill()
        driver.wait()
        driver.stderr.close()


@pytest.mark.parametrize(
    ("number", "ranks_end_with", "expected"),
    [(signal.SIGINT, 0, 0), (signal.SIGTERM, 0, 0), (signal.SIGINT, 130, 130), (signal.SIGTERM, 143, 143)],
)
def test_a_signal_is_forwarded_once_and_ranks_end_by_themselves(driven, tmp_path, number, ranks_end_with, expected):
    driver, pids = driven(WELL_BEHAVED.replace("sys.exit(0)", f"sys.exit({ranks_end_with})"))
    driver.send_signal(number)
    assert end_of(driver) == expected
    assert [(tmp_path / f"{rank}.signal").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert not any(map(alive, pids))
    assert "kills them" in driver.stderr.read()


def test_a_signal_after_a_while_kills(driven):
    driver, pids = driven(DEAF)
    for _ in range(3):  # one request
        driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None and all(map(alive, pids))
    driver.send_signal(signal.SIGINT)
    assert end_of(driver) == 130
    assert not any(map(alive, pids))


def test_a_rank_that_was_asked_itself_ends_the_run_and_is_no_failure(driven, tmp_path):
    """As when all ranks agree to end because of it; the one that is deaf to them is ended."""
    program = f"if sys.argv[1].endswith('0'):\n{textwrap.indent(WELL_BEHAVED, '    ')}\nelse:\n"
    program = "import sys\n" + program.replace("sys.exit(0)", "sys.exit(143)") + textwrap.indent(DEAF, "    ")
    driver, pids = driven(program)
    os.kill(pids[0], signal.SIGTERM)
    assert end_of(driver) == 143
    assert not any(map(alive, pids)) and driver.stderr.read() == ""


def test_ranks_are_not_started_again_once_their_supervisor_was_asked(tmp_path):
    requests, said = StopRequests(), []

    def start(attempt):
        requests.note(signal.SIGUSR1)
        ranks = [python(f"open({str(tmp_path / 'started')!r}, 'w')")]
        return supervise(ranks, requests=requests)

    assert supervise_again(start, restarts=3, progress=lambda: 0, say=said.append, requests=requests) == 138
    assert not (tmp_path / "started").exists()

    def fail(attempt):
        requests.note(signal.SIGTERM)
        raise RankError("a rank fails meanwhile", 1)

    with pytest.raises(RankError):
        supervise_again(fail, restarts=3, progress=lambda: 0, say=said.append, requests=requests)
    assert said == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a child's life to its parent's")
def test_ranks_die_with_the_supervisor(driven):
    driver, pids = driven(DEAF)
    os.kill(driver.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)), "the ranks to be gone")
