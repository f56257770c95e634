"""CEPO and D3S against their formulas, written with loops over single tokens; float64."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from method_tables import CASES, table_of, with_options
from policy_steps import made_up_context
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext, ScoredTokens
from clipo_megatron.algorithms.methods.cepo import CEPO, GOLD, WRONG
from clipo_megatron.algorithms.methods.d3s import D3S, D3sScope, kth_largest, most_varied
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Prompt, RolloutTable


def scored(table: RolloutTable, seed: int = 0, **signals: Tensor) -> ScoredTokens:
    """Every token of the table on one rank."""
    rollout = torch.repeat_interleave(torch.arange(table.size), table.response_length)
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rollout.numel(), generator=generator, dtype=torch.float64)
    given = {name: values[rollout] if values.numel() == table.size else values for name, values in signals.items()}
    return ScoredTokens(rollout, rollout, old, given, sum_over_ranks=torch.clone)


def after(hook: Any, steps: int) -> Any:
    for _ in range(steps):
        hook.after_update(None, learned=True)
    return hook


# --- CEPO ------------------------------------------------------------------------------------------------------------


def context_for(table: RolloutTable, messages: tuple[dict[str, str], ...]) -> HookContext:
    prompts = {name: Prompt(name, messages, torch.arange(3), "arithmetic", "3") for name in table.prompt_ids}
    return HookContext(**{**vars(made_up_context(RunConfig())), "prompts": prompts, "tokenize": None})


@pytest.mark.parametrize("steps", [0, 10, 24, 25, 40])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_cepo_is_the_formula(case: str, steps: int, clip: float) -> None:
    table, _ = table_of(CASES[case])
    generator = torch.Generator().manual_seed(steps)
    count = int(table.response_length.sum())
    plus, minus = (-3 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = scored(table, **{GOLD: plus, WRONG: minus})
    advantage = torch.randn(table.size, generator=generator, dtype=torch.float64)[tokens.rows]
    ours = after(with_options(CEPO, clip=clip), steps).token_advantage(tokens, table, advantage)
    share = 0.5 * max(0.0, 1 - steps / 25)
    for place in range(count):
        a = float(advantage[place])
        w = math.exp(math.copysign(1.0, a) * float(plus[place] - minus[place]))
        w = min(max(w, 1 - clip), 1 + clip)
        assert float(ours[place]) == pytest.approx(a * ((1 - share) + share * w), abs=1e-6)


def test_cepo_hints_at_the_gold_answer_and_at_the_first_wrong_one() -> None:
    table, _ = table_of([[True, False, False], [True, True], [False, None, False], [False, False]])
    # Group 2: its first wrong rollout says nothing, its second says so; group 3's wrong ones say the gold answer.
    table.text_columns["answer"] = ["3", "4", "5", "3", "3", "", "9", "7", "3", ""]
    turns = (
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "2+1?"},
        {"role": "assistant", "content": ""},
    )
    hook = with_options(CEPO, hint=" [{answer}]{}")
    hook.bind(context_for(table, turns))
    hook.context = HookContext(
        **{**vars(hook.context), "encode": lambda messages: [turn["content"] for turn in messages]}
    )
    variants = hook.variants(table)
    assert variants[GOLD] == {0: ["Be", "2+1? [3]{}", ""], 2: ["Be", "2+1? [3]{}", ""]}
    assert variants[WRONG] == {0: ["Be", "2+1? [4]{}", ""], 2: ["Be", "2+1? [7]{}", ""]}
    assert turns[1]["content"] == "2+1?", "the prompt is left as it was"
    assert after(hook, 25).variants(table) == {GOLD: {}, WRONG: {}}, "no forwards once they have no weight"


def test_cepo_keeps_advantages_to_the_bit_where_there_is_no_wrong_answer() -> None:
    table, _ = table_of(CASES["all right"])
    advantage = torch.randn(int(table.response_length.sum()))
    assert torch.equal(CEPO().token_advantage(scored(table), table, advantage), advantage)
    same = torch.rand_like(advantage)
    assert torch.equal(CEPO().token_advantage(scored(table, **{GOLD: same, WRONG: same}), table, advantage), advantage)


# --- D3S -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_most_varied_is_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(9, generator=generator)
    if seed % 2:
        values = (values * 2).round() / 2  # with ties
    if seed == 5:
        values = values.double() + 1e9  # far from 0, where sums of squares say nothing
    for count in range(10):
        chosen = most_varied(values, count)
        assert chosen.numel() == count == chosen.unique().numel()
        if count:
            best = max(
                float(values[list(each)].double().var(correction=0)) for each in itertools.combinations(range(9), count)
            )
            assert float(values[chosen].double().var(correction=0)) == pytest.approx(best, abs=1e-9)


def test_equal_choices_are_not_decided_by_rounding() -> None:
    """Of a step with 5 right rollouts of 32, any 19 wrong ones vary as much as any others: the last 19 are chosen."""
    right = {5: 0.7479137, 6: 0.7513172, 10: 1.0, 18: 0.5, 23: 0.5}
    values = torch.zeros(32)
    values[list(right)] = torch.tensor(list(right.values()))
    wrong = [row for row in range(32) if row not in right]
    for noise in torch.linspace(-1e-6, 1e-6, 21):
        chosen = most_varied(torch.where(values == 0, values, values * (1 + noise * values)), 24)
        assert sorted(chosen.tolist()) == sorted([*right, *wrong[-19:]])
    assert most_varied(torch.full((7,), 0.1), 4).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("steps", [0, 5, 10, 30])
@pytest.mark.parametrize("scope", D3sScope)
@pytest.mark.parametrize("case", CASES)
def test_d3s_is_the_formula(case: str, scope: D3sScope, steps: int) -> None:
    table, _ = table_of(CASES[case])
    generator = torch.Generator().manual_seed(steps)
    advantage = torch.randn(table.size, generator=generator)
    entropy = torch.rand(int(table.response_length.sum()), generator=generator)
    hook = after(with_options(D3S, rollouts=0.4, tokens=0.3, scope=scope, relax_steps=10), steps)
    kept = hook.select(table, advantage)
    relaxed = min(steps / 10, 1.0)

    pools = [[row for row in range(table.size) if table.graded[row]]]
    if scope is D3sScope.group:
        pools = [[row for row in pools[0] if table.group[row] == number] for number in range(len(table.prompt_ids))]
    for pool in pools:
        chosen = [row for row in pool if kept[row]]
        assert len(chosen) == math.ceil((0.4 + 0.6 * relaxed) * len(pool) - 1e-9)
        if chosen:
            best = max(
                float(advantage[list(each)].double().var(correction=0))
                for each in itertools.combinations(pool, len(chosen))
            )
            assert float(advantage[chosen].double().var(correction=0)) == pytest.approx(best, abs=1e-9)
    assert not kept[~table.graded].any()

    tokens = scored(table, entropy=entropy)
    ours = hook.token_advantage(tokens, table, advantage[tokens.rows])
    places = [place for place in range(entropy.numel()) if kept[tokens.rows[place]]]
    places.sort(key=lambda place: -abs(float(advantage[tokens.rows[place]])) * float(entropy[place]))
    top = set(places[: math.ceil((0.3 + 0.7 * relaxed) * len(places) - 1e-9)])
    expected = [float(advantage[tokens.rows[place]]) if place in top else 0.0 for place in range(entropy.numel())]
    assert ours.tolist() == expected


class Rank:
    """One of two ranks, each in a thread of its own."""

    def __init__(self, meet: threading.Barrier, box: dict[int, Tensor], number: int):
        self.meet, self.box, self.number = meet, box, number

    def sum(self, own: Tensor) -> Tensor:
        self.box[self.number] = own
        self.meet.wait()
        total = self.box[0] + self.box[1]
        self.meet.wait()
        return total


@pytest.mark.parametrize("cut", [0, 17, 47])
def test_the_threshold_of_tokens_is_that_of_both_ranks_together(cut: int) -> None:
    """Divided over two ranks in any way, one of them without a token: the k-th largest of all, on both."""
    values = torch.cat([torch.rand(40, generator=torch.Generator().manual_seed(3)), torch.zeros(3)])
    values = torch.cat([values, torch.tensor([1e-42, 7.5, 7.5, 3e38])])
    everything = values.sort(descending=True).values
    meet, box = threading.Barrier(2, timeout=20), {}
    parts = values[:cut], values[cut:]

    def find(number: int, k: int) -> float:
        tokens = ScoredTokens(None, None, None, {}, sum_over_ranks=Rank(meet, box, number).sum)
        return float(kth_largest(parts[number], k, tokens))

    with ThreadPoolExecutor(2) as pool:
        for k in (1, 2, 3, 20, 44, 47):
            assert list(pool.map(find, range(2), [k, k])) == [float(everything[k - 1])] * 2


def test_d3s_goes_on_where_it_was() -> None:
    hook = after(with_options(D3S, relax_steps=10), 4)
    resumed = with_options(D3S, relax_steps=10)
    resumed.load_state_dict(hook.state_dict())
    table, _ = table_of(CASES["random"])
    advantage = torch.linspace(-1, 1, table.size)
    assert torch.equal(resumed.select(table, advantage), hook.select(table, advantage))
    assert not torch.equal(with_options(D3S, relax_steps=10).select(table, advantage), hook.select(table, advantage))
