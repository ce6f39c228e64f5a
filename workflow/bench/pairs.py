"""Paired differences on the same images and seeds: ``races.yaml``, and the pipeline against its rivals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from bench.tables import labels_name, smallest_claim
from nnc_utils.configurations import settings_json
from nnc_utils.figures import NARROW
from nnc_utils.peers import GENERAL
from nnc_utils.rows import (
    SETTING,
    differences,
    evidence,
    interval_text,
    labels_of,
    notebook_of,
    read_predictions,
    with_settings,
)

PIPELINE = "prune,distill,quantize"  # its stages: held against the other orders, and against every rival
STUDENT = "narrow,distill,quantize"  # the pipeline of a profile that prunes nothing
COLUMNS = ("technique", "method", "division", "control", "run", "train_images", "all_images")  # no settings
LARGER = ", in a larger file"
# their training is not in addition to the baseline's
FROM_SCRATCH = {"control": ("from_scratch", "small_dense")}


class Pair(NamedTuple):
    """Two configurations on the same images: their first rows, and what the difference says."""

    ours: pd.Series
    theirs: pd.Series
    bytes: int
    their_bytes: int
    difference: dict[str, float]
    seeds: int
    verdict: str

    def line(self) -> dict[str, Any]:
        """A line of a table."""
        sizes = {"ours": self.ours["title"], "bytes": self.bytes, "theirs": self.theirs["title"]}
        sizes |= {"their bytes": self.their_bytes, "difference (pp) [95 %]": interval_text(self.difference)}
        return sizes | {"seeds": self.seeds, "verdict": self.verdict}


def pairs(compression: pd.DataFrame, predictions: Path, *, dataset: str) -> list[Pair]:
    """Paired differences on the test images of one data set, from the stored predictions, over all seeds.

    Verdicts are "beats" (interval above 0), "not below" (upper end at least 0) or "below", and "in a larger
    file" where ours takes over 1 % more.
    """
    table = _table(compression)
    places = [place for race in races() for place in _raced(table, **race)] + _of_pipelines(table)
    return _held(table, places, predictions, dataset)


def raced(compression: pd.DataFrame, predictions: Path, *, dataset: str, **race: Any) -> list[Pair]:
    """As `pairs`, of one race: `ours`, `theirs`, `equal` and `budget` as in ``races.yaml``."""
    table = _table(compression)
    return _held(table, _raced(table, **race), predictions, dataset)


def _held(table: pd.DataFrame, places: list, predictions: Path, dataset: str) -> list[Pair]:
    """The places of our and their rows, all seeds of two configurations together."""
    labels = labels_for(predictions, dataset)
    together: dict[tuple, dict] = {}
    for place in places:
        key = tuple((table.at[side, "method"], table.at[side, "settings"]) for side in place)
        together.setdefault(key, {})[place] = None
    sides = [[table.loc[list(side)] for side in zip(*same, strict=True)] for same in together.values()]
    return [versus(ours, theirs, predictions, labels) for ours, theirs in sides]


def comparisons(compression: pd.DataFrame, predictions: Path, *, dataset: str) -> pd.DataFrame:
    """`pairs` as a table, a line each: titles, bytes (means over the seeds), difference, seeds, verdict."""
    return pd.DataFrame([pair.line() for pair in pairs(compression, predictions, dataset=dataset)])


def races() -> list[dict[str, Any]]:
    """Who is held against whom at equal settings."""
    return yaml.safe_load(Path(__file__).with_name("races.yaml").read_text(encoding="utf-8"))


def versus(ours: pd.DataFrame, theirs: pd.DataFrame, predictions: Path, labels: np.ndarray) -> Pair:
    """Rows of the same seeds side by side."""
    own, others = (
        [read_predictions(predictions / evidence(sha256)) for sha256 in side["artifact_sha256"]]
        for side in (ours, theirs)
    )
    delta = differences(compressed=own, reference=others, labels=labels)
    low, high = delta["delta_ci_low"], delta["delta_ci_high"]
    verdict = "beats" if low > 0 else "not below" if high >= 0 else "below"
    sizes = [round(side["artifact_bytes"].mean()) for side in (ours, theirs)]
    verdict += LARGER if sizes[0] > 1.01 * sizes[1] else ""
    return Pair(ours.iloc[0], theirs.iloc[0], *sizes, delta, len(ours), verdict)


def gaps(compression: pd.DataFrame, predictions: Path, *, dataset: str) -> pd.DataFrame:
    """What share of the gap between a student alone and the uncompressed network its teacher closes.

    Parameters as for `pairs`. A row for each distilled student, over its seeds: the gap to the uncompressed
    network in percentage points, what the teacher gained, and the share; "no gap" where its interval holds 0.
    """
    table, labels = _table(compression), labels_for(predictions, dataset)
    sides = ({"technique": "distillation", "control": control} for control in ("", "student_alone"))
    dense = table[where(table, {"technique": "baseline", "control": ""})].set_index("seed")
    together: dict[str, list] = {}
    for mine, alone in _raced(table, *sides, ["width", "train_images"]):
        if (seed := table.at[mine, "seed"]) in dense.index:
            together.setdefault(table.at[mine, "title"], []).append((mine, alone, seed))
    lines = []
    for name, places in together.items():
        mine, alone, seeds = map(list, zip(*places, strict=True))
        gap = versus(dense.loc[seeds], table.loc[alone], predictions, labels).difference
        gained = versus(table.loc[mine], table.loc[alone], predictions, labels).difference
        share = gained["accuracy_delta"] / gap["accuracy_delta"] if gap["delta_ci_low"] > 0 else None
        line = {"student": name, "gap (pp)": interval_text(gap), "gained (pp)": interval_text(gained)}
        lines.append(line | {"closed": "no gap" if share is None else f"{100 * share:.0f} %"})
    return pd.DataFrame(lines)


def rivals(compression: pd.DataFrame, point: pd.Series, predictions: Path) -> list[Pair]:
    """A pipeline against each narrow rival and other tool with equal training, whatever its size."""
    table, same, columns = _table(compression), ["seed", "train_images"], ["method", "settings", "control"]
    labels = labels_for(predictions, point["dataset"])
    mine = table[(table[columns] == point[columns]).all(axis=1)]
    others = table[_rivals(table) & ~table["method"].isin(GENERAL)]
    told = []
    for _, theirs in others.groupby(["method", "settings"], sort=False):
        own, other = mine.merge(theirs[same], on=same), theirs.merge(mine[same], on=same)
        told += [versus(own, other, predictions, labels)] if len(own) else []
    return told


def the_pipeline(summary: pd.DataFrame) -> pd.Series | None:
    """The row of summary.csv that stands for the pipeline in its default order, or for a student's."""
    settings = with_settings(summary)
    own = (where(settings, {"method": "pipeline", "control": "", "stages": s}) for s in (PIPELINE, STUDENT))
    return next((smallest_claim(summary[rows]) for rows in own if rows.any()), None)


def another_teacher(ours: pd.Series, theirs: pd.Series) -> bool:
    """Whether a rival of a pipeline had a teacher, and not the same: all seeds' networks, or one."""
    distilled = "distill" in str(theirs.get(SETTING + "stages")) or theirs.get(SETTING + "distill")
    distilled = distilled or theirs["method"] in ("searched", "nncodec_pruned")
    return bool(distilled) and ours.get(SETTING + "ensemble") != theirs.get(SETTING + "ensemble")


def narrow_rivals(table: pd.DataFrame) -> pd.Series:
    """The narrow rivals of the pipeline; another notebook's have another training."""
    return table["control"].isin(NARROW) & (table["run"].map(notebook_of) == "06_pipeline")


def _rivals(table: pd.DataFrame) -> pd.Series:
    tools = (table["technique"] == "peer") & (table["run"].map(notebook_of) == "06_pipeline")
    return narrow_rivals(table) | tools


def labels_for(predictions: Path, dataset: str) -> np.ndarray:
    """A data set's test labels, stored among the predictions, or loaded."""
    stored = predictions / labels_name(dataset)
    return read_predictions(stored) if stored.is_file() else labels_of(dataset)


def where(table: pd.DataFrame, conditions: dict[str, Any]) -> pd.Series:
    """Which rows of `with_settings` have these values, or one of several, in columns or settings."""
    chosen = pd.Series(True, table.index)
    for name, value in conditions.items():
        chosen &= _column(table, name).isin(value if isinstance(value, tuple | list) else [value])
    return chosen


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    name = name if name in COLUMNS else SETTING + name
    return table[name] if name in table else pd.Series("", table.index, dtype=object)


def _table(compression: pd.DataFrame) -> pd.DataFrame:
    """Rows with their settings; a budget is that of a uniform width; images that training saw in all."""
    table = with_settings(
        compression.assign(control=compression["control"].fillna("")).reset_index(drop=True)
    )
    for width in ("bits", "levels"):
        budget = _column(table, f"budget_{width}")
        table[SETTING + width] = _column(table, width).where(budget == "", budget)
    dense = table[where(table, {"technique": "baseline", "control": ""})]
    before = table["seed"].map(dense.groupby("seed")["train_images"].max()).fillna(-1)
    return table.assign(all_images=table["train_images"] + before.mask(where(table, FROM_SCRATCH), 0))


def _raced(
    table: pd.DataFrame, ours: dict, theirs: dict, equal: list[str], budget: bool = False
) -> list[tuple[int, int]]:
    """The places of our and their row of each pair of one race."""
    sides = []
    for side, conditions in (("ours", ours), ("theirs", theirs)):
        own = table[where(table, conditions)]
        same = pd.DataFrame({name: _column(own, name) for name in equal}, index=own.index)
        sides.append(
            same.assign(seed=own["seed"], **{side: own.index, f"{side}_bytes": own["artifact_bytes"]})
        )
    both = sides[0].merge(sides[1], on=["seed", *equal]).query("ours != theirs")
    if budget:
        both = both[both["ours_bytes"] <= both["theirs_bytes"]].sort_values("ours_bytes")
        both = both.drop_duplicates("theirs", keep="last")
    return list(both[["ours", "theirs"]].sort_values(["theirs", "ours"]).itertuples(index=False, name=None))


def _of_pipelines(table: pd.DataFrame) -> list[tuple[int, int]]:
    """The pipeline and each other order of the same budgets, as far as that has them; and each rival.

    Only of an equal number of training images and, where both have a teacher, of the same one. A rival meets
    the pipeline's largest file that is no larger on average, or else its smallest.
    """
    joined = table[where(table, {"technique": "pipeline", "control": ""})]
    ours = joined[_column(joined, "stages") == PIPELINE]
    first = {settings: rows.iloc[0] for settings, rows in ours.groupby("settings")}
    sizes = ours.groupby("settings")["artifact_bytes"].mean().sort_values()
    chosen = []
    for place, other in joined[_column(joined, "stages") != PIPELINE].iterrows():
        wanted = json.loads(other["settings"])
        wanted.pop("stages")
        able = [s for s in sizes.index if wanted.items() <= json.loads(s).items()]
        chosen += [(settings, place) for settings in able if not another_teacher(first[settings], other)]
    for _, theirs in table[_rivals(table)].groupby(["method", "settings"], sort=False):
        other = theirs.iloc[0]
        same = sizes[[not another_teacher(first[settings], other) for settings in sizes.index]]
        if other["method"] in GENERAL:  # of whose codes it is
            of = json.loads(other["settings"])["of"]
            of.pop("method")
            same = sizes[sizes.index == settings_json(of)]
        if len(same):
            smaller = same[same <= theirs["artifact_bytes"].mean()]
            chosen += [
                ((smaller.index[-1] if len(smaller) else same.index[0]), place) for place in theirs.index
            ]
    training = ["settings", "seed", "train_images"]
    places = {tuple(row[training]): place for place, row in ours.iterrows()}
    keys = [((settings, *table.loc[place, training[1:]]), place) for settings, place in chosen]
    return [(places[key], place) for key, place in keys if key in places]
