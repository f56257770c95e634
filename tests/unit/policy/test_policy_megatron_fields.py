"""What reaches Megatron's configurations: what the policy decides, good defaults, and fields that the user gives."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import DType, LayoutConfig, ModelConfig, RunConfig
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.megatron_fields import configured
from clipo_megatron.policy.model import model as model_module
from clipo_megatron.policy.model.fake_process_group import fake_process_group
from clipo_megatron.policy.model.model import transformer_config
from clipo_megatron.policy.policy import check_quantized
from clipo_megatron.weights.families import model_spec

SPEC = model_spec(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "vocab_size": 261,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


OWN = {"num_layers": 1, "num_attention_heads": 1, "hidden_size": 8}


def of_a_rank(recompute: bool = False, **megatron: object) -> TransformerConfig:
    with fake_process_group(LayoutConfig(tp=2), rank=0, world=2) as place:
        return transformer_config(SPEC, ModelConfig(dtype=DType.bf16, recompute=recompute), place, megatron)


def test_given_fields_arrive_in_the_types_of_the_field():
    config = of_a_rank(
        recompute_granularity="selective",
        recompute_modules=["mlp"],
        attention_backend="flash",
        distribute_saved_activations=None,
        bucket_size=5,  # of another class
    )
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["mlp"])
    assert config.attention_backend is AttnBackend.flash and config.distribute_saved_activations is None
    assert config.params_dtype is torch.bfloat16 and config.tensor_model_parallel_size == 2


def test_a_default_gives_way_and_what_is_owned_does_not():
    assert of_a_rank().moe_token_dispatcher_type == "alltoall"
    assert of_a_rank(moe_token_dispatcher_type="flex").moe_token_dispatcher_type == "flex"
    assert of_a_rank(hidden_dropout=0.5).hidden_dropout == 0.0
    assert of_a_rank(recompute=True).recompute_granularity == "full"
    assert of_a_rank().recompute_granularity is None


def test_names_of_dtypes_become_dtypes():
    with fake_process_group(LayoutConfig(), rank=0, world=1):
        made = configured(TransformerConfig, {"autocast_dtype": "bf16", "num_layers": 2}, owned=OWN, defaults={})
    assert made.autocast_dtype is torch.bfloat16 and made.num_layers == 1


def test_what_megatron_refuses_is_said_in_a_sentence():
    with pytest.raises(ConfigError, match=r"megatron: Megatron refuses recompute_granularity = full: .*recompute_meth"):
        of_a_rank(recompute_granularity="full")
    with pytest.raises(ConfigError, match=r"exp_avg_dtype can only be fp32 when not .* optimizer\. Correct or remove"):
        configured(OptimizerConfig, {"exp_avg_dtype": "bf16"}, owned={}, defaults={})


@pytest.mark.parametrize(("gpu", "engine", "apex"), [(False, False, False), (True, False, True), (True, True, False)])
def test_fused_kernels_are_used_where_they_are_installed(gpu, engine, apex, monkeypatch):
    monkeypatch.setattr(model_module, "platform", lambda: SimpleNamespace(has_gpu=gpu))
    monkeypatch.setattr(model_module, "transformer_engine_usable", lambda: engine)
    monkeypatch.setattr(model_module, "_grad_accum_fusion_available", apex)
    found = model_module._fused_kernels()
    assert found == {
        "bias_activation_fusion": gpu,
        "apply_rope_fusion": engine,
        "gradient_accumulation_fusion": apex,
    }
    assert found.keys() <= {field.name for field in dataclasses.fields(TransformerConfig)}


def test_8_bit_products_need_the_layers_that_compute_them():
    check_quantized({"fp8": None, "bucket_size": 3})
    with pytest.raises(ConfigError, match=r"megatron\.fp8 = hybrid: only transformer-engine's layers compute"):
        check_quantized({"fp8": "hybrid"})


@pytest.mark.parametrize(
    ("megatron", "sequence_parallel", "multiple"),
    [
        ({}, False, 1),
        ({}, True, 2),
        ({"fp8": "hybrid"}, False, 16),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, True, 32),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, False, 128),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, True, 64),
        ({"fp8": None}, False, 1),
    ],
)
def test_rows_are_padded_to_what_8_bit_products_take(megatron, sequence_parallel, multiple):
    config = RunConfig()
    config.megatron = megatron
    layout = LayoutConfig(tp=2, sequence_parallel=sequence_parallel)
    with fake_process_group(layout, rank=0, world=2) as place:
        assert Batcher.of(config, place).pack([]).tokens.numel() == multiple
