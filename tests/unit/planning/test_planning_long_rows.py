"""Rows that are too long for one rank: layouts that divide them, what gathering them takes, and FP8's speed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from allocations import peak_bytes
from paths import EXAMPLES

from clipo_megatron.cli.main import main
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.flow import Segment
from clipo_megatron.planning.architecture import find_architecture
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import LayoutPlan, plan_layout, search_layouts
from clipo_megatron.planning.memory import gathered_bytes
from clipo_megatron.policy.model.attention import attention_of, plan_attention
from clipo_megatron.policy.model.fake_process_group import fake_process_group
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

RECIPES = EXAMPLES / "recipes"
H100, ASSUMED = HARDWARE["h100"], Assumptions(error=0.0)


def recipe(name: str) -> tuple[RunConfig, ModelSpec]:
    file = RECIPES / f"{name}.yaml"
    config = load(file)
    return config, find_architecture(config.model.path, file)[0]


def searched(config: RunConfig, spec: ModelSpec) -> list[LayoutPlan]:
    return search_layouts(config, spec, 64, H100, ASSUMED)


def test_rows_are_divided_where_they_do_not_fit_and_by_as_few_ranks_as_fit():
    config, spec = recipe("deepseek-r1-distill-7b-math-64k")
    found = searched(config, spec)
    assert found and {each.cp for each in found} > {1, 2}
    assert found == searched(replace(config, layout=replace(config.layout, cp=1)), spec), "it is searched, as tp is"
    for each in found:
        assert each.fits and each.trainer_gpus == 64 and bool(each.because) == (each.cp > 1)
        if each.cp > 1:
            layout = replace(config.layout, cp=each.cp // 2, sequence_parallel=each.division.tp > 1)
            fewer = replace(config, layout=layout, model=replace(config.model, recompute=each.recompute), sglang={})
            fewer = plan_layout(fewer, spec, 2 * each.dp, 64, H100, ASSUMED, division=each.division)
            assert not fewer.fits and max(stage.total for stage in fewer.trainer) > 0.92 * 80e9
    assert found[0].cp > 1 and f"layout.cp={found[0].cp}" in found[0].overrides


def test_short_rollouts_are_not_divided():
    """Smaller micro-batches are cheaper, however large those are that are configured."""
    config, spec = recipe("qwen2.5-7b-math")
    config.layout.max_tokens_per_microbatch = 65536
    assert all(each.cp == 1 for each in searched(config, spec))


def test_the_command_says_why_rows_are_divided(capsys):
    file = RECIPES / "deepseek-r1-distill-7b-math-64k.yaml"
    words = ["plan", str(file), "--gpus", "64", "--assume", "error=0"]
    assert main([*words, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["layouts"]["64"][0]
    cp = int(dict(each.split("=") for each in best["settings"])["layout.cp"])
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"cp: {cp} ranks divide the rows of the first, since with {cp // 2} each would need" in said
    assert f" cp {cp} pp " in said
    assert main(["plan", str(file), "layout.cp=1", "layout.dp=32", "model.recompute=false"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "for a row of 65536 tokens: a larger layout.cp, now 1, or shorter responses makes it less" in said


@pytest.mark.parametrize("cp", [2, 4])
def test_gathered_keys_take_what_is_planned(cp):
    """The peak of one attention on a rank, forward and backward, beside what it has whatever the row's length."""
    config, spec = recipe("qwen2.5-7b-math")
    tokens = 2048
    config.layout = LayoutConfig(cp=cp, max_tokens_per_microbatch=tokens)
    config.data.max_prompt_tokens = config.rollout.max_new_tokens = tokens // 2
    spec = replace(spec, num_heads=4, num_kv_heads=4, head_dim=32)
    planned = gathered_bytes(config, spec, ParallelDivision())
    with fake_process_group(config.layout, rank=0, world=cp) as place:
        plan = plan_attention([Segment(0, tokens)], torch.device("cpu"), share=place.share)
        rows = [torch.randn(tokens // cp, 4, 32).bfloat16().requires_grad_() for _ in range(3)]
        output = attention_of(*rows, plan, 32**-0.5)
        peak = peak_bytes(lambda: output.backward(torch.ones_like(output)))
    part = rows[0].nbytes
    # The gradients of its own queries, keys and values, and of the output; and a call's own copies of a part.
    assert planned < peak < planned + 8 * part + 2 * tokens * 4 * 32 * 4
    config.layout.cp = 1
    assert gathered_bytes(config, spec, ParallelDivision()) == 0


def test_fp8_makes_the_layers_products_faster_and_nothing_else(capsys):
    config, spec = recipe("qwen2.5-7b-math")

    def trained(**changed: float) -> tuple[float, float]:
        time = plan_layout(config, spec, 4, 8, H100, replace(ASSUMED, **changed)).time
        return time.update, time.generate

    plain, generate = trained()
    config.megatron = {"fp8": "hybrid"}
    assert trained(fp8_flops=0.4 * 989 / 1979) == (pytest.approx(plain), generate), "at bf16's rate nothing is gained"
    fast, faster = trained()[0], trained(fp8_flops=0.4)[0]
    assert 0.5 < faster / plain < fast / plain < 0.9
    file = str(RECIPES / "qwen2.5-7b-math.yaml")
    assert main(["plan", file, "megatron.fp8=hybrid"]) == 0
    assert "megatron.fp8: layers' products take 77% of their time in bf16" in capsys.readouterr().out
    for words in ([], ["--gpus", "8"]):
        assert main(["plan", file, "megatron.fp8=hybrid", "--hardware", "a100", *words]) == 2
        assert "megatron.fp8 = hybrid, and a100 has no FP8. Leave it out" in " ".join(capsys.readouterr().err.split())
