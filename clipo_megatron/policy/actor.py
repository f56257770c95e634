"""The policy on its ranks: scores rollouts, learns from them, and gives its weights away."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from clipo_megatron.algorithms.base import Signal, TokenBatch
from clipo_megatron.algorithms.correction import LARGEST_EXPONENT, SUMS, correction_metrics, correction_sums
from clipo_megatron.algorithms.kl import kl_estimate
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import CorrectionKind, DType, RunConfig
from clipo_megatron.device import platform
from clipo_megatron.flow import MicroBatch, RolloutTable
from clipo_megatron.policy.contrastive import ContrastiveActor
from clipo_megatron.policy.exchange import from_last_stage, share_from_last_stage
from clipo_megatron.policy.layout import Layout
from clipo_megatron.policy.model import TORCH_DTYPE, build_stages, transformer_config
from clipo_megatron.policy.optimizer import PolicyOptimizer, data_parallel
from clipo_megatron.weights.coverage import check_tensors, match
from clipo_megatron.weights.export import ExportPlan, export, plan_export
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.source import open_weights
from clipo_megatron.weights.spec import ModelSpec, read_config

LossFunction = Callable[[TokenBatch], Tensor]


class PolicyActor:
    """One rank's part of the policy. Every method is collective: all ranks call it, in the same order.

    Raises:
        ValueError: the layout divides experts as this machine's communication cannot.
        WeightsError: the folder cannot be used, or not in this layout.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, needs: frozenset[Signal], total_steps: int):
        self.config = config
        self.layout = layout
        self.needs = needs
        self.spec = model_spec(read_config(hf_folder(config.model.path)))
        _check_experts(self.spec, layout)
        self.stages = layout.division.stages(self.spec.num_layers)
        self.transformer = transformer_config(self.spec, config.model, layout)
        with platform().cuda_tensor_names():
            (self.stage,) = build_stages(self.spec, self.transformer, layout)
            self.stage.to(device=platform().device, dtype=TORCH_DTYPE[config.model.dtype])
        self._load(config.model.path)
        self.model = data_parallel(self.stage, self.transformer, config.optimizer)
        self.optimizer = PolicyOptimizer(
            self.model, config.optimizer, dtype=config.model.dtype, total_steps=total_steps
        )
        self.contrastive = (
            ContrastiveActor(self.spec.hidden_size, config.clipo, layout, seed=config.train.seed)
            if Signal.contrastive in needs and layout.is_last_stage
            else None
        )
        self._reference: list[Tensor] | None = (
            [parameter.detach().clone() for parameter in self.stage.parameters()]
            if Signal.reference_logprobs in needs
            else None
        )
        # Names, shapes and owners of the Hugging Face tensors this policy exports.
        self.export_plan: ExportPlan = plan_export(self.spec, layout.division, dtype=TORCH_DTYPE[config.model.dtype])
        self._forward_backward = get_forward_backward_func()
        self._skipped = self._skipped_in_a_row = 0  # updates: of this step, and since the last that was applied

    def _load(self, folder: str) -> None:
        """Fill this stage from a Hugging Face folder or a checkpoint."""
        at = self.layout.coordinates
        mapping = entries(self.spec, self.stages[self.layout.pp_rank], at)
        parameters = dict(self.stage.named_parameters())
        with open_weights(folder, self.spec) as reader:
            if self.layout.rank == 0:
                check_tensors(reader, self.spec)
            load_into(parameters.items(), mapping, reader, at)
        # Megatron sets this while it initialises weights at random, which we leave out; without it the gradient norm
        # would count the shards of one rank only.
        for name, entry in match(parameters, mapping, at):
            parameters[name].tensor_model_parallel = entry.kind.sharded  # type: ignore[attr-defined]

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch], table: RolloutTable) -> dict[str, float]:
        """One forward without gradient over the step's rollouts.

        Fills, on the last stage, `old_logprobs` (and `reference_logprobs`) of every micro-batch, and on every rank the
        table's signals that the algorithm needs: "contrastive_loss", "contrastive_valid", "kl".

        Args:
            micro_batches: all of the step, in order; each rank of a replica passes the same.
            table: the step's facts, updated in place.

        Returns:
            Metrics of the forward, identical on every rank.
        """
        pooled, rows, entropy = [], [], torch.zeros(2)
        want_pooled = Signal.pooled_states in self.needs or Signal.contrastive in self.needs
        want_entropy = Signal.entropy in self.needs
        outputs = self._forward(micro_batches, want_pooled=want_pooled, want_entropy=want_entropy)
        for micro, output in zip(micro_batches, outputs, strict=False):
            micro.old_logprobs = output["logprobs"]
            if want_pooled:
                pooled.append(output["pooled"])
                rows.append(micro.rows)
            if want_entropy:
                entropy += torch.tensor([output["entropy"].sum().item(), output["entropy"].numel()])
        if Signal.contrastive in self.needs:
            self._contrast(pooled, rows, table)
        if Signal.reference_logprobs in self.needs:
            self._score_reference(micro_batches, table)
        metrics = self._agreement(micro_batches, table)
        if want_entropy:
            total, count = share_from_last_stage(entropy, self.layout, sum_over_dp=True).tolist()
            metrics["policy/entropy"] = total / max(count, 1.0)
        return metrics

    def _contrast(self, pooled: list[Tensor], rows: list[Tensor], table: RolloutTable) -> None:
        result = torch.zeros(2, table.size)
        if self.contrastive is not None:
            loss, valid = self.contrastive.step(torch.cat(pooled), torch.cat(rows), table)
            result = torch.stack([loss, valid.float()])
        result = share_from_last_stage(result, self.layout, sum_over_dp=False)
        table.signals["contrastive_loss"] = result[0]
        table.signals["contrastive_valid"] = result[1] > 0

    def contrastive_metrics(self, table: RolloutTable, bonus: Tensor | None) -> dict[str, float]:
        """What the contrastive head did in this step, the same on every rank; {} without one, or before the first
        `bonus` ([B] float32, what its losses paid)."""
        if Signal.contrastive not in self.needs or bonus is None:
            return {}
        metrics = self.contrastive.metrics(table, bonus) if self.contrastive is not None else {}
        return from_last_stage(metrics, self.layout)

    def _score_reference(self, micro_batches: Sequence[MicroBatch], table: RolloutTable) -> None:
        kind = self.config.algorithm.kl.kind
        sums = torch.zeros(table.size, device=platform().device)
        with self._reference_weights():
            outputs = self._forward(micro_batches, want_pooled=False, want_entropy=False)
        for micro, output in zip(micro_batches, outputs, strict=False):
            micro.reference_logprobs = output["logprobs"]
            per_token = kl_estimate(kind, micro.old_logprobs, micro.reference_logprobs)
            sums.index_add_(0, micro.rows[micro.rollout], per_token)
        table.signals["kl"] = share_from_last_stage(sums, self.layout, sum_over_dp=True)

    def _agreement(self, micro_batches: Sequence[MicroBatch], table: RolloutTable) -> dict[str, float]:
        """How far the engine's log-probs are from the trainer's, and what a correction makes of it.

        policy/mult_prob_error       mean of exp(|log pi_train - log pi_rollout|) over the tokens of fresh rollouts:
                                     same weights on both sides, so what is beyond 1 is precision, or an error
        policy/rollout_kl            mean of log pi_rollout - log pi_train over the same tokens
        off_policy/mult_prob_error   as above, over all tokens: those of older weights too
        off_policy/rollout_kl        k3 estimate of KL(rollout || train) over all tokens
        """
        correction = self.config.algorithm.correction
        sums = torch.zeros(5 + len(SUMS), dtype=torch.float64)
        if self.layout.is_last_stage:
            for micro in micro_batches:
                gap = (micro.old_logprobs - micro.rollout_logprobs).double()
                error = gap.abs().clamp(max=LARGEST_EXPONENT).exp()
                fresh = table.fresh.to(gap.device)[micro.rows][micro.rollout]
                k3 = gap.clamp(max=LARGEST_EXPONENT).exp() - 1 - gap
                parts = [error[fresh].sum(), -gap[fresh].sum(), fresh.sum().double(), error.sum(), k3.sum()]
                sums[:5] += torch.stack(parts).cpu()
                sums[5:] += correction_sums(gap, micro.rollout, correction).cpu()
        sums = share_from_last_stage(sums, self.layout, sum_over_dp=True)
        fresh_error, fresh_kl, fresh_count, error, kl = sums[:5].tolist()
        count = max(float(sums[-1]), 1.0)
        metrics = {"off_policy/mult_prob_error": error / count, "off_policy/rollout_kl": kl / count}
        if fresh_count:
            metrics["policy/mult_prob_error"] = fresh_error / fresh_count
            metrics["policy/rollout_kl"] = fresh_kl / fresh_count
        if correction.kind is not CorrectionKind.none:
            metrics |= correction_metrics(sums[5:])
        return metrics

    def _forward(
        self, micro_batches: Sequence[MicroBatch], *, want_pooled: bool, want_entropy: bool
    ) -> list[dict[str, Tensor]]:
        """Outputs of the last stage a micro-batch; an empty list elsewhere."""

        def collect(micro: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> dict[str, Tensor]:
            logprobs, entropy = self.stage.logprobs(
                hidden, micro, temperature=self.config.rollout.temperature or 1.0, entropy=want_entropy
            )
            output = {"logprobs": logprobs}
            if want_entropy:
                output["entropy"] = entropy
            if want_pooled:
                output["pooled"] = self.stage.pooled_states(hidden, micro)
            return output

        with torch.no_grad():
            return self._run(micro_batches, collect, forward_only=True)

    # --- learning ------------------------------------------------------------------------------------------------

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: LossFunction, *, first: bool = False
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch.

        Args:
            micro_batches: with advantages, weights and old log-probs on the last stage.
            loss: per-token loss [N] of a TokenBatch; the step's loss is its sum under the weights, over all ranks.
            first: whether the weights are still those that were scored; then KL(old || new) must be 0, and is
                reported as "policy/first_update_kl".

        Returns:
            Metrics, identical on every rank. An update whose loss or gradient is not finite is skipped:
            "policy/update_skipped" counts those of the step, "policy/skipped_in_a_row" the latest without one between.
        """
        self.model.zero_grad_buffer()
        self.optimizer.inner.zero_grad()

        def compute(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logprobs, entropy = self.stage.logprobs(
                hidden,
                micro,
                temperature=self.config.rollout.temperature or 1.0,
                entropy=Signal.entropy in self.needs,
            )
            tokens = TokenBatch(
                logprobs=logprobs,
                old_logprobs=micro.old_logprobs,
                advantages=micro.advantages,
                weights=micro.weights,
                rollout=micro.rollout,
                rollout_logprobs=micro.rollout_logprobs,
                reference_logprobs=micro.reference_logprobs,
                entropy=entropy,
            )
            total = (micro.weights * loss(tokens)).sum()
            ratio = (logprobs - micro.old_logprobs).detach()
            metrics = {
                "policy/loss": total.detach(),
                # k3, the low-variance estimate of KL(old || new)
                "policy/update_kl": (micro.weights * (ratio.exp() - 1 - ratio)).sum(),
                "policy/weight": micro.weights.sum(),
                **tokens.metrics,
            }
            count = torch.tensor(logprobs.numel(), dtype=torch.int, device=logprobs.device)
            return total, count, metrics

        outputs = self._run(micro_batches, compute, forward_only=False)
        sums = self._sum_metrics(outputs)
        norm, applied = self.optimizer.step(finite=math.isfinite(sums.get("policy/loss", 0.0)))
        self._skipped = (0 if first else self._skipped) + (not applied)
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if first:
            sums["policy/first_update_kl"] = sums["policy/update_kl"]
        return {
            **sums,
            "policy/grad_norm": norm,
            "policy/update_skipped": float(self._skipped),
            "policy/skipped_in_a_row": float(self._skipped_in_a_row),
            "policy/learning_rate": self.optimizer.learning_rate,
        }

    def _sum_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Add up over micro-batches and data-parallel ranks. Every micro-batch reports the same names."""
        names: list[str] = from_last_stage(sorted(outputs[0]) if outputs else [], self.layout)
        sums = torch.zeros(len(names), dtype=torch.float64)
        for output in outputs:
            sums += torch.stack([output[name].double().cpu() for name in names])
        values = share_from_last_stage(sums, self.layout, sum_over_dp=True).tolist()
        metrics = dict(zip(names, values, strict=True))
        weight = metrics.pop("policy/weight", 0.0)
        return {name: value / weight if weight and name != "policy/loss" else value for name, value in metrics.items()}

    def _run(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """Drive Megatron's pipeline schedule; `last_stage(micro, hidden)` ends each forward."""

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(batches)
            return model(micro), partial(last_stage, micro)

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.numel(),  # only a hint: lengths travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    # --- weights and state ---------------------------------------------------------------------------------------

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by Hugging Face name, whole, on every rank, bucket by bucket."""
        return export(self.export_plan, [dict(self.stage.named_parameters())], self.layout.holder)

    def release_memory(self) -> None:
        """Free what only training needs: gradients, and optimizer state and reference policy into host memory.

        The weights stay, so they can be exported. For servers that take turns with this rank on its GPU.
        """
        self.optimizer.before_change()
        self.model.offload_grad_buffers()
        if self.config.model.dtype is DType.bf16:  # in fp32 the masters are the weights themselves
            self.optimizer.inner.offload_to_cpu()
        if self._reference is not None:
            self._reference = [tensor.cpu() for tensor in self._reference]

    def restore_memory(self) -> None:
        """Inverse of `release_memory`, before `score` or `update`. Gradients come back as zeros."""
        self.optimizer.before_change()
        self.model.restore_grad_buffers()
        if self.config.model.dtype is DType.bf16:
            with platform().cuda_tensor_names():
                self.optimizer.inner.restore_from_cpu()
        if self._reference is not None:
            self._reference = [tensor.to(platform().device) for tensor in self._reference]

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Within, the stage computes with the reference policy's weights."""
        self.optimizer.before_change()
        self._swap_reference()
        try:
            yield
        finally:
            self._swap_reference()

    @torch.no_grad()
    def _swap_reference(self) -> None:
        for parameter, other in zip(self.stage.parameters(), self._reference, strict=True):
            held = parameter.data.clone()
            parameter.data.copy_(other)
            other.copy_(held)


def _check_experts(spec: ModelSpec, layout: Layout) -> None:
    division = layout.division
    if spec.experts is not None and division.ep > 1 and division.expert_tp > 1 and not platform().has_gpu:
        raise ValueError(
            f"experts over ep {division.ep} ranks cannot each be divided over etp {division.expert_tp} more on a CPU, "
            "whose communication knows no gathering of unequal parts; set layout.etp=1"
        )
