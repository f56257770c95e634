"""Rollouts that grow in windows: where a window ends, and that windows make up the response."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from collector_steps import prompts
from safetensors.torch import load_file
from small_runs import (
    write_model,
)

from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.rollout.continuation import append_tokens, if_finished
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.training.partial_rollouts import continuations, count_unfinished
from clipo_megatron.training.prompt_assignment import assign_by_load


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


def test_where_a_window_ends() -> None:
    params = SamplingParams(max_new_tokens=10, window_tokens=4)
    assert [params.token_limit(trained) for trained in (0, 4, 8)] == [4, 8, 10]
    assert [params.finish_at(tokens) for tokens in (4, 8, 10)] == ["window", "window", "length"]
    assert replace(params, window_tokens=None).token_limit() == 10
    tokens = torch.arange(6)
    begun = Rollout(tokens, torch.zeros(6), "", "abort", torch.zeros(6).long(), 1, trained=4)
    assert if_finished(begun, params) is None, "it was interrupted within its second window"
    added = torch.arange(2), torch.zeros(2), torch.ones(2).long()
    whole = append_tokens(begun, *added, sample=1, finish="length", params=params, decode=str)
    assert (whole.finish, whole.trained, whole.tokens.numel()) == ("window", 4, 8)
    assert if_finished(replace(whole, finish="abort"), params) == whole


def test_unfinished_rollouts_are_counted() -> None:
    def group(*open_: bool) -> RolloutGroup:
        one = torch.ones(1).long()
        return RolloutGroup(
            0,
            prompts(1)[0],
            [Rollout(one, one.float(), "", "window" if each else "stop", one, i) for i, each in enumerate(open_)],
        )

    three, two, none = group(True, False, True, True), group(True, True, False, False), group(False, False)
    assert len(continuations([three, two, none])) == 2
    assert [count_unfinished(continuations(each), 4) for each in ([three], [three, two], [none])] == [3, 5, 0]
    assert count_unfinished([Request(0, prompts(1)[0])], 4) == 4
    assert (
        assign_by_load([5, 0, 2], 4, 4) == [1, 2, 1, 0]
        and assign_by_load([3], 0, 4) == assign_by_load([3], -1, 4) == []
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_generated_in_windows_is_the_same_response(model: Path, temperature: float) -> None:
    """Greedy: token by token that of one call. Sampled: each window's log-probs are those of a plain forward."""
    engine = LocalEngine(model, dtype=torch.float32, device="cpu", batch_size=7)
    engine.load_weights(load_file(model / "model.safetensors").items(), version=0)
    params = SamplingParams(samples=3, max_new_tokens=7, temperature=temperature, seed=1)
    requests = [Request(place, prompt) for place, prompt in enumerate(prompts(4))]
    whole = {group.position: group for group in engine.generate(requests, params, deadline_s=60)}
    grown: dict[int, RolloutGroup] = {}
    for step in range(3):
        cut = replace(params, window_tokens=3, step=step)
        for group in engine.generate(requests, cut, deadline_s=60):
            assert [each.sample for each in group.rollouts] == [0, 1, 2]
            grown[group.position] = group
        requests = continuations(grown[each.position] for each in requests)
        assert {rollout.trained for each in requests for rollout in each.begun} == (
            {3 * (step + 1)} if step < 2 else set()
        )
    for position, group in grown.items():
        for mine, theirs in zip(group.rollouts, whole[position].rollouts, strict=True):
            assert (mine.tokens.numel(), mine.finish) == (7, "length")
            if not temperature:
                assert mine.tokens.tolist() == theirs.tokens.tolist()
                torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
            sequence = torch.cat([group.prompt.tokens, mine.tokens])[None]
            with torch.inference_mode():
                logits = engine._model(sequence).logits[0, group.prompt.tokens.numel() - 1 : -1].float()
            plain = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, mine.tokens[:, None])[:, 0]
            torch.testing.assert_close(mine.logprobs, plain, rtol=1e-4, atol=1e-4)
