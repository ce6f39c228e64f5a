"""Production counterparts: what others make of the same checkpoint and the same calibration images.

A module each, imported by name when it is needed, which offers

- `make(source, images, folder, **settings)`: compress an artifact into a file of the folder; the images
  (n, C, H, W) are normalized, of train,
- `load(path, source, threads)`: the network of that file as a `Loaded`,
- `missing(name)` where importing it does not tell whether it can be used.

The integer runtimes (`RUNTIMES`) run what they wrote; the codecs (`CODECS`) decode to a network for eager.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from nnc_utils import runtimes

if TYPE_CHECKING:
    from nnc_utils.models import ResNet

RUNTIMES = ("ort_static", "nncf_ptq", "torchao_pt2e")
GENERAL = ("gzip", "xz", "zstd")  # compressors of anything: here, of the codes of an artifact of ours
CODECS = ("nncodec", *GENERAL)
NAMES = RUNTIMES + CODECS
PRUNERS = ("torch_pruning",)  # return a network, not a file: `peer(name).prune`
SEARCHERS = ("optuna_nsga2",)  # choose an architecture: `peer(name).search`


@dataclass(frozen=True)
class Loaded:
    """A peer's network: `predict` as that of `runtimes.Session`, `zeros` its layers' weights that are 0."""

    predict: Callable[[np.ndarray], np.ndarray]
    zeros: int


def peer(name: str) -> ModuleType:
    """The module of a peer; ValueError for an unknown name, ImportError without its library."""
    if name not in NAMES + PRUNERS + SEARCHERS:
        raise ValueError(f"unknown peer {name!r}: one of {', '.join(NAMES + PRUNERS + SEARCHERS)}")
    return importlib.import_module(f"nnc_utils.peers.{'plain' if name in GENERAL else name}")


def available(name: str) -> str:
    """Empty when a peer can be used, otherwise why not, e.g. "not installed"."""
    if why := runtimes.why_not(lambda: peer(name)):
        return why
    return peer(name).missing(name) if hasattr(peer(name), "missing") else ""


def make(name: str, source: str | Path, images: np.ndarray, folder: str | Path, **settings: Any) -> Path:
    """Let a peer compress an artifact; the file that it wrote (OpenVINO's weights lie beside it: `files`).

    Parameters
    ----------
    name : one of `NAMES`.
    source : the artifact: fp32, or for gzip, xz and zstd the one whose codes are to be compressed.
    images : float32 (n, C, H, W); codecs ignore them, but for NNCodec's `reestimate`.
    settings : the peer's own, see its `make`.
    """
    if name in GENERAL:
        settings["compressor"] = name
    return peer(name).make(Path(source), images, Path(folder), **settings)


def load(name: str, path: str | Path, source: str | Path, *, threads: int = 1) -> Loaded:
    """The network in a file that `make` wrote from the artifact `source`."""
    return peer(name).load(Path(path), Path(source), threads)


def files(path: str | Path) -> list[Path]:
    """All that a peer's network needs: its file, and OpenVINO's weights."""
    path = Path(path)
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def measured(path: str | Path) -> tuple[str, int]:
    """SHA-256 and length in bytes of a peer's files."""
    contents = [file.read_bytes() for file in files(path)]
    return hashlib.sha256(b"".join(contents)).hexdigest(), sum(map(len, contents))


def in_eager(network: ResNet, threads: int) -> Loaded:
    """A decoded network."""
    import torch

    from nnc_utils import models
    from nnc_utils.runtimes.eager import EagerSession

    weights = (network.get_submodule(layer.name).weight for layer in models.layers(network.spec))
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
    module = network.eval().to(memory_format=torch.channels_last)
    return Loaded(EagerSession(module, 0, threads).predict, zeros)


def vnni() -> bool:
    """Whether this processor adds four products of 8 bits without saturating in 16 (only x86 may not)."""
    import torch

    cpu = torch.cpu.get_capabilities()
    instructions = ("avx512_vnni", "avx_vnni", "amx_int8")
    return cpu["architecture"] != "x86_64" or any(cpu.get(name) for name in instructions)
