"""How much is cut when: in one step, or in several with training between them."""

from __future__ import annotations

KINDS = ("one_shot", "iterative", "gradual")


def sparsities(final: float, kind: str, steps: int) -> list[float]:
    """The share of zeros after each step.

    Parameters
    ----------
    final : share of zeros in the end, in [0, 1).
    kind : "one_shot"; "iterative", each step cuts the same share of what the step before left (Han et al.,
        2015; Frankle and Carbin, 2019); "gradual", ``final * (1 - (1 - t)**3)`` at the time t, much at
        first and little in the end (Zhu and Gupta, 2017, equation 1).
    steps : at least 1; 1 for "one_shot".

    Examples
    --------
    >>> [round(share, 3) for share in sparsities(0.875, "iterative", 3)]
    [0.5, 0.75, 0.875]
    """
    if not 0 <= final < 1:
        raise ValueError(f"the final sparsity is {final}: a share of zeros in [0, 1) is needed")
    return [1 - kept for kept in shares(1 - final, kind, steps)]


def shares(final: float, kind: str, steps: int) -> list[float]:
    """The share that is left after each step, as of MACs or weights; `sparsities` has the parameters."""
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}: one of {', '.join(KINDS)}")
    if type(steps) is not int or steps < 1 or (kind == "one_shot" and steps > 1):
        raise ValueError(f"steps is {steps!r}: 1 for one_shot, a whole number of at least 1 for the others")
    if not 0 < final <= 1:
        raise ValueError(f"the final share is {final}: a number in (0, 1] is needed")
    times = [step / steps for step in range(1, steps + 1)]
    if kind == "gradual":
        return [1 - (1 - final) * (1 - (1 - time) ** 3) for time in times]
    return [final**time for time in times]
