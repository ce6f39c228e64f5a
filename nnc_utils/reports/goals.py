"""The goals of the course, and what the tables say of each."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from nnc_utils.models import Spec
from nnc_utils.over_seeds import SEEDS_OF_A_CLAIM
from nnc_utils.paired import LARGER
from nnc_utils.reports.committed import ALL_PROFILES, RATIO, Tables, baselines
from nnc_utils.reports.headline import rivals_of
from nnc_utils.reports.words import count_seeds, delta_over_seeds, factor, markdown
from nnc_utils.rows import NO_LOSS
from nnc_utils.search import latency
from nnc_utils.tables import PIPELINE, POINT, named_pipeline

Finding = tuple[str, str]  # what was measured, and whether the goal is reached
YES, NO, UNCLAIMED = "yes", "no", "yes, but no claim"
BASELINE, GAIN = 94.0, 0.3  # percent right; points that a converged network may still gain
PREDICTED = 10.0  # percent: mean absolute error of milliseconds
FAMILIES = ("evolution", "reinforce", "gradient")
AGREEMENT = 99.0  # percent of the pictures on which a runtime's class is the artifact's
EAGER = "speedup_eager_fp32"
UNITS = {"size_ratio": "smaller", "fewer": "fewer MACs", RATIO: "the fastest fp32", EAGER: "fp32 in eager"}
ABOUT = f"""“{UNCLAIMED.capitalize()}”: reached by a point that validation did not choose, or by fewer \
than {SEEDS_OF_A_CLAIM} seeds. A speed is that of the first seed's network in int8, one picture, fewest \
threads, in its fastest runtime, and without loss is what is so over the seeds and in that runtime. What \
this profile did not measure a smaller one did, where that is said."""


def goals_text(tables: Tables) -> list[str]:
    """A section on the course's goals, where some point has the seeds that a claim needs."""
    if tables.summary["seeds"].max() < SEEDS_OF_A_CLAIM:
        return []
    lines, others = [], _smaller(tables)
    for goal, find in GOALS.items():
        found = find(tables)
        for other in others if found is None else ():
            if (smaller := find(other)) is not None:
                found = f"in {other.compression.iloc[0]['profile']}: {smaller[0]}", smaller[1]
                break
        measured, reached = found or ("not measured", "–")
        lines.append({"goal": goal, "measured": measured, "reached": reached})
    return ["## Which goals are reached?", f"{ABOUT}\n\n{markdown(lines)}"]


def _smaller(tables: Tables) -> list[Tables]:
    """The committed tables of the smaller profiles beside these, the best first."""
    name = tables.folder.name
    smaller = ALL_PROFILES[ALL_PROFILES.index(name) + 1 :] if name in ALL_PROFILES else ()
    folders = [tables.folder.parent / profile for profile in smaller]
    return [Tables(folder) for folder in folders if (folder / "compression.csv").is_file()]


def _points(tables: Tables) -> pd.DataFrame:
    """The points that are no controls, with times fewer MACs, and the first seed's network in int8."""
    dense = tables.compression[baselines(tables.compression)]["macs"].max()
    points = tables.summary[tables.summary["control"] == ""]
    points = points.assign(fewer=dense / points["macs"]).reset_index(drop=True)
    timed = pd.DataFrame([_in_int8(tables, point) for _, point in points.iterrows()])
    return points.join(timed.reindex(columns=[RATIO, EAGER, "runtime", "runtime_low", "agreement"]))


def _in_int8(tables: Tables, point: pd.Series) -> dict:
    """Speed and loss of a point's first network in its fastest runtime; nothing where it was not timed."""
    same = tables.compression[(tables.compression[POINT] == point[POINT]).all(axis=1)]
    network = same.sort_values("seed").iloc[0]
    timed = tables.timed(network["artifact_sha256"])
    for _, row in timed[timed["precision"] == "int8"].head(1).iterrows():
        low = tables.differences(network, row)["delta_ci_low"]
        return row[[RATIO, EAGER, "runtime", "agreement"]].to_dict() | {"runtime_low": low}
    return {}


def _told(point: pd.Series, column: str) -> str:
    """A point, how much of what is asked it has, and its loss."""
    where = ""
    if column in (RATIO, EAGER):
        where = f", {point['runtime']}: lower end {point['runtime_low']:+.2f}"
    return (
        f"`{point['method']} {point['point']}` {factor(point[column])} {UNITS[column]}, "
        f"{delta_over_seeds(point)} ({count_seeds(point)}{where})"
    )


def _without_loss(
    column: str, least: float, condition: str, *, loss: float = NO_LOSS
) -> Callable[[Tables], Finding | None]:
    """So much of a column without loss, of the points that meet a condition (as for `DataFrame.query`)."""

    def find(tables: Tables) -> Finding | None:
        points = _points(tables).query(condition).dropna(subset=[column]).sort_values(column)
        if points.empty:
            return None
        alike = points["delta_ci_low"] >= loss
        if column in (RATIO, EAGER):
            alike &= (points["runtime_low"] >= loss) & (points["agreement"] >= AGREEMENT)
        enough = points[column] >= least
        good = points[alike & enough]
        claimed = good[(good["headline"] == 1) & (good["seeds"] >= SEEDS_OF_A_CLAIM)]
        if len(claimed):
            return _told(claimed.iloc[-1], column), YES
        told = {"chosen": points[points["headline"] == 1].tail(1), "not chosen": good.tail(1)}
        if good.empty:
            told["nearest with so much"] = points[enough].sort_values("delta_ci_low").tail(1)
            told["most without loss"] = points[alike].tail(1)
        text: dict[str, str] = {}
        for word, rows in told.items():
            for _, point in rows.iterrows():
                text.setdefault(_told(point, column), word)
        told_of = "; ".join(f"{word}: {point}" for point, word in text.items())
        return told_of or "none without loss", UNCLAIMED if len(good) else NO

    return find


def _pairs(
    ours: str, theirs: str, wanted: str, *, at_least: int = 0, fixed: bool = False, bytes_count: bool = True
) -> Callable[[Tables], Finding | None]:
    """Each of theirs (or so many) meets one of ours with a wanted verdict, "beats" or "not below".

    Parameters
    ----------
    ours, theirs : expressions that a method and its point match as a whole; ours are no controls.
    fixed : whether the pair was chosen beforehand, so that ours need not be claimed.
    bytes_count : whether ours must not lie in a larger file.
    """
    allowed = {"beats": ["beats"], "not below": ["beats", "not below", "equal"]}[wanted]

    def find(tables: Tables) -> Finding | None:
        points = tables.summary[tables.summary["control"] == ""]
        known = {f"{point['method']} {point['point']}": point for _, point in points.iterrows()}
        met: dict[str, list[tuple[int, float, str]]] = {}
        for pair in tables.pairs:
            if pair["ours"] not in known or not re.fullmatch(ours, pair["ours"]):
                continue
            if not re.fullmatch(theirs, pair["theirs"]):
                continue
            mine, seeds = known[pair["ours"]], int(pair["seeds"])
            verdict = pair["verdict"] if bytes_count else pair["verdict"].removesuffix(LARGER)
            claim = seeds >= SEEDS_OF_A_CLAIM and (fixed or mine["headline"] == 1)
            reached = NO if verdict not in allowed else YES if claim else UNCLAIMED
            text = (
                f"`{pair['ours']}` ({mine['accuracy_mean']:.2f} %) {pair['verdict']} `{pair['theirs']}`: "
                f"{pair['points']} ({seeds} seed{'s' * (seeds > 1)})"
            )
            low = float(pair["points"].split("[")[1].split(",")[0])
            met.setdefault(pair["theirs"], []).append(([NO, UNCLAIMED, YES].index(reached), low, text))
        if not met:
            return None
        ranks, _, texts = zip(*map(max, met.values()), strict=True)
        needed = at_least or len(met)
        reached = [sum(rank >= least for rank in ranks) >= needed for least in (1, 2)]
        return "; ".join(texts), [NO, UNCLAIMED, YES][sum(reached)]

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
        f"more add {delta_over_seeds(more)} ({count_seeds(more)})"
    )
    reached = whole["accuracy_mean"] >= BASELINE and more["delta_ci_high"] < GAIN
    seeds = min(whole["seeds"], more["seeds"]) >= SEEDS_OF_A_CLAIM
    return text, NO if not reached else YES if seeds else UNCLAIMED


def _recorded(tables: Tables, name: str) -> dict | None:
    """What a run of 05_architecture_search has left beside its rows."""
    found = [record["extra"][name] for record in tables.provenance.values() if name in record["extra"]]
    return found[0] if found else None


def _searches(tables: Tables) -> Finding | None:
    """The median of what each method's searches find, against random search and Optuna's."""
    search = _recorded(tables, "search")
    if search is None:
        return None
    medians = {name: float(np.median(values)) for name, values in search["verified"].items()}
    text = ", ".join(f"`{name}` {median:.2f} %" for name, median in medians.items())
    text += f": medians of {min(map(len, search['verified'].values()))} searches or more"
    own = [medians[name] for name in FAMILIES if name in medians]
    reached = len(own) == len(FAMILIES) and min(own) > medians["random"]
    return text, YES if reached and max(own) > medians.get("optuna_nsga2", 100.0) else NO


def _predictor(tables: Tables) -> Finding | None:
    """The error of the model of latency on networks that it was not fitted to."""
    timed = _recorded(tables, "latency")
    if timed is None:
        return None
    known, unseen = (
        [(Spec.from_json(text), milliseconds) for text, milliseconds in timed[kind]]
        for kind in ("blocks", "networks")
    )
    error = latency.fit(known).error(unseen)
    text = f"{error:.1f} % on {len(unseen)} networks, fitted to {len(known)} blocks"
    return text, YES if error <= PREDICTED else NO


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
    text += f" of {len(said)} (the first paragraph names them)"
    if larger := sum(verdict.endswith(LARGER) for verdict in said):
        text += f"; in a larger file than {larger} of them"
    if set(said) != {"beats"}:
        return text, NO
    every_seed = not any(" of " in about or "another teacher" in about for _, about in told)
    claim = point["headline"] == 1 and point["seeds"] >= SEEDS_OF_A_CLAIM
    return text, YES if every_seed and claim else UNCLAIMED


_INT8 = "method == 'uniform_per_channel' and point in ['bits=7', 'bits=8'] and division == 'closed'"
_PIPELINE = f"method == '{PIPELINE}'"
_QAT = "method == 'qat_lsq' and point == '{}'"
_MACS = {"fixed": True, "bytes_count": False}  # networks of equal MACs
GOALS: dict[str, Callable[[Tables], Finding | None]] = {
    f"Uncompressed: at least {BASELINE} %, and trained on it gains less than {GAIN} points": _converged,
    "Integers without training (7 or 8 bits): 4.5 times smaller without loss": _without_loss(
        "size_ratio", 4.5, _INT8
    ),
    "… 4 times as fast as the fastest fp32": _without_loss(RATIO, 4.0, _INT8),
    "… 20 times as fast as fp32 in eager": _without_loss(EAGER, 20.0, _INT8),
    "Without a gradient step: 22 times smaller without loss": _without_loss(
        "size_ratio", 22.0, "technique == 'quantization' and division == 'closed'"
    ),
    "At NNCodec's points ours, in no more bytes, is not below it": _pairs(
        "hessian_rounding .*", "nncodec .*", "not below", fixed=True
    ),
    "Mixed precision beats the uniform width at the same bytes, twice": _pairs(
        "mixed_precision .*", "uniform_per_channel .*", "beats", at_least=2, fixed=True
    ),
    "Hessian-weighted k-means beats k-means at 2 bits": _pairs(
        "hessian_kmeans .*", "kmeans bits=2", "beats", fixed=True
    ),
    "… and is not below it at 3": _pairs("hessian_kmeans .*", "kmeans bits=3", "not below", fixed=True),
    "Trained with 4 bits: no loss": _without_loss("size_ratio", 1.0, _QAT.format("bits=4")),
    "Trained with 2 bits: at most a point of loss": _without_loss(
        "size_ratio", 1.0, _QAT.format("bits=2"), loss=-1.0
    ),
    "90 % zeros without loss, 12 times smaller": _without_loss(
        "size_ratio", 12.0, "technique == 'pruning' and point.str.fullmatch('sparsity=0.9 (tuned|taught)')"
    ),
    "Channels removed: 4 times fewer MACs without loss": _without_loss(
        "fewer", 4.0, "technique == 'pruning' and fewer > 1"
    ),
    "At no MACs is the best of ours below Torch-Pruning": _pairs(
        "channels_fisher .*", "torch_pruning_.*", "not below", **_MACS
    ),
    "A taught student of ⅛ width beats the student alone": _pairs(
        ".*", r"student_alone width=0\.125", "beats"
    ),
    "A taught student of ¼ width beats the student alone": _pairs(
        ".*", r"student_alone width=0\.25", "beats"
    ),
    "Evolution, REINFORCE and gradients each find more than random search, one more than NSGA-II": _searches,
    f"Milliseconds are predicted within {PREDICTED:g} % on networks never seen": _predictor,
    "A searched network beats the thin ResNet-18 of no fewer MACs": _pairs(
        ".*", "thin_resnet18 .*", "beats", at_least=1, bytes_count=False
    ),
    "The pipeline: 100 times smaller without loss": _without_loss("size_ratio", 100.0, _PIPELINE),
    "… 20 times as fast as the fastest fp32": _without_loss(RATIO, 20.0, _PIPELINE),
    "… 100 times as fast as fp32 in eager": _without_loss(EAGER, 100.0, _PIPELINE),
    "The pipeline beats every rival and other tool at no more bytes": _no_rival,
}
