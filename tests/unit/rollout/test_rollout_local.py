"""The local engine against transformers: one sequence at a time, in fp32, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from local_engines import TEXTS, alone, bare_prompts, by_prompt, chat_prompts, engine_of, reference, run
from tiny_models import EOS, tiny_llama
from transformers import AutoTokenizer

from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import EngineError, Request, SamplingParams
from clipo_megatron.rollout.local import decoding

# --- log-probs and greedy decoding ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-prefix", "nothing-shared"])
def test_logprobs_agree_with_a_plain_forward_of_each_sequence(folder, shared, temperature):
    prompts = chat_prompts(folder, TEXTS) if shared else bare_prompts([9, 1, 30, 9, 2])
    assert (decoding.shared_prefix([prompt.tokens for _, prompt, _ in prompts]) > 0) == shared
    model = reference(folder)
    groups = run(
        engine_of(folder), prompts, samples=3, max_new_tokens=12, temperature=temperature, stop_ids=(EOS, 50, 60, 70)
    )
    assert sorted(group.position for group in groups) == list(range(len(prompts)))
    for group in groups:
        assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2]
        for rollout in group.rollouts:
            expected = alone(model, group.prompt.tokens, rollout.tokens, temperature)
            assert rollout.logprobs.dtype == torch.float32 and rollout.tokens.dtype == torch.int64
            torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_a_prefill_in_several_forwards_changes_nothing(llama, monkeypatch):
    prompts = chat_prompts(llama, TEXTS)
    engine = engine_of(llama)
    params = {"samples": 2, "max_new_tokens": 8}
    whole = by_prompt(run(engine, prompts, **params))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 30)
    assert by_prompt(run(engine, prompts, **params)) == whole


def test_a_cache_that_outgrows_its_first_room_changes_nothing(llama):
    prompts = bare_prompts([5, 3])
    model = reference(llama)
    for group in run(engine_of(llama), prompts, samples=2, max_new_tokens=150):
        for rollout in group.rollouts:
            assert rollout.tokens.numel() == 150
            expected = alone(model, group.prompt.tokens, rollout.tokens, 1.0)
            torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_memory_that_was_never_written_is_never_read(llama, monkeypatch):
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 30)  # parts of different widths, so gaps in the cache
    prompts, engine = chat_prompts(llama, TEXTS), engine_of(llama)
    params = {"samples": 3, "max_new_tokens": 12, "stop_ids": tuple(range(40, 60))}
    expected = by_prompt(run(engine, prompts, **params))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(1).isnan()
        assert by_prompt(run(engine, prompts, **params)) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_greedy_equals_generate(folder):
    prompts = chat_prompts(folder, TEXTS)
    model = reference(folder)
    stop = (EOS, 101)
    groups = run(engine_of(folder), prompts, max_new_tokens=20, temperature=0.0, stop_ids=stop)
    assert len(groups) == len(prompts)
    for group in groups:
        prompt, rollout = group.prompt.tokens, group.rollouts[0]
        expected = model.generate(prompt[None], do_sample=False, max_new_tokens=20, eos_token_id=list(stop))[0]
        assert rollout.tokens.tolist() == expected[prompt.numel() :].tolist()
        torch.testing.assert_close(rollout.logprobs, alone(model, prompt, rollout.tokens, 1.0), rtol=0, atol=1e-5)


def test_text_is_decoded_without_special_tokens(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for group in run(engine_of(llama), bare_prompts([4]), samples=8, max_new_tokens=40, temperature=1.5):
        for rollout in group.rollouts:
            assert rollout.text == tokenizer.decode(rollout.tokens[rollout.tokens > 2])
    assert any((rollout.tokens <= 2).any() for rollout in group.rollouts), (
        "no special token was drawn: test says nothing"
    )


def test_bf16_runs_and_stays_near_fp32(llama):
    model, errors = reference(llama), []
    for group in run(engine_of(llama, dtype=torch.bfloat16), chat_prompts(llama, TEXTS), samples=4, max_new_tokens=8):
        for rollout in group.rollouts:
            assert rollout.logprobs.dtype == torch.float32
            errors.append(rollout.logprobs - alone(model, group.prompt.tokens, rollout.tokens, 1.0))
    assert torch.cat(errors).abs().mean() < 0.1


# --- sampling ---


def test_frequencies_follow_the_model(tmp_path):
    folder = tiny_llama(tmp_path, vocab=12, layers=1)
    prompt = bare_prompts([6], vocab=12)
    count, temperature = 4000, 1.3
    (group,) = run(engine_of(folder), prompt, samples=count, max_new_tokens=1, temperature=temperature)
    with torch.no_grad():
        logits = reference(folder)(prompt[0][1].tokens[None]).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1) * count
    counts = torch.zeros(12, dtype=torch.float64)
    for rollout in group.rollouts:
        counts[rollout.tokens[0]] += 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 31.3  # chi-square, 11 degrees of freedom, p = 0.001


def test_samples_depend_on_nothing_but_seed_step_prompt_and_sample(folder):
    prompts = chat_prompts(folder, TEXTS)
    params = {"samples": 5, "max_new_tokens": 16, "seed": 3, "step": 4, "stop_ids": (EOS, 50, 60, 70, 80, 90)}
    expected = by_prompt(run(engine_of(folder, batch_size=64), prompts, **params))
    assert len({len(tokens) for group in expected.values() for tokens in group}) > 2, (
        "rows should end at various lengths"
    )
    small = engine_of(folder, batch_size=3)
    assert by_prompt(run(small, prompts, **params)) == expected
    assert by_prompt(run(small, prompts[::-1], **params)) == expected
    assert by_prompt(run(engine_of(folder, batch_size=11), prompts[2:4], **params)) == {
        prompt.id: expected[prompt.id] for _, prompt, _ in prompts[2:4]
    }


def test_a_longer_budget_extends_the_same_responses(llama):
    prompts, engine = bare_prompts([5, 8]), engine_of(llama)
    short = by_prompt(run(engine, prompts, samples=2, max_new_tokens=6))
    long = by_prompt(run(engine, prompts, samples=2, max_new_tokens=12))
    assert {name: [tokens[:6] for tokens in group] for name, group in long.items()} == short


def test_seed_step_prompt_and_sample_each_change_the_draw(llama):
    engine = engine_of(llama)
    prompt = bare_prompts([6])
    twin = [Request(0, Prompt("another", (), prompt[0][1].tokens, "test", ""))]
    variants = [
        run(engine, prompts, samples=2, max_new_tokens=16, seed=seed, step=step)[0].rollouts
        for prompts, seed, step in [(prompt, 0, 0), (prompt, 1, 0), (prompt, 0, 1), (twin, 0, 0)]
    ]
    responses = {tuple(rollout.tokens.tolist()) for rollouts in variants for rollout in rollouts}
    assert len(responses) == 8


def test_truncation_reaches_the_engine_and_logprobs_are_over_what_it_keeps(llama):
    model = reference(llama)
    for group in run(engine_of(llama), bare_prompts([5, 7]), samples=20, max_new_tokens=6, top_k=3):
        for rollout in group.rollouts:
            prompt, response = group.prompt.tokens, rollout.tokens
            with torch.no_grad():
                logits = model(torch.cat((prompt, response))[None]).logits[0, prompt.numel() - 1 : -1]
            best = logits.topk(3)
            assert torch.equal(best.indices, rollout.support.long())
            expected = best.values.log_softmax(-1)[best.indices == response[:, None]]
            torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)


def test_evaluation_keeps_no_supports_and_top_p_alone_is_refused_where_they_are_wanted(llama):
    engine, prompts = engine_of(llama), bare_prompts([5])
    (group,) = run(engine, prompts, samples=2, max_new_tokens=4, top_k=3, top_p=0.9, exact_logprobs=False)
    assert all(rollout.support is None for rollout in group.rollouts)
    with pytest.raises(EngineError, match=r"top_k is 0.*with top_p below 1 at least 1"):
        run(engine, prompts, samples=2, max_new_tokens=4, top_p=0.9)


# --- ends of responses, batches ---


def test_a_response_ends_with_its_first_stop_token(llama):
    prompts, engine = chat_prompts(llama, TEXTS), engine_of(llama)
    stop = (EOS, *range(40, 60))
    free = by_prompt(run(engine, prompts, samples=4, max_new_tokens=16))
    groups = run(engine, prompts, samples=4, max_new_tokens=16, stop_ids=stop)
    finishes = set()
    for group in groups:
        for rollout, whole in zip(group.rollouts, free[group.prompt.id], strict=True):
            ends = [place for place, token in enumerate(whole) if token in stop]
            expected = whole[: ends[0] + 1] if ends else whole
            assert rollout.tokens.tolist() == expected
            assert rollout.logprobs.numel() == len(expected)
            assert rollout.finish == ("stop" if ends else "length")
            finishes.add(rollout.finish)
    assert finishes == {"stop", "length"}


def test_a_stop_token_at_the_last_place_is_a_stop(llama):
    (group,) = run(engine_of(llama), bare_prompts([4]), max_new_tokens=1, stop_ids=tuple(range(259)))
    assert group.rollouts[0].finish == "stop" and group.rollouts[0].tokens.numel() == 1


def test_no_token_is_computed_twice_or_after_its_end(llama):
    """Each prefix, prompt and response token is computed once, except for a response's last token."""
    engine, prompts = engine_of(llama), chat_prompts(llama, ["same size a", "same size b", "same size c"])
    tokens = []
    engine._model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    groups = run(engine, prompts, samples=6, max_new_tokens=16, stop_ids=tuple(range(40, 60)))
    shared = decoding.shared_prefix([prompt.tokens for _, prompt, _ in prompts])
    prefill = shared + sum(prompt.tokens.numel() - shared for _, prompt, _ in prompts)
    decode = sum(rollout.tokens.numel() - 1 for group in groups for rollout in group.rollouts)
    assert sum(tokens) == prefill + decode


def test_results_are_plain_tensors_and_the_callers_modes_are_left_alone(llama):
    state = torch.random.get_rng_state()
    engine = engine_of(llama)
    scale = torch.ones((), requires_grad=True)
    for group in engine.generate(bare_prompts([5, 9]), SamplingParams(samples=2, max_new_tokens=4), deadline_s=60):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        for rollout in group.rollouts:
            (rollout.logprobs * scale).exp().sum().backward()  # saves logprobs for backward
    assert scale.grad is not None
    assert torch.equal(torch.random.get_rng_state(), state)
