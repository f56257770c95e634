"""Checkpoints by themselves: complete or not there, damage noticed, old ones pruned, foreign ones refused in words."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from clipo_megatron.checkpoint import CheckpointError, Checkpoints, Owner

pytestmark = pytest.mark.timeout(200)


class Counter:
    """An owner: a tensor, and plain values of every kind."""

    def __init__(self):
        self.state = {}

    def fill(self, step):
        self.state = {
            "tensor": torch.full((3, 4), step / 3),
            "nested": {1: [step, 2.5, None, True, "x"], "t": [torch.arange(step), {"deep": torch.tensor(1.0 / 3)}]},
        }


def build(folder, *, keep=2, facts=None, said=None):
    """Checkpoints of two owners, one of them of every rank, and of a "policy" in one file a rank."""
    rank = torch.distributed.get_rank()
    head, sampler = Counter(), Counter()

    def save_policy(place):
        (place / f"weights.{rank}.bin").write_bytes(bytes([rank, len(head.state.get("nested", {}))]) * 4096)

    checkpoints = Checkpoints(
        Path(folder) / "checkpoints",
        [
            Owner("head", lambda: head.state, lambda state: setattr(head, "state", state), writes=rank == 0),
            Owner("sampler", lambda: sampler.state, lambda state: setattr(sampler, "state", state), per_rank=True),
        ],
        save_policy=save_policy,
        load_policy=lambda place: None,
        keep=keep,
        facts={"model": {"hidden": 64, "layers": 4}, "layout": {"pp": 1}} if facts is None else facts,
        say=(said if said is not None else []).append,
    )
    return checkpoints, head, sampler


def saved(folder, steps, **options):
    checkpoints, head, sampler = build(folder, **options)
    for step in steps:
        head.fill(step)
        sampler.fill(step + torch.distributed.get_rank())
        checkpoints.save(step)
    return checkpoints


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


# Cases run on ranks; each returns what the test looks at.


def round_trip(folder):
    saved(folder, [3, 5])
    checkpoints, head, sampler = build(folder)
    latest = checkpoints.latest()
    step = checkpoints.load(latest)
    expected = Counter()
    expected.fill(5)
    same = equal(head.state, expected.state)
    expected.fill(5 + torch.distributed.get_rank())
    return step, latest.name, same, equal(sampler.state, expected.state), checkpoints.has(5), checkpoints.has(4)


def prune(folder, keep, steps):
    checkpoints = saved(folder, steps, keep=keep)
    return [path.name for path in checkpoints.complete()]


def newest(folder, **options):
    said = []
    checkpoints, _, _ = build(folder, said=said, **options)
    found = checkpoints.latest()
    return (found.name if found else None), said


def restore(folder, facts=None):
    checkpoints, _, _ = build(folder, facts=facts)
    return checkpoints.load(checkpoints.latest())


def failure(case, *args, **options):
    try:
        case(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refused_facts(folder, facts):
    return failure(restore, folder, facts)


def refused_latest(folder):
    return failure(newest, folder)


def an_owner_more(folder):
    """A checkpoint from before there was a certain owner, which gathers what all ranks have."""
    checkpoints = saved(folder, [1])
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loaded = []

    def gathered():
        shared = [None] * world
        torch.distributed.all_gather_object(shared, rank)
        return {"ranks": shared if rank == 0 else []}

    for optional in (True, False):
        owner = Owner("late", gathered, loaded.append, writes=rank == 0, gathers=True, optional=optional)
        checkpoints.owners = [*checkpoints.owners[:2], owner]
        if optional:
            assert checkpoints.load(checkpoints.latest()) == 1 and not loaded
        else:
            with pytest.raises(CheckpointError, match="has no state of late"):
                checkpoints.load(checkpoints.latest())
    checkpoints.save(2)
    checkpoints.load(checkpoints.latest())
    return loaded


def save_onto_a_file(folder):
    (Path(folder) / "checkpoints").write_text("in the way")
    return failure(saved, folder, [1])


def save_something_odd(folder):
    checkpoints, head, _ = build(folder)
    head.state = {"inner": {"set": {1, 2}}}
    return failure(checkpoints.save, 1), [path.name for path in checkpoints.complete()]


@pytest.mark.parametrize("world", [1, 2])
def test_state_comes_back_to_the_bit_on_every_rank(ranks, tmp_path, world):
    results = ranks.run(round_trip, world, tmp_path)
    assert results == [(5, "step_000005", True, True, True, False)] * world
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert not [name for name in files if "partial" in name]
    manifest = json.loads((tmp_path / "checkpoints" / "step_000005" / "manifest.json").read_text())
    assert manifest["world"] == world
    listed = {f"checkpoints/step_000005/{name}" for name in [*manifest["files"], "manifest.json"]}
    assert listed == {name for name in files if "step_000005" in name}


def test_an_owner_that_gathers_and_may_be_missing(ranks, tmp_path):
    assert ranks.run(an_owner_more, 2, tmp_path) == [[{"ranks": [0, 1]}]] * 2


@pytest.mark.parametrize(
    ("keep", "steps", "left"),
    [
        (1, [1, 2, 3], ["step_000003"]),
        (2, [9, 10, 11], ["step_000010", "step_000011"]),
        (2, [999_999, 1_000_000, 1_000_001], ["step_1000000", "step_1000001"]),  # by number, not by name
        (0, [1, 2, 3], ["step_000001", "step_000002", "step_000003"]),
    ],
)
def test_pruning(ranks, tmp_path, keep, steps, left):
    assert ranks.run(prune, 1, tmp_path, keep, steps) == [left]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left


def test_what_a_killed_writer_left_is_ignored_and_removed(ranks, tmp_path):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    checkpoints = tmp_path / "checkpoints"
    # killed before the rename, even with a manifest; and killed while deleting an old one
    shutil.copytree(checkpoints / "step_000003", checkpoints / ".step_000006.partial")
    shutil.copytree(checkpoints / "step_000003", checkpoints / ".step_000002.removed")
    (checkpoints / "step_notes").mkdir()
    (checkpoints / "step_000007").write_text("a file")
    assert ranks.run(newest, 1, tmp_path) == [("step_000003", [])]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000003", "step_000007", "step_notes"]


def saved_quietly(folder, steps):
    saved(folder, steps)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (cut, "policy/weights.1.bin", "policy/weights.1.bin has 8191 bytes, 8192 were written"),
        (flip, "policy/weights.0.bin", "the bytes of policy/weights.0.bin are not those that were written"),
        (flip, "head.safetensors", "the bytes of head.safetensors are not those that were written"),
        (Path.unlink, "sampler.1.json", "sampler.1.json is missing"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
        (cut, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_damage_is_noticed_and_an_older_one_used(ranks, tmp_path, damage, file, reason):
    ranks.run(saved_quietly, 2, tmp_path, [3, 6])
    damage(tmp_path / "checkpoints" / "step_000006" / file)
    for name, said in ranks.run(newest, 2, tmp_path):
        assert name == "step_000003"
        (message,) = said
        assert message.startswith(f"warning: {tmp_path / 'checkpoints' / 'step_000006'} is damaged: {reason}")
        assert message.endswith("looking for an older checkpoint")
    # the run comes by this step again and replaces what is damaged
    ranks.run(saved_quietly, 2, tmp_path, [6])
    assert ranks.run(newest, 2, tmp_path) == [("step_000006", [])] * 2


def test_nothing_but_damage_is_no_reason_to_start_over(ranks, tmp_path):
    assert ranks.run(newest, 1, tmp_path) == [(None, [])]
    ranks.run(saved_quietly, 1, tmp_path, [3])
    cut(tmp_path / "checkpoints" / "step_000003" / "head.json")
    ((kind, message),) = ranks.run(refused_latest, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000003 is damaged: head.json has" in message
    assert "checkpoint.resume=false" in message


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model": {"hidden": 128, "layers": 4}}, ["model = hidden 64, layers 4", "hidden 128, layers 4"]),
        ({"contrastive head": {"dim": 8}}, ["contrastive head = nothing", "dim 8"]),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_words(ranks, tmp_path, facts, words):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    ((kind, message),) = ranks.run(refused_facts, 1, tmp_path, facts)
    assert kind == "CheckpointError"
    assert all(word in message for word in [*words, "step_000003", "checkpoint.resume=false", "train.output"])


def test_another_layout_and_number_of_ranks(ranks, tmp_path):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    facts = {"model": {"hidden": 64, "layers": 4}, "layout": {"pp": 2}}
    assert ranks.run(restore, 2, tmp_path, facts) == [3, 3]
    shutil.rmtree(tmp_path / "checkpoints")
    ranks.run(saved_quietly, 2, tmp_path, [3])
    assert ranks.run(restore, 1, tmp_path, facts) == [3]


def test_what_cannot_be_written_is_said(ranks, tmp_path):
    ((kind, message),) = ranks.run(save_onto_a_file, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000001 cannot be written" in message


def test_state_that_is_neither_tensor_nor_plain_is_refused(ranks, tmp_path):
    (((kind, message), complete),) = ranks.run(save_something_odd, 1, tmp_path)
    assert kind == "CheckpointError"
    assert ".inner.set is a set" in message
    assert complete == []


def checksum_speed(folder):
    checkpoints, head, _ = build(folder)
    head.state = {"big": torch.zeros(64 << 20, dtype=torch.uint8)}
    start = time.perf_counter()
    checkpoints.save(1)
    written = time.perf_counter() - start
    start = time.perf_counter()
    checkpoints.latest()
    return written, time.perf_counter() - start


def test_checksums_cost_little(ranks, tmp_path):
    ((_, verified),) = ranks.run(checksum_speed, 1, tmp_path)
    assert verified < 2.0  # 64 MB: some 30 ms on an idle core
