"""Sensitivity: how much the loss minds a change of one weight, and of a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import encoding, models
from nnc_utils.devices import exact_device


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

    Raises
    ------
    ValueError
        For no images, images of another shape, and a loss that is not finite.

    Notes
    -----
    Labels are drawn from the network's own predictions. With the data's labels it would be the
    "empirical Fisher", which is no curvature (Kunstner et al., 2019, section 3); with drawn ones it is
    the Gauss-Newton matrix of the cross-entropy (Martens, 2020, section 9). The gradients of different
    images are then independent and zero on average, so that the square of their sum is, on average,
    the sum of their squares: one backward pass serves a batch (Liu et al., 2023, Sophia, section 2.3).
    """
    models.check_images(model, images)
    home, device = next(model.parameters()).device, exact_device()
    network, weights = _plain_copy(model)
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch in images.split(batch_size):
        logits = network(batch.to(device))
        _check_finite(logits)
        drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).flatten()
        loss = functional.cross_entropy(logits, drawn.to(device), reduction="sum")
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            fisher[name] += gradient.square()
    return {name: (total.detach() / len(images)).to(home) for name, total in fisher.items()}


def hessian_diagonal(
    model: nn.Module, images: Tensor, labels: Tensor, *, probes: int = 16, batch_size: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Estimate, for each weight, the second derivative of the mean cross-entropy: the Hessian's diagonal.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Batch-norm works as in evaluation.
    images : normalized float images, (n, channels, size, size).
    labels : their classes, int64 (n,).
    probes : random vectors for each batch.
    batch_size : images a backward pass.
    seed : of the probes.

    Returns
    -------
    Layer -> second derivatives, in the shape of the layer's weight; their sum is the trace of the layer's
    block. The Hessian of a network is not positive definite: entries, and traces, may be below 0.

    Raises
    ------
    ValueError
        For no images, images or labels of another shape, and a loss that is not finite.

    Notes
    -----
    Hutchinson's estimator ``mean(v * (H @ v))`` with entries of v drawn from {-1, 1} (Bekas, Kokiopoulou
    and Saad, 2007); the sum of a layer's is that of its trace (Dong et al., 2020, HAWQ-V2, equation 8).
    All layers are probed at once: what one layer's probe brings into another
    one's product has a random sign, and so makes the estimate noisier but not wrong on average.
    """
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    if type(probes) is not int or probes < 1:
        raise ValueError(f"probes is {probes!r}: a whole number of at least 1 is needed")
    home, device = next(model.parameters()).device, exact_device()
    network, weights = _plain_copy(model)
    tensors = list(weights.values())
    diagonal = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size)):
        logits = network(batch.to(device))
        _check_finite(logits)
        loss = functional.cross_entropy(logits, truth.to(device), reduction="sum") / len(images)
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        for _ in range(probes):
            probe = [_signs(weight, generator) for weight in tensors]
            products = torch.autograd.grad(gradients, tensors, probe, retain_graph=True)
            for name, ours, product in zip(weights, probe, products):
                diagonal[name] += (ours * product).detach() / probes
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
    model : a network of `models.build`; not changed. Batch-norm works as in evaluation.
    candidates : layer -> a number (bits, or a share of zeros) -> weight to put in the place of the layer's
        own, the others left alone.
    images : normalized float images, (n, channels, size, size).
    labels : their classes, int64 (n,).
    batch_size : images a forward pass; a matter of memory only.

    Returns
    -------
    Layer -> number -> mean cross-entropy with the candidate minus without; may be below 0.

    Raises
    ------
    ValueError
        For an unknown layer, a candidate or labels or images of another shape, no images, and a
        candidate or a loss that is not finite.
    """
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    device = exact_device()
    network, weights = _plain_copy(model)
    _check_candidates(weights, candidates)
    units = ["conv1", *(name for name, _ in models.named_blocks(model.spec)), "fc"]
    increase = {name: dict.fromkeys(widths, 0.0) for name, widths in candidates.items()}
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size)):
        batch, truth = batch.to(device), truth.to(device)
        outputs = _outputs(network, units, batch)
        before = _total_loss(network, batch, truth)
        for unit in units:
            inside = [name for name in candidates if f"{name}.".startswith(f"{unit}.")]
            for name in inside:
                own = weights[name].clone()
                for number, candidate in candidates[name].items():
                    weights[name].copy_(candidate)
                    added = _total_loss(network, batch, truth) - before
                    increase[name][number] += added / len(images)
                weights[name].copy_(own)
            # Later layers do not change what this unit puts out: from here on it is looked up.
            network.get_submodule(unit).forward = lambda inputs, known=outputs[unit]: known
        for unit in units:
            del network.get_submodule(unit).forward
    return increase


# --- Inside -------------------------------------------------------------------------------------


def _plain_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in eval mode that computes with the same weights, but as plain tensors, and these by layer.

    It is on `exact_device`. Nothing but these weights has a gradient.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False).to(exact_device())
    weights = {}
    for name in (layer.name for layer in models.layers(model.spec)):
        module = network.get_submodule(name)
        encoding.fold(module)
        module.weight = weights[name] = nn.Parameter(module.weight.detach())
    return network, weights


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
    return drawn.to(weight) * 2 - 1


def _outputs(network: nn.Module, units: list[str], batch: Tensor) -> dict[str, Tensor]:
    """What each of the modules puts out."""
    outputs = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in units]
    network(batch)
    for hook in hooks:
        hook.remove()
    return outputs


def _total_loss(network: nn.Module, batch: Tensor, truth: Tensor) -> float:
    logits = network(batch)
    _check_finite(logits)
    return float(functional.cross_entropy(logits.double(), truth, reduction="sum"))


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError("logits are not finite: the network or the images hold NaN or inf")


def _check_candidates(
    weights: Mapping[str, Tensor], candidates: Mapping[str, Mapping[float, Tensor]]
) -> None:
    if unknown := sorted(set(candidates) - set(weights)):
        raise ValueError(f"unknown layer {unknown[0]!r}: one of {', '.join(weights)}")
    for name, widths in candidates.items():
        for number, candidate in widths.items():
            if candidate.shape != weights[name].shape:
                raise ValueError(
                    f"{name}: the candidate for {number} has shape {tuple(candidate.shape)}, "
                    f"the weight {tuple(weights[name].shape)}"
                )
            if not candidate.isfinite().all():
                raise ValueError(f"{name}: the candidate for {number} is not finite")
