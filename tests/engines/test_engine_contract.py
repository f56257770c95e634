"""The engine contract, one set of tests for the local engine and for real SGLang and vLLM servers, all in fp32."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from engine_requests import ask, expected_logprobs, new_engine, run
from safetensors.torch import load_file
from tiny_models import EOS, tiny_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipo_megatron.config.schema import EngineKind
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rollout.engine import Engine, EngineError, InFlight, Memory, Request, SamplingParams
from clipo_megatron.training.partial_rollouts import continuations

# Of a log-prob between two programs that compute in fp32: their sums run in other orders.
NEAR = {"rtol": 0, "atol": 5e-4}
PARAMS = SamplingParams(samples=3, max_new_tokens=12, stop_ids=(EOS,))
VERSIONS = itertools.count(1)


@pytest.fixture(scope="module", params=[kind.value for kind in EngineKind])
def make(request, servers, tiny_model) -> Iterator[Callable[[], Engine]]:
    """Makes engines of one kind; servers are shared, so a new engine may find other weights."""
    made: list[Engine] = []

    def make_one() -> Engine:
        made.append(new_engine(request.param, tiny_model, servers))
        return made[-1]

    make_one.kind = request.param
    yield make_one
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def only(make) -> Engine:
    """The module's engine of that kind."""
    return make()


@pytest.fixture(scope="module")
def weights(tiny_model) -> dict[str, torch.Tensor]:
    return load_file(tiny_model / "model.safetensors")


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def engine(only, weights) -> Engine:
    """Loads the model's weights under a new version."""
    only.load_weights(weights.items(), version=next(VERSIONS))
    return only


# --- what a rollout is ---


def test_a_group_has_all_samples_in_order_with_tokens_log_probs_versions_and_text(engine, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    requests = ask(9, 1, 80, 30, 9)  # 80: long enough to be prefilled by itself
    params = dataclasses.replace(PARAMS, stop_ids=(EOS, *range(40, 60)))
    groups = run(engine, requests, params)
    for request, group in zip(requests, groups, strict=True):
        assert group.prompt is request.prompt
        assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2]
        assert len({tuple(rollout.tokens.tolist()) for rollout in group.rollouts}) > 1, "samples are drawn alike"
        for rollout in group.rollouts:
            assert rollout.tokens.dtype == rollout.versions.dtype == torch.int64
            assert rollout.logprobs.dtype == torch.float32
            assert rollout.tokens.shape == rollout.logprobs.shape == rollout.versions.shape
            assert rollout.tokens.ndim == 1 and 1 <= rollout.tokens.numel() <= 12
            assert set(rollout.versions.tolist()) == {engine.version} == {rollout.version}
            assert rollout.text == tokenizer.decode(rollout.tokens, skip_special_tokens=True)
            assert rollout.finish == ("stop" if int(rollout.tokens[-1]) in params.stop_ids else "length")
            assert rollout.finish == "stop" or rollout.tokens.numel() == params.max_new_tokens


def test_a_stop_token_is_included_and_nothing_follows_it(engine):
    stop = {EOS, *range(30, 120)}  # SGLang ends at the model's own end-of-text token in any case
    params = dataclasses.replace(PARAMS, samples=8, max_new_tokens=30, stop_ids=tuple(sorted(stop)))
    ends = set()
    for group in run(engine, ask(5, 6), params):
        for rollout in group.rollouts:
            tokens = rollout.tokens.tolist()
            assert not stop & set(tokens[:-1])
            assert (tokens[-1] in stop) == (rollout.finish == "stop")
            if rollout.finish == "stop":
                ends.add(tokens[-1])
    assert len(ends) > 1


@pytest.mark.parametrize("most", [1, 2, 40])
def test_there_are_as_many_tokens_as_asked_for_where_nothing_stops(engine, most):
    params = dataclasses.replace(PARAMS, max_new_tokens=most, stop_ids=())
    (group,) = run(engine, ask(7), params)
    assert [(rollout.tokens.numel(), rollout.finish) for rollout in group.rollouts] == [(most, "length")] * 3


def test_text_keeps_a_stop_token_that_is_no_special_one(engine, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    params = dataclasses.replace(PARAMS, samples=6, stop_ids=(EOS, *range(3, 200)))
    (group,) = run(engine, ask(7), params)
    stopped = [rollout for rollout in group.rollouts if rollout.finish == "stop"]
    assert any(int(rollout.tokens[-1]) != EOS for rollout in stopped)
    for rollout in stopped:
        assert rollout.text == tokenizer.decode(rollout.tokens, skip_special_tokens=True)


# --- log-probs and draws ---


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_log_probs_are_those_of_a_plain_forward(engine, model, temperature):
    for group in run(engine, ask(9, 1, 80), dataclasses.replace(PARAMS, temperature=temperature)):
        for rollout in group.rollouts:
            expected = expected_logprobs(model, group.prompt.tokens, rollout.tokens, temperature)
            chosen = expected.gather(1, rollout.tokens[:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, chosen, **NEAR)


@pytest.mark.parametrize("truncation", [{"top_p": 0.6, "top_k": 64}, {"top_k": 5}, {"top_p": 0.6, "top_k": 5}], ids=str)
def test_supports_are_those_of_top_p_and_top_k_and_log_probs_are_over_them(make, engine, model, truncation):
    """The likeliest tokens, as few of them as have the share top_p, and at most top_k.

    SGLang takes top_p of the whole probability where the others take it of what top_k keeps.
    """
    params = dataclasses.replace(PARAMS, temperature=0.3, samples=6, **truncation)
    sizes, near = set(), 1e-4
    for group in run(engine, ask(9, 4), params):
        for rollout in group.rollouts:
            probs = expected_logprobs(model, group.prompt.tokens, rollout.tokens, params.temperature).double().exp()
            assert rollout.support.dtype == torch.int32 and len(rollout.support) == rollout.tokens.numel()
            for token, logprob, row, own in zip(
                rollout.tokens.tolist(), rollout.logprobs.tolist(), rollout.support, probs, strict=True
            ):
                kept = row[row >= 0].long()
                last, mass = float(own[kept].min()), float(own[kept].sum())
                wanted = params.top_p * (1.0 if make.kind == "sglang" else float(own.topk(params.top_k).values.sum()))
                assert token in kept and len(set(kept.tolist())) == len(kept) <= params.top_k
                assert float(own.index_fill(0, kept, 0.0).max()) < last + near, "the likeliest ones"
                assert mass - last < wanted + near, "no more than needed"
                assert mass > wanted - near or len(kept) == params.top_k, "no fewer"
                assert abs(logprob - float((own[token] / mass).log())) < 5e-4
                sizes.add(len(kept))
    assert len(sizes) > 1 or params.top_p == 1


def test_greedy_tokens_are_the_likeliest_with_log_probs_of_temperature_1(engine, model):
    params = dataclasses.replace(PARAMS, samples=1, temperature=0.0, max_new_tokens=24)
    for group in run(engine, ask(9, 1, 80, 33, 20, 64, 2, 5), params):
        (rollout,) = group.rollouts
        expected = expected_logprobs(model, group.prompt.tokens, rollout.tokens, 1.0)
        chosen = expected.gather(1, rollout.tokens[:, None])[:, 0]
        assert (chosen >= expected.max(-1).values - 1e-3).all()  # the likeliest, but for ties
        torch.testing.assert_close(rollout.logprobs, chosen, **NEAR)


def test_frequencies_follow_the_model(engine, model):
    count, temperature = 1000, 0.6
    params = SamplingParams(samples=count, max_new_tokens=1, temperature=temperature)
    (group,) = run(engine, ask(6), params)
    probs = expected_logprobs(model, group.prompt.tokens, torch.tensor([0]), temperature)[0].double().exp()
    likeliest = probs.topk(11).indices
    drawn = torch.tensor([int(rollout.tokens[0]) for rollout in group.rollouts])
    observed = torch.tensor([int((drawn == token).sum()) for token in likeliest], dtype=torch.float64)
    expected = probs[likeliest] * count
    observed = torch.cat((observed, count - observed.sum()[None]))
    expected = torch.cat((expected, count - expected.sum()[None]))
    assert (expected > 4).all()
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < 50  # chi-square, 11 degrees of freedom, p = 6e-7: servers draw without a seed


# --- weights ---


def test_new_weights_change_what_is_generated_and_every_token_says_so(engine, tiny_model, weights):
    params = dataclasses.replace(PARAMS, samples=1, temperature=0.0)
    before = run(engine, ask(9, 20, 80), params)
    other = tiny_weights(tiny_model, seed=77)
    version = next(VERSIONS)
    engine.load_weights(other.items(), version=version)
    assert engine.version == version
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.load_state_dict(other)
    for old, new in zip(before, run(engine, ask(9, 20, 80), params), strict=True):
        rollout: Rollout = new.rollouts[0]
        assert rollout.tokens.tolist() != old.rollouts[0].tokens.tolist()
        assert set(rollout.versions.tolist()) == {version}
        expected = expected_logprobs(model, new.prompt.tokens, rollout.tokens, 1.0)
        torch.testing.assert_close(rollout.logprobs, expected.gather(1, rollout.tokens[:, None])[:, 0], **NEAR)
    engine.load_weights(weights.items(), version=next(VERSIONS))
    for old, again in zip(before, run(engine, ask(9, 20, 80), params), strict=True):
        torch.testing.assert_close(again.rollouts[0].logprobs, old.rollouts[0].logprobs, **NEAR)


def test_weights_that_do_not_fit_are_refused_by_name(engine, weights):
    wrong = {name: tensor for name, tensor in weights.items() if "layers.2.mlp.up" not in name}
    wrong["model.extra.weight"] = torch.zeros(2)
    with pytest.raises(EngineError, match=r"model\.extra\.weight") as caught:
        engine.load_weights(wrong.items(), version=next(VERSIONS))
    assert "model.layers.2.mlp.up_proj.weight" in str(caught.value)


# --- deadlines, interruptions, pauses ---


def test_a_missed_deadline_names_the_prompts(engine):
    params = dataclasses.replace(PARAMS, samples=16, max_new_tokens=1000, stop_ids=())
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"deadline of 1 s.*without an answer: .*math/0.*and 2 more"):
        list(engine.generate(ask(*[9] * 10), params, deadline_s=1))
    assert time.monotonic() - begun < 60
    run(engine, ask(9), PARAMS)


@pytest.mark.parametrize("how", ["stop", "close", "forget"])
def test_a_generation_ended_early_leaves_the_engine_usable(engine, how):
    params = dataclasses.replace(PARAMS, max_new_tokens=600, stop_ids=())
    generation = engine.generate([*ask(9, 9), *ask(9, first=2)], params, deadline_s=100)
    time.sleep(0.5)
    if how != "forget":
        found = getattr(generation, how)()
        assert all(1 <= rollout.tokens.numel() <= 600 for group in found or () for rollout in group.rollouts)
        assert list(generation) == []
        generation.close()
    begun = time.monotonic()
    run(engine, ask(9, 20), PARAMS)
    assert time.monotonic() - begun < 90


def test_what_was_stopped_goes_on_from_its_tokens(make, engine, model):
    params = dataclasses.replace(PARAMS, max_new_tokens=1000, stop_ids=())
    # A server's first request of a kind may take its time on a busy machine; the local engine could be done after 2 s.
    for seconds in (2.0, 10.0) if make.kind != "local" else (0.05, 0.2, 1.0, 5.0):
        generation = engine.generate(ask(9, 30), params, deadline_s=100)
        generation.detach()  # without it the local engine generates only while its caller waits
        time.sleep(seconds)
        if partial := sorted(generation.stop(), key=lambda group: group.position):
            break
    assert [group.position for group in partial] == [0, 1]
    most = max(rollout.tokens.numel() for group in partial for rollout in group.rollouts) + 6
    again = [Request(group.position, group.prompt, tuple(group.rollouts)) for group in partial]
    for before, after in zip(
        partial, run(engine, again, dataclasses.replace(params, max_new_tokens=most)), strict=True
    ):
        for old, rollout in zip(before.rollouts, after.rollouts, strict=True):
            assert old.finish == "abort"
            assert rollout.tokens.numel() == most and rollout.finish == "length" and rollout.sample == old.sample
            assert rollout.tokens[: old.tokens.numel()].equal(old.tokens)
            expected = expected_logprobs(model, after.prompt.tokens, rollout.tokens, 1.0)
            torch.testing.assert_close(rollout.logprobs, expected.gather(1, rollout.tokens[:, None])[:, 0], **NEAR)


def test_detached_rollouts_cross_an_update_and_every_token_is_of_the_weights_that_it_names(
    engine, model, weights, tiny_model
):
    """Greedy tokens are the likeliest of the weights that they name, and so are their log-probs: of what was computed
    under the old weights nothing is used under the new ones."""
    new_weights = tiny_weights(tiny_model, seed=77)
    new = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    new.load_state_dict(new_weights)
    params = dataclasses.replace(PARAMS, samples=1, temperature=0.0, max_new_tokens=120, stop_ids=())
    run(engine, ask(9, 80), dataclasses.replace(params, max_new_tokens=2))
    start = time.monotonic()
    run(engine, ask(9, 80), dataclasses.replace(params, max_new_tokens=20))
    pace = (time.monotonic() - start) / 20
    for tokens in (40, 20, 60, 10, 80):  # until the update comes after the first token and before the last
        old_version, version = engine.version, next(VERSIONS)
        generation = engine.generate(ask(9, 80), params, deadline_s=1000)
        generation.detach()
        time.sleep(tokens * pace)
        engine.pause(InFlight.retract)
        engine.load_weights(new_weights.items(), version=version)
        engine.resume()
        groups = list(engine.generate(ask(9, first=2), params, deadline_s=1000))
        assert sorted(group.position for group in groups) == [0, 1, 2]
        detached = [(group, each) for group in groups if group.position < 2 for each in group.rollouts]
        if all(set(rollout.versions.tolist()) == {old_version, version} for _, rollout in detached):
            break
        engine.load_weights(weights.items(), version=next(VERSIONS))
    else:
        pytest.fail(f"no update came in the middle: {[each.versions.unique().tolist() for _, each in detached]}")
    for group, rollout in detached:
        assert rollout.tokens.numel() == 120 and (rollout.versions.diff() >= 0).all()
        for policy, mine in ((model, rollout.versions == old_version), (new, rollout.versions == version)):
            expected = expected_logprobs(policy, group.prompt.tokens, rollout.tokens, 1.0)[mine]
            chosen = expected.gather(1, rollout.tokens[mine][:, None])[:, 0]
            assert (chosen >= expected.max(-1).values - 1e-3).all()
            torch.testing.assert_close(rollout.logprobs[mine], chosen, **NEAR)


def test_responses_grow_in_windows_under_newer_weights(make, engine, model, weights):
    params = dataclasses.replace(PARAMS, max_new_tokens=11, window_tokens=4, stop_ids=())
    requests, before = ask(9, 30), {}
    for window, length in enumerate((4, 8, 11)):
        groups = run(engine, requests, dataclasses.replace(params, step=window))
        assert [group.position for group in groups] == [0, 1]
        for group in groups:
            assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2]
            for rollout in group.rollouts:
                assert (rollout.tokens.numel(), rollout.trained) == (length, 4 * window)
                assert rollout.finish == ("window" if window < 2 else "length")
                old = before.get((group.position, rollout.sample), rollout.tokens[:0])
                assert rollout.tokens[: old.numel()].equal(old)
                assert set(rollout.versions[4 * window :].tolist()) == {engine.version}
                before[group.position, rollout.sample] = rollout.tokens
                expected = expected_logprobs(model, group.prompt.tokens, rollout.tokens, 1.0)
                torch.testing.assert_close(rollout.logprobs, expected.gather(1, rollout.tokens[:, None])[:, 0], **NEAR)
        requests = continuations(groups)
        engine.load_weights(weights.items(), version=next(VERSIONS))
    assert requests == []


@pytest.mark.parametrize("in_flight", list(InFlight))
def test_a_paused_engine_generates_when_it_is_resumed(make, engine, in_flight):
    groups: list[RolloutGroup] = []
    thread = threading.Thread(target=lambda: groups.extend(run(engine, ask(9, 9), PARAMS)))
    engine.pause(in_flight)
    engine.pause(in_flight)
    try:
        thread.start()
        if make.kind != "local":  # the local one generates while its caller waits for it, and at no other time
            thread.join(2.0)
            assert thread.is_alive() and not groups
    finally:
        engine.resume()
        engine.resume()
    thread.join(60)
    assert len(groups) == 2


# --- memory, health, end ---


def test_memory_calls_are_harmless_where_there_is_no_gpu(make, engine, weights):
    for call in (engine.offload, engine.onload):
        for what in ((Memory.kv_cache,), (Memory.weights, Memory.kv_cache)):
            for _ in range(2):
                try:
                    call(*what)
                except EngineError as error:
                    assert make.kind != "local", error
    engine.load_weights(weights.items(), version=next(VERSIONS))
    run(engine, ask(9), PARAMS)


def test_health_says_whether_it_can_serve(engine, make):
    engine.health()
    fresh = make()
    assert fresh.version == -1
    with pytest.raises(EngineError, match="weights"):
        fresh.health()
    fresh.close()
    engine.health()


def test_a_closed_engine_stays_closed(engine, make, weights):
    other = make()
    other.load_weights(weights.items(), version=next(VERSIONS))
    run(other, ask(9), PARAMS)
    other.close()
    other.close()
    for call in (
        other.health,
        lambda: other.generate(ask(9), PARAMS, deadline_s=10),
        lambda: other.load_weights(weights.items(), version=1),
    ):
        with pytest.raises(EngineError, match="closed"):
            call()


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_parameters_that_cannot_be_are_refused_at_once(engine, wrong):
    with pytest.raises(EngineError, match=next(iter(wrong))):
        engine.generate(ask(9), dataclasses.replace(PARAMS, **wrong), deadline_s=10)


@pytest.mark.parametrize("tokens", [[], [259], [-1]])
def test_prompts_that_cannot_be_are_refused_at_once(engine, tokens):
    bad = Request(0, Prompt("math/bad", (), torch.tensor(tokens, dtype=torch.int64), "math", ""))
    with pytest.raises(EngineError, match="math/bad"):
        engine.generate([bad], PARAMS, deadline_s=10)
    run(engine, ask(9), PARAMS)
