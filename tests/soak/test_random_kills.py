"""The short form of `random_kills.py`: some kills of one run, which ends as if there had been none."""

import os
import random

from random_kills import Kills, killed_with_its_servers
from small_runs import EVERY, assert_same_run


def test_random_kills_cost_nothing(small_config, undisturbed, tmp_path):
    seed = int(os.environ.get("CLIPO_KILLS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CLIPO_KILLS_SEED={seed}")
    kills = Kills(small_config, tmp_path / "run", (f"checkpoint.every={EVERY}",), seed)
    kills.until_done(3)
    print(dict(kills.struck))
    assert kills.struck.total()
    assert_same_run(tmp_path / "run", undisturbed)


def test_random_kills_of_a_run_and_its_servers_lose_no_prompt(tmp_path):
    """Steps run ahead of their training meanwhile; a token that is too old would end the run."""
    seed = int(os.environ.get("CLIPO_KILLS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CLIPO_KILLS_SEED={seed}")
    struck = killed_with_its_servers(tmp_path, 4, 20, seed, ("rollout.ahead=1", "layout.pp=2"))
    print(dict(struck))
    assert struck.total()
