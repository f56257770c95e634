"""Megatron's data-parallel wrapper and optimizer, set up so that gradients are plain sums.

The losses carry their global denominators already. Megatron divides gradients in three places (by micro-batches in the
schedule, by data-parallel size in the reduction, by tokens at the end); here, and only here, all three are switched
off: `calculate_per_token_loss` turns off the first two, and `sum_gradients` keeps the token count from the third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from clipo_megatron.config.schema import DType, OptimizerConfig
from clipo_megatron.runtime.platform import platform


def sum_gradients(model: list[torch.nn.Module], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's end of backward without its division by tokens: reduce over DP, TP norms, tied embeddings."""
    finalize_model_grads(model, None, **kwargs)


def data_parallel(stage: torch.nn.Module, config: TransformerConfig, optimizer: OptimizerConfig) -> torch.nn.Module:
    """Wrap a stage so that its gradients accumulate in fp32 and reduce-scatter over data-parallel ranks."""
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            average_in_collective=False,
        ),
        stage,
    )
    wrapped.broadcast_params()
    config.finalize_model_grads_func = sum_gradients
    if optimizer.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
    return wrapped


class PolicyOptimizer:
    """Distributed AdamW with fp32 masters, gradient clipping and a learning-rate schedule.

    A gradient that is not finite skips the update; the caller records it.

    Attributes:
        before_change: called before anything changes or moves the weights or the optimizer's state. Whoever reads them
            in another thread, as a checkpoint does, has it wait.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, *, dtype: DType, total_steps: int):
        self.pre_mutation_hook: Callable[[], None] = lambda: None
        self._model, self._dtype = model, dtype
        with platform().cuda_tensor_names():
            self.inner: MegatronOptimizer = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=config.learning_rate,
                    min_lr=config.min_learning_rate,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.beta1,
                    adam_beta2=config.beta2,
                    adam_eps=config.epsilon,
                    clip_grad=config.max_grad_norm,
                    bf16=dtype is DType.bf16,
                    params_dtype=torch.bfloat16 if dtype is DType.bf16 else torch.float32,
                    use_distributed_optimizer=True,
                ),
                [model],
                use_gloo_process_groups=False,
            )
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0 if config.warmup_steps else config.learning_rate,
            max_lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(total_steps, config.warmup_steps + 1),
            lr_decay_style=config.schedule.value,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
            # On resume the configuration counts, not the checkpoint's: a run may be prolonged.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return max((float(group["lr"]) for group in self.inner.param_groups), default=0.0)

    def step(self, *, finite: bool = True) -> tuple[float, bool]:
        """Apply the accumulated gradients, if they and the loss are `finite`.

        Returns:
            Global gradient norm before clipping, and whether the update was applied.
        """
        with platform().cuda_tensor_names():
            self.inner.prepare_grads()
            norm = float(self.inner.get_grad_norm())
            applied = finite and math.isfinite(norm)
            if applied:
                self.pre_mutation_hook()
                self.inner.step()
        self.schedule.step(increment=1)
        return norm, applied

    def offload(self) -> None:
        """Free the gradients, and move the optimizer's state into host memory."""
        self.pre_mutation_hook()
        self._model.offload_grad_buffers()
        if self._dtype is DType.bf16:  # in fp32 the masters are the weights themselves
            self.inner.offload_to_cpu()

    def restore_memory(self) -> None:
        """Inverse of `offload`. Gradients come back as zeros."""
        self.pre_mutation_hook()
        self._model.restore_grad_buffers()
        if self._dtype is DType.bf16:
            with platform().cuda_tensor_names():
                self.inner.restore_from_cpu()
