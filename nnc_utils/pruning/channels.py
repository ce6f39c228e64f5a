"""Which channels go: a score for each, a choice within a budget of MACs, and readers that make up for them.

The removal itself is `channel_removal.remove_channels`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models, sample
from nnc_utils.devices import exact_device
from nnc_utils.models import Spec
from nnc_utils.pruning.channel_removal import check_plain, groups, narrowed, remove_channels

BATCH = 64  # images a pass
LEAST = 0.05  # share of each group's channels that stays in any case


def scores(
    model: nn.Module, kind: str, *, images: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A score for each channel of each group of a network, float32 (channels,); larger means keep.

    "random" is the control; "l1" and "l2" are norms of the filters that write the channel (Li et al., 2017),
    "bn_scale" is |γ| of their batch-norms (Liu et al., 2017), both summed over the layers that write it;
    "taylor" is the first-order change of an image's loss without the channel, |∂L/∂gate| (Molchanov et al.,
    2017, equation 8), "fisher" half its square (Theis et al., 2018, equation 5), both means over normalized
    training images (n, C, H, W).
    """
    layers, known = {layer.name: layer for layer in models.layers(model.spec)}, groups(model.spec)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(layers[name].out_channels, generator=generator) for name in known}
    if kind in ("taylor", "fisher"):
        gates = gate_gradients(model, images, labels)
        return {n: g.abs().mean(0) if kind == "taylor" else g.square().mean(0) / 2 for n, g in gates.items()}

    def norm(writer: str) -> Tensor:
        if kind == "bn_scale":
            return model.get_submodule(layers[writer].batch_norm).weight.detach().abs()
        return model.get_submodule(writer).weight.detach().flatten(1).norm(int(kind[1]), dim=1)

    return {name: torch.stack([norm(writer) for writer in g.writers]).sum(0) for name, g in known.items()}


def gate_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The derivative of each image's loss by its gate, a factor of 1 on a channel of a group: (n, channels).

    The gate stands behind the batch-norm of every layer that writes the channel. A ValueError where a
    derivative is not finite.
    """
    models.check_images(model, images)
    models.check_labels(model, images, labels)
    home, device = next(model.parameters()).device, exact_device()
    network, known = sample.frozen_copy(model), groups(model.spec)
    layers = {layer.name: layer for layer in models.layers(model.spec)}
    gates: dict[str, Tensor] = {}
    for name, group in known.items():
        for writer in group.writers:
            norm = network.get_submodule(layers[writer].batch_norm)
            norm.register_forward_hook(lambda module, inputs, output, name=name: output * gates[name])
    slopes = {name: [] for name in known}
    for batch, truth in zip(images.to(device).split(BATCH), labels.to(device).split(BATCH), strict=True):
        for name in known:
            gates[name] = batch.new_ones(len(batch), layers[name].out_channels, 1, 1).requires_grad_()
        loss = functional.cross_entropy(network(batch), truth, reduction="sum")
        for name, slope in zip(known, torch.autograd.grad(loss, list(gates.values())), strict=True):
            slopes[name].append(slope.flatten(1))
    gradients = {name: torch.cat(parts).to(home) for name, parts in slopes.items()}
    if odd := [name for name, values in gradients.items() if not values.isfinite().all()]:
        raise ValueError(f"{', '.join(odd)}: gradients are not finite; has the network diverged?")
    return gradients


def comparable(spec: Spec, score: Mapping[str, Tensor], normalize: str) -> dict[str, Tensor]:
    """Scores of all groups on one scale, as group -> (channels,).

    Some groups have far larger scores than others, whatever their channels are worth. "group" divides each
    by its mean; "isomorphic" takes ranks among all groups that like layers write and read (Fang et al., 2024,
    "Isomorphic Pruning"), "rank" those within the group itself.
    """
    if normalize == "group":
        return {name: values / values.mean().clamp(min=1e-30) for name, values in score.items()}
    kinds = {layer.name: (layer.kind, layer.kernel) for layer in models.layers(spec)}
    relative, alike = {}, {}
    for name, group in groups(spec).items():
        role = str([[kinds[layer] for layer in side] for side in (group.writers, group.readers)])
        alike.setdefault(role if normalize == "isomorphic" else name, []).append(name)
    for names in alike.values():
        ranks = torch.cat([score[name] for name in names]).argsort().argsort()
        parts = (ranks / len(ranks)).split([len(score[name]) for name in names])
        relative |= zip(names, parts, strict=True)
    return relative


def within_macs(
    spec: Spec, score: Mapping[str, Tensor], *, macs: float, normalize="group", uniform=False, multiple=1
) -> dict[str, Tensor]:
    """The channels to keep so that a network has at most so many MACs for an image: group -> their numbers.

    One threshold for all groups, by bisection, on `comparable` scores; with `uniform` on ranks, so that each
    group loses the same share. Widths are multiples of `multiple`, such as the 8 or 16 that integer kernels
    like, as far as a group has so many channels. A budget out of reach is refused.
    """
    relative = comparable(spec, score, "rank" if uniform else normalize)

    def kept(threshold: float) -> dict[str, Tensor]:
        chosen = {}
        for name, values in relative.items():
            count = max(int((values > threshold).sum()), round(LEAST * len(values)), 1)
            count = min(len(values), -(-count // multiple) * multiple)
            chosen[name] = values.topk(count).indices.sort().values
        return chosen

    def cost(threshold: float) -> int:
        return models.macs(narrowed(spec, kept(threshold)))

    low, high = 0.0, max(float(values.max()) for values in relative.values())
    if cost(high) > macs:
        raise ValueError(
            f"at most {macs:,.0f} MACs are allowed, the smallest network with {LEAST:.0%} of the channels of "
            f"each group in multiples of {multiple} has {cost(high):,}: allow more"
        )
    if cost(-1.0) <= macs:
        return kept(-1.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= macs else (middle, high)
    return kept(high)


@torch.no_grad()
def compensated(
    model: nn.Module, kept: Mapping[str, Tensor], images: Tensor, *, rows: int = 8192, damping: float = 0.05
) -> nn.Module:
    """The narrower network (`channel_removal.remove_channels`), whose layers make up for what it lacks.

    Layer after layer, weights become those of least squares: from what the layer sees in the narrower network
    as compensated so far to the sums that it has in the whole one (He, Zhang and Sun, 2017, equation 1,
    second step). So no layer hands on its error, and batch-norm finds the sums that it expects.

    Parameters
    ----------
    kept : group -> numbers of the channels that stay.
    images : normalized training images; a layer looks at those that give `rows` output pixels.
    damping : how far a weight is held where it was, as a share of the inputs' mean square.
    """
    check_plain(model)
    whole, narrow = sample.frozen_copy(model), remove_channels(model, kept).to(exact_device())
    known = groups(model.spec)
    written = {writer: kept[name].sort().values for name in kept for writer in known[name].writers}
    for layer in models.layers(narrow.spec)[1:]:
        few, seen = images[: math.ceil(rows / layer.size_out**2)], []
        for network in (whole, narrow):
            with sample.watched(network, [layer.name], lambda n, inputs, _, seen=seen: seen.append(inputs)):
                network(next(sample.sent([few], network)))
        old, module = whole.get_submodule(layer.name).weight, narrow.get_submodule(layer.name)
        sums = sample.outputs(layer, old[written.get(layer.name, slice(None))], seen[0])
        missing = (sums - sample.outputs(layer, module.weight, seen[1])).transpose(0, 1).flatten(1)
        inputs = seen[1]
        if layer.kind == "conv":
            inputs = functional.unfold(inputs, layer.kernel, 1, layer.kernel // 2, layer.stride)
            inputs = inputs.transpose(1, 2).flatten(0, 1)
        moment = inputs.T @ inputs
        moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-30)  # some see nothing but 0
        module.weight += torch.linalg.solve(moment, inputs.T @ missing.T).T.view_as(module.weight)
    return narrow.to(next(model.parameters()).device)
