"""Which client has which images, and a client's images as a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnc_utils.data import Data, Split

TRIES = 1000  # draws until every client has images


class SplitError(ValueError):
    """Images that cannot be divided as asked for."""


def dirichlet(labels: Tensor, *, clients: int, alpha: float, seed: int, least: int = 2) -> list[Tensor]:
    """The indices of each client's images, ascending: every image is some client's.

    Each class is divided by shares from a Dirichlet distribution (Yurochkin et al., 2019): with a small
    `alpha` a client has few of the classes, with a large one it has a little of each. Drawn again until every
    client has `least` images: batch-norm needs two.

    >>> parts = dirichlet(torch.arange(100) % 10, clients=4, alpha=1.0, seed=1)
    >>> sum(map(len, parts))
    100
    """
    if clients < 1 or not alpha > 0:
        raise SplitError(f"{clients} clients, alpha {alpha:g}: at least 1, and a number above 0, is needed")
    if clients * least > len(labels):
        most = len(labels) // least
        raise SplitError(f"{clients} clients with {least} images or more: {len(labels)} images allow {most}")
    random, own_labels = np.random.default_rng(seed), labels.numpy()
    for _ in range(TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(own_labels):
            images = random.permutation(np.flatnonzero(own_labels == label))
            shares = random.dirichlet(np.full(clients, alpha))
            ends = (shares.cumsum()[:-1] * len(images)).round().astype(int)
            for part, piece in zip(parts, np.split(images, ends), strict=True):
                part.append(piece)
        joined = [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]
        if min(map(len, joined)) >= least:
            return joined
    raise SplitError(
        f"alpha {alpha:g} left one of {clients} clients with fewer than {least} images in {TRIES} draws: "
        "use a larger alpha, or fewer clients"
    )


def counts(labels: Tensor, parts: list[Tensor], classes: int) -> Tensor:
    """How many images of each class each client has, (clients, classes)."""
    return torch.stack([torch.bincount(labels[part], minlength=classes) for part in parts])


def write_images(path: Path, images: Data, part: Split) -> None:
    """Write some images of a data set, and what normalizes and augments them, to a file."""
    about = {name: getattr(images, name) for name in ("name", "classes", "mean", "std", "flip", "shift")}
    tensors = {"images": part.images.contiguous(), "labels": part.labels.contiguous()}
    save_file(tensors, path, {"about": json.dumps(about)})


def read_images(path: Path) -> Data:
    """The images of such a file; they stand for all splits."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        part = Split(file.get_tensor("images"), file.get_tensor("labels"))
    about |= {name: tuple(about[name]) for name in ("classes", "mean", "std")}
    return Data(train=part, validation=part, test=part, **about)
