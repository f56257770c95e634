"""The policy in training on its ranks: it scores rollouts and learns from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.clipo.reward import has_scores
from clipo_megatron.algorithms.hook import Signal, TokenBatch
from clipo_megatron.algorithms.importance import correction_of
from clipo_megatron.algorithms.kl import kl_estimate
from clipo_megatron.algorithms.policy_loss import LARGEST_LOG_RATIO
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
    """The policy with what trains it: optimizer, and as needed contrastive head, critic and reference policy.

    Args:
        config: the run's configuration.
        layout: this rank's place in the parallel layout.
        needs: the signals that the algorithm needs.
        total_steps: updates in the whole run, over which the learning rate decays.

    Attributes:
        pooled: mean response states of this rank's rollouts that were scored last, [b, H] float32, and their rows in
            the table, [b]; on the last stage, if the algorithm needs them or `wants_states` asks for them, else None.
        wants_states: called with the number of a step; whether its mean response states are kept in any case.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, needs: frozenset[str], total_steps: int):
        super().__init__(config, layout)
        self.needs = needs
        self.batcher = Batcher.of(config, layout)
        self.trainable = Trainable(
            "policy", self.stage, layout, config.optimizer, total_steps=total_steps, megatron=config.megatron
        )
        self.contrastive = (
            ContrastiveActor(self.spec.hidden_size, config.clipo, layout, seed=config.train.seed)
            if Signal.contrastive in needs and layout.is_last_stage
            else None
        )
        self.critic = CriticActor(config, layout) if Signal.values in needs else None
        self.reference = ReferencePolicy(self.trainable) if Signal.reference_logprobs in needs else None
        self.pooled: tuple[Tensor, Tensor] | None = None
        self.wants_states: Callable[[int], bool] = lambda step: False
        self._skipped = 0  # updates of this step that were skipped

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch], table: RolloutTable, algorithm: Algorithm) -> dict[str, float]:
        """Score the step's rollouts before the policy is updated on them.

        Costs one forward, and another each for the reference policy, the critic and every variant of the prompts, if
        the algorithm needs them. On the last stage it fills `old_logprobs`, and as needed `reference_logprobs` and
        `signals`, of every micro-batch; on every rank the signals of the table that the algorithm needs.

        Args:
            micro_batches: all of the step, in order; each rank of a replica passes the same.
            table: the step's facts; its signals are filled in place.
            algorithm: says what is needed, and which variants of the prompts are scored.

        Returns:
            Metrics, identical on every rank: entropy, and how far engine and trainer disagree.
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
            self._score_contrastive(table)
        if Signal.pooled_states in self.needs:
            table.signals["pooled_states"] = self._sum_by_row(pooled, rows, table).float()
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
        metrics = mismatch_metrics(micro_batches, table, correction_of(self.config), self.layout)
        if want_entropy:
            total, count = share_from_last_stage(entropy, self.layout, sum_over_dp=True).tolist()
            metrics["policy/entropy"] = total / max(count, 1.0)
        return metrics

    def _sum_by_row(self, parts: Sequence[Tensor], rows: Sequence[Tensor], table: RolloutTable) -> Tensor:
        """Add up values by row of the table: [B, ...] float64, on every rank.

        `parts` are values [n, ...] of each micro-batch on the last stage, and `rows` [n] the rows that they belong to.
        """
        trailing = from_last_stage(tuple(parts[0].shape[1:]) if parts else (), self.layout)
        total = torch.zeros(table.size, *trailing, dtype=torch.float64, device=platform().device)
        for part, own in zip(parts, rows, strict=False):
            total.index_add_(0, own, part.double())
        return share_from_last_stage(total, self.layout, sum_over_dp=True)

    def _sum_by_rollout(
        self, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor], table: RolloutTable
    ) -> Tensor:
        """Add up the tokens' values, [N] or [N, C] a micro-batch, of each rollout: [B] or [B, C] float64."""
        return self._sum_by_row(values, [micro.rows[micro.rollout] for micro in micro_batches], table)

    def _score_variant(self, name: str, prompts: Mapping[int, Tensor], micro_batches: Sequence[MicroBatch]) -> None:
        """Score the same responses after other prompts; the log-probs become the micro-batches' signal `name`.

        `prompts` has the tokens [P] of each group whose prompt is another one.
        """
        others = [
            self.batcher.pack(
                [
                    replace(sample, prompt=prompts.get(sample.group, sample.prompt), routes=None)
                    for sample in micro.samples
                ]
            )
            for micro in micro_batches
        ]
        outputs = self._forward(others, want_pooled=False, want_entropy=False)
        for micro, output in zip(micro_batches, outputs, strict=False):
            micro.signals[name] = output["logprobs"]

    def _score_contrastive(self, table: RolloutTable) -> None:
        """Fill the table's contrastive signals, and train the head one step on the way."""
        clipo = self.config.clipo
        scored = has_scores(clipo.bonus.value, clipo.loss.value)
        result = torch.zeros(3 if scored else 2, table.size)
        if self.contrastive is not None:
            signals = self.contrastive.step(*self.pooled, table)
            result = torch.stack([signal.float() for signal in signals])
        result = share_from_last_stage(result, self.layout, sum_over_dp=False)
        table.signals["contrastive_loss"] = result[0]
        table.signals["contrastive_valid"] = result[1] > 0
        if scored:
            table.signals["contrastive_score"] = result[2]
        if Signal.embeddings in self.needs:
            found = torch.zeros(table.size, clipo.dim) if self.contrastive is None else self.contrastive.embeddings
            table.signals["embeddings"] = share_from_last_stage(found, self.layout, sum_over_dp=False)

    def contrastive_metrics(self, table: RolloutTable, bonus: Tensor | None) -> dict[str, float]:
        """Metrics of the contrastive head in this step, identical on every rank; {} without a head or a bonus.

        `bonus` [B] float32 is what the contrastive losses added to the rewards.
        """
        if Signal.contrastive not in self.needs or bonus is None:
            return {}
        metrics = self.contrastive.metrics(table, bonus) if self.contrastive is not None else {}
        return from_last_stage(metrics, self.layout)

    def _score_reference(self, micro_batches: Sequence[MicroBatch], table: RolloutTable) -> None:
        with self.reference.in_place():
            outputs = self._forward(micro_batches, want_pooled=False, want_entropy=False)
        scored = list(zip(micro_batches, outputs, strict=False))  # empty on stages before the last
        for micro, output in scored:
            micro.reference_logprobs = output["logprobs"]
        if Signal.reference_kl in self.needs:
            kind = self.config.algorithm.kl.kind
            estimates = [kl_estimate(kind, micro.old_logprobs, micro.reference_logprobs) for micro, _ in scored]
            table.signals["kl"] = self._sum_by_rollout(micro_batches, estimates, table).float()

    def _forward(
        self, micro_batches: Sequence[MicroBatch], *, want_pooled: bool, want_entropy: bool
    ) -> list[dict[str, Tensor]]:
        """Run a forward; returns a dict for each micro-batch on the last stage, an empty list elsewhere.

        "logprobs" [N] float32; if wanted, "entropy" [N] float32 and "pooled" [K, H] float32.
        """

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
        self,
        batch: MiniBatch,
        experience: Experience,
        algorithm: Algorithm,
        *,
        first: bool = False,
        last: bool = True,
    ) -> dict[str, float]:
        """Take one optimizer step on one mini-batch.

        Args:
            batch: as `Batcher.with_advantages` returns it.
            experience: what the mini-batch is a part of.
            algorithm: its `objective`, summed over all ranks, is the loss.
            first: whether the weights are still those that were scored. Then KL(old || new) must be 0, and is reported
                as "policy/first_update_kl".
            last: whether the weights may be read afterwards; false where another update follows at once.

        Returns:
            Metrics, identical on every rank: see `Trainable.update`. "policy/update_skipped" counts the step's updates
            that were skipped because the loss or a gradient was not finite. "policy/update_kl", of later updates, is
            KL(old || new) on the mini-batch's tokens where the update begins: what the updates before it have done.
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
            tokens = token_batch(micro, logprobs, entropy)
            if score_gradient is not None:
                tokens.score_gradient = score_gradient[tokens.rows]
            total, value = algorithm.objective(tokens)
            gap = (logprobs - micro.old_logprobs).detach().clamp(max=LARGEST_LOG_RATIO)
            metrics = {
                "policy/loss": value,
                "policy/update_kl": (micro.weights * k3(gap)).sum(),
                "policy/weight": micro.weights.sum(),
                **tokens.metrics,
            }
            return total, metrics

        metrics = self.trainable.update(batch.micro_batches, loss, added_loss=group_loss, last=last)
        self._skipped = (0 if first else self._skipped) + (metrics["policy/skipped_in_a_row"] > 0)
        if first and "policy/update_kl" in metrics:
            metrics["policy/first_update_kl"] = metrics.pop("policy/update_kl")
        return metrics | {"policy/update_skipped": float(self._skipped)}

    def measure_update(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """How far a step's updates have moved the policy, at the price of one forward; collective.

        Returns:
            "policy/kl_after_update": KL(old || new) over all tokens of the step's rollouts, identical on every rank.
        """
        outputs = self._forward(micro_batches, want_pooled=False, want_entropy=False)
        sums = torch.zeros(2, dtype=torch.float64)
        for micro, output in zip(micro_batches, outputs, strict=False):
            gap = (output["logprobs"] - micro.old_logprobs).double().clamp(max=LARGEST_LOG_RATIO)
            sums += torch.tensor([k3(gap).sum().item(), gap.numel()], dtype=torch.float64)
        total, count = share_from_last_stage(sums, self.layout, sum_over_dp=True).tolist()
        return {"policy/kl_after_update": total / max(count, 1.0)}

    def update_critic(self, experience: Experience, algorithm: Algorithm) -> dict[str, float]:
        """Update the critic on a step's rollouts, also in steps in which the policy is not updated.

        Returns:
            The metrics of `CriticActor.learn`; {} without a critic.
        """
        if self.critic is None:
            return {}
        batches = [self.batcher.with_advantages(batch, experience, algorithm) for batch in experience.mini_batches]
        return self.critic.learn(
            [[micro for micro in batch.micro_batches if not micro.demonstrated] for batch in batches]
        )

    def _scores(
        self, micro_batches: Sequence[MicroBatch], table: RolloutTable, algorithm: Algorithm, *, scored: bool
    ) -> Tensor:
        """Scores of every rollout under the current weights, [B, C] float64, on every rank.

        Costs a forward, unless the rollouts were `scored` under these very weights.
        """

        if scored:
            parts = (
                [algorithm.scores(token_batch(micro, micro.old_logprobs)) for micro in micro_batches]
                if self.layout.is_last_stage
                else []
            )
        else:
            parts = self.trainable.forward(
                micro_batches,
                lambda micro, hidden: algorithm.scores(token_batch(micro, self._logprobs(micro, hidden)[0])),
            )
        return self._sum_by_rollout(micro_batches, parts, table)

    def _logprobs(self, micro: MicroBatch, hidden: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of a micro-batch's targets at the sampling temperature, and entropies if asked for, [N] float32."""
        temperature = self.config.rollout.temperature or 1.0
        return self.stage.logprobs(hidden, micro, temperature=temperature, entropy=entropy)

    # --- memory --------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free the memory that only training needs, for servers that take turns with this rank on its GPU.

        Gradients are freed; optimizer state, reference policy and critic go to host memory. The policy's weights stay,
        so that they can be exported.
        """
        for part in (self.trainable, self.critic, self.reference):
            if part is not None:
                part.offload()
        platform().release_cached_memory()

    def onload(self) -> None:
        """Undo `offload`, before `score` or `update`. Gradients come back as zeros."""
        for part in (self.trainable, self.critic, self.reference):
            if part is not None:
                part.onload()


def k3(gap: Tensor) -> Tensor:
    """The low-variance estimate of KL(old || new) at each token, [N], from gap = log new - log old [N]."""
    return gap.exp() - 1 - gap


def token_batch(micro: MicroBatch, logprobs: Tensor, entropy: Tensor | None = None) -> TokenBatch:
    """A micro-batch's targets as the hooks of an algorithm see them."""
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
