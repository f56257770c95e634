"""The controls of CLIPO against loops, and what they are refused beside."""

from __future__ import annotations

import statistics

import pytest
import torch
from method_tables import CASES, table_of, with_options
from policy_steps import made_up_context
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.algorithms.methods.likelihood import Likelihood
from clipo_megatron.algorithms.methods.shuffle_bonus import ShuffleBonus
from clipo_megatron.algorithms.methods.text_overlap import TextOverlap
from clipo_megatron.checks.training import training_problems
from clipo_megatron.config.schema import PluginConfig, RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

EVERY_CASE = pytest.mark.parametrize("case", CASES)


def correct_rows(table: RolloutTable) -> list[list[int]]:
    return [
        [row for row in range(table.size) if table.correct[row] and int(table.group[row]) == group]
        for group in range(len(table.prompt_ids))
    ]


def standardised(table: RolloutTable, score: list[float], weight: float) -> list[float]:
    """By groups with two correct rollouts or more and a wrong one; pairs by the deviation of the batch."""
    paid = []
    for group, rows in enumerate(correct_rows(table)):
        wrong = [
            r for r in range(table.size) if int(table.group[r]) == group and table.graded[r] and not table.correct[r]
        ]
        if len(rows) > 1 and wrong:
            paid.append(rows)
    gaps = {row: score[row] - statistics.fmean(score[r] for r in rows) for rows in paid for row in rows}
    batch = (sum(gap**2 for gap in gaps.values()) / max(sum(len(rows) - 1 for rows in paid), 1)) ** 0.5
    bonus = [0.0] * table.size
    for rows in paid:
        deviation = statistics.stdev(score[row] for row in rows) if len(rows) > 2 else batch
        held = [min(max(gaps[row] / (deviation + 1e-3), -2), 2) for row in rows]
        for row, value in zip(rows, held, strict=True):
            bonus[row] = weight * (value - statistics.fmean(held))
    return bonus


def near(ours: Tensor, theirs: list[float]) -> None:
    assert ours.dtype is torch.float32 and ours.tolist() == pytest.approx(theirs, abs=1e-6)


@EVERY_CASE
def test_likelihood(case: str) -> None:
    for seed in range(3):
        table, _ = table_of(CASES[case], seed)
        sums = -10 * torch.rand(table.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        table.signals["logprob_sum"] = sums
        score = [float(total) / int(length) for total, length in zip(sums, table.response_length, strict=True)]
        near(with_options(Likelihood, weight=-0.3).bonus(table), standardised(table, score, -0.3))


@EVERY_CASE
def test_text_overlap(case: str) -> None:
    prompt = Prompt("made up/0", (), torch.tensor([1]), "arithmetic", "3", {})
    for n in (1, 2, 5):
        hook = with_options(TextOverlap, n=n)
        table, _ = table_of(CASES[case], n)
        generator = torch.Generator().manual_seed(n)
        texts = [torch.randint(0, 3, (int(length),), generator=generator) for length in table.response_length]
        seen = [
            hook.observe(prompt, Rollout(ids, torch.zeros(len(ids)), "", "stop", torch.zeros(len(ids)), 0))
            for ids in texts
        ]
        table.text_columns = {"text_overlap/tokens": [str(each["text_overlap/tokens"]) for each in seen]}

        def grams(row: int, texts: list[Tensor] = texts, n: int = n) -> list[tuple[int, ...]]:
            ids = texts[row].tolist()
            return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] or [tuple(ids)]

        def overlap(one: int, other: int, grams=grams) -> float:
            left, common = grams(other), 0
            for gram in grams(one):
                if gram in left:
                    left.remove(gram)
                    common += 1
            return 2 * common / (len(grams(one)) + len(grams(other)))

        score = [0.0] * table.size
        for rows in correct_rows(table):
            for row in rows if len(rows) > 1 else ():
                score[row] = statistics.fmean(overlap(row, other) for other in rows if other != row)
        near(hook.bonus(table), standardised(table, score, 0.2))


class Pays(Hook):
    """A bonus of its own to each rollout."""

    def bonus(self, table: RolloutTable) -> Tensor:
        return torch.arange(1.0, table.size + 1)


def shuffled(table: RolloutTable, seed: int) -> Tensor:
    config, hook = RunConfig(), ShuffleBonus()
    config.train.seed = seed
    hook.bind(made_up_context(config))
    base = build_algorithm(config).base_method
    found = Algorithm([base, hook, Pays()]).assign_advantages(table, []).bonus  # it stands before what pays
    assert found is not None
    return found


def test_shuffling_keeps_the_bonuses_of_a_group_and_depends_on_seed_step_and_prompt() -> None:
    table, _ = table_of([[True] * 8 + [False, None], [True] * 8 + [False], [False, True]])
    plain, found = Pays().bonus(table), shuffled(table, 1)
    for rows in correct_rows(table):
        assert sorted(found[rows].tolist()) == plain[rows].tolist()
    assert torch.equal(found[~table.correct], plain[~table.correct])
    orders = {tuple((found[rows] - min(rows)).tolist()) for rows in correct_rows(table)[:2]}
    assert len(orders) == 2, "two prompts are permuted alike"
    assert torch.equal(shuffled(table, 1), found) and not torch.equal(shuffled(table, 2), found)
    table.step = 1
    assert not torch.equal(shuffled(table, 1), found)
    table.step, table.prompt_ids = 0, ["other/0", *table.prompt_ids[1:]]
    other = shuffled(table, 1)
    assert torch.equal(other[10:], found[10:]) and not torch.equal(other[:8], found[:8])


def test_every_permutation_is_drawn() -> None:
    table, _ = table_of([[True] * 3 + [False]])
    seen = {tuple(shuffled(table, seed).tolist()) for seed in range(60)}
    assert len(seen) == 6


class Reads(Hook):
    needs = frozenset({Signal.embeddings})


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["shuffle_bonus"], "it shapes bonuses, and nothing pays any"),
        ([f"{__name__}:Reads"], "it reads embeddings, and there is no head"),
        (["shuffle_bonus", "likelihood"], None),
        (["text_overlap"], None),
    ],
)
def test_what_has_nothing_to_act_on_is_refused(names: list[str], part: str | None) -> None:
    config = RunConfig()
    config.algorithm.plugins = [PluginConfig(name) for name in names]
    assert list(training_problems(config)) == []
    config.clipo.enabled = False
    problems = [str(each) for each in training_problems(config)]
    assert len(problems) == (part is not None) and all(str(part) in each for each in problems)
