"""The report of a single run: nothing empty, what training changed, and each pair of rollouts once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_runs import evaluate, write_run

from clipo_megatron.cli.report import write_page


def page(tmp_path: Path, *runs: Path) -> str:
    out = tmp_path / "report.html"
    write_page(list(runs), out)
    return out.read_text()


def text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)))


def card(html: str, title: str) -> str:
    """What stands between a card's title and the next one; empty where there is no such card."""
    found = re.search(rf"<h3>{title}</h3>(.*?)(?=<h3>|<section|<footer)", html, re.DOTALL)
    return text(found[1]) if found else ""


def test_the_report_of_one_run_has_no_card_about_nothing(tmp_path):
    html = page(tmp_path, write_run(tmp_path / "a", evaluated=True))
    assert "nothing is compared" not in html and "Settings that differ" not in html
    begin = r'<(?:div|figure) class="card(?: [^"]*)?">'
    cards = re.findall(rf"{begin}(.*?)(?={begin}|</section>)", html, re.DOTALL)
    assert cards and all("<svg" in each or len(text(each).strip()) > 20 for each in cards)


def test_two_runs_still_show_their_settings(tmp_path):
    html = page(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=0.5))
    assert "optimizer.learning_rate" in card(html, "Settings that differ")


def test_what_training_changed_stands_in_the_report_of_one_run(tmp_path):
    run = write_run(tmp_path / "a")
    for step, solved in ((0, 5), (6, 9), (12, 15)):
        evaluate(run, step, solved)
    html = page(tmp_path, run)
    said = card(html, "Before and after")
    assert "25.0% → 75.0%" in said and "+50.0" in said and "10 / 0" in said, said
    assert "The policy before training against that after 12 steps" in said
    assert "before training 25.0%" in text(html)


def test_seeds_of_one_group_are_paired_with_themselves(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed, name="same") for seed in (0, 1)]
    for run, gained in zip(runs, (10, 6), strict=True):
        evaluate(run, 0, 5)
        evaluate(run, 12, 5 + gained)
    said = card(page(tmp_path, *runs), "Before and after")
    assert "25.0% → 65.0%" in said and "+40.0" in said and "points, 95% over seeds" in said, said


@pytest.mark.parametrize("steps", [(), (0,), (12,)])
def test_one_evaluation_or_none_changes_nothing(tmp_path, steps):
    run = write_run(tmp_path / "a")
    for step in steps:
        evaluate(run, step, 5)
    assert "Before and after" not in page(tmp_path, run)


def test_other_problems_under_the_same_names_are_not_compared(tmp_path):
    run = write_run(tmp_path / "a")
    evaluate(run, 0, 5)
    evaluate(run, 12, 9)
    file = next((run / "eval").glob("*12.json"))
    facts = json.loads(file.read_text())
    file.write_text(re.sub(r'"digest": "(\d+)"', r'"digest": "other \1"', json.dumps(facts)))
    html = page(tmp_path, run)
    assert "→" not in card(html, "Before and after")


def test_a_single_pair_is_not_nearest_and_farthest_at_once(tmp_path):
    """Four rollouts, two correct: one pair of correct ones, and four of a correct with a wrong one."""
    html = page(tmp_path, write_run(tmp_path / "a"))
    titles = re.findall(r"<h3>((?:Nearest|Farthest|The only pair), [^<]+)</h3>", html)
    assert (
        titles
        == ["The only pair, both correct", "Nearest, one correct and one wrong", "Farthest, one correct and one wrong"]
        * 2
    )
