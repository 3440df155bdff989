"""The order of rows: whole steps, each row once an epoch, another order each epoch."""

import pytest

from amvl_fast.training.sampling import WholeSteps


def epoch(sampler, number):
    sampler.set_epoch(number)
    order = list(sampler)
    assert len(order) == len(sampler)
    return order


def test_an_epoch_is_filled_up_from_its_beginning():
    sampler = WholeSteps(20, 8, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert len(first) == 24 and sorted(first[:20]) == list(range(20)) and first[20:] == first[:4]
    assert first != second and first == epoch(sampler, 0) and first != epoch(WholeSteps(20, 8, seed=4), 0)


def test_what_does_not_fill_a_step_may_be_left_out():
    order = epoch(WholeSteps(20, 8, seed=3, drop_last=True), 0)
    assert len(order) == len(set(order)) == 16
    assert epoch(WholeSteps(3, 8, seed=None, drop_last=True), 5) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_rows_may_stay_in_order():
    assert epoch(WholeSteps(5, 2, seed=None), 7) == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_like_lengths_come_together(number):
    lengths = [10 * (i % 7) + i for i in range(700)]

    def spread(sampler):
        """Between the shortest and the longest of a step, on average."""
        order = epoch(sampler, number)
        assert sorted(order) == list(range(700))
        steps = [[lengths[row] for row in order[i : i + 7]] for i in range(0, 700, 7)]
        return sum(max(step) - min(step) for step in steps) / len(steps)

    assert spread(WholeSteps(700, 7, seed=0, lengths=lengths)) < 0.2 * spread(WholeSteps(700, 7, seed=0))
