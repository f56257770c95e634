"""What starts one server: its arguments and environment, made from the configuration. Pure, but for the key's file.

Defaults of ours, per engine; then the section `sglang` or `vllm` of the configuration, option by option.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import DType, EngineKind, RunConfig
from clipo_megatron.runtime.launch import cores

HERE = Path(__file__).parent
DTYPES = {DType.fp32: "float32", DType.bf16: "bfloat16"}
CPU_CACHE_TOKENS = 16_384  # that an SGLang server on a CPU keeps keys and values of
CPU_CACHE_GIB = 1  # the same for vLLM

# A bucket of weights is received into new memory. Taking that from the system each time, and giving it back, is half of
# the time of an update on a CPU; glibc keeps it with these.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30)}

# Options that other settings decide -> which
DECIDED = {
    "model_path": "model.path",
    "model": "model.path",
    "host": "serve.host",
    "port": "serve.port",
    "tp_size": "serve.tp",
    "tp": "serve.tp",
    "tensor_parallel_size": "serve.tp",
    "dtype": "serve.dtype",
    "api_key": "the environment variable that rollout.api_key_env names",
    "config": "the section itself",
}


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """One server to start."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]  # on top of the parent's
    secret_file: tuple[Path, str] | None = None  # to be written for it, readable by its user alone, and its text


@dataclass(frozen=True, slots=True)
class ServerSlot:
    """Where one server of several runs."""

    index: int  # among the servers of this `clipo serve`
    port: int
    devices: tuple[str, ...] = ()  # the GPUs that it may see, by the driver's numbers; none: the CPU


def api_key(config: RunConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The servers' key.

    Raises:
        ConfigError: servers that others can reach would have none.
    """
    name = config.rollout.api_key_env
    key = environment.get(name) if name else None
    if not key and not is_loopback(config.serve.host):
        raise ConfigError(
            f"serve.host = {config.serve.host} lets other machines reach the servers, which take weights from whoever "
            f"asks, and there is no key. Put one into the environment variable {name or '(rollout.api_key_env)'}, here "
            "and where the trainer runs, or set serve.host=127.0.0.1."
        )
    return key or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url(host: str, port: int) -> str:
    """Under which the trainer finds a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:  # it listens on every address; others know it by name
        return f"http://{socket.getfqdn()}:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def server_command(
    config: RunConfig, place: ServerSlot, *, python: Path, key: str | None = None, scratch: Path | None = None
) -> ServerCommand:
    """What starts the server at `place`; `scratch` is a folder for the file that tells SGLang its key.

    Raises:
        ConfigError: an option that another setting decides, or a value that is no option's.
    """
    if config.rollout.engine == EngineKind.sglang:
        return _sglang(config, place, python, key, scratch)
    if config.rollout.engine == EngineKind.vllm:
        return _vllm(config, place, python, key)
    raise ConfigError(
        f"rollout.engine = {config.rollout.engine.value} runs in the training processes and has no server. Set "
        "rollout.engine to sglang or vllm."
    )


def _sglang(config: RunConfig, place: ServerSlot, python: Path, key: str | None, scratch: Path | None) -> ServerCommand:
    options: dict[str, Any] = {
        "model_path": config.model.path,
        "host": config.serve.host,
        "port": place.port,
        "tp_size": config.serve.tp,
        "dtype": DTYPES[config.serve.dtype or config.model.dtype],
        "log_level_http": "warning",  # not a line a request
    }
    environment = _environment(config, place)
    if place.devices:
        options |= {"enable_memory_saver": config.rollout.colocated}
    else:
        options |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_overlap_schedule": True,
            "sleep_on_idle": True,  # else it polls with a whole core
            "skip_server_warmup": True,  # the supervisor's first question is one
            "mem_fraction_static": 0.5,  # a limit: what others take meanwhile counts towards it
            "max_total_tokens": CPU_CACHE_TOKENS,
        }
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(HERE / "stand_ins"), **KEEP_MEMORY}
    secret = None
    if key:
        # On the command line everybody on the machine could read it.
        if scratch is None:
            raise ValueError("a key needs a folder for its file")
        file = scratch / f"server-{place.index}.yaml"
        secret, options["config"] = (file, f"api-key: {json.dumps(key)}\n"), str(file)
    flags = _flags(options | _given(config.sglang, "sglang"), negatable=False)
    return ServerCommand((str(python), "-m", "sglang.launch_server", *flags), environment, secret)


def _vllm(config: RunConfig, place: ServerSlot, python: Path, key: str | None) -> ServerCommand:
    options: dict[str, Any] = {
        "model": config.model.path,
        "host": config.serve.host,
        "port": place.port,
        "tensor_parallel_size": config.serve.tp,
        "dtype": DTYPES[config.serve.dtype or config.model.dtype],
        "seed": config.train.seed + place.index,  # else all servers draw alike
        "max_model_len": _longest(config),
        "logprobs_mode": "processed_logprobs",  # of the policy that was sampled from
        "worker_extension_cls": "clipo_weights.WeightChecksums",
        "uvicorn_log_level": "warning",
        **({"enable_sleep_mode": True} if config.rollout.colocated and place.devices else {}),
        **({} if place.devices else {"enforce_eager": True}),
    }
    environment = _environment(config, place) | {
        "PYTHONPATH": str(HERE / "vllm_extension"),
        "VLLM_SERVER_DEV_MODE": "1",  # calls that change weights
        "VLLM_NO_USAGE_STATS": "1",
        **({"VLLM_API_KEY": key} if key else {}),
    }
    if not place.devices:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    flags = _flags(options | _given(config.vllm, "vllm"), negatable=True)
    return ServerCommand((str(python), "-m", "vllm.entrypoints.openai.api_server", *flags), environment)


def _environment(config: RunConfig, place: ServerSlot) -> dict[str, str]:
    """What both engines are told: fetch nothing, report to nobody, leave the other servers their cores or GPUs."""
    common = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",  # the log is complete when the server is killed
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",  # nothing out of the folder that this was started in
    }
    if place.devices:
        from clipo_megatron.runtime.platform import VISIBLE_DEVICES

        return common | {VISIBLE_DEVICES: ",".join(place.devices)}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // config.serve.servers))
    return common | {"OMP_NUM_THREADS": threads}


def _longest(config: RunConfig) -> int:
    """Tokens of the longest sequence that the run can ask for."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)


def _given(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The user's options, spelled as ours are."""
    options = {}
    for key, value in section.items():
        plain = str(key).lstrip("-").replace("-", "_")
        if plain in DECIDED:
            raise ConfigError(f"{name}.{key}: it is decided by {DECIDED[plain]}. Remove it here.")
        options[plain] = value
    return options


def _flags(options: Mapping[str, Any], *, negatable: bool) -> list[str]:
    """Options as a command line: true is a bare flag, false `--no-x` or nothing, null nothing, a dict is JSON."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is False:
            words += [f"--no-{flag[2:]}"] if negatable else []
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [flag, *map(_word, value)]
        elif value is not None:
            words += [flag, _word(value)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping | list | bool) else str(value)
