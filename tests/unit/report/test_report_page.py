"""The report page: its numbers are the metrics', it says what is missing, and a browser shows it without errors."""

import html
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import browser
import numpy as np
import pytest
from report_runs import NASTY, write_run

from clipo_megatron.cli import main as cli
from clipo_megatron.cli.report import write_page
from clipo_megatron.evaluation.comparing import compare, comparisons
from clipo_megatron.evaluation.results import Evaluation, ProblemResult, read_evaluations, write_evaluation
from clipo_megatron.report.grouping import differences, group_runs
from clipo_megatron.report.metric_titles import CONTRASTIVE, LEARNING, OTHERS, PLACED, other
from clipo_megatron.report.overview import _ranks
from clipo_megatron.report.reading import Accuracy, PageError, read_run, wilson
from clipo_megatron.report.scales import number, percent, safe
from clipo_megatron.report.timing import chrome_trace, phase_seconds

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium here: install one, or set CLIPO_BROWSER")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two seeds with CLIPO and two without, and the page of them."""
    folder = tmp_path_factory.mktemp("compared")
    runs = [write_run(folder / f"{c}{s}", seed=s, clipo=c, evaluated=True) for c in (True, False) for s in (0, 1)]
    page, trace = write_page(runs, folder / "page.html")
    return runs, page, trace


def charts(page: Path) -> dict[str, dict]:
    """The numbers of the page's curves, by the name of the metric or set."""
    found = re.findall(r'aria-label="([^"]*)" data-chart="([^"]*)"', page.read_text())
    named = {name.rpartition("(")[2].rstrip(")"): json.loads(html.unescape(facts)) for name, facts in found}
    assert len(named) == len(found)
    return named


# ---------------------------------------------------------------- numbers


def test_curves_show_the_numbers_of_the_metrics(compared):
    runs, page, _ = compared
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    clipo, grpo = charts(page)["reward/accuracy"]["series"]
    assert (clipo["name"], grpo["name"]) == ("clipo", "grpo")
    for series, (a, b) in ((clipo, lines[:2]), (grpo, lines[2:])):
        pairs = [(x["reward/accuracy"], y["reward/accuracy"]) for x, y in zip(a, b, strict=True)]
        assert series["xs"] == list(range(1, 13))
        assert series["ys"] == pytest.approx([sum(pair) / 2 for pair in pairs], rel=1e-6)
        assert series["low"] == pytest.approx([min(pair) for pair in pairs], rel=1e-6)
        assert series["high"] == pytest.approx([max(pair) for pair in pairs], rel=1e-6)
    norm = charts(page)["policy/grad_norm"]["series"][0]
    assert norm["xs"] == [step + 1 for step in range(12) if step != 3], "what was not finite is left out"
    assert [each["name"] for each in charts(page)["cosines"]["series"]] == [
        "clipo, correct–correct",
        "clipo, correct–wrong",
    ]
    assert "my/own" in charts(page), "a metric that nobody knows is shown too"


def test_groups_are_compared_problem_by_problem(compared, tmp_path):
    """One seed a side: the figures of `clipo compare`. Two: the mean over seeds."""
    folders = [compared[0][2], compared[0][0]]  # without CLIPO, with it
    page, _ = write_page(folders, tmp_path / "page.html")
    text = html.unescape(page.read_text())
    before, after = (read_evaluations(folder / "eval")[-1] for folder in folders)
    rows = comparisons(before, after)
    assert [row.source for row in rows] == ["easy", "hard", "all problems", "mean of sets"]
    for row in rows:
        points = (
            f"<b>{100 * row.difference:+.1f}</b> <span class='aside'>{100 * row.low:+.1f} to {100 * row.high:+.1f}<"
        )
        assert points.replace("-", "−") in text and f"{percent(row.before)} → {percent(row.after)}" in text
    assert f">{number(compare(before, after, source='easy').p_value, 2)}</td>" in text

    means = [np.mean([read_evaluations(f / "eval")[-1].accuracy for f in compared[0][i : i + 2]]) for i in (0, 2)]
    assert f"{100 * (means[1] - means[0]):+.1f}</b>".replace("-", "−") in html.unescape(compared[1].read_text())
    other = write_run(tmp_path / "other")
    write_evaluation(other / "eval", Evaluation(12, {"new/1": ProblemResult(1, 1)}))
    page, _ = write_page([folders[0], other], tmp_path / "page.html")
    assert "there is nothing to pair" in page.read_text()


def test_seeds_are_one_group_and_settings_set_groups_apart(compared, tmp_path):
    runs = [read_run(folder) for folder in compared[0]]
    other = read_run(write_run(tmp_path / "other", seed=1, learning_rate=3e-6))
    groups = group_runs([*runs, other])
    assert [(group.label, len(group.runs)) for group in groups] == [("clipo", 2), ("grpo", 2), ("clipo-1", 1)]
    assert [run.name for run in groups[0].runs] == ["clipo-0", "clipo-1"]
    assert differences(groups) == [
        ("clipo.enabled", [True, False, True]),
        ("optimizer.learning_rate", [1e-6, 1e-6, 3e-6]),
    ]
    assert differences(groups[:1]) == []


def test_the_group_to_compare_with_is_chosen(compared, tmp_path, capsys):
    arguments = ["report", *map(str, compared[0]), "-o", str(tmp_path / "page.html")]
    assert cli.main([*arguments, "--against", "grpo"]) == 0
    text = html.unescape((tmp_path / "page.html").read_text())
    assert "<h1>grpo vs clipo</h1>" in text and "Paired differences: against grpo" in text
    assert cli.main([*arguments, "--against", "ppo"]) == 2
    assert "--against ppo: no group has this label. Give one of: clipo, grpo" in capsys.readouterr().err


def test_marks_of_groups_stand_side_by_side(compared):
    text = compared[1].read_text()
    drawing = re.search(r'<svg[^>]*aria-label="accuracy on easy".*?</svg>', text, re.DOTALL)[0]
    places = [float(x) for x in re.findall(r'<circle class="dot" cx="([\d.]+)"', drawing)]
    assert len(places) == 4 and len(set(places)) == 4 and min(b - a for a, b in pairwise(sorted(places))) >= 8
    whiskers = [float(x) for x in re.findall(r'class="whisker" d="M([\d.]+) ', drawing)]
    assert sorted(whiskers) == sorted(places)


def test_a_known_metric_has_a_caption():
    assert "rollout.window_tokens" in other("rollout/windows").caption and other("rollout/windows").share
    assert other("my/own").caption == ""
    known = [each.name for each in (*LEARNING, *CONTRASTIVE, *OTHERS)]
    assert len(set(known)) == len(known) and not {each.name for each in OTHERS} & PLACED


def test_ranks_are_shown_without_factors_of_one(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    found = []
    for layout in ({"tp": 2, "pp": 1, "dp": 4}, {"tp": 1, "pp": 1, "dp": 1}, {"tp": 1, "pp": 2}, {}):
        run.settings["layout"] = layout
        found.append(_ranks(run))
    assert found == ["8 = tp 2 × dp 4", "1", "2 = pp 2", "2 = dp 2"], "dp is known from the trace of two ranks"
    run.traces = []
    assert _ranks(run) == "–"


def test_the_trace_has_the_format_that_chrome_reads(compared):
    events = json.loads(compared[2].read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 4 * 2 * 2 and {event["pid"] for event in spans} == {0, 1, 2, 3}
    first = [(event["name"], event["ts"], event["dur"]) for event in spans if (event["pid"], event["tid"]) == (0, 0)]
    assert first == [("generate", 0.0, 1.5e6), ("update", 1.5e6, 2.75e6)]
    named = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named == {"clipo-0", "clipo-1", "grpo-0", "grpo-1", "rank 0", "rank 1"}
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}


def test_phases_sum_to_the_step():
    line = {"time/generate_s": 1.0, "time/update_s": 2.0, "time/step_s": 3.5}
    assert phase_seconds(line) == [1.0, 0.0, 0.0, 2.0, 0.0, 0.5]


def test_runs_with_steps_ahead_say_how_long_ranks_waited_and_how_old_tokens_were(tmp_path):
    runs = [write_run(tmp_path / name, steps=4, name=name) for name in ("apart", "beside")]
    config = json.loads((runs[1] / "config.json").read_text())
    config["rollout"]["ahead"] = 2
    (runs[1] / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for line, mean, oldest in zip(lines, (0.0, 1.0, 1.5, 1.5), (0.0, 1.0, 2.0, 2.0), strict=True):
        line |= {"time/generate_s": 1.5, "time/step_s": 6.0, "off_policy/age_mean": mean, "off_policy/age_max": oldest}
        line |= {"off_policy/spanning_groups": 0.5}
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, *_ = write_page(runs, tmp_path / "page.html")
    (card,) = re.findall(r"<h3>Generation beside training</h3>(.*?)</table>", page.read_text(), re.S)
    assert " ".join(re.sub(r"<[^>]*>", " ", card).split()).endswith("25% 1.00 updates 2 of 2 allowed 50%")
    assert "beside" in card and "apart" not in card, "a run without steps ahead has no ages"
    assert charts(page)["off_policy/age_mean"]["series"][0]["ys"] == [0.0, 1.0, 1.5, 1.5]


def test_intervals():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Accuracy(0, "s", (1.0,) * 5 + (0.0,) * 5).interval == wilson(5, 10)
    sampled = (0.25, 0.5, 0.75, 1.0)
    low, high = Accuracy(0, "s", sampled).interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(sampled, ddof=1) / 2, rel=1e-9) or high == 1.0
    assert (low + 1.96 * np.std(sampled, ddof=1) / 2) == pytest.approx(0.625)


# ---------------------------------------------------------------- what is missing


def missing(folder: Path) -> str:
    (page, *_) = write_page([folder], folder / "page.html")
    return html.unescape(page.read_text())


def test_a_running_run(tmp_path):
    folder = write_run(tmp_path / "run", steps=5, clipo=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/acc')
    text = missing(folder)
    for sentence in (
        "grpo-0: 5 of 12 steps are done: it still runs, or was ended.",
        "grpo-0: the last line of metrics.jsonl is cut short",
        "grpo-0: nothing was evaluated",
        "grpo-0: it ran without CLIPO",
    ):
        assert sentence in text
    assert "Positive and negative cosines" not in text and "Near and far" not in text


def test_a_run_that_has_just_begun(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, steps=0)
    for name in ("trace.jsonl", "rollouts.jsonl"):
        (folder / name).unlink()
    assert "clipo-0: no step is done yet, so it has no curves." in missing(folder)


def test_a_run_of_one_step(tmp_path):
    folder = write_run(tmp_path / "run", steps=1)
    shutil.rmtree(folder / "states")
    (folder / "trace.jsonl").unlink()
    text = missing(folder)
    assert "one step is a point" in text and "no states were kept" in text and "no step was traced" in text
    assert "correct rollouts" in text


def test_broken_files_are_noted_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text("{")
    (folder / "states" / "step_000011.safetensors").write_bytes(b"no")
    (folder / "eval").mkdir()
    (folder / "eval" / "step_000000.json").write_text("[]")
    text = missing(folder)
    assert "config.json cannot be read" in text and "step_000011.safetensors does not hold the states" in text
    assert "1 of its evaluations cannot be read" in text and "Contrastive loss" in text


def test_a_damaged_evaluation_alone_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", evaluated=True)
    file = folder / "eval" / "step_000012.json"
    whole = file.read_text()
    for damage in ({"samples": "x"}, {"samples": 1, "correct": 5}, {"correct": None}, {"votes": 3}):
        facts = json.loads(whole)
        facts["problems"]["easy/0"] |= damage
        file.write_text(json.dumps(facts))
        run = read_run(folder)
        assert "1 of its evaluations cannot be read, or are of an older version." in run.missing, damage
        assert {each.step for each in run.evaluations} == {each.step for each in run.accuracies} == {0}
    for step in ("x", None):
        file.write_text(json.dumps(json.loads(whole) | {"step": step}))
        assert [each.step for each in read_run(folder).evaluations] == [0]
    text = missing(folder)
    assert "clipo-0: 1 of its evaluations cannot be read" in text
    assert "of held-out problems after 0 steps" in text
    assert text.count(", after 0 steps</span>") == 2, "of each set, in the table of runs"


def test_the_folder_of_a_model_is_not_that_of_a_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}')
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert "has neither metrics.jsonl nor config.json of a run" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text('{"hidden_size": 64}')
    assert "run: config.json is not the configuration of a run" in missing(run)


def test_impossible_inputs_and_outputs_are_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "none is not a folder. Give the folder of a run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert "has neither metrics.jsonl nor config.json of a run" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "-o", str(tmp_path)]) == 2
    assert "is a folder. Give the file to write" in capsys.readouterr().err
    assert cli.main(["report", str(run), "-o", str(run / "config.json" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(PageError):
        read_run(run / "metrics.jsonl")


def test_a_report_needs_no_torch(compared):
    script = (
        "import sys\nfrom clipo_megatron.cli import main as cli\n"
        "assert cli.main(['report', *sys.argv[2:], '-o', sys.argv[1]]) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    runs, page, _ = compared
    command = [sys.executable, "-c", script, str(page.with_name("again.html")), *map(str, runs[:1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------- the page


PROBE = """
const root = document.documentElement, out = {ready: root.dataset.ready, overflow: [], tips: 0};
out.wide = root.scrollWidth - root.clientWidth;
for (const part of document.querySelectorAll("details")) part.open = true;
out.wideOpen = root.scrollWidth - root.clientWidth;
for (const each of document.querySelectorAll("main .card, main .tile, main svg, main .response, main .map")) {
  const box = each.getBoundingClientRect();
  if (box.right > root.clientWidth + 1 || box.left < -1) out.overflow.push(each.className.baseVal ?? each.className);
}
for (const text of document.querySelectorAll("main svg text")) {
  const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
  if (box.width && (box.left < frame.left - 2 || box.right > frame.right + 2)) out.overflow.push(text.textContent);
}
const tip = document.querySelector(".tip");
for (const drawing of document.querySelectorAll("svg[data-chart]")) {
  const box = drawing.getBoundingClientRect();
  drawing.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
  if (tip.style.display === "block" && tip.textContent.includes("step")) out.tips += 1;
  drawing.dispatchEvent(new MouseEvent("mouseleave"));
}
out.drawings = document.querySelectorAll("svg[data-chart]").length;
const point = document.querySelector(".map .pt");
if (point) {
  point.dispatchEvent(new MouseEvent("mouseover", {bubbles: true, clientX: 9, clientY: 9}));
  out.picked = document.querySelectorAll(".map.picked .pt.same").length;
}
const back = () => getComputedStyle(document.body).backgroundColor;
out.before = back(); document.getElementById("theme").click(); out.after = back();
document.getElementById("smooth").click();
out.smooth = getComputedStyle(document.querySelector(".line.smooth")).display;
const key = document.querySelector(".key"); key.click();
const mine = [...document.querySelectorAll('g[data-slot="0"]')];
out.hidden = mine.length > 0 && mine.every((part) => getComputedStyle(part).display === "none");
key.click();
for (const link of document.querySelectorAll("nav a"))
  if (!document.querySelector(link.hash)) out.overflow.push(link.hash);
return out;
"""


@needs_browser
@pytest.mark.parametrize("width", [1440, 600])
def test_a_browser_shows_it_without_errors(width, compared):
    failures, found = browser.look(compared[1], PROBE, width=width)
    assert failures == []
    assert found["ready"] == "true" and found["overflow"] == []
    assert found["wide"] <= 0 and found["wideOpen"] <= 0, "it scrolls sideways"
    assert found["tips"] == found["drawings"] > 12
    assert found["picked"] == 4, "the rollouts of the prompt stand out"
    assert found["before"] != found["after"] and found["smooth"] == "inline" and found["hidden"] is True


@needs_browser
def test_the_browser_check_finds_errors(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><head></head><body><script>nothing.here()</script></body></html>")
    failures, found = browser.look(page, "return 7")
    assert found == 7 and any("nothing is not defined" in failure for failure in failures)
    page.write_text("<html><head></head><body><script>console.error('so it is')</script></body></html>")
    assert any("so it is" in failure for failure in browser.look(page, "")[0])


def test_the_page_needs_no_network(compared):
    text = compared[1].read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_texts_of_rollouts_are_escaped(compared):
    text = compared[1].read_text()
    assert safe(NASTY) in text and "<img src=x" not in text and "throw Error" not in text.replace(safe(NASTY), "")
    assert safe("a\N{NO-BREAK SPACE}b\u202ec\ud800") == "a\N{NO-BREAK SPACE}b\\u202ec\\ud800"
    assert safe("\x1b[31m") == "\\x1b[31m" and safe('<a b="c">') == "&lt;a b=&quot;c&quot;&gt;"
