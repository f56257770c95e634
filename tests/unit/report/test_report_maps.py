"""Maps in reports: t-SNE against its definition, and the agreement of neighbours against a plain loop."""

import math

import numpy as np
import pytest

from clipo_megatron.report.representation import neighbour_agreement
from clipo_megatron.report.tsne import affinities, gradient, squared_distances, tsne


def test_tsne_follows_its_divergence():
    """The gradient against finite differences of KL(P || Q), written out pair by pair."""
    random = np.random.default_rng(0)
    joint = affinities(squared_distances(random.normal(size=(12, 5))), 3.0)
    assert joint.sum() == pytest.approx(1) and np.array_equal(joint, joint.T)
    place = random.normal(size=(12, 2))

    def divergence(place):
        weights = {(i, j): 1 / (1 + sum((place[i] - place[j]) ** 2)) for i in range(12) for j in range(12) if i != j}
        total = sum(weights.values())
        return sum(joint[pair] * math.log(joint[pair] / (weight / total)) for pair, weight in weights.items())

    found, step = gradient(place, joint), 1e-6
    for i, axis in ((0, 0), (5, 1), (11, 0)):
        moved = np.zeros_like(place)
        moved[i, axis] = step
        slope = (divergence(place + moved) - divergence(place - moved)) / (2 * step)
        assert found[i, axis] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_every_row_has_the_perplexity_that_was_asked_for():
    points = np.random.default_rng(1).normal(size=(40, 6)) * np.linspace(0.1, 30, 40)[:, None]
    distances = squared_distances(points)
    joint = affinities(distances, 7.0)
    assert joint.sum() == pytest.approx(1)
    # From the joint of one row's own search: rebuild the conditional by the same rule, in base 2.
    for row in (0, 17, 39):
        low, high = 0.0, 1e6
        others = np.delete(distances[row], row)
        for _ in range(200):
            middle = (low + high) / 2
            share = np.exp(-(others - others.min()) * middle)
            share /= share.sum()
            perplexity = 2 ** -(share[share > 0] * np.log2(share[share > 0])).sum()
            low, high = (middle, high) if perplexity > 7.0 else (low, middle)
        assert perplexity == pytest.approx(7.0, rel=1e-3)
        assert (np.delete(joint[row], row) * 80 >= share - 1e-6).all(), "P is (this + its transpose) / 2n"


def test_tsne_keeps_clusters_apart_and_is_the_same_each_time():
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 30)
    points = random.normal(size=(90, 20)) + 15 * random.normal(size=(3, 20))[label]
    place = tsne(points)
    assert np.array_equal(place, tsne(points)) and place.shape == (90, 2) and np.abs(place).max() == pytest.approx(1)
    distances = squared_distances(place)
    np.fill_diagonal(distances, np.inf)
    assert (label[distances.argsort(1)[:, :5]] == label[:, None]).all()


@pytest.mark.parametrize("points", [np.zeros((1, 4)), np.zeros((9, 4)), np.eye(3), np.eye(5)[:, :1]])
def test_tsne_of_few_or_equal_points(points):
    place = tsne(points)
    assert place.shape == (len(points), 2) and np.isfinite(place).all()


def test_neighbours_against_a_loop():
    random = np.random.default_rng(2)
    points, group = random.normal(size=(40, 6)).astype(np.float32), np.repeat(np.arange(5), 8)
    correct, graded = random.random(40) < 0.4, random.random(40) < 0.9
    correct[group == 0] = True
    correct &= graded
    hits = chances = count = 0
    for i in range(40):
        others = [j for j in range(40) if j != i and group[j] == group[i] and graded[j]]
        if not graded[i] or len({bool(correct[j]) for j in [*others, i]}) < 2:
            continue
        cosine = [points[i] @ points[j] / np.linalg.norm(points[i]) / np.linalg.norm(points[j]) for j in others]
        hits += correct[others[int(np.argmax(cosine))]] == correct[i]
        chances += sum(correct[j] == correct[i] for j in others) / len(others)
        count += 1
    share, chance, used = neighbour_agreement(points, group, correct, graded)
    assert (share, chance, used) == (pytest.approx(hits / count), pytest.approx(chances / count), count)
    assert neighbour_agreement(points, group, np.ones(40, bool), graded) is None
