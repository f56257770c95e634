"""How much of a model an update changes, in the dtype in which it is sent, and what sending only that saves.

    python tools/bench_delta.py MODEL_DIR [--updates 6 --learning-rate 1e-6 --dtype bf16]

Every update learns from the same random rollouts, so that its gradients agree and Adam goes as far as it can: real
rollouts differ from step to step and change less. After each update the changes are found as `rollout.sync.delta` finds
them, their bytes are compared with those of all weights, and the time to find them with that of exporting everything.
Under torchrun this runs on several ranks, each of which reports what it sends.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from bench_step import megatron_step, synthetic

from clipo_megatron.config.schema import DType, RunConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.runtime.launcher_env import Launch, export_environment, from_environment
from clipo_megatron.runtime.platform import platform
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.delta import LastSent


def main() -> None:
    """Print a line for each update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--dtype", default="bf16", choices=[each.value for each in DType])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=16)
    options = parser.parse_args()

    config = RunConfig()
    config.model.path, config.model.dtype, config.clipo.enabled = options.model, DType(options.dtype), False
    config.optimizer.learning_rate, config.optimizer.warmup_steps = options.learning_rate, 0
    config.layout.max_tokens_per_microbatch = 1024
    export_environment(from_environment() or Launch(rank=0, world=1, local_rank=0))
    platform().init_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s=1800)
    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=frozenset(), total_steps=1000)
    step = megatron_step(config, actor, *synthetic(options, actor.spec.vocab_size), share=True)
    shard = Shard.of(actor)
    plan = shard.plan(config.rollout.sync.bucket_mb * 2**20)
    sent, memory = LastSent(plan, shard.holder), torch.empty(shard.largest(plan), dtype=plan.dtype)
    sent.remember(shard.chunks())
    for number in range(options.updates):
        step()
        start = time.process_time()
        whole = sum(flat.nbytes for _, flat in shard.own_buckets(plan, lambda _: memory))
        middle = time.process_time()
        tensors = [each for bucket in sent.changes(shard.chunks()) for each in bucket]
        end = time.process_time()
        changed = sum(tensor.numel() for name, tensor in tensors if "|" not in name or name.endswith("|values"))
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        if whole:
            print(
                f"rank {layout.rank}, update {number + 1}: {changed / whole * plan.dtype.itemsize:.2%} of the values "
                f"changed, {nbytes / 1e6:.1f} of {whole / 1e6:.1f} MB ({nbytes / whole:.1%}), found in "
                f"{end - middle:.2f} s of processor time, exported whole in {middle - start:.2f} s",
                flush=True,
            )
    parallel.shutdown()


if __name__ == "__main__":
    main()
