"""Bias correction: a repair after rounding that needs images but no training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nnc_utils import models, sample


@torch.no_grad()
def correct_bias(quantized: nn.Module, images: Tensor, *, original: nn.Module, batch_size=256) -> nn.Module:
    """A copy of a rounded network in which rounding moves no layer's mean output, inputs being equal.

    The rounding error ``Ŵ - W`` times the float network's mean input, on normalized training images, is a
    shift of each output channel. It is added to what batch-norm subtracts, or taken off the classifier's
    bias (Nagel et al., 2019, section 4.2). That inputs moved, too, is not corrected.
    """
    models.check_images(original, images)
    home, network = next(original.parameters()).device, sample.frozen_copy(original)
    layers = {layer.name: layer for layer in models.layers(original.spec)}
    shifts: dict[str, Tensor] = {}

    def add_shift(name: str, inputs: Tensor, outputs: Tensor) -> None:
        error = quantized.get_submodule(name).weight - original.get_submodule(name).weight
        shift = sample.outputs(layers[name], error.to(inputs.device), inputs)
        shift = shift.mean((2, 3)) if layers[name].kind == "conv" else shift
        shifts[name] = shifts.get(name, 0.0) + shift.sum(0) / len(images)

    with sample.watched(network, layers, add_shift):
        for batch in sample.sent(images.split(batch_size), network):
            network(batch)
    corrected = copy.deepcopy(quantized)
    for layer in layers.values():
        shift = shifts[layer.name].to(home)
        if layer.batch_norm:
            corrected.get_submodule(layer.batch_norm).running_mean += shift
        else:
            corrected.get_submodule(layer.name).bias -= shift
    return corrected
