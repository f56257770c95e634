"""The output folder of a run: earlier results are set aside, and one run at a time writes to it."""

import subprocess
import sys

import pytest

from clipo_megatron.runtime.run_dir import OutputError, lock_output, set_aside


def test_results_of_earlier_runs_are_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
        (tmp_path / "logs").mkdir(exist_ok=True)  # of ranks that write at this moment
        assert set_aside(tmp_path) == tmp_path / "previous" / str(number)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "previous"]
        assert (tmp_path / "previous" / str(number) / "metrics.jsonl").read_text() == str(number)
        assert (tmp_path / "previous" / str(number) / "checkpoints" / "step_000001").is_dir()


def test_one_run_at_a_time_writes_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("clipo_megatron.runtime.run_dir._LOCK_WAIT_S", 0.2)
    output = tmp_path / "deep" / "run"
    lock = lock_output(output)
    again = (
        "from pathlib import Path; from clipo_megatron.runtime import run_dir; run_dir._LOCK_WAIT_S = 0.2; "
        f"run_dir.lock_output(Path({str(output)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert "OutputError: process " in done.stderr
    assert "is writing to train.output = " in done.stderr
    lock.close()
    lock_output(output).close()


def test_an_output_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"train.output = .*file.run cannot be written to.*Choose another"):
        lock_output(tmp_path / "file" / "run")
