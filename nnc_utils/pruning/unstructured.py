"""Single weights are removed: a score for each, a mask of those that stay, a network that keeps its mask.

The zeros stay in memory: a mask makes a file smaller, not the arithmetic.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import encoding, models, sensitivity
from nnc_utils.devices import exact_device

SCORES = ("random", "magnitude", "gradient", "taylor", "obd_fisher", "obd_hessian")
BATCH = 64  # images a pass; it changes the noise of curvature
PROBES = 8  # for the Hessian's diagonal; each costs as much as three passes


def scores(
    model: nn.Module, kind: str, *, images: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A score for each weight of each layer, in its shape; larger means keep, -inf where a mask removed it.

    "random" is the control; "magnitude" is |w| (Han et al., 2015); "gradient" is |∂L/∂w|; "taylor" is
    |w·∂L/∂w|, the loss's first-order change without the weight (Molchanov et al., 2017); "obd_fisher" and
    "obd_hessian" are w²·|h|/2 with h the diagonal of the Fisher information or of the Hessian (Optimal Brain
    Damage; LeCun et al., 1989). All but two need normalized training images (n, C, H, W) and their classes.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}: one of {', '.join(SCORES)}")
    if kind not in ("random", "magnitude") and (images is None or labels is None):
        raise ValueError(f"{kind} needs images and labels")
    modules = {layer.name: model.get_submodule(layer.name) for layer in models.layers(model.spec)}
    weights = {name: module.weight.detach() for name, module in modules.items()}
    generator, options = torch.Generator().manual_seed(seed), {"batch_size": BATCH, "seed": seed}
    if kind == "random":
        score = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    elif kind == "magnitude":
        score = {name: weight.abs() for name, weight in weights.items()}
    elif kind in ("gradient", "taylor"):
        slopes = _gradients(model, images, labels)
        score = {name: (g if kind == "gradient" else g * weights[name]).abs() for name, g in slopes.items()}
    else:
        if kind == "obd_fisher":
            diagonal = sensitivity.fisher_diagonal(model, images, **options)
        else:
            diagonal = sensitivity.hessian_diagonal(model, images, labels, probes=PROBES, **options)
        score = {name: weight.square() * diagonal[name].abs() / 2 for name, weight in weights.items()}
    for name, values in score.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: weights or gradients are not finite; has the network diverged?")
        if (mask := encoding.mask_of(modules[name])) is not None:
            values[~mask] = -torch.inf
    return score


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy of these images by each layer's weight."""
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    home, device = next(model.parameters()).device, exact_device()
    plain, weights = copy.deepcopy(model).eval().requires_grad_(False).to(device), {}
    for layer in models.layers(model.spec):
        module = plain.get_submodule(layer.name)
        encoding.fold(module)
        weights[layer.name] = module.weight.requires_grad_()
    for batch, truth in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        loss = functional.cross_entropy(plain(batch.to(device)), truth.to(device), reduction="sum")
        (loss / len(images)).backward()
    return {name: weight.grad.to(home) for name, weight in weights.items()}


def masks(score: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Which weights stay (True), in the score's shapes; the nearest whole number of weights goes.

    `sparsity` is a share of zeros in [0, 1), of all layers together with one threshold ("global") or of each
    layer ("layer-wise"). A ValueError names a layer that would be empty.
    """
    if isinstance(sparsity, Mapping):
        if odd := sorted(set(sparsity) ^ set(score)):
            raise ValueError(f"unknown or missing: {', '.join(odd)}; the layers are {', '.join(score)}")
        parts = [_highest(values.flatten(), sparsity[name]) for name, values in score.items()]
    else:
        everything = _highest(torch.cat([values.flatten() for values in score.values()]), sparsity)
        parts = everything.split([values.numel() for values in score.values()])
    kept = {name: part.view_as(score[name]) for name, part in zip(score, parts, strict=True)}
    if empty := [name for name, mask in kept.items() if not mask.any()]:
        raise ValueError(f"{', '.join(empty)} would be empty at {sparsity}: ask for less, or layer-wise")
    return kept


def _highest(score: Tensor, sparsity: float) -> Tensor:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: a share of zeros in [0, 1) is needed")
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[score.topk(len(score) - round(sparsity * len(score))).indices] = True
    return kept


def of_four(score: Tensor, count: int = 2) -> Tensor:
    """The mask that keeps the best of each four input channels, where they fit (Mishra et al., 2021)."""
    if score.shape[1] % 4:
        return torch.ones_like(score, dtype=torch.bool)
    fours = score.unflatten(1, (-1, 4))
    best = fours.topk(count, dim=2).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter(2, best, True).flatten(1, 2)


def masked(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with weights set to 0, which training and saving preserve.

    `kept` is layer -> bool in the weight's shape; layers that are not named stay as they are. A mask that the
    model has is replaced, a quantizer refused.
    """
    network = copy.deepcopy(model)
    for name, mask in kept.items():
        stored = encoding.encoded(network.get_submodule(name))
        if not isinstance(stored, encoding.Dense):
            raise ValueError(f"{name} is quantized: prune first, then quantize")
        if mask.shape != stored.shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: a bool mask of shape {stored.shape} is needed, not {mask.shape}")
        encoding.attach(network.get_submodule(name), encoding.Dense(stored.values * mask, mask))
    return network
