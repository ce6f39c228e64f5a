"""gzip, xz and zstd of an artifact's codes as they are before entropy coding.

The compressed file is a safetensors file that holds what the artifact holds: the Spec, the codes as
8-bit (where they fit) or 16-bit integers, their scales, batch-norm, activation ranges, preprocessing.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from nnc_utils import artifact as artifacts
from nnc_utils import encoding, peers
from nnc_utils.artifact import Artifact
from nnc_utils.models import Spec

try:
    import zstandard
except ImportError:
    zstandard = None

KINDS = {kind.__name__: kind for kind in encoding.Encoding.__args__}
# Each at its strongest setting; suffix -> (compress, decompress)
COMPRESSORS = {
    "gzip": (lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
    "xz": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    "zstd": (
        lambda data: zstandard.ZstdCompressor(22).compress(data),
        lambda data: zstandard.ZstdDecompressor().decompress(data),
    ),
}


def missing(name: str) -> str:
    """gzip and xz are Python's own."""
    return "not installed: pip install zstandard" if name == "zstd" and zstandard is None else ""


def make(source: Path, images: np.ndarray | None, folder: Path, *, compressor: str) -> Path:
    """Compress what an artifact holds; the images do not matter."""
    if missing(compressor):
        raise ImportError(f"{compressor} is {missing(compressor)}")
    artifact = artifacts.read(source)
    target = folder / f"{artifact.sha256[:16]}.{compressor}"
    target.write_bytes(COMPRESSORS[compressor][0](_contents(artifact)))
    return target


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """The decoded network, its activations rounded if the artifact's are."""
    return peers.in_eager(artifacts.network(decode(path)), threads)


def decode(path: Path) -> Artifact:
    """What the file holds, as the artifact that was compressed; needs nothing else."""
    data = COMPRESSORS[path.suffix[1:]][1](path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    document = json.loads(header["network"])
    arrays = {name: torch.from_numpy(a.copy()) for name, a in safetensors.numpy.load(data).items()}
    weights = {}
    for name, (kind, plain, wide) in document["weights"].items():
        tensors = {key: arrays[f"{name}.{key}"].to(getattr(torch, dtype)) for key, dtype in wide.items()}
        weights[name] = KINDS[kind](**plain, **tensors)
    flat = arrays["batch_norm_and_bias"].split(list(document["tensors"].values()))
    return Artifact(
        spec=Spec.from_json(json.dumps(document["spec"])),
        weights=weights,
        tensors=dict(zip(document["tensors"], flat)),
        ranges={name: tuple(values) for name, values in document["ranges"].items()},
        **{key: tuple(document[key]) for key in ("mean", "std", "classes")},
        sha256="",
        nbytes=path.stat().st_size,
        streams={},
    )


def _contents(artifact: Artifact) -> bytes:
    arrays, weights = {"batch_norm_and_bias": torch.cat(list(artifact.tensors.values())).numpy()}, {}
    for name, weight in artifact.weights.items():
        plain, wide = {}, {}
        for field in dataclasses.fields(weight):
            value = getattr(weight, field.name)
            if isinstance(value, Tensor):
                wide[field.name] = str(value.dtype).removeprefix("torch.")
                fits = value.dtype == torch.int16 and value.min() >= -128 and value.max() <= 127
                arrays[f"{name}.{field.name}"] = (value.to(torch.int8) if fits else value).numpy()
            else:
                plain[field.name] = value
        weights[name] = type(weight).__name__, plain, wide
    document = {"spec": json.loads(artifact.spec.to_json()), "weights": weights, "ranges": artifact.ranges}
    document["tensors"] = {name: len(tensor) for name, tensor in artifact.tensors.items()}
    document |= {key: getattr(artifact, key) for key in ("mean", "std", "classes")}
    return safetensors.numpy.save(arrays, {"network": json.dumps(document, separators=(",", ":"))})
