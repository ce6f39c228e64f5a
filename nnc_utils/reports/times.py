"""What was timed, how much the times varied, and whether speed-ups hold when they are taken again."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nnc_utils.reports.committed import RATIO, TIMING, Tables, baselines
from nnc_utils.reports.words import factor, markdown, network_name, number
from nnc_utils.rows import AGAIN, APART

RATIOS = {RATIO: "the fastest fp32 runtime", "speedup_eager_fp32": "fp32 in eager"}


def latency_text(tables: Tables) -> str:
    """Every row of latency.csv, and how steady the times were."""
    notes = []
    for run in tables.latency["run"].unique():
        extra = tables.provenance[run]["extra"]
        if "fewest_samples" in extra:
            rounds = tables.latency[tables.latency["run"] == run]["rounds"]
            notes.append(
                f"Medians of at least {extra['fewest_samples']} predictions in {rounds.min()} rounds, "
                f"{rounds.max()} at the smallest batch and fewest threads; a speed-up is the median of the "
                f"ratios within a round. Before the first, other processes used "
                f"{extra['cpu_busy_before']:.0f} % of the processor.\n\n"
            )
    return (
        "".join(notes)
        + f"{_unrest(tables.latency)}\n\n".lstrip()
        + markdown(
            [
                {
                    "network": "identity" if row["control"] == "identity" else network_name(row),
                    "runtime": f"{row['runtime']} {row['precision']}",
                    "batch": str(row["batch"]),
                    "threads": str(row["threads"]),
                    "p50 ms": number(row["p50_ms"], ".3f", tables.why(row)),
                    "p90 ms": number(row["p90_ms"], ".3f"),
                    "images/s": number(row["throughput"], ",.0f"),
                    "× eager fp32": factor(row["speedup_eager_fp32"]),
                    "× fastest fp32": factor(row["speedup_best_fp32"]),
                    "agreement %": number(row["agreement"], ".2f"),
                }
                for _, row in tables.latency.iterrows()
            ]
        )
    )


def twice(latency: pd.DataFrame) -> pd.DataFrame:
    """What was timed twice, a row each.

    Parameters
    ----------
    latency : rows of latency.csv, with those whose control is "again".

    Returns
    -------
    The rows of the first timing with the speed-ups of the second ("... again"), and by how many percent each
    differs ("... apart"). The uncompressed network in fp32 is what others are compared with, and left out.
    """
    ratios = list(RATIOS)
    second = latency["control"] == AGAIN
    pairs = latency[~second].merge(latency[second][[*TIMING, *ratios]], on=TIMING, suffixes=("", " again"))
    pairs = pairs[pairs["p50_ms"].notna()]
    pairs = pairs[~(baselines(pairs) & (pairs["precision"] == "fp32"))]
    apart = {f"{r} apart": 100 * (pairs[f"{r} again"] / pairs[r] - 1).abs() for r in ratios}
    return pairs.assign(**apart)


def _unrest(latency: pd.DataFrame) -> str:
    """How much a network's time varied from round to round: what others on the host took shows here."""
    most = latency[(latency["rounds"] == latency["rounds"].max()) & (latency["control"] != "identity")]
    rounds = [np.array(text.split(), float) for text in most["rounds_p50_ms"].dropna() if text]
    spreads = [np.subtract(*np.percentile(found, (75, 25))) / np.median(found) for found in rounds]
    if not spreads:
        return ""
    return (
        f"The middle half of a network's rounds spans {100 * np.median(spreads):.0f} % of their median (half "
        "of them more); nothing else ran on this machine, whose host others may use."
    )


def holding(latency: pd.DataFrame) -> str:
    """How many speed-ups held when they were timed again, of `twice`, in words."""
    pairs = twice(latency)
    texts = []
    for ratio, against in RATIOS.items():
        apart = pairs[f"{ratio} apart"]
        held = f"{(apart <= APART).sum()} of {len(pairs)} are within {APART} % of each other"
        lower = (pairs[f"{ratio} again"] < pairs[ratio]).sum()
        half = f"half of them within {apart.median():.1f} %"
        texts.append(f"against {against} {held}, {half}, {lower} lower the second time")
    return "; ".join(texts)


def twice_text(tables: Tables) -> str:
    """Do the speed-ups hold when they are timed again?"""
    if not len(tables.again):
        return "Timed once."
    both = pd.concat([tables.latency, tables.again])
    pairs = twice(both)
    batch, threads = (pairs[column].iloc[0] for column in ("batch", "threads"))
    far = pairs[pairs[[f"{ratio} apart" for ratio in RATIOS]].max(axis=1) > APART]
    text = (
        f"Batch {batch} with threads={threads} was timed twice, in new processes. Of the speed-ups, "
        f"{holding(both)}. {_unrest(tables.again)} "
        + ("Further apart:" if len(far) else "None is further apart.")
    )
    if not len(far):
        return text
    lines = [
        {"network": network_name(row), "runtime": f"{row['runtime']} {row['precision']}"}
        | {
            f"against {name}, again, apart": f"{factor(row[ratio])}, {factor(row[f'{ratio} again'])}, "
            f"{row[f'{ratio} apart']:.0f} %"
            for ratio, name in RATIOS.items()
        }
        for _, row in far.sort_values(f"{RATIO} apart", ascending=False).iterrows()
    ]
    return text + "\n\n" + markdown(lines)
