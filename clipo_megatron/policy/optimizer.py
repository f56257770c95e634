"""Megatron's data-parallel wrapper and optimizer, set up so that gradients are plain sums.

The losses carry their global denominators already. Megatron divides gradients in three places (by micro-batches in the
schedule, by data-parallel size in the reduction, by tokens at the end); here, and only here, all three are switched
off: `calculate_per_token_loss` turns off the first two, and `sum_gradients` keeps the token count from the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from clipo_megatron.config.schema import OptimizerConfig
from clipo_megatron.policy.host_memory import HostedTensors
from clipo_megatron.policy.megatron_fields import configured
from clipo_megatron.runtime.platform import platform


def sum_gradients(model: list[torch.nn.Module], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's end of backward without its division by tokens: reduce over DP, TP norms, tied embeddings."""
    finalize_model_grads(model, None, **kwargs)


def data_parallel(
    stage: MegatronModule, settings: OptimizerConfig, *, replicas: int, megatron: Mapping[str, Any]
) -> DistributedDataParallel:
    """Wrap a stage so that its gradients accumulate in fp32 and reduce-scatter over data-parallel ranks.

    Among several `replicas` both that and the gathering of new weights run beside computation, unless the settings say
    otherwise. `megatron` are the fields of that section.
    """
    overlap = replicas > 1 if settings.overlap_grad_reduce is None else settings.overlap_grad_reduce
    fields = configured(
        DistributedDataParallelConfig,
        megatron,
        owned={
            "grad_reduce_in_fp32": True,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": overlap,
            # All buckets are gathered after an update, at once; by default each waits for the one before.
            "align_param_gather": overlap,
            "average_in_collective": False,
        },
        defaults={"overlap_param_gather": overlap},
    )
    wrapped = DistributedDataParallel(stage.config, fields, stage)
    wrapped.broadcast_params()
    stage.config.finalize_model_grads_func = sum_gradients
    if overlap:
        stage.config.no_sync_func = wrapped.no_sync
    return wrapped


def param_buffers(model: DistributedDataParallel) -> list[Any]:
    """Megatron's buffers that hold the weights of a stage, and their gradients."""
    return [*model.buffers, *model.expert_parallel_buffers]


class DistributedAdamW:
    """AdamW with fp32 masters, sharded over data-parallel ranks; it clips gradients and has a learning-rate schedule.

    The learning rate decays over `total_steps` updates. `megatron` are the fields of that section.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        settings: OptimizerConfig,
        *,
        total_steps: int,
        megatron: Mapping[str, Any],
    ):
        self._model, self._hosted = model, HostedTensors()
        fields = configured(
            MegatronOptimizerConfig,
            megatron,
            owned={
                "optimizer": "adam",
                "lr": settings.learning_rate,
                "min_lr": settings.min_learning_rate,
                "weight_decay": settings.weight_decay,
                "adam_beta1": settings.beta1,
                "adam_beta2": settings.beta2,
                "adam_eps": settings.epsilon,
                "clip_grad": settings.max_grad_norm,
                "bf16": model.config.bf16,
                "params_dtype": model.config.params_dtype,
                "use_distributed_optimizer": True,
            },
            defaults={"overlap_param_gather": model.ddp_config.overlap_param_gather},
        )
        with platform().cuda_tensor_names():
            self.inner: MegatronOptimizer = get_megatron_optimizer(fields, [model], use_gloo_process_groups=False)
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0 if settings.warmup_steps else settings.learning_rate,
            max_lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
            lr_decay_style=settings.schedule.value,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
            # On resume the configuration counts, not the checkpoint's: a run may be prolonged.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return max((float(group["lr"]) for group in self.inner.param_groups), default=0.0)

    def gradient_norm(self) -> float:
        """The global norm of the accumulated gradients, before clipping."""
        with platform().cuda_tensor_names():
            self.inner.prepare_grads()
            return float(self.inner.get_grad_norm())

    def step(self) -> None:
        """Clip the accumulated gradients and update masters and weights, but not the schedule.

        Where weights are gathered beside computation, `complete_weights` has to follow before anything but a forward of
        the model's modules reads them.
        """
        with platform().cuda_tensor_names():
            self.inner.step()
        if self._model.ddp_config.overlap_param_gather:
            self._model.start_param_sync()

    def complete_weights(self) -> None:
        """Wait for the weights that other data-parallel ranks have updated, if they are still on their way."""
        if self._model.ddp_config.overlap_param_gather:
            for group in (*self._model.bucket_groups, *self._model.expert_parallel_bucket_groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def offload(self) -> None:
        """Free the gradients, and move masters and moments into host memory."""
        self._model.offload_grad_buffers(empty_cache=False)
        self._hosted.take(self._own_tensors())

    def onload(self) -> None:
        """Undo `offload`. Gradients come back as zeros."""
        self._model.restore_grad_buffers()
        self._hosted.give_back()

    def _own_tensors(self) -> Iterator[Tensor]:
        """Masters and moments on the device. Masters that are the weights themselves, as in fp32, are the model's."""
        weights = {each.param_data.untyped_storage()._cdata for each in param_buffers(self._model)}
        for each in self.inner.chained_optimizers:
            masters = (master for group in each.optimizer.param_groups for master in group["params"])
            states = (value for state in each.optimizer.state.values() for value in state.values())
            for tensor in (*masters, *states):
                is_ours = isinstance(tensor, Tensor) and tensor.dim() and tensor.device.type == platform().device.type
                if is_ours and tensor.untyped_storage()._cdata not in weights:
                    yield tensor
