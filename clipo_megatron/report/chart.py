"""Charts as inline SVG. Colours are CSS classes (`c0` to `c7` for groups), so that only style.css knows light and dark.

script.js draws what the pointer shows, from the numbers in `data-chart`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.report.scales import Scale, reach, safe, tick_text, ticks

WIDTH, HEIGHT = 560, 264
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 12, 42
SLOTS = 8
MOST_POINTS = 300  # most points of a line; a longer one is shown as means over stretches of steps
_MANY = 4  # most lines whose bands can still be told apart
SMOOTHING = 0.8  # weight of the average so far at each step


@dataclass(frozen=True)
class Series:
    """One line of a chart, with an optional band or intervals."""

    name: str
    slot: int
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    marks: bool = False  # draw dots, with an interval where low and high are given, and no band
    shift: float = 0.0  # pixels to the right, so that the dots of several lines do not hide each other


def line_chart(
    series: Sequence[Series],
    *,
    y: str,
    x: str = "step",
    label: str = "",
    share: bool = False,
    zero: bool = False,
    smooth: bool = True,
) -> str:
    """A line chart over steps, as SVG.

    Args:
        series: the lines, each with at least one point.
        y: name of the vertical axis, with its unit.
        x: name of the horizontal axis.
        label: description for screen readers; `y` by default.
        share: values are shares, shown in percent.
        zero: the vertical axis includes 0.
        smooth: draw a smoothed form too, to which the page can switch.
    """
    series = [thinned(each) for each in series]
    shown = [v for each in series for column in (each.ys, each.low or (), each.high or ()) for v in column]
    low, high = reach(shown, zero=zero, share=share)
    first, last = min(min(s.xs) for s in series), max(max(s.xs) for s in series)
    if first == last:
        first, last = first - 0.5, last + 0.5
    inside = max((abs(each.shift) for each in series), default=0.0)
    inside += 8 if inside else 0
    across = Scale(first, last, LEFT + inside, WIDTH - RIGHT - inside)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [frame(across, up, x=x, y=y, share=share, inside=inside)]
    many = len(series) > _MANY
    parts += [_drawn(each, across, up, smooth=smooth, faint=many) for each in series]
    facts = {
        "x": [first, last, across.start, across.end],
        "y": [low, high, HEIGHT - BOTTOM, TOP],
        "xName": x,
        "share": share,
        "series": [
            {
                "name": each.name,
                "slot": each.slot % SLOTS,
                "xs": list(each.xs),
                "ys": list(each.ys),
                **({"low": list(each.low), "high": list(each.high)} if each.low and each.high else {}),
            }
            for each in series
        ],
    }
    return svg("".join(parts), WIDTH, HEIGHT, label=label or y, facts=facts)


def _drawn(each: Series, across: Scale, up: Scale, *, smooth: bool, faint: bool) -> str:
    points = [(across(x) + each.shift, up(y)) for x, y in zip(each.xs, each.ys, strict=True)]
    slot, parts = each.slot % SLOTS, []
    if each.low and each.high and not each.marks and any(a != b for a, b in zip(each.low, each.high, strict=True)):
        lower = [(across(x), up(value)) for x, value in zip(each.xs, each.low, strict=True)]
        upper = [(across(x), up(value)) for x, value in zip(each.xs, each.high, strict=True)]
        parts.append(f'<path class="band{" faint" if faint else ""}" d="{path(upper + lower[::-1])}Z"/>')
    if each.marks and each.low and each.high:
        parts += [
            f'<path class="whisker" d="M{across(x) + each.shift:.1f} {up(a):.1f}V{up(b):.1f}"/>'
            for x, a, b in zip(each.xs, each.low, each.high, strict=True)
        ]
    dashed = " dashed" if each.dashed else ""
    if len(points) > 1:
        parts.append(f'<path class="line raw{dashed}{"" if smooth else " only"}" d="{path(points)}"/>')
        if smooth:
            even = [(x, up(y)) for (x, _), y in zip(points, smoothed(each.ys), strict=True)]
            parts.append(f'<path class="line smooth{dashed}" d="{path(even)}"/>')
    if each.marks or len(points) == 1:
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
    return f'<g class="series c{slot}" data-slot="{each.slot}">{"".join(parts)}</g>'


def frame(
    across: Scale,
    up: Scale,
    *,
    x: str,
    y: str,
    share: bool = False,
    share_x: bool = False,
    inside: float = 0.0,
) -> str:
    """Grid, ticks and names of the axes, which reach `inside` pixels beyond the horizontal scale."""
    parts = []
    left, right = across.start - inside, across.end + inside
    marks = ticks(up.low, up.high)
    spacing = marks[1] - marks[0] if len(marks) > 1 else 1.0
    for value in marks:
        place = up(value)
        parts.append(f'<path class="grid" d="M{left} {place:.1f}H{right}"/>')
        text = tick_text(value, spacing, share=share)
        parts.append(f'<text class="tick" x="{left - 8}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    marks = ticks(across.low, across.high, 6)
    if not share_x and x.startswith("step"):
        marks = [value for value in marks if value == round(value)]
    spacing = marks[1] - marks[0] if len(marks) > 1 else 1.0
    for value in marks:
        text = tick_text(value, spacing, share=share_x)
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{up.start + 18:.1f}" text-anchor="middle">{text}</text>'
        )
        parts.append(f'<path class="axis" d="M{across(value):.1f} {up.start:.1f}v4"/>')
    parts.append(f'<path class="axis" d="M{left} {up.start:.1f}H{right}"/>')
    middle = (across.start + across.end) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{safe(x)}</text>')
    centre = (up.start + up.end) / 2
    turned = f'transform="rotate(-90 13 {centre:.1f})"'
    parts.append(f'<text class="name" x="13" y="{centre:.1f}" text-anchor="middle" {turned}>{safe(y)}</text>')
    return "".join(parts)


def scatter(
    points: Sequence[tuple[float, float, int, str]],
    *,
    x: str,
    y: str,
    share_x: bool = False,
) -> str:
    """A scatter plot of points (x, y, slot of the group, text that the pointer shows)."""
    across = Scale(*reach([p[0] for p in points], share=share_x, zero=share_x), LEFT, WIDTH - RIGHT)
    up = Scale(*reach([p[1] for p in points], zero=True), HEIGHT - BOTTOM, TOP)
    dots = "".join(
        f'<g class="series c{slot % SLOTS}" data-slot="{slot}"><circle class="dot soft" cx="{across(a):.1f}" '
        f'cy="{up(b):.1f}" r="4.5" data-tip="{safe(tip)}"/></g>'
        for a, b, slot, tip in points
    )
    axes = frame(across, up, x=x, y=y, share_x=share_x)
    return svg(axes + dots, WIDTH, HEIGHT, label=f"{y} against {x}")


def svg(content: str, width: int, height: int, *, label: str, facts: dict | None = None) -> str:
    """An SVG element as wide as its place; `facts` are the numbers that script.js shows at the pointer."""
    data = f' data-chart="{safe(json.dumps(rounded(facts)))}"' if facts else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(label)}"{data}>'
        f'{content}<g class="cursor"></g></svg>'
    )


def path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average with bias correction, as in Adam."""
    found, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        found.append(average / (1 - SMOOTHING**count))
    return found


def thinned(each: Series) -> Series:
    """The series with at most MOST_POINTS points: means of stretches of steps, with their least and largest values."""
    stretch = -(-len(each.xs) // MOST_POINTS)
    if stretch <= 1 or each.marks:
        return each
    cuts = [slice(start, start + stretch) for start in range(0, len(each.xs), stretch)]
    low, high = each.low or each.ys, each.high or each.ys
    return Series(
        each.name,
        each.slot,
        [each.xs[cut][len(each.xs[cut]) // 2] for cut in cuts],
        [sum(each.ys[cut]) / len(each.ys[cut]) for cut in cuts],
        [min(low[cut]) for cut in cuts],
        [max(high[cut]) for cut in cuts],
        each.dashed,
    )


def rounded(facts: object) -> object:
    """`facts` with all numbers rounded to seven digits, which keeps the page small."""
    if isinstance(facts, float):
        return float(f"{facts:.7g}")
    if isinstance(facts, dict):
        return {key: rounded(value) for key, value in facts.items()}
    return [rounded(value) for value in facts] if isinstance(facts, list | tuple) else facts
