"""The command line: its help, and one message without a traceback for what the user can correct."""

import os
import subprocess
import sys

import pytest
from model_folders import whole_folder

from clipo_megatron.cli import main as cli
from clipo_megatron.config.reference import settings


@pytest.fixture
def run_file(tmp_path):
    model = tmp_path / "model"
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "vocab_size": 260,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "intermediate_size": 8,
    }
    whole_folder(model, facts)
    file = tmp_path / "run.yaml"
    file.write_text(f"""
name: demo
model: {{path: {model}}}
data: {{train: [{{generator: gcd, size: 40}}]}}
train: {{output: {tmp_path}/out}}
""")
    return str(file)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    commands = (
        "train",
        "submit",
        "scale",
        "eval",
        "compare",
        "report",
        "serve",
        "convert",
        "plan",
        "settings",
        "methods",
        "doctor",
    )
    for word in (*commands, "examples:", "torchrun", "srun", "CLIPO_TRACEBACK"):
        assert word in shown


def test_help_of_train_shows_overrides(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "key=value" in (shown := capsys.readouterr().out) and "data.train=[{path:" in shown


def test_settings_show_everything(capsys):
    assert cli.main(["settings"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{setting.key} " in shown and setting.comment in shown for setting in settings())


def test_settings_of_one_section(capsys):
    assert cli.main(["settings", "algorithm.kl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["algorithm.kl.coefficient", "a", "number,", "at", "least", "0;", "default", "0.0"]
    assert all(line.startswith(("algorithm.kl.", " ")) for line in lines)
    assert cli.main(["settings", "algoritm"]) == 2
    assert "Did you mean algorithm?" in capsys.readouterr().err


def test_settings_of_several_names(capsys):
    assert cli.main(["settings", "data.hold_out", "eval"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
    assert keys[0] == "data.hold_out" and len(keys) > 5 and all(key.startswith("eval.") for key in keys[1:])


def test_check_reports_what_a_run_would_do(run_file, capsys):
    # overrides may stand before and after the option
    assert cli.main(["train", run_file, "layout.pp=2", "--check", "train.steps=5"]) == 0
    shown = capsys.readouterr().out
    assert "2 = tp 1 x pp 2 x dp 1" in shown and "40 problems, 5 steps = 2 epochs" in shown
    assert "16 prompts x 8 samples = 128 rollouts" in shown


def test_check_reads_the_data(run_file, capsys):
    assert cli.main(["train", run_file, "--check", "data.train[0].generator=gdc"]) == 2
    assert "Did you mean gcd" in capsys.readouterr().err


def test_check_makes_only_a_few_problems_of_a_generator(run_file, capsys):
    sizes = ["data.train[0].size=100000000", "data.eval=[{generator: gcd, size: 100000000, seed: 1, name: held}]"]
    assert cli.main(["train", run_file, "--check", *sizes]) == 0
    assert "100000000 problems, 100 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["layout.tp=3"], "Valid for this model: 1, 2, 4"),
        (["algorithm.mini_batches=3"], "algorithm.mini_batches = 3 does not divide it"),
        (["layout.dp=9000", "data.prompts_per_step=9000"], "srun or torchrun"),
    ],
)
def test_refusals_come_without_a_traceback(run_file, words, part):
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", run_file, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("clipo: ")
    assert part in done.stderr and "Traceback" not in done.stderr


def test_a_misspelt_setting_is_refused_before_torch_is_imported(run_file):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "clipo_megatron.cli",
        "train",
        run_file,
        "rollout.temprature=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean rollout.temperature?" in done.stderr
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_traceback_on_request(run_file):
    environment = {**os.environ, "CLIPO_TRACEBACK": "1"}
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", run_file, "nonsense=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "Traceback" in done.stderr and "ConfigError" in done.stderr


def test_only_the_first_rank_of_a_machine_reports_what_all_of_torchruns_find(run_file):
    said = []
    for rank in "01":
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "x"}
        command = [sys.executable, "-m", "clipo_megatron.cli", "train", run_file, "nonsense=1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        said.append(done.stderr)
    assert "nonsense" in said[0] and said[1] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "run.yaml"], "there is no command 'trian'. Did you mean train? `clipo --help` shows what there is."),
        (["train"], "the following arguments are required: CONFIG. `clipo train --help` shows"),
        (["train", "run.yaml", "--chek"], "unrecognized arguments: --chek. `clipo train --help` shows"),
        (["convert", "to-hf", "a"], "the following arguments are required: OUT. `clipo convert to-hf --help` shows"),
    ],
)
def test_wrong_words_are_told_with_where_the_right_ones_stand(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith(f"clipo: {message}") and said.count("\n") == 1


def test_without_a_word_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2 and "clipo train run.yaml" in capsys.readouterr().err


def test_errors_of_this_package_are_for_users():
    from clipo_megatron.config.errors import ConfigError
    from clipo_megatron.data.sources import DataError

    assert cli.is_for_users(ConfigError("x")) and cli.is_for_users(DataError("x"))
    assert not cli.is_for_users(ValueError("x"))
