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


class _InputMoments:
    """Second moments of each layer's inputs, from so many output pixels, or a multiple of its inputs."""

    def __init__(self, model: nn.Module, rows: int, multiple: float = math.inf) -> None:
        self.layers = {layer.name: layer for layer in models.layers(model.spec)}
        lengths = {name: math.prod(layer.weight_shape[1:]) for name, layer in self.layers.items()}
        self.rows = {name: min(rows, max(1024, multiple * length)) for name, length in lengths.items()}
        self.seen, self.sums = dict.fromkeys(self.layers, 0), dict.fromkeys(self.layers, 0.0)

    def add(self, name: str, inputs: Tensor) -> None:
        layer, left = self.layers[name], self.rows[name] - self.seen[name]
        if left <= 0:
            return
        if layer.kind == "conv":
            inputs = functional.unfold(inputs, layer.kernel, 1, layer.kernel // 2, layer.stride)
            inputs = inputs.transpose(1, 2).flatten(0, 1)
        some = inputs[:: max(1, int(len(inputs) // left))]  # of all these images, not all pixels of a few
        self.sums[name] += some.T @ some
        self.seen[name] += len(some)

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.seen[name] for name, total in self.sums.items()}


@torch.no_grad()
def input_moments(
    model: nn.Module, images: Tensor, *, rows: int = 8192, batch_size: int = 128
) -> dict[str, Tensor]:
    """`Curvature.inputs` of each layer alone, without a backward pass; parameters as for `curvatures`.

    Two output pixels for each input of a layer are enough; once all have them no further image is looked at.
    """
    models.check_images(model, images)
    network, moments = sample.frozen_copy(model), _InputMoments(model, rows, multiple=2)
    with sample.watched(network, moments.layers, lambda name, inputs, outputs: moments.add(name, inputs)):
        for batch in sample.sent(progress(images.split(batch_size), "input moments"), network):
            sample.check_finite(network(batch))
            if all(moments.seen[name] >= rows for name, rows in moments.rows.items()):
                break
    home = next(model.parameters()).device
    return {name: moment.to(home) for name, moment in moments.means().items()}


def curvatures(
    model: nn.Module, images: Tensor, *, rows: int = 8192, batch_size: int = 128, seed: int = 0
) -> dict[str, Curvature]:
    """Each layer's `Curvature` from normalized training images, (n, channels, size, size).

    `rows` is from how many output pixels the inputs' moment is estimated; above in * kernel * kernel it has
    full rank, below, damping alone holds the rest. The gradients are drawn with the seed. A ValueError for
    images of another shape, and activations that are not finite.
    """
    moments, home = _InputMoments(model, rows), next(model.parameters()).device
    outputs = dict.fromkeys(moments.layers, 0.0)

    def see(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        moments.add(layer.name, inputs)
        if gradient.ndim == 4:
            gradient = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        outputs[layer.name] += gradient.T @ gradient

    _pass(model, images, see, batch_size=batch_size, seed=seed, task="curvature")
    inputs = moments.means()
    return {name: Curvature(inputs[name], outputs[name] / len(images)).to(home) for name in inputs}


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
