"""The bonus, the hook that pays it, and the statistics about it."""

import math

import pytest
import torch

from clipo_megatron.algorithms.clipo import contrastive_loss, contrastive_reward
from clipo_megatron.algorithms.clipo.hook import Clipo
from clipo_megatron.algorithms.clipo.statistics import statistics
from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.config.schema import ClipoConfig, ContrastiveLossName, Level
from clipo_megatron.flow import RolloutTable

YES = torch.ones(4, dtype=torch.bool)


def test_the_bonus_is_minus_lambda_times_the_loss_above_the_floor():
    loss = torch.tensor([1.0, 2.0, 10.0, 1.0], requires_grad=True)
    valid = torch.tensor([True, True, True, False])
    bonus = contrastive_reward(loss, valid)
    torch.testing.assert_close(bonus, torch.tensor([-0.2, -0.4, -0.5, 0.0]))
    assert not bonus.requires_grad
    other = contrastive_reward(loss, valid, weight=0.1, floor=-0.3, constant=0.25)
    torch.testing.assert_close(other, torch.tensor([0.15, 0.05, -0.3, 0.0]))


def test_a_collapsed_head_and_perfect_separation_of_fourteen_both_reach_the_floor():
    loss = torch.tensor([math.log(15), math.log(14 - 1), math.log(13 - 1), 0.0])
    bonus = contrastive_reward(loss, YES)
    assert bonus[0] == -0.5 and bonus[1] == -0.5 and bonus[2] > -0.5


def test_calibration_subtracts_the_loss_of_perfect_separation():
    positives = torch.tensor([1, 2, 5, 16])
    loss = torch.tensor([0.3, 0.3, 0.3 + math.log(4), math.log(15)])
    bonus = contrastive_reward(loss, YES, calibrate=True, group_sizes=positives)
    torch.testing.assert_close(bonus, torch.tensor([-0.06, -0.06, -0.06, 0.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate": True}, "calibrate=True needs group_sizes"),
        ({"calibrate": True, "group_sizes": torch.ones(3)}, "group_sizes has shape"),
        ({"valid": torch.ones(4)}, "needed is torch.bool"),
        ({"valid": YES[:3]}, "valid has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        contrastive_reward(**({"loss": torch.ones(4), "valid": YES} | change))


def table(anchors="correct", level="group"):
    """Three groups of four: mixed, all correct, one correct alone."""
    correct = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]).bool()
    group = torch.arange(12) // 4
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    loss, valid = contrastive_loss(z, correct, group, loss="supcon_out", anchors=anchors, level=level)
    whole = torch.zeros(12, dtype=torch.long)
    return RolloutTable(
        prompt_ids=["a", "b", "c"],
        group=group,
        correct=correct,
        graded=torch.ones(12, dtype=torch.bool),
        reward=correct.float(),
        prompt_length=whole,
        response_length=whole,
        truncated=~torch.ones(12, dtype=torch.bool),
        version=whole,
        signals={"contrastive_loss": loss, "contrastive_valid": valid},
    )


def test_the_hook_pays_valid_correct_rollouts_only():
    hook, rollouts = Clipo(ClipoConfig()), table(anchors="both")
    assert hook.needs == {Signal.contrastive}
    bonus = hook.bonus(rollouts)
    shaped = rollouts.reward + bonus
    loss = rollouts.signals["contrastive_loss"]
    torch.testing.assert_close(shaped[:3], 1 + (-0.2 * loss[:3]).clamp(min=-0.5))
    assert torch.equal(shaped[3:], rollouts.reward[3:])
    assert rollouts.signals["contrastive_valid"][9:].any(), "the wrong ones of the last group are anchors"
    assert not bonus[3:].any()
    assert torch.equal(rollouts.reward, rollouts.correct.float()), "the grader's reward is left as it was"


def test_the_hook_reads_its_settings():
    rollouts = table()
    bonus = Clipo(ClipoConfig(weight=0.01, constant=0.2, floor=0.195)).bonus(rollouts)
    loss = rollouts.signals["contrastive_loss"][:3]
    torch.testing.assert_close(bonus[:3], (0.2 - 0.01 * loss).clamp(min=0.195))


@pytest.mark.parametrize(
    ("level", "loss", "subtracted"),
    [
        (Level.group, "infonce", 2),
        (Level.cross, "supcon_in", 2),
        (Level.batch, "supcon_out", 7),
        (Level.group, "soft_nn", 1),
    ],
)
def test_the_hook_calibrates_by_the_positives_of_the_level(level, loss, subtracted):
    rollouts = table(level=level.value)
    config = ClipoConfig(calibrate=True, level=level, loss=ContrastiveLossName(loss), floor=-100.0)
    hook = Clipo(config)
    bonus = hook.bonus(rollouts)
    expected = -0.2 * (rollouts.signals["contrastive_loss"][:3] - math.log(subtracted))
    torch.testing.assert_close(bonus[:3], expected)


def test_the_warm_up_pays_nothing_and_survives_a_resume():
    hook, rollouts = Clipo(ClipoConfig(warmup_steps=2)), table()
    for update in range(3):
        assert hook.warming_up == (update < 2)
        assert (hook.bonus(rollouts) == 0).all() == (update < 2)
        hook.after_update(None, learned=True)
        resumed = Clipo(ClipoConfig(warmup_steps=2))
        resumed.load_state_dict(hook.state_dict())
        hook = resumed


def test_a_missing_signal_is_named():
    rollouts = table()
    del rollouts.signals["contrastive_valid"]
    with pytest.raises(ValueError, match="no contrastive_valid"):
        Clipo(ClipoConfig()).bonus(rollouts)


def test_statistics_equal_loops_over_pairs():
    generator = torch.Generator().manual_seed(3)
    group = torch.tensor([7, 7, -1, 7, -1, -1, 7, 7, 30, 30, -1, 30])
    correct = torch.tensor([1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1]).bool()
    z = torch.randn(12, 5, generator=generator)
    loss, valid = contrastive_loss(z, correct, group, loss="supcon_out", anchors="both", temperature=0.5)
    bonus = contrastive_reward(loss, valid & correct, floor=-0.4)
    found = statistics(correct, group, loss, valid, bonus, floor=-0.4, embeddings=z)

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j and group[i] == group[j] and correct[i]]
    cosine = torch.nn.functional.cosine_similarity
    cosines = {(i, j): cosine(z[i], z[j], dim=0).item() for i, j in pairs}
    positive = [c for (i, j), c in cosines.items() if correct[j]]
    negative = [c for (i, j), c in cosines.items() if not correct[j]]
    paid = [[b for b, g, c, v in zip(bonus, group, correct, valid, strict=True) if g == k and c and v] for k in (7, -1)]
    every = torch.stack([b for group_bonus in paid for b in group_bonus])
    expected = {
        "clipo/groups_with_valid_anchor": 2 / 3,
        "clipo/loss": loss[valid].mean().item(),
        "clipo/bonus_mean": every.mean().item(),
        "clipo/bonus_at_floor": (every <= -0.4).float().mean().item(),
        "clipo/bonus_spread": sum(torch.stack(p).std().item() for p in paid) / 2,
        "clipo/positive_cosine": sum(positive) / len(positive),
        "clipo/negative_cosine": sum(negative) / len(negative),
    }
    assert 0 < expected["clipo/bonus_at_floor"] < 1
    assert found == pytest.approx(expected, rel=1e-5)


def test_statistics_without_anything_to_average_leave_the_metric_out():
    nothing = torch.zeros(0)
    empty = statistics(nothing.bool(), nothing.long(), nothing, nothing.bool(), nothing, embeddings=torch.zeros(0, 3))
    assert empty == {}
    ones = torch.ones(4)
    found = statistics(YES, torch.arange(4), ones, ~YES, ones, embeddings=torch.randn(4, 3))
    assert found == {"clipo/groups_with_valid_anchor": 0.0}
