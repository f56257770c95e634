"""SmolLM2 on real servers: a run on two pipeline stages with two servers, and greedy decoding by three engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from served import Servers
from small_runs import SmallRun, metrics
from transformers import AutoModelForCausalLM

from clipo_megatron.config.schema import DType, EngineKind, PoolConfig
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.rollout.servers.pool import ServerPool

STEPS = 3
# Two floating-point programs may disagree about which of two logits is larger if they differ by less than this.
TIE = 2e-3


def questions() -> list[str]:
    """32 problems like the quickstart's."""
    return [f"What is {n % 10} {'+-'[n % 2]} {n // 4}? Answer with only the number." for n in range(32)]


@pytest.mark.full
def test_three_steps_on_two_pipeline_stages_with_two_servers(servers: Servers, smollm2: Path, tmp_path: Path):
    rows = [
        {
            "data_source": "arithmetic/one_digit",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"ground_truth": str(eval(question.split("is ")[1].split("?")[0])), "style": "rule"},
        }
        for question in questions()
    ]
    (tmp_path / "practice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "served",
        "model": {"path": str(smollm2), "dtype": "bf16", "system_prompt": ""},
        "layout": {"pp": 2, "max_tokens_per_microbatch": 512},
        "data": {"train": [{"path": str(tmp_path / "practice.jsonl")}], "prompts_per_step": 4},
        "rollout": {"engine": "sglang", "samples_per_prompt": 8, "max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-4},
        # A step whose groups are all right or all wrong must still change the weights and update the servers.
        "algorithm": {"entropy_coefficient": 1e-4},
        "train": {"steps": STEPS},
        "checkpoint": {"every": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    started = [servers.own("sglang", smollm2).begin() for _ in range(2)]
    try:
        urls = [each.wait().url for each in started]
        SmallRun(tmp_path / "run.yaml", tmp_path / "run", f"rollout.endpoints=[{','.join(urls)}]").wait()
    finally:
        for each in started:
            each.stop()
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        # `verify_every` is 1: a different checksum would have ended the run.
        assert line["sync/servers"] == 2
        assert line["sync/pause_s"] > line["sync/verify_s"] > 0
        assert line["policy/mult_prob_error"] <= 1.05
        assert line["rollout/version_lag"] == 0
        assert line["policy/grad_norm"] > 0
    assert len({line["policy/mult_prob_error"] for line in lines}) == STEPS
    print("mult_prob_error", [round(line["policy/mult_prob_error"], 5) for line in lines])


@pytest.mark.full
def test_greedy_tokens_of_all_engines_are_equal_but_for_ties(servers: Servers, smollm2: Path):
    tokenizer = load_tokenizer(str(smollm2))
    prompts = []
    for number, question in enumerate(questions()):
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        prompts.append(Request(number, Prompt(f"greedy/{number}", tuple(turns), torch.tensor(ids), "none", "")))
    params = SamplingParams(max_new_tokens=16, temperature=0.0, stop_ids=(tokenizer.eos_token_id,))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    local = LocalEngine(smollm2, dtype=torch.float32, device="cpu")
    local.load_weights(model.named_parameters(), version=0)
    expected = answers(local, prompts, params)
    ties = 0
    for kind in ("sglang", "vllm"):
        server = servers.own(kind, smollm2, DType.fp32)
        try:
            pool = ServerPool(
                EngineKind(kind), decode=tokenizer.decode, config=PoolConfig(), endpoints=[server.start().url],
                model=smollm2,
            )  # fmt: skip
            pool.load_weights(model.named_parameters(), version=0)
            found = answers(pool, prompts, params)
            pool.close()
        finally:
            server.stop()
        for request in prompts:
            ties += differ_at_a_tie(
                model, request.prompt.tokens, expected[request.position], found[request.position], kind
            )
    print(f"{ties} of {2 * len(prompts)} answers differ at a tie")
    assert ties <= 6


def answers(engine, prompts: list[Request], params: SamplingParams) -> dict[int, list[int]]:
    """The tokens of each answer, by position."""
    groups = engine.generate(prompts, params, deadline_s=200)
    return {group.position: group.rollouts[0].tokens.tolist() for group in groups}


def differ_at_a_tie(model, prompt: torch.Tensor, expected: list[int], found: list[int], kind: str) -> bool:
    """Whether two answers differ, which is allowed only where the two tokens are equally likely."""
    if expected == found:
        return False
    place = next((n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    assert place is not None, f"{kind} ended elsewhere: {found} is not {expected}"
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tolist(), *expected[:place]]])).logits[0, -1]
    gap = float(logits[expected[place]] - logits[found[place]])
    assert abs(gap) <= TIE, f"{kind} differs from local at token {place}, where the logits are {gap:.4f} apart"
    return True
