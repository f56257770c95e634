"""The pool of ranks that other tests run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, RankPool, RankTimeout


def total(value: int) -> tuple[int, int, int]:
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return int(tensor), dist.get_world_size(), torch.get_num_threads()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("out of numbers")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def die() -> None:
    os._exit(7)


def process_id() -> int:
    return os.getpid()


def test_one_result_a_rank_and_the_same_processes_for_every_world(ranks: RankPool) -> None:
    assert ranks.run(total, 2, 10) == [(21, 2, 1)] * 2
    assert ranks.run(total, 4, 0) == [(6, 4, 1)] * 4
    assert ranks.run(process_id, 3) == ranks.run(process_id, 4)[:3]


def test_an_error_names_its_rank_and_the_pool_lives_on(ranks: RankPool) -> None:
    before = ranks.run(process_id, 4)
    with pytest.raises(RankError, match=r"ranks raised in fail_on(?s:.*)--- rank 1 of 3(?s:.*)out of numbers"):
        ranks.run(fail_on, 3, 1)
    assert ranks.run(process_id, 4) == before


def test_ranks_that_stand_still_and_ranks_that_die_are_named_and_the_pool_starts_again() -> None:
    pool = RankPool(2)
    try:
        pool.run(process_id, 2)
        with pytest.raises(RankTimeout, match=r"waited for .*sleep_on: no answer from ranks \[1\] of 2"):
            pool.run(sleep_on, 2, 1, stall_s=1.0)
        with pytest.raises(RankError, match="exit code 7"):
            pool.run(die, 1)
        assert pool.run(total, 2, 0) == [(1, 2, 1)] * 2
    finally:
        pool.close()


def test_a_world_larger_than_the_pool_is_refused(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="this pool has 4 ranks"):
        ranks.run(process_id, 5)
