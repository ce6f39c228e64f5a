"""ImageNet weights, or others in torchvision's format, for a network of this suite."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from nnc_utils import models


def load_pretrained(model: models.ResNet, weights: str | Path) -> list[str]:
    """Copy weights from "imagenet" (torchvision's own) or a file in its format, as far as shapes allow.

    A file is .pt or .pth without pickled code, or .safetensors. A one-channel input takes the sum of the
    first weights over the colours, which is what they do to a grey image. Returns the layers (stem,
    classifier) that stay fresh for their shape. Weights of another network are a ValueError.
    """
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (model.state_dict(), _read_weights(weights, model.spec))
    )
    colours = theirs.get("conv1.weight")
    if colours is not None and colours.shape[1] == 3 and model.spec.channels == 1:
        theirs["conv1.weight"] = colours.sum(1, keepdim=True)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (theirs, ours)]
    differ = [name for name in {**theirs, **ours} if shapes[0].get(name) != shapes[1].get(name)]
    for name in differ:
        if not name.startswith(("conv1.", "fc.")):
            one, other = (shape.get(name, "missing") for shape in shapes)
            raise ValueError(f"{weights}: {name} is {one} there, {other} here: weights of another network")
    for name in ours.keys() - set(differ):
        ours[name].copy_(theirs[name])
    return sorted({name.rpartition(".")[0] for name in differ})


def _read_weights(weights: str | Path, spec: models.Spec) -> dict[str, Tensor]:
    if str(weights) == "imagenet":
        shape = spec.block, tuple(len(stage) for stage in spec.stages)
        depth = {known: depth for depth, known in models.RESNETS.items()}.get(shape)
        if depth is None:
            raise ValueError("ImageNet weights by name exist for ResNet-18, -34 and -50: give a file instead")
        return torchvision.models.get_model_weights(f"resnet{depth}").DEFAULT.get_state_dict(check_hash=True)
    path = Path(weights)
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
