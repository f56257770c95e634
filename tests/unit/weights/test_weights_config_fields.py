"""config.json of somebody: every field that is read has its type and range, and all else is refused by its name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from clipo_megatron.config.model_folder import ModelFileError, foreign_links, read_object
from clipo_megatron.weights.config_fields import FIELDS
from clipo_megatron.weights.errors import UnsupportedModel, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.header import parse_header
from clipo_megatron.weights.formats.source import sidecar_files

MODEL = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
WRONG = {
    "max_position_embeddings": ("x", None, 0, -5, 1.5, True, float("nan"), 10**30, [1]),
    "model_type": ({}, 5, ["llama"]),
    "architectures": ({}, "LlamaForCausalLM", [{}], 7),
    "rms_norm_eps": (None, "x", float("nan"), float("inf"), -1, 5, [], False),
    "eos_token_id": ("x", {}, ["x"], 1.5, True, 10**30),
    "dtype": ("x", 5, "int8", "device", "nn"),
    "torch_dtype": ("float99", {}),
    "hidden_size": (-1, 0, 10**12, "4096", None, [64]),
    "num_hidden_layers": (10**6, -1, "2", 2.0, None),
    "num_attention_heads": (0, 10**9, None),
    "num_key_value_heads": ("2", -1, [2]),
    "head_dim": ("x", -8, 10**9),
    "vocab_size": (None, -1, 10**15, "x"),
    "num_experts": (10**9, -1, "x"),
    "rope_theta": ("x", float("nan"), -1.0, 0, [1e4]),
    "rope_scaling": (5, "x", ["linear"], {"rope_type": {}, "factor": 2}, {"rope_type": "linear", "factor": "2"}),
    "rope_parameters": ([], "x", {"rope_theta": "x"}),
    "sliding_window": ("x", -1, {}),
    "tie_word_embeddings": ("no", 1, []),
    "layer_types": ("full_attention", [5], {}),
    "mlp_only_layers": (5, ["x"], [-1]),
    "decoder_sparse_step": (0, "x"),
    "norm_topk_prob": ("yes", 2),
    "hidden_act": (None, 5, {}),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_value_of_another_type_or_size_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedModel) as refusal:
        model_spec(MODEL | {field: value})
    if field == "model_type":
        assert refusal.value.value == value
    assert refusal.value.field.startswith(field) and len(str(refusal.value)) < 400


def test_every_field_with_a_type_says_what_it_may_hold():
    model_spec(MODEL)
    assert all(kind.words for kind in FIELDS.values())


def test_a_million_layers_are_refused_at_once():
    start = time.process_time()
    for sizes in ({"num_hidden_layers": 10**6}, {"num_hidden_layers": 4000, "num_experts": 16_000}):
        with pytest.raises(UnsupportedModel):
            model_spec(MODEL | sizes)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", '"x"', '{"a": ' + "9" * 5000 + "}"])
def test_a_file_that_holds_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json (cannot be read|holds a)"):
        read_object(tmp_path / "config.json")


def header(**tensor: object) -> str:
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | tensor})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (header(shape=[-1, -2]), "x has no shape or place of whole numbers"),
        (header(shape=[2.0]), "x has no shape or place of whole numbers"),
        (header(shape=[True, 2]), "x has no shape or place of whole numbers"),
        (header(shape="ab"), "x has no shape"),
        (header(data_offsets=[0, 4]), "the bytes of x are misplaced"),
        (header(data_offsets=[4, 12]), "the bytes of x are misplaced"),
        (header(data_offsets=[0]), "the bytes of x are misplaced"),
        (header(data_offsets=None), "no safetensors header"),
        (header(dtype="F99"), "x has the element type 'F99'"),
        (header(dtype=[]), "no safetensors header"),
        ("[" * 100_000, "no safetensors header"),
    ],
)
def test_a_header_that_lies_is_named(text, reason):
    with pytest.raises(WeightsFolderError) as refusal:
        parse_header(text, "file.safetensors")
    assert reason in str(refusal.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models--a--b" / "snapshots" / "1234"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("a key")
    return folder


@pytest.mark.parametrize("target", ["../../../secret", "{outside}/secret", "inner"])
def test_a_link_out_of_the_folder_is_no_part_of_the_model(model, tmp_path, target):
    (model / "inner").symlink_to(tmp_path / "secret")
    (model / "merges.txt").symlink_to(target.format(outside=tmp_path))
    assert model / "merges.txt" in list(foreign_links(model))
    with pytest.raises(WeightsFolderError, match=r"is a link to .*, outside the model's folder"):
        sidecar_files(model)


def test_links_of_the_hubs_cache_and_within_the_folder_are_followed(model):
    blobs = model.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "abcd").write_text("text")
    (model / "merges.txt").symlink_to("../../blobs/abcd")
    (model / "copy.json").symlink_to("config.json")
    (model / "weights.safetensors").symlink_to("/elsewhere")
    assert not list(foreign_links(model))
