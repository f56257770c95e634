"""Compares two folders of weights, A and B, tensor by tensor under their Hugging Face names.

Each tensor of each side is read once and hashed; one tensor of each side is in memory at a time. Tensors that differ
are read again to say by how much, and looked for under other names, so that swapped tensors are recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER

# Number of elements that are compared at a time when two tensors are known to differ.
_RUN = 1 << 24


class Weights(Protocol):
    """One side: a reader of Hugging Face tensors by name."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        ...

    def get(self, name: str) -> Tensor:
        """Read a whole tensor into memory."""
        ...


class DifferenceKind(Enum):
    """A way in which a tensor can differ."""

    ONLY_A = "only in A"
    ONLY_B = "only in B"
    DTYPE = "dtype"
    SHAPE = "shape"
    VALUES = "values"
    DAMAGED = "cannot be read"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The hash of a tensor, after the cast if there was one."""

    sha256: str  # of its bytes, row-major
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored_dtype: torch.dtype = field(compare=False)  # before the cast
    stored_bytes: int = field(compare=False)  # before the cast

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)} {self.sha256[:12]}"


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same on both sides."""

    name: str
    kind: DifferenceKind
    a: Fingerprint | None
    b: Fingerprint | None
    detail: str  # a sentence for people

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(slots=True)
class SideTotals:
    """How many tensors and bytes one side has, and of which dtypes."""

    tensors: int = 0
    nbytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, found: Fingerprint) -> None:
        """Add one tensor to the totals."""
        self.tensors += 1
        self.nbytes += found.stored_bytes
        self.dtypes[str(found.stored_dtype).removeprefix("torch.")] += 1


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """What `compare` finds about A and B."""

    a: SideTotals
    b: SideTotals
    equal: int  # number of tensors with the same bytes, dtype and shape on both sides
    differences: tuple[Difference, ...]


def compare(
    a: Weights,
    b: Weights,
    *,
    tied: bool = False,
    cast: torch.dtype | None = None,
    details: int = 50,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TensorComparison:
    """Compare every tensor of either side.

    Args:
        a: one side, used by one thread at a time.
        b: the other side, likewise.
        tied: whether the model's output layer is its embedding, which then stands for a missing output layer.
        cast: dtype to which both sides are cast before they are compared; None: the bytes as they are.
        details: how many of the tensors that differ in value are read again to say how they differ.
        progress: called after each tensor with the number of tensors done and in all.
    """
    names_a, names_b = set(a.names()), set(b.names())
    names = sorted(names_a | names_b, key=_in_model_order)
    sides, equal = (SideTotals(), SideTotals()), 0
    found: list[tuple[str, _Lookup, _Lookup]] = []
    with ThreadPoolExecutor(1, "A") as left, ThreadPoolExecutor(1, "B") as right:
        for done, name in enumerate(names, start=1):
            futures = (
                left.submit(_fingerprint_of, a, names_a, name, tied, cast),
                right.submit(_fingerprint_of, b, names_b, name, tied, cast),
            )
            pair = futures[0].result(), futures[1].result()
            for side, own, one in zip(sides, (names_a, names_b), pair, strict=True):
                if isinstance(one, Fingerprint) and name in own:
                    side.add(one)
            found.append((name, *pair))
            equal += pair[0] == pair[1] and isinstance(pair[0], Fingerprint)
            progress(done, len(names))
    elsewhere = {one.sha256: name for name, one, _ in reversed(found) if isinstance(one, Fingerprint)}
    differences: list[Difference] = []
    for name, one, other in found:
        if one == other and isinstance(one, Fingerprint):
            continue
        explain = sum(each.kind is DifferenceKind.VALUES for each in differences) < details
        differences.append(_difference(name, one, other, elsewhere, (a, b, cast) if explain else None))
    return TensorComparison(*sides, equal=equal, differences=tuple(differences))


_Lookup = Fingerprint | WeightsError | None


def _fingerprint_of(side: Weights, names: set[str], name: str, tied: bool, cast: torch.dtype | None) -> _Lookup:
    """Hash a tensor of one side; None if the side lacks it, an error if it cannot be read."""
    if name not in names:
        if not (tied and name == OUTPUT_LAYER and EMBEDDING in names):
            return None
        name = EMBEDDING
    try:
        return fingerprint(side.get(name), cast)
    except WeightsError as error:
        return error


def fingerprint(tensor: Tensor, cast: torch.dtype | None = None) -> Fingerprint:
    """Hash a tensor's bytes, after a cast if there is one."""
    stored_dtype, stored_bytes = tensor.dtype, tensor.nbytes
    if cast is not None:
        tensor = tensor.to(cast)
    # as bytes, because numpy does not have every dtype
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return Fingerprint(
        hashlib.sha256(flat.numpy()).hexdigest(), tensor.dtype, tuple(tensor.shape), stored_dtype, stored_bytes
    )


def _difference(
    name: str,
    one: _Lookup,
    other: _Lookup,
    elsewhere: dict[str, str],
    again: tuple[Weights, Weights, torch.dtype | None] | None,
) -> Difference:
    a, b = (each if isinstance(each, Fingerprint) else None for each in (one, other))
    for side, each in (("A", one), ("B", other)):
        if isinstance(each, WeightsError):
            return Difference(name, DifferenceKind.DAMAGED, a, b, f"{side}'s cannot be read: {each}")
    if b is None:
        return Difference(name, DifferenceKind.ONLY_A, a, b, "only A has it")
    if a is None:
        return Difference(name, DifferenceKind.ONLY_B, a, b, f"only B has it{_known_as(elsewhere.get(b.sha256), name)}")
    if a.shape != b.shape:
        return Difference(name, DifferenceKind.SHAPE, a, b, f"A's shape is {list(a.shape)}, B's is {list(b.shape)}")
    if a.dtype != b.dtype:
        names = [str(each.dtype).removeprefix("torch.") for each in (a, b)]
        return Difference(name, DifferenceKind.DTYPE, a, b, f"A's dtype is {names[0]}, B's is {names[1]}")
    detail = "the values differ" if again is None else _value_difference(name, *again)
    return Difference(name, DifferenceKind.VALUES, a, b, detail + _known_as(elsewhere.get(b.sha256), name))


def _known_as(other: str | None, name: str) -> str:
    return f"; B's holds what A has as {other}" if other not in (None, name) else ""


def _value_difference(name: str, a: Weights, b: Weights, cast: torch.dtype | None) -> str:
    """Say how many elements of a tensor differ and by how much."""
    left, right = (_whole(side, name, cast).flatten() for side in (a, b))
    count, largest, zero, finite = 0, 0.0, True, True
    for start in range(0, left.numel(), _RUN):
        run_a, run_b = (each[start : start + _RUN] for each in (left, right))
        unequal = run_a != run_b
        count += int(unequal.sum())
        if bool(unequal.any()):
            largest = max(largest, float((run_a.double() - run_b.double()).abs().max()))
        zero &= not bool(run_b.any())
        finite &= bool(run_b.isfinite().all())
    if not count:
        return "the values are equal and their bytes are not (a zero's sign, or NaN)"
    if not finite:
        return f"{count:,} of {left.numel():,} values differ; B's are not finite everywhere"
    all_zero = "; B's are all zero" if zero else ""
    return f"{count:,} of {left.numel():,} values differ, by {largest:.3g} at most{all_zero}"


def _whole(side: Weights, name: str, cast: torch.dtype | None) -> Tensor:
    tensor = side.get(name if name in side.names() else EMBEDDING)
    return tensor if cast is None else tensor.to(cast)


def _in_model_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort layer 10 after layer 9."""
    return tuple(_pieces(name))


def _pieces(name: str) -> Iterator[tuple[int, int | str]]:
    for piece in re.split(r"(\d+)", name):
        yield (0, int(piece)) if piece.isdigit() else (1, piece)
