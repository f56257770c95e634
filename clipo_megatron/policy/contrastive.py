"""The contrastive head on the last pipeline stage, replicated over tensor- and data-parallel ranks.

Embeddings, not states, cross the network: d numbers a rollout. Each rank computes the loss of its own rollouts, as
anchors, against the embeddings of the whole batch. The gradient with respect to the embeddings is summed over
data-parallel ranks and flows back through each rank's own rows; summed once more, the head's gradient is that of the
global batch on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.clipo import ContrastiveHead, contrastive_loss
from clipo_megatron.algorithms.clipo.draw import draws
from clipo_megatron.algorithms.clipo.forms import contrastive_scores
from clipo_megatron.algorithms.clipo.reward import has_scores
from clipo_megatron.algorithms.clipo.statistics import statistics
from clipo_megatron.config.schema import BonusForm, ClipoConfig, Debias
from clipo_megatron.flow import RolloutTable
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform


class ContrastiveActor:
    """Trains the head and scores rollouts with it; lives on last-stage ranks only.

    Attributes:
        embeddings: [B, d] float32, of the batch that was scored last.
        skipped: whether the head's last update was skipped because a gradient was not finite.
    """

    def __init__(self, hidden_size: int, config: ClipoConfig, layout: Layout, *, seed: int):
        self.config = config
        self.layout = layout
        self.seed = seed
        self.head = ContrastiveHead(
            hidden_size, config.dim, kind=config.head.value, debias=config.debias.value, seed=seed
        ).to(platform().device)
        self.embeddings = torch.empty(0)
        self.skipped = False
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def step(self, pooled: Tensor, rows: Tensor, table: RolloutTable) -> tuple[Tensor, ...]:
        """Score the batch with the head as it stands, then train the head one step on it.

        Args:
            pooled: [b, H] float32, mean response states of this rank's rollouts.
            rows: [b] int64, their rows in the table.
            table: the global batch, B rows.

        Returns:
            Each rollout's loss as an anchor [B] float32, whether it has one [B] bool, and, for forms of the bonus that
            are not made of the losses, its score [B] float32: under the head before the step.
        """
        size, device = table.size, pooled.device
        graded = table.graded.to(device)
        mean = self._global_mean(pooled[graded[rows]]) if self.config.debias is Debias.mean else None
        own = self.head(pooled, mean=mean)
        gathered = torch.zeros(size, own.shape[1], dtype=own.dtype, device=device)
        gathered[rows] = own.detach()
        self._sum(gathered)
        gathered.requires_grad_(not self.config.frozen)

        anchors = torch.zeros(size, dtype=torch.bool, device=device)
        anchors[rows] = True
        # An ungraded rollout is neither right nor wrong: it is nobody's positive and nobody's negative.
        kept = graded.nonzero().squeeze(1)
        uniform = draws(table.prompt_ids, table.group, None, self.seed, table.step).to(device)
        batch = gathered[kept], table.correct.to(device)[kept], table.group.to(device)[kept]
        loss_kept, valid_kept = contrastive_loss(
            *batch,
            loss=self.config.loss.value,
            level=self.config.level.value,
            similarity=self.config.similarity.value,
            temperature=self.config.temperature,
            anchors=self.config.anchors.value,
            uniform=uniform[kept],
            anchor_rows=anchors[kept],
            released_eps=self.config.released_eps,
        )
        loss = torch.zeros(size, dtype=torch.float32, device=device)
        valid = torch.zeros(size, dtype=torch.float32, device=device)
        loss[kept], valid[kept] = loss_kept.detach(), valid_kept.float()
        self._sum(loss)
        self._sum(valid)
        signals = (loss, valid > 0)
        if has_scores(self.config.bonus.value, self.config.loss.value):
            score = torch.zeros_like(loss)
            score[kept] = self._scores(*batch, anchors[kept])
            self._sum(score)
            signals = (*signals, score)
        count = valid.sum()
        if not self.config.frozen and count > 0:
            self._train(own, gathered, rows, loss_kept.sum() / count)
        self.embeddings = gathered.detach()
        return signals

    def _scores(self, embeddings: Tensor, correct: Tensor, group: Tensor, anchor_rows: Tensor) -> Tensor:
        """The scores of this rank's rollouts, [B] float32, 0 for all others."""
        config = self.config
        return contrastive_scores(
            embeddings,
            correct,
            group,
            form=config.bonus.value,
            level=config.level.value,
            similarity=config.similarity.value,
            temperature=config.temperature,
            weight=config.weight,
            floor=config.floor,
            constant=config.constant,
            calibrate=config.calibrate,
            anchor_rows=anchor_rows,
            released_eps=config.released_eps,
        )[0]

    def metrics(self, table: RolloutTable, bonus: Tensor) -> dict[str, float]:
        """Metrics of the last batch; `bonus` [B] float32 is what the losses added to its rewards."""
        graded = table.graded
        numbers = statistics(
            table.correct[graded],
            table.group[graded],
            table.signals["contrastive_loss"][graded],
            table.signals["contrastive_valid"][graded],
            bonus[graded],
            floor=None if self.config.bonus is BonusForm.ratio else self.config.floor,
            embeddings=self.embeddings.cpu()[graded],
        )
        return numbers | {"clipo/update_skipped": float(self.skipped)}

    def _train(self, own: Tensor, gathered: Tensor, rows: Tensor, loss: Tensor) -> None:
        if loss.requires_grad:
            loss.backward()
        grad = gathered.grad if gathered.grad is not None else torch.zeros_like(gathered)
        self._sum(grad)
        self.optimizer.zero_grad(set_to_none=True)
        own.backward(grad[rows])
        gradients = [parameter.grad for parameter in self.head.parameters()]
        for gradient in gradients:
            self._sum(gradient)
        # All ranks with the head decide alike: the gradients are sums over all of them.
        self.skipped = not all(bool(gradient.isfinite().all()) for gradient in gradients)
        if not self.skipped:
            self.optimizer.step()

    def _global_mean(self, pooled: Tensor) -> Tensor:
        """The mean state [H] over the rows of all ranks."""
        total = torch.cat([pooled.sum(0), pooled.new_tensor([pooled.shape[0]])])
        self._sum(total)
        return total[:-1] / total[-1].clamp(min=1)

    def _sum(self, tensor: Tensor) -> None:
        """All-reduce over data-parallel ranks, in place."""
        if self.layout.dp > 1:
            dist.all_reduce(tensor, group=self.layout.dp_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of head and optimizer."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
