"""The policy's state as it was taken: whatever training does while it is written, in any data-parallel division."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy_steps import configuration
from tiny_models import tiny_llama

from clipo_megatron.config.schema import DType, LayoutConfig, RunConfig
from clipo_megatron.files import FolderWriter, crc32
from clipo_megatron.policy import layout as layouts
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.snapshot import HostBuffer
from clipo_megatron.policy.state import load_policy, take_policy

SHAPES = [pytest.param(1, LayoutConfig(), id="one rank"), pytest.param(4, LayoutConfig(tp=2, dp=2), id="TP2 x DP2")]


def held(actor: PolicyActor) -> list[torch.Tensor]:
    """All that this rank holds of parameters and masters."""
    masters = [each for group in actor.optimizer.inner.optimizer.param_groups for each in group["params"]]
    return [tensor.detach() for tensor in (*actor.stage.parameters(), *masters)]


def written_late(config: RunConfig, layout: LayoutConfig, folder: str, copied: bool) -> tuple[bool, bool, Any]:
    """Take a snapshot twice, change everything after the second, write that one, and load it.

    Returns:
        Whether what was loaded is as when it was taken, and as it was afterwards; and what the files are.
    """
    config.model.dtype, config.layout = DType.bf16, layout
    actor = PolicyActor(config, layouts.initialize(layout, seed=0), needs=frozenset(), total_steps=1)
    buffer = HostBuffer() if copied else None
    with torch.no_grad():
        take_policy(actor.stage, actor.optimizer, buffer)
        for number, tensor in enumerate(held(actor)):
            tensor.fill_(number + 1)
        taken = [tensor.clone() for tensor in held(actor)]
        snapshot, files = take_policy(actor.stage, actor.optimizer, buffer, check=False), FolderWriter(Path(folder))
        for tensor in held(actor):
            tensor.neg_()
        after = [tensor.clone() for tensor in held(actor)]
        places = [[]] * dist.get_world_size()
        dist.all_gather_object(places, snapshot.write(files))
        if dist.get_rank() == 0:
            snapshot.finish(files, places)
        dist.barrier()
        for tensor in held(actor):
            tensor.zero_()
    load_policy(Path(folder), actor.stage, actor.optimizer)
    entries = {
        name: {"bytes": (path := Path(folder) / name).stat().st_size, "crc32": crc32(path)} for name in files.written
    }
    return (
        all(map(torch.equal, held(actor), taken)),
        all(map(torch.equal, held(actor)[: len(list(actor.stage.parameters()))], after)),
        entries == files.written and bool(entries),
    )


@pytest.mark.parametrize(("world", "layout"), SHAPES)
def test_a_copy_is_of_the_moment_and_comes_back(ranks, tmp_path, world, layout):
    config = configuration(tiny_llama(tmp_path / "model"))
    (tmp_path / "copy").mkdir()
    results = ranks.run(written_late, world, config, layout, str(tmp_path / "copy"), True)
    assert {(taken, after) for taken, after, _ in results} == {(True, False)}
    assert results[0][2]


def test_without_a_copy_it_is_of_the_writing(ranks, tmp_path):
    config = configuration(tiny_llama(tmp_path / "model"))
    (tmp_path / "direct").mkdir()
    ((taken, after, entries),) = ranks.run(written_late, 1, config, LayoutConfig(), str(tmp_path / "direct"), False)
    assert (taken, after, entries) == (False, True, True)
