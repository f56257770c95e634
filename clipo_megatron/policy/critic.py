"""The critic on its ranks: values of the states in rollouts, and what it learns of their returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.model_folder import hf_folder, tokens_of
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.batch.exchange import share_from_last_stage
from clipo_megatron.policy.loading import load_stage
from clipo_megatron.policy.model.model import TORCH_DTYPE, transformer_config
from clipo_megatron.policy.model.value_model import ValueStage
from clipo_megatron.policy.optimizer import PolicyOptimizer, data_parallel
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.pipeline import run_pipeline, summed_metrics
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config


class CriticActor:
    """One rank's part of a value model in the policy's layout: the same tensor, pipeline and data-parallel groups, the
    same micro-batches. Every method is collective: all ranks call it, in the same order.

    It starts from the weights of critic.path, or the policy's, without their LM head, and a value head near zero.

    Raises:
        WeightsError: the folder cannot be used, or not in this layout.
        ConfigError: it is of another vocabulary than the policy.
    """

    def __init__(self, config: RunConfig, layout: Layout):
        self.config, self.layout = config, layout
        settings = config.critic
        path = settings.path or config.model.path
        if settings.path is not None:
            same_vocabulary(settings.path, config.model.path)
        self.spec = model_spec(read_config(hf_folder(path)))
        transformer = transformer_config(self.spec, config.model, layout)
        with platform().cuda_tensor_names():
            self.stage = ValueStage(self.spec, transformer, layout, seed=config.train.seed)
            self.stage.to(device=platform().device, dtype=TORCH_DTYPE[config.model.dtype])
        load_stage(self.stage, path, layout)
        self.model = data_parallel(self.stage, transformer, config.optimizer)
        self.epochs = settings.epochs or config.algorithm.epochs
        schedule = replace(
            config.optimizer,
            learning_rate=settings.learning_rate,
            min_learning_rate=min(config.optimizer.min_learning_rate, settings.learning_rate),
        )
        self.optimizer = PolicyOptimizer(
            self.model,
            schedule,
            dtype=config.model.dtype,
            total_steps=config.train.steps * config.algorithm.mini_batches * self.epochs,
        )
        self._away: list[tuple[Tensor, Tensor]] = []  # weights on the device, emptied, and their copies on the host
        self._skipped_in_a_row = 0

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A forward without gradient. Fills, on the last stage, [N] float32 each of every micro-batch:

        signals["value"], the value of the state that predicts each response token, and signals["next_value"], that of
        the state with the token: the next one's "value", and behind the last token what a bootstrap continues from.
        """

        def collect(micro: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor]:
            return self.stage.values(hidden, micro.predict), self.stage.values(hidden, micro.states)

        with torch.no_grad():
            outputs = self._run(micro_batches, collect, forward_only=True)
        for micro, (value, after) in zip(micro_batches, outputs, strict=False):
            micro.signals |= {"value": value, "next_value": after}

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(self, batches: Sequence[Sequence[MicroBatch]]) -> dict[str, float]:
        """One optimizer step a mini-batch and epoch, on signals["return"].

        Args:
            batches: the micro-batches of each mini-batch, as the batcher credits them.

        Returns:
            Metrics, identical on every rank: of the last update, and over the step's tokens that train
            "critic/value_mean", "critic/return_mean" and "critic/explained_variance", 1 - Var(R - V) / Var(R), all of
            the values before the update; 0 where the returns do not vary.
        """
        metrics = self._fit([micro for batch in batches for micro in batch])
        skipped = 0.0
        for _ in range(self.epochs):
            for batch in batches:
                metrics |= self.update(batch)
                skipped += metrics["critic/skipped_in_a_row"] > 0
        return metrics | {"critic/update_skipped": skipped}

    def update(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step: half the squared distance to the returns, where the value is held within critic.clip of
        what it was if that makes the distance larger (arXiv 1707.06347's code), weighed as the policy's tokens are.

        Returns:
            Metrics, identical on every rank. An update whose loss or gradient is not finite is skipped.
        """
        clip = self.config.critic.clip
        self.model.zero_grad_buffer()
        self.optimizer.inner.zero_grad()

        def compute(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            values = self.stage.values(hidden, micro.predict)
            per_token, held = value_loss(values, micro.signals["value"], _returns(micro), clip)
            loss = (micro.weights * per_token).sum()
            count = torch.tensor(values.numel(), dtype=torch.int, device=values.device)
            metrics = {
                "critic/loss": loss.detach(),
                "critic/weight": micro.weights.sum(),
                "critic/clip_fraction": (micro.weights * held).sum(),
            }
            return loss, count, metrics

        sums = summed_metrics(self._run(micro_batches, compute, forward_only=False), "critic", self.layout)
        norm, applied = self.optimizer.step(finite=math.isfinite(sums["critic/loss"]))
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        return {
            **sums,
            "critic/grad_norm": norm,
            "critic/skipped_in_a_row": float(self._skipped_in_a_row),
            "critic/learning_rate": self.optimizer.learning_rate,
        }

    def _fit(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """How well the scored values fit the returns."""
        sums = torch.zeros(6, dtype=torch.float64, device=platform().device)
        if self.layout.is_last_stage:
            for micro in micro_batches:
                value, target = micro.signals["value"].double(), _returns(micro).double()
                error = target - value
                columns = (torch.ones_like(value), value, target, target.square(), error, error.square())
                sums += torch.stack(columns).sum(1)
        count, *totals = share_from_last_stage(sums, self.layout, sum_over_dp=True).tolist()
        value, target, target_square, error, error_square = (total / max(count, 1.0) for total in totals)
        spread = target_square - target**2
        # Equal returns leave rounding errors of their mean's square here.
        varies = spread > 1e-12 * max(target_square, 1e-12)
        return {
            "critic/value_mean": value,
            "critic/return_mean": target,
            "critic/explained_variance": 1 - (error_square - error**2) / spread if varies else 0.0,
        }

    def _run(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        return run_pipeline(self.model, micro_batches, last_stage, forward_only=forward_only)

    # --- memory ------------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free the gradients, and move weights and optimizer state into host memory: nobody exports a critic."""
        self.optimizer.offload()
        if self._away:
            return
        for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
            self._away.append((buffer.param_data, buffer.param_data.to("cpu", copy=True)))
            buffer.param_data.untyped_storage().resize_(0)

    def restore_memory(self) -> None:
        """Inverse of `offload`, before `score` or `learn`."""
        for weights, copy in self._away:
            weights.untyped_storage().resize_(copy.untyped_storage().size())
            weights.copy_(copy)
        self._away = []
        self.optimizer.restore_memory()


def same_vocabulary(path: str, policy: str) -> None:
    """Hold the tokens of the folder that a critic starts from against the policy's, whose ids it reads.

    Tokenizers are compared where both folders have a tokenizer.json; a token that one alone has is no contradiction.

    Raises:
        ConfigError: the embeddings differ in size, or an id is another token.
    """
    sizes = [read_config(hf_folder(each)).get("vocab_size") for each in (path, policy)]
    remedy = "Choose a model with the policy's vocabulary, or null to start from the policy's weights"
    if sizes[0] != sizes[1]:
        reason = f"its vocab_size is {sizes[0]}, and that of model.path is {sizes[1]}; it reads the policy's tokens"
        raise ConfigError([ConfigProblem("critic.path", reason, remedy, path)])
    own, others = tokens_of(path), tokens_of(policy)
    if own is None or others is None:
        return
    differing = min((token for token in own.keys() & others.keys() if own[token] != others[token]), default=None)
    if differing is not None:
        reason = f"its token {differing} is {own[differing]!r}, and that of model.path is {others[differing]!r}"
        raise ConfigError([ConfigProblem("critic.path", f"{reason}; it reads the policy's tokens", remedy, path)])


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether it is that of the value held within `clip` of the old one; [N] each."""
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    limited = (old + (values - old).clamp(-clip, clip) - returns).square()
    held = ((values - old).abs() > clip) & (limited > plain)
    return 0.5 * torch.maximum(plain, limited), held


def _returns(micro: MicroBatch) -> Tensor:
    if "return" not in micro.signals:
        raise ValueError("the algorithm needs values, and no stage's token_advantage gives the critic `returns`")
    return micro.signals["return"]
