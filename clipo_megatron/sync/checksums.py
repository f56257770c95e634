"""Verifies an update: compares the trainer's checksum of every tensor, cut as a server holds it, with the server's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from clipo_megatron.rollout.servers.server import Fault, LiveServer, RankChecksums, ServerError
from clipo_megatron.runtime.platform import platform
from clipo_megatron.sync.attempt import Attempt
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.export import Bucket, ExportPlan
from clipo_megatron.weights.families import server_tensors
from clipo_megatron.weights.server_layout import CPU_MLP_MULTIPLE, ServerTensor
from clipo_megatron.weights.spec import ModelSpec

_SLICE_BYTES = 8 * 2**20  # how much of a non-contiguous tensor is copied at once

# How servers compute checksums. SGLang on a GPU has a hash of its own (`tile_hash`), SGLang on a CPU pads the MLP; all
# others compute the plain `digest`.
ChecksumKind = Literal["sglang on a gpu", "sglang on a cpu", "plain"]
ServerRank = tuple[int, int]  # a rank of a server, and the server's number of ranks

_EMPTY = hashlib.sha256().hexdigest()[:16]  # the digest of no bytes


class ChecksumError(RuntimeError):
    """A server's tensor differs from the trainer's; the message names the server, the tensor and both checksums."""


class Sums:
    """Checksums of the tensors that this rank sent, added bucket by bucket, for servers of every size.

    Args:
        spec: the model's specification.
        sizes: the different numbers of ranks that servers have.
        kind: how the servers compute checksums.
    """

    def __init__(self, spec: ModelSpec, sizes: Iterable[int], kind: ChecksumKind = "plain"):
        self.sizes = tuple(sizes)
        self.held: dict[ServerRank, dict[str, str]] = {(rank, size): {} for size in self.sizes for rank in range(size)}
        self.optional: set[str] = set()
        self._hash = tile_hash if kind == "sglang on a gpu" else digest
        self._by_source: dict[str, list[ServerTensor]] = {}
        for tensor in server_tensors(spec, mlp_multiple=CPU_MLP_MULTIPLE if kind == "sglang on a cpu" else 1):
            self._by_source.setdefault(tensor.sources[0], []).append(tensor)
            if tensor.optional:
                self.optional.add(tensor.name)

    def add(self, bucket: Bucket, flat: Tensor) -> None:
        """Compute the checksums of all server tensors that a bucket [numel] contributes to.

        Tensors that a server fuses are one parameter in the trainer, so they are in the same bucket.
        """
        tensors = dict(bucket.views(flat))
        for name in tensors:
            for served in self._by_source.get(name, ()):
                sources = [tensors[source] for source in served.sources]
                if served.replicated and self.held:
                    value = self._hash(served.cut(sources, 0, 1))
                    for held in self.held.values():
                        held[served.name] = value
                    continue
                for (rank, size), held in self.held.items():
                    held[served.name] = self._hash(served.cut(sources, rank, size))

    def merged(self, others: Iterable[Sums | None]) -> Sums:
        """Add the checksums of the other senders, which sent other tensors."""
        for other in others:
            for rank, held in other.held.items() if other is not None else ():
                self.held[rank] |= held
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"held": self.held, "optional": self.optional, "sizes": self.sizes}  # sent between ranks


def compare(url: str, ranks: Sequence[RankChecksums], sums: Sums) -> list[str]:
    """Compare a server's checksums with the trainer's.

    Returns:
        A line for each tensor that could not be compared: the trainer cannot tell what it is made of, the server holds
        it in another form, or the server was sent it and does not list it.

    Raises:
        ChecksumError: at least one tensor differs.
    """
    unverified, seen = [], set()
    wrong: list[str] = []
    for rank in ranks:
        mine = sums.held.get((rank.tp_rank, rank.tp_size), {})
        seen |= rank.checksums.keys()
        for name, value in sorted(rank.checksums.items()):
            if name not in mine:
                unverified.append(f"{name} of {url}: the trainer does not know what it is made of")
            elif value == _EMPTY != mine[name]:
                unverified.append(
                    f"{name} of {url}: the server holds it in another form, and its checksum covers no bytes"
                )
            elif value != mine[name]:
                wrong.append(
                    f"{url}, rank {rank.tp_rank} of {rank.tp_size}: {name} has checksum {value}, "
                    f"the trainer's has {mine[name]}"
                )
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ChecksumError(
            f"a server does not hold the weights it was sent: {'; '.join(wrong[:3])}{more}. Look for another process "
            "that updates this server, or for another model or precision in it"
        )
    expected = set().union(*sums.held.values()) - sums.optional if sums.held else set()
    return unverified + [f"{name}: {url} does not name it" for name in sorted(expected - seen)]


def sums_of_shard(shard: Shard, plan: ExportPlan, sizes: Iterable[int], kind: ChecksumKind) -> Sums:
    """The checksums of what this rank sends, as it is now; gathers every bucket, and sends none."""
    sums = Sums(shard.spec, sizes, kind)
    memory = torch.empty(shard.largest(plan), dtype=plan.dtype, device=shard.device)  # reused by every bucket
    for bucket, flat in shard.own_buckets(plan, lambda _: memory):
        sums.add(bucket, flat)
    return sums


def checksum_kind(targets: Sequence[LiveServer]) -> ChecksumKind:
    """How the servers compute checksums, if all run the same engine on the same kind of device as the trainer."""
    if not all(target.state.engine.startswith("SGLang") for target in targets):
        return "plain"
    return "sglang on a gpu" if platform().has_gpu else "sglang on a cpu"


async def held_checksums(attempt: Attempt, target: LiveServer) -> list[RankChecksums] | None:
    """A server's checksums of the weights that it holds; None if it has no such call."""
    try:
        return await target.server.checksums(deadline_s=attempt.deadline())
    except ServerError as error:
        if error.fault is Fault.unsupported:
            return None
        raise


def digest(parts: Sequence[Tensor]) -> str:
    """SGLang's checksum of a tensor on a CPU: the first 8 bytes of the SHA-256 over the parts' bytes, in hex."""
    state = hashlib.sha256()
    for part in parts:
        for piece in _contiguous(part.cpu()):
            state.update(memoryview(piece.view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()[:16]


def _contiguous(part: Tensor) -> Iterable[Tensor]:
    """The part itself, or copies of slices of its rows if it is not contiguous."""
    if part.is_contiguous():
        return [part]
    rows = max(1, _SLICE_BYTES // max(1, part[0].nbytes))
    return (piece.contiguous() for piece in part.split(rows))


_MASK = 0xFFFFFFFF
_TILE = 8192  # words of 4 bytes that are hashed to one number
_AT_ONCE = 128 * _TILE  # words, each of which needs several 8-byte numbers meanwhile


def tile_hash(parts: Sequence[Tensor], seed: int = 0x243F6A88) -> str:
    """SGLang's checksum of a tensor on a GPU, in plain torch on the device of the parts.

    Every 32-bit word is mixed with its index under two seeds; the results are summed within tiles of 8,192 words and
    mixed again; the sum of the tiles' 64-bit numbers is mixed once more (finalisers of MurmurHash3 and SplitMix64).
    It was tested against another program for the same formula, never against a server on a GPU.
    """
    data = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    data = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    if not data.numel():
        return f"{0:016x}"
    seeds = seed & _MASK, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK
    total = 0
    for start in range(0, data.numel(), _AT_ONCE):
        words = data[start : start + _AT_ONCE].to(torch.int64) & _MASK
        index = torch.arange(start, start + words.numel(), device=words.device)
        halves = []
        for first, factor, turn in ((seeds[0], 0x27D4EB2D, 15), (seeds[1], 0x165667B1, 13)):
            salt = ((index * factor + first) & _MASK) ^ ((index << turn | index >> (32 - turn)) & _MASK)
            mixed = torch.nn.functional.pad(_mix32(words ^ salt), (0, -words.numel() % _TILE))
            halves.append(_mix32((mixed.view(-1, _TILE).sum(dim=1) & _MASK) ^ (4 * data.numel() & _MASK)))
        total += sum(high << 32 | low for high, low in zip(*(half.tolist() for half in halves), strict=True))
    return f"{_mix64(total & (1 << 64) - 1):016x}"


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser, on int64 that holds 32 unsigned bits."""
    x = x ^ x >> 16
    x = _times(x, 0x85EBCA6B)
    x = x ^ x >> 13
    x = _times(x, 0xC2B2AE35)
    return x ^ x >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """The product modulo 2^32, without overflow of int64."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def _mix64(x: int) -> int:
    mask = (1 << 64) - 1
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & mask
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & mask
    return x ^ x >> 31
