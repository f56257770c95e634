"""Changes of weights on gloo ranks of several layouts: put together as servers do, they are the weights to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import RankPool
from sync_steps import make_shard

from clipo_megatron.serving.engine_extension.clipo_delta import WholeTensors, places_of
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.delta import RUN, LastSent, sparse


def exported(shard: Shard) -> dict[str, torch.Tensor]:
    """What this rank sends, whole."""
    plan = shard.plan(2**18)
    return {
        name: tensor.clone()
        for bucket, flat in shard.own_buckets(plan, lambda numel: torch.empty(numel, dtype=plan.dtype))
        for name, tensor in bucket.views(flat)
    }


def follow_changes(folder: str, tp: int, pp: int, ep: int) -> list[tuple[int, set[str]]]:
    """Change a shard in turn a little, nowhere, and of some parameters everything; returns for each change the bytes
    and the names that this rank sent of it."""
    shard = make_shard(folder, tp, pp, ep=ep)
    plan, server, facts = shard.plan(2**18), WholeTensors(), []
    last = LastSent(plan, shard.holder)
    last.remember(shard.chunks())
    for _ in server.take(exported(shard).items()):
        pass
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for share, every in ((0.01, 1), (0.0, 1), (1.0, 3), (0.2, 2)):
        for number, parameter in enumerate(shard.chunks()[0].values()):
            # What is the same on the ranks of a stage stays the same.
            same = torch.Generator().manual_seed(number) if parameter.dim() == 1 else generator
            chosen = (torch.rand(parameter.shape, generator=same) < share) & (number % every == 0)
            parameter.data[chosen] *= -1.25
        sent = [each for bucket in last.changes(shard.chunks()) for each in bucket]
        for _ in server.take(sent):
            pass
        whole = exported(shard)
        assert server.tensors.keys() == whole.keys()
        for name, tensor in whole.items():
            assert tensor.equal(server.tensors[name]), name
        facts.append((sum(tensor.nbytes for _, tensor in sent), {name for name, _ in sent}))
    return facts


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((1, 1, 1), marks=pytest.mark.full),
        (2, 2, 1),
        pytest.param((1, 2, 2), marks=pytest.mark.full),
    ],
    ids="tp{0[0]} pp{0[1]} ep{0[2]}".format,
)
def test_changes_put_together_are_the_weights(layout, ranks: RankPool, tmp_path: Path):
    from tiny_models import tiny_llama, tiny_qwen3_moe  # not at the top: ranks import this file

    tp, pp, ep = layout
    make = tiny_qwen3_moe if ep > 1 else tiny_llama
    folder = make(tmp_path / "model", tied=False, vocab=515, head_dim=16)
    results = ranks.run(follow_changes, tp * pp * ep, str(folder), tp, pp, ep)
    whole = (folder / "model.safetensors").stat().st_size // 2  # the folder's are in fp32
    few, none, many, some = (sum(rank[step][0] for rank in results) for step in range(4))
    assert 0 < few < 0.04 * whole and none == 0 and few < some < many < whole
    names = set().union(*(rank[2][1] for rank in results))
    assert any("|" not in name for name in names), "what has changed altogether is sent whole"


def test_places_come_back_over_many_runs():
    numel = 3 * RUN + 5
    places = torch.tensor([0, 1, RUN - 1, 2 * RUN, 3 * RUN - 1, 3 * RUN + 4])
    parts = {name.partition("|")[2]: part for name, part in sparse("w", places, torch.ones(6), numel)}
    assert places_of(parts["runs"], parts["places"]).equal(places)
