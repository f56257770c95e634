"""The sections `rollout` and `serve`: what generates rollouts, how, and the servers that `clipo serve` starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema.model import DType

MOST_TOP_K = 1024


class EngineKind(str, Enum):
    local = "local"  # transformers, inside the training processes
    sglang = "sglang"  # servers, of `clipo serve` or others
    vllm = "vllm"  # servers, of `clipo serve` or others


class Transport(str, Enum):
    in_process = "in_process"  # local engine: from memory to memory
    broadcast = "broadcast"  # over process groups of trainer ranks and servers
    ipc = "ipc"  # servers on the trainer's own GPUs open its memory
    disk = "disk"  # safetensors in a folder that trainer and servers share


class Unfinished(str, Enum):
    drop = "drop"  # aborted and forgotten
    resume = "resume"  # aborted; the next step goes on from their tokens
    keep_running = "keep_running"  # continued while the policy trains, with its new weights after the weight sync


@dataclass
class PoolConfig:
    """How each data-parallel replica asks the servers."""

    # requests in flight of a replica, over all servers; a request is a prompt's group
    concurrency: int = within(64, 1, 100_000)
    request_deadline_s: float = within(900.0, above=0)  # seconds for one request to one server
    attempts: int = within(4, 1)  # servers asked for one request before generation fails
    backoff_s: float = within(0.5, 0)  # seconds before the second attempt; doubles with each further one
    affinity_slack: int = within(4, 0)  # requests by which a prompt's own server may be busier than the idlest
    join_deadline_s: float = within(900.0, above=0)  # seconds to wait for a server when none is ready


@dataclass
class SyncConfig:
    """How new weights reach the engine."""

    # null: in_process for local, broadcast for sglang, ipc if it is colocated, disk for vllm
    transport: Optional[Transport] = None
    deadline_s: float = within(300.0, above=0)  # seconds for one weight sync of all servers; a late one is left out
    bucket_mb: int = within(64, 1)  # MiB of tensors sent together; two such buckets are held
    verify_every: int = within(1, 0)  # weight syncs between two comparisons of checksums; 0: never
    delta: bool = False  # transports broadcast and disk: send only what changed since the last weight sync
    folder: Optional[str] = None  # transport disk: where a run makes its folder of weights; null: train.output/weights
    host: str = "127.0.0.1"  # transport broadcast: the trainer's address as servers reach it


@dataclass
class RolloutConfig:
    engine: EngineKind = EngineKind.local  # what generates
    endpoints: list[str] = field(default_factory=list)  # URLs of servers that others run; []: those of `clipo serve`
    servers: int = within(1, 1)  # servers of `clipo serve` to wait for before the first step
    router: Optional[str] = None  # URL of a router in front of the servers, which gets the requests but no weights
    api_key_env: str = "CLIPO_API_KEY"  # environment variable with the servers' key; needed beyond this machine
    pool: PoolConfig = field(default_factory=PoolConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    colocated: bool = False  # servers and trainer share GPUs and take turns
    # prompts asked for / prompts needed, of each replica; the step takes the groups that finish first
    over_sampling: float = within(1.0, 1, because="it is prompts asked for over prompts needed; 1.2 to 2 are usual")
    unfinished: Unfinished = Unfinished.drop  # what becomes of the rollouts that a step does not wait for
    # steps whose rollouts are generated while earlier ones train; no token trains more than so many updates later
    ahead: int = within(0, 0, 64)
    # times per step that zero-advantage groups (all right or all wrong) are replaced; null: the method's own
    max_refill_rounds: Optional[int] = within(None, 0)
    samples_per_prompt: int = within(8, 1)  # rollouts of a group, G
    max_new_tokens: int = within(1024, 1)  # longest response, in tokens
    # tokens that end a response, beside those that the model's files name; null: these must end a turn of the template
    stop_tokens: Optional[list[str]] = None
    window_tokens: Optional[int] = within(None, 1)  # most tokens a step adds to a rollout; null: whole responses
    temperature: float = within(1.0, above=0)  # sampling temperature, also of the trainer's log-probs
    top_p: float = within(1.0, above=0, most=1, because="it is a share of the probability mass")  # 1: off
    # likeliest tokens to draw from; 0: all, and with top_p 64. Those kept travel with each token
    top_k: int = within(0, 0, MOST_TOP_K)
    batch_size: int = within(64, 1)  # local engine: sequences decoded at once
    dtype: Optional[DType] = None  # local engine: dtype of its weights; null: model.dtype
    deadline_s: float = within(1800.0, above=0)  # seconds for a step's rollouts, all refill rounds together


@dataclass
class ServeConfig:
    """What `clipo serve` starts. Further options of the server itself go into the sections `sglang` and `vllm`."""

    servers: int = within(1, 1)  # servers on this machine
    python: Optional[str] = None  # interpreter with the engine; null: this one, or an environment that is set up once
    host: str = "127.0.0.1"  # address to listen on; others than this machine's need the key of rollout.api_key_env
    # port of the first server, the next ones follow; 0: free ones
    port: int = within(0, 0, 65535)
    tp: int = within(1, 1)  # GPUs of one server
    dtype: Optional[DType] = None  # dtype of the servers' weights; null: model.dtype
    startup_timeout_s: float = within(900.0, above=0)  # seconds until a server must answer
    health_timeout_s: float = within(60.0, above=0)  # seconds without an answer after which a server is restarted
    max_restarts: int = within(5, 0)  # failed starts in a row before `clipo serve` gives up
