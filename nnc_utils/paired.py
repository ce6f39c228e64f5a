"""Paired differences: which methods are held against which, on the same test images and seeds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from nnc_utils.peers import GENERAL
from nnc_utils.rows import differences, evidence, labels_of, read_predictions
from nnc_utils.tables import PIPELINE, THIN, labels_name, of_the_pipelines_notebook

# ours, theirs: compared at the same setting; with a codec, our largest file that is no larger
RIVALS = (
    ("hessian_kmeans", "kmeans"),
    ("mixed_precision", "uniform_per_channel"),
    ("qat_lsq", "qat_ste"),
    *((score, "magnitude_global") for score in ("taylor", "obd_fisher", "obd_hessian", "obs_block")),
    ("hessian_rounding", "nncodec"),
    ("hessian_rounding", "hessian_rounding one_sided"),
)
OURS = "channels_fisher"  # what is held against other networks of equal MACs
TAUGHT = ("searched", "nncodec_pruned")  # by a teacher, though their names do not say it
ALONE = ("student_alone", "label_smoothing", "student_longer")  # controls of distillation without a teacher
LARGER = ", in a larger file"


def comparisons(compression: pd.DataFrame, predictions: Path, *, dataset: str) -> pd.DataFrame:
    """Paired differences between methods on the test images, from the stored predictions.

    `RIVALS` at equal settings, `OURS`, fixed before, against Torch-Pruning, random scores and networks that
    were never pruned at equal MACs, each taught student against the same one without a teacher (and with a
    teacher that looked before against one beside), each search's winner against the network by hand of no
    fewer MACs and the same training, `PIPELINE` against the other orders at equal budgets, and its largest
    file that is no larger against each rival (its smallest, where all are larger). Seeds are taken together.

    Parameters
    ----------
    compression : rows of compression.csv of one data set.
    predictions : folder of their evidence.
    dataset : name; its labels are read from the folder, or loaded.

    Returns
    -------
    A row for each pair: both points, their bytes (mean over the seeds), the difference in percentage points
    with its 95 % interval, and the verdict: "beats" (interval above 0), "not below" (upper end at least 0),
    "equal" (no picture tells them apart) or "below", and "in a larger file" where ours takes over 1 % more.
    """
    labels = labels_for(predictions, dataset)
    arms = (compression["method"] + " " + compression["control"].fillna("")).str.strip()
    lines, pairs, together = [], [], {}
    for ours, theirs in RIVALS:
        own = compression[arms == ours].sort_values("artifact_bytes")
        for _, other in compression[arms == theirs].iterrows():
            found = own[own["seed"] == other["seed"]]
            if ours == "hessian_rounding":  # settings differ: the largest file that is not larger
                found = found[found["artifact_bytes"] <= other["artifact_bytes"]].tail(1)
            else:
                found = found[found["point"].map(_setting) == other["point"]]
            pairs += [(mine, other) for _, mine in found.iterrows()]
    pairs += _against_equal_macs(compression) + _against_alone(compression) + _against_thin(compression)
    pairs += _looked_before(compression)
    for mine, other in pairs + _against_pipeline(compression):
        names = tuple(f"{row['method']} {row['point']}" for row in (mine, other))
        together.setdefault(names, []).append((mine, other))
    for (ours, theirs), found in together.items():
        sides = [pd.DataFrame(side) for side in zip(*found, strict=True)]
        told = versus(*sides, predictions, labels)
        lines.append({"ours": ours, "bytes": told.pop("bytes"), "theirs": theirs, **told})
    return pd.DataFrame(lines)


def versus(
    ours: pd.DataFrame, theirs: pd.DataFrame, predictions: Path, labels: np.ndarray
) -> dict[str, str | int]:
    """Rows of the same seeds side by side: bytes, paired difference, seeds, verdict."""
    delta = _between(ours, theirs, predictions, labels)
    low, high = delta["delta_ci_low"], delta["delta_ci_high"]
    kind = "equal" if low == high == 0 else "beats" if low > 0 else "not below" if high >= 0 else "below"
    sizes = [round(side["artifact_bytes"].mean()) for side in (ours, theirs)]
    about = {"bytes": sizes[0], "their bytes": sizes[1], "points": in_points(delta), "seeds": len(ours)}
    return about | {"verdict": kind + LARGER * bool(sizes[0] > 1.01 * sizes[1])}


def gaps(compression: pd.DataFrame, predictions: Path, *, dataset: str) -> pd.DataFrame:
    """What share of the gap between a student alone and the uncompressed network its teacher closes.

    Parameters
    ----------
    compression, predictions, dataset : as for `comparisons`.

    Returns
    -------
    A row for each taught student, over its seeds: the gap to the uncompressed network in percentage points,
    what the teacher gained, and the share in percent; "no gap" where the gap's interval holds 0.
    """
    labels = labels_for(predictions, dataset)
    plain = (compression["technique"] == "baseline") & (compression["control"].fillna("") == "")
    whole = compression[plain].set_index("seed")
    together: dict[str, list] = {}
    for mine, alone in _against_alone(compression):
        taught = not mine["control"]  # not by a shuffled teacher
        if taught and alone["control"] == "student_alone" and mine["seed"] in whole.index:
            name = f"{mine['method']} {mine['point']}"
            together.setdefault(name, []).append((mine, alone, whole.loc[mine["seed"]]))
    lines = []
    for name, found in together.items():
        mine, alone, dense = (pd.DataFrame(side) for side in zip(*found, strict=True))
        gap = _between(dense, alone, predictions, labels)
        gained = _between(mine, alone, predictions, labels)
        share = 100 * gained["accuracy_delta"] / gap["accuracy_delta"] if gap["delta_ci_low"] > 0 else None
        closed = "no gap" if share is None else f"{share:.0f} %"
        lines.append({"student": name, "gap": in_points(gap), "gained": in_points(gained), "closed": closed})
    return pd.DataFrame(lines)


def labels_for(predictions: Path, dataset: str) -> np.ndarray:
    """A data set's test labels, stored among the predictions, or loaded."""
    stored = predictions / labels_name(dataset)
    return read_predictions(stored) if stored.is_file() else labels_of(dataset)


def _between(
    ours: pd.DataFrame, theirs: pd.DataFrame, predictions: Path, labels: np.ndarray
) -> dict[str, float]:
    """The paired difference between rows of the same seeds."""
    read = [
        [read_predictions(predictions / evidence(sha256)) for sha256 in side["artifact_sha256"]]
        for side in (ours, theirs)
    ]
    return differences(compressed=read[0], reference=read[1], labels=labels)


def _against_alone(compression: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """Each taught student and each without a teacher, of the same width, seed and number of pictures."""
    students = compression[compression["technique"] == "distillation"]
    if students.empty:
        return []
    students = students.assign(
        control=students["control"].fillna(""),
        width=students["point"].str.extract(r"width=([^,]+)", expand=False).astype(float),
    )
    pairs = []
    for _, rows in students.dropna(subset=["width"]).groupby(["seed", "width", "train_images"]):
        without = rows["control"].isin(ALONE)
        for _, alone in rows[without].iterrows():
            pairs += [(mine, alone) for _, mine in rows[~without].iterrows()]
    return pairs


def _looked_before(compression: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """Each student whose teacher had looked before, and the same one that had its teacher beside it."""
    students = compression[compression["technique"] == "distillation"]
    same = ["seed", "method", "point", "train_images"]
    beside = {tuple(row[same]): row for _, row in students.iterrows()}
    cached = students[students["point"].str.contains(",cached", na=False)]
    uncached = cached.assign(point=cached["point"].str.replace(",cached", ""))
    keys = [tuple(row[same]) for _, row in uncached.iterrows()]
    rows = (row for _, row in cached.iterrows())
    return [(mine, beside[key]) for mine, key in zip(rows, keys, strict=True) if key in beside]


def _against_equal_macs(compression: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """`OURS`, with and without mending, and each network of equal MACs, both in floats or both in int8.

    In one cut against Torch-Pruning with the same training and random scores in the same way; in one or more
    against networks that were never pruned with as many pictures as ours and the baseline's.
    """
    found = compression.assign(
        control=compression["control"].fillna(""),
        macs_point=compression["point"].str.extract(r"(macs=\S+)", expand=False),
        training=compression["point"].str.extract(r"(tuned|taught)", expand=False).fillna(""),
        int8=compression["point"].str.endswith(" int8"),
    )
    plain = found[(found["technique"] == "baseline") & (found["control"] == "")]
    before, pairs = dict(zip(plain["seed"], plain["train_images"], strict=True)), []
    for (seed, *_), rows in found.dropna(subset=["macs_point"]).groupby(["seed", "macs_point", "int8"]):
        theirs = rows["method"].str.startswith("torch_pruning_") & (rows["control"] == "")
        never_cut = rows["control"].isin(("from_scratch", "small_dense"))
        for _, mine in rows[(rows["method"] == OURS) & (rows["control"] == "")].iterrows():
            more = rows["train_images"] - mine["train_images"]
            random = (rows["control"] == "random") & (rows["point"] == mine["point"])
            alike = (theirs & (rows["training"] == mine["training"]) | random) & (more == 0)
            alike &= "iterative" not in mine["point"]
            if mine["training"]:  # in one run the notebook gives both the same pictures
                alike |= never_cut & ((rows["run"] == mine["run"]) | (more == before.get(seed)))
            pairs += [(mine, other) for _, other in rows[alike].iterrows()]
    return pairs


def _against_thin(compression: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """The winner of a search and the network by hand of its run and constraint, both taught or neither."""
    control = compression["control"].fillna("")
    by_hand = compression[control == "thin_resnet18"]
    if by_hand.empty:
        return []
    hands = {(row["run"], row["point"]): row for _, row in by_hand.iterrows()}
    others = [(row, (row["run"], row["point"])) for _, row in compression[control == ""].iterrows()]
    return [(row, hands[where]) for row, where in others if where in hands]


def _against_pipeline(compression: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """The pipeline and each other order of the same budgets, as far as that has them; and each rival.

    Only of an equal number of training pictures and, where both have a teacher, of the same one.

    A rival is held against the pipeline's largest file that is no larger on average, or else its smallest.
    """
    control = compression["control"].fillna("")
    joined = compression[(compression["technique"] == "pipeline") & (control == "")]
    ours = joined[joined["method"] == PIPELINE]
    sizes = ours.groupby("point")["artifact_bytes"].mean().sort_values()
    pairs = [
        (point, row)
        for _, row in joined[joined["method"] != PIPELINE].iterrows()
        for point in sizes.index
        if set(row["point"].split(",")) <= set(point.split(",")) and not another_teacher(point, row)
    ]
    if ours.empty:
        return []
    peers = of_the_pipelines_notebook(compression) & (compression["technique"] == "peer")
    for _, rows in compression[thin_rivals(compression) | peers].groupby(["method", "point"], sort=False):
        same = sizes[[not another_teacher(point, rows.iloc[0]) for point in sizes.index]]
        if rows.iloc[0]["method"] in GENERAL:  # of whose codes it is
            same = sizes[sizes.index == rows.iloc[0]["point"]]
        if same.empty:
            continue
        able = same[same <= rows["artifact_bytes"].mean()]
        point = able.index[-1] if len(able) else same.index[0]
        pairs += [(point, row) for _, row in rows.iterrows()]
    found = {(row["point"], row["seed"]): row for _, row in ours.iterrows()}
    pairs = [(found[p, row["seed"]], row) for p, row in pairs if (p, row["seed"]) in found]
    return [(mine, other) for mine, other in pairs if mine["train_images"] == other["train_images"]]


def another_teacher(point: str, other: pd.Series) -> bool:
    """Whether a rival had a teacher, and not that of the pipeline's point: all seeds' networks, or one."""
    taught = "distill" in other["method"] or other["method"] in TAUGHT
    return taught and ("ensemble" in point.split(",")) != ("ensemble" in other["point"].split(","))


def _setting(point: str) -> str:
    """ "budget=3bit bn" as "bits=3 bn": one width for all layers, whose bytes are the budget."""
    return re.sub(r"budget=(\d+)(bit|level)", r"\2s=\1", point)


def thin_rivals(compression: pd.DataFrame) -> pd.Series:
    """The thin rivals of the pipeline; another notebook's have another training."""
    return compression["control"].fillna("").isin(THIN) & of_the_pipelines_notebook(compression)


def in_points(delta: dict[str, float]) -> str:
    """A difference of `rows.differences` and its interval as text, in percentage points."""
    return "{accuracy_delta:+.2f} [{delta_ci_low:+.2f}, {delta_ci_high:+.2f}]".format(**delta)
