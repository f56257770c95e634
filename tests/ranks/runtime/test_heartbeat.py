"""Ranks without a heartbeat are named and end all ranks; phases that take too long print stacks."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from clipo_megatron.runtime.heartbeat import HEARTBEAT_LOST, Heartbeat
from clipo_megatron.runtime.launch import RankError, supervise_again
from clipo_megatron.runtime.platform import platform

TIMEOUT_S = 4.0


def watched(folder: str, silent: int, phase_timeout_s: float, seconds: float) -> tuple[list[int], str, float]:
    """Ranks that watch each other; the rank `silent` stops its heartbeat after a moment.

    Returns:
        The exit codes with which this rank would have ended, what it wrote, and after how many seconds of silence.
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
                heartbeat_timeout_s=TIMEOUT_S,
                phase_timeout_s=phase_timeout_s,
                remedy="Do it again",
                end=end,
            )
            beat.phase("generate")
            beat.start()
            if rank == silent:
                time.sleep(0.4 * TIMEOUT_S)  # after a sign that it has entered the phase
                beat.stop()
            else:
                start = time.monotonic() + 0.4 * TIMEOUT_S
                ended.wait(seconds)
            spent = time.monotonic() - start
            dist.barrier()
            beat.stop()
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
        assert codes == [HEARTBEAT_LOST], said
        named = rf"clipo: rank {rank}: rank {silent} of 3 \(process \d+ on .*\) has sent no heartbeat for \d+ s; it"
        assert re.search(named + r" had been in phase 'generate' for \d+ s", said)
        assert "(the limit is 4 s). All ranks end. Do it again" in said
        assert spent > TIMEOUT_S / 2  # from its last sign, which came before
        assert "in watched" in said  # its own stacks


def test_living_ranks_are_left_alone_and_a_stuck_phase_prints_all_stacks(ranks, tmp_path):
    limit_s = 0.8
    for rank, (codes, said, _) in enumerate(ranks.run(watched, 2, str(tmp_path), -1, limit_s, 2.5)):
        assert codes == []
        assert re.search(
            rf"rank {rank} of 2 \(process .*\): a rank has been in phase 'generate' \(number 1\) for", said
        )
        assert "Thread 0x" in said or "Current thread" in said
        reasons = re.findall(r"number 1\) for ([0-9.]+) s; its stacks", said)
        assert len(reasons) == said.count("in watched") == len(set(reasons))  # once each, though both ranks find them
        assert {float(each) for each in reasons} <= {limit_s, 2 * limit_s, 4 * limit_s}


def test_restarts_are_limited_and_progress_resets_the_limit():
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
