"""What a second task may start from: the first task's network, and what compression made of it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from nnc_utils import artifact, models, pipeline
from nnc_utils.baseline import narrow_resnet
from nnc_utils.distillation import student_loss
from nnc_utils.pruning import unstructured
from nnc_utils.quantization import activations, qat, uniform

FEWER = 4.0  # times fewer MACs of the narrow starts
ZEROS = 0.9  # share of the weights
BITS = 4  # of the pipeline's weights
IMAGES = 256  # of the first task, for scores and ranges


@functools.cache
def file(bench: Any, name: str) -> tuple[Path, int, float]:
    """A start's file, its floats in 16 bits, and the images and seconds of training beyond the baseline's."""
    network, images, seconds = _made(bench, name)
    path = bench.path(f"artifacts/start_{name}.safetensors")
    about = {"mean": bench.images.mean, "std": bench.images.std, "classes": bench.images.classes}
    artifact.save(network.eval(), path, dtype=torch.float16, **about)
    return path, images, seconds


@functools.cache
def _made(bench: Any, name: str) -> tuple[models.ResNet, int, float]:
    """A start's network, and the images and seconds of its training."""
    dense, (images, labels) = bench.dense, bench.sample(min(IMAGES, len(bench.images.train)))
    torch.manual_seed(bench.seed)  # of new weights
    match name:
        case "dense":
            return copy.deepcopy(dense), 0, 0.0
        case "scratch":
            return models.build(dense.spec), 0, 0.0
        case "int8":
            rounded = uniform.quantize_network(dense, bits=8, per_channel=True)
            return activations.calibrate(rounded, images), 0, 0.0
        case "zeros":  # the smallest weights of all layers together
            kept = unstructured.masks(unstructured.scores(dense, "magnitude"), ZEROS)
            return _trained(bench, name, unstructured.masked(dense, kept))
        case "channels":
            macs = models.macs(dense.spec) / FEWER
            return _trained(bench, name, pipeline.prune(dense, images, labels, macs=macs))
        case "distilled":  # as long as the uncompressed network
            student = models.build(narrow_resnet(dense.spec, bench.recipe, FEWER))
            options = {key: bench.recipe[key] for key in ("epochs", "learning_rate")}
            return _trained(bench, name, student, loss=_taught(bench, student), **options)
        case "pipeline":
            pruned, seen, seconds = _made(bench, "channels")
            rounded = qat.prepare(pruned, images, bits=BITS, method="lsq")
            network, more, longer = _trained(bench, name, rounded, loss=_taught(bench, rounded))
            return activations.calibrate(network, images), seen + more, seconds + longer
    raise ValueError(f"unknown start {name!r}")


def _taught(bench: Any, student: models.ResNet) -> Any:
    return student_loss.online(bench.dense, student_loss.Recipe(), student.spec)


def _trained(
    bench: Any, name: str, network: models.ResNet, **options: Any
) -> tuple[models.ResNet, int, float]:
    """Train on the first task, for `compress_epochs` unless options say otherwise."""
    given = {
        "epochs": bench.parameters["compress_epochs"],
        "learning_rate": bench.parameters["learning_rate"],
    }
    given |= {key: bench.recipe[key] for key in ("augment", "batch_size")}
    history = bench.fit(network, f"start_{name}", **given | options)
    return network.eval(), history.images, history.seconds
