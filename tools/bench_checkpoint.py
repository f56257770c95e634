"""Measures how long a checkpoint delays training: written while training continues, and written at once, in one run.

    python tools/bench_checkpoint.py MODEL_DIR FOLDER [--rounds 5 --dtype bf16]

Each round saves once in each way, with steps between: both use the same threads, files, checksums and disk.

    synchronous     the time until `save` returns
    asynchronous    the time until `save` returns; how long the next update waits for the copy; and by how much the
                    steps until the checkpoint is complete are slower than steps without one (a median)

A step here scores and updates, and generates nothing, so that the update comes early. Under torchrun this runs on
several ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench_step import megatron_step, synthetic

from clipo_megatron.checkpoint import CheckpointContents, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, DType, RunConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.runtime.launcher_env import Launch, export_environment, from_environment
from clipo_megatron.runtime.platform import platform


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    platform().synchronize()
    start = time.perf_counter()
    action()
    platform().synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("folder", type=Path, help="on the disk to write to; is removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16", choices=[each.value for each in DType])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=26)
    parser.add_argument("--response-tokens", type=int, default=10)
    options = parser.parse_args()

    config = RunConfig()
    config.model.path, config.model.dtype, config.clipo.enabled = options.model, DType(options.dtype), False
    config.layout.max_tokens_per_microbatch = 1024
    export_environment(from_environment() or Launch(rank=0, world=1, local_rank=0))
    platform().init_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s=1800)
    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=frozenset(), total_steps=1000)
    step = megatron_step(config, actor, *synthetic(options, actor.spec.vocab_size), share=True)
    checkpointer = TrainableCheckpointer(actor.trainable)
    checkpoints = Checkpoints(
        options.folder, CheckpointContents(models={POLICY: checkpointer}), CheckpointConfig(keep=1)
    )
    waits: list[float] = []
    actor.trainable.pre_mutation_hook = lambda: waits.append(timed(checkpoints.wait_for_snapshot))
    number, rows, plain = 0, [], []
    step()
    for each in range(options.rounds + 1):  # the first is not counted: memory is taken, files are new
        number += 1
        checkpoints.settings.asynchronous = False
        at_once = timed(partial(checkpoints.save, number))
        plain = [timed(step) for _ in range(5)]
        usual = statistics.median(plain)
        number += 1
        checkpoints.settings.asynchronous = True
        held = timed(partial(checkpoints.save, number))
        slower, start = 0.0, time.perf_counter()
        waits.clear()
        while checkpoints._writer is not None:
            slower += timed(step) - usual
            checkpoints.poll()
        waited, under_way = sum(waits), time.perf_counter() - start
        slower -= waited
        if each:
            rows.append((at_once, held, waited, slower, under_way, usual))
        if layout.rank == 0:
            label = f"round {each}" if each else "warm-up"
            print(
                f"{label:8}  at once {at_once:7.3f} s   asynchronous: save {held:6.3f} s, waited {waited:6.3f} s, "
                f"steps slower by {slower:6.3f} s in {under_way:6.2f} s of writing   step {usual:.3f} s",
                flush=True,
            )
    if layout.rank == 0:
        at_once, held, waited, slower, *_ = (statistics.median(column) for column in zip(*rows, strict=True))
        size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
        print(
            f"{size / 1e9:.2f} GB on {layout.world} ranks; medians: at once {at_once:.3f} s; asynchronous {held:.3f} s "
            f"of saving and {waited:.3f} s of waiting = {(held + waited) / at_once:.1%} of it; with the slower steps "
            f"{(held + waited + slower) / at_once:.1%}"
        )
        shutil.rmtree(options.folder)
    parallel.shutdown()


if __name__ == "__main__":
    main()
