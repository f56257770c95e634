"""The plan of which rank trains which rollouts, packed rows, and that packing does not change what is computed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from policy_steps import configuration, scored_groups
from ranks import RankPool
from tiny_models import LLAMA3, tiny_llama, tiny_qwen2
from torch import Tensor
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.config.schema import DType, LayoutConfig, RunConfig
from clipo_megatron.flow import RolloutTable, Sample, Segment
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.batch.packing import pack, plan_micro_batches

VOCAB = 263


def rollouts(generator: random.Random, groups: int, samples: int, longest: int) -> tuple[list[int], ...]:
    """Random group, prompt length and response length of each rollout; lengths are skewed, as real ones are."""
    group = [number for number in range(groups) for _ in range(samples)]
    prompts = [generator.randint(1, max(1, longest // 4)) for _ in range(groups)]
    response = [min(longest, 1 + int(generator.lognormvariate(0, 0.8) * longest / 4)) for _ in group]
    return group, [prompts[number] for number in group], response


def cost(rows: Sequence[int], group: list[int], prompt: list[int], response: list[int], share: bool) -> int:
    """The packed tokens of these rollouts, counted independently of the code under test."""
    prompts = sum({group[row]: prompt[row] for row in rows}.values()) if share else sum(prompt[row] for row in rows)
    return prompts + sum(response[row] for row in rows)


def plan_of(group: list[int], prompt: list[int], response: list[int], **options: int | bool) -> list[list[list[int]]]:
    return plan_micro_batches(tuple(group), tuple(prompt), tuple(response), **options)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_a_plan_keeps_its_promises(seed: int, share: bool) -> None:
    generator = random.Random(seed)
    ranks = generator.choice([1, 2, 3, 5, 8])
    samples = generator.randint(1, 9)
    groups = generator.randint(-(-ranks // samples), 4 * ranks)
    limit = generator.choice([20, 100, 400])
    group, prompt, response = rollouts(generator, groups, samples, longest=generator.choice([5, 60, 200]))
    plan = plan_of(group, prompt, response, ranks=ranks, max_tokens=limit, share_prompts=share)
    assert sorted(row for rank in plan for micro in rank for row in micro) == list(range(len(group)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    for rank in plan:
        assert any(rank), "a rank has nothing to do"
        for micro in rank:
            assert micro == sorted(micro)
            assert cost(micro, group, prompt, response, share) <= limit or len(micro) == 1
    plan_micro_batches.cache_clear()
    assert plan == plan_of(group, prompt, response, ranks=ranks, max_tokens=limit, share_prompts=share)


def test_ranks_without_rollouts_have_as_many_micro_batches() -> None:
    assert plan_of([0, 0], [3, 3], [5, 4], ranks=4, max_tokens=10, share_prompts=True) == [[[0]], [[1]], [[]], [[]]]
    assert plan_of([], [], [], ranks=2, max_tokens=10, share_prompts=True) == [[[]], [[]]]


@pytest.mark.parametrize("dead", [0.3, 0.5])
@pytest.mark.parametrize(("prompts", "ranks"), [(128, 4), (128, 8), (128, 32), (512, 64)])
def test_no_micro_batch_too_many_and_ranks_alike_after_groups_have_dropped_out(
    prompts: int, ranks: int, dead: float
) -> None:
    """Groups that are all right or all wrong train nothing. Ranks are compared by the response tokens that train."""
    generator, spread, limit = torch.Generator().manual_seed(0), 0.7, 8192
    lengths = torch.randint(60, 400, (prompts,), generator=generator).tolist()
    drawn = torch.exp(torch.randn(prompts * 16, generator=generator) * spread + math.log(1200) - spread**2 / 2)
    trains = (torch.rand(prompts, generator=generator) >= dead).tolist()
    rows = [row for row in range(prompts * 16) if trains[row // 16]]
    group, prompt = [row // 16 for row in rows], [lengths[row // 16] for row in rows]
    response = [int(drawn[row].clamp(8, 4096)) for row in rows]
    plan = plan_of(group, prompt, response, ranks=ranks, max_tokens=limit, share_prompts=True)
    packed = [sum(cost(micro, group, prompt, response, True) for micro in rank) for rank in plan]
    assert len(plan[0]) == -(-sum(packed) // (ranks * limit)), "more micro-batches than the tokens fill"
    assert sum(packed) < 1.04 * cost(range(len(group)), group, prompt, response, True), "prompts computed again"
    trained = [sum(response[row] for micro in rank for row in micro) for rank in plan]
    assert max(trained) <= 1.02 * sum(trained) / ranks


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("ranks", [8, 64])
def test_ranks_are_balanced_within_two_percent(ranks: int, share: bool) -> None:
    group, prompt, response = rollouts(random.Random(ranks), groups=512, samples=16, longest=2048)
    plan = plan_of(group, prompt, response, ranks=ranks, max_tokens=16384, share_prompts=share)
    tokens = [sum(cost(micro, group, prompt, response, share) for micro in rank) for rank in plan]
    assert max(tokens) <= 1.02 * sum(tokens) / ranks
    assert len(plan[0]) == -(-sum(tokens) // (ranks * 16384))
    if share:
        assert sum(tokens) < 0.8 * cost(range(len(group)), group, prompt, response, share=False)


def test_a_group_is_cut_where_it_does_not_fit_and_no_further() -> None:
    group, prompt, response = [0] * 3, [2] * 3, [6, 6, 6]
    assert plan_of(group, prompt, response, ranks=1, max_tokens=11, share_prompts=True) == [[[0], [1], [2]]]
    assert plan_of(group, prompt, response, ranks=1, max_tokens=20, share_prompts=True) == [[[0, 1, 2]]]


def test_too_few_rollouts_for_the_ranks_are_refused() -> None:
    columns = {name: torch.zeros(1) for name in ("correct", "graded", "reward", "truncated", "version")}
    ones = torch.ones(1, dtype=torch.int64)
    table = RolloutTable(["one"], ones - 1, prompt_length=ones, response_length=ones, **columns)
    batcher = Batcher(SimpleNamespace(dp=2), mini_batches=1, max_tokens=100, share_prompts=True)
    with pytest.raises(ValueError, match=r"1 rollouts cannot keep 2 data-parallel ranks busy; raise data\."):
        batcher.repack_mini_batches({}, table)


# --- planned again ---------------------------------------------------------------------------------------------------


def trained_parts(folder: Path, layout_config: LayoutConfig) -> tuple[int, dict[int, tuple[Tensor, ...]], list[int]]:
    """Score, and leave out the rollouts without advantage.

    Returns:
        The data-parallel rank; what it then trains, by row: prompt, response, supports, the old log-probs and an
        entropy of the tokens where this stage has them; and the rows of each of its micro-batches.
    """
    config = configuration(folder)
    config.algorithm.mini_batches, config.layout = 1, layout_config
    layout = parallel.initialize(layout_config, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs | {Signal.entropy}, total_steps=10)
    mine = scored_groups(0, vocab=VOCAB, groups=9, top_k=6)[layout.rank :: layout.world]
    table, held = build_table(mine, step=0, observe=algorithm.observe)
    (batch,) = actor.batcher.mini_batches_of(held, table)
    actor.score(batch.micro_batches, table, algorithm)
    experience = algorithm.assign_advantages(table, [batch])
    weighed = actor.batcher.with_advantages(batch, experience, algorithm)
    assert 0 < int((experience.advantage != 0).sum()) < table.size
    found = {}
    for micro in weighed.micro_batches:
        assert torch.equal(micro.advantages, experience.advantage[micro.rows[micro.rollout]])
        columns = [micro.old_logprobs, micro.signals["entropy"]] if layout.is_last_stage else []
        for place, sample in enumerate(micro.samples):
            own = [column[micro.rollout == place] for column in columns]
            assert torch.equal(micro.support[micro.rollout == place], sample.support)
            found[sample.row] = (sample.prompt, sample.response, sample.logprobs, sample.support, *own)
    return layout.dp_rank, found, [micro.rows.tolist() for micro in weighed.micro_batches]


def test_rollouts_move_with_their_columns_to_the_ranks_that_train_them(ranks: RankPool, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab=VOCAB)
    [(_, alone, _)] = ranks.run(trained_parts, 1, folder, LayoutConfig(max_tokens_per_microbatch=60))
    results = ranks.run(trained_parts, 4, folder, LayoutConfig(pp=2, dp=2, max_tokens_per_microbatch=60))
    counts = {len(micro_batches) for _, _, micro_batches in results}
    assert len(counts) == 1, "pipelines would wait for each other"
    for dp_rank in (0, 1):
        first, last = (rows for rank, rows, _ in results if rank == dp_rank)
        assert first.keys() == last.keys()
    trained = [set(rows) for _, rows, _ in results[:2]]  # the ranks of the first stage
    assert trained[0] | trained[1] == alone.keys() and not trained[0] & trained[1]
    tokens = [sum(found[1].numel() for found in rows.values()) for _, rows, _ in results]
    assert max(tokens) < 1.3 * min(tokens), "rollouts of a dozen tokens divide no better"
    for _, rows, _ in results:
        for row, values in rows.items():
            for mine, theirs in zip(values[:4], alone[row], strict=False):
                assert torch.equal(mine, theirs)
            for mine, theirs in zip(values[4:], alone[row][4:], strict=False):
                assert torch.allclose(mine, theirs, atol=1e-5)


# --- packed rows -------------------------------------------------------------------------------------------------


def sample(row: int, group: int, prompt: Sequence[int], response: Sequence[int]) -> Sample:
    logprobs = -torch.arange(1, len(response) + 1) / 8 - row
    return Sample(row, group, torch.tensor(prompt), torch.tensor(response), logprobs)


def test_the_worked_example_shared() -> None:
    micro = pack([sample(3, 7, [5, 6, 7], [8, 9]), sample(4, 7, [5, 6, 7], [10])], share_prompts=True)
    assert micro.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert micro.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert micro.segments == (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 1, 0, 3))
    assert micro.predict.tolist() == [2, 3, 2]
    assert micro.states.tolist() == [3, 4, 5]
    assert micro.targets.tolist() == [8, 9, 10]
    assert micro.rollout.tolist() == [0, 0, 1]
    assert micro.rows.tolist() == [3, 4]
    assert micro.rollout_logprobs.tolist() == [-3.125, -3.25, -4.125]
    assert micro.padding == 0


def test_the_worked_example_apart() -> None:
    micro = pack([sample(3, 7, [5, 6, 7], [8, 9]), sample(4, 7, [5, 6, 7], [10])])
    assert micro.tokens.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 10]
    assert micro.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert micro.segments == (Segment(0, 5), Segment(5, 4))
    assert micro.predict.tolist() == [2, 3, 7]
    assert micro.states.tolist() == [3, 4, 8]
    assert micro.targets.tolist() == [8, 9, 10]


def test_a_prompt_is_shared_within_its_group_only() -> None:
    same = [5, 6, 7]
    micro = pack([sample(0, 0, same, [8]), sample(1, 1, same, [9])], share_prompts=True)
    assert micro.tokens.tolist() == [*same, *same, 8, 9]


@pytest.mark.parametrize(("multiple", "padding"), [(1, 0), (2, 1), (4, 3), (8, 3), (9, 4), (5, 0)])
@pytest.mark.parametrize("share", [False, True])
def test_padding_is_a_segment_of_its_own_that_nothing_reads(multiple: int, padding: int, share: bool) -> None:
    micro = pack([sample(0, 0, [5, 6], [8, 9, 10])], multiple=multiple, share_prompts=share)
    assert micro.tokens.numel() % multiple == 0
    assert micro.padding == padding
    assert sum(segment.length for segment in micro.segments) == micro.tokens.numel() == micro.positions.numel()
    if padding:
        assert micro.segments[-1] == Segment(5, padding)
    assert int(torch.cat([micro.predict, micro.states]).max()) < 5


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_pack_is_padding_alone(multiple: int) -> None:
    micro = pack([], multiple=multiple)
    assert micro.tokens.numel() == micro.padding == multiple
    assert micro.segments == (Segment(0, multiple),)
    for each in (micro.rows, micro.predict, micro.states, micro.targets, micro.rollout):
        assert each.shape == (0,) and each.dtype == torch.int64
    assert micro.rollout_logprobs.shape == (0,)


# --- packed rows through the model -------------------------------------------------------------------------------


def scores(folder: Path, micro_batches: list[list[Sample]], share: bool, dtype: DType) -> list[dict[str, Tensor]]:
    """On a rank: log-probs and mean response states of packed micro-batches."""
    from clipo_megatron.policy.actor import PolicyActor

    config = RunConfig()
    config.model.path, config.model.dtype = str(folder), dtype
    layout = parallel.initialize(LayoutConfig(), seed=0)
    actor = PolicyActor(config, layout, needs=frozenset({Signal.pooled_states}), total_steps=1)
    packed = [pack(samples, share_prompts=share) for samples in micro_batches]
    return actor._forward(packed, want_pooled=True, want_entropy=False)


def by_rollout(samples: Sequence[Sample], values: Tensor) -> Iterator[tuple[Sample, Tensor]]:
    yield from zip(samples, values.split([each.response.numel() for each in samples]), strict=True)


def random_samples(seed: int) -> list[Sample]:
    """Three groups of four, among them a prompt of one token and responses of one token."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for group, prompt_length in enumerate((1, 9, 17)):
        prompt = torch.randint(0, VOCAB, (prompt_length,), generator=generator)
        for length in (1, 5, 14, 1 + group):
            response = torch.randint(0, VOCAB, (length,), generator=generator)
            result.append(Sample(len(result), group, prompt, response, torch.zeros(length)))
    return result


def llama3_rope(folder: Path, **options: object) -> Path:
    tiny_llama(folder, **options)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = LLAMA3
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2, llama3_rope])
def test_packed_log_probs_are_those_of_each_sequence_alone(
    family: object, share: bool, ranks: RankPool, tmp_path: Path
) -> None:
    """To 1e-5 of the largest logit, about 7: at that size transformers in fp32 is 2e-5 away from itself in fp64."""
    folder = family(tmp_path, vocab=VOCAB, tied=False)  # type: ignore[operator]
    samples = random_samples(seed=1)
    parts = [samples[:5], samples[5:]]
    outputs = ranks.run(scores, 1, folder, parts, share, DType.fp32)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for part, output in zip(parts, outputs, strict=True):
        for (one, logprobs), pooled in zip(by_rollout(part, output["logprobs"]), output["pooled"], strict=True):
            with torch.no_grad():
                alone = model(torch.cat([one.prompt, one.response])[None], output_hidden_states=True)
            logits, states = alone.logits[0].double(), alone.hidden_states[-1][0]
            first = one.prompt.numel()
            expected = logits.log_softmax(-1)[first - 1 : -1].gather(1, one.response[:, None]).squeeze(1)
            assert float((logprobs - expected).abs().max()) <= 1e-5 * float(logits.abs().max())
            assert float((pooled - states[first:].mean(0)).abs().max()) <= 1e-5 * float(states.abs().max())


@pytest.mark.parametrize("share", [False, True])
def test_nothing_leaks_between_sequences(share: bool, ranks: RankPool, tmp_path: Path) -> None:
    """Changing the tokens of one sequence does not change a bit of the others' log-probs."""
    folder = tiny_llama(tmp_path, vocab=VOCAB)
    samples = random_samples(seed=2)
    changed = 6
    one = samples[changed]
    others = list(samples)
    others[changed] = Sample(changed, one.group, one.prompt, (one.response + 1) % VOCAB, one.logprobs)
    before, after = ranks.run(scores, 1, folder, [samples, others], share, DType.fp32)[0]
    for number, ((_, was), (_, is_now)) in enumerate(
        zip(by_rollout(samples, before["logprobs"]), by_rollout(others, after["logprobs"]), strict=True)
    ):
        assert torch.equal(was, is_now) == (number != changed)
    same = (before["pooled"] == after["pooled"]).all(-1)
    assert same.tolist() == [number != changed for number in range(len(samples))]


@pytest.mark.parametrize("share", [False, True])
def test_bf16_is_near_fp32(share: bool, ranks: RankPool, tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path, vocab=VOCAB)
    samples = random_samples(seed=3)
    exact, rounded = (ranks.run(scores, 1, folder, [samples], share, dtype)[0][0] for dtype in (DType.fp32, DType.bf16))
    assert rounded["logprobs"].dtype == rounded["pooled"].dtype == torch.float32
    distance = (exact["logprobs"] - rounded["logprobs"]).abs()
    # bf16 has 8 bits: about 1% of a logit of 10, and not the same numbers by accident.
    assert 1e-4 < float(distance.mean()) < 0.1


def test_a_micro_batch_without_rollouts_passes_through(ranks: RankPool, tmp_path: Path) -> None:
    output = ranks.run(scores, 1, tiny_llama(tmp_path), [[]], True, DType.fp32)[0][0]
    assert output["logprobs"].shape == (0,) and output["pooled"].shape == (0, 64)
