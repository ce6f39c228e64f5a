"""Is a network as sure as it is right, and does it agree with its teacher?"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """How far confidence is from accuracy, in percentage points (Guo et al., 2017, equation 3).

    The mean over the images of |accuracy - confidence| of their bin.

    Parameters
    ----------
    logits : (images, classes).
    labels : (images,).
    bins : of equal width over confidences from 0 to 1.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, place, (predicted == labels).double() - confidence)
    return 100 * float(gaps.abs().sum()) / len(labels)


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The share of images on which two networks' logits (images, classes) name the same class, in percent."""
    return 100 * float((ours.argmax(1) == theirs.argmax(1)).double().mean())
