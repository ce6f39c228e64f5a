"""What a network predicts on a split, how often it is right, and how sure a difference is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnc_utils.data import Split


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a while; each module then gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits(
    model: nn.Module,
    split: Split,
    *,
    normalize: Callable[[Tensor], Tensor],
    batch_size: int = 100,
    device: torch.device | None = None,
) -> Tensor:
    """The logits of every image of a split: float32 (n, classes) on the CPU.

    `normalize` makes float32 images of uint8 ones, as `Data.normalize` does; `batch_size` is a matter of
    memory only. The network's mode stays, and so does its place: on another `device` a copy computes.
    """
    if len(split.images) == 0:
        raise ValueError("the split has no images: nothing can be predicted")
    home = next(model.parameters()).device
    if device not in (None, home):
        model, home = copy.deepcopy(model).to(device), device
    with evaluating(model), torch.inference_mode():
        return torch.cat(
            [
                model(normalize(images.to(home)).to(memory_format=torch.channels_last)).float().cpu()
                for images in split.images.split(batch_size)
            ]
        )


def predict(
    model: nn.Module,
    split: Split,
    *,
    normalize: Callable[[Tensor], Tensor],
    batch_size: int = 100,
    device: torch.device | None = None,
) -> np.ndarray:
    """The class of every image of a split: uint8 (n,), so 256 classes at most; parameters as in `logits`.

    Logits that are not finite are a ValueError: their largest means nothing.
    """
    scores = logits(model, split, normalize=normalize, batch_size=batch_size, device=device)
    if scores.shape[1] > 256:
        raise ValueError(
            f"the network has {scores.shape[1]} classes: predictions are stored as uint8, 256 at most"
        )
    broken = int((~scores.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"the logits of {broken} of {len(scores)} images are not finite: "
            "the network's weights or scales overflow, look for infinities or NaN in its state_dict"
        )
    return scores.argmax(1).to(torch.uint8).numpy()


def _hits(predictions: np.ndarray, labels: np.ndarray | Tensor) -> np.ndarray:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {predictions.shape}, labels {labels.shape}: "
            "one prediction for each label is needed"
        )
    return predictions == labels


def correct(predictions: np.ndarray, labels: np.ndarray | Tensor) -> int:
    """The number of predictions (n,) equal to their labels (n,)."""
    return int(_hits(predictions, labels).sum())


def accuracy(predictions: np.ndarray, labels: np.ndarray | Tensor) -> float:
    """Correct predictions in percent of all images.

    Examples
    --------
    >>> accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    75.0
    """
    return 100 * float(_hits(predictions, labels).mean())


@dataclass(frozen=True)
class Interval:
    """A difference of accuracies in percentage points, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_interval(*, compressed_correct: np.ndarray, reference_correct: np.ndarray) -> Interval:
    """Compressed minus reference accuracy on the same images, with its 95 % interval.

    For image i, d_i is the mean over the seeds of (compressed correct - reference correct); the interval is
    mean(d) +- 1.96 sd / sqrt(n), in percentage points. For sd one image that is won and one that is lost are
    added (Bonett and Price, 2012), and it is never narrower than the rule of three, +-300 / n: networks that
    differ nowhere may differ on other images. It says nothing of other seeds: their deviation is to stand
    beside it. Both arrays are bool (or 0 and 1) of shape (n,) or (seeds, n).

    Examples
    --------
    >>> paired_interval(compressed_correct=np.array([1, 1, 0, 1]), reference_correct=np.array([1, 0, 0, 1]))
    Interval(mean=25.0, low=-50.0, high=100.0)
    """
    arrays = {"compressed_correct": compressed_correct, "reference_correct": reference_correct}
    compressed, reference = arrays.values()
    if compressed.shape != reference.shape:
        raise ValueError(
            f"compressed_correct has shape {compressed.shape}, reference_correct {reference.shape}: "
            "the same seeds and the same images are needed for a paired interval"
        )
    if compressed.ndim not in (1, 2) or compressed.shape[-1] < 2 or compressed.shape[0] == 0:
        raise ValueError(f"shape {compressed.shape}: (n,) or (seeds, n) with at least 2 images is needed")
    for name, array in arrays.items():
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} holds more than 0 and 1: give predictions == labels, not predictions")
    difference = np.atleast_2d(100.0 * compressed - 100.0 * reference).mean(0)
    mean = float(difference.mean())
    deviation = float(np.append(difference, (100.0, -100.0)).std(ddof=1))
    half = max(1.96 * deviation / len(difference) ** 0.5, 300 / len(difference))
    return Interval(mean, mean - half, mean + half)
