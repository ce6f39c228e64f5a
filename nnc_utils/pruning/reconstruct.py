"""Pruning by reconstruction: the weights of a layer that stay make up for those that go, by least squares.

No gradient step, no label: each layer's weight W becomes the W' that errs least on the inputs x it had,
``E |W' @ x - W @ x|**2 = trace((W' - W) @ H @ (W' - W).T)`` with ``H = E[x @ x.T]``. This is Optimal Brain
Surgeon (Hassibi and Stork, 1993) with a block for each output channel, as in Optimal Brain Compression
(Frantar and Alistarh, 2022) and SparseGPT (2023).
"""

import copy

import torch
from torch import Tensor, nn

from nnc_utils import curvature, encoding
from nnc_utils.devices import exact_device
from nnc_utils.pruning import schedules, unstructured
from nnc_utils.pruning.channel_removal import check_plain
from nnc_utils.training import progress

DAMPING = 0.05  # of H, a share of its mean diagonal: directions that no image showed still cost something
ROUNDS, ITERATIONS = 4, 6


def damped(moment: Tensor) -> Tensor:
    """The moment with its diagonal raised."""
    raised = DAMPING * moment.diagonal().mean() + 1e-30
    return moment + raised * torch.eye(len(moment), device=moment.device)


def importance(moment: Tensor, kind: str) -> Tensor:
    """What the square of a weight counts in each column, (n,), given the inputs' moment.

    "magnitude": the same in all. "inputs": ``H_cc``, the squared error without the weight. "obs":
    ``1 / [H^-1]_cc``, the error that is left once all others of its row have made up for it.
    """
    if kind == "magnitude":
        return torch.ones_like(moment.diagonal())
    if kind == "inputs":
        return moment.diagonal()
    return 1 / torch.cholesky_inverse(torch.linalg.cholesky(moment)).diagonal()


def corrected(
    weight: Tensor, kept: Tensor, moment: Tensor, *, start: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """The weight that errs least with zeros outside the mask `kept`; all three are (out, n).

    Each row is a least-squares problem of its own, ``H_SS @ w' = H_S: @ w`` for its columns S that stay.
    Conjugate gradients solve all of them at once, from `start` on: as many iterations as a row has weights
    are exact, a few gain most of it.
    """
    now = start * kept
    residual = ((weight - now) @ moment) * kept
    scaling = moment.diagonal().clamp(min=1e-30)
    direction = residual / scaling
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        moved = (direction @ moment) * kept
        length = size / (direction * moved).sum(1, keepdim=True).clamp(min=1e-30)
        now = now + length * direction
        residual = residual - length * moved
        step = residual / scaling
        size, before = (residual * step).sum(1, keepdim=True), size
        direction = step + size / before.clamp(min=1e-30) * direction
    return now


def prune_layer(
    weight: Tensor,
    moment: Tensor,
    sparsity: float,
    *,
    score: str = "obs",
    rounds: int = ROUNDS,
    two_of_four: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weight (out, in, ...) of a layer with a share of zeros, the others corrected, and its mask.

    In rounds: each scores the corrected weights anew, which have taken over what others did, and removes the
    same share of them. `two_of_four` is half: in each of two rounds one of four neighbouring inputs goes.
    """
    target, moment = weight.flatten(1), damped(moment)
    columns = importance(moment, score)
    now, kept = target, torch.ones_like(weight, dtype=torch.bool)
    shares = [0.25, 0.5] if two_of_four else schedules.sparsities(sparsity, "iterative", rounds)
    for share in shares:
        values = (now.square() * columns).view_as(weight).masked_fill(~kept, -torch.inf)
        if two_of_four:
            kept = unstructured.of_four(values, 3 if share == 0.25 else 2)
        else:
            kept = unstructured.masks({"": values}, {"": share})[""]
        now = corrected(target, kept.flatten(1), moment, start=now)
    return now.view_as(weight), kept


@torch.no_grad()
def prune_network(
    model: nn.Module,
    images: Tensor,
    *,
    sparsity: float = 0.5,
    score: str = "obs",
    rounds: int = ROUNDS,
    two_of_four: bool = False,
) -> nn.Module:
    """A copy of a network with a share of zeros in [0, 1), the weights that stay corrected.

    Each layer loses the share that one threshold for the magnitudes of all layers takes from it, or two of
    four where they fit. (Scores of second order, compared over all layers, empty the last ones.) `images` are
    normalized training images, a few thousand; masks and quantizers are refused.
    """
    check_plain(model)
    network, device = copy.deepcopy(model), exact_device()
    free = unstructured.masks(unstructured.scores(model, "magnitude"), sparsity)
    moments = curvature.input_moments(model, images)
    for name, moment in progress(moments.items(), "reconstruction"):
        layer, share = network.get_submodule(name), 1 - float(free[name].float().mean())
        fits = layer.weight.shape[1] % 4 == 0
        if fits if two_of_four else share:
            options = {"score": score, "rounds": rounds, "two_of_four": two_of_four}
            pruned, kept = prune_layer(layer.weight.to(device), moment.to(device), share, **options)
            encoding.attach(layer, encoding.Dense(pruned, kept))
    return network
