"""Loading folders: in every layout, only a rank's own bytes, and an error for everything that does not match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3
from torch import Tensor

from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.errors import CoverageError, UnsupportedModel, WeightsFolderError
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import INDEX, SINGLE, HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.mapping import Coordinates, MappingEntry, PipelineStage, even_stages
from clipo_megatron.weights.spec import ModelSpec, read_config

Tensors = dict[str, Tensor]


def empty_model(
    spec: ModelSpec, stage: PipelineStage, *, tp: int, dtype: torch.dtype = torch.float32, te: bool = False
) -> Tensors:
    """Make the parameters of one chunk with Megatron's names, filled with NaN."""
    return {
        entry.megatron[-1 if te else 0]: torch.full(
            entry.sharding.local_shape(entry.shapes, tp), float("nan"), dtype=dtype
        )
        for entry in entries(spec, stage)
    }


def load(folder: Path, model: Tensors, stage: PipelineStage, *, rank: int = 0, tp: int = 1) -> int:
    """Fill a model and return the bytes that were read."""
    spec = model_spec(read_config(folder))
    with HFReader(folder) as reader:
        load_into(model.items(), entries(spec, stage), reader, Coordinates(tp=tp, tp_rank=rank))
        return reader.bytes_read


def whole(spec: ModelSpec) -> PipelineStage:
    return even_stages(spec.num_layers, 1)[0]


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path, files: int = 3) -> None:
    """Replace the single file by several files with an index."""
    tensors = load_file(folder / SINGLE)
    weight_map = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / SINGLE).unlink()


def unsharded(entry: MappingEntry, parts: list[Tensor]) -> list[tuple[str, Tensor]]:
    targets = [torch.full(tensor.shape, float("nan"), dtype=parts[0].dtype) for tensor in entry.hf]
    entry.sharding.unshard(torch.stack(parts), targets)
    return [(tensor.name, target) for tensor, target in zip(entry.hf, targets, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_phi3])
def test_there_and_back_in_any_layout(
    family: Callable[..., Path], tp: int, pp: int, tied: bool, te: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"head_dim": 24, "hidden": 64} if family is tiny_llama else {}  # 4 x 24 != 64
    folder = family(tmp_path, tied=tied, vocab=263, **sizes)
    spec = model_spec(read_config(folder))
    back: Tensors = {}
    for stage in even_stages(spec.num_layers, pp):
        ranks = [empty_model(spec, stage, tp=tp, dtype=dtype, te=te) for _ in range(tp)]
        for rank, model in enumerate(ranks):
            load(folder, model, stage, rank=rank, tp=tp)
            assert not any(parameter.isnan().any() for parameter in model.values())
        for entry in entries(spec, stage):
            name = entry.name_in(ranks[0])
            assert name is not None
            for hf_name, tensor in unsharded(entry, [model[name] for model in ranks]):
                assert entry.copy == (hf_name in back)
                back[hf_name] = tensor
    source = load_file(folder / SINGLE)
    assert back.keys() == source.keys()
    assert [name for name in source if not torch.equal(back[name], source[name].to(dtype))] == []


def test_a_rank_reads_only_its_part(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=False, vocab=260)
    spec = model_spec(read_config(folder))
    stage = whole(spec)
    model = empty_model(spec, stage, tp=2)
    nbytes = load(folder, model, stage, rank=1, tp=2)
    assert nbytes == sum(parameter.nbytes for parameter in model.values())
    assert nbytes < 0.51 * (folder / SINGLE).stat().st_size


def test_a_stage_opens_only_its_files(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    tensors = load_file(folder / SINGLE)
    last = {name: "b.safetensors" for name in tensors if ".layers.3." in name or name == "model.norm.weight"}
    weight_map = {name: last.get(name, "a.safetensors") for name in tensors}
    save_file({name: tensors[name] for name in last}, folder / "b.safetensors")
    (folder / "a.safetensors").write_bytes(b"not safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SINGLE).unlink()
    spec = model_spec(read_config(folder))
    middle = PipelineStage(offset=3, layers=1, first=False, last=False)
    load(folder, empty_model(spec, middle, tp=1), middle)
    with pytest.raises(WeightsFolderError, match=r"a\.safetensors is damaged or truncated"):
        load(folder, empty_model(spec, whole(spec), tp=1), whole(spec))


def test_sharded_folders_hold_the_same(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path)
    expected = load_file(folder / SINGLE)
    shard(folder)
    with HFReader(folder) as reader:
        assert set(reader.names()) == set(expected)
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in expected.items())
        check_tensors(reader, model_spec(read_config(folder)))


def test_parameters_of_a_module_are_filled_in_place(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    spec = model_spec(read_config(folder))
    model = empty_model(spec, whole(spec), tp=1, dtype=torch.bfloat16)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in model.items()}
    load(folder, parameters, whole(spec))
    norm = load_file(folder / SINGLE)["model.norm.weight"]
    assert torch.equal(parameters["decoder.final_layernorm.weight"], norm.bfloat16())
    assert all(parameter.grad_fn is None and parameter.requires_grad for parameter in parameters.values())


# --- what does not match ---------------------------------------------------------------------------------------------


def refusal(folder: Path, change: Callable[[Tensors], None] = lambda model: None, *, tp: int = 1) -> list[str]:
    """Return the problems that loading reports; the model must be unchanged."""
    spec = model_spec(read_config(folder))
    model = empty_model(spec, whole(spec), tp=tp)
    change(model)
    with pytest.raises(CoverageError) as error:
        load(folder, model, whole(spec), tp=tp)
    assert all(parameter.isnan().all() for parameter in model.values())
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


def test_missing_and_renamed_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)

    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")

    rewrite(folder, change)
    problems = refusal(folder)
    assert [problem.split()[-1] for problem in problems] == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    with HFReader(folder) as reader, pytest.raises(CoverageError) as error:
        check_tensors(reader, model_spec(read_config(folder)))
    assert len(error.value.problems) == 3
    assert f"no parameter takes tensor model.final_norm.weight of {folder}" in error.value.problems


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    (problem,) = refusal(folder)
    assert name in problem and "[64, 64]" in problem and "[32, 64]" in problem


def test_parameters_without_entry_and_entries_without_parameter_are_named(tmp_path: Path) -> None:
    def change(model: Tensors) -> None:
        model["decoder.layers.0.mlp.linear_fc1.bias"] = torch.full((3,), float("nan"))
        del model["decoder.layers.2.input_layernorm.weight"]

    problems = refusal(tiny_llama(tmp_path), change)
    assert len(problems) == 2
    assert "decoder.layers.2.input_layernorm.weight or decoder.layers.2.self_attention.linear_qkv" in problems[0]
    assert problems[1] == "nothing fills parameter decoder.layers.0.mlp.linear_fc1.bias"


def test_both_names_of_one_norm_are_one_too_many(tmp_path: Path) -> None:
    twin = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    problems = refusal(tiny_llama(tmp_path), lambda model: model.update({twin: torch.full((64,), float("nan"))}))
    assert problems == [f"nothing fills parameter {twin}"]


def test_a_parameter_of_another_layout_is_named(tmp_path: Path) -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    (problem,) = refusal(
        tiny_llama(tmp_path), lambda model: model.update({name: torch.full((64, 112), float("nan"))}), tp=2
    )
    assert name in problem and "[64, 112]" in problem and "[64, 56]" in problem and "2 TP ranks" in problem


def test_extra_tensors_are_named_and_old_buffers_are_not(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    spec = model_spec(read_config(folder))
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    with HFReader(folder) as reader:
        check_tensors(reader, spec)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}))
    with HFReader(folder) as reader, pytest.raises(CoverageError) as error:
        check_tensors(reader, spec)
    assert error.value.problems == [f"no parameter takes tensor model.layers.0.self_attn.o_proj.bias of {folder}"]


def test_a_tied_folder_may_repeat_its_embedding_but_not_contradict_it(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=True)
    spec = model_spec(read_config(folder))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with HFReader(folder) as reader:
        check_tensors(reader, spec)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
    with HFReader(folder) as reader, pytest.raises(UnsupportedModel, match="tie_word_embeddings"):
        check_tensors(reader, spec)


def test_an_untied_folder_needs_its_output_layer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=False)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(folder) == [f"{folder} has no tensor lm_head.weight"]


# --- damaged folders -------------------------------------------------------------------------------------------------


def test_truncated_file(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    content = (folder / SINGLE).read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (folder / SINGLE).write_bytes(content[:length])
        with pytest.raises(WeightsFolderError, match=r"model\.safetensors is damaged or truncated"):
            HFReader(folder)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsFolderError, match="neither"):
        HFReader(tmp_path)


def test_index_faults_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"]

    def opened(**changes: str) -> HFReader:
        (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
        return HFReader(folder)

    with pytest.raises(WeightsFolderError, match=r"lacks files .*: gone\.safetensors"):
        opened(x="gone.safetensors")
    with pytest.raises(WeightsFolderError, match="outside its folder"):
        opened(x="../model.safetensors")
    file = weight_map["model.norm.weight"]
    with opened(invented=file) as reader, pytest.raises(WeightsFolderError, match=f"{file} does not hold 'invented'"):
        reader.get("invented")
    with opened() as reader, pytest.raises(WeightsFolderError, match=r"no tensor 'invented'"):
        reader.get("invented")
    with pytest.raises(WeightsFolderError, match="3 is no file name"):
        opened(x=3)
    (folder / INDEX).write_text("[]")
    with pytest.raises(WeightsFolderError, match="cannot be read"):
        HFReader(folder)


def test_a_closed_reader_says_so(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path))
    reader.close()
    reader.close()
    with pytest.raises(WeightsFolderError, match="closed"):
        reader.get("model.norm.weight")
