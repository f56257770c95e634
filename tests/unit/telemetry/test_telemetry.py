"""What a run writes and prints: metrics.jsonl, rollouts.jsonl, one line per step and the closing table."""

import builtins
import io
import json
import math
import re

import pytest
from rich.console import Console

from clipo_megatron.config.schema import ReportConfig
from clipo_megatron.evaluation.results import Evaluation, ProblemResult
from clipo_megatron.evaluation.tables import progress_table
from clipo_megatron.flow import StepReport
from clipo_megatron.telemetry.alarms import AlarmError, NonFiniteError, alarms, stop_on, stop_on_skips
from clipo_megatron.telemetry.console import COLUMNS, Progress, Stopwatch, duration
from clipo_megatron.telemetry.sinks import JsonLines, MissingPackageError, TensorBoard, keep_before, read_lines


def written(path, steps, from_step=0):
    sink = JsonLines(path, from_step=from_step)
    for step in steps:
        sink.write(StepReport(step, {"reward/mean": step / 3}))
    sink.close()
    sink.close()


# ---------------------------------------------------------------- JSON lines


def test_a_resumed_run_drops_lines_after_its_checkpoint(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    written(path, range(5))
    first = path.read_bytes().splitlines()
    with path.open("ab") as file:
        file.write(b'{"step": 5, "rew')  # killed while writing
    written(path, [3, 4], from_step=3)
    lines = path.read_bytes().splitlines()
    assert lines == first
    assert path.read_bytes().endswith(b"\n")
    assert [path.name for path in path.parent.iterdir()] == ["metrics.jsonl"]


def test_kept_lines_are_unchanged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = '{"step":0,  "b": 1e-3, "a": "\u2028 caf\u00e9"}'
    path.write_text(f'{odd}\n12\n[]\nnull\n{{"step": "x"}}\n{{"no": 1}}\n\n{{"step": 1}}\n{{"step": 2}}\n', "utf-8")
    assert [line["step"] for line in read_lines(path)] == [0, 1, 2]
    keep_before(path, 2)
    assert path.read_text("utf-8") == f'{odd}\n{{"step": 1}}\n'
    assert read_lines(tmp_path / "none.jsonl") == []


def test_every_line_is_on_its_way_to_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, from_step=0)
    for step in range(3):
        sink.write(StepReport(step, {"x": 1.0}))
        assert [line["step"] for line in read_lines(path)] == list(range(step + 1))
    sink.close()


def test_lines_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"policy/grad_norm": math.inf, "a": math.nan, "b": -math.inf, "exact": 0.1 + 0.2}
    sink = JsonLines(path, from_step=0)
    sink.write(StepReport(0, values))
    sink.close()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 0, "policy/grad_norm": None, "a": None, "b": None, "exact": 0.1 + 0.2}


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(MissingPackageError, match=r"report.tensorboard is true.*pip install tensorboard"):
        TensorBoard(tmp_path, from_step=0)


# ---------------------------------------------------------------- updates that are skipped


def test_a_run_of_skipped_updates_ends_the_run():
    def report(in_a_row):
        metrics = {"policy/skipped_in_a_row": in_a_row, "policy/loss": math.nan, "policy/grad_norm": 2.5}
        return StepReport(9, metrics)

    stop_on_skips(StepReport(1, {}), 0)
    stop_on_skips(report(5.0), 5)
    with pytest.raises(NonFiniteError) as caught:
        stop_on_skips(report(6.0), 5)
    skipped = "optimizer.max_skipped_updates = 5"
    for part in ("step 9: the last 6 updates", skipped, "policy/loss is nan", "policy/grad_norm 2.5"):
        assert part in str(caught.value)


# ---------------------------------------------------------------- alarms


def test_alarms_name_step_value_limit_and_where_to_look():
    config = ReportConfig(mult_prob_error_alarm=1.05, rollout_kl_alarm=0.02)

    def found(**metrics):
        return alarms(StepReport(7, {f"policy/{name}": value for name, value in metrics.items()}), config)

    assert found() == found(mult_prob_error=1.05, rollout_kl=0.02) == found(rollout_kl=-1.0) == []
    (alarm,) = found(mult_prob_error=1.0501, rollout_kl=0.01)
    assert (alarm.metric, alarm.setting, alarm.limit) == (
        "policy/mult_prob_error",
        "report.mult_prob_error_alarm",
        1.05,
    )
    both = found(mult_prob_error=1.25, rollout_kl=math.nan)
    assert [each.metric for each in both] == ["policy/mult_prob_error", "policy/rollout_kl"]
    old = StepReport(7, {"off_policy/effective_samples": 0.2, "off_policy/age_max": 3.0})
    assert [str(each).partition(" is ")[0] for each in alarms(old, config, ahead=2)] == [
        "step 7: off_policy/effective_samples",
        "step 7: off_policy/age_max",
    ]
    assert alarms(old, ReportConfig(effective_samples_alarm=0.0), ahead=3) == []
    assert "rollout.ahead = 2" in str(alarms(old, config, ahead=2)[1])
    text = str(both[0])
    for part in ("step 7", "is 1.25", "report.mult_prob_error_alarm = 1.05", "rollout.sync.verify_every=1", "dtype"):
        assert part in text
    stop_on([])
    with pytest.raises(AlarmError, match=r"rollout_kl is nan.*before this step is saved.*resumes from there"):
        stop_on(both)


# ---------------------------------------------------------------- live lines and closing table


def screen(width, *, terminal):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, soft_wrap=True)
    return Progress(20, console=console), lambda: console.file.getvalue().splitlines()


def report(step, **metrics):
    values = {metric: 0.25 for _, metric, _ in COLUMNS}
    return StepReport(step, {**values, "time/step_s": 10.0, **metrics})


@pytest.mark.parametrize("width", [80, 120, 200])
def test_lines_fit_the_terminal(width):
    progress, lines = screen(width, terminal=True)
    for step in range(3):
        progress.step(report(step))
    heading, *rows = lines()
    assert len(rows) == 3
    assert all(len(line) == len(heading) <= width for line in rows)
    assert heading.split()[:5] == ["step", "done", "reward", "accuracy", "clipo"]
    assert heading.endswith("time left")
    assert ("tokens" in heading) == (width > 120)
    assert [row.split()[:2] for row in rows] == [["0", "1/20"], ["1", "2/20"], ["2", "3/20"]]
    assert rows[0].endswith("3m10s")  # 19 steps of 10 s


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_step_counts_its_rollouts_on_a_terminal(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("clipo_megatron.telemetry.console.time.monotonic", lambda: now[0])
    progress, lines = screen(60, terminal=terminal)
    for _ in range(2):  # the second step counts anew
        for done in range(8, 65, 8):
            progress.rollouts(done, 64)
            now[0] += 3.0
    progress.rollouts(8, 64)
    progress.say("news")
    shown = [part for part in lines() if part.strip()]  # also split where the line begins again
    if not terminal:
        assert shown == ["news"]
        return
    # 24 rollouts are in 6 s after the first 8: 2.67 a second
    assert shown[0] == "rollouts 24 of 64, about 15s left"
    assert sum(part.startswith("rollouts 24 of 64, about 15s left") for part in shown) == 2
    assert shown[-1] == "news" and not any("64 of 64" in part for part in shown)
    assert all(len(part) < 60 for part in lines())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_evaluation_says_how_much_time_is_left(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("clipo_megatron.telemetry.console.time.monotonic", lambda: now[0])
    progress, lines = screen(60, terminal=terminal)
    for done in range(1, 101):
        progress.answers(done, 100)
        now[0] += 1.0
    shown = [part.strip() for part in lines() if part.strip()]
    if terminal:
        assert shown[0] == "answers 6 of 100, about 1m34s left" and len(shown) > 80
    else:
        left = {31: "1m09s", 61: "39s", 91: "9s"}
        assert shown == [f"answers {done} of 100, about {left[done]} left" for done in left]


def test_the_console_and_the_metrics_number_steps_alike(tmp_path):
    progress, lines = screen(200, terminal=False)
    sink = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    for step in range(3):
        progress.step(report(step))
        sink.write(report(step))
    sink.close()
    said = [int(line.split()[0]) for line in lines()[1:]]
    assert said == [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]


def test_a_file_gets_all_columns_and_no_colours():
    progress, lines = screen(40, terminal=False)
    for step in range(20):
        progress.step(report(step))
    progress.step(report(20))
    assert len(lines()) == 21 + 2  # a heading before the first and before the 21st
    assert all(heading in lines()[0] for heading, _, _ in COLUMNS)
    assert "\x1b" not in "".join(lines())


def test_a_metric_that_a_step_lacks_is_a_dash():
    progress, lines = screen(120, terminal=False)
    progress.step(StepReport(0, {"time/step_s": 1.0, "reward/mean": math.nan}))
    assert lines()[1].split() == ["0", "1/20", "nan", "-", "-", "-", "1.0", "-", "-", "-", "19s"]


def test_other_ranks_print_nothing():
    console = Console(file=io.StringIO())
    progress = Progress(3, enabled=False, console=console)
    progress.say("x")
    progress.step(report(0))
    progress.table("x", ["a"], [["b"]])
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [80, 120])
def test_the_closing_table_is_not_broken_into_pieces(width, terminal):
    def evaluation(accuracy):
        names = [f"{source}/{n}" for source in ("quickstart-held-out", "b [bold]") for n in range(1000)]
        return Evaluation(0, {name: ProblemResult(1, int(accuracy)) for name in names})

    progress, lines = screen(width, terminal=terminal)
    headings, rows = progress_table(evaluation(0.0), evaluation(1.0))
    progress.table("Held-out problems", headings, rows)
    text = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines()]
    assert terminal or text == lines()
    assert all(len(line) <= width for line in text)
    (heading,) = [line for line in text if "problems" in line and "gained" in line]
    assert all(name in heading for name in headings)
    body = [line for line in text if line.strip().startswith(("quick", "b [", "all"))]
    assert [line.split()[-7:] for line in body] == [row[1:] for row in rows]
    assert "100.0%" in body[0] and "+100.0" in body[0] and "b [bold]" in body[0]  # brackets are text


def test_durations():
    assert [duration(x) for x in (-3, 0.4, 59.4, 59.6, 190, 7500)] == ["0s", "0s", "59s", "1m00s", "3m10s", "2h05m"]


def test_phases_add_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch("update"):
            pass
    with pytest.raises(KeyError), watch("sync"):
        raise KeyError
    assert set(watch.metrics) == {"time/update_s", "time/sync_s"}
    assert 0 <= sum(watch.metrics.values()) <= watch.total()


def test_a_line_cut_short_does_not_stay_in_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a"')
    log = JsonLines(path, from_step=2)
    log.write(StepReport(step=2, metrics={"a": 3.0}))
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
