"""Channels and blocks are removed for good: out comes a smaller Spec with its weights, an ordinary network.

What a residual connection adds has to have the same channels on both sides. So layers lose channels together,
in *groups*: the channels of a residual stream, or those between two convolutions inside a block.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.models import Spec


@dataclass(frozen=True)
class Group:
    """Layers that share channels: those that write them, all alike, and those that read them."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]


def groups(spec: Spec) -> dict[str, Group]:
    """The groups of a network by the name of their first writer, in the order of the forward pass.

    >>> groups(models.resnet(18))["conv1"].writers
    ('conv1', 'layer1.0.conv2', 'layer1.1.conv2')
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


def narrowed(spec: Spec, kept: Mapping[str, Tensor]) -> Spec:
    """The Spec with only the kept channels of each group."""
    widths = {layer.name: layer.out_channels for layer in models.layers(spec)}
    for name, group in groups(spec).items():
        if name in kept:
            widths |= dict.fromkeys(group.writers, len(kept[name]))
    return models.with_widths(spec, widths)


def check_plain(model: nn.Module) -> None:
    """Raise a ValueError for a network with masks or quantizers."""
    for layer in models.layers(model.spec):
        stored = encoding.encoded(model.get_submodule(layer.name))
        if not isinstance(stored, encoding.Dense) or stored.mask is not None:
            raise ValueError(f"{layer.name} is masked or quantized: give the network before it was pruned")


@torch.no_grad()
def remove_channels(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A narrower network that computes what the original does with the other channels at 0.

    `kept` is group (`groups`) -> the numbers of the channels that stay, int64, in any order; groups that are
    not named stay whole. Masks and activation ranges are kept, quantizers refused.
    """
    known, layers = groups(model.spec), {layer.name: layer for layer in models.layers(model.spec)}
    rows = {name: torch.arange(layer.out_channels) for name, layer in layers.items()}
    columns = {name: torch.arange(layer.in_channels) for name, layer in layers.items()}
    for name, numbers in kept.items():
        numbers = numbers.sort().values
        rows |= dict.fromkeys(known[name].writers, numbers)
        columns |= dict.fromkeys(known[name].readers, numbers)
    narrow = models.build(narrowed(model.spec, kept)).eval()
    for name, layer in layers.items():
        stored = encoding.encoded(model.get_submodule(name))
        if not isinstance(stored, encoding.Dense):
            raise ValueError(f"{name} is quantized: prune first, then quantize")
        values, mask = (
            t if t is None else t[rows[name]][:, columns[name]] for t in (stored.values, stored.mask)
        )
        encoding.attach(narrow.get_submodule(name), encoding.Dense(values, mask))
        statistics = narrow.get_submodule(layer.batch_norm or name).state_dict()
        for part, tensor in model.get_submodule(layer.batch_norm or name).state_dict().items():
            if layer.batch_norm or part == "bias":
                statistics[part].copy_(tensor[rows[name]] if tensor.ndim else tensor)
    places = models.activations(narrow)
    for name, place in models.activations(model).items():
        places[name].scale, places[name].zero_point = place.scale, place.zero_point
    return narrow


def remove_blocks(model: nn.Module, blocks: Iterable[str]) -> nn.Module:
    """A shallower network: the identity connection of a block takes the block's place.

    `blocks` are names such as "layer3.1", of blocks with an identity connection (the others change the size
    or the width of what flows); one of each stage stays. Masks, quantizers and activation ranges are kept.
    """
    gone, known = list(blocks), dict(models.named_blocks(model.spec))
    removable = [name for name, block in known.items() if block.connection == "identity"]
    if odd := [name for name in gone if name not in removable or gone.count(name) > 1]:
        raise ValueError(
            f"{', '.join(odd)} cannot be removed: each once, of {', '.join(removable) or 'none'}"
        )
    stages = range(1, len(model.spec.stages) + 1)
    left = [[name for name in known if name.startswith(f"layer{s}.") and name not in gone] for s in stages]
    if not all(left):
        raise ValueError(f"without {', '.join(gone)} a stage has no block left: keep one of each")
    shallow = copy.deepcopy(model).eval()
    for number, names in zip(stages, left, strict=True):
        setattr(shallow, f"layer{number}", nn.Sequential(*map(shallow.get_submodule, names)))
    specs = tuple(tuple(known[name] for name in names) for names in left)
    shallow.spec = dataclasses.replace(model.spec, stages=specs)
    return shallow
