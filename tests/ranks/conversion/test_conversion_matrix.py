"""From Hugging Face through Megatron's own loading and saving, layout after layout, and back: not a bit differs.

The models on the ranks are the ones that train; between two layouts lies a torch_dist checkpoint that Megatron wrote.
What each of them holds is compared with the source, tensor by tensor, so that a loss is found where it happens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron_steps import left_over, relay, save_from_hf
from ranks import RankPool
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.conversion.compare import compare
from clipo_megatron.conversion.running import convert
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, SINGLE, HFReader
from clipo_megatron.weights.formats.torch_dist import TorchDist
from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import read_config

VOCAB = 263  # odd: padded in every layout with TP

# ranks, layout, model chunks a pipeline rank; the families have 2 KV heads and 4 layers
DENSE = [
    (4, LayoutConfig(tp=2, pp=2), 1),
    (4, LayoutConfig(tp=4), 1),
    (2, LayoutConfig(pp=2), 2),
    (2, LayoutConfig(pp=2, first_stage_layers=1), 1),
]
EXPERTS = [
    (4, LayoutConfig(tp=2, pp=2), 1),  # each expert over the TP ranks
    (4, LayoutConfig(tp=4, etp=1, ep=4), 1),
    (4, LayoutConfig(pp=2, ep=2), 1),
    (4, LayoutConfig(tp=2, pp=2, ep=2, etp=1), 2),
    (2, LayoutConfig(pp=2, last_stage_layers=1), 1),
]
FAMILIES: dict[str, tuple[Callable[..., Path], dict[str, Any], list[Any]]] = {
    "llama": (tiny_llama, {"tied": False, "head_dim": 24}, DENSE),
    "llama tied": (tiny_llama, {"tied": True}, DENSE),
    "qwen2": (tiny_qwen2, {}, DENSE),
    "qwen3": (tiny_qwen3, {}, DENSE),
    "mistral": (tiny_mistral, {}, DENSE),
    "phi3": (tiny_phi3, {}, DENSE),
    "qwen3_moe": (tiny_qwen3_moe, {"dense_layers": (2,)}, EXPERTS),
}


def assert_same(source: Path, policy: Path) -> None:
    """Check that a torch_dist folder holds the tensors of a Hugging Face folder and nothing else."""
    with HFReader(source) as a, TorchDistReader(policy, model_spec(read_config(source))) as b:
        found = compare(a, b)
        assert [str(each) for each in found.differences] == []
        assert found.equal == len(a.names()) > 20
        assert b.unknown == []


def in_two_files(folder: Path) -> None:
    """Divide a folder's weights as releases are, with an index and unusual spaces in the headers."""
    tensors = load_file(folder / SINGLE)
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt", "made by": "a test"})
    places = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=3))
    (folder / SINGLE).unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("llama tied", "qwen3_moe") else pytest.mark.full) for name in FAMILIES],
)
def test_layout_after_layout_and_back(name: str, ranks: RankPool, tmp_path: Path) -> None:
    family, sizes, layouts = FAMILIES[name]
    source = family(tmp_path / "source", vocab=VOCAB, **sizes)
    in_two_files(source)
    checkpoint = tmp_path / "checkpoint"
    convert(ToMegatron(source, checkpoint))
    assert_same(source, checkpoint / "policy")
    policy = checkpoint / "policy"
    for number, (world, layout, vpp) in enumerate(layouts):
        saved = tmp_path / f"policy{number}"
        held = ranks.run(relay, world, source, policy, saved, layout, vpp)
        assert len(held) == world and all(len(chunks) == vpp for chunks in held)
        assert_same(source, saved)
        policy = saved
    convert(ToHF(policy, tmp_path / "back", hf=checkpoint))
    before, after = contents(source), contents(tmp_path / "back")
    assert before.keys() == after.keys() and len(before) >= 6
    assert [name for name in before if before[name] != after[name]] == []


def test_a_checkpoint_divided_like_training(ranks: RankPool, tmp_path: Path) -> None:
    """Megatron loads a checkpoint that was converted for another layout of experts."""
    source = tiny_qwen3_moe(tmp_path / "source", vocab=VOCAB)
    division = ParallelDivision(tp=2, pp=2, vpp=2, ep=4, etp=1)
    convert(ToMegatron(source, tmp_path / "checkpoint", division=division))
    assert_same(source, tmp_path / "checkpoint" / "policy")
    ranks.run(relay, 4, source, tmp_path / "checkpoint" / "policy", tmp_path / "saved", LayoutConfig(tp=4, ep=2, etp=2))
    assert_same(source, tmp_path / "saved")


@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen3, tiny_qwen3_moe])
def test_megatron_finds_neither_less_nor_more_than_it_expects(
    family: Callable[..., Path], ranks: RankPool, tmp_path: Path
) -> None:
    source = family(tmp_path / "source", vocab=VOCAB)
    convert(ToMegatron(source, tmp_path / "checkpoint"))
    policy = tmp_path / "checkpoint" / "policy"
    for unasked, absent in ranks.run(left_over, 2, source, policy, LayoutConfig(pp=2)):
        assert absent == set()
        # Transformer Engine's norms and attention have a state of their own, which those here have not
        assert {key.rpartition(".")[2] for key in unasked} == {"_extra_state"}
    fewer = tmp_path / "fewer"
    shutil.copytree(source, fewer)
    config = json.loads((fewer / "config.json").read_text()) | {"num_hidden_layers": 2, "layer_types": None}
    (fewer / "config.json").write_text(json.dumps(config))
    unasked, absent = ranks.run(left_over, 1, fewer, policy, LayoutConfig())[0]
    weights = {key for key in unasked if not key.endswith("_extra_state")}
    assert absent == set() and {key.split(".")[2] for key in weights} == {"2", "3"}


@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2, tiny_qwen3_moe])
def test_layers_stacked_under_one_key(family: Callable[..., Path], ranks: RankPool, tmp_path: Path) -> None:
    """Checkpoints with all layers stacked under one key, as older ones and Megatron-LM's are."""
    source = family(tmp_path / "source", vocab=VOCAB)
    stacked = tmp_path / "stacked"
    ranks.run(save_from_hf, 2, source, stacked, LayoutConfig(pp=2), 1, True)
    store = TorchDist(stacked)
    assert store.tensors["decoder.layers.self_attention.linear_qkv.weight"].shape[0] == 4
    assert not any(key.startswith("decoder.layers.0.") for key in store.tensors)
    store.close()
    assert_same(source, stacked)
    convert(ToHF(stacked, tmp_path / "back", hf=source))
    assert contents(tmp_path / "back") == contents(source)
    # Megatron itself goes on from what was converted in this form's stead
    shutil.rmtree(stacked)
    convert(ToMegatron(tmp_path / "back", tmp_path / "checkpoint"))
    ranks.run(relay, 2, source, tmp_path / "checkpoint" / "policy", stacked, LayoutConfig(tp=2))
    assert_same(source, stacked)
