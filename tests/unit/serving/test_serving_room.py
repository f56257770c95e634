"""A server that shares GPUs with a trainer starts when their memory is free, and the trainer waits for its start."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clipo_megatron.config.schema import EngineKind, PoolConfig, RunConfig
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.serving import serve
from clipo_megatron.serving.commands import ServerSlot, memory_share
from clipo_megatron.serving.gpus import free_share
from clipo_megatron.serving.supervisor import ServerLimits, Supervisor

RECORD = ServerRecord("one", "http://127.0.0.1:1", "sglang", 1, "node", 1, "b", Status.starting)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Sets the free MiB, of 80,000, of two GPUs, which a stand-in for nvidia-smi tells."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def tell(first: int, second: int) -> None:
        lines = f"0, GPU-aa, {first}, 80000\\n1, GPU-bb, {second}, 80000\\n"
        program.write_text(f"#!/bin/sh\ncase \"$*\" in *memory.free*nounits*) printf '{lines}';; esac\n")
        program.chmod(0o755)

    return tell


def test_the_fullest_gpu_counts(gpus):
    gpus(72_000, 8_000)
    assert free_share(["0"]) == 0.9 and free_share(["0", "1"]) == free_share(["GPU-bb"]) == 0.1
    assert free_share(["7"]) == 1.0


def test_the_options_say_how_much_a_server_takes():
    config = RunConfig()
    assert memory_share(config) == 0.5
    config.sglang = {"mem_fraction_static": 0.7}
    assert memory_share(config) == 0.7


@pytest.mark.parametrize("colocated", [False, True])
def test_a_server_that_died_while_its_gpu_is_in_use_is_started_when_the_memory_is_free(
    colocated, gpus, tmp_path, monkeypatch
):
    config = RunConfig()
    config.rollout.engine, config.rollout.colocated = EngineKind.sglang, colocated
    config.sglang = {"mem_fraction_static": 0.6}
    gpus(8_000, 80_000)
    spec = serve._spec(config, ServerSlot(0, 4000, ("0",)), Path("python"), None, tmp_path, "")
    said, started = [], []
    limits = ServerLimits(startup_timeout_s=1, health_timeout_s=1, engine_timeout_s=1, max_restarts=1)
    supervisor = Supervisor([spec], Registry(tmp_path), limits, say=said.append)
    monkeypatch.setattr(Supervisor, "_start", lambda self, server, scratch: started.append(server))
    (server,) = supervisor._servers
    supervisor._check(server, tmp_path)
    if not colocated:
        assert started, "no other program uses its GPU"
        return
    assert not started and "waits until the memory of its GPUs is free" in said[0]
    gpus(50_000, 80_000)
    supervisor._check(server, tmp_path)
    assert not started, "it has just looked"
    server.retry_at = 0.0
    supervisor._check(server, tmp_path)
    assert started == [server]


def test_memory_is_not_taken_from_servers_before_those_that_start_have_it(tmp_path, monkeypatch):
    registry = Registry(tmp_path)
    registry.write(RECORD)
    registry.write(replace(RECORD, name="long-ago", updated_at=time.time() - 1e6))
    pool = ServerPool(EngineKind.sglang, decode=str, config=PoolConfig(), registry=tmp_path)
    told: list[list[Status]] = []
    monkeypatch.setattr(
        pool,
        "_everywhere",
        lambda call: told.append([each.status for each in registry.records() if each.name == "one"]),
    )
    thread = threading.Thread(target=pool.offload)
    thread.start()
    thread.join(0.2)
    assert not told
    registry.write(replace(RECORD, status=Status.ready))
    thread.join()
    pool.close()
    assert told == [[Status.ready]]
