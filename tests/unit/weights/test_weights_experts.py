"""Mixtures of experts: facts from config.json, refusals, and the mapping on every rank of many divisions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_qwen3_moe

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.policy.model.fake_process_group import fake_process_group, meta_stages
from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.spec import Experts, read_config

VOCAB = 263


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), layers=8, dense_layers=(0, 5), vocab=VOCAB)


def test_both_names_of_the_count_and_both_ways_to_name_dense_layers(folder: Path) -> None:
    config = read_config(folder)
    assert model_spec(config).experts == Experts(8, 2, 40, True, frozenset({0, 5}))
    count = config.pop("num_local_experts")
    assert model_spec(config | {"num_experts": count}).experts == Experts(8, 2, 40, True, frozenset({0, 5}))
    stepping = model_spec(config | {"num_experts": count, "mlp_only_layers": [3], "decoder_sparse_step": 2})
    assert stepping.experts.dense_layers == {0, 2, 3, 4, 6}
    assert [stepping.is_sparse(layer) for layer in range(8)] == [False, True, False, False, False, True, False, True]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": list(range(8))}, "mlp_only_layers"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(fields: dict[str, Any], named: str, folder: Path) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        model_spec(read_config(folder) | fields)
    assert raised.value.field == named and named in str(raised.value)


@pytest.mark.parametrize(
    ("world", "vpp", "layout"),
    [
        (1, 1, LayoutConfig()),
        (4, 2, LayoutConfig(pp=2, ep=2)),
        (8, 1, LayoutConfig(tp=2, pp=2, ep=2)),
        (8, 2, LayoutConfig(tp=4, pp=2, ep=2, etp=2, sequence_parallel=True)),
        (4, 1, LayoutConfig(pp=4, first_stage_layers=1, last_stage_layers=3)),
        (8, 2, LayoutConfig(pp=4, ep=2, first_stage_layers=2, last_stage_layers=2)),
    ],
)
def test_every_rank_is_covered_and_all_tensors_are_held(
    world: int, vpp: int, layout: LayoutConfig, folder: Path
) -> None:
    """Each tensor is held by as many ranks as divide or copy it."""
    spec = model_spec(read_config(folder))
    held: Counter[str] = Counter()
    for rank in range(world):
        with fake_process_group(layout, rank=rank, world=world, vpp=vpp) as place:
            stages = meta_stages(spec, place)
            assert len(stages) == vpp
            for stage in stages:
                bound = entries(spec, stage.place, place.coordinates)
                pairs = match(dict(stage.named_parameters()), bound, place.coordinates)
                held.update(tensor.name for _, entry in pairs for tensor in entry.hf)
                keys = stage.sharded_state_dict(metadata={"non_homogeneous_layers": True})
                assert {value.key for value in keys.values() if hasattr(value, "key")} >= {
                    entry.key for _, entry in pairs if not entry.copy
                }
    with HFReader(folder) as reader:
        assert held.keys() == set(reader.names())
    width = world // layout.pp
    for name, ranks in held.items():
        assert ranks == (width // layout.ep if ".experts." in name else width), name
