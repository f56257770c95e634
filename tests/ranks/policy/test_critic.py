"""The critic: its gradients, the same weights in any layout, offloading, and settings that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from critic_steps import one_critic_update, plain_critic
from critic_weights import HEAD
from policy_steps import STEPS, configuration, train
from ranks import RankPool
from tiny_models import tiny_llama, tiny_qwen2
from update_steps import VOCAB

from clipo_megatron.checks.methods import method_problems
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.model_folder import vocabulary_problem
from clipo_megatron.config.ranges import range_problems
from clipo_megatron.config.schema import DType, KLConfig, KLPlace, LayoutConfig, RunConfig
from clipo_megatron.policy.critic import CriticActor, value_loss

TOLERANCE = 1e-5


def with_critic(model: Path) -> RunConfig:
    """The configuration of a small PPO run whose critic's weights move visibly."""
    config = configuration(model)
    config.clipo.enabled, config.algorithm.name = False, "ppo"
    config.critic.learning_rate = 2e-3
    return config


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The names whose tensors differ by more than the tolerance, with the distance."""
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - each).abs().max() / each.abs().max()) for name, each in theirs.items()}
    return {name: value for name, value in apart.items() if not value < TOLERANCE}


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize(("family", "tied"), [(tiny_llama, True), (tiny_qwen2, False)])
def test_gradients_are_those_of_a_plain_implementation(
    family: Any, tied: bool, clip: float | None, ranks: RankPool, tmp_path: Path
) -> None:
    config = with_critic(family(tmp_path, tied=tied, vocab=VOCAB, layers=2))
    config.critic.clip = clip
    loss, gradients = plain_critic(config)
    (ours,) = ranks.run(one_critic_update, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    assert ours["metrics"]["critic/loss"] == pytest.approx(loss, abs=1e-5)
    assert far(ours["gradients"], gradients) == {}
    assert (ours["metrics"]["critic/clip_fraction"] > 0.1) == (clip is not None)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
    assert ours["metrics"]["critic/grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
    for rank in ranks.run(one_critic_update, 4, config, LayoutConfig(tp=2, pp=2, max_tokens_per_microbatch=100)):
        assert far(rank["gradients"], gradients) == {}
        assert rank["metrics"]["critic/grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        last = HEAD in rank["own"]
        # no LM head, and no second embedding where the policy has one
        assert ("embedding.word_embeddings.weight" in rank["own"]) == (not last)
        assert "output_layer.weight" not in rank["own"]
        assert ("decoder.final_layernorm.weight" in rank["own"]) == last


def test_the_same_critic_and_policy_in_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    config = with_critic(tiny_llama(tmp_path, vocab=VOCAB, layers=2))
    config.algorithm.kl = KLConfig(coefficient=0.1, place=KLPlace.reward)
    config.critic.warmup_steps, config.critic.epochs = 1, 2
    (alone,) = ranks.run(train, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    assert len(alone["updates"]) == (STEPS - 1) * config.algorithm.mini_batches  # the policy waited for a step
    assert len(alone["values"]) == STEPS
    assert all(step["critic/grad_norm"] > 0 and step["critic/update_skipped"] == 0 for step in alone["values"])
    assert alone["values"][-1]["critic/explained_variance"] < 1
    start = alone["critic_before"]
    assert all(not torch.equal(after, start[name]) for name, after in alone["critic"].items())
    layouts = [
        (LayoutConfig(tp=2, pp=2, sequence_parallel=True, max_tokens_per_microbatch=100), 4),
        (LayoutConfig(dp=2, max_tokens_per_microbatch=60), 2),
        (LayoutConfig(cp=2, max_tokens_per_microbatch=100), 2),
    ]
    for layout, world in layouts:
        for rank in ranks.run(train, world, config, layout):
            assert far(rank["critic"], alone["critic"]) == {}, layout
            assert far(rank["weights"], alone["weights"]) == {}, layout
            for mine, theirs in zip(rank["values"], alone["values"], strict=True):
                assert mine == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in theirs.items()}


def train_in_turns(config: RunConfig, layout: LayoutConfig) -> dict[str, Any]:
    """Train with memory offloaded between steps, as for servers on the same GPU."""
    return train(config, layout, taking_turns=True)


@pytest.mark.parametrize("dtype", [DType.fp32, DType.bf16])
def test_offloading_between_steps_changes_no_weight_of_the_critic(
    dtype: DType, ranks: RankPool, tmp_path: Path
) -> None:
    config = with_critic(tiny_llama(tmp_path, vocab=VOCAB, layers=2))
    config.model.dtype = dtype
    layout = LayoutConfig(max_tokens_per_microbatch=100)
    (stays,) = ranks.run(train, 1, config, layout)
    (goes,) = ranks.run(train_in_turns, 1, config, layout)
    assert goes["held"] == goes["critic_held"] == 0
    for name, value in stays["critic"].items():
        assert torch.equal(goes["critic"][name], value), name


def test_value_loss_clips_values() -> None:
    values = torch.tensor([0.5, 0.5, -0.5, 0.1], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss, held = value_loss(values, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([0.32, 0.125, 1.125, 0.405])
    assert held.tolist() == [True, False, False, False]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 0.5, -1.5, -0.9])


def test_a_clip_of_zero_is_refused() -> None:
    config = RunConfig()
    config.algorithm.name, config.critic.clip = "ppo", 0.0
    (problem,) = map(str, range_problems(config))
    assert "critic.clip = 0.0: it must be above 0: values could not move at all" in problem


def test_a_critic_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Both the size of the embeddings and the tokenizers are compared."""

    def folder(name: str, vocabulary: object, added: object = (), size: int = 4) -> str:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"vocab_size": size}))
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
        return str(path)

    policy = folder("policy", {"a": 0, "b": 1}, [{"id": 2, "content": "<end>"}])
    assert vocabulary_problem(folder("same", [["a", -1.0], ["b", -2.0]]), policy) is None
    for other, reason in (
        (folder("other", {"a": 0, "c": 1}), "its token 1 is 'c', and that of model.path is 'b'"),
        (folder("added", {"a": 0}, [{"id": 2, "content": "<pad>"}]), "its token 2 is '<pad>', and that of model.path"),
        (folder("larger", {"a": 0}, size=5), "its vocab_size is 5, and that of model.path is 4"),
    ):
        assert f"critic.path = {other}: {reason}" in str(vocabulary_problem(other, policy))
    config = RunConfig()
    config.model.path, config.critic.path = policy, str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"its token 1 is 'c'"):
        CriticActor(config, layout=None)


def test_critic_settings_without_a_critic_are_refused() -> None:
    config = RunConfig()
    config.critic.learning_rate = 1e-4
    (problem,) = map(str, method_problems(config))
    assert "grpo has no critic" in problem
