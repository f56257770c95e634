"""Context parallelism together with every other kind trains as one rank does.

`test_policy_invariance.py` and others have it with one or two of them; this takes a pool of twelve ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from policy_steps import configuration, merged, train
from ranks import RankPool
from tiny_models import tiny_mistral, tiny_qwen3_moe

from clipo_megatron.config.schema import LayoutConfig

TOLERANCE = 1e-5
LAYOUTS = {
    8: {"tp": 2, "cp": 2, "pp": 2, "sequence_parallel": True},
    12: {"tp": 2, "cp": 3, "pp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def many() -> Iterator[RankPool]:
    pool = RankPool(max(LAYOUTS))
    yield pool
    pool.close()


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("family", ["a window of 5", "experts"])
def test_with_tensor_sequence_pipeline_and_expert_parallelism(family, world, many, tmp_path):
    experts = family == "experts"
    folder = tiny_qwen3_moe(tmp_path, vocab=263) if experts else tiny_mistral(tmp_path, tied=True, window=5, vocab=263)
    config, added = configuration(folder), {"ep": 2, "etp": 1} if experts else {}
    (alone,) = many.run(train, 1, config, LayoutConfig(share_prompts=True))
    results = many.run(train, world, config, LayoutConfig(**LAYOUTS[world], **added, share_prompts=True))
    far = {}
    for name in ("logprobs", "pooled"):
        ours, theirs = (torch.cat(list(merged(each, name).values())) for each in (results, [alone]))
        far[name] = float((ours - theirs).abs().max() / theirs.abs().max())
    for result in results:
        for name, theirs in alone["weights"].items():
            far[name] = max(
                far.get(name, 0.0), float((result["weights"][name] - theirs).abs().max() / theirs.abs().max())
            )
        for step, theirs in zip(result["reward"], alone["reward"], strict=True):
            far["reward"] = max(far.get("reward", 0.0), float((step - theirs).abs().max()))
    assert {name: value for name, value in far.items() if not value <= TOLERANCE} == {}
    moved = alone["weights_before"]
    assert all(float((alone["weights"][name] - moved[name]).abs().max()) > 0 for name in moved)
