"""The calls that the pool and the weight sync make to one server, whatever engine it runs.

All calls are coroutines on one event loop. Each has a deadline, and fails with a `ServerError` that names the server,
the call and what went wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.engine import EngineError, InFlight, Memory, Request, SamplingParams


class Fault(str, Enum):
    """How a call failed."""

    refused = "refused"  # no connection, or it broke
    deadline = "deadline"  # no answer in time
    status = "status"  # an HTTP status other than 200, or an answer that reports failure
    garbage = "garbage"  # an answer that cannot be what was asked for
    stale = "stale"  # an answer produced by other weights than expected
    aborted = "aborted"  # the request was interrupted on the server
    unsupported = "unsupported"  # this engine has no such call


class ServerError(EngineError):
    """A call to a server failed. `status` is its HTTP status if that is the fault, else 0."""

    def __init__(self, url: str, fault: Fault, message: str, status: int = 0):
        super().__init__(f"{url}: {message}")
        self.url, self.fault, self.status = url, fault, status


@dataclass(frozen=True, slots=True)
class ServerState:
    """A server's description of itself."""

    model: str  # the model folder that it was started with
    tp: int  # number of tensor-parallel ranks
    version: int | None  # version of its weights; None if no trainer has updated them or it cannot tell
    boot: str  # changes with a restart; "" if the server cannot tell
    engine: str  # name and release, such as "SGLang 0.5.10"
    pp: int = 1  # number of pipeline stages


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that answered, and what it answered."""

    server: Server
    state: ServerState
    gpus: tuple[str, ...] = ()  # the UUIDs of its ranks' GPUs, in order; (): it has none, or nobody has named them
    collectives: str = ""  # release of the library that connects its GPUs; "": it has none, or nobody has named it

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def life(self) -> tuple[str, str, int]:
        """Identifies this start of the server: it changes with a restart, if the server can tell."""
        return self.url, self.state.boot, self.state.tp


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """The process group through which one sender (rank 0) gives all ranks of all servers its weights."""

    name: str
    host: str
    port: int
    world: int
    backend: str


@dataclass(frozen=True, slots=True)
class BucketNames:
    """The tensors of a flat bucket, in order."""

    names: tuple[str, ...]  # Hugging Face names
    dtypes: tuple[str, ...]  # without "torch.": "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int = 0  # of all of them


@dataclass(frozen=True, slots=True)
class RankChecksums:
    """Checksums of the tensors that one rank of a server holds, by the server's parameter names."""

    tp_rank: int
    tp_size: int
    checksums: dict[str, str] = field(repr=False)


def sample_id(name: str, sample: int) -> str:
    """The id under which a server knows one sample of a call."""
    return f"{name}-{sample}"


class Server(Protocol):
    """The client of one server. A call that the engine lacks raises `ServerError` with `Fault.unsupported`."""

    url: str

    async def state(self, *, deadline_s: float) -> ServerState:
        """Ask the server for its model, size and version."""
        ...

    async def health(self, *, deadline_s: float) -> None:
        """Return if the server can generate."""
        ...

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """Return all rollouts of one request, in order of sample.

        Partial rollouts of the request continue from their tokens; finished ones are returned as they are. Tokens of
        weights older than `version` are an error, newer ones are not. `abort` knows a sample as
        `sample_id(name, sample)`. After an abort the rollouts that were interrupted have the finish "abort"; those
        without a token are left out.
        """
        ...

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        """End the generation of the samples with these ids, or of all samples. Their `generate` calls then return.

        Ids that the server does not know are no error.
        """
        ...

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        """Stop generating until `resume`; under `abort` it returns when nothing is in flight."""
        ...

    async def resume(self, *, deadline_s: float) -> None:
        """Generate again after `pause`."""
        ...

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back while nothing is in flight."""
        ...

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take offloaded memory back; its contents are undefined."""
        ...

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        """Join as ranks rank_offset .. rank_offset + tp - 1; returns when all members have joined."""
        ...

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        """Destroy the server's side of the group."""
        ...

    async def keep_tensors(self, *, deadline_s: float) -> None:
        """Keep all tensors of the updates that follow, so that later ones can consist of changes (weights/delta.py)."""
        ...

    async def begin_update(self, *, changes: bool = False, deadline_s: float) -> None:
        """Announce the first bucket, or that of changes. Does nothing on a release without such a call."""
        ...

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        """Receive one flat bucket that the group's rank 0 broadcasts as bytes; returns when it is loaded.

        `last` says that no further bucket of this update follows, so the server may empty its prefix cache. If it
        cannot do so yet, `end_update` does.
        """
        ...

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        """Copy a bucket out of another process's memory on the same GPUs; one payload for each rank of the server."""
        ...

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """Empty the prefix cache and set the version that answers carry from now on."""
        ...

    async def load_folder(self, folder: str, version: int, *, changes: bool = False, deadline_s: float) -> None:
        """Load all weights, or changes of them, from the safetensors in a folder, and set their version."""
        ...

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Compute checksums of the weights in the server's memory, for each of its ranks."""
        ...

    async def close(self) -> None:
        """Close the client's connections; the server keeps running."""
        ...
