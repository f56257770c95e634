"""Mixtures of experts in the policy: logits, gradients and training in every layout, checkpoints between layouts.

Everything is compared in fp32 with transformers or with one rank; the data-parallel ranks hold different rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_steps import (
    do_not_renormalise,
    forget_copies_of_experts,
    load_and_save,
    logits_by_row,
    permute_experts,
    samples,
    save,
    stages_left,
)
from policy_steps import configuration, train
from ranks import RankError, RankPool
from safetensors.torch import load_file
from tiny_models import _as_released, tiny_llama, tiny_qwen3_moe
from torch import Tensor
from transformers import AutoModelForCausalLM
from update_steps import VOCAB, one_update, plainly

from clipo_megatron.config.schema import KLConfig, KLKind, LayoutConfig, RunConfig
from clipo_megatron.weights.formats.reader import SINGLE

TOLERANCE = 1e-5
LAYOUTS = {
    "one rank": (1, LayoutConfig()),
    "EP2": (2, LayoutConfig(ep=2)),
    "EP2 x PP2": (4, LayoutConfig(ep=2, pp=2)),
    "EP2 of DP4": (4, LayoutConfig(ep=2)),
    "TP2, ETP2": (2, LayoutConfig(tp=2, sequence_parallel=True)),
    "TP2, ETP1": (2, LayoutConfig(tp=2, etp=1, sequence_parallel=True)),
    "TP2, EP2, ETP1": (2, LayoutConfig(tp=2, ep=2, etp=1, sequence_parallel=True)),
    "EP2 x PP2, uneven": (4, LayoutConfig(ep=2, pp=2, first_stage_layers=1)),
    "EP2 of CP2": (2, LayoutConfig(cp=2, ep=2)),
    "EP2 of TP2 x CP2": (4, LayoutConfig(tp=2, cp=2, ep=2, etp=1, sequence_parallel=True)),
}
# Those that `make test` has too: one rank, and the ones that divide experts in two ways or layers unevenly.
IN_SHORT = {"one rank", "TP2, ETP2", "TP2, EP2, ETP1", "EP2 x PP2, uneven"}
MODELS: dict[str, dict[str, Any]] = {
    "renormalised": {},
    "not renormalised, dense layers": {"renormalised": False, "dense_layers": (0, 2), "per_token": 3},
}


def among(*layouts: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.full) for name in layouts]


def moe(folder: Path, model: str = "renormalised") -> RunConfig:
    return configuration(tiny_qwen3_moe(folder, vocab=VOCAB, **MODELS[model]))


def expected_rows(folder: str) -> dict[int, Tensor]:
    """The logits of transformers at the tokens that predict responses, one sequence at a time, by sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = {}
    for sample in samples():
        with torch.no_grad():
            logits = model(torch.cat([sample.prompt, sample.response])[None]).logits[0]
        rows[sample.row] = logits[sample.prompt.numel() - 1 : -1]
    return rows


def distance(results: list[dict[str, Any]], theirs: dict[int, Tensor]) -> float:
    """The largest difference of any rank's logits, relative to the largest logit; asserts that no row is missing."""
    ours = [(row, logits) for result in results for row, logits in result["rows"].items()]
    assert {row for row, _ in ours} == theirs.keys()
    largest = max(float(logits.abs().max()) for logits in theirs.values())
    return max(float((logits - theirs[row]).abs().max()) for row, logits in ours) / largest


@pytest.mark.parametrize("layout", among(*LAYOUTS))
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers_and_export_gives_the_bits(
    model: str, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    config = moe(tmp_path, model)
    results = ranks.run(logits_by_row, LAYOUTS[layout][0], config, LAYOUTS[layout][1])
    assert distance(results, expected_rows(config.model.path)) < TOLERANCE
    source = load_file(tmp_path / SINGLE)
    for result in results:
        assert result["exported"].keys() == source.keys()
        assert [name for name, tensor in source.items() if not torch.equal(tensor, result["exported"][name])] == []


@pytest.mark.parametrize("harm", [permute_experts, do_not_renormalise])
@pytest.mark.parametrize("layout", ["one rank", "EP2"])
def test_the_logits_notice(harm: Any, layout: str, ranks: RankPool, tmp_path: Path) -> None:
    config = moe(tmp_path)
    results = ranks.run(logits_by_row, LAYOUTS[layout][0], config, LAYOUTS[layout][1], harm)
    assert distance(results, expected_rows(config.model.path)) > 1e-3


def test_expert_tensor_parallelism_with_expert_parallelism_needs_a_gpu(ranks: RankPool, tmp_path: Path) -> None:
    layout = LayoutConfig(tp=2, ep=2, sequence_parallel=True)
    with pytest.raises(RankError, match=r"layout.etp = 2: experts over layout.ep = 2 ranks .* set layout.etp=1"):
        ranks.run(logits_by_row, 4, moe(tmp_path), layout)


# --- learning --------------------------------------------------------------------------------------------------------


def with_all_terms(config: RunConfig) -> RunConfig:
    """Add KL and entropy to the loss, so that every graded rollout has a gradient."""
    config.algorithm.kl = KLConfig(coefficient=0.2, kind=KLKind.k3)
    config.algorithm.entropy_coefficient = 0.05
    return config


def far_from_autograd(config: RunConfig, results: list[dict[str, Any]]) -> dict[str, float]:
    """The distance of each gradient and of their norm from autograd; asserts that every expert has a gradient."""
    _, stacked = plainly(config, results[0]["advantage"])
    gradients = dict(_as_released(stacked))
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
    far = {"norm": abs(results[0]["metrics"]["policy/grad_norm"] - norm) / norm}
    for result in results:
        assert result["gradients"].keys() == gradients.keys()
        for name, expected in gradients.items():
            assert expected.abs().max() > 1e-7, name
            distance = float((result["gradients"][name] - expected).abs().max() / expected.abs().max())
            far[name] = max(far.get(name, 0.0), distance)
    return far


@pytest.mark.parametrize("layout", among("one rank", "EP2", "EP2 x PP2, uneven", "TP2, ETP1", "TP2, ETP2"))
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_routers_and_experts_are_those_of_autograd(
    model: str, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    config = with_all_terms(moe(tmp_path, model))
    results = ranks.run(one_update, LAYOUTS[layout][0], config, LAYOUTS[layout][1])
    far = far_from_autograd(config, results)
    assert sum("mlp.gate." in name for name in far) in (2, 4) and sum(".experts." in name for name in far) >= 48
    assert {name: value for name, value in far.items() if not value <= TOLERANCE} == {}


@pytest.mark.parametrize(
    "layout",
    among("one rank", "TP2, EP2, ETP1", "EP2 x PP2, uneven", "EP2 of TP2 x CP2", "EP2 of CP2", "EP2 of DP4"),
)
@pytest.mark.parametrize(
    "model", ["renormalised", pytest.param("not renormalised, dense layers", marks=pytest.mark.full)]
)
def test_tokens_go_to_the_experts_that_the_engine_chose(
    model: str, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    """With random routes, of shared prompts too, and layers that are computed again in the backward pass."""
    config = with_all_terms(moe(tmp_path, model))
    config.model.replay_routing = config.model.recompute = True
    results = ranks.run(one_update, LAYOUTS[layout][0], config, LAYOUTS[layout][1])
    far = far_from_autograd(config, results)
    assert {name: value for name, value in far.items() if not value <= TOLERANCE} == {}
    config.model.replay_routing = False
    unlike = far_from_autograd(config, results)
    assert min(value for name, value in unlike.items() if "mlp.gate." in name) > 0.1, "the routers choose others"


def test_no_part_of_a_model_stays_in_memory(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(stages_left, 1, moe(tmp_path), LayoutConfig()) == [0]


def test_the_comparison_notices_gradients_without_the_copies_of_experts(ranks: RankPool, tmp_path: Path) -> None:
    config = with_all_terms(moe(tmp_path))
    results = ranks.run(forget_copies_of_experts, 2, config, LAYOUTS["TP2, ETP1"][1])
    far = far_from_autograd(config, results)
    assert min(value for name, value in far.items() if ".experts." in name) > 1e-2


@pytest.fixture(scope="module")
def trained_on_one_rank(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    config = moe(tmp_path_factory.mktemp("model"), "not renormalised, dense layers")
    return config, ranks.run(train, 1, config, LayoutConfig())[0]


@pytest.mark.parametrize("layout", among(*(name for name in LAYOUTS if name != "one rank")))
def test_every_layout_trains_the_same(layout: str, trained_on_one_rank: tuple[Any, ...], ranks: RankPool) -> None:
    config, expected = trained_on_one_rank
    far: dict[str, float] = {}
    for result in ranks.run(train, LAYOUTS[layout][0], config, LAYOUTS[layout][1]):
        for name, theirs in expected["weights"].items():
            distance = float((result["weights"][name] - theirs).abs().max() / theirs.abs().max())
            far[name] = max(far.get(name, 0.0), distance)
        for ours, theirs in zip(result["updates"], expected["updates"], strict=True):
            for metric in ("policy/loss", "policy/grad_norm"):
                far[metric] = max(
                    far.get(metric, 0.0), abs(ours[metric] - theirs[metric]) / max(1, abs(theirs[metric]))
                )
    assert {name: value for name, value in far.items() if not value <= TOLERANCE} == {}


def test_the_weights_move_far_more_than_the_tolerance(trained_on_one_rank: tuple[Any, ...]) -> None:
    _, facts = trained_on_one_rank
    for name, after in facts["weights"].items():
        before = facts["weights_before"][name]
        assert float((after - before).abs().max() / before.abs().max()) > 100 * TOLERANCE, name


# --- checkpoints -----------------------------------------------------------------------------------------------------


def differing(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> list[str]:
    assert ours.keys() == theirs.keys()
    assert all(ours[kind].keys() == theirs[kind].keys() for kind in ours)
    return [
        f"{kind} {name}"
        for kind in ours
        for name, tensor in ours[kind].items()
        if not torch.equal(tensor, theirs[kind][name])
    ]


def test_checkpoints_keep_weights_and_optimizer_in_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    """EP2 x PP2 is loaded on one rank, that on TP2 x EP2 with ETP 1, and that on TP2 with ETP 2, EP4 and CP2 x PP2."""
    config = moe(tmp_path / "model", "not renormalised, dense layers")
    places = [str(tmp_path / str(number)) for number in range(3)]
    saved = ranks.run(save, 4, config, LayoutConfig(ep=2, pp=2), places[0])
    assert int(saved[0]["updates"]["count"]) == 4 and float(saved[0]["exp_avg"]["lm_head.weight"].abs().max()) > 0
    steps = [
        (1, LayoutConfig(), places[0], places[1]),
        (2, LayoutConfig(tp=2, ep=2, etp=1, sequence_parallel=True), places[1], places[2]),
        (2, LayoutConfig(tp=2, sequence_parallel=True), places[2], ""),
        (4, LayoutConfig(ep=4), places[2], ""),
        (4, LayoutConfig(cp=2, pp=2), places[2], ""),
    ]
    for world, layout, source, target in steps:
        for result in ranks.run(load_and_save, world, config, layout, source, target):
            assert differing(result, saved[0]) == []


def test_checkpoints_with_layers_stacked_are_still_read(ranks: RankPool, tmp_path: Path) -> None:
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    folder = str(tmp_path / "old")
    saved = ranks.run(save, 2, config, LayoutConfig(pp=2), folder, True)
    for world, layout in ((1, LayoutConfig()), (2, LayoutConfig(tp=2))):
        for result in ranks.run(load_and_save, world, config, layout, folder):
            assert differing(result, saved[0]) == []
