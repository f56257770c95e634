"""What surrounds the steps of a run: its folder, its problems, and the silence of libraries."""

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch.distributed as dist
from small_runs import SmallRun, checkpoint_state, metrics, write_config, write_model
from update_steps import actor_on

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.checkpoint import CheckpointError
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.data.prompts import load_tokenizer
from clipo_megatron.data.sources import DataError, overlap
from clipo_megatron.training.eval_run import steps_of
from clipo_megatron.runtime.run_dir import OutputError, claim, set_aside
from clipo_megatron.data.splits import held_out_problems, training_problems
from clipo_megatron.runtime.warning_filters import NOISE, quiet_libraries
from clipo_megatron.training.run import policy_updates
from clipo_megatron.training.stop_signal import SIGNALS, TERM_S, StopRequest
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config

pytestmark = pytest.mark.timeout(120)

# ---------------------------------------------------------------- the output folder


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


def test_one_run_writes_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("clipo_megatron.runtime.run_dir._LOCK_WAIT_S", 0.2)
    output = tmp_path / "deep" / "run"
    lock = claim(output)
    again = (
        "from pathlib import Path; from clipo_megatron import output; output._LOCK_WAIT_S = 0.2; "
        f"output.claim(Path({str(output)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, timeout=60)
    assert "OutputError: process " in done.stderr
    assert "is writing to train.output = " in done.stderr
    lock.close()
    claim(output).close()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"train.output = .*file.run cannot be written to.*Choose another"):
        claim(tmp_path / "file" / "run")


# ---------------------------------------------------------------- being asked to end


def a_signal_while_the_ranks_agree() -> list[tuple[bool, int]]:
    """Rank 1 is asked to end after it has told the others that it was not."""
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    stop, reduce, answers = StopRequest(announce=False, patience_s=60.0), dist.all_reduce, []
    stop.watch()

    def all_reduce(*args, **kwargs):
        reduce(*args, **kwargs)
        if dist.get_rank() == 1 and not answers:
            signal.raise_signal(signal.SIGUSR1)

    dist.all_reduce = all_reduce
    try:
        for _ in range(3):
            answers.append((stop.agreed(), stop.signum))
    finally:
        dist.all_reduce = reduce
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return answers


def test_a_signal_is_never_lost_and_all_ranks_hear_of_it_at_once(ranks):
    asked = (True, signal.SIGUSR1)
    assert ranks.run(a_signal_while_the_ranks_agree, 2) == [
        [(False, 0), asked, asked],
        [(False, signal.SIGUSR1), asked, asked],
    ]


def test_who_sends_term_waits_less(monkeypatch):
    now = 100.0
    monkeypatch.setattr("clipo_megatron.training.stop_signal.time.monotonic", lambda: now)
    for signum, patience in ((signal.SIGUSR1, 60.0), (signal.SIGINT, 60.0), (signal.SIGTERM, TERM_S)):
        stop = StopRequest(announce=False, patience_s=60.0)
        now = 1000.0
        assert not stop.should_cancel()
        stop.hear_of(signum)
        now = 1000.0 + patience - 0.1
        assert not stop.should_cancel()
        stop._hear(signum, None)  # what another rank got as well is no second signal
        now = 1000.0 + patience
        assert stop.should_cancel() and not stop.insisted
        with pytest.raises(KeyboardInterrupt):
            stop._hear(signum, None)


def test_an_interpreter_that_ends_does_not_die_of_a_warning(tmp_path):
    ends = (
        "import os, signal; from clipo_megatron.training.stop_signal import StopRequest\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), usr1=signal.SIGUSR1): kill(me, usr1)\n"
        "stop, os.late = StopRequest(announce=False, patience_s=1.0), Late()\n"
        "stop.watch()\nstop.leave()"
    )
    done = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- problems


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    file = write_config(folder, write_model(folder / "model"))
    return file, load_tokenizer(folder / "model")


def problems(small, *overrides):
    said = []
    config, tokenizer = load(small[0], overrides), small[1]
    held_out = held_out_problems(config, tokenizer, said.append)
    train = training_problems(config, tokenizer, held_out, said.append)
    return train, held_out, said


def test_no_evaluation_problem_is_trained_on(small):
    train, held_out, said = problems(small)
    assert (len(train), len(held_out), overlap(train, held_out)) == (10, 6, 0)
    assert said == [
        "2 of 8 evaluation problems of exam repeat others and are left out: a paired test counts each problem once",
        "2 of 12 training problems are also evaluation problems and are left out (data.hold_out)",
    ]
    assert [prompt.id for prompt in held_out] == [f"exam/{row}" for row in range(6)]


def test_holding_out_can_be_switched_off(small):
    train, held_out, said = problems(small, "data.hold_out=false")
    assert (len(train), overlap(train, held_out)) == (12, 2)
    assert len(said) == 1


def test_nothing_left_to_train_on_is_said(small):
    path = load(small[0], []).data.train[0].path
    with pytest.raises(DataError, match=r"all 12 training problems.*data\.hold_out=false"):
        problems(small, f"data.eval=[{{path: {path}, name: same}}]")


def test_without_evaluation_nothing_is_held_out(small):
    train, held_out, said = problems(small, "data.eval=[]")
    assert (len(train), held_out, said) == (12, [], [])


def test_long_prompts_are_counted(small):
    train, *_ = problems(small, "data.eval=[]")
    lengths = sorted(prompt.tokens.numel() for prompt in train)
    limit = lengths[0]
    longer = sum(length > limit for length in lengths)
    assert longer  # else the test shows nothing
    kept, _, said = problems(small, f"data.max_prompt_tokens={limit}", "data.eval=[]")
    assert len(kept) == len(train) - longer
    assert said == [f"{longer} training prompts are longer than data.max_prompt_tokens = {limit} and are left out"]


# ---------------------------------------------------------------- what is evaluated


def test_a_checkpoint_of_another_model_is_not_evaluated(small, tmp_path):
    """Weights of the same shapes would be loaded without a word."""
    config = load(small[0], [])
    facts = model_spec(read_config(config.model.path)).architecture()
    for model, step in ((facts, 7), ({}, 8), (None, 9)):  # older checkpoints say less
        (tmp_path / "manifest.json").write_text(json.dumps({"step": step, "model": model}))
        assert steps_of(tmp_path, config) == step
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 7, "model": {**facts, "norm epsilon": 0.5}}))
    with pytest.raises(CheckpointError, match=r"no checkpoint of model.path = .*norm epsilon 0.5 in place of"):
        steps_of(tmp_path, config)


# ---------------------------------------------------------------- how long learning rates fall


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 84 * 2),
        (("algorithm.epochs=3",), 84 * 3 * 2),
        (("clipo.warmup_steps=14",), 84 * 2),  # the policy learns meanwhile, on the plain reward
        (("clipo.warmup_steps=14", "clipo.warmup_policy=false"), 70 * 2),
        (("clipo.warmup_policy=false", "clipo.enabled=false"), 84 * 2),
        (("algorithm.name=ppo", "critic.warmup_steps=10"), 74 * 2),
        (("algorithm.name=ppo", "critic.warmup_steps=10", "clipo.warmup_policy=false", "clipo.warmup_steps=3"), 74 * 2),
        (
            ("algorithm.name=ppo", "clipo.warmup_policy=false", "clipo.warmup_steps=14", "plugins=[{name: pipo}]"),
            70 * 2 * 2,
        ),
    ],
)
def test_updates_are_those_of_the_steps_in_which_the_policy_learns(small, overrides, expected):
    plugins = [f"algorithm.{each}" if each.startswith("plugins") else each for each in overrides]
    config = load(small[0], ["train.steps=84", "algorithm.kl.coefficient=0", *plugins])
    algorithm, learned = build_algorithm(config), 0
    for _ in range(config.train.steps):
        learned += algorithm.policy_learns
        algorithm.after_update(None)
    per_step = config.algorithm.epochs * config.algorithm.mini_batches * (1 + algorithm.replays)
    assert policy_updates(config, algorithm) == learned * per_step == expected


def lengths_of_schedules(config):
    """On a rank: over how many updates the learning rates of policy and critic fall."""
    actor = actor_on(config, LayoutConfig())
    return [each.optimizer.schedule.lr_decay_steps for each in (actor, actor.critic)]


def test_a_critic_falls_over_its_own_updates(small, ranks):
    """Neither replays nor steps in which the policy waits are among them."""
    settings = ("algorithm.name=ppo", "algorithm.plugins=[{name: pipo}]", "critic.epochs=3", "critic.warmup_steps=10")
    config = load(small[0], ["train.steps=84", "algorithm.epochs=2", *settings])
    assert ranks.run(lengths_of_schedules, 1, config) == [[100, 84 * 2 * 3]]


# ---------------------------------------------------------------- rollouts of a step, and alarms


def test_dynamic_sampling_with_a_correction_in_a_whole_run(small_config, tmp_path):
    output = tmp_path / "run"
    asked = ("rollout.max_refill_rounds=2", "rollout.over_sampling=1.5", "layout.dp=2", "train.steps=2", "data.eval=[]")
    asked += ("clipo.warmup_steps=0",)
    corrected = ("algorithm.correction.kind=mask", "algorithm.correction.level=geometric")
    SmallRun(small_config, output, *asked, *corrected).wait()
    lines = metrics(output)
    assert len(lines) == 2
    for line in lines:
        assert line["rollout/rounds"] == 1 + (line["rollout/refilled_groups"] > 0) or line["rollout/rounds"] == 3
        assert line["rollout/dropped_prompts"] + line["rollout/discarded_groups"] > 0
        assert line["reward/mixed_groups"] >= line["rollout/mixed_groups"] > 0
        assert (line["rollout/stale"], line["rollout/mixed_versions"], line["rollout/version_lag"]) == (0, 0, 0)
        assert abs(line["off_policy/importance_mean"] - 1) < 1e-3
        assert line["off_policy/mult_prob_error"] == line["policy/mult_prob_error"]


def test_an_alarm_stops_the_run_before_the_checkpoint(small_config, tmp_path):
    output = tmp_path / "run"
    limit = ("report.alarm_stops=true", "report.mult_prob_error_alarm=1.0e-9", "checkpoint.every=1", "data.eval=[]")
    run = SmallRun(small_config, output, *limit).wait(2)
    said = " ".join(run.said.split())
    assert "step 0: policy/mult_prob_error is 1" in said and "report.mult_prob_error_alarm = 1e-09" in said
    assert "before this step is saved" in said
    assert len(metrics(output)) == 1 and not (output / "checkpoints").exists()
    warned = SmallRun(small_config, output, *limit[1:], "report.alarm_stops=false", "train.steps=3").wait().said
    assert warned.count("warning: step") == 3 and (output / "checkpoints" / "step_000003").is_dir()


def test_losses_that_are_not_finite_change_nothing_and_end_the_run(small_config, tmp_path):
    output = tmp_path / "run"
    odd = ("reward.correct_reward=1.0e300", "algorithm.mini_batches=1")  # more than a float32 holds
    quick = ("checkpoint.every=1", "data.eval=[]", "clipo.enabled=false", "algorithm.kl.coefficient=0")
    run = SmallRun(small_config, output, *odd, *quick, "optimizer.skips=1").wait(2)
    said = " ".join(run.said.split())
    assert "warning: step 0: loss or gradient of the policy was not finite; 1 of its updates skipped" in said
    assert "step 1: the last 2 updates were skipped because loss or gradient was not finite (optimizer.skips" in said
    first, second = metrics(output)
    assert [first["policy/skipped_in_a_row"], second["policy/skipped_in_a_row"]] == [1.0, 2.0]
    assert first["policy/loss"] is None and second["policy/update_skipped"] == 1.0
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000001"]  # and none of step 2
    state = checkpoint_state(output, 1)
    moments = [tensor for name, tensor in state.items() if name.startswith("policy.optimizer.exp_avg")]
    assert moments and not any(moment.any() for moment in moments)


# ---------------------------------------------------------------- silence


def test_libraries_are_quiet_and_others_are_heard(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        apex = "Apex is not installed. Falling back to Torch Norm"
        for module, message in [
            ("megatron.core.models.backends", apex),
            ("somebody.else", apex),
            ("megatron.core.models.backends", "The weights are on fire"),
            ("torch.distributed.c10d_logger", "`torch.distributed.reduce_scatter_tensor` is deprecated. Please"),
            ("torch.distributed.c10d_logger", "`torch.distributed` is not what it was"),
        ]:
            warnings.warn_explicit(message, UserWarning, f"{module}.py", 1, module=module)
    assert [str(each.message) for each in heard] == [
        apex,
        "The weights are on fire",
        "`torch.distributed` is not what it was",
    ]
    assert len(NOISE) < 12


def test_a_run_says_nothing_that_is_not_its_own(undisturbed):
    (log,) = undisturbed.parent.glob("undisturbed.*.log")
    assert "Warning" not in log.read_text()
    assert json.loads((undisturbed / "config.json").read_text())["train"]["seed"] == 0
