"""Builds the command line and environment of a server from the configuration.

Each engine has our defaults, which the configuration's section `sglang` or `vllm` overrides option by option.
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
from clipo_megatron.config.schema import MOST_TOP_K, DType, EngineKind, RunConfig
from clipo_megatron.runtime.launch import cores
from clipo_megatron.runtime.ports import is_loopback

HERE = Path(__file__).parent
EXTENSION = str(HERE / "engine_extension")  # what servers of both engines load for rollout.sync.delta
DTYPES = {DType.fp32: "float32", DType.bf16: "bfloat16"}
CPU_CACHE_TOKENS = 16_384  # size of the key-value cache of an SGLang server on a CPU
CPU_CACHE_GIB = 1  # the same for vLLM
UNSAID_MEMORY_SHARE = 0.5  # of a GPU, that an engine whose options do not say needs at least

# A bucket of weights is received into new memory. Getting it from the system and giving it back takes half of the time
# of an update on a CPU; with these settings glibc keeps it.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30)}

# Options of the engines -> the setting that decides them
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
    """How to start one server."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]  # added to the parent's
    secret_file: tuple[Path, str] | None = None  # path and text of a file to write, readable by its user only


@dataclass(frozen=True, slots=True)
class ServerSlot:
    """The port and GPUs of one of the servers."""

    index: int  # among the servers of this `clipo serve`
    port: int
    devices: tuple[str, ...] = ()  # the driver's numbers of its GPUs; empty: it runs on the CPU


def api_key(config: RunConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The servers' key, None if there is none.

    Raises:
        ConfigError: other machines could reach the servers without a key.
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


def url(host: str, port: int) -> str:
    """The URL under which the trainer reaches a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:  # it listens on every address; other machines use its name
        return f"http://{socket.getfqdn()}:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def server_command(
    config: RunConfig, slot: ServerSlot, *, python: Path, key: str | None = None, scratch: Path | None = None
) -> ServerCommand:
    """The command that starts the server of `slot`. SGLang reads its key from a file in the folder `scratch`.

    Raises:
        ConfigError: the configuration gives an option that another setting decides, or names no engine with a server.
    """
    if config.rollout.engine == EngineKind.sglang:
        return _sglang(config, slot, python, key, scratch)
    if config.rollout.engine == EngineKind.vllm:
        return _vllm(config, slot, python, key)
    raise ConfigError(
        f"rollout.engine = {config.rollout.engine.value} runs in the training processes and has no server. Set "
        "rollout.engine to sglang or vllm."
    )


def memory_share(config: RunConfig) -> float:
    """The share of a GPU's memory that has to be free for a server to start, by its options or a guess."""
    options = {**config.sglang, **config.vllm}
    given = options.get("mem_fraction_static", options.get("gpu_memory_utilization"))
    return float(given) if isinstance(given, int | float) else UNSAID_MEMORY_SHARE


def _sglang(config: RunConfig, slot: ServerSlot, python: Path, key: str | None, scratch: Path | None) -> ServerCommand:
    options: dict[str, Any] = {
        "model_path": config.model.path,
        "host": config.serve.host,
        "port": slot.port,
        "tp_size": config.serve.tp,
        "dtype": DTYPES[config.serve.dtype or config.model.dtype],
        "log_level_http": "warning",  # do not log every request
        "enable_return_routed_experts": config.model.replay_routing or None,
    }
    environment, paths = _environment(config, slot), []
    if config.rollout.sync.delta:
        options["custom_weight_loader"] = "clipo_delta.keep_tensors"
        paths.append(EXTENSION)
    if slot.devices:
        options |= {
            "enable_memory_saver": config.rollout.colocated,
            # Logits as the trainer computes them, in fp32: one product of bf16 factors, which costs nothing more.
            "enable_fp32_lm_head": True,
        }
    else:
        options |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_overlap_schedule": True,
            "sleep_on_idle": True,  # otherwise it polls, which takes a whole core
            "skip_server_warmup": True,  # the supervisor's first health check warms it up
            "mem_fraction_static": 0.5,  # memory that other processes take counts towards it
            "max_total_tokens": CPU_CACHE_TOKENS,
        }
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", **KEEP_MEMORY}
        paths.append(str(HERE / "stand_ins"))
    secret = None
    if key:
        # Every user of the machine can read command lines.
        if scratch is None:
            raise ValueError("a key needs a folder for its file")
        file = scratch / f"server-{slot.index}.yaml"
        secret, options["config"] = (file, f"api-key: {json.dumps(key)}\n"), str(file)
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    flags = _flags(options | _given(config.sglang, "sglang"), negatable=False)
    module = "sglang.launch_server" if slot.devices else "sglang_forked"
    return ServerCommand((str(python), "-m", module, *flags), environment, secret)


def _vllm(config: RunConfig, slot: ServerSlot, python: Path, key: str | None) -> ServerCommand:
    options: dict[str, Any] = {
        "model": config.model.path,
        "host": config.serve.host,
        "port": slot.port,
        "tensor_parallel_size": config.serve.tp,
        "dtype": DTYPES[config.serve.dtype or config.model.dtype],
        "seed": config.train.seed + slot.index,  # otherwise all servers would sample the same
        "max_model_len": _longest(config),
        "logprobs_mode": "processed_logprobs",  # those of the policy that is drawn from
        "max_logprobs": 2 * MOST_TOP_K,  # ties may keep more tokens than rollout.top_k
        "worker_extension_cls": "clipo_weights.TrainerCalls",
        "enable_scale_out": True,  # the call that takes and gives token ids
        "uvicorn_log_level": "warning",
        **({"enable_sleep_mode": True} if config.rollout.colocated and slot.devices else {}),
        **({} if slot.devices else {"enforce_eager": True}),
    }
    environment = _environment(config, slot) | {
        "PYTHONPATH": os.pathsep.join((str(HERE / "vllm_extension"), EXTENSION)),
        "VLLM_SERVER_DEV_MODE": "1",  # enables the calls that change weights
        "VLLM_NO_USAGE_STATS": "1",
        **({"VLLM_API_KEY": key} if key else {}),
    }
    if not slot.devices:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if config.serve.tp == 1:
            # The model runs in the process of the scheduler. In one of its own, the two would wait for each other in
            # busy loops, which take the core that computes.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    flags = _flags(options | _given(config.vllm, "vllm"), negatable=True)
    module = "vllm.entrypoints.openai.api_server" if slot.devices else "vllm_forked"
    return ServerCommand((str(python), "-m", module, *flags), environment)


def _environment(config: RunConfig, slot: ServerSlot) -> dict[str, str]:
    """The variables for both engines: no downloads, no usage reports, and only this server's cores or GPUs."""
    common = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",  # the log is complete even if the server is killed
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",  # import nothing from the current folder
    }
    if slot.devices:
        from clipo_megatron.runtime.platform import VISIBLE_DEVICES

        return common | {VISIBLE_DEVICES: ",".join(slot.devices)}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // config.serve.servers))
    return common | {"OMP_NUM_THREADS": threads}


def _longest(config: RunConfig) -> int:
    """The number of tokens of the longest sequence that the run can ask for."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)


def _given(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The user's options, spelled like our defaults."""
    options = {}
    for key, value in section.items():
        plain = str(key).lstrip("-").replace("-", "_")
        if plain in DECIDED:
            raise ConfigError(f"{name}.{key}: it is decided by {DECIDED[plain]}. Remove it here.")
        options[plain] = value
    return options


def _flags(options: Mapping[str, Any], *, negatable: bool) -> list[str]:
    """Options as words: true becomes a flag, false `--no-flag` if `negatable`, dicts become JSON, None is left out."""
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
