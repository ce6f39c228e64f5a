"""The headline: did it get smaller, faster, worse? In sentences, and as a table."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from nnc_utils.over_seeds import SEEDS_OF_A_CLAIM
from nnc_utils.paired import another_teacher, in_points, labels_for, thin_rivals, versus
from nnc_utils.peers import GENERAL
from nnc_utils.reports.committed import RATIO, TIMING, Tables, baselines
from nnc_utils.reports.words import (
    STALE,
    STALE_NOTE,
    count_seeds,
    delta_over_seeds,
    factor,
    in_words,
    markdown,
    megabytes,
    network_name,
    no_loss,
    number,
    verdicts,
)
from nnc_utils.rows import AFTER, NO_LOSS
from nnc_utils.tables import POINT, THIN, named_pipeline, of_the_pipelines_notebook

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
    "random_near_limit": "an architecture found by random search among those near the limit (05)",
    "random_alone": "the best of random architectures, each trained alone (05)",
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
    "compressed": "taught by what the pipeline made of the large network",
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
            "file": megabytes(network["artifact_bytes"]),
            "smaller": factor(network["size_ratio"]) + " (simulated)" * bool(network["simulated"]),
        }
        timed = tables.timed(network["artifact_sha256"])
        for _, row in timed.iterrows() if len(timed) else [(None, None)]:
            where = "eager, not timed" if row is None else f"{row['runtime']} {row['precision']}"
            runs = {network["run"]} | ({row["run"]} if row is not None else set())
            delta = tables.differences(network, row)
            accuracy = network["accuracy"] if row is None else row["accuracy"]
            line = {
                "network": network_name(network) + (STALE if runs & tables.stale else ""),
                "runs in": where,
            }
            line |= {"accuracy": f"{accuracy:.2f}"}
            itself = is_baseline and (row is None or pd.isna(row["agreement"]))
            line["Δ points [95 %]"] = "reference" if itself else in_points(delta)
            line["no loss"] = "–" if itself else no_loss(delta["delta_ci_low"], delta["delta_ci_high"])
            time = {} if row is None else row
            line |= size | {"runtime loads": megabytes(time.get("runtime_bytes"))}
            line["ms"] = number(time.get("p50_ms"), ".3f")
            line["× eager fp32"] = factor(time.get("speedup_eager_fp32"))
            line["× fastest fp32"] = factor(time.get("speedup_best_fp32"))
            lines.append(line)
    return markdown(lines) + "\n\n" + _legend(tables)


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
    baseline = tables.compression[baselines(tables.compression)].iloc[0]
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
    loss = in_words(point["delta_ci_low"], point["delta_ci_high"])
    text = (
        f"`{point['method']} {point['point']}`: {factor(point['size_ratio'])} smaller, "
        f"{delta_over_seeds(point)} points over {count_seeds(point)}: {loss}."
    )
    same = (tables.compression[POINT] == point[POINT]).all(axis=1)
    network = tables.compression[same].sort_values("seed").iloc[0]
    timed = tables.timed(network["artifact_sha256"])
    for _, row in timed[timed["precision"] == "int8"].iterrows():
        again = tables.again[(tables.again[TIMING] == row[TIMING]).all(axis=1)][RATIO]
        second = f" ({factor(again.iloc[0])} when it was timed again)" if len(again) else ""
        text += (
            f" In {row['runtime']} int8 {factor(row[RATIO])} as fast{second} as the fastest fp32 runtime, at "
            f"{in_points(tables.differences(network, row))} points."
        )
    return text


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
    return text + verdicts(rivals_of(tables, point))


def rivals_of(tables: Tables, point: pd.Series) -> list[tuple[str, str]]:
    """How a pipeline stands against each thin rival and other tool of its training: verdict, and of whom."""
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
        fewer = f", {found['seeds']} of {count_seeds(point)}" * bool(found["seeds"] != point["seeds"])
        teacher = ", another teacher" * another_teacher(point["point"], theirs.iloc[0])
        about = f"`{method} {setting}` ({found['their bytes']:,} bytes, {found['points']}{fewer}{teacher})"
        told.append((found["verdict"], about))
    return told
