"""Optimal Brain Surgeon: weights are removed, and those of the layer that stay make up for it.

Each layer is a block with the curvature G ⊗ H of `curvature.Curvature`. With it the loss that one removed
weight adds, once all others have made up for it, and what they become, have closed forms (Hassibi and Stork,
1993; blocks of a network: Kurtic et al., 2022; Kronecker factors: Wang et al., 2019, "EigenDamage").
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.curvature import Curvature, upper_factor
from nnc_utils.devices import exact_device
from nnc_utils.pruning import schedules, unstructured
from nnc_utils.pruning.structured import check_plain
from nnc_utils.training import progress

Damping = tuple[float, float]
DAMPING = (0.05, 0.3)  # of H and of G, as for second-order rounding


def scores(
    weights: Mapping[str, Tensor], curvature: Mapping[str, Curvature], *, damping: Damping = DAMPING
) -> dict[str, Tensor]:
    """The loss, in nats an image, that removing one weight adds after the layer has made up for it.

    ``w**2 / (2 * [G^-1]_rr * [H^-1]_cc)`` for the weight in row r and column c (Hassibi and Stork, 1993,
    equation 5), in the weight's shape; larger means keep. All other weights may move: where some are removed
    already it is too low, and ranks what is left only roughly.
    """
    score = {}
    for name, weight in weights.items():
        columns = _inverse_diagonal(curvature[name].inputs, damping[0])
        rows = _inverse_diagonal(curvature[name].outputs, damping[1])
        square = weight.detach().flatten(1).square()
        score[name] = (square / (2 * rows[:, None] * columns)).view(weight.shape)
    return score


def _inverse_diagonal(moment: Tensor, damping: float) -> Tensor:
    factor, unit = upper_factor(moment, damping), torch.eye(len(moment), device=moment.device)
    return torch.linalg.solve_triangular(factor, unit, upper=True).square().sum(0)


def corrected(
    weight: Tensor,
    kept: Tensor,
    curvature: Curvature,
    *,
    damping: Damping = DAMPING,
    iterations: int = 12,
    start: Tensor | None = None,
) -> Tensor:
    """The weight of least added loss with zeros outside the mask `kept`.

    Minimizes ``trace(G @ D @ H @ D.T)`` for D = result - weight, all rows at once. For one removed weight in
    one row that is the step of Optimal Brain Surgeon, ``-w / [H^-1]_cc * H^-1[:, c]``.
    As many iterations of conjugate gradients as there are weights solve it exactly, a dozen gain most of it;
    they start at `start`, or at the weight with zeros outside the mask.
    """
    inputs, outputs = (
        moment + share * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        for moment, share in zip((curvature.inputs, curvature.outputs), damping, strict=True)
    )
    mask, target = kept.flatten(1), weight.detach().flatten(1)
    scaling = (outputs.diagonal()[:, None] * inputs.diagonal()).clamp(min=1e-30)
    now = (target if start is None else start.detach().flatten(1)) * mask
    residual = (outputs @ (target - now) @ inputs) * mask
    step = residual / scaling
    direction, size = step, float((residual * step).sum())
    for _ in range(iterations):
        moved = (outputs @ direction @ inputs) * mask
        curve = float((direction * moved).sum())
        if curve <= 0 or size <= 0:  # there already, to rounding
            break
        now = now + size / curve * direction
        residual = residual - size / curve * moved
        step = residual / scaling
        size, before = float((residual * step).sum()), size
        direction = step + size / before * direction
    return now.view(weight.shape)


def prune_network(
    model: nn.Module, curvature: Mapping[str, Curvature], *, sparsity: float, rounds: int = 3
) -> nn.Module:
    """A copy of a network without the weights that its loss minds least, the others corrected.

    `sparsity` is the share of zeros of all layers together, in [0, 1). Between the rounds the weights are
    scored anew, since a corrected weight has taken over what others did. Masks and quantizers are refused.
    """
    check_plain(model)
    network, device = copy.deepcopy(model), exact_device()
    names = [layer.name for layer in models.layers(model.spec)]
    weights = {name: model.get_submodule(name).weight.detach().to(device) for name in names}
    curvature = {name: curvature[name].to(device) for name in names}
    now, kept = dict(weights), {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for share in schedules.sparsities(sparsity, "iterative", rounds):
        score = scores(now, curvature)
        for name in names:
            score[name][~kept[name]] = -torch.inf
        kept = unstructured.masks(score, share)
        for name in progress(names, f"correcting for {share:.0%} zeros"):
            now[name] = corrected(weights[name], kept[name], curvature[name], start=now[name])
    for name in names:
        encoding.attach(network.get_submodule(name), encoding.Dense(now[name] * kept[name], kept[name]))
    return network
