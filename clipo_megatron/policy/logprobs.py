"""Log-probabilities of chosen tokens from hidden states and a vocabulary shard, in chunks of tokens.

The logits of a chunk live for a moment in the forward and once more in the backward; [N, V] never exists. With
vocabulary parallelism each rank keeps (log-sum-exp, target logit, entropy moment) of its shard, three numbers a token,
and one all-gather a micro-batch merges them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of fp32 logits that may exist at once.
CHUNK_BYTES = 64 * 2**20


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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at the targets.

    Args:
        hidden: [N, H], the states that the LM head reads, identical on every rank of `tp_group`.
        weight: [V_shard, H], this rank's rows of the LM head; rows past `vocab_size` are padding and ignored.
        targets: [N] int64, token ids of the full vocabulary.
        vocab_start: token id of the shard's first row.
        vocab_size: size of the real vocabulary, padding left out; default: no padding.
        temperature: of the sampling distribution.
        tp_group: ranks that share the vocabulary; None for one.
        main_grad: [V_shard, H] float32 buffer that takes the weight's gradient directly, in place of autograd.
        entropy: also return the entropy of each distribution (nats).
        chunk_tokens: tokens a chunk; default: as many as CHUNK_BYTES of logits hold.

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
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // (4 * max(real, 1)))
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, targets, vocab_start, real, temperature, tp_group, main_grad, entropy, chunk_tokens
    )
    return logprobs, entropies if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps log-sum-exp only; backward recomputes each chunk's softmax from it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, start, real, temperature, group, main_grad, want_entropy, chunk):
        count = targets.numel()
        shard = weight[:real]
        stats = torch.zeros(3 if want_entropy else 2, count, dtype=torch.float32, device=hidden.device)
        stats[0] = -torch.inf  # of a shard that is padding alone
        local = targets - start
        owned = (local >= 0) & (local < real)
        local = torch.where(owned, local, 0)
        workspace = _Workspace(min(chunk, count), hidden, shard, temperature)
        for begin in range(0, count if real else 0, chunk):
            part = slice(begin, begin + chunk)
            logits = workspace.logits(hidden[part])
            stats[1, part] = logits.gather(1, local[part, None]).squeeze(1).masked_fill_(~owned[part], 0.0)
            peak = logits.amax(-1, keepdim=True)
            odds = logits.sub_(peak).exp() if want_entropy else logits.sub_(peak).exp_()
            total = odds.sum(-1)
            stats[0, part] = total.log() + peak.squeeze(1)
            if want_entropy:
                # sum_j p_j * logit_j under the shard's own softmax; merged below
                stats[2, part] = odds.mul_(logits).sum(-1) / total + peak.squeeze(1)
        if group is not None and dist.get_world_size(group) > 1:
            gathered = torch.empty(dist.get_world_size(group), *stats.shape, dtype=stats.dtype, device=stats.device)
            dist.all_gather_into_tensor(gathered.view(-1), stats.view(-1), group=group)
            lse = torch.logsumexp(gathered[:, 0], dim=0)
            target_logit = gathered[:, 1].sum(0)
            share = (gathered[:, 0] - lse).exp()  # of the probability, each shard's
            entropy = (share * (lse - gathered[:, 2])).sum(0) if want_entropy else lse.new_empty(0)
        else:
            lse, target_logit = stats[0].clone(), stats[1]
            entropy = lse - stats[2] if want_entropy else lse.new_empty(0)
        ctx.save_for_backward(hidden, weight, local, owned, lse, *([lse - entropy] if want_entropy else []))
        ctx.real, ctx.temperature, ctx.main_grad, ctx.chunk = real, temperature, main_grad, chunk
        return target_logit - lse, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, local, owned, lse, *moment = ctx.saved_tensors
        shard = weight[: ctx.real]
        grad_hidden = torch.empty_like(hidden) if ctx.real else torch.zeros_like(hidden)
        grad_weight = ctx.main_grad
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_full = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            grad_weight = grad_full[: ctx.real]
        workspace = _Workspace(min(ctx.chunk, local.numel()), hidden, shard, ctx.temperature)
        for begin in range(0, local.numel() if ctx.real else 0, ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            logits = workspace.logits(hidden[part])
            centred = logits - moment[0][part, None] if moment else None
            grad = logits.sub_(lse[part, None]).exp_()
            if centred is not None:
                # d entropy / d logit_j = -p_j (logit_j - sum_k p_k logit_k)
                grad.mul_(centred.mul_(-grad_entropy[part, None]).sub_(grad_logprobs[part, None]))
            else:
                grad.mul_(-grad_logprobs[part, None])
            grad.scatter_add_(1, local[part, None], (grad_logprobs[part] * owned[part])[:, None])
            if ctx.temperature != 1.0:
                grad.div_(ctx.temperature)
            narrow = workspace.narrowed(grad)
            torch.mm(narrow, shard, out=grad_hidden[part])
            if grad_weight is not None:
                if narrow.dtype == grad_weight.dtype:
                    grad_weight.addmm_(narrow.t(), hidden[part])
                else:
                    grad_weight.add_(narrow.t() @ hidden[part])
        if ctx.main_grad is not None:
            # Megatron's hook wants to see some gradient; this one is never read (see grad_added_to_main_grad).
            weight.grad_added_to_main_grad = True
            grad_out = torch.empty_like(weight)
        elif ctx.needs_input_grad[1]:
            grad_out = grad_full.to(weight.dtype)
        else:
            grad_out = None
        return (grad_hidden, grad_out) + (None,) * 8


class _Workspace:
    """Buffers for the logits of one chunk, used again by the next: fresh ones of this size cost page faults."""

    def __init__(self, tokens: int, hidden: Tensor, shard: Tensor, temperature: float):
        self.shard, self.temperature = shard, temperature
        self.raw = hidden.new_empty(tokens, shard.shape[0])
        self.wide = (
            self.raw if hidden.dtype is torch.float32 else self.raw.new_empty(self.raw.shape, dtype=torch.float32)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V_shard] float32, valid until the next call; the caller may overwrite it."""
        raw, logits = self.raw[: len(hidden)], self.wide[: len(hidden)]
        torch.mm(hidden, self.shard.t(), out=raw)
        if self.raw is not self.wide:
            logits.copy_(raw)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def narrowed(self, logits: Tensor) -> Tensor:
        """What `logits` returned, in the states' dtype again."""
        return logits if self.raw is self.wide else self.raw[: len(logits)].copy_(logits)
