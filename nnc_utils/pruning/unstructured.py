"""Single weights are set to 0: a score for each, a mask of those that stay, a network that keeps the mask.

The zeros stay in memory: a mask makes a file smaller, not the arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import encoding, models, sensitivity
from nnc_utils.devices import exact_device

SCORES = ("random", "magnitude", "gradient", "taylor", "obd_fisher", "obd_hessian")
PROBES = 8  # for the Hessian's diagonal; each costs as much as three passes
KEPT, OF = 2, 4  # the pattern of sparse tensor cores: 2 of 4 neighbouring inputs


def scores(
    model: nn.Module,
    kind: str,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """A score for each weight of the convolutions and the classifier; larger means keep.

    Parameters
    ----------
    model : a network of `models.build`, in evaluation mode; what a mask of it has cut scores below all.
    kind : "random" (the control); "magnitude", |w| (Han et al., 2015); "gradient", |∂L/∂w|; "taylor",
        |w·∂L/∂w|, the first-order change of the loss without the weight (Molchanov et al., 2017);
        "obd_fisher" and "obd_hessian", w²·h/2 with h the curvature by the Fisher information's or the
        Hessian's diagonal (Optimal Brain Damage; LeCun et al., 1989). Of a negative h, where the loss has no
        minimum, the size counts.
    images, labels : normalized training images (n, C, H, W) and classes, int64, for all but the first two;
        the loss is the mean of theirs.
    seed : of what is drawn: scores, labels, or probes.
    batch_size : images a pass; it changes the noise of "obd_fisher" and "obd_hessian".

    Returns
    -------
    Layer -> float32 in the weight's shape, -inf where the weight is cut already.

    Raises
    ------
    ValueError
        For an unknown kind, missing images, and scores that are not numbers.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}: one of {', '.join(SCORES)}")
    modules = {layer.name: model.get_submodule(layer.name) for layer in models.layers(model.spec)}
    weights = {name: module.weight.detach() for name, module in modules.items()}
    if kind not in ("random", "magnitude"):
        if images is None or labels is None:
            raise ValueError(f"{kind} needs images and labels")
        models.check_images(model, images)
        models.check_labels(model, images, labels)
    if kind in ("gradient", "taylor"):
        gradients = _gradients(model, weights, images, labels, batch_size)
        found = {n: (g if kind == "gradient" else g * weights[n]).abs() for n, g in gradients.items()}
    elif kind.startswith("obd"):
        if kind == "obd_fisher":
            curved = sensitivity.fisher_diagonal(model, images, batch_size=batch_size, seed=seed)
        else:
            settings = {"probes": PROBES, "batch_size": batch_size, "seed": seed}
            curved = sensitivity.hessian_diagonal(model, images, labels, **settings)
        found = {name: weight.square() * curved[name].abs() / 2 for name, weight in weights.items()}
    elif kind == "magnitude":
        found = {name: weight.abs() for name, weight in weights.items()}
    else:
        generator = torch.Generator().manual_seed(seed)
        found = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    for name, score in found.items():
        if not score.isfinite().all():
            raise ValueError(f"{name}: weights or gradients are not finite; has the network diverged?")
        mask = encoding.mask_of(modules[name])
        if mask is not None:
            score[~mask] = -torch.inf
    return found


@torch.enable_grad()
def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor, batch_size: int
) -> dict[str, Tensor]:
    home, device = next(model.parameters()).device, exact_device()
    plain = copy.deepcopy(model).eval().to(device)
    for name in weights:
        encoding.fold(plain.get_submodule(name))
    parameters = [plain.get_submodule(name).weight.requires_grad_() for name in weights]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        logits, truth = plain(images[batch].to(device)), labels[batch].to(device)
        loss = functional.cross_entropy(logits, truth, reduction="sum") / len(images)
        for total, gradient in zip(totals, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient
    return {name: total.to(home) for name, total in zip(weights, totals, strict=True)}


def masks(score: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Which weights stay, True = kept.

    Parameters
    ----------
    score : layer -> score of each weight.
    sparsity : share of zeros in [0, 1). One number: of all layers together, with one threshold
        ("global"). A number for each layer: in each ("layer-wise").

    Returns
    -------
    Layer -> bool in the score's shape. Exactly the nearest whole number of weights is cut.

    Raises
    ------
    ValueError
        For a share outside [0, 1), unknown or missing layers, and a layer that would be empty.
    """
    if isinstance(sparsity, Mapping):
        if set(sparsity) != set(score):
            odd = sorted(set(sparsity) ^ set(score))
            raise ValueError(
                f"sparsity must name each layer once; unknown or missing: {', '.join(odd)}; the layers are "
                f"{', '.join(score)}"
            )
        found = {name: _best(score[name].flatten(), sparsity[name]).view_as(score[name]) for name in score}
    else:
        everything = _best(torch.cat([values.flatten() for values in score.values()]), sparsity)
        parts = everything.split([values.numel() for values in score.values()])
        found = {name: part.view_as(score[name]) for name, part in zip(score, parts, strict=True)}
    for name, mask in found.items():
        if not mask.any():
            raise ValueError(
                f"{name} would be empty at a sparsity of {sparsity}: ask for less, or layer-wise"
            )
    return found


def _best(score: Tensor, sparsity: float) -> Tensor:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: a share of zeros in [0, 1) is needed")
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[score.topk(len(score) - round(sparsity * len(score))).indices] = True
    return kept


def two_of_four(score: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep the best two of four neighbouring inputs of each output (Mishra et al., 2021).

    Neighbours are input channels at one place of the kernel. A layer whose input channels are no multiple
    of four stays whole.
    """
    found = {}
    for name, values in score.items():
        rows = values.movedim(1, -1)
        if values.shape[1] % OF:
            found[name] = torch.ones_like(values, dtype=torch.bool)
            continue
        fours = rows.reshape(-1, OF)
        kept = torch.zeros_like(fours, dtype=torch.bool)
        kept.scatter_(1, fours.topk(KEPT, dim=1).indices, True)
        found[name] = kept.view(rows.shape).movedim(-1, 1).contiguous()
    return found


def masked(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with weights set to 0, which training and saving preserve.

    Parameters
    ----------
    model : a network of `models.build` without a quantizer; not changed. A mask that it has is replaced.
    kept : layer -> bool in the weight's shape; layers that are not named stay as they are.

    Raises
    ------
    ValueError
        For unknown layers (a stage such as "layer1" is none), other shapes, and quantized weights.
    """
    network, known = copy.deepcopy(model), [layer.name for layer in models.layers(model.spec)]
    if unknown := sorted(set(kept) - set(known)):
        inside = [name for name in known if any(name.startswith(f"{stage}.") for stage in unknown)]
        hint = f"{', '.join(unknown)} has the layers" if inside else "the layers are"
        raise ValueError(f"no layer is called {', '.join(unknown)}; {hint} {', '.join(inside or known)}")
    for name, mask in kept.items():
        module = network.get_submodule(name)
        stored = encoding.encoded(module)
        if not isinstance(stored, encoding.Dense):
            raise ValueError(f"{name} is quantized: cut weights first, then quantize")
        if mask.shape != stored.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: a bool mask of shape {stored.shape} is needed, not {tuple(mask.shape)}"
            )
        encoding.attach(module, encoding.Dense(stored.values * mask, mask))
    return network
