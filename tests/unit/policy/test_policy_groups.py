"""Process groups of a layout, and what is built in it, on libraries and devices that are not here."""

from __future__ import annotations

import contextlib
import sys
from datetime import timedelta
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import DType, LayoutConfig, ModelConfig
from clipo_megatron.policy.model import model
from clipo_megatron.policy.model.fake_process_group import fake_process_group, meta_stages
from clipo_megatron.policy.model.model import transformer_config, transformer_engine_usable
from clipo_megatron.runtime.platform import Platform, all_gather
from clipo_megatron.weights.families import model_spec

LAYOUT = LayoutConfig(tp=2, pp=2, dp=2, distributed_timeout_s=123.0)
SPEC = model_spec(
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 261}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
)
ON_GPU = Platform("cuda", torch.device("cpu"), "nccl")


@pytest.fixture
def made(monkeypatch):
    """The options of every process group that is made."""
    groups = []
    original = dist.new_group

    def new_group(*args, **options):
        groups.append(options)
        return original(*args, **options | {"backend": None})

    monkeypatch.setattr(dist, "new_group", new_group)
    return groups


def test_every_group_of_megatron_has_the_deadline_of_the_configuration(made):
    with fake_process_group(LAYOUT, rank=1, world=8):
        pass
    assert len(made) > 10
    assert {each["timeout"] for each in made} == {timedelta(seconds=123)}


def test_groups_of_gpus_have_no_second_mesh_on_the_cpu(made, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "cuda:nccl,cpu:gloo")
    monkeypatch.setattr(Platform, "device_groups", lambda self, real=Platform.device_groups: real(ON_GPU))
    with fake_process_group(LAYOUT, rank=1, world=8):
        pass
    assert {each["backend"] for each in made} == {"nccl"}
    assert dist.new_group.__name__ == "new_group", "groups that are made later are as before"


@pytest.mark.parametrize("name", ["all_gather_single", "all_gather_into_tensor"])
def test_tensors_are_gathered_by_whichever_name_torch_has(name, monkeypatch):
    heard = []
    monkeypatch.delattr(dist, "all_gather_single", raising=False)
    monkeypatch.delattr(dist, "all_gather_into_tensor", raising=False)
    monkeypatch.setattr(dist, name, lambda output, tensor, group: heard.append(group), raising=False)
    all_gather(torch.zeros(4), torch.zeros(2), "a group")
    assert heard == ["a group"]


def test_nothing_is_compiled_for_a_dropout_that_does_not_happen(monkeypatch):
    with fake_process_group(LAYOUT, rank=0, world=8) as layout:
        monkeypatch.setattr(model, "platform", lambda: SimpleNamespace(has_gpu=True, device=torch.device("cpu")))
        config = transformer_config(SPEC, ModelConfig(path="x", dtype=DType.bf16), layout)
    assert config.hidden_dropout == 0 and not config.bias_dropout_fusion


class EngineNorm(torch.nn.RMSNorm):
    """A norm on the device that Megatron names for transformer-engine's layers (extensions/transformer_engine.py)."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        options = transformer_engine._get_extra_te_kwargs(config)
        super().__init__(hidden_size, eps=eps, dtype=options["params_dtype"], device=options["device"])


def test_a_dry_run_takes_no_memory_for_layers_of_transformer_engine(monkeypatch):
    monkeypatch.setattr(transformer_engine, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(model, "RMSNorm", EngineNorm)
    with fake_process_group(LayoutConfig(), rank=0, world=1) as layout:
        (stage,) = meta_stages(SPEC, layout)
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    assert transformer_engine._get_extra_te_kwargs.__name__ == "_get_extra_te_kwargs"


@pytest.mark.parametrize(("version", "taken"), [("2.8.0", False), ("2.9.0", True), ("2.11.0", True), ("2.13.0", False)])
def test_a_transformer_engine_that_megatron_does_not_take_is_refused(version, taken, monkeypatch):
    monkeypatch.setattr(model, "platform", lambda: ON_GPU)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    versions = {"transformer-engine": version, "megatron-core": "0.16.1"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    wanted = [
        "transformers",
        'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"',
    ]  # as 0.16.1 says
    monkeypatch.setattr(metadata, "requires", {"megatron-core": wanted}.__getitem__)
    refusal = pytest.raises(ConfigError, match=rf"transformer-engine {version} .* takes <2.12.0,>=2.9.0a0; pip install")
    with contextlib.nullcontext() if taken else refusal:
        assert transformer_engine_usable()
