"""Live export from ranks in any layout: whole tensors, in plan order, bit for bit, on the right ranks."""

from __future__ import annotations

import itertools
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from clipo_megatron.weights.errors import CoverageError, WeightsError
from clipo_megatron.weights.export import Holder, export, plan_export
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import SINGLE, HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.mapping import Coordinates, PipelineStage, even_stages
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import read_config

DEADLINE_S = 120
VOCAB = 263  # odd, and padded below


def loaded(folder: Path, stage: PipelineStage, *, rank: int = 0, tp: int = 1) -> dict[str, Tensor]:
    """Make one chunk's parameters, with a vocabulary padded by a few rows of random numbers."""
    spec = model_spec(read_config(folder))
    model = {}
    for entry in entries(spec, stage):
        shape = list(entry.sharding.local_shape(entry.shapes, tp))
        if shape[0] * tp >= VOCAB:
            shape[0] += 3
        model[entry.megatron[0]] = torch.full(shape, float("nan"))
    with HFReader(folder) as reader:
        load_into(model.items(), entries(spec, stage), reader, Coordinates(tp=tp, tp_rank=rank))
    return model


def folders(root: Path) -> list[Path]:
    from tiny_models import (
        tiny_llama,
        tiny_qwen2,
    )  # not at the top: the ranks import this file, and need no transformers

    return [
        tiny_llama(root / "llama", tied=True, vocab=VOCAB, head_dim=24),
        tiny_qwen2(root / "qwen2", tied=False, vocab=VOCAB, seed=1),
    ]


def check(folder: Path, exported: list[tuple[str, Tensor]], order: list[str], dtype: torch.dtype) -> None:
    source = load_file(folder / SINGLE)
    assert [name for name, _ in exported] == order
    assert set(order) == set(source) and len(order) == len(source)
    wrong = [name for name, tensor in exported if not torch.equal(tensor, source[name].to(dtype))]
    assert wrong == []
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for _, tensor in exported)


def test_one_rank(tmp_path: Path) -> None:
    for folder, dtype in itertools.product(folders(tmp_path), (torch.float32, torch.bfloat16)):
        spec = model_spec(read_config(folder))
        plan = plan_export(spec, ParallelDivision(), dtype=dtype, bucket_bytes=64 * 1024)
        exported = list(export(plan, [loaded(folder, *plan.stages(0))]))
        check(folder, exported, [tensor.name for tensor in plan.tensors], dtype)
        assert plan.nbytes == sum(tensor.nbytes for _, tensor in exported)


def test_exported_tensors_are_not_the_parameters(tmp_path: Path) -> None:
    folder = folders(tmp_path)[0]
    spec = model_spec(read_config(folder))
    plan = plan_export(spec, ParallelDivision(), dtype=torch.float32)
    model = loaded(folder, *plan.stages(0))
    exported = list(export(plan, [model]))
    for parameter in model.values():
        parameter.zero_()
    check(folder, exported, [tensor.name for tensor in plan.tensors], torch.float32)


def test_buckets_keep_to_their_size_and_are_let_go(tmp_path: Path) -> None:
    folder = folders(tmp_path)[0]
    spec = model_spec(read_config(folder))
    limit = 64 * 1024
    plan = plan_export(spec, ParallelDivision(), dtype=torch.float32, bucket_bytes=limit)
    assert len(plan.buckets) > 3
    assert all(bucket.numel * 4 <= limit or len(bucket.entries) == 1 for bucket in plan.buckets)
    alive: list[weakref.ref[Tensor]] = []
    for _, tensor in export(plan, [loaded(folder, *plan.stages(0))]):
        buffer = tensor._base
        assert buffer is not None
        if not alive or alive[-1]() is not buffer:
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(buffer))
        del buffer, tensor
    assert len(alive) == len(plan.buckets)


def test_a_model_that_is_not_the_planned_one_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    folder = folders(tmp_path)[0]
    spec = model_spec(read_config(folder))
    plan = plan_export(spec, ParallelDivision(), dtype=torch.float32)
    model = loaded(folder, *plan.stages(0))
    del model["decoder.final_layernorm.weight"]
    with pytest.raises(CoverageError, match=r"model\.norm\.weight"):
        export(plan, [model])


def test_a_plan_for_other_groups_is_refused(tmp_path: Path) -> None:
    folder = folders(tmp_path)[0]
    spec = model_spec(read_config(folder))
    model = loaded(folder, *even_stages(spec.num_layers, 1))
    for division in (ParallelDivision(tp=2), ParallelDivision(pp=2)):
        plan = plan_export(spec, division, dtype=torch.float32)
        with pytest.raises(WeightsError, match=r"planned for (tp|pp)=2, and \1_group has 1 ranks"):
            export(plan, [model])
    with pytest.raises(WeightsError, match="planned for 1 model chunks a rank, not 2"):
        export(plan_export(spec, ParallelDivision(), dtype=torch.float32), [model, model])


# --- several ranks ---------------------------------------------------------------------------------------------------


def groups_of(tp: int, pp: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make all groups in Megatron's order of ranks, in which TP changes fastest; collective."""
    mine: list[dist.ProcessGroup] = []
    for lists in (
        [[p * tp + t for t in range(tp)] for p in range(pp)],
        [[p * tp + t for p in range(pp)] for t in range(tp)],
    ):
        for ranks in lists:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine.append(group)
    return mine[0], mine[1]


def rank_main(rank: int, world: int, root: str, rendezvous: str) -> None:
    """Export two families in every layout of `world` ranks; an assertion here fails the test."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timeout)
    for tp in (1, 2, 4):
        pp = world // tp
        tp_group, pp_group = groups_of(tp, pp)
        for folder, dtype in ((Path(root, "llama"), torch.float32), (Path(root, "qwen2"), torch.bfloat16)):
            spec = model_spec(read_config(folder))
            division = ParallelDivision(tp=tp, pp=pp, vpp=2 if pp == 2 else 1)
            plan = plan_export(spec, division, dtype=dtype, bucket_bytes=48 * 1024)
            chunks = [loaded(folder, stage, rank=rank % tp, tp=tp) for stage in plan.stages(rank // tp)]
            holder = Holder(
                at=Coordinates(tp=tp, tp_rank=rank % tp), pp_rank=rank // tp, tp_group=tp_group, pp_group=pp_group
            )
            order = [tensor.name for tensor in plan.tensors]
            check(folder, list(export(plan, chunks, holder)), order, dtype)
            alone = list(export(plan, chunks, holder, to_all=False))
            check(folder, alone, order, dtype) if rank == 0 else _nothing(alone)
    dist.barrier()
    dist.destroy_process_group()


def _nothing(exported: list[tuple[str, Tensor]]) -> None:
    assert exported == []


def test_every_layout_of_four_ranks(tmp_path: Path) -> None:
    folders(tmp_path)
    context = mp.start_processes(
        rank_main, args=(4, str(tmp_path), str(tmp_path / "rendezvous")), nprocs=4, join=False, start_method="spawn"
    )
    try:
        while not context.join(timeout=1):
            pass
    finally:
        for process in context.processes:
            process.kill()
