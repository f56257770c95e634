"""The contrastive losses against a loop over anchors in float64, written from the formulas."""

import itertools
import math

import pytest
import torch

from clipo_megatron.algorithms.clipo import contrastive_loss, losses

LOSSES = ["infonce", "supcon_out", "supcon_in", "soft_nn"]
LEVELS = ["group", "batch", "cross", "cross_opposite"]
SIMILARITIES = ["cosine", "neg_cosine", "l2"]
ANCHORS = ["correct", "wrong", "both"]
TAU = 0.2


def oracle(z, correct, group, *, loss, level, similarity, anchors, temperature, uniform):
    """One rollout after another, each with its lists of positives and negatives."""
    size = len(z)
    label, member = correct.tolist(), group.tolist()

    if similarity == "l2":
        # The ones keep the root of a row's distance to itself, which no formula uses, from having no derivative.
        squares = ((z[:, None] - z) ** 2).sum(-1) + torch.eye(size, dtype=z.dtype)
        similarities = 1 - squares.sqrt()
    else:
        lengths = (z**2).sum(-1).sqrt()
        cosine = (z[:, None] * z).sum(-1) / (lengths[:, None] * lengths)
        similarities = cosine if similarity == "cosine" else -cosine
    exponential = (similarities / temperature).exp()

    found, valid = [], []
    for i in range(size):
        others = [j for j in range(size) if j != i]
        mates = [j for j in others if member[j] == member[i]]
        positives = [j for j in (others if level == "batch" else mates) if label[j] == label[i]]
        negatives = [j for j in (mates if level == "group" else others) if label[j] != label[i]]
        if level == "cross":
            negatives = [j for j in others if j not in positives]
        is_anchor = anchors == "both" or label[i] == (anchors == "correct")
        if not (is_anchor and positives and negatives):
            found.append(z.new_zeros(()))
            valid.append(False)
            continue
        below = exponential[i, positives + negatives].sum()
        if loss == "infonce":
            value = -(exponential[i, positives[int(uniform[i] * len(positives))]] / below).log()
        elif loss == "supcon_out":
            value = -(exponential[i, positives] / below).log().mean()
        else:
            above = exponential[i, positives].sum()
            value = -(above / (len(positives) if loss == "supcon_in" else 1) / below).log()
        found.append(value)
        valid.append(True)
    return torch.stack(found) if found else z.new_zeros(0), torch.tensor(valid, dtype=torch.bool)


def random_batch(seed, sizes=(5, 1, 4, 2, 6, 3, 3), dim=7, dtype=torch.float64):
    """Unequal, interleaved groups with ids that are neither small nor sorted; one all correct, one all wrong."""
    generator = torch.Generator().manual_seed(seed)
    ids = [907, -3, 12, 5, 400_000_000_000, 0, 44]
    group = torch.tensor([i for i, n in zip(ids, sizes, strict=True) for _ in range(n)])
    correct = torch.rand(len(group), generator=generator) < 0.5
    correct[group == 0], correct[group == 44] = True, False
    order = torch.randperm(len(group), generator=generator)
    z = torch.randn(len(group), dim, generator=generator, dtype=torch.float64)
    uniform = torch.rand(len(group), generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), correct[order], group[order], uniform


@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_equal_the_loop(loss, level, similarity, anchors):
    names = {"loss": loss, "level": level, "similarity": similarity, "anchors": anchors, "temperature": TAU}
    z, correct, group, uniform = random_batch(seed=1)
    expected, expected_valid = oracle(z, correct, group, uniform=uniform, **names)
    found, valid = contrastive_loss(z, correct, group, uniform=uniform, **names)
    assert expected_valid.any() and (level == "batch" and anchors == "both") == bool(expected_valid.all())
    assert torch.equal(valid, expected_valid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[~valid] == 0).all()

    # A weight a row, so that a gradient that lands on the wrong row is seen.
    weight = torch.linspace(0.5, 2.0, len(z), dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), z)
    (gradient,) = torch.autograd.grad((found * weight).sum(), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-11)

    single = z.detach().float()
    found32, valid32 = contrastive_loss(single, correct, group, uniform=uniform, **names)
    expected32, _ = oracle(single.double(), correct, group, uniform=uniform, **names)
    assert found32.dtype == torch.float32 and torch.equal(valid32, valid)
    torch.testing.assert_close(found32.double(), expected32, rtol=1e-6, atol=1e-5 * TAU)


@pytest.mark.parametrize("budget", [1, 8, 40])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_any_size_give_the_same(monkeypatch, loss, level, budget):
    z, correct, group, uniform = random_batch(seed=2)
    whole, valid = contrastive_loss(z, correct, group, uniform=uniform, loss=loss, level=level)
    (gradient,) = torch.autograd.grad(whole.sum(), z)
    monkeypatch.setattr(losses, "BLOCK", budget)
    cut, cut_valid = contrastive_loss(z, correct, group, uniform=uniform, loss=loss, level=level)
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-13)
    assert torch.equal(cut_valid, valid)
    torch.testing.assert_close(torch.autograd.grad(cut.sum(), z)[0], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, level, similarity):
    z, correct, group, uniform = random_batch(seed=3, dim=3)

    def total(x):
        return contrastive_loss(
            x, correct, group, loss=loss, level=level, similarity=similarity, uniform=uniform, temperature=TAU
        )[0]

    assert torch.autograd.gradcheck(total, (z,))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_rows_does_not_matter(loss, level):
    z, correct, group, uniform = random_batch(seed=4)
    sample = torch.tensor([(group[:i] == g).sum() for i, g in enumerate(group)])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    names = {"loss": loss, "level": level}
    before, valid = contrastive_loss(z, correct, group, uniform=uniform, sample=sample, **names)
    after, moved = contrastive_loss(
        z[order], correct[order], group[order], uniform=uniform[order], sample=sample[order], **names
    )
    torch.testing.assert_close(after, before[order], rtol=1e-12, atol=1e-12)
    assert torch.equal(moved, valid[order])


def test_sample_numbers_in_row_order_change_nothing():
    z, correct, group, uniform = random_batch(seed=5)
    sample = torch.tensor([(group[:i] == g).sum() for i, g in enumerate(group)])
    plain, _ = contrastive_loss(z, correct, group, uniform=uniform)
    assert torch.equal(contrastive_loss(z, correct, group, uniform=uniform, sample=sample)[0], plain)


DEGENERATE = {
    "no rollout": ([], []),
    "one rollout": ([True], [3]),
    "all correct": ([True] * 4, [0, 0, 1, 1]),
    "all wrong": ([False] * 4, [0, 0, 1, 1]),
    "no second positive": ([True, False, False, True], [0, 0, 1, 1]),
    "every rollout alone": ([True, False, True], [0, 1, 2]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_without_a_valid_anchor_loss_and_gradient_are_zero(case):
    correct, group = torch.tensor(DEGENERATE[case][0], dtype=torch.bool), torch.tensor(DEGENERATE[case][1]).long()
    for loss, level, similarity, anchors in itertools.product(LOSSES, LEVELS, SIMILARITIES, ANCHORS):
        z = torch.randn(len(correct), 5, requires_grad=True)
        names = {"loss": loss, "level": level, "similarity": similarity, "anchors": anchors}
        found, valid = contrastive_loss(z, correct, group, **names)
        assert torch.equal(valid, oracle(z.double(), correct, group, temperature=1, uniform=[0.0] * 4, **names)[1])
        assert not valid.any() or level != "group" or anchors != "correct"
        found.sum().backward()
        assert found.isfinite().all() and z.grad.isfinite().all() and (found[~valid] == 0).all()
        assert valid.any() or (z.grad == 0).all()


def test_an_invalid_group_beside_a_valid_one_gets_no_gradient():
    z = torch.randn(8, 4, requires_grad=True)
    correct = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]).bool()
    found, _ = contrastive_loss(z, correct, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    found.sum().backward()
    assert (z.grad[:4] != 0).any(1).all() and (z.grad[4:] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_coinciding_and_zero_embeddings_have_finite_gradients(similarity, loss):
    row = torch.randn(6)
    z = torch.stack([row, row, row, -row, torch.zeros(6), torch.zeros(6)]).requires_grad_()
    correct, group = torch.tensor([1, 1, 0, 0, 1, 0]).bool(), torch.zeros(6, dtype=torch.long)
    found, valid = contrastive_loss(z, correct, group, similarity=similarity, loss=loss, anchors="both")
    found.sum().backward()
    assert valid.all() and found.isfinite().all() and z.grad.isfinite().all() and z.grad.abs().max() < 1e4


def test_small_distances_keep_their_digits():
    z = 1 + 1e-3 * torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    correct, group = torch.arange(32) % 2 == 0, torch.zeros(32, dtype=torch.long)
    names = {"loss": "supcon_out", "similarity": "l2", "temperature": 1e-3}
    found, _ = contrastive_loss(z, correct, group, **names)
    expected, _ = contrastive_loss(z.double(), correct, group, **names)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4, 16])
def test_a_collapsed_head_costs_the_log_of_the_others(size):
    z = torch.ones(size, 8, dtype=torch.float64)
    correct = torch.arange(size) < size // 2
    group = torch.zeros(size, dtype=torch.long)
    for loss in ("infonce", "supcon_out", "supcon_in"):
        found, valid = contrastive_loss(z, correct, group, loss=loss)
        torch.testing.assert_close(found[valid], torch.full_like(found[valid], math.log(size - 1)))


@pytest.mark.parametrize("positives", [2, 5, 14])
def test_perfect_separation_costs_the_log_of_the_other_positives(positives):
    correct = torch.arange(16) < positives
    z = torch.where(correct[:, None], 1.0, -1.0).double() * torch.ones(16, 8, dtype=torch.float64)
    group = torch.zeros(16, dtype=torch.long)
    for loss in ("infonce", "supcon_out", "supcon_in"):
        found, valid = contrastive_loss(z, correct, group, loss=loss)
        assert valid.sum() == positives
        torch.testing.assert_close(found[valid], torch.full_like(found[valid], math.log(positives - 1)))
    found, valid = contrastive_loss(z, correct, group, loss="soft_nn")
    assert (found[valid] >= 0).all() and found.max() < 1e-15


def test_supcon_in_is_soft_nn_plus_the_log_of_the_positives():
    z, correct, group, _ = random_batch(seed=6)
    soft, valid = contrastive_loss(z, correct, group, loss="soft_nn")
    supcon, _ = contrastive_loss(z, correct, group, loss="supcon_in")
    positives = torch.tensor([((group == g) & correct).sum() - 1 for g in group])
    torch.testing.assert_close((supcon - soft)[valid], positives[valid].double().log())


def test_infonce_is_supcon_out_in_expectation():
    z, correct, group, _ = random_batch(seed=7)
    steps = 60  # divisible by every |P|, so that equally spaced numbers hit each positive equally often
    drawn = [
        contrastive_loss(z, correct, group, uniform=torch.full((len(z),), (k + 0.5) / steps, dtype=torch.float64))[0]
        for k in range(steps)
    ]
    torch.testing.assert_close(torch.stack(drawn).mean(0), contrastive_loss(z, correct, group, loss="supcon_out")[0])


def test_half_precision_inputs_are_computed_in_float32_even_under_autocast():
    z, correct, group, uniform = random_batch(seed=8, dtype=torch.bfloat16)
    full, _ = contrastive_loss(z.detach().float(), correct, group, uniform=uniform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = contrastive_loss(z, correct, group, uniform=uniform)
    assert found.dtype == torch.float32 and torch.equal(found, full)
    found.sum().backward()
    assert z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "infonec"}, "Did you mean 'infonce'"),
        ({"level": "global"}, "group, batch, cross"),
        ({"similarity": "dot"}, "cosine, neg_cosine, l2"),
        ({"anchors": "right"}, "correct, wrong, both"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"correct": torch.ones(4)}, "verdict as torch.bool"),
        ({"correct": torch.ones(3).bool()}, "correct has shape"),
        ({"group": torch.zeros(4)}, "integer ids"),
        ({"embeddings": torch.zeros(4)}, r"\[B, d\]"),
        ({"uniform": torch.zeros(3)}, "uniform has shape"),
        ({"uniform": torch.zeros(4), "generator": torch.Generator()}, "pass one of them"),
        ({"anchor_rows": torch.tensor([4])}, "4 rows"),
        ({"anchor_rows": torch.ones(3).bool()}, "4 rows"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {
        "embeddings": torch.randn(4, 2),
        "correct": torch.tensor([1, 1, 0, 0]).bool(),
        "group": torch.zeros(4, dtype=torch.long),
    }
    contrastive_loss(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        contrastive_loss(**(good | change))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_released_epsilon(loss, level):
    """1e-8 beside the sums, once the anchor's similarity to itself is taken off: it counts where cosines are low."""
    z, correct, group, uniform = random_batch(seed=8, dim=200)
    names = {"loss": loss, "level": level, "uniform": uniform}
    found, valid = contrastive_loss(z, correct, group, released_eps=True, **names)
    plain, _ = contrastive_loss(z, correct, group, **names)
    unit = z.detach() / z.detach().norm(dim=1, keepdim=True)
    shifted = (unit @ unit.T / 0.05 - 1 / 0.05).exp()  # the largest cosine of a row is 1, to itself
    for i in valid.nonzero().squeeze(1).tolist():
        others = [j for j in range(len(z)) if j != i]
        mates = [j for j in others if group[j] == group[i]]
        positives = [j for j in (others if level == "batch" else mates) if correct[j]]
        sets = {"group": mates, "batch": others, "cross": others}
        sets["cross_opposite"] = positives + [j for j in others if not correct[j]]
        below = math.log(float(shifted[i, sets[level]].sum()) + 1e-8)
        if loss == "infonce":
            value = below - math.log(float(shifted[i, positives[int(uniform[i] * len(positives))]]))
        elif loss == "supcon_out":
            value = below - float(shifted[i, positives].log().mean())
        else:
            value = below - math.log(float(shifted[i, positives].sum()) + 1e-8)
            value += math.log(len(positives)) if loss == "supcon_in" else 0.0
        assert found[i].item() == pytest.approx(value, rel=1e-10)
    assert (found - plain).abs().max() > 0.001 and (found[~valid] == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), z)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_at_cross_level_a_batch_without_a_wrong_rollout_has_anchors():
    """As in the released code, where the correct rollouts of other prompts are in the denominator; not at
    cross_opposite."""
    z, group = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 2])
    right = torch.ones(6, dtype=torch.bool)
    loss, valid = contrastive_loss(z, right, group, level="cross", loss="supcon_out")
    assert valid.tolist() == [True] * 5 + [False] and (loss[:5] > 0).all()
    assert not contrastive_loss(z, right, group, level="cross_opposite")[1].any()
