"""The sections with maps of pooled states and embeddings, and with pairs of near and far rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.parts import Section, swatch
from clipo_megatron.report.reading import RunRecord
from clipo_megatron.report.scales import number, percent, safe
from clipo_megatron.report.tsne import tsne
from clipo_megatron.telemetry.states import States

_SIZE = 270
MOST_POINTS = 600  # most points of a map, since t-SNE computes all pairs
_QUESTION, _TEXT = 400, 4000  # most characters shown


def representation(groups: Sequence[RunGroup]) -> Section:
    """Maps of the first run of each group, at the first and the last recorded step."""
    parts = [part for group in groups if (part := _maps_of(group))]
    lead = (
        "t-SNE maps of rollouts: a correct one is a filled dot, a wrong one a cross. Only neighbourhoods within a map "
        "mean something, not positions or distances, and maps cannot be compared with each other. Point at a rollout "
        "to highlight the others of its prompt. Below each map stands a number from the original space: the share of "
        "rollouts whose nearest neighbour by cosine among the others of their prompt has the same verdict, over "
        "prompts with correct and wrong rollouts; in brackets what chance would give."
    )
    return Section("states", "Representation", lead, "".join(parts))


def pairs(groups: Sequence[RunGroup]) -> Section:
    """Texts of pairs of rollouts that are near or far in the embedding space."""
    parts = [part for group in groups if (part := _pairs_of(group))]
    lead = (
        "Pairs of rollouts of one prompt, by the cosine of their embeddings. Near pairs should reason alike. A correct "
        "rollout near a wrong one is a pair that the head does not separate yet, or a lucky guess."
    )
    return Section("pairs", "Near and far rollouts", lead, "".join(parts))


# ---------------------------------------------------------------- maps


def _maps_of(group: RunGroup) -> str:
    run = group.first
    steps = [run.state_steps[0], run.state_steps[-1]] if len(run.state_steps) > 1 else run.state_steps
    found = [states for step in steps if (states := run.states(step)) is not None]
    drawn = []
    for title, column in (("Pooled states", "pooled"), ("Embeddings", "embeddings")):
        for states in found:
            if (points := getattr(states, column)) is not None:
                drawn.append(_map(f"{title}, step {states.step + 1}", states, points))
    if not drawn:
        return ""
    legend = (
        '<div class="legend"><span><svg class="mark mark-right" viewBox="0 0 12 12"><circle cx="6" cy="6" r="4.5" '
        'fill="currentColor"/></svg>correct</span><span><svg class="mark mark-wrong" viewBox="0 0 12 12"><path '
        'd="M2 2L10 10M10 2L2 10" stroke="currentColor" stroke-width="2"/></svg>wrong</span></div>'
    )
    maps = f'<div class="maps">{"".join(drawn)}</div>'
    return f'<figure class="card below"><h3>{swatch(group, run.label)}</h3>{legend}{maps}</figure>'


def _map(title: str, states: States, points: NDArray[np.float32]) -> str:
    count = min(len(points), MOST_POINTS)
    used = points[:count].astype(np.float64)
    if title.startswith("Emb"):
        used = used / np.maximum(np.linalg.norm(used, axis=1, keepdims=True), 1e-12)
    places = tsne(used) * (_SIZE / 2 - 14) + _SIZE / 2
    marks = []
    for row, (x, y) in enumerate(places):
        verdict = "none" if not states.graded[row] else "right" if states.correct[row] else "wrong"
        shown = {"none": "not graded", "right": "correct"}.get(verdict, verdict)
        bonus = f", bonus {number(float(states.bonus[row]))}" if states.bonus is not None and verdict == "right" else ""
        prompt = int(states.group[row])
        tip = safe(f"{states.prompt_ids[prompt]}\n{shown}{bonus}")
        shape = f"M{x - 3.2:.1f} {y - 3.2:.1f}l6.4 6.4M{x + 3.2:.1f} {y - 3.2:.1f}l-6.4 6.4"
        mark = f'<path d="{shape}"' if verdict == "wrong" else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"'
        marks.append(f'{mark} class="pt {verdict}" data-group="{prompt}" data-tip="{tip}"/>')
    note = _agreement_text(states, points)
    return (
        f'<div><h4>{safe(title)}</h4><div class="map"><svg viewBox="0 0 {_SIZE} {_SIZE}" role="img" '
        f'aria-label="{safe(title)}">{"".join(marks)}</svg></div><div class="caption">{note}</div></div>'
    )


def _agreement_text(states: States, points: NDArray[np.float32]) -> str:
    found = neighbour_agreement(points, states.group, states.correct, states.graded)
    if found is None:
        return "No prompt here has correct and wrong rollouts."
    share, chance, count = found
    return f"nearest has the same verdict: <b>{percent(share)}</b> ({percent(chance)}), of {count}"


def neighbour_agreement(
    points: NDArray[np.float32], group: NDArray[np.int64], correct: NDArray[np.bool_], graded: NDArray[np.bool_]
) -> tuple[float, float, int] | None:
    """How often the nearest neighbour within a prompt has the same verdict.

    Args:
        points: the rollouts' states or embeddings, [n, D].
        group: the index of each rollout's prompt, [n].
        correct: the verdicts, [n].
        graded: which rollouts have a verdict, [n]; the others are left out.

    Returns:
        The share of rollouts whose nearest neighbour by cosine has their verdict, the share expected by chance, and
        the number of rollouts; None where no prompt has both verdicts.
    """
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    same, chance, count = 0.0, 0.0, 0
    for each in np.unique(group):
        rows = np.flatnonzero((group == each) & graded)
        verdicts = correct[rows]
        right, size = int(verdicts.sum()), len(rows)
        if not 0 < right < size:
            continue
        cosine = unit[rows] @ unit[rows].T
        np.fill_diagonal(cosine, -np.inf)
        same += float((verdicts[cosine.argmax(1)] == verdicts).sum())
        chance += (right * (right - 1) + (size - right) * (size - right - 1)) / (size - 1)
        count += size
    return (same / count, chance / count, count) if count else None


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True)
class _Pair:
    cosine: float
    group: dict[str, Any]  # a line of rollouts.jsonl
    members: tuple[int, int]
    verdicts: tuple[bool, bool]


def _pairs_of(group: RunGroup) -> str:
    run = group.first
    blocks = []
    for step in reversed([run.state_steps[0], run.state_steps[-1]] if len(run.state_steps) > 1 else run.state_steps):
        states = run.states(step)
        if states is None or states.embeddings is None:
            continue
        found = list(_all_pairs(run, states))
        shown = [
            _shown(f"{place}, {what}", pair)
            for what, verdicts in (("both correct", (True, True)), ("one correct and one wrong", None))
            for place, pair in _extremes(found, verdicts)
        ]
        if shown:
            opened = " open" if not blocks else ""
            prompts = len({id(pair.group) for pair in found})
            source = f"{prompts} prompt{'s' * (prompts != 1)}"
            head = f"Step {step + 1}: of {len(found)} pairs with different texts, from {source}"
            blocks.append(f"<details{opened}><summary>{head}</summary>{''.join(shown)}</details>")
    if not blocks:
        return ""
    return f'<div class="card below"><h3>{swatch(group, run.label)}</h3>{"".join(blocks)}</div>'


def _all_pairs(run: RunRecord, states: States) -> Iterator[_Pair]:
    """Pairs of graded rollouts of one prompt whose texts were kept and differ."""
    unit = states.embeddings / np.maximum(np.linalg.norm(states.embeddings, axis=1, keepdims=True), 1e-12)
    for group in run.texts(states.step):
        if group.get("prompt_id") not in states.prompt_ids:
            continue
        rows = np.flatnonzero(states.group == states.prompt_ids.index(group["prompt_id"]))
        rollouts = group["rollouts"]
        if len(rows) != len(rollouts):
            continue
        for a in range(len(rows)):
            for b in range(a + 1, len(rows)):
                if (
                    states.graded[rows[a]]
                    and states.graded[rows[b]]
                    and rollouts[a]["text"].strip() != rollouts[b]["text"].strip()
                ):
                    verdicts = (bool(states.correct[rows[a]]), bool(states.correct[rows[b]]))
                    yield _Pair(float(unit[rows[a]] @ unit[rows[b]]), group, (a, b), verdicts)


def _extremes(found: Sequence[_Pair], verdicts: tuple[bool, bool] | None) -> list[tuple[str, _Pair]]:
    """The nearest and the farthest pair with these verdicts, or the only one; `verdicts` None: different ones."""
    fitting = [p for p in found if (p.verdicts == verdicts if verdicts else p.verdicts[0] != p.verdicts[1])]
    fitting.sort(key=lambda pair: pair.cosine)
    if len(fitting) == 1:
        return [("The only pair", fitting[0])]
    return [("Nearest", fitting[-1]), ("Farthest", fitting[0])] if fitting else []


def _shown(title: str, pair: _Pair) -> str:
    question = " ".join(
        str(turn.get("content", "")) for turn in pair.group.get("messages", []) if isinstance(turn, dict)
    )
    gold = pair.group.get("ground_truth")
    members = sorted(pair.members, key=lambda m: not pair.group["rollouts"][m]["correct"])
    texts = "".join(_response(pair.group["rollouts"][member], member) for member in members)
    return (
        f'<div class="pair"><div class="head"><h3>{title}</h3>'
        f'<span class="cosine">cosine {pair.cosine:.3f}</span></div>'
        f'<div class="question">{safe(_cut(question, _QUESTION))} <span class="gold">Correct: {safe(gold)}</span></div>'
        f'<div class="two">{texts}</div></div>'
    )


def _response(rollout: dict[str, Any], member: int) -> str:
    verdict, shown = ("right", "correct") if rollout.get("correct") else ("wrong", "wrong")
    bonus = rollout.get("bonus")
    facts = [f"rollout {member + 1}"]
    if verdict == "right" and bonus is not None:
        facts.append(f"bonus {number(bonus)}")
    facts.append(f"reward {number(rollout.get('reward'))}")
    return (
        f'<div class="response {verdict}"><span class="badge">{shown}</span>'
        f'<span class="meta">{", ".join(facts)}</span>'
        f'<div class="text">{safe(_cut(rollout["text"], _TEXT)) or "<i>nothing</i>"}</div></div>'
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} characters more)"
