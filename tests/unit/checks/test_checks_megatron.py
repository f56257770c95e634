"""The section `megatron`: fields of the installed release pass by name and type, what a run decides is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from paths import ROOT

from clipo_megatron.checks.megatron import megatron_problems
from clipo_megatron.config import megatron
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig

SECTIONS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


def problems(recompute: bool = False, overlap: bool | None = None, **given: object) -> list[str]:
    config = RunConfig()
    config.model.recompute, config.optimizer.overlap_grad_reduce, config.megatron = recompute, overlap, given
    return [str(each) for each in megatron_problems(config)]


def test_the_fields_are_those_of_the_installed_release():
    real = {each.name for section in SECTIONS for each in dataclass_fields(section) if each.name[0] != "_"}
    assert set(megatron.fields()) == real


def test_what_a_run_decides_exists_in_some_release():
    """A name that is misspelt in the list would refuse nothing."""
    later = {"moe_router_padding_for_fp8"}
    assert set(megatron.OWNED) - later <= set(megatron.fields())


def test_every_field_that_the_policy_sets_is_refused():
    """The arguments `owned` of the three calls that make Megatron's configurations, by their source."""
    owned: set[str] = set()
    for name in ("policy/model/model.py", "policy/optimizer.py", "policy/model/experts.py"):
        for node in ast.walk(ast.parse((ROOT / "clipo_megatron" / name).read_text())):
            if isinstance(node, ast.keyword) and node.arg == "owned":
                owned |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.FunctionDef) and node.name in ("expert_settings", "_stage_sizes"):
                owned |= {key.value for each in ast.walk(node) if isinstance(each, ast.Dict) for key in each.keys}
    assert len(owned) > 40 and owned <= set(megatron.OWNED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recompute_granularity", "selective"),
        ("recompute_modules", ["mlp", "layernorm"]),
        ("fp8", "hybrid"),
        ("fp8_recipe", "blockwise"),
        ("bucket_size", 100_000_000),
        ("bucket_size", None),
        ("overlap_param_gather", False),
        ("fp8_margin", 1),
        ("moe_router_bias_update_rate", 1),
        ("attention_backend", "flash"),
        ("deterministic_mode", True),
        ("cpu_offloading_num_layers", 4),
    ],
)
def test_a_field_passes(field, value):
    assert problems(**{field: value}) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_layers": 3}, "megatron.num_layers = 3: it is decided by the model's config.json. Remove it."),
        ({"lr": 1e-3}, "it is decided by optimizer.learning_rate"),
        ({"tensor_model_parallel_size": 2}, "it is decided by layout.tp"),
        ({"bf16": True}, "it is decided by model.dtype"),
        ({"hidden_dropout": 0.1}, "log-probs must not be noisy"),
        ({"tp_comm_overlap": True}, "packed rows, each of which has another number of tokens"),
        ({"fp8_recipes": "delayed"}, "has no such field in TransformerConfig, DistributedDataParallelConfig or Optim"),
        ({"fp8_recipes": "delayed"}, "Did you mean fp8_recipe?"),
        ({"fp8": "e5m2"}, "one of e4m3, hybrid, or null was expected"),
        ({"fp8_margin": 1.5}, "a whole number was expected"),
        ({"fp8_margin": True}, "a whole number was expected"),
        ({"bias_activation_fusion": 1}, "true or false was expected"),
        ({"recompute_modules": "mlp"}, "a list of text, or null was expected"),
        ({"exp_avg_dtype": "bf16"}, "checkpoints, which hold masters and moments in fp32"),
        ({"timers": "mine"}, "objects of Python"),
        ({"recompute_granularity": "selective", "recompute": True}, "model.recompute is true"),
        ({"overlap_param_gather": True, "overlap": False}, "only where gradients are reduced early"),
    ],
)
def test_a_field_is_refused_with_the_reason(given, said):
    (problem,) = problems(**given)
    assert said in problem


def test_without_megatron_the_section_is_a_thing_that_is_not_here(monkeypatch):
    monkeypatch.setattr("clipo_megatron.checks.megatron.fields", lambda: None)
    config = RunConfig()
    assert list(megatron_problems(config)) == [], "nothing is asked of a laptop that sets no field"
    config.megatron = {"fp8": "hybrid"}
    (problem,) = megatron_problems(config)
    assert problem.absent and "megatron-core is not installed" in str(problem)


def test_nothing_is_imported_for_it(tmp_path: Path):
    script = (
        "import sys\nfrom clipo_megatron.config.megatron import fields\n"
        "assert fields()['fp8'].section == 'TransformerConfig'\n"
        "assert not {'torch', 'megatron.core', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_written_in_a_file_and_on_the_command_line(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: somewhere}\nmegatron: {fp8: hybrid}\n")
    assert load(file, ["megatron.bucket_size=9"]).megatron == {"fp8": "hybrid", "bucket_size": 9}
