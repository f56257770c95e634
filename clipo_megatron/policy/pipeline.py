"""Megatron's pipeline schedule over micro-batches, and sums of what its last stage reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.batch.exchange import from_last_stage, share_from_last_stage
from clipo_megatron.policy.parallel import Layout


def run_pipeline(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    last_stage: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Drive the schedule; `last_stage(micro, hidden)` ends each forward. What it gave a micro-batch; [] elsewhere."""

    def forward_step(batches: Iterator[MicroBatch], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(batches)
        return stage(micro), partial(last_stage, micro)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.numel(),  # only a hint: lengths travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def summed_metrics(outputs: Sequence[dict[str, Tensor]], room: str, layout: Layout) -> dict[str, float]:
    """Added up over micro-batches and data-parallel ranks, which report the same names, and divided by "<room>/weight";
    the losses have their weights already."""
    names: list[str] = from_last_stage(sorted(set().union(*outputs)), layout)
    nothing = torch.zeros(())
    sums = torch.zeros(len(names), dtype=torch.float64)
    for output in outputs:
        sums += torch.stack([output.get(name, nothing).double().cpu() for name in names])
    values = share_from_last_stage(sums, layout, sum_over_dp=True).tolist()
    metrics = dict(zip(names, values, strict=True))
    weight = metrics.pop(f"{room}/weight", 0.0)
    losses = (f"{room}/loss", f"{room}/demonstration_loss")
    return {name: value / weight if weight and name not in losses else value for name, value in metrics.items()}
