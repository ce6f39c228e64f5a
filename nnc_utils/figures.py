"""Pictures of the tables, one question each; and how every figure of the course looks."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>hdp8"
UNTIMED = ("identity", "again")  # controls of rows that are no network's first timing
NAMES = {
    "eager": "eager PyTorch",
    "onnxruntime": "ONNX Runtime",
    "inductor": "Inductor",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "train": "ResNet, fp32",
    "uniform_per_tensor": "per tensor",
    "uniform_per_channel": "per channel",
    "kmeans": "k-means",
    "hessian_kmeans": "k-means, Hessian",
    "hessian_rounding": "second order",
    "qat_ste": "trained, STE",
    "qat_lsq": "trained, LSQ",
    "dense_finetuned": "dense, trained on",
    "ort_static": "ONNX Runtime static",
    "nncf_ptq": "NNCF",
    "torchao_pt2e": "torchao PT2E",
    "nncodec": "NNCodec",
}


def style() -> None:
    """Set the look of every figure: colour-blind-safe colours, markers, thin grid."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    plt.rcParams.update({"figure.figsize": (7, 4), "figure.dpi": 90, "savefig.dpi": 110})
    # seaborn 0.13 calls what pandas 3 deprecates; nothing a reader can act on
    warnings.filterwarnings("ignore", module="seaborn")


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with a text for those who cannot see it, and close it."""
    figure.tight_layout()
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def read_table(path: Path) -> pd.DataFrame:
    """A committed CSV, with empty text as "" and empty numbers as NaN."""
    frame = pd.read_csv(path)
    text = [c for c in ("technique", "method", "point", "control", "runtime", "precision") if c in frame]
    return frame.assign(**{column: frame[column].fillna("").astype(str) for column in text})


def name(value: str) -> str:
    """How a method or runtime is written in a figure."""
    return NAMES.get(value, value.replace("_", " "))


def size_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How small does the file get, and what does it cost? Accuracy with its paired interval."""
    axes = axes or plt.subplots()[1]
    reference = compression[compression["technique"] == "baseline"]["accuracy"]
    for value in reference:
        axes.axhline(value, color="grey", linewidth=1)
        axes.axhline(value - 0.3, color="grey", linewidth=1, linestyle=":")
        axes.annotate(
            "−0.3 points", (1, value - 0.3), xytext=(2, -11), textcoords="offset points", fontsize=8
        )
    for number, (method, rows) in enumerate(compression.groupby("method", sort=True)):
        rows = rows.sort_values("size_ratio")
        below = (rows["accuracy_delta"] - rows["delta_ci_low"]).fillna(0)
        above = (rows["delta_ci_high"] - rows["accuracy_delta"]).fillna(0)
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(
            rows["size_ratio"], rows["accuracy"], (below, above), marker=marker, capsize=3, label=name(method)
        )
        for _, row in rows[rows["point"].str.startswith("bits=")].iterrows():
            place = (row["size_ratio"], row["accuracy"])
            text = row["point"].removeprefix("bits=")
            axes.annotate(text, place, xytext=(5, 5), textcoords="offset points", fontsize=9)
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t <= 1.5 * compression["size_ratio"].max()]
    axes.set(
        xscale="log", xlabel="times smaller than the fp32 file (numbers: bits)", ylabel="test accuracy (%)"
    )
    axes.set_xticks(ticks, [f"{t}×" for t in ticks])
    axes.minorticks_off()
    axes.set_title("How small, and how much worse?")
    axes.legend()
    return axes.figure


def latency_bars(latency: pd.DataFrame, axes: Axes | None = None, *, threads: int = 1) -> Figure:
    """How long does one picture take, where? Medians at batch 1 with one number of threads."""
    rows = _single(latency, threads).sort_values("p50_ms", ascending=False)
    axes = axes or plt.subplots(figsize=(8, max(3.0, 0.33 * len(rows))))[1]
    colours = dict(zip(("fp32", "int8", "s8s8", "bf16"), sns.color_palette("colorblind"), strict=False))
    labels = [f"{name(row['runtime'])} {row['precision']}, {_point(row)}" for _, row in rows.iterrows()]
    places = range(len(rows))
    axes.barh(places, rows["p50_ms"], color=[colours.get(p, "grey") for p in rows["precision"]])
    axes.set_yticks(places, labels, fontsize=9)
    for place, (_, row) in zip(places, rows.iterrows(), strict=True):
        axes.text(row["p50_ms"], place, f" {row['p50_ms']:.2f} ms", va="center", fontsize=9)
    axes.set(xlabel=f"median milliseconds a picture, {threads} thread{'s' if threads > 1 else ''}")
    axes.set_title("How long does one picture take, where?")
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    return axes.figure


def _single(latency: pd.DataFrame, threads: int) -> pd.DataFrame:
    """What was timed for one picture, once each."""
    timed = (latency["batch"] == 1) & (latency["threads"] == threads) & latency["p50_ms"].notna()
    return latency[timed & ~latency["control"].isin(UNTIMED)]


def _point(row: pd.Series) -> str:
    """A network in two or three words."""
    point = row["point"].replace("bits=", "") + (" bits" if "bits=" in row["point"] else "")
    return " ".join(
        filter(None, (row["model"] if row["technique"] == "baseline" else name(row["method"]), point))
    )


def frontier(latency: pd.DataFrame, axes: Axes | None = None, *, threads: int = 1) -> Figure:
    """Which networks are worth having? Accuracy against time: a colour a technique, a marker a runtime."""
    axes = axes or plt.subplots(figsize=(8, 4.5))[1]
    rows = _single(latency, threads).dropna(subset=["accuracy"]).sort_values("p50_ms", kind="stable")
    networks = {key: _point(group.iloc[0]) for key, group in rows.groupby("artifact_sha256", sort=False)}
    colours = dict(zip(networks, sns.color_palette("colorblind", max(1, len(networks))), strict=True))
    markers = dict(zip(rows["runtime"].unique(), MARKERS, strict=False))
    for _, row in rows.iterrows():
        colour = colours[row["artifact_sha256"]]
        style = {"edgecolors": colour, "facecolors": colour if row["precision"] == "int8" else "none"}
        axes.scatter(row["p50_ms"], row["accuracy"], marker=markers[row["runtime"]], s=70, **style)
    best = rows[rows["accuracy"] > rows["accuracy"].cummax().shift(fill_value=-1.0)]
    axes.step(best["p50_ms"], best["accuracy"], where="post", color="grey", linewidth=1, zorder=0)
    handles = [axes.scatter([], [], color=colour, label=networks[key]) for key, colour in colours.items()]
    handles += [axes.scatter([], [], color="grey", marker=m, label=name(r)) for r, m in markers.items()]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xscale="log", xlabel="median milliseconds a picture", ylabel="test accuracy (%)")
    axes.set_title("Which networks are worth having? (filled: int8)")
    return axes.figure


def headline(profile_dir: Path) -> Figure:
    """Smaller, worse, faster? The tables of one profile in one picture."""
    latency = read_table(profile_dir / "latency.csv")
    figure, panels = plt.subplots(1, 2 if len(latency) else 1, figsize=(13 if len(latency) else 8, 4.5))
    left, *rest = np.atleast_1d(panels)
    size_against_accuracy(read_table(profile_dir / "compression.csv"), left)
    for right in rest:
        latency_bars(latency, right)
    figure.tight_layout()
    return figure
