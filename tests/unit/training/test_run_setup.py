"""The problems a run trains and evaluates on, its number of updates, stop signals and hidden warnings."""

import json
import signal
import sys
import warnings

import pytest
from small_runs import write_config, write_model

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.checkpoint import CheckpointError
from clipo_megatron.config.load import load
from clipo_megatron.data.sources import DataError, question_key
from clipo_megatron.data.splits import ProblemSets
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.runtime.stop_requests import StopRequests
from clipo_megatron.runtime.warning_filters import NOISE, quiet_libraries
from clipo_megatron.training.eval_run import steps_of
from clipo_megatron.training.run import policy_updates
from clipo_megatron.training.stop_signal import TERM_GRACE_S, StopSignal
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config


def test_the_grace_period_after_sigterm_is_shorter(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for signum, patience in ((signal.SIGUSR1, 60.0), (signal.SIGINT, 60.0), (signal.SIGTERM, TERM_GRACE_S)):
        for other in (False, True):
            requests = StopRequests()
            stop = StopSignal(announce=False, grace_period_s=60.0, requests=requests)
            now = 1000.0
            assert not stop.should_cancel()
            stop.set_by_other_rank(signum) if other else requests.note(signum)
            now += patience - 0.1
            assert not stop.should_cancel()
            requests.note(signum)  # what another rank got as well is no second signal
            now += 0.1
            assert stop.should_cancel() and stop.repeated is not other


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    file = write_config(folder, write_model(folder / "model"))
    return file, load_tokenizer(folder / "model")


def problems(small, *overrides):
    said = []
    config, tokenizer = load(small[0], overrides), small[1]
    sets = ProblemSets(config, tokenizer, said.append)
    held_out = sets.held_out()
    return sets.training(held_out), held_out, said


def in_both(train, held_out):
    """How many training problems are also held out."""
    questions = {question_key(prompt.messages) for prompt in held_out}
    return sum(question_key(prompt.messages) in questions for prompt in train)


def test_no_evaluation_problem_is_trained_on(small):
    train, held_out, said = problems(small)
    assert (len(train), len(held_out), in_both(train, held_out)) == (10, 6, 0)
    assert said == [
        "2 of 8 evaluation problems of exam repeat others and are left out: a paired test counts each problem once",
        "2 of 12 training problems are also evaluation problems and are left out (data.hold_out)",
    ]
    assert [prompt.id for prompt in held_out] == [f"exam/{row}" for row in range(6)]


def test_holding_out_can_be_switched_off(small):
    train, held_out, said = problems(small, "data.hold_out=false")
    assert (len(train), in_both(train, held_out)) == (12, 2)
    assert len(said) == 1


def test_no_problem_left_to_train_on_is_an_error(small):
    path = load(small[0], []).data.train[0].path
    with pytest.raises(DataError, match=r"all 12 training problems.*data\.hold_out=false"):
        problems(small, f"data.eval=[{{path: {path}, name: same}}]")


def test_without_evaluation_nothing_is_held_out(small):
    train, held_out, said = problems(small, "data.eval=[]")
    assert (len(train), held_out, said) == (12, None, [])


def test_long_prompts_are_counted(small):
    train, *_ = problems(small, "data.eval=[]")
    lengths = sorted(prompt.tokens.numel() for prompt in train)
    limit = lengths[0]
    longer = sum(length > limit for length in lengths)
    assert longer  # else the test shows nothing
    kept, _, said = problems(small, f"data.max_prompt_tokens={limit}", "data.eval=[]")
    assert len(kept) == len(train) - longer
    assert said == [
        f"{longer} of {len(train)} training prompts are longer than data.max_prompt_tokens = {limit} and are left out"
    ]


def test_a_checkpoint_of_another_model_is_not_evaluated(small, tmp_path):
    """Weights of the same shapes would be loaded without a word."""
    config = load(small[0], [])
    facts = model_spec(read_config(config.model.path)).architecture()
    for model, step in ((facts, 7), ({}, 8), (None, 9)):  # older checkpoints say less
        (tmp_path / "manifest.json").write_text(json.dumps({"step": step, "model": model, "files": {}}))
        assert steps_of(tmp_path, config) == step
    (tmp_path / "manifest.json").write_text(
        json.dumps({"step": 7, "model": {**facts, "norm epsilon": 0.5}, "files": {}})
    )
    with pytest.raises(CheckpointError, match=r"no checkpoint of model.path = .*norm epsilon 0.5 in place of"):
        steps_of(tmp_path, config)


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
def test_updates_are_counted_in_the_steps_in_which_the_policy_learns(small, overrides, expected):
    plugins = [f"algorithm.{each}" if each.startswith("plugins") else each for each in overrides]
    config = load(small[0], ["train.steps=84", "algorithm.kl.coefficient=0", *plugins])
    algorithm, learned = build_algorithm(config), 0
    for _ in range(config.train.steps):
        learned += algorithm.policy_learns
        algorithm.after_update(None, learned=False)
    per_step = config.algorithm.epochs * config.algorithm.mini_batches * (1 + algorithm.replays)
    assert policy_updates(config, algorithm) == learned * per_step == expected


def test_warnings_of_libraries_are_hidden_and_others_are_shown(monkeypatch):
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
