"""Reading config.json: the facts, both generations of rope fields, and every refusal by name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clipo_megatron.checks import model as checks_model
from clipo_megatron.weights import families
from clipo_megatron.weights.errors import UnsupportedModel, WeightsFolderError
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.mapping import PipelineStage, even_stages
from clipo_megatron.weights.rope import LinearRope, Llama3Rope
from clipo_megatron.weights.spec import NEUTRAL, Experts, inverse_frequencies, read_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-5, "hidden_act": "silu", **changes}


def qwen2(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", **SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu", **changes}


def qwen3(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3", **SIZES, "head_dim": 24, **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    return {"model_type": "mistral", **SIZES, "head_dim": 24, "sliding_window": 8, **changes}


def phi3(**changes: Any) -> dict[str, Any]:
    return {"model_type": "phi3", **SIZES, "pad_token_id": 0, "sliding_window": 8, **changes}


FAMILIES = (llama, qwen2, qwen3, mistral, phi3)


def test_facts_of_a_llama() -> None:
    spec = model_spec(llama(head_dim=24, rope_theta=5e5, tie_word_embeddings=True))
    assert (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size, spec.vocab_size) == (4, 64, 48, 101)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 24)
    assert (spec.query_size, spec.kv_size) == (96, 48)
    assert (spec.rms_norm_eps, spec.rope_theta, spec.rope_scaling) == (1e-5, 5e5, None)
    assert spec.tied_embeddings and not spec.qkv_bias and not spec.qk_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_transformers_means(family: Any) -> None:
    config = family(num_attention_heads=32)
    for field in ("num_key_value_heads", "rms_norm_eps", "head_dim", "sliding_window", "hidden_act"):
        config.pop(field, None)
    spec, reference = model_spec(config), AutoConfig.for_model(**config)
    assert spec.num_kv_heads == reference.num_key_value_heads
    assert spec.head_dim == (getattr(reference, "head_dim", None) or 2)
    assert spec.rms_norm_eps == reference.rms_norm_eps
    assert spec.rope_theta == reference.rope_parameters["rope_theta"]
    assert spec.tied_embeddings == reference.tie_word_embeddings
    assert spec.sliding_window == getattr(reference, "sliding_window", None)


# Each fact, and the field of config.json that gives it, under its name in transformers' configuration.
FACTS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_config_that_says_nothing_is_that_of_transformers(family: str) -> None:
    spec, reference = model_spec({"model_type": family}), AutoConfig.for_model(family)
    for fact, field in FACTS.items():
        assert getattr(spec, fact) == getattr(reference, field), field
    heads = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    assert spec.head_dim == heads
    assert spec.rope_theta == reference.rope_parameters["rope_theta"] and spec.rope_scaling is None
    assert spec.sliding_window == getattr(reference, "sliding_window", None)
    if spec.experts is not None:
        assert (spec.experts.count, spec.experts.per_token, spec.experts.ffn_hidden_size) == (
            reference.num_experts,
            reference.num_experts_per_tok,
            reference.moe_intermediate_size,
        )
        assert spec.experts.renormalised == reference.norm_topk_prob and not spec.experts.dense_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_number_of_kv_heads_is_the_number_of_heads(family: Any) -> None:
    assert model_spec(family(num_key_value_heads=None)).num_kv_heads == 4


def test_norms_on_query_and_key_are_no_news_to_a_qwen3() -> None:
    """Qwen3-Coder says `use_qk_norm: true`, which is what every Qwen3 has."""
    assert model_spec(qwen3(use_qk_norm=True)).qk_norm
    assert model_spec({"model_type": "qwen3_moe", "use_qk_norm": True, "qk_layernorm": True}).qk_norm
    assert not model_spec(llama(use_qk_norm=False, qk_layernorm=False)).qk_norm
    with pytest.raises(UnsupportedModel, match=r"use_qk_norm=False.*qwen3 models always normalise"):
        model_spec(qwen3(use_qk_norm=False))
    with pytest.raises(UnsupportedModel, match=r"qk_layernorm=True.*llama models have no norms on query and key"):
        model_spec(llama(qk_layernorm=True))


def test_a_field_that_names_what_every_layer_does_is_no_reason_to_refuse() -> None:
    model_spec(llama(no_rope_layers=[1, 1, 1, 1], logits_scaling=1.0, is_causal=True, use_mrope=False))


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("field", NEUTRAL)
def test_no_refusal_claims_what_a_family_has(family: str, field: str) -> None:
    value = False if field == "is_causal" else [0] if field == "no_rope_layers" else 3
    with pytest.raises(UnsupportedModel) as refusal:
        model_spec({"model_type": family, field: value})
    assert "do not have it" not in str(refusal.value) and str(refusal.value).endswith(NEUTRAL[field][1])


def test_what_families_differ_in() -> None:
    assert [family.__name__ for family in FAMILIES if model_spec(family()).qkv_bias] == ["qwen2"]
    assert [family.__name__ for family in FAMILIES if model_spec(family()).qk_norm] == ["qwen3"]
    windows = [model_spec(family()).sliding_window for family in FAMILIES]
    assert windows == [None, None, None, 8, 8]
    assert model_spec(mistral(sliding_window=None)).sliding_window is None
    assert model_spec(mistral(layer_types=["sliding_attention"] * 4)).sliding_window == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 7e4, "rope_scaling": LLAMA3},  # transformers 4
        {"rope_parameters": {**LLAMA3, "rope_theta": 7e4}},  # 5
        {"rope_parameters": {**LLAMA3, "rope_theta": 7e4}, "rope_theta": 7e4},  # both, agreeing
    ],
)
def test_rope_of_both_generations(fields: dict[str, Any]) -> None:
    spec = model_spec(llama(**fields))
    assert spec.rope_theta == 7e4
    assert spec.rope_scaling == Llama3Rope(32.0, 1.5, 5.0, 64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 4.0}},  # transformers 4
        {"rope_theta": 7e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 7e4}},  # 5
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ],
)
def test_linear_rope_of_both_generations(family: Any, fields: dict[str, Any]) -> None:
    spec = model_spec(family(**fields))
    assert (spec.rope_theta, spec.rope_scaling) == (7e4, LinearRope(4.0))


def test_old_spelling_of_the_rope_type() -> None:
    scaling = {"type": "default"}
    assert model_spec(llama(rope_theta=1e6, rope_scaling=scaling)).rope_theta == 1e6
    assert model_spec(llama(rope_theta=1e6, rope_scaling=None)).rope_scaling is None


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LLAMA3,
        {**LLAMA3, "factor": 8.0, "low_freq_factor": 1.0},
        {"rope_type": "linear", "factor": 3.0},
    ],
)
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None, theta: float) -> None:
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    spec = model_spec(llama(rope_parameters=dict(parameters)))
    config = LlamaConfig(**llama(rope_parameters=dict(parameters)))
    if scaling is None:
        expected = 1.0 / theta ** (torch.arange(0, 16, 2).float() / 16)
    else:
        expected = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))[0]
    torch.testing.assert_close(inverse_frequencies(spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (llama(attention_bias=True), "attention_bias", True),
        (llama(mlp_bias=True), "mlp_bias", True),
        (llama(hidden_act="gelu"), "hidden_act", "gelu"),
        (llama(sliding_window=4096), "sliding_window", 4096),
        (llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.rope_type", "dynamic"),
        (llama(rope_scaling={"type": "linear"}), "rope_scaling.factor", None),
        (llama(rope_scaling={"factor": 2.0}), "rope_scaling.factor", 2.0),
        (llama(rope_scaling={"type": "linear", "factor": 2, "mscale": 1}), "rope_scaling.mscale", 1),
        (llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters.rope_type", "yarn"),
        (llama(rope_parameters={"rope_type": "spiral"}), "rope_parameters.rope_type", "spiral"),
        (
            llama(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            "rope_parameters",
            {"full_attention": {"rope_theta": 1e4}},
        ),
        (
            llama(rope_parameters={"rope_theta": 1e4}, rope_scaling={"type": "linear", "factor": 2.0}),
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
        ),
        (llama(rope_scaling=LLAMA3, original_max_position_embeddings=32), "original_max_position_embeddings", 32),
        (llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_theta=2e4), "rope_theta", 2e4),
        (llama(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope_parameters.factor", None),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor", 0.5),
        (
            llama(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}),
            "rope_parameters.partial_rotary_factor",
            0.75,
        ),
        (llama(quantization_config={"quant_method": "fp8"}), "quantization_config", {"quant_method": "fp8"}),
        (llama(num_key_value_heads=3), "num_key_value_heads", 3),
        (llama(vocab_size=None), "vocab_size", None),
        (qwen2(use_sliding_window=True), "use_sliding_window", True),
        (qwen2(layer_types=["full_attention", "sliding_attention"]), "layer_types", "sliding_attention"),
        (qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=2), "use_sliding_window", True),
        (qwen3(attention_bias=True), "attention_bias", True),
        (qwen3(use_sliding_window=True), "use_sliding_window", True),
        (qwen3(layer_types=["full_attention", "sliding_attention"]), "layer_types", "sliding_attention"),
        (mistral(layer_types=["sliding_attention", "full_attention"]), "layer_types", "full_attention"),
        (mistral(attention_bias=True), "attention_bias", True),
        (mistral(sliding_window=0), "sliding_window", 0),
        (phi3(mlp_bias=True), "mlp_bias", True),
        (phi3(partial_rotary_factor=0.75), "partial_rotary_factor", 0.75),
        (phi3(rope_scaling={"type": "su", "short_factor": [1.0]}), "rope_scaling.rope_type", "su"),
        (phi3(rope_scaling={"type": "longrope", "long_factor": [1.0]}), "rope_scaling.rope_type", "longrope"),
        (llama(attention_multiplier=0.1), "attention_multiplier", 0.1),
        (llama(embedding_multiplier=12.0), "embedding_multiplier", 12.0),
        (llama(residual_multiplier=0.2), "residual_multiplier", 0.2),
        (llama(logits_scaling=8.0), "logits_scaling", 8.0),
        (llama(final_logit_softcapping=30.0), "final_logit_softcapping", 30.0),
        (qwen2(attn_logit_softcapping=50.0), "attn_logit_softcapping", 50.0),
        (qwen2(use_mrope=True), "use_mrope", True),
        (llama(no_rope_layers=[1, 1, 0, 1]), "no_rope_layers", [1, 1, 0, 1]),
        (llama(rope_interleaved=True), "rope_interleaved", True),
        ({"model_type": "gemma2"}, "model_type", "gemma2"),
        ({"model_type": "mamba"}, "model_type", "mamba"),
        ({}, "model_type", None),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(config: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        model_spec(config)
    assert (refusal.value.field, refusal.value.value) == (field, value)
    assert f"{field}={value!r}" in str(refusal.value)


def test_an_idle_sliding_window_is_no_reason_to_refuse() -> None:
    model_spec(qwen2(use_sliding_window=False, sliding_window=4096, layer_types=["full_attention"] * 4))


def test_what_the_configuration_lets_through_is_what_there_is() -> None:
    """The check of a configuration, the families and the tests' tiny models are the same set."""
    assert set(tiny_models.ARCHITECTURES) == set(families.FAMILIES)
    assert sorted(tiny_models.ARCHITECTURES.values()) == sorted(checks_model.ARCHITECTURES)


def test_facts_and_parameter_counts_need_no_torch() -> None:
    """What is known of a model answers at once, before a command imports torch for the methods."""
    script = (
        "import sys, clipo_megatron.checks.model, clipo_megatron.planning.parameters; "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_a_refusal_of_gemma2_says_what_is_missing() -> None:
    with pytest.raises(UnsupportedModel, match=r"caps logits.*norms after attention and MLP.*known families"):
        model_spec({"model_type": "gemma2", **SIZES})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("config", FAMILIES)
def test_rules_cover_exactly_the_tensors_of_transformers(config: Any, pp: int, tied: bool) -> None:
    fields = config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    spec = model_spec(fields)
    bound = [entry for stage in even_stages(4, pp) for entry in entries(spec, stage)]
    owned = [tensor for entry in bound if not entry.copy for tensor in entry.hf]
    assert {tensor.name: tensor.shape for tensor in owned} == expected
    assert len(owned) == len(expected)
    copies = [(entry.megatron, entry.hf[0].name) for entry in bound if entry.copy]
    assert copies == ([(("output_layer.weight",), "model.embed_tokens.weight")] if tied and pp > 1 else [])


def test_one_family_serves_a_tied_and_then_an_untied_model() -> None:
    last = PipelineStage(offset=2, layers=2, first=False, last=True)
    tied, untied = model_spec(llama(tie_word_embeddings=True)), model_spec(llama(tie_word_embeddings=False))
    for _ in range(2):
        assert entries(tied, last)[-1].hf[0].name == "model.embed_tokens.weight"
        assert entries(untied, last)[-1].hf[0].name == "lm_head.weight"
        assert not entries(untied, last)[-1].copy


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsFolderError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsFolderError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(WeightsFolderError, match="list"):
        read_config(tmp_path)


def test_every_fact_of_a_model_is_told_in_its_checkpoints() -> None:
    experts = Experts(8, 2, 16, renormalised=True, dense_layers=frozenset({1}))
    spec = dataclasses.replace(model_spec(llama(rope_scaling=LLAMA3)), experts=experts)
    told = spec.architecture()
    assert json.loads(json.dumps(told)) == told

    def changes(value: Any) -> list[Any]:
        if dataclasses.is_dataclass(value):
            each = [(field.name, other) for field in fields(value) for other in changes(getattr(value, field.name))]
            return [None, *(dataclasses.replace(value, **{name: other}) for name, other in each)]
        if isinstance(value, bool):
            return [not value]
        if isinstance(value, str):
            return [f"{value}x"]
        return [{2}] if isinstance(value, frozenset) else [(value or 6) + 2]

    for field in fields(spec):
        for other in changes(getattr(spec, field.name)):
            same = dataclasses.replace(spec, **{field.name: other}).architecture() == told
            assert same == (field.name == "max_positions"), (field.name, other)
