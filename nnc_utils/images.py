"""A folder of images as a data set.

Nothing is passed over in silence: a file is read, or it stands in `Folder.left_out` with the reason, or the
whole folder is refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnc_utils.image_file import FRAMES, RANGE, SHEER, decode, resized
from nnc_utils.image_layout import HELD_OUT, NAMED, SPLITS, FolderError, Layout, inside, layout, some
from nnc_utils.image_remarks import Read, remarks

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> uint8 images (n, channels, size, size), labels


@dataclass(frozen=True)
class Folder:
    """What a folder holds. Each file below it is in `files` or in `left_out`.

    `origin`: split -> where its images are from. `files`: split -> class -> image files. `left_out`: reason
    -> files. `remarks`: what else one should know, a sentence each.
    """

    path: Path
    classes: tuple[str, ...]
    origin: dict[str, str]
    files: dict[str, dict[str, list[Path]]]
    left_out: dict[str, list[Path]]
    remarks: tuple[str, ...]

    def told(self) -> list[str]:
        """What was left out, a line for each reason, and the remarks."""
        left = [
            f"left out: {len(files)}, {reason}, such as {files[0].relative_to(self.path)}"
            for reason, files in self.left_out.items()
        ]
        return [*left, *self.remarks]

    def report(self) -> list[str]:
        """How the splits came about, images of each class in each, and what is `told`."""
        lines = [f"{which}: {origin}" for which, origin in self.origin.items()]
        for name in self.classes:
            counts = ", ".join(f"{len(files[name])} {which}" for which, files in self.files.items())
            lines.append(f"class {name}: {counts}")
        return lines + self.told()


def read(path: Path, size: int) -> tuple[Folder, Arrays]:
    """A folder of images as a data set, its images resized to `size` pixels; see `image_layout.layout`.

    A split without a folder is held out of train: of each class a share, `HELD_OUT`, at least one, chosen by
    the images' contents. So names and order do not matter, an image more moves few others to another split,
    and identical images stay together.

    Raises
    ------
    FolderError
        What `layout` refuses; images cannot be read (all are named); two split folders share identical
        images; or a class has too few different ones.
    """
    found = layout(path)
    classes = tuple(found.images["train"])
    shares = {which: part for which, part in HELD_OUT.items() if which not in found.folders}
    images = _read_all(found, size)
    _refuse_shared(images)
    images = _hold_out(images, shares)
    files = {which: {name: [] for name in classes} for which in SPLITS}
    for image in images:
        files[image.split][classes[image.label]].append(image.file)
    if short := [f"{c} in {w}" for w, by_class in files.items() for c in classes if not by_class[c]]:
        raise FolderError(
            f"{path}: no image is left for {', '.join(short[:NAMED])}, since identical images stay together: "
            f"at least {1 + len(shares)} different ones, as they are read, in each class of "
            f"{found.folders['train']} are needed"
        )
    origin = {which: f"the folder {folder}" for which, folder in found.folders.items()}
    origin |= {which: f"1 in {part} of each class of train, by content" for which, part in shares.items()}
    told = *remarks(images, classes), *inside(found)
    return Folder(path, classes, origin, files, found.left_out, told), _arrays(images)


def _read_all(found: Layout, size: int) -> list[Read]:
    """Every image; those that cannot be read are named together."""
    listed = [
        (file, which, label)
        for which, by_class in found.images.items()
        for label, name in enumerate(by_class)
        for file in by_class[name]
    ]
    failures: list[str] = []

    def read_one(entry: tuple[Path, str, int]) -> Read | None:
        try:
            image = decode(entry[0])
        except Exception as error:  # a damaged file can make Pillow raise anything
            failures.append(f"{entry[0]}: {error}")
            return None
        whole = image.convert("RGB").tobytes()  # grey that is stored as RGB is the same image
        digest = hashlib.sha256(f"{image.size}".encode() + whole).hexdigest()
        about = image.info[FRAMES], image.info.get(RANGE, (0, 0)), image.info.get(SHEER, False)
        return Read(*entry, resized(image, size), digest, image.size, *about)

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        images = list(pool.map(read_one, listed))
    if failures:
        raise FolderError(
            f"{len(failures)} of {len(listed)} images cannot be read; repair them or take them out:\n  "
            + "\n  ".join([*sorted(failures)[:NAMED], *(["…"] if len(failures) > NAMED else [])])
        )
    return images


def _refuse_shared(images: list[Read]) -> None:
    """No image may be in two of the user's own splits: it would be tested on what it was trained on."""
    first: dict[str, Read] = {}
    pairs = [
        f"{first[image.digest].file} and {image.file}"
        for image in images
        if first.setdefault(image.digest, image).split != image.split
    ]
    if pairs:
        raise FolderError(
            f"split folders share identical images, {some(pairs, 'pairs')}: keep each in one split only"
        )


def _hold_out(images: list[Read], shares: dict[str, int]) -> list[Read]:
    """The images, some of train now in another split: of each class one in so many, at least one.

    Those that come first by digest are taken. Where an image is there more than once, all stay in train as
    long as single ones are left.
    """
    copies: dict[int, Counter] = defaultdict(Counter)
    for image in images:
        if image.split == "train":
            copies[image.label][image.digest] += 1
    split: dict[str, str] = {}
    for _, own in sorted(copies.items()):
        wanted = {which: max(1, own.total() // part) for which, part in shares.items()}
        for digest in sorted(own, key=lambda digest: (own[digest], digest)):
            missing = [which for which, count in wanted.items() if count > 0]
            which = split.setdefault(digest, missing[0] if missing else "train")
            if which in wanted:
                wanted[which] -= own[digest]
    return [replace(i, split=split[i.digest]) if i.split == "train" else i for i in images]


def _arrays(images: list[Read]) -> Arrays:
    """The pixels of each split; grey images among coloured ones become coloured."""
    channels = max(image.pixels.shape[-1] for image in images)
    arrays = {}
    for which in SPLITS:
        own = [image for image in images if image.split == which]
        pixels = [np.broadcast_to(i.pixels, (*i.pixels.shape[:2], channels)) for i in own]
        arrays[which] = np.stack(pixels).transpose(0, 3, 1, 2), np.array([image.label for image in own])
    return arrays
