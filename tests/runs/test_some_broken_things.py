"""A few broken things of each kind, always the same ones; tests/soak has hundreds."""

import pytest
from broken_kinds import KINDS
from broken_things import in_fork

DEAR = {"environment": 3, "targets": 4, "model": 6, "checkpoint": 5, "rows": 5, "run": 5}
EACH = 8


def test_sound_things_are_taken():
    for verdict in in_fork("sound", 0, range(5)):
        assert verdict.code == 0 and not verdict.wrong, verdict


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"sound"}))
def test_broken_things_cost_a_sentence(kind):
    verdicts = in_fork(kind, 0, range(DEAR.get(kind, EACH)))
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    assert not wrong, "\n\n".join(map(str, wrong))
    assert any(verdict.code for verdict in verdicts), "nothing was broken"
