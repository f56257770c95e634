"""Snapshots hold the state of the moment they were taken at, whatever training does while they are copied."""

import random
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from expert_steps import train_a_little
from policy_steps import configuration
from tiny_models import tiny_llama
from update_steps import VOCAB, actor_on

from clipo_megatron.checkpoint import CheckpointContents, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, DType, LayoutConfig, RunConfig
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.checkpoint.snapshot import boxes
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.policy.host_memory import HostBuffer

SHAPES = [pytest.param(1, LayoutConfig(), id="one rank"), pytest.param(4, LayoutConfig(tp=2, dp=2), id="TP2 x DP2")]


def shards(actor: PolicyActor) -> list[torch.Tensor]:
    """This rank's shards of masters and moments."""
    inner = actor.trainable.optimizer.inner.optimizer
    masters = [each for group in inner.param_groups for each in group["params"]]
    moments = [inner.state[each][name] for each in masters for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach() for tensor in (*masters, *moments)]


def held(actor: PolicyActor) -> list[torch.Tensor]:
    """This rank's shards of masters and moments, and its parameters."""
    return [*shards(actor), *(parameter.detach() for parameter in actor.stage.parameters())]


def update(actor: PolicyActor, config: RunConfig, wait_for_snapshot) -> None:
    train_a_little(actor, config, steps=1)


def compute_with_the_reference(actor: PolicyActor, config: RunConfig, wait_for_snapshot) -> None:
    with actor.reference.in_place():
        wait_for_snapshot()


def offload(actor: PolicyActor, config: RunConfig, wait_for_snapshot) -> None:
    actor.offload()  # frees the memory that is to be copied
    actor.onload()
    for tensor in held(actor):
        tensor.neg_()


def onload(actor: PolicyActor, config: RunConfig, wait_for_snapshot) -> None:
    actor.onload()
    for tensor in held(actor):
        tensor.neg_()


def saved_before(change, waits: bool, config: RunConfig, layout: LayoutConfig, folder: Path) -> tuple[bool, bool, bool]:
    """Save twice, change the state before the second copy has begun, and load the second checkpoint.

    The copy begins when it is waited for, or after the change.

    Returns:
        Whether the saved state has anything but zeros, and whether this rank's masters and moments, and its
        parameters, were loaded as they were saved.
    """
    config.model.dtype, config.algorithm.kl.coefficient = DType.bf16, 0.01
    actor, begin, copies = actor_on(config, layout), threading.Event(), HostBuffer.copies

    def late(buffer, tensors):
        begin.wait()
        return copies(buffer, tensors)

    checkpointer = TrainableCheckpointer(actor.trainable)
    contents = CheckpointContents(models={POLICY: checkpointer})
    checkpoints = Checkpoints(folder, contents, CheckpointConfig(keep=1, asynchronous=False))
    checkpoints.save(1)
    train_a_little(actor, config, steps=1)
    checkpoints.settings.asynchronous, HostBuffer.copies = True, late

    def wait_for_snapshot() -> None:
        begin.set()
        checkpoints.wait_for_snapshot()

    actor.trainable.pre_mutation_hook = wait_for_snapshot if waits else lambda: None
    try:
        with torch.no_grad():
            taken = [tensor.clone() for tensor in held(actor)]
            checkpoints.save(2)
        change(actor, config, wait_for_snapshot)
        wait_for_snapshot()
    finally:
        HostBuffer.copies, actor.trainable.pre_mutation_hook = copies, lambda: None
        begin.set()
        checkpoints.wait(last=True)
    with torch.no_grad():
        for tensor in held(actor):
            tensor.zero_()
        checkpoints.load(checkpoints.latest())
    same, count = list(map(torch.equal, held(actor), taken)), len(shards(actor))
    return any(map(torch.any, taken)), all(same[:count]), all(same[count:])


ONE_RANK = (1, LayoutConfig())


@pytest.mark.parametrize(
    ("change", "world", "layout"),
    [
        pytest.param(update, *ONE_RANK, id="update"),
        pytest.param(update, 4, LayoutConfig(tp=2, dp=2), id="update on TP2 x DP2"),
        pytest.param(compute_with_the_reference, *ONE_RANK, id="reference"),
        pytest.param(offload, *ONE_RANK, id="offload"),
        pytest.param(onload, *ONE_RANK, id="onload"),
    ],
)
def test_what_changes_the_state_waits_until_it_is_copied(ranks, tmp_path, change, world, layout):
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    kept = ranks.run(saved_before, world, change, True, config, layout, tmp_path / "kept")
    assert kept == [(True, True, True)] * world
    if change in (update, compute_with_the_reference):
        early = ranks.run(saved_before, world, change, False, config, layout, tmp_path / "lost")
        # What a data-parallel rank alone holds is lost on each, not only where parameters are written.
        assert early == [(True, change is not update, False)] * world


def written_at_once(config: RunConfig, layout: LayoutConfig, folder: Path) -> tuple[bool, bool]:
    actor = actor_on(config, layout)
    checkpointer = TrainableCheckpointer(actor.trainable)
    contents = CheckpointContents(models={POLICY: checkpointer})
    checkpoints = Checkpoints(folder, contents, CheckpointConfig(keep=1, asynchronous=False))
    for step in (1, 2):
        train_a_little(actor, config, steps=1)
        checkpoints.save(step)
    with torch.no_grad():
        taken = [tensor.clone() for tensor in held(actor)]
        for tensor in held(actor):
            tensor.zero_()
        checkpoints.load(folder / "step_000002")
    return checkpoints.latest().name == "step_000002", all(map(torch.equal, held(actor), taken))


@pytest.mark.parametrize(("world", "layout"), SHAPES)
def test_what_is_written_at_once_comes_back(ranks, tmp_path, world, layout):
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    assert ranks.run(written_at_once, world, config, layout, tmp_path / "kept") == [(True, True)] * world


def took_alone(config: RunConfig, layout: LayoutConfig) -> tuple[int, int]:
    """Take a snapshot on one rank after another; returns the bytes of this rank's, and of this rank's masters."""
    actor = actor_on(config, layout)
    checkpointer, sizes = TrainableCheckpointer(actor.trainable), []
    checkpointer.take()
    for rank in range(dist.get_world_size()):
        if dist.get_rank() == rank:
            snapshot = checkpointer.take()
            snapshot.copy()
            sizes.append(snapshot.nbytes)
        dist.barrier()
    masters = actor.trainable.optimizer.inner.optimizer.param_groups
    return sizes[0], sum(each.nbytes for group in masters for each in group["params"])


def test_no_rank_waits_for_another_to_take_the_state(ranks, tmp_path):
    """Otherwise training would stop while data-parallel ranks gather their shards."""
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    config.model.dtype = DType.bf16
    found = ranks.run(took_alone, 4, config, LayoutConfig())
    whole = sum(masters for _, masters in found)
    # Three of fp32 by shards, and the parameters in bf16 on the first.
    assert [nbytes - 3 * masters for nbytes, masters in found] == [whole // 2, 0, 0, 0]


def test_boxes_hold_the_elements_of_a_stretch_of_memory_in_order():
    draw = random.Random(0)
    for _ in range(3000):
        outer = [draw.randint(1, 4) for _ in range(draw.randint(0, 4))]
        part = whole = torch.arange(torch.Size(outer).numel()).view(outer)
        for axis, size in enumerate(outer):
            first = draw.randrange(size)
            part = part.narrow(axis, first, draw.randint(0 if draw.random() < 0.05 else 1, size - first))
        if draw.random() < 0.3:
            part = part[None]
        low, high = (draw.randint(-1, whole.numel() + 1) for _ in range(2))
        found = list(boxes(part.storage_offset(), tuple(part.shape), part.stride(), low, high))
        elements = []
        for offset, sizes in found:
            box = part[tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))]
            assert box.shape == sizes and 0 not in sizes
            elements += box.reshape(-1).tolist()
        assert elements == [each for each in part.reshape(-1).tolist() if low <= each < high]
        assert len(found) <= max(1, 2 * part.dim() - 1)
