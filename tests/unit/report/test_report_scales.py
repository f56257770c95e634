"""Axes, ticks and numbers of the report's charts."""

import math

import numpy as np
import pytest

from clipo_megatron.report.chart import MOST_POINTS, Series, smoothed, thinned
from clipo_megatron.report.scales import Scale, number, reach, seconds, tick_text, ticks


def test_axes_hold_their_values_and_have_round_ticks():
    random = np.random.default_rng(3)
    for _ in range(300):
        values = (random.normal(size=random.integers(1, 9)) * 10.0 ** random.integers(-8, 9)).tolist()
        low, high = reach(values)
        marks = ticks(low, high)
        assert low <= min(values) + 1e-9 * abs(low) and high >= max(values) - 1e-9 * abs(high) and low < high
        assert 2 <= len(marks) <= 12
        labels = [tick_text(mark, marks[1] - marks[0]) for mark in marks]
        assert len(set(labels)) == len(labels), f"two ticks read alike: {labels}"
    for value in (5e-324, 1e-310, 1.7e308):  # a metric can be any number that is one
        for values in ([value], [-value, value], [0.0, value]):
            low, high = reach(values)
            places = [Scale(low, high, 0.0, 100.0)(each) for each in (*values, *ticks(low, high))]
            assert low < high and all(map(math.isfinite, places))
        assert reach([value], share=True)[0] < reach([value], share=True)[1]
    assert reach([]) != reach([5.0]) and reach([0.2, 0.97], share=True, zero=True) == (0.0, 1.0)


def test_numbers_as_people_write_them():
    assert [number(x) for x in (0, 0.12345, 12345.0, -2.5e6, 1.5e-7, math.nan, None)] == [
        "0", "0.1235", "12.3k", "−2.5M", "1.5e−7", "–", "–",
    ]  # fmt: skip
    assert [seconds(x) for x in (0.44, 59, 61, 3720)] == ["0.4 s", "59 s", "1 min 01 s", "1 h 02 min"]
    assert tick_text(0.25, 0.25) == "0.25" and tick_text(0.05, 0.05, share=True) == "5%"
    assert [tick_text(x, 0.025, share=True) for x in (0.3, 0.325)] == ["30.0%", "32.5%"]
    assert [tick_text(x, step, share=True) for x, step in ((0.75, 0.25), (0.002, 0.001), (0.2, 0.2))] == [
        "75%", "0.2%", "20%",
    ]  # fmt: skip


def test_long_curves_are_thinned_between_their_extremes():
    values = np.sin(np.arange(5200)).tolist()
    line = thinned(Series("a", 0, list(range(5200)), values))
    assert len(line.xs) <= MOST_POINTS and line.xs == sorted(line.xs)
    assert min(line.low) == min(values) and max(line.high) == max(values)
    assert sum(line.ys) / len(line.ys) == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
