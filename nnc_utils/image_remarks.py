"""An image that was read, and what one should know of all: copies, lost contents, one class above all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nnc_utils.image_layout import HELD_OUT, some, split_of

FAINT = 16  # of 255: an image whose values are closer together has lost its contents, or never had any
OUTLINE = 16  # pixels of the grey images by which copies of another size or encoding are found
COPY = 0.998  # correlation of their outlines; Fashion-MNIST's first 1,000 test images have none in train
TINTS = 4  # pixels of the colours by which drawings of one shape in two colours are told apart
SAME_COLOURS = 0.9  # correlation of these; JPEG, resizing and 5 % more light leave 0.95 and more
GREY = 4  # of 255: an image whose colours are closer to grey may be a copy of one in colours
MOSTLY = 0.8  # share of one class in the test images from which accuracy says little
FEW = 2**14  # of 65,536: deep images whose values are closer together are read in fewer than 64 greys
PARTS = re.compile(r"images?|imgs?|photos?|masks?|labels?|annotations?|segmentations?|gt|ground.?truth")
MASK = re.compile(r"[\W_]*(masks?|seg|segmentation|gt|labels?|annotations?)[\W_]*", re.IGNORECASE)
AGAIN = re.compile(r"( \d+| ?\(\d+\)| -? ?copy)$", re.IGNORECASE)  # behind the name of a folder's copy
AT_ONCE = 256  # images that are compared with all others at a time


@dataclass(frozen=True)
class Read:
    """An image that was read: pixels uint8 (size, size, 1 or 3).

    `digest`: SHA-256 of the whole image in RGB; `shape`: its width and height; `frames`: or pages, in its
    file. `range`: its lowest and largest value, where it has 16 bits; else 0 and 0. `sheer`: whether most of
    its pixels are half-transparent.
    """

    file: Path
    split: str
    label: int
    pixels: np.ndarray
    digest: str
    shape: tuple[int, int]
    frames: int
    range: tuple[int, int]
    sheer: bool


def remarks(images: list[Read], classes: tuple[str, ...]) -> tuple[str, ...]:
    """A sentence for each thing that was found."""
    found = [*_alike_names(classes), *_identical(images), *_copies(images), *_named(images)]
    return *found, *_lost(images), *_unused(images, classes), *_mostly(images, classes)


def _alike_names(classes: tuple[str, ...]) -> list[str]:
    by_name: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        seen = "".join(x for x in unicodedata.normalize("NFKC", name) if unicodedata.category(x) != "Cf")
        by_name[seen.casefold().strip()].append(name)
    alike = [" and ".join(map(ascii, names)) for names in by_name.values() if len(names) > 1]
    told = [f"classes whose names differ in case or spelling only: {'; '.join(alike)}"] if alike else []
    if again := [name for name in classes if AGAIN.search(name) and AGAIN.sub("", name) in classes]:
        told.append(f"classes named as a copy of another: {', '.join(again)}")
    if len(parts := [name for name in classes if PARTS.fullmatch(name.casefold())]) > 1:
        told.append(f"classes named as the parts of a data set: {', '.join(parts)}; are these the classes?")
    return told


def _identical(images: list[Read]) -> list[str]:
    by_digest: dict[str, list[Read]] = defaultdict(list)
    for image in images:
        by_digest[image.digest].append(image)
    several = [same for same in by_digest.values() if len(same) > 1]
    contradicting = [same for same in several if len({image.label for image in same}) > 1]
    found = []
    if several:
        one = " and ".join(str(image.file) for image in several[0][:2])
        count = sum(map(len, several))
        found.append(f"identical images: {count} files of {len(several)}, such as {one}; kept in one split")
    if contradicting:
        one = " and ".join(str(contradicting[0][i].file) for i in (0, -1))
        found.append(f"identical images in two classes: {len(contradicting)}, such as {one}")
    return found


def _copies(images: list[Read]) -> list[str]:
    """Images of test and validation that are in another split, too, in another size, encoding or turn."""
    outlines = np.stack([_outline(image.pixels) for image in images])
    tints = np.stack([_tint(image.pixels) for image in images])
    coloured = tints.any(1)
    splits = np.array([image.split for image in images])
    pairs = []
    for which in HELD_OUT:
        own, others = (np.flatnonzero(there) for there in (splits == which, splits != which))
        for some_own in np.split(own, range(AT_ONCE, len(own), AT_ONCE)):
            correlation = np.zeros((len(some_own), len(others)), np.float32)
            for outline, tint in zip(_turned(outlines[some_own], OUTLINE), _turned(tints[some_own], TINTS)):
                turned = outline @ outlines[others].T
                differ = tint @ tints[others].T < SAME_COLOURS
                turned[differ & coloured[some_own, None] & coloured[others]] = 0
                correlation = np.maximum(correlation, turned)
            nearest = others[correlation.argmax(1)]
            for image, other, most in zip(some_own, nearest, correlation.max(1)):
                pairs += [(images[image].file, images[other].file)] if most > COPY else []
    if not pairs:
        return []
    one, other = pairs[0]
    return [
        f"nearly identical images in two splits: {len(pairs)}, such as {one} and {other}. Where one is a "
        "copy of the other, in another size or encoding, mirrored or turned, the accuracy is too high: keep "
        "them in one split"
    ]


def _turned(vectors: np.ndarray, side: int) -> list[np.ndarray]:
    """Square images as vectors (n, side² or side² · 3), mirrored and turned in all eight ways."""
    squares = vectors.reshape(len(vectors), side, side, -1)
    both = squares, squares[:, :, ::-1]
    return [np.rot90(one, times, (1, 2)).reshape(vectors.shape) for one in both for times in range(4)]


def _named(images: list[Read]) -> list[str]:
    """Names of files that speak of splits which their folders do not make, or of copies of one image."""
    words, sources = defaultdict(set), defaultdict(set)
    for image in images:
        parts = re.split(r"[^a-z]+", image.file.stem.casefold())
        words[image.file.parent] |= {split_of(part) for part in parts} - {""}
        if (source := image.file.name.partition(".rf.")[0]) != image.file.name:  # as Roboflow names copies
            sources[Path(source)].add(image.split)
    splits_of = defaultdict(set)
    for image in images:
        splits_of[image.file.with_suffix("")].add(image.split)
    for file, splits in list(splits_of.items()):  # "name-edited", "name_aug_2" beside "name", or its cut-out
        sources[file] |= splits
        for end in re.finditer(r"(?<!^)[\W_]", file.name):
            if (beside := file.with_name(file.name[: end.start()])) in splits_of:
                sources[beside] |= splits | splits_of[beside]
    found = []
    masks = [i.file for i in images if (own := MASK.sub("", i.file.stem)) and own != i.file.stem]
    if masks := [file for file in masks if file.with_name(MASK.sub("", file.stem)) in splits_of]:
        found.append(f"named as masks of an image beside them, read as images: {some(masks, 'files')}")
    if mixed := [folder for folder, splits in words.items() if len(splits) > 1]:
        found.append(
            f"names of files speak of splits, which only folders make: {some(mixed, 'class folders')}. If "
            "they are meant, put the files into train, validation and test"
        )
    if copies := [file.name for file, splits in sources.items() if len(splits) > 1]:
        found.append(f"names as of copies of one image, in two splits: {some(copies, 'images')}; are they?")
    return found


def _outline(pixels: np.ndarray) -> np.ndarray:
    """A small grey image as a vector of mean 0 and length 1 (0 where all is one colour)."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).convert("L")
    values = np.asarray(image.resize((OUTLINE, OUTLINE), Image.Resampling.BOX), np.float32).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1.0)


def _tint(pixels: np.ndarray) -> np.ndarray:
    """What a tiny image differs from grey by, as a vector of length 1 (0 where that is next to nothing)."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).convert("RGB")
    values = np.asarray(image.resize((TINTS, TINTS), Image.Resampling.BOX), np.float32)
    values = (values - values.mean(2, keepdims=True)).ravel()
    length = float(np.linalg.norm(values))
    return values / length if length > GREY * len(values) ** 0.5 else np.zeros_like(values)


def _lost(images: list[Read]) -> list[str]:
    """Images of which little is left in the square that a network sees."""
    found = []
    channels = [image.pixels.reshape(-1, image.pixels.shape[2]) for image in images]
    faint = [image.file for image, own in zip(images, channels) if np.ptp(own, axis=0).max() < FAINT]
    if faint:
        found.append(
            f"nearly one colour: {some(faint, 'images')}: as they are read, their values are less than "
            f"{FAINT} of 255 apart"
        )
    if several := [image.file for image in images if image.frames > 1]:
        found.append(f"of several frames, of which the first is read: {some(several, 'images')}")
    if sheer := [image.file for image in images if image.sheer]:
        found.append(
            f"mostly half-transparent, read on white: {some(sheer, 'images')}. If their fourth channel means "
            "something else, leave it out"
        )
    long = [image.file for image in images if 2 * min(image.shape) < max(image.shape)]
    if long:
        found.append(f"long: {some(long, 'images')}: their middle square is less than half of them")
    return found


def _unused(images: list[Read], classes: tuple[str, ...]) -> list[str]:
    """Deep images that leave much of 16 bits unused, as devices of 12 bits do: a class, a split, or each."""
    tops = defaultdict(list)
    for image in images:
        for group in (f"class {classes[image.label]}", image.split):
            tops[group].append(image.range[1])
    dark = [group for group, own in tops.items() if 255 < max(own) < 2**15]
    narrow = [i.file for i in images if i.range[1] > 255 and i.range[1] - i.range[0] < FEW]
    told = [f"16 bits of which at most 15 are used, so read darker: {', '.join(dark)}"] if dark else []
    if narrow:
        told.append(f"16 bits of which less than a quarter is used, so few greys: {some(narrow, 'images')}")
    return told


def _mostly(images: list[Read], classes: tuple[str, ...]) -> list[str]:
    """Whether a network that always says the same would look good."""
    tested = Counter(image.label for image in images if image.split == "test")
    [(label, count)] = tested.most_common(1)
    if (share := count / tested.total()) < MOSTLY:
        return []
    return [
        f"{100 * share:.1f} % of the test images are of class {classes[label]}: a network that always says "
        "so is right as often, so accuracy tells little of the other classes"
    ]
