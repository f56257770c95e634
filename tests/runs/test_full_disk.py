"""A run whose disk is full: checkpoints survive, the message says what to do, and the same command resumes."""

from pathlib import Path

from full_disk import fill, small_disk
from held_runs import Hold
from small_runs import EVERY, SmallRun, assert_same_run


def the_last_words(run: SmallRun) -> str:
    assert "Traceback" not in run.said
    (line,) = [line for line in run.said.splitlines() if line.startswith("clipo: ")]
    return line


def test_a_run_resumes_after_its_disk_was_full(small_config, undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", megabytes=24) as disk:
        output, config = disk / "run", Path(small_config)

        def start(hold: Hold | None = None) -> SmallRun:
            overrides = ("report.save_rollouts=0", "checkpoint.asynchronous=false")
            return SmallRun(config, output, *overrides, logs=tmp_path, hold=hold)

        after_the_checkpoint = Hold(tmp_path / "hold", after_step=EVERY + 1)
        run = start(after_the_checkpoint)
        run.wait_for_hold()
        fill(disk)
        after_the_checkpoint.release()
        run.wait(2)
        assert the_last_words(run) == (
            f"clipo: {output}/metrics.jsonl cannot be written: [Errno 28] No space left on device. Free space, or "
            "correct train.output; the same command resumes from the newest checkpoint"
        )
        written = (output / "metrics.jsonl").read_bytes()
        assert not written.endswith(b"\n")  # half a line
        assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step_{EVERY:06d}"]

        again = start().wait(2)
        assert "segments.jsonl cannot be written: [Errno 28] No space left on device. Free" in the_last_words(again)
        assert (output / "metrics.jsonl").read_bytes() == written

        (disk / "others").unlink()
        last = start().wait()
        assert f"resumed from {output}/checkpoints/step_{EVERY:06d}, {EVERY} steps done" in last.said
        assert_same_run(output, undisturbed)
