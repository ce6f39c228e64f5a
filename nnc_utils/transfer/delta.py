"""A second task as a small file on top of the first one's: what differs, and from which file.

The container is safetensors. Its metadata hold one JSON text, "delta": format, the checksum of the artifact
that it is a difference to (`base`), the new classes, a description of each part (`encoding.pack`), and a
checksum over all that and the tensors. The parts:

    head, head_bias   the new classifier: 8-bit codes, and float32
    batch_norm        differences of all batch-norms as 16-bit codes; omitted where none differs
    values            differences of all convolutions, one behind the other, as 8-bit codes behind a mask

The second network's activations are floats; it normalizes images as the first one does.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnc_utils import artifact, encoding, models
from nnc_utils.artifact import Artifact
from nnc_utils.provenance import write_atomically
from nnc_utils.quantization.uniform import quantize
from nnc_utils.transfer.tasks import in_floats

FORMAT = "nnc_utils.delta/1"


class DeltaError(ValueError):
    """A file that is no difference to a network, or one to another network."""


class Sparse(nn.Module):
    """Parametrization that adds values, to be trained, where a mask is True; both in the weight's shape."""

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())
        self.values = nn.Parameter(values * mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.values * self.mask


def sparse(network: models.ResNet, trained: models.ResNet, share: float) -> models.ResNet:
    """A copy of a trained network whose convolutions differ from before at a share of their weights only.

    `network` is what it was before. What moved most stays and can be trained on; the rest is as it was.
    (Guo et al., 2021, "Diff pruning", learn the places.)
    """
    before, trained = network, copy.deepcopy(trained)
    layers = {name: trained.get_submodule(name) for name in convolutions(trained)}
    with torch.no_grad():
        moved = [layer.weight - before.get_submodule(name).weight for name, layer in layers.items()]
        whole = _flat(moved).abs()
        mask = torch.zeros(len(whole), dtype=torch.bool)
        mask[whole.topk(max(1, round(share * len(whole)))).indices] = True  # as many also of equal ones
        masks = mask.split([difference.numel() for difference in moved])
        for (name, layer), difference, own in zip(layers.items(), moved, masks, strict=True):
            layer.weight.copy_(before.get_submodule(name).weight)
            layer.weight.requires_grad_(False)
            values = Sparse(difference, own.view_as(difference))
            parametrize.register_parametrization(layer, "weight", values)
    return trained


def convolutions(network: models.ResNet) -> list[str]:
    """The layers that a difference may change: all but the classifier, which is new."""
    return [layer.name for layer in models.layers(network.spec) if layer.kind == "conv"]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _norms(first: Artifact) -> list[str]:
    """Names of batch-norm's tensors."""
    return [name for name in first.tensors if name != "fc.bias"]


def save(network: models.ResNet, base: str | Path, path: str | Path, *, classes: tuple[str, ...]) -> int:
    """Write what a network adds to an artifact; returns the file's length in bytes.

    `network` is `artifact.load(base)` with a new classifier and, for `sparse`, trained. A DeltaError names a
    layer that differs from the artifact's in another way.
    """
    first, added = artifact.read(base), []
    for name in convolutions(network):
        layer = network.get_submodule(name)
        weight = layer.weight
        if parametrize.is_parametrized(layer):
            weight = layer.parametrizations.weight.original
            added.append(layer.parametrizations.weight[0])
        if not torch.equal(weight, encoding.decode(first.weights[name])):
            raise DeltaError(f"{name} is not what it is in {base}: only what `sparse` adds is kept")
    parts = {"head": quantize(network.fc.weight, bits=8, per_channel=True)}
    parts["head_bias"] = encoding.Dense(network.fc.bias.detach())
    state, norms = network.state_dict(), _norms(first)
    difference = _flat(state[name] - first.tensors[name] for name in norms)
    if difference.any():
        parts["batch_norm"] = quantize(difference, bits=16, per_channel=False)
    if added:
        values = quantize(_flat(one.values * one.mask for one in added), bits=8, per_channel=False)
        parts["values"] = dataclasses.replace(values, mask=_flat(one.mask for one in added))
    document, arrays = {"format": FORMAT, "base": first.sha256, "classes": [*classes], "parts": {}}, {}
    for part, one in parts.items():
        document["parts"][part], streams = encoding.pack(one)
        arrays |= {f"{part}.{name}": stream for name, stream in streams.items()}
    document["sha256"] = _sha256(document, arrays)
    data = safetensors.numpy.save(arrays, {"delta": json.dumps(document, separators=(",", ":"))})
    write_atomically(Path(path), data)
    return len(data)


def _sha256(document: Mapping, arrays: Mapping[str, np.ndarray]) -> str:
    text = {entry: value for entry, value in document.items() if entry != "sha256"}
    digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def load(path: str | Path, base: str | Path) -> tuple[models.ResNet, tuple[str, ...]]:
    """The second task's network, in eval mode, and its classes, from its file and the first one's.

    A DeltaError tells of a file that is damaged or of another kind, and of another artifact than its own.
    """
    first, data = artifact.read(base), Path(path).read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["delta"])
        its_base = document["base"][:16]
        if document["format"] != FORMAT or document["sha256"] != _sha256(document, arrays):
            raise DeltaError(f"another format than {FORMAT}, or another checksum: it was changed or damaged")
    except Exception as error:  # whatever bytes of another kind make a parser raise
        raise DeltaError(f"{path}: no whole difference to a network: {error!r:.200}") from None
    if document["base"] != first.sha256:
        names = f"{its_base}, and {base} is {first.sha256[:16]}"
        raise DeltaError(f"{path} is a difference to the network {names}: give the file that it was made of")
    try:
        return _applied(document, arrays, first), tuple(document["classes"])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DeltaError(f"{path} does not fit {base}: {error!r:.200}") from None


@torch.no_grad()
def _applied(document: Mapping, arrays: Mapping[str, np.ndarray], first: Artifact) -> models.ResNet:
    network = in_floats(artifact.network(first))
    network.spec = dataclasses.replace(first.spec, classes=len(document["classes"]))
    network.fc = nn.Linear(network.fc.in_features, network.spec.classes)
    state = network.state_dict()  # shares the network's memory
    targets = {"head": ["fc.weight"], "head_bias": ["fc.bias"], "batch_norm": _norms(first)}
    targets["values"] = [f"{name}.weight" for name in convolutions(network)]
    for name in ("fc.weight", "fc.bias"):
        state[name].zero_()
    for part, told in document["parts"].items():
        tensors = [state[name] for name in targets[part]]
        shape = tensors[0].shape if part == "head" else (sum(tensor.numel() for tensor in tensors),)
        description = {**told, "shape": shape}  # the network's, whatever the file says
        streams = {name: arrays[f"{part}.{name}"] for name in encoding.stream_names(description)}
        values = encoding.decode(encoding.unpack(description, streams)).flatten()
        pieces = values.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.add_(piece.view(tensor.shape))
    for name in _norms(first):
        if name.endswith("running_var"):
            state[name].clamp_(min=0)
    return network.eval()
