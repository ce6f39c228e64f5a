"""What the paper of each method claims (``papers.yaml``), and what the tables say of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from bench import pairs
from bench.goals import recorded, seeds_text
from nnc_utils.rows import interval_text

if TYPE_CHECKING:
    from bench.committed import Tables


def read() -> list[dict[str, Any]]:
    """The methods with their papers, in the order of the course."""
    return yaml.safe_load(Path(__file__).with_name("papers.yaml").read_text(encoding="utf-8"))


def lines(tables: Tables, others: list[Tables]) -> list[dict[str, str]]:
    """A line for each method and what it is held against, from these tables or else the first others.

    A method and its claim are named once. Where it is below, the verdict says why (the paper's `because`).
    """
    told = []
    for paper in read():
        found: list[list[str]] = []
        for side in [name for name in ("theirs", "peer") if name in paper]:
            measured: list[list[str]] = []
            for its in [tables, *others]:
                if not measured and (measured := _measured(paper, paper[side], its)) and its is not tables:
                    measured = [[*line[:-1], f"{line[-1]} (in {its.profile})"] for line in measured]
            found += measured or [["–", "–", "–", "not measured"]]
        names = [paper["method"], f"[{paper['paper']}]({paper['url']}): {paper['claim']}"]
        told += [[*(names if place == 0 else ["", ""]), *line] for place, line in enumerate(found)]
    columns = ("method", "claim", "ours", "against", "difference", "verdict")
    return [dict(zip(columns, line, strict=True)) for line in told]


def _measured(paper: dict[str, Any], against: Any, tables: Tables) -> list[list[str]]:
    """Ours, theirs, the difference and the verdict of each pair that the tables of a profile have."""
    if isinstance(paper["ours"], str):
        return _searched(paper["ours"], against, tables)
    race = {"ours": paper["ours"], "theirs": against} | {
        k: paper[k] for k in ("equal", "budget") if k in paper
    }
    told = []
    for pair in pairs.raced(
        tables.compression, tables.folder / "predictions", dataset=tables.dataset, **race
    ):
        why = f": {paper['because']}" if pair.verdict.startswith("below") and "because" in paper else ""
        difference = f"{interval_text(pair.difference)}, {seeds_text(pair.seeds)}"
        told.append([pair.ours["title"], pair.theirs["title"], difference, pair.verdict + why])
    return told


def _searched(ours: str, theirs: str, tables: Tables) -> list[list[str]]:
    """A method of search against another: the mean of what their searches found, on validation images."""
    found = (recorded(tables, "search") or {}).get("verified", {})
    if ours not in found or theirs not in found:
        return []
    mine, others = (np.array(found[name], float) for name in (ours, theirs))
    mean = mine.mean() - others.mean()
    half = 1.96 * (mine.var(ddof=1) / len(mine) + others.var(ddof=1) / len(others)) ** 0.5
    delta = {"accuracy_delta": mean, "delta_ci_low": mean - half, "delta_ci_high": mean + half}
    verdict = "beats" if mean > half else "not below" if mean >= -half else "below"
    return [[ours, theirs, f"{interval_text(delta)}, {len(mine)} searches", verdict]]
