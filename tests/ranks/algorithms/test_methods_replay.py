"""PIPO and HPT: formulas against loops in float64, experiences that outlive a run, demonstrations on any ranks."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_tables import CASES, experience_of, table_of, with_options
from policy_steps import STEPS, configuration, made_up_context, train, train_part
from ranks import RankPool
from tiny_models import tiny_llama

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.methods.d3s import D3S, D3sScope
from clipo_megatron.algorithms.methods.hpt import HPT
from clipo_megatron.algorithms.methods.pipo import PIPO
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import Aggregation, LayoutConfig, PluginConfig, RunConfig
from clipo_megatron.flow import Experience, MiniBatch, Prompt, RolloutTable, Sample
from clipo_megatron.policy.batch.packing import pack

VOCAB = 263


# --- PIPO ------------------------------------------------------------------------------------------------------------


def outcome_of(mean: float, case: str = "random") -> Experience:
    """A batch whose graded rollouts have this mean reward."""
    table, _ = table_of(CASES[case])
    reward = torch.where(table.graded, mean, 7.0) + torch.where(table.graded, 0.0, 1.0)
    advantage = torch.randn(table.size, generator=torch.Generator().manual_seed(int(1000 * mean)))
    return experience_of(table, reward.float(), advantage)


def test_pipo_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(14, generator=generator).tolist()
    hook, signs = with_options(PIPO, limit=100.0), set()
    for step, mean in enumerate(means):
        outcome = outcome_of(mean)
        former = hook.replay(outcome)
        assert (hook.replay(outcome) is None) == (former is None), "to ask changes nothing"
        hook.after_update(outcome, learned=True)
        before = [float(torch.tensor(each)) for each in means[max(0, step - 8) : step]]
        if len(before) < 2:
            assert former is None
            continue
        xi = (float(torch.tensor(mean)) - sum(before) / len(before)) / statistics.stdev(before)
        phi = xi if xi >= 0 else 0.1 * xi
        signs.add(phi > 0)
        assert hook.phi == pytest.approx(phi, abs=1e-6)
        expected = outcome_of(means[step - 1]).advantage.double() * phi
        torch.testing.assert_close(former.advantage.double(), expected, rtol=1e-6, atol=1e-6)
    assert signs == {True, False}


@pytest.mark.parametrize(("means", "phi"), [([0.5] * 3, 0.0), ([0.5, 0.5, 0.6], 5.0), ([0.5, 0.5, 0.1], -0.5)])
def test_pipo_with_batches_that_do_not_vary(means: list[float], phi: float) -> None:
    hook = PIPO()
    for mean in means:
        former = hook.replay(outcome := outcome_of(mean))
        hook.after_update(outcome, learned=True)
    assert hook.phi == pytest.approx(phi)
    assert (former is not None) == bool(phi)


def test_pipo_leaves_a_step_without_verdicts_out_of_its_window() -> None:
    hook = PIPO()
    for case in ("random", "groups of one", "random"):
        outcome = outcome_of(0.5, case)
        if case == "groups of one":
            outcome = replace(outcome, table=replace(outcome.table, graded=torch.zeros(3, dtype=torch.bool)))
        hook.replay(outcome)
        hook.after_update(outcome, learned=True)
    assert len(hook.means) == 2


def test_pipo_does_not_take_the_first_bonus_for_a_loss() -> None:
    """CLIPO's bonus is at most 0: a step's mean with it says nothing against those of the warm-up."""
    config = RunConfig()
    config.clipo.enabled, config.clipo.warmup_steps = True, 3
    for enabled in (True, False):
        config.clipo.enabled, hook, phis = enabled, PIPO(), []
        hook.bind(made_up_context(config))
        for step, mean in enumerate([0.5, 0.52, 0.48, 0.25, 0.27, 0.28]):
            outcome = outcome_of(mean)
            outcome.table.step = step
            hook.replay(outcome)
            hook.after_update(outcome, learned=True)
            phis.append(hook.phi)
        if enabled:
            assert phis[:2] == [0, 0] and phis[2] < 0 and phis[3:5] == [0, 0] and phis[5] > 0
            assert hook.means == pytest.approx([0.25, 0.27, 0.28])
        else:
            assert phis[3] < -0.4


def test_pipo_holds_what_a_replay_reads() -> None:
    outcome = outcome_of(0.5)
    ours = ("masked_logprob", "one of a user's")
    names = (*ours, "entropy", "value", "next_value", "cepo_gold_logprob", "cepo_wrong_logprob")
    sample = Sample(0, 0, torch.arange(3), torch.arange(2), torch.zeros(2))
    micro = pack([sample], share_prompts=False, multiple=1, device=torch.device("cpu"))
    micro.signals = {name: torch.zeros(2) for name in names}
    micro.token_advantages, micro.returns = torch.ones(2), torch.ones(2)
    outcome.mini_batches.append(MiniBatch(torch.tensor([0]), [micro]))
    hook = PIPO()
    hook.after_update(outcome, learned=True)
    (held,) = hook.previous.mini_batches[0].micro_batches
    assert set(held.signals) == set(ours)
    assert held.token_advantages.tolist() == [1.0, 1.0] and held.returns is None
    assert set(micro.signals) == set(names), "this step's update still has them"


def pipo_config(folder: Path) -> RunConfig:
    """With advantages of single tokens, reference log-probs, entropies and supports to be kept too."""
    config = configuration(tiny_llama(folder, vocab=VOCAB, layers=2))
    config.rollout.top_k = 5
    config.algorithm.kl.coefficient = 0.01
    config.algorithm.plugins = [PluginConfig("pipo", {"window": 3}), PluginConfig("d3s", {"relax_steps": 4})]
    return config


@pytest.mark.full
def test_a_resumed_run_trains_on_the_batch_of_before(ranks: RankPool, tmp_path: Path) -> None:
    """To the bit in the same layout; as near as any in another one. Without the batch it would differ."""
    config = pipo_config(tmp_path / "model")
    layout = LayoutConfig(tp=2, max_tokens_per_microbatch=100)
    undisturbed = ranks.run(train, 4, config, layout)
    steps_of = [update["pipo/phi"] for update in undisturbed[0]["updates"]]
    assert any(steps_of[-4:]), "the last step trains on the one before it"
    kept, last = tmp_path / "kept", range(STEPS - 1, STEPS)
    ranks.run(train_part, 4, config, layout, range(STEPS - 1), kept)
    shutil.copytree(kept, tmp_path / "other")
    same = ranks.run(train_part, 4, config, layout, last, kept)
    for mine, theirs in zip(undisturbed, same, strict=True):
        assert all(torch.equal(mine["weights"][key], theirs["weights"][key]) for key in mine["weights"])
    other = ranks.run(
        train_part, 4, config, LayoutConfig(pp=2, max_tokens_per_microbatch=100), last, tmp_path / "other"
    )
    for key, weight in undisturbed[0]["weights"].items():
        assert float((other[0]["weights"][key] - weight).abs().max() / weight.abs().max()) < 1e-5, key


# --- HPT -------------------------------------------------------------------------------------------------------------


def hpt(**options: Any) -> HPT:
    return with_options(HPT, PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 16), **options)


def bound(hook: HPT, table: RolloutTable, extra: dict[str, Any] | None = None, truth: str = "3") -> HPT:
    """Prompts of three tokens; those with odd numbers have no demonstration."""
    extra = {"solution": "1+2=3"} if extra is None else extra
    prompts = {
        name: Prompt(name, (), torch.arange(3), "arithmetic", truth, {} if number % 2 else extra)
        for number, name in enumerate(table.prompt_ids)
    }
    hook.bind(replace(made_up_context(RunConfig()), prompts=prompts))
    return hook


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_hpt_is_the_formula(case: str, gate: int) -> None:
    """Loss of a mini-batch of random log-probs: a mean over prompts, of one kind or the other."""
    table, reward = table_of(CASES[case])
    hook = bound(hpt(gate=gate, sft_weight=0.7), table)
    rows = table.graded.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(int(length), generator=generator).double() for length in table.response_length]
    advantage, weight = hook.advantage(table, reward), hook.token_weight(table, rows)
    ours = sum(float(weight[row] * advantage[row]) * float(values[row].sum()) for row in rows.tolist())
    shown = hook.demonstrate(table)
    prompts = table.group[rows].unique().numel()
    shown = {group: each for group, each in shown.items() if group in table.group[rows]}
    ours += sum(each.weight / prompts * float(values[0][0]) for each in shown.values())

    groups = {number: [row for row in rows.tolist() if table.group[row] == number] for number in range(6)}
    groups = {number: members for number, members in groups.items() if members}
    correct = {number: sum(bool(table.correct[row]) for row in members) for number, members in groups.items()}
    routed = [number for number in groups if correct[number] <= gate and number % 2 == 0]
    others = [number for number in groups if number not in routed]
    theirs, tokens = 0.0, sum(len(values[row]) for number in others for row in groups[number])
    for number in others:
        own = [float(reward[row]) for row in groups[number]]
        for row in groups[number]:
            a = float(reward[row]) - sum(own) / len(own)
            theirs += len(others) / len(groups) * a * float(values[row].sum()) / tokens
    theirs += len(routed) * 0.7 * float(values[0][0]) / max(len(groups), 1)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert list(shown) == [each.group for each in shown.values()] == routed
    assert all(not weight[row] for number in routed for row in groups[number])


@pytest.mark.parametrize("scope", list(D3sScope))
@pytest.mark.parametrize("case", ["random", "one right", "everything"])
def test_a_selection_of_rollouts_leaves_the_demonstrations(case: str, scope: D3sScope) -> None:
    """D3S drops advantages of 0 first: those of the groups that HPT is for. Shares are of the groups that teach."""
    table, reward = table_of([[False, False], *CASES[case], [True, False, True, False], [False, False, False]])
    hook = bound(hpt(gate=0), table)
    graded = table.group[table.graded].unique().tolist()
    every = [group for group in hook.demonstrate(table) if group in graded]
    assert every and every[0] == 0
    selection = with_options(D3S, rollouts=0.4, scope=scope, relax_steps=10)
    algorithm = Algorithm([hook, selection])
    advantage = algorithm.advantage(table, reward)
    keep = algorithm.select(table, advantage, hook.demonstrate(table))
    assert not keep[~table.graded].any() and int(keep.sum()) < int(table.graded.sum())
    rows = keep.nonzero().squeeze(1)
    weight = algorithm.token_weight(table, rows)
    shown = [group for group in hook.demonstrate(table) if group in table.group[rows]]
    assert shown == every
    learning = {int(table.group[row]) for row in range(table.size) if weight[row]}
    groups = len(learning) + len(shown)
    assert float((weight * table.response_length).sum()) == pytest.approx(len(learning) / groups)
    chosen = selection.select(table, advantage)
    assert all(bool(chosen[row]) for row in range(table.size) if weight[row]), "what else was dropped does not train"


def test_demonstrations_of_rows() -> None:
    table, _ = table_of(CASES["all wrong"])

    def text_of(hook: HPT) -> list[int]:
        (shown,) = hook.demonstrate(table).values()
        return shown.response.tolist()

    assert text_of(bound(hpt(), table)) == [*b"1+2=3", 1]
    worked = r"So \boxed{3}"
    assert text_of(bound(hpt(demonstration="answer"), table, {"answer": "3!"})) == [*b"3!", 1]
    hook = bound(hpt(), table, {}, worked)
    assert [bytes(each.response[:-1].tolist()).decode() for each in hook.demonstrate(table).values()] == [worked] * 2
    hook.context.config.rollout.max_new_tokens = 4
    assert [each.response.tolist() for each in hook.demonstrate(table).values()] == [[*b"So \\"]] * 2
    for options, extra, words in (
        ({}, {}, r"none of the 2 training prompts has one: no extra_info.solution, nor a ground truth"),
        ({"demonstration": "answer"}, None, "no extra_info.answer"),
    ):
        with pytest.raises(ConfigError, match=words):
            bound(hpt(**options), table, extra)


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(tp=2)], ids=["DP4", "TP2 x DP2"])
def test_demonstrations_are_learned_the_same_on_any_number_of_ranks(
    layout: LayoutConfig, ranks: RankPool, tmp_path: Path
) -> None:
    """One demonstration for four ranks to share in some mini-batches, several in others."""
    config = configuration(tiny_llama(tmp_path, vocab=VOCAB, layers=2))
    config.algorithm.name, config.algorithm.options = "hpt", {"gate": 1}
    (alone,) = ranks.run(train, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    assert any(update.get("policy/demonstration_loss", 0) > 0 for update in alone["updates"])
    layout.max_tokens_per_microbatch = 60
    for rank in ranks.run(train, 4, config, layout):
        for key, theirs in alone["weights"].items():
            assert float((rank["weights"][key] - theirs).abs().max() / theirs.abs().max()) < 1e-5, key
        for mine, theirs in zip(rank["updates"], alone["updates"], strict=True):
            assert mine.keys() == theirs.keys()
            assert mine["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-5)
            key = "policy/demonstration_loss"
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), abs=1e-5)
