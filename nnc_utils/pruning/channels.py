"""Which channels go: a score for each channel of a group, and a choice of them within a budget of MACs.

A score says what the network would miss; it is apart from the removal (`structured.remove_channels`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.devices import exact_device
from nnc_utils.models import Spec
from nnc_utils.pruning.structured import groups

SCORES = ("random", "l1", "l2", "bn_scale", "taylor", "fisher")


def scores(
    model: nn.Module,
    kind: str,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """A score for each channel of each group; larger means keep.

    Parameters
    ----------
    model : a network of `models.build`, in evaluation mode.
    kind : "random" (the control); "l1" and "l2", norms of the filters that write the channel (Li et al.,
        2017); "bn_scale", |γ| of their batch-norms (Liu et al., 2017); "taylor", the first-order change
        of a picture's loss without the channel, |∂L/∂gate| (Molchanov et al., 2017, equation 8); "fisher",
        half its square (Theis et al., 2018, equation 5). The last two are means over the images.
    images, labels : normalized training images (n, C, H, W) and classes; for "taylor" and "fisher".

    Returns
    -------
    Group -> float32 (channels,). Where several layers write a channel their norms add up; a gate is
    one for all of them.

    Raises
    ------
    ValueError
        For an unknown kind, missing images, and gradients that are not finite.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}: one of {', '.join(SCORES)}")
    layers = {layer.name: layer for layer in models.layers(model.spec)}
    known = groups(model.spec)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(layers[name].out_channels, generator=generator) for name in known}
    if kind in ("taylor", "fisher"):
        if images is None or labels is None:
            raise ValueError(f"{kind} needs images and labels")
        models.check_images(model, images)
        models.check_labels(model, images, labels)
        gates = gate_gradients(model, images, labels, batch_size=batch_size)
        if kind == "taylor":
            return {name: gates[name].abs().mean(0) for name in known}
        return {name: gates[name].square().mean(0) / 2 for name in known}
    found = {}
    for name, group in known.items():
        each = [_norm(model, layers[writer], kind) for writer in group.writers]
        found[name] = torch.stack(each).sum(0)
    return found


def _norm(model: nn.Module, layer: models.Layer, kind: str) -> Tensor:
    if kind == "bn_scale":
        return model.get_submodule(layer.batch_norm).weight.detach().abs()
    return model.get_submodule(layer.name).weight.detach().flatten(1).norm(int(kind[1]), dim=1)


def gate_gradients(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> dict[str, Tensor]:
    """The derivative of each picture's loss by a factor on each channel of a group, at 1: (n, channels).

    A factor on what batch-norm puts out: the derivative is the sum over pixels of output times gradient, and
    over all layers that write the channel.
    """
    writers = {layer.name: layer.batch_norm for layer in models.layers(model.spec)}
    of_norm = {writers[w]: name for name, group in groups(model.spec).items() for w in group.writers}
    home, device = next(model.parameters()).device, exact_device()
    network, found = copy.deepcopy(model).eval().to(device), {}

    def watch(norm: str):
        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            values = output.detach().clone()  # what follows works in place
            output.register_hook(lambda slope: gates.append((of_norm[norm], (values * slope).sum((2, 3)))))

        return hook

    for norm in of_norm:
        network.get_submodule(norm).register_forward_hook(watch(norm))
    for start in range(0, len(images), batch_size):
        batch, gates = slice(start, start + batch_size), []
        pictures = images[batch].detach().to(device).requires_grad_()
        truth = labels[batch].to(device)
        functional.cross_entropy(network(pictures), truth, reduction="sum").backward()
        sums: dict[str, Tensor] = {}
        for name, gate in gates:
            sums[name] = sums.get(name, 0.0) + gate
        for name, gate in sums.items():
            found.setdefault(name, []).append(gate)
    stacked = {name: torch.cat(found[name]).to(home) for name in groups(model.spec)}
    for name, gates in stacked.items():
        if not gates.isfinite().all():
            raise ValueError(f"{name}: gradients are not finite; has the network diverged?")
    return stacked


def within_macs(
    spec: Spec,
    score: Mapping[str, Tensor],
    *,
    macs: float,
    everywhere: bool = False,
    multiple: int = 1,
    least: float = 0.05,
) -> dict[str, Tensor]:
    """The channels to keep so that a network has at most so many multiplications.

    One threshold for all groups, on scores divided by their group's mean or replaced by their ranks in it; it
    is found by bisection.

    Parameters
    ----------
    spec : the network's.
    score : group -> (channels,), as `scores` gives them.
    macs : multiplications for one picture, at most.
    everywhere : the same share of each group (ranks), instead of more where scores are low.
    multiple : of which each width is to be, such as the 8 or 16 that integer kernels like, as far as the
        group has so many channels.
    least : share of each group's channels that stays in any case.

    Returns
    -------
    Group -> channel numbers for `structured.remove_channels`.

    Raises
    ------
    ValueError
        When the smallest network allowed has more MACs than that (the message says how many), or for a
        share outside (0, 1] or a multiple below 1.
    """
    if not 0 < least <= 1 or multiple < 1:
        raise ValueError(f"least is {least} and multiple {multiple}: (0, 1] and at least 1 are needed")
    if everywhere:
        relative = {name: values.argsort().argsort() / len(values) for name, values in score.items()}
    else:
        relative = {name: values / values.mean().clamp(min=1e-30) for name, values in score.items()}

    def kept(threshold: float) -> dict[str, Tensor]:
        chosen = {}
        for name, values in relative.items():
            count = max(int((values > threshold).sum()), round(least * len(values)), 1)
            count = min(len(values), -(-count // multiple) * multiple)
            chosen[name] = values.topk(count).indices.sort().values
        return chosen

    def cost(chosen: Mapping[str, Tensor]) -> int:
        return models.macs(_narrowed(spec, chosen))

    low, high = 0.0, max(float(values.max()) for values in relative.values())
    if cost(kept(high)) > macs:
        raise ValueError(
            f"at most {macs:,.0f} MACs are allowed, the smallest network with {least:.0%} of the channels of "
            f"each group in multiples of {multiple} has {cost(kept(high)):,}: allow more, or lower least"
        )
    if cost(kept(-1.0)) <= macs:
        return kept(-1.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(kept(middle)) <= macs else (middle, high)
    return kept(high)


def _narrowed(spec: Spec, chosen: Mapping[str, Tensor]) -> Spec:
    widths = {layer.name: layer.out_channels for layer in models.layers(spec)}
    for name, group in groups(spec).items():
        if name in chosen:
            widths |= dict.fromkeys(group.writers, len(chosen[name]))
    return models.with_widths(spec, widths)
