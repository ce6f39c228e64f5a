"""ImageNet weights, or a file of anybody's ResNet in torchvision's names, for a network of this suite.

A file is read by its content, not by its suffix, and no code in it ever runs.
"""

from __future__ import annotations

import argparse
import os
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nnc_utils import models

NEEDED = "the weights of a ResNet by name are needed: torch.save(model.state_dict(), FILE), or safetensors"
EVERY = "layer1.0.conv1.weight"  # each ResNet has it: what stands before it are wrappers and prefixes
ADDED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by PyTorch's wrappers
PLAIN = [  # classes whose values checkpoints hold beside tensors: of torchvision's own training, and of NumPy
    *(argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8"))),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
ZEROS = 1024  # in a row, and in no other place of a tensor: no training leaves so many
LARGE = 1e10  # no trained value is
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # 8 bits need scales from elsewhere
TOLD = ("arch", "architecture", "model", "model_name", "replace_stride_with_dilation")  # each by itself
BEGINNINGS = {  # of files that are no weights
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` brings the file itself",
    b"<": "a web page: the download went wrong",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
}


class OtherNetworkError(ValueError):
    """Weights of a ResNet whose layers are not those of the network at hand."""


def load_pretrained(model: models.ResNet, weights: str | Path) -> list[str]:
    """Copy weights from "imagenet" (torchvision's own) or a file, as far as shapes allow.

    A file holds tensors in torchvision's names, which timm's ResNets have, too, in any precision; it is
    written by `torch.save` or is safetensors. Wrappers such as {"state_dict": ...} and prefixes such as
    "module." are taken off; of several networks the first is taken, and what is not used is printed. A
    one-channel input takes the sum of the first weights over the colours, as they do to a grey image.

    Names and shapes do not say strides, dilation, pooling, activations, the order of colours or the range of
    the inputs: of a variant that differs in these alone nothing is noticed.

    Returns the layers (stem, classifier) that stay fresh for their shape. ValueError: the file is none of
    this, or another network's, or holds what no training leaves; nothing has been copied then.
    """
    ours, theirs = _weights(model.state_dict()), _read_weights(weights, model.spec)
    colours = theirs.get("conv1.weight")
    if colours is not None and colours.ndim == 4 and colours.shape[1] == 3 and model.spec.channels == 1:
        theirs["conv1.weight"] = colours.sum(1, keepdim=True)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (theirs, ours)]
    differ = [name for name in {**theirs, **ours} if shapes[0].get(name) != shapes[1].get(name)]
    for name in differ:
        if not name.startswith(("conv1.", "fc.")):
            one, other = (shape.get(name, "missing") for shape in shapes)
            if other == "missing" and not re.match(r"(layer\d|bn1)\.", name):
                kept = (
                    f"no ResNet has {name}: another network, a classifier not called fc, or an entry too many"
                )
                raise ValueError(f"{weights}: {kept}")
            raise OtherNetworkError(
                f"{weights}: {name} is {one} there, {other} here: weights of another network"
            )
    fresh = {name.partition(".")[0] for name in differ if name in ours}
    if added := [name for name in differ if name not in ours and name.partition(".")[0] not in fresh]:
        raise ValueError(f"{weights}: {added[0]} stands beside weights that fit: take it out")
    copied = [name for name in ours if name.partition(".")[0] not in fresh]
    _check_values(theirs, weights)
    for name in copied:
        ours[name].copy_(theirs[name])
    means = [name for name in copied if name.endswith("running_mean")]
    if means and not any(ours[name].any() for name in means):
        print(f"{weights}: its batch-norm statistics were never measured: each mean is 0")
    return sorted(fresh)


def _check_values(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Refuse what no training leaves, also in a layer that is not copied: the whole file is doubtful then."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or tensor.abs().max() > LARGE:
            raise ValueError(
                f"{file}: {name} holds NaN, or more than {LARGE:g}: it diverged, or 16 bits were too few"
            )
        if name.endswith("running_var") and tensor.min() < 0:
            raise ValueError(f"{file}: {name} is negative, as no variance is: the file is damaged")
        is_constant = tensor.numel() < 2 or bool(tensor.min() == tensor.max())
        if tensor.ndim == 4 and tensor.numel() > 1 and is_constant:
            raise ValueError(f"{file}: {name} is {tensor.max():g} everywhere, as no trained weights are")
        if tensor.ndim > 1 and (zeros := _hole(tensor)):
            raise ValueError(f"{file}: {name} holds {zeros} zeros in a row: the file was copied in part")
        if tensor.ndim > 1 and not is_constant and (tensor == tensor.round()).all():
            raise ValueError(
                f"{file}: {name} holds whole numbers alone: codes without their scales, it seems"
            )


def _hole(tensor: Tensor) -> int:
    """Zeros in a row that are no pruned weights: not whole channels, and half as many nowhere else."""
    places = np.flatnonzero(tensor.detach().numpy())
    runs = np.diff(places, prepend=-1, append=tensor.numel()) - 1
    longest = int(runs.argmax())
    zeros, begin = int(runs[longest]), int(places[longest - 1]) + 1 if longest else 0
    row, others = tensor[0].numel(), np.delete(runs, longest)
    is_whole = begin % row == 0 and (begin + zeros) % row == 0
    is_pruned = others.max(initial=0) > zeros / 2 or 2 * others.sum() > tensor.numel() - zeros
    return 0 if zeros < ZEROS or is_whole or is_pruned else zeros


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _read_weights(weights: str | Path, spec: models.Spec) -> dict[str, Tensor]:
    if str(weights) != "imagenet":
        return _network(_read(_place(weights)), weights)
    shape = spec.block, tuple(len(stage) for stage in spec.stages)
    depth = {known: depth for depth, known in models.RESNETS.items()}.get(shape)
    if depth is None:
        raise ValueError("ImageNet weights by name exist for ResNet-18, -34 and -50: give a file instead")
    known = torchvision.models.get_model_weights(f"resnet{depth}").DEFAULT
    try:
        return _weights(known.get_state_dict(check_hash=True))
    except (OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir(), "checkpoints", known.url.rpartition("/")[2])
        raise ValueError(
            f"ImageNet weights cannot be fetched ({error}): put {known.url} into {place}, or give a file"
        ) from None


def _place(weights: str | Path) -> Path:
    """A relative path is one in the repository, or else in the folder in which the command was given."""
    repository = os.environ.get("NNC_ROOT") or Path(__file__).parents[1]
    caller = os.environ.get("NNC_CALLER") or "."  # `python -m bench run` changes the folder, and sets it
    places = [str(Path(folder, Path(weights).expanduser()).resolve()) for folder in (repository, caller)]
    for place in filter(os.path.exists, places):
        return Path(place)
    raise FileNotFoundError(f"no weights {weights}: there is no {' and no '.join(dict.fromkeys(places))}")


def _network(content: Mapping[str, object], file: str | Path) -> dict[str, Tensor]:
    """The tensors of the first network in a file, in torchvision's names and 32 bits; the rest is told."""
    tensors = {ADDED.sub("", name): leaf for name, leaf in content.items() if isinstance(leaf, Tensor)}
    if len(tensors) < sum(isinstance(leaf, Tensor) for leaf in content.values()):
        raise ValueError(f"{file} holds tensors twice, with and without _orig_mod. or the like: give one net")
    tensors = _without_masks(tensors, file)
    prefixes = [n.removesuffix(EVERY) for n in tensors if n == EVERY or n.endswith(f".{EVERY}")]
    if not prefixes:
        names = ", ".join(list(tensors)[:3]) or "no tensor with a name"
        if "metadata.artifact" in content:
            raise ValueError(f"{file} is a compressed network of this suite: 01 takes it as `pretrained`")
        if tensors and next(iter(tensors)).partition(".")[0].isdigit():
            names += " by place, as of nn.Sequential,"
        raise ValueError(f"{file} holds {names} ..., the weights of another network: {NEEDED}")
    first, *others = prefixes
    if others:
        print(f"{file} holds several sets of weights: {first}* is taken, not {'*, '.join(others)}*")
    own = _weights({n.removeprefix(first): tensor for n, tensor in tensors.items() if n.startswith(first)})
    rest = {n: leaf for n, leaf in content.items() if n not in tensors and not isinstance(leaf, Tensor)}
    rest |= {n: tensor for n, tensor in tensors.items() if not n.startswith(tuple(prefixes))}
    if rest:
        print(f"{file}: not used: {', '.join(_listed(rest, first))}")
    if empty := [name for name, tensor in own.items() if not tensor.numel()]:
        raise ValueError(
            f"{file}: {empty[0]} is empty, as in a shard of a training on several devices: join them"
        )
    for name, tensor in own.items():
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if tensor.dtype not in FLOATS or tensor.is_meta or not is_plain:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(f"{file}: {name} is {kind}: dense floats from before quantization are needed")
    return {name: tensor.float() for name, tensor in own.items()}


def _listed(rest: Mapping[str, object], first: str) -> Iterator[str]:
    """What stands beside a network, grouped by where its names first differ from the network's prefix."""
    groups: dict[str, list[str]] = {}
    for name in rest:
        parts, shared = name.split("."), first.split(".")
        same = next((i for i, (one, other) in enumerate(zip(parts, shared, strict=False)) if one != other), 0)
        same = next((i for i, part in enumerate(parts) if part in TOLD), same)
        groups.setdefault(".".join(parts[: same + 1]), []).append(name)
    for group, names in groups.items():
        leaf = rest[names[0]]
        if len(names) > 1 or names[0] != group:
            yield f"{group}.* ({len(names)} entries)"
        else:
            yield group if isinstance(leaf, Tensor) else f"{group} = {str(leaf)[:40]!r}"


def _without_masks(tensors: dict[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """With weight_orig · weight_mask, as `torch.nn.utils.prune` keeps a pruned layer, as its weight."""
    for mask in [name for name in tensors if name.endswith("_mask")]:
        plain = mask.removesuffix("_mask")
        whole = f"{plain}_orig" if f"{plain}_orig" in tensors else plain
        if whole != plain and plain in tensors:
            print(f"{file}: {plain} is taken, not {whole}")
            tensors.pop(whole)
            whole = plain
        if whole not in tensors:
            continue
        if tensors[whole].shape != tensors[mask].shape or tensors[whole].dtype not in FLOATS:
            raise ValueError(f"{file}: {mask} does not fit {whole}, floats of the same shape")
        if not torch.isin(tensors[mask].float(), torch.tensor([0.0, 1.0])).all():
            raise ValueError(
                f"{file}: {mask} holds more than 0 and 1: scores, or no mask; save plain weights"
            )
        tensors[plain] = tensors.pop(whole) * tensors.pop(mask)
    return tensors


def _flat(content: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every tensor and plain value in nested mappings and lists, its name made of the keys on the way."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else f"{key}")
    else:
        yield name, content


def _read(path: Path) -> dict[str, object]:
    """Every tensor and plain value in a file, by name; a ValueError says in one line what it is instead."""
    if path.is_dir():
        parts = ": join its parts by torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        what = parts if (path / ".metadata").is_file() else ": the file of weights in it is needed"
        raise ValueError(f"{path} is a folder{what}")
    with path.open("rb") as file:
        start = file.read(64)
    if what := _foreign(path, start):
        raise ValueError(f"{path} is {what}; {NEEDED}")
    try:
        if start[8:9] == b"{":  # safetensors: the length of a header in JSON, then the header
            with safe_open(path, "pt") as opened:
                about = opened.metadata() or {}
            return load_file(path) | {f"metadata.{key}": about[key] for key in about if key != "format"}
        allowed = torch.serialization.safe_globals(PLAIN)
        with path.open("rb") as file, allowed, warnings.catch_warnings(action="ignore"):
            named = list(_flat(torch.load(file, map_location="cpu", weights_only=True)))
            is_longer = bool(file.read(1)) and not start.startswith(b"PK")
    except Exception as error:  # of many kinds, since these bytes may be anything
        raise ValueError(f"{path} is {_broken(error)}; {NEEDED}") from None
    if is_longer:
        raise ValueError(f"{path} goes on behind what torch.save wrote first: give one file a network")
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise ValueError(f"{path} holds two tensors that would be called {twice[0]}: give one network alone")
    return dict(named)


def _foreign(path: Path, start: bytes) -> str:
    """What a file is that `torch.load` and safetensors do not read; empty where they may."""
    if not start:
        return "empty"
    if not start.strip(b"\0"):
        return "zeros where it should begin: it was not downloaded"
    for beginning, what in BEGINNINGS.items():
        if start.lstrip().startswith(beginning):
            return what
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return "truncated: its end is missing"
        try:
            parts = zipfile.ZipFile(path).infolist()
        except zipfile.BadZipFile as error:
            return f"damaged ({error})"
        names = [part.filename for part in parts]
        if min((part.header_offset for part in parts), default=0):
            return "damaged, or more than one file: what torch.save wrote last does not begin where it says"
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3])}, not of torch.save: save the weights anew"
        if damaged := _damaged(path):
            return f"damaged: {damaged} does not match its checksum (or was written without): save it anew"
    return "a tar archive: unpack it, or save it anew" if tarfile.is_tarfile(path) else ""


def _damaged(path: Path) -> str | None:
    """The first part of a zip archive that its checksum does not fit; `torch.load` reads it all the same."""
    try:
        return zipfile.ZipFile(path).testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        return f"a part ({error})"


def _broken(error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"a truncated or damaged safetensors file ({error})"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"a pickled object: reading it would run the code of {code[1]}"
    return f"truncated, damaged, or of another program ({type(error).__name__})"
