"""Folders as people have them: an index that leaves tensors out, names with a prefix, the folder of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conversion_steps import contents, differing, export_model, import_model, shard_as_released, tensors_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_qwen3_moe
from torch import Tensor
from transformers import AutoModelForCausalLM

from clipo_megatron.cli.main import main
from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.conversion.newest_step import newest_step
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.conversion.verify import verify
from clipo_megatron.weights.errors import CoverageError, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, SINGLE, HFReader
from clipo_megatron.weights.spec import read_config

# --- an index that leaves tensors out --------------------------------------------------------------------------------


def unnamed(folder: Path, *names: str) -> Path:
    """Take tensors out of the index; their files keep them."""
    index = json.loads((folder / INDEX).read_text())
    for name in names:
        del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def test_a_tensor_that_only_its_file_names_goes_there_and_back(tmp_path: Path) -> None:
    """transformers takes every tensor of a file that the index names, and so does a conversion."""
    source = shard_as_released(tiny_llama(tmp_path / "hf", tied=False))
    whole = tensors_of(source)
    unnamed(source, "model.norm.weight", "lm_head.weight")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(source).lm_head.weight, whole["lm_head.weight"])
    release = export_model(import_model(source, tmp_path / "checkpoint"), tmp_path / "release")
    assert differing(tensors_of(release), whole) == []
    assert set(json.loads((release / INDEX).read_text())["weight_map"]) == set(whole), "the new index is complete"
    verdict = verify(source, release)
    assert verdict.equal, verdict
    assert [each for each in verdict.remarks if "does not name" in each] != [] and not any(verdict.defects.values())


def test_a_tied_output_layer_that_the_index_leaves_out(tmp_path: Path) -> None:
    source = shard_as_released(tiny_llama(tmp_path / "hf", tied=True))
    index = json.loads((source / INDEX).read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(source / file)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / file, {"format": "pt"}
    )
    checkpoint = import_model(source, tmp_path / "checkpoint")
    release = export_model(checkpoint, tmp_path / "release")
    for pair in ((source, checkpoint), (source, release), (checkpoint, release)):
        verdict = verify(*pair)
        assert verdict.equal, verdict


def test_a_file_that_the_index_does_not_name_is_left_alone(tmp_path: Path) -> None:
    source = shard_as_released(tiny_llama(tmp_path / "hf"))
    before = contents(source)
    save_file({"tok_embeddings.weight": torch.zeros(3)}, source / "consolidated.safetensors")
    release = export_model(import_model(source, tmp_path / "checkpoint"), tmp_path / "release")
    assert contents(release) == before
    verdict = verify(source, release)
    assert verdict.equal and f"A: consolidated.safetensors: not named by {INDEX}, and not read" in verdict.remarks


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    source = shard_as_released(tiny_llama(tmp_path / "hf"))
    index = json.loads((source / INDEX).read_text())["weight_map"]
    home = index["model.norm.weight"]
    other = next(file for file in sorted(set(index.values())) if file != home)
    save_file(load_file(source / other) | {"model.norm.weight": torch.zeros(64)}, source / other, {"format": "pt"})
    with pytest.raises(WeightsFolderError, match=r"both hold model\.norm\.weight.*Remove one"):
        HFReader(source)


# --- names with a prefix ---------------------------------------------------------------------------------------------


def renamed(folder: Path, name_of: Callable[[str], str]) -> Path:
    tensors = load_file(folder / SINGLE)
    save_file({name_of(name): tensor for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    return folder


def within_layers(wrapper: str) -> Callable[[str], str]:
    return lambda name: name.replace("self_attn.", f"self_attn.{wrapper}").replace("mlp.", f"mlp.{wrapper}")


PREFIXES = {
    "base_model.model.": (lambda name: f"base_model.model.{name}", "merge_and_unload"),
    "module.": (lambda name: f"module.{name}", "model.module"),
    "_orig_mod.": (lambda name: f"_orig_mod.{name}", "torch.compile"),
    "module._orig_mod.": (lambda name: f"module._orig_mod.{name}", "save_pretrained"),
    "actor.": (lambda name: f"actor.{name}", "a wrapper around the model"),
    "model.": (lambda name: f"model.{name}", "a wrapper around the model"),
    "model.language_model.": (lambda name: name.replace("model.", "model.language_model."), "its language model"),
    "_fsdp_wrapped_module.": (within_layers("_fsdp_wrapped_module."), "FSDP"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_named_in_one_sentence_with_its_remedy(tmp_path: Path, prefix: str, tied: bool) -> None:
    name_of, remedy = PREFIXES[prefix]
    folder = renamed(tiny_llama(tmp_path / "hf", tied=tied), name_of)
    with pytest.raises(CoverageError) as refusal:
        ToMegatron(folder, tmp_path / "out")
    (sentence,) = refusal.value.problems
    assert f"have {prefix!r} in their names, as " in sentence and remedy in sentence


def test_a_model_without_its_output_layer_is_recognised(tmp_path: Path) -> None:
    folder = renamed(tiny_llama(tmp_path / "hf", tied=True), lambda name: name.removeprefix("model."))
    with pytest.raises(CoverageError, match=r"1 problem\).*\n.*lack 'model.' before their names.*AutoModelForCausalLM"):
        ToMegatron(folder, tmp_path / "out")


def test_an_adapter_that_was_not_merged_is_recognised(tmp_path: Path) -> None:
    def adapted(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if "q_proj" not in name:
                yield f"base_model.model.{name}", tensor
                continue
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{stem}.base_layer.weight", tensor
            yield f"{stem}.lora_A.default.weight", torch.zeros(2, tensor.shape[1])

    folder = tiny_llama(tmp_path / "hf")
    save_file(dict(adapted(load_file(folder / SINGLE))), folder / SINGLE, {"format": "pt"})
    with pytest.raises(CoverageError, match=r"1 problem.*\n.*'base_model\.model\.'.*merge_and_unload"):
        ToMegatron(folder, tmp_path / "out")


def test_a_few_wrong_names_are_still_listed_one_by_one(tmp_path: Path) -> None:
    wrong = {"model.norm.weight": "model.final_norm.weight", "model.layers.0.mlp.up_proj.weight": "up.weight"}
    folder = renamed(tiny_llama(tmp_path / "hf"), lambda name: wrong.get(name, name))
    with pytest.raises(CoverageError) as refusal:
        ToMegatron(folder, tmp_path / "out")
    assert len(refusal.value.problems) == 4


# --- the folder of a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The output of a run with checkpoints of steps 2 and 4, whose weights differ."""
    output = tmp_path / "run"
    for step, seed in ((2, 1), (4, 2)):
        model = tiny_llama(tmp_path / f"model{step}", seed=seed)
        checkpoint = import_model(model, output / "checkpoints" / f"step_{step:06d}")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    return output


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_to_hf_takes_the_newest_step_of_a_run_and_names_it(run_folder, tmp_path, capsys, below) -> None:
    assert main(["convert", "to-hf", str(run_folder / below), str(tmp_path / "release")]) == 0
    assert "taking its newest checkpoint, step_000004" in capsys.readouterr().out
    assert differing(tensors_of(tmp_path / "release"), tensors_of(tmp_path / "model4")) == []
    assert main(["convert", "verify", str(tmp_path / "model4"), str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]


def test_a_damaged_newest_step_is_passed_over_and_named(run_folder: Path) -> None:
    (run_folder / "checkpoints" / "step_000004" / "policy" / "common.pt").unlink()
    lines: list[str] = []
    assert newest_step(run_folder, lines.append).name == "step_000002"
    assert lines == [
        f"{run_folder} is a run: taking its newest checkpoint, step_000002; step_000004 is newer and not complete"
    ]
    shutil.rmtree(run_folder / "checkpoints" / "step_000002" / "hf")
    with pytest.raises(ConversionError, match=r"step_000004/policy/common\.pt is missing"):
        newest_step(run_folder)


# --- what config.json leaves out -------------------------------------------------------------------------------------


def test_a_model_whose_config_leaves_out_what_transformers_assumes(tmp_path: Path) -> None:
    """A Qwen3-MoE without num_key_value_heads has four of them, and not as many as heads."""
    folder = tiny_qwen3_moe(tmp_path / "hf", kv_heads=4, heads=8)
    config = json.loads((folder / "config.json").read_text())
    del config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert model_spec(read_config(folder)).num_kv_heads == 4
    release = export_model(import_model(folder, tmp_path / "checkpoint"), tmp_path / "release")
    assert verify(folder, release).equal
