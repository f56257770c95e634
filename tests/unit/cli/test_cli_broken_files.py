"""Commands that read files of earlier runs, and write where they are told, refuse what is broken in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_kinds import write_sound

from clipo_megatron.cli.main import main

DEEP = "[" * 10_000 + "]" * 10_000
POINT = {"name": "nodes-1", "kinds": ["weak"], "nodes": 1, "server_nodes": 0, "ranks": 1, "gpus": 0, "steps": 4}
POINT |= {"prompts": 4, "output": "run", "overrides": ["layout.dp=1"], "job": None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a user with a run, which is the current one."""
    write_sound(tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


def refused(capsys, *words: str) -> str:
    """What a command says that ends with exit code 2."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("clipo: ") and len(said) < 1000
    return said


@pytest.mark.parametrize(
    "change", [{"output": ["a"]}, {"nodes": "1"}, {"steps": []}, {"kinds": [3]}, {"prompts": 10**30}, {"job": 7}]
)
def test_scaling_points_with_other_types_are_damaged(change, folder, capsys):
    (folder / "run" / "scale").mkdir()
    (folder / "run" / "scale" / "points.json").write_text(json.dumps([POINT | change]))
    assert "points.json cannot be read" in refused(capsys, "scale", "run.yaml", "--collect")


def test_metrics_that_are_no_numbers_are_not_measured(folder, capsys):
    (folder / "run" / "scale").mkdir()
    (folder / "run" / "scale" / "points.json").write_text(json.dumps([POINT]))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    lines[2]["time/step_s"], lines[3]["speed/tokens_per_s"] = "fast", [1]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["scale", "run.yaml", "--collect"]) == 0
    assert "1 steps" in capsys.readouterr().out or (folder / "run" / "scale" / "scale.json").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trace.jsonl", {"step": 0, "ranks": ["x"]}),
        ("trace.jsonl", {"step": 0, "ranks": [{"spans": [["generate", 2.0, "3"]]}]}),
        ("trace.jsonl", {"step": 0, "ranks": [{"spans": 7}]}),
        ("rollouts.jsonl", {"step": 3, "prompt_id": "practice/0", "rollouts": [{"text": ["x"], "correct": True}]}),
        ("rollouts.jsonl", {"step": 3, "prompt_id": ["x"], "rollouts": []}),
        ("metrics.jsonl", {"step": 3, "time/step_s": {"a": 1}, "reward/accuracy": "1", "policy/grad_norm": 10**400}),
        ("metrics.jsonl", {"step": 10**30, "reward/accuracy": 0.5}),
    ],
)
def test_a_line_that_no_run_wrote_is_left_out_of_the_page(name, line, folder):
    with (folder / "run" / name).open("a") as file:
        file.write(json.dumps(line) + "\n" + DEEP + "\n")
    assert main(["report", "run", "-o", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    assert ("not as a run writes them" in page) == (name != "metrics.jsonl")


def test_files_of_a_run_that_are_none_are_named(folder, capsys):
    for name in ("metrics.jsonl", "segments.jsonl"):
        file = folder / "run" / name
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        said = refused(capsys, "report", "run", "-o", "page.html")
        assert f"run/{name} cannot be read: it is a device or a pipe. Restore it" in said
        file.unlink()
        file.touch()
        os.truncate(file, 1 << 33)
        assert "it has a line of 64 MiB" in refused(capsys, "report", "run", "-o", "page.html")
        file.write_bytes(kept)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: file.write_text(DEEP),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: os.truncate(file, 1 << 33),
        lambda file: file.write_text(file.read_text().replace('"tokens": 1', f'"tokens": {10**30}')),
    ],
    ids=["deep", "pipe", "huge", "long number"],
)
def test_a_result_that_is_none_is_refused(break_it, folder, capsys):
    file = Path("run/eval/step_000004.json")
    break_it(file)
    assert str(file) in refused(capsys, "compare", "run/eval/step_000000.json", str(file))


@pytest.mark.parametrize(
    "words",
    [
        ("report", "run", "-o", "x" * 300),
        ("eval", "run", "--output", "x" * 300),
        ("eval", "x" * 300),
        ("eval", "run.yaml/x"),
        ("compare", "run/eval/step_000000.json", "run/eval/step_000004.json", "--json", "x" * 300),
        ("convert", "to-megatron", "model", "/"),
        ("convert", "to-megatron", "model", "x" * 300),
        ("convert", "to-hf", "run/checkpoints/step_000002", "out", "--hf", "nowhere"),
        ("convert", "to-hf", "run/checkpoints/step_000002", "out", "--hf", "run.yaml"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_is_refused(words, folder, capsys):
    refused(capsys, *words)


@pytest.mark.parametrize("taken", ["run.yaml", "practice.jsonl", "model/config.json", "run/metrics.jsonl"])
def test_a_file_of_another_kind_is_not_overwritten(taken, folder, capsys):
    before = Path(taken).read_bytes()
    for words in (
        ("report", "run", "-o", taken),
        ("eval", "run", "--output", taken),
        ("compare", "run/eval/step_000000.json", "run/eval/step_000004.json", "--json", taken),
    ):
        assert "a file of another kind, which is not overwritten" in refused(capsys, *words)
    assert Path(taken).read_bytes() == before
    Path("empty.html").touch()
    for out in ("empty.html", "page.html", "page.html"):  # one of before is replaced
        assert main(["report", "run", "-o", out]) == 0
    for _ in range(2):
        assert main([*words[:3], "--json", "compared.json"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"layout": {"tp": ["a"], "pp": "2", "dp": {}}},
        {"layout": 3},
        {"model": {"path": [1]}},
        {"clipo": [1]},
        {"name": {}},
    ],
)
def test_settings_of_a_run_with_other_types_are_shown_as_unknown(change, folder):
    file = folder / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(["report", "run", "-o", "page.html"]) == 0


def test_closed_streams_lead_nowhere_and_no_file_takes_their_numbers(folder):
    code = (
        "import os, sys; from clipo_megatron.cli.main import main; found = main(['settings', 'nope']); "
        "sys.exit(found if os.open('run.yaml', os.O_RDONLY) > 2 and not sys.stdout.isatty() else 1)"
    )
    closed = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=lambda: (os.close(1), os.close(2)), stdin=subprocess.DEVNULL
    )
    assert closed.returncode == 2


@pytest.mark.parametrize("words", [["settings", "clipo"], ["methods"]])
def test_a_full_disk_behind_the_output_is_named(words, folder):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "clipo_megatron.cli", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "clipo: output cannot be written: No space left on device. Free space, or write elsewhere.\n"
    )


def test_a_deep_configuration_of_a_run_is_no_run(folder, capsys):
    (folder / "run" / "config.json").write_text(DEEP)
    assert "no run to evaluate" in refused(capsys, "eval", "run", "--output", "out.json")


def test_a_long_word_is_not_repeated_at_length(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "run.yaml", "--nope" + "x" * 9000, "\x1b[2J"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said) < 2000 and "\x1b" not in said
