"""Is a network as sure as it is right, and does it agree with its teacher?"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """How far confidence is from accuracy, in percentage points (Guo et al., 2017, equation 3).

    Parameters
    ----------
    logits : (images, classes).
    labels : (images,).
    bins : of equal width over confidences from 0 to 1.

    Returns
    -------
    Mean over the images of |accuracy - confidence| of their bin, in percent.
    """
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} logits and {len(labels)} labels: as many of both, one or more")
    if bins < 1:
        raise ValueError(f"bins is {bins}: at least one is needed")
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return 100 * float(gaps.abs().sum()) / len(labels)


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The share of images on which two networks' logits (images, classes) name the same class, in percent."""
    if ours.shape != theirs.shape:
        raise ValueError(f"logits of shape {tuple(ours.shape)} and {tuple(theirs.shape)}: the same is needed")
    return 100 * float((ours.argmax(1) == theirs.argmax(1)).double().mean())
