"""What generation and training at the same time gains: steps a second with `rollout.ahead` against a run that waits.

    python tools/bench_overlap.py --steps 30 --ahead 0,1,3 --seeds 0,1,2 [key=value ...]

Two SGLang servers of `clipo serve` and a trainer on two pipeline stages work on the quickstart's task, each side on
cores of its own: on a machine without GPUs both sides would take each other's time otherwise. With ahead 0 the sides
wait for each other, so a step takes the sum of their times; it cannot take less than the larger of the two. Every
update's checksums are compared, and a difference would end the run.

Times are means over the steps after the first few. A run's `generate` is the time for which its ranks waited for
rollouts.
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
from typing import Any

from clipo_megatron.rollout.servers.registry import Registry, Status
from clipo_megatron.runtime.launch import dies_with_this_process
from clipo_megatron.runtime.run_dir import METRICS, SERVERS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

from arithmetic import write_problems  # noqa: E402

LEFT_OUT = 5  # first steps, in which processes are warming up and batches ahead are begun
START_S = 600.0  # for the servers to be ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ahead", type=numbers, default=[0, 1, 3])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--server-cores", default="0", help="as taskset takes them")
    parser.add_argument("--trainer-cores", default="1")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("overrides", nargs="*", help="settings of the runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held_out = write_problems(folder / "data", held_out=64, seed=0)
        settings = [
            str(ROOT / "examples" / "served" / "served.yaml"),
            f"model.path={options.model}",
            f"data.train=[{{path: '{train}'}}]",
            f"data.eval=[{{path: '{held_out}'}}]",
            f"train.steps={options.steps}",
            "eval.every=0",
            "eval.at_start=false",
            *options.overrides,
        ]
        serving = start(
            "serve", [*settings, f"train.output={folder / 'served'}", "serve.servers=2"], options.server_cores
        )
        try:
            urls = wait_for_servers(folder / "served" / SERVERS, serving)
            found = {
                ahead: [run(folder, settings, urls, ahead, seed, options.trainer_cores) for seed in options.seeds]
                for ahead in options.ahead
            }
        finally:
            serving.terminate()
            serving.wait()
    show(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(each) for each in text.split(",")]


def start(command: str, arguments: list[str], cores: str) -> subprocess.Popen[bytes]:
    """Start a `clipo` command on some cores."""
    return subprocess.Popen(
        ["taskset", "--cpu-list", cores, sys.executable, "-m", "clipo_megatron.cli", command, *arguments],
        stdout=subprocess.DEVNULL if command == "serve" else sys.stderr,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=dies_with_this_process,
    )


def wait_for_servers(folder: Path, serving: subprocess.Popen[bytes]) -> list[str]:
    """The URLs of the two servers, once both are ready."""
    deadline = time.monotonic() + START_S
    while True:
        records = Registry(folder).records() if folder.is_dir() else []
        ready = [each.url for each in records if each.status is Status.ready]
        if len(ready) == 2:
            return ready
        if serving.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{len(ready)} of 2 servers are ready; `clipo serve` has exit code {serving.poll()}")
        time.sleep(1.0)


def run(folder: Path, settings: list[str], urls: list[str], ahead: int, seed: int, cores: str) -> list[dict[str, Any]]:
    """The metrics of a run."""
    output = folder / f"ahead{ahead}-seed{seed}"
    words = [f"train.output={output}", f"rollout.endpoints=[{','.join(urls)}]", f"rollout.ahead={ahead}"]
    if start("train", [*settings, *words, f"train.seed={seed}"], cores).wait():
        raise RuntimeError(f"the run with rollout.ahead={ahead}, seed {seed} failed")
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    shutil.rmtree(output)
    return lines


def show(found: dict[int, list[list[dict[str, Any]]]]) -> None:
    """Print a line for each `ahead`, and the accuracy and drift of all runs side by side."""

    def mean(runs: list[list[dict[str, Any]]], name: str) -> float:
        return statistics.mean(line.get(name, 0.0) for lines in runs for line in lines[LEFT_OUT:])

    waiting, bound = None, None
    print("ahead     step  waiting training     sync  against ahead 0  of the bound")
    for ahead, runs in found.items():
        step, generate, sync = (mean(runs, f"time/{name}_s") for name in ("step", "generate", "sync"))
        if ahead == 0:
            waiting, bound = step, max(generate, step - generate)
        gain = f"{waiting / step:.2f} x" if waiting else "-"
        share = f"{bound / step:.0%}" if bound else "-"
        print(
            f"{ahead:>5} {step:>6.2f} s {generate:>6.2f} s {step - generate - sync:>6.2f} s {sync:>6.2f} s "
            f"{gain:>16} {share:>13}"
        )
    for title, name in (
        ("accuracy", "reward/accuracy"),
        ("drift", "policy/mult_prob_error"),
        ("length", "rollout/response_length"),
    ):
        print(f"{title}, mean of every 5 steps and all seeds")
        for ahead, runs in found.items():
            parts = [
                [line[name] for lines in runs for line in lines[first : first + 5] if name in line]
                for first in range(0, len(runs[0]), 5)
            ]
            print(f"{ahead:>5} " + " ".join(f"{statistics.mean(part):8.4f}" if part else "       -" for part in parts))


if __name__ == "__main__":
    main()
