"""A converged network that lies in the repository: where it is given, 01 trains nothing.

Three files in one folder: the network in 16 bits, `history.csv`, an epoch of its training a line, and
`provenance.json`, the record of the run that trained it. Beside them narrow networks that had the same
training: where 06 would train a rival from new weights, it takes the one of this architecture; its further
training in a run of 06 (`trained_*.tensors` there) may be copied here, too. And the logits of the network for
each training image, which students of it then need not wait for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from bench.tables import ResultError, read_run
from nnc_utils import artifact, data, evaluation, models, training
from nnc_utils.baseline import narrow_resnet, spec_of
from nnc_utils.provenance import root, write_atomically

RECIPE = ("epochs", "batch_size", "learning_rate", "augment")
HISTORY, PROVENANCE = "history.csv", "provenance.json"
MOST_LOST = 0.1  # percentage points of validation accuracy that 16 bits may cost


class Reference(NamedTuple):
    """A network that was trained before: computing in 32 bits, with its epochs and their parameters."""

    network: models.ResNet
    history: training.History
    recipe: dict[str, Any]


def read(given: dict[str, Any], images: data.Data) -> Reference:
    """The network that `pretrained` among the parameters of 01 names, if the others describe it.

    All seeds may start from one network. A file that is missing, or of another data set or architecture, is
    a ResultError before any work.
    """
    path, spec = root() / given["pretrained"], spec_of(given, images)
    if given["weights"]:
        raise ResultError("pretrained and weights both say where 01 starts: give one of them")
    if missing := [n for n in (path.name, HISTORY, PROVENANCE) if not path.with_name(n).is_file()]:
        names = ", ".join(missing)
        raise ResultError(f"{path.parent} lacks {names}: `python -m bench reference RUN` makes such files")
    stored = artifact.read(path)
    record = json.loads(path.with_name(PROVENANCE).read_text(encoding="utf-8"))
    wanted = {"data set": images.name, "classes": images.classes, "network": _described(spec)}
    wanted |= {"checksum": record["extra"]["reference"]["sha256"]}
    there = {"data set": record["dataset"], "classes": stored.classes, "network": _described(stored.spec)}
    there |= {"checksum": stored.sha256}
    if saw := record["extra"].get("images"):  # own images
        there, wanted = there | {"images": saw}, wanted | {"images": images.digests()}
    differ = [f"{name} {there[name]}, not {wanted[name]}" for name in wanted if there[name] != wanted[name]]
    if differ:
        raise ResultError(f"{path} is not what the parameters of 01 describe: {'; '.join(differ)}")
    epochs = pd.read_csv(path.with_name(HISTORY)).to_dict("records")
    history = training.History(training.Epoch(**epoch) for epoch in epochs)
    network = artifact.network(stored, trainable=True).eval()
    return Reference(network, history, {name: record["parameters"][name] for name in RECIPE})


def _described(spec: models.Spec) -> str:
    size = f"{spec.channels} × {spec.size} × {spec.size} pixels"
    return f"{models.parameters(spec):,} parameters, stem {spec.stem}, {size}"


def write(folder: Path, out: Path) -> Path:
    """Make the three files in `out` of a finished run of 01; returns the network's.

    ResultError: the run kept no history, or 16 bits lose more than `MOST_LOST` on the validation images.
    """
    run = read_run(folder)
    record, trained = run.record.model_dump(mode="json"), artifact.read(run.artifact("fp32"))
    if not (history := record["extra"].pop("history", None)):
        raise ResultError(f"{run.run} kept no history of its training: run 01_baseline again")
    images = data.load(run.dataset, size=trained.spec.size)
    path = out / _name(record)
    out.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    network = artifact.network(trained, trainable=True)
    stored = artifact.save(network, draft, dtype=torch.float16, **_about(images))
    accuracies = [_validated(one, images) for one in (trained, stored)]
    said = f"validation {accuracies[0]:.2f} % in 32 bits, {accuracies[1]:.2f} % in 16"
    if accuracies[0] - accuracies[1] > MOST_LOST:
        draft.unlink()
        raise ResultError(f"{said}: more than {MOST_LOST} points are lost, nothing is written")
    record["extra"]["reference"] = {"sha256": stored.sha256, "validation": accuracies}
    write_atomically(out / HISTORY, pd.DataFrame(history).to_csv(index=False))
    write_atomically(out / PROVENANCE, json.dumps(record, indent=1) + "\n")
    draft.replace(path)
    print(f"{path}: {stored.nbytes:,} bytes, {said}")
    return path


def _validated(stored: artifact.Artifact, images: data.Data) -> float:
    predictions = evaluation.predict(artifact.network(stored), images.validation, normalize=images.normalize)
    return evaluation.accuracy(predictions, images.validation.labels)


def write_narrow(out: Path, family: str, fewer: float) -> Path:
    """Train a narrow network as the reference in `out` was trained, and put it beside that, in 16 bits.

    It is the widest of a family (`SmallDense.family`) with so many times fewer MACs.
    """
    record = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    given, spec = record["parameters"], artifact.read(out / _name(record)).spec
    images = data.load(record["dataset"], size=spec.size)
    name = f"{family}_{fewer:g}"
    checkpoint = root() / "results/runs/reference" / f"{name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(record["seed"])
    network = models.build(narrow_resnet(spec, given, fewer, family))
    recipe = {key: given[key] for key in RECIPE} | {"seed": record["seed"], "checkpoint": checkpoint}
    history = training.fit(network, images, validate=True, **recipe)
    path = out / f"{name}.safetensors"
    stored = artifact.save(network.eval(), path, dtype=torch.float16, **_about(images))
    about = {"sha256": stored.sha256, "validation": _validated(stored, images)}
    about |= {"train_images": history.images, "train_seconds": history.seconds}
    record = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))  # another may have written meanwhile
    record["extra"].setdefault("narrow", {})[name] = about
    write_atomically(out / PROVENANCE, json.dumps(record, indent=1) + "\n")
    print(f"{path}: {stored.nbytes:,} bytes, validation {about['validation']:.2f} %")
    return path


def write_logits(out: Path, copies: int) -> Path:
    """Compute the logits of the reference in `out` for so many augmentations of each image, beside it."""
    from nnc_utils.distillation import student_loss  # here alone: what a process loads counts for its rows

    record = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    teacher = artifact.load(out / _name(record))
    images, augment = data.load(record["dataset"], size=teacher.spec.size), record["parameters"]["augment"]
    copies = copies if augment else 1
    path = out / student_loss.logits_name(teacher, copies, record["seed"])
    known = student_loss.cache_logits(
        teacher, images, copies=copies, augment=augment, seed=record["seed"], file=path
    )
    print(f"{path}: {path.stat().st_size:,} bytes, {known.seconds:.0f} s")
    return path


def beside(pretrained: Path, spec: models.Spec, seed: int) -> models.ResNet | None:
    """The network of an architecture and a seed that lies beside a pretrained one, or None."""
    if json.loads(pretrained.with_name(PROVENANCE).read_text(encoding="utf-8"))["seed"] != seed:
        return None
    for file in sorted(pretrained.parent.glob("*.safetensors")):
        if not file.name.startswith("teacher_logits") and (stored := artifact.read(file)).spec == spec:
            return artifact.network(stored, trainable=True)
    return None


def _name(record: dict[str, Any]) -> str:
    return f"resnet{record['parameters']['depth']}_{record['parameters']['stem']}.safetensors"


def _about(images: data.Data) -> dict[str, Any]:
    return {name: getattr(images, name) for name in ("mean", "std", "classes")}


def main(arguments: list[str]) -> int:
    """``python -m bench reference``"""
    parser = argparse.ArgumentParser(prog="python -m bench reference", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run of 01_baseline")
    parser.add_argument("--narrow", nargs=2, metavar=("FAMILY", "MACS"), help="such as three_stage 16")
    parser.add_argument("--logits", type=int, metavar="COPIES", help="augmentations of each training image")
    options, out = parser.parse_args(arguments), root() / "results/reference"
    if not options.run and not options.narrow and options.logits is None:
        parser.error("a run of 01_baseline, --narrow or --logits is needed")
    if options.logits is not None and options.logits < 1:
        parser.error(f"--logits is {options.logits}: a number of augmentations, 1 or more, is needed")
    if not options.run and not (out / PROVENANCE).is_file():
        parser.error(f"{out} holds no reference: give a finished run of 01_baseline first")
    if options.run:
        write(options.run, out)
    if options.narrow:
        write_narrow(out, options.narrow[0], float(options.narrow[1]))
    if options.logits:
        write_logits(out, options.logits)
    return 0
