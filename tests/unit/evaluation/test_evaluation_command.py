"""`clipo eval` and `clipo compare`: which runs and checkpoints a target means, and what is printed and written."""

import json
from dataclasses import asdict, replace

import pytest

from clipo_megatron.cli import main as cli
from clipo_megatron.cli.evaluate import find_target, words_of
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.results import Evaluation, EvaluationSettings, ProblemResult, write_result

# ---------------------------------------------------------------- what a target means


def target_of(*words):
    options, rest = cli.parse(["eval", *map(str, words)]), None
    assert rest is None
    return find_target(options), words_of(options)


@pytest.fixture
def run(tmp_path):
    """A run's output folder as far as targets read it: settings and two checkpoints."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: mine\nmodel: {path: models/x}\ntrain: {output: runs/elsewhere}\noptimizer: {learning_rate: 2.0e-6}\n"
        "data: {train: [{path: t.jsonl}],\n"
        "       eval: [{path: sets/a.jsonl}, {path: sets/b.jsonl}, {generator: gcd, size: 9}]}\n"
    )
    folder = tmp_path / "moved run"
    for step in (1, 2):
        policy = folder / "checkpoints" / f"step_00000{step}" / "policy"
        policy.mkdir(parents=True)
        (policy / "metadata.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(asdict(load(file)), default=str))
    return file, folder


def test_a_configuration_is_used_unchanged(run):
    target, words = target_of(run[0], "train.output=there", "eval.samples=2")
    assert (target.checkpoint, target.config.train.output, target.config.eval.samples) == (None, "there", 2)
    assert words == [str(run[0]), "train.output=there", "eval.samples=2"]


def test_a_run_is_evaluated_as_it_was_configured_and_where_it_is_now(run):
    target, _ = target_of(run[1])
    assert target.config == replace(load(run[0]), train=replace(load(run[0]).train, output=str(run[1])))
    assert target.checkpoint is None
    assert target.config.optimizer.learning_rate == 2e-6


def test_a_checkpoint_means_its_run(run, monkeypatch):
    place = run[1] / "checkpoints" / "step_000001"
    target, _ = target_of(place, "eval.top_p=0.9")
    assert (target.checkpoint, target.config.train.output, target.config.eval.top_p) == (place, str(run[1]), 0.9)
    monkeypatch.chdir(place.parent)
    assert target_of("step_000001")[0].config.train.output == str(run[1])


def test_sets_are_chosen_by_name(run):
    target, words = target_of(run[1], "--set", "gcd", "--set", "a", "--output", "x.json")
    assert [source.path or source.generator for source in target.config.data.eval] == ["gcd", "sets/a.jsonl"]
    assert words == [str(run[1]), "--set", "gcd", "--set", "a", "--output", "x.json"]
    with pytest.raises(EvaluationError, match=r"no set 'c'; it has a, b, gcd"):
        target_of(run[1], "--set", "c")


def test_a_wrong_target_is_refused(run, tmp_path):
    with pytest.raises(EvaluationError, match=r"data.eval is empty"):
        target_of(run[1], "data.eval=[]")
    with pytest.raises(ConfigError, match=r"No configuration file"):
        target_of(tmp_path / "none.yaml")
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(EvaluationError, match=r"model is no run to evaluate: there is no .*config.json"):
        target_of(model)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(EvaluationError, match=r"a model's configuration, not a run's. Give a .*model.path=.*model"):
        target_of(model)


def test_a_missing_checkpoint_is_reported_with_the_existing_ones(run, tmp_path):
    folder = run[1] / "checkpoints"
    with pytest.raises(EvaluationError, match=r"no checkpoint .*step_000099: .* has step_000001, step_000002"):
        target_of(folder / "step_000099")
    with pytest.raises(EvaluationError, match=r"holds the checkpoints step_000001, step_000002. Give .*moved run for"):
        target_of(folder)
    with pytest.raises(EvaluationError, match=r"there is no .*nowhere. Give a YAML file"):
        target_of(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"there is no checkpoint .*: .*checkpoints has no checkpoint"):
        target_of(tmp_path / "nowhere" / "checkpoints" / "step_000001")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_generated(run, tmp_path):
    with pytest.raises(EvaluationError, match=r"--output .* is a folder. Name a file"):
        target_of(run[1], "--output", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=r"--output .*x.json cannot be written"):
        target_of(run[1], "--output", tmp_path / "file" / "x.json")
    target_of(run[1], "--output", tmp_path / "new" / "x.json")


# ---------------------------------------------------------------- comparing


def result(folder, name, correct, *, samples=1, digest="same", **settings):
    problems = {each: ProblemResult(samples, count, digest=digest) for each, count in correct.items()}
    how = EvaluationSettings(samples=samples, ks=(1,), **settings)
    write_result(file := folder / name, Evaluation(3, problems, how, "models/x"))
    return str(file)


def test_compare_prints_a_table_and_writes_its_figures(tmp_path, capsys):
    first = result(tmp_path, "a.json", {**{f"x/{n}": int(n < 8) for n in range(20)}, "y/0": 1, "only/0": 1})
    second = result(tmp_path, "b.json", {**{f"x/{n}": int(n not in (3, 12)) for n in range(20)}, "y/0": 1})
    assert cli.main(["compare", first, second, "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    assert "only is in A alone, and is left out" in said and "a.json: models/x, 3 steps; greedy" in said
    row = next(line for line in said.splitlines() if line.startswith("x "))
    assert row.split()[:5] == ["x", "20", "40.0%", "90.0%", "+50.0"]
    assert row.split()[-3:] == ["11", "1", "0.0063"]
    assert "all problems" in said and "mean of sets" in said
    found = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert [each["source"] for each in found] == ["x", "y", "all problems", "mean of sets"]
    assert found[0]["p_value"] == pytest.approx(2 * 13 / 2**12)
    assert found[0]["low"] < found[0]["difference"] == 0.5 < found[0]["high"]
    assert found[1]["low"] is found[1]["high"] is None, "a set of one problem"
    again = ["compare", first, second, "--json", str(tmp_path / "d.json"), "--seed", "5", "--set", "x"]
    assert cli.main(again) == 0
    other = json.loads((tmp_path / "d.json").read_text())["comparisons"]
    assert len(other) == 1 and other[0]["before"] == 0.4
    assert other[0] == {**found[0], "low": other[0]["low"], "high": other[0]["high"]}


def test_compare_reports_other_settings_and_problems(tmp_path, capsys):
    first = result(tmp_path, "a.json", {"x/0": 2, "x/1": 0}, samples=4, temperature=0.6)
    second = result(tmp_path, "b.json", {"x/0": 3, "x/1": 0}, samples=4, temperature=1.0)
    assert cli.main(["compare", first, second]) == 0
    assert "They sampled differently" in (said := capsys.readouterr().out)
    assert said.splitlines()[-1].split()[-1] == "-", "McNemar's test is for one sample per problem"
    other = result(tmp_path, "c.json", {"x/0": 3, "x/1": 0}, samples=4, digest="other")
    assert cli.main(["compare", first, other]) == 2
    assert "2 of 2 problems of the set x have another question or ground truth" in capsys.readouterr().err
    assert cli.main(["compare", first, second, "--set", "z"]) == 2
    assert "no set 'z'" in capsys.readouterr().err
    assert cli.main(["compare", first, str(tmp_path / "none.json")]) == 2
    for option, value in (("--resamples", "3"), ("--seed", "-3")):
        with pytest.raises(SystemExit):
            cli.main(["compare", first, second, option, value])
        assert f"argument {option}: '{value}' is no whole number" in capsys.readouterr().err


def test_another_seed_or_other_ks_are_not_other_settings(tmp_path, capsys):
    first = result(tmp_path, "a.json", {"x/0": 1, "x/1": 0}, seed=0)
    second = result(tmp_path, "b.json", {"x/0": 1, "x/1": 1}, seed=7)
    assert cli.main(["compare", first, second]) == 0
    assert "differently" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown and "--set" in shown and f"clipo {command} runs/" in shown


# ---------------------------------------------------------------- the real thing
