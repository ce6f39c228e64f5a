"""Activation ranges: what unsigned 8-bit integers stand for between the layers."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from nnc_utils import models
from nnc_utils.devices import exact_device
from nnc_utils.quantization.uniform import CLIPS, PERCENTILE, SHRINKS

SAMPLE = 2**16  # values kept of each tensor of a batch, for percentile and mse


def affine_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero-point that put [low, high] on 0..255: ``x = scale * (q - zero_point)``.

    Widened to contain 0, which is then exact (Jacob et al., 2018, section 3); after a ReLU the zero-point
    is 0, so that clamping at 0 is the ReLU.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / 255 or 1.0, dtype=torch.float32))
    return scale, min(255, max(0, round(-low / scale)))


def calibrate(model: nn.Module, images: Tensor, *, clip: str = "max", batch_size: int = 128) -> nn.Module:
    """A copy of a network that rounds its activations to 8 bits, over the ranges these images show.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Each `models.Activation` of the copy has a range.
    images : normalized float images of the training split, (n, channels, size, size).
    clip : as in `uniform.quantize`; "percentile" takes half of what is outside from each end of a signed
        tensor, and all of it from the top behind a ReLU.
    """
    models.check_images(model, images)
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}: one of {', '.join(CLIPS)}")
    home, device = next(model.parameters()).device, exact_device()
    calibrated = copy.deepcopy(model).eval().to(device)
    places = models.activations(calibrated)
    bounds: dict[str, tuple[float, float]] = {}
    samples: dict[str, list[Tensor]] = {name: [] for name in places}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            module.scale = None  # the ranges of the float network
            low, high = (float(bound) for bound in torch.aminmax(inputs[0]))
            if not math.isfinite(low + high):
                raise ValueError(f"{name}: activations are not finite: the network or images hold NaN or inf")
            before = bounds.get(name, (low, high))
            bounds[name] = min(low, before[0]), max(high, before[1])
            if clip != "max":
                values = inputs[0].flatten()
                samples[name].append(values[:: max(1, len(values) // SAMPLE)].clone())

        return hook

    hooks = [place.register_forward_pre_hook(watch(name)) for name, place in places.items()]
    with torch.inference_mode():
        for batch in images.split(batch_size):
            calibrated(batch.to(device).contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    for name, place in places.items():
        low, high = bounds[name]
        if clip != "max":
            low, high = _clipped(torch.cat(samples[name]), low, high, clip)
        place.scale, place.zero_point = affine_range(low, high)
    return calibrated.to(home)


def _clipped(values: Tensor, low: float, high: float, clip: str) -> tuple[float, float]:
    if clip == "percentile":
        outside = int(len(values) * (1 - PERCENTILE))
        below = 0 if low >= 0 else outside // 2
        ordered = values.sort().values
        return float(ordered[below]), float(ordered[len(values) - 1 - (outside - below)])

    def error(shrink: float) -> float:
        scale, zero_point = affine_range(shrink * low, shrink * high)
        rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, 255)
        return float((rounded - values).square().mean())

    best = min(SHRINKS.tolist(), key=error)
    return best * low, best * high
