"""A setting for each layer, such as its bits or its share of zeros: the least harm within a budget."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Table = Mapping[str, Mapping[float, float]]
LARGEST = 1e3  # of the solver's objective, of which it sees no difference below 1e-6


def allocate(cost: Table, harm: Table, *, budget: float) -> dict[str, float]:
    """Choose a setting for each layer: the smallest total harm that the budget pays for.

    Parameters
    ----------
    cost : layer -> setting (a number: bits, or a share of zeros) -> bytes.
    harm : layer -> setting -> what this setting of this layer does to the network, such as
        `sensitivity.loss_increase`; may be negative. The harms of layers are taken to add up.
    budget : bytes of all layers together, at most.

    Returns
    -------
    Layer -> setting, in the order of `cost`; of two that harm the same the cheaper one. A ValueError for a
    budget below the smallest possible number of bytes, and tables that do not fit each other.

    Notes
    -----
    An integer linear program with a variable in {0, 1} for each setting of each layer, exactly one of
    them 1 in each layer (Yao et al., 2021, HAWQ-V3, equation 9), solved by HiGHS to a total within
    about 1e-9 of the best.

    Examples
    --------
    >>> cost = {"conv1": {4: 100, 8: 200}, "fc": {4: 10, 8: 20}}
    >>> harm = {"conv1": {4: 0.3, 8: 0.0}, "fc": {4: 0.2, 8: 0.0}}
    >>> allocate(cost, harm, budget=210)
    {'conv1': 8, 'fc': 4}
    """
    _check(cost, harm)
    smallest = sum(min(settings.values()) for settings in cost.values())
    if not budget >= smallest:
        raise ValueError(
            f"the budget is {budget} bytes, the smallest allocation takes {smallest} bytes: "
            "raise the budget or offer cheaper settings"
        )
    excess = {layer: _excess(cost[layer], harm[layer]) for layer in cost}
    chosen = {layer: min(excess[layer], key=cost[layer].__getitem__) for layer in cost}
    # A setting with more excess than some allocation has in total is not in the best one. Without it the
    # objective spans less, so that the solver sees smaller differences.
    while total := sum(excess[layer][setting] for layer, setting in chosen.items()):
        pairs = [(layer, setting) for layer, settings in excess.items() for setting in settings]
        useful = [(layer, setting) for layer, setting in pairs if excess[layer][setting] <= total]
        objective = [excess[layer][setting] / total * LARGEST for layer, setting in useful]
        chosen = _solve(useful, objective, [cost[layer][setting] for layer, setting in useful], budget)
        if sum(excess[layer][setting] for layer, setting in chosen.items()) > total / 2:
            break
    return chosen


def _excess(cost: Mapping[float, float], harm: Mapping[float, float]) -> dict[float, float]:
    """Harm above the layer's least one, of the settings that no other beats in both cost and harm."""
    best = {}
    for setting in sorted(cost, key=lambda setting: (cost[setting], harm[setting], setting)):
        if not best or harm[setting] < min(best.values()):
            best[setting] = harm[setting]
    return {setting: value - min(best.values()) for setting, value in best.items()}


def _solve(
    options: list[tuple[str, float]], objective: list[float], cost: list[float], budget: float
) -> dict[str, float]:
    layers = list(dict.fromkeys(layer for layer, _ in options))
    one_each = np.array([[layer == name for name, _ in options] for layer in layers], float)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint([cost], ub=budget)]
    whole, exact = np.ones(len(options)), {"mip_rel_gap": 0.0}
    with _silence():
        solved = milp(
            objective, integrality=whole, bounds=Bounds(0, 1), constraints=constraints, options=exact
        )
    if solved.x is None:
        raise RuntimeError(f"the solver found no allocation: {solved.message}")
    return {layer: setting for (layer, setting), taken in zip(options, solved.x) if taken > 0.5}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what HiGHS prints for its authors, past Python, from the notebook."""
    sys.stdout.flush()
    stdout, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)


def _check(cost: Table, harm: Table) -> None:
    settings = [{layer: set(own) for layer, own in table.items()} for table in (cost, harm)]
    if settings[0] != settings[1] or not cost or not all(cost.values()):
        raise ValueError("cost and harm must name the same layers, each with the same settings, at least one")
    for layer, prices in cost.items():
        for setting, price in prices.items():
            if not 0 <= price < math.inf or not math.isfinite(harm[layer][setting]):
                numbers = f"the cost of {setting} is {price}, its harm {harm[layer][setting]}"
                raise ValueError(f"{layer}: {numbers}: finite numbers are needed, the cost at least 0")
