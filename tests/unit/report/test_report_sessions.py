"""The report says which steps of a run were trained with which settings."""

from report_runs import write_run

from clipo_megatron.config.differences import plain
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.report.grouping import group_runs
from clipo_megatron.report.overview import overview
from clipo_megatron.report.reading import read_run
from clipo_megatron.report.sessions import sessions_of
from clipo_megatron.telemetry.segments import add_segment


def session(folder, step, rate, questions="a"):
    config = RunConfig()
    config.optimizer.learning_rate = rate
    facts = {"train": {"count": 4, "questions": questions, "problems": questions, "tokens": questions}}
    add_segment(folder, step, plain(config), facts)


def test_steps_are_credited_to_the_settings_that_made_them(tmp_path):
    run = write_run(tmp_path / "run")
    for step, rate, questions in ((0, 1e-6, "a"), (3, 1e-6, "a"), (5, 2e-6, "a"), (8, 2e-6, "b")):
        session(run, step, rate, questions)
    first, second, third = sessions_of(read_run(run))
    assert first == ("0 to 4", ["as at the beginning"]), "a session that changes nothing is no stretch of its own"
    assert second == ("5 to 7", ["optimizer.learning_rate: 1e-06 \N{RIGHTWARDS ARROW} 2e-06"])
    assert third[0] == "8 to the last" and "the training problems are not those of before" in third[1][0]
    page = overview(group_runs([read_run(run)])).body
    assert "Changed on the way" in page and "optimizer.learning_rate: 1e-06" in page and "metrics.jsonl" in page


def test_a_run_that_changed_nothing_shows_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    assert sessions_of(read_run(run)) == [] and "Changed on the way" not in overview(group_runs([read_run(run)])).body
    for step in (0, 3):
        session(run, step, 1e-6)
    assert sessions_of(read_run(run)) == [] and "Changed on the way" not in overview(group_runs([read_run(run)])).body
