"""The speed of log-probs against the matrix products in them, and of whole updates against the device's peak."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from clipo_megatron.config.schema import DType
from clipo_megatron.policy.model.logprobs import token_logprobs
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.footprint import compare_with_plan, peak_of
from clipo_megatron.training.proving.models import SIZES, configuration, packed_rows, trainable_of, updated
from clipo_megatron.training.proving.outcome import Outcome, Task, seconds_of
from clipo_megatron.weights.families import model_spec

MOST_BYTES = 2**30  # that log-probs take beside what goes in and comes out
LEAST_MFU = 0.40
LAYERS_OF_7B = 8  # with its optimizer the whole model does not fit one GPU of 141 GB


def logprobs(task: Task) -> Outcome:
    """Log-probs of a whole vocabulary, forward and backward: the share of their four products' time, and the peak."""
    outcome = Outcome()
    tokens, hidden, vocabulary = task.pick((128, 128, 4096), (512, 512, 32768), (8192, 3584, 152064))
    dtype = torch.bfloat16 if platform().has_gpu else torch.float32
    generator = torch.Generator(platform().device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=platform().device, generator=generator).to(dtype)

    states, weight = drawn(tokens, hidden).requires_grad_(), drawn(vocabulary, hidden).mul_(0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=platform().device, generator=generator)
    buffer = torch.zeros(vocabulary, hidden, device=platform().device)

    def both_ways() -> None:
        found, _ = token_logprobs(states, weight, targets, main_grad=buffer)
        found.sum().backward()
        states.grad = weight.grad = None

    rows = weight.detach()[: min(vocabulary, 16384)]
    product = seconds_of(lambda: states.detach() @ rows.t()) * vocabulary / len(rows)
    seconds = seconds_of(both_ways)
    note = f"{1000 * seconds:.1f} ms for {tokens} tokens of {vocabulary}"
    outcome.at_least(
        "log-probs: their products' time in theirs",
        4 * product / seconds,
        task.pick(0.1, 0.3, 0.6),
        unit="%",
        note=note,
    )
    # autograd wants a gradient of the weight beside the buffer that it was added to; on a CPU no page of it is touched
    peak = peak_of(both_ways) - (weight.nbytes if platform().has_gpu else 0)
    outcome.at_most("log-probs: peak beside what goes in and comes out", peak, MOST_BYTES, unit="B")
    return outcome


def updates(task: Task) -> Outcome:
    """Whole updates of packed rows, and what they keep against the plan."""
    outcome = Outcome()
    for name in task.pick(["tiny"], ["small"], ["1.5B", "7B"]):
        _update(outcome, task, name)
        gc.collect()
        if platform().has_gpu:
            torch.accelerator.empty_cache()
    return outcome


def _update(outcome: Outcome, task: Task, name: str) -> None:
    spec = model_spec(SIZES[name] | ({"num_hidden_layers": LAYERS_OF_7B} if name == "7B" else {}))
    rows, tokens, longest = task.pick((2, 128, 32), (2, 1024, 256), (8, 8192, 4096))
    config = configuration(dtype=DType.bf16 if platform().has_gpu else DType.fp32, max_tokens=tokens)
    config.clipo.enabled = False
    plan = task.predict(config, spec, longest / 2)
    trainable = trainable_of(config, spec, task.layout)
    batch = list(packed_rows(spec.vocab_size, rows=rows, tokens=tokens, longest=longest))
    seconds = seconds_of(lambda: updated(trainable, batch), repeats=task.pick(1, 2, 3))
    rate = plan.update_flops_per_token * tokens * rows / seconds
    what, note = f"updates of {name}, {rows} rows of {tokens} tokens", f"{tokens * rows / seconds:,.0f} tokens/s"
    if not platform().has_gpu:
        limit = task.pick(0.01, 0.2, None)
        outcome.at_least(f"{what}: share of a product's rate", rate / _product_rate(), limit, unit="%", note=note)
    elif plan.peak_flops is None:
        outcome.skip(f"{what}: MFU", f"{rate / 1e12:.0f} TFLOP/s, and the peak of this GPU is not in the plan's table")
    else:
        outcome.at_least(f"{what}: MFU", rate / plan.peak_flops, LEAST_MFU, unit="%", note=note)
    if platform().has_gpu:
        outcome.measured["update_flops_per_s"] = max(rate, outcome.measured.get("update_flops_per_s", 0.0))
    compare_with_plan(outcome, name, trainable, batch[0], plan)


def _product_rate() -> float:
    """FLOP/s of a large matrix product in fp32 on a CPU."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    return 2 * 1024 * 2048 * 2048 / seconds_of(lambda: a @ b)
