"""Attention: where a stage is active on a picture, the student's shall be, too."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nnc_utils.distillation.features import full, same_size


def attention_map(features: Tensor) -> Tensor:
    """Where a stage is active: the mean square over its channels, each picture at unit length.

    Zagoruyko and Komodakis (2017), section 3.1, with p = 2.

    Parameters
    ----------
    features : a stage's output, (images, channels, height, width).

    Returns
    -------
    (images, height * width), rows of length 1; zeros where a stage is silent.
    """
    return functional.normalize(full(features).square().mean(1).flatten(1), dim=1)


def attention_transfer(*, student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of the two maps, mean over images and pixels (Zagoruyko and Komodakis, 2017).

    Channels are averaged away, so widths may differ; the larger map is averaged down to the smaller. The
    mean (not the sum) over pixels follows the authors' code, whose weight of 1000 belongs to it.

    Parameters
    ----------
    student, teacher : a stage's output, (images, channels, height, width), of the same images.
    """
    pair = same_size(*(full(features).square().mean(1, keepdim=True) for features in (student, teacher)))
    return functional.mse_loss(*(functional.normalize(squares.flatten(1), dim=1) for squares in pair))
