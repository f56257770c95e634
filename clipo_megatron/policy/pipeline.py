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

Loss = Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


def forward(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], last_stage: Callable[[MicroBatch, Tensor], Any]
) -> list[Any]:
    """Run the micro-batches through the pipeline without gradient.

    Returns:
        What `last_stage` makes of each micro-batch and its states [T, H]; [] on stages before the last.
    """
    with torch.no_grad():
        return _run(
            model, micro_batches, lambda micro, hidden, non_loss_data: last_stage(micro, hidden), forward_only=True
        )


def forward_backward(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], loss: Loss
) -> list[dict[str, Tensor]]:
    """Run the micro-batches through the pipeline and add the gradients of their losses to Megatron's buffers.

    Returns:
        The metrics that `loss` returns with each loss; [] on stages before the last.
    """

    def with_count(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        value, metrics = loss(micro, hidden)
        count = torch.tensor(micro.targets.numel(), dtype=torch.int, device=hidden.device)
        return value, count, metrics

    return _run(model, micro_batches, with_count, forward_only=False)


def _run(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
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


def summed_metrics(outputs: Sequence[dict[str, Tensor]], prefix: str, layout: Layout) -> dict[str, float]:
    """Metrics added up over micro-batches and data-parallel ranks, which report the same names.

    The sums are divided by "<prefix>/weight", the sum of all tokens' weights. Losses are weighted already and are not.
    """
    names: list[str] = from_last_stage(sorted(set().union(*outputs)), layout)
    nothing = torch.zeros(())
    sums = torch.zeros(len(names), dtype=torch.float64)
    for output in outputs:
        sums += torch.stack([output.get(name, nothing).double().cpu() for name in names])
    values = share_from_last_stage(sums, layout, sum_over_dp=True).tolist()
    metrics = dict(zip(names, values, strict=True))
    weight = metrics.pop(f"{prefix}/weight", 0.0)
    losses = (f"{prefix}/loss", f"{prefix}/demonstration_loss")
    return {name: value / weight if weight and name not in losses else value for name, value in metrics.items()}
