"""`clipo train` on a mixture of experts: the engine in the same processes has the weights that train, in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import SmallRun, metrics, write_config
from tiny_models import EOS, tiny_qwen3_moe


def moe_config(folder: Path) -> Path:
    """A tiny model that ends its turn early."""
    model = tiny_qwen3_moe(folder / "model", tied=True)
    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding *= 0.3
    embedding[EOS] *= 20.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return write_config(folder, model)


@pytest.mark.full
def test_experts_over_ranks_and_stages_train(tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ["layout.ep=2", "layout.dp=2", "layout.pp=2", "clipo.warmup_steps=0", "eval.every=0"]
    SmallRun(moe_config(tmp_path), output, *settings, "train.steps=3", "eval.at_start=false").wait()
    lines = metrics(output)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert max(line["policy/grad_norm"] for line in lines[:2]) > 0, "the last step's rollouts are of new weights"
    for line in lines:
        assert line["policy/mult_prob_error"] == pytest.approx(1.0, abs=1e-5)
        assert abs(line["policy/first_update_kl"]) < 1e-8
