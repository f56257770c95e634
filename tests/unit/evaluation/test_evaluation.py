"""Evaluations: figures, result files, and whether a gain is more than chance."""

import json
from dataclasses import replace

import pytest

from clipo_megatron.config.load import load
from clipo_megatron.evaluation.comparing import compare, comparisons, refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import majority_at, mean_and_error, pass_at_k
from clipo_megatron.evaluation.evaluate import evaluation_params
from clipo_megatron.evaluation.results import (
    Evaluation,
    EvaluationSettings,
    ProblemResult,
    digest_of,
    free_name,
    ks_of,
    read_evaluations,
    read_result,
    remove_evaluations,
    write_evaluation,
    write_result,
)
from clipo_megatron.evaluation.tables import comparison_table, lines_of, progress_table, result_table, summary_line
from clipo_megatron.telemetry.reporter import Reporter


def evaluation(correct, step=0, samples=4):
    """Of problems with these shares of correct samples."""
    problems = {name: ProblemResult(samples, round(share * samples), digest="same") for name, share in correct.items()}
    return Evaluation(step, problems, EvaluationSettings(samples=samples, ks=(1, samples)))


# ---------------------------------------------------------------- figures


MIXED = {
    "a/0": ProblemResult(4, 3, ungraded=0, truncated=1, tokens=40, votes=(1,)),
    "a/1": ProblemResult(4, 1, ungraded=1, truncated=0, tokens=20, votes=(2,)),
    "x/b/0": ProblemResult(4, 0, ungraded=2, truncated=4, tokens=400, votes=(1, 1)),
}


def test_figures_of_sets_are_those_of_their_problems():
    result = Evaluation(7, MIXED, EvaluationSettings(samples=4, temperature=0.6, ks=(1, 2, 4)))
    assert result.sources == ["a", "x/b"]
    assert result.correct == {"a/0": 0.75, "a/1": 0.25, "x/b/0": 0.0}
    assert result.by_source() == {"a": 0.5, "x/b": 0.0}
    whole, first = result.figures(), result.figures("a")
    assert (whole.problems, whole.samples, whole.length) == (3, 4, 460 / 12)
    assert (whole.truncated, whole.ungraded) == (5 / 12, 3 / 12)
    assert (whole.accuracy, whole.error) == mean_and_error([0.75, 0.25, 0.0])
    assert (first.length, first.truncated, first.ungraded) == (60 / 8, 1 / 8, 1 / 8)
    for k in (1, 2, 4):
        assert first.pass_at[k] == pytest.approx((pass_at_k(4, 3, k) + pass_at_k(4, 1, k)) / 2)
        expected = (majority_at(4, 3, (1,), (k,))[k] + majority_at(4, 1, (2,), (k,))[k]) / 2
        assert first.majority_at[k] == pytest.approx(expected)
    assert first.majority_at[4] == 0.5  # three agree on the right answer of one, two on a wrong one of the other
    assert result.mean_of_sets == (0.25, None)  # a set of one problem has no error
    assert Evaluation(0, {}).accuracy == 0.0
    assert result.of(["x/b"]).by_source() == {"x/b": 0.0}


def test_every_set_weighs_the_same_in_the_mean_of_sets():
    result = evaluation({**{f"a/{n}": float(n % 2) for n in range(100)}, "b/0": 1.0, "b/1": 1.0})
    mean, error = result.mean_of_sets
    assert mean == 0.75 and result.accuracy == pytest.approx(52 / 102)
    assert error == pytest.approx(result.figures("a").error / 2)


def test_the_table_has_a_row_for_each_set():
    result = Evaluation(7, MIXED, EvaluationSettings(samples=4, temperature=0.6, ks=(1, 2, 4)))
    headings, rows = result_table(result)
    assert headings[:4] == ["set", "problems", "pass@1", "± SE"] and "maj@4" in headings and "pass@1" in headings
    assert [row[0] for row in rows] == ["a", "x/b", "all problems", "mean of sets"]
    first = dict(zip(headings, rows[0], strict=True))
    assert (first["pass@1"], first["± SE"], first["pass@2"], first["maj@4"]) == ("50.0%", "25.0", "75.0%", "50.0%")
    assert (first["tokens"], first["cut"], first["ungraded"]) == ("8", "12.5%", "12.5%")
    lines = lines_of((headings, rows))
    assert len(lines) == 5 and max(map(len, lines)) <= 100
    said = summary_line(result)
    assert (
        "after 7 steps: 33.3% ± 22.0 (SE) of 3 problems (a 50.0%, x/b 0.0%) (42% cut" in said
        and "25.0% could not" in said
    )


def test_figures_without_a_spread_have_no_error():
    for shares in ([0.0] * 6, [1.0] * 6, [0.5]):
        result = evaluation({f"a/{n}": share for n, share in enumerate(shares)})
        headings, rows = result_table(result)
        assert dict(zip(headings, rows[0], strict=True))["± SE"] == "-" and "±" not in summary_line(result)


def test_ks():
    assert ks_of([], 16) == (1, 2, 4, 8, 16)
    assert ks_of([8, 1, 8], 16) == (1, 8)


# ---------------------------------------------------------------- comparisons


def test_comparison_is_paired():
    before = evaluation({"a/0": 0.0, "a/1": 1.0, "a/2": 0.0, "b/0": 0.5, "b/1": 0.25, "gone/0": 1.0})
    after = evaluation({"a/0": 1.0, "a/1": 0.0, "a/2": 1.0, "b/0": 0.75, "b/1": 0.5, "new/0": 1.0})
    paired = compare(before, after)
    # half of the samples right is not solved; problems that one side lacks take no part, in the means neither
    assert (paired.problems, paired.gained, paired.lost) == (5, 3, 1)
    assert paired.before == pytest.approx(1.75 / 5)
    assert paired.after == pytest.approx(3.25 / 5)
    assert paired.low < paired.difference < paired.high
    assert paired.p_value is None  # McNemar's test is about one outcome a problem
    only = compare(before, after, source="b")
    assert (only.problems, only.gained, only.lost) == (2, 1, 0)
    assert paired.has_interval and not only.has_interval  # both problems gained the same
    nothing = compare(before, evaluation({}))
    assert nothing.problems == 0 and not nothing.has_interval


def test_greedy_answers_get_the_exact_test():
    names = [f"a/{n}" for n in range(20)]
    before = evaluation({name: float(n < 8) for n, name in enumerate(names)}, samples=1)
    after = evaluation({name: float(n not in (3, 12)) for n, name in enumerate(names)}, samples=1)
    paired = compare(before, after)
    assert (paired.gained, paired.lost) == (11, 1)
    assert paired.p_value == pytest.approx(2 * 13 / 2**12)


def test_the_pairing_makes_the_interval_narrow():
    """Hard and easy problems differ far more than the two models do."""
    before = evaluation({f"a/{n}": (n % 11) / 16 for n in range(500)}, samples=16)
    after = evaluation({f"a/{n}": (n % 11 + (n % 2)) / 16 for n in range(500)}, samples=16)
    paired = compare(before, after)
    assert paired.difference == pytest.approx(0.03125)
    assert paired.high - paired.low < 0.006 < 2 * 1.96 * before.figures().error


def test_the_comparison_table_has_a_row_for_each_set():
    before = evaluation({"x/a/0": 0.0, "x/a/1": 0.0, "b/0": 1.0, "b/1": 1.0}, samples=1)
    after = evaluation({"x/a/0": 1.0, "x/a/1": 0.0, "b/0": 1.0, "b/1": 1.0}, samples=1)
    headings, rows = progress_table(before, after)
    assert [row[0] for row in rows] == ["b", "x/a", "all problems"]
    assert dict(zip(headings, rows[1], strict=True)) == {
        "set": "x/a",
        "problems": "2",
        "before": "0.0%",
        "after": "50.0%",
        "points": "+50.0",
        "gained": "1",
        "lost": "0",
        "p": "1",
    }
    assert len(progress_table(evaluation({"b/0": 0.0}), evaluation({"b/0": 0.0}))[1]) == 1
    headings, rows = comparison_table(found := comparisons(before, after))
    assert [row[0] for row in rows] == ["b", "x/a", "all problems", "mean of sets"]
    assert dict(zip(headings, rows[1], strict=True))["95%"] == "+0.0 .. +100.0"
    assert dict(zip(headings, rows[0], strict=True))["95%"] == "-", "equal differences tell of no spread"
    *_, everything, mean = found
    assert everything.difference == mean.difference == 0.25
    assert everything.low == mean.low == 0.0 and everything.high == 0.75 and mean.high == 0.5


def test_sets_with_other_problems_are_refused():
    mine = evaluation({"a/0": 1.0, "a/1": 0.0, "b/0": 1.0})
    refuse_other_problems(mine, evaluation({"a/0": 0.0, "a/1": 0.0, "c/0": 1.0}), ("A", "B"))
    with pytest.raises(EvaluationError, match=r"a has 2 problems in A and 3 in B; 1 of them .*such as a/2.*--set"):
        refuse_other_problems(mine, evaluation({"a/0": 1.0, "a/1": 1.0, "a/2": 1.0}), ("A", "B"))
    with pytest.raises(EvaluationError, match=r"A has the sets a, b and B has c: there is nothing to pair"):
        refuse_other_problems(mine, evaluation({"c/0": 1.0}), ("A", "B"))
    other = Evaluation(0, {name: replace(each, digest="other") for name, each in mine.of(["b"]).problems.items()})
    with pytest.raises(EvaluationError, match=r"1 of 1 problems of the set b have another question.*such as b/0"):
        refuse_other_problems(mine, other, ("A", "B"))
    turn = {"role": "user", "content": "1 + 1?"}
    assert digest_of([turn], "2") == digest_of([dict(turn)], "2") != digest_of([turn], "3")
    assert digest_of([turn], "2") != digest_of([{**turn, "content": "1 + 2?"}], "2")


def closing_words(tmp_path, monkeypatch, *evaluations):
    """What a run with these evaluations says at its end: its lines, and the titles of its tables."""
    (tmp_path / "run.yaml").write_text("model: {path: x}\ndata: {train: [{path: x.jsonl}]}\n")
    reporter = Reporter(load(tmp_path / "run.yaml"), is_main=True)
    lines, tables = [], []
    monkeypatch.setattr(reporter.progress, "say", lines.append)
    monkeypatch.setattr(reporter.progress, "table", lambda title, headings, rows: tables.append(title))
    reporter.evaluations = list(evaluations)
    reporter.close(3)
    return " ".join(lines), tables


def test_training_compares_only_equal_problems(tmp_path, monkeypatch):
    before, after = (evaluation({"a/0": 0.0, "a/1": 1.0}, step, samples=1) for step in (0, 3))
    _, tables = closing_words(tmp_path, monkeypatch, before, after)
    assert tables == ["Held-out problems after 0 and 3 steps, paired (p: exact McNemar test)"]
    several = [evaluation({"a/0": 0.0, "a/1": 1.0}, step, samples=4) for step in (0, 3)]
    assert closing_words(tmp_path, monkeypatch, *several)[1] == ["Held-out problems after 0 and 3 steps, paired"]
    other = replace(after, problems={name: replace(each, digest="x") for name, each in after.problems.items()})
    said, tables = closing_words(tmp_path, monkeypatch, before, other)
    assert tables == [] and "2 of 2 problems of the set a have another question" in said


# ---------------------------------------------------------------- files


def test_results_are_written_whole_and_later_ones_removed(tmp_path):
    results = [evaluation({"a/0": 1.0, "a/1": 0.5}, step) for step in (0, 10, 999_999, 1_000_000)]
    for result in results:
        write_evaluation(tmp_path, result)
    facts = json.loads((tmp_path / "step_000010.json").read_text())
    assert facts["accuracy"] == facts["all"]["pass@1"] == 0.75
    assert facts["by_source"] == {"a": 0.75}
    assert facts["sets"]["a"]["pass@k"] == {"1": 0.75, "4": 1.0}
    (tmp_path / "step_000020.json.tmp").write_text('{"step":')  # the writer was killed
    (tmp_path / "step_000030.json").write_text('{"step": 30, "correct": {}}')  # an older version's
    assert read_evaluations(tmp_path) == results
    remove_evaluations(tmp_path, after=1_000_000)
    assert read_evaluations(tmp_path) == results
    remove_evaluations(tmp_path, after=10)
    assert read_evaluations(tmp_path) == results[:2]
    assert not (tmp_path / "step_999999.json").exists() and not (tmp_path / "step_000030.json").exists()
    assert read_evaluations(tmp_path / "none") == []


def test_a_result_is_read_as_it_was_written(tmp_path):
    settings = EvaluationSettings(4, 0.6, 0.95, 20, 512, 3, (1, 4))
    result = Evaluation(7, MIXED, settings, model="models/m", checkpoint="runs/x/checkpoints/step_000007")
    write_result(tmp_path / "deep" / "result.json", result)
    assert read_result(tmp_path / "deep" / "result.json") == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "no result of an evaluation"),
        ('{"name": "run"}', "no result of an evaluation"),
        ('{"schema": 9}', "schema 9, and this version reads 1"),
        ('{"schema": 1, "settings": {"ks": [1]}}', "is damaged"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_result(tmp_path / "x.json")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_result(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("problem samples", "x", "samples = 'x'"),
        ("problem samples", 0, "samples = 0"),
        ("problem correct", 5, "5 correct.* of 4 samples"),
        ("problem correct", True, "correct = True"),
        ("problem votes", [3], r"votes \(3,\) of 4 samples"),
        ("problem votes", [1.5], "votes"),
        ("problem tokens", -1, "tokens = -1"),
        ("settings temperature", None, "temperature = None"),
        ("settings temperature", float("nan"), "temperature = nan"),
        ("settings ks", [0], "ks"),
        ("settings samples", 2.5, "samples = 2.5"),
        ("step", "x", "step is 'x'"),
    ],
)
def test_impossible_values_count_as_damage(tmp_path, place, value, message):
    write_result(file := tmp_path / "x.json", Evaluation(7, MIXED, EvaluationSettings(samples=4, ks=(1, 4))))
    facts = json.loads(file.read_text())
    *room, name = place.split()
    {"problem": facts["problems"]["a/0"], "settings": facts["settings"]}.get("".join(room), facts)[name] = value
    file.write_text(json.dumps(facts))
    with pytest.raises(EvaluationError, match=f"x.json is damaged .*{message}"):
        read_result(file)


def test_no_other_result_is_overwritten(tmp_path):
    first = evaluation({"a/0": 1.0, "a/1": 0.5}, step=3)
    write_result(file := free_name(tmp_path, first), first)
    assert file == tmp_path / "step_000003.json"
    again = evaluation({"a/0": 0.0, "a/1": 0.5}, step=3)  # other answers to the same
    assert free_name(tmp_path, again) == file
    sampled = replace(first, settings=replace(first.settings, temperature=1.0))
    for result, number in ((sampled, 2), (evaluation({"b/0": 1.0}, step=3), 3)):
        write_result(free_name(tmp_path, result), result)
        assert read_result(tmp_path / f"step_000003-{number}.json") == result
    assert free_name(tmp_path, sampled) == tmp_path / "step_000003-2.json"
    file.write_text("no JSON")
    assert free_name(tmp_path, first) == tmp_path / "step_000003-4.json"


# ---------------------------------------------------------------- asking


def test_how_evaluation_samples():
    from clipo_megatron.config.schema import EvalConfig, RolloutConfig

    settings = EvalConfig(samples=16, temperature=0.6, top_p=0.95, top_k=20)
    params = evaluation_params(settings, RolloutConfig(max_new_tokens=77), (1,), seed=3)
    assert (params.samples, params.temperature, params.top_p, params.top_k) == (16, 0.6, 0.95, 20)
    assert (params.max_new_tokens, params.seed, params.step, params.exact_logprobs) == (77, 3, -1, False)
