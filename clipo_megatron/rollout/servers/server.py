"""What the pool and the weight sync ask of one server, whatever engine it runs.

Calls are coroutines of one event loop. Each has a deadline; each failure is a `ServerError` that names the server, what
was asked of it, and what came instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.engine import EngineError, InFlight, Memory, Request, SamplingParams


class Fault(str, Enum):
    """What went wrong with a call."""

    refused = "refused"  # no connection, or it broke off
    deadline = "deadline"  # no answer in time
    status = "status"  # an answer that says no
    garbage = "garbage"  # an answer that cannot be what was asked for
    stale = "stale"  # an answer under weights other than those it should have
    aborted = "aborted"  # the request was interrupted on the server
    unsupported = "unsupported"  # this engine cannot do it


class ServerError(EngineError):
    """One call to one server failed; `status` is the HTTP status where the fault is `status`, else 0."""

    def __init__(self, url: str, fault: Fault, message: str, status: int = 0):
        super().__init__(f"{url}: {message}")
        self.url, self.fault, self.status = url, fault, status


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server says of itself."""

    model: str  # folder it was started with
    tp: int  # ranks that hold its weights
    version: int | None  # of its weights; None: those it was started with, or it cannot tell
    boot: str  # differs after a restart; "" where the server cannot tell
    engine: str  # name and release, for people


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """A process group of one sender (rank 0) and the ranks of all servers, for weights."""

    name: str
    host: str
    port: int
    world: int
    backend: str


@dataclass(frozen=True, slots=True)
class BucketNames:
    """The tensors of a flat bucket, in order: Hugging Face names, dtypes as torch spells them ("bfloat16"), shapes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class RankChecksums:
    """Checksums of the tensors that one rank of a server holds, by the server's own parameter names."""

    tp_rank: int
    tp_size: int
    checksums: dict[str, str] = field(repr=False)


def sample_id(name: str, sample: int) -> str:
    """What identifies one sample of a call on its server."""
    return f"{name}-{sample}"


class Server(Protocol):
    """One server's client. An engine that lacks a call raises `ServerError` with `Fault.unsupported`."""

    url: str
    keeps_unfinished: bool  # whether an aborted request returns the tokens it has

    async def state(self, *, deadline_s: float) -> ServerState:
        """What it is; also says that it answers."""
        ...

    async def health(self, *, deadline_s: float) -> None:
        """Return when it can generate."""
        ...

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """All rollouts of one request, in order of sample.

        `begun` rollouts that are finished are returned as they are; aborted ones go on from their tokens. `version`
        is that of the weights it should have, newer ones are no error here; `sample_id(name, sample)` identifies a
        sample for `abort`. After an abort, rollouts of finish "abort" are among the result, those without a token left
        out.
        """
        ...

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        """End the generation of the samples with the given ids (`sample_id`), or all of it; their calls return."""
        ...

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        """Generate nothing until `resume`."""
        ...

    async def resume(self, *, deadline_s: float) -> None:
        """Go on."""
        ...

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back."""
        ...

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take it again."""
        ...

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        """Become ranks rank_offset .. rank_offset + tp - 1; returns when all members have met."""
        ...

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        """Forget the group."""
        ...

    async def begin_update(self, *, deadline_s: float) -> None:
        """Before the first bucket. Does nothing on a release that has no such call."""
        ...

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        """Take one flat bucket that the group's rank 0 broadcasts as bytes; returns when it is loaded.

        `last`: no other bucket of this update follows, so the server may let go of what it has computed with the
        weights before. A server that cannot do so yet is not at fault: `end_update` sees to it.
        """
        ...

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        """Take tensors from the memory of another process on its GPUs; one payload a rank of the server.

        `last` is as in `receive_bucket`.
        """
        ...

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """After the last bucket: caches are empty, and answers carry the version."""
        ...

    async def load_folder(self, folder: str, version: int, *, deadline_s: float) -> None:
        """Read all weights from safetensors."""
        ...

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of the weights as they are in its memory, a rank each."""
        ...

    async def close(self) -> None:
        """Close the client's connections; the server goes on."""
        ...
