"""Torch-Pruning: channels removed over its own dependency graph, until so many multiplications are left.

As its authors benchmark it, in many small steps ("progressive pruning"), each followed by a count. What comes
out is read into a `Spec`, and from there on is a network like any other.
"""

from __future__ import annotations

import copy

import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.devices import exact_device
from nnc_utils.models import Spec

IMPORTANCES = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
}
STEPS = 400
MOST = (
    0.95  # share of a group that may go: without a limit, one ranking leaves single channels in first layers
)


def prune(
    model: nn.Module, kind: str, *, macs: float, images: Tensor, labels: Tensor, everywhere: bool = True
) -> nn.Module:
    """A narrower network with at most so many multiplications for one image.

    Parameters
    ----------
    model : a network of `models.build` with plain weights; not changed.
    kind : one of `IMPORTANCES`.
    images, labels : normalized training images (n, C, H, W) and classes, for the gradients of "taylor".
    everywhere : the same share of each group, the library's default; otherwise one ranking of all groups
        ("global pruning").

    Raises
    ------
    ValueError
        For an unknown kind, images or labels of another shape, and when the budget cannot be met.
    """
    if kind not in IMPORTANCES:
        raise ValueError(f"unknown importance {kind!r}: one of {', '.join(IMPORTANCES)}")
    models.check_labels(model, images, labels)
    network = copy.deepcopy(model).eval()
    pruner = torch_pruning.pruner.BasePruner(
        network,
        images[:1],
        importance=IMPORTANCES[kind](),
        global_pruning=not everywhere,
        pruning_ratio=MOST if everywhere else 1.0,
        max_pruning_ratio=MOST,
        iterative_steps=STEPS,
        ignored_layers=[network.fc],
    )
    home, device = next(model.parameters()).device, exact_device()
    network.to(device)  # its gradients go with it, also on the way back
    for start in range(0, len(images), 64) if kind == "taylor" else ():
        batch = slice(start, start + 64)
        logits, truth = network(images[batch].to(device)), labels[batch].to(device)
        (functional.cross_entropy(logits, truth, reduction="sum") / len(images)).backward()
    network.to(home)
    for _ in range(STEPS - 1):
        if models.macs(spec_of(network)) <= macs:
            break
        pruner.step()
    spec = spec_of(network)
    if models.macs(spec) > macs:
        raise ValueError(
            f"Torch-Pruning leaves {models.macs(spec):,} MACs, {macs:,.0f} are wanted: allow more"
        )
    narrow = models.build(spec).eval()
    narrow.load_state_dict({name: tensor.detach() for name, tensor in network.state_dict().items()})
    return narrow


def spec_of(network: nn.Module) -> Spec:
    """The Spec of a network of `models.build` whose channels a library has removed in place."""
    convolutions = [layer.name for layer in models.layers(network.spec) if layer.kind == "conv"]
    widths = {name: network.get_submodule(name).out_channels for name in convolutions}
    return models.with_widths(network.spec, widths)
