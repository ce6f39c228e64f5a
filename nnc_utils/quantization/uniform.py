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
    levels: int | None = None,
) -> Uniform:
    """Round a weight to ``bits``-bit codes: ``Q(w) = round(w * (2**(bits-1) - 1) / max|w|)``.

    Parameters
    ----------
    weight : of any shape; output channels first.
    bits : 2 to 16; affine codes 2 to 8.
    per_channel : one scale for each output channel, its range taken there, instead of one for all.
    symmetric : codes in ±(2**(bits-1) - 1). Otherwise affine: codes in 0..2**bits - 1 and a
        zero-point, over a range that need not be centred on 0 (Jacob et al., 2018, section 2.1).
    clip : how the range is chosen; what is outside gets the last code. "max": nothing is outside.
        "percentile": one weight in a thousand is. "mse": the one of 17 ranges, from the largest to a
        fifth of it, with the smallest squared error.
    levels : of symmetric codes, to use fewer than the width has: an odd number, so that 0 is one.

    Returns
    -------
    The codes with their scale; a channel (or tensor) of zeros gets the scale 1.

    Raises
    ------
    ValueError
        For other widths and levels, an unknown `clip`, an empty tensor, and weights that are not finite.
    """
    most = 16 if symmetric else 8
    if type(bits) is not int or not 2 <= bits <= most:
        raise ValueError(f"bits is {bits!r}: a whole number from 2 to {most} is needed")
    largest = _largest(bits, levels, symmetric)
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}: one of {', '.join(CLIPS)}")
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds nothing to quantize")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{int((~torch.isfinite(weight)).sum())} weights are not finite: the training diverged"
        )
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = _range(rows, symmetric, clip)
    codes, scale, zero_point = _round(rows, low, high, largest, symmetric)
    if clip == "mse":
        least = torch.full_like(low, torch.inf)
        for shrink in SHRINKS.tolist():
            trial = _round(rows, shrink * low, shrink * high, largest, symmetric)
            error = (_values(*trial) - rows).square().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            codes, scale, zero_point = (
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(trial, (codes, scale, zero_point))
            )
    shape = (weight.shape[0],) if per_channel else ()
    return Uniform(
        codes.view(weight.shape).to(torch.int16),
        scale.view(shape),
        axis=0 if per_channel else None,
        bits=bits,
        zero_point=None if symmetric else zero_point.view(shape).to(torch.int16),
    )


def _range(rows: Tensor, symmetric: bool, clip: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight that shall be represented in each row."""
    if symmetric:
        low, high = -rows.abs().amax(1), rows.abs().amax(1)
    else:
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if clip == "percentile":
        outside = int(rows.shape[1] * (1 - PERCENTILE))
        if symmetric:
            high = rows.abs().kthvalue(rows.shape[1] - outside, 1).values
            low = -high
        else:
            low = torch.maximum(low, rows.kthvalue(1 + outside // 2, 1).values.clamp(max=0))
            high = torch.minimum(high, rows.kthvalue(rows.shape[1] - outside // 2, 1).values.clamp(min=0))
    return low, high


def _largest(bits: int, levels: int | None, symmetric: bool) -> int:
    """The largest code."""
    _, largest = encoding.code_range(bits, affine=not symmetric)
    if levels is None:
        return largest
    if not symmetric or levels not in range(3, 2 * largest + 2, 2):
        raise ValueError(
            f"levels is {levels!r} with symmetric={symmetric} and bits={bits}: symmetric codes, and of "
            f"them an odd number from 3 to {2**bits - 1}, are needed"
        )
    return levels // 2


def _round(rows: Tensor, low: Tensor, high: Tensor, largest: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes, scale and zero-point of each row."""
    scale = ((high if symmetric else high - low) / largest).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round()
    lowest = -largest if symmetric else 0
    codes = (torch.round(rows / scale[:, None]) + zero_point[:, None]).clamp(lowest, largest)
    return codes, scale, zero_point


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (codes - zero_point[:, None]) * scale[:, None]


def quantize_network(
    model: nn.Module,
    *,
    bits: int | dict[str, int],
    per_channel: bool,
    symmetric: bool = True,
    clip: str = "max",
    levels: int | None = None,
) -> nn.Module:
    """A copy of a network whose convolutions and classifier compute with rounded weights.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    bits : one width for all layers, or a width for each layer by name.
    per_channel, symmetric, clip, levels : see `quantize`.

    Returns
    -------
    The copy; each weight is a torch parametrization, so it can be trained on and `artifact.save`
    writes the codes. An `encoding.ZeroMask` of the network stays.

    Raises
    ------
    ValueError
        For a width out of range, an unknown or missing layer name, a weight that is not finite.
    """
    widths = for_each_layer(model, "bits", bits)
    options = {"per_channel": per_channel, "symmetric": symmetric, "clip": clip, "levels": levels}

    def rule(name: str, layer: nn.Module) -> Uniform:
        rounded = quantize(layer.weight, bits=widths[name], **options)
        return dataclasses.replace(rounded, mask=encoding.mask_of(layer))

    return quantized(model, rule)
