"""Channels are removed for good: out comes a narrower Spec with its weights, an ordinary network.

What a residual connection adds has to have the same channels on both sides. So layers are cut together, in
*groups*: the channels of a residual stream, or those between two convolutions inside a block.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.models import Layer, Spec


@dataclass(frozen=True)
class Group:
    """Layers that share channels: those that write them, all alike, and those that read them."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]


def groups(spec: Spec) -> dict[str, Group]:
    """The groups of a network by the name of their first writer, in the order of the forward pass.

    Examples
    --------
    >>> found = groups(models.resnet(18))
    >>> found["conv1"].writers
    ('conv1', 'layer1.0.conv2', 'layer1.1.conv2')
    >>> found["layer1.0.conv1"]
    Group(writers=('layer1.0.conv1',), readers=('layer1.0.conv2',))
    """
    writers, readers = {"conv1": ["conv1"]}, {"conv1": []}
    stream = "conv1"
    for name, block in models.named_blocks(spec):
        convolutions = [f"{name}.conv{i}" for i in range(1, len(block.widths) + 1)]
        readers[stream].append(convolutions[0])
        for inner, after in zip(convolutions, convolutions[1:], strict=False):
            writers[inner], readers[inner] = [inner], [after]
        if block.connection == "identity":
            writers[stream].append(convolutions[-1])
            continue
        projection = [f"{name}.downsample.0"] if block.connection == "projection" else []
        readers[stream] += projection
        stream = convolutions[-1]
        writers[stream], readers[stream] = [stream, *projection], []
    readers[stream].append("fc")
    return {name: Group(tuple(writers[name]), tuple(readers[name])) for name in writers}


@torch.no_grad()
def remove_channels(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A narrower network that computes what the given one does with the other channels at 0.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Its weights may be masked, not quantized.
    kept : group (`groups`) -> the numbers of the channels that stay, int64, in any order; groups that
        are not named stay whole.

    Returns
    -------
    A new network in evaluation mode, activation ranges and masks kept.

    Raises
    ------
    ValueError
        For a name that is no group, a group that would be empty, numbers that are no channels of it or
        occur twice, and weights that carry a quantizer.
    """
    known, layers = groups(model.spec), {layer.name: layer for layer in models.layers(model.spec)}
    weights = {name: encoding.encoded(model.get_submodule(name)) for name in layers}
    _check(known, layers, weights, kept)
    kept = {name: numbers.sort().values for name, numbers in kept.items()}
    rows = {layer: kept[name] for name in kept for layer in known[name].writers}
    columns = {layer: kept[name] for name in kept for layer in known[name].readers}
    widths = {name: len(rows[name]) if name in rows else layer.out_channels for name, layer in layers.items()}
    narrow = models.build(models.with_widths(model.spec, widths)).eval()
    for name, layer in layers.items():
        values, mask = (
            tensor if tensor is None else _cut(tensor, rows.get(name), columns.get(name))
            for tensor in (weights[name].values, weights[name].mask)
        )
        encoding.attach(narrow.get_submodule(name), encoding.Dense(values, mask))
        beside = layer.batch_norm or name
        for part, tensor in model.get_submodule(beside).state_dict().items():
            if "weight" not in part or layer.batch_norm:
                cut = tensor if tensor.ndim == 0 else _cut(tensor, rows.get(name), None)
                narrow.get_submodule(beside).state_dict()[part].copy_(cut)
    places = models.activations(narrow)
    for name, place in models.activations(model).items():
        places[name].scale, places[name].zero_point = place.scale, place.zero_point
    return narrow


def remove_blocks(model: nn.Module, blocks: Iterable[str]) -> nn.Module:
    """A shallower network: the identity connection of a block takes the block's place.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    blocks : names such as "layer3.1", of blocks with an identity connection; the others change the size or
        the width of what flows and cannot go.

    Returns
    -------
    A new network in evaluation mode; masks, quantizers and activation ranges are kept.

    Raises
    ------
    ValueError
        For names that are no such block, and a stage that would be empty.
    """
    gone, known = list(blocks), dict(models.named_blocks(model.spec))
    able = [name for name, block in known.items() if block.connection == "identity"]
    if odd := [name for name in gone if name not in able] or [n for n in gone if gone.count(n) > 1]:
        raise ValueError(f"{', '.join(odd)} cannot be removed: each once, of {', '.join(able) or 'none'}")
    stages = range(1, len(model.spec.stages) + 1)
    left = [[name for name in known if name.startswith(f"layer{s}.") and name not in gone] for s in stages]
    if not all(left):
        raise ValueError(f"without {', '.join(gone)} a stage has no block left: keep one of each")
    shallow = copy.deepcopy(model).eval()
    for number, names in zip(stages, left, strict=True):
        setattr(shallow, f"layer{number}", nn.Sequential(*map(shallow.get_submodule, names)))
    blocks = tuple(tuple(known[name] for name in names) for names in left)
    shallow.spec = dataclasses.replace(model.spec, stages=blocks)
    return shallow


def _cut(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    tensor = tensor if rows is None else tensor.index_select(0, rows)
    return (tensor if columns is None else tensor.index_select(1, columns)).clone()


def _check(
    known: Mapping[str, Group],
    layers: Mapping[str, Layer],
    weights: Mapping[str, encoding.Encoding],
    kept: Mapping[str, Tensor],
) -> None:
    if unknown := set(kept) - set(known):
        raise ValueError(f"no group is called {', '.join(sorted(unknown))}: one of {', '.join(known)}")
    for name, numbers in kept.items():
        width, found = layers[name].out_channels, numbers.tolist()
        if not found or len(set(found)) < len(found) or not set(found) <= set(range(width)):
            raise ValueError(
                f"{name} has {width} channels, {found[:8]}{'...' if len(found) > 8 else ''} are to stay: at "
                f"least one of 0 to {width - 1}, each once, is needed"
            )
    for name, weight in weights.items():
        if not isinstance(weight, encoding.Dense):
            raise ValueError(f"{name} is quantized: cut channels first, then quantize")
