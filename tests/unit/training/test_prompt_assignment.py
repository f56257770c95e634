"""Which requests belong to which step where steps run ahead."""

from __future__ import annotations

import random
from collections import Counter

from clipo_megatron.training.ledger import balance
from clipo_megatron.training.prompt_assignment import can_wait, fill_batches


def test_batches_take_the_oldest_and_are_filled_up_with_new_ones():
    # Two ranks with 2 requests a step: the first has lost one of step 5's, the second has all that are wanted but two.
    taken, new = fill_batches([{5: 1, 6: 2, 7: 2}, {5: 2, 6: 2}], {5: [2, 2], 6: [2, 2], 7: [2, 2]})
    assert [{step: count for step, count in each.items() if count} for each in taken] == [
        {5: 2, 6: 2, 7: 1},
        {5: 2, 6: 2},
    ]
    assert new == [(7, 0), (7, 1), (7, 1)]


def test_what_no_batch_takes_waits():
    taken, new = fill_batches([{0: 5}], {3: [2], 4: [2]})
    assert dict(taken[0]) == {3: 2, 4: 2, 5: 1} and new == []


def test_what_can_wait_is_what_a_schedule_exists_for():
    """Against a schedule by earliest deadline, on random deadlines."""
    draw = random.Random(3)
    answers = Counter()
    for _ in range(2000):
        due, quota = [draw.randint(1, 6) for _ in range(draw.randint(0, 12))], draw.randint(1, 4)
        left, step = sorted(due), 2
        possible = all(each > step for each in left)
        while left and possible:
            step += 1
            left = left[quota:]
            possible = all(each > step for each in left)
        answers[possible] += 1
        assert can_wait(due, step=2, quota=quota) == possible
    assert min(answers.values()) > 200


def line(step: int, drawn: int, trained: list, zero: list = (), unfinished: list = ()) -> dict:
    return {"step": step, "drawn": drawn, "trained": trained, "zero_advantage": zero, "unfinished": unfinished}


def test_a_ledger_names_what_is_wrong():
    sound = balance([line(0, 6, [[0, 2], [3, 4]], [[2, 3]]), line(1, 8, [[4, 6]], [], [[6, 7]])])
    assert sound.problems([7]) == [] and sound.dropped == {2: "zero_advantage", 6: "unfinished"}
    assert sound.problems() == ["prompt 7 is neither trained, dropped nor open"]
    wrong = balance([line(0, 4, [[0, 3]]), line(1, 4, [[2, 4]], [[3, 4]])])
    assert wrong.problems([1]) == [
        "prompt 2 trained 2 times",
        "prompt 3 trained and was dropped",
        "prompt 1 is open, and trained or dropped before",
    ]
