"""Drawing one token: the exact inverse of the cumulated distribution, truncation, streams of uniforms."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
import torch

from clipo_megatron.rollout.local.sampling import draw, rollout_uniforms


def grid(count: int) -> torch.Tensor:
    """Evenly spaced numbers in (0, 1): drawn with them, frequencies are the probabilities to within 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def frequencies(logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    tokens, logprobs, support = draw(logits.expand(count, -1), grid(count), **{"temperature": 1.0, **params})
    scaled = (logits / params.pop("temperature", 1.0)).log_softmax(-1)
    if params:
        expected = truncated(logits, params["top_k"], params["top_p"])
        scaled = expected.log().float()
        assert (support is None) == (not params["top_k"])
        for row in [] if support is None else support[::100]:
            assert row.dtype == torch.int32 and sorted(row[row >= 0].tolist()) == expected.nonzero()[:, 0].tolist()
    torch.testing.assert_close(logprobs, scaled[tokens], rtol=0, atol=1e-5 if params else 1e-6)
    return torch.bincount(tokens, minlength=logits.numel()).double() / count


def truncated(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution after top-k and top-p, computed token by token from their definition."""
    probs = logits.double().softmax(-1)
    order = probs.argsort(descending=True, stable=True).tolist()
    kept = order[:top_k] if top_k else order
    total, mass, support = sum(float(probs[token]) for token in kept), 0.0, []
    for token in kept:
        if mass >= top_p * total:
            break
        support.append(token)
        mass += float(probs[token])
    expected = torch.zeros_like(probs)
    expected[support] = probs[support] / mass
    return expected


@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 700, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(vocabulary, temperature):
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 4000
    expected = (logits.double() / temperature).softmax(-1)
    assert (frequencies(logits, count, temperature=temperature) - expected).abs().max() < 1.5 / count


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.3), (0, 0.9), (50, 0.6), (0, 1e-9), (10_000, 1.0), (300, 0.99)]
)
@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["flat", "peaked"])  # flat: top-p needs more than 1,024 candidates
def test_truncation_follows_the_definition(top_k, top_p, scale):
    logits = scale * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    count = 6000
    found, expected = frequencies(logits, count, top_k=top_k, top_p=top_p), truncated(logits, top_k, top_p)
    assert (found - expected).abs().max() < 1.5 / count
    assert found[expected == 0].sum() == 0


def test_flat_and_peaked_rows_of_one_batch_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3000, generator=generator) * torch.tensor([0.1, 4.0, 0.1, 4.0, 2.0, 0.05])[:, None]
    shares = torch.rand(6, generator=generator, dtype=torch.float64)
    together, _, _ = draw(logits, shares, temperature=1.0, top_p=0.95)
    for row in range(6):
        single, _, _ = draw(logits[row : row + 1], shares[row : row + 1], temperature=1.0, top_p=0.95)
        assert single[0] == together[row]


def test_the_ends_of_the_unit_interval_and_tokens_without_mass():
    logits = torch.full((600,), -200.0)  # exp underflows to 0 in fp32
    logits[[3, 300, 597]] = 0.0
    shares = torch.tensor([0.0, 0.5, np.nextafter(1.0, 0.0), 1 / 3 - 1e-6, 1 / 3 + 1e-6], dtype=torch.float64)
    tokens, _, _ = draw(logits.expand(5, -1), shares, temperature=1.0)
    assert tokens.tolist() == [3, 300, 597, 3, 300]


def test_greedy_takes_the_maximum_and_reports_temperature_one():
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    tokens, logprobs, _ = draw(logits, None, temperature=0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_bf16_logits_give_fp32_logprobs():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    tokens, logprobs, _ = draw(logits, grid(3), temperature=1.0)
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_streams_are_stable_distinct_and_uniform():
    first = rollout_uniforms(4000, seed=1, step=2, prompt_id="gsm8k/17", sample=3)
    # The stream is part of a run's identity: a change here changes every published run.
    np.testing.assert_allclose(
        first[:3], [0.15930355535400365, 0.9274383310205837, 0.8243868924419561], rtol=0, atol=1e-15
    )
    assert np.array_equal(first[:100], rollout_uniforms(100, seed=1, step=2, prompt_id="gsm8k/17", sample=3))
    names = [(1, 2, "gsm8k/17", 3), (0, 2, "gsm8k/17", 3), (1, 3, "gsm8k/17", 3), (1, 2, "gsm8k/1", 3)]
    names += [(1, 2, "gsm8k/17", 4), (1, 23, "gsm8k/17", 0), (12, 3, "gsm8k/17", 0)]
    heads = {rollout_uniforms(1, seed=s, step=t, prompt_id=p, sample=g)[0] for s, t, p, g in names}
    assert len(heads) == len(names)
    assert first.min() >= 0 and first.max() < 1
    deciles = np.histogram(first, bins=10, range=(0, 1))[0]
    assert ((deciles - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_copies_of_a_prompt_have_numbers_of_their_own():
    place = {"seed": 1, "step": 2, "prompt_id": "gsm8k/17", "sample": 3}
    copies = [rollout_uniforms(8, **place, occurrence=each).tolist() for each in range(3)]
    assert copies[0] == rollout_uniforms(8, **place).tolist()
    assert len({str(numbers) for numbers in copies}) == 3
    name = f"{1}/{2}/{3}/gsm8k/17".encode()  # as runs before had it, without copies
    key = int.from_bytes(blake2b(name, digest_size=16).digest(), "little")
    assert copies[0] == np.random.Generator(np.random.Philox(key=key)).random(8).tolist()
