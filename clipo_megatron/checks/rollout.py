"""Checks of the engine, its servers, the transport of weights, over-sampling, and the off-policy correction."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from clipo_megatron.algorithms.importance import correction_of
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import CorrectionKind, EngineKind, RunConfig, Transport, Unfinished
from clipo_megatron.runtime.ports import is_loopback

# The transports that an engine can receive weights by, the default first.
TRANSPORTS = {
    EngineKind.local: (Transport.in_process,),
    EngineKind.sglang: (Transport.broadcast, Transport.disk, Transport.ipc),
    EngineKind.vllm: (Transport.disk, Transport.broadcast, Transport.ipc),
}
LAST_PORT = 65535


def rollout_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    yield from _transport(config)
    yield from _addresses(config)
    yield from _ahead(config)
    yield from _over_sampling(config)
    yield from _deadlines(config)
    yield from _serving(config)
    yield from _correction(config)


def transport_of(config: RunConfig) -> Transport:
    """The transport in use: rollout.sync.transport, or the engine's default, which for colocated servers is ipc."""
    rollout, fitting = config.rollout, TRANSPORTS[config.rollout.engine]
    default = Transport.ipc if rollout.colocated and fitting[0] is Transport.broadcast else fitting[0]
    return rollout.sync.transport or default


def _transport(config: RunConfig) -> Iterator[ConfigProblem]:
    rollout, fitting = config.rollout, TRANSPORTS[config.rollout.engine]
    key, transport = "rollout.sync.transport", transport_of(config)
    if transport not in fitting:
        reason = f"rollout.engine = {rollout.engine.value} takes no weights that way"
        names = " or ".join(each.value for each in fitting)
        yield ConfigProblem(key, reason, f"Set it to {names}, or to null for {fitting[0].value}", transport)
    elif transport is Transport.ipc and not rollout.colocated:
        reason = "servers can open the trainer's memory on GPUs that they share with it, and rollout.colocated is false"
        yield ConfigProblem(key, reason, "Set rollout.colocated=true, or choose broadcast", transport)
    elif transport is Transport.broadcast and rollout.colocated:
        reason = (
            "the libraries that connect GPUs take each GPU once, and with rollout.colocated trainer and servers share "
            "theirs"
        )
        yield ConfigProblem(key, reason, "Set it to ipc, or to null for it", transport)
    if rollout.sync.delta and transport not in (Transport.broadcast, Transport.disk):
        reason = f"with the transport {transport.value} weights are copied from memory to memory, and nothing is sent"
        yield ConfigProblem("rollout.sync.delta", reason, "Set it to false", True)
    if rollout.colocated and rollout.engine is EngineKind.local:
        reason = "the local engine lives in the training processes anyway"
        yield ConfigProblem("rollout.colocated", reason, "Set it to false, or rollout.engine to sglang", True)
    if rollout.colocated and rollout.unfinished is Unfinished.keep_running:
        reason = "with rollout.colocated servers give their memory back while the policy trains, and nothing can go on"
        yield ConfigProblem("rollout.unfinished", reason, "Set it to resume or drop", rollout.unfinished)


def _addresses(config: RunConfig) -> Iterator[ConfigProblem]:
    rollout = config.rollout
    urls = [(f"rollout.endpoints[{index}]", url) for index, url in enumerate(rollout.endpoints)]
    urls += [("rollout.router", rollout.router)] if rollout.router is not None else []
    if urls and rollout.engine is EngineKind.local:
        reason = "rollout.engine is local, which asks no server"
        key = "rollout.endpoints" if rollout.endpoints else "rollout.router"
        yield ConfigProblem(key, reason, "Remove it, or set rollout.engine to sglang or vllm", show_value=False)
        return
    outside = []  # (setting, address) of those beyond this machine
    for key, url in urls:
        if (host := _host(url)) is None:
            remedy = "Give an address such as http://127.0.0.1:30000"
            yield ConfigProblem(key, "it is no http or https URL of a server, without a path", remedy, url)
        elif not is_loopback(host):
            outside.append((key, url))
    for url, count in Counter(url.rstrip("/") for url in rollout.endpoints).items():
        if count > 1:
            reason = f"{url} is listed {count} times, and each server is asked and given weights once"
            yield ConfigProblem("rollout.endpoints", reason, "List it once", show_value=False)
    if rollout.engine is EngineKind.local:
        return
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*|", rollout.api_key_env):
        reason = "it is no name of an environment variable, and a job's script uses it as one"
        yield ConfigProblem("rollout.api_key_env", reason, "Name one, such as CLIPO_API_KEY", rollout.api_key_env)
    if not is_loopback(config.serve.host):
        outside.append(("serve.host", config.serve.host))
    if outside and not os.environ.get(rollout.api_key_env):
        key, value = outside[0]
        name = rollout.api_key_env or "CLIPO_API_KEY"
        reason = (
            "it is reached beyond this machine, where whoever can connect could use the server or change its weights"
        )
        remedy = f"Put a key into the environment variable {name} (rollout.api_key_env), for servers and trainer"
        yield ConfigProblem(
            key, f"{reason}; the environment variable {name} with the servers' key is not set", remedy, value
        )
    servers = [each for each in outside if each[0] != "rollout.router"]
    if servers and transport_of(config) is Transport.broadcast and is_loopback(rollout.sync.host):
        reason = f"servers elsewhere ({servers[0][0]} = {servers[0][1]}) cannot reach the trainer there"
        remedy = "Set it to the trainer's address in their network"
        yield ConfigProblem("rollout.sync.host", reason, remedy, rollout.sync.host)


def _host(url: str) -> str | None:
    """The host of a URL that names a server; None where it is none."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.username is not None:
        return None
    return None if parts.path.strip("/") or parts.query or parts.fragment else parts.hostname


def _ahead(config: RunConfig) -> Iterator[ConfigProblem]:
    """Rollouts of later steps, generated while earlier ones train."""
    rollout, key = config.rollout, "rollout.ahead"
    if rollout.ahead < 1:
        return
    if rollout.colocated:
        reason = "with rollout.colocated servers give their memory back while the policy trains, and nothing can go on"
        yield ConfigProblem(key, reason, "Set it to 0, or give the servers GPUs of their own", rollout.ahead)
    if rollout.unfinished is Unfinished.resume:
        reason = f"with {key} = {rollout.ahead} requests keep running while the policy trains"
        yield ConfigProblem("rollout.unfinished", reason, "Set it to keep_running", rollout.unfinished)
    if rollout.over_sampling > 1 and rollout.unfinished is Unfinished.drop:
        reason = (
            f"with {key} = {rollout.ahead} a step that takes the groups that finish first leaves the others to later "
            "steps, and drops none"
        )
        yield ConfigProblem("rollout.unfinished", reason, "Set it to keep_running", rollout.unfinished)
    if rollout.over_sampling > rollout.ahead + 1:
        reason = (
            f"with {key} = {rollout.ahead} at most {rollout.ahead + 1} times a step's prompts can be at work, or some "
            "would train too late"
        )
        yield ConfigProblem("rollout.over_sampling", reason, f"Lower it, or raise {key}", rollout.over_sampling)


def _over_sampling(config: RunConfig) -> Iterator[ConfigProblem]:
    """Over-sampling, and what becomes of rollouts that a step does not wait for."""
    rollout = config.rollout
    if rollout.unfinished is Unfinished.drop:
        return
    key, value = "rollout.unfinished", rollout.unfinished
    if rollout.ahead:
        return
    if rollout.over_sampling == 1:
        reason = "nothing is ever unfinished: rollout.over_sampling is 1, so every prompt asked for is waited for"
        yield ConfigProblem(key, reason, "Set rollout.over_sampling above 1, or this to drop", value)


def _deadlines(config: RunConfig) -> Iterator[ConfigProblem]:
    rollout, patience = config.rollout, config.layout.distributed_timeout_s
    key, wait = "layout.distributed_timeout_s", "ranks that are done wait in a collective for those that are not"
    if rollout.deadline_s >= patience:
        reason = f"{wait}, and a step's rollouts may take rollout.deadline_s = {rollout.deadline_s:g}"
        yield ConfigProblem(key, reason, "Raise it, or lower rollout.deadline_s", patience)
    if rollout.engine is EngineKind.local:
        return
    joining, update = rollout.pool.join_deadline_s, rollout.sync.deadline_s
    if joining + update >= patience:
        reason = (
            f"{wait}, and a weight sync may take rollout.pool.join_deadline_s + rollout.sync.deadline_s = "
            f"{joining:g} + {update:g} = {joining + update:g}"
        )
        yield ConfigProblem(key, reason, "Raise it, or lower one of these", patience)


def _serving(config: RunConfig) -> Iterator[ConfigProblem]:
    serve = config.serve
    if serve.port + serve.servers - 1 > LAST_PORT >= serve.port:
        reason = f"{serve.servers} servers take as many ports from there on, the last of which is {LAST_PORT}"
        yield ConfigProblem("serve.port", reason, "Set it to 0 for free ones, or lower", serve.port)


def _correction(config: RunConfig) -> Iterator[ConfigProblem]:
    correction = correction_of(config)
    if correction.kind is CorrectionKind.none:
        return
    key = "algorithm.correction.floor"
    if correction.kind is CorrectionKind.truncate and correction.floor != 0:
        remedy = "Set it to 0, or algorithm.correction.kind to mask"
        yield ConfigProblem(key, "weights are truncated at the cap alone", remedy, correction.floor)
    elif correction.floor >= correction.cap:
        reason = f"it must lie below algorithm.correction.cap = {correction.cap:g}"
        yield ConfigProblem(key, reason, "Lower it; 0.5 is usual", correction.floor)
