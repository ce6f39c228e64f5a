"""The uniform quantizer: a weight becomes a whole number times a scale."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from nnc_utils import encoding
from nnc_utils.encoding import Uniform
from nnc_utils.quantization.networks import for_each_layer, quantized

CLIPS = ("max", "percentile", "mse")
PERCENTILE = 0.999  # of the weights lie in the range that clip="percentile" takes
SHRINKS = torch.linspace(1.0, 0.2, 17)  # of the largest range, tried by clip="mse"


def quantize(
    weight: Tensor,
    *,
    bits: int,
    per_channel: bool,
    symmetric: bool = True,
    clip: str = "max",
    levels: int = 0,
) -> Uniform:
    """Round a weight to ``bits``-bit codes: ``Q(w) = round(w * (2**(bits-1) - 1) / max|w|)``.

    Parameters
    ----------
    weight : finite, of any shape; output channels first.
    bits : 2 to 16; affine codes 2 to 8.
    per_channel : one scale for each output channel, its range taken there, instead of one for all.
    symmetric : codes in ±(2**(bits-1) - 1). Otherwise affine: codes in 0..2**bits - 1 and a zero-point.
    clip : how the range is chosen; what is outside gets the last code. "max": nothing is outside.
        "percentile": one weight in a thousand is. "mse": the one of 17 ranges, from the largest to a
        fifth of it, with the smallest squared error.
    levels : of symmetric codes, to use fewer than the width has: an odd number, so that 0 is one; 0: all.

    A channel (or tensor) of zeros gets the scale 1.
    """
    most = 16 if symmetric else 8
    if type(bits) is not int or not 2 <= bits <= most:
        raise ValueError(f"bits is {bits!r}: a whole number from 2 to {most} is needed")
    _, largest = encoding.code_range(bits, affine=not symmetric)
    if levels and (not symmetric or levels not in range(3, 2 * largest + 2, 2)):
        raise ValueError(f"levels is {levels!r}: an odd number from 3 to {2**bits - 1}, of symmetric codes")
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}: one of {', '.join(CLIPS)}")
    check_weight(weight)
    largest = levels // 2 if levels else largest
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = _range(rows, symmetric, clip)
    best, least = None, torch.inf
    for shrink in SHRINKS.tolist() if clip == "mse" else [1.0]:
        codes, scale, zero_point = trial = _round(rows, shrink * low, shrink * high, largest, symmetric)
        error = ((codes - zero_point) * scale - rows).square().sum(1, keepdim=True)
        best = [torch.where(error < least, new, old) for new, old in zip(trial, best or trial)]
        least = torch.minimum(error, torch.as_tensor(least))
    codes, scale, zero_point = best
    shape = (weight.shape[0],) if per_channel else ()
    axis, zero_point = 0 if per_channel else None, None if symmetric else zero_point.view(shape).short()
    return Uniform(codes.view(weight.shape).short(), scale.view(shape), axis, bits, zero_point=zero_point)


def check_weight(weight: Tensor) -> None:
    """Raise a ValueError unless there are weights, all of them finite."""
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds nothing to quantize")
    if broken := int((~weight.isfinite()).sum()):
        raise ValueError(f"{broken} weights are not finite: the training diverged")


def _range(rows: Tensor, symmetric: bool, clip: str) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each row that shall be represented, (rows, 1)."""
    count = rows.shape[1]
    outside = int(count * (1 - PERCENTILE)) if clip == "percentile" else 0
    if symmetric:
        high = rows.abs().kthvalue(count - outside, 1, keepdim=True).values
        return -high, high
    low = rows.kthvalue(1 + outside // 2, 1, keepdim=True).values.clamp(max=0)
    return low, rows.kthvalue(count - outside // 2, 1, keepdim=True).values.clamp(min=0)


def _round(rows: Tensor, low: Tensor, high: Tensor, largest: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes, scale and zero-point of each row."""
    scale = ((high if symmetric else high - low) / largest).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round()
    lowest = -largest if symmetric else 0
    return (torch.round(rows / scale) + zero_point).clamp(lowest, largest), scale, zero_point


def quantize_network(model: nn.Module, *, bits: int | dict[str, int], **options) -> nn.Module:
    """A copy of a network whose convolutions and classifier compute with weights rounded by `quantize`.

    `bits` is one width, or one for each layer by name; the options are those of `quantize`. A mask stays.
    """
    widths = for_each_layer(model, "bits", bits)

    def rule(name: str, layer: nn.Module) -> Uniform:
        rounded = quantize(layer.weight, bits=widths[name], **options)
        return dataclasses.replace(rounded, mask=encoding.mask_of(layer))

    return quantized(model, rule)
