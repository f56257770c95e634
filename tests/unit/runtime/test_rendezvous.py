"""The rendezvous of the ranks of a job: a port that stays theirs, and messages about ranks that do not come."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipo_megatron.runtime.ports import LOOPBACK, PORTS, PortError, free_port, listen
from clipo_megatron.runtime.rendezvous import FOLDER, RendezvousError, rendezvous


def place(job, rank, world=2, **more):
    return {
        "CLIPO_JOB": str(job), "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": LOOPBACK,
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURMD_NODENAME": f"n{rank}", **more,
    }  # fmt: skip


@pytest.fixture
def at_once():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_ranks_rendezvous_at_a_port_that_nobody_else_can_take(tmp_path, at_once):
    stores = list(at_once.map(lambda rank: rendezvous(place(tmp_path, rank, 3), timeout_s=20), range(3)))
    stores[2].set("word of 2", "heard")
    assert stores[0].get("word of 2") == b"heard"
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.name == "7.0.1.json"
    port = json.loads(file.read_text())["port"]
    assert port in PORTS
    with pytest.raises(OSError, match="in use"):
        socket.create_server((LOOPBACK, port))


def test_each_attempt_and_step_has_its_own_rendezvous(tmp_path, at_once):
    stores = []
    for more in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "2"}):
        stores += at_once.map(lambda rank, more=more: rendezvous(place(tmp_path, rank, **more), timeout_s=20), range(2))
    files = sorted((tmp_path / FOLDER).iterdir())
    assert [file.name for file in files] == ["7.0.1.json", "7.0.2.json", "7.1.1.json"]
    assert len({json.loads(file.read_text())["port"] for file in files}) == 3


def test_missing_ranks_are_named_on_every_rank_that_came(tmp_path, at_once):
    def said(rank):
        with pytest.raises(RendezvousError) as caught:
            rendezvous(place(tmp_path, rank, 4), timeout_s=1.0)
        return str(caught.value)

    first, other = at_once.map(said, (0, 2))
    assert first.startswith("ranks 1, 3 of 4 did not come within 1 s.")
    assert other == "ranks 1, 3 of 4 did not come within 1 s"


def test_a_rank_that_finds_no_file_says_where_it_looked(tmp_path):
    with pytest.raises(RendezvousError, match=r"rank 1 of 2, on n1, waited 1 s for rank 0 to write .*7\.0\.1\.json"):
        rendezvous(place(tmp_path, 1), timeout_s=1.0)


def test_a_rank_0_that_has_ended_is_reported(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "7.0.1.json").write_text(json.dumps({"host": LOOPBACK, "port": free_port()}))
    with pytest.raises(RendezvousError, match=r"rank 1 of 2, on n1, does not reach rank 0 at 127\.0\.0\.1:"):
        rendezvous(place(tmp_path, 1), timeout_s=1.0)


def local(rank, port, **more):
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **more}


def test_under_torchrun_and_between_machines_torch_does_the_rendezvous(tmp_path):
    assert rendezvous(local(0, 1, TORCHELASTIC_USE_AGENT_STORE="True")) is None
    assert rendezvous(local(0, 1, MASTER_ADDR="192.0.2.1")) is None
    assert rendezvous({"RANK": "0", "WORLD_SIZE": "1"}) is None


def listening(port):
    """The addresses at which this machine listens at a port, as the kernel has them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as file:
            lines = [line.split() for line in file.readlines()[1:]]
        addresses = [fields[1] for fields in lines if fields[3] == "0A"]
        found |= {address for address in addresses if int(address.rpartition(":")[2], 16) == port}
    return found


def test_a_run_on_one_machine_meets_on_loopback_alone(at_once):
    port = free_port()
    stores = list(at_once.map(lambda rank: rendezvous(local(rank, port), timeout_s=20), range(2)))
    stores[1].set("word of 1", "heard")
    assert stores[0].get("word of 1") == b"heard"
    assert listening(port) == {f"0100007F:{port:04X}"}


def test_a_port_that_is_taken_is_named():
    with listen(LOOPBACK) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=rf"rank 0 of 2 cannot listen at 127\.0\.0\.1:{port}: .*in use.*free"):
            rendezvous(local(0, port), timeout_s=1.0)


def test_ports_are_below_the_ephemeral_ones():
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        lowest = int(file.read().split()[0])
    assert PORTS.start > 1024 and PORTS.stop <= lowest
    with listen(LOOPBACK) as one, listen(LOOPBACK) as other:
        assert one.getsockname()[1] != other.getsockname()[1]
    with pytest.raises(PortError, match=r"nothing can listen at 192\.0\.2\.1"):
        listen("192.0.2.1")
