"""How much is pruned when: in one step, or in several with training between them."""

KINDS = ("one_shot", "iterative", "gradual")


def sparsities(final: float, kind: str, steps: int) -> list[float]:
    """The share of zeros after each step.

    `final` is the share in the end, in [0, 1). "iterative": each step removes the same share of what the step
    before left (Han et al., 2015; Frankle and Carbin, 2019). "gradual": ``final * (1 - (1 - t)**3)`` at the
    time t, much at first and little in the end (Zhu and Gupta, 2017, equation 1). "one_shot": a single step.

    >>> [round(share, 3) for share in sparsities(0.875, "iterative", 3)]
    [0.5, 0.75, 0.875]
    """
    return [1 - kept for kept in shares(1 - final, kind, steps)]


def shares(final: float, kind: str, steps: int) -> list[float]:
    """The share that is left after each step, of MACs or weights, for a final one in (0, 1]."""
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}: one of {', '.join(KINDS)}")
    if not 0 < final <= 1 or steps < 1 or (kind == "one_shot" and steps > 1):
        raise ValueError(f"{steps} steps to a share of {final:g}: in (0, 1], at least 1 step, 1 for one_shot")
    times = [step / steps for step in range(1, steps + 1)]
    if kind == "gradual":
        return [1 - (1 - final) * (1 - (1 - time) ** 3) for time in times]
    return [final**time for time in times]
