"""The critic on its ranks: values of the states in rollouts, learned from the rollouts' returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.model_folder import vocabulary_problem
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.batch.exchange import share_from_last_stage
from clipo_megatron.policy.model.value_model import ValueStage
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.policy import loaded_stage
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform


class CriticActor:
    """One rank's part of a value model. Every method is collective: all ranks call it, in the same order.

    It shares the policy's layout, process groups and micro-batches. It starts from the weights of critic.path, or the
    policy's, without their LM head, and a value head near zero.

    Raises:
        ConfigError: critic.path has another vocabulary than the policy.
        ValueError, WeightsError: as `loaded_stage` for the folder.
    """

    def __init__(self, config: RunConfig, layout: Layout):
        self.layout, self.clip = layout, config.critic.clip
        path = config.critic.path or config.model.path
        if config.critic.path and (problem := vocabulary_problem(path, config.model.path)):
            raise ConfigError([problem])
        build = partial(ValueStage, seed=config.train.seed)
        self.stage = loaded_stage(build, path, config, layout)
        self.spec = self.stage.spec
        self.epochs = config.critic.epochs or config.algorithm.epochs
        learning_rate = config.critic.learning_rate
        settings = replace(
            config.optimizer,
            learning_rate=learning_rate,
            min_learning_rate=min(config.optimizer.min_learning_rate, learning_rate),
        )
        updates = config.train.steps * config.algorithm.mini_batches * self.epochs
        self.trainable = Trainable(
            "critic", self.stage, layout, settings, total_steps=updates, megatron=config.megatron
        )

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Value the rollouts' states in a forward without gradient.

        On the last stage every micro-batch gets signals["value"] [N] float32, the value of the state that predicts each
        response token, and signals["next_value"] [N] float32, the value of the state after the token. The latter is the
        "value" of the token that follows; after the last one it is what a bootstrap continues from.
        """

        def values(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self.stage.values(hidden, micro.predict), self.stage.values(hidden, micro.states)

        outputs = self.trainable.forward(micro_batches, values)
        for micro, (value, after) in zip(micro_batches, outputs, strict=False):
            micro.signals |= {"value": value, "next_value": after}

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(self, batches: Sequence[Sequence[MicroBatch]]) -> dict[str, float]:
        """Take one optimizer step for each mini-batch and epoch, on the returns.

        Args:
            batches: the micro-batches of each mini-batch, as `Batcher.with_advantages` returns them.

        Returns:
            Metrics, identical on every rank: of the last update, and over the step's tokens that train
            "critic/value_mean", "critic/return_mean" and "critic/explained_variance", 1 - Var(R - V) / Var(R), all of
            the values before the update; 0 where the returns do not vary.
        """
        metrics = self._fit_metrics([micro for batch in batches for micro in batch])
        skipped = 0.0
        for _ in range(self.epochs):
            for batch in batches:
                metrics |= self.update(batch)
                skipped += metrics["critic/skipped_in_a_row"] > 0
        return metrics | {"critic/update_skipped": skipped}

    def update(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Take one optimizer step on the `value_loss` of a mini-batch, weighted as the policy's tokens are.

        Returns the metrics of `Trainable.update`, and the share of clipped values.
        """

        def loss(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values = self.stage.values(hidden, micro.predict)
            per_token, clipped = value_loss(values, micro.signals["value"], _returns(micro), self.clip)
            total = (micro.weights * per_token).sum()
            metrics = {
                "critic/loss": total.detach(),
                "critic/weight": micro.weights.sum(),
                "critic/clip_fraction": (micro.weights * clipped).sum(),
            }
            return total, metrics

        return self.trainable.update(micro_batches, loss)

    def _fit_metrics(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Measure how well the scored values fit the returns."""
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
        # Where all returns are equal, the spread is the rounding error of the square of their mean.
        varies = spread > 1e-12 * max(target_square, 1e-12)
        return {
            "critic/value_mean": value,
            "critic/return_mean": target,
            "critic/explained_variance": 1 - (error_square - error**2) / spread if varies else 0.0,
        }

    # --- memory ------------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free the gradients, and move weights and optimizer state into host memory: nobody exports a critic."""
        self.trainable.offload(weights=True)

    def onload(self) -> None:
        """Undo `offload`, before `score` or `learn`."""
        self.trainable.onload()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """PPO's loss of values [N], as in the code of arXiv 1707.06347: half the squared distance to the returns.

    With `clip`, a value is also held within that distance of its `old` one, and the larger of the two losses counts.

    Returns:
        The loss of each token [N] float32, and whether it is that of the held value [N] bool.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    limited = (old + (values - old).clamp(-clip, clip) - returns).square()
    held = ((values - old).abs() > clip) & (limited > plain)
    return 0.5 * torch.maximum(plain, limited), held


def _returns(micro: MicroBatch) -> Tensor:
    if micro.returns is None:
        raise ValueError("the algorithm needs values, and no hook's token_advantage sets the critic's `returns`")
    return micro.returns
