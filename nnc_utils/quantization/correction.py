"""Bias correction: a repair after rounding that needs pictures but no training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.devices import exact_device


@torch.no_grad()
def correct_bias(
    quantized: nn.Module, images: Tensor, *, original: nn.Module, batch_size: int = 256
) -> nn.Module:
    """A copy of a rounded network in which rounding moves no layer's mean output, inputs being equal.

    The rounding error ``Ŵ - W`` times the mean input of the float network is a shift of each output channel.
    It is added to what batch-norm subtracts, or taken off the classifier's bias (Nagel et al., 2019, section
    4.2). Behind the first layers the rounded network's inputs are others, and what they move is left out.

    Parameters
    ----------
    quantized : the rounded network; not changed.
    images : normalized training images, (n, channels, size, size).
    original : the same network with float weights.
    batch_size : images a forward pass.

    Raises
    ------
    ValueError
        For no images, or images of another shape.
    """
    models.check_images(original, images)
    home, device = next(original.parameters()).device, exact_device()
    corrected, network = copy.deepcopy(quantized), copy.deepcopy(original).eval().to(device)
    shifts: dict[str, Tensor] = {}
    for layer in models.layers(original.spec):
        error = quantized.get_submodule(layer.name).weight - original.get_submodule(layer.name).weight
        error = error.to(device)

        def add_shift(module: nn.Module, inputs: tuple[Tensor], output: Tensor, layer=layer, error=error):
            if layer.kind == "conv":
                shift = functional.conv2d(inputs[0], error, None, layer.stride, layer.kernel // 2)
                shift = shift.mean((2, 3))
            else:
                shift = inputs[0] @ error.T
            shifts[layer.name] = shifts.get(layer.name, 0.0) + shift.sum(0) / len(images)

        network.get_submodule(layer.name).register_forward_hook(add_shift)
    for batch in images.split(batch_size):
        network(batch.to(device).contiguous(memory_format=torch.channels_last))
    shifts = {name: shift.to(home) for name, shift in shifts.items()}
    for layer in models.layers(original.spec):
        if layer.batch_norm:
            corrected.get_submodule(layer.batch_norm).running_mean += shifts[layer.name]
        else:
            corrected.get_submodule(layer.name).bias -= shifts[layer.name]
    return corrected
