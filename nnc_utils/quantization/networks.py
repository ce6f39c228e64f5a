"""From one weight to a whole network: the same few lines for every quantizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from nnc_utils import encoding, models
from nnc_utils.training import progress

Value = TypeVar("Value")


def for_each_layer(model: nn.Module, what: str, given: Value | Mapping[str, Value]) -> dict[str, Value]:
    """One value for all convolutions and the classifier, or a value for each by name, as a dict."""
    names = [layer.name for layer in models.layers(model.spec)]
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if odd := sorted(set(values) ^ set(names)):
        raise ValueError(f"{what} must name each layer once; unknown or missing: {', '.join(odd)}")
    return {name: values[name] for name in names}


def quantized(model: nn.Module, rule: Callable[[str, nn.Module], encoding.Encoding]) -> nn.Module:
    """A copy of a network with a rule's encoding attached to each convolution and the classifier.

    The rule maps a layer's name and module to the encoding of its weight; a ValueError gets the name.
    """
    network = copy.deepcopy(model)
    for layer in progress(models.layers(model.spec), "rounding"):
        module = network.get_submodule(layer.name)
        try:
            encoding.attach(module, rule(layer.name, module))
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None
    return network
