"""The local engine against transformers: one sequence at a time, in fp32, on tiny random models."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from tiny_models import EOS, tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3, tiny_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rollout.engine import EngineError, Request, SamplingParams
from clipo_megatron.rollout.local import decoding
from clipo_megatron.rollout.local.engine import LocalEngine

FAMILIES = {
    "llama": (tiny_llama, {"tied": False}),
    "llama-tied": (tiny_llama, {"tied": True}),
    "qwen2": (tiny_qwen2, {"tied": True}),
    "qwen2-untied": (tiny_qwen2, {"tied": False}),
    "qwen3": (tiny_qwen3, {"tied": False}),
    "mistral": (tiny_mistral, {"window": 17}),  # shorter than what chat prompts share, and than prompts without it
    "phi3": (tiny_phi3, {"window": 7}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name, **options) for name, (make, options) in FAMILIES.items()}


IN_SHORT = ("llama-tied", "qwen2-untied", "qwen3", "mistral")  # of which `make test` has every test


@pytest.fixture(params=[pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.full) for name in FAMILIES])
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture
def llama(folders) -> Path:
    return folders["llama"]


def reference(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_of(folder: Path, *, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> LocalEngine:
    engine = LocalEngine(folder, dtype=dtype, device="cpu", batch_size=batch_size)
    engine.load_weights(reference(folder).named_parameters(), version=0)
    return engine


def chat_prompts(folder: Path, texts: list[str]) -> list[Request]:
    """Prompts of different lengths that share the beginning of the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for row, text in enumerate(texts):
        messages = ({"role": "user", "content": text},)
        tokens = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        prompts.append(Request(row, Prompt(f"test/{row}", messages, torch.tensor(tokens), "test", "")))
    return prompts


def bare_prompts(lengths: list[int], vocab: int = 259) -> list[Request]:
    """Prompts of random tokens, which have nothing in common."""
    generator = torch.Generator().manual_seed(7)
    return [
        Request(row, Prompt(f"bare/{row}", (), torch.randint(3, vocab, (length,), generator=generator), "test", ""))
        for row, length in enumerate(lengths)
    ]


TEXTS = [f"Solve {what}" for what in ("one", "a longer question, for the padding", "two plus two?", "x", "it", "one")]


def by_prompt(groups) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [rollout.tokens.tolist() for rollout in group.rollouts] for group in groups}


def run(engine: LocalEngine, prompts, **params) -> list[RolloutGroup]:
    return list(engine.generate(prompts, SamplingParams(**params), deadline_s=60))


def alone(model, prompt: torch.Tensor, response: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [R] of a response by one plain forward."""
    with torch.no_grad():
        logits = model(torch.cat((prompt, response))[None]).logits[0, prompt.numel() - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]


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


def test_truncation_reaches_the_engine_and_logprobs_are_of_the_whole_distribution(llama):
    model = reference(llama)
    for group in run(engine_of(llama), bare_prompts([5, 7]), samples=20, max_new_tokens=6, top_k=3):
        for rollout in group.rollouts:
            prompt, response = group.prompt.tokens, rollout.tokens
            with torch.no_grad():
                logits = model(torch.cat((prompt, response))[None]).logits[0, prompt.numel() - 1 : -1]
            assert (logits.topk(3).indices == response[:, None]).any(-1).all()
            torch.testing.assert_close(rollout.logprobs, alone(model, prompt, response, 1.0), rtol=0, atol=1e-5)


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


# --- weights ---


def test_new_weights_serve_at_once_in_place(folder):
    engine, prompts = engine_of(folder), chat_prompts(folder, TEXTS[:2])
    before = by_prompt(run(engine, prompts, max_new_tokens=8, temperature=0.0))
    pointers = [parameter.data_ptr() for parameter in engine._model.parameters()]
    weights = tiny_weights(folder, seed=5)
    engine.load_weights(((name, tensor.double()) for name, tensor in weights.items()), version=7)
    assert engine.version == 7
    assert [parameter.data_ptr() for parameter in engine._model.parameters()] == pointers
    model = reference(folder)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    groups = run(engine, prompts, max_new_tokens=8, temperature=0.0)
    assert by_prompt(groups) != before
    for group in groups:
        (rollout,) = group.rollouts
        assert rollout.version == 7
        expected = alone(model, group.prompt.tokens, rollout.tokens, 1.0)
        torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_every_problem_of_a_load_is_listed_and_nothing_serves_until_one_succeeds(llama):
    engine = engine_of(llama)
    weights = tiny_weights(llama, seed=1)
    broken = [(name, tensor) for name, tensor in weights.items() if name != "model.norm.weight"]
    broken = [(name, tensor[:-1] if name == "lm_head.weight" else tensor) for name, tensor in broken]
    broken += [("model.extra.weight", torch.zeros(2, 3)), broken[0]]
    with pytest.raises(EngineError) as raised:
        engine.load_weights(broken, version=3)
    message = str(raised.value)
    assert "version 3" in message and "4 problems" in message
    assert "model.norm.weight never came" in message
    assert "lm_head.weight has shape [258, 64], the model needs [259, 64]" in message
    assert "model.extra.weight [2, 3] is unknown" in message
    assert f"{broken[0][0]} came twice" in message
    assert engine.version == -1
    with pytest.raises(EngineError, match="load_weights"):
        run(engine, bare_prompts([3]))
    engine.load_weights(weights.items(), version=4)
    engine.health()
    assert run(engine, bare_prompts([3]), max_new_tokens=2)[0].rollouts[0].version == 4


def test_a_tied_head_may_come_but_has_to_equal_the_embedding(folders):
    folder = folders["llama-tied"]
    engine, weights = engine_of(folder), tiny_weights(folder, seed=1)
    head = weights["model.embed_tokens.weight"]
    engine.load_weights([*weights.items(), ("lm_head.weight", head)], version=1)
    engine.load_weights([("lm_head.weight", head), *weights.items()], version=2)
    with pytest.raises(EngineError, match=r"lm_head\.weight differs from the weight it is tied to"):
        engine.load_weights([*weights.items(), ("lm_head.weight", head + 1)], version=3)


def test_weights_that_give_nan_are_reported(llama):
    engine, weights = engine_of(llama), tiny_weights(llama, seed=1)
    weights["model.norm.weight"][3] = float("nan")
    engine.load_weights(weights.items(), version=9)
    with pytest.raises(EngineError, match=r"version 9 give log-probs that are not finite.*bare/0"):
        run(engine, bare_prompts([3]))


# --- deadline, misuse, end ---


def test_a_failing_forward_names_the_prompts_without_an_answer(llama):
    engine, calls = engine_of(llama, batch_size=1), []

    def fail_later(*_):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("the disk is upside down")

    engine._model.get_input_embeddings().register_forward_pre_hook(fail_later)
    stream = engine.generate(bare_prompts([9, 4, 3]), SamplingParams(max_new_tokens=4), deadline_s=60)
    assert next(stream).position == 0
    with pytest.raises(EngineError, match=r"without an answer: bare/1, bare/2\..*rollout\.batch_size.*upside down"):
        next(stream)


def test_a_deadline_names_the_prompts_without_an_answer(llama):
    engine = engine_of(llama, batch_size=1)
    with pytest.raises(EngineError, match=r"deadline of 0 s; without an answer: bare/0, bare/1\."):
        list(engine.generate(bare_prompts([3, 4]), SamplingParams(max_new_tokens=2), deadline_s=0))
    stream = engine.generate(bare_prompts([9, 4, 3]), SamplingParams(max_new_tokens=2), deadline_s=2)
    assert next(stream).position == 0  # longest first, one prompt at a time
    time.sleep(2)
    with pytest.raises(EngineError, match=r"deadline of 2 s; without an answer: bare/1, bare/2\."):
        next(stream)
    assert len(run(engine, bare_prompts([3, 4]), max_new_tokens=2)) == 2  # and the engine still serves


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 2046}, "bare/0 has 3 tokens; with 2046 new ones it exceeds the model's 2048"),
    ],
)
def test_impossible_requests_fail_at_the_call(llama, params, message):
    with pytest.raises(EngineError, match=message):
        engine_of(llama).generate(bare_prompts([3]), SamplingParams(**params), deadline_s=60)


def test_prompts_without_or_with_foreign_tokens_are_named(llama):
    engine = engine_of(llama)
    for tokens, message in [([], "p/0 has no tokens"), ([5, 259], "p/0 has a token outside.*259"), ([-1], "outside")]:
        prompt = Prompt("p/0", (), torch.tensor(tokens, dtype=torch.int64), "test", "")
        with pytest.raises(EngineError, match=message):
            engine.generate([Request(0, prompt)], SamplingParams(max_new_tokens=2), deadline_s=60)


def test_no_prompts_no_groups(llama):
    assert run(engine_of(llama), []) == []


def test_construction_errors_name_the_folder(tmp_path, llama):
    with pytest.raises(EngineError, match=r"no config\.json"):
        LocalEngine(tmp_path, dtype=torch.float32, device="cpu")
    with pytest.raises(EngineError, match="batch_size is 0"):
        LocalEngine(llama, dtype=torch.float32, device="cpu", batch_size=0)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None}, "sliding_attention"),
    ],
)
def test_a_model_it_would_compute_wrongly_is_refused(folders, tmp_path, family, changes, message):
    shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes, "sliding_window": 8}))
    with pytest.raises(EngineError, match=message):
        LocalEngine(tmp_path, dtype=torch.float32, device="cpu")


def test_close_is_idempotent_and_final(llama):
    engine = LocalEngine(llama, dtype=torch.float32, device="cpu")
    with pytest.raises(EngineError, match="load_weights"):
        engine.health()
    engine.close()
    engine.close()
    for call in (engine.health, lambda: engine.load_weights([], version=0)):
        with pytest.raises(EngineError, match="closed"):
            call()
