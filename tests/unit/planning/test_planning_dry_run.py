"""Ranks of planned layouts, built by Megatron without memory, hold what the plan says, or the difference is shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from paths import ARCHITECTURES

from clipo_megatron.cli.main import main
from clipo_megatron.config.schema import DType, HeadKind, LayoutConfig, RunConfig
from clipo_megatron.planning import dry_run
from clipo_megatron.planning.dry_run import build_ranks, spans
from clipo_megatron.weights.families import model_spec

LAYOUTS = {
    "tp8 x pp4 x dp2": ("llama-3.1-70b", LayoutConfig(tp=8, pp=4, dp=2, sequence_parallel=True), (0, 9, 33, 63)),
    "uneven stages": ("qwen2.5-72b", LayoutConfig(tp=4, pp=3, first_stage_layers=26, last_stage_layers=26), (0, 5, 11)),
    "more ranks than kv heads": ("llama-3.1-70b", LayoutConfig(tp=16, pp=2), (0, 15, 31)),
    "experts": ("qwen3-235b-a22b", LayoutConfig(tp=4, pp=2, dp=16, ep=64, etp=1, sequence_parallel=True), (3, 127)),
    "long rows": ("llama-3.1-70b", LayoutConfig(tp=8, pp=2, cp=4, dp=2, sequence_parallel=True), (0, 31, 64, 127)),
    "cut experts": ("qwen3-235b-a22b", LayoutConfig(tp=4, pp=1, ep=32, etp=2, sequence_parallel=True), (33,)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_ranks_hold_what_was_planned(case):
    name, layout, ranks = LAYOUTS[case]
    config = replace(RunConfig(), layout=layout)
    spec = model_spec(json.loads((ARCHITECTURES / f"{name}.json").read_text()))
    found = list(build_ranks(config, spec, ranks))
    assert [each.rank for each in found] == list(ranks) and not dist.is_initialized()
    for each in found:
        assert each.equal, each
        assert each.built_bytes == 2 * each.built.total
        assert (each.built.expert > 0) == (spec.experts is not None)
        assert each.built_head == (spec.hidden_size * 512 if each.stage == layout.pp - 1 else 0)
    if case == "tp8 x pp4 x dp2":
        assert found[0].built.total > found[2].built.total, "an embedding"
        padded = -(-spec.vocab_size // (8 * 64)) * 64 - spec.vocab_size // 8
        assert padded and (found[0].built.total - found[2].built.total) % spec.hidden_size == 0


def test_all_ranks_in_fp32_with_a_tied_embedding_and_an_mlp_head():
    config = replace(RunConfig(), layout=LayoutConfig(tp=2, pp=2, dp=2))
    config.model.dtype, config.clipo.head = DType.fp32, HeadKind.mlp
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "vocab_size": 261}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    spec = model_spec({"model_type": "llama", **sizes, **heads})
    found = list(build_ranks(config, spec))
    assert [each.rank for each in found] == list(range(config.layout.requested_ranks))
    assert [each.stage for each in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(each.equal and each.built_bytes == 4 * each.built.total for each in found)
    assert found[4].built_head == 64 * 64 + 64 * 512
    assert found[0].built.total > 192 * 64 < found[4].built.total, "261 rows are 2 x 192 in tiles of 64, on both ends"


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    """Write a configuration whose model is absent except for its architecture."""
    (tmp_path / "architectures").mkdir()
    for name in ("llama-3.1-70b", "qwen3-235b-a22b"):
        shutil.copy(ARCHITECTURES / f"{name}.json", tmp_path / "architectures")
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: big\nmodel: {path: some-hub/llama-3.1-70b}\nrollout: {engine: sglang, colocated: true}\n"
        "layout: {tp: 8, pp: 8, sequence_parallel: true}\nserve: {tp: 8}\n"
    )
    return str(file)


def test_the_command_builds_and_says_so(run_file, capsys):
    assert main(["plan", run_file, "--dry-run", "--rank", "0,1,63"]) == 0
    said = capsys.readouterr().out
    assert "planned from" in said and "built 3 of 64 ranks" in said and "weights in bfloat16" in said
    rows = [line.split() for line in said.splitlines() if line.rstrip().endswith("equal")]
    assert [row[:2] for row in rows] == [["0", "0-1"], ["7", "63"]]
    assert all(row[2] == row[3] for row in rows)


def test_a_rank_that_is_not_as_planned_is_told(run_file, capsys, monkeypatch):
    honest = dry_run.rank_count

    def forgetful(*arguments, **options):
        count = honest(*arguments, **options)
        return replace(count, dense=count.dense - 8192)  # a norm

    monkeypatch.setattr(dry_run, "rank_count", forgetful)
    assert main(["plan", run_file, "--rank", "9"]) == 1
    said = capsys.readouterr().out
    assert "fits" in said and "DIFFERENT" in said and "equal" not in said


EXPERTS = ["model.path=qwen3-235b-a22b", "layout.tp=1", "layout.pp=1", "layout.sequence_parallel=false"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "64"], "--rank 64: the layout has 64 ranks, 0 to 63"),
        (["--dry-run", "--gpus", "64"], "--dry-run builds the configured layout"),
        (["model.path=some-hub/other"], "model.path = some-hub/other has no config.json, and there is no"),
        (["--rank", "0", "layout.tp=24", "layout.pp=1"], "rows cannot be divided into 24 equal parts"),
        (["--rank", "0", *EXPERTS, "layout.dp=3", "layout.ep=2"], "rank 0 of 3 cannot be built: 3 ranks cannot be"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message, run_file, capsys):
    assert main(["plan", run_file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ranks_in_short():
    assert spans([0]) == "0" and spans([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"
