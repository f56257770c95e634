"""Conversions are exact in both directions and in every layout, and give back the source's files byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversion_steps import (
    MODELS,
    contents,
    differing,
    export_model,
    import_model,
    shard_as_released,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.runtime.manifest import manifest_defects
from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.source import open_weights
from clipo_megatron.weights.sharding import (
    QKV,
    Fused,
    GateUp,
    Interleaved,
    Replicated,
    RowParallel,
    Shape,
    Sharding,
    Vocab,
)
from clipo_megatron.weights.spec import read_config

LAYOUTS = {
    "one rank": {},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp4, more than KV heads": {"tp": 4},
    "uneven pipeline": {"pp": 2, "first_layers": 1, "last_layers": 3},
    "virtual stages": {"tp": 2, "pp": 2, "vpp": 2},
}
SHAPES = [(6, 8), (4, 8), (4, 8)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, model: str, layout: str) -> None:
    source = shard_as_released(MODELS[model](tmp_path / "hf"))
    checkpoint = import_model(source, tmp_path / "checkpoint", **LAYOUTS[layout])
    expected = contents(source)
    shutil.rmtree(source)  # not needed again
    assert contents(export_model(checkpoint, tmp_path / "release")) == expected
    assert manifest_defects(checkpoint) == []


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 4, "pp": 2}, {"ep": 2, "etp": 2, "tp": 2}, {"tp": 2, "etp": 1}])
def test_experts_are_divided_and_come_together(tmp_path: Path, sizes: dict[str, int]) -> None:
    source = MODELS["experts"](tmp_path / "hf")
    checkpoint = import_model(source, tmp_path / "checkpoint", **sizes)
    files = sorted(path.name for path in (checkpoint / "policy").glob("__0_ep*.distcp"))
    assert len(files) == sizes.get("ep", 1) * sizes.get("etp", sizes.get("tp", 1))
    assert contents(export_model(checkpoint, tmp_path / "release")) == contents(source)


@pytest.mark.parametrize("piece", [pytest.param(200, marks=pytest.mark.full), 3000])
def test_tensors_larger_than_a_piece_are_cut_and_joined(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("to_megatron", "to_hf"):
        monkeypatch.setattr(f"clipo_megatron.conversion.{module}.PIECE_BYTES", piece)
        monkeypatch.setattr(f"clipo_megatron.conversion.{module}.UNIT_BYTES", 10 * piece)
    for number, make in enumerate(MODELS.values()):
        source = make(tmp_path / f"hf{number}")
        checkpoint = import_model(source, tmp_path / f"checkpoint{number}", tp=2)
        assert len(list((checkpoint / "policy").glob("__0_tp0_*.distcp"))) > 3
        assert contents(export_model(checkpoint, tmp_path / f"release{number}")) == contents(source)


def test_a_tied_output_layer_that_the_source_holds_is_given_back(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "hf", tied=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = import_model(source, tmp_path / "checkpoint", tp=2)
    assert contents(export_model(checkpoint, tmp_path / "release")) == contents(source)


def test_buffers_that_config_json_gives_are_left_out_and_named(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, buffer: torch.ones(8)}, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = import_model(source, tmp_path / "checkpoint")
    release = export_model(checkpoint, tmp_path / "release")
    assert differing(tensors_of(release), tensors) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_on_the_way_is_torchs_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny_qwen2(tmp_path / "hf", tied=False)
    cast = {name: tensor.to(dtype) for name, tensor in tensors_of(source).items()}
    name = str(dtype).removeprefix("torch.")
    on_import = import_model(source, tmp_path / "low", dtype=dtype, tp=2)
    for checkpoint, options in ((on_import, {}), (import_model(source, tmp_path / "high"), {"dtype": dtype})):
        release = export_model(checkpoint, tmp_path / f"release of {checkpoint.name}", **options)
        assert differing(tensors_of(release), cast) == []
        config = json.loads((release / "config.json").read_text())
        assert (config.get("dtype") or config["torch_dtype"]) == name
        original = json.loads((source / "config.json").read_text())
        assert {key for key in config if config[key] != original.get(key)} <= {"dtype", "torch_dtype"}


def test_files_are_no_larger_than_wanted_and_transformers_loads_them(tmp_path: Path) -> None:
    source = tiny_qwen2(tmp_path / "hf", tied=False)
    checkpoint = import_model(source, tmp_path / "checkpoint", tp=2)
    release = export_model(checkpoint, tmp_path / "release", shard_bytes=150_000)
    shards = sorted(release.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 150_000 + 10_000 for path in shards)
    tokens = torch.arange(20)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, release)]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    assert AutoTokenizer.from_pretrained(release).encode("hello") == AutoTokenizer.from_pretrained(source).encode(
        "hello"
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_reads_like_its_source(tmp_path: Path, model: str) -> None:
    source = MODELS[model](tmp_path / "hf")
    checkpoint = import_model(source, tmp_path / "checkpoint", tp=2, pp=2)
    spec = model_spec(read_config(hf_folder(checkpoint)))
    expected = tensors_of(source)
    with open_weights(checkpoint) as reader:
        check_tensors(reader, spec)
        assert differing({name: reader.get(name) for name in reader.names()}, expected) == []
        for name, tensor in expected.items():
            view = reader.view(name)
            assert tuple(view.shape) == tensor.shape
            assert torch.equal(view[3:7], tensor[3:7])
            if tensor.dim() == 2:
                assert torch.equal(view[1:, 2:5], tensor[1:, 2:5])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("sharding", "shapes"),
    [
        (QKV(2), [(16, 8), (8, 8), (8, 8)]),
        (GateUp(), [(8, 8), (8, 8)]),
        (Interleaved(), [(8, 8)]),
        (RowParallel(), [(8, 8)]),
        (Replicated(), [(8,)]),
        (Fused(QKV(2), (16, 8, 8)), [(32, 8)]),
        (Fused(GateUp(), (8, 8)), [(16, 8)]),
        (Vocab(), [(8, 8)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sharding) else "",
)
def test_slices_and_row_spans_agree_with_shard(sharding: Sharding, shapes: list[Shape], size: int) -> None:
    sources = [torch.randn(shape) for shape in shapes]
    alone = torch.empty(sharding.local_shape(shapes, 1))
    sharding.shard(sources, alone, rank=0, size=1)
    together = torch.full_like(alone, torch.nan)
    for rank in range(size):
        part = torch.empty(sharding.local_shape(shapes, size))
        sharding.shard(sources, part, rank=rank, size=size)
        assert sharding.whole_shape(tuple(part.shape), size) == alone.shape
        for piece in sharding.slices(tuple(part.shape), shapes, rank=rank, size=size):
            rows = part[piece.start : piece.stop]
            place = tuple(slice(at, at + n) for at, n in zip(piece.offset, rows.shape, strict=True))
            together[place] = rows
    assert torch.equal(together, alone)
    for number, source in enumerate(sources):
        found = torch.cat([alone[run.at : run.at + run.rows] for run in sharding.row_spans(shapes, number)])
        assert torch.equal(found, source)
        starts = [run.start for run in sharding.row_spans(shapes, number)]
        assert starts == sorted(starts)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "hf")
    with pytest.raises(WeightsError, match="4 layers cannot be divided"):
        import_model(source, tmp_path / "out", pp=3)
    with pytest.raises(WeightsError, match="cannot be divided into 5"):
        import_model(source, tmp_path / "out", tp=5)
    checkpoint = import_model(source, tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match="is a checkpoint already"):
        import_model(checkpoint, tmp_path / "out")
    with pytest.raises(WeightsError, match="no optimizer's masters"):
        export_model(checkpoint, tmp_path / "out", master=True)
    with pytest.raises(WeightsError, match="is no checkpoint"):
        export_model(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_smollm2_both_ways(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = import_model(smollm2, tmp_path / "checkpoint", tp=3, pp=2)
    release = export_model(checkpoint, tmp_path / "release")
    source = {name: code for name, code in contents(smollm2).items() if "/" not in name and not name.startswith(".")}
    assert contents(release) == source
