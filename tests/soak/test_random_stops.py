"""Twenty requests to end, by random signals to random processes at random moments: a run loses nothing by them."""

import os
import random

from random_stops import Stops
from small_runs import assert_same_run, undisturbed_run

REQUESTS = int(os.environ.get("CLIPO_STOPS", "20"))
LONG = ("layout.pp=2", "train.steps=30", "checkpoint.every=2", "checkpoint.keep=3", "eval.every=10")


def test_random_stops_cost_nothing(small_config, tmp_path):
    seed = int(os.environ.get("CLIPO_STOPS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CLIPO_STOPS_SEED={seed}")
    undisturbed, asked = undisturbed_run(small_config, "undisturbed_long", *LONG), 0
    while asked < REQUESTS:
        output = tmp_path / f"run{asked}"
        stops = Stops(small_config, output, LONG, seed + asked)
        stops.until_done(REQUESTS - asked)
        assert_same_run(output, undisturbed, 30)
        asked += stops.asked.total()
