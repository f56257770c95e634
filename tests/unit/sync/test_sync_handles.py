"""A server opens the memory of the trainer's rank on its own GPU, whatever number the GPU has in either process."""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

import clipo_megatron.serving
from clipo_megatron.config.schema import EngineKind, PoolConfig
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.rollout.servers.server import LiveServer, ServerState
from clipo_megatron.serving.gpus import uuids_of
from clipo_megatron.sync import ipc
from clipo_megatron.sync.ipc import payload, ranks_of

EXTENSION = Path(clipo_megatron.serving.__file__).parent / "vllm_extension" / "clipo_weights.py"
UUIDS = ["a1", "b2", "c3", "d4"]  # of the GPUs of trainer ranks 0 .. 3


def live(port: int, gpus: str, tp: int = 1) -> LiveServer:
    server = SimpleNamespace(url=f"http://127.0.0.1:{port}")
    return LiveServer(server, ServerState("m", tp, 0, "", "SGLang 0.5.23"), tuple(gpus.split()))


def by_url(servers: list[LiveServer]) -> list[LiveServer]:
    return sorted(servers, key=lambda each: each.url)


@pytest.mark.parametrize("ports", itertools.permutations((30000, 30001, 30002, 30003)))
def test_servers_are_paired_with_the_ranks_on_their_gpus_under_any_ports(ports):
    servers = by_url([live(port, gpu) for port, gpu in zip(ports, UUIDS, strict=True)])
    assert ranks_of(servers, UUIDS) == {each.url: [UUIDS.index(each.gpus[0])] for each in servers}


def test_a_missing_server_moves_no_other():
    servers = by_url([live(30000, "d4 c3", tp=2), live(30001, "b2")])
    assert ranks_of(servers, UUIDS) == {"http://127.0.0.1:30000": [3, 2], "http://127.0.0.1:30001": [1]}


def test_a_server_on_a_gpu_without_trainer_has_no_ranks():
    assert ranks_of([live(30000, "b2"), live(30001, "c3 e5", tp=2)], UUIDS) == {
        "http://127.0.0.1:30000": [1],
        "http://127.0.0.1:30001": None,
    }


def test_without_names_servers_follow_each_other_on_the_ranks():
    servers = [live(30000, "", tp=2), live(30001, "", tp=2), live(30002, "")]
    assert list(ranks_of(servers, [""] * 4).values()) == [[0, 1], [2, 3], None]


class TheirUnpickler(pickle.Unpickler):
    """Opens a handle as SGLang 0.5.23 does (srt/utils/patch_torch.py), in a process that sees the GPU `gpu` alone."""

    gpu = "d4"

    def find_class(self, module: str, name: str):
        if name == "rebuild_cuda_tensor":
            return self.rebuilt
        if name == "FlattenedTensorMetadata":
            return lambda *args: args
        return super().find_class(module, name)

    def rebuilt(self, *args):
        device = args[6]  # _REDUCE_TENSOR_ARG_DEVICE_INDEX
        if isinstance(device, int):
            return f"memory of device {device}"
        if device != self.gpu:
            raise ValueError(f"Invalid device_uuid={device}")
        return "memory of device 0"


def test_a_handle_names_its_gpu_by_its_uuid(monkeypatch):
    def reduce_on_gpu_3(tensor):
        """What torch's `reduce_tensor` returns for a tensor on the GPU that this process knows as 3."""
        words = (torch.Tensor, (4,), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3, b"handle", 4, 0)
        return reductions.rebuild_cuda_tensor, (*words, False, b"counter", 0, b"event", True)

    monkeypatch.setattr(ipc, "platform", lambda: SimpleNamespace(device_uuid="d4"))
    monkeypatch.setattr(ipc.reductions, "reduce_tensor", reduce_on_gpu_3)
    bucket = SimpleNamespace(views=lambda flat: [])
    opened = TheirUnpickler(io.BytesIO(payload(bucket, torch.zeros(4, dtype=torch.uint8)))).load()
    assert opened["flattened_tensor"] == "memory of device 0"


@pytest.fixture
def extension():
    """What `clipo serve` adds to vLLM's workers, which runs in vLLM's environment."""
    spec = spec_from_file_location("clipo_weights", EXTENSION)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vllms_extension_opens_a_handle_and_nothing_else(extension):
    flat = torch.arange(6, dtype=torch.bfloat16)
    bucket = SimpleNamespace(views=lambda flat: [("one", flat[:2]), ("two", flat[2:].view(2, 2))])
    opened = extension._Unpickler(io.BytesIO(payload(bucket, flat))).load()
    assert torch.equal(opened["flattened_tensor"].view(torch.bfloat16), flat)
    assert [
        (each.name, tuple(each.shape), each.dtype, each.start_idx, each.end_idx) for each in opened["metadata"]
    ] == [
        ("one", (2,), torch.bfloat16, 0, 4),
        ("two", (2, 2), torch.bfloat16, 4, 12),
    ]
    for harm in (print, io.BytesIO, torch.load):
        with pytest.raises(pickle.UnpicklingError, match="a handle names"):
            extension._Unpickler(io.BytesIO(pickle.dumps(harm))).load()


def test_vllms_extension_knows_the_gpu_by_its_uuid(extension, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(uuid=["c3", "d4"][place]))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *args: args)
    assert extension._rebuilt_on_this_device(*range(6), "d4", 7) == (*range(6), 1, 7)


def test_the_pool_reads_which_gpus_a_server_has_and_how_they_connect(tmp_path, monkeypatch):
    registry = Registry(tmp_path)
    record = ServerRecord("one", "http://127.0.0.1:1", "sglang", 2, "node", 1, "b", Status.ready)
    registry.write(replace(record, gpus="a1,b2", collectives="2.30.7"))
    registry.write(replace(record, name="two", url="http://127.0.0.1:2/"))
    pool = ServerPool(EngineKind.sglang, decode=str, config=PoolConfig(), registry=tmp_path)
    try:
        monkeypatch.setattr(pool, "run", lambda call, deadline_s: call.close() or [live(1, ""), live(2, "")])
        found = [(each.gpus, each.collectives) for each in pool.discover()]
        assert found == [(("a1", "b2"), "2.30.7"), ((), "")]
    finally:
        monkeypatch.undo()
        pool.close()


def test_gpus_are_known_by_number_or_name(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, GPU-aa11-b\\n1, GPU-cc22-d\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert uuids_of(["1", "0"]) == ["cc22-d", "aa11-b"]
    assert uuids_of(["GPU-cc22"]) == ["cc22-d"], "the driver takes the beginning of a name"
    assert uuids_of(["2"]) == uuids_of([]) == []
