"""Servers that a transport could not reach as they were started are named before anybody waits for them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipo_megatron.config.schema import RunConfig, SyncConfig
from clipo_megatron.rollout.servers.server import LiveServer, ServerState
from clipo_megatron.serving.commands import ServerSlot
from clipo_megatron.serving.environment import collectives_version
from clipo_megatron.serving.serve import _spec
from clipo_megatron.sync import broadcast
from clipo_megatron.sync.broadcast import BroadcastSync
from clipo_megatron.sync.disk import DiskSync
from clipo_megatron.sync.ipc import IpcSync
from clipo_megatron.sync.served import AttemptPlan

PLAN = SimpleNamespace(division=SimpleNamespace(pp=1), buckets=[], dtype=torch.bfloat16, nbytes=0)
SHARD = SimpleNamespace(is_coordinator=True, rank=0, holder=None, plan=lambda nbytes: PLAN)


def planned(kind, state: ServerState, collectives: str = "", **options) -> AttemptPlan | str:
    """What the coordinator plans for one server in this state."""
    server = LiveServer(SimpleNamespace(url="http://here:1"), state, (), collectives)
    sync = kind(SHARD, SimpleNamespace(discover=lambda: [server]), SyncConfig(), **options)
    try:
        return sync._plan_attempt(0)
    finally:
        sync.close()


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_of_a_server_are_reached_through_a_folder_alone(stages, tmp_path):
    state = ServerState("m", 2, 0, "", "SGLang 0.5.23", stages)
    for kind in (BroadcastSync, IpcSync):
        found = planned(kind, state)
        if stages == 1:
            assert found.ranks == 2
        else:
            assert "http://here:1 cannot be updated: it has 2 pipeline stages; start it with one" in found
    assert planned(DiskSync, state, model=tmp_path, folder=tmp_path, run=tmp_path).ranks == 2


@pytest.mark.parametrize(
    ("mine", "theirs", "meets"),
    [("2.29.7", "2.29.7", True), ("2.29.7", "2.30.7", False), ("2.29.7", "", True), ("", "2.30.7", True)],
)
def test_releases_that_refuse_each_other_are_compared_before_anybody_joins(mine, theirs, meets, monkeypatch):
    monkeypatch.setattr(broadcast, "platform", lambda: SimpleNamespace(collectives_version=mine, backend="nccl"))
    found = planned(BroadcastSync, ServerState("m", 1, 0, "", "SGLang 0.5.23"), theirs)
    if meets:
        assert isinstance(found, AttemptPlan)
    else:
        assert "its NCCL is 2.30.7 and the trainer's is 2.29.7" in found and "one torch for both" in found


def test_a_python_tells_its_release(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 2.30.7\n")
    program.chmod(0o755)
    assert collectives_version(program) == "2.30.7"
    assert collectives_version(tmp_path / "none") == ""
    assert collectives_version(sys.executable) == "", "without GPUs there is no such library"


def test_the_registry_names_the_release_of_a_server(tmp_path):
    slot = ServerSlot(0, 4000, ())
    assert _spec(RunConfig(), slot, Path("python"), None, tmp_path, "2.30.7").record.collectives == "2.30.7"
