"""A learner's predictions, kept beside what was measured: a ratio of 1 means that it was understood."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

_PREDICTED: dict[str, float] = {}
_RATIOS: dict[str, float] = {}


def predict(what: str, value: float) -> None:
    """Keep a prediction, until `measured` is told what came out."""
    _PREDICTED[what] = float(value)


def measured(what: str, value: float) -> None:
    """Print a measured value beside its prediction, and the ratio of the two."""
    if not _PREDICTED.get(what):  # a ratio needs another number than 0
        said = "0" if what in _PREDICTED else "nothing"
        print(f"{what}: measured {value:.4g}; you predicted {said}")
        return
    _RATIOS[what] = float(value) / _PREDICTED[what]
    print(f"{what}: you predicted {_PREDICTED[what]:.4g}, measured {value:.4g}: ratio {_RATIOS[what]:.2f}")


def show() -> Figure:
    """The ratios of all predictions of this notebook, bars from 1 on a log axis: where were you far off?"""
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(_RATIOS) + 1.2))
    names = [f"{what}: {ratio:.2g}" for what, ratio in _RATIOS.items()]
    axes.barh(names, [ratio - 1 for ratio in _RATIOS.values()], left=1)
    axes.axvline(1, color="grey")
    above_zero = [ratio for ratio in _RATIOS.values() if ratio > 0]  # a ratio of 0 reaches to the edge
    axes.set(xscale="log", xlim=(0.8 * min(0.5, *above_zero), 1.25 * max(2, *above_zero)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="measured ÷ predicted", title="How near were your predictions?")
    axes.invert_yaxis()
    return figure
