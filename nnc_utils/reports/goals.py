"""What was to be reached, set before it was measured, and what the tables say of it."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from nnc_utils.over_seeds import SEEDS_OF_A_CLAIM
from nnc_utils.paired import LARGER, OURS
from nnc_utils.reports.committed import RATIO, Tables, baselines
from nnc_utils.reports.headline import rivals_of
from nnc_utils.reports.words import count_seeds, delta_over_seeds, factor, markdown
from nnc_utils.rows import NO_LOSS
from nnc_utils.tables import PIPELINE, POINT, named_pipeline

Finding = tuple[str, str]  # what was measured, and whether the goal is reached
YES, NO, UNCLAIMED = "yes", "no", "not by what was claimed"
BASELINE, GAIN = 94.0, 0.3  # percent right; points that a converged network may still gain


def goals_text(tables: Tables) -> list[str]:
    """A section on the course's goals, where some point has the seeds that a claim needs."""
    if tables.summary["seeds"].max() < SEEDS_OF_A_CLAIM:
        return []
    lines = []
    for goal, find in GOALS.items():
        measured, reached = find(tables) or ("not measured in this profile", "–")
        lines.append({"goal": goal, "measured": measured, "reached": reached})
    about = (
        f"Goals set beforehand. “{UNCLAIMED.capitalize()}”: a point that validation did not choose reaches "
        "it, so the test set chose. A speed is that of int8 in its fastest runtime, one picture, fewest "
        "threads.\n\n"
    )
    return ["## Which goals are reached?", about + markdown(lines)]


def _points(tables: Tables) -> pd.DataFrame:
    """The points that are no controls, with times fewer MACs and the int8 speed-ups of the first seed."""
    dense = tables.compression[baselines(tables.compression)]["macs"].max()
    points = tables.summary[tables.summary["control"] == ""]
    points = points.assign(fewer=dense / points["macs"])
    int8 = (tables.latency["precision"] == "int8") & (tables.latency["batch"] == 1)
    int8 &= tables.latency["threads"] == tables.latency["threads"].min()
    fastest = tables.latency[int8].groupby(POINT)[[RATIO, "speedup_eager_fp32"]].max()
    return points.merge(fastest, how="left", on=POINT)


def _told(point: pd.Series, column: str) -> str:
    """A point, how much of what is asked it has, and its loss."""
    name = f"`{point['method']} {point['point']}`"
    about = {
        "size_ratio": "smaller",
        "fewer": "fewer MACs",
        RATIO: "the fastest fp32",
        "speedup_eager_fp32": "fp32 in eager",
    }
    return f"{name} {factor(point[column])} {about[column]}, {delta_over_seeds(point)} ({count_seeds(point)})"


def _without_loss(
    column: str, least: float, condition: str, *, loss: float = NO_LOSS
) -> Callable[[Tables], Finding | None]:
    """So much of a column without loss, of the points that meet a condition (as for `DataFrame.query`)."""

    def find(tables: Tables) -> Finding | None:
        points = _points(tables).query(condition).dropna(subset=[column]).sort_values(column)
        if points.empty:
            return None
        enough = points[points[column] >= least]
        good = enough[enough["delta_ci_low"] >= loss]
        claimed = good[(good["headline"] == 1) & (good["seeds"] >= SEEDS_OF_A_CLAIM)]
        if len(claimed):
            return _told(claimed.iloc[-1], column), YES
        told = {"claimed": points[points["headline"] == 1].tail(1), "not claimed": good.tail(1)}
        if good.empty:
            told["nearest with so much"] = enough.sort_values("delta_ci_low").tail(1)
            told["most without loss"] = points[points["delta_ci_low"] >= loss].tail(1)
        text: dict[str, str] = {}
        for word, rows in told.items():
            for _, point in rows.iterrows():
                text.setdefault(_told(point, column), word)
        told_of = "; ".join(f"{word}: {point}" for point, word in text.items())
        return told_of or "none without loss", UNCLAIMED if len(good) else NO

    return find


def _pairs(ours: str, theirs: str, wanted: str, at_least: int = 0) -> Callable[[Tables], Finding | None]:
    """Each of theirs (or so many) meets one of ours with a wanted verdict, "beats" or "not below"."""

    def find(tables: Tables) -> Finding | None:
        met: dict[str, list] = {}
        for pair in tables.pairs:
            if pair["ours"].startswith(ours) and pair["theirs"].startswith(theirs):
                met.setdefault(pair["theirs"], []).append(pair)
        if not met:
            return None
        allowed = {"beats": ["beats"], "not below": ["beats", "not below", "equal"]}[wanted]
        reached, told = 0, []
        for pairs in met.values():
            pairs.sort(key=lambda pair: float(pair["points"].split("[")[1].split(",")[0]))  # by the lower end
            good = [pair for pair in pairs if pair["verdict"] in allowed]
            reached += bool(good)
            best = (good or pairs)[-1]
            told.append(
                f"`{best['ours']}` {best['verdict']} `{best['theirs']}`: {best['points']} "
                f"({best['seeds']} seed{'s' * (best['seeds'] != '1')})"
            )
        return "; ".join(told), YES if reached >= (at_least or len(met)) else NO

    return find


def _converged(tables: Tables) -> Finding | None:
    """The uncompressed network, and what as much training as the pipeline's adds to it."""
    whole = tables.summary[baselines(tables.summary)]
    more = tables.summary[(tables.summary["technique"] == "baseline") & (tables.summary["control"] != "")]
    more = more[more["method"] == "dense_finetuned"]
    if whole.empty or more.empty:
        return None
    whole, more = whole.iloc[0], more.iloc[0]
    rows = tables.compression[(tables.compression[POINT] == more[POINT]).all(axis=1)]
    text = (
        f"{whole['accuracy_mean']:.2f} % ({count_seeds(whole)}); {rows['train_images'].max():,} pictures "
        f"more add {delta_over_seeds(more)}"
    )
    return text, YES if whole["accuracy_mean"] >= BASELINE and more["delta_mean"] < GAIN else NO


def _no_rival(tables: Tables) -> Finding | None:
    """The pipeline against each rival and other tool at no more bytes."""
    point = named_pipeline(tables.summary)
    told = [] if point is None else rivals_of(tables, point)
    if not told:
        return None
    said = [verdict for verdict, _ in told]
    words = {"beats": "above", "equal": "equal to", "not below": "undecided against", "below": "below"}
    counts = {word: sum(v.removesuffix(LARGER) == kind for v in said) for kind, word in words.items()}
    text = f"`{PIPELINE} {point['point']}`: " + ", ".join(f"{w} {n}" for w, n in counts.items() if n)
    larger = sum(verdict.endswith(LARGER) for verdict in said)
    text += f" of {len(said)}; in the larger file than {larger} of them" * bool(larger)
    return text, YES if set(said) == {"beats"} else NO


_PIPELINE = f"method == '{PIPELINE}'"
GOALS: dict[str, Callable[[Tables], Finding | None]] = {
    f"Uncompressed: at least {BASELINE} %, and trained on it gains less than {GAIN} points": _converged,
    "Int8 without training: 4.5 times smaller without loss": _without_loss(
        "size_ratio", 4.5, "method == 'uniform_per_channel' and division == 'closed'"
    ),
    "Int8 without training: 4 times as fast as the fastest fp32": _without_loss(
        RATIO, 4.0, "method == 'uniform_per_channel' and division == 'closed'"
    ),
    "Int8 without training: 20 times as fast as fp32 in eager": _without_loss(
        "speedup_eager_fp32", 20.0, "method == 'uniform_per_channel' and division == 'closed'"
    ),
    "Without a gradient step: 22 times smaller without loss": _without_loss(
        "size_ratio", 22.0, "technique == 'quantization' and division == 'closed'"
    ),
    "At NNCodec's points none of ours in no more bytes is below it": _pairs(
        "hessian_rounding", "nncodec", "not below"
    ),
    "Mixed precision beats the uniform width at the same bytes, twice": _pairs(
        "mixed_precision", "uniform_per_channel", "beats", at_least=2
    ),
    "Hessian-weighted k-means beats k-means at 2 bits": _pairs("hessian_kmeans", "kmeans bits=2", "beats"),
    "… and is not below it at 3": _pairs("hessian_kmeans", "kmeans bits=3", "not below"),
    "Trained with 4 bits: no loss": _without_loss(
        "size_ratio", 1.0, "method == 'qat_lsq' and point.str.startswith('bits=4')"
    ),
    "Trained with 2 bits: at most a point of loss": _without_loss(
        "size_ratio", 1.0, "method == 'qat_lsq' and point.str.startswith('bits=2')", loss=-1.0
    ),
    "90 % zeros without loss, 12 times smaller": _without_loss(
        "size_ratio", 12.0, "technique == 'pruning' and point.str.contains('sparsity=0.9 ')"
    ),
    "Channels removed: 4 times fewer MACs without loss": _without_loss(
        "fewer", 4.0, "technique == 'pruning' and fewer > 1"
    ),
    "At no MACs is the best of ours below Torch-Pruning": _pairs(OURS, "torch_pruning_", "not below"),
    "A teacher's student of ⅛ width beats the student alone": _pairs(
        "", "student_alone width=0.125", "beats"
    ),
    "A teacher's student of ¼ width beats the student alone": _pairs("", "student_alone width=0.25", "beats"),
    "A searched network beats the thin ResNet-18": _pairs("", "thin_resnet18", "beats", at_least=1),
    "The pipeline: 100 times smaller without loss": _without_loss("size_ratio", 100.0, _PIPELINE),
    "The pipeline: 20 times as fast as the fastest fp32 without loss": _without_loss(RATIO, 20.0, _PIPELINE),
    "The pipeline: 100 times as fast as fp32 in eager without loss": _without_loss(
        "speedup_eager_fp32", 100.0, _PIPELINE
    ),
    "The pipeline beats every rival and other tool at no more bytes": _no_rival,
}
