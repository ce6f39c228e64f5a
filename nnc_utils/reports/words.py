"""Numbers, intervals and verdicts as a report says them."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from nnc_utils.paired import LARGER, in_points
from nnc_utils.rows import NO_LOSS

STALE = " †"
STALE_NOTE = "† measured with older code than the one in this repository; `RERUN=stale` measures it again."


def markdown(rows: list[dict[str, str]]) -> str:
    """A table whose columns are the keys of its rows."""
    if not rows:
        return "_none_"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str, missing: str = "–") -> str:
    """A number in a format, or what stands for none."""
    return missing if value is None or pd.isna(value) else format(value, form)


def factor(value: float | None) -> str:
    """How many times smaller or faster."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def yes(value: bool) -> str:
    """Of a truth value."""
    return "yes" if value else "no"


def megabytes(count: float | None) -> str:
    """Bytes as megabytes of 10⁶."""
    return "–" if count is None or pd.isna(count) else f"{count / 1e6:.2f} MB"


def delta_over_seeds(point: pd.Series) -> str:
    """The difference of a row of summary.csv, in points, with its interval."""
    ends = {column: point[column] for column in ("delta_ci_low", "delta_ci_high")}
    return in_points({"accuracy_delta": point["delta_mean"], **ends})


def network_name(row: pd.Series) -> str:
    """Model, method, point and control of a row."""
    control = f"({row['control']})" if row["control"] else ""
    return " ".join(str(part) for part in (row["model"], row["method"], row["point"], control) if part)


def count_seeds(point: pd.Series) -> str:
    """How many seeds a row of summary.csv has."""
    return f"{point['seeds']} seed{'s' if point['seeds'] > 1 else ''}"


def no_loss(low: float, high: float) -> str:
    """Of an interval: "no" where there is a loss, "not shown" where these pictures are too few to tell."""
    return "yes" if low >= NO_LOSS else "no" if high < 0 else "not shown"


def in_words(low: float, high: float) -> str:
    """What an interval says about loss."""
    return {"yes": "no loss", "no": "**a loss**", "not shown": "no loss is **not shown**"}[no_loss(low, high)]


def verdicts(told: Iterable[tuple[str, str]]) -> str:
    """A sentence for each verdict with all that it was said of, from pairs of both."""
    said, text = dict[str, list[str]](), ""
    for verdict, about in told:
        said.setdefault(verdict, []).append(about)
    words = {"below": "below", "not below": "undecided against", "beats": "above", "equal": "equal to"}
    for kind, told_of in words.items():
        for size in ("", LARGER):
            rivals = ", ".join(said.get(kind + size, []))
            text += f" It is {told_of}{' (with the larger file)' * bool(size)} {rivals}." * bool(rivals)
    return text
