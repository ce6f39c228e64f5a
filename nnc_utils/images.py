"""Your own images: how a file becomes pixels, and a folder of them a data set.

Nothing is passed over in silence: a file is read, or it stands in `Folder.left_out` with the reason, or the
whole folder is refused. `read_image` is the one way to read an image; `READING` is what it does, in words.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from nnc_utils.image_folder import HELD_OUT, MISREAD, NAMED, SPLITS, FolderError, Layout, inside, layout, some
from nnc_utils.image_remarks import Read, remarks

BACKGROUND = "white"  # under transparent pixels
BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES, SAMPLE = 258, 259, 262, 277, 284, 339  # tags of TIFF
HEIGHT, STRIPS, ROWS, LARGEST, TILES = 257, 273, 278, 281, 324  # more of them
KIND, DESCRIBED, DEPTH = 254, 270, 32_997
NEXT = {  # how each image begins in a file that holds several, one behind the other
    "JPEG": rb"\A\xff\xd8|\xff\xd9\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "PPM": rb"P[456]\s\d+\s\d+\s",
}
SCALE, FRAMES, TOP = "scale", "frames", "top"  # in an image's `info`: see `Read`
KEYED = {"L;2", "L;4", "RGB;16B"}  # PNG's pixels whose transparent value Pillow takes for one of 8 bits
READING = {
    "frame": "the first of an animation",
    "turned": "as EXIF says",
    "deep": "one channel of 16 bits: value // 256; of 32 bits: up to 255 as it is, else value // 256; "
    "floats up to 1 times 255, rounded, others as they are",
    "background": f"{BACKGROUND} under transparent pixels",
    "profile": "not looked at, nor gamma: colours are taken as stored",
    "resized": "the middle square, bilinear with antialiasing (Pillow: ImageOps.fit, BILINEAR)",
}

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


# --- One image -----------------------------------------------------------------------------------------


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as training sees it, see `READING`: uint8 (size, size, 1 or 3), grey or RGB."""
    return _resized(decode(path), size)


def decode(path: Path) -> Image.Image:
    """A file as a whole image of mode L or RGB, before it is resized.

    Whatever Pillow says about a damaged file is passed on; a ValueError, where it is not clear how the
    values map to 0..255.
    """
    with path.open("rb") as file, Image.open(file) as opened:  # by its path, turned TIFFs are scrambled
        if opened.format in MISREAD:
            raise ValueError(f"a {opened.format} file, whatever its suffix: convert it to PNG")
        if opened.format == "TIFF":
            _check_tiff(opened)
        if opened.format in ("JPEG", "MPO", "PNG"):
            _check_end(opened.format, path)
        if opened.format == "JPEG" and opened.mode == "CMYK" and "adobe" not in opened.info:
            raise ValueError("CMYK, and not said whether 0 is ink or paper: convert it to RGB")
        if "transparency" in opened.info and KEYED & {tile.args for tile in opened.tile}:
            raise ValueError("Pillow would mistake its transparent value: convert it to RGBA of 8 bits")
        image = ImageOps.exif_transpose(opened)
        is_grey = image.mode in ("1", "L", "LA") or image.mode[0] in "IF"
        if image.mode[0] in "IF":  # one channel of 16 or 32 bits
            image = _to_8_bits(image, sixteen=opened.format in ("PNG", "PPM"))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        if not is_grey and _is_deep(opened, file):  # of which Pillow keeps the upper byte alone
            image.info[TOP] = 256 * max(high for _, high in image.convert("RGB").getextrema()) + 255
        image = image.convert("L" if is_grey else "RGB")
        image.info[FRAMES] = _frames(opened, path)
        return image


def _is_deep(opened: Image.Image, file: BinaryIO) -> bool:
    """Whether the file holds 16 bits a channel."""
    if opened.format == "PNG":
        file.seek(24)  # in its header: the bits of a sample
        return file.read(1) == b"\x10"
    return opened.format == "TIFF" and max(opened.tag_v2.get(BITS, (1,))) == 16


def _frames(opened: Image.Image, path: Path) -> int:
    """How many images a file holds, also where Pillow sees the first alone."""
    if opened.format == "MPO":  # whose others are previews
        return 1
    if opened.format == "TIFF":  # a stack that one directory describes, as ImageJ and tifffile write it
        tags = opened.tag_v2
        said = re.match(r"(?s)ImageJ=.*^images=(\d+)", str(tags.get(DESCRIBED, "")), re.MULTILINE)
        return max(opened.n_frames, int(said[1]) if said else 1, tags.get(DEPTH, 1), _stacked(opened))
    if opened.format in NEXT:
        return max(getattr(opened, "n_frames", 1), len(re.findall(NEXT[opened.format], path.read_bytes())))
    return getattr(opened, "n_frames", 1)


def _stacked(opened: Image.Image) -> int:
    """Planes of a stack by the shape that tifffile notes; 1 without."""
    shape = re.match(r'{"shape": \[([\d, ]+)\]', str(opened.tag_v2.get(DESCRIBED, "")))
    values = math.prod(map(int, shape[1].split(","))) if shape and opened.n_frames == 1 else 0
    return max(1, values // (math.prod(opened.size) * opened.tag_v2.get(SAMPLES, 1)))


def _check_end(form: str, path: Path) -> None:
    """Refuse what a copy that broke off left of a file, its length right and the rest zeros."""
    if form == "PNG":
        with Image.open(path) as image:
            image.verify()  # of each part its checksum
        return
    content, place = path.read_bytes(), 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    if b"\xff\xd9" not in content[place:]:
        raise ValueError("its end is missing: only a part of it was copied")


def _check_tiff(opened: Image.Image) -> None:
    """Refuse what Pillow opens, and reads as other values than the file holds."""
    tags = opened.tag_v2
    bits, bands = max(tags.get(BITS, (1,))), len(opened.getbands())
    if opened.mode[0] in "IF" and tags.get(PHOTOMETRIC) == 0:  # which Pillow minds in 8 bits only
        raise ValueError("0 is white in this TIFF, and Pillow would read a negative: invert it first")
    if bits <= 16 and 2 in tags.get(SAMPLE, ()):
        raise ValueError(f"its values are signed, of {bits} bits: unsigned ones are needed")
    if (samples := tags.get(SAMPLES, 1)) != bands or opened.mode == "RGBX":
        raise ValueError(f"of its {samples} channels Pillow would read only some: keep one, three, or RGBA")
    is_right = opened.mode in ("RGB", "RGBA", "CMYK") and (bits == 8 or tags.get(COMPRESSION) != 1)
    if bands > 1 and tags.get(PLANES) == 2 and not is_right:
        raise ValueError(f"Pillow reads such planes ({opened.mode}, {bits} bits) wrongly: convert it to PNG")
    if tags.get(KIND, 0) & 5:
        raise ValueError("its first page is a preview or a mask: convert the image itself to PNG")
    top = max(tags.get(LARGEST, (65_535,)))
    if bits == 16 and top < 65_535 and not top & (top + 1):  # that of 10, 12, 14 bits; else just the largest
        raise ValueError(f"its white is {top}, not 65535: bring it to all of 8 or 16 bits")
    parts, height = tags.get(STRIPS, tags.get(TILES, ())), tags.get(HEIGHT, 1)
    rows = min(tags.get(ROWS, height), height)
    planes = samples if tags.get(PLANES) == 2 else 1
    if (STRIPS in tags and len(parts) < planes * -(-height // rows)) or 0 in parts:
        raise ValueError("rows of it are not in the file: they would be black, or other bytes of the file")


def _to_8_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """`sixteen`: also mode I, 32 bits in memory, stands for a file of 16, by whose range it is scaled.

    Where the image's own largest value decides, ``info[SCALE]`` of the result says how.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    most = 255 if image.mode == "F" else 65_535
    if not (low >= 0 and high <= most) or "transparency" in image.info:
        raise ValueError(
            f"its values ({image.mode}) go from {low:g} to {high:g}: opaque ones in 0..1 (floats), 0..255 or "
            "0..65535 (integers) are needed"
        )
    largest = values[values < 65_535].max(initial=0) or high  # but for those that mean "none here"
    if image.mode == "F":
        values = np.rint(values * 255 if high <= 1 else values)
    elif image.mode != "I" or sixteen or high > 255:
        values //= 256
    result = Image.fromarray(values.astype(np.uint8))
    result.info[TOP] = int(largest) if image.mode != "F" else 0
    if image.mode == "F" or (image.mode == "I" and not sixteen):
        tops = (1, 255) if image.mode == "F" else (255, 65_535)
        result.info[SCALE] = f"up to {tops[int(high > tops[0])]}"
    return result


def _resized(image: Image.Image, size: int) -> np.ndarray:
    square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).reshape(size, size, -1)


# --- A folder ------------------------------------------------------------------------------------------


def read(path: Path, size: int) -> tuple[Folder, Arrays]:
    """A folder of images as a data set, its images resized to `size` pixels; see `image_folder.layout`.

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
            f"at least {1 + len(shares)} different ones in each class of {found.folders['train']} are needed"
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
        about = image.info.get(SCALE, ""), image.info[FRAMES], image.info.get(TOP, 0)
        return Read(*entry, _resized(image, size), digest, image.size, *about)

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
