"""What a launcher's environment says is judged in one sentence, before a library answers it with a traceback."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from clipo_megatron.cli import ranks
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime import launcher_env
from clipo_megatron.runtime.launcher_env import Launch, export_environment, from_environment, this_process
from clipo_megatron.runtime.platform import INTERFACE, VISIBLE_DEVICES, are_device_names

STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PAIR = {"RANK": "1", "WORLD_SIZE": "2", **MEETING}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "CLIPO_", INTERFACE)):
            monkeypatch.delenv(name)
    return lambda given: [monkeypatch.setenv(name, value) for name, value in given.items()]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is set and RANK is not"),
        ({**PAIR, "RANK": "abc"}, "make no rank: RANK=abc, WORLD_SIZE=2"),
        ({**PAIR, "RANK": "²"}, "make no rank: RANK=²"),
        ({**PAIR, "LOCAL_RANK": "2"}, "LOCAL_RANK=2. RANK and LOCAL_RANK count from 0 to below WORLD_SIZE"),
        ({**PAIR, "WORLD_SIZE": "9" * 30}, "WORLD_SIZE=9999"),
        ({**STEP, "SLURM_PROCID": "-1"}, "make no rank: SLURM_PROCID=-1"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many"),
        ({**STEP, "WORLD_SIZE": "3"}, "contradict each other: WORLD_SIZE=3 and SLURM_STEP_NUM_TASKS=2"),
        ({**PAIR, "MASTER_PORT": "99999999"}, "MASTER_PORT=99999999 is no port"),
        ({**PAIR, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({**PAIR, "MASTER_PORT": "x"}, "MASTER_PORT=x is no port"),
        ({**PAIR, "MASTER_ADDR": ""}, "MASTER_ADDR='' is no host"),
        ({**PAIR, "MASTER_ADDR": "no.such.invalid"}, "MASTER_ADDR=no.such.invalid is no host that this machine can"),
        ({**PAIR, "MASTER_ADDR": "a" * 300}, "MASTER_ADDR=aaa"),
        ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS=abc is no number of threads"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS=0 is no number"),
        ({"OMP_NUM_THREADS": "99999999"}, "OMP_NUM_THREADS=99999999 is no number"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(environment, given, words):
    environment(given)
    with pytest.raises(ConfigError) as caught:
        this_process()
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({INTERFACE: "nope"}, "nope is no network interface of this machine, which has "),
        ({INTERFACE: ""}, "is no network interface"),
        ({VISIBLE_DEVICES: "nonsense"}, "=nonsense names no GPUs"),
        ({VISIBLE_DEVICES: "0;1"}, "=0;1 names no GPUs"),
    ],
)
def test_a_device_that_is_none_is_named(given, words):
    with pytest.raises(ConfigError) as caught:
        export_environment(Launch(0, 1, 0), dict(given))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "-1", "NoDevFiles", "0", "3,1", "GPU-8932f937-d72c,1", "MIG-GPU-1/0/2"])
def test_names_of_devices(text):
    assert are_device_names(text)


@pytest.mark.parametrize("given", [{**STEP, "SLURM_JOB_ID": "x"}, {**STEP, "SLURM_STEP_ID": "1.5"}])
def test_ids_of_a_step_are_numbers(given):
    with pytest.raises(ConfigError, match=r"is no number, as srun sets it"):
        export_environment(from_environment(given), {**given, "SLURM_JOB_NODELIST": "localhost"})


def test_a_process_without_a_launcher_meets_nobody():
    environment = {"MASTER_ADDR": "no.such.invalid", "MASTER_PORT": "x"}  # left over in a shell
    export_environment(Launch(0, 1, 0), environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"].isdecimal()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_gpus_are_held_to_loopback_only_where_all_servers_are_there(elsewhere):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    export_environment(Launch(0, 2, 0), environment, servers_elsewhere=elsewhere)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo", "ranks meet there in any case"
    assert environment.get("NCCL_SOCKET_IFNAME") == (None if elsewhere else "lo")


@pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", False), ("10.0.0.7", True)])
def test_a_run_tells_by_its_address_for_servers_whether_they_are_elsewhere(host, elsewhere, monkeypatch):
    config, told = RunConfig(), []
    config.rollout.sync.host = host
    monkeypatch.setattr(
        launcher_env, "export_environment", lambda place, servers_elsewhere: told.append(servers_elsewhere)
    )
    monkeypatch.setattr(ranks, "quiet_libraries", lambda: None)
    assert ranks.on_ranks(SimpleNamespace(), config, Launch(0, 1, 0), lambda: None, [], restarts=0) == 0
    assert told == [elsewhere]


def test_the_limit_of_open_files_is_raised_where_it_may_be_and_else_named():
    tried = (
        "import resource, sys; from clipo_megatron.runtime.launcher_env import this_process\n"
        "soft, hard = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "try: print(this_process(), *resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "except Exception as error: print(error)"
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most == resource.RLIM_INFINITY or most >= 2048
    refused, raised, plenty = "ulimit -n is 64: a process may open so many", "None 512 512", "None 2048 2048"
    for soft, hard, words in ((64, 64, refused), (64, 512, raised), (1024, 2048, plenty)):
        command = [sys.executable, "-c", tried, str(soft), str(hard)]
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        assert words in subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout


def test_a_stray_variable_silences_nobody(environment):
    environment({"RANK": "1", "SLURM_PROCID": "3"})
    command = [sys.executable, "-m", "clipo_megatron.cli", "compare", "none.json", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "none.json" in done.stderr


def test_only_torchrun_tells_that_another_rank_reports():
    assert launcher_env.is_reported_by_another({"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1"})
    assert not launcher_env.is_reported_by_another({"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0"})
    assert not launcher_env.is_reported_by_another({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
