"""The section on CLIPO: contrastive loss, cosines and bonus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipo_megatron.report.chart import line_chart, scatter
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.metric_titles import CONTRASTIVE, NEGATIVE, POSITIVE
from clipo_megatron.report.parts import Section, cards, figure, group_series, metric_figure, stroke
from clipo_megatron.report.scales import number, percent


def contrast(groups: Sequence[RunGroup]) -> Section:
    """The section; its body is empty where no run has CLIPO."""
    loss, *others = (metric_figure(groups, metric) for metric in CONTRASTIVE)
    body = cards([loss, _cosines(groups), *others, _bonus_by_step(groups), _bonus_by_prompt(groups)])
    lead = (
        "The head embeds each rollout. Correct rollouts of a prompt should lie close together and apart from wrong "
        "ones; the bonus of a correct rollout is lower the less this holds for it."
    )
    return Section("clipo", "CLIPO", lead, body)


def _cosines(groups: Sequence[RunGroup]) -> str:
    series = []
    for group in groups:
        both = len(groups) > 1
        for metric, pair, dashed in ((POSITIVE, "correct–correct", False), (NEGATIVE, "correct–wrong", True)):
            name = f"{group.label}, {pair}" if both else pair
            if (found := group_series(group, metric, name=name, dashed=dashed)) is not None:
                series.append(found)
    if not series:
        return ""
    legend = f'<div class="legend">{stroke("correct with correct")}{stroke("correct with wrong", dashed=True)}</div>'
    caption = (
        "Mean cosine of embeddings over pairs of rollouts of one prompt. The wider the gap between the lines, the "
        "better the head separates them; without a gap it has collapsed. "
        f"<code>{POSITIVE}</code> <code>{NEGATIVE}</code>"
    )
    return figure(
        "Positive and negative cosines", line_chart(series, y="cosine", label="cosines"), caption, legend=legend
    )


def _bonus_by_step(groups: Sequence[RunGroup]) -> str:
    points = []
    for group in groups:
        for run in group.runs:
            bonus, accuracy = run.values("clipo/bonus_mean"), run.values("reward/accuracy")
            for step in sorted(bonus.keys() & accuracy.keys()):
                tip = (
                    f"{run.label}, step {step + 1}: {percent(accuracy[step])} correct, mean bonus {number(bonus[step])}"
                )
                points.append((accuracy[step], bonus[step], group.slot, tip))
    if not points:
        return ""
    caption = (
        "One dot a step: the share of correct rollouts, and the mean bonus of those with a valid anchor. Steps of the "
        "warm-up lie at 0. A bonus that only follows accuracy adds nothing to the verifier's reward."
    )
    drawing = scatter(points, x="correct rollouts of the step", y="mean bonus", share_x=True)
    return figure("Bonus against correctness, by step", drawing, caption)


def _bonus_by_prompt(groups: Sequence[RunGroup]) -> str:
    points, steps = [], set()
    for group in groups:
        run = group.first
        states = run.states(run.state_steps[-1]) if run.state_steps else None
        if states is None or states.bonus is None or states.embeddings is None:
            continue
        steps.add(states.step + 1)
        beside: dict[float, int] = {}  # share of correct rollouts -> number of prompts drawn there so far
        for index, prompt in enumerate(states.prompt_ids):
            rows = states.group == index
            right = rows & states.correct
            if not right.any() or not (rows & states.graded & ~states.correct).any():
                continue
            share = float(states.correct[rows].sum() / states.graded[rows].sum())
            place = beside[share] = beside.get(share, -1) + 1
            shift = 0.008 * ((place + 1) // 2) * (-1) ** place
            for value in np.sort(states.bonus[right]):
                tip = (
                    f"{run.label}, {prompt}: {percent(share, 0)} of its rollouts correct, bonus {number(float(value))}"
                )
                points.append((min(max(share + shift, 0.0), 1.0), float(value), group.slot, tip))
    if not points:
        return ""
    caption = (
        f"One dot a correct rollout of step {' or '.join(map(str, sorted(steps)))}, for prompts with correct and wrong "
        "rollouts; prompts with the same share stand side by side. The verifier rewards all dots of a column equally: "
        "their spread is what the bonus adds. First run of each group."
    )
    drawing = scatter(points, x="correct rollouts of the prompt", y="bonus", share_x=True)
    return figure("Bonus against correctness, by rollout", drawing, caption)
