"""The draw of positives and the share of one rank: neither depends on how rows are laid out."""

import pytest
import torch

from clipo_megatron.algorithms.clipo import contrastive_loss
from clipo_megatron.algorithms.clipo.draw import draws
from clipo_megatron.algorithms.clipo.relations import Relations

PROMPTS = [f"gsm8k/{i}" for i in range(6)]
GROUP = torch.arange(6).repeat_interleave(8)
SAMPLE = torch.arange(8).repeat(6)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(48, 9, generator=generator, dtype=torch.float64).requires_grad_()
    return z, torch.rand(48, generator=generator) < 0.5


def test_draws_are_a_fixed_function_of_their_key():
    # Computed once and written down: a resumed run must draw what the first one would have.
    found = draws(["gsm8k/0"], torch.tensor([0, 0]), torch.tensor([0, 1]), seed=1, step=2)
    assert found.dtype == torch.float64
    assert found.tolist() == [0.6527192111582444, 0.2724978398506115]


def test_draws_depend_on_seed_step_prompt_and_sample_and_on_nothing_else():
    base = draws(PROMPTS, GROUP, SAMPLE, seed=3, step=7)
    assert base.unique().numel() == 48 and (base >= 0).all() and (base < 1).all()
    for seed, step in ((4, 7), (3, 8), (37, 0), (0, 37)):
        assert not (draws(PROMPTS, GROUP, SAMPLE, seed=seed, step=step) == base).any()
    torch.rand(5)
    order = torch.randperm(48)
    assert torch.equal(draws(PROMPTS, GROUP[order], SAMPLE[order], seed=3, step=7), base[order])
    # Two ranks, each with its own prompts and its own numbering of them.
    shares = [draws(PROMPTS[a:b], GROUP[a * 8 : b * 8] - a, SAMPLE[: (b - a) * 8], 3, 7) for a, b in ((0, 2), (2, 6))]
    assert torch.equal(torch.cat(shares), base)
    assert torch.equal(draws(PROMPTS, GROUP, None, seed=3, step=7), base)


def test_draws_are_uniform():
    found = draws([f"p{i}" for i in range(1000)], torch.arange(1000).repeat_interleave(16), None, seed=0, step=0)
    counts = torch.histc(found.float(), bins=16, min=0, max=1)
    # 15 degrees of freedom: 37.7 is the 0.999 quantile, and the draw is fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 37.7


def test_draws_name_a_group_without_prompt():
    with pytest.raises(ValueError, match="there are 1 prompt ids"):
        draws(["a"], torch.tensor([0, 1]), None, seed=0, step=0)


@pytest.mark.parametrize("level", ["group", "batch", "cross"])
def test_infonce_with_draws_does_not_depend_on_row_order(level):
    z, correct = batch()
    uniform = draws(PROMPTS, GROUP, SAMPLE, seed=1, step=1)
    base, _ = contrastive_loss(z, correct, GROUP, level=level, uniform=uniform, sample=SAMPLE)
    other, _ = contrastive_loss(
        z, correct, GROUP, level=level, uniform=draws(PROMPTS, GROUP, SAMPLE, seed=1, step=2), sample=SAMPLE
    )
    assert (base != other).any()
    order = torch.randperm(48)
    again = draws(PROMPTS, GROUP[order], SAMPLE[order], seed=1, step=1)
    moved, _ = contrastive_loss(
        z[order], correct[order], GROUP[order], level=level, uniform=again, sample=SAMPLE[order]
    )
    torch.testing.assert_close(moved, base[order], rtol=1e-12, atol=1e-12)


def test_the_partner_is_a_positive_and_every_positive_is_drawn():
    _, correct = batch()
    relations = Relations.of(correct, GROUP, "group")
    seen = {i: set() for i in range(48)}
    for k in range(64):
        partner = relations.partner(torch.full((48,), k / 64), None)
        for i, p in enumerate(partner.tolist()):
            seen[i].add(p)
    for i in range(48):
        positives = {j for j in range(48) if j != i and GROUP[j] == GROUP[i] and correct[j] == correct[i]}
        assert seen[i] == (positives or {i})
    top = relations.partner(torch.full((48,), 1 - 2**-53, dtype=torch.float64), None)
    assert all(t == max(seen[i]) for i, t in enumerate(top.tolist()))


def test_a_generator_makes_the_draw_repeatable_and_leaves_the_global_state_alone():
    z, correct = batch()
    state = torch.get_rng_state()
    first, second, third = (
        contrastive_loss(z, correct, GROUP, generator=torch.Generator().manual_seed(s))[0] for s in (5, 5, 6)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("level", ["group", "batch", "cross"])
@pytest.mark.parametrize("loss", ["infonce", "supcon_out", "supcon_in", "soft_nn"])
def test_the_losses_of_the_ranks_add_up_to_the_whole(loss, level):
    z, correct = batch()
    uniform = draws(PROMPTS, GROUP, SAMPLE, seed=1, step=1)
    names = {"loss": loss, "level": level, "uniform": uniform, "anchors": "both"}
    whole, valid = contrastive_loss(z, correct, GROUP, **names)
    (gradient,) = torch.autograd.grad(whole.sum(), z)
    parts = torch.randperm(48).split([20, 3, 0, 25])
    shares = [contrastive_loss(z, correct, GROUP, anchor_rows=rows, **names) for rows in parts]
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole, rtol=1e-13, atol=1e-13)
    assert torch.equal(sum(mask.int() for _, mask in shares), valid.int())
    total = sum(torch.autograd.grad(loss.sum(), z)[0] for loss, _ in shares)
    torch.testing.assert_close(total, gradient, rtol=1e-11, atol=1e-12)
    for rows, (own, mask) in zip(parts, shares, strict=True):
        elsewhere = torch.ones(48, dtype=torch.bool).index_fill(0, rows, False)
        assert (own[elsewhere] == 0).all() and not mask[elsewhere].any()
        again = contrastive_loss(z, correct, GROUP, anchor_rows=~elsewhere, **names)
        assert torch.equal(again[0], own) and torch.equal(again[1], mask)


def test_ranks_with_equal_generators_draw_what_one_rank_would():
    z, correct = batch()
    whole, _ = contrastive_loss(z, correct, GROUP, generator=torch.Generator().manual_seed(1))
    shares = [
        contrastive_loss(z, correct, GROUP, generator=torch.Generator().manual_seed(1), anchor_rows=rows)[0]
        for rows in torch.arange(48).chunk(3)
    ]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-13, atol=1e-13)


def test_copies_of_a_prompt_draw_differently():
    twice = draws(["a/0", "b/0", "a/0"], torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1]), seed=1, step=2)
    once = draws(["a/0", "b/0"], torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), seed=1, step=2)
    assert torch.equal(twice[:3], once), "the first copy draws as if it were alone"
    assert twice.unique().numel() == 5
