"""Exact t-SNE in numpy: a map of points that keeps neighbours together (van der Maaten and Hinton, 2008).

A report shows some hundred points, for which all pairs take a second or two. Nothing is random: equal points give equal
maps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
PERPLEXITY = 20.0
ITERATIONS = 500
_TINY = 1e-12


def tsne(points: Points) -> Points:
    """The map [n, 2] of `points` [n, D], centred, with coordinates in [-1, 1].

    D is reduced to 50 by principal components. Few points lower the perplexity. The first two principal components are
    the start.
    """
    count = len(points)
    centred = principal(np.asarray(points, np.float64), 50)
    if count < 4 or not np.ptp(centred):
        return _scaled(np.pad(centred, ((0, 0), (0, 2)))[:, :2])
    joint = affinities(squared_distances(centred), min(PERPLEXITY, (count - 1) / 3))
    start = np.pad(centred, ((0, 0), (0, 2)))[:, :2]
    place = 1e-2 * start / max(start[:, 0].std(), _TINY)
    velocity, gains = np.zeros_like(place), np.ones_like(place)
    early, rate = ITERATIONS // 4, max(count / 12.0, 20.0)
    for step in range(ITERATIONS):
        slope = gradient(place, joint * (12.0 if step < early else 1.0))
        agree = np.sign(slope) == np.sign(velocity)
        gains = np.clip(np.where(agree, gains * 0.8, gains + 0.2), 0.01, None)
        velocity = (0.5 if step < early else 0.8) * velocity - rate * gains * slope
        place = place + velocity
        place -= place.mean(0)
    return _scaled(place)


def principal(points: Points, dimensions: int) -> Points:
    """Coordinates along at most `dimensions` principal components, [n, dimensions], with a fixed choice of signs."""
    centred = points - points.mean(0)
    if centred.shape[1] <= 2:
        return centred
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    found = (left * sizes)[:, :dimensions]
    signs = np.sign(found[np.abs(found).argmax(0), np.arange(found.shape[1])])
    return found * np.where(signs == 0, 1, signs)


def squared_distances(points: Points) -> Points:
    """Squared distances [n, n] between points [n, D]."""
    square = (points**2).sum(1)
    return np.maximum(square[:, None] + square[None] - 2 * points @ points.T, 0.0)


def affinities(distances: Points, perplexity: float) -> Points:
    """Joint probabilities [n, n] of pairs, from Gaussians whose widths give each row the perplexity.

    Args:
        distances: squared distances, [n, n].
        perplexity: 2 to the power of a row's entropy in bits; below n.
    """
    count = len(distances)
    apart = ~np.eye(count, dtype=bool)
    near = np.where(apart, distances, np.inf)
    near = near - near.min(1, keepdims=True)  # does not change a row's probabilities
    low, high = np.zeros((count, 1)), np.full((count, 1), np.inf)
    precision = 1.0 / np.maximum(np.where(apart, near, 0.0).sum(1, keepdims=True) / count, _TINY)
    for _ in range(60):
        weights = np.exp(-near * precision)
        share = weights / weights.sum(1, keepdims=True)
        entropy = -(share * np.log(share + _TINY)).sum(1, keepdims=True)
        too_wide = entropy > np.log(perplexity)
        low, high = np.where(too_wide, precision, low), np.where(too_wide, high, precision)
        precision = np.where(np.isinf(high), precision * 2, (low + np.where(np.isinf(high), 0, high)) / 2)
    return (share + share.T) / (2 * count)


def gradient(place: Points, joint: Points) -> Points:
    """Gradient [n, 2] of KL(joint || map) by the places, where pairs of the map have Student-t weights."""
    weights = 1.0 / (1.0 + squared_distances(place))
    np.fill_diagonal(weights, 0.0)
    force = (joint - weights / weights.sum()) * weights
    return 4.0 * (force.sum(1)[:, None] * place - force @ place)


def _scaled(place: Points) -> Points:
    place = place - (place.max(0) + place.min(0)) / 2
    return place / max(np.abs(place).max(), _TINY)
