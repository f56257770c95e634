"""The sampler: it drops nothing, shuffles each epoch differently, and resumes at its position."""

import pytest

from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.data.sources import DataError


def drawn(sampler, steps):
    return [sampler.next() for _ in range(steps)]


def test_every_epoch_gives_every_prompt_once():
    flat = [index for batch in drawn(PromptSampler(10, 4, seed=1), 15) for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batches_have_their_size_even_above_the_epoch():
    assert [len(batch) for batch in drawn(PromptSampler(3, 8), 3)] == [8, 8, 8]


def test_order_depends_on_the_seed_only_and_never_changes():
    assert PromptSampler(8, 8, seed=1).next() == PromptSampler(8, 8, seed=1).next()
    assert PromptSampler(8, 8, seed=1).next() != PromptSampler(8, 8, seed=2).next()
    # a golden: a new order would silently change what a resumed run trains on
    assert PromptSampler(8, 8, seed=0).next() == [0, 4, 2, 3, 7, 6, 5, 1]


def test_no_shuffle():
    assert drawn(PromptSampler(5, 3, shuffle=False), 3) == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 7])
def test_resume(steps):
    straight, interrupted, resumed = (PromptSampler(10, 4, seed=3) for _ in range(3))
    drawn(straight, steps), drawn(interrupted, steps)
    resumed.load_state_dict(interrupted.state_dict())
    assert drawn(resumed, 8) == drawn(straight, 8)


def test_resume_with_another_batch_size():
    first, second = PromptSampler(10, 4, shuffle=False), PromptSampler(10, 3, shuffle=False)
    first.next()
    second.load_state_dict(first.state_dict())
    assert second.next() == [4, 5, 6]


@pytest.mark.parametrize("other", [{"n": 11}, {"seed": 1}, {"shuffle": False}])
def test_position_in_other_data_is_refused(other):
    state = PromptSampler(10, 4).state_dict()
    with pytest.raises(DataError, match=f"{next(iter(other))} = "):
        PromptSampler(**{"n": 10, "prompts_per_step": 4, **other}).load_state_dict(state)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError):
        PromptSampler(0, 4)
