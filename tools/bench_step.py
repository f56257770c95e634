"""Time the learning half of a GRPO step: score once, update once, on the same rollouts in three ways.

    python tools/bench_step.py MODEL_DIR [--prompts 16 --samples 8 --prompt-tokens 26 --response-tokens 10]
    python tools/bench_step.py MODEL_DIR --group-loss conspo
    python tools/bench_step.py MODEL_DIR --row 32768

    shared     this project: packed, each group's prompt computed once
    packed     this project: packed, prompts repeated
    padded     what a user would write: transformers, right-padded micro-batches, full logits, torch's AdamW

One process; the ways alternate in rounds, medians are printed, with their ratio to the floor: 2 FLOPs a parameter and
token forward, 6 forward and backward, at the matrix-multiplication rate measured in the same run.

With --group-loss only updates are timed: with a clipped loss, with a loss over groups under the weights that scored the
rollouts, and with a loss over groups under later weights, which needs another forward. Processor time is measured, so
that other processes on the machine do not change the ratios.

With --row one layer's attention is computed on a row of so many tokens, forward and backward: a prompt of an eighth of
them and eight responses, by this project and by torch's `scaled_dot_product_attention` on padded sequences with the
prompt repeated, as transformers calls it. Each is a process of its own; memory is what its peak has grown by.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import DType, RunConfig
from clipo_megatron.flow import RolloutTable, Sample, Segment
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.model.attention import attention_of, plan_attention
from clipo_megatron.runtime.launcher_env import Launch, export_environment
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config


def synthetic(options: argparse.Namespace, vocabulary: int) -> tuple[RolloutTable, list[Sample]]:
    """Random rollouts of about the given lengths, half of them correct."""
    generator = torch.Generator().manual_seed(0)

    def tokens(mean: int) -> torch.Tensor:
        count = int(torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (1,), generator=generator))
        return torch.randint(0, vocabulary, (count,), generator=generator)

    samples = []
    for group in range(options.prompts):
        prompt = tokens(options.prompt_tokens)
        for _ in range(options.samples):
            response = tokens(options.response_tokens)
            samples.append(Sample(len(samples), group, prompt, response, torch.zeros(response.numel())))
    size = len(samples)
    correct = torch.arange(size) % 2 == 0
    table = RolloutTable(
        prompt_ids=[f"p/{group}" for group in range(options.prompts)],
        group=torch.tensor([sample.group for sample in samples]),
        correct=correct,
        graded=torch.ones(size, dtype=torch.bool),
        reward=correct.float(),
        prompt_length=torch.tensor([sample.prompt.numel() for sample in samples]),
        response_length=torch.tensor([sample.response.numel() for sample in samples]),
        truncated=torch.zeros(size, dtype=torch.bool),
        version=torch.zeros(size, dtype=torch.int64),
    )
    return table, samples


def megatron_step(
    config: RunConfig, actor: PolicyActor, table: RolloutTable, samples: list[Sample], *, share: bool
) -> Callable[[], int]:
    """Make a function that scores and updates, and returns the number of tokens it computed."""
    config.layout.share_prompts = share
    batcher = actor.batcher = Batcher.of(config, actor.layout)
    algorithm = build_algorithm(config)

    def step() -> int:
        [batch] = batcher.mini_batches_of(samples, table)
        actor.score(batch.micro_batches, table, algorithm)
        experience = algorithm.assign_advantages(table, [batch])
        actor.update(batcher.with_advantages(batch, experience, algorithm), experience, algorithm)
        return sum(micro.tokens.numel() for micro in batch.micro_batches)

    return step


def updates_of(
    name: str, actor: PolicyActor, table: RolloutTable, samples: list[Sample], *, scored: bool
) -> Callable[[], int]:
    """Make a function that updates with a method's loss, and returns the number of tokens it computed."""
    config = RunConfig()
    config.clipo.enabled, config.algorithm.name = False, name
    algorithm, batcher = build_algorithm(config), actor.batcher
    [batch] = batcher.mini_batches_of(samples, table)
    actor.score(batch.micro_batches, table, algorithm)
    experience = algorithm.assign_advantages(table, [batch])
    weighed = batcher.with_advantages(batch, experience, algorithm)

    def step() -> int:
        actor.update(weighed, experience, algorithm, first=scored)
        return sum(micro.tokens.numel() for micro in weighed.micro_batches)

    return step


def padded_step(model_dir: str, table: RolloutTable, samples: list[Sample], per_forward: int) -> Callable[[], int]:
    """Make a function for the same step with a transformers model, right-padded, `per_forward` rollouts at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(platform().device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    advantage = torch.where(table.correct, 1.0, -1.0)
    total = int(table.response_length.sum())
    parts = [samples[i : i + per_forward] for i in range(0, len(samples), per_forward)]

    def logprobs(part: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.cat([sample.prompt, sample.response]) for sample in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([row.numel() for row in rows])
        place = torch.arange(ids.shape[1])
        logits = model(ids, attention_mask=(place < lengths[:, None]).long()).logits[:, :-1]
        picked = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        starts = torch.tensor([sample.prompt.numel() for sample in part])
        mask = (place[1:] >= starts[:, None]) & (place[1:] < lengths[:, None])
        return picked, mask

    def step() -> int:
        with torch.no_grad():
            old = [logprobs(part)[0] for part in parts]
        optimizer.zero_grad()
        for part, before in zip(parts, old, strict=True):
            now, mask = logprobs(part)
            rows = torch.tensor([sample.row for sample in part])
            ratio = (now - before).exp() * advantage[rows][:, None]
            (-(ratio * mask).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return sum(len(part) * max(sample.length for sample in part) for part in parts)

    return step


def matmul_flops_per_s() -> float:
    """The FLOP/s that this machine reaches on a large fp32 matrix product."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024 * 2048 * 2048 / (time.perf_counter() - start))
    return best


def compare_updates(
    options: argparse.Namespace, actor: PolicyActor, table: RolloutTable, samples: list[Sample]
) -> None:
    """Time updates with a loss over groups against GRPO's, and print them."""
    name = options.group_loss
    ways = {
        "grpo": updates_of("grpo", actor, table, samples, scored=True),
        f"{name}, weights as scored": updates_of(name, actor, table, samples, scored=True),
        f"{name}, later weights": updates_of(name, actor, table, samples, scored=False),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(options.rounds + 1):
        for way, step in ways.items():
            start = time.process_time()
            tokens = step()
            if round_number:
                seconds[way].append(time.process_time() - start)
    print(f"{len(samples)} rollouts, {tokens} tokens, {torch.get_num_threads()} threads")
    first = statistics.median(seconds["grpo"])
    for way, values in seconds.items():
        print(f"{way:32}{statistics.median(values):9.2f} s of processor time{statistics.median(values) / first:7.2f} x")


def attention_of_row(way: str, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[float, float]:
    """The seconds and the MiB that the attention of a row takes, forward and backward; for a fresh process."""
    prompt = tokens // 8
    lengths = [tokens * (7 + 2 * (n % 2)) // 64 - prompt // 8 for n in range(8)]
    segments, end = [Segment(0, prompt)], prompt
    for length in lengths:
        segments.append(Segment(end, length, 0, prompt))
        end += length
    own, plan = torch.nn.functional.scaled_dot_product_attention, plan_attention(segments, torch.device("cpu"))
    width = len(lengths), max(lengths) + prompt

    def inputs(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(*shape, count, dim, requires_grad=True) for count in (heads, kv_heads, kv_heads)]

    def cascade(rows: list[torch.Tensor]) -> torch.Tensor:
        return attention_of(*rows, plan, dim**-0.5)

    def padded(rows: list[torch.Tensor]) -> torch.Tensor:
        return own(*(each.transpose(1, 2) for each in rows), is_causal=True, enable_gqa=heads != kv_heads)

    call, rows = (cascade, inputs(end)) if way == "cascade" else (padded, inputs(*width))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    output = call(rows)
    output.backward(torch.ones(()).expand_as(output))
    return time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def compare_rows(options: argparse.Namespace) -> None:
    """Measure the attention of a row in both ways, and print them."""
    spec = model_spec(read_config(hf_folder(options.model)))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for way in ("cascade", "padded"):
            shape = (options.row, spec.num_heads, spec.num_kv_heads, spec.head_dim)
            measured = [pool.apply(attention_of_row, (way, *shape)) for _ in range(options.rounds)]
            seconds, memory = (statistics.median(each) for each in zip(*measured, strict=True))
            print(f"{way:8}{seconds:9.2f} s of processor time{memory:9.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=26)
    parser.add_argument("--response-tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-loss", help="time updates by this loss over groups instead")
    parser.add_argument("--row", type=int, help="measure the attention of a row of so many tokens instead")
    options = parser.parse_args()
    if options.row:
        compare_rows(options)
        return

    config = RunConfig()
    config.model.path, config.model.dtype, config.clipo.enabled = options.model, DType.fp32, False
    config.layout.max_tokens_per_microbatch = 1024
    export_environment(Launch(rank=0, world=1, local_rank=0))
    platform().init_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s=600)
    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=frozenset(), total_steps=1000)
    table, samples = synthetic(options, actor.spec.vocab_size)
    if options.group_loss:
        compare_updates(options, actor, table, samples)
        parallel.shutdown()
        return
    ways = {
        "shared": megatron_step(config, actor, table, samples, share=True),
        "packed": megatron_step(config, actor, table, samples, share=False),
        "padded": padded_step(options.model, table, samples, per_forward=32),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for round_number in range(options.rounds + 1):
        for name, step in ways.items():
            start = time.perf_counter()
            tokens[name] = step()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rate, parameters = matmul_flops_per_s(), sum(parameter.numel() for parameter in actor.stage.parameters())
    print(f"{len(samples)} rollouts, {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s on a large product")
    print(f"{'':8}{'tokens':>8}{'seconds':>9}{'x shared':>10}{'x floor':>9}")
    for name, values in seconds.items():
        median = statistics.median(values)
        floor = 8 * parameters * tokens[name] / rate
        print(
            f"{name:8}{tokens[name]:8d}{median:9.2f}{median / statistics.median(seconds['shared']):10.2f}"
            f"{median / floor:9.2f}"
        )
    parallel.shutdown()


if __name__ == "__main__":
    main()
