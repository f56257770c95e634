"""bf16 against fp32: how far rounding moves log-probs, of a whole model and of its head alone."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.config.schema import DType
from clipo_megatron.policy.batch.random_rollouts import random_rollouts
from clipo_megatron.policy.model.logprobs import token_logprobs
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.models import SIZES, actor_of, configuration, write_folder
from clipo_megatron.training.proving.outcome import Outcome, Task

LIMIT = 1.05  # of policy/mult_prob_error, as NeMo-RL accepts it
_SPREAD = 4.0  # standard deviation of the logits of the head alone, so that its choices are about as sure as a model's


def measure(task: Task) -> Outcome:
    """The mean of exp(|difference of log-probs|) between the precisions."""
    outcome = Outcome()
    folder = write_folder(task.folder / "drift", SIZES[task.pick("tiny", "small", "small")])
    found = [_scored(task, str(folder), dtype) for dtype in (DType.fp32, DType.bf16)]
    outcome.at_most("mult_prob_error of bf16 against fp32, whole model", _error(*found), LIMIT)
    tokens, hidden, vocabulary = task.pick((64, 128, 1024), (256, 512, 8192), (4096, 3584, 151936))
    generator = torch.Generator(platform().device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=platform().device, generator=generator).bfloat16()

    states, weight = drawn(tokens, hidden), drawn(vocabulary, hidden) * (_SPREAD * hidden**-0.5)
    targets = torch.randint(0, vocabulary, (tokens,), device=platform().device, generator=generator)
    exact, _ = token_logprobs(states.float(), weight.float(), targets)
    ours, _ = token_logprobs(states, weight, targets)
    rounded = (states @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    note = f"with logits rounded to bf16 it is {_error(rounded, exact):.5f}"
    outcome.at_most("mult_prob_error of the head alone, bf16", _error(ours, exact), LIMIT, note=note)
    return outcome


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().abs().exp().mean())


def _scored(task: Task, folder: str, dtype: DType) -> Tensor:
    """The log-probs [N] of the same rollouts in a precision."""
    actor, algorithm = actor_of(configuration(folder, dtype=dtype), task.layout)
    table, samples = random_rollouts(actor.spec.vocab_size, groups=2, samples=4, prompt=32, response=64)
    [batch] = actor.batcher.mini_batches_of(samples, table)
    actor.score(batch.micro_batches, table, algorithm)
    return torch.cat([micro.old_logprobs for micro in batch.micro_batches])
