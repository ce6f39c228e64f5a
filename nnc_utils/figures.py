"""Pictures of the tables, one question each; and how every figure of the course looks."""

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
from matplotlib.patches import Patch

from nnc_utils import peers
from nnc_utils.rows import AFTER, AGAIN, APART, NO_LOSS
from nnc_utils.tables import POINT, THIN, of_the_pipelines_notebook

MARKERS = "osD^vP*X<>hdp8"
SHOWN = 4  # percentage points of accuracy below the best that a figure shows
UNTIMED = ("identity", AGAIN)  # controls of rows that are no network's first timing
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
    "prune_distill_quantize": "prune → distill → quantize",
    "prune_quantize_distill": "prune → quantize → distill",
    "small_dense_qat4": "thin, 4 bits",
    "thin_resnet18": "thin ResNet-18",
    "reinforce": "REINFORCE",
    "random_alone": "random, trained alone",
    "kd": "soft labels",
    "dkd": "soft labels, decoupled",
    "kd_attention": "soft labels + attention",
    "kd_hints": "soft labels + hints",
    "self": "taught by itself",
    "nm_2_4": "2:4",
    "obd_fisher": "OBD, Fisher",
    "obd_hessian": "OBD, Hessian",
    "obs_block": "OBS",
    "torch_pruning_magnitude": "Torch-Pruning magnitude",
    "torch_pruning_taylor": "Torch-Pruning Taylor",
    "torch_pruning_bn_scale": "Torch-Pruning BN scale",
}
KINDS = {  # what a network is, by its technique; thin rivals have none of their own
    "baseline": "uncompressed",
    "quantization": "quantized",
    "pruning": "pruned",
    "distillation": "taught",
    "search": "searched",
    "pipeline": "pipeline",
    "thin": "thin, trained as long",
    "peer": "other tools",
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
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi, bbox_inches="tight")
    plt.close(figure)
    # 255 colours are enough for a plot, and a third of the bytes in the notebook
    PIL.Image.open(drawn).convert("RGB").quantize(255).save(small, format="png", optimize=True)
    display(Image(data=small.getvalue(), format="png", alt=alt))


def read_table(path: Path) -> pd.DataFrame:
    """A committed CSV, with empty text as "" and empty numbers as NaN.

    compression.csv gets the interval over all seeds of a point, of summary.csv, beside each seed's own:
    `seeds_delta`, `seeds_ci_low` and `seeds_ci_high`.
    """
    frame = pd.read_csv(path)
    text = [c for c in ("technique", "method", "point", "control", "runtime", "precision") if c in frame]
    frame = frame.assign(**{column: frame[column].astype(object).fillna("").astype(str) for column in text})
    summary = path.with_name("summary.csv")
    if path.name != "compression.csv" or not summary.is_file():
        return frame
    over = {"delta_mean": "seeds_delta", "delta_ci_low": "seeds_ci_low", "delta_ci_high": "seeds_ci_high"}
    return frame.merge(
        read_table(summary).rename(columns=over)[[*POINT, *over.values()]],
        how="left",
        on=POINT,
        validate="many_to_one",
    )


def name(value: str) -> str:
    """How a method or runtime is written in a figure."""
    return NAMES.get(value, value.replace("_", " "))


def size_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How small does the file get, and what does it cost? Accuracy with its paired interval."""
    axes = axes or plt.subplots()[1]
    _accuracy_against(compression, compression["size_ratio"], axes)
    axes.set(
        xlabel="times smaller than the fp32 file (numbers: bits)", title="How small, and how much worse?"
    )
    return axes.figure


def claims_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """What is claimed of each technique, among all its points? Means over the seeds, faint of few.

    Left out are controls other than the pipeline's rivals, the pipeline's stages, and the same codes in
    general compressors.
    """
    axes = axes or plt.subplots(figsize=(8, 4.5))[1]
    control = compression["control"].fillna("")
    other = ~control.isin(["", "dense_finetuned", *THIN])
    shown = compression[~other & ~compression["method"].isin(peers.GENERAL)]
    table, seeds = _pooled(shown, shown["size_ratio"], _kinds(shown))
    _reference(axes, seeds)
    for (kind, colour), marker in zip(_colours().items(), MARKERS, strict=False):
        rows = table[table["series"] == kind]
        if rows.empty:
            continue
        faint = (rows["seeds"] < table["seeds"].max()).map({True: 0.45, False: 1.0})
        hollow = {"facecolors": "white", "edgecolors": colour, "marker": marker, "alpha": faint, "zorder": 2}
        axes.scatter(rows["ratio"], rows["accuracy"], s=22, **hollow)
        claimed = rows[rows["headline"] > 0]
        ends, style = (claimed["below"], claimed["above"]), {"linestyle": "none", "capsize": 3, "zorder": 3}
        style |= {"color": colour, "marker": marker, "markersize": 8}
        axes.errorbar(claimed["ratio"], claimed["accuracy"], ends, **style)
        axes.plot([], [], linestyle="none", color=colour, marker=marker, label=kind)
        for _, row in claimed[claimed["accuracy"] > _lowest(table["accuracy"])].iterrows():
            place = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(f"{row['ratio']:.0f}×", (row["ratio"], row["accuracy"]), **place)
    _times(axes, table, seeds, "times smaller than the fp32 file")
    axes.set_title("How small, and how much worse? (filled: claimed)")
    axes.legend(fontsize=8, loc="lower left")
    return axes.figure


def macs_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """How much arithmetic is left away, and what does it cost?

    Masks leave it all: of those only the ones that were trained on. What was rounded is left out, and the
    pipeline's rivals, which had another training. Where MACs are equal, series stand side by side.
    """
    axes = axes or plt.subplots()[1]
    dense = compression[_is_reference(compression)]["macs"].max()
    others = compression["point"].str.contains("int8|rate=") | of_the_pipelines_notebook(compression)
    masks = (compression["technique"] == "pruning") & (compression["macs"] >= dense)
    rows = compression[~others & ~(masks & (compression["division"] == "closed"))]
    _accuracy_against(rows, dense / rows["macs"], axes, apart=1.008)
    axes.set(
        xlabel="times fewer multiplications (MACs)", title="How much less to compute, and how much worse?"
    )
    return axes.figure


def parameters_against_accuracy(compression: pd.DataFrame, axes: Axes | None = None) -> Figure:
    """Does a teacher help a small network? Means over seeds; grey: without a teacher's help.

    Bars are the deviation between seeds; of a single seed, its interval. What lies far below, a shuffled
    teacher's students for one, is counted and left out of the legend.
    """
    axes = axes or plt.subplots(figsize=(8, 4.2))[1]
    arm = compression["control"].where(compression["control"] != "", compression["method"])
    dense, rows = _is_reference(compression), compression.assign(arm=arm)
    for value in rows[dense]["accuracy"]:
        axes.axhline(value, color="grey", linewidth=1)
    arms = rows[~dense].groupby("arm", sort=False)
    for number, (arm, found) in enumerate(arms):
        found = found.assign(half=(found["delta_ci_high"] - found["delta_ci_low"]) / 2)
        points = found.groupby(["point", "params"], sort=False)
        mean, half = points["accuracy"].mean(), points["accuracy"].std().fillna(points["half"].mean())
        # side by side, since all students of a width have as many parameters
        places = mean.index.get_level_values("params") * 1.07 ** (number - (len(arms) - 1) / 2)
        style = {"marker": MARKERS[number % len(MARKERS)], "capsize": 3, "linestyle": "none"}
        style |= {} if (found["control"] == "").all() else {"markerfacecolor": "none", "color": "grey"}
        axes.errorbar(places, mean, half, label=name(arm), **style)
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)")
    axes.set_title("Does a teacher help a small network?")
    shown = rows[~dense & (rows["accuracy"] >= _lowest(rows["accuracy"]))]
    counts = sorted(set(shown["params"]))
    axes.set_xticks(counts, [f"{count / 1e6:.2g} M" for count in counts])
    axes.minorticks_off()
    bars = [drawn for drawn in axes.containers if drawn.get_label() in set(shown["arm"].map(name))]
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(handles=bars, fontsize=8, title="grey: without its help", **place)
    _cut(axes, compression["accuracy"])
    return axes.figure


def _is_reference(compression: pd.DataFrame) -> pd.Series:
    return (compression["technique"] == "baseline") & (compression["control"].fillna("") == "")


def _kinds(table: pd.DataFrame) -> pd.Series:
    """What each row's network is, of `KINDS`."""
    control = table["control"].fillna("")
    kinds = table["technique"].mask(control.isin(THIN), "thin")
    return kinds.mask(control == "dense_finetuned", "baseline").map(KINDS)


def _colours() -> dict[str, tuple[float, float, float]]:
    """The colour of each of `KINDS`, in every figure the same."""
    palette = sns.color_palette("colorblind")
    return dict(zip(KINDS.values(), (palette[place] for place in (7, 1, 2, 4, 9, 0, 3, 5)), strict=True))


def _series(compression: pd.DataFrame) -> pd.Series:
    """What a line of a figure joins: a method, if pruned with its flags; a control apart from its method.

    Of points that have a rate it joins those that differ in nothing else.
    """
    pruned = (compression["technique"] == "pruning") | compression["method"].str.startswith("torch_pruning")
    flags = compression["point"].where(pruned, "").str.replace(r"\S+=\S+\s*", "", regex=True)
    flags = flags.where(~compression["point"].str.contains(",rate="), compression["point"].map(_without_rate))
    control = compression["control"].fillna("")
    rivals = control.where(
        control.isin(["small_dense", "from_scratch"]), ""
    )  # open division: not on the line
    searched = (compression["technique"] == "search") & (control == "")
    kinds = pd.Series("searched", compression.index).where(searched, "")
    labels = [
        ", ".join(filter(None, (kind, name(method), flag, name(rival) if rival != method else "")))
        for kind, method, flag, rival in zip(kinds, compression["method"], flags, rivals, strict=True)
    ]
    return pd.Series(labels, compression.index)


def _without_rate(point: str) -> str:
    parts = [part for part in point.split(",") if not part.startswith("rate=")]
    return ", ".join(part.replace("macs=", "MACs ÷ ").removesuffix("x") for part in parts)


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """A row each point: its means over the seeds, and how far its interval reaches below and above.

    The interval is that of summary.csv; without it (the rows of one run), the seed's own.
    """
    pooled = {
        "seeds_delta": "accuracy_delta",
        "seeds_ci_low": "delta_ci_low",
        "seeds_ci_high": "delta_ci_high",
    }
    if set(pooled) <= set(rows):
        rows = rows.drop(columns=list(pooled.values())).rename(columns=pooled)
    points = rows.groupby(["series", "method", "point", "control"], sort=False)
    means = points.mean(numeric_only=True).assign(seeds=points["seed"].nunique()).reset_index()
    below = (means["accuracy_delta"] - means["delta_ci_low"]).fillna(0)
    above = (means["delta_ci_high"] - means["accuracy_delta"]).fillna(0)
    return means.assign(below=below, above=above).sort_values("ratio", kind="stable")


def _accuracy_against(compression: pd.DataFrame, ratio: pd.Series, axes: Axes, *, apart: float = 1.0) -> None:
    table, seeds = _pooled(compression, ratio, _series(compression))
    _reference(axes, seeds)
    middle = (table["series"].nunique() - 1) / 2
    for number, (label, rows) in enumerate(table.groupby("series", sort=True)):
        rows = rows.assign(ratio=rows["ratio"] * apart ** (number - middle))
        marker = MARKERS[number % len(MARKERS)]
        style = {"marker": marker, "capsize": 3, "label": label}
        thin = rows["control"].eq("small_dense") & rows["point"].str.contains(",rate=")
        if (rows["control"].ne("") & ~thin).any():  # each of a kind of its own
            style["linestyle"] = "none"
        [line, *_] = axes.errorbar(rows["ratio"], rows["accuracy"], (rows["below"], rows["above"]), **style)
        few = rows[rows["seeds"] < table["seeds"].max()]
        hollow = {"color": line.get_color(), "markerfacecolor": "white", "zorder": 3}
        axes.plot(few["ratio"], few["accuracy"], marker=marker, linestyle="none", **hollow)
        for _, row in rows[rows["point"].str.startswith("bits=")].iterrows():
            place = (row["ratio"], row["accuracy"])
            text = row["point"].removeprefix("bits=")
            axes.annotate(text, place, xytext=(5, 5), textcoords="offset points", fontsize=9)
    _times(axes, table, seeds)
    many = len(axes.get_legend_handles_labels()[0]) > 7
    if many and len(axes.figure.axes) == 1:  # the legend stands beside it
        axes.figure.set_size_inches(10, 4.5)
    hollow = f"hollow: fewer than {table['seeds'].max()} seeds" if table["seeds"].nunique() > 1 else None
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}
    axes.legend(fontsize=8, title=hollow, title_fontsize=8, **place)


def _pooled(compression: pd.DataFrame, ratio: pd.Series, series: pd.Series) -> tuple[pd.DataFrame, pd.Series]:
    """A row each point, without the pipeline's stages; and the accuracies of the uncompressed networks."""
    table = compression.assign(ratio=ratio, series=series, control=compression["control"].fillna(""))
    table = table[~table["control"].str.startswith(AFTER)]
    seeds = table[_is_reference(table)]["accuracy"]
    table = _over_seeds(table)
    if len(seeds) > 1:  # not every point has every seed; the difference is to its own seeds' networks
        table["accuracy"] = seeds.mean() + table["accuracy_delta"]
    return table, seeds


def _reference(axes: Axes, seeds: pd.Series) -> None:
    """A line where the uncompressed networks are, and one as far below as counts as no loss."""
    for value in [seeds.mean()] if len(seeds) else []:
        axes.axhline(value, color="grey", linewidth=1)
        axes.axhline(value + NO_LOSS, color="grey", linewidth=1, linestyle=":")
        place = {"xytext": (2, -11), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"−{-NO_LOSS} points", (1, value + NO_LOSS), **place)


def _times(axes: Axes, table: pd.DataFrame, seeds: pd.Series, label: str = "") -> None:
    """Axes of accuracy against how many times less of something."""
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t <= 1.5 * table["ratio"].max()]
    of = f", fp32: mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
    axes.set(xscale="log", xlabel=label, ylabel=f"test accuracy (%){of}")
    axes.set_xticks(ticks, [f"{t}×" for t in ticks])
    axes.minorticks_off()
    _cut(axes, table["accuracy"])


def _lowest(accuracies: pd.Series) -> float:
    """Where a figure of accuracies ends: `SHOWN` points below the best."""
    return accuracies.max() - SHOWN


def _cut(axes: Axes, accuracies: pd.Series) -> None:
    """Show the `SHOWN` points below the best, where networks differ, and say how many are further down."""
    lowest = _lowest(accuracies)
    below = int((accuracies < lowest).sum())
    if below:
        axes.set_ylim(lowest, accuracies.max() + 0.05 * SHOWN)
        text = f"↓ {below} more down to {accuracies.min():.1f} %"
        axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", fontsize=9)


def latency_bars(latency: pd.DataFrame, axes: Axes | None = None, *, threads: int = 1) -> Figure:
    """How long does one picture take, where? Medians at batch 1 with one number of threads."""
    rows = _single(latency, threads).sort_values("p50_ms", ascending=False)
    axes = axes or plt.subplots(figsize=(7.5, max(3.0, 0.26 * len(rows))))[1]
    colours = dict(zip(("fp32", "int8", "s8s8", "bf16"), sns.color_palette("colorblind"), strict=False))
    labels = [f"{name(row['runtime'])} {row['precision']}, {_point(row)}" for _, row in rows.iterrows()]
    places = range(len(rows))
    axes.barh(places, rows["p50_ms"], color=[colours.get(p, "grey") for p in rows["precision"]])
    axes.set_yticks(places, labels, fontsize=8)
    for place, (_, row) in zip(places, rows.iterrows(), strict=True):
        axes.text(row["p50_ms"], place, f" {row['p50_ms']:.2f} ms", va="center", fontsize=8)
    axes.set(xlabel=f"median milliseconds a picture, {threads} thread{'s' if threads > 1 else ''}")
    axes.set_title("How long does one picture take, where?")
    shown = [p for p in colours if p in set(rows["precision"])]
    axes.legend(handles=[Patch(color=colours[p], label=p) for p in shown], loc="upper right")
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    return axes.figure


def _single(latency: pd.DataFrame, threads: int) -> pd.DataFrame:
    """What was timed for one picture, once each."""
    timed = (latency["batch"] == 1) & (latency["threads"] == threads) & latency["p50_ms"].notna()
    return latency[timed & ~latency["control"].isin(UNTIMED)]


def _point(row: pd.Series) -> str:
    """A network in a few words."""
    point = row["point"].replace("bits=", "") + (" bits" if "bits=" in row["point"] else "")
    dense = row["technique"] == "baseline" and not row["control"]
    stage = name(row["control"]) if row["control"].startswith(AFTER) else ""
    return " ".join(filter(None, (row["model"] if dense else name(row["method"]), point, stage)))


def frontier(latency: pd.DataFrame, axes: Axes | None = None, *, threads: int = 1) -> Figure:
    """Which networks are worth having? Accuracy against time: a colour a technique, a marker a runtime."""
    axes = axes or plt.subplots(figsize=(8, 4.5))[1]
    rows = _single(latency, threads).dropna(subset=["accuracy"]).sort_values("p50_ms", kind="stable")
    rows = rows[~rows["control"].str.startswith(AFTER)]
    kinds = _kinds(rows)
    colours = {kind: colour for kind, colour in _colours().items() if kind in set(kinds)}
    markers = dict(zip(rows["runtime"].unique(), MARKERS, strict=False))
    for kind, (_, row) in zip(kinds, rows.iterrows(), strict=True):
        colour = colours[kind]
        integers = row["precision"] in ("int8", "s8s8")
        style = {"edgecolors": colour, "facecolors": colour if integers else "none"}
        axes.scatter(row["p50_ms"], row["accuracy"], marker=markers[row["runtime"]], s=70, **style)
    best = _worth_having(rows)
    axes.step(best["p50_ms"], best["accuracy"], where="post", color="grey", linewidth=1, zorder=0)
    handles = [axes.scatter([], [], color=colour, label=kind) for kind, colour in colours.items()]
    handles += [axes.scatter([], [], color="black", marker=m, label=name(r)) for r, m in markers.items()]
    if handles:
        axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_xscale("log")
        ticks = [t * 10.0**power for power in range(-3, 4) for t in (1, 2, 5)]
        ticks = [t for t in ticks if 0.7 * rows["p50_ms"].min() < t < 1.4 * rows["p50_ms"].max()]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    axes.set(xlabel="median milliseconds a picture", ylabel="test accuracy (%)")
    axes.set_title("Which networks are worth having? (filled: in integers)")
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
    """Smaller, worse, faster? The tables of one profile in one picture."""
    latency = read_table(profile_dir / "latency.csv")
    style()
    figure, panels = plt.subplots(1, 2 if len(latency) else 1, figsize=(15 if len(latency) else 10, 4.5))
    left, *rest = np.atleast_1d(panels)
    compression = read_table(profile_dir / "compression.csv")
    claims_against_accuracy(compression, left)
    for right in rest:
        frontier(latency, right, threads=int(latency["threads"].min()))
    figure.tight_layout()
    return figure


def waterfall(compression: pd.DataFrame, latency: pd.DataFrame | None = None) -> Figure | None:
    """What did each stage of the pipeline give? Bytes, milliseconds (untimed: MACs) and accuracy.

    Of the first pipeline that has rows between its stages; None where there is none.
    """
    between = compression[compression["control"].str.startswith(AFTER)]
    if not len(between):
        return None
    first = between.iloc[0]
    same = compression[
        (compression[["run", "method", "point"]] == first[["run", "method", "point"]]).all(axis=1)
    ]
    dense = compression[_is_reference(compression) & (compression["seed"] == first["seed"])]
    stages = pd.concat([dense.head(1), same[same["control"] != ""], same[same["control"] == ""]])
    names = [control.removeprefix(AFTER) for control in stages["control"]]
    names[0], names[-1] = "fp32", first["method"].rpartition("_")[2]
    shown = {"bytes of the file": stages["artifact_bytes"], "million MACs": stages["macs"] / 1e6}
    if latency is not None and (found := _stage_times(stages["artifact_sha256"], latency)):
        shown = {"bytes of the file": stages["artifact_bytes"], found[0]: found[1]}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for axes, (label, heights) in zip(panels, shown.items(), strict=False):
        bars = axes.bar(names, heights, color=["grey"] + ["C0"] * (len(names) - 1))
        axes.bar_label(bars, fmt="{:.4g}" if axes is not panels[0] else "{:,.0f}", fontsize=8)
        axes.set(title=f"{label} (log)", yscale="log", yticks=[])  # each bar says how much it is
        axes.margins(y=0.12)
        axes.minorticks_off()
    half = (stages["delta_ci_high"] - stages["delta_ci_low"]).fillna(0) / 2
    panels[2].errorbar(names, stages["accuracy"], half, marker="o", capsize=3, linestyle="none")
    for place, accuracy in zip(names, stages["accuracy"], strict=True):
        panels[2].annotate(
            f"{accuracy:.2f}", (place, accuracy), xytext=(6, 0), textcoords="offset points", fontsize=8
        )
    panels[2].set(title="test accuracy (%)")
    panels[2].margins(x=0.2)
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
    precisions = rows[rows["runtime"] == runtime].set_index("artifact_sha256")["precision"]
    integers = [precisions.loc[[sha256]].eq("int8").any() for sha256 in networks]
    label = f"milliseconds in {name(runtime)}"
    label += ", the last in int8" if integers == [False] * (len(integers) - 1) + [True] else ""
    return label, list(times[runtime])


def write(profile_dir: Path) -> None:
    """Draw the tables of a profile into its figures/."""
    compression, latency = (read_table(profile_dir / f"{kind}.csv") for kind in ("compression", "latency"))
    drawn = {"headline": headline(profile_dir), "waterfall": waterfall(compression, latency)}
    (profile_dir / "figures").mkdir(exist_ok=True)
    for key, figure in drawn.items():
        if figure is not None:
            figure.tight_layout()
            figure.savefig(profile_dir / "figures" / f"{key}.png")
            plt.close(figure)
