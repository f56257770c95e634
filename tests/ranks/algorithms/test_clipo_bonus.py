"""Forms of the bonus on ranks: each with each loss and level, and a run that trains on one of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bonus_steps import bonuses
from policy_steps import configuration, train
from ranks import RankPool
from tiny_models import tiny_llama

from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.config.schema import (
    BonusForm,
    BonusPlace,
    ContrastiveLossName,
    LayoutConfig,
    Level,
    PluginConfig,
    RunConfig,
)
from clipo_megatron.flow import RolloutTable

TOLERANCE = 1e-5
VOCAB = 263


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), vocab=VOCAB, layers=2)


def test_every_form_with_every_loss_and_level_on_two_layouts(folder: Path, ranks: RankPool) -> None:
    settings = [
        {"bonus": form, "loss": loss, "level": level, "temperature": 0.5}
        for form, loss, level in product(BonusForm, ContrastiveLossName, Level)
    ]
    config = configuration(folder)
    config.algorithm.mini_batches = 1
    (alone,) = ranks.run(bonuses, 1, config, LayoutConfig(), settings)
    assert all(int((bonus != 0).sum()) >= 4 for bonus in alone)
    for world, layout in ((2, LayoutConfig()), (4, LayoutConfig(pp=2))):
        for found in ranks.run(bonuses, world, config, layout, settings):
            for names, ours, theirs in zip(settings, found, alone, strict=True):
                assert float((ours - theirs).abs().max()) <= TOLERANCE, names


def test_a_ratio_on_the_advantage_trains_the_same_on_two_layouts(folder: Path, ranks: RankPool) -> None:
    config = configuration(folder)
    config.clipo.bonus, config.clipo.place, config.clipo.temperature = BonusForm.ratio, BonusPlace.advantage, 0.5
    (alone,) = ranks.run(train, 1, config, LayoutConfig())
    for found in ranks.run(train, 4, config, LayoutConfig(pp=2)):
        for ours, theirs in zip(found["advantage"], alone["advantage"], strict=True):
            assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())
        for name, theirs in alone["weights"].items():
            assert float((found["weights"][name] - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE, name
    config.clipo.place = BonusPlace.reward
    (on_reward,) = ranks.run(train, 1, config, LayoutConfig())
    assert float((torch.cat(on_reward["advantage"]) - torch.cat(alone["advantage"])).abs().max()) > 0.05


class Sees(Hook):
    """Notes the embeddings, and the bonuses before and after they are shuffled."""

    needs = frozenset({Signal.embeddings})
    noted: ClassVar[list[torch.Tensor]] = []

    def shape_bonus(self, table: RolloutTable, bonus: torch.Tensor) -> torch.Tensor:
        self.noted += [table.signals["embeddings"], bonus]
        return bonus


def controls(config: RunConfig, layout: LayoutConfig) -> dict[str, Any]:
    Sees.noted.clear()
    return train(config, layout) | {"noted": list(Sees.noted)}


def test_controls_and_embeddings_on_two_layouts(folder: Path, ranks: RankPool) -> None:
    config = configuration(folder)
    sees = PluginConfig(f"{__name__}:Sees")
    names = ("likelihood", "text_overlap", "shuffle_bonus")
    config.algorithm.plugins = [sees, *(PluginConfig(name) for name in names)]
    config.clipo.weight = -0.2
    (alone,) = ranks.run(controls, 1, config, LayoutConfig())
    embeddings, bonus = alone["noted"][:2]
    assert embeddings.shape == (24, config.clipo.dim) and torch.allclose(embeddings.norm(dim=1), torch.ones(24))
    assert (bonus > 0.1).any()
    for found in ranks.run(controls, 4, config, LayoutConfig(pp=2)):
        for ours, theirs in zip(found["noted"], alone["noted"], strict=True):
            assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max().clamp(min=1))
        for name, theirs in alone["weights"].items():
            assert float((found["weights"][name] - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE, name
    config.algorithm.plugins.pop()
    (unshuffled,) = ranks.run(train, 1, config, LayoutConfig())
    assert not torch.equal(torch.cat(unshuffled["advantage"]), torch.cat(alone["advantage"]))
