"""Measures the time and memory of conversions, next to `cp` of the same bytes in the same run.

    python tools/bench_convert.py --gb 3 --shard-gb 0.5 [--tp 2 --pp 2] [--folder DIR]

Writes a random Llama in bf16 below a temporary folder, which is removed at the end. Each direction runs in a process of
its own, whose peak memory (VmHWM) is shown; `cp -r` of the source, and `sync` of the copies, run before and after each.
All files are in the page cache when they are read, and on disk when a time is taken, for `cp` as for conversions. A
pause precedes each measurement: a virtual machine returns freed memory to its host after a while, and writing is much
slower until it has it back, so whatever writes right after files were removed would win.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.safetensors import as_bytes, build
from clipo_megatron.weights.mapping import PipelineStage

PAUSE_S = 5.0
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 2048, 16, 4, 5632, 64_003
_CHILD = """
import re, sys, time
from clipo_megatron.cli import main as cli
from clipo_megatron.conversion import running, to_hf, to_megatron
time.sleep(float(sys.argv.pop(1)))
began = time.monotonic()
code = cli.main(sys.argv[1:])
took = time.monotonic() - began
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)
print("MEASURED", code, took, int(peak) * 1024)
"""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="of the model")
    parser.add_argument("--shard-gb", type=float, default=0.5, help="of one file of it")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tp", default="1")
    parser.add_argument("--pp", default="1")
    parser.add_argument("--threads", default="3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Convert in both directions, `repeats` times, each between two copies."""
    source = folder / "source"
    nbytes = write_model(source, options.gb * 1e9, options.shard_gb * 1e9)
    layout = ["--tp", options.tp, "--pp", options.pp]
    directions = {
        "to-megatron": ["to-megatron", source, folder / "checkpoint", *layout],
        "to-hf": ["to-hf", folder / "checkpoint", folder / "release"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in directions}
    peaks: dict[str, list[int]] = {name: [] for name in directions}
    copies: list[float] = []
    loads: list[float] = []
    for _ in range(options.repeats):
        loads.append(os.getloadavg()[0])
        copies.append(copy(source, folder / "copy"))
        for name, arguments in directions.items():
            took, peak = convert([*map(str, arguments), "--threads", options.threads])
            seconds[name].append(took)
            peaks[name].append(peak)
            copies.append(copy(source, folder / "copy"))
        same = subprocess.run(["diff", "-r", source, folder / "release"], capture_output=True, check=False)
        assert same.returncode == 0, same.stdout
        shutil.rmtree(folder / "checkpoint")
        shutil.rmtree(folder / "release")
    rate = nbytes / 1e6
    plain = statistics.median(copies)
    print(
        f"{nbytes / 1e9:.2f} GB in files of {options.shard_gb} GB, load before: {', '.join(f'{x:.1f}' for x in loads)}"
    )
    print("| | s | MB/s | of cp | peak RSS, GB |")
    print("|---|---|---|---|---|")
    print(f"| cp -r, sync | {plain:.2f} | {rate / plain:.0f} | | |")
    for name in directions:
        took = statistics.median(seconds[name])
        print(f"| {name} | {took:.2f} | {rate / took:.0f} | {plain / took:.0%} | {max(peaks[name]) / 1e9:.2f} |")
    print("all:", json.dumps({"cp": copies, **seconds}, default=lambda x: round(x, 2)))


def write_model(folder: Path, nbytes: float, shard: float) -> int:
    """Write a random Llama in shards and return the bytes of its tensors."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    layer = 2 * HIDDEN * (HIDDEN * (2 + 2 * KV_HEADS / HEADS) + 3 * INTERMEDIATE)
    config["num_hidden_layers"] = round((nbytes - 4 * VOCABULARY * HIDDEN) / layer)
    (folder / "config.json").write_text(json.dumps(config))
    spec = model_spec(config)
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for entry in entries(spec, PipelineStage(0, spec.num_layers, first=True, last=True)):
        for tensor in entry.hf:
            size = 2 * torch.Size(tensor.shape).numel()
            if shards[-1] and filled + size > shard:
                shards.append([])
                filled = 0
            shards[-1].append((tensor.name, torch.bfloat16, tensor.shape))
            filled += size
            total += size
    places = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header = build(tensors)
        with (folder / name).open("wb") as file:
            file.write(header.bytes)
            for stored in header.tensors.values():
                file.write(as_bytes(torch.randint(-(2**15), 2**15, stored.shape, dtype=torch.int16)))
            os.fsync(file.fileno())
        places |= dict.fromkeys(header.tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def copy(source: Path, target: Path) -> float:
    """Return the seconds of `cp -r` and of `sync` of what it wrote."""
    time.sleep(PAUSE_S)
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True, timeout=600)
    subprocess.run(["sync", *target.iterdir()], check=True, timeout=600)
    took = time.monotonic() - began
    shutil.rmtree(target)
    return took


def convert(arguments: list[str]) -> tuple[float, int]:
    """Return the seconds of a conversion, without Python's start, and the peak memory of its process in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(PAUSE_S), "convert", *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if not found or found[0][1] != "0":
        raise SystemExit(f"clipo convert {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return float(found[0][2]), int(found[0][3])


if __name__ == "__main__":
    main()
