"""Planted faults: each must be caught by the check that is meant for it, and be named.

verify   the bytes of two folders, their architecture, a checkpoint against its manifest
coverage a folder against the mapping, before a conversion writes anything
logits   what a mapping that is wrong in both directions makes of a model: no round trip can see that
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron_model import megatron_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_qwen3_moe
from torch import Tensor

from clipo_megatron.cli import main as cli
from clipo_megatron.conversion import logits as through_transformers
from clipo_megatron.conversion.running import convert
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.conversion.verify import VerificationReport, verify
from clipo_megatron.weights import families
from clipo_megatron.weights.errors import CoverageError, UnsupportedModel, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, SINGLE, HFReader
from clipo_megatron.weights.formats.safetensors import SafetensorsFile
from clipo_megatron.weights.mapping import Rule
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import GateUp
from clipo_megatron.weights.spec import read_config

LAYER = "model.layers.1."
EXPERTS = LAYER + "mlp.experts."


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with as many KV heads as heads, so that q and k have one shape; read-only."""
    return tiny_llama(tmp_path_factory.mktemp("dense") / "model", tied=False, kv_heads=4, vocab=264)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts; read-only."""
    return tiny_qwen3_moe(tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module")
def checkpoint(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model, converted; read-only."""
    target = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(ToMegatron(dense, target, division=ParallelDivision(tp=2, pp=2)))
    return target


def mutated(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a Hugging Face folder with changed tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / SINGLE, {"format": "pt"})
    return target


def swap(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for one, other in pairs:
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def differences(verdict: VerificationReport) -> dict[str, str]:
    """Return what is said of each tensor that differs, by name."""
    assert verdict.comparison is not None
    return {each.name: each.detail for each in verdict.comparison.differences}


PARTS = ("gate_proj", "up_proj", "down_proj")
SWAPS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "q and k": ("dense", [(f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight")]),
    "gate and up": ("dense", [(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")]),
    "two experts": ("sparse", [(f"{EXPERTS}2.{part}.weight", f"{EXPERTS}5.{part}.weight") for part in PARTS]),
}


@pytest.mark.parametrize("name", SWAPS)
def test_verify_names_a_swap(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, pairs = SWAPS[name]
    true = request.getfixturevalue(fixture)
    wrong = mutated(true, tmp_path / "wrong", swap(*pairs))
    verdict = verify(true, wrong, with_logits=True)
    found = differences(verdict)
    assert found.keys() == {tensor for pair in pairs for tensor in pair}
    for one, other in pairs:
        assert found[one].endswith(f"B's holds what A has as {other}")
        assert found[other].endswith(f"B's holds what A has as {one}")
    assert verdict.logits is not None and verdict.logits.relative > 1e-3 and not verdict.equal


def test_verify_finds_a_swap_that_a_checkpoint_has(dense: Path, tmp_path: Path) -> None:
    """The conversion of a wrong folder is compared with the right folder, through the reader of checkpoints."""
    pair = SWAPS["q and k"][1]
    convert(ToMegatron(mutated(dense, tmp_path / "wrong", swap(*pair)), tmp_path / "checkpoint"))
    verdict = verify(dense, tmp_path / "checkpoint")
    assert differences(verdict).keys() == set(pair[0]) and verdict.defects == {"A": [], "B": []}


def test_a_zeroed_norm(dense: Path, tmp_path: Path) -> None:
    norm = f"{LAYER}post_attention_layernorm.weight"
    wrong = mutated(dense, tmp_path / "wrong", lambda tensors: tensors[norm].zero_())
    verdict = verify(dense, wrong, with_logits=True)
    assert "B's are all zero" in differences(verdict).pop(norm)
    assert verdict.logits is not None and verdict.logits.relative > 1e-3


def test_a_wrong_theta(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    """No tensor differs, but the architecture and the logits do."""
    wrong = tmp_path / "wrong"
    shutil.copytree(dense, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (wrong / "config.json").write_text(json.dumps(config))
    for other in (dense, checkpoint):
        verdict = verify(other, wrong, with_logits=True)
        assert differences(verdict) == {} and not verdict.equal
        assert verdict.architecture == ["rope_theta is 10000.0 in A and 20000.0 in B"]
        assert not verify(other, wrong).equal  # without the logits too
        assert verdict.logits is not None and verdict.logits.relative > 1e-3 and not verdict.logits_agree


def test_a_missing_expert(sparse: Path, tmp_path: Path) -> None:
    names = {f"{EXPERTS}3.{part}.weight" for part in PARTS}

    def remove(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    wrong = mutated(sparse, tmp_path / "wrong", remove)
    assert differences(verify(sparse, wrong)) == dict.fromkeys(names, "only A has it")
    with pytest.raises(CoverageError) as caught:
        ToMegatron(wrong, tmp_path / "out")
    assert sorted(caught.value.problems) == sorted(f"{wrong} has no tensor {name}" for name in names)


def test_an_extra_tensor(dense: Path, tmp_path: Path) -> None:
    extra = f"{LAYER}self_attn.o_proj.bias"
    wrong = mutated(dense, tmp_path / "wrong", lambda tensors: tensors.update({extra: torch.zeros(64)}))
    assert differences(verify(dense, wrong)) == {extra: "only B has it"}
    with pytest.raises(CoverageError, match=f"no parameter takes tensor {extra}"):
        ToMegatron(wrong, tmp_path / "out")


def test_a_tensor_that_the_index_does_not_name(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    assert verify(dense, folder).equal
    save_file(tensors | {"stray.weight": torch.zeros(3)}, folder / "part.safetensors", {"format": "pt"})
    verdict = verify(dense, folder)
    assert not verdict.equal and differences(verdict) == {"stray.weight": "only B has it"}
    assert f"B: part.safetensors holds stray.weight, which {INDEX} does not name; compared all the same" in (
        verdict.remarks
    )
    with pytest.raises(CoverageError, match=r"no parameter takes tensor stray\.weight .*part\.safetensors holds it"):
        ToMegatron(folder, tmp_path / "out")


def test_a_dtype_that_changed(dense: Path, tmp_path: Path) -> None:
    name = f"{LAYER}mlp.down_proj.weight"

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].bfloat16()

    assert differences(verify(dense, mutated(dense, tmp_path / "wrong", cast))) == {
        name: "A's dtype is float32, B's is bfloat16"
    }


def test_a_tied_output_layer_that_differs(tmp_path: Path) -> None:
    true = tiny_llama(tmp_path / "true", tied=True)

    def spell_out(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def alter(tensors: dict[str, Tensor]) -> None:
        spell_out(tensors)
        tensors["lm_head.weight"][7, 3] += 1

    assert verify(true, mutated(true, tmp_path / "spelt out", spell_out)).equal
    wrong = mutated(true, tmp_path / "wrong", alter)
    assert "1 of 16,576 values differ, by 1 at most" in differences(verify(true, wrong))["lm_head.weight"]
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        ToMegatron(wrong, tmp_path / "out")


@pytest.mark.parametrize("lost", [1, 100_000])
def test_a_truncated_file(lost: int, dense: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(dense, wrong)
    file = wrong / SINGLE
    file.write_bytes(file.read_bytes()[:-lost])
    verdict = verify(dense, wrong)
    assert not verdict.equal and verdict.comparison is None
    assert len(verdict.defects["B"]) == 1 and str(file) in verdict.defects["B"][0] and verdict.defects["A"] == []
    with pytest.raises(WeightsFolderError, match=SINGLE):
        ToMegatron(wrong, tmp_path / "out")


def flip(file: Path, position: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_of_a_safetensors_file(dense: Path, tmp_path: Path) -> None:
    name = f"{LAYER}self_attn.o_proj.weight"
    wrong = tmp_path / "wrong"
    shutil.copytree(dense, wrong)
    file = SafetensorsFile(dense / SINGLE)
    flip(wrong / SINGLE, file.header.tensors[name].start + 41)
    file.close()
    found = differences(verify(dense, wrong))
    assert found.keys() == {name} and found[name].startswith("1 of 4,096 values differ")


def test_a_flipped_bit_of_every_file_of_a_checkpoint(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    """`verify` finds the file by the manifest, and the conversion back refuses it."""
    assert verify(dense, checkpoint).equal
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    assert sum(name.endswith(".distcp") for name in names) > 4 and "hf/config.json" in names
    for number, name in enumerate(names):
        if name == "manifest.json":
            continue
        wrong = tmp_path / str(number)
        shutil.copytree(checkpoint, wrong)
        size = (wrong / name).stat().st_size
        flip(wrong / name, size // 2)
        try:
            verdict = verify(dense, wrong)
        except (WeightsFolderError, UnsupportedModel) as error:  # config.json itself cannot be read any more
            assert str(wrong / name) in str(error)
            continue
        assert not verdict.equal, name
        assert f"the bytes of {wrong / name} are not those that were written" in verdict.defects["B"]
        shutil.rmtree(wrong)


def test_a_flipped_bit_of_a_weight_in_a_checkpoint(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    """`verify` names the tensor as well as the file."""
    wrong = tmp_path / "wrong"
    shutil.copytree(checkpoint, wrong)
    norm = f"{LAYER}input_layernorm.weight"
    raw = load_file(dense / SINGLE)[norm].numpy().tobytes()
    (file,) = [path for path in (wrong / "policy").glob("*.distcp") if raw in path.read_bytes()]
    flip(file, file.read_bytes().index(raw) + 2)
    verdict = verify(dense, wrong)
    assert differences(verdict).keys() == {norm}
    assert verdict.defects["B"] == [f"the bytes of {file} are not those that were written"]
    with pytest.raises(ValueError, match=file.name):
        convert(ToHF(wrong, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_that_lost_a_file(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(checkpoint, wrong)
    file = sorted((wrong / "policy").glob("__1_tp1*.distcp"))[0]
    file.unlink()
    verdict = verify(dense, wrong)
    assert any(str(file) in defect for defect in verdict.defects["B"])
    damaged = [
        each for each in (verdict.comparison.differences if verdict.comparison else ()) if file.name in each.detail
    ]
    assert damaged and not verdict.equal


# ---------------------------------------------------------------- faults of the mapping itself


Rules = Callable[[Any], list[Rule]]


def changed_rules(change: Callable[[Rule], Rule]) -> Rules:
    right = families.FAMILIES["llama"].rules
    return lambda spec: [change(rule) for rule in right(spec)]


def sources_reordered(suffix: str, order: Sequence[int]) -> Callable[[Rule], Rule]:
    """Reorder the tensors of the rule whose parameter ends with `suffix`."""

    def change(rule: Rule) -> Rule:
        names = (rule.megatron,) if isinstance(rule.megatron, str) else rule.megatron
        if not names[0].endswith(suffix):
            return rule
        tensors = list(rule.hf.items())
        return replace(rule, hf=dict(tensors[i] for i in order))

    return change


def interleaved_by_two(rule: Rule) -> Rule:
    """Interleave fc1 in two groups for every TP size, which is right for TP 2 only."""
    return replace(rule, sharding=GateUp(groups=2)) if isinstance(rule.sharding, GateUp) else rule


MAPPINGS: dict[str, Callable[[Rule], Rule]] = {
    "q and k swapped": sources_reordered("linear_qkv.weight", (1, 0, 2)),
    "k and v swapped": sources_reordered("linear_qkv.weight", (0, 2, 1)),
    "gate and up swapped": sources_reordered("mlp.linear_fc1.weight", (1, 0)),
    "gate and up interleaved": interleaved_by_two,
}


def megatron_logits(folder: Path, checkpoint: Path, like: Tensor) -> Tensor:
    """Compute the logits of the fixed prompts with megatron-core's model, loaded from a checkpoint by its own keys."""
    prompts = through_transformers.fixed_prompts(like.shape[-1], 2048)
    with megatron_model(model_spec(read_config(folder)), 1, 1, 0) as built, torch.no_grad():
        sharded = built.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        wanted = {each.key: each.data for each in sharded.values() if isinstance(each.data, Tensor)}
        assert len(wanted) == len(list(built.parameters()))
        dcp.load(wanted, checkpoint_id=checkpoint / "policy", no_dist=True)
        positions = torch.arange(prompts.shape[1]).expand_as(prompts)
        later = torch.ones(prompts.shape[1], prompts.shape[1], dtype=torch.bool).triu(1)
        return built.eval()(prompts, positions, later[None, None])


@pytest.mark.parametrize("name", MAPPINGS)
def test_the_logits_notice_a_mapping_that_undoes_itself(
    name: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round trip is exact and `verify` finds no difference, but Megatron computes something else."""
    right = ToMegatron(dense, tmp_path / "right")
    convert(right)
    wrong_rules = changed_rules(MAPPINGS[name])
    with monkeypatch.context() as patched:
        patched.setitem(families.FAMILIES, "llama", replace(families.FAMILIES["llama"], rules=wrong_rules))
        convert(ToMegatron(dense, tmp_path / "wrong"))
        convert(ToHF(tmp_path / "wrong", tmp_path / "back"))
        assert verify(dense, tmp_path / "back").equal
        assert verify(dense, tmp_path / "wrong").equal
    with HFReader(dense) as reader:
        true = through_transformers.logits(reader, dense)
    errors = [
        through_transformers.difference(true, megatron_logits(dense, tmp_path / each, true)).relative
        for each in ("right", "wrong")
    ]
    assert errors[0] < 1e-5 and errors[1] > 1e-3
    assert verify(dense, tmp_path / "right").equal
    assert not verify(dense, tmp_path / "wrong").equal  # by the right mapping


# ---------------------------------------------------------------- the command


def test_the_command(dense: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "verify", str(dense), str(checkpoint), "--logits"]) == 0
    shown = capsys.readouterr().out
    assert "equal: 39 tensors, every tensor by its SHA-256, and the logits" in shown
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    wrong = mutated(dense, tmp_path / "wrong", lambda tensors: [tensors[name].zero_() for name in names])
    assert cli.main(["convert", "verify", str(checkpoint), str(wrong), "--show", "3"]) == 1
    shown = capsys.readouterr().out
    assert [name in shown for name in names] == [True, True, True, False]
    assert "and 1 more" in shown and "NOT equal: 4 of 39 tensors differ" in shown
    assert cli.main(["convert", "verify", str(checkpoint), str(wrong), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["differences"]] == names
    assert told["equal"] is False and told["equal_tensors"] == 35 and told["a"]["tensors"] == 39
    assert told["differences"][0]["a"]["sha256"] != told["differences"][0]["b"]["sha256"]
    assert cli.main(["convert", "verify", str(dense), str(tmp_path / "nothing")]) == 2
    assert "nothing/config.json does not exist" in capsys.readouterr().err


def test_a_checkpoint_without_its_config(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "hf")
    with pytest.raises(WeightsFolderError, match=r"old holds no hf/ with config\.json.*to-hf .*old OUT --hf MODEL"):
        verify(checkpoint, tmp_path / "old")


def test_a_conversion_that_cast(dense: Path, tmp_path: Path) -> None:
    convert(ToMegatron(dense, tmp_path / "bf16", dtype=torch.bfloat16))
    assert verify(dense, tmp_path / "bf16").comparison.equal == 0
    verdict = verify(dense, tmp_path / "bf16", cast=torch.bfloat16)
    assert verdict.equal and verdict.comparison.equal == 39
