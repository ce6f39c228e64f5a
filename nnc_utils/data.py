"""Data sets by name: fixed splits, normalization computed from train, augmentation on batches.

Images stay unsigned bytes in memory, of shape (n, channels, height, width), until `normalize`.
`python -m nnc_utils.data NAME` fetches a data set and prints what it is.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from nnc_utils.images import Folder

NAMES = ("digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder:PATH")
# SHA-256 of the *unpacked* files: the sources compress the same bytes differently
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SPLITS = ("train", "validation", "test")


class DataError(RuntimeError):
    """A data set that is unavailable, or not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """Part of a data set: `images` uint8 (n, channels, size, size), `labels` int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set: splits, class names, mean and deviation of each channel of train on the scale 0..1.

    `flip`: a mirrored image keeps its label; not so for digits, or for your own images of text
    (``dataclasses.replace(data, flip=False)``). `shift`: how many pixels augmentation moves an image at
    most; an eighth of its size when None, one for Fashion-MNIST, whose images fill their frame.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    shift: int | None = None
    folder: Folder | None = None  # of your own images: their files, and what was left out

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.images.shape[2]

    def digests(self) -> dict[str, str]:
        """Split -> the beginning of the SHA-256 of its images and labels: which images a run saw."""
        found = {}
        for which in SPLITS:
            split, digest = getattr(self, which), hashlib.sha256()
            for tensor in (split.images, split.labels):
                digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
            found[which] = digest.hexdigest()[:16]
        return found

    def normalize(self, images: Tensor) -> Tensor:
        """See `normalize`, with this data set's mean and deviation."""
        return normalize(images, self.mean, self.std)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See `augment`, with what this data set allows."""
        return augment(images, generator, flip=self.flip, padding=self.shift)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images / 255 - mean) / std per channel: uint8 (n, channels, height, width) -> float32, same shape."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.shape[1] == len(mean) == len(std):
        raise DataError(
            f"cannot normalize {images.dtype} of shape {tuple(images.shape)} with {len(mean)} means and "
            f"{len(std)} deviations: uint8 (n, {len(mean)}, height, width) is needed"
        )
    means, deviations = (_column(tuple(values), images.device) for values in (mean, std))
    return images.float().div_(255).sub_(means).div_(deviations)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # it outlives the call, and training has to be able to use it
def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel; cached, since a copy to an accelerator at each batch would make it wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def augment(
    images: Tensor, generator: torch.Generator, *, flip: bool = True, padding: int | None = None
) -> Tensor:
    """Shift each image by at most `padding` pixels (borders become black) and mirror half of them.

    `images`: uint8 (n, channels, size, size) on any device. `generator`: of the CPU, so that every device
    draws the same. `padding`: an eighth of the size, at least 1, when None. Returns a new tensor.
    """
    n, _, height, width = images.shape
    padding = max(1, height // 8) if padding is None else padding
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(images.device)
    padded = functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, channels, top, left, height, width)
    shifted = windows[torch.arange(n, device=images.device), :, top, left]
    if flip:
        mirror = torch.randint(0, 2, (n, 1, 1, 1), generator=generator, dtype=torch.bool)
        shifted = torch.where(mirror.to(images.device), shifted.flip(3), shifted)
    return shifted


def load(name: str, *, root: str | Path | None = None, size: int | None = None) -> Data:
    """Load a data set by name, fetching it first where needed; another one never takes its place.

    Parameters
    ----------
    name : one of `NAMES`; ``digits:5-9`` is five of its classes. ``imagefolder:PATH``: your own images, one
        sub-folder a class, or train / validation / test folders that hold them; a split without one is taken
        from train (a tenth, for test a fifth). See `images.read`; a warning tells what it left out.
    root : data folder; the environment variable NNC_DATA or ``data/`` in the repository when None.
    size : resize the images to this many pixels. Your own: 32 when None, the middle square of each.

    >>> data = load("digits")
    >>> len(data.train), len(data.validation), len(data.test), data.size
    (1197, 200, 400, 8)
    """
    if size is not None and (type(size) is not int or not 1 <= size <= 1024):
        raise DataError(f"size is {size!r}: a whole number of pixels from 1 to 1024 is needed")
    kind, _, path = name.partition(":")
    if kind in NAMES and (ends := re.fullmatch(r"(\d+)-(\d+)", path)):
        return _some_classes(load(kind, root=root, size=size), name, int(ends[1]), int(ends[2]))
    folder = Path(root or os.environ.get("NNC_DATA") or Path(__file__).parents[1] / "data")
    folder = folder.expanduser().absolute()
    loaders = {
        "digits": _digits,
        "fashion_mnist": lambda: _fashion_mnist(folder),
        "cifar10": lambda: _cifar(kind, folder),
        "cifar100": lambda: _cifar(kind, folder),
        "imagefolder": lambda: _own_images(Path(path).expanduser().absolute(), size or 32),
    }
    if kind not in loaders or (kind == "imagefolder") != bool(path):
        raise DataError(f"unknown data set {name!r}: one of {', '.join(NAMES)}")
    arrays, classes, *own = loaders[kind]()
    parts = {which: _split(*arrays[which], size) for which in SPLITS}
    mean, std = _moments(parts["train"].images)
    shift = max(1, round(parts["train"].images.shape[2] / 28)) if kind == "fashion_mnist" else None
    about = {"flip": kind != "digits", "shift": shift, "folder": own[0] if own else None}
    _test_labels[name] = parts["test"].labels
    return Data(name, **parts, classes=tuple(classes), mean=mean, std=std, **about)


_test_labels: dict[str, Tensor] = {}  # of what was loaded last under a name


def test_labels(name: str) -> Tensor:
    """The labels of a data set's test images; what was loaded before, in any size, is not read again."""
    return _test_labels[name] if name in _test_labels else load(name).test.labels


Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> uint8 images (n, channels, size, size), labels


def _split(images: np.ndarray, labels: np.ndarray, size: int | None) -> Split:
    from torchvision.transforms.v2.functional import resize

    pixels = torch.from_numpy(np.array(images, order="C"))
    if size not in (None, pixels.shape[2]):
        pixels = torch.cat([resize(part, [size, size], antialias=True) for part in pixels.split(1000)])
    return Split(pixels, torch.from_numpy(np.array(labels, np.int64)))


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel on the scale 0..1, from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append((share @ values).item())
        # a channel that never changes carries nothing, but must not divide by zero
        std.append((share @ (values - mean[-1]) ** 2).sqrt().item() if share.max() < 1 else 1.0)
    return tuple(mean), tuple(std)


def _hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: `count` of them held out, in each class's proportion.

    Every class gives at least one. The same for ever: NumPy freezes RandomState's stream.
    """
    classes, numbers = np.unique(labels, return_counts=True)
    share = numbers * (count / len(labels))
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    random, held = np.random.RandomState(0), np.zeros(len(labels), dtype=bool)
    for label, number in zip(classes, take, strict=True):
        held[random.permutation(np.flatnonzero(labels == label))[: max(1, number)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _held_out(arrays: Arrays, **counts: int) -> Arrays:
    """The splits, and those that are named taken from train: as many images as given."""
    for which, count in counts.items():
        images, labels = arrays["train"]
        kept, held = _hold_out(labels, count)
        arrays |= {which: (images[held], labels[held]), "train": (images[kept], labels[kept])}
    return arrays


def _some_classes(whole: Data, name: str, first: int, last: int) -> Data:
    """The images of the classes first to last, with the mean and deviation of their own train."""
    if not first < last < len(whole.classes):
        raise DataError(f"{name}: two or more of the classes 0 to {len(whole.classes) - 1} are needed")
    parts = {}
    for which in SPLITS:
        split = getattr(whole, which)
        own = (first <= split.labels) & (split.labels <= last)
        parts[which] = Split(split.images[own], split.labels[own] - first)
    mean, std = _moments(parts["train"].images)
    _test_labels[name] = parts["test"].labels
    return replace(whole, name=name, **parts, classes=whole.classes[first : last + 1], mean=mean, std=std)


def _digits() -> tuple[Arrays, list[str]]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    return _held_out({"train": (images, bundle.target)}, test=400, validation=200), list("0123456789")


def _fashion_mnist(root: Path) -> tuple[Arrays, list[str]]:
    """Fashion-MNIST (Xiao et al., 2017) from the first source that has it intact."""
    from torchvision.datasets import FashionMNIST

    folder, failures = root / "fashion_mnist", []
    sources = {
        f"data folder ({folder})": lambda _: folder,
        f"package {FASHION_PACKAGE} ({FASHION_INSTALLED})": lambda _: FASHION_INSTALLED,
        f"apt-get download {FASHION_PACKAGE}": _from_apt,
        "torchvision's download": _from_torchvision,
    }
    for source, fetch in sources.items():
        with tempfile.TemporaryDirectory() as work:
            try:
                place = fetch(Path(work))
                arrays = _read_fashion(place, Path(work))
                if place.is_relative_to(work):
                    folder.mkdir(parents=True, exist_ok=True)
                    for file in FASHION_FILES:
                        partial = shutil.copy(place / file, folder / f"{file}.{os.getpid()}")
                        os.replace(partial, folder / file)
                return _held_out(arrays, validation=5000), FashionMNIST.classes
            except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
                failures.append(f"{source}: {last}")
        if not failures[1:] and "not there" not in failures[0]:
            warnings.warn(f"passing over the {failures[0]}", stacklevel=3)
    raise DataError(
        "\n  - ".join(["fashion_mnist is not available:", *failures])
        + f"\nPut the files {', '.join(FASHION_FILES)} into {folder} (or set NNC_DATA to a folder that has "
        f"them under fashion_mnist/), or install the Debian or Ubuntu package {FASHION_PACKAGE}."
    )


def _read_fashion(folder: Path, work: Path) -> Arrays:
    """Unpack the four files into `work`, check what is inside, and let torchvision read them."""
    from torchvision.datasets import FashionMNIST

    raw = work / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    if not any((folder / file).exists() for file in FASHION_FILES):
        raise DataError("not there")
    for file, sha256 in FASHION_FILES.items():
        try:
            content = gzip.decompress((folder / file).read_bytes())
        except (OSError, EOFError, gzip.zlib.error) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        if (digest := hashlib.sha256(content).hexdigest()) != sha256:
            raise DataError(f"{file} is damaged: its content has SHA-256 {digest}, not {sha256}")
        (raw / file.removesuffix(".gz")).write_bytes(content)
    parts = {"train": FashionMNIST(work, train=True), "test": FashionMNIST(work, train=False)}
    return {which: (part.data[:, None].numpy(), part.targets.numpy()) for which, part in parts.items()}


def _from_apt(work: Path) -> Path:
    """Let apt-get fetch the package (apt checks its signature) and unpack it here; needs no root."""
    options = ["-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    options += ["-o", "APT::Sandbox::User=root"]  # root's usual stand-in, _apt, may not write here
    own = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
    for name in ("lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    run = functools.partial(subprocess.run, cwd=work, capture_output=True, text=True, timeout=300)
    try:
        run(["apt-get", *options, "download", FASHION_PACKAGE], check=True)
    except (
        subprocess.CalledProcessError
    ):  # the machine's lists lack it or are too old: fetch lists of our own
        run(["apt-get", *options, *own, "update"], check=False)
        run(["apt-get", *options, *own, "download", FASHION_PACKAGE], check=True)
    for package in work.glob(f"{FASHION_PACKAGE}_*.deb"):
        run(["dpkg-deb", "-x", package.name, "unpacked"], check=True)
    return work / "unpacked" / FASHION_INSTALLED.relative_to("/")


def _from_torchvision(work: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    socket.setdefaulttimeout(30)  # torchvision would wait for a silent server for ever
    return Path(FashionMNIST(work, download=True).raw_folder)


def _cifar(name: str, root: Path) -> tuple[Arrays, list[str]]:
    """CIFAR-10 or -100; a tenth of train is held out."""
    from nnc_utils import cifar  # not above: what other data sets measure does not depend on it

    try:
        arrays, classes = cifar.read(name, root)
    except cifar.CifarError as error:
        raise DataError(str(error)) from None
    return _held_out(arrays, validation=len(arrays["train"][1]) // 10), classes


def _own_images(path: Path, size: int) -> tuple[Arrays, tuple[str, ...], Folder]:
    from nnc_utils import images  # not above: what other data sets measure does not depend on it

    try:
        folder, arrays = images.read(path, size)
    except images.FolderError as error:
        raise DataError(str(error)) from None
    if told := folder.told():
        warnings.warn("\n  ".join([f"imagefolder:{path}:", *told]), stacklevel=4)
    return arrays, folder.classes, folder


def main(name: str) -> None:
    """`python -m nnc_utils.data NAME`: fetch a data set and print what it is."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="imagefolder:")  # it is printed below
            data = load(name)
    except DataError as error:
        sys.exit(printable(str(error)))
    parts = ", ".join(f"{len(getattr(data, which)):,} {which}" for which in SPLITS)
    shape, classes = f"{data.channels} x {data.size} x {data.size}", ", ".join(data.classes)
    lines = [f"{data.name}: {parts}; images {shape}; {len(data.classes)} classes: {classes}"]
    lines += data.folder.report() if data.folder else []
    print(printable("\n  ".join(lines)))


def printable(text: str) -> str:
    """The text with escapes for what the console's alphabet lacks."""
    alphabet = sys.stdout.encoding or "utf-8"
    return text.encode(alphabet, "backslashreplace").decode(alphabet)


if __name__ == "__main__":
    main(*sys.argv[1:])
