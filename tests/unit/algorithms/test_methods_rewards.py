"""Plug-ins that shape rewards and advantages against their formulas, written out in loops; tables without ranks."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_tables import CASES, experience_of, table_of, with_options
from policy_steps import made_up_context
from torch import Tensor

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Hook, HookContext
from clipo_megatron.algorithms.methods.adora import ADORA
from clipo_megatron.algorithms.methods.c_grpo import CGRPO
from clipo_megatron.algorithms.methods.empo import EMPO, Answers
from clipo_megatron.algorithms.methods.gcpo import GCPO
from clipo_megatron.algorithms.methods.grace import GRACE, Rewarded
from clipo_megatron.algorithms.methods.hapo import HAPO
from clipo_megatron.algorithms.methods.unlikeliness import Unlikeliness
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import PluginConfig, RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

SEEDS = range(3)
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def near(ours: Tensor, theirs: list[float]) -> None:
    """To 1e-6, of values above 1 relatively."""
    assert ours.dtype is torch.float32 and ours.numel() == len(theirs)
    far = [(a, b) for a, b in zip(ours.tolist(), theirs, strict=True) if not abs(a - b) <= 1e-6 * max(1.0, abs(b))]
    assert far == []


def rows_of(table: RolloutTable) -> list[list[int]]:
    """Graded rows of each group."""
    return [
        [row for row in range(table.size) if int(table.group[row]) == group and bool(table.graded[row])]
        for group in range(len(table.prompt_ids))
    ]


def kinds(table: RolloutTable, rows: list[int]) -> tuple[list[int], list[int]]:
    """Correct and wrong ones."""
    return [row for row in rows if table.correct[row]], [row for row in rows if not table.correct[row]]


def random(table: RolloutTable, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(table.size, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rollout(text: str) -> Rollout:
    return Rollout(torch.tensor([1]), torch.tensor([-0.1]), text, "stop", torch.tensor([0]), 0)


def prompt(**extra: Any) -> Prompt:
    return Prompt("made up/0", (), torch.tensor([1]), "arithmetic", "3", extra)


@EVERY_CASE
def test_hapo(case: str) -> None:
    hook, shortest = with_options(HAPO, weight=0.5), {}
    for seed in SEEDS:  # steps
        table, reward = table_of(CASES[case], seed)
        expected = reward.double().tolist()
        for group, rows in enumerate(rows_of(table)):
            h = shortest.get(group)
            for row in rows if h else ():
                c = math.cos(math.pi / 2 * min(int(table.response_length[row]) / h, 2))
                expected[row] += 0.5 * (max(-0.7, c) if table.correct[row] else min(0.0, c))
        near(hook.shape_reward(table, reward), expected)
        hook.after_update(experience_of(table, reward), learned=True)
        for group, rows in enumerate(rows_of(table)):
            for row in kinds(table, rows)[0]:
                shortest[group] = min(shortest.get(group, 10**9), int(table.response_length[row]))
    resumed = with_options(HAPO, weight=0.5)
    resumed.load_state_dict(hook.state_dict())
    assert torch.equal(resumed.shape_reward(table, reward), hook.shape_reward(table, reward))
    assert hook.state_dict() == {"shortest": {f"made up/{group}": length for group, length in shortest.items()}}


@EVERY_CASE
def test_adora(case: str) -> None:
    for seed in range(8):
        table, reward = table_of(CASES[case], seed)
        advantage = random(table, seed=seed).float()
        expected = [0.1 * value for value in advantage.double().tolist()]
        for group, rows in enumerate(rows_of(table)):
            right, wrong = ([int(table.response_length[row]) for row in kind] for kind in kinds(table, rows))
            if right and wrong and max(right) > statistics.fmean(wrong):
                for row in range(table.size):
                    if int(table.group[row]) == group:
                        expected[row] = float(advantage[row])
        near(ADORA().shape_advantage(table, reward, advantage), expected)


def test_adora_as_long_is_not_longer() -> None:
    table, reward = table_of([[True, False, False]])
    for lengths, factor in (([4, 3, 5], 0.1), ([5, 3, 5], 2.0)):
        table.response_length = torch.tensor(lengths)
        shaped = with_options(ADORA, emphasis=2.0).shape_advantage(table, reward, torch.ones(3))
        assert shaped.tolist() == pytest.approx([factor] * 3)


@EVERY_CASE
def test_empo(case: str) -> None:
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        answers = [["", "3", "4", "x"][int(10 * abs(value)) % 4] for value in random(table, seed=seed)]
        table.text_columns["answer"] = answers
        expected = (reward.double() - table.reward).tolist()  # what other hooks had added
        for rows in rows_of(table):
            for row in rows:
                same = [other for other in rows if answers[other] == answers[row]]
                expected[row] += len(same) / len(rows) if answers[row] else 0.0
        near(EMPO().shape_reward(table, reward), expected)


def test_answers_are_read_where_a_hook_needs_them() -> None:
    config = RunConfig()
    assert not any(isinstance(hook, Answers) for hook in build_algorithm(config).hooks)
    config.algorithm.plugins = [PluginConfig("empo")]
    algorithm = build_algorithm(config, made_up_context(config))
    noted = algorithm.observe(prompt(), rollout("so the answer is 17"))
    assert noted == {"answer": "17"}
    assert algorithm.observe(prompt(), rollout("no idea")) == {"answer": ""}


@EVERY_CASE
def test_unlikeliness(case: str) -> None:
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        table.reward = torch.where(table.correct, 1.0, -0.5)  # a wrong answer keeps what it costs
        sums = table.signals["logprob_sum"] = random(table, seed=seed)
        expected = reward.double().tolist()
        for rows in rows_of(table):
            ranked = sorted(rows, key=lambda row: float(sums[row]))  # the likeliest last
            for row in kinds(table, rows)[0]:
                r = float(table.reward[row])
                expected[row] += r * (1 - 0.25 * (ranked.index(row) + 1) / len(rows)) - r
        near(Unlikeliness().shape_reward(table, reward), expected)


def test_unlikeliness_of_equals_is_equal_and_wrong_ones_keep_their_reward() -> None:
    table, _ = table_of([[True, True, True, False]])
    table.signals["logprob_sum"] = torch.tensor([-1.0, -1.0, -3.0, -0.5], dtype=torch.float64)
    shaped = with_options(Unlikeliness, beta=0.4).shape_reward(table, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert shaped.tolist() == pytest.approx([1 - 0.4 * 2.5 / 4, 1 - 0.4 * 2.5 / 4, 1 - 0.4 * 1 / 4, -1.0])


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@EVERY_CASE
def test_gcpo(case: str, threshold: float) -> None:
    signs = set()
    for seed in range(8):
        table, reward = table_of(CASES[case], seed)
        used = random(table, seed=seed) > 0
        table.signals["used_tool"] = used.double()
        expected = reward.double().tolist()
        for rows in rows_of(table):
            tool = [float(table.correct[row]) for row in rows if used[row]]
            plain = [float(table.correct[row]) for row in rows if not used[row]]
            if tool and plain:
                gap = statistics.fmean(tool) - statistics.fmean(plain)
                sign = 1 if gap > threshold else -1 if gap < -threshold else 0
                signs.add(sign)
                for row in rows:
                    expected[row] += 0.5 * sign * bool(used[row])
        near(with_options(GCPO, weight=0.5, threshold=threshold).shape_reward(table, reward), expected)
    assert case != "random" or signs >= {1, -1}


def test_gcpo_sees_tools_by_a_pattern() -> None:
    for text, used in (("```python\nprint(1)", 1.0), ("<aux>AD</aux>", 1.0), ("a python", 0.0)):
        assert GCPO().observe(prompt(), rollout(text)) == {"used_tool": used}
    assert with_options(GCPO, pattern="draw [A-Z]{2}").observe(prompt(), rollout("draw AD")) == {"used_tool": 1.0}


@EVERY_CASE
def test_c_grpo(case: str) -> None:
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        table.reward = torch.where(table.correct, 1.0, -0.5)  # a wrong answer keeps what it costs
        score = table.signals["rubric"] = (random(table, seed=seed) * 2).round().abs() / 4
        expected = reward.double().tolist()
        for rows in rows_of(table):
            best = max([float(score[row]) for row in rows], default=0.0)
            for row in kinds(table, rows)[0]:
                r = float(table.reward[row])
                expected[row] += r * (0.7 + 0.3 * (float(score[row]) / best if best else 0.0)) - r
        near(CGRPO().shape_reward(table, reward), expected)


def test_rubrics_are_found_in_the_response() -> None:
    given = prompt(rubrics=["Pythagoras", "right angle", "25"], other=["x"])
    assert CGRPO().observe(given, rollout("by PYTHAGORAS, 9 + 16 = 25")) == {"rubric": 2 / 3}
    assert with_options(CGRPO, ignore_case=False).observe(given, rollout("by PYTHAGORAS, 9 + 16 = 25")) == {
        "rubric": 1 / 3
    }
    assert with_options(CGRPO, rubrics="other").observe(given, rollout("an x")) == {"rubric": 1.0}


def test_a_score_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def judge(prompt, rollout):\n    return len(rollout.text) / 10\n")
    hook = with_options(CGRPO, score=f"{file}:judge")
    hook.bind(context_with(prompt()))
    assert hook.observe(prompt(), rollout("four.")) == {"rubric": 0.5}
    with pytest.raises(ConfigError, match="nobody is not in it"):
        with_options(CGRPO, score=f"{file}:nobody")


@pytest.mark.parametrize("extra", [{}, {"rubrics": []}, {"rubrics": "25"}, {"rubrics": ["a", ""]}, {"rubrics": [3]}])
def test_rows_without_rubrics_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"prompt made up/0 has no list of texts as extra_info\['rubrics'\]"):
        CGRPO().bind(context_with(prompt(**extra)))


def context_with(*prompts: Prompt) -> HookContext:
    return replace(made_up_context(RunConfig()), prompts={each.id: each for each in prompts})


@pytest.mark.parametrize("rewarded", list(Rewarded))
@EVERY_CASE
def test_grace(case: str, rewarded: Rewarded) -> None:
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        table.signals["pooled_states"] = random(table, 6, seed=seed).float()
        states = table.signals["pooled_states"].double().tolist()

        def cosine(a: int, b: int, states: list[list[float]] = states) -> float:
            product = math.fsum(x * y for x, y in zip(states[a], states[b], strict=True))
            return product / math.hypot(*states[a]) / math.hypot(*states[b])

        expected = reward.double().tolist()
        for rows in rows_of(table):
            for row in rows:
                right, wrong = kinds(table, [other for other in rows if other != row])
                if right and wrong and (table.correct[row] or rewarded is Rewarded.all):
                    near_right = statistics.fmean([cosine(row, other) for other in right])
                    near_wrong = [cosine(row, other) for other in wrong]
                    group = statistics.fmean([cosine(row, other) for other in right + wrong])
                    score = near_right - statistics.fmean(near_wrong) + 0.2 * group - 0.2 * max(near_wrong)
                    expected[row] += 0.3 * score / 0.1
        near(with_options(GRACE, weight=0.3, rewarded=rewarded).shape_reward(table, reward), expected)


@pytest.mark.parametrize(
    ("hook", "signals"),
    [
        (HAPO(), {}),
        (Unlikeliness(), {"logprob_sum": torch.tensor([-1.0, -2.0], dtype=torch.float64)}),
        (GCPO(), {"used_tool": torch.tensor([1.0, 0.0])}),
        (CGRPO(), {"rubric": torch.tensor([1.0, 0.0], dtype=torch.float64)}),
        (GRACE(), {"pooled_states": torch.eye(2)}),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_ungraded_keeps_its_reward(hook: Hook, signals: dict[str, Tensor]) -> None:
    table, reward = table_of([[None, None]])
    table.signals.update(signals)
    assert torch.equal(hook.shape_reward(table, reward), reward)
