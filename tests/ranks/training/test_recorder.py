"""The recorder: states are the same in every layout, nothing is recorded twice, and traces have every rank."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policy_steps import configuration, made_up_context, scored_groups
from tiny_models import tiny_llama

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.telemetry.console import Stopwatch
from clipo_megatron.telemetry.sinks import read_lines
from clipo_megatron.telemetry.states import States, chosen, file_of, read_states, steps_with_states, write_states
from clipo_megatron.training.recorder import Recorder

STEPS, SAMPLES = 4, 4
ALONE = LayoutConfig(max_tokens_per_microbatch=100)


def record(folder: str, output: str, layout_config: LayoutConfig, clipo: bool = True, start: int = 0) -> None:
    """Score the steps from `start` on without learning, and record them; collective."""
    config = configuration(folder)
    config.layout, config.clipo.enabled = layout_config, clipo
    config.train.steps, config.train.output = STEPS, output
    config.report.save_states, config.report.states_every, config.report.trace_every = 13, 2, 3
    Path(output).mkdir(exist_ok=True)
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config, made_up_context(config))
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=STEPS)
    recorder = Recorder(config, layout, actor)
    recorder.open(start)
    for step in range(start, STEPS):
        watch = Stopwatch()
        mine = [
            g
            for g in scored_groups(step, vocab=actor.spec.vocab_size)
            if g.group.position % layout.world == layout.rank
        ]
        with watch("exchange"):
            table, samples = build_table(mine, step=step, observe=algorithm.observe)
            batches = actor.batcher.mini_batches_of(samples, table)
        with watch("score"):
            actor.score([micro for batch in batches for micro in batch.micro_batches], table, algorithm)
            experience = algorithm.assign_advantages(table, batches)
        recorder.step(mine, table, experience.reward, experience.advantage, experience.bonus, watch)
    recorder.close()
    parallel.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("recorded") / "model", layers=2))


@pytest.fixture(scope="module")
def alone(model, ranks, tmp_path_factory):
    """What one rank records."""
    output = tmp_path_factory.mktemp("alone") / "run"
    ranks.run(record, 1, model, str(output), ALONE)
    return output


LAYOUTS = [(2, LayoutConfig(pp=2)), (2, LayoutConfig(dp=2)), (4, LayoutConfig(tp=2, pp=2, sequence_parallel=True))]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=["pp2", "dp2", "tp2pp2"])
def test_states_are_the_same_in_every_layout(world, layout, model, alone, ranks, tmp_path):
    output = tmp_path / "run"
    ranks.run(record, world, model, str(output), replace(layout, max_tokens_per_microbatch=100))
    assert steps_with_states(output / "states") == [0, 2, 3]
    for step in (0, 2, 3):
        mine, other = (read_states(file_of(folder / "states", step)) for folder in (output, alone))
        assert mine.prompt_ids == other.prompt_ids and len(mine.prompt_ids) == 3
        assert mine.pooled.shape == (12, 64) and mine.embeddings.shape == (12, 16)
        assert np.abs(other.pooled).max() > 0.1
        np.testing.assert_allclose(mine.pooled, other.pooled, atol=2e-5)
        # One step of the head's Adam lies between two steps here, which turns rounding into steps.
        np.testing.assert_allclose(mine.embeddings, other.embeddings, atol=1e-5 if step == 0 else 5e-3)
        for column in ("group", "correct", "graded"):
            assert np.array_equal(getattr(mine, column), getattr(other, column))


def test_states_are_those_of_the_step(alone):
    """Rows, verdicts and prompts against the rollouts that went in; a right rollout of a mixed prompt has a bonus."""
    for step in (0, 2, 3):
        states, groups = read_states(file_of(alone / "states", step)), scored_groups(step, vocab=8)[:3]
        assert states.step == step
        assert states.prompt_ids == [scored.group.prompt.id for scored in groups]
        verdicts = [verdict.correct for scored in groups for verdict in scored.verdicts]
        assert states.correct.tolist() == [verdict is True for verdict in verdicts]
        assert states.graded.tolist() == [verdict is not None for verdict in verdicts]
        assert states.group.tolist() == [group for group in range(3) for _ in range(SAMPLES)]
        assert not states.bonus[~states.correct].any()


def test_a_run_without_a_head_has_states_too(model, alone, ranks, tmp_path):
    output = tmp_path / "run"
    ranks.run(record, 1, model, str(output), ALONE, False)
    states = read_states(file_of(output / "states", 0))
    assert states.embeddings is None and states.bonus is None
    np.testing.assert_allclose(states.pooled, read_states(file_of(alone / "states", 0)).pooled, atol=1e-6)


def test_texts_and_traces(alone):
    """A step with states has texts of the groups that they are of, mixed ones first; others have one group."""
    lines = read_lines(alone / "rollouts.jsonl")
    assert [sum(line["step"] == step for line in lines) for step in range(STEPS)] == [3, 1, 3, 3]
    for line in lines:
        states = read_states(file_of(alone / "states", line["step"])) if line["step"] != 1 else None
        if states is not None:
            rows = states.group == states.prompt_ids.index(line["prompt_id"])
            assert [rollout["bonus"] for rollout in line["rollouts"]] == states.bonus[rows].tolist()
            assert [rollout["correct"] is True for rollout in line["rollouts"]] == states.correct[rows].tolist()
    first = [{rollout["correct"] for rollout in line["rollouts"]} - {None} for line in lines if line["step"] == 0]
    assert [len(verdicts) for verdicts in first] == [2, 1, 1]

    traces = read_lines(alone / "trace.jsonl")
    assert [trace["step"] for trace in traces] == [0, 3]
    for trace in traces:
        (rank,) = trace["ranks"]
        (a, start, middle), (b, later, end) = rank["spans"]
        assert (a, b) == ("exchange", "score") and start < middle <= later < end < start + 60
        assert rank["peak_memory"] > 50 * 2**20


def test_a_resumed_run_records_nothing_twice(model, alone, ranks, tmp_path):
    output = tmp_path / "run"
    ranks.run(record, 1, model, str(output), ALONE)
    kept = file_of(output / "states", 0).stat().st_mtime_ns
    ranks.run(record, 1, model, str(output), ALONE, True, 2)
    assert file_of(output / "states", 0).stat().st_mtime_ns == kept
    assert steps_with_states(output / "states") == [0, 2, 3]
    for name in ("rollouts.jsonl", "trace.jsonl"):
        steps = [line["step"] for line in read_lines(output / name)]
        assert steps == [line["step"] for line in read_lines(alone / name)]


def test_which_rows_are_kept():
    group = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert [len(chosen(group, most)) for most in (1, 3, 4, 5, 8, 9, 100)] == [3, 3, 3, 5, 5, 9, 9]


def test_files_of_states(tmp_path):
    states = States(7, ["a/0"], np.zeros(2, np.int64), np.ones(2, bool), np.ones(2, bool), np.eye(2, dtype=np.float32))
    write_states(tmp_path, states)
    read = read_states(file_of(tmp_path, 7))
    assert (read.step, read.prompt_ids, read.embeddings) == (7, ["a/0"], None)
    assert np.array_equal(read.pooled, states.pooled) and read.correct.dtype == bool
    file_of(tmp_path, 8).write_bytes(file_of(tmp_path, 7).read_bytes()[:-3])
    for broken in (8, 9):
        with pytest.raises(ValueError, match=f"step_00000{broken}.safetensors does not hold the states of a step"):
            read_states(file_of(tmp_path, broken))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000007.safetensors", "step_000008.safetensors"]


def test_a_full_disk_loses_the_states_and_not_the_run(tmp_path, capfd):
    from clipo_megatron.telemetry.states import StateWriter

    (tmp_path / "states").write_text("in the way")
    writer = StateWriter(tmp_path / "states")
    writer.write(States(0, [], *(np.zeros(0, bool),) * 3, np.zeros((0, 2), np.float32)))
    writer.close()
    assert "warning" in (said := capfd.readouterr().err) and "cannot be written" in said
