"""Ranks that share a conversion: one that dies or fails ends the others, with a sentence, in time."""

import os
import signal
import subprocess
import sys
import time

from paths import ROOT

from clipo_megatron.runtime.ports import free_port

RANK = """
import sys, time
from clipo_megatron.conversion.ranks import Ranks
with Ranks(silence_s=4) as ranks:
    assert list(ranks.share(range(5))) == list(range(ranks.rank, 5, 2))
    ranks.meet("start")
    print("met", flush=True)
    if "fail" in sys.argv and ranks.rank == 1:
        ranks.fail("its disk is full")
        time.sleep(3)
        sys.exit(3)
    time.sleep(0.5 if "finish" in sys.argv else 0)
    if "finish" not in sys.argv and ranks.rank == 1:
        time.sleep(5 if "late" in sys.argv else 60)
    ranks.meet("end")
    print("done", flush=True)
"""


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher: rank 0 holds the store."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env=os.environ | place | path | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def outputs(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """What each has printed by its end, which comes soon."""
    try:
        return [rank.communicate()[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_ranks_that_all_arrive_go_on():
    ranks = start("finish")
    assert [text.split() for text in outputs(ranks)] == [["met", "done"], ["met", "done"]]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_a_killed_rank_ends_the_other():
    ranks = start()
    assert [rank.stdout.readline() for rank in ranks] == ["met\n", "met\n"]
    time.sleep(1.5)
    ranks[1].send_signal(signal.SIGKILL)
    told = outputs(ranks)[0]
    assert "rank 1 of 2 has not been heard of for 4 s. The same command goes on from what is done" in told


def test_a_rank_ends_when_the_one_that_leads_is_gone():
    ranks = start("late")
    assert [rank.stdout.readline() for rank in ranks] == ["met\n", "met\n"]
    ranks[0].send_signal(signal.SIGKILL)
    told = outputs(ranks)[1]
    assert "the ranks' store is gone, and with it rank 0 or the launcher" in told
    assert ranks[1].returncode == 1


def test_a_rank_that_fails_tells_the_other():
    ranks = start("fail")
    told = outputs(ranks)[0]
    assert "rank 1: its disk is full. The same command goes on from what is done" in told
    assert ranks[0].returncode == 1
