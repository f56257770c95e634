"""A model in training on this rank: its pipeline stage, Megatron's data-parallel wrapper, an optimizer, one update.

The policy and the critic are both trained through it, so that what guards an update is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clipo_megatron.config.schema import OptimizerConfig
from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.policy.optimizer import DistributedAdamW, data_parallel
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.pipeline import Loss, forward, forward_backward, summed_metrics


class Trainable:
    """One rank's part of a model that is trained. Every method is collective: all ranks call it, in the same order.

    Args:
        name: first part of the names of its metrics: "policy" or "critic".
        stage: this rank's pipeline stage, its weights loaded.
        layout: this rank's place.
        settings: the optimizer's.
        total_steps: updates in the whole run, over which the learning rate decays.

    Attributes:
        pre_mutation_hook: called before weights or optimizer state change or move. A checkpoint that copies them in
            another thread has it wait until the copy is done.
    """

    def __init__(self, name: str, stage: PolicyStage, layout: Layout, settings: OptimizerConfig, *, total_steps: int):
        self.name, self.stage, self.layout = name, stage, layout
        self.model = data_parallel(stage, settings)
        self.optimizer = DistributedAdamW(self.model, settings, total_steps=total_steps)
        self.pre_mutation_hook: Callable[[], None] = lambda: None
        self._skipped_in_a_row = 0
        self._weights_on_host: list[tuple[Tensor, Tensor]] = []  # buffers on the device, emptied, and their copies

    def forward(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[[MicroBatch, Tensor], Any]
    ) -> list[Any]:
        """Run the model without gradient; see `pipeline.forward`."""
        return forward(self.model, micro_batches, last_stage)

    def update(self, micro_batches: Sequence[MicroBatch], loss: Loss, *, added_loss: float = 0.0) -> dict[str, float]:
        """One optimizer step; it is skipped, on all ranks alike, when the loss or a gradient is not finite.

        Args:
            micro_batches: this rank's part of the mini-batch.
            loss: the loss [] of a micro-batch from the last stage's states [T, H], and the metrics to add up; the sum
                over all micro-batches and data-parallel ranks is minimised.
            added_loss: what the caller has computed of the loss's value already; its gradient is in `loss`.

        Returns:
            Metrics, identical on every rank: the sums, "<name>/grad_norm" before clipping, "<name>/skipped_in_a_row"
            and the "<name>/learning_rate" of the next update.
        """
        self.model.zero_grad_buffer()
        self.optimizer.inner.zero_grad()
        outputs = forward_backward(self.model, micro_batches, loss)
        metrics = summed_metrics(outputs, self.name, self.layout)
        total = metrics[f"{self.name}/loss"] = metrics.get(f"{self.name}/loss", 0.0) + added_loss
        norm = self.optimizer.gradient_norm()
        if math.isfinite(total) and math.isfinite(norm):
            self.pre_mutation_hook()
            self.optimizer.step()
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
        if weights and not self._weights_on_host:
            for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
                self._weights_on_host.append((buffer.param_data, buffer.param_data.to("cpu", copy=True)))
                buffer.param_data.untyped_storage().resize_(0)

    def onload(self) -> None:
        """Inverse of `offload`. Gradients come back as zeros."""
        self.pre_mutation_hook()
        for weights, copy in self._weights_on_host:
            weights.untyped_storage().resize_(copy.untyped_storage().size())
            weights.copy_(copy)
        self._weights_on_host = []
        self.optimizer.onload()
