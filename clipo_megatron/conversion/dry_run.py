"""`clipo convert ... --dry-run`: what a conversion would write and how long that would take, without writing it.

For `to-megatron` a config.json without weights is enough: the tensors are then those of its architecture, in the dtype
that it names. The expected time follows from a short measurement of how fast the source can be read, if it is there,
and the target's disk written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipo_megatron.conversion.conversion import Conversion
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.header import StoredTensor, kind_of
from clipo_megatron.weights.formats.reader import INDEX, SINGLE
from clipo_megatron.weights.mapping import PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec, read_config

_PROBE_BYTES = 64 * 1024**2  # read, and written, to measure the rates
_PROBE_S = 3.0  # longest measurement of one rate
_SHOWN_FILES = 12
_BLOCK = 4 * 1024**2


class ConfigOnlyReader:
    """Takes the place of a reader where there are no weights: the architecture's tensors, all of one dtype."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        whole = PipelineStage(0, spec.num_layers, first=True, last=True)
        self._stored = {
            tensor.name: StoredTensor(kind_of(dtype), tensor.shape, 0)
            for entry in entries(spec, whole)
            if not entry.copy
            for tensor in entry.hf
        }

    def stored(self, name: str) -> StoredTensor:
        """Return dtype and shape of a tensor."""
        return self._stored[name]

    def close(self) -> None:
        """Do nothing, because no file is open."""


class ConfigOnlyConversion(ToMegatron):
    """The conversion of a folder without weights, which can be planned but not done."""

    def __init__(self, source: Path, target: Path, *, division: ParallelDivision, dtype: torch.dtype | None) -> None:
        config = read_config(source)
        self.source, self.target, self.dtype, self.division = source, target, dtype, division
        self.spec = model_spec(config)
        named = config.get("dtype") or config.get("torch_dtype") or "float32"
        stored = getattr(torch, str(named).removeprefix("torch."), None)
        if not isinstance(stored, torch.dtype):
            raise UnsupportedModel("torch_dtype", named, "torch has no such dtype")
        self.named = f"{str(stored).removeprefix('torch.')}, as config.json says"
        self.reader = ConfigOnlyReader(self.spec, stored)  # type: ignore[assignment]
        self.units = tuple(self._divide())
        self.sidecar_files = {}


def has_weights(folder: Path) -> bool:
    """Tell whether a Hugging Face folder holds weights."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, as measured."""

    read: float | None  # None: the source has no weights to read
    write: float

    def seconds(self, nbytes: int) -> float:
        """Return the seconds to read and write `nbytes` one after the other: it may be the same disk."""
        return nbytes / self.write + (nbytes / self.read if self.read else 0.0)


def run(conversion: Conversion, console: Console | None = None) -> int:
    """Print what a conversion would do; return the exit code, 1 if the disk has no room for the result."""
    console = console or Console(highlight=False)
    try:
        files = conversion.files()
        place = _existing(conversion.target)
        rates = measure(_source_files(conversion), place)
        free = shutil.disk_usage(place).free
        _show(conversion, files, rates, free, console)
    finally:
        conversion.close()
    return 0 if sum(files.values()) <= free else 1


def measure(sources: Sequence[Path], place: Path) -> Rates:
    """Read the start of the largest source file, and write as much to a temporary file in `place`."""
    read = None
    if sources:
        with max(sources, key=lambda path: path.stat().st_size).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, _PROBE_BYTES, os.POSIX_FADV_DONTNEED)  # from the disk, if it is there
            start, done = time.monotonic(), 0
            while done < _PROBE_BYTES and time.monotonic() - start < _PROBE_S and (block := file.read(_BLOCK)):
                done += len(block)
            read = done / max(time.monotonic() - start, 1e-6) if done else None
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=place) as file:
        start, done = time.monotonic(), 0
        while done < _PROBE_BYTES and time.monotonic() - start < _PROBE_S:
            file.write(block)
            done += len(block)
        file.flush()
        os.fsync(file.fileno())
        return Rates(read, done / max(time.monotonic() - start, 1e-6))


def _show(conversion: Conversion, files: dict[str, int], rates: Rates, free: int, console: Console) -> None:
    total = sum(files.values())
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("from", str(conversion.source)),
        ("to", str(conversion.target)),
        ("architecture", architecture(conversion.spec)),
        *_division(conversion),
        ("files", f"{len(files):,}, largest {_size(max(files.values()))}"),
        ("bytes", f"{total:,} ({_size(total)}) of weights"),
        ("free disk", f"{_size(free)}{'' if total <= free else ': NOT enough'}"),
        ("expected", _expected(conversion, rates, total)),
    ):
        facts.add_row(name, Text(value))
    console.print(facts)
    console.print()
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, nbytes in list(files.items())[:_SHOWN_FILES]:
        table.add_row(Text(name), f"{nbytes:,}")
    if len(files) > _SHOWN_FILES:
        rest = list(files.values())[_SHOWN_FILES:]
        table.add_row(f"and {len(rest):,} more", f"{sum(rest):,}")
    console.print(table)
    console.print("\nNothing was written.")


def architecture(spec: ModelSpec) -> str:
    """Describe a model in one line."""
    words = [
        spec.family,
        f"{spec.num_layers} layers",
        f"hidden {spec.hidden_size}",
        f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads of {spec.head_dim}",
        f"vocabulary {spec.vocab_size:,}{' (tied)' if spec.tied_embeddings else ''}",
    ]
    if spec.experts is None:
        words.append(f"MLP {spec.ffn_hidden_size}")
    else:
        words.append(
            f"{spec.experts.count} experts of {spec.experts.ffn_hidden_size}, {spec.experts.per_token} a token"
        )
    if spec.sliding_window:
        words.append(f"window {spec.sliding_window}")
    if spec.rope_scaling is not None:
        words.append(f"rope theta {spec.rope_theta:g}, {spec.rope_scaling}")
    return ", ".join(words)


def _division(conversion: Conversion) -> list[tuple[str, str]]:
    if not isinstance(conversion, ToMegatron):
        return [("dtype", _dtype(conversion.dtype, "as in the checkpoint"))]
    division, spec = conversion.division, conversion.spec
    chunks = division.stages(spec.num_layers)
    layers = [sum(chunk.layers for chunk in chunks[rank :: division.pp]) for rank in range(division.pp)]
    words = f"TP {division.tp} x PP {division.pp}"
    if division.vpp > 1:
        words += f" of {division.vpp} chunks"
    if spec.experts is not None:
        words += f", experts over EP {division.ep} x ETP {division.expert_tp}"
    spread = f"{layers[0]} each" if len(set(layers)) == 1 else ", ".join(map(str, layers))
    return [
        ("division", f"{words}; layers of the pipeline ranks: {spread}"),
        ("padding", padding(spec, division)),
        (
            "dtype",
            _dtype(
                conversion.dtype,
                conversion.named if isinstance(conversion, ConfigOnlyConversion) else "as in the source",
            ),
        ),
    ]


def padding(spec: ModelSpec, division: ParallelDivision) -> str:
    """Say how many rows pad the vocabulary in the checkpoint, so that the TP ranks have equal shares."""
    rows = -spec.vocab_size % division.tp
    if not rows:
        return "none"
    tables = 1 if spec.tied_embeddings else 2
    held = "the embedding" if tables == 1 else "embedding and output layer each"
    return f"{rows} rows of zeros: {held} {spec.vocab_size + rows:,} rows, {division.tp} equal shares"


def _expected(conversion: Conversion, rates: Rates, total: int) -> str:
    measured = f"writing {_size(rates.write)}/s"
    if rates.read is not None:
        measured = f"reading {_size(rates.read)}/s, {measured}"
    else:
        measured += "; reading is not counted, the weights are not here"
    return f"about {_time(rates.seconds(total))}, one process (measured on this machine just now: {measured})"


def _source_files(conversion: Conversion) -> list[Path]:
    if isinstance(conversion, ConfigOnlyConversion):
        return []
    if isinstance(conversion, ToHF):
        return sorted(conversion.policy.glob("*.distcp"))
    return sorted(conversion.source.glob("*.safetensors"))


def _existing(path: Path) -> Path:
    """Return the nearest parent folder that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _dtype(dtype: torch.dtype | None, otherwise: str) -> str:
    return otherwise if dtype is None else str(dtype).removeprefix("torch.")


def _size(nbytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:,.0f} bytes"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
