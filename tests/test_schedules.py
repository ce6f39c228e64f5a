"""Schedules against their formulas."""

import pytest

from nnc_utils.pruning import schedules

CUBIC = [0.8 - 0.8 * (1 - step / 5) ** 3 for step in range(1, 6)]


@pytest.mark.parametrize(
    ("final", "kind", "zeros"),
    [(0.9, "iterative", [1 - 0.1 ** (step / 4) for step in range(1, 5)]), (0.8, "gradual", CUBIC)]
    + [(0.5, "one_shot", [0.5])],
)
def test_a_schedule_is_its_formula(final, kind, zeros):
    assert schedules.sparsities(final, kind, len(zeros)) == pytest.approx(zeros)
    assert schedules.shares(1 - final, kind, len(zeros)) == pytest.approx([1 - share for share in zeros])


@pytest.mark.parametrize("arguments", [(1.0, "gradual", 3), (0.5, "one_shot", 2), (0.5, "gradual", 0)])
def test_schedules_that_make_no_sense_are_refused(arguments):
    with pytest.raises(
        ValueError, match=r"steps to a share of .*: in \(0, 1\], at least 1 step, 1 for one_shot"
    ):
        schedules.sparsities(*arguments)
    with pytest.raises(ValueError, match="unknown schedule 'cubic': one of one_shot, iterative, gradual"):
        schedules.sparsities(0.5, "cubic", 3)
