"""Damaged and forged artifacts by number, always the same, and what reading one comes to."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.numpy
import torch

from nnc_utils import artifact, encoding, models
from nnc_utils.artifact import Artifact, ArtifactError
from nnc_utils.encoding import Codebook, Dense, Uniform
from nnc_utils.models import BlockSpec, Spec
from nnc_utils.parametrizations import code_range
from nnc_utils.provenance import write_atomically

SEED = 35
SPEC = Spec(
    *(1, 8, 3, "small", 4, "basic"),
    ((BlockSpec((4, 4), (3, 3)),), (BlockSpec((6, 6), (3, 3), 2, "projection"),)),
)
ENCODINGS = ("dense", "dense masked", "int8", "4 bits masked", "affine", "codebook masked")
HARMS = ("bits", "header", "cut", "added", "moved", "entry", "entry", "tensor")
HANG = 10  # seconds after which a file counts as one that is never read
MEMORY = 2**30  # bytes that reading a file may take
CHUNK = 20_000  # mutants that one process reads
OUTCOMES = ("refused", "read", "unclear", "wrong", "too_much_memory", "crashed", "hung")
DTYPES = ("u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", "?")
VALUES = [None, True, -1, 0, 1, 2, 7, 255, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")]
VALUES += ["", "x", "9" * 1000, "\ud800", [], {}, [[]], [1], json.loads("[" * 500 + "]" * 500)]
LONGEST = 1000  # characters of an error


# --- Files, and what is done to them --------------------------------------------------------------------


@functools.cache
def originals(folder: Path) -> list[bytes]:
    """Small artifacts, one of each encoding; those with integers have activation ranges, too."""
    files = []
    for kind in ENCODINGS:
        torch.manual_seed(SEED)
        network, path = models.build(SPEC).eval(), folder / f"{kind}.safetensors"
        for layer in models.layers(SPEC):
            encoding.attach(network.get_submodule(layer.name), _encoded(kind, layer.weight_shape))
        for place in models.activations(network).values() if kind in ("int8", "affine") else ():
            place.scale, place.zero_point = 0.05, 119
        artifact.save(network, path, mean=[0.3], std=[0.4], classes=["a", "b", "c"])
        files.append(path.read_bytes())
    return files


def _encoded(kind: str, shape: tuple[int, ...]) -> encoding.Encoding:
    weight, mask = torch.randn(shape), torch.rand(shape) < 0.4 if "masked" in kind else None
    kept = 1 if mask is None else mask
    if kind.startswith("dense"):
        return Dense(weight * kept, mask)
    if kind.startswith("codebook"):
        codes = (2 * weight + 4).clamp(0, 8).to(torch.uint8) * kept
        return Codebook(codes, torch.linspace(-1, 1, 9), mask)
    if kind == "affine":
        codes = (40 * weight + 100).clamp(0, 255).to(torch.int16)
        return Uniform(codes, torch.full(shape[:1], 0.02), 0, 8, None, torch.full(shape[:1], 100).short())
    bits, axis = (8, 0) if kind == "int8" else (4, None)
    codes = (2**bits / 6 * weight).clamp(*code_range(bits, affine=False)).to(torch.int16) * kept
    return Uniform(codes, torch.full(shape[:1] if axis == 0 else (), 0.02), axis, bits, mask)


def contents(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON and the tensors of an artifact."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["artifact"]), safetensors.numpy.load(data)


def checksum(document: dict, arrays: dict[str, np.ndarray]) -> str:
    """As the format says; not the package's own."""
    rest = {entry: value for entry, value in document.items() if entry != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {list(array.shape)}\n".encode() + array.tobytes())
    return digest.hexdigest()


def mutant(number: int, files: Sequence[bytes]) -> tuple[bytes, bytes | None]:
    """The bytes of a mutant, and the file that it was; None where its checksum was made anew."""
    random, harm = np.random.default_rng([SEED, number]), HARMS[number % len(HARMS)]
    data = files[random.integers(len(files))]
    if harm in ("entry", "tensor"):
        document, arrays = contents(data)
        change = _change_entry if harm == "entry" else _change_tensor
        change(random, document if harm == "entry" else arrays)
        document["sha256"] = checksum(document, arrays)
        return safetensors.numpy.save(arrays, {"artifact": json.dumps(document)}), None
    changed, header = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    if harm in ("bits", "header"):
        for at in random.integers(0, header if harm == "header" else len(data), random.choice([1, 1, 2, 10])):
            changed[at] ^= 1 << random.integers(8) if random.random() < 0.5 else random.integers(1, 256)
    elif harm == "cut":
        del changed[random.integers(0, random.choice([len(data), header])) :]
    elif harm == "added":
        changed += random.bytes(int(random.integers(1, 100)))
    else:
        size = int(random.integers(1, 1000))
        source, target = random.integers(0, len(data) - size, 2)
        changed[target : target + size] = data[source : source + size]
    return bytes(changed), data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of nested lists and objects: what it is in, and its key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _change_entry(random: np.random.Generator, document: dict) -> None:
    places = list(_places(document))
    parent, key = places[random.integers(len(places))]
    how = random.random()
    if how < 0.1:
        del parent[key]
    elif how < 0.3:  # what stands elsewhere
        other, its = places[random.integers(len(places))]
        parent[key] = copy.deepcopy(other[its])
    elif how < 0.5 and isinstance(parent[key], int):
        parent[key] += int(random.integers(-3, 4))
    else:
        parent[key] = VALUES[random.integers(len(VALUES))]


def _change_tensor(random: np.random.Generator, arrays: dict[str, np.ndarray]) -> None:
    names = sorted(arrays)
    name, other = random.choice(names), random.choice(names)
    content = bytearray(arrays[name].tobytes())
    how, dtype = random.integers(7), arrays[name].dtype
    if how == 0:
        del arrays[name]
        return
    if how == 1:
        content = bytearray(arrays[other].tobytes())
    elif how == 2:
        dtype = np.dtype(random.choice(DTYPES))
    elif how == 3:
        del content[random.integers(len(content)) :]
    elif how == 4:
        content += random.bytes(int(random.integers(1, 100)))
    else:
        for at in random.integers(0, len(content), random.choice([1, 4, 100])):
            content[at] = random.integers(256)
    content += bytes(-len(content) % dtype.itemsize)
    arrays[name] = np.frombuffer(bytes(content), dtype)
    if random.random() < 0.1:
        arrays[name] = arrays[name][None]


# --- What it comes to -----------------------------------------------------------------------------------


def outcome(number: int, files: Sequence[bytes], place: Path) -> str:
    """Read a mutant: one of `OUTCOMES`."""
    data, before = mutant(number, files)
    place.write_bytes(data)
    try:
        found = artifact.read(place)
    except ArtifactError as error:
        said = str(error)
        if "MemoryError" in said or "allocate" in said:
            return "too_much_memory"
        is_clear = said.startswith(str(place)) and "\n" not in said and len(said) < LONGEST
        return "refused" if is_clear else "unclear"
    except Exception:  # a caller expects none
        return "unclear"
    same = before is None or found.sha256 == contents(before)[0]["sha256"]
    return "read" if same and holds(found, data) else "wrong"


def holds(found: Artifact, data: bytes) -> bool:
    """Whether what was read is what the file says: checksum, shapes, codes within their range, names."""
    (document, arrays), spec = contents(data), found.spec
    names = len(found.classes) == spec.classes and len(found.mean) == len(found.std) == spec.channels
    shapes = all(found.weights[layer.name].shape == layer.weight_shape for layer in models.layers(spec))
    codes = [(e.codes, _ends(e)) for e in found.weights.values() if not isinstance(e, Dense)]
    within = all(low <= code.min() and code.max() <= high for code, (low, high) in codes)
    return found.sha256 == document["sha256"] == checksum(document, arrays) and names and shapes and within


def _ends(e: Uniform | Codebook) -> tuple[int, int]:
    if isinstance(e, Codebook):
        return 0, len(e.codebook) - 1
    return code_range(e.bits, affine=e.zero_point is not None)


def read_some(numbers: range, files: Sequence[bytes], place: Path, shared: Any) -> None:
    """In a process of its own: `shared` gets the number of the mutant that is read, then the outcomes.

    The process may take `MEMORY` more than it has, and a mutant that is read for `HANG` seconds ends it.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        shared[0] = number
        signal.setitimer(signal.ITIMER_REAL, HANG)
        shared[1 + OUTCOMES.index(outcome(number, files, place))] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)


class Count(dict):
    """What a part has counted, kept in a file: tried, stood, and anything else by name."""

    def __init__(self, out: Path, part: str) -> None:
        self.file = out / f"{part}.json"
        known = json.loads(self.file.read_text()) if self.file.is_file() else {}
        super().__init__({"tried": 0, "stood": 0} | known)

    def add(self, **counts: int) -> None:
        """Count more, keep it, and print it."""
        self.update({name: self.get(name, 0) + number for name, number in counts.items()})
        write_atomically(self.file, json.dumps(self))
        print(f"{self.file.stem}: {json.dumps(self)}", flush=True)


def read_all(out: Path, total: int, until: float) -> None:
    """Read mutants up to a number or a time; the number of one that ends its process is printed."""
    count, files, fork = Count(out, "mutants"), originals(out), multiprocessing.get_context("fork")
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    while count["tried"] < total and time.time() < until:
        numbers = range(count["tried"], min(count["tried"] + CHUNK, total))
        shared = fork.Array("q", 1 + len(OUTCOMES), lock=False)
        child = fork.Process(target=read_some, args=(numbers, files, place / "mutant", shared))
        child.start()
        child.join()
        outcomes = dict(zip(OUTCOMES, shared[1:], strict=True))
        if child.exitcode:
            why = "hung" if child.exitcode == -signal.SIGALRM else "crashed"
            outcomes[why] = 1
            print(f"mutant {shared[0]} {why} (exit {child.exitcode})", flush=True)
        stood = outcomes["refused"] + outcomes["read"]
        count.add(tried=sum(outcomes.values()), stood=stood, **outcomes)
    shutil.rmtree(place)
