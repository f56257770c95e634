"""Checkpoints: written completely or not at all, damage is noticed, old ones are removed, foreign ones refused."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import fill, small_disk

from clipo_megatron.checkpoint import CheckpointContents, CheckpointError, CheckpointItem, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig


class Counter:
    """Has a state of a tensor and of plain values of every kind."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def fill(self, step):
        self.state = {
            "tensor": torch.full((3, 4), step / 3),
            "nested": {1: [step, 2.5, None, True, "x"], "t": [torch.arange(step), {"deep": torch.tensor(1.0 / 3)}]},
        }


class Model:
    """A "policy" that is never loaded; `take` returns its snapshot."""

    def __init__(self, take):
        self.take = take

    def load(self, folder):
        pass


class Weights:
    """The snapshot of a "policy": one file a rank, described by a file of rank 0."""

    def __init__(self, content, *, broken=None, gate=None):
        self.content, self.broken, self.gate = content, broken, gate

    def copy(self):
        pass

    def write(self, files):
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.broken is not None:
            raise self.broken
        files.write(f"weights.{torch.distributed.get_rank()}.bin", self.content)
        return len(self.content)

    def finish(self, files, written):
        files.write("metadata.json", json.dumps(written))
        files.write(".metadata", b"a pickle")


def build(folder, *, facts=None, said=None, accuracy=dict, **settings):
    """Checkpoints of two items, one of them of every rank, and of a "policy" in one file a rank."""
    rank = torch.distributed.get_rank()
    head, sampler = Counter(), Counter()
    contents = CheckpointContents(
        [CheckpointItem("head", head, writes=rank == 0), CheckpointItem("sampler", sampler, per_rank=True)],
        {POLICY: Model(lambda: Weights(bytes([rank, len(head.state.get("nested", {}))]) * 4096))},
        {"model": {"hidden": 64, "layers": 4}, "layout": {"pp": 1}} if facts is None else facts,
    )
    checkpoints = Checkpoints(
        Path(folder) / "checkpoints",
        contents,
        CheckpointConfig(**{"asynchronous": False, "max_failed_saves": 1, **settings}),
        say=(said if said is not None else []).append,
        accuracy=accuracy,
    )
    return checkpoints, head, sampler


def saved(folder, steps, **options):
    checkpoints, head, sampler = build(folder, **options)
    for step in steps:
        head.fill(step)
        sampler.fill(step + torch.distributed.get_rank())
        checkpoints.save(step)
    checkpoints.wait(last=True)
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


def save_onto_a_file(folder):
    (Path(folder) / "checkpoints").write_text("in the way")
    return failure(saved, folder, [1])


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


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(ranks, tmp_path):
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
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(ranks, tmp_path, damage, file, reason):
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


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(ranks, tmp_path):
    assert ranks.run(newest, 1, tmp_path) == [(None, [])]
    ranks.run(saved_quietly, 1, tmp_path, [3])
    cut(tmp_path / "checkpoints" / "step_000003" / "head.json")
    ((kind, message),) = ranks.run(refused_latest, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000003 is damaged: head.json has" in message
    assert "checkpoint.resume=false" in message


def load_flipped(folder):
    checkpoints = saved(folder, [3])
    flip(checkpoints.folder / "step_000003" / "policy" / ".metadata")
    checkpoints.contents.models[POLICY].load = lambda folder: pytest.fail("it was read")
    return failure(checkpoints.load, checkpoints.folder / "step_000003")


def test_a_changed_pickle_is_not_read(ranks, tmp_path):
    ((kind, message),) = ranks.run(load_flipped, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000003 is damaged: the bytes of policy/.metadata are not those that were written" in message


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


def test_a_checkpoint_that_cannot_be_written_is_an_error(ranks, tmp_path):
    ((kind, message),) = ranks.run(save_onto_a_file, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000001 cannot be written" in message


def test_state_that_is_neither_tensor_nor_plain_is_refused(ranks, tmp_path):
    (((kind, message), complete),) = ranks.run(save_something_odd, 1, tmp_path)
    assert kind == "CheckpointError"
    assert ".inner.set is a set" in message
    assert complete == []


# ---------------------------------------------------------------- asynchronous


def overlapping(folder):
    """The state changes while it is written, and another save comes before that is done."""
    rank, said = torch.distributed.get_rank(), []
    checkpoints, head, sampler = build(folder, said=said, asynchronous=True)
    gates = {step: threading.Event() for step in (1, 2)}
    head.fill(1)
    checkpoints.contents.models[POLICY].take = lambda: Weights(bytes([rank, 1]), gate=gates[1])
    sampler.fill(1)
    checkpoints.save(1)
    head.state["tensor"].fill_(77.0)
    head.state["nested"]["t"].append("later")
    checkpoints.poll()
    before = [path.name for path in checkpoints.complete()]
    # the other rank may go on earlier, but no rank sees the second before all have the first
    threading.Timer(0.3 * rank, gates[1].set).start()
    checkpoints.contents.models[POLICY].take = lambda: Weights(bytes([rank, 1]), gate=gates[2])
    checkpoints.save(2)
    between = [path.name for path in checkpoints.complete()]
    gates[2].set()
    while checkpoints._writer is not None:
        checkpoints.poll()
    again, restored, _ = build(folder)
    again.load(Path(folder) / "checkpoints" / "step_000001")
    expected = Counter()
    expected.fill(1)
    return before, between, [path.name for path in checkpoints.complete()], equal(restored.state, expected.state), said


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_holds_the_state_of_the_moment_of_saving(ranks, tmp_path, world):
    first, both = ["step_000001"], ["step_000001", "step_000002"]
    assert ranks.run(overlapping, world, tmp_path) == [([], first, both, True, [])] * world


def failing(folder, failures, asynchronous):
    """Saves that fail on the last rank, but for the first and the fourth."""
    rank, world, said, outcomes = torch.distributed.get_rank(), torch.distributed.get_world_size(), [], []
    checkpoints, head, sampler = build(folder, said=said, max_failed_saves=failures, asynchronous=asynchronous)
    for step in range(1, 8):
        head.fill(step), sampler.fill(step)
        broken = OSError(errno.ENOSPC, "No space left on device", "weights") if rank == world - 1 else None
        checkpoints.contents.models[POLICY].take = lambda broken=broken, step=step: Weights(
            b"x" * 100, broken=None if step in (1, 4) else broken
        )
        outcomes.append(failure(checkpoints.save, step))
        outcomes[-1] = outcomes[-1] or failure(checkpoints.wait)
        if outcomes[-1]:
            break
    torch.distributed.barrier()  # rank 0 removes what is half written
    names = sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())
    return outcomes, said, names, checkpoints.has(step)


@pytest.mark.parametrize(("world", "asynchronous"), [(1, True), (2, True), (2, False)])
def test_write_errors_reach_all_ranks_and_leave_older_checkpoints_alone(ranks, tmp_path, world, asynchronous):
    for outcomes, said, names, has in ranks.run(failing, world, tmp_path, 3, asynchronous):
        assert outcomes[:-1] == [None] * 6  # 1 good, 2 and 3 fail, 4 good, 5 and 6 fail, and 7 is one too many
        kind, message = outcomes[-1]
        assert kind == "CheckpointError" and not has
        who = "" if world == 1 else "rank 1: "
        place = tmp_path / "checkpoints"
        assert message.startswith(f"{place / 'step_000007'} cannot be written: {who}[Errno 28] No space left on device")
        assert f"The newest checkpoint is {place / 'step_000004'}." in message and "3 saves in a row" in message
        assert len(said) == 4 and all(line.startswith("warning: ") for line in said)
        assert "step_000002 cannot be written" in said[0] and "ends if 3 saves in a row fail" in said[0]
        assert f"The newest checkpoint is {place / 'step_000001'}." in said[1]
        assert names == ["step_000001", "step_000004"]  # and nothing half written takes up room


def hanging(folder):
    gate = threading.Event()
    checkpoints, _, _ = build(folder, asynchronous=True, deadline_s=0.5)
    checkpoints.contents.models[POLICY].take = lambda: Weights(b"x", gate=gate)
    checkpoints.save(1)
    start = time.monotonic()
    said = failure(checkpoints.wait)
    gate.set()
    return said, time.monotonic() - start


def test_a_file_system_that_hangs_is_not_waited_for(ranks, tmp_path):
    ((kind, message), spent) = ranks.run(hanging, 1, tmp_path)[0]
    assert kind == "CheckpointError" and spent < 60
    assert "was not written within" in message and "There is no checkpoint yet" in message


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=3) as place:
        yield place


def two_saves(folder, between, failures=1):
    """Save, let something happen to the disk, save again; then what is there, and what the next run finds."""
    said = []
    checkpoints, head, sampler = build(folder, said=said, asynchronous=True, max_failed_saves=failures)
    for step in (1, 2):
        head.fill(step), sampler.fill(step)
        checkpoints.save(step)
        outcome = failure(checkpoints.wait)
        if step == 1 and torch.distributed.get_rank() == 0:
            between(folder)
        torch.distributed.barrier()
    return outcome, newest(folder)[0], said


def make_read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@pytest.mark.parametrize(("happens", "reason"), [(fill, "No space left"), (make_read_only, "Read-only file system")])
def test_older_checkpoints_survive_a_disk_that_cannot_be_written(ranks, disk, happens, reason):
    for (kind, message), found, _ in ranks.run(two_saves, 2, disk, happens):
        assert kind == "CheckpointError" and reason in message and "step_000002 cannot be written" in message
        assert found == "step_000001"


def test_a_disk_that_recovers_is_written_to_again(ranks, disk):
    def names():
        return sorted(path.name for path in (disk / "checkpoints").iterdir())

    for outcome, found, said in ranks.run(two_saves, 2, disk, fill, 3):
        assert outcome is None and found == "step_000001"
        assert len(said) == 1 and "Training goes on" in said[0]
    assert names() == ["step_000001"]
    (disk / "others").unlink()
    ranks.run(saved_quietly, 2, disk, [3])
    assert names() == ["step_000001", "step_000003"]


def checksum_speed(folder):
    checkpoints, head, _ = build(folder)
    head.state = {"big": torch.zeros(64 << 20, dtype=torch.uint8)}
    start = time.process_time()
    checkpoints.save(1)
    written = time.process_time() - start
    start = time.process_time()
    checkpoints.latest()
    return written, time.process_time() - start


def test_checksums_cost_little(ranks, tmp_path):
    ((_, verified),) = ranks.run(checksum_speed, 1, tmp_path)
    assert verified < 2.0  # 64 MB: some 30 ms on an idle core
