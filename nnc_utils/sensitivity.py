"""Sensitivity: how much the loss minds a change of one weight, and of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models, sample
from nnc_utils.parametrizations import fold


def fisher_diagonal(
    model: nn.Module, images: Tensor, *, batch_size: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Estimate, for each weight, the curvature of the cross-entropy: the Fisher information's diagonal.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Batch-norm works as in evaluation.
    images : normalized float images, (n, channels, size, size).
    batch_size : images a backward pass; more of them take less time and give a noisier estimate.
    seed : of the drawn labels.

    Returns
    -------
    Layer -> mean over the images, in the shape of the layer's weight; at least 0.

    Notes
    -----
    Labels are drawn from the network's own predictions. With the data's labels it would be the
    "empirical Fisher", which is no curvature (Kunstner et al., 2019, section 3); with drawn ones it is
    the Gauss-Newton matrix of the cross-entropy (Martens, 2020, section 9). The gradients of different
    images are then independent and zero on average, so that the square of their sum is, on average,
    the sum of their squares: one backward pass serves a batch (Liu et al., 2023, Sophia, section 2.3).
    """
    models.check_images(model, images)
    network, weights = _plain_copy(model)
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch in images.split(batch_size):
        logits = _logits(network, batch)
        drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).flatten()
        loss = functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            fisher[name] += gradient.square()
    home = next(model.parameters()).device
    return {name: (total.detach() / len(images)).to(home) for name, total in fisher.items()}


def hessian_diagonal(
    model: nn.Module, images: Tensor, labels: Tensor, *, probes: int = 16, batch_size: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Estimate, for each weight, the second derivative of the mean cross-entropy: the Hessian's diagonal.

    Parameters
    ----------
    model, images : as for `fisher_diagonal`.
    labels : the images' classes, int64 (n,).
    probes : random vectors for each batch, drawn with the seed.

    Returns
    -------
    Layer -> second derivatives, in the shape of the layer's weight; their sum is the trace of the layer's
    block. The Hessian of a network is not positive definite: entries, and traces, may be below 0.

    Notes
    -----
    Hutchinson's estimator ``mean(v * (H @ v))`` with entries of v drawn from {-1, 1} (Bekas, Kokiopoulou
    and Saad, 2007); the sum of a layer's is that of its trace (Dong et al., 2020, HAWQ-V2, equation 8). All
    layers are probed at once: what one layer's probe brings into another one's product has a random sign.
    """
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    network, weights = _plain_copy(model)
    tensors = list(weights.values())
    diagonal = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size)):
        logits = _logits(network, batch)
        loss = functional.cross_entropy(logits, truth.to(logits.device), reduction="sum") / len(images)
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        for _ in range(probes):
            probe = [_signs(weight, generator) for weight in tensors]
            products = torch.autograd.grad(gradients, tensors, probe, retain_graph=True)
            for name, ours, product in zip(weights, probe, products):
                diagonal[name] += (ours * product).detach() / probes
    home = next(model.parameters()).device
    return {name: estimate.detach().to(home) for name, estimate in diagonal.items()}


@torch.no_grad()
def loss_increase(
    model: nn.Module,
    candidates: Mapping[str, Mapping[float, Tensor]],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
) -> dict[str, dict[float, float]]:
    """Measure what each candidate for one layer's weight adds to the mean cross-entropy.

    Parameters
    ----------
    model, images : as for `fisher_diagonal`.
    candidates : layer -> a number (bits, or a share of zeros) -> weight to put in the place of the layer's
        own, the others left alone.
    labels : the images' classes, int64 (n,).

    Returns
    -------
    Layer -> number -> mean cross-entropy with the candidate minus without; may be below 0.
    """
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    network, weights = _plain_copy(model)
    units = ["conv1", *(name for name, _ in models.named_blocks(model.spec)), "fc"]
    increase = {name: dict.fromkeys(widths, 0.0) for name, widths in candidates.items()}
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size)):
        _, known = sample.with_outputs(network, units, batch.to(network.fc.weight.device))
        before = _total_loss(network, batch, truth)
        for unit in units:
            for name in (name for name in candidates if f"{name}.".startswith(f"{unit}.")):
                own = weights[name].clone()
                for number, candidate in candidates[name].items():
                    weights[name].copy_(candidate)
                    increase[name][number] += (_total_loss(network, batch, truth) - before) / len(images)
                weights[name].copy_(own)
            # Later layers do not change what this unit puts out: from here on it is looked up.
            network.get_submodule(unit).forward = lambda inputs, outputs=known[unit]: outputs
        for unit in units:
            del network.get_submodule(unit).forward
    return increase


def _plain_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A frozen copy that computes with the same weights, but as plain tensors; only these have a gradient."""
    network, weights = sample.frozen_copy(model), {}
    for name in (layer.name for layer in models.layers(model.spec)):
        module = network.get_submodule(name)
        fold(module)
        module.weight = weights[name] = nn.Parameter(module.weight.detach())
    return network, weights


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
    return drawn.to(weight) * 2 - 1


def _logits(network: nn.Module, batch: Tensor) -> Tensor:
    logits = network(batch.to(network.fc.weight.device))
    sample.check_finite(logits)
    return logits


def _total_loss(network: nn.Module, batch: Tensor, truth: Tensor) -> float:
    logits = _logits(network, batch).double()
    return float(functional.cross_entropy(logits, truth.to(logits.device), reduction="sum"))
