"""Shardings against explicit loops, and their inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.mapping import ChunkScope, PipelineStage, Rule, bind, even_stages, fused
from clipo_megatron.weights.sharding import QKV, Fused, GateUp, Interleaved, Replicated, RowParallel, Sharding, Vocab

HIDDEN = 6


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def shards_of(sharding: Sharding, sources: list[Tensor], size: int, local: tuple[int, ...] | None = None) -> Tensor:
    """Shard for all ranks, [size, *local]; elements that are not written stay NaN."""
    local = local or sharding.local_shape([tuple(source.shape) for source in sources], size)
    shards = torch.full((size, *local), float("nan"), dtype=sources[0].dtype)
    for rank in range(size):
        sharding.shard(sources, shards[rank], rank=rank, size=size)
    return shards


def restored(sharding: Sharding, shards: Tensor, sources: list[Tensor]) -> list[Tensor]:
    targets = [torch.full_like(source, float("nan")) for source in sources]
    sharding.unshard(shards, targets)
    return targets


def fused_by_loop(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Order the rows as Megatron does, head by head: for each KV group query heads, key head, value head."""
    rows = []
    for group in range(kv_heads):
        for head in range(heads):
            if head // (heads // kv_heads) == group:
                rows += [q[head * head_dim + i] for i in range(head_dim)]
        rows += [k[group * head_dim + i] for i in range(head_dim)]
        rows += [v[group * head_dim + i] for i in range(head_dim)]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tp"),
    [
        (4, 2, 8, 1),
        (4, 2, 8, 2),
        (4, 2, 8, 4),  # a KV group over two ranks
        (8, 1, 4, 4),  # one KV head over four ranks
        (9, 3, 5, 3),
        (4, 4, 3, 2),  # no grouping
        (6, 2, 2, 4),  # chunks that begin inside a head's rows of another sharding
        (12, 4, 2, 2),
    ],
)
def test_qkv_equals_the_loop_and_comes_back(
    heads: int, kv_heads: int, head_dim: int, tp: int, bias: bool, dtype: torch.dtype
) -> None:
    rest = () if bias else (HIDDEN,)
    sources = [random(n * head_dim, *rest, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
    sharding = QKV(kv_heads)
    shards = shards_of(sharding, sources, tp)
    expected = fused_by_loop(*sources, heads, kv_heads, head_dim)
    assert torch.equal(shards.flatten(0, 1), expected)
    for source, back in zip(sources, restored(sharding, shards, sources), strict=True):
        assert torch.equal(back, source)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_fused_tensor_is_its_parts_end_to_end(tp: int) -> None:
    q, k, v = random(16, HIDDEN), random(8, HIDDEN), random(8, HIDDEN)
    sharding, tensor = Fused(QKV(2), (16, 8, 8)), torch.cat([q, k, v])
    shards = shards_of(sharding, [tensor], tp)
    assert torch.equal(shards.flatten(0, 1), fused_by_loop(q, k, v, 4, 2, 4))
    assert torch.equal(restored(sharding, shards, [tensor])[0], tensor)
    gated, both = Fused(GateUp(), (16, 16)), torch.cat([q, k, v])
    assert torch.equal(shards_of(gated, [both], tp), shards_of(GateUp(), list(both.chunk(2)), tp))
    assert torch.equal(restored(gated, shards_of(gated, [both], tp), [both])[0], both)


def test_a_rule_from_one_tensor_keeps_the_order() -> None:
    rule = Rule("m", {"a": (4, HIDDEN), "b": (2, HIDDEN), "c": (2, HIDDEN)}, QKV(2))
    one = fused(rule, "abc")
    assert one.hf == {"abc": (8, HIDDEN)} and one.sharding == Fused(rule.sharding, (4, 2, 2)) and one.megatron == "m"


def test_the_loop_notices_swapped_projections() -> None:
    q, k, v = random(8, HIDDEN), random(8, HIDDEN), random(8, HIDDEN)
    fused = shards_of(QKV(2), [q, k, v], 1)[0]
    assert torch.equal(fused, fused_by_loop(q, k, v, 2, 2, 4))
    for wrong in ((k, q, v), (q, v, k), (v, k, q)):
        assert not torch.equal(fused, fused_by_loop(*wrong, 2, 2, 4))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gate_and_up_stand_beside_each_other_on_every_rank(tp: int) -> None:
    gate, up = random(8, HIDDEN), random(8, HIDDEN)
    shards = shards_of(GateUp(), [gate, up], tp)
    for rank in range(tp):
        share = slice(rank * 8 // tp, (rank + 1) * 8 // tp)
        assert torch.equal(shards[rank], torch.cat([gate[share], up[share]]))
        assert not torch.equal(shards[rank], torch.cat([up[share], gate[share]]))
    back = restored(GateUp(), shards, [gate, up])
    assert torch.equal(back[0], gate)
    assert torch.equal(back[1], up)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_column_row_and_replicated(tp: int) -> None:
    weight, norm = random(8, 12), random(5)
    columns, rows = shards_of(Interleaved(), [weight], tp), shards_of(RowParallel(), [weight], tp)
    assert torch.equal(torch.cat(list(columns), 0), weight)
    assert torch.equal(torch.cat(list(rows), 1), weight)
    assert torch.equal(shards_of(Replicated(), [norm], tp), norm.expand(tp, 5))
    for sharding, shards, source in ((Interleaved(), columns, weight), (RowParallel(), rows, weight)):
        assert torch.equal(restored(sharding, shards, [source])[0], source)


@pytest.mark.parametrize(
    ("vocab", "held", "tp"),
    [(7, 7, 1), (7, 16, 1), (7, 4, 2), (7, 2, 4), (7, 4, 4), (8, 4, 2), (5, 5, 4), (16, 4, 4)],
)
def test_vocabulary_is_padded_with_zeros_and_cut_back(vocab: int, held: int, tp: int) -> None:
    table = random(vocab, HIDDEN)
    sharding = Vocab()
    assert sharding.fits((held, HIDDEN), [(vocab, HIDDEN)], tp)
    shards = shards_of(sharding, [table], tp, (held, HIDDEN))
    flat = shards.flatten(0, 1)
    assert torch.equal(flat[:vocab], table)
    assert torch.equal(flat[vocab:], torch.zeros(held * tp - vocab, HIDDEN))
    shards[shards == 0] = 1e9  # what training leaves in the padding must not come out
    assert torch.equal(restored(sharding, shards, [table])[0], table)


def test_vocabulary_that_does_not_fit_is_seen() -> None:
    assert not Vocab().fits((3, HIDDEN), [(7, HIDDEN)], 2)
    assert not Vocab().fits((4, HIDDEN + 1), [(7, HIDDEN)], 2)


def test_shards_may_be_strided_as_a_gathered_bucket_leaves_them() -> None:
    sources = [random(n * 4, HIDDEN) for n in (4, 2, 2)]
    sharding = QKV(2)
    shards = shards_of(sharding, sources, 2)
    wide = torch.zeros(2, 3 + shards[0].numel() + 5)
    wide[:, 3:-5] = shards.flatten(1)
    strided = wide[:, 3:-5].unflatten(1, shards.shape[1:])
    for source, back in zip(sources, restored(sharding, strided, sources), strict=True):
        assert torch.equal(back, source)


@pytest.mark.parametrize(
    ("sharding", "shapes"),
    [
        (Interleaved(), [(10, 4)]),
        (RowParallel(), [(4, 10)]),
        (GateUp(), [(10, 4), (10, 4)]),
        (QKV(1), [(3, 4), (1, 4), (1, 4)]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(
    sharding: Sharding, shapes: list[tuple[int, int]]
) -> None:
    message = r"^\d+ (rows|columns) cannot be divided into 4 equal parts, but into \d( or \d+)?$"
    with pytest.raises(WeightsError, match=message):
        sharding.local_shape(shapes, 4)


def test_parts_are_cast_to_the_parameter() -> None:
    weight = random(4, 4)
    target = torch.empty(2, 4, dtype=torch.bfloat16)
    Interleaved().shard([weight], target, rank=1, size=2)
    assert torch.equal(target, weight[2:].bfloat16())


def test_layers_are_local_on_one_side_and_global_on_the_other() -> None:
    rules = [
        Rule("first", {"hf.first": (1,)}, Replicated(), scope=ChunkScope.FIRST),
        Rule(("m.{layer}", "te.{layer}"), {"hf.{layer}": (1,)}, Replicated()),
        Rule("last", {"hf.last": (1,)}, Replicated(), scope=ChunkScope.LAST),
        Rule("copy", {"hf.first": (1,)}, Replicated(), scope=ChunkScope.LAST, copy=True),
    ]
    first, second = (bind(rules, stage) for stage in even_stages(4, 2))
    assert [(entry.megatron, entry.hf[0].name) for entry in first] == [
        (("first",), "hf.first"),
        (("m.0", "te.0"), "hf.0"),
        (("m.1", "te.1"), "hf.1"),
    ]
    assert [(entry.megatron[0], entry.hf[0].name) for entry in second] == [
        ("m.0", "hf.2"),
        ("m.1", "hf.3"),
        ("last", "hf.last"),
        ("copy", "hf.first"),
    ]
    whole = bind(rules, PipelineStage(0, 4, first=True, last=True))
    assert "copy" not in [entry.megatron[0] for entry in whole]


def test_uneven_stages_are_refused() -> None:
    with pytest.raises(WeightsError, match="30 layers cannot be divided into 4"):
        even_stages(30, 4)
