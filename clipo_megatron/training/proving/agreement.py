"""This device against the CPU: the same steps of tiny models, packed otherwise, by another process without a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.batch.random_rollouts import random_rollouts
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.models import FAMILIES, actor_of, configuration, write_folder
from clipo_megatron.training.proving.outcome import Outcome, Task
from clipo_megatron.weights.export import export

UPDATES = 3
LIMIT = 1e-5  # relative, in fp32


def compute_reference(task: Task) -> Outcome:
    """Leave behind what this process computes with one rollout a row; the process has no GPU."""
    for family in _families(task):
        torch.save(_steps(task, family, alone=True), task.folder / f"{family}.pt")
    return Outcome()


def compare(task: Task) -> Outcome:
    """Compute the same with rows of many rollouts, prompts shared where the attention can, and compare."""
    outcome = Outcome()
    for family in _families(task):
        expected = torch.load(task.folder / f"{family}.pt", weights_only=True)
        worst: dict[str, float] = {}
        for name, value in _steps(task, family, alone=False).items():
            kind = name.partition("/")[0]
            worst[kind] = max(worst.get(kind, 0.0), _distance(value, expected[name]))
        note = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
        outcome.at_most(f"{family} against a CPU, relative", max(worst.values()), LIMIT, note=note)
    return outcome


def _families(task: Task) -> list[str]:
    return task.pick(["qwen2"], list(FAMILIES), list(FAMILIES))


def _distance(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected norm; infinite where anything is not finite."""
    gap = (value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(gap) if bool(gap.isfinite()) else float("inf")


def _steps(task: Task, family: str, *, alone: bool) -> Mapping[str, Tensor]:
    """Score, CLIPO's losses and some updates, as tensors on the CPU; `alone`: each rollout is a row of its own."""
    torch.set_float32_matmul_precision("highest")
    folder = write_folder(task.folder / f"{family}-{'alone' if alone else 'packed'}", FAMILIES[family])
    config = configuration(folder, max_tokens=64 if alone else 8192)
    config.layout.share_prompts = False if alone else None
    actor, algorithm = actor_of(config, task.layout)
    actor.batcher = Batcher.of(config, task.layout)
    found: dict[str, Tensor] = {}
    for step in range(UPDATES):
        table, samples = random_rollouts(actor.spec.vocab_size, groups=2, samples=4, prompt=12, response=16, seed=step)
        [batch] = actor.batcher.mini_batches_of(samples, table)
        actor.score(batch.micro_batches, table, algorithm)
        found[f"log-probs/{step}"] = _by_row(batch.micro_batches)
        found[f"CLIPO's loss/{step}"] = table.signals["contrastive_loss"].cpu()
        experience = algorithm.assign_advantages(table, [batch])
        actor.update(actor.batcher.with_advantages(batch, experience, algorithm), experience, algorithm)
        if step == 0:
            found |= {f"gradients/{name}": value for name, value in _gradients(actor).items()}
    found |= {f"weights/{name}": value.cpu() for name, value in actor.export()}
    platform().synchronize()
    return found


def _by_row(micro_batches: list) -> Tensor:
    """The log-probs of all targets, in the order of the table's rows."""
    parts: dict[int, Tensor] = {}
    for micro in micro_batches:
        for place, row in enumerate(micro.rows.tolist()):
            parts[row] = micro.old_logprobs[micro.rollout == place].cpu()
    return torch.cat([parts[row] for row in sorted(parts)])


def _gradients(actor: PolicyActor) -> dict[str, Tensor]:
    """The gradients of the update before by Hugging Face name, since other layers name theirs otherwise."""
    gradients = {name: each.main_grad for name, each in actor.stage.named_parameters()}
    return {name: each.cpu().clone() for name, each in export(actor.export_plan, [gradients], actor.layout.holder)}
