"""Results as a notebook or a reader wants them.

Rows (`nnc_utils.rows`) and tables (`nnc_utils.tables`) are built elsewhere and offered here; here
tables become text: the headline table, report.md and the README between its markers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from nnc_utils.over_seeds import SEEDS_OF_A_CLAIM, chosen_over_seeds
from nnc_utils.paired import (
    LARGER,
    OURS,
    THIN,
    comparisons,
    gaps,
    in_points,
    labels_for,
    thin_rivals,
    versus,
)
from nnc_utils.peers import GENERAL
from nnc_utils.provenance import code_sha256, root, write_atomically
from nnc_utils.publishing import ATTEMPT, publish
from nnc_utils.rows import (
    AFTER,
    AGAIN,
    APART,
    NO_LOSS,
    CompressionRow,
    LatencyRow,
    SummaryRow,
    compression_row,
    differences,
    evidence,
    label,
    latency_rows,
    read_predictions,
    timed_evidence,
)
from nnc_utils.tables import (
    POINT,
    ResultError,
    Run,
    artifact_name,
    committed_runs,
    labels_name,
    named_pipeline,
    of_the_pipelines_notebook,
    read_rows,
    read_run,
    summarize,
    to_frame,
)

__all__ = [
    "AFTER",
    "AGAIN",
    "APART",
    "CompressionRow",
    "LatencyRow",
    "ResultError",
    "Run",
    "SummaryRow",
    "committed_profile",
    "comparisons",
    "compression_row",
    "gaps",
    "holding",
    "label",
    "latency_rows",
    "publish",
    "read_run",
    "report",
    "report_text",
    "summarize",
    "table",
    "twice",
    "update_readme",
    "verdict",
]

PROFILES = ("full", "standard", "quick")  # what the README shows, the best first
SMALLEST = PROFILES[-1]  # whose network is trained least: what it says may change
ALL_PROFILES = ("full", "standard", "medium", "quick")
RATIO = "speedup_best_fp32"
RATIOS = {RATIO: "the fastest fp32 runtime", "speedup_eager_fp32": "fp32 in eager"}
FIGURES = {  # in figures/ of a profile, and what they show
    "headline": "Size against accuracy, and accuracy against milliseconds",
    "waterfall": "Bytes, milliseconds and accuracy after each stage of the pipeline",
}
DELTAS = ("delta_mean", "delta_ci_low", "delta_ci_high")  # over the seeds, of summary.csv
WORDS = {  # what stands in the column "network"; the number is the notebook's that teaches it
    "train": "the fp32 network (01)",
    "uniform_per_channel": "weights rounded, one scale a channel (02)",
    "hessian_rounding": "weights rounded to where loss and bits cost least (02)",
    "qat_lsq": "trained with its rounding, the scales as well (02)",
    "qat_ste": "trained with its rounding (02)",
    "kmeans": "weights from a codebook (02)",
    "hessian_kmeans": "weights from a codebook that spares what the loss feels (02)",
    "mixed_precision": "bits for each layer within a budget (02)",
    "magnitude_global": "the smallest weights set to zero (03)",
    "obs_block": "weights set to zero, the others correct it (03)",
    "channels_fisher": "channels removed that the loss misses least (03)",
    "kd": "a narrower network, taught by soft labels (04)",
    "dkd": "a narrower network, taught by soft labels in two parts (04)",
    "kd_attention": "a narrower network, taught by soft labels and attention maps (04)",
    "kd_hints": "a narrower network, taught by soft labels and features (04)",
    "reinforce": "an architecture found by REINFORCE (05)",
    "evolution": "an architecture found by evolution (05)",
    "gradient": "an architecture found by gradients (05)",
    "random": "an architecture found by random search (05)",
    "optuna_nsga2": "an architecture found by Optuna (05)",
    "prune_distill_quantize": "the pipeline: channels removed, taught, rounded (06)",
    "small_dense": "a plain thin ResNet-18, trained as long: the rival of the pipeline (06), of cuts (03)",
    "small_dense_qat4": "a plain thin ResNet-18, trained as long, at last with weights of 4 bits (06)",
    "small_dense_distilled": "a plain thin ResNet-18, taught and rounded (06)",
    "searched": "the architecture of 05, taught and rounded (06)",
    "bits": "of a weight",
    "rate": "the price of a bit, in loss",
    "macs": "how many times fewer multiplications",
    "width": "share of the channels",
    "sparsity": "share of zeros",
    "ensemble": "taught by the networks of all seeds together",
    "cached": "the teacher looked before",
    "T": "temperature of the soft labels",
    "alpha": "their weight",
    "beta": "weight of the features or maps",
    "bn": "batch-norm re-estimated",
    "float": "activations stay floats",
    "mended": "the weights that read a removed channel adjusted",
    "tuned": "trained on by labels",
    "taught": "trained on by a teacher",
}
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"
CHOICE = """Validation pictures chose what is claimed: in each division of a run the smallest file that is \
likely without loss on the test set, of networks that lost channels the one with the fewest MACs; of \
students of one width, and of searched networks, the best of the first seed. Whether it holds, the test \
set says."""
TOGETHER = f"""Where {SEEDS_OF_A_CLAIM} seeds looked at the same points, they chose together, one point in \
each technique and division, networks that lost channels apart: the first whose lower end, over the seeds, \
is {NO_LOSS} or more (of equal files the first by name); where there is none, the nearest that they do not \
call a loss (`over_seeds.chosen_over_seeds`)."""
HISTORY = "history.md"  # what the test set had seen before what is claimed was made, in the authors' words
STALE = " †"
STALE_NOTE = "† measured with older code than the one in this repository; `RERUN=stale` measures it again."


class Tables:
    """The committed tables of one profile."""

    def __init__(self, profile_dir: Path) -> None:
        self.folder = Path(profile_dir)
        if not (self.folder / "compression.csv").is_file():
            raise ResultError(f"{self.folder} has no tables yet: run the benchmark of this profile first")
        kinds = {"compression": CompressionRow, "latency": LatencyRow, "summary": SummaryRow}
        frames = {name: to_frame(read_rows(self.folder / f"{name}.csv", k), k) for name, k in kinds.items()}
        self.compression, latency, self.summary = frames.values()
        self.latency, self.again = latency[latency["control"] != AGAIN], latency[latency["control"] == AGAIN]
        self.provenance = json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))
        self.stale = {run for run, record in self.provenance.items() if _older(record)}

    def networks(self) -> pd.DataFrame:
        """The rows of the headline, of each the first seed.

        Each baseline, what a claim rests on, what was timed in integers in more than one runtime, the
        pipeline and its thin rivals.
        """
        baseline = _baselines(self.compression)
        runtimes = self.latency[self.latency["precision"] == "int8"].groupby("artifact_sha256")["runtime"]
        spread = self.compression["artifact_sha256"].map(runtimes.nunique()).fillna(0) > 1
        rivals = thin_rivals(self.compression)
        point = named_pipeline(self.summary)
        pipeline = False if point is None else (self.compression[POINT] == point[POINT]).all(axis=1)
        claimed = self.compression["headline"] == 1
        chosen = self.compression[baseline | spread | rivals | pipeline | claimed]
        chosen = chosen.assign(first=~baseline).sort_values(["first", "size_ratio", "seed"], kind="stable")
        return chosen.drop_duplicates(["dataset", "model", "technique", "method", "point", "control"])

    def timed(self, sha256: str) -> pd.DataFrame:
        """An artifact at batch 1 with the fewest threads: in eager, and in the fastest of each precision."""
        rows = self.latency[(self.latency["artifact_sha256"] == sha256) & (self.latency["batch"] == 1)]
        rows = rows[(rows["threads"] == rows["threads"].min()) & (rows["precision"] != "s8s8")]
        rows = rows.assign(other=rows["runtime"] != "eager").sort_values("p50_ms", kind="stable")
        rows = rows[rows["p50_ms"].notna() & (~rows["other"] | ~rows.duplicated(["precision", "other"]))]
        return rows.sort_values(["other", "precision"], kind="stable")

    def why(self, row: pd.Series) -> str:
        """Why a row has no numbers."""
        missing = self.provenance[row["run"]]["extra"].get("missing", {})
        return missing.get(f"{row['runtime']} {row['precision']}", "not installed")

    def differences(self, row: pd.Series, timed: pd.Series | None = None) -> dict[str, float]:
        """Accuracy against the reference on the test images, in eager or as a row of latency.csv has it."""
        folder = self.folder / "predictions"
        own = evidence(row["artifact_sha256"]) if timed is None else timed_evidence(timed)
        return differences(
            compressed=[read_predictions(folder / own)],
            reference=[read_predictions(folder / evidence(row["reference_sha256"]))],
            labels=read_predictions(folder / labels_name(row["dataset"])),
        )


def _baselines(compression: pd.DataFrame) -> pd.Series:
    return (compression["technique"] == "baseline") & (compression["control"] == "")


def _older(record: dict) -> bool:
    notebook = root() / "notebooks" / f"{record['notebook']}.ipynb"
    return notebook.is_file() and code_sha256(notebook) != record["code_sha256"]


def markdown(rows: list[dict[str, str]]) -> str:
    """A table whose columns are the keys of its rows."""
    if not rows:
        return "_none_"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None or pd.isna(value) else format(value, form)


def _times(value: float | None) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _over_seeds(point: pd.Series) -> str:
    ends = {column: point[column] for column in ("delta_ci_low", "delta_ci_high")}
    return in_points({"accuracy_delta": point["delta_mean"], **ends})


def _network(row: pd.Series) -> str:
    control = f"({row['control']})" if row["control"] else ""
    return " ".join(str(part) for part in (row["model"], row["method"], row["point"], control) if part)


def table(profile_dir: Path) -> str:
    """The headline table as Markdown: what the networks weigh, how right they are, how fast, and where.

    A line is one network in one runtime; its accuracy is that of the code that was timed, or eager's where a
    runtime in fp32 was seen to compute the same.
    """
    tables = Tables(profile_dir)
    lines = []
    for _, network in tables.networks().iterrows():
        is_baseline = network["artifact_sha256"] == network["reference_sha256"]
        size = {
            "file": _megabytes(network["artifact_bytes"]),
            "smaller": _times(network["size_ratio"]) + " (simulated)" * bool(network["simulated"]),
        }
        timed = tables.timed(network["artifact_sha256"])
        for _, row in timed.iterrows() if len(timed) else [(None, None)]:
            where = "eager, not timed" if row is None else f"{row['runtime']} {row['precision']}"
            runs = {network["run"]} | ({row["run"]} if row is not None else set())
            delta = tables.differences(network, row)
            accuracy = network["accuracy"] if row is None else row["accuracy"]
            line = {"network": _network(network) + (STALE if runs & tables.stale else ""), "runs in": where}
            line |= {"accuracy": f"{accuracy:.2f}"}
            itself = is_baseline and (row is None or pd.isna(row["agreement"]))
            line["Δ points [95 %]"] = "reference" if itself else in_points(delta)
            line["no loss"] = "–" if itself else _no_loss(delta["delta_ci_low"], delta["delta_ci_high"])
            time = {} if row is None else row
            line |= size | {"runtime loads": _megabytes(time.get("runtime_bytes"))}
            line["ms"] = _number(time.get("p50_ms"), ".3f")
            line["× eager fp32"] = _times(time.get("speedup_eager_fp32"))
            line["× fastest fp32"] = _times(time.get("speedup_best_fp32"))
            lines.append(line)
    return markdown(lines) + "\n\n" + _legend(tables)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _megabytes(count: float | None) -> str:
    return "–" if count is None or pd.isna(count) else f"{count / 1e6:.2f} MB"


def _no_loss(low: float, high: float) -> str:
    """Of an interval: "no" where there is a loss, "not shown" where these pictures are too few to tell."""
    return "yes" if low >= NO_LOSS else "no" if high < 0 else "not shown"


def _legend(tables: Tables) -> str:
    first = tables.compression.iloc[0]
    images, seeds, fewest = first["total"], tables.summary["seeds"].max(), tables.summary["seeds"].min()
    text = (
        f"Profile {first['profile']}: {first['dataset']}, {images:,} test images, "
        f"{f'{fewest} to ' * bool(fewest < seeds)}{seeds} seed{'s' if seeds > 1 else ''}. "
        f"Δ is the paired difference to the fp32 network in percentage points with its 95 % interval; "
        f"“no loss” means that its lower end is at least {NO_LOSS}; “no”, that it is not and all of it is "
        "below 0."
    )
    if seeds > 1:
        text += " A line is the first seed's network; the report's rankings are over all seeds."
    baseline = tables.compression[_baselines(tables.compression)].iloc[0]
    epochs = tables.provenance[baseline["run"]]["parameters"].get("epochs")
    text += (
        f" The fp32 network saw {baseline['train_images']:,} pictures"
        + (f" ({epochs:g} epochs)" if epochs else "")
        + ". “Smaller” is about the file, which is decoded before it runs: what the runtime then loads "
        "stands beside it. Weights that stay floats are stored in 16 bits, so twice smaller than in fp32."
    )
    if len(tables.latency):
        timed = tables.latency[tables.latency["batch"] == 1]
        threads = timed["threads"].min()
        hardware = tables.provenance.get(timed.iloc[0]["run"], {}).get("hardware", {}) if len(timed) else {}
        text += (
            f" ms: median for one picture, {threads} thread{'s' if threads > 1 else ''}"
            f"{', ' + str(hardware['cpu']) if 'cpu' in hardware else ''}; × is the median of the ratios "
            "within a round, not the ratio of these medians. Of a runtime in fp32 the first thousand "
            "pictures are compared with eager's; where they agree, its accuracy is eager's."
        )
    if tables.networks()["simulated"].any():
        text += (
            " Simulated: no runtime computes with what is stored (masks, codebooks, codes of fewer than 8 "
            "bits, or with activations in floats); the size is the file's, the time that of the int8 or fp32 "
            "network it decodes to."
        )
    named = tables.networks()[["method", "point"]].agg(" ".join, axis=1)
    shown = re.split(r"[ ,=]+", " ".join(named))
    known = [f"`{word}`: {meaning}" for word, meaning in WORDS.items() if word in shown]
    text += ("\n\n" + "; ".join(known) + ".") * bool(known)
    return text + ("\n\n" + STALE_NOTE if tables.stale else "")


def _claims(tables: Tables) -> str:
    """What was chosen on validation, before the test set was looked at, and whether it holds there."""
    together = chosen_over_seeds(committed_runs(tables.folder))
    claims = [CHOICE, TOGETHER] if together else [CHOICE]
    if (history := tables.folder / HISTORY).is_file():
        claims.append(history.read_text(encoding="utf-8").strip())
    equal_macs = [pair for pair in _compared(tables, comparisons) if pair["ours"].startswith(OURS)]
    for _, network in tables.networks().iterrows():
        if network["headline"] != 1 or network["artifact_sha256"] == network["reference_sha256"]:
            continue
        same = tables.summary
        for column in ("dataset", "technique", "method", "point", "control"):
            same = same[same[column] == network[column]]
        point = same.iloc[0]
        text = (
            f"**{_network(network)}** ({network['division']} division): a file "
            f"{_times(point['size_ratio'])} smaller at {_over_seeds(point)} points over {_seeds(point)}: "
            + f"{_in_words(point['delta_ci_low'], point['delta_ci_high'])}."
        )
        if seen := together.get(tuple(network[column] for column in POINT)):
            near = "" if seen.low >= NO_LOSS else ", the nearest: none is likely without loss"
            text += f" On validation {seen.mean:+.2f} [{seen.low:+.2f}, {seen.high:+.2f}]{near}."
        same_kind = [tables.summary[c] == network[c] for c in ("dataset", "technique", "division")]
        short = tables.summary[np.logical_and.reduce(same_kind) & (tables.summary["control"] == ATTEMPT)]
        if fell_short := (short["no_loss"] == 0).sum():
            text += (
                f" Earlier attempts of its technique that fell short on the test set (control `{ATTEMPT}`): "
                f"{fell_short}."
            )
        rivals = [pair for pair in equal_macs if pair["ours"] == f"{network['method']} {network['point']}"]
        text += _verdicts(
            (pair["verdict"], f"`{pair['theirs']}` ({pair['points']}, {pair['seeds']} of {_seeds(point)})")
            for pair in rivals
        )
        timed = tables.timed(network["artifact_sha256"])
        timed = timed[timed["p50_ms"].notna() & (timed["runtime"] != "eager")].sort_values("p50_ms")
        if len(timed):
            row = timed.iloc[0]
            inside = tables.differences(network, row)
            holds = _in_words(inside["delta_ci_low"], inside["delta_ci_high"])
            text += (
                f" In {row['runtime']} {row['precision']} {row['p50_ms']:.3f} ms a picture: "
                f"{_times(row['speedup_eager_fp32'])} as fast as fp32 in eager, "
                f"{_times(row['speedup_best_fp32'])} as fast as the fastest fp32 runtime; "
                + "the time of the network that the file decodes to; " * bool(network["simulated"])
                + f"{in_points(inside)} points ({holds})"
                + ("." if pd.isna(row["agreement"]) else f", agreement {row['agreement']:.2f} %.")
            )
        claims.append(text)
    none = ["No row of this profile carries a claim (`headline` = 1)."]
    return "\n\n".join(claims if (tables.compression["headline"] == 1).any() else claims + none)


def verdict(profile_dir: Path) -> str:
    """Did it get smaller, faster, worse? A list: what needs no training, the smallest file, the pipeline."""
    tables = Tables(profile_dir)
    text = ""
    if tables.summary["seeds"].min() < SEEDS_OF_A_CLAIM:
        text = f"A claim needs {SEEDS_OF_A_CLAIM} seeds; int8 after training, and times, need one."
        if tables.compression.iloc[0]["profile"] not in ("standard", "full"):
            text += " The profile `standard` has them."
        text += "\n\n"
    lines = [_untrained(tables), _smallest(tables), _pipeline(tables)]
    return text + "\n".join(f"- {line}" for line in lines if line)


def _told(tables: Tables, point: pd.Series) -> str:
    """A point: its size and its loss over the seeds, and how fast its first seed's network is in integers."""
    loss = _in_words(point["delta_ci_low"], point["delta_ci_high"])
    text = (
        f"`{point['method']} {point['point']}`: {_times(point['size_ratio'])} smaller, "
        f"{_over_seeds(point)} points over {_seeds(point)}: {loss}."
    )
    same = (tables.compression[POINT] == point[POINT]).all(axis=1)
    network = tables.compression[same].sort_values("seed").iloc[0]
    timed = tables.timed(network["artifact_sha256"])
    for _, row in timed[timed["precision"] == "int8"].iterrows():
        alike = ["artifact_sha256", "runtime", "precision", "batch", "threads"]
        again = tables.again[(tables.again[alike] == row[alike]).all(axis=1)][RATIO]
        second = f" ({_times(again.iloc[0])} when it was timed again)" if len(again) else ""
        text += (
            f" In {row['runtime']} int8 {_times(row[RATIO])} as fast{second} as the fastest fp32 runtime, at "
            f"{in_points(tables.differences(network, row))} points."
        )
    return text


def _seeds(point: pd.Series) -> str:
    return f"{point['seeds']} seed{'s' if point['seeds'] > 1 else ''}"


def _in_words(low: float, high: float) -> str:
    return {"yes": "no loss", "no": "**a loss**", "not shown": "no loss is **not shown**"}[
        _no_loss(low, high)
    ]


def _untrained(tables: Tables) -> str:
    """The fastest network in int8 without a gradient step, of those without loss if there are any."""
    whole = (tables.latency["batch"] == 1) & (tables.latency["threads"] == tables.latency["threads"].min())
    rows = tables.latency[whole & (tables.latency["precision"] == "int8")].dropna(subset=["p50_ms"])
    rows = rows.groupby(["method", "point", "control"], sort=False)["p50_ms"].min().reset_index()
    closed = tables.summary[tables.summary["division"] == "closed"]
    closed = closed.merge(rows, on=["method", "point", "control"]).sort_values("p50_ms", kind="stable")
    for _, point in closed.sort_values("no_loss", ascending=False, kind="stable").head(1).iterrows():
        return f"**Int8 without training**, {_told(tables, point)}"
    return ""


def _smallest(tables: Tables) -> str:
    """The smallest file without loss, whatever made it; what validation chose first."""
    plain = (tables.summary["technique"] == "baseline") & ~tables.summary["control"].isin(THIN)
    between = tables.summary["control"].str.startswith(AFTER)
    good = tables.summary[(tables.summary["no_loss"] == 1) & ~plain & ~between].sort_values("size_ratio")
    chosen = good[good["headline"] == 1].tail(1)
    text = "**Smallest without loss** of what validation chose: " + (
        _told(tables, chosen.iloc[0]) if len(chosen) else "none."
    )
    more = good[good["size_ratio"] > chosen["size_ratio"].max()] if len(chosen) else good
    for _, point in more.tail(1).iterrows():
        text += f" Read off the test set, so no claim: {_told(tables, point)}"
    return text


def _pipeline(tables: Tables) -> str:
    """The pipeline, and how it stands against each thin rival and other tool, smaller ones as well."""
    point = named_pipeline(tables.summary)
    if point is None:
        return ""
    text = f"**The pipeline**{'' if point['headline'] else ' (no claim)'}, {_told(tables, point)}"
    rows = tables.compression[tables.compression["dataset"] == point["dataset"]]
    mine = rows[(rows[POINT] == point[POINT]).all(axis=1)]
    others = rows[
        thin_rivals(rows)
        | (of_the_pipelines_notebook(rows) & (rows["technique"] == "peer") & ~rows["method"].isin(GENERAL))
    ]
    evidence_of, told = tables.folder / "predictions", []
    labels = labels_for(evidence_of, point["dataset"])
    for (method, setting), theirs in others.groupby(["method", "point"], sort=False):
        same = ["seed", "train_images"]
        pairs = mine.merge(theirs[same], on=same), theirs.merge(mine[same], on=same)
        if not len(pairs[0]):
            continue
        found = versus(*pairs, evidence_of, labels)
        fewer = f", {found['seeds']} of {_seeds(point)}" * bool(found["seeds"] != point["seeds"])
        about = f"`{method} {setting}` ({found['their bytes']:,} bytes, {found['points']}{fewer})"
        told.append((found["verdict"], about))
    return text + _verdicts(told)


def _verdicts(told: Iterable[tuple[str, str]]) -> str:
    """A sentence for each verdict with all that it was said of."""
    said, text = dict[str, list[str]](), ""
    for verdict, about in told:
        said.setdefault(verdict, []).append(about)
    words = {"below": "below", "not below": "undecided against", "beats": "above", "equal": "equal to"}
    for kind, told_of in words.items():
        for size in ("", LARGER):
            rivals = ", ".join(said.get(kind + size, []))
            text += f" It is {told_of}{' (with the larger file)' * bool(size)} {rivals}." * bool(rivals)
    return text


def _ranking(tables: Tables, division: str) -> str:
    chosen = tables.summary[tables.summary["division"] == division]
    chosen = chosen.sort_values(["no_loss", "size_ratio"], ascending=False, kind="stable")
    lines = []
    dense = tables.compression[_baselines(tables.compression)]["macs"].max()
    for _, row in chosen.iterrows():
        lines.append(
            {
                "technique": row["technique"],
                "method": row["method"],
                "point": row["point"] or "–",
                "control": row["control"] or "–",
                "claim": _yes(row["headline"] == 1),
                "accuracy (sd)": f"{row['accuracy_mean']:.2f} ({_number(row['accuracy_sd'], '.2f')})",
                "Δ points [95 %]": _over_seeds(row),
                "no loss": _no_loss(row["delta_ci_low"], row["delta_ci_high"]),
                "smaller": _times(row["size_ratio"]),
                "bytes": f"{row['artifact_bytes']:,.0f}",
                "fewer MACs": _times(dense / row["macs"]),
                "seeds": str(row["seeds"]),
            }
        )
    return markdown(lines)


def _stops_paying(tables: Tables) -> str:
    """The smallest file of each technique without loss, and the next smaller one; or the nearest to that."""
    lines = []
    ours = tables.summary[(tables.summary["control"] == "") & (tables.summary["technique"] != "baseline")]
    thin = tables.compression[thin_rivals(tables.compression)][POINT].drop_duplicates()
    ours = pd.concat([ours, tables.summary.merge(thin, on=POINT).assign(technique="the thin rivals")])
    for (technique, division), rows in ours.groupby(["technique", "division"], sort=False):
        rows = rows.sort_values("size_ratio", kind="stable")
        good = rows[rows["no_loss"] == 1].tail(1)
        smaller = rows[rows["size_ratio"] > good["size_ratio"].max()]
        if good.empty:
            smaller = rows.sort_values("delta_ci_low", ascending=False, kind="stable")
        line = {"technique": technique, "division": division}
        for name, found in (("smallest without loss", good), ("beyond, or else nearest", smaller.head(1))):
            line[name], line[f"{name}: Δ points"] = "none", "–"
            for _, row in found.iterrows():
                line[name] = f"{row['method']} {row['point']}".strip() + f", {_times(row['size_ratio'])}"
                line[f"{name}: Δ points"] = _over_seeds(row)
        lines.append(line)
    return markdown(lines)


def _zeros(tables: Tables) -> list[str]:
    """A section on the zeros in stem, stages and classifier of masked networks, where they are known."""
    records = [record for run in tables.provenance.values() for record in run["artifacts"]]
    known = {record["artifact_sha256"]: record["zeros"] for record in records if "zeros" in record}
    rows = tables.compression[tables.compression["artifact_sha256"].isin(known)]
    rows = rows.sort_values("seed", kind="stable").drop_duplicates(POINT)
    rows = rows.merge(tables.summary[[*POINT, *DELTAS]], on=POINT, suffixes=("_alone", ""))
    names = {part for counts in known.values() for part in counts}
    names = sorted(names, key=lambda part: (part == "fc", part))
    lines = []
    for _, row in rows.iterrows():
        counts = known[row["artifact_sha256"]]
        zeros, weights = map(sum, zip(*counts.values(), strict=True))
        shares = {part: 100 * counts[part][0] / counts[part][1] for part in names if part in counts}
        line = {"network": f"{_network(row)}, seed {row['seed']}", "all": 100 * zeros / weights, **shares}
        lines.append((line, _over_seeds(row)))
    lines.sort(key=lambda pair: pair[0]["all"])
    told = [
        {"network": line["network"], "Δ points [95 %]": delta}
        | {part: _number(line.get(part), ".1f") for part in ("all", *names)}
        for line, delta in lines
    ]
    about = "Percent of the weights in each part of a masked network.\n\n"
    return ["## Where do the zeros lie?", about + markdown(told)] if told else []


def _latency(tables: Tables) -> str:
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
                    "network": "identity" if row["control"] == "identity" else _network(row),
                    "runtime": f"{row['runtime']} {row['precision']}",
                    "batch": str(row["batch"]),
                    "threads": str(row["threads"]),
                    "p50 ms": _number(row["p50_ms"], ".3f", tables.why(row)),
                    "p90 ms": _number(row["p90_ms"], ".3f"),
                    "images/s": _number(row["throughput"], ",.0f"),
                    "× eager fp32": _times(row["speedup_eager_fp32"]),
                    "× fastest fp32": _times(row["speedup_best_fp32"]),
                    "agreement %": _number(row["agreement"], ".2f"),
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
    same, ratios = ["artifact_sha256", "runtime", "precision", "batch", "threads"], list(RATIOS)
    second = latency["control"] == AGAIN
    pairs = latency[~second].merge(latency[second][[*same, *ratios]], on=same, suffixes=("", " again"))
    pairs = pairs[pairs["p50_ms"].notna()]
    reference = (pairs["technique"] == "baseline") & (pairs["control"] == "") & (pairs["precision"] == "fp32")
    pairs = pairs[~reference]
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


def _twice(tables: Tables) -> str:
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
        {"network": _network(row), "runtime": f"{row['runtime']} {row['precision']}"}
        | {
            f"against {name}, again, apart": f"{_times(row[ratio])}, {_times(row[f'{ratio} again'])}, "
            f"{row[f'{ratio} apart']:.0f} %"
            for ratio, name in RATIOS.items()
        }
        for _, row in far.sort_values(f"{RATIO} apart", ascending=False).iterrows()
    ]
    return text + "\n\n" + markdown(lines)


def _not_measured(tables: Tables) -> str:
    missing = []
    for _, network in tables.networks().iterrows():
        if not len(tables.timed(network["artifact_sha256"])):
            missing.append(f"{_network(network)}: its time.")
    absent = tables.latency[tables.latency["p50_ms"].isna()]
    where = {f"{row['runtime']} {row['precision']}": tables.why(row) for _, row in absent.iterrows()}
    missing += [f"{name}: {why}." for name, why in sorted(where.items())]
    if single := (tables.summary["seeds"] == 1).sum():
        missing.append(
            f"The spread between seeds of {single} of {len(tables.summary)} points: they have one, so their "
            "intervals are about these networks."
        )
    for run, record in tables.provenance.items():
        if seen := record["extra"].get("search", {}).get("images", {}).get("supernet"):
            missing.append(f"The search of {run} in `train_images`: its supernet saw {seen:,} pictures.")
        points = record["extra"].get("missing", {}).items()
        missing += [f"{point}: {why}." for point, why in points if ":" in point]
        for entry in record["artifacts"]:
            if entry["headline"] and entry["committed"].startswith("not"):
                why = entry["committed"].removeprefix("not: ")
                missing.append(f"The network {Path(entry['path']).stem} again, in this repository: {why}.")
    return "\n".join(f"- {line}" for line in missing) or "- Nothing that the tables promise."


def _provenance(tables: Tables) -> str:
    lines = [
        {
            "run": run,
            "seed": str(record["seed"]),
            "commit": record["commit"][:12] + ("-dirty" if record["commit"].endswith("-dirty") else ""),
            "code": "older than this repository's" if run in tables.stale else "this repository's",
            "seconds": f"{record['wall_seconds']:.0f}",
        }
        for run, record in sorted(tables.provenance.items())
    ]
    told: dict[str, list[str]] = {}
    for run, record in sorted(tables.provenance.items()):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        machine = [f"{k}: {v}" for k, v in record["hardware"].items() if k != "load_average"]
        told.setdefault(f"Versions: {versions}.\n\nMachine: {', '.join(machine)}.", []).append(run)
    texts = [f"{', '.join(runs)}:\n\n" * (len(told) > 1) + text for text, runs in told.items()]
    return "\n\n".join([markdown(lines), *texts])


def _compared(tables: Tables, kind: Callable[..., pd.DataFrame]) -> list[dict[str, str]]:
    found = [
        kind(rows, tables.folder / "predictions", dataset=dataset)
        for dataset, rows in tables.compression.groupby("dataset")
    ]
    return pd.concat(found).astype(str).to_dict("records")


def _reversed(tables: Tables) -> list[str]:
    """A section on the points, and the pairs, that had another verdict in the smallest profile."""
    folder = tables.folder.parent / SMALLEST
    if folder == tables.folder or not (folder / "summary.csv").is_file():
        return []
    small, lines = Tables(folder), []
    both = small.summary.merge(tables.summary, on=POINT, suffixes=("_small", ""))
    for _, row in both.iterrows():
        before = row.filter(like="_small").rename(lambda column: column.removesuffix("_small"))
        told = [_no_loss(point["delta_ci_low"], point["delta_ci_high"]) for point in (before, row)]
        if told[0] != told[1]:
            line = {"what": " ".join(filter(None, (row["method"], row["point"])))} | {"asked": "no loss?"}
            line |= {f"in {SMALLEST}": f"{told[0]}, {_over_seeds(before)}"}
            lines.append(line | {"here": f"{told[1]}, {_over_seeds(row)}"})
    earlier = {(pair["ours"], pair["theirs"]): pair for pair in _compared(small, comparisons)}
    for pair in _compared(tables, comparisons):
        before = earlier.get((pair["ours"], pair["theirs"]), pair)
        if before["verdict"] != pair["verdict"]:
            line = {"what": f"{pair['ours']} against {pair['theirs']}", "asked": "which is better?"}
            line |= {f"in {SMALLEST}": f"{before['verdict']}, {before['points']}"}
            lines.append(line | {"here": f"{pair['verdict']}, {pair['points']}"})
    about = (
        f"Points and pairs of both profiles with another verdict here than in {SMALLEST}. There the fp32 "
        f"network is right on {_accuracy(small)} % of the test pictures, here on {_accuracy(tables)} %.\n\n"
    )
    return [f"## What changed from the {SMALLEST} profile?", about + markdown(lines)]


def _accuracy(tables: Tables) -> str:
    """Of the uncompressed networks, their mean."""
    return f"{tables.compression[_baselines(tables.compression)]['accuracy'].mean():.1f}"


def _side_by_side(tables: Tables) -> str:
    compared, closed = _compared(tables, comparisons), _compared(tables, gaps)
    text = (
        "“not below” is undecided. A student whose point ends in "
        "`shuffled` had a teacher of wrong answers, as a control.\n\n" + markdown(compared)
    )
    if closed:
        text += (
            "\n\nFrom the student alone to the uncompressed network: what a teacher closes of that gap:\n\n"
        )
        text += markdown(closed)
    return text


def report_text(profile_dir: Path) -> str:
    """What ``report.md`` of a profile says, from its tables."""
    tables = Tables(profile_dir)
    drawn = {
        name: f"![{alt}](figures/{name}.png)\n\n" if (tables.folder / f"figures/{name}.png").is_file() else ""
        for name, alt in FIGURES.items()
    }
    return "\n\n".join(
        [
            f"# Results of the {tables.compression.iloc[0]['profile']} profile",
            verdict(profile_dir),
            "## Chosen on validation",
            _claims(tables),
            "## Headline",
            drawn["headline"] + table(profile_dir),
            "## Closed division: no gradient step after the baseline",
            _ranking(tables, "closed"),
            "## Open division: retrained, or another architecture",
            _ranking(tables, "open"),
            "## Where does each technique stop paying?",
            "Read off the test set, so a guide and no claim: claims were chosen on validation.\n\n"
            + _stops_paying(tables),
            "## Side by side: paired differences",
            drawn["waterfall"] + _side_by_side(tables),
            *_reversed(tables),
            *_zeros(tables),
            "## Time",
            _latency(tables),
            "## Time, measured twice",
            _twice(tables),
            "## Not measured",
            _not_measured(tables),
            "## Provenance",
            _provenance(tables),
        ]
    )


def report(profile_dir: Path) -> str:
    """Write ``report.md`` of a profile from its tables, and return its text."""
    text = report_text(profile_dir)
    write_atomically(Path(profile_dir) / "report.md", text + "\n")
    return text


def committed_profile(
    folder: Path | None = None,
    profiles: Iterable[str] = PROFILES,
    *,
    technique: str = "",
    timed: bool = False,
) -> Path | None:
    """The tables of the best profile that has some (of a technique, with times), or None."""
    for profile in profiles:
        profile_dir = (folder or root()) / "results" / profile
        table = profile_dir / "compression.csv"
        if not table.is_file() or technique and technique not in set(pd.read_csv(table)["technique"]):
            continue
        if not timed or len(pd.read_csv(profile_dir / "latency.csv")):
            return profile_dir
    return None


def readme_block(folder: Path) -> str:
    """What the README of a clone shall say between its markers: the best profile that is timed."""
    profile_dir = committed_profile(folder, timed=True) or committed_profile(folder)
    if profile_dir is None:
        return ""
    place = f"results/{profile_dir.name}"
    alt = "Left: test accuracy against times smaller. Right: test accuracy against milliseconds a picture."
    figure = f"![{alt}]({place}/figures/headline.png)\n\n"
    shown = figure if (profile_dir / "figures/headline.png").is_file() else ""
    more = f"{shown}Everything else: [report]({place}/report.md)."
    if files := _kept_files(profile_dir):
        links = [f"[{name}]({place}/artifacts/{file.name})" for name, file in files.items()]
        more += f" Networks that lie in this repository: {', '.join(links)}."
    return "\n\n".join([verdict(profile_dir), table(profile_dir), more])


def _kept_files(profile_dir: Path) -> dict[str, Path]:
    """What the committed networks are called, and where they are."""
    rows = Tables(profile_dir).compression.drop_duplicates("artifact_sha256")
    files = {sha: profile_dir / "artifacts" / artifact_name(sha) for sha in rows["artifact_sha256"]}
    return {
        f"{row['method']} {row['point']}, seed {row['seed']}": files[row["artifact_sha256"]]
        for _, row in rows.iterrows()
        if files[row["artifact_sha256"]].is_file()
    }


def readme_says(folder: Path) -> str:
    """What the README says between its markers now."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultError(f"README.md needs the lines {BEGIN} and {END} once each, in this order")
    return text.split(BEGIN)[1].split(END)[0].strip()


def without_marks(text: str) -> str:
    """A table without the marks of stale rows, which come and go with the code around it."""
    return text.replace(STALE_NOTE, "").replace(STALE, "").replace("\n\n\n\n", "\n\n").strip()


def update_readme(folder: Path) -> bool:
    """Write the headline table and figure into the README; True where that changed it."""
    readme_says(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{readme_block(folder)}\n{END}{after}"
    if new != text:
        write_atomically(path, new)
    return new != text


def main() -> None:
    """``python -m nnc_utils.results report``: figure, report.md and README from the tables.

    ``publish`` first makes the tables from the profile's finished runs, however many there are; what
    other machines committed stays beside them.
    """
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.results", description=main.__doc__)
    parser.add_argument("command", choices=["report", "publish"])
    parser.add_argument("--profile", help="default of report: every profile that has tables")
    about = "committed runs whose points fell short: they stay as attempts beside those measured since"
    parser.add_argument("--attempts", nargs="+", default=[], metavar="RUN", help=about)
    options = parser.parse_args()
    if options.command == "publish":
        if not options.profile:
            parser.error("publish needs --profile")
        marks = (root() / "results/runs" / options.profile).glob("*/*/result.json")
        try:
            runs = [read_run(mark.parent) for mark in sorted(marks)]
            folders = [run.folder for run in runs if run.compression or run.latency]
            publish(folders, options.profile, keep=True, attempts=options.attempts)
        except ResultError as error:
            raise SystemExit(str(error)) from None
    names = [options.profile] if options.profile else [*ALL_PROFILES, "smoke"]
    found = [root() / "results" / name for name in names]
    found = [folder for folder in found if (folder / "compression.csv").is_file()]
    if not found:
        raise SystemExit(f"no tables of {', '.join(names)} in {root() / 'results'}: run the benchmark first")
    import matplotlib

    matplotlib.use("Agg")
    from nnc_utils import figures

    for profile_dir in found:
        figures.write(profile_dir)
        report(profile_dir)
        print(table(profile_dir))
        print(f"\n{profile_dir / 'report.md'} written")
    if (root() / "README.md").is_file() and update_readme(root()):
        print("README.md updated")


if __name__ == "__main__":
    main()
