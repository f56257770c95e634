"""Hundreds of broken things, thousands on request: each costs a sentence, and nothing of the user's is touched."""

import os
import random

import pytest
from broken_kinds import KINDS
from broken_things import in_fork

CASES = int(os.environ.get("CLIPO_BROKEN_CASES", "60"))  # of each kind


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"sound"}))
def test_broken_things_cost_a_sentence(kind):
    seed = int(os.environ.get("CLIPO_BROKEN_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CLIPO_BROKEN_SEED={seed}")
    wrong = [verdict for verdict in in_fork(kind, seed, range(CASES)) if verdict.wrong]
    assert not wrong, "\n\n".join(map(str, wrong))
