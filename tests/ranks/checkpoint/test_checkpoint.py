"""Checkpoints are restored bit for bit, on other layouts too; old ones are removed, and foreign ones refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import Counter, build, equal, failure, saved, saved_quietly

from clipo_megatron.checkpoint import CheckpointError, CheckpointItem

# Cases run on ranks; each returns what the test looks at.


def round_trip(folder, asynchronous):
    before = saved(folder, [3, 5], asynchronous=asynchronous)
    held = before.has(5), before.has(3)
    checkpoints, head, sampler = build(folder)
    latest = checkpoints.latest()
    step = checkpoints.load(latest)
    expected = Counter()
    expected.fill(5)
    same = equal(head.state, expected.state)
    expected.fill(5 + torch.distributed.get_rank())
    return step, latest.name, same, equal(sampler.state, expected.state), checkpoints.has(5), checkpoints.has(4), held


def prune(folder, steps, options, accuracy):
    checkpoints = saved(folder, steps, accuracy=lambda: accuracy, **options)
    return [path.name for path in checkpoints.complete()]


def restore(folder, facts=None):
    checkpoints, _, _ = build(folder, facts=facts)
    return checkpoints.load(checkpoints.latest())


def refused_facts(folder, facts):
    return failure(restore, folder, facts)


def an_item_more(folder):
    """Load and save with one more item than an older checkpoint has; it gathers what all ranks have."""
    checkpoints = saved(folder, [1])
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loaded = []

    def gathered():
        shared = [None] * world
        torch.distributed.all_gather_object(shared, rank)
        return {"ranks": shared if rank == 0 else []}

    for optional in (True, False):
        late = SimpleNamespace(state_dict=gathered, load_state_dict=loaded.append)
        item = CheckpointItem("late", late, writes=rank == 0, gathers=True, optional=optional)
        checkpoints.contents.items = [*checkpoints.contents.items[:2], item]
        if optional:
            assert checkpoints.load(checkpoints.latest()) == 1 and not loaded
        else:
            with pytest.raises(CheckpointError, match="has no state of late"):
                checkpoints.load(checkpoints.latest())
    checkpoints.save(2)
    checkpoints.load(checkpoints.latest())
    return loaded


def save_something_odd(folder):
    checkpoints, head, _ = build(folder)
    head.state = {"inner": {"set": {1, 2}}}
    return failure(checkpoints.save, 1), [path.name for path in checkpoints.complete()]


@pytest.mark.parametrize(("world", "asynchronous"), [(1, False), (2, False), (1, True), (2, True)])
def test_the_state_is_restored_bit_for_bit_on_every_rank(ranks, tmp_path, world, asynchronous):
    results = ranks.run(round_trip, world, tmp_path, asynchronous)
    assert results == [(5, "step_000005", True, True, True, False, (True, False))] * world
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert not [name for name in files if "partial" in name]
    manifest = json.loads((tmp_path / "checkpoints" / "step_000005" / "manifest.json").read_text())
    assert manifest["world"] == world
    listed = {f"checkpoints/step_000005/{name}" for name in [*manifest["files"], "manifest.json"]}
    assert listed == {name for name in files if "step_000005" in name}


def test_an_item_that_gathers_may_be_missing(ranks, tmp_path):
    assert ranks.run(an_item_more, 2, tmp_path) == [[{"ranks": [0, 1]}]] * 2


@pytest.mark.parametrize(
    ("options", "steps", "left"),
    [
        ({"keep": 1}, [1, 2, 3], [3]),
        ({"keep": 2}, [9, 10, 11], [10, 11]),
        ({"keep": 2}, [999_999, 1_000_000, 1_000_001], [1_000_000, 1_000_001]),  # by number, not by name
        ({"keep": 0}, [1, 2, 3], [1, 2, 3]),
        ({"keep": 1, "keep_every": 4}, [2, 4, 6, 8, 10], [4, 8, 10]),
        ({"keep": 1, "keep_best": 1}, [1, 2, 3, 4], [3, 4]),  # 2 and 3 are equally good
        ({"keep": 1, "keep_best": 2}, [1, 2, 3, 4], [2, 3, 4]),
        ({"keep": 1, "keep_best": 9, "asynchronous": True}, [1, 2, 3, 4], [1, 2, 3, 4]),
        ({"keep": 2, "keep_every": 5, "keep_best": 1}, [1, 5, 10, 11, 12, 13], [1, 5, 10, 12, 13]),
    ],
)
def test_pruning(ranks, tmp_path, options, steps, left):
    names = [f"step_{step:06d}" for step in left]
    assert ranks.run(prune, 1, tmp_path, steps, options, {1: 0.2, 2: 0.5, 3: 0.5, 11: 0.1}) == [names]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model": {"hidden": 128, "layers": 4}}, ["model = hidden 64, and", "has hidden 128: "]),
        ({"model": {"hidden": 128, "heads": 4}}, ["model = hidden 64, and", "has hidden 128: "]),
        ({"model": {"hidden": 64, "layers": 2}}, ["model = layers 4, and", "has layers 2: "]),
        ({"contrastive head": {"dim": 8}}, ["contrastive head = nothing", "dim 8"]),
    ],
)
def test_the_message_says_why_a_foreign_checkpoint_is_refused(ranks, tmp_path, facts, words):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    ((kind, message),) = ranks.run(refused_facts, 1, tmp_path, facts)
    assert kind == "CheckpointError"
    assert all(word in message for word in [*words, "step_000003", "checkpoint.resume=false", "train.output"])


def restore_and_hear(folder, facts):
    said = []
    checkpoints, _, _ = build(folder, facts=facts, said=said)
    return checkpoints.load(checkpoints.latest()), said


def test_facts_that_an_older_checkpoint_lacks_are_reported(ranks, tmp_path):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    facts = {"model": {"hidden": 64, "layers": 4, "rope theta": 1e4, "heads": 4}}
    ((step, (line,)),) = ranks.run(restore_and_hear, 1, tmp_path, facts)
    assert step == 3
    assert "step_000003 is from a version that did not record heads, rope theta of its model" in line


def test_another_layout_and_number_of_ranks(ranks, tmp_path):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    facts = {"model": {"hidden": 64, "layers": 4}, "layout": {"pp": 2}}
    assert ranks.run(restore, 2, tmp_path, facts) == [3, 3]
    shutil.rmtree(tmp_path / "checkpoints")
    ranks.run(saved_quietly, 2, tmp_path, [3])
    assert ranks.run(restore, 1, tmp_path, facts) == [3]


def test_state_that_is_neither_tensor_nor_plain_is_refused(ranks, tmp_path):
    (((kind, message), complete),) = ranks.run(save_something_odd, 1, tmp_path)
    assert kind == "CheckpointError"
    assert ".inner.set is a set" in message
    assert complete == []
