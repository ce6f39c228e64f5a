"""The network of each configuration of 09: a start, trained for the second task."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from nnc_utils import artifact, encoding, pipeline
from nnc_utils.configurations import Built
from nnc_utils.data import Data
from nnc_utils.quantization import activations, uniform
from nnc_utils.training import History
from nnc_utils.transfer import delta, starts, tasks
from nnc_utils.transfer.configurations import Transfer

CALIBRATION = 512  # images of the second task, for the ranges of activations


def check(configuration: Transfer, bench: Any) -> None:
    """Raise a ValueError, before any training, where a class has too few images."""
    tasks.few(bench.target, configuration.labels, seed=bench.seed)


def build(configuration: Transfer, bench: Any) -> Built:
    """Train a start for the second task; a head or a sparse difference is written as a file of its own.

    The run's `target` is the second task, `images` the first one. Of its parameters count `seen`, the images
    that each training sees, `learning_rate`, `batch_size`, and `compress_epochs` for the starts.
    """
    base, images, seconds = starts.file(bench, configuration.start)
    target = tasks.few(bench.target, configuration.labels, seed=bench.seed)
    fit = functools.partial(_fit, bench, configuration.slug, target)
    kept = configuration.train == "kept"
    network = tasks.adopted(artifact.load(base, trainable=kept), len(target.classes), seed=bench.seed)
    network = network if kept else tasks.in_floats(network)
    if configuration.train == "head":
        history = fit("head", tasks.freeze_body(network), loss=tasks.of_the_head)
    elif configuration.train == "sparse":  # half of the training moves everything, and shows where
        history = fit("everything", moved := copy.deepcopy(network), share=0.5)
        network = delta.sparse(network, moved, configuration.share)
        history += fit("sparse", network, share=0.5)
    else:
        every = -(-len(target.train) // CALIBRATION)  # they lie class by class
        sample = target.normalize(target.train.images[::every])
        rounded = pipeline.is_rounded(network)
        network = activations.calibrate(network, sample) if rounded else network
        history = fit(configuration.train, network)
        if rounded:  # and so is the new head
            encoding.attach(network.fc, uniform.quantize(network.fc.weight, bits=8, per_channel=True))
            network = activations.calibrate(network, sample)
    cost = {"train_images": images + sum(epoch.images for epoch in history)}
    cost["train_seconds"] = seconds + sum(epoch.seconds for epoch in history)
    if configuration.train not in ("head", "sparse"):
        return Built(network.eval(), **cost)
    file = bench.path(f"deltas/{configuration.slug}.safetensors")
    delta.save(network, base, file, classes=target.classes)
    network, _ = delta.load(file, base)  # what is measured is what the files say
    return Built(network, file=file, dtype=torch.float32, **cost)


def _fit(bench: Any, slug: str, target: Data, part: str, network: Any, share=1.0, **options: Any) -> History:
    """A training that sees as many images, or a share of them, whatever the number of labels.

    It takes two steps at least: one step alone would be the end of a cycle of the learning rate, which is 0.
    """
    seen = round(share * bench.parameters["seen"])
    images, size = tasks.repeated(target, seen), min(bench.parameters["batch_size"], max(2, seen // 2))
    options |= {"batch_size": size, "epochs": (seen // size) / (len(images.train) // size)}
    options |= {"learning_rate": bench.parameters["learning_rate"], "augment": bench.recipe["augment"]}
    return bench.fit(network, f"{slug}_{part}", images=images, **options)
