"""What `bench own` ends with: a table, a figure, and the network that answers the goal, ready to be used."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from bench import own_goal
from bench.committed import FASTEST, Tables
from bench.own_goal import Offer
from bench.publish import publish
from bench.report import factor
from bench.tables import Run, guessing, read_run
from nnc_utils import artifact, evaluation, export, figures
from nnc_utils.data import Data
from nnc_utils.devices import exact_device
from nnc_utils.rows import AFTER, NO_LOSS, evidence, interval_text, read_predictions, within

if TYPE_CHECKING:
    from bench.own import Asked

PROGRAM = Path(__file__).with_name("classify.py.txt")  # as the README shows it
TRIED = 200  # test images on which the program is compared with the table, at most
HEAD = "| network | test accuracy | within 0.3 pp | file | one image | faster than fp32 |"


def write(asked: Asked, folders: list[Path]) -> str:
    """Tables, figure, network, program and report in the command's folder; the report's text."""
    runs = [read_run(folder) for folder in folders]
    tables = Tables(publish(folders, "own", out=asked.out))
    points = shown(tables.summary)
    own = [tables.rows_of(point).iloc[0] for _, point in compressed(points).iterrows()]
    dense = sorted({row["reference_sha256"] for row in own})
    reference = max(_validated(_file(runs, sha256), asked.images) for sha256 in dense)
    offers = [_offer(tables, row, _file(runs, row["artifact_sha256"]), asked, reference) for row in own]
    offer = own_goal.best(asked.goal, offers)
    draw(points, tables, offer, asked.out / "figures/own.png")
    told = verdict(asked, offer, reference)
    if asked.goal.points is not None:
        row = tables.compression.set_index("artifact_sha256").loc[offer.sha256]
        interval = row["delta_ci_low"], row["delta_ci_high"]
        told.append(own_goal.can_tell(asked.goal.points, *interval, row["total"]))
    told += deliver(_file(runs, offer.sha256), asked.out)
    if (asked.out / "net.onnx").is_file():
        told.append(tried(asked, tables, offer.sha256))
    parts = [f"# {Path(asked.images.name).name}: goal {asked.goal}", table(points, tables, asked)]
    parts += ["\n".join(f"- {line}" for line in told), "![Accuracy against times smaller](figures/own.png)"]
    text = "\n\n".join(parts)
    (asked.out / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Without the networks between a pipeline's stages; of those trained on only 06's, the longest."""
    between = summary["control"].str.startswith(AFTER)
    dense = (summary["control"] == "dense_finetuned") & (summary["technique"] != "baseline")
    return summary[~between & ~dense]


def compressed(points: pd.DataFrame) -> pd.DataFrame:
    """Without the uncompressed network, and the same trained on."""
    return points[~points["method"].isin(["train", "dense_finetuned"])]


def _file(runs: list[Run], sha256: str) -> Path:
    run = next(r for r in runs if sha256 in {entry.artifact_sha256 for entry in r.record.artifacts})
    return run.artifact(sha256)


def _offer(tables: Tables, row: pd.Series, file: Path, asked: Asked, reference: float) -> Offer:
    time = tables.fastest(row)
    faster = None if time is None else float(time[FASTEST])
    ratio, nbytes = float(row["size_ratio"]), int(row["artifact_bytes"])
    lost = reference - _validated(file, asked.images)
    return Offer(row["title"], row["artifact_sha256"], nbytes, ratio, faster, lost)


def _validated(path: Path, images: Data) -> float:
    """Accuracy on the validation images in percent."""
    about = {"normalize": images.normalize, "device": exact_device()}
    predicted = evaluation.predict(artifact.load(path), images.validation, **about)
    return evaluation.accuracy(predicted, images.validation.labels)


def verdict(asked: Asked, offer: Offer, reference: float) -> list[str]:
    """What answers the goal; first of all, where the uncompressed network, the reference, only guesses."""
    labels = asked.images.validation.labels
    told = [f"Beware: {only}."] if (only := guessing(reference, labels)) else []
    return told + own_goal.verdict(asked.goal, offer, len(labels))


# --- Table and figure -----------------------------------------------------------------------------------


def table(points: pd.DataFrame, tables: Tables, asked: Asked) -> str:
    """The README's columns, a line each network, and how to read them."""
    lines = [HEAD, "| --- " * 6 + "|"]
    for _, point in points.iterrows():
        time, first = tables.fastest(point), point["method"] == "train"
        delta = point.rename({"delta_mean": "accuracy_delta"})
        name = f"ResNet-{asked.depth}, uncompressed" if first else point["title"]
        difference = "–" if first else f"{interval_text(delta)}: {within(delta)}"
        file = f"{point['artifact_bytes'] / 1e6:.2f} MB, {factor(point['size_ratio'])} smaller"
        one, speed = "not timed", "–"
        if time is not None:
            one = f"{time['p50_ms']:.3f} ms, {figures.name(time['runtime'])}"
            speed = "1×" if first else factor(time[FASTEST])
        accuracy = f"{point['accuracy_mean']:.2f} %"
        lines.append(f"| {' | '.join([name, accuracy, difference, file, one, speed])} |")
    count = tables.images
    lines += [
        "",
        f"- {count:,} test images, one seed. They cannot tell a difference below {300 / count:.2f} pp from "
        f"none; {-NO_LOSS} pp takes {-300 / NO_LOSS:,.0f} images or more.",
        "- A retrained network is compared with the better, on validation images, of the uncompressed one "
        "and the same trained on for as long. The narrow network is trained anew, as a control.",
        "- A time is the median for one image on one thread, in the fastest runtime of each network.",
    ]
    return "\n".join(lines)


def draw(points: pd.DataFrame, tables: Tables, offer: Offer, path: Path) -> None:
    """Accuracy with its interval against times smaller; what answers the goal is filled."""
    plt.switch_backend("Agg")
    figures.style()
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for (_, point), marker in zip(points.iterrows(), figures.MARKERS):
        mean, low, high = point[["delta_mean", "delta_ci_low", "delta_ci_high"]]
        chosen = tables.rows_of(point)["artifact_sha256"].iloc[0] == offer.sha256
        look = {"marker": marker, "markersize": 11 if chosen else 8, "linestyle": "none", "capsize": 3}
        look |= {"markerfacecolor": None if chosen else "white", "label": point["title"]}
        axes.errorbar(point["size_ratio"], point["accuracy_mean"], [[mean - low], [high - mean]], **look)
    axes.set(xscale="log", xlabel="times smaller than the fp32 file", ylabel="test accuracy (%)")
    axes.set_title("How small, and how much worse? (filled: the goal's network)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


# --- The network, ready to be used ----------------------------------------------------------------------


def deliver(file: Path, out: Path) -> list[str]:
    """Write the artifact, its ONNX and ExecuTorch files and the program; a line for each, or why not."""
    for old in ("net.safetensors", "net.onnx", "net.onnx.json", "net.pte", "net.pte.json"):
        (out / old).unlink(missing_ok=True)
    lines = [f"`{shutil.copy(file, out / 'net.safetensors').name}`: the network as a file, to be inspected"]
    for to, suffix in (("onnx", "onnx"), ("executorch", "pte")):
        runtime = figures.name(export.TARGETS[to])
        try:
            written = export.export(file, to=to, out=out / f"net.{suffix}")
            lines.append(f"`{written[0].name}` for {runtime}, beside it how to use it")
        except export.ExportError as error:
            lines.append(f"no net.{suffix}: {error}")
    if not (out / "net.onnx").is_file():
        (out / "classify.py").unlink(missing_ok=True)
        return lines
    shutil.copy(PROGRAM, out / "classify.py")
    return [*lines, f"`python {out / 'classify.py'} IMAGE` names its class"]


def tried(asked: Asked, tables: Tables, sha256: str) -> str:
    """On how many test images the program says what the table's accuracy is made of."""
    files = [file for own in asked.images.folder.files["test"].values() for file in own]
    predictions = read_predictions(asked.out / "predictions" / evidence(sha256))
    compared = list(zip(files, predictions, strict=True))[:: -(-len(files) // TRIED)]
    said = [(classify(asked.out / "classify.py", file), asked.images.classes[p]) for file, p in compared]
    same = sum(name == expected for name, expected in said)
    return f"classify.py names the table's class on {same} of {len(said)} test images"


def classify(program: Path, image: Path) -> str:
    """What the program prints for an image."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [str(program), os.fspath(image)]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(program))
    finally:
        sys.argv = before
    return printed.getvalue().strip()
