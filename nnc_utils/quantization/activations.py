"""Activation ranges: what unsigned 8-bit integers stand for between the layers."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from nnc_utils import models


def affine_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero-point that put [low, high] on 0..255: ``x = scale * (q - zero_point)``.

    The range is widened to contain 0, which is then represented exactly (Jacob et al., 2018,
    section 3); after a ReLU the zero-point is 0, so that clamping at 0 is the ReLU.

    Raises
    ------
    ValueError
        When low or high is not finite, or low is above high.
    """
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"no range from {low} to {high}: two finite bounds in order are needed")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / 255 or 1.0, dtype=torch.float32))
    return scale, min(255, max(0, round(-low / scale)))


def calibrate(model: nn.Module, images: Tensor, *, batch_size: int = 128) -> nn.Module:
    """A copy of a network that rounds its activations to 8 bits, over the ranges these images show.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    images : normalized float images of the training split, (n, channels, size, size).
    batch_size : images a forward pass.

    Returns
    -------
    The copy, with a scale and zero-point at every `models.Activation`: the smallest and the largest
    value seen there.

    Raises
    ------
    ValueError
        For an empty calibration set, images of another shape, activations that are not finite.
    """
    wanted = (model.spec.channels, model.spec.size, model.spec.size)
    if len(images) == 0 or tuple(images.shape[1:]) != wanted:
        raise ValueError(
            f"calibration images have shape {tuple(images.shape)}: at least one of shape {wanted} is needed"
        )
    calibrated = copy.deepcopy(model).eval()
    places = models.activations(calibrated)
    seen: dict[str, tuple[float, float]] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            low, high = (float(bound) for bound in torch.aminmax(inputs[0]))
            if not math.isfinite(low + high):
                raise ValueError(
                    f"{name}: activations are not finite: the network or the images hold NaN or inf"
                )
            before = seen.get(name, (low, high))
            seen[name] = (min(low, before[0]), max(high, before[1]))

        return hook

    for place in places.values():
        place.scale = None
    hooks = [place.register_forward_hook(watch(name)) for name, place in places.items()]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            calibrated(images[start : start + batch_size].contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    for name, place in places.items():
        place.scale, place.zero_point = affine_range(*seen[name])
    return calibrated
