"""Attention: where a stage is active on an image, the student's shall be, too."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nnc_utils.distillation.features import full, same_size


def attention_transfer(*, student: Tensor, teacher: Tensor) -> Tensor:
    """How far two attention maps are apart (Zagoruyko and Komodakis, 2017, section 3.1, with p = 2).

    A map is the mean square over the channels, each image at unit length; widths may differ, the larger map
    is averaged down. The squared distance is the mean (not the sum) over images and pixels, as in the
    authors' code, whose weight of 1000 belongs to it.

    Parameters
    ----------
    student, teacher : a stage's output, (images, channels, height, width), of the same images.
    """
    pair = same_size(*(full(features).square().mean(1, keepdim=True) for features in (student, teacher)))
    return functional.mse_loss(*(functional.normalize(squares.flatten(1), dim=1) for squares in pair))
