"""Images that pass through a copy of a network, and what its layers get and give meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils.devices import exact_device
from nnc_utils.models import Layer


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy on `exact_device`, in eval mode, none of whose parameters has a gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False).to(exact_device())


def sent(batches: Iterable[Tensor], network: nn.Module) -> Iterator[Tensor]:
    """Batches of images, where the network is and in channels-last order."""
    device = next(network.parameters()).device
    for batch in batches:
        yield batch.to(device).contiguous(memory_format=torch.channels_last)


@contextmanager
def watched(
    network: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, inputs, outputs)`` whenever one of these modules has computed, for a while."""

    def hook(name: str) -> Callable:
        return lambda module, inputs, outputs: see(name, inputs[0], outputs)

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def with_outputs(network: nn.Module, names: Iterable[str], batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch, and by name what these modules put out on the way."""
    kept: dict[str, Tensor] = {}
    with watched(network, names, lambda name, inputs, outputs: kept.update({name: outputs})):
        return network(batch), kept


def outputs(layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
    """What a layer with this weight puts out, without its bias."""
    if layer.kind == "conv":
        return functional.conv2d(inputs, weight, None, layer.stride, layer.kernel // 2)
    return inputs @ weight.T


def check_finite(logits: Tensor) -> None:
    """Raise a ValueError unless all logits are finite."""
    if not logits.isfinite().all():
        raise ValueError("logits are not finite: the network or the images hold NaN or inf")
