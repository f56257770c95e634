"""The policy in training on its ranks: scores rollouts and learns from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import Signal, TokenBatch
from clipo_megatron.algorithms.kl import kl_estimate
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Experience, MicroBatch, MiniBatch, RolloutTable
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.batch.exchange import from_last_stage, share_from_last_stage
from clipo_megatron.policy.contrastive import ContrastiveActor
from clipo_megatron.policy.critic import CriticActor
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.policy import Policy
from clipo_megatron.policy.reference import ReferencePolicy
from clipo_megatron.policy.train_inference_mismatch import mismatch_metrics
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform


class PolicyActor(Policy):
    """The policy with all that training needs: optimizer, contrastive head, critic, reference policy.

    Args:
        config: of the run.
        layout: of the ranks.
        needs: of the algorithm.
        total_steps: updates of the policy, as the schedule of its learning rate counts them.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, needs: frozenset[str], total_steps: int):
        super().__init__(config, layout)
        self.needs = needs
        self.batcher = Batcher.of(config, layout)
        self.trainable = Trainable("policy", self.stage, layout, config.optimizer, total_steps=total_steps)
        self.contrastive = (
            ContrastiveActor(self.spec.hidden_size, config.clipo, layout, seed=config.train.seed)
            if Signal.contrastive in needs and layout.is_last_stage
            else None
        )
        self.critic = CriticActor(config, layout) if Signal.values in needs else None
        self.reference = ReferencePolicy(self.trainable) if Signal.reference_logprobs in needs else None
        # Mean response states [b, H] float32 of this rank's rollouts that were scored last, and their rows [b]: on the
        # last stage, where the algorithm needs them or somebody wants those of the step.
        self.pooled: tuple[Tensor, Tensor] | None = None
        self.wants_states: Callable[[int], bool] = lambda step: False
        self._skipped = 0  # updates of this step that were skipped

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch], table: RolloutTable, algorithm: Algorithm) -> dict[str, float]:
        """Forwards without gradient over the step's rollouts: one, and one more for the reference policy and for each
        variant of the prompts, if the algorithm needs them.

        The critic's forward is one more.

        Fills, on the last stage, `old_logprobs` (and `reference_logprobs`, `signals`) of every micro-batch, and on
        every rank the table's signals that the algorithm needs.

        Args:
            micro_batches: all of the step, in order; each rank of a replica passes the same.
            table: the step's facts, updated in place.
            algorithm: that of the step.

        Returns:
            Metrics of the forward, identical on every rank.
        """
        pooled, entropy = [], torch.zeros(2)
        contrastive = Signal.contrastive in self.needs
        want_pooled = contrastive or Signal.pooled_states in self.needs or self.wants_states(table.step)
        want_entropy = Signal.entropy in self.needs or Signal.scored_entropy in self.needs
        outputs = self._forward(micro_batches, want_pooled=want_pooled, want_entropy=want_entropy)
        for micro, output in zip(micro_batches, outputs, strict=False):
            micro.old_logprobs = output["logprobs"]
            if want_pooled:
                pooled.append(output["pooled"])
            if want_entropy:
                micro.signals["entropy"] = output["entropy"]
                entropy += torch.tensor([output["entropy"].sum().item(), output["entropy"].numel()])
        rows = [micro.rows for micro in micro_batches]
        self.pooled = (torch.cat(pooled), torch.cat(rows)) if pooled else None
        if contrastive:
            self._contrast(table)
        if Signal.pooled_states in self.needs:
            table.signals["pooled_states"] = self._rows_of(pooled, rows, table).float()
        if Signal.logprob_sums in self.needs:
            logprobs = [output["logprobs"] for output in outputs]
            table.signals["logprob_sum"] = self._sum_by_rollout(micro_batches, logprobs, table)
        if Signal.reference_logprobs in self.needs:
            self._score_reference(micro_batches, table)
        if self.critic is not None:
            self.critic.score(micro_batches)
        for name, prompts in algorithm.variants(table).items():
            if prompts:
                self._score_variant(name, prompts, micro_batches)
        metrics = mismatch_metrics(micro_batches, table, self.config.algorithm.correction, self.layout)
        if want_entropy:
            total, count = share_from_last_stage(entropy, self.layout, sum_over_dp=True).tolist()
            metrics["policy/entropy"] = total / max(count, 1.0)
        return metrics

    def _rows_of(self, parts: Sequence[Tensor], rows: Sequence[Tensor], table: RolloutTable) -> Tensor:
        """What last stages know of the rows [n] of each part [n, ...], added up: [B, ...] float64, on every rank."""
        trailing = from_last_stage(tuple(parts[0].shape[1:]) if parts else (), self.layout)
        total = torch.zeros(table.size, *trailing, dtype=torch.float64, device=platform().device)
        for part, own in zip(parts, rows, strict=False):
            total.index_add_(0, own, part.double())
        return share_from_last_stage(total, self.layout, sum_over_dp=True)

    def _sum_by_rollout(
        self, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor], table: RolloutTable
    ) -> Tensor:
        """Sum over each rollout of its tokens' values, [N] or [N, C] a micro-batch; [B] or [B, C] float64."""
        return self._rows_of(values, [micro.rows[micro.rollout] for micro in micro_batches], table)

    def _score_variant(self, name: str, prompts: Mapping[int, Tensor], micro_batches: Sequence[MicroBatch]) -> None:
        """The same responses behind other prompts, by group; their log-probs become the signal `name`."""
        others = [
            self.batcher.pack(
                [replace(sample, prompt=prompts.get(sample.group, sample.prompt)) for sample in micro.samples]
            )
            for micro in micro_batches
        ]
        outputs = self._forward(others, want_pooled=False, want_entropy=False)
        for micro, output in zip(micro_batches, outputs, strict=False):
            micro.signals[name] = output["logprobs"]

    def _contrast(self, table: RolloutTable) -> None:
        result = torch.zeros(2, table.size)
        if self.contrastive is not None:
            loss, valid = self.contrastive.step(*self.pooled, table)
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
        with self.reference.in_place():
            outputs = self._forward(micro_batches, want_pooled=False, want_entropy=False)
        scored = list(zip(micro_batches, outputs, strict=False))  # none on stages before the last
        for micro, output in scored:
            micro.reference_logprobs = output["logprobs"]
        if Signal.reference_kl in self.needs:
            kind = self.config.algorithm.kl.kind
            estimates = [kl_estimate(kind, micro.old_logprobs, micro.reference_logprobs) for micro, _ in scored]
            table.signals["kl"] = self._sum_by_rollout(micro_batches, estimates, table).float()

    def _forward(
        self, micro_batches: Sequence[MicroBatch], *, want_pooled: bool, want_entropy: bool
    ) -> list[dict[str, Tensor]]:
        """Outputs of the last stage a micro-batch; an empty list elsewhere."""

        def outputs_of(micro: MicroBatch, hidden: Tensor) -> dict[str, Tensor]:
            logprobs, entropy = self._logprobs(micro, hidden, entropy=want_entropy)
            output = {"logprobs": logprobs}
            if want_entropy:
                output["entropy"] = entropy
            if want_pooled:
                output["pooled"] = self.stage.pooled_states(hidden, micro)
            return output

        return self.trainable.forward(micro_batches, outputs_of)

    # --- learning ------------------------------------------------------------------------------------------------

    def update(
        self, batch: MiniBatch, experience: Experience, algorithm: Algorithm, *, first: bool = False
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch.

        Args:
            batch: as the batcher credits it: with advantages, weights and old log-probs on the last stage.
            experience: that it is a part of.
            algorithm: its `objective`, summed over all ranks, is the loss.
            first: whether the weights are still those that were scored; then KL(old || new) must be 0, and is
                reported as "policy/first_update_kl".

        Returns:
            Metrics, identical on every rank. An update whose loss or gradient is not finite is skipped:
            "policy/update_skipped" counts those of the step, "policy/skipped_in_a_row" the latest without one between.
        """
        group_loss, score_gradient = 0.0, None
        if algorithm.has_group_loss:
            scores = self._scores(batch.micro_batches, experience.table, algorithm, scored=first)
            group_loss, score_gradient = algorithm.group_loss(scores, experience, batch.rows)
            score_gradient = score_gradient.to(platform().device)

        def loss(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = self._logprobs(micro, hidden, entropy=Signal.entropy in self.needs)
            if micro.demonstrated:
                total = -(micro.weights * logprobs).sum()
                value = total.detach()
                return total, {"policy/loss": value, "policy/demonstration_loss": value}
            tokens = tokens_of(micro, logprobs, entropy)
            if score_gradient is not None:
                tokens.score_gradient = score_gradient[tokens.rows]
            total, value = algorithm.objective(tokens)
            ratio = (logprobs - micro.old_logprobs).detach()
            metrics = {
                "policy/loss": value,
                # k3, the low-variance estimate of KL(old || new)
                "policy/update_kl": (micro.weights * (ratio.exp() - 1 - ratio)).sum(),
                "policy/weight": micro.weights.sum(),
                **tokens.metrics,
            }
            return total, metrics

        metrics = self.trainable.update(batch.micro_batches, loss, added_loss=group_loss)
        self._skipped = (0 if first else self._skipped) + (metrics["policy/skipped_in_a_row"] > 0)
        if first:
            metrics["policy/first_update_kl"] = metrics["policy/update_kl"]
        return metrics | {"policy/update_skipped": float(self._skipped)}

    def learn_values(self, experience: Experience, algorithm: Algorithm) -> dict[str, float]:
        """The critic's update on a step's rollouts, whether or not the policy waits; {} without a critic.

        Returns:
            Metrics, identical on every rank: see `CriticActor.learn`.
        """
        if self.critic is None:
            return {}
        credited = [self.batcher.credit(batch, experience, algorithm) for batch in experience.mini_batches]
        return self.critic.learn(
            [[micro for micro in batch.micro_batches if not micro.demonstrated] for batch in credited]
        )

    def _scores(
        self, micro_batches: Sequence[MicroBatch], table: RolloutTable, algorithm: Algorithm, *, scored: bool
    ) -> Tensor:
        """Scores of every rollout under the weights of now, [B, C] float64, on every rank.

        Costs a forward, unless these are still the weights that were `scored`.
        """

        if scored:
            parts = (
                [algorithm.scores(tokens_of(micro, micro.old_logprobs)) for micro in micro_batches]
                if self.layout.is_last_stage
                else []
            )
        else:
            parts = self.trainable.forward(
                micro_batches,
                lambda micro, hidden: algorithm.scores(tokens_of(micro, self._logprobs(micro, hidden)[0])),
            )
        return self._sum_by_rollout(micro_batches, parts, table)

    def _logprobs(self, micro: MicroBatch, hidden: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of a micro-batch's targets, and entropies, [N] float32 each, under the sampling temperature."""
        temperature = self.config.rollout.temperature or 1.0
        return self.stage.logprobs(hidden, micro, temperature=temperature, entropy=entropy)

    # --- memory --------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free what only training needs: gradients, and optimizer state, reference policy and critic into host memory.

        The weights stay, so they can be exported. For servers that take turns with this rank on its GPU.
        """
        for part in (self.trainable, self.critic, self.reference):
            if part is not None:
                part.offload()

    def onload(self) -> None:
        """Inverse of `offload`, before `score` or `update`. Gradients come back as zeros."""
        for part in (self.trainable, self.critic, self.reference):
            if part is not None:
                part.onload()


def tokens_of(micro: MicroBatch, logprobs: Tensor, entropy: Tensor | None = None) -> TokenBatch:
    """A micro-batch's targets as the stages of an algorithm see them."""
    nothing = torch.zeros_like(logprobs)
    return TokenBatch(
        logprobs=logprobs,
        old_logprobs=micro.old_logprobs,
        advantages=nothing if micro.advantages is None else micro.advantages,
        weights=nothing if micro.weights is None else micro.weights,
        rollout=micro.rollout,
        rollout_logprobs=micro.rollout_logprobs,
        rows=micro.rows[micro.rollout],
        reference_logprobs=micro.reference_logprobs,
        entropy=entropy,
        signals=micro.signals,
    )
