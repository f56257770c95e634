"""`clipo eval` as a command: a checkpoint gets the result that training gave it."""

from dataclasses import replace

from small_runs import SmallRun, write_config, write_model, write_problems

from clipo_megatron.evaluation.results import read_result
from clipo_megatron.runtime.run_dir import lock_output


def test_a_checkpoint_gets_the_result_that_training_gave_it(tmp_path):
    """Two sets, four samples of each problem; with another run writing to the same folder, as training would be."""
    config = write_config(tmp_path, write_model(tmp_path / "model", layers=1))
    more = write_problems(tmp_path / "more.jsonl", [f"Another {n}?" for n in range(4)])
    output = tmp_path / "run"
    sets = f"data.eval=[{{path: {tmp_path / 'exam.jsonl'}}}, {{path: {more}}}]"
    sampling = ("eval.samples=4", "eval.temperature=0.8", "eval.top_p=0.95", "eval.at_start=false", "eval.ks=[1,2,4]")
    SmallRun(config, output, sets, *sampling, "train.steps=1", "clipo.warmup_steps=0").wait()
    trained = read_result(output / "eval" / "step_000001.json")
    assert trained.sources == ["exam", "more"] and trained.settings.ks == (1, 2, 4) and trained.settings.top_p == 0.95
    assert 0 < trained.accuracy < 1 and trained.figures().pass_at[4] > trained.accuracy, "a task with something to find"

    lock = lock_output(output)
    checkpoint = output / "checkpoints" / "step_000001"
    evaluation = SmallRun(checkpoint, output, command="eval").wait()
    lock.close()
    measured = read_result(output / "results" / "step_000001.json")
    assert measured == replace(trained, checkpoint=str(checkpoint))
    assert "all problems" in evaluation.said and "maj@4" in evaluation.said and "mean of sets" in evaluation.said
    assert [path.name for path in (output / "eval").iterdir()] == ["step_000001.json"]

    # What training needs is not asked for: its problems, their number, its seed, its head, its batches, its critic.
    (practice := tmp_path / "practice.jsonl").rename(moved := tmp_path / "moved.jsonl")
    one = tmp_path / "one.json"
    SmallRun(output, output, "--output", str(one), "--set", "exam", command="eval").wait()
    assert read_result(one).problems.keys() == trained.of(["exam"]).problems.keys()
    other = (
        "train.seed=5",
        "clipo.enabled=false",
        "data.prompts_per_step=3",
        "critic.path=gone",
        f"data.eval=[{{path: {moved}}}]",
    )
    SmallRun(output, output, *other, "--output", str(one), command="eval").wait()
    assert len(read_result(one).problems) == 12 and read_result(one).step == 1
    assert read_result(one).model == trained.model and not practice.exists()


def test_problems_that_are_too_long_are_counted(tmp_path):
    """Three of eight problems do not fit: the result says so, in its file and on the console."""
    config = write_config(tmp_path, write_model(tmp_path / "model", layers=1))
    asked = write_problems(tmp_path / "mixed.jsonl", [f"Q{n}" * (1 if n < 5 else 60) for n in range(8)])
    output = tmp_path / "run"
    run = SmallRun(config, output, f"data.eval=[{{path: {asked}}}]", command="eval").wait()
    result = read_result(output / "results" / "step_000000.json")
    assert (len(result.problems), result.left_out) == (5, {"mixed": 3})
    assert (
        "mixed: 3 of 8 problems have prompts of more than data.max_prompt_tokens tokens and were not asked" in run.said
    )
    assert "5 problems x 1 sample" in run.said
