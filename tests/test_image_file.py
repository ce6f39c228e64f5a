"""image_file.py: each kind of file against what was written into it."""

import contextlib
import io
import json
import re
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from nnc_utils import data, image_file

README = Path(__file__).parents[1] / "README.md"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
HALF = np.repeat([[0, 255]], 8, axis=1).repeat(16, axis=0).astype(np.uint8)  # dark at the left
SMALL = dict.fromkeys(("cat", "dog"), 10)


def grey(array, mode=None):
    return Image.fromarray(array if mode is None else array.astype(mode))


def with_alpha(mode):
    """Black everywhere, the more transparent the darker RAMP is."""
    image = Image.new(mode, (16, 16), 0)
    image.putalpha(grey(RAMP))
    return image


def cmyk():
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    image.paste((0, 255, 255, 0), (0, 0, 8, 16))
    return image


def palette():
    image = grey((RAMP > 127).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


RED_WHITE = np.stack([np.full((16, 16), 255), HALF, HALF], -1)
BLUE_BELOW = np.stack([255 * (RAMP <= 127), 0 * RAMP, 255 * (RAMP > 127)], -1)
FRAMES = {"save_all": True, "append_images": [Image.new("L", (16, 16), 99)]}
KINDS = {  # file -> what is written, with which options, what has to be read, how far it may be off
    "8.png": (grey(RAMP), {}, RAMP, 0),
    "1.png": (grey(HALF).convert("1"), {}, HALF, 0),
    "8.jfif": (grey(HALF), {"format": "JPEG", "quality": 95}, HALF, 6),
    "8.JPE": (grey(HALF), {"format": "JPEG", "quality": 95}, HALF, 6),
    "8.avif": (grey(HALF), {"quality": 95}, HALF, 8),
    "16.png": (grey(RAMP * 256.0 + 7, np.uint16), {}, RAMP, 0),
    "16.tif": (grey(RAMP * 256.0 + 7, ">u2"), {}, RAMP, 0),
    "16dark.png": (grey(RAMP, np.uint16), {}, RAMP * 0, 0),
    "la.png": (with_alpha("L"), {}, 255 - RAMP, 1),
    "rgba.png": (with_alpha("RGB"), {}, 255 - RAMP, 1),
    "rgba.webp": (with_alpha("RGB"), {"lossless": True, "exact": True}, 255 - RAMP, 1),
    "key.png": (grey(HALF), {"transparency": 0}, HALF * 0 + 255, 0),
    "key.gif": (grey(HALF), {"transparency": 0}, HALF * 0 + 255, 0),
    "palette.png": (palette(), {}, BLUE_BELOW, 0),
    "palette.gif": (palette(), {}, BLUE_BELOW, 0),
    "cmyk.jpg": (cmyk(), {"quality": 100}, RED_WHITE, 8),
    "animated.gif": (grey(HALF), FRAMES, HALF, 0),
    "animated.webp": (grey(HALF).convert("RGB"), FRAMES | {"lossless": True}, HALF, 0),
}


def write(place, name):
    image, options, expected, off = KINDS[name]
    place.mkdir(parents=True, exist_ok=True)
    if name.endswith(".avif") and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    image.save(place / name, **options)
    return expected, off


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_is_read_as_what_it_shows(tmp_path, name):
    expected, off = write(tmp_path, name)
    read = image_file.read_image(tmp_path / name, 16).astype(int)
    expected = np.broadcast_to(expected.reshape(16, 16, -1), (16, 16, 3)).astype(int)
    assert np.abs(np.broadcast_to(read, (16, 16, 3)) - expected).max() <= off


def test_a_pgm_of_16_bits_is_scaled_by_its_type(tmp_path):
    for name, most, expected in (("deep", 65_535, RAMP * 0), ("8", 255, RAMP)):
        kind = ">u2" if most > 255 else "u1"
        (tmp_path / f"{name}.pgm").write_bytes(b"P5 16 16 %d\n" % most + RAMP.astype(kind).tobytes())
        assert (image_file.read_image(tmp_path / f"{name}.pgm", 16)[..., 0] == expected).all()


@pytest.mark.parametrize("orientation, turned", [(3, HALF[::-1, ::-1]), (6, HALF.T), (8, HALF.T[::-1])])
def test_an_image_is_turned_as_its_camera_was(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey(HALF).save(tmp_path / "a.png", exif=exif)
    assert (image_file.read_image(tmp_path / "a.png", 16)[..., 0] == turned).all()


def tiff(path, values, bands=1, **tags):
    """A TIFF of 16 x 16 pixels by the format's own description; `values`: as they are stored."""
    content, width = values.tobytes(), 8 * values.dtype.itemsize
    planes = bands if tags.get("planar") == 2 else 1
    places = [8 + i * len(content) // planes for i in range(planes)]
    entries = {
        256: 16,
        257: 16,
        258: [width] * bands,
        259: 1,
        262: tags.get("colours", 2 if bands >= 3 else 1),
    }
    entries |= {277: bands, 254: tags.get("page")}
    entries |= {273: tags.get("strips", places), 278: tags.get("rows", 16), 281: tags.get("top")}
    entries |= {279: [len(content) // planes] * planes, 284: tags.get("planar", 1)}
    entries |= {338: tags.get("extra"), 339: tags.get("kind")}
    heads, after, place = b"", b"", 8 + len(content)
    entries = {tag: np.ravel(x).tolist() for tag, x in sorted(entries.items()) if x is not None}
    place += 6 + 12 * len(entries)
    for tag, numbers in entries.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        where = packed if len(numbers) == 1 else struct.pack("<I", place + len(after))
        heads += struct.pack("<HHI", tag, 4, len(numbers)) + where
        after += packed if len(numbers) > 1 else b""
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(content)) + content
        + struct.pack("<H", len(entries)) + heads + bytes(4) + after
    )  # fmt: skip


SHORT = np.arange(256, dtype=np.uint16) * 257
TIFFS = {  # what Pillow opens and reads as other values, without a word, or what is not clear
    "planes of 16 bits": ((np.stack([SHORT, SHORT // 2, SHORT // 4]), 3), {"planar": 2}, "plain values"),
    "signed, 8 bits": ((SHORT.astype(np.uint8), 1), {"kind": 2}, "plain values"),
    "signed, 16 bits": ((SHORT // 2, 1), {"kind": 2}, "plain values"),
    "five channels": ((np.stack([SHORT] * 5, 1).astype(np.uint8), 5), {"extra": [0, 0]}, "has 5 × 8 bits"),
    "a fourth": ((np.stack([SHORT] * 4, 1).astype(np.uint8), 4), {"extra": 0}, "has 4 × 8 bits"),
    "Lab": ((np.stack([SHORT] * 3).astype(np.uint8), 3), {"colours": 8}, "plain values"),
    "white is 0, 8 bits": ((SHORT.astype(np.uint8), 1), {"colours": 0}, "plain values"),
    "white is 0, 16 bits": ((SHORT, 1), {"colours": 0}, "plain values"),
    "32 bits": ((SHORT.astype(np.uint32), 1), {}, "has 1 × 32 bits"),
    "floats": ((SHORT.astype(np.float32), 1), {"kind": 3}, "has 1 × 32 bits"),
    "a preview first": ((SHORT.astype(np.uint8), 1), {"page": 1}, "or of a preview"),
    "no rows": ((SHORT, 1), {"strips": 0}, "rows of it are not in"),
    "half of its rows": ((SHORT, 1), {"rows": 8}, "rows of it are not in"),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_that_is_not_plain_is_refused(tmp_path, kind):
    (values, bands), tags, message = TIFFS[kind]
    tiff(tmp_path / "a.tif", values, bands, **tags)
    with pytest.raises(ValueError, match=message):
        image_file.read_image(tmp_path / "a.tif", 16)


@pytest.mark.parametrize(
    "description, is_stack",
    [
        ("ImageJ=1.54\nimages=3\nslices=3\n", True),
        ("ImageJ=1.54\nimages=1\n", False),
        ('{"shape": [3, 16, 16]}', True),
        ('{"shape": [16, 16]}', False),
    ],
)
def test_a_tiff_that_is_a_stack_is_refused(tmp_path, description, is_stack):
    grey(HALF).save(tmp_path / "a.tif", description=description)
    with pytest.raises(ValueError, match="several images") if is_stack else contextlib.nullcontext():
        image_file.read_image(tmp_path / "a.tif", 16)


def test_a_tiff_of_pages_is_refused(tmp_path):
    grey(HALF).save(tmp_path / "a.tif", **FRAMES)
    with pytest.raises(ValueError, match="several images"):
        image_file.read_image(tmp_path / "a.tif", 16)


def test_floats_and_unknown_formats_are_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"Pf\n16 16\n-1.0\n" + RAMP.astype("<f4").tobytes())
    with pytest.raises(ValueError, match="floats do not say what is white"):
        image_file.read_image(tmp_path / "a.ppm", 16)
    grey(RAMP).save(tmp_path / "a.png", format="SGI")
    with pytest.raises(ValueError, match="a SGI file, whatever its suffix"):
        image_file.read_image(tmp_path / "a.png", 16)


STACKS = {  # files that hold several images, of which Pillow sees one
    "a.jpg": lambda one: one("JPEG") * 3,
    "a.png": lambda one: one("PNG") * 3,
    "a.pgm": lambda one: one("PPM") * 3,
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_an_image_that_was_copied_in_part_is_refused(tmp_path, name):
    """Its length is right, and zeros follow."""
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    options = {"quality": 98} if name == "a.jpg" else {}
    Image.fromarray(noise).save(tmp_path / name, **options)
    image_file.decode(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for kept in (len(content) - 5, len(content) - 20, len(content) * 3 // 4):
        (tmp_path / name).write_bytes(content[:kept] + bytes(len(content) - kept))
        with pytest.raises((ValueError, SyntaxError, OSError)):
            image_file.decode(tmp_path / name)


def test_bytes_that_fill_before_a_jpegs_mark_are_none_of_its_length(tmp_path):
    grey(HALF).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:2] + b"\xff\xff" + content[2:])
    image_file.read_image(tmp_path / "a.jpg", 16)


@pytest.mark.parametrize("content, said", [(b"", "it is empty"), (b"<html>", "it begins with b'<html>'")])
def test_what_is_no_image_is_told_by_how_it_begins(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        image_file.read_image(tmp_path / "a.jpg", 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm", "ascii.ppm", "transparent.png"])
def test_the_largest_value_of_deep_colours_is_known(tmp_path, name):
    values = np.stack([SHORT // 8] * 3, 1)
    if name == "transparent.png":  # on white, but that is not the file's
        values = np.concatenate([values, np.repeat([0, 65_535], 128)[:, None]], 1)
    rows = [values[16 * i : 16 * i + 16].astype(">u2").tobytes() for i in range(16)]
    if name == "a.tif":
        tiff(tmp_path / name, values, 3)
    elif name == "a.ppm":
        (tmp_path / name).write_bytes(b"P6\n# by a scanner\n16 16\n65535\n" + b"".join(rows))
    elif name == "ascii.ppm":
        (tmp_path / name).write_text("P3 16 16 65535\n" + " ".join(map(str, values.ravel())))
    else:
        (tmp_path / name).write_bytes(png(16, 6 if name == "transparent.png" else 2, rows, b""))
    low, high = image_file.decode(tmp_path / name).info["range"]
    assert low == 0 and 8_191 <= high < 8_192 + 256


@pytest.mark.parametrize("name", STACKS)
def test_images_behind_the_first_are_told(tmp_path, name):
    def one(kind, **options):
        stream = io.BytesIO()
        grey(HALF).save(stream, format=kind, **options)
        return stream.getvalue()

    (tmp_path / name).write_bytes(STACKS[name](one))
    assert image_file.decode(tmp_path / name).info["frames"] == 3


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "RGB"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_turned_tiff_that_is_not_square_is_read(tmp_path, mode, turn):
    """By its path, Pillow would map most of these into memory with width and height exchanged."""
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))
    deep = mode == "I;16"
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if deep else Image.fromarray(ramp).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.tif", exif=exif)
    read = np.asarray(image_file.decode(tmp_path / "a.tif").convert("L")).astype(int)
    expected = np.rot90(ramp, {1: 0, 3: 2, 6: -1, 8: 1}[turn]).astype(int)
    assert read.shape == expected.shape and abs(read - expected).max() <= 1


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_of_plain_values_is_read(tmp_path, bands, kind):
    values = np.stack([SHORT // (2**i) for i in range(bands)], 1)
    tiff(tmp_path / "a.tif", (values // 256).astype(kind) if kind == np.uint8 else values, bands)
    read = image_file.read_image(tmp_path / "a.tif", 16)
    assert (read.reshape(256, bands) == values // 256).all()


def png(bits, colours, rows, key):
    """A PNG of 16 x 16 pixels by the format's own description, with a transparent value."""

    def part(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", 16, 16, bits, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *[(b"tRNS", key)] * bool(key), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part(*one) for one in parts)


@pytest.mark.parametrize("bits, samples", [(2, 1), (4, 1), (16, 3)])
def test_a_transparent_value_that_pillow_mistakes_is_refused(tmp_path, bits, samples):
    """It compares the value as it stands in the file with pixels that were brought to 8 bits."""
    key = struct.pack(">H", 1 if bits < 16 else 0x1200) * samples  # its lower byte is that of black
    row = bytes([0x1B if bits == 2 else 0x01] * (16 * bits // 8)) if bits < 16 else bytes(16 * 6)
    (tmp_path / "a.png").write_bytes(png(bits, 2 if samples == 3 else 0, [row] * 16, key))
    with pytest.raises(ValueError, match="mistake its transparent value"):
        image_file.read_image(tmp_path / "a.png", 16)


def test_a_transparent_value_of_8_bits_is_white(tmp_path):
    row = bytes([7, 7, 7, 0, 0, 0] * 8)
    (tmp_path / "a.png").write_bytes(png(8, 2, [row] * 16, struct.pack(">H", 7) * 3))
    read = image_file.read_image(tmp_path / "a.png", 16)
    assert (read[:, ::2] == 255).all() and (read[:, 1::2] == 0).all()


@pytest.mark.parametrize("only_grey", [True, False])
def test_the_program_of_the_readme_reads_what_training_read(tmp_path, monkeypatch, only_grey):
    """Its own code, with a session that keeps what it is given; on a folder that holds every kind."""
    coloured = ("palette", "cmyk", "rgba", "key.gif", "animated")
    for name in KINDS:
        if not (only_grey and name.startswith(coloured)):
            for sub in ("a", "b"):
                write(tmp_path / "own" / sub, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "identical images"
        loaded = data.load(f"imagefolder:{tmp_path / 'own'}", size=12)
    assert loaded.channels == (1 if only_grey else 3)
    about = {"size": 12, "channels": loaded.channels, "mean": loaded.mean, "std": loaded.std}
    (tmp_path / "net.onnx.json").write_text(json.dumps(about | {"classes": loaded.classes}))
    given = []

    class Session:
        def __init__(self, file):
            assert file == "net.onnx"

        def run(self, names, feed):
            given.append(feed["images"])
            return [np.array([[0.0, 1.0]])]

    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=Session))
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "InferenceSession" in c]
    compared = 0
    for which, by_class in loaded.folder.files.items():
        split = getattr(loaded, which)
        trained = loaded.normalize(split.images)
        for number, file in enumerate(by_class["a"]):
            monkeypatch.setattr(sys, "argv", ["program", str(file)])
            exec(code, {})
            assert split.labels[number] == 0
            torch.testing.assert_close(torch.tensor(given[-1][0]), trained[number], msg=file.name)
            compared += 1
    assert compared == len(list((tmp_path / "own" / "a").iterdir()))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_format_that_pillow_misreads_is_refused_whatever_its_suffix(tmp_path, name):
    grey(RAMP).save(tmp_path / name, format="TGA" if name == "a.png" else "JPEG2000")
    with pytest.raises(ValueError, match="whatever its suffix: convert it to PNG"):
        image_file.read_image(tmp_path / name, 16)


def test_cmyk_that_does_not_say_what_is_ink_is_refused(tmp_path):
    cmyk().save(tmp_path / "a.jpg", quality=100)
    content = (tmp_path / "a.jpg").read_bytes()
    start = content.index(b"\xff\xee")  # APP14, Adobe's mark
    (tmp_path / "a.jpg").write_bytes(content[:start] + content[start + 16 :])
    with pytest.raises(ValueError, match="CMYK, and not said whether 0 is ink or paper"):
        image_file.read_image(tmp_path / "a.jpg", 16)


def test_an_image_is_reduced_with_antialias_and_its_middle_kept(tmp_path):
    stripes = np.zeros((64, 192), np.uint8)
    stripes[:, 64:128:2] = 255  # the middle third: one-pixel stripes that must become an even grey
    grey(stripes).save(tmp_path / "a.png")
    inside = image_file.read_image(tmp_path / "a.png", 8)[:, 1:-1].astype(float)
    assert abs(inside.mean() - 127.5) < 8 and inside.std() < 8
