"""A model in training on this rank: its pipeline stage, Megatron's data-parallel wrapper, an optimizer, one update.

The policy and the critic are both trained through it, so that what guards an update is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from clipo_megatron.config.schema import OptimizerConfig
from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.batch.exchange import from_last_stage, share_from_last_stage
from clipo_megatron.policy.host_memory import HostedTensors
from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.policy.optimizer import DistributedAdamW, data_parallel, param_buffers
from clipo_megatron.policy.parallel import Layout

Loss = Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Trainable:
    """One rank's part of a model that is trained. Every method is collective: all ranks call it, in the same order.

    Args:
        name: first part of the names of its metrics: "policy" or "critic".
        stage: this rank's pipeline stage, its weights loaded.
        layout: this rank's place in the parallel layout.
        settings: of the optimizer.
        total_steps: updates in the whole run, over which the learning rate decays.
        megatron: the fields of that section of the configuration.

    Attributes:
        pre_mutation_hook: called before weights or optimizer state change or move. A checkpoint that copies them in
            another thread has it wait until the copy is done.
    """

    def __init__(
        self,
        name: str,
        stage: PolicyStage,
        layout: Layout,
        settings: OptimizerConfig,
        *,
        total_steps: int,
        megatron: Mapping[str, Any],
    ):
        self.name, self.stage, self.layout = name, stage, layout
        self.model = data_parallel(stage, settings, replicas=layout.dp * layout.share.size, megatron=megatron)
        self.optimizer = DistributedAdamW(self.model, settings, total_steps=total_steps, megatron=megatron)
        self.pre_mutation_hook: Callable[[], None] = lambda: None
        self._skipped_in_a_row = 0
        self._hosted_weights = HostedTensors()

    def forward(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[[MicroBatch, Tensor], Any]
    ) -> list[Any]:
        """Run the micro-batches through the pipeline without gradient.

        Returns:
            What `last_stage` makes of each micro-batch and its states [T, H]; [] on stages before the last.
        """
        with torch.no_grad():
            return self._run_pipeline(
                micro_batches, lambda micro, hidden, non_loss_data: last_stage(micro, hidden), forward_only=True
            )

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: Loss, *, added_loss: float = 0.0, last: bool = True
    ) -> dict[str, float]:
        """Take one optimizer step, or skip it on all ranks when the loss or a gradient is not finite.

        Args:
            micro_batches: this rank's part of the mini-batch.
            loss: the loss [] of a micro-batch from the last stage's states [T, H], and the metrics to add up; the sum
                over all micro-batches and data-parallel ranks is minimised.
            added_loss: a part of the loss's value that the caller has computed; its gradient comes through `loss`.
            last: whether the weights may be read afterwards; otherwise another `update` or `forward` has to follow,
                during which they are completed.

        Returns:
            Metrics, identical on every rank: the sums, "<name>/grad_norm" before clipping, "<name>/skipped_in_a_row"
            and the "<name>/learning_rate" of the next update.
        """
        self.model.zero_grad_buffer()
        self.optimizer.inner.zero_grad()
        outputs = self._forward_backward(micro_batches, loss)
        metrics = _summed_metrics(outputs, self.name, self.layout)
        total = metrics[f"{self.name}/loss"] = metrics.get(f"{self.name}/loss", 0.0) + added_loss
        norm = self.optimizer.gradient_norm()
        if math.isfinite(total) and math.isfinite(norm):
            self.pre_mutation_hook()
            self.optimizer.step()
            if last:
                self.optimizer.complete_weights()
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
        self.optimizer.schedule.step(increment=1)
        return {
            **metrics,
            f"{self.name}/grad_norm": norm,
            f"{self.name}/skipped_in_a_row": float(self._skipped_in_a_row),
            f"{self.name}/learning_rate": self.optimizer.learning_rate,
        }

    def offload(self, *, weights: bool = False) -> None:
        """Free the gradients, and move the optimizer's state, and the `weights` if asked to, into host memory."""
        self.pre_mutation_hook()
        self.optimizer.offload()
        if weights:
            self._hosted_weights.take(buffer.param_data for buffer in param_buffers(self.model))

    def onload(self) -> None:
        """Undo `offload`. Gradients come back as zeros."""
        self.pre_mutation_hook()
        self._hosted_weights.give_back()
        self.optimizer.onload()

    def _forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Loss) -> list[dict[str, Tensor]]:
        """Add the gradients of the micro-batches' losses to Megatron's buffers.

        Returns:
            The metrics that `loss` returns with each loss; [] on stages before the last.
        """

        def with_count(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value, metrics = loss(micro, hidden)
            count = torch.tensor(micro.targets.numel(), dtype=torch.int, device=hidden.device)
            return value, count, metrics

        return self._run_pipeline(micro_batches, with_count, forward_only=False)

    def _run_pipeline(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """Run Megatron's pipeline schedule; returns what `last_stage` makes of each micro-batch, [] elsewhere."""

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(batches)
            hidden = model(micro)
            # Modules wait for their weights themselves, but `last_stage` reads those of the head.
            self.optimizer.complete_weights()
            return hidden, partial(last_stage, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.numel(),  # only a hint: lengths travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _summed_metrics(outputs: Sequence[dict[str, Tensor]], prefix: str, layout: Layout) -> dict[str, float]:
    """Add up metrics over micro-batches and data-parallel ranks, which report the same names.

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
