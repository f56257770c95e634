"""Released models: the facts of their config.json, and their number of parameters."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.mapping import PipelineStage
from clipo_megatron.weights.rope import Llama3Rope
from clipo_megatron.weights.spec import ModelSpec

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config(family: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict:
    """Make a config.json with the fields that all models have."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv, "attention_dropout": 0.0}
    return {"model_type": family, "hidden_act": "silu", **sizes, **attention, "use_cache": True, **more}


QWEN2 = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21, "use_mrope": False}
LLAMA = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
NO_WINDOW = {"sliding_window": None, "rope_theta": 1e6}
# name: (config.json, parameters as published)
RELEASES: dict[str, tuple[dict[str, Any], int]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        config("qwen2", 1536, 8960, 28, 12, 2, 151936, rope_theta=10000, tie_word_embeddings=False, **QWEN2),
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        config("llama", 4096, 14336, 32, 32, 8, 128256, rope_theta=5e5, rope_scaling=LLAMA3, **LLAMA),
        8_030_261_248,
    ),
    "SmolLM2-135M": (
        config(
            "llama", 576, 1536, 30, 9, 3, 49152, rope_theta=100000, rope_interleaved=False, is_llama_config=True,
            rope_scaling=None, tie_word_embeddings=True, **LLAMA,
        ),
        134_515_008,
    ),
    "Qwen3-8B": (
        config(
            "qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128, rope_theta=1000000, attention_bias=False,
            use_sliding_window=False, sliding_window=None, max_window_layers=36, rope_scaling=None,
        ),
        8_190_735_360,
    ),
    "Mistral-7B-v0.1": (
        config("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096, rope_theta=10000.0), 7_241_732_096,
    ),
    "Mistral-7B-v0.3": (config("mistral", 4096, 14336, 32, 32, 8, 32768, **NO_WINDOW), 7_248_023_552),
    "Mistral-Nemo": (config("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128, **NO_WINDOW), 12_247_782_400),
    "Phi-3-mini-4k": (
        config(
            "phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=2047, rope_theta=10000.0, rope_scaling=None,
            max_position_embeddings=4096, original_max_position_embeddings=4096, attention_bias=False,
            auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        ),
        3_821_079_552,
    ),
}  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    return model_spec(RELEASES[name][0])


@pytest.mark.parametrize("name", RELEASES)
def test_the_tensors_have_the_published_number_of_parameters(name: str) -> None:
    spec = spec_of(name)
    bound = entries(spec, PipelineStage(0, spec.num_layers, first=True, last=True))
    assert sum(prod(shape) for entry in bound for shape in entry.shapes) == RELEASES[name][1]


def test_what_sets_releases_apart() -> None:
    assert spec_of("DeepSeek-R1-Distill-Llama-8B").rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert spec_of("DeepSeek-R1-Distill-Qwen-1.5B").rope_theta == 10000.0
    assert spec_of("DeepSeek-R1-Distill-Qwen-1.5B").sliding_window is None
    assert spec_of("SmolLM2-135M").tied_embeddings
    assert spec_of("Mistral-Nemo").head_dim == 128 != 5120 // 32
    windows = [spec_of(name).sliding_window for name in ("Mistral-7B-v0.1", "Mistral-7B-v0.3", "Phi-3-mini-4k")]
    assert windows == [4096, None, 2047]


@pytest.mark.parametrize(
    ("name", "fields", "refused"),
    [
        ("Phi-3-mini-4k", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type"),  # Phi-3-mini-128k
        ("Phi-3-mini-4k", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),  # Phi-4-mini
        ("Qwen3-8B", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),  # R1-0528-Qwen3
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ],
)
def test_releases_that_are_refused(name: str, fields: dict[str, Any], refused: str) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        model_spec({**RELEASES[name][0], **fields})
    assert refusal.value.field == refused
