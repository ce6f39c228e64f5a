"""Optimal Brain Surgeon: weights are cut, and those of the layer that stay make up for it.

Each layer is a block with the curvature G ⊗ H of `curvature.Curvature`. With it the loss that one cut weight
adds, once all others have made up for it, and what they become, have closed forms (Hassibi and Stork, 1993;
blocks of a network: Kurtic et al., 2022; Kronecker factors: Wang et al., 2019, "EigenDamage").
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.curvature import Curvature, upper_factor
from nnc_utils.devices import exact_device
from nnc_utils.pruning import schedules, unstructured
from nnc_utils.pruning.structured import groups
from nnc_utils.training import progress

DAMPING = (0.05, 0.3)  # of H and of G, as for second-order rounding
ITERATIONS = 12  # of conjugate gradients


def scores(
    weights: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
    *,
    damping: tuple[float, float] = DAMPING,
) -> dict[str, Tensor]:
    """The loss, in nats an image, that cutting one weight adds after the layer has made up for it.

    ``w**2 / (2 * [G^-1]_rr * [H^-1]_cc)`` for the weight in row r and column c: the saliency of Optimal Brain
    Surgeon (Hassibi and Stork, 1993, equation 5). All other weights may move: where some are cut already it
    is too low, and ranks what is left only about right.

    Parameters
    ----------
    weights : layer -> (out, in) or (out, in, kernel, kernel).
    curvature : of each of these layers, from `curvature.curvatures`.
    damping : of H and of G, see `curvature.upper_factor`.

    Returns
    -------
    Layer -> float32 in the weight's shape; larger means keep.
    """
    found = {}
    for name, weight in weights.items():
        columns, rows = (
            _inverse_diagonal(moment, share)
            for moment, share in zip((curvature[name].inputs, curvature[name].outputs), damping, strict=True)
        )
        flat = weight.detach().flatten(1)
        found[name] = (flat.square() / (2 * rows[:, None] * columns)).view(weight.shape)
    return found


def _inverse_diagonal(moment: Tensor, damping: float) -> Tensor:
    factor = upper_factor(moment, damping)
    unit = torch.eye(len(moment), device=moment.device)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=True)
    return inverse.square().sum(0)


def corrected(
    weight: Tensor,
    kept: Tensor,
    curvature: Curvature,
    *,
    damping: tuple[float, float] = DAMPING,
    iterations: int = ITERATIONS,
    start: Tensor | None = None,
) -> Tensor:
    """The weight with zeros outside the mask that is nearest to the given one: of least added loss.

    Parameters
    ----------
    weight : (out, in) or (out, in, kernel, kernel), before anything was cut.
    kept : bool in the weight's shape.
    curvature : of this layer.
    damping : of H and of G.
    iterations : of conjugate gradients, for all rows at once; as many as there are weights solve the
        problem exactly, a dozen gain most of it.
    start : a weight to start from; the given one with what is cut at 0, unless given.

    Returns
    -------
    float32 in the weight's shape.

    Notes
    -----
    Minimizes ``trace(G @ D @ H @ D.T)`` for D = result - weight. For one cut weight in one row that is the
    step of Optimal Brain Surgeon, ``-w / [H^-1]_cc * H^-1[:, c]``.
    """
    inputs, outputs = (
        moment + share * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        for moment, share in zip((curvature.inputs, curvature.outputs), damping, strict=True)
    )
    mask, wanted = kept.flatten(1), weight.detach().flatten(1)
    price = (outputs.diagonal()[:, None] * inputs.diagonal()).clamp(min=1e-30)
    now = (wanted if start is None else start.detach().flatten(1)) * mask
    residual = (outputs @ (wanted - now) @ inputs) * mask
    step = residual / price
    direction, size = step, float((residual * step).sum())
    for _ in range(iterations):
        moved = (outputs @ direction @ inputs) * mask
        curve = float((direction * moved).sum())
        if curve <= 0 or size <= 0:  # there already, to rounding
            break
        now = now + size / curve * direction
        residual = residual - size / curve * moved
        step = residual / price
        size, before = float((residual * step).sum()), size
        direction = step + size / before * direction
    return now.view(weight.shape)


def prune_network(
    model: nn.Module,
    curvature: Mapping[str, Curvature],
    *,
    sparsity: float,
    rounds: int = 3,
    damping: tuple[float, float] = DAMPING,
) -> nn.Module:
    """A copy of a network with the weights cut that its loss minds least, the others corrected.

    Parameters
    ----------
    model : a network of `models.build` without masks and quantizers; not changed.
    curvature : of each layer.
    sparsity : share of zeros of all layers together, in [0, 1).
    rounds : between which the weights are scored anew, since a corrected weight has taken over what others
        did.

    Raises
    ------
    ValueError
        For a share outside [0, 1), masks, quantized weights, a layer that would be empty.
    """
    _check_plain(model)
    names = [layer.name for layer in models.layers(model.spec)]
    device = exact_device()
    weights = {name: model.get_submodule(name).weight.detach().to(device) for name in names}
    curvature = {name: curvature[name].to(device) for name in names}
    now, kept = dict(weights), {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for share in schedules.sparsities(sparsity, "iterative", rounds):
        found = scores(now, curvature, damping=damping)
        for name in names:
            found[name][~kept[name]] = -torch.inf
        kept = unstructured.masks(found, share)
        for name in progress(names, f"correcting for {share:.0%} zeros"):
            about = {"damping": damping, "start": now[name]}
            now[name] = corrected(weights[name], kept[name], curvature[name], **about)
    network = copy.deepcopy(model)
    for name in names:
        encoding.attach(network.get_submodule(name), encoding.Dense(now[name] * kept[name], kept[name]))
    return network


@torch.no_grad()
def compensated(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
    *,
    damping: float = DAMPING[0],
) -> nn.Module:
    """A copy of a network in which what reads a group's channels makes up for those that will be removed.

    The readers' weights for the channels that stay become those of least squares (He, Zhang and Sun, 2017,
    "Channel pruning", equation 1, second step), but with the inputs of the network before, for all layers at
    once; the others become 0. `structured.remove_channels` then takes them away.

    Parameters
    ----------
    model : a network of `models.build` without masks and quantizers; not changed.
    kept : group -> the numbers of the channels that stay, as for `structured.remove_channels`.
    curvature : of each layer; its second moments of the inputs are used.
    damping : of these, see `curvature.upper_factor`.
    """
    _check_plain(model)
    network, known, device = copy.deepcopy(model), groups(model.spec), exact_device()
    kernels = {layer.name: layer.kernel**2 for layer in models.layers(model.spec)}
    for name, channels in kept.items():
        for reader in known[name].readers:
            moment, kernel = curvature[reader].inputs.to(device), kernels[reader]
            raised = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), device=device)
            stay = (channels[:, None] * kernel + torch.arange(kernel)).flatten().to(device)
            module = network.get_submodule(reader)
            weight = module.weight.flatten(1).to(device)
            mended = torch.zeros_like(weight)
            mended[:, stay] = torch.linalg.solve(raised[stay][:, stay], raised[stay] @ weight.T).T
            module.weight.copy_(mended.view(module.weight.shape))
    return network


def _check_plain(model: nn.Module) -> None:
    for layer in models.layers(model.spec):
        stored = encoding.encoded(model.get_submodule(layer.name))
        if not isinstance(stored, encoding.Dense) or stored.mask is not None:
            raise ValueError(f"{layer.name} is masked or quantized: give the network before anything was cut")
