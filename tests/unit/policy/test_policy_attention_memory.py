"""What the attention of a long row takes on a CPU beside what goes in: little more than what has to be there."""

from __future__ import annotations

import pytest
import torch
from allocations import peak_bytes

from clipo_megatron.flow import Segment
from clipo_megatron.policy.model import attention_kernels
from clipo_megatron.policy.model.attention import attention_of, plan_attention

HEADS, KV_HEADS, DIM, TOKENS = 9, 3, 64, 2048


@pytest.mark.parametrize("responses", [1, 8])
def test_a_row_takes_little_more_than_its_results(responses, monkeypatch):
    """A prompt of an eighth of the row. Each call is for one key head, as for longer rows.

    Its results have to be there: the output with its log-sum-exps, then the gradients. Beside them is what one call
    hands out, of a key head: gradients of queries, and of keys and values for each of the heads that share them.
    """
    monkeypatch.setattr(attention_kernels, "_CALL_BYTES", 1)
    prompt = TOKENS // 8
    length = (TOKENS - prompt) // responses
    segments = [Segment(0, prompt), *(Segment(prompt + n * length, length, 0, prompt) for n in range(responses))]
    plan = plan_attention(segments, torch.device("cpu"))
    rows = [torch.randn(TOKENS, heads, DIM).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    kept = []
    forward = peak_bytes(lambda: kept.append(attention_of(*rows, plan, DIM**-0.5)))
    grad = torch.ones_like(rows[0])
    backward = peak_bytes(lambda: kept[0].backward(grad))
    queries, buffers = grad.nbytes, 2**21 * torch.get_num_threads()
    assert forward <= queries + 2 * queries / KV_HEADS + buffers, "a call's output, and its weighted copy"
    assert backward <= sum(each.nbytes for each in rows) + 3 * queries / KV_HEADS + buffers


def test_calls_for_some_heads_compute_the_same_to_the_bit(monkeypatch):
    segments = [Segment(0, 40), *(Segment(40 + 90 * n, 90, 0, 40) for n in range(3))]
    plan = plan_attention(segments, torch.device("cpu"))

    def computed(most: int) -> list[torch.Tensor]:
        monkeypatch.setattr(attention_kernels, "_CALL_BYTES", most)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(310, heads, DIM, generator=generator).requires_grad_() for heads in (9, 3, 3)]
        output = attention_of(*rows, plan, DIM**-0.5)
        output.backward(torch.randn(output.shape, generator=generator))
        return [output, *(each.grad for each in rows)]

    for one, other in zip(computed(1), computed(2**24), strict=True):
        assert torch.equal(one, other)
