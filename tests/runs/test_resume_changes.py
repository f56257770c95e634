"""A run that is resumed with something changed says so, keeps what each session had, and refuses another model."""

import json
import subprocess
import sys

from safetensors.torch import load_file, save_file
from small_runs import SmallRun, metrics, write_config, write_model

from clipo_megatron.report.reading import read_run
from clipo_megatron.report.sessions import sessions_of
from clipo_megatron.telemetry.segments import read_segments

PLAIN = (
    "clipo.enabled=false",
    "eval.every=0",
    "eval.at_start=false",
    "algorithm.kl.coefficient=0",
    "checkpoint.every=1",
)


def test_what_changed_is_said_kept_and_shown(tmp_path):
    config = write_config(tmp_path, write_model(tmp_path / "model", layers=1))
    output = tmp_path / "run"
    first = SmallRun(config, output, *PLAIN, "train.steps=1", "algorithm.mini_batches=1").wait()
    assert "settings that are not those" not in first.said and len(read_segments(output)) == 1
    (line,) = metrics(output)
    assert "policy/update_kl" not in line, "before the only update of a step it measures nothing"
    assert abs(line["policy/first_update_kl"]) < 1e-8
    assert line["rollout/mixed_groups"] == line["reward/mixed_groups"]

    file = tmp_path / "practice.jsonl"
    file.write_text(file.read_text().replace("Question 3?", "Question three?"))
    second = SmallRun(
        config, output, *PLAIN, "train.steps=3", "optimizer.learning_rate=0.002", "report.measure_update_kl=true"
    ).wait()
    said = second.said
    assert "resumed from" in said and "settings that are not those of the steps before, 4:" in said
    assert "optimizer.learning_rate" in said and "before 0.001, now 0.002" in said
    assert "warning: the training problems are not those of before (they are 10 as before)" in said
    segments = read_segments(output)
    assert [(each.step, each.settings["optimizer"]["learning_rate"]) for each in segments] == [(0, 0.001), (1, 0.002)]
    assert json.loads((output / "config.json").read_text())["optimizer"]["learning_rate"] == 0.002
    lines = metrics(output)
    assert "policy/kl_after_update" not in lines[0] and all(line["policy/kl_after_update"] > 0 for line in lines[1:])
    assert all(line["policy/kl_after_update"] > line["policy/update_kl"] for line in lines[2:])
    (_, (steps, changed)) = sessions_of(read_run(output))
    assert steps == "1 to the last" and any("optimizer.learning_rate: 0.001" in each for each in changed)
    page = tmp_path / "page.html"
    subprocess.run(
        [sys.executable, "-m", "clipo_megatron.cli", "report", str(output), "--out", str(page)],
        check=True,
        capture_output=True,
    )
    assert "Changed on the way" in page.read_text() and "training problems are not those" in page.read_text()

    weights = tmp_path / "model" / "model.safetensors"
    changed = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    refused = SmallRun(config, output, *PLAIN, "train.steps=4").wait(code=2)
    assert "this run cannot be resumed: the weights at model.path" in refused.said
    assert "checkpoint.resume=false" in refused.said and len(metrics(output)) == 3
    assert len(read_segments(output)) == 2, "a session that was refused trained nothing"
