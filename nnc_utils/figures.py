"""Figures of the tables, one question each; and how every figure of the course looks."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnc_utils.rows import AFTER, AGAIN, APART, NO_LOSS, SETTING, with_settings

MARKERS = "osD^vP*X<>hdp8"
SERIES = 6  # named in a figure at most; what is beyond is grey
SHOWN = 3  # percentage points of accuracy below the best that a figure shows
KEY = ["dataset", "technique", "method", "settings", "control"]
NARROW = ("small_dense", "small_dense_qat4", "small_dense_distilled", "searched")  # controls: narrow networks
BUDGETS = (
    *("bits", "levels", "budget_bits", "budget_levels", "lambda_", "sparsity", "macs", "latency_ms", "size"),
    *("width", "qp", "removed", "smoothing", "epochs", "times"),
)
UNNAMED = (
    *("granularity", "activations", "schedule", "train", "stages", "of", "family"),
    *("temperature", "alpha", "beta", "others"),
)
NAMES = {
    "eager": "eager PyTorch", "onnxruntime": "ONNX Runtime", "inductor": "Inductor", "openvino": "OpenVINO",
    "executorch": "ExecuTorch", "train": "uncompressed", "dense_finetuned": "uncompressed, trained on",
    "small_dense": "narrow ResNet-18", "narrow_resnet18": "narrow ResNet-18", "kmeans": "k-means",
    "hessian": "Hessian-weighted", "hessian_rounding": "second-order rounding", "weights": "single weights",
    "qat": "quantization-aware training", "reestimate": "batch-norm re-estimated", "kd": "soft labels",
    "compensate": "compensated", "finetune": "fine-tuned", "distill": "distilled", "nncodec": "NNCodec",
    "dkd": "decoupled soft labels", "kd_attention": "soft labels + attention",
    "three_stage": "three-stage ResNet",
    "kd_hints": "soft labels + hints", "reinforce": "REINFORCE", "torch_pruning": "Torch-Pruning",
    "bn_scale": "batch-norm scale", "obs": "OBS", "lsq": "LSQ", "ste": "STE",
}  # fmt: skip
KINDS = {  # what a network is, by its technique, and its colour; narrow rivals have no technique of their own
    "baseline": ("uncompressed", 7), "quantization": ("quantized", 1), "pruning": ("pruned", 2),
    "distillation": ("distilled", 4), "search": ("searched", 9), "pipeline": ("pipeline", 0),
    "federated": ("federated", 8), "narrow": ("narrow, equal training budget", 3), "peer": ("other tools", 5),
    "transfer": ("for another task", 6),
}  # fmt: skip


def style() -> None:
    """Set the look of every figure: colour-blind-safe colours, markers, thin grid; tables cut no name."""
    pd.set_option("display.max_colwidth", None)
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    plt.rcParams.update({"figure.figsize": (7, 4), "figure.dpi": 90, "savefig.dpi": 110})
    # seaborn 0.13 calls what pandas 3 deprecates; nothing a reader can act on
    warnings.filterwarnings("ignore", module="seaborn")


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with a text for those who cannot see it, and close it."""
    figure.tight_layout()
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi, bbox_inches="tight")
    plt.close(figure)
    # 255 colours are enough for a plot, and a third of the bytes in the notebook
    PIL.Image.open(drawn).convert("RGB").quantize(255).save(small, format="png", optimize=True)
    display(Image(data=small.getvalue(), format="png", alt=alt))


def read_table(path: Path) -> pd.DataFrame:
    """A committed CSV with `rows.with_settings`; empty text is "", empty numbers are NaN.

    compression.csv gets the interval over all seeds of a configuration, of summary.csv, in place of each
    seed's own.
    """
    frame = pd.read_csv(path)
    text = [c for c in ("technique", "method", "settings", "control", "runtime", "precision") if c in frame]
    frame = frame.assign(**{column: frame[column].astype(object).fillna("").astype(str) for column in text})
    if path.name == "compression.csv" and path.with_name("summary.csv").is_file():
        summary = read_table(path.with_name("summary.csv")).rename(columns={"delta_mean": "accuracy_delta"})
        over_seeds = ["accuracy_delta", "delta_ci_low", "delta_ci_high"]
        frame = frame.drop(columns=over_seeds).merge(summary[[*KEY, *over_seeds]], how="left", on=KEY)
    return with_settings(frame)


def name(value: str) -> str:
    """How a method, setting or runtime is written in a figure."""
    return NAMES.get(value, value.replace("_", " "))


def size_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How small does the file get, and what does it cost? Accuracy with its paired interval."""
    ratio, label = compression["size_ratio"], "times smaller than the fp32 file (numbers: bits)"
    return _against(compression, ratio, axes, label, "How small, and how much worse?")


def macs_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How much arithmetic is omitted, and what does it cost? Masks omit none: they stand at 1×."""
    ratio = compression[_is_reference(compression)]["macs"].max() / compression["macs"]
    title = "How much less to compute, and how much worse?"
    return _against(compression, ratio, axes, "times fewer multiplications (MACs)", title)


def _against(rows: pd.DataFrame, ratio: pd.Series, axes: Axes | None, label: str, title: str) -> Figure:
    axes = axes or plt.subplots()[1]
    _lines(axes, _pooled(rows, ratio))
    _times(axes, ratio, label)
    axes.set_title(title)
    return axes.figure


def parameters_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How good is a network of so many parameters? Controls, such as students without a teacher, are grey."""
    axes = axes or plt.subplots(figsize=(8, 4.2))[1]
    _lines(axes, _pooled(compression, compression["params"]), grey_controls=True)
    counts: list[int] = []  # labels, where there is room for one
    room = max(1.25, (compression["params"].max() / compression["params"].min()) ** 0.1)
    for count in sorted(set(compression["params"])):
        counts += [count] if not counts or count > room * counts[-1] else []
    axes.set(xscale="log", xlabel="parameters", title="How good is a small network?")
    axes.set_xticks(counts, [f"{count / 1e6:.2g} M" for count in counts])
    axes.minorticks_off()
    return axes.figure


def claims_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """What is claimed of each technique, among all its configurations? Means over the seeds, faint of few.

    Controls other than the pipeline's rivals are omitted, and the same codes in general compressors.
    """
    axes = axes or plt.subplots(figsize=(8, 4.5))[1]
    shown = compression["control"].isin(["", "dense_finetuned", *NARROW])
    shown &= ~compression["method"].isin(["gzip", "xz", "zstd"])
    table = _pooled(compression[shown], compression["size_ratio"][shown])
    for kind, rows in table.groupby(_kinds(table), sort=False):
        label, colour, marker = _kind(kind)
        faint = (rows["seeds"] < table["seeds"].max()).map({True: 0.45, False: 1.0})
        hollow = {"facecolors": "white", "edgecolors": colour, "marker": marker, "alpha": faint, "zorder": 2}
        axes.scatter(rows["x"], rows["accuracy"], s=22, **hollow)
        claimed = rows[rows["headline"] > 0]
        filled = {"linestyle": "none", "capsize": 3, "zorder": 3, "markersize": 8}
        filled |= {"color": colour, "marker": marker}
        axes.errorbar(claimed["x"], claimed["accuracy"], (claimed["below"], claimed["above"]), **filled)
        axes.plot([], [], linestyle="none", color=colour, marker=marker, label=label)
        for _, row in claimed[claimed["accuracy"] > table["accuracy"].max() - SHOWN].iterrows():
            place = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 10, "color": colour}
            axes.annotate(f"{row['x']:.0f}×", (row["x"], row["accuracy"]), **place)
    _reference(axes, table)
    _times(axes, table["x"], "times smaller than the fp32 file")
    _cut(axes, table["accuracy"])
    axes.set_title("How small, and how much worse? (filled: claimed)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
    return axes.figure


def _is_reference(table: pd.DataFrame) -> pd.Series:
    return (table["technique"] == "baseline") & (table["control"] == "")


def _kinds(table: pd.DataFrame) -> pd.Series:
    """What each row's network is, of `KINDS`."""
    kinds = table["technique"].mask(table["control"].isin(NARROW), "narrow")
    return kinds.mask(table["control"] == "dense_finetuned", "baseline")


def _kind(kind: str) -> tuple[str, tuple[float, float, float], str]:
    """Label, colour and marker of one of `KINDS`, in every figure the same."""
    label, place = KINDS[kind]
    return label, sns.color_palette("colorblind")[place], MARKERS[list(KINDS).index(kind)]


def _pooled(compression: pd.DataFrame, x: pd.Series) -> pd.DataFrame:
    """A row each configuration, without the pipeline's stages: means over seeds, interval, series.

    Not every configuration has every seed, and the difference is to its own seeds' networks: the accuracy is
    that of all seeds' uncompressed networks plus the difference.
    """
    table = with_settings(compression).assign(x=x)
    table = table[~table["control"].str.startswith(AFTER)]
    table = table.assign(series=[_series(row) for row in table.to_dict("records")])
    groups = table.groupby(["technique", "method", "settings", "control", "series"], sort=False)
    means = groups.mean(numeric_only=True).assign(seeds=groups["seed"].nunique()).reset_index()
    for bits in [SETTING + "bits"] if SETTING + "bits" in table else []:
        means["bits"] = groups[bits].first().to_numpy()
    if (references := table[_is_reference(table)]["accuracy"]).size > 1:
        means["accuracy"] = references.mean() + means["accuracy_delta"]
    below = (means["accuracy_delta"] - means["delta_ci_low"]).fillna(0)
    above = (means["delta_ci_high"] - means["accuracy_delta"]).fillna(0)
    return means.assign(below=below, above=above).sort_values("x", kind="stable")


def _series(row: dict) -> str:
    """What a line joins: configurations of one method that differ in a budget; with a λ, in that alone."""
    kept = ("macs",) if row.get(SETTING + "lambda_") else ()
    settings = {key.removeprefix(SETTING): value for key, value in row.items() if key.startswith(SETTING)}
    told = [row["control"] if row["control"] not in ("", row["method"], *NARROW) else ""]
    for setting, value in settings.items():
        if setting in ("train", "stages", "schedule") and value not in ("", "none", "one_shot"):
            told.append(" → ".join(value.split(",")))
        elif setting in kept and value:
            told.append(f"MACs ÷ {value:g}")
        elif setting not in (*BUDGETS, *UNNAMED) and value not in ("", 0, "group"):
            told.append(setting if value is True else str(value))
    what = [settings.get("family") or row["method"]]  # a rival goes by its family's name
    if row["method"] == "pipeline":
        what = [row["method"], settings.get("family") if "narrow" in settings.get("stages", "") else ""]
    return ", ".join(name(word) for word in (*what, *told) if word)


def _lines(axes: Axes, table: pd.DataFrame, *, grey_controls: bool = False) -> None:
    """A line and a marker for each of at most `SERIES` series, hollow where some seeds are missing."""
    order = table.groupby("series").agg(claimed=("headline", "max"), count=("x", "size"))
    order = list(order.sort_values(["claimed", "count"], ascending=False, kind="stable").index)
    _reference(axes, table)
    for number, series in enumerate(order[:SERIES]):
        rows, marker = table[table["series"] == series], MARKERS[number]
        grey = {"color": "grey"} if grey_controls and (rows["control"] != "").any() else {}
        interval = {"yerr": (rows["below"], rows["above"]), "capsize": 3, "label": series, "marker": marker}
        line = axes.errorbar(rows["x"], rows["accuracy"], **interval, **grey)[0]
        few = rows[rows["seeds"] < table["seeds"].max()]
        hollow = {"color": line.get_color(), "markerfacecolor": "white", "zorder": 3}
        axes.plot(few["x"], few["accuracy"], marker=marker, linestyle="none", **hollow)
        for _, row in rows[rows["bits"] != ""].iterrows() if "bits" in rows else ():
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 9}
            axes.annotate(f"{row['bits']:g}", (row["x"], row["accuracy"]), **place)
    if others := order[SERIES:]:
        rows = table[table["series"].isin(others)]
        label = f"{len(others)} other{'s' if len(others) > 1 else ''}"
        axes.plot(rows["x"], rows["accuracy"], ".", color="lightgrey", zorder=1, label=label)
    if len(axes.figure.axes) == 1:  # the legend stands beside it
        axes.figure.set_size_inches(10, 4.5)
    hollow = f"hollow: fewer than {table['seeds'].max()} seeds" if table["seeds"].nunique() > 1 else None
    axes.legend(fontsize=8, title=hollow, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_ylabel("test accuracy (%)")
    _cut(axes, table["accuracy"])


def _reference(axes: Axes, table: pd.DataFrame) -> None:
    """A line where the uncompressed network is, and one as far below as still counts as within."""
    for value in table[_is_reference(table)]["accuracy"].head(1):
        axes.axhline(value, color="grey", linewidth=1)
        axes.axhline(value + NO_LOSS, color="grey", linewidth=1, linestyle=":")
        place = {"xytext": (2, -11), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"−{-NO_LOSS} pp", (axes.get_xlim()[0], value + NO_LOSS), **place)


def _times(axes: Axes, ratio: pd.Series, label: str) -> None:
    """A logarithmic axis of how many times less of something."""
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t <= 1.5 * ratio.max()]
    axes.set(xscale="log", xlabel=label, ylabel="test accuracy (%)")
    axes.set_xticks(ticks, [f"{t}×" for t in ticks])
    axes.minorticks_off()


def _cut(axes: Axes, accuracies: pd.Series) -> None:
    """Show the `SHOWN` points below the best, where networks differ, and say how many are further down."""
    lowest = accuracies.max() - SHOWN
    if below := int((accuracies < lowest).sum()):
        axes.set_ylim(lowest, accuracies.max() + 0.2 * SHOWN)
        text = f"↓ {below} more down to {accuracies.min():.1f} %"
        axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", fontsize=9)


def _single(latency: pd.DataFrame, threads: int) -> pd.DataFrame:
    """What was timed for one image, once each."""
    timed = (latency["batch"] == 1) & (latency["threads"] == threads) & latency["p50_ms"].notna()
    return with_settings(latency)[timed & ~latency["control"].isin(("identity", AGAIN))]


def frontier(latency: pd.DataFrame, axes: Axes | None = None, *, threads: int = 1) -> Figure:
    """Which networks are worth having? Each once, in its fastest runtime; what none beats is joined."""
    axes = axes or plt.subplots(figsize=(8, 4.5))[1]
    rows = _single(latency, threads).dropna(subset=["accuracy"]).sort_values("p50_ms", kind="stable")
    rows = rows[~rows["control"].str.startswith(AFTER) & rows["precision"].isin(["fp32", "int8"])]
    rows = rows.drop_duplicates("artifact_sha256")
    for kind, own in rows.groupby(_kinds(rows), sort=False):
        label, colour, marker = _kind(kind)
        axes.scatter(own["p50_ms"], own["accuracy"], color=colour, marker=marker, s=60, label=label)
    best = _worth_having(rows)
    axes.step(best["p50_ms"], best["accuracy"], where="post", color="grey", linewidth=1, zorder=0)
    if len(rows):
        least, most = rows["p50_ms"].min(), rows["p50_ms"].max()
        ticks = [t * 10.0**power for power in range(-3, 4) for t in (1, 2, 5)]
        ticks = [t for t in ticks if 0.7 * least < t < 1.4 * most]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="median milliseconds an image, fastest runtime", ylabel="test accuracy (%)")
    axes.set_title("Which networks are worth having?")
    _cut(axes, rows["accuracy"])
    return axes.figure


def _worth_having(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows, by time, that are more accurate than all that are faster: by `-NO_LOSS` points at least.

    What takes at most `APART` percent longer counts as fast as the one that it is held against.
    """
    kept: list[pd.Series] = []
    fastest = 0.0  # of those that count as fast as the last one
    for _, row in rows.iterrows():
        if kept and row["accuracy"] < kept[-1]["accuracy"] - NO_LOSS:
            continue
        if row["p50_ms"] <= fastest * (1 + APART / 100):
            kept.pop()
        else:
            fastest = row["p50_ms"]
        kept.append(row)
    return pd.DataFrame(kept, columns=rows.columns)


def headline(profile_dir: Path) -> Figure:
    """Smaller, worse, faster? The tables of one profile in one figure."""
    compression, latency = (read_table(profile_dir / f"{kind}.csv") for kind in ("compression", "latency"))
    style()
    figure, panels = plt.subplots(1, 2 if len(latency) else 1, figsize=(11, 5), sharey=True)
    left, *rest = np.atleast_1d(panels)
    claims_against_accuracy(compression, left)
    handles, labels = left.get_legend_handles_labels()
    for right in rest:
        frontier(latency, right, threads=int(latency["threads"].min()))
        right.set_ylabel("")
    for axes in figure.axes:
        axes.get_legend().remove()
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)  # below the figure
    return figure


def waterfall(compression: pd.DataFrame, latency: pd.DataFrame | None = None) -> Figure | None:
    """What did each stage of the pipeline give? Bytes, milliseconds (untimed: MACs) and accuracy.

    Of the first pipeline that has rows between its stages; None where there is none.
    """
    between = compression[compression["control"].str.startswith(AFTER)]
    if between.empty:
        return None
    first = with_settings(between).iloc[0]
    same = ["run", "method", "settings"]
    own = compression[(compression[same] == first[same]).all(axis=1)]
    dense = compression[_is_reference(compression) & (compression["seed"] == first["seed"])]
    stages = pd.concat([dense.head(1), own[own["control"] != ""], own[own["control"] == ""]])
    names = ["fp32", *first[SETTING + "stages"].split(",")]
    panels_of = {"bytes of the file": stages["artifact_bytes"], "million MACs": stages["macs"] / 1e6}
    if latency is not None and (timed := _stage_times(stages["artifact_sha256"], latency)):
        panels_of = {"bytes of the file": stages["artifact_bytes"], timed[0]: timed[1]}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for axes, (label, heights) in zip(panels, panels_of.items(), strict=False):
        bars = axes.bar(names, heights, color=["grey"] + ["C0"] * (len(names) - 1))
        axes.bar_label(bars, fmt="{:.4g}" if axes is not panels[0] else "{:,.0f}", fontsize=8)
        axes.set(title=f"{label} (log)", yscale="log", yticks=[])  # each bar says how much it is
        axes.margins(y=0.12)
        axes.minorticks_off()
    half = (stages["delta_ci_high"] - stages["delta_ci_low"]).fillna(0) / 2
    panels[2].errorbar(names, stages["accuracy"], half, marker="o", capsize=3, linestyle="none")
    for place, accuracy in zip(names, stages["accuracy"], strict=True):
        right = {"xytext": (6, 0), "textcoords": "offset points", "fontsize": 8}
        panels[2].annotate(f"{accuracy:.2f}", (place, accuracy), **right)
    panels[2].set_title("test accuracy (%)")
    panels[2].margins(x=0.2)
    figure.tight_layout()
    return figure


def _stage_times(networks: pd.Series, latency: pd.DataFrame) -> tuple[str, list[float]] | None:
    """Milliseconds in the runtime that has these networks and is fastest at the last; first, their label."""
    rows = _single(latency, int(latency["threads"].min())) if len(latency) else latency
    rows = rows[rows["precision"].isin(["fp32", "int8"])]
    times = rows.pivot_table(index="artifact_sha256", columns="runtime", values="p50_ms", aggfunc="min")
    times = times.reindex(networks).dropna(axis=1)
    if not times.shape[1]:
        return None
    runtime = times.iloc[-1].idxmin()
    last = rows[(rows["runtime"] == runtime) & (rows["artifact_sha256"] == networks.iloc[-1])]
    return f"milliseconds in {name(runtime)}, the last in {last['precision'].iloc[-1]}", list(times[runtime])


def write(profile_dir: Path) -> None:
    """Draw the tables of a profile into its figures/."""
    tables = (read_table(profile_dir / f"{kind}.csv") for kind in ("compression", "latency"))
    drawn = {"headline": headline(profile_dir), "waterfall": waterfall(*tables)}
    (profile_dir / "figures").mkdir(exist_ok=True)
    for key, figure in drawn.items():
        if figure is not None:
            figure.savefig(profile_dir / "figures" / f"{key}.png", bbox_inches="tight")
            plt.close(figure)
