"""What ranks do in tests of the weight sync: hold a model without Megatron, change it, and send it to servers."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from progress import wait_until
from torch import Tensor

from clipo_megatron.config.schema import EngineKind, PoolConfig, SyncConfig
from clipo_megatron.rollout.engine import InFlight
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.sync.broadcast import BroadcastSync
from clipo_megatron.sync.disk import DiskSync
from clipo_megatron.sync.ipc import IpcSync
from clipo_megatron.sync.report import SyncReport
from clipo_megatron.sync.served import ServedSync
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.export import Holder, export
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.mapping import Coordinates
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import read_config

Change = Callable[[dict[str, Tensor], int], None]


def make_shard(folder: str, tp: int, pp: int, *, ep: int = 1, dtype: torch.dtype = torch.bfloat16) -> Shard:
    """This rank's part of a folder's weights in fp32, exported in `dtype`; ranks are ordered like Megatron's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    width = world // pp  # ranks of a stage
    pp_rank, place = divmod(rank, width)
    etp = tp if ep == 1 else 1
    division = ParallelDivision(tp=tp, pp=pp, ep=ep, etp=etp)
    at = Coordinates(tp, place % tp, ep, place // etp % ep, etp, place % etp)
    spec = model_spec(read_config(folder))
    mine = entries(spec, division.stages(spec.num_layers)[pp_rank], at)
    parameters = {
        entry.megatron[0]: torch.empty(entry.sharding.local_shape(entry.shapes, entry.shard_of(at)[0]))
        for entry in mine
    }
    with HFReader(folder) as reader:
        load_into(parameters.items(), mine, reader, at)
    holder = Holder(
        at=at,
        pp_rank=pp_rank,
        copy=place // tp,
        expert_copy=place // (etp * ep),
        tp_group=_neighbours(tp, 1),
        etp_group=_neighbours(etp, 1),
        ep_group=_neighbours(ep, etp),
        pp_group=_neighbours(pp, width),
    )
    return Shard(spec=spec, division=division, holder=holder, chunks=lambda: [parameters], dtype=dtype, rank=rank)


def _neighbours(size: int, stride: int) -> dist.ProcessGroup | None:
    """This rank's group of `size` ranks that are `stride` apart; None if it is alone."""
    found = None
    for first in range(dist.get_world_size() if size > 1 else 0):
        if first // stride % size == 0:
            members = [first + number * stride for number in range(size)]
            group = dist.new_group(members)
            found = group if dist.get_rank() in members else found
    return found


def make_pool(shard: Shard, urls: list[str], engine: str = "sglang") -> ServerPool | None:
    """The pool on the first rank of every replica, as in a run; None on other ranks."""
    if shard.holder.at.tp_rank or shard.holder.pp_rank:
        return None
    return ServerPool(EngineKind(engine), decode=str, config=PoolConfig(), endpoints=urls)


def change(shard: Shard, version: int) -> None:
    """Multiply the parameters by different factors."""
    with torch.no_grad():
        for index, parameter in enumerate(shard.chunks()[0].values()):
            parameter.mul_(1.0 + 0.01 * (version + 1) + 0.001 * (index % 7))


def update_repeatedly(
    folder: str,
    urls: list[str],
    tp: int,
    pp: int,
    updates: int,
    settings: dict[str, Any],
    transport: str = "broadcast",
    engine: str = "sglang",
    ep: int = 1,
    changing: bool = True,
) -> list[SyncReport]:
    """Update several times, with changing weights or the folder's; checks the pool's version, returns the reports.

    `settings` are those of the sync and its join deadline, and "dtype", that of the server's weights, else bfloat16.
    """
    shard = make_shard(folder, tp, pp, ep=ep, dtype=settings.get("dtype", torch.bfloat16))
    pool = make_pool(shard, urls, engine)
    sync = make_sync(transport, shard, pool, settings)
    reports = []
    try:
        for version in range(updates):
            if changing:
                change(shard, version)
            reports.append(sync.update_weights(version))
            assert pool is None or pool.version == version
    finally:
        sync.close()
        if pool is not None:
            pool.close()
    return reports


def update_with_few_changes(
    folder: str, urls: list[str], tp: int, pp: int, settings: dict[str, Any], transport: str, engine: str
) -> list[SyncReport]:
    """Send the folder's weights, then three times what a hundredth of the values has become; returns the reports.

    Before the update in the middle one server seems to have been restarted, so that everything is sent.
    """
    shard = make_shard(folder, tp, pp, dtype=settings.get("dtype", torch.bfloat16))
    pool = make_pool(shard, urls, engine)
    sync = make_sync(transport, shard, pool, settings)
    reports = [sync.update_weights(0)]
    try:
        for version in (1, 2, 3):
            for number, parameter in enumerate(shard.chunks()[0].values()):
                same = parameter.dim() == 1  # on all ranks of a stage
                generator = torch.Generator().manual_seed(100 * number + 10 * version + (0 if same else shard.rank))
                chosen = torch.rand(parameter.shape, generator=generator) < 0.01
                parameter.data[chosen] *= -1.25
            if version == 2 and sync._formed is not None:
                sync._formed = ((urls[0], "an earlier start", 1),)
            reports.append(sync.update_weights(version))
    finally:
        sync.close()
        if pool is not None:
            pool.close()
    return reports


def make_sync(transport: str, shard: Shard, pool: ServerPool | None, settings: dict[str, Any]) -> ServedSync:
    settings = {"deadline_s": 60.0, "bucket_mb": 1, "join_deadline_s": 20.0} | settings
    settings.pop("dtype", None)  # of the shard
    join_deadline_s, model = settings.pop("join_deadline_s"), settings.pop("model", None)
    config, rest = SyncConfig(**settings), {"in_flight": InFlight.retract, "join_deadline_s": join_deadline_s}
    if transport == "disk":
        return DiskSync(shard, pool, config, model=model, folder=config.folder, run=config.folder, **rest)
    if transport == "ipc":
        return IpcSync(shard, pool, config, **rest)
    return BroadcastSync(shard, pool, config, **rest)


def plant_a_wrong_byte(folder: str, urls: list[str], settings: dict[str, Any]) -> None:
    """Flip one bit on the wire, in a tensor of the second stage."""
    shard = make_shard(folder, 1, 2, dtype=settings["dtype"])
    pool = make_pool(shard, urls)
    sync = make_sync("broadcast", shard, pool, settings)
    name = "model.layers.2.self_attn.o_proj.weight"
    bucket = next(each for each in sync.export_plan.buckets if name in {tensor.name for tensor in each.tensors})

    sync.update_weights(0)
    if shard.holder.pp_rank == bucket.owner:
        send = sync._group.broadcast

        def broadcast(flat: Tensor, stop: Callable[[], bool]) -> Any:
            if flat.numel() == bucket.numel and torch.equal(dict(bucket.views(flat))[name], expected):
                flat = flat.clone()
                dict(bucket.views(flat))[name].view(torch.uint8)[17, 3] ^= 1
                kept.append(flat)
            return send(flat, stop)

        expected, kept = exported(shard, name), []
        sync._group.broadcast = broadcast
    try:
        sync.update_weights(1)
    finally:
        assert shard.holder.pp_rank != bucket.owner or len(kept) == 1, "no byte was changed"
        sync.close()


def exported(shard: Shard, name: str) -> Tensor:
    """A tensor of this stage by its Hugging Face name."""
    plan = shard.plan(2**20)

    def buffer(numel: int) -> Tensor:
        return torch.empty(numel, dtype=plan.dtype)

    return next(dict(bucket.views(flat))[name] for bucket, flat in shard.own_buckets(plan, buffer)
                if name in dict(bucket.views(flat)))  # fmt: skip


def harm_in_the_middle(
    folder: str, urls: list[str], fault: str, group: int, marker: str, deadline_s: float
) -> tuple[float, SyncReport, SyncReport]:
    """Two stages update two servers, of which one is killed or stopped before its second bucket. Once both are back,
    they are updated again."""
    shard = make_shard(folder, 1, 2)
    pool = make_pool(shard, urls)
    sync = make_sync("broadcast", shard, pool, {"deadline_s": deadline_s})
    change(shard, 0)
    if pool is not None:
        harm_before_bucket(
            pool, urls[1], 2, lambda: os.killpg(group, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        )
    start = time.monotonic()
    gc.disable()  # a broken group is left when the attempt fails, not when Python next collects cycles
    try:
        first = sync.update_weights(0)
    finally:
        gc.enable()
    seconds = time.monotonic() - start
    if pool is not None:
        Path(marker).touch()
        wait_until(lambda: len(pool.discover()) == 2, "the server to come back")
    dist.barrier()
    change(shard, 1)
    second = sync.update_weights(1)
    sync.close()
    return seconds, first, second


def harm_before_bucket(pool: ServerPool, url: str, count: int, harm: Callable[[], None]) -> None:
    """Call `harm` when a server is about to receive its bucket number `count`."""
    server = next(live.server for live in pool.discover() if live.server.url == url)
    receive, asked = server.receive_bucket, []

    async def harmful(*args: Any, **kwargs: Any) -> None:
        asked.append(None)
        if len(asked) == count:
            harm()
        await receive(*args, **kwargs)

    server.receive_bucket = harmful


def update_without_servers() -> None:
    """Update when nothing listens at the server's address."""
    from tiny_models import tiny_llama

    folder = tiny_llama(Path(tempfile.mkdtemp(prefix="alone-")))
    shard = make_shard(str(folder), 1, 2)
    sync = make_sync("broadcast", shard, make_pool(shard, ["http://127.0.0.1:9"]), {"join_deadline_s": 3.0})
    try:
        sync.update_weights(0)
    finally:
        sync.close()


def write_and_compare(folder: str, target: str, tp: int, pp: int, ep: int = 1) -> dict[str, Tensor]:
    """Let all ranks write a version; returns the export of all weights."""
    shard = make_shard(folder, tp, pp, ep=ep)
    pool, settings = make_pool(shard, ["http://127.0.0.1:9"]), SyncConfig(bucket_mb=1)
    sync = DiskSync(shard, pool, settings, model=folder, folder=target, run=target)
    change(shard, 5)
    sync._begin(5)
    whole = export(sync.export_plan, shard.chunks(), shard.holder)
    return {name: tensor.clone() for name, tensor in whole}


def own_against_export(folder: str, tp: int, pp: int, ep: int = 1) -> dict[str, int]:
    """Compare every sender's buckets with the export; returns how often this rank sent each tensor."""
    shard = make_shard(folder, tp, pp, ep=ep)
    plan = shard.plan(96 * 1024)
    whole = {name: tensor.clone() for name, tensor in export(plan, shard.chunks(), shard.holder)}
    buffers = [torch.full((max(bucket.numel for bucket in plan.buckets),), 7.0, dtype=plan.dtype) for _ in range(2)]
    asked: list[int] = []

    def buffer(numel: int) -> Tensor:
        asked.append(numel)
        return buffers[len(asked) % 2]

    sent: dict[str, int] = {}
    for bucket, flat in shard.own_buckets(plan, buffer):
        assert flat.data_ptr() == buffers[len(asked) % 2].data_ptr() and flat.numel() == asked[-1] == bucket.numel
        for name, tensor in bucket.views(flat):
            assert torch.equal(tensor, whole[name]), name
            sent[name] = sent.get(name, 0) + 1
    assert shard.is_sender or not asked
    return sent
