"""Detached generations of the local engine: a thread goes on with them while the caller does other things.

Everything is computed in float64 here, so that nothing depends on how forwards are batched.
"""

from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from local_engines import bare_prompts, reference
from progress import end_of, wait_until
from tiny_models import tiny_llama, tiny_weights

from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.rollout.engine import Cancelled, EngineError, SamplingParams
from clipo_megatron.rollout.local.background import Turns
from clipo_megatron.rollout.local.engine import LocalEngine

PARAMS = SamplingParams(samples=3, max_new_tokens=12, stop_ids=tuple(range(40, 60)))
LONG = replace(PARAMS, max_new_tokens=14, stop_ids=())
PROMPTS = bare_prompts([9, 30, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def weights(folder):
    """The weights of three versions."""
    return [tiny_weights(folder, seed=seed) for seed in range(3)]


@pytest.fixture
def engine(folder, weights):
    engine = LocalEngine(folder, dtype=torch.float64, device="cpu", batch_size=7)  # two of the groups in a wave
    engine.load_weights(weights[0].items(), version=0)
    yield engine
    engine.close()
    assert not threads()


@pytest.fixture
def held_at(monkeypatch):
    """Lets threads wait before their nth forwards until somebody holds or ends them; returns how many have come.

    A thread also counts the moments between two groups as forwards.
    """
    give, came = Turns.give, itertools.count(1)

    def set_places(*places: int) -> list[int]:
        waiting: list[int] = []

        def wait_and_give(turns: Turns) -> None:
            if (place := next(came)) in places:
                waiting.append(place)
                wait_until(lambda: turns._holders or turns._ended, "somebody who holds the thread")
            give(turns)

        monkeypatch.setattr(Turns, "give", wait_and_give)
        return waiting

    return set_places


completed: list[tuple[int, str]] = []  # position of each group that a thread told of, and the name of the thread


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "local rollouts"]


def facts(groups) -> dict[tuple[str, int], tuple]:
    """Everything of each rollout, by prompt and sample."""
    return {(group.prompt.id, each.sample): _facts(each) for group in groups for each in group.rollouts}


def _facts(rollout: Rollout) -> tuple:
    numbers = (rollout.tokens.tolist(), rollout.logprobs.tolist(), rollout.versions.tolist())
    return (*numbers, rollout.text, rollout.finish)


def detached(engine: LocalEngine, params: SamplingParams, first: int = 0) -> list[RolloutGroup]:
    """Detach a generation after so many groups, which are returned."""
    generation = engine.generate(PROMPTS, params, deadline_s=60)
    groups = list(itertools.islice(generation, first))
    generation.detach(lambda group: completed.append((group.position, threading.current_thread().name)))
    return groups


@pytest.mark.parametrize("first", [0, 1])
def test_a_detached_generation_gives_what_it_would_have_given_at_once(engine, first):
    expected = list(engine.generate(PROMPTS, PARAMS, deadline_s=60))
    state, thread_count = torch.random.get_rng_state(), torch.get_num_threads()
    completed.clear()
    groups = detached(engine, PARAMS, first)
    assert len(threads()) == 1
    more = bare_prompts([5, 6, 7, 8])[3:]
    groups += engine.generate(more, PARAMS, deadline_s=60)
    assert [group.position for group in groups[:-1]] == [group.position for group in expected]
    assert facts(groups[:-1]) == facts(expected) and groups[-1].position == 3
    assert facts(groups[-1:]) == facts(engine.generate(more, PARAMS, deadline_s=60))
    by_thread = expected[2 * first :]  # groups of a wave that run into the limit are complete with the same token
    assert completed == [(group.position, "local rollouts") for group in by_thread], "not the one that was sent later"
    assert not threads(), "a thread without requests ends"
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == thread_count


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_before_an_update_are_of_old_weights_and_those_after_it_of_new_ones(
    engine, folder, weights, held_at, temperature
):
    params = replace(LONG, temperature=temperature)
    waiting = held_at(6, 13)  # both in the first wave
    detached(engine, params)
    for version in (1, 2):
        wait_until(lambda version=version: len(waiting) == version, "the thread")
        engine.load_weights(weights[version].items(), version=version)
        assert engine.version == version
    groups = list(engine.generate([], params, deadline_s=60))
    models = [reference(folder).double() for _ in weights]
    for model, tensors in zip(models, weights, strict=True):
        model.load_state_dict(tensors, strict=False)
        model.tie_weights()
    seen: set[tuple[int, ...]] = set()
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.tokens.numel() == 14 == rollout.versions.numel() and (rollout.versions.diff() >= 0).all()
            seen.add(tuple(rollout.versions.unique().tolist()))
            whole, start = torch.cat((group.prompt.tokens, rollout.tokens))[None], group.prompt.tokens.numel() - 1
            with torch.no_grad():
                plain = torch.stack([model(whole).logits[0, start:-1].log_softmax(-1) for model in models])
            of_version = plain[rollout.versions, torch.arange(14)]
            expected = of_version.gather(1, rollout.tokens[:, None])[:, 0].float()
            torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-6)
            assert temperature or of_version.argmax(-1).equal(rollout.tokens)
    assert seen == {(0, 1, 2), (2,)}, "some rollouts cross both updates, some begin after them"


def test_an_update_to_equal_weights_changes_no_token(engine, weights, held_at):
    expected = facts(engine.generate(PROMPTS, PARAMS, deadline_s=60))
    waiting = held_at(4, 9)
    detached(engine, PARAMS)
    for version in (1, 2):
        wait_until(lambda version=version: len(waiting) == version, "the thread")
        engine.load_weights(weights[0].items(), version=version)
    found = facts(engine.generate([], PARAMS, deadline_s=60))
    assert {name: each[0] for name, each in found.items()} == {name: each[0] for name, each in expected.items()}
    assert {name: each[3:] for name, each in found.items()} == {name: each[3:] for name, each in expected.items()}
    assert any(len(set(each[2])) > 1 for each in found.values())


@pytest.mark.parametrize("batch_size", [7, 2], ids=["two-groups-a-wave", "a-group-in-two-batches"])
@pytest.mark.parametrize("place", [1, 3, 8, 15, 20, 30])
def test_what_is_stopped_has_its_tokens_and_goes_on(folder, weights, held_at, place, batch_size):
    engine = LocalEngine(folder, dtype=torch.float64, device="cpu", batch_size=batch_size)
    engine.load_weights(weights[0].items(), version=0)
    params = replace(LONG, temperature=0.0)
    expected = facts(engine.generate(PROMPTS, params, deadline_s=60))
    waiting = held_at(place)
    generation = engine.generate(PROMPTS, params, deadline_s=60)
    generation.detach()
    wait_until(lambda: waiting, "the thread")
    partial = {group.position: group for group in generation.stop()}
    assert not threads() and generation.stop() == [] and list(generation) == []
    found = facts(partial.values())
    assert bool(found) == (place > 4)
    for name, (tokens, logprobs, _, _, finish) in found.items():
        assert finish == ("length" if len(tokens) == 14 else "abort") and tokens
        assert (tokens, logprobs) == tuple(each[: len(tokens)] for each in expected[name][:2])
    again = [
        each._replace(begun=tuple(partial[each.position].rollouts)) if each.position in partial else each
        for each in PROMPTS
    ]
    whole = facts(engine.generate(again, params, deadline_s=60))
    assert {name: each[0] for name, each in whole.items()} == {name: each[0] for name, each in expected.items()}
    engine.close()


def test_a_generation_that_is_not_detached_stops_with_what_it_has(engine):
    generation = engine.generate(PROMPTS, LONG, deadline_s=60)
    assert generation.stop() == [] and list(generation) == []
    generation = engine.generate(PROMPTS, LONG, deadline_s=60)
    first = next(generation)
    (complete,) = generation.stop()  # of the same wave; the other request has not begun
    assert {first.position, complete.position} == {0, 1} and not threads()


def test_a_paused_thread_waits_until_it_is_resumed(engine, held_at):
    waiting = held_at(5)
    detached(engine, LONG)
    wait_until(lambda: waiting, "the thread")
    engine.pause()
    engine.pause()
    with pytest.raises(EngineError, match=r"deadline of 1 s; without an answer: bare/0, bare/1, bare/2"):
        list(engine.generate([], LONG, deadline_s=1))
    detached(engine, LONG)
    engine.resume()
    assert len(list(engine.generate([], LONG, deadline_s=60))) == 3


def test_weights_that_do_not_fit_let_the_thread_wait_for_others(engine, weights, held_at):
    waiting = held_at(5)
    detached(engine, LONG)
    wait_until(lambda: waiting, "the thread")
    with pytest.raises(EngineError, match="never came"):
        engine.load_weights(list(weights[1].items())[1:], version=1)
    engine.load_weights(weights[1].items(), version=2)
    found = facts(engine.generate([], LONG, deadline_s=60))
    assert {version for each in found.values() for version in each[2]} == {0, 2}


def test_errors_of_the_thread_reach_the_next_caller_and_name_all_prompts(engine, weights, held_at):
    broken = {name: tensor.clone() for name, tensor in weights[1].items()}
    broken["model.norm.weight"][3] = float("nan")
    waiting = held_at(5)
    detached(engine, LONG)
    wait_until(lambda: waiting, "the thread")
    engine.load_weights(broken.items(), version=1)
    new = [each._replace(position=9) for each in bare_prompts([5, 6, 7, 8])[3:]]
    with pytest.raises(EngineError, match=r"version 1 give log-probs that are not finite.*bare/0, bare/1, .*bare/3"):
        list(engine.generate(new, LONG, deadline_s=60))
    assert not threads()

    engine.load_weights(weights[0].items(), version=2)
    hook = engine._model.get_input_embeddings().register_forward_pre_hook(_fail)
    generation = engine.generate(PROMPTS, LONG, deadline_s=60)
    generation.detach()
    wait_until(lambda: not threads(), "the thread to fail")
    with pytest.raises(EngineError, match="upside down"):
        generation.stop()
    hook.remove()
    assert len(list(engine.generate(PROMPTS, LONG, deadline_s=60))) == 3


def _fail(*_: object) -> None:
    raise RuntimeError("the disk is upside down")


@pytest.mark.parametrize("how", ["close", "forget", "cancel", "interrupt", "engine"])
def test_no_thread_outlives_its_generation_or_its_engine(folder, weights, held_at, how):
    engine = LocalEngine(folder, dtype=torch.float64, device="cpu")
    engine.load_weights(weights[0].items(), version=0)
    waiting = held_at(5)
    generation = engine.generate(PROMPTS, LONG, deadline_s=60)
    generation.detach()
    wait_until(lambda: waiting, "the thread")
    if how == "close":
        generation.close()
    elif how == "engine":
        del engine, generation
        gc.collect()
    elif how == "forget":
        engine.generate([], LONG, deadline_s=60)  # takes it over, and is not detached
        assert len(list(engine.generate(PROMPTS[:1], LONG, deadline_s=60))) == 1
    else:
        interrupted = {"cancel": Cancelled, "interrupt": KeyboardInterrupt}[how]
        with pytest.raises(interrupted):
            list(engine.generate([], LONG, deadline_s=60, should_cancel=lambda: how == "cancel" or _interrupt()))
    assert not threads()


def _interrupt() -> bool:
    raise KeyboardInterrupt


PROGRAM = """
import sys, time, torch
from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from safetensors.torch import load_file
engine = LocalEngine(sys.argv[1], dtype=torch.float32, device="cpu")
engine.load_weights(load_file(sys.argv[1] + "/model.safetensors").items(), version=0)
request = Request(0, Prompt("p/0", (), torch.arange(3, 9), "p", ""))
generation = engine.generate([request], SamplingParams(max_new_tokens=2000), deadline_s=9e9)
generation.detach()
print("runs", flush=True)
if sys.argv[2] == "interrupt":
    list(engine.generate([], SamplingParams(), deadline_s=9e9)), time.sleep(9e9)
"""


@pytest.mark.parametrize("how", [pytest.param("exit", marks=pytest.mark.full), "interrupt"])
def test_a_process_ends_while_a_thread_decodes(folder, how):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "runs\n", process.stderr.read()
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    assert (end_of(process) == 0) == (how == "exit")
    said = process.stderr.read()
    assert ("KeyboardInterrupt" in said) == (how == "interrupt") and "Fatal" not in said
