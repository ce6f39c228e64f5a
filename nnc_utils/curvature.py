"""Curvature: what a change of several weights of a layer together does to the loss.

With H the second moment of a layer's inputs and G that of the loss's gradient at its outputs, a change D
of its weight, (out, n), adds about

    1/2 * trace(G @ D @ H @ D.T)

to the loss: the Kronecker-factored Fisher information (Martens and Grosse, 2015; convolutions: Grosse and
Martens, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models, sample
from nnc_utils.devices import exact_device
from nnc_utils.models import Layer
from nnc_utils.training import progress


@dataclass(frozen=True)
class Curvature:
    """How the loss curves in one layer's weight, (out, n) with n = in * kernel * kernel.

    inputs : (n, n), mean of ``x @ x.T`` over images and pixels, x what one output pixel sees.
    outputs : (out, out), mean over images of the sum over pixels of ``g @ g.T``, g the loss's gradient.
    """

    inputs: Tensor
    outputs: Tensor

    def to(self, device: torch.device) -> Curvature:
        """The same on a device."""
        return Curvature(self.inputs.to(device), self.outputs.to(device))

    def loss(self, error: Tensor) -> float:
        """The loss, in nats an image, that an error of the layer's weight adds."""
        rows = error.flatten(1)
        return float(0.5 * ((self.outputs @ (rows @ self.inputs)) * rows).sum())


def upper_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper triangular R with ``R @ R.T`` = moment, its diagonal raised by the damping times its mean.

    So directions that no image showed still cost something: where inputs outnumber the images' pixels,
    errors without a price would grow there.
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is {damping!r}: 0 or more is needed, such as 0.05")
    raised = moment.flip(0, 1)
    raised.diagonal().add_(damping * moment.diagonal().mean() + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(raised)
    if failed:
        raise ValueError(f"no factor with damping {damping}: give more images or more damping, as 0.05")
    return lower.flip(0, 1)


def _pass(model: nn.Module, images: Tensor, see: Callable, *, batch_size: int, seed: int, task: str) -> None:
    """Call ``see(layer, inputs, gradient at its outputs)`` for each layer and batch, on `exact_device`.

    The gradient is that of ``v @ logits`` with v, random signs times a root of ``diag(p) - p @ p.T``
    (curvature propagation; Martens, Sutskever and Swersky, 2012): the second moment that the loss's
    gradient has over labels drawn from the network's own p, without the rare draws that a confident
    network's would hang on.
    """
    models.check_images(model, images)
    network, layers = sample.frozen_copy(model), {layer.name: layer for layer in models.layers(model.spec)}

    def watch(name: str, inputs: Tensor, outputs: Tensor) -> None:
        outputs.register_hook(lambda gradient: see(layers[name], inputs.detach(), gradient))

    generator = torch.Generator().manual_seed(seed)
    with sample.watched(network, layers, watch):
        for batch in sample.sent(progress(images.split(batch_size), task), network):
            logits = network(batch.requires_grad_())
            sample.check_finite(logits)
            p = logits.detach().softmax(1)
            signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
            drawn = p.sqrt() * signs.to(p.device)
            logits.backward(drawn - p * drawn.sum(1, keepdim=True))


def curvatures(
    model: nn.Module, images: Tensor, *, rows: int = 8192, batch_size: int = 128, seed: int = 0
) -> dict[str, Curvature]:
    """Measure each layer's curvature on training images.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Batch-norm works as in evaluation.
    images : normalized float images, (n, channels, size, size).
    rows : output pixels from which the inputs' moment is estimated: early layers have them from a few
        images. Above in * kernel * kernel the moment has full rank; below, damping alone holds the rest.
    batch_size : images a pass.
    seed : of the signs that the gradients are drawn with.

    Returns
    -------
    Layer -> `Curvature`. A ValueError for images of another shape, and activations that are not finite.
    """
    layers = models.layers(model.spec)
    home, device = next(model.parameters()).device, exact_device()
    seen = dict.fromkeys((x.name for x in layers), 0)
    lengths = {x.name: math.prod(x.weight_shape[1:]) for x in layers}
    inputs = {x.name: torch.zeros(lengths[x.name], lengths[x.name], device=device) for x in layers}
    outputs = {x.name: torch.zeros(x.out_channels, x.out_channels, device=device) for x in layers}

    def see(layer: Layer, patches: Tensor, gradient: Tensor) -> None:
        patches = patches[: max(0, math.ceil(rows / layer.size_out**2) - seen[layer.name])]
        seen[layer.name] += len(patches)
        if len(patches):
            if layer.kind == "conv":
                patches = functional.unfold(patches, layer.kernel, 1, layer.kernel // 2, layer.stride)
                patches = patches.transpose(1, 2).flatten(0, 1)
            inputs[layer.name].addmm_(patches.T, patches)
        if gradient.ndim == 4:
            gradient = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        outputs[layer.name].addmm_(gradient.T, gradient)

    _pass(model, images, see, batch_size=batch_size, seed=seed, task="curvature")
    means = ((x.name, seen[x.name] * x.size_out**2) for x in layers)
    return {n: Curvature(inputs[n] / count, outputs[n] / len(images)).to(home) for n, count in means}


def loss_of_errors(
    model: nn.Module, errors: dict[str, Tensor], images: Tensor, *, batch_size: int = 128, seed: int = 0
) -> dict[str, float]:
    """The loss, in nats an image, that an error of each layer's weight alone adds, to second order.

    Half the mean square of the loss's directional derivative, ``d @ F @ d / 2`` with the Fisher information
    F itself: outputs and pixels whose errors move together add up, which Kronecker factors leave out.
    `errors` are layer -> rounded - weight, in the weight's shape; the other parameters as for `curvatures`.
    """
    squares = dict.fromkeys(errors, 0.0)
    errors = {name: error.to(exact_device()) for name, error in errors.items()}

    def see(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        if layer.name in errors:
            change = sample.outputs(layer, errors[layer.name], inputs)
            squares[layer.name] += float((gradient * change).flatten(1).sum(1).square().sum())

    _pass(model, images, see, batch_size=batch_size, seed=seed, task="loss of errors")
    return {name: 0.5 * total / len(images) for name, total in squares.items()}
