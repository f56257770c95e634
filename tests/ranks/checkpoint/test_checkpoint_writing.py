"""A checkpoint is written while training goes on, completely or not at all, also where a disk or a rank fails."""

import errno
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Counter, Weights, build, equal, failure, newest, saved, saved_quietly
from full_disk import fill, small_disk

from clipo_megatron.config.model_folder import POLICY


def save_onto_a_file(folder):
    (Path(folder) / "checkpoints").write_text("in the way")
    return failure(saved, folder, [1])


def test_a_checkpoint_that_cannot_be_written_is_an_error(ranks, tmp_path):
    ((kind, message),) = ranks.run(save_onto_a_file, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000001 cannot be written" in message


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
