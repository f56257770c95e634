"""Loading: what a user writes becomes a typed configuration, or one message that says how to correct it."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
from omegaconf import OmegaConf

from clipo_megatron.config import reference
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load, nearest_keys
from clipo_megatron.config.renamed import RENAMED
from clipo_megatron.config.schema import DType, GraderMode, Level, RunConfig, SourceConfig

MODEL = "model: {path: some/model}\n"


@pytest.fixture
def write(tmp_path):
    def written(text):
        file = tmp_path / "run.yaml"
        file.write_text(textwrap.dedent(text))
        return file

    return written


def refusal(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(file, list(overrides))
    return str(caught.value)


def test_file_and_overrides_become_typed_values(write):
    file = write("""
        name: first
        model: {path: some/model, dtype: fp32}
        data:
          train:
            - {path: a.parquet}
            - {generator: basic_arithmetic, size: 3, options: {min_terms: 2}}
        optimizer: {learning_rate: 1e-5}
    """)
    config = load(
        file,
        [
            "layout.tp=2",
            "data.train[1].size=9",
            "data.train.0.name=x",
            "data.train[1].options.max_terms=4",
            "reward.by_source={conrl/math: reference}",
            "clipo={level: cross, dim: 8}",
            "model.system_prompt=''",
        ],
    )
    assert isinstance(config, RunConfig)
    assert config.model.dtype is DType.fp32 and config.model.system_prompt == ""
    assert config.optimizer.learning_rate == 1e-5
    assert config.layout.tp == 2 and config.layout.pp == 1
    assert config.data.train == [
        SourceConfig(path="a.parquet", name="x"),
        SourceConfig(generator="basic_arithmetic", size=9, options={"min_terms": 2, "max_terms": 4}),
    ]
    assert config.reward.by_source == {"conrl/math": GraderMode.reference}
    assert config.clipo.level is Level.cross and config.clipo.dim == 8 and config.clipo.weight == 0.2
    assert config.train.output == "runs/first"


def test_lists_replace_and_later_overrides_win(write):
    file = write(MODEL + "data: {train: [{path: a.jsonl}, {path: b.jsonl}]}\n")
    config = load(file, ["data.train=[{path: c.jsonl}]", "layout.tp=2", "layout.tp=3"])
    assert [source.path for source in config.data.train] == ["c.jsonl"]
    assert config.layout.tp == 3


def test_references_to_other_settings(write):
    config = load(write(MODEL), ["train.seed=7", "name=run-${train.seed}"])
    assert config.name == "run-7" and config.train.output == "runs/run-7"
    assert "'nme' not found" in refusal(write(MODEL), "name=${nme}")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.temprature", ["rollout.temperature"]),
        ("model.tp", ["serve.tp", "layout.tp"]),
        ("rolout.temperature", ["rollout.temperature"]),
        ("optimizer.lr", ["optimizer.learning_rate"]),
        ("layout.tensor_model_parallel_size", ["layout.tp"]),
        ("data.train[3].pth", ["data.train[].path"]),
        ("clippo", ["clipo"]),
        ("model.temprature", ["rollout.temperature", "clipo.temperature", "eval.temperature"]),
        ("xyzzy", []),
    ],
)
def test_suggestions_for_unknown_keys(key, nearest):
    assert nearest_keys(key) == nearest


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.temprature=0.7", ["rollout.temprature = 0.7", "no such setting", "mean rollout.temperature?"]),
        ("layout.tp=two", ["layout.tp = two", "a whole number was expected", "default is 1"]),
        ("layout.tp=2.0", ["layout.tp = 2.0", "Write 2"]),
        ("layout.tp=null", ["layout.tp = null", "a whole number was expected"]),
        ("rollout.temperature=[1]", ["a number was expected"]),
        ("clipo.enabled=3", ["clipo.enabled = 3", "true or false was expected"]),
        ("clipo.loss=inonce", ["one of infonce, supcon_out, supcon_in, soft_nn", "Did you mean infonce?"]),
        ("optimizer.schedule=cosin", ["one of constant, linear, cosine", "Did you mean cosine?"]),
        ("reward.by_source.x=mth", ["reward.by_source.x = mth", "Did you mean math?"]),
        ("name=no", ["name = false", "Put it in quotes"]),
        ("clipo=3", ["clipo = 3", "a section"]),
        ("data.train={path: x}", ["data.train", "a list was expected. Write `data.train: [{path: ...}]`"]),
        ("data.train=[x]", ["data.train[0] = x", "a section"]),
        ("data.train[1].size=3", ["data.train"]),
        ("name.first=3", ["name = {'first': 3}", "text was expected"]),
        ("layout.tp", ["'layout.tp'", "key=value"]),
        ("layout.tp=[", ["layout.tp", "not valid YAML"]),
        ("name=${oops", ["name", "${oops"]),
        ("model.path=???", ["model.path", "must be given"]),
    ],
)
def test_wrong_override_names_value_reason_and_remedy(write, override, parts):
    message = refusal(write(MODEL), override)
    for part in parts:
        assert part in message, message
    assert "omegaconf" not in message.lower() and "\n    full_key" not in message


def test_all_problems_come_at_once(write):
    file = write("rollout: {temprature: 1}\nlayout: {tp: x}\nnonsense: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(file, ["clipo.loss=y"])
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"rollout.temprature", "layout.tp", "nonsense", "clipo.loss", "model.path"}
    assert "5 configuration problems" in str(caught.value) and "  5. " in str(caught.value)


def test_a_mandatory_setting_must_be_given(write):
    message = refusal(write("name: x\n"))
    assert "model.path: it must be given" in message and "model.path=" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("layout: {tp: 2}\n bad: [", "line 2"),
        ("name: a\nname: b", "duplicate"),
        ("- 1\n", "holds a list"),
        ("3\n", "bare value"),
    ],
)
def test_the_message_of_a_broken_file_says_where(write, text, part):
    file = write(text)
    message = refusal(file)
    assert part in message and str(file) in message


def test_absent_file(tmp_path):
    assert "No configuration file" in refusal(tmp_path / "none.yaml")
    assert "folder" in refusal(tmp_path)


def test_every_setting_of_the_schema_is_described():
    found = reference.settings()
    assert {"model.path", "algorithm.kl.kind", "data.train[].suffix", "name"} <= {setting.key for setting in found}
    by_key = {setting.key: setting for setting in found}
    assert by_key["clipo.weight"].comment.startswith("lambda") and by_key["clipo.weight"].default == 0.2
    assert by_key["algorithm.kl.kind"].type == "one of k1, k2, k3"
    assert by_key["layout.dp"].type == "a whole number, at least 1, or null"
    assert by_key["rollout.top_p"].type == "a number, above 0 and at most 1"
    assert all(setting.comment for setting in found)


def test_the_comment_of_a_setting_stands_behind_it_or_above_it():
    by_key = {setting.key: setting for setting in reference.settings()}
    assert by_key["layout.tp"].comment == "tensor-parallel ranks; divides the attention heads"
    assert by_key["layout.dp"].comment.startswith("data-parallel replicas; null: ranks / (tp * cp * pp)")
    assert by_key["rollout.unfinished"].choices["drop"] == "aborted and forgotten"
    assert by_key["reward.by_source"].choices["choice"] == "the option that the final answer names"


def test_configuration_imports_no_torch(write):
    """Loading works where torch cannot be imported at all."""
    program = """
        import sys
        for name in ("torch", "transformers", "megatron", "reasoning_gym"):
            sys.modules[name] = None  # any import of it raises
        from clipo_megatron.config.load import load
        print(load(sys.argv[1]).model.path)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(write(MODEL))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "some/model", done.stderr


def test_a_list_of_plain_values(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: x\nmodel: {path: m}\nrollout: {endpoints: ['http://a:1', 'http://b:2']}\n")
    assert load(file).rollout.endpoints == ["http://a:1", "http://b:2"]
    assert load(file, ["rollout.endpoints=[http://c:3]"]).rollout.endpoints == ["http://c:3"]
    with pytest.raises(ConfigError, match=r"a list, each entry text was expected. Write \[http://c:3\]"):
        load(file, ["rollout.endpoints=http://c:3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.top_p=0",
            "rollout.top_p = 0.0: it must be above 0 and at most 1: it is a share of the probability mass.",
        ),
        (
            "data.train=[{path: x, size: 0}]",
            "data.train[0].size = 0: it must be at least 1. Correct it, or set it to null.",
        ),
        (
            "optimizer.beta1=1",
            "optimizer.beta1 = 1.0: it must be at least 0 and below 1. Correct it; the default is 0.9.",
        ),
        ("clipo.constant=.nan", "clipo.constant = nan: it must be a finite number. Correct it; the default is 0.0."),
        ("serve.port=70000", "serve.port = 70000: it must be from 0 to 65535"),
        ("optimizer.learning_rate=1e300", "it must be above 0 and at most 1"),
        ("optimizer.weight_decay=1e300", "its size must be at most 1000000000. Correct it"),
        ("clipo.constant=-1e300", "its size must be at most 1000000000"),
        ("rollout.deadline_s=1e15", "it must be at most 2000000 s, which are 23 days"),
        ("rollout.deadline_s=1e-9", "its size must be at least 0.001"),
        ("rollout.temperature=1e-300", "its size must be at least 1e-12"),
        ("optimizer.learning_rate=1e-320", "its size must be at least 1e-12"),
        ("faults.heartbeat_timeout_s=0.01", "it must be at least 1"),
        ("rollout.max_new_tokens=3000000000", "its size must be at most 2147483647"),
        (f"train.seed={'9' * 400}", "it must be from 0 to 4294967295"),
        ("data.train=[{generator: chain_sum, seed: -9999999999}]", "data.train[0].seed = -9999999999: its size must"),
        ("reward.workers=100000", "it must be from 1 to 1024"),
        ("eval.ks=[1,9999999999]", "eval.ks[1] = 9999999999: its size must be at most 2147483647"),
        ("eval.ks=[1,[2]]", "a list, each entry a whole number was expected"),
        ("eval.ks=[1,{a: 2}]", "eval.ks = [1, {'a': 2}]: a list, each entry a whole number was expected"),
    ],
)
def test_numbers_out_of_range_are_refused_with_value_reason_and_remedy(write, override, message):
    assert message in refusal(write(MODEL), override)


OLD_FAULTS = "faults: {frozen_s: 9, stuck_s: '${faults.frozen_s}'}\n"


def test_old_names_of_settings_are_read_and_the_new_ones_told(write, capsys):
    file = write(MODEL + OLD_FAULTS)
    config = load(file, ["faults.stop_s=7", "serve={unresponsive_s: 3}", "rollout.refill_rounds=2"])
    assert (config.faults.heartbeat_timeout_s, config.faults.phase_timeout_s, config.faults.grace_period_s) == (9, 9, 7)
    assert config.serve.health_timeout_s == 3 and config.rollout.max_refill_rounds == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5 and "clipo: faults.stop_s is now called faults.grace_period_s" in told[1]


def test_an_override_wins_over_the_file_whichever_name_either_uses(write):
    assert load(write(MODEL + OLD_FAULTS), ["faults.heartbeat_timeout_s=5"]).faults.heartbeat_timeout_s == 5
    new = write(MODEL + "faults: {heartbeat_timeout_s: 5}\n")
    assert load(new, ["faults.frozen_s=4"]).faults.heartbeat_timeout_s == 4


def test_a_setting_given_by_both_names_is_refused(write):
    both = "now called faults.heartbeat_timeout_s, which is given too. Remove the old name"
    assert both in refusal(write(MODEL + "faults: {frozen_s: 9, heartbeat_timeout_s: 9}\n"))
    assert both in refusal(write(MODEL), "faults.frozen_s=9", "faults.heartbeat_timeout_s=9")


def test_only_rank_0_tells_new_names(write, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(write(MODEL + OLD_FAULTS))
    assert capsys.readouterr().err == ""


def test_renamed_settings_exist_and_stay_in_their_section():
    assert RENAMED.keys().isdisjoint(reference.keys()) and set(RENAMED.values()) <= set(reference.keys())
    assert all(old.partition(".")[0] == new.partition(".")[0] for old, new in RENAMED.items())


def test_the_schema_is_translated_for_omegaconf_once(write, monkeypatch):
    built, structured = [], OmegaConf.structured
    monkeypatch.setattr(OmegaConf, "structured", lambda section: built.append(section) or structured(section))
    first, second = load(write(MODEL), ["layout.tp=2"]), load(write(MODEL))
    assert len(built) <= 1
    assert first.layout.tp == 2 and second.layout.tp == 1 and second.data.train is not first.data.train


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:CLIPO_TEST_SECRET}",
        "runs/${oc.env:CLIPO_TEST_SECRET,none}/x",
        "${oc.decode:${oc.env:CLIPO_TEST_SECRET}}",
        "${oc.${name}:CLIPO_TEST_SECRET}",
        "${ oc.env : CLIPO_TEST_SECRET }",
        "\\\\${oc.env:CLIPO_TEST_SECRET}",
    ],
)
def test_nothing_of_the_environment_gets_into_the_settings(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CLIPO_TEST_SECRET", "hidden")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"path": "m"}, "data": {"train": [{"path": text}]}, "name": "env"}))
    with pytest.raises(ConfigError, match="refer") as caught:
        load(file)
    assert "data.train[0].path" in str(caught.value) and "hidden" not in str(caught.value)
    file.write_text("model: {path: m}\n")
    with pytest.raises(ConfigError, match="refer"):
        load(file, [f"train.output={json.dumps(text)}"])


def test_braces_and_colons_that_refer_to_nothing_are_text(tmp_path):
    file = tmp_path / "run.yaml"
    asks = "Answer: {a: 1} ${name}: b"
    file.write_text(json.dumps({"model": {"path": "m", "system_prompt": asks}, "name": "env"}))
    assert load(file).model.system_prompt == "Answer: {a: 1} env: b"


@pytest.mark.parametrize("text", ["\\${x} and ${name}", "\\\\\\${oc.env:HOME}", "\\\\${name}", "a\\b \\${", "${name}"])
def test_settings_that_a_run_has_written_are_read_as_they_are(tmp_path, text):
    """An escaped reference is text, and stays text in config.json, from which `clipo eval` starts."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"path": "m", "system_prompt": text}, "name": "env"}))
    config = load(file)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load(tmp_path / "config.json", resolved=True) == config
