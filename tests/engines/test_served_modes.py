"""Whole runs on two ranks against real servers, for each way of collecting rollouts, syncing and sharing GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from served import Servers
from small_runs import STEPS, SmallRun, metrics, write_config, write_model
from tiny_models import EOS

from clipo_megatron.config.schema import DType
from clipo_megatron.training.ledger import balance

SERVED = (
    "layout.pp=2",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=80",
    "rollout.pool.join_deadline_s=60",
    "rollout.sync.deadline_s=60",
    "layout.distributed_timeout_s=200",
    "data.max_prompt_tokens=60",
)
Lines = list[dict[str, float]]


@pytest.fixture(scope="module")
def run_of_unequal_lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run whose responses differ in length, so that some are unfinished when the step has enough.

    Its model has the shapes of the shared servers' model, so these take its weights.
    """
    folder = tmp_path_factory.mktemp("unequal")
    model = write_model(folder / "model", tied=False, head_dim=32)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][EOS] *= 0.45
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return write_config(folder, model)


def carried(lines: Lines) -> None:
    """Some rollouts began in one step and finished in another, under two versions of the weights."""
    assert any(line["rollout/carried_prompts"] > 0 for line in lines)
    assert any(line["rollout/mixed_versions"] > 0 for line in lines)
    assert any(line["off_policy/effective_samples"] < 1 for line in lines)
    assert all(line["rollout/dropped_prompts"] == 0 for line in lines)


def refilled(lines: Lines) -> None:
    """Zero-advantage groups were replaced, and all rollouts come from the newest weights."""
    assert any(line["rollout/refilled_groups"] > 0 for line in lines)
    assert all(line["rollout/version_lag"] == 0 for line in lines)


def plain(lines: Lines) -> None:
    """All rollouts come from the newest weights."""
    assert all(line["rollout/version_lag"] == 0 and line["rollout/mixed_versions"] == 0 for line in lines)


def ahead(lines: Lines) -> None:
    """Rollouts were begun before the last update, and none is older than the bound."""
    assert 0 < max(line["rollout/version_lag"] for line in lines) <= 2
    assert [line["rollout/carried_prompts"] for line in lines][-1] == 0, "nothing is begun that would not train"
    assert any(line["rollout/carried_prompts"] > 0 for line in lines)


WAYS: dict[str, tuple[str, Callable[[Lines], None], tuple[str, ...]]] = {
    "go on from tokens": ("sglang", carried, ("rollout.over_sampling=2", "rollout.unfinished=resume")),
    "keep running": ("sglang", carried, ("rollout.over_sampling=2", "rollout.unfinished=keep_running")),
    "two steps ahead": ("sglang", ahead, ("rollout.ahead=2", "layout.pp=1", "layout.dp=2")),
    "refill on two replicas": (
        "sglang",
        refilled,
        ("rollout.over_sampling=1.5", "rollout.max_refill_rounds=2", "layout.pp=1", "layout.dp=2"),
    ),
    "colocated": ("sglang", plain, ("rollout.colocated=true", "rollout.sync.transport=ipc")),
    "vllm": ("vllm", plain, ("rollout.sync.transport=disk",)),
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way in ("go on from tokens", "two steps ahead") else pytest.mark.full)
        for way in WAYS
    ],
)
def test_a_run(way: str, servers: Servers, tiny_model: Path, run_of_unequal_lengths: Path, tmp_path: Path):
    engine, holds, settings = WAYS[way]
    server = servers.shared(engine, tiny_model, DType.fp32)
    correction = ("algorithm.correction.kind=truncate",) if holds is carried else ()
    SmallRun(
        run_of_unequal_lengths,
        tmp_path / "run",
        f"rollout.engine={engine}",
        f"rollout.endpoints=[{server.url}]",
        *SERVED,
        *settings,
        *correction,
    ).wait()
    lines = metrics(tmp_path / "run")
    ledger = balance(map(json.loads, (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()))
    assert ledger.problems(ledger.open) == [] and len(ledger.open) == lines[-1]["rollout/carried_prompts"]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["sync/servers"] == 1 for line in lines)
    # Only rollouts from the newest weights count, and a step may have none.
    assert all(line.get("policy/mult_prob_error", 1.0) <= 1.01 for line in lines)
    holds(lines)
    evaluations = sorted((tmp_path / "run" / "eval").glob("step_*.json"))
    assert [json.loads(file.read_text())["step"] for file in evaluations] == [0, 3, 6]
