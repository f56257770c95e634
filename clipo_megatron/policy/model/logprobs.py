"""Log-probabilities of chosen tokens from hidden states and a vocabulary shard, in tiles of tokens x vocabulary rows.

The logits of one tile exist at a time, in the forward and again in the backward; [N, V] never exists. The forward
carries each token's largest logit and the sum of exponentials relative to it from tile to tile. With vocabulary
parallelism each rank keeps three numbers a token for its shard (log-sum-exp, target logit, mean logit), and one
all-gather a micro-batch merges them.

Tokens that were drawn by top-p or top-k have a support, the few token ids that were left to draw from. Their log-probs
are those of the truncated policy, log softmax over the support alone. Of a tile's tokens only the vocabulary rows are
multiplied that are in the support of one of them, each once, so that sums run in the same order each time.

Products leave their sums in fp32, also of bf16 states and weights: a logit of 30 rounded to bf16 is off by up to 0.06.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.policy.model.tiles import TILE_BYTES_ON_CPUS, TILE_BYTES_ON_GPUS, tile_of
from clipo_megatron.runtime.platform import all_gather


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
    entropy: bool = False,
    support: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log softmax(hidden @ weight.T / temperature) at the targets, over the vocabulary or each one's support.

    Args:
        hidden: [N, H], the states that the LM head reads, identical on every rank of `tp_group`.
        weight: [V_shard, H], this rank's rows of the LM head; rows past `vocab_size` are padding and ignored.
        targets: [N] int64, token ids of the full vocabulary.
        vocab_start: token id of the shard's first row.
        vocab_size: size of the vocabulary without padding; None: there is no padding.
        temperature: the sampling distribution's.
        tp_group: ranks that share the vocabulary; None: this rank has all of it.
        main_grad: [V_shard, H] float32 buffer to which the weight's gradient is added directly, in place of autograd.
        entropy: also return the entropy of each distribution (nats).
        support: [N, S] int32, different token ids among which each target is, padded with -1; None: all are.
        tile: (tokens, vocabulary rows) whose logits exist at once; default: as many as suit the device.

    Returns:
        logprobs [N] float32, and the entropies [N] float32 or None. The gradient with respect to `hidden` is this
        shard's part: the caller sums it over `tp_group`.
    """
    if vocab_size is not None:
        real = max(0, min(weight.shape[0], vocab_size - vocab_start))
        if main_grad is not None:
            main_grad = main_grad[:real]
    else:
        real = weight.shape[0]
    if tile is None:
        tile = tile_of(targets.numel(), real, TILE_BYTES_ON_CPUS if hidden.device.type == "cpu" else TILE_BYTES_ON_GPUS)
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, targets, vocab_start, real, temperature, tp_group, main_grad, entropy, tile, support
    )
    return logprobs, entropies if entropy else None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _TokenLogprobs(torch.autograd.Function):
    """The forward keeps each token's log-sum-exp only; the backward recomputes every tile's softmax from it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, start, real, temperature, group, main_grad, want_entropy, tile, support):
        count = targets.numel()
        stats = torch.zeros(3 if want_entropy else 2, count, dtype=torch.float32, device=hidden.device)
        stats[0] = -torch.inf  # stays where the shard is all padding
        local = targets - start
        workspace, states = _Workspace(tile, hidden, weight, temperature), _factor(hidden)
        for part in _slices(count if real else 0, tile[0]):
            if support is None:
                stats[:, part] = _statistics(workspace, states[part], weight[:real], local[part], want_entropy)
            else:
                chosen = _Support(support[part], targets[part], start, real)
                stats[:, part] = chosen.statistics(chosen.logits(workspace, states[part], weight), want_entropy)
        if group is not None and dist.get_world_size(group) > 1:
            gathered = torch.empty(dist.get_world_size(group), *stats.shape, dtype=stats.dtype, device=stats.device)
            all_gather(gathered.view(-1), stats.view(-1), group)
            lse = torch.logsumexp(gathered[:, 0], dim=0)
            target_logit = gathered[:, 1].sum(0)
            share = (gathered[:, 0] - lse).exp()  # probability of each shard
            if support is None:
                entropy = (share * (lse - gathered[:, 2])).sum(0) if want_entropy else lse.new_empty(0)
            else:
                entropy = _merged_entropy(share, gathered, lse) if want_entropy else lse.new_empty(0)
        else:
            lse, target_logit = stats[0].clone(), stats[1]
            entropy = (lse - stats[2] if support is None else stats[2]) if want_entropy else lse.new_empty(0)
        moment = [lse - entropy if support is None else entropy] if want_entropy else []
        ctx.save_for_backward(hidden, weight, targets, lse, support, *moment)
        ctx.start, ctx.real, ctx.temperature, ctx.main_grad, ctx.tile = start, real, temperature, main_grad, tile
        return target_logit - lse, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, lse, support, *moment = ctx.saved_tensors
        grad_weight = ctx.main_grad
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_full = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            grad_weight = grad_full[: ctx.real]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        local = targets - ctx.start
        workspace, states = _Workspace(ctx.tile, hidden, weight, ctx.temperature), _factor(hidden)
        for part in _slices(local.numel() if ctx.real else 0, ctx.tile[0]):
            if support is not None:
                chosen = _Support(support[part], targets[part], ctx.start, ctx.real)
                logits = chosen.logits(workspace, states[part], weight)
                logprobs = logits - lse[part, None]
                grad = grad_logprobs[part, None] * (chosen.is_target.float() - logprobs.exp())
                if moment:
                    centred = (logprobs + moment[0][part, None]).nan_to_num(neginf=0.0)  # log-prob plus entropy
                    grad -= grad_entropy[part, None] * logprobs.exp() * centred
                grad = grad / ctx.temperature
                chosen.add_products(grad, weight, states[part], (grad_hidden[part], grad_weight), ctx.tile[1])
                continue
            for rows in _slices(ctx.real, ctx.tile[1]):
                shard = _factor(weight[rows])
                logits = workspace.logits(states[part], shard)
                centred = logits - moment[0][part, None] if moment else None
                grad = logits.sub_(lse[part, None]).exp_()
                if centred is not None:
                    # d entropy / d logit_j = -p_j (logit_j - sum_k p_k logit_k)
                    grad.mul_(centred.mul_(-grad_entropy[part, None]).sub_(grad_logprobs[part, None]))
                else:
                    grad.mul_(-grad_logprobs[part, None])
                column, within = _columns(local[part], rows)
                grad.scatter_add_(1, column[:, None], (grad_logprobs[part] * within)[:, None])
                if ctx.temperature != 1.0:
                    grad.div_(ctx.temperature)
                factor = grad.to(shard.dtype)
                _add_product(grad_hidden[part], factor, shard)
                if grad_weight is not None:
                    _add_product(grad_weight[rows], factor.t(), states[part])
        if ctx.main_grad is not None:
            # Megatron's hook expects a gradient, but does not read it once grad_added_to_main_grad is set.
            weight.grad_added_to_main_grad = True
            grad_out = torch.empty_like(weight)
        elif ctx.needs_input_grad[1]:
            grad_out = grad_full.to(weight.dtype)
        else:
            grad_out = None
        return (grad_hidden.to(hidden.dtype), grad_out) + (None,) * 9


def _statistics(workspace: _Workspace, hidden: Tensor, shard: Tensor, local: Tensor, want_entropy: bool) -> Tensor:
    """Log-sum-exp, target logit (0 if it is elsewhere) and perhaps mean logit of n tokens over a shard: [2 or 3, n]."""
    peak = hidden.new_full((local.numel(),), -torch.inf, dtype=torch.float32)
    total, target, moment = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
    for rows in _slices(shard.shape[0], workspace.tile[1]):
        logits = workspace.logits(hidden, _factor(shard[rows]))
        column, within = _columns(local, rows)
        target += logits.gather(1, column[:, None]).squeeze(1) * within
        highest = torch.maximum(peak, logits.amax(-1))
        fall = (peak - highest).nan_to_num_(neginf=0.0) if rows.start == 0 else peak - highest
        scale, below = fall.exp(), logits.sub_(highest[:, None])
        odds = below.exp() if want_entropy else below.exp_()
        if want_entropy:
            # sum_j odds_j * (logit_j - highest): relative to the peak, so that nothing large cancels
            moment = scale * (moment + total * fall) + odds.mul(below).sum(-1)
        total, peak = scale * total + odds.sum(-1), highest
    return torch.stack([total.log() + peak, target, *([moment / total + peak] if want_entropy else [])])


def _merged_entropy(share: Tensor, gathered: Tensor, lse: Tensor) -> Tensor:
    """The entropy [n] over all shards, from their shares of the probability [r, n] and statistics [r, 3, n]."""
    return torch.where(share > 0, share * (gathered[:, 2] + lse - gathered[:, 0]), 0.0).sum(0)


class _Support:
    """The token ids that n tokens were drawn among, as distinct rows of the shard and columns of these.

    Args:
        support: [n, S] int32, padded with -1.
        targets: [n] int64.
        start, real: the token id of the shard's first row, and how many rows it has without padding.

    Attributes:
        is_target: which entries are the targets, [n, S] bool.
    """

    def __init__(self, support: Tensor, targets: Tensor, start: int, real: int):
        self.is_target = support == targets[:, None]
        self._within = (support >= start) & (support < start + real)
        self._rows, column = torch.unique(support[self._within].long() - start, return_inverse=True)
        self._column = torch.zeros_like(support, dtype=torch.int64).masked_scatter_(self._within, column)

    def logits(self, workspace: _Workspace, states: Tensor, weight: Tensor) -> Tensor:
        """The logits of the entries, [n, S] float32; -inf where one is padding or in another shard."""
        found = torch.full(self._within.shape, -torch.inf, device=states.device)
        for some in _slices(len(self._rows), workspace.tile[1]):
            tile = workspace.logits(states, _factor(weight[self._rows[some]]))
            column, here = self._columns(some)
            found = torch.where(here, tile.gather(1, column), found)
        return found

    def statistics(self, logits: Tensor, want_entropy: bool) -> Tensor:
        """As `_statistics`, of these logits, but with the entropy within the shard in place of the mean logit.

        The entropy of a few tokens is small: a difference of logits would be mostly rounding.
        """
        lse = logits.logsumexp(-1)
        stats = [lse, torch.where(self._within & self.is_target, logits, 0.0).sum(-1)]
        if want_entropy:
            logprobs = logits - lse[:, None]
            stats.append(-torch.where(self._within, logprobs.exp() * logprobs, 0.0).sum(-1))
        return torch.stack(stats)

    def add_products(
        self, grad: Tensor, weight: Tensor, states: Tensor, totals: tuple[Tensor, Tensor | None], most: int
    ) -> None:
        """Add what the gradient [n, S] of the logits makes of states and weight to the `totals` of both, in place, by
        at most so many rows of the weight at once."""
        for some in _slices(len(self._rows), most):
            rows = self._rows[some]
            shard = _factor(weight[rows])
            column, here = self._columns(some)
            tile = torch.zeros(len(states), len(rows), device=states.device)
            tile.scatter_add_(1, column, torch.where(here, grad, 0.0))  # a token's ids differ, so one value each
            factor = tile.to(shard.dtype)
            _add_product(totals[0], factor, shard)
            if totals[1] is not None:
                total = totals[1][rows]
                _add_product(total, factor.t(), states)
                totals[1].index_copy_(0, rows, total)

    def _columns(self, some: slice) -> tuple[Tensor, Tensor]:
        """The entries' columns among some of the distinct rows, 0 where they are not there, and whether they are."""
        here = self._within & (self._column >= some.start) & (self._column < some.stop)
        return torch.where(here, self._column - some.start, 0), here


def _columns(local: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The columns of the targets among some rows of the shard, 0 where they are not there, and whether they are."""
    column = local - rows.start
    within = (column >= 0) & (column < rows.stop - rows.start)
    return torch.where(within, column, 0), within


def _factor(tensor: Tensor) -> Tensor:
    """A factor of products whose sums are fp32: the tensor itself, or an fp32 copy on CPUs, which have no other such
    products."""
    return tensor.float() if tensor.device.type == "cpu" else tensor


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to `out`, which is float32."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is float32, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _Workspace:
    """A buffer for the logits of one tile, reused by the next: a new one of this size would cost page faults."""

    def __init__(self, tile: tuple[int, int], hidden: Tensor, weight: Tensor, temperature: float):
        self.tile = min(tile[0], len(hidden)), min(tile[1], len(weight))
        self.temperature = temperature
        self._buffer = hidden.new_empty(self.tile[0] * self.tile[1], dtype=torch.float32)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The tile's logits [n, rows] float32, valid until the next call; the caller may overwrite them."""
        logits = self._buffer[: len(hidden) * len(rows)].view(len(hidden), len(rows))
        _product(hidden, rows.t(), logits)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)
