"""Repairs after rounding that need pictures but no training: batch-norm re-estimation, bias correction."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models


@torch.no_grad()
def reestimate_batch_norm(
    quantized: nn.Module, images: Tensor, *, original: nn.Module, batch_size: int = 256
) -> nn.Module:
    """A copy of a rounded network whose batch-norm statistics moved as its own activations did.

    Rounded weights give other sums than the float weights whose mean and variance batch-norm
    remembers (Sun et al., 2019, "Hybrid 8-bit floating point (HFP8) training and inference"). Both networks
    see the same batches: what rounding moved, the difference of the means and of the variances (the ratio of
    those that fell), is known from few images, and a network that was not rounded keeps its statistics.

    Parameters
    ----------
    quantized : the rounded network; not changed.
    images : normalized training images, (n, channels, size, size).
    original : the same network with float weights; not changed.
    batch_size : images a forward pass; a smaller last batch is left out unless it is the only one.

    Raises
    ------
    ValueError
        For fewer than 2 images, or images of another shape.
    """
    models.check_images(original, images, least=2)
    corrected = copy.deepcopy(quantized)
    moved = zip(_batch_norms(quantized, images, batch_size), _batch_norms(original, images, batch_size))
    norms = [module for module in corrected.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, (new, old) in zip(norms, moved, strict=True):
        norm.running_mean += new.running_mean - old.running_mean
        # A variance that grew from nearly nothing has a ratio that says nothing.
        norm.running_var *= ((new.running_var + norm.eps) / (old.running_var + norm.eps)).clamp(max=1)
        norm.running_var += (new.running_var - old.running_var).clamp(min=0)
    return corrected


def _batch_norms(model: nn.Module, images: Tensor, batch_size: int) -> list[nn.BatchNorm2d]:
    """Batch-norms with the average statistics of these batches."""
    network = copy.deepcopy(model).train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    whole = len(images) // batch_size * batch_size or len(images)
    for batch in images[:whole].split(batch_size):
        network(batch.contiguous(memory_format=torch.channels_last))
    return norms


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
    corrected = copy.deepcopy(quantized)
    shifts: dict[str, Tensor] = {}
    hooks = []
    for layer in models.layers(original.spec):
        error = quantized.get_submodule(layer.name).weight - original.get_submodule(layer.name).weight

        def add_shift(module: nn.Module, inputs: tuple[Tensor], output: Tensor, layer=layer, error=error):
            if layer.kind == "conv":
                shift = functional.conv2d(inputs[0], error, None, layer.stride, layer.kernel // 2)
                shift = shift.mean((2, 3))
            else:
                shift = inputs[0] @ error.T
            shifts[layer.name] = shifts.get(layer.name, 0.0) + shift.sum(0) / len(images)

        hooks.append(original.get_submodule(layer.name).register_forward_hook(add_shift))
    try:
        training = original.training
        original.eval()
        for batch in images.split(batch_size):
            original(batch.contiguous(memory_format=torch.channels_last))
    finally:
        original.train(training)
        for hook in hooks:
            hook.remove()
    for layer in models.layers(original.spec):
        if layer.batch_norm:
            corrected.get_submodule(layer.batch_norm).running_mean += shifts[layer.name]
        else:
            corrected.get_submodule(layer.name).bias -= shifts[layer.name]
    return corrected
