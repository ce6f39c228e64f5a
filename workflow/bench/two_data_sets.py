"""What carries over from one data set to another: the tables of two profiles side by side."""

from __future__ import annotations

import math
from typing import Any

from bench import goals
from bench.committed import Tables, committed_profile
from bench.pairs import LARGER, Pair
from bench.tables import KEY
from nnc_utils.rows import within

CIFAR = "cifar"  # the profile of the second data set
SAME = [column for column in KEY if column != "dataset"]
OUTCOMES = {  # within 0.3 pp on the first and on the second
    ("yes", "yes"): "carries over",
    ("no", "no"): "holds on neither",
    ("yes", "no"): "does not carry over",
    ("no", "yes"): "holds on the second alone",
}


def both(tables: Tables) -> tuple[Tables, Tables] | None:
    """The tables that the README shows, then those of the profile `cifar`; None where these are not of it.

    `tables` has to be one of the two, so that their page stands in their two reports.
    """
    results = tables.folder.parent
    shown = committed_profile(results.parent, timed=True) or committed_profile(results.parent)
    folders = [shown, results / CIFAR]
    if tables.folder not in folders or not all(f and (f / "compression.csv").is_file() for f in folders):
        return None
    first, second = (tables if folder == tables.folder else Tables(folder) for folder in folders)
    return (first, second) if first.dataset != second.dataset else None


def headlines(first: Tables, second: Tables) -> list[dict[str, Any]]:
    """What stands for each technique on both data sets: its name, the outcome, tables and point of either."""
    ours, theirs, lines = dict(first.headline()), dict(second.headline()), []
    for name in [name for name in ours if name in theirs]:
        outcome = OUTCOMES.get((within(ours[name]), within(theirs[name])), "cannot tell")
        line = {"name": name, "sides": [(first, ours[name]), (second, theirs[name])]}
        lines.append(line | {"outcome": "" if ours[name]["technique"] == "baseline" else outcome})
    return lines


def configurations(first: Tables, second: Tables) -> list[dict[str, Any]]:
    """What both measured, the largest file first: title, the points of summary.csv, cost and verdict.

    The cost is how many percentage points more the second data set loses. Its interval is that of two
    independent sets of test images.
    """
    mine, lines = {tuple(point[SAME]): point for _, point in first.summary.iterrows()}, []
    for _, theirs in second.summary.sort_values("size_ratio", kind="stable").iterrows():
        ours = mine.get(tuple(theirs[SAME]))
        if ours is None or theirs["method"] == "train":
            continue
        halves = [(point["delta_ci_high"] - point["delta_ci_low"]) / 2 for point in (ours, theirs)]
        mean, half = ours["delta_mean"] - theirs["delta_mean"], math.hypot(*halves)
        cost = {"accuracy_delta": mean, "delta_ci_low": mean - half, "delta_ci_high": mean + half}
        verdict = "more" if mean > half else "less" if mean < -half else "undecided"
        lines.append({"title": theirs["title"], "points": (ours, theirs), "cost": cost, "verdict": verdict})
    return lines


def comparisons(first: Tables, second: Tables) -> list[dict[str, Any]]:
    """The pairs that were compared on both: the pair of either, and whether their verdicts agree."""
    mine, lines = {_sides(pair): pair for pair in first.pairs}, []
    for theirs in second.pairs:
        if ours := mine.get(_sides(theirs)):
            verdicts = [pair.verdict.removesuffix(LARGER) for pair in (ours, theirs)]
            kind = "same" if verdicts[0] == verdicts[1] else "decided on one"
            kind = "opposite" if set(verdicts) == {"beats", "below"} else kind
            lines.append({"pairs": (ours, theirs), "kind": kind})
    return lines


def _sides(pair: Pair) -> tuple[str, ...]:
    return tuple(side[column] for side in (pair.ours, pair.theirs) for column in ("method", "settings"))


def goals_of(tables: Tables) -> list[dict[str, str]]:
    """The goals that were set for this data set alone."""
    own = [goal for goal in goals.read() if goal.get("dataset") == tables.dataset]
    return goals.answers(tables, [], own)
