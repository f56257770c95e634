"""A run that was killed at any moment and resumed equals an undisturbed run, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
from held_runs import Hold
from progress import wait_until
from small_runs import (
    EVERY,
    STEPS,
    SmallRun,
    assert_same_run,
    checkpoint_state,
    metrics,
    steps_logged,
)

from clipo_megatron.runtime.platform import LOCAL_RENDEZVOUS_ENV
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.runtime.stop_requests import AGAIN_AFTER_S

PP2 = "layout.pp=2"


def kill_after_checkpoint(config, output, *overrides):
    """Kill a run at a random moment between its first checkpoint and its end, with steps logged that this lacks."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"moment drawn with seed {seed}")
    delay = random.Random(seed).uniform(0.0, 0.15)
    for attempt in range(4):  # where it wins the race, it starts again
        hold = Hold(output.with_name(f"hold{attempt}"), after_step=EVERY + 1)
        run = SmallRun(config, output, *overrides, hold=hold)
        run.wait_for_hold()
        written = output / "checkpoints" / f"step_{EVERY:06d}"
        run.wait_for(written.exists, f"the checkpoint of step {EVERY}")
        known = run.pids()
        hold.release()
        time.sleep(delay)
        run.kill(known)
        if not (output / "checkpoints" / f"step_{STEPS:06d}").exists():
            break
        shutil.rmtree(output)
        delay /= 4
    assert [path.name for path in (output / "checkpoints").glob("step_*")] == [f"step_{EVERY:06d}"]
    assert steps_logged(output) > EVERY


def has_every_kind_of_learning(output):
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["policy/grad_norm"] > 0 for line in lines)
    assert all(line["clipo/groups_with_valid_anchor"] > 0 for line in lines)
    assert [line["clipo/bonus_mean"] != 0 for line in lines] == [False, False, True, True, True, True]
    assert len({line["policy/learning_rate"] for line in lines}) == STEPS
    assert all(line["reward/mixed_groups"] > 0 for line in lines)


def test_the_runs_compared_here_learn(undisturbed):
    has_every_kind_of_learning(undisturbed)
    state = checkpoint_state(undisturbed, STEPS)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        moments = [tensor for name, tensor in state.items() if name.startswith(f"policy.optimizer.{kind}.")]
        assert len(moments) == 26  # six in each of four layers, the embedding and the last norm
        assert all(moment.abs().max() > 0 for moment in moments)
    before = checkpoint_state(undisturbed, EVERY)
    for name in ("policy.embedding.word_embeddings.weight", "contrastive.safetensors/.head.projection"):
        assert not torch.equal(before[name], state[name])


def test_a_run_killed_in_a_step_and_then_in_a_checkpoint(small_config, undisturbed, tmp_path):
    output = tmp_path / "run"
    kill_after_checkpoint(small_config, output)
    torn = (output / "metrics.jsonl").read_bytes()
    (output / "metrics.jsonl").write_bytes(torn + b'{"step": 5, "reward/me')  # a line cut short

    checkpoints = output / "checkpoints"
    partial = checkpoints / f".step_{STEPS:06d}.partial"
    hold = Hold(tmp_path / "hold", at_folder=partial.name)
    second = SmallRun(small_config, output, hold=hold)
    second.wait_for_hold()
    known = second.pids()
    hold.release()
    time.sleep(random.SystemRandom().uniform(0.0, 0.05))
    second.kill(known)
    assert f"resumed from {checkpoints / f'step_{EVERY:06d}'}, {EVERY} steps done" in second.said
    assert partial.exists() or (checkpoints / f"step_{STEPS:06d}").exists()
    written = partial.exists()

    third = SmallRun(small_config, output).wait()
    assert f"resumed from {checkpoints / f'step_{EVERY if written else STEPS:06d}'}" in third.said
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000003", "step_000006"]
    assert_same_run(output, undisturbed)

    # the same command once more: nothing is left to do, and nothing is done
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file() and path.name != ".lock"}
    again = SmallRun(small_config, output).wait()
    assert f"nothing to train: {STEPS} steps are done; to continue, set train.steps higher" in again.said
    assert "Held-out problems after 0 and 6 steps" in again.said
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_killed_on_two_pipeline_stages(small_config, undisturbed_pp2, tmp_path):
    has_every_kind_of_learning(undisturbed_pp2)
    output = tmp_path / "run"
    kill_after_checkpoint(small_config, output, PP2)
    SmallRun(small_config, output, PP2).wait()
    assert_same_run(output, undisturbed_pp2)


@pytest.mark.full
def test_resume_in_other_layouts(small_config, undisturbed, tmp_path):
    """One rank, then TP2 x PP2, then DP2: each goes on from what the one before wrote."""
    output = tmp_path / "run"
    checkpoints = output / "checkpoints"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(checkpoints / f"step_{STEPS:06d}")
    often = ("checkpoint.every=1", "checkpoint.keep=9")
    run = SmallRun(small_config, output, "layout.tp=2", "layout.pp=2", *often).wait()
    assert f"resumed from {checkpoints / f'step_{EVERY:06d}'}, {EVERY} steps done" in run.said
    assert len(metrics(output)) == STEPS
    for step in (EVERY + 2, EVERY + 3):
        shutil.rmtree(checkpoints / f"step_{step:06d}")
    run = SmallRun(small_config, output, "layout.dp=2").wait()
    assert f"resumed from {checkpoints / f'step_{EVERY + 1:06d}'}, {EVERY + 1} steps done" in run.said
    for mine, other in zip(metrics(output), metrics(undisturbed), strict=True):
        # a gradient's norm is a long sum, and its rounding is carried on by the updates
        within = {"policy/loss": 1e-5, "clipo/loss": 1e-5, "reward/mean": 1e-5, "policy/grad_norm": 1e-4}
        for name, tolerance in within.items():
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=1e-7), (mine["step"], name)


def test_a_finished_run_continues_with_more_steps(small_config, undisturbed, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    SmallRun(small_config, output, f"train.steps={STEPS + 2}").wait()
    lines = metrics(output)
    assert lines[:STEPS] == metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS + 2))
    assert lines[STEPS]["policy/learning_rate"] > 0  # the schedule is the new, longer one
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_000006", "step_000008"]
    assert sorted(path.name for path in (output / "eval").iterdir())[-1] == "step_000008.json"
    learnt = checkpoint_state(output, STEPS + 2)
    assert learnt["algorithm.json"] != checkpoint_state(undisturbed, STEPS)["algorithm.json"]
    assert re.search(r"held-out accuracy after 8 steps", SmallRun(small_config, output).wait().said) is None


def test_an_interrupted_run_continues(small_config, undisturbed, tmp_path):
    output = tmp_path / "run"
    hold = Hold(tmp_path / "hold", after_step=1)
    run = SmallRun(small_config, output, hold=hold)
    run.wait_for_hold()
    run.process.send_signal(signal.SIGINT)
    hold.release()
    run.wait(130)
    done = steps_logged(output)
    assert 1 <= done < STEPS
    assert "SIGINT: ending after this step; once more after 3 s to end at once" in run.said
    assert (
        f"clipo: stopped by SIGINT after {done} of {STEPS} steps; the state is saved, and the same command" in run.said
    )
    assert json.loads((output / "checkpoints" / f"step_{done:06d}" / "manifest.json").read_text())["step"] == done
    SmallRun(small_config, output).wait()
    assert_same_run(output, undisturbed)


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_twice(small_config, tmp_path, ranks):
    output = tmp_path / "run"
    # a step that takes for ever
    slow = ("rollout.max_new_tokens=400", "train.steps=9", "eval.at_start=false", "data.prompts_per_step=400")
    run = SmallRun(small_config, output, f"layout.pp={ranks}", *slow, "layout.max_tokens_per_microbatch=4000")
    run.wait_for(lambda: "small: model" in run.said, "the first step")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    run.wait_for(lambda: "SIGINT: ending after this step" in run.said, "the answer to the first signal")
    time.sleep(AGAIN_AFTER_S)
    run.process.send_signal(signal.SIGINT)
    run.wait(130)
    assert steps_logged(output) == 0


def test_a_step_whose_generation_is_cancelled_is_repeated(small_config, undisturbed_pp2, tmp_path):
    """Only rank 0 asks for rollouts here, and the signal goes to rank 1, which waits for it."""
    output, mark = tmp_path / "run", tmp_path / "slow"
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    slow = {"CLIPO_SLOW_STEP": str(EVERY + 1), "CLIPO_SLOW_MARK": str(mark), warm.IMPORT: "slow_rank"}
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    words = ["train", str(small_config), f"train.output={output}", PP2, "faults.grace_period_s=1"]
    ranks = []
    for rank, log in enumerate(logs):
        log.touch()
        place = {**store, **LOCAL_RENDEZVOUS_ENV, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(warm.Command(words, env={**os.environ, **warm.ONE_THREAD, **slow, **place}, log=log))
    try:
        wait_until(lambda: mark.exists() or any(each.poll() is not None for each in ranks), "the slow step")
        assert mark.exists(), [log.read_text() for log in logs]
        ranks[1].send_signal(signal.SIGUSR1)
        wait_until(lambda: all(each.poll() is not None for each in ranks), "both ranks to end")
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    said = [log.read_text() for log in logs]
    assert [each.returncode for each in ranks] == [138, 138], said
    assert f"stopped by SIGUSR1 after {EVERY + 1} of {STEPS} steps; the state is saved" in " ".join(said[0].split())
    assert steps_logged(output) == EVERY + 1
    assert (output / "checkpoints" / f"step_{EVERY + 1:06d}").is_dir()  # one that was not due
    run = SmallRun(small_config, output, PP2).wait()
    assert f"{EVERY + 1} steps done" in run.said
    assert [line["step"] for line in metrics(output)] == list(range(STEPS))
    assert_same_run(output, undisturbed_pp2)


def test_ranks_die_with_their_supervisor(small_config, tmp_path):
    run = SmallRun(small_config, tmp_path / "run", PP2, hold=Hold(tmp_path / "hold", after_step=1))
    run.wait_for_hold()
    assert len(run.pids()) >= 3
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not run.pids(), "its ranks and graders to be gone")


def test_starting_over_keeps_old_and_new_results_apart(small_config, undisturbed, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    short = ("train.steps=2", "clipo.warmup_steps=0", "eval.at_start=false")
    run = SmallRun(small_config, output, "checkpoint.resume=false", "checkpoint.every=1", "checkpoint.keep=1", *short)
    run.wait()
    shelf = output / "previous" / "1"
    assert f"starting over: the results of the run before are in {shelf}" in run.said
    assert (shelf / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in (shelf / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    # the new run's own: pruned to one, and not to the old run's highest
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000002"]
    assert [line["step"] for line in metrics(output)] == [0, 1]
    assert [path.name for path in (output / "eval").iterdir()] == ["step_000002.json"]
    logged = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in logged} == {0, 1}
    assert len({(line["step"], line["prompt_id"]) for line in logged}) == len(logged)


def test_a_frozen_rank_is_named_and_the_ranks_restart(small_config, undisturbed_pp2, tmp_path):
    output = tmp_path / "run"
    hold = Hold(tmp_path / "hold", after_step=EVERY + 1)
    faults = ("faults.heartbeat_timeout_s=4", "faults.max_restarts=1", "faults.grace_period_s=1")
    run = SmallRun(small_config, output, PP2, *faults, hold=hold)
    run.wait_for_hold()
    run.wait_for((output / "checkpoints" / f"step_{EVERY:06d}").exists, f"the checkpoint of step {EVERY}")
    ranks = [pid for pid in run.pids() if b"clipo_megatron.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    frozen = next(pid for pid in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(frozen, signal.SIGSTOP)
    hold.release()
    run.wait()
    said = " ".join(run.said.split())
    assert f"clipo: rank 0: rank 1 of 2 (process {frozen} on " in said
    assert (
        "has sent no heartbeat for" in said and "(the limit is 4 s). All ranks end. faults.heartbeat_timeout_s" in said
    )
    assert "Rank 0 of 2 ended with exit code 70" in said
    assert "Starting the ranks again (restart 1, faults.max_restarts = 1)." in said
    assert "resumed from" in said
    assert_same_run(output, undisturbed_pp2)
