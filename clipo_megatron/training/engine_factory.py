"""Builds the engine that a configuration names, and the sync that gives it the policy's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.checks.rollout import transport_of
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import EngineKind, RunConfig, Transport, Unfinished
from clipo_megatron.data.response_text import response_decoder
from clipo_megatron.policy.model.model import TORCH_DTYPE
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.policy import Policy
from clipo_megatron.rollout.engine import Engine, InFlight, Memory
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.run_dir import SERVERS, WEIGHTS
from clipo_megatron.sync.broadcast import BroadcastSync
from clipo_megatron.sync.colocation import ColocatedSync
from clipo_megatron.sync.disk import DiskSync
from clipo_megatron.sync.in_process import InProcessSync
from clipo_megatron.sync.ipc import IpcSync
from clipo_megatron.sync.shard import Shard

WeightSync = InProcessSync | BroadcastSync | DiskSync | IpcSync | ColocatedSync


def rollout_ranks(config: RunConfig, layout: Layout) -> list[int]:
    """The ranks that send rollout requests: all with a local engine, the first of each replica with servers."""
    if config.rollout.engine is EngineKind.local:
        return list(range(layout.world))
    return [layout.head_of(dp_rank) for dp_rank in range(layout.dp)]


def build_engine(config: RunConfig, layout: Layout, tokenizer: Any, say: Callable[[str], None]) -> Engine | None:
    """Build this rank's engine; None on ranks that send no requests.

    A pool of servers has found `rollout.servers` of them. Colocated servers have given up their GPU memory, so that the
    policy can be built; this is collective then.

    Raises:
        EngineError: the model cannot be used, or the servers did not appear in time.
    """
    if config.rollout.engine is EngineKind.local:
        return LocalEngine(
            hf_folder(config.model.path),
            dtype=TORCH_DTYPE[config.rollout.dtype or config.model.dtype],
            device=platform().device,
            batch_size=config.rollout.batch_size,
        )
    pool = None
    if layout.rank in rollout_ranks(config, layout):
        pool = _pool_of_servers(config, tokenizer)
        wanted = len(config.rollout.endpoints) or config.rollout.servers
        if len(pool.discover()) < wanted:
            where = ", ".join(config.rollout.endpoints) or f"`clipo serve` with train.output={config.train.output}"
            seconds = config.rollout.pool.join_deadline_s
            say(f"waiting up to {seconds:.0f} s for rollout servers ({wanted} wanted): {where}")
        pool.join(wanted)
    if config.rollout.colocated:
        if layout.rank == 0:
            pool.offload(Memory.kv_cache, Memory.weights)
        dist.all_reduce(torch.zeros(1))  # no rank builds anything before the memory is free
    return pool


def _pool_of_servers(config: RunConfig, tokenizer: Any) -> ServerPool:
    rollout = config.rollout
    return ServerPool(
        rollout.engine,
        decode=response_decoder(tokenizer),
        config=rollout.pool,
        endpoints=rollout.endpoints,
        registry=Path(config.train.output) / SERVERS,
        router=rollout.router,
        api_key_env=rollout.api_key_env,
        model=config.model.path,
    )


def build_sync(config: RunConfig, policy: Policy, engine: Engine | None) -> WeightSync:
    """Build this rank's part in giving the policy's weights to the engine."""
    if config.rollout.engine is EngineKind.local:
        return InProcessSync(policy, engine)
    rollout, transport = config.rollout, transport_of(config)
    goes_on = rollout.unfinished is Unfinished.keep_running or rollout.ahead > 0
    options: dict[str, Any] = {
        "in_flight": InFlight.retract if goes_on else InFlight.abort,
        "join_deadline_s": rollout.pool.join_deadline_s,
    }
    if transport is Transport.disk:
        options["model"] = Path(config.model.path)
        options["folder"] = Path(rollout.sync.folder or Path(config.train.output) / WEIGHTS)
        options["run"] = Path(config.train.output)
    kind = {Transport.broadcast: BroadcastSync, Transport.disk: DiskSync, Transport.ipc: IpcSync}[transport]
    sync = kind(Shard.of(policy), engine, rollout.sync, **options)
    return ColocatedSync(sync, policy, engine) if rollout.colocated else sync
