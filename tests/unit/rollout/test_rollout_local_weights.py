"""The local engine's weights, and what it refuses."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from local_engines import TEXTS, alone, bare_prompts, by_prompt, chat_prompts, engine_of, reference, run
from tiny_models import tiny_weights

from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import EngineError, Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine

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
