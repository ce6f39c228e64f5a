"""Your own images, and a network of yours if you have one, compressed in one command.

All that can be wrong is told before any work. Then come the notebooks 01, 02, 03, 06 and 07, each in a run
folder below `--out`, with lengths that fit the number of images; last `own_result` writes what they found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.execute import CELL_TIMEOUT
from bench.folder import environment
from bench.own_goal import Goal, GoalError, parse
from bench.tables import ResultError
from nnc_utils import data, models, processes, training
from nnc_utils.data import Data, Split
from nnc_utils.pretrained import OtherNetworkError, load_pretrained
from nnc_utils.provenance import file_sha256, relative, root, write_atomically

DEPTHS = {f"resnet{depth}": depth for depth in models.RESNETS}
SMALL = 32  # pixels up to which the first convolution keeps the resolution
MOST_MACS = 50.0  # times fewer multiplications that channels can be removed to, in each of the networks
INPUTS = "inputs.json"  # in the folder: of which images and weights its runs are
SECONDS = {  # of a notebook apart from its trainings: on two cores, ResNet-18, 64 pixels
    "01_baseline": 40,
    "02_quantization": 40,
    "03_pruning": 50,
    "06_pipeline": 60,
    "07_deployment": 120,
}


class OwnError(ValueError):
    """What was given cannot be worked on; the message says what is needed."""


@dataclass(frozen=True)
class Asked:
    """What the command was given, checked."""

    images: Data
    goal: Goal
    out: Path
    depth: int
    stem: str
    weights: str  # empty: none
    fresh: tuple[str, ...]  # layers that the weights do not fit
    epochs: float


# --- Checked before any work ----------------------------------------------------------------------------


def check(options: argparse.Namespace) -> Asked:
    """Everything that was given, read and checked; an error says what is wrong and what is allowed."""
    goal = parse(options.goal)
    if options.model not in ("", *DEPTHS):
        raise OwnError(f"unknown model {options.model!r}: one of {', '.join(DEPTHS)}")
    if not 8 <= options.size <= 1024:
        raise OwnError(f"size is {options.size}: from 8 to 1024 pixels are needed")
    if not 0 <= options.epochs <= 1000:
        raise OwnError(f"epochs is {options.epochs:g}: at most 1000, or 0 for what fits the images")
    folder = Path(options.data).expanduser().resolve()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="imagefolder:")  # `found` tells it
        images = data.load(f"imagefolder:{folder}", size=options.size)
    weights = options.weights
    if weights and weights != "imagenet":
        weights = str(Path(weights).expanduser().resolve())
    depth, stem, fresh = architecture(images, weights, options.model)
    count = len(images.train)
    epochs = options.epochs or length(count, trained=bool(weights))
    if epochs < (least := 4 * batch_size(count) / count):  # a quarter of them trains the compressed networks
        raise OwnError(f"epochs is {epochs:g}: {least:.2g} or more are needed for {count} training images")
    out = Path(options.out or root() / "results/own" / folder.name).expanduser().resolve()
    if out.is_relative_to(folder):
        raise OwnError(f"{out} lies in the folder of images: give another one with --out")
    return Asked(images, goal, out, depth, stem, weights, tuple(fresh), epochs)


def architecture(images: Data, weights: str, model: str) -> tuple[int, str, list[str]]:
    """Depth, stem and the layers that start anew; without a model's name that which the weights fit."""
    depths = [DEPTHS[model]] if model else list(DEPTHS.values())
    stems = ["imagenet", "small"] if images.size > SMALL else ["small", "imagenet"]
    if not weights:
        return depths[0], stems[0], []
    shape = {"channels": images.channels, "size": images.size, "classes": len(images.classes)}
    fitting, errors, said = [], [], io.StringIO()
    for depth in depths if weights != "imagenet" else depths[:1]:
        for stem in stems:
            network = models.build(models.resnet(depth, stem=stem, **shape))
            try:
                with contextlib.redirect_stdout(said):
                    fitting.append((depth, stem, load_pretrained(network, weights)))
            except (ValueError, OSError) as error:
                errors.append(error)
    if not fitting:  # of a network whose layers fit, what else is wrong
        raise OwnError(str(min(errors, key=lambda error: isinstance(error, OtherNetworkError))))
    print("".join(dict.fromkeys(said.getvalue().splitlines(keepends=True))), end="")
    return min(fitting, key=lambda fit: "conv1" in fit[2])


def length(images: int, *, trained: bool) -> float:
    """Epochs of the uncompressed network: the fewer images, the more; a trained one needs a third."""
    epochs = min(60, max(10, 1000 / images**0.5))
    return round(epochs / 3 if trained else epochs, 1)


def batch_size(images: int) -> int:
    """Images a step."""
    return min(images, 32 if images >= 256 else 16)


def found(asked: Asked) -> list[str]:
    """What the folder and the weights hold, in lines for the screen."""
    images = asked.images
    parts = ", ".join(f"{len(getattr(images, which)):,} {which}" for which in data.SPLITS)
    kind = "grey" if images.channels == 1 else "coloured"
    lines = [f"{len(images.classes)} classes; {parts}; {kind}, read as {images.size} x {images.size} pixels"]
    lines += [f"  {line}" for line in images.folder.report()]
    begins = f"starts from {asked.weights}" if asked.weights else "starts from new weights"
    lines.append(f"ResNet-{asked.depth}, {asked.stem} stem, {begins}; {asked.epochs:g} epochs")
    if asked.fresh:
        names = ", ".join({"fc": "the classifier", "conv1": "the stem"}.get(n, n) for n in asked.fresh)
        lines.append(f"  new, since the weights have another shape there: {names}")
    if asked.weights:
        lines.append("  trained on with your images, since these are normalized by their own mean")
    lines.append("  training shifts and mirrors the images: not meant for text or numbers")
    return [*lines, f"goal: {asked.goal}", f"everything goes into {asked.out}"]


# --- The notebooks and their parameters -----------------------------------------------------------------


def notebooks(asked: Asked) -> dict[str, dict[str, Any]]:
    """Notebook -> its parameters, in the order in which they run."""
    batch, again = batch_size(len(asked.images.train)), asked.epochs / 4
    strong, int8 = min(max(8.0, asked.goal.faster), MOST_MACS), {"method": "uniform", "bits": 7}
    pruned = [
        {"method": "weights", "sparsity": 0.9, "train": "finetune"},
        {"method": "channels", "macs": 3, "compensate": True, "train": "finetune", "int8": True},
    ]
    pipelines = [  # the surer a network is of its few images, the less λ it stands
        {"method": "pipeline", "macs": 3, "lambda_": 1e-12},
        *({"method": "pipeline", "macs": strong, "lambda_": price} for price in (1e-12, 1e-11, 1e-10)),
    ]
    small = {"method": "small_dense", "macs": strong, "lambda_": 1e-11}
    start = {"dataset": asked.images.name, "size": asked.images.size, "depth": asked.depth}
    start |= {"stem": asked.stem, "weights": asked.weights, "epochs": asked.epochs, "augment": True}
    start |= {"batch_size": batch, "learning_rate": 0.01 if asked.weights else 0.02}
    both = {"train_epochs": again, "learning_rate": 0.01, "scoring_images": 256}
    last = {"prune_epochs": again / 4, "quantize_epochs": again / 4, "distill_epochs": again}
    last |= {"epochs": 1.0, "configurations": pipelines, "controls": [small]}
    timed = {"networks": [int8, *pruned, *pipelines, small], "batches": [1], "threads": [1], "seconds": 15.0}
    timed["in_runtimes"] = ["eager", "onnxruntime", "executorch"]
    second_order = {"method": "hessian_rounding", "lambda_": 1e-12, "reestimate": True}
    return {
        "01_baseline": start,
        "02_quantization": {"configurations": [int8, second_order]},
        "03_pruning": both | {"configurations": pruned},
        "06_pipeline": last,
        "07_deployment": timed,
    }


def estimate(asked: Asked, planned: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of each notebook: what its trainings see, times a measured step, and what else it does."""
    one, count = seconds_an_image(asked), len(asked.images.train)
    again = planned["03_pruning"]["train_epochs"]
    passes = {"01_baseline": asked.epochs, "03_pruning": 5 * again, "06_pipeline": 7 * again}
    return {name: seconds + passes.get(name, 0) * count * one for name, seconds in SECONDS.items()}


def seconds_an_image(asked: Asked) -> float:
    """Of a training step on this machine, for one image; measured in two batches after a first try."""
    images, batch = asked.images, min(16, len(asked.images.train))
    shape = {"channels": images.channels, "size": images.size, "classes": len(images.classes)}
    network = models.build(models.resnet(asked.depth, stem=asked.stem, **shape))
    few = Split(images.train.images[: 2 * batch], images.train.labels[: 2 * batch])
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()):
            history = training.fit(network, replace(images, train=few), epochs=1, batch_size=batch)
    return history.seconds / history.images


def run(asked: Asked, planned: dict[str, dict[str, Any]], seconds: dict[str, float]) -> list[Path]:
    """The run folders, each finished: what was before is kept. ResultError: a notebook failed."""
    folders = {name: asked.out / "runs" / name / "seed=1" for name in planned}
    plan = {relative(folder): seconds[name] for name, folder in folders.items()}
    for name, given in planned.items():
        before = [str(folders[other]) for other in planned if other < name]
        upstream = before if name == "07_deployment" else before[:1]  # else the uncompressed network
        given = given | {"profile": "own"} | ({"upstream": upstream} if upstream else {})
        notebook = root() / f"notebooks/{name}.ipynb"
        command = [sys.executable, "-m", "bench", "run", str(notebook), str(folders[name])]
        command += [json.dumps(given), "--keep", "current", "--no-lesson"]
        command += ["--timeout", f"{max(CELL_TIMEOUT, 5 * seconds[name]):.0f}"]
        own = environment() | {"NNC_PLAN": json.dumps(plan)}
        if subprocess.run(command, cwd=root(), env=own).returncode != 0:
            raise ResultError("Call the same command again to go on: what is finished stays.")
    return list(folders.values())


def claim_folder(asked: Asked) -> None:
    """Make the folder this command's own; runs of other images or weights in it are put aside, and told."""
    inputs = {"data": asked.images.name, "images": asked.images.digests()}
    inputs["classes"] = list(asked.images.classes)
    inputs["weights"] = file_sha256(Path(asked.weights)) if os.path.isfile(asked.weights) else asked.weights
    mark, runs = asked.out / INPUTS, asked.out / "runs"
    try:
        before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != inputs.keys():
        before = None  # somebody else's file of this name
    others = asked.out.is_dir() and any(not entry.name.startswith(".") for entry in asked.out.iterdir())
    if before is None and others:
        raise OwnError(f"{asked.out} holds files of something else: give another folder with --out")
    if before and before["data"] != inputs["data"]:
        raise OwnError(f"{asked.out} is about {before['data']}: give another folder with --out")
    asked.out.mkdir(parents=True, exist_ok=True)
    processes.lock(asked.out / ".own.lock", wait=1, what=f"the folder {asked.out}")
    if before and before != inputs:
        aside = asked.out / f"runs-before-{time.strftime('%Y%m%d-%H%M%S')}"
        print("images, their size, classes or the weights have changed: everything is measured again")
        print(f"what was measured before goes to {aside}", flush=True)
        if runs.is_dir():
            runs.rename(aside)
    write_atomically(mark, json.dumps(inputs, indent=1))


def main(arguments: Sequence[str]) -> int:
    """``python -m bench own``: 0, 1 where a notebook failed, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench own", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="a folder with one sub-folder of images a class")
    parser.add_argument("--weights", default="", help="a checkpoint in torchvision's names, or imagenet")
    parser.add_argument("--model", default="", help=", ".join(DEPTHS) + "; default: the first that fits")
    parser.add_argument("--size", type=int, default=64, help="pixels that images are resized to")
    parser.add_argument("--goal", default="0.3 points", help="'20x smaller', '10x faster', '0.5 points'")
    parser.add_argument("--epochs", type=float, default=0, help="of the uncompressed network; 0: as fits")
    parser.add_argument("--out", default="", help="folder for everything; default: results/own/NAME")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, processes.end_on_signal)
    begin = time.time()
    try:
        asked = check(options)
        print(data.printable("\n".join(found(asked))), flush=True)
        claim_folder(asked)
    except (OwnError, GoalError, RuntimeError, OSError) as error:  # DataError, LockedError are of the third
        print(data.printable(str(error)), file=sys.stderr)
        return 2
    planned = notebooks(asked)
    seconds = estimate(asked, planned)
    print(f"about {sum(seconds.values()) / 60:.0f} minutes, if nothing is finished yet\n", flush=True)
    try:
        folders = run(asked, planned, seconds)
        from bench import own_result  # draws and exports, which what comes before does not need

        print("\n" + own_result.write(asked, folders))
    except (ResultError, OSError) as error:  # the latter of a full disk
        print(error, file=sys.stderr)
        return 1
    print(f"\n{asked.out / 'report.md'} says the same ({(time.time() - begin) / 60:.0f} min)")
    return 0
