"""What ranks do in tests of mixtures of experts: logits, gradients and optimizer state by Hugging Face name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from policy_steps import scored_groups
from torch import Tensor
from update_steps import VOCAB, actor_on, bare, one_update, whole

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.checkpoint import CheckpointContents, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, LayoutConfig, RunConfig
from clipo_megatron.flow import MicroBatch, Sample
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.batch.packing import pack
from clipo_megatron.policy.checkpoint import state
from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.weights.export import export


def samples() -> list[Sample]:
    """Four groups of three: prompts of 1 to 17 tokens, responses of 1 to 14."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for group, prompt_length in enumerate((1, 9, 17, 4)):
        prompt = torch.randint(0, VOCAB, (prompt_length,), generator=generator)
        for length in (1 + group, 5, 14):
            response = torch.randint(0, VOCAB, (length,), generator=generator)
            result.append(Sample(len(result), group, prompt, response, torch.zeros(length)))
    return result


def logits_by_row(
    config: RunConfig, layout_config: LayoutConfig, harm: Callable[[PolicyActor], None] | None = None
) -> dict[str, Any]:
    """Logits of the tokens that predict responses, by sample, and the exported weights.

    The data-parallel ranks have different samples, two packed rows each, the second with shared prompts.
    """
    actor = actor_on(config, layout_config)
    layout = actor.layout
    exported = {name: tensor.clone() for name, tensor in actor.export()}
    if harm is not None:
        harm(actor)
    mine = [sample for sample in samples() if sample.group % layout.dp == layout.dp_rank]
    halves = mine[: len(mine) // 2], mine[len(mine) // 2 :]
    micro_batches = [
        pack(half, share_prompts=share, multiple=layout.row_multiple)
        for half, share in zip(halves, (False, True), strict=True)
    ]
    head = exported["lm_head.weight"]

    def logits_of(micro: MicroBatch, hidden: Tensor) -> tuple[MicroBatch, Tensor]:
        return micro, layout.share.gathered(hidden)[micro.predict] @ head.t()

    outputs = actor.trainable.forward(micro_batches, logits_of)
    rows = {
        int(row): logits[micro.rollout == index] for micro, logits in outputs for index, row in enumerate(micro.rows)
    }
    return {"rows": rows, "exported": exported}


def stages_left(config: RunConfig, layout_config: LayoutConfig) -> int:
    """How many models an update leaves in memory after its actor is deleted."""
    gc.collect()
    before = _stages()
    one_update(config, layout_config)
    gc.collect()
    return _stages() - before


def _stages() -> int:
    return sum(isinstance(each, PolicyStage) for each in gc.get_objects())


def optimizer_state(actor: PolicyActor) -> dict[str, dict[str, Tensor]]:
    """Master parameters and moments by Hugging Face name, and the number of updates that Adam has counted."""
    shards, found = list(state._shards(actor.trainable.optimizer)), {}
    for kind in (state.MASTER, *state.MOMENTS):
        held = {
            bare(name): whole(parameter, shard, state._state_of(shard).get(kind)) for name, parameter, shard in shards
        }
        exported = export(actor.export_plan, [held], actor.layout.holder)
        found[kind] = {name: tensor.clone() for name, tensor in exported}
    return {**found, "updates": {"count": torch.tensor(state._updates(actor.trainable.optimizer))}}


def train_a_little(actor: PolicyActor, config: RunConfig, steps: int = 2) -> None:
    algorithm, batcher = build_algorithm(config), actor.batcher
    for step in range(steps):
        mine = scored_groups(step, vocab=VOCAB)[actor.layout.rank :: actor.layout.world]
        table, held = build_table(mine, step=step)
        batches = batcher.mini_batches_of(held, table)
        actor.score([micro for batch in batches for micro in batch.micro_batches], table, algorithm)
        experience = algorithm.assign_advantages(table, batches)
        for batch in batches:
            actor.update(batcher.with_advantages(batch, experience, algorithm), experience, algorithm)


def save(config: RunConfig, layout_config: LayoutConfig, folder: str, stacked: bool = False) -> dict[str, Any]:
    """Train and save; returns the optimizer's state. `stacked`: with layers stacked, as in older checkpoints."""
    actor = actor_on(config, layout_config)
    train_a_little(actor, config)
    ours = state._sharded
    try:
        if stacked:
            state._sharded = lambda stage, **_: ours(stage, stacked=True)
        _save(actor, folder)
    finally:
        state._sharded = ours
    return {**optimizer_state(actor), "exported": {name: tensor.clone() for name, tensor in actor.export()}}


def load_and_save(config: RunConfig, layout_config: LayoutConfig, folder: str, target: str = "") -> dict[str, Any]:
    """Load a checkpoint into an actor, and save it to `target` if that is not ""; returns the optimizer's state."""
    actor = actor_on(config, layout_config)
    state.TrainableCheckpointer(actor.trainable).load(Path(folder))
    if target:
        _save(actor, target)
    return {**optimizer_state(actor), "exported": {name: tensor.clone() for name, tensor in actor.export()}}


def _save(actor: PolicyActor, folder: str) -> None:
    """Write the policy's part of a checkpoint as a run does, but to `folder`."""
    checkpointer, place = state.TrainableCheckpointer(actor.trainable), Path(f"{folder}.checkpoints")
    whole = Checkpoints(place, CheckpointContents(models={POLICY: checkpointer}), CheckpointConfig(asynchronous=False))
    written = whole.save(1) / POLICY
    if dist.get_rank() == 0:
        written.rename(folder)
    dist.barrier()


def permute_experts(actor: PolicyActor) -> None:
    """Swap the first two experts of the first layer with experts on this rank."""
    layer = next(layer for layer in actor.stage.decoder.layers if layer.is_moe_layer)
    first, second = layer.mlp.experts.local_experts[:2]
    with torch.no_grad():
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            held = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(held)


def do_not_renormalise(actor: PolicyActor) -> None:
    """Swap the router's order of softmax and choice of experts."""
    actor.stage.config.moe_router_pre_softmax = not actor.stage.config.moe_router_pre_softmax


def forget_copies_of_experts(config: RunConfig, layout_config: LayoutConfig) -> dict[str, Any]:
    """`one_update` with experts' gradients summed over the copies that Megatron takes by default."""
    from clipo_megatron.policy.model import model

    ours = model.adapt_experts

    def adapt(stage: torch.nn.Module, *, dispatchers: bool) -> None:
        ours(stage, dispatchers=dispatchers)
        for parameter in stage.parameters():
            parameter.allreduce = True

    model.adapt_experts = adapt
    try:
        return one_update(config, layout_config)
    finally:
        model.adapt_experts = ours
