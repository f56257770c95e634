"""Checkpoints pass between torch's layers and Adam and those of transformer-engine, for which stand-ins are used."""

from contextlib import contextmanager
from pathlib import Path

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from fused_adam import FusedAdam
from megatron.core.optimizer import distrib_optimizer
from policy_steps import configuration, train
from tiny_models import tiny_qwen3

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.policy.checkpoint.reading import holds_nothing
from clipo_megatron.policy.model import model
from clipo_megatron.weights.formats.metadata import read_metadata

ADAM, NORM = megatron_optimizer.Adam, model.RMSNorm
ACCEPTED = distrib_optimizer.Adam


class NormWithState(NORM):
    """A norm with an extra state, which is empty without FP8 (transformer-engine 2.11: pytorch/ops/op.py)."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert holds_nothing(state)


@contextmanager
def library(adam: type, norm: type):
    """Megatron with another Adam and our model with another norm."""

    def use(adam: type, norm: type) -> None:
        megatron_optimizer.Adam = adam
        distrib_optimizer.Adam = ACCEPTED if adam is ADAM else adam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER, model.RMSNorm = adam is ADAM, norm

    use(adam, norm)
    try:
        yield
    finally:
        use(ADAM, NORM)


def trained(folder: Path, source: Path, steps: range, adam: type, norm: type) -> dict[str, torch.Tensor]:
    """The weights before and after steps of a run whose checkpoints are in `folder`."""
    config = configuration(source)
    config.algorithm.name, config.algorithm.mini_batches = "grpo", 1
    with library(adam, norm):
        facts = train(config, LayoutConfig(), steps=steps, folder=folder)
    return facts["weights_before"], facts["weights"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param((FusedAdam, NormWithState), (FusedAdam, NormWithState), id="the same fused Adam"),
        pytest.param((ADAM, NORM), (FusedAdam, NormWithState), id="from torch to the libraries"),
        pytest.param((FusedAdam, NormWithState), (ADAM, NORM), id="from the libraries to torch"),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(ranks, tmp_path, first, then):
    source = tiny_qwen3(tmp_path / "hf")
    [(before, whole)] = ranks.run(trained, 1, tmp_path / "whole", source, range(3), *first)
    ranks.run(trained, 1, tmp_path / "parts", source, range(2), *first)
    [(_, resumed)] = ranks.run(trained, 1, tmp_path / "parts", source, range(2, 3), *then)
    assert distance(whole, before) > 1e-3
    # Two kinds of Adam round differently; the weights of norms are near 1, where a float32 has steps of 1.2e-7.
    assert distance(whole, resumed) <= (0.0 if first == then else 1e-5 * distance(whole, before) + 2.4e-7)
    written = read_metadata(next((tmp_path / "parts").rglob(".metadata")).parent).state_dict_metadata
    assert any("final_layernorm._extra_state" in key for key in written) == (first[1] is NormWithState)
