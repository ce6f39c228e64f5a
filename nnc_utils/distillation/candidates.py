"""The network of each configuration of 04: students with and without a teacher, and a larger teacher."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from nnc_utils import artifact, models, training
from nnc_utils.configurations import Built, Configuration, read
from nnc_utils.distillation import features, student_loss
from nnc_utils.distillation.configurations import Distilled, StudentAlone


def build(configuration: Configuration, bench: Any) -> Built:
    """Train a configuration's network; students of a width start from the same weights.

    Of the run's parameters epochs, learning_rate and copies count, and `teaches`: the mapping of the pipeline
    whose network is the teacher of "compressed" students.
    """
    return Built(*_trained(bench, configuration))


def check(configuration: Configuration, bench: Any) -> None:
    """Raise a ValueError, before any training, where a teacher or a stage is missing."""
    if isinstance(configuration, Distilled):
        if configuration.compressed and not bench.parameters["teaches"]:
            raise ValueError("compressed: name the pipeline whose network teaches in `teaches`")
        if configuration.teacher == "ensemble" and len(members(bench, configuration.compressed)) == 1:
            raise ValueError("teacher 'ensemble': put the teachers of other seeds into upstream")
        features.check_stages(_untrained(bench, configuration).spec, recipe(configuration).compared)


def recipe(configuration: Distilled) -> student_loss.Recipe:
    """What a configuration's teacher teaches."""
    method, settings = configuration.method, dict(configuration)
    soft = method if method in ("dkd", "dist") else "kd" if "kd" in method else ""
    weights = {part: settings["beta"] for part in ("attention", "hints", "similarity") if part in method}
    shared = {name: settings[name] for name in student_loss.Recipe.__dataclass_fields__ if name in settings}
    return student_loss.Recipe(**{"soft": soft, "alpha": 0.0} | weights | shared)


def _untrained(bench: Any, configuration: Configuration) -> models.ResNet:
    if configuration.method == "dense_finetuned":
        return copy.deepcopy(bench.dense)
    torch.manual_seed(bench.seed)
    depth = 50 if configuration.method == "resnet50" else 18
    same = {key: getattr(bench.dense.spec, key) for key in ("channels", "size", "classes", "stem")}
    return models.build(models.resnet(depth, width=getattr(configuration, "width", 1.0), **same))


@functools.cache
def _trained(bench: Any, configuration: Configuration) -> tuple[models.ResNet, int, float]:
    """A trained network, and the images and seconds that it took, its teacher's included."""
    student = model = _untrained(bench, configuration)
    loss, images, augment = training.cross_entropy, bench.images, bench.recipe["augment"]
    more_images, more_seconds = 0, 0.0
    if configuration.method == "label_smoothing":
        loss = student_loss.smoothed(configuration.smoothing)
    elif isinstance(configuration, Distilled):
        network, more_images, more_seconds = _teacher(bench, configuration)
        lesson = recipe(configuration)
        if configuration.cached:
            known = memory(bench, network)
            images, augment, more_seconds = known.images, False, more_seconds + known.seconds
            loss = student_loss.cached(known, lesson, student.spec)
        else:
            loss = student_loss.online(network, lesson, student.spec)
        if lesson.hints:  # from the student's widths to its teacher's
            model = features.WithRegressors(student, network.spec, student_loss.STAGES)
    length, size = bench.parameters["epochs"] * getattr(configuration, "times", 1), bench.recipe["batch_size"]
    steps = round(getattr(configuration, "epochs", length) * (len(bench.images.train) // size))
    options = {"images": images, "loss": loss, "augment": augment, "batch_size": size}
    options["epochs"] = steps / (len(images.train) // size)
    options["learning_rate"] = bench.parameters["learning_rate"]
    history = bench.fit(model, configuration.slug, **options)
    return student.eval(), history.images + more_images, history.seconds + more_seconds


@functools.cache
def members(bench: Any, compressed: bool) -> list[tuple[nn.Module, float]]:
    """The teachers of this seed and of others, and the seconds of their training beyond the baseline's."""
    if not compressed:
        others = [artifact.load(run.artifact("fp32")) for run in bench.others]
        return [(network, 0.0) for network in (copy.deepcopy(bench.dense), *others)]
    runs = bench.rows_of(read(bench.parameters["teaches"], "pipeline")[0])
    return [(artifact.load(run.artifact(row.artifact_sha256)).eval(), row.train_seconds) for run, row in runs]


def _teacher(bench: Any, configuration: Distilled) -> tuple[nn.Module, int, float]:
    """A configuration's teacher, and the images and seconds of training that count for its students."""
    if configuration.teacher == "self":
        return _trained(bench, StudentAlone(width=configuration.width))
    if configuration.teacher == "resnet50":  # like the baseline's, its images do not count; its time does
        file, _, seconds = bench.made("resnet50")
        return artifact.load(file), 0, seconds
    teachers = members(bench, configuration.compressed)
    teachers = teachers if configuration.teacher == "ensemble" else teachers[:1]
    seconds = sum(seconds for _, seconds in teachers)
    return teacher(bench, configuration.teacher, configuration.compressed), 0, seconds


@functools.cache
def teacher(bench: Any, kind: str, compressed: bool = False) -> nn.Module:
    """The "baseline", or the "ensemble" of all seeds' baselines; or what the pipeline made of them."""
    networks = [network for network, _ in members(bench, compressed)]
    return student_loss.Ensemble(networks) if kind == "ensemble" else networks[0]


@functools.cache
def memory(bench: Any, teacher: nn.Module) -> student_loss.CachedLogits:
    """A teacher's logits of the training images, computed once: in the baseline's run, or beside its file."""
    augment = bench.recipe["augment"]
    copies = bench.parameters["copies"] if augment else 1
    name = student_loss.logits_name(teacher, copies, bench.seed)
    file = bench.file_beside(name) or bench.baseline.folder / name
    options = {"copies": copies, "augment": augment, "seed": bench.seed, "file": file}
    known = student_loss.cache_logits(teacher, bench.images, **options)
    if not torch.isfinite(known.logits).all():
        raise training.TrainingError("the teacher's logits are beyond half precision: train it longer first")
    return known
