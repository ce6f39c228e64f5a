"""Data sets by name: fixed splits, normalization computed from train, augmentation on batches.

Images stay unsigned bytes in memory, of shape (n, channels, height, width), until `normalize`.
`python -m nnc_utils.data NAME` fetches a data set and prints what it is.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


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

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.images.shape[2]

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
    name : one of `NAMES`. ``imagefolder:PATH`` is a folder of your own images: one sub-folder a class, or
        train / validation / test folders that hold them; a split without a folder of its own is taken from
        train (a tenth for validation, a fifth for test).
    root : data folder; the environment variable NNC_DATA or ``data/`` in the repository when None.
    size : resize the images to this many pixels. Your own: 32 when None, the middle square of each.

    >>> data = load("digits")
    >>> len(data.train), len(data.validation), len(data.test), data.size
    (1197, 200, 400, 8)
    """
    if size is not None and (type(size) is not int or not 1 <= size <= 1024):
        raise DataError(f"size is {size!r}: a whole number of pixels from 1 to 1024 is needed")
    kind, _, path = name.partition(":")
    folder = Path(root or os.environ.get("NNC_DATA") or Path(__file__).parents[1] / "data")
    folder = folder.expanduser().absolute()
    loaders = {
        "digits": _digits,
        "fashion_mnist": lambda: _fashion_mnist(folder),
        "cifar10": lambda: _cifar("CIFAR10", folder),
        "cifar100": lambda: _cifar("CIFAR100", folder),
        "imagefolder": lambda: _imagefolder(Path(path).expanduser(), size or 32),
    }
    if kind not in loaders or (kind == "imagefolder") != bool(path):
        raise DataError(f"unknown data set {name!r}: one of {', '.join(NAMES)}")
    arrays, classes = loaders[kind]()
    parts = {which: _split(*arrays[which], size) for which in SPLIT_FOLDERS}
    mean, std = _moments(parts["train"].images)
    shift = max(1, round(parts["train"].images.shape[2] / 28)) if kind == "fashion_mnist" else None
    return Data(name, **parts, classes=tuple(classes), mean=mean, std=std, flip=kind != "digits", shift=shift)


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


def _cifar(which: str, root: Path) -> tuple[Arrays, list[str]]:
    """CIFAR-10 or -100 (Krizhevsky, 2009) as torchvision fetches, checks and reads it."""
    from filelock import FileLock
    from torchvision import datasets

    loader = getattr(datasets, which)
    socket.setdefaulttimeout(30)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):
            parts = {name: loader(root, train=name == "train", download=True) for name in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{which.lower()} is not in {root} and cannot be fetched from {loader.url}: {error}\n"
            f"Put {loader.filename} into {root}, or set NNC_DATA to the folder that has it."
        ) from None
    arrays = {k: (part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for k, part in parts.items()}
    return _held_out(arrays, validation=len(parts["train"]) // 10), parts["train"].classes


def _imagefolder(path: Path, size: int) -> tuple[Arrays, list[str]]:
    """Your own images: class folders, or split folders that hold them."""
    if not path.is_dir():
        raise DataError(f"no folder {path}: give imagefolder:PATH of a folder with one sub-folder a class")
    names = [(which, name) for which, names in SPLIT_FOLDERS.items() for name in reversed(names)]
    folders = {which: path / name for which, name in names if (path / name).is_dir()}
    if "train" not in folders or not _image_files(folders["train"]):  # it may be a class: cars, trains
        folders = {"train": path}
    files = {which: _image_files(folder) for which, folder in folders.items()}
    held_out = {which: part for which, part in (("test", 5), ("validation", 10)) if which not in files}
    classes = list(files["train"])
    for which, by_class in files.items():
        least = 1 + len(held_out) if which == "train" else 1
        enough = all(len(by_class.get(name, ())) >= least for name in classes)
        if len(classes) < 2 or by_class.keys() - classes or not enough:
            counts = ", ".join(f"{name}: {len(paths)}" for name, paths in by_class.items()) or "none"
            raise DataError(
                f"{folders[which]} needs at least 2 class folders, the same in every split, with at least "
                f"{least} images each ({', '.join(sorted(IMAGE_SUFFIXES))}); there are {counts}"
            )
    arrays = {which: _read_images(by_class, size) for which, by_class in files.items()}
    channels = max(images.shape[1] for images, _ in arrays.values())  # grey images among coloured ones
    arrays = {k: (x.repeat(channels // x.shape[1], axis=1), y) for k, (x, y) in arrays.items()}
    counts = {which: max(1, len(arrays["train"][1]) // part) for which, part in held_out.items()}
    return _held_out(arrays, **counts), classes


def _image_files(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, at any depth; hidden files and folders are passed over."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    files = {sub.name: [p for p in sorted(sub.rglob("*")) if p.name[0] != "."] for sub in classes}
    return {name: [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES] for name, paths in files.items()}


def _read_images(by_class: dict[str, list[Path]], size: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class.values()])
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        images = list(pool.map(lambda path: _read_image(path, size), sum(by_class.values(), [])))
    channels = max(image.shape[-1] for image in images)  # 1 where all are grey
    images = [np.broadcast_to(image, (size, size, channels)) for image in images]
    return np.stack(images).transpose(0, 3, 1, 2), labels


def _read_image(path: Path, size: int) -> np.ndarray:
    """The middle square of an image file: uint8 (size, size, 1 or 3)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.draft(None, (2 * size, 2 * size))  # a JPEG far too large is decoded at a fraction
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(size, size, -1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; repair it or take it out") from None


def main(name: str) -> None:
    """`python -m nnc_utils.data NAME`: fetch a data set and print what it is."""
    try:
        data = load(name)
    except DataError as error:
        sys.exit(str(error))
    parts = ", ".join(f"{len(getattr(data, which)):,} {which}" for which in SPLIT_FOLDERS)
    shape, classes = f"{data.channels} x {data.size} x {data.size}", ", ".join(data.classes)
    print(f"{data.name}: {parts}; images {shape}; {len(data.classes)} classes: {classes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
