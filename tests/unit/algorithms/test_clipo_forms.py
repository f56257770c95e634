"""The forms of the bonus against loops in float64, what holds for each, and where the bonus is added."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from method_tables import table_of
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.clipo import contrastive_bonus, losses
from clipo_megatron.algorithms.clipo.forms import contrastive_scores
from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.checks.training import training_problems
from clipo_megatron.config.schema import BonusForm, BonusPlace, KLPlace, RunConfig

FORMS = ["paper", "expected", "ratio"]
LOSSES = ["infonce", "supcon_out", "supcon_in", "soft_nn"]
LEVELS = ["group", "batch", "cross", "cross_opposite"]
TAU, WEIGHT, FLOOR, CONSTANT = 0.3, 0.2, -0.5, 0.05


def oracle(
    z: Tensor, correct: Tensor, group: Tensor, uniform: Tensor, form: str, loss: str, level: str, calibrate: bool
) -> list[float]:
    """One rollout after another, from lists of positives and negatives."""
    size, label, member = len(z), correct.tolist(), group.tolist()
    s = [
        [sum(a * b for a, b in zip(z[i].tolist(), z[j].tolist(), strict=True)) / TAU for j in range(size)]
        for i in range(size)
    ]
    lengths = [math.sqrt(s[i][i] * TAU) for i in range(size)]
    s = [[s[i][j] / (lengths[i] * lengths[j]) for j in range(size)] for i in range(size)]
    bonus, g = [0.0] * size, {}
    for i in range(size):
        others = [j for j in range(size) if j != i]
        mates = [j for j in others if member[j] == member[i]]
        P = [j for j in (others if level == "batch" else mates) if label[j]]
        N = [j for j in (mates if level == "group" else others) if not label[j]]
        if level == "cross":
            N = [j for j in others if j not in P]
        if not (label[i] and P and N):
            continue
        whole = math.log(sum(math.exp(s[i][j]) for j in P + N))
        easy = math.log(len(P)) if calibrate and loss != "soft_nn" else 0.0
        inside = math.log(sum(math.exp(s[i][p]) for p in P))
        if form == "ratio":
            g[i] = inside - math.log(len(P)) - math.log(sum(math.exp(s[i][n]) for n in N) / len(N))
        elif form == "expected" and loss in ("infonce", "supcon_out"):
            bonus[i] = statistics.fmean(max(CONSTANT - WEIGHT * (whole - s[i][p] - easy), FLOOR) for p in P)
        else:
            value = {
                "infonce": whole - s[i][P[int(uniform[i] * len(P))]],
                "supcon_out": whole - statistics.fmean(s[i][p] for p in P),
                "supcon_in": whole - inside + math.log(len(P)),
                "soft_nn": whole - inside,
            }[loss]
            bonus[i] = max(CONSTANT - WEIGHT * (value - easy), FLOOR)
    sets: dict[int, list[int]] = {}
    for i in g:
        sets.setdefault(0 if level == "batch" else member[i], []).append(i)
    gaps = {i: g[i] - statistics.fmean(g[j] for j in rows) for rows in sets.values() for i in rows}
    pooled = math.sqrt(sum(gap**2 for gap in gaps.values()) / max(sum(len(rows) - 1 for rows in sets.values()), 1))
    for rows in sets.values():
        deviation = statistics.stdev(g[i] for i in rows) if len(rows) > 2 else pooled
        held = {i: min(max(gaps[i] / (deviation + 1e-3), -2.0), 2.0) for i in rows}
        for i in rows:
            bonus[i] = WEIGHT * (held[i] - statistics.fmean(held.values()))
    return bonus


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups in disorder: two mixed ones, one all right, one all wrong, one with a single right one, two with a pair,
    one of one rollout."""
    verdicts = {
        7: [1, 1, 1, 0, 1, 0], -3: [1, 0, 1, 1, 0, 0, 1], 0: [1] * 4, 44: [0] * 3, 5: [0, 1, 0, 0],
        9: [1, 1, 0], 400_000_000_000: [1, 0, 1, 0], 12: [1],
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([name for name, each in verdicts.items() for _ in each])
    correct = torch.tensor([verdict for each in verdicts.values() for verdict in each]).bool()
    order = torch.randperm(len(group), generator=generator)
    z = torch.randn(len(group), 5, generator=generator, dtype=torch.float64)
    return z, correct[order], group[order], torch.rand(len(group), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_values_equal_the_loop(form: str, loss: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, correct, group, uniform = batch()
    settings = {"weight": WEIGHT, "floor": FLOOR, "constant": CONSTANT, "temperature": TAU, "uniform": uniform}
    for calibrate in (False, True):
        expected = oracle(z, correct, group, uniform, form, loss, level, calibrate)
        names = {"form": form, "loss": loss, "level": level, "calibrate": calibrate}
        found = contrastive_bonus(z, correct, group, **names, **settings)
        assert found.dtype is torch.float64 and sum(value != 0 for value in expected) >= 10
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-12
        single = contrastive_bonus(z.float(), correct, group, **names, **settings)
        assert single.dtype is torch.float32 and torch.allclose(single.double(), found, atol=2e-5)
    monkeypatch.setattr(losses, "BLOCK", 8)  # a few anchors at a time
    monkeypatch.setattr("clipo_megatron.algorithms.clipo.forms.BLOCK", 8)
    assert (contrastive_bonus(z, correct, group, **names, **settings) - found).abs().max() <= 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "verdicts", [[], [1], [0], [1, 1, 1], [0, 0, 0], [0, 1, 0]], ids=["none", "1", "0", "all right", "all wrong", "one"]
)
def test_nothing_to_compare_pays_nothing(form: str, verdicts: list[int]) -> None:
    correct, group = torch.tensor(verdicts).bool(), torch.zeros(len(verdicts), dtype=torch.int64)
    bonus = contrastive_bonus(torch.randn(len(verdicts), 3), correct, group, form=form)
    assert bonus.shape == correct.shape and not bonus.any()


def test_expected_is_the_mean_of_infonce_over_its_draws() -> None:
    """Of all positives, each of which is drawn for one of the numbers; with a floor that binds for some of them."""
    z, correct, group, _ = batch()
    for level in LEVELS:
        draws = []
        for number in range(60):  # 60 is a multiple of every count of positives at group level
            uniform = torch.full((len(z),), (number + 0.5) / 60, dtype=torch.float64)
            draws.append(
                contrastive_bonus(z, correct, group, level=level, uniform=uniform, temperature=TAU, floor=-0.4)
            )
        if level == "batch":  # 17 positives each
            positives = int(correct.sum()) - 1
            draws = [
                contrastive_bonus(
                    z, correct, group, level=level, temperature=TAU, floor=-0.4,
                    uniform=torch.full((len(z),), (number + 0.5) / positives, dtype=torch.float64),
                )
                for number in range(positives)
            ]  # fmt: skip
        found = contrastive_bonus(z, correct, group, form="expected", level=level, temperature=TAU, floor=-0.4)
        drawn = torch.stack(draws)
        assert (drawn == -0.4).any() and (drawn.std(0) > 0.01).any()
        assert (drawn.mean(0) - found).abs().max() < 1e-12


def test_ratio_sums_to_zero_is_bounded_and_does_not_count_copies_of_negatives() -> None:
    for seed in range(20):
        z, correct, group, _ = batch(seed)
        for level in LEVELS:
            settings = {"form": "ratio", "level": level, "temperature": 0.02}
            bonus = contrastive_bonus(z, correct, group, **settings)
            for each in group.unique() if level != "batch" else [None]:
                rows = correct if each is None else correct & (group == each)
                assert abs(float(bonus[rows].sum())) < 1e-12
            assert 0.1 < bonus.abs().max() < 0.5
            if level == "cross":
                continue  # there the correct rollouts of other prompts are negatives too
            copies = torch.cat([torch.arange(len(z)), *[(~correct).nonzero().squeeze(1)] * 3])
            again = contrastive_bonus(z[copies], correct[copies], group[copies], **settings)
            assert (again[: len(z)] - bonus).abs().max() < 1e-12


def test_ratio_never_pays_a_member_of_a_cluster_less_than_an_equidistant_outlier() -> None:
    """Ten alike and four that have one cosine to all others; supcon_out pays the outliers more, as J punishes the
    majority."""
    axes = torch.eye(32, dtype=torch.float64)
    cluster = torch.stack([axes[0]] * 10)
    outliers = 0.6 * axes[0] + 0.8 * axes[1:5]
    z = torch.cat([cluster, outliers, axes[20:22]])
    correct, group = torch.arange(16) < 14, torch.zeros(16, dtype=torch.int64)
    bonus = contrastive_bonus(z, correct, group, form="ratio")
    assert bonus[:10].min() > bonus[10:14].max()
    paper = contrastive_bonus(z, correct, group, loss="supcon_out", calibrate=True, floor=-9.0)
    assert paper[:10].max() < paper[10:14].min()


def test_a_collapsed_head_is_not_paid_for_its_rounding() -> None:
    z = torch.ones(8, 16) + 1e-7 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    bonus = contrastive_bonus(z, torch.arange(8) < 5, torch.zeros(8, dtype=torch.int64), form="ratio")
    assert bonus.abs().max() < 0.01


def test_scores_of_a_partition_add_up() -> None:
    z, correct, group, _ = batch()
    for form in ("expected", "ratio"):
        for level in LEVELS:
            whole, valid = contrastive_scores(z, correct, group, form=form, level=level)
            parts = [
                contrastive_scores(z, correct, group, form=form, level=level, anchor_rows=rows)
                for rows in torch.arange(len(z)).split(7)
            ]
            assert torch.allclose(sum(each[0] for each in parts), whole, rtol=1e-12)
            assert torch.equal(torch.stack([each[1] for each in parts]).any(0), valid)


def test_wrong_names_are_refused() -> None:
    z, correct, group, _ = batch()
    with pytest.raises(ValueError, match=r"form is 'ratios'.*Did you mean 'ratio'"):
        contrastive_bonus(z, correct, group, form="ratios")
    with pytest.raises(ValueError, match=r"loss is 'info'"):
        contrastive_bonus(z, correct, group, form="ratio", loss="info")


class Pays(Hook):
    """A bonus to one rollout."""

    def bonus(self, table: object) -> Tensor:
        return torch.tensor([0.4, 0.0, 0.0, 0.0, 0.2, -0.2, 0.0, 0.0])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_bonus_on_the_advantage_keeps_its_size(name: str) -> None:
    """One right of four, and an all-right group: on the reward, division by the deviation cancels the first bonus and
    brings the second to deviation 1."""
    table, _ = table_of([[True, False, False, False], [True, True, True, True]])
    config = RunConfig()
    config.algorithm.name, config.clipo.enabled = name, False
    base = build_algorithm(config).base_method
    plain = Algorithm([base]).assign_advantages(table, [])
    on_reward = Algorithm([base, Pays()]).assign_advantages(table, [])
    on_advantage = Algorithm([base, Pays()], BonusPlace.advantage).assign_advantages(table, [])
    bonus = Pays().bonus(table)
    assert torch.equal(on_advantage.advantage, plain.advantage + bonus)
    assert torch.equal(on_advantage.reward, plain.reward) and torch.equal(on_advantage.bonus, bonus)
    if name == "grpo":
        assert torch.allclose(on_reward.advantage[:4], plain.advantage[:4], atol=1e-4)
        assert float(on_reward.advantage[4:].std()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        ({"bonus": BonusForm.ratio, "calibrate": True}, "clipo.calibrate", "Leave it at false"),
        ({"bonus": BonusForm.ratio, "floor": -1.0}, "clipo.floor", "made of no loss, so it would be ignored"),
        ({"bonus": BonusForm.ratio, "constant": 0.1}, "clipo.constant", "Leave it at 0.0"),
        ({"place": BonusPlace.advantage, "enabled": False}, "clipo.place", "nothing pays a bonus"),
        ({"place": BonusPlace.advantage, "name": "disco"}, "clipo.place", "disco has no advantages"),
        ({"place": BonusPlace.advantage, "name": "ppo"}, "clipo.place", "ppo takes what it is added to for rewards"),
        (
            {"place": BonusPlace.advantage, "name": "reinforce_pp", "kl": 0.1},
            "clipo.place",
            "reinforce_pp whitens what it is added to",
        ),
        ({"place": BonusPlace.advantage, "name": "reinforce_pp"}, None, ""),
        ({"bonus": BonusForm.ratio, "place": BonusPlace.advantage}, None, ""),
        ({"bonus": BonusForm.expected, "calibrate": True, "floor": -1.0}, None, ""),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict, key: str | None, part: str) -> None:
    config = RunConfig()
    config.algorithm.name = settings.pop("name", "grpo")
    config.algorithm.kl.coefficient, config.algorithm.kl.place = settings.pop("kl", 0.0), KLPlace.reward
    for name, value in settings.items():
        setattr(config.clipo, name, value)
    problems = [*training_problems(config), *method_problems(config)]
    assert [each.key for each in problems] == ([key] if key else [])
    assert not problems or part in str(problems[0])
