"""The bonus of one step for many settings, by the same calls as the trainer, on any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from policy_steps import made_up_context, scored_groups
from torch import Tensor
from update_steps import VOCAB, actor_on

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.clipo.hook import Clipo
from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.contrastive import ContrastiveActor


def bonuses(config: RunConfig, layout_config: LayoutConfig, settings: list[dict[str, Any]]) -> list[Tensor]:
    """The bonus [B] under each of `settings` of `clipo`, under a fresh head, from one scoring forward; collective."""
    actor = actor_on(config, layout_config)
    algorithm = build_algorithm(config, made_up_context(config))
    mine = scored_groups(0, vocab=VOCAB)[actor.layout.rank :: actor.layout.world]
    table, samples = build_table(mine, step=0, observe=algorithm.observe)
    actor.score(actor.batcher.mini_batches_of(samples, table)[0].micro_batches, table, algorithm)
    found, plain = [], config.clipo
    for each in settings:
        actor.config.clipo = replace(plain, **each)
        if actor.contrastive is not None:
            actor.contrastive = ContrastiveActor(actor.spec.hidden_size, actor.config.clipo, actor.layout, seed=0)
        actor._score_contrastive(table)
        found.append(Clipo(actor.config.clipo).bonus(table))
    return found
