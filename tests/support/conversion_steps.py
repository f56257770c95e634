"""Helpers of conversion tests: folders with awkward files, conversions, and comparisons of folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from paths import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_qwen2, tiny_qwen3_moe

from clipo_megatron.conversion.running import convert
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.weights.parallel_division import ParallelDivision

MODELS = {
    "llama tied": lambda path: tiny_llama(path, tied=True, vocab=263, heads=8, kv_heads=2, head_dim=24),
    "qwen2 untied, biases": lambda path: tiny_qwen2(path, tied=False, vocab=263),
    "experts": lambda path: tiny_qwen3_moe(path, dense_layers=(1,), experts=4),
}


def import_model(source: Path, target: Path, *, dtype: torch.dtype | None = None, **division: int) -> Path:
    """Convert a Hugging Face folder into a checkpoint, in this process."""
    convert(ToMegatron(source, target, division=ParallelDivision(**division), dtype=dtype))
    return target


def export_model(source: Path, target: Path, **options: object) -> Path:
    """Convert a checkpoint into a Hugging Face folder, in this process."""
    convert(ToHF(source, target, **options))
    return target


def shard_as_released(folder: Path, files: int = 3) -> Path:
    """Divide a folder's weights over files whose headers are unlike ours: other order, other metadata, padding."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    places: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = {name: tensors[name] for name in names[number::files]}
        save_file(mine, folder / file, metadata={"format": "pt", "made-by": f"a test, {number}"})
        _rewrite_header(folder / file)
        places |= dict.fromkeys(mine, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places, "metadata": {"total_size": size}}, separators=(", ", ":  "))
    )
    return folder


def _rewrite_header(file: Path) -> None:
    """Give a file a header with other spaces and another order of tensors."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    text = json.dumps(dict(reversed(entries.items())), indent=1).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder's safetensors with the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                assert name not in found, f"{name} is in two files"
                found[name] = opened.get_tensor(name)
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bitwise equal in both."""
    assert a, "nothing to compare"
    names = sorted(set(a) | set(b))
    return [name for name in names if name not in a or name not in b or not same_bits(a[name], b[name])]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors have equal dtype, shape and bytes."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def start(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `clipo convert ...` in a process of its own."""
    command = [sys.executable, *launcher, "-m", "clipo_megatron.cli", "convert", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def ended(process: subprocess.Popen[str], *, timeout_s: float = 120.0) -> tuple[int, str]:
    """Wait for a process and return its exit code and output; kill it and its children if it takes too long."""
    try:
        output, _ = process.communicate()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s:\n{output}") from None
    return process.returncode, output
