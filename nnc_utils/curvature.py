"""Curvature: what a change of several weights of a layer together does to the loss.

With H the second moment of a layer's inputs and G that of the loss's gradient at its outputs, a change D
of its weight, (out, n), adds about

    1/2 * trace(G @ D @ H @ D.T)

to the loss: the Kronecker-factored Fisher information (Martens and Grosse, 2015; convolutions: Grosse and
Martens, 2016).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.devices import exact_device
from nnc_utils.models import Layer
from nnc_utils.training import progress


@dataclass(frozen=True)
class Curvature:
    """How the loss curves in one layer's weight, (out, n) with n = in * kernel * kernel.

    Parameters
    ----------
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


def _watched(model: nn.Module, images: Tensor, see, *, batch_size: int, seed: int, task: str) -> None:
    """Call ``see(layer, inputs, gradient)`` for each layer and batch: what it gets, and the gradient there.

    Both are on `exact_device`.

    The gradient is that of ``v @ logits`` with v, random signs times a root of ``diag(p) - p @ p.T``
    (curvature propagation; Martens, Sutskever and Swersky, 2012): the second moment that the loss's
    gradient has over labels drawn from the network's own p, without the rare draws that a confident
    network's would hang on.
    """
    models.check_images(model, images)
    device = exact_device()
    network = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    for layer in models.layers(model.spec):

        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor, layer: Layer = layer) -> None:
            inputs = given[0].detach()
            output.register_hook(lambda gradient: see(layer, inputs, gradient))

        network.get_submodule(layer.name).register_forward_hook(hook)
    generator = torch.Generator().manual_seed(seed)
    for batch in progress(images.split(batch_size), task):
        batch = batch.to(device).contiguous(memory_format=torch.channels_last)
        logits = network(batch.requires_grad_())
        if not logits.isfinite().all():
            raise ValueError("logits are not finite: the network or the images hold NaN or inf")
        p = logits.detach().softmax(1)
        signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
        drawn = p.sqrt() * signs.to(device)
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
    Layer -> `Curvature`.

    Raises
    ------
    ValueError
        For no images, images of another shape, activations that are not finite.
    """
    layers = models.layers(model.spec)
    seen = dict.fromkeys((layer.name for layer in layers), 0)
    home, device = next(model.parameters()).device, exact_device()
    sizes = {x.name: (x.in_channels * x.kernel**2, x.out_channels) for x in layers}
    inputs, outputs = (
        {name: torch.zeros(size[side], size[side], device=device) for name, size in sizes.items()}
        for side in (0, 1)
    )

    def see(layer: Layer, given: Tensor, gradient: Tensor) -> None:
        taken = given[: max(0, math.ceil(rows / layer.size_out**2) - seen[layer.name])]
        if len(taken):
            if layer.kind == "conv":
                taken = functional.unfold(taken, layer.kernel, 1, layer.kernel // 2, layer.stride)
                patches = taken.transpose(1, 2).flatten(0, 1)
            else:
                patches = taken
            inputs[layer.name].addmm_(patches.T, patches)
            seen[layer.name] += len(taken)
        if gradient.ndim == 4:
            gradient = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        outputs[layer.name].addmm_(gradient.T, gradient)

    _watched(model, images, see, batch_size=batch_size, seed=seed, task="curvature")
    found = {
        x.name: Curvature(inputs[x.name] / (seen[x.name] * x.size_out**2), outputs[x.name] / len(images))
        for x in layers
    }
    return {name: curvature.to(home) for name, curvature in found.items()}


def loss_of_errors(
    model: nn.Module, errors: dict[str, Tensor], images: Tensor, *, batch_size: int = 128, seed: int = 0
) -> dict[str, float]:
    """The loss, in nats an image, that an error of each layer's weight alone adds, to second order.

    Half the mean square of the loss's directional derivative, ``d @ F @ d / 2`` with the Fisher information
    F itself: outputs and pixels whose errors move together add up, which Kronecker factors leave out.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    errors : layer -> rounded - weight, in the weight's shape; of some layers or of all.
    images : normalized training images, (n, channels, size, size).
    batch_size : images a pass.
    seed : of the signs that the gradients are drawn with.
    """
    squares = dict.fromkeys(errors, 0.0)
    errors = {name: error.to(exact_device()) for name, error in errors.items()}

    def see(layer: Layer, given: Tensor, gradient: Tensor) -> None:
        if layer.name not in errors:
            return
        error = errors[layer.name]
        if layer.kind == "conv":
            change = functional.conv2d(given, error, None, layer.stride, layer.kernel // 2)
        else:
            change = given @ error.T
        squares[layer.name] += float((gradient * change).flatten(1).sum(1).square().sum())

    _watched(model, images, see, batch_size=batch_size, seed=seed, task="loss of errors")
    return {name: 0.5 * total / len(images) for name, total in squares.items()}
