"""Data sets by name: fixed splits, normalization computed from train, augmentation on batches.

Pictures stay unsigned bytes in memory, of shape (n, channels, height, width), until `normalize`.
`python -m nnc_utils.data NAME` fetches a data set and prints what it is.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

NAMES = ("digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder:PATH")

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
FASHION_CLASSES += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# SHA-256 of the *unpacked* files: the sources compress the same bytes differently
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_INSTALLED = Path("/usr/share/datasets/fashion-mnist")

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


class DataError(RuntimeError):
    """A data set that cannot be had, or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """Part of a data set: `images` uint8 (n, channels, size, size), `labels` int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set.

    Parameters
    ----------
    name : as given to `load`.
    train, validation, test : the splits; the same ones every time.
    classes : the name of each label.
    mean, std : of each channel of train, on the scale 0..1.
    flip : whether a mirrored picture keeps its label; false for digits. For your own pictures of
        something that has a handedness (text, say): ``dataclasses.replace(data, flip=False)``.
    shift : by how many pixels augmentation moves a picture at most; an eighth of its size when None.
        Fashion-MNIST's pictures are centred and fill their frame: one pixel.
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
        """Colour channels of a picture."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of a picture in pixels."""
        return self.train.images.shape[2]

    def normalize(self, images: Tensor) -> Tensor:
        """See `normalize`, with this data set's mean and deviation."""
        return normalize(images, self.mean, self.std)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See `augment`, with what this data set allows."""
        return augment(images, generator, flip=self.flip, padding=self.shift)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What a network is given: (images / 255 - mean) / std, per channel.

    Parameters
    ----------
    images : uint8 (n, channels, height, width).
    mean, std : one number a channel.

    Returns
    -------
    float32, same shape, device and memory format.

    Raises
    ------
    DataError
        When the pictures are no bytes (normalized twice, say) or have another number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.shape[1] == len(mean) == len(std):
        raise DataError(
            f"cannot normalize {images.dtype} of shape {tuple(images.shape)} with {len(mean)} means and "
            f"{len(std)} deviations: uint8 (n, {len(mean)}, height, width) is needed"
        )
    means, stds = (_column(tuple(values), images.device) for values in (mean, std))
    return images.float().div_(255).sub_(means).div_(stds)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # they outlive the call, and training has to be able to use them
def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel; kept, since a copy to an accelerator at each batch would make it wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def augment(
    images: Tensor, generator: torch.Generator, *, flip: bool = True, padding: int | None = None
) -> Tensor:
    """Shift each picture by a few pixels (borders become black) and mirror half of them.

    Parameters
    ----------
    images : uint8 (n, channels, size, size), on any device.
    generator : on the CPU, so that every device draws the same.
    flip : mirror left to right with probability one half; see `Data.flip`.
    padding : largest shift in pixels; an eighth of the size, at least 1, when not given.

    Returns
    -------
    A new tensor of the same shape.
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
    """Load a data set by name, fetching it first where needed.

    Parameters
    ----------
    name : one of `NAMES`. ``imagefolder:PATH`` is a folder of your own pictures: one sub-folder a
        class, or train / validation / test folders that hold them; a split that has no folder of
        its own is taken from train (a tenth for validation, a fifth for test).
    root : data folder; the environment variable NNC_DATA or ``data/`` in the repository if not given.
    size : resize the pictures to this many pixels. Your own pictures: 32 if not given, the middle square
        of each; the others keep their size.

    Raises
    ------
    DataError
        Naming each source tried and what to do. Another data set never takes its place.

    Examples
    --------
    >>> data = load("digits")
    >>> len(data.train), len(data.validation), len(data.test), data.size
    (1197, 200, 400, 8)
    """
    if size is not None and (type(size) is not int or not 1 <= size <= 1024):
        raise DataError(f"size is {size!r}: a whole number of pixels from 1 to 1024 is needed")
    kind, _, path = name.partition(":")
    folder = Path(root or os.environ.get("NNC_DATA") or Path(__file__).parents[1] / "data")
    folder = folder.expanduser().absolute()
    loaders: dict[str, Callable[[], tuple[dict[str, Split], tuple[str, ...]]]] = {
        "digits": _digits,
        "fashion_mnist": lambda: _fashion_mnist(folder),
        "cifar10": lambda: _cifar("CIFAR10", folder),
        "cifar100": lambda: _cifar("CIFAR100", folder),
        "imagefolder": lambda: _imagefolder(Path(path).expanduser(), size or 32),
    }
    if kind not in loaders or (kind == "imagefolder") != bool(path):
        raise DataError(f"unknown data set {name!r}: one of {', '.join(NAMES)}")
    splits, classes = loaders[kind]()
    if size is not None:
        splits = {which: _resized(split, size) for which, split in splits.items()}
    mean, std = _moments(splits["train"].images)
    shift = max(1, round(splits["train"].images.shape[2] / 28)) if kind == "fashion_mnist" else None
    return Data(name, **splits, classes=classes, mean=mean, std=std, flip=kind != "digits", shift=shift)


def _resized(split: Split, size: int) -> Split:
    if split.images.shape[2] == size:
        return split
    from torchvision.transforms.v2.functional import resize

    chunks = [resize(chunk, [size, size], antialias=True) for chunk in split.images.split(1000)]
    return Split(torch.cat(chunks), split.labels)


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


# --- Splits ---------------------------------------------------------------------------------------


def _hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: `count` of them held out, in each class's proportion.

    Every class gives at least one. The same for ever: NumPy freezes RandomState's stream.
    """
    classes, numbers = np.unique(labels, return_counts=True)
    share = numbers * (count / len(labels))
    take = np.floor(share).astype(int)
    by_remainder = np.argsort(take - share, kind="stable")
    take[by_remainder[: count - take.sum()]] += 1
    random = np.random.RandomState(0)
    held = [
        random.permutation(np.flatnonzero(labels == c))[: max(1, n)]
        for c, n in zip(classes, take, strict=True)
    ]
    mask = np.zeros(len(labels), dtype=bool)
    mask[np.concatenate(held)] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def _split(images: np.ndarray, labels: np.ndarray, index: np.ndarray | slice = slice(None)) -> Split:
    picked = images[index], labels[index].astype(np.int64)
    return Split(*(torch.from_numpy(np.array(a, order="C")) for a in picked))


# --- digits ---------------------------------------------------------------------------------------


def _digits() -> tuple[dict[str, Split], tuple[str, ...]]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    rest, test = _hold_out(bundle.target, 400)
    train, validation = _hold_out(bundle.target[rest], 200)
    indices = {"train": rest[train], "validation": rest[validation], "test": test}
    splits = {which: _split(images, bundle.target, index) for which, index in indices.items()}
    return splits, tuple(map(str, bundle.target_names))


# --- Fashion-MNIST (Xiao et al., 2017) --------------------------------------------------------------


def _fashion_mnist(root: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    images, labels, test_images, test_labels = _fashion_arrays(root)
    train, validation = _hold_out(labels, 5000)
    splits = {
        "train": _split(images[:, None], labels, train),
        "validation": _split(images[:, None], labels, validation),
        "test": _split(test_images[:, None], test_labels),
    }
    return splits, FASHION_CLASSES


def _fashion_arrays(root: Path) -> list[np.ndarray]:
    """The four arrays from the first source that has them intact."""
    folder = root / "fashion_mnist"
    failures = []
    for source, where in (("data folder", folder), (f"package {FASHION_PACKAGE}", FASHION_INSTALLED)):
        try:
            arrays = _read_fashion(where)
        except DataError as error:
            failures.append(f"{source} ({where}): {error}")
        else:
            _warn_if_damaged(folder, failures)
            return arrays
    return _fetch_fashion(root, folder, failures)


def _fetch_fashion(root: Path, folder: Path, failures: list[str]) -> list[np.ndarray]:
    from filelock import FileLock

    fetchers = {
        f"apt-get download {FASHION_PACKAGE}": _from_apt,
        "torchvision's download": _from_torchvision,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):
            try:  # another process may have fetched it while this one waited
                return _read_fashion(folder)
            except DataError:
                _warn_if_damaged(folder, failures)
            for leftover in root.glob(".fetching-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for source, fetch in fetchers.items():
                with tempfile.TemporaryDirectory(dir=root, prefix=".fetching-") as work:
                    try:
                        print(f"fashion_mnist: trying {source}", file=sys.stderr, flush=True)
                        fetched = fetch(Path(work))
                        arrays = _read_fashion(fetched)
                    except (DataError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                        failures.append(f"{source}: {error}")
                        continue
                    folder.mkdir(exist_ok=True)
                    for file in FASHION_FILES:
                        os.replace(fetched / file, folder / file)
                    return arrays
    except OSError as error:
        failures.append(f"fetching into {root}: {error}")
    listed = "".join(f"\n  - {failure}" for failure in failures)
    raise DataError(
        f"fashion_mnist cannot be had:{listed}\nPut the files {', '.join(FASHION_FILES)} into {folder} "
        "(or set NNC_DATA to a folder that has them under fashion_mnist/), or install the Debian or Ubuntu "
        f"package {FASHION_PACKAGE}."
    )


def _warn_if_damaged(folder: Path, failures: list[str]) -> None:
    if failures and any((folder / file).exists() for file in FASHION_FILES):
        warnings.warn(f"passing over the {failures[0]}", stacklevel=2)


def _read_fashion(folder: Path) -> list[np.ndarray]:
    missing = [file for file in FASHION_FILES if not (folder / file).is_file()]
    if missing:
        raise DataError("not there" if len(missing) == 4 else f"without {', '.join(missing)}")
    return [_read_idx(folder / file, sha256) for file, sha256 in FASHION_FILES.items()]


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    """Read a gzipped file of LeCun's idx format (unsigned bytes) after checking what is inside."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path.name} is damaged: its content has SHA-256 {found}, not {sha256}")
    if content[:3] != b"\0\0\x08":
        raise DataError(f"{path.name} is no idx file of unsigned bytes: it starts with {content[:4].hex()}")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _from_apt(work: Path) -> Path:
    """Let apt-get fetch the package (apt checks its signature) and unpack it here; needs no root."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on this machine")
    options = ["-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    options += ["-o", "APT::Sandbox::User=root"]  # root's usual stand-in, _apt, may not write here
    for name in ("lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
    answer = _command(["apt-get", *options, "download", FASHION_PACKAGE], work)
    if answer:  # the machine's package lists are missing or too old: fetch lists of our own
        refreshed = _command(["apt-get", *options, *own, "update"], work)
        answer = _command(["apt-get", *options, *own, "download", FASHION_PACKAGE], work)
        if answer:
            raise DataError("; ".join(filter(None, (refreshed, answer))))
    for package in work.glob(f"{FASHION_PACKAGE}_*.deb"):
        if answer := _command(["dpkg-deb", "-x", package.name, "unpacked"], work):
            raise DataError(answer)
    return work / "unpacked" / FASHION_INSTALLED.relative_to("/")


def _command(command: list[str], folder: Path) -> str:
    """Run it in the folder; empty when all went well, else what it complained about last."""
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=folder, env=english, capture_output=True, text=True, errors="replace", timeout=300
    )
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else ""


def _from_torchvision(work: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision would wait for a silent server for ever
    try:
        return Path(FashionMNIST(work, download=True).raw_folder)
    finally:
        socket.setdefaulttimeout(before)


# --- CIFAR (Krizhevsky, 2009) -----------------------------------------------------------------------


def _cifar(which: str, root: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    from filelock import FileLock
    from torchvision import datasets

    loader = getattr(datasets, which)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):
            learn = loader(root, train=True, download=True)
        test = loader(root, train=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{which.lower()} is not in {root} and cannot be fetched from {loader.url}: {error}\n"
            f"Put {loader.filename} into {root}, or set NNC_DATA to the folder that has it."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    images, labels = learn.data.transpose(0, 3, 1, 2), np.array(learn.targets)
    train, validation = _hold_out(labels, len(labels) // 10)
    splits = {
        "train": _split(images, labels, train),
        "validation": _split(images, labels, validation),
        "test": _split(test.data.transpose(0, 3, 1, 2), np.array(test.targets)),
    }
    return splits, tuple(learn.classes)


# --- Your own pictures ------------------------------------------------------------------------------


def _imagefolder(path: Path, size: int) -> tuple[dict[str, Split], tuple[str, ...]]:
    if not path.is_dir():
        raise DataError(f"no folder {path}: give imagefolder:PATH of a folder with one sub-folder a class")
    given = {
        which: next((path / name for name in names if (path / name).is_dir()), None)
        for which, names in SPLIT_FOLDERS.items()
    }
    if given["train"] is None or not _picture_files(given["train"]):  # "train" may be a class: cars, trains
        given = {"train": path}
    files = {which: _picture_files(folder) for which, folder in given.items() if folder is not None}
    classes = tuple(files["train"])
    held_out = {which: part for which, part in (("test", 5), ("validation", 10)) if which not in files}
    _check_classes(given, files, 1 + len(held_out))
    read = {which: _read_pictures(by_class, classes, size) for which, by_class in files.items()}
    if any(images.shape[-1] == 3 for images, _ in read.values()):  # grey pictures among colour
        read = {k: (np.broadcast_to(v, (*v.shape[:3], 3)), labels) for k, (v, labels) in read.items()}
    arrays = {which: (images.transpose(0, 3, 1, 2), labels) for which, (images, labels) in read.items()}
    images, labels = arrays["train"]
    counts = {which: max(1, len(labels) // part) for which, part in held_out.items()}
    for which, count in counts.items():
        kept, held = _hold_out(labels, count)
        arrays[which] = images[held], labels[held]
        images, labels = arrays["train"] = images[kept], labels[kept]
    return {which: _split(*arrays[which]) for which in SPLIT_FOLDERS}, classes


def _picture_files(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its pictures, at any depth; hidden files and folders are passed over."""
    found = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))):
        pictures = [p for p in sorted(sub.rglob("*")) if p.suffix.lower() in PICTURE_SUFFIXES]
        found[sub.name] = [p for p in pictures if not p.name.startswith(".")]
    return found


def _check_classes(
    given: dict[str, Path | None], files: dict[str, dict[str, list[Path]]], least: int
) -> None:
    train = files["train"]
    if len(train) < 2:
        raise DataError(
            f"{given['train']} holds {len(train)} class folders: at least 2 are needed, one a class"
        )
    for which, by_class in files.items():
        if set(by_class) != set(train):
            raise DataError(
                f"{given[which]} has the classes {', '.join(sorted(by_class)) or '(none)'}, "
                f"but {given['train']} has {', '.join(train)}: every split needs the same class folders"
            )
        needed = least if which == "train" else 1
        for name, pictures in by_class.items():
            if len(pictures) < needed:
                raise DataError(
                    f"{given[which] / name} holds {len(pictures)} pictures: at least {needed} are needed, "
                    f"of a kind among {', '.join(sorted(PICTURE_SUFFIXES))}"
                )


def _read_pictures(
    by_class: dict[str, list[Path]], classes: tuple[str, ...], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, size, size, 1 or 3), one channel when all pictures are grey; labels (n,)."""
    paths = [path for name in classes for path in by_class[name]]
    labels = np.repeat(np.arange(len(classes)), [len(by_class[name]) for name in classes])
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        pictures = list(pool.map(lambda path: _read_picture(path, size), paths))
    channels = max(picture.shape[-1] for picture in pictures)
    images = np.empty((len(pictures), size, size, channels), np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[...] = picture
    return images, labels


def _read_picture(path: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.draft(None, (2 * size, 2 * size))  # a JPEG far too large is decoded at a fraction
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits a pixel
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture).reshape(size, size, -1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}; repair it or take it out") from None


# --- Command line -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """`python -m nnc_utils.data NAME`: fetch a data set and print what it is."""
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.data", description=main.__doc__)
    parser.add_argument("name", help=", ".join(NAMES))
    parser.add_argument("--root", type=Path, help="data folder (default: NNC_DATA or data/)")
    parser.add_argument("--size", type=int, help="resize the pictures to this many pixels")
    options = parser.parse_args(arguments)
    try:
        data = load(options.name, root=options.root, size=options.size)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    shape = f"{data.channels} x {data.size} x {data.size}"
    parts = ", ".join(f"{len(getattr(data, which)):,} {which}" for which in SPLIT_FOLDERS)
    print(f"{data.name}: {parts}; pictures {shape}; {len(data.classes)} classes: {', '.join(data.classes)}")
    print(f"mean {[round(m, 4) for m in data.mean]}, standard deviation {[round(s, 4) for s in data.std]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
