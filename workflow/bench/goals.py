"""The goals of the course (``goals.yaml``), and what the tables say of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from bench import federated
from bench.claims import SEEDS_OF_A_CLAIM
from bench.pairs import LARGER, another_teacher, where
from nnc_utils.rows import NO_LOSS, interval_text

if TYPE_CHECKING:
    from bench.committed import Tables

YES, NO, UNCLAIMED = "yes", "no", "yes, but no claim"
AGREEMENT = 99.0  # percent of the images on which a runtime's class is the artifact's
UNITS = {
    "size_ratio": "smaller",
    "fewer": "fewer MACs",
    "speedup_best_fp32": "the fastest fp32",
    "speedup_eager_fp32": "fp32 in eager",
}
Answer = tuple[str, str] | None  # what was measured, and whether the goal is reached; None: not measured


def answers(
    tables: Tables, others: list[Tables], asked: list[dict[str, Any]] | None = None
) -> list[dict[str, str]]:
    """Each goal with what was measured and whether it is reached, if not here then in another profile.

    `asked`: those that are set for every data set when None.
    """
    lines = []
    for goal in [goal for goal in read() if "dataset" not in goal] if asked is None else asked:
        answer = ask(goal, tables)
        for other in others if answer is None else ():
            if (elsewhere := ask(goal, other)) is not None:
                answer = f"in {other.profile}: {elsewhere[0]}", elsewhere[1]
                break
        measured, reached = answer or ("not measured", "–")
        lines.append({"goal": goal["goal"], "measured": measured, "reached": reached})
    return lines


def read() -> list[dict[str, Any]]:
    """The goals in their order."""
    return yaml.safe_load(Path(__file__).with_name("goals.yaml").read_text(encoding="utf-8"))


def ask(goal: dict[str, Any], tables: Tables) -> Answer:
    """What the tables of one profile say of a goal."""
    return {
        "reach": _reach,
        "converged": _converged,
        "predicted": _predicted,
        "no_rival": _no_rival,
        "sent": _sent,
    }[goal["kind"]](goal, tables)


def _reach(goal: dict[str, Any], tables: Tables) -> Answer:
    column, loss = goal["column"], goal.get("loss", NO_LOSS)
    points = tables.points[where(tables.points, goal["of"])].dropna(subset=[column]).sort_values(column)
    if points.empty:
        return None
    alike = points["delta_ci_low"] >= loss
    if column.startswith("speedup"):
        alike &= (points["runtime_low"] >= loss) & (points["agreement"] >= AGREEMENT)
    enough = points[column] >= goal["at_least"]
    good = points[alike & enough]
    claimed = good[(good["headline"] == 1) & (good["seeds"] >= SEEDS_OF_A_CLAIM)]
    if len(claimed):
        return _told(claimed.iloc[-1], column), YES
    told = {"chosen": points[points["headline"] == 1].tail(1), "not chosen": good.tail(1)}
    if good.empty:
        told["nearest with so much"] = points[enough].sort_values("delta_ci_low").tail(1)
        told["most within the limit"] = points[alike].tail(1)
    text: dict[str, str] = {}
    for word, rows in told.items():
        for _, point in rows.iterrows():
            text.setdefault(_told(point, column), word)
    told_of = "; ".join(f"{word}: {point}" for point, word in text.items())
    return told_of or "none within the limit", UNCLAIMED if len(good) else NO


def _told(point: pd.Series, column: str) -> str:
    amount = f"{point[column]:.2f}×" if point[column] < 10 else f"{point[column]:.1f}×"
    delta = interval_text(point.rename({"delta_mean": "accuracy_delta"}))
    where = ""
    if column.startswith("speedup"):
        where = f", {point['runtime']}: lower end {point['runtime_low']:+.2f}"
    return f"{point['title']}: {amount} {UNITS[column]}, {delta} ({seeds_text(point['seeds'])}{where})"


def seeds_text(count: int) -> str:
    """ "3 seeds"."""
    return f"{count} seed{'s' if count > 1 else ''}"


def _converged(goal: dict[str, Any], tables: Tables) -> Answer:
    """The uncompressed network, and what as much training as the pipeline's adds to it."""
    dense = tables.summary[(tables.summary["technique"] == "baseline") & (tables.summary["control"] == "")]
    more = tables.summary[tables.summary["technique"] == "baseline"]
    more = more[more["method"] == "dense_finetuned"]
    if dense.empty or more.empty:
        return None
    dense, more = dense.iloc[0], more.iloc[0]
    images = tables.rows_of(more)["train_images"].max()
    text = (
        f"{dense['accuracy_mean']:.2f} % ({seeds_text(dense['seeds'])}); {images:,} images more add "
        f"{interval_text(more.rename({'delta_mean': 'accuracy_delta'}))} ({seeds_text(more['seeds'])})"
    )
    if dense["accuracy_mean"] < goal["accuracy"] or more["delta_ci_high"] >= goal["gain"]:
        return text, NO
    return text, YES if min(dense["seeds"], more["seeds"]) >= SEEDS_OF_A_CLAIM else UNCLAIMED


def recorded(tables: Tables, name: str) -> dict | None:
    """What a run of 05_architecture_search has left beside its rows."""
    return next(
        (record["extra"][name] for record in tables.provenance.values() if record["extra"].get(name)), None
    )


def _predicted(goal: dict[str, Any], tables: Tables) -> Answer:
    """The error of the model of latency on networks that it was not fitted to, as its run computed it."""
    if (timed := recorded(tables, "latency")) is None:
        return None
    seen, unseen = len(timed["blocks"]), len(timed["networks"])
    text = f"{timed['error']:.1f} % on {unseen} networks, fitted to {seen} blocks"
    return text, YES if timed["error"] <= goal["percent"] else NO


def _sent(goal: dict[str, Any], tables: Tables) -> Answer:
    """What rounds of federated averaging sent, against as many rounds in fp32."""
    if (known := federated.of(tables.folder)) is None:
        return None
    own = known[known["times fewer bytes"].notna() & ~known.index.str.startswith("fp32")]
    enough = own[own["times fewer bytes"] >= goal["at_least"]]
    good = enough[enough["within 0.5 pp"] == "yes"]
    best = next((rows for rows in (good, enough, own) if len(rows)), None)
    if best is None:
        return None
    name, run = next(best.sort_values(["seeds", "times fewer bytes"], ascending=False).iterrows())
    text = f"{name}: {run['times fewer bytes']:.1f}× fewer bytes, {run['difference (pp) [95 %]']} "
    text += f"({seeds_text(run['seeds'])})"
    if good.empty:
        return text, NO
    return text, YES if run["seeds"] >= SEEDS_OF_A_CLAIM else UNCLAIMED


def _no_rival(goal: dict[str, Any], tables: Tables) -> Answer:
    """The pipeline against each rival and other tool at no more bytes."""
    if not (rivals := tables.rivals):
        return None
    words = {"beats": "above", "not below": "undecided against", "below": "below"}
    counts = Counter(pair.verdict.removesuffix(LARGER) for pair in rivals)
    point = tables.pipeline
    text = f"{point['title']}: " + ", ".join(f"{words[kind]} {n}" for kind, n in counts.items())
    text += f" of {len(rivals)}"
    if larger := sum(pair.verdict.endswith(LARGER) for pair in rivals):
        text += f"; in a larger file than {larger} of them"
    if {pair.verdict for pair in rivals} != {"beats"}:
        return text, NO
    every_seed = all(
        pair.seeds == point["seeds"] and not another_teacher(pair.ours, pair.theirs) for pair in rivals
    )
    return text, YES if every_seed and point["headline"] == 1 and point[
        "seeds"
    ] >= SEEDS_OF_A_CLAIM else UNCLAIMED
