"""An image file as pixels: `read_image` is the one way to read one; `READING` is what it does, in words.

What Pillow would read as other values than the file holds is refused: each check says why.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nnc_utils.image_layout import MISREAD, SUFFIXES

BACKGROUND = "white"  # under transparent pixels
FORMATS = {*SUFFIXES.values(), "MPO"} - MISREAD
BITS, PHOTOMETRIC, SAMPLES, PLANES, SAMPLE = 258, 262, 277, 284, 339  # tags of TIFF
KIND, HEIGHT, DESCRIBED, STRIPS, ROWS, TILES, DEPTH = 254, 257, 270, 273, 278, 324, 32_997
COLOURS = {"L": 1, "I;16": 1, "I;16B": 1, "RGB": 2, "RGBA": 2}  # a TIFF's, as Pillow and as the file says
NEXT = {  # how each image begins in a file that holds several, one behind the other
    "JPEG": rb"\A\xff\xd8|\xff\xd9\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "PPM": rb"P[456]\s\d+\s\d+\s",
}
FRAMES, RANGE, SHEER = "frames", "range", "sheer"  # in an image's `info`: see `Read`
KEYED = {"L;2", "L;4", "RGB;16B"}  # PNG's pixels whose transparent value Pillow takes for one of 8 bits
READING = {
    "frame": "the first of an animation",
    "turned": "as EXIF says, or XMP",
    "deep": "one channel of 16 bits: value // 256",
    "background": f"{BACKGROUND} under transparent pixels",
    "profile": "not looked at, nor gamma: colours are taken as stored",
    "resized": "the middle square, bilinear with antialiasing (Pillow: ImageOps.fit, BILINEAR)",
}


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as training sees it, see `READING`: uint8 (size, size, 1 or 3), grey or RGB."""
    return resized(decode(path), size)


def resized(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of what `decode` gives: uint8 (size, size, 1 or 3)."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).reshape(size, size, -1)


def decode(path: Path) -> Image.Image:
    """A file as a whole image of mode L or RGB, before it is resized.

    Whatever Pillow says about a damaged file is passed on; a ValueError, where it is not clear how the
    values map to 0..255.
    """
    with path.open("rb") as file, _opened(file) as opened:  # by its path, turned TIFFs are scrambled
        if opened.format not in FORMATS:
            raise ValueError(f"a {opened.format} file, whatever its suffix: convert it to PNG")
        if opened.format == "TIFF":
            _check_tiff(opened)
        if opened.format in ("JPEG", "MPO", "PNG"):
            _check_end(opened.format, path)
        if opened.format == "JPEG" and opened.mode == "CMYK" and "adobe" not in opened.info:
            raise ValueError("CMYK, and not said whether 0 is ink or paper: convert it to RGB")
        if "transparency" in opened.info and KEYED & {tile.args for tile in opened.tile}:
            raise ValueError("Pillow would mistake its transparent value: convert it to RGBA of 8 bits")
        if opened.mode == "F":
            raise ValueError("floats do not say what is white: convert it to 8 bits")
        image = ImageOps.exif_transpose(opened)
        is_grey, deep = image.mode in ("1", "L", "LA") or image.mode[0] == "I", {}
        if not is_grey and _is_deep(opened, file):  # of which Pillow keeps the upper byte alone
            lows, highs = zip(*image.convert("RGB").getextrema())
            deep = {RANGE: (256 * min(lows), 256 * max(highs) + 255)}
        if image.mode[0] == "I":  # one channel of 16 bits
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            opacity = np.asarray(image.getchannel("A"))
            deep[SHEER] = bool(np.mean((opacity > 0) & (opacity < 255)) > 0.5)
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        image = image.convert("L" if is_grey else "RGB")
        image.info |= deep | {FRAMES: _frames(opened, path)}
        return image


def _opened(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        what = f"begins with {start!r}" if start else "is empty"
        raise ValueError(f"no image that can be read here, whatever its suffix: it {what}") from None


def _check_tiff(opened: Image.Image) -> None:
    """Refuse all but plain TIFFs."""
    tags, colours = opened.tag_v2, len(opened.getbands())
    height, parts = tags.get(HEIGHT, 1), tags.get(STRIPS, tags.get(TILES, ()))
    strips = -(-height // min(tags.get(ROWS, height), height))
    bits, kinds = set(tags.get(BITS, (1,))), set(tags.get(SAMPLE, (1,)))
    is_plain = COLOURS.get(opened.mode) == tags.get(PHOTOMETRIC) and tags.get(SAMPLES, 1) == colours
    if not is_plain or bits not in ({8}, {16}) or kinds != {1} or tags.get(PLANES, 1) != 1:
        raise ValueError(
            "a TIFF that is not of plain values (grey with white at the top, RGB or RGBA, side by side, "
            f"unsigned, of 8 or 16 bits; it has {tags.get(SAMPLES, 1)} × {max(bits)} bits, colours of kind "
            f"{tags.get(PHOTOMETRIC)} and planes {tags.get(PLANES, 1)}): convert it to PNG"
        )
    if opened.n_frames > 1 or tags.get(KIND, 0) or _stacked(tags, math.prod(opened.size) * colours):
        raise ValueError("a TIFF of several images, or of a preview: convert the one that is meant to PNG")
    if (STRIPS in tags and len(parts) < strips) or not parts or 0 in parts:
        raise ValueError("rows of it are not in the file: they would be black, or other bytes of the file")


def _stacked(tags: dict, values: int) -> bool:
    """Whether more images lie behind its one of so many values, as ImageJ and tifffile say it."""
    said = str(tags.get(DESCRIBED, ""))
    shape = re.match(r'{"shape": \[([\d, ]+)\]', said)
    several = re.match(r"(?s)ImageJ=.*^images=(?!1\s)\d", said, re.MULTILINE) or tags.get(DEPTH, 1) > 1
    return bool(several) or (shape is not None and math.prod(map(int, shape[1].split(","))) > values)


def _check_end(form: str, path: Path) -> None:
    """Refuse what a copy that broke off left of a file, its length right and the rest zeros."""
    if form == "PNG":
        with Image.open(path) as image:
            image.verify()  # of each part its checksum
        return
    content, place = path.read_bytes(), 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        if content[place + 1 : place + 2] == b"\xff":  # one that fills
            place += 1
            continue
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    if b"\xff\xd9" not in content[place:]:
        raise ValueError("its end is missing: only a part of it was copied")


def _is_deep(opened: Image.Image, file: BinaryIO) -> bool:
    """Whether the file holds 16 bits a channel."""
    if opened.format == "PNG":
        file.seek(24)  # in its header: the bits of a sample
        return file.read(1) == b"\x10"
    if opened.format == "PPM":
        file.seek(0)
        most = re.match(rb"P[36](?:\s+(?:#[^\n]*\n\s*)*(\d+)){3}", file.read(512))
        return bool(most) and int(most[1]) > 255
    return opened.format == "TIFF" and max(opened.tag_v2.get(BITS, (1,))) == 16


def _frames(opened: Image.Image, path: Path) -> int:
    """How many images a file holds, also where Pillow sees the first alone; previews do not count."""
    if opened.format == "MPO":
        return 1
    behind = len(re.findall(NEXT[opened.format], path.read_bytes())) if opened.format in NEXT else 1
    return max(getattr(opened, "n_frames", 1), behind)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Of one channel of 16 bits; the range of its values goes into its `info`."""
    values = np.asarray(image)
    if "transparency" in image.info or values.max() > 65_535:
        raise ValueError("16 bits and a transparent value, or more than 16 bits: convert it to 8 bits")
    result = Image.fromarray((values // 256).astype(np.uint8))
    largest = values[values < 65_535].max(initial=0) or values.max()  # 65,535 may mean "none here"
    result.info[RANGE] = int(values.min()), int(largest)
    return result
