"""The uniform quantizer: a weight becomes a whole number times a scale."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.encoding import Uniform, largest_code


def quantize(weight: Tensor, *, bits: int, per_channel: bool) -> Uniform:
    """Round a weight to ``bits``-bit codes: ``Q(w) = round(w * (2**(bits-1) - 1) / max|w|)``.

    Parameters
    ----------
    weight : of any shape; output channels first.
    bits : 2 to 16.
    per_channel : one scale for each output channel, max|w| taken there, instead of one for all.

    Returns
    -------
    The codes with their scale; a channel (or tensor) of zeros gets the scale 1.

    Raises
    ------
    ValueError
        For other widths, an empty tensor, and weights that are not finite.

    Notes
    -----
    Jacob et al., 2018, section 2.1, with the zero-point fixed at 0.
    """
    if type(bits) is not int or not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits!r}: a whole number from 2 to 16 is needed")
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds nothing to quantize")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{int((~torch.isfinite(weight)).sum())} weights are not finite: the training diverged"
        )
    peak = weight.detach().abs().flatten(1).amax(1) if per_channel else weight.detach().abs().amax()
    scale = (peak / largest_code(bits)).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    column = scale.view(-1, *[1] * (weight.ndim - 1)) if per_channel else scale
    codes = torch.round(weight.detach() / column).clamp(-largest_code(bits), largest_code(bits))
    return Uniform(codes.to(torch.int16), scale, axis=0 if per_channel else None, bits=bits, mask=None)


def quantize_network(model: nn.Module, *, bits: int | dict[str, int], per_channel: bool) -> nn.Module:
    """A copy of a network whose convolutions and classifier compute with rounded weights.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    bits : one width for all layers, or a width for each layer by name.
    per_channel : see `quantize`.

    Returns
    -------
    The copy; each weight is a torch parametrization, so it can be trained on and `artifact.save`
    writes the codes.

    Raises
    ------
    ValueError
        For a width out of range, an unknown or missing layer name, a weight that is not finite.
    """
    names = [layer.name for layer in models.layers(model.spec)]
    widths = dict.fromkeys(names, bits) if isinstance(bits, int) else bits
    if set(widths) != set(names):
        odd = sorted(set(widths) ^ set(names))
        raise ValueError(f"bits must name each layer once; unknown or missing: {', '.join(odd)}")
    quantized = copy.deepcopy(model)
    for name, width in widths.items():
        layer = quantized.get_submodule(name)
        try:
            encoding.attach(layer, quantize(layer.weight, bits=width, per_channel=per_channel))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return quantized
