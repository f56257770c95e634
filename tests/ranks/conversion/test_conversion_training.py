"""Training starts from a converted checkpoint in any layout; its own checkpoints are exported without the source."""

import shutil
from pathlib import Path

import pytest
import torch
from conversion_steps import contents, differing, export_model, import_model, tensors_of
from policy_steps import configuration
from tiny_models import tiny_llama, tiny_qwen2

from clipo_megatron.checkpoint import CheckpointContents, Checkpoints
from clipo_megatron.checks.run import check
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, DType, EngineKind, LayoutConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.weights.formats.source import sidecar_files


def actor_of(model: str, sizes: dict[str, int], dtype: DType = DType.fp32) -> PolicyActor:
    """Build the policy of this rank; collective."""
    config = configuration(model)
    config.model.dtype, config.layout = dtype, LayoutConfig(**sizes)
    return PolicyActor(config, parallel.initialize(config.layout, seed=0), needs=frozenset(), total_steps=1)


def exported(model: str, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the tensors that a policy loaded from `model` exports to engines."""
    return {name: tensor.clone() for name, tensor in actor_of(model, sizes).export()}


def checkpointed(model: str, folder: str, sizes: dict[str, int]) -> str:
    """Save a checkpoint as a run does, in bf16 with fp32 masters that differ from it; return its path."""
    actor = actor_of(model, sizes, DType.bf16)
    with torch.no_grad():
        for group in actor.trainable.optimizer.inner.optimizer.param_groups:
            for master in group["params"]:
                master.add_(2.0**-20)
    contents = CheckpointContents(
        models={POLICY: TrainableCheckpointer(actor.trainable)},
        sidecar_files=sidecar_files(model) if torch.distributed.get_rank() == 0 else {},
    )
    return str(Checkpoints(Path(folder), contents, CheckpointConfig(asynchronous=False)).save(3))


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 2, "pp": 2}])
def test_a_policy_is_loaded_from_a_checkpoint_in_any_layout(ranks, tmp_path: Path, sizes: dict[str, int]) -> None:
    source = tiny_qwen2(tmp_path / "hf", tied=False, vocab=263)
    checkpoint = import_model(source, tmp_path / "checkpoint", tp=2, pp=4)
    expected = tensors_of(source)
    shutil.rmtree(source)
    for found in ranks.run(exported, 4, str(checkpoint), sizes):
        assert differing(found, expected) == []


def test_a_training_checkpoint_is_exported_without_its_source(ranks, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "hf", tied=True, vocab=263)
    low = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    beside = contents(source)
    (saved, *_) = ranks.run(checkpointed, 4, str(source), str(tmp_path / "checkpoints"), {"tp": 2, "pp": 2})
    shutil.rmtree(source)
    release = export_model(Path(saved), tmp_path / "release")
    assert differing(tensors_of(release), low) == []
    files = contents(release)
    assert files.keys() == beside.keys()
    assert {name for name in files if files[name] != beside[name]} == {"config.json", "model.safetensors"}
    masters = tensors_of(export_model(Path(saved), tmp_path / "masters", master=True))
    assert differing(masters, {name: tensor.float() + 2.0**-20 for name, tensor in low.items()}) == []


def test_servers_are_not_given_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = import_model(tiny_llama(tmp_path / "hf"), tmp_path / "checkpoint")
    config = configuration(checkpoint)
    config.rollout.engine = EngineKind.sglang
    with pytest.raises(ConfigError, match=rf"clipo convert to-hf {checkpoint} OUT"):
        check(config, ranks=1)
    config.rollout.engine = EngineKind.local
    with pytest.raises(ConfigError) as error:
        check(config, ranks=1)
    assert "model.path" not in str(error.value)
