"""Ranks that stand still are named and end the attempt; phases that do not end print stacks."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from clipo_megatron.runtime.heartbeat import FROZEN, Heartbeat
from clipo_megatron.runtime.launch import RankError, supervise_again
from clipo_megatron.runtime.platform import platform

FROZEN_S = 4.0


def watched(folder: str, silent: int, phase_timeout_s: float, seconds: float) -> tuple[list[int], str, float]:
    """Ranks that watch each other; `silent` gives no sign any more after a moment.

    Returns:
        With what exit codes it would have left, what it wrote, and after how many seconds of silence.
    """
    rank, codes, ended = dist.get_rank(), [], threading.Event()
    said = sys.stderr
    start = time.monotonic()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with open(f"{folder}/{rank}", "w") as sys.stderr:
        try:
            store = platform().own_store("heartbeat")
            beat = Heartbeat(
                rank,
                dist.get_world_size(),
                store,
                heartbeat_timeout_s=FROZEN_S,
                phase_timeout_s=phase_timeout_s,
                end=end,
            )
            beat.start()
            beat.phase("generate")
            if rank == silent:
                time.sleep(0.6)
                beat.leave()
            else:
                start = time.monotonic() + 0.6
                ended.wait(seconds)
            spent = time.monotonic() - start
            dist.barrier()
            beat.leave()
        finally:
            sys.stderr = said
    return codes, Path(f"{folder}/{rank}").read_text(), spent


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_and_the_others_end(ranks, tmp_path, silent):
    results = ranks.run(watched, 3, str(tmp_path), silent, 600.0, 300.0)
    assert results[silent][0] == []  # it left by itself
    for rank, (codes, said, spent) in enumerate(results):
        if rank == silent:
            continue
        assert codes == [FROZEN], said
        named = (
            rf"clipo: rank {rank}: rank {silent} of 3 \(process \d+ on .*\) has given no sign of life for \d+ s; then"
        )
        assert re.search(named + r" it had been in phase 'generate' for \d+ s", said)
        assert "The attempt ends; the same command goes on from the newest checkpoint" in said
        assert spent > FROZEN_S - 0.5
        assert "in watched" in said  # its own stacks


def test_ranks_that_live_are_left_alone_and_a_stuck_phase_prints_all_stacks(ranks, tmp_path):
    for rank, (codes, said, _) in enumerate(ranks.run(watched, 2, str(tmp_path), -1, 0.8, 3.0)):
        assert codes == []
        assert re.search(
            rf"rank {rank} of 2 \(process .*\): a rank has been in phase 'generate' \(number 1\) for", said
        )
        assert "Current thread" in said and said.count("in watched") in (1, 2)  # at 0.8 and 1.6 s


def test_restarts_are_bounded_and_progress_counts_anew():
    said, attempts = [], []
    reached = iter([0, 1, 1, 2, 2, 2])

    def start(attempt: int) -> int:
        attempts.append(attempt)
        raise RankError(f"attempt {attempt} broke", 1)

    with pytest.raises(RankError, match="attempt 4 broke"):
        supervise_again(start, restarts=2, progress=lambda: next(reached), say=said.append)
    # got further, did not, got further, did not, did not: the third in a row is one too many
    assert attempts == [0, 1, 2, 3, 4]
    assert "attempt 0 broke" in said[0] and "restart 1, faults.max_restarts = 2" in said[0]
    with pytest.raises(RankError):
        supervise_again(start, restarts=0, progress=lambda: 0, say=said.append)
    assert supervise_again(lambda attempt: 130, restarts=2, progress=lambda: 0) == 130
