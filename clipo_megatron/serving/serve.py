"""Starts the servers that a configuration asks for on this machine, and keeps them running."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.runtime.run_dir import LOGS, SERVERS
from clipo_megatron.serving import environment
from clipo_megatron.serving.commands import ServerSlot, api_key, memory_share, server_command, url
from clipo_megatron.serving.gpus import free_share, gpus, uuids_of
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.supervisor import ServerLimits, ServerSpec, Supervisor, host_name, only_one


def serve(config: RunConfig) -> int:
    """Start the servers of a configuration, and keep them running until a signal.

    Returns:
        128 + the signal's number.

    Raises:
        ConfigError: the configuration asks for servers that cannot run.
        ServingError: they cannot be set up or started, or fail too often.
    """
    found, _ = gpus()
    slots, key = slots_of(config, found), api_key(config)
    folder = Path(config.train.output).absolute()
    # Wrong options are refused before an environment is set up, which takes minutes.
    for slot in slots:
        server_command(config, slot, python=Path("python"), key=key, scratch=folder)
    with only_one(folder / SERVERS):
        python = environment.interpreter(config.rollout.engine.value, config.serve.python, gpus=len(found))
        collectives = environment.collectives_version(python) if found else ""
        specs = [_spec(config, slot, python, key, folder, collectives) for slot in slots]
        limits = ServerLimits(
            startup_timeout_s=config.serve.startup_timeout_s,
            health_timeout_s=config.serve.health_timeout_s,
            # A weight sync may keep an engine busy until its deadline.
            engine_timeout_s=max(config.serve.health_timeout_s, config.rollout.sync.deadline_s),
            max_restarts=config.serve.max_restarts,
        )
        secrets = [key] if key else []
        return Supervisor(specs, Registry(folder / SERVERS), limits, secrets=secrets).run()


def slots_of(config: RunConfig, found: list[str]) -> list[ServerSlot]:
    """The port and the GPUs of each server, of the GPUs `found` on this machine.

    Raises:
        ConfigError: see `serve`.
    """
    serve, rollout = config.serve, config.rollout
    if rollout.engine == EngineKind.local:
        raise ConfigError(
            "rollout.engine = local generates in the training processes, and there is nothing to serve. Set "
            "rollout.engine to sglang or vllm."
        )
    if rollout.endpoints:
        raise ConfigError(
            f"rollout.endpoints = {rollout.endpoints} names servers that others run, and the run would use those "
            "alone. Empty it, or do without `clipo serve`."
        )
    if not (Path(config.model.path) / "config.json").is_file():
        raise ConfigError(
            f"model.path = {config.model.path}: there is no Hugging Face model folder. Give the path of one on this "
            "machine."
        )
    devices = _visible(len(found))
    needed = serve.servers * serve.tp
    if devices and needed > len(devices):
        raise ConfigError(
            f"serve.servers x serve.tp = {serve.servers} x {serve.tp} = {needed} GPUs, and this machine offers "
            f"{len(devices)}. Lower one of them, or serve from several machines."
        )
    return [
        ServerSlot(
            index,
            serve.port + index if serve.port else free_port(),
            tuple(devices[index * serve.tp : (index + 1) * serve.tp]),
        )
        for index in range(serve.servers)
    ]


def _visible(count: int) -> list[str]:
    """The GPUs that this process may use, by the driver's numbers or names, out of `count`."""
    if not count:
        return []
    from clipo_megatron.runtime.platform import VISIBLE_DEVICES

    chosen = os.environ.get(VISIBLE_DEVICES)
    return [str(index) for index in range(count)] if chosen is None else [name for name in chosen.split(",") if name]


def _spec(
    config: RunConfig, slot: ServerSlot, python: Path, key: str | None, folder: Path, collectives: str
) -> ServerSpec:
    name = f"server-{host_name()}-{slot.index}"  # machines may share the folder
    record = ServerRecord(
        name=name,
        url=url(config.serve.host, slot.port),
        engine=config.rollout.engine.value,
        tp=config.serve.tp,
        host=host_name(),
        pid=0,
        boot="",
        status=Status.starting,
        gpus=",".join(uuids_of(slot.devices)),
        collectives=collectives,
    )
    return ServerSpec(
        record=record,
        port=slot.port,
        command=lambda port, scratch: server_command(
            config, replace(slot, port=port), python=python, key=key, scratch=scratch
        ),
        url=lambda port: url(config.serve.host, port),
        probe=lambda address: Probe(address, config.rollout.engine, key),
        log=folder / LOGS / f"{name}.log",
        host=config.serve.host,
        port_is_fixed=config.serve.port != 0,
        has_room=lambda: (
            not (config.rollout.colocated and slot.devices) or free_share(slot.devices) >= memory_share(config)
        ),
    )
