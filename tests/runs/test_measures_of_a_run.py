"""What the report page and the scaling table read from the folder of a real run."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import STEPS

from clipo_megatron.cli.report import write_page
from clipo_megatron.report.scales import percent, seconds
from clipo_megatron.slurm.measure import measure
from clipo_megatron.slurm.scaling_points import STRONG, WEAK, ScalingPoint
from clipo_megatron.telemetry.sinks import read_lines


def charts(page: Path) -> dict[str, dict]:
    """The numbers of the page's curves, by metric, or what else they are of."""
    found = re.findall(r'aria-label="([^"]*)" data-chart="([^"]*)"', page.read_text())
    named = {name.rpartition("(")[2].rstrip(")"): json.loads(html.unescape(facts)) for name, facts in found}
    assert len(named) == len(found)
    return named


def test_a_real_run(undisturbed, tmp_path):
    page, _ = write_page([undisturbed], tmp_path / "page.html")
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    text, drawn = html.unescape(page.read_text()), charts(page)
    assert drawn["reward/accuracy"]["series"][0]["ys"] == pytest.approx([x["reward/accuracy"] for x in lines], rel=1e-6)
    assert drawn["clipo/loss"]["series"][0]["ys"] == pytest.approx([x["clipo/loss"] for x in lines], rel=1e-6)
    evaluations = {file.stem: json.loads(file.read_text()) for file in (undisturbed / "eval").iterdir()}
    (accuracy,) = drawn["accuracy on exam"]["series"]
    assert accuracy["xs"] == [0, 3, 6]
    assert accuracy["ys"] == pytest.approx([evaluations[f"step_00000{s}"]["accuracy"] for s in (0, 3, 6)])
    assert f">{percent(evaluations['step_000006']['accuracy'])}</div>" in text
    assert seconds(sum(line["time/step_s"] for line in lines)) in text
    for title in (
        "Representation",
        "Near and far rollouts",
        "One step, rank by rank: small",
        "Embeddings, step 6",
    ):
        assert title in text
    assert "What is missing" not in text


POINT = ScalingPoint("nodes-1", (WEAK, STRONG), 1, 0, 1, 0, STEPS, 4, "", ())


def test_a_real_run_is_measured(undisturbed):
    """Tokens against those that the metrics of score and update count, seconds against the phases' sum."""
    run = measure(replace(POINT, output=str(undisturbed)), skip=2)
    lines = read_lines(undisturbed / "metrics.jsonl")[2:]
    assert run.steps == STEPS - 2 == len(lines)
    spent = [line["time/step_s"] for line in lines]
    learnt = [line["time/score_s"] + line["time/update_s"] for line in lines]
    tokens = sum(line["speed/train_tokens_per_s_per_rank"] * s for line, s in zip(lines, learnt, strict=True))
    assert run.tokens_per_s == pytest.approx(tokens / sum(spent), rel=1e-9)
    responses = sum(line["rollout/response_length"] for line in lines) * 4 * 8
    assert tokens > responses > 0, "prompts count too"
    assert run.fastest == min(spent) <= run.seconds <= run.slowest == max(spent)
    assert sum(run.shares.values()) == pytest.approx(1) and run.shares["update"] > 0 <= run.shares["other"]
    assert measure(replace(POINT, output=str(undisturbed), steps=STEPS + 1), skip=1) is None, "it is not done"
    assert measure(replace(POINT, output=str(undisturbed)), skip=STEPS) is None
