"""Schedules against their formulas."""

import pytest

from nnc_utils.pruning import schedules


def test_each_iterative_step_cuts_the_same_share_of_what_is_left():
    found = schedules.sparsities(0.9, "iterative", 4)
    left = [1.0, *(1 - share for share in found)]
    ratios = [after / before for before, after in zip(left, left[1:], strict=False)]
    assert ratios == pytest.approx([0.1**0.25] * 4) and found[-1] == pytest.approx(0.9)


def test_gradual_cutting_is_cubic_and_ends_gently():
    found = schedules.sparsities(0.8, "gradual", 5)
    assert found == pytest.approx([0.8 - 0.8 * (1 - step / 5) ** 3 for step in range(1, 6)])
    steps = [after - before for before, after in zip([0.0, *found], found, strict=False)]
    assert steps == sorted(steps, reverse=True)


def test_one_shot_is_one_step():
    assert schedules.sparsities(0.5, "one_shot", 1) == [0.5]
    assert schedules.shares(0.25, "one_shot", 1) == [0.25]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((1.0, "gradual", 3), r"a share of zeros in \[0, 1\)"),
        ((0.5, "cubic", 3), "unknown schedule 'cubic': one of one_shot, iterative, gradual"),
        ((0.5, "one_shot", 2), "steps is 2: 1 for one_shot"),
        ((0.5, "gradual", 0), "steps is 0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        schedules.sparsities(*given)
