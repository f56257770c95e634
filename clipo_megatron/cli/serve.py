"""`clipo serve`: starts the servers that generate for a training run, and keeps them running."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.runtime.run_dir import LOGS, SERVERS
from clipo_megatron.serving import environment
from clipo_megatron.serving.commands import ServerSlot, api_key, server_command, url
from clipo_megatron.serving.gpus import gpus
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.process import REDACTED
from clipo_megatron.serving.supervisor import ServerLimits, ServerSpec, Supervisor, host_name, only_one

DESCRIPTION = """\
Run the servers that generate for the training run that CONFIG describes, until Ctrl-C.

They are started as `model`, `rollout` and `serve` say, with any further options of the sections `sglang` and `vllm`,
registered in train.output/servers, where `clipo train` finds them, and started again when they die or hang. Their logs
are in train.output/logs. On a machine without a GPU the engine gets an environment of its own, once.
"""
EXAMPLES = """\
examples:
  clipo serve run.yaml rollout.engine=sglang serve.servers=2
  clipo serve run.yaml --check                  show the command lines, and start nothing
  clipo serve run.yaml serve.tp=4 sglang.mem_fraction_static=0.8 serve.python=envs/sglang/bin/python
  CLIPO_API_KEY=... clipo serve run.yaml serve.host=0.0.0.0

Train with the same file and overrides: clipo train run.yaml rollout.engine=sglang
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, the one that training gets")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--check", action="store_true", help="print what would be started, and start nothing")


def run(options: argparse.Namespace) -> int:
    config = load(options.config, options.overrides)
    return report_check(config) if options.check else serve(config)


def serve(config: RunConfig) -> int:
    """Start the servers of a configuration, and keep them running until a signal.

    Returns:
        128 + the signal's number.

    Raises:
        ConfigError: the configuration asks for servers that cannot run.
        ServingError: they cannot be set up or started, or fail too often.
    """
    found, _ = gpus()
    slots, key = _slots(config, found), api_key(config)
    folder = Path(config.train.output).absolute()
    # Wrong options are refused before an environment is set up, which takes minutes.
    for slot in slots:
        server_command(config, slot, python=Path("python"), key=key, scratch=folder)
    with only_one(folder / SERVERS):
        python = environment.interpreter(config.rollout.engine.value, config.serve.python, gpus=len(found))
        specs = [_spec(config, slot, python, key, folder) for slot in slots]
        limits = ServerLimits(
            startup_timeout_s=config.serve.startup_timeout_s,
            health_timeout_s=config.serve.health_timeout_s,
            # A weight sync may keep an engine busy until its deadline.
            engine_timeout_s=max(config.serve.health_timeout_s, config.rollout.sync.deadline_s),
            max_restarts=config.serve.max_restarts,
        )
        secrets = [key] if key else []
        return Supervisor(specs, Registry(folder / SERVERS), limits, secrets=secrets).run()


def report_check(config: RunConfig) -> int:
    """Print what `serve` would start, and start nothing."""
    found, reason = gpus()
    slots, key = _slots(config, found), api_key(config)
    engine = config.rollout.engine.value
    print(f"{config.name}: {len(slots)} {engine} server{'s' * (len(slots) > 1)} for {config.train.output}")
    print(f"  GPUs         {len(found) or f'none ({reason})'}")
    python, remark = _planned_interpreter(engine, config.serve.python, len(found))
    print(f"  interpreter  {python}{remark}")
    named = config.rollout.api_key_env
    print(f"  key          {f'from {named}' if key else 'none: only this machine reaches the servers'}")
    for slot in slots:
        command = server_command(config, slot, python=python, key=key, scratch=Path("PRIVATE"))
        words = {name: REDACTED if key and value == key else value for name, value in command.environment.items()}
        print(f"\nserver {slot.index}, {url(config.serve.host, slot.port)}")
        print("  " + " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(words.items())))
        print("  " + shlex.join(command.arguments))
    return 0


def _planned_interpreter(engine: str, given: str | None, count: int) -> tuple[Path, str]:
    """The interpreter that `environment.interpreter` would choose, and a remark; sets nothing up."""
    recipe = environment.RECIPES[engine]
    if given is None and count == 0 and not recipe.is_ready and not environment.importable(engine):
        return recipe.python, f" (to be set up: about {recipe.minutes:.0f} minutes, {recipe.gigabytes:.1f} GB)"
    return environment.interpreter(engine, given, gpus=count), ""


def _slots(config: RunConfig, found: list[str]) -> list[ServerSlot]:
    """The port and the GPUs of each server.

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


def _spec(config: RunConfig, slot: ServerSlot, python: Path, key: str | None, folder: Path) -> ServerSpec:
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
    )
