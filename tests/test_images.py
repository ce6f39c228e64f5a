"""Own images: each kind of file against what was written into it, each layout against what it is."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from nnc_utils import data, image_folder, images

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
    "32small.tif": (grey(RAMP, np.int32), {}, RAMP, 0),
    "32.tif": (grey(RAMP * 256.0 + 7, np.int32), {}, RAMP, 0),
    "float1.tif": (grey(RAMP / 255, np.float32), {}, RAMP, 0),
    "float255.tif": (grey(RAMP, np.float32), {}, RAMP, 0),
    "la.png": (with_alpha("L"), {}, 255 - RAMP, 1),
    "rgba.png": (with_alpha("RGB"), {}, 255 - RAMP, 1),
    "rgba.webp": (with_alpha("RGB"), {"lossless": True, "exact": True}, 255 - RAMP, 1),
    "key.png": (grey(HALF), {"transparency": 0}, HALF * 0 + 255, 0),
    "key.gif": (grey(HALF), {"transparency": 0}, HALF * 0 + 255, 0),
    "palette.png": (palette(), {}, BLUE_BELOW, 0),
    "palette.gif": (palette(), {}, BLUE_BELOW, 0),
    "cmyk.tif": (cmyk(), {}, RED_WHITE, 0),
    "cmyk.jpg": (cmyk(), {"quality": 100}, RED_WHITE, 8),
    "animated.gif": (grey(HALF), FRAMES, HALF, 0),
    "animated.webp": (grey(HALF).convert("RGB"), FRAMES | {"lossless": True}, HALF, 0),
    "pages.tif": (grey(HALF), FRAMES, HALF, 0),
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
    read = images.read_image(tmp_path / name, 16).astype(int)
    expected = np.broadcast_to(expected.reshape(16, 16, -1), (16, 16, 3)).astype(int)
    assert np.abs(np.broadcast_to(read, (16, 16, 3)) - expected).max() <= off


def test_a_pgm_of_16_bits_is_scaled_by_its_type(tmp_path):
    for name, most, expected in (("deep", 65_535, RAMP * 0), ("8", 255, RAMP)):
        kind = ">u2" if most > 255 else "u1"
        (tmp_path / f"{name}.pgm").write_bytes(b"P5 16 16 %d\n" % most + RAMP.astype(kind).tobytes())
        assert (images.read_image(tmp_path / f"{name}.pgm", 16)[..., 0] == expected).all()


@pytest.mark.parametrize("orientation, turned", [(3, HALF[::-1, ::-1]), (6, HALF.T), (8, HALF.T[::-1])])
def test_an_image_is_turned_as_its_camera_was(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey(HALF).save(tmp_path / "a.png", exif=exif)
    assert (images.read_image(tmp_path / "a.png", 16)[..., 0] == turned).all()


@pytest.mark.parametrize(
    "values", [RAMP - 1.0, RAMP * 2.0, RAMP * np.nan, RAMP.astype(np.int32) - 9, RAMP.astype(np.int32) * 999]
)
def test_a_range_that_is_not_clear_is_refused(tmp_path, values):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"its values \([FI]\) go from"):
        images.read_image(tmp_path / "a.tif", 16)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_0_is_white_is_inverted_or_refused(tmp_path, bits):
    grey(HALF if bits == 8 else HALF * 257.0, np.uint8 if bits == 8 else np.uint16).save(tmp_path / "a.tif")
    black_is_0 = bytes.fromhex("06010300010000000100")  # the photometric tag, one short, of value 1
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content.replace(black_is_0, black_is_0[:-2] + bytes(2)))
    if bits == 8:
        assert (images.read_image(tmp_path / "a.tif", 16)[..., 0] == 255 - HALF).all()
    else:
        with pytest.raises(ValueError, match="0 is white"):
            images.read_image(tmp_path / "a.tif", 16)


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
TIFFS = {  # what Pillow opens and reads as other values, without a word
    "planes of 16 bits": ((np.stack([SHORT, SHORT // 2, SHORT // 4]), 3), {"planar": 2}, "such planes"),
    "signed, 8 bits": ((np.arange(256, dtype=np.uint8), 1), {"kind": 2}, "are signed, of 8 bits"),
    "signed, 16 bits": ((SHORT // 2, 1), {"kind": 2}, "are signed, of 16 bits"),
    "five channels": ((np.stack([SHORT] * 5, 1).astype(np.uint8), 5), {"extra": [0, 0]}, "of its 5 channels"),
    "a preview first": ((SHORT.astype(np.uint8), 1), {"page": 1}, "its first page is a preview or a mask"),
    "planes of Lab": (
        (np.stack([SHORT] * 3).astype(np.uint8), 3),
        {"planar": 2, "colours": 8},
        r"such planes \(LAB",
    ),
    "a fourth": ((np.stack([SHORT] * 4, 1).astype(np.uint8), 4), {"extra": 0}, "of its 4 channels"),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_that_pillow_misreads_is_refused(tmp_path, kind):
    (values, bands), tags, message = TIFFS[kind]
    tiff(tmp_path / "a.tif", values, bands, **tags)
    with pytest.raises(ValueError, match=message):
        images.read_image(tmp_path / "a.tif", 16)


@pytest.mark.parametrize("tags", [{"strips": 0}, {"rows": 8}, {"top": 4095}])
def test_a_tiff_that_lacks_rows_or_has_another_white_is_refused(tmp_path, tags):
    tiff(tmp_path / "a.tif", SHORT, **tags)
    with pytest.raises(ValueError, match="its white is 4095" if "top" in tags else "rows of it are not in"):
        images.read_image(tmp_path / "a.tif", 16)


STACKS = {  # files that hold several images, of which Pillow sees one
    "a.jpg": lambda one: one("JPEG") * 3,
    "a.png": lambda one: one("PNG") * 3,
    "a.pgm": lambda one: one("PPM") * 3,
    "imagej.tif": lambda one: one("TIFF", description="ImageJ=1.54\nimages=3\nslices=3\n"),
    "shape.tif": lambda one: one("TIFF", description='{"shape": [3, 16, 16]}'),
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_an_image_that_was_copied_in_part_is_refused(tmp_path, name):
    """Its length is right, and zeros follow."""
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    options = {"quality": 98} if name == "a.jpg" else {}
    Image.fromarray(noise).save(tmp_path / name, **options)
    images.decode(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for kept in (len(content) - 5, len(content) - 20, len(content) * 3 // 4):
        (tmp_path / name).write_bytes(content[:kept] + bytes(len(content) - kept))
        with pytest.raises((ValueError, SyntaxError, OSError)):
            images.decode(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_the_largest_value_of_deep_colours_is_known(tmp_path, name):
    values = np.stack([SHORT // 8] * 3, 1)
    if name == "a.tif":
        tiff(tmp_path / name, values, 3)
    else:
        rows = [values[16 * i : 16 * i + 16].astype(">u2").tobytes() for i in range(16)]
        (tmp_path / name).write_bytes(png(16, 2, rows, b""))
    assert 8_191 <= images.decode(tmp_path / name).info["top"] < 8_192 + 256


@pytest.mark.parametrize("name", STACKS)
def test_images_behind_the_first_are_told(tmp_path, name):
    def one(kind, **options):
        stream = io.BytesIO()
        grey(HALF).save(stream, format=kind, **options)
        return stream.getvalue()

    (tmp_path / name).write_bytes(STACKS[name](one))
    assert images.decode(tmp_path / name).info["frames"] == 3


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "CMYK", "RGB"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_turned_tiff_that_is_not_square_is_read(tmp_path, mode, turn):
    """By its path, Pillow would map most of these into memory with width and height exchanged."""
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))
    deep = mode == "I;16"
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if deep else Image.fromarray(ramp).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.tif", exif=exif)
    read = np.asarray(images.decode(tmp_path / "a.tif").convert("L")).astype(int)
    expected = np.rot90(ramp, {1: 0, 3: 2, 6: -1, 8: 1}[turn]).astype(int)
    assert read.shape == expected.shape and abs(read - expected).max() <= 1


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_of_plain_values_is_read(tmp_path, bands, kind):
    values = np.stack([SHORT // (2**i) for i in range(bands)], 1)
    tiff(tmp_path / "a.tif", (values // 256).astype(kind) if kind == np.uint8 else values, bands)
    read = images.read_image(tmp_path / "a.tif", 16)
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
        images.read_image(tmp_path / "a.png", 16)


def test_a_transparent_value_of_8_bits_is_white(tmp_path):
    row = bytes([7, 7, 7, 0, 0, 0] * 8)
    (tmp_path / "a.png").write_bytes(png(8, 2, [row] * 16, struct.pack(">H", 7) * 3))
    read = images.read_image(tmp_path / "a.png", 16)
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


# --- Which files -------------------------------------------------------------------------------------


def paint(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 60), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], *channels)).astype(np.uint8)
    Image.fromarray(pixels, mode if mode == "LA" else None).save(path)


def fill(root, counts=SMALL, first=0):
    """Different small images: so many in each folder; the seeds that were used end before the result."""
    for name, count in counts.items():
        for number in range(count):
            paint(root / name / f"{number}.png", size=(6, 6), seed=first)
            first += 1
    return first


@pytest.fixture
def own(tmp_path):
    """Two classes of ten colour images of many sizes and kinds."""
    suffixes = (".png", ".jpg", ".bmp", ".PNG", ".webp")
    for i in range(10):
        for seed, name in enumerate(("cat", "dog")):
            size = (60 + 4 * i, 90 - 3 * i)
            paint(tmp_path / "own" / name / f"{i}{suffixes[i % 5]}", size=size, seed=2 * i + seed)
    return tmp_path / "own"


def load(root, size=8):
    return data.load(f"imagefolder:{root}", size=size)


def labels(loaded):
    return {w: torch.bincount(getattr(loaded, w).labels).tolist() for w in data.SPLITS}


def read_files(loaded):
    return [file for by_class in loaded.folder.files.values() for file in sum(by_class.values(), [])]


def test_class_folders_are_split_by_class(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to tell
        loaded = load(own, 16)
    assert loaded.classes == ("cat", "dog") and loaded.flip
    assert (loaded.channels, loaded.size) == (3, 16)
    assert labels(loaded) == {"train": [7, 7], "validation": [1, 1], "test": [2, 2]}
    assert data.load(f"imagefolder:{own}").size == 32
    assert torch.equal(loaded.test.images, load(own, 16).test.images)
    assert loaded.folder.files == data.load(f"imagefolder:{own}").folder.files  # whatever the size


def test_every_file_is_read_or_left_out_with_a_reason(own):
    seed = 100
    for hidden in (".x", "__MACOSX", "@eaDir", "deep/.git"):  # copies that must not be read
        seed = fill(own / "cat" / hidden, {"": 2, "inner": 1}, seed)
    fill(own, {".trash": 1, "cat/deep/deeper": 1}, 200)
    for name in ("cat/notes.txt", "cat/._0.png", "dog/Thumbs.db", "dog/IMG_0001", "labels.csv"):
        (own / name).write_text("no image")
    paint(own / "cover.png", seed=300)
    paint(own / "dog" / "old.png" / "a.png", seed=301)  # a folder
    (own / "cat" / "more").symlink_to(own.parent)
    (own / "dog" / "gone.png").symlink_to(own / "nowhere.png")
    with pytest.warns(UserWarning) as told:
        loaded = load(own)
    left = {reason: len(files) for reason, files in loaded.folder.left_out.items()}
    assert left == {
        image_folder.HIDDEN: 4 * 3 + 1 + 2,
        image_folder.OTHER_SUFFIX: 3,
        image_folder.NO_CLASS: 1,
        image_folder.LINKED: 1,
        image_folder.NO_FILE: 1,
    }
    [message] = [str(w.message) for w in told]
    lines = message.splitlines()[1:]
    assert len(lines) == 6 and "in folders inside class folders, read as of the class: 2, such as" in message
    assert "left out: 3, no suffix of an image, such as labels.csv" in message
    everything = {Path(place) / name for place, _, names in os.walk(own) for name in names}
    everything.add(own / "cat" / "more")
    accounted = read_files(loaded) + sum(loaded.folder.left_out.values(), [])
    assert sorted(accounted) == sorted(everything)
    read = {str(file.relative_to(own)) for file in read_files(loaded)}
    assert len(read) == 22 and {"cat/deep/deeper/0.png", "dog/old.png/a.png"} <= read


def test_linked_class_folders_and_files_are_followed(own, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(own / name)
    paint(tmp_path / "elsewhere.png", seed=99)
    (own / "dog" / "one.png").symlink_to(tmp_path / "elsewhere.png")
    assert len(read_files(load(tmp_path / "linked"))) == 21


def test_a_class_may_be_called_anything_that_is_visible(tmp_path):
    fill(tmp_path, dict.fromkeys(("__none__", "train", "été #1", "contest"), 4))
    assert load(tmp_path).classes == ("__none__", "contest", "train", "été #1")


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("train", "val", "test"),
        ("Train", "valid", "TEST"),
        ("training", "Validation", "testing"),
        ("training_set", "eval", "test_images"),
        ("images-train", "dev", "TestData"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_splits_have_many_names(tmp_path, train, validation, test):
    first = 0
    for name, count in ((train, 5), (validation, 2), (test, 3)):
        first = fill(tmp_path / name, dict.fromkeys(("a", "b/deeper"), count), first)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").touch()
    with pytest.warns(UserWarning, match="left out: 1, no suffix"):
        loaded = load(tmp_path)
    assert labels(loaded) == {"train": [5, 5], "validation": [2, 2], "test": [3, 3]}
    assert str(tmp_path / test) in loaded.folder.origin["test"]
    for split in ("validation", "test"):
        for file in sum(loaded.folder.files[split].values(), []):
            assert file.is_relative_to(tmp_path / (validation if split == "validation" else test))


def test_a_split_without_a_folder_is_taken_from_train(tmp_path):
    fill(tmp_path / "test", SMALL, fill(tmp_path / "train"))
    loaded = load(tmp_path)
    assert labels(loaded) == {"train": [9, 9], "validation": [1, 1], "test": [10, 10]}
    assert loaded.folder.origin["validation"].startswith("1 in 10")


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "train/b", "holdout/a", "holdout/b"),
        ("train/a", "train/b", "cat"),
        ("train/a", "train/b", "val/a", "val/b", "valid/a", "valid/b"),  # which one?
        ("Test/a", "Test/b", "eval/a", "eval/b"),  # no train
        ("train_v2/a", "train_v2/b", "test_v2/a", "test_v2/b"),
        ("train/a", "train/b", "test"),  # images without labels
        ("train", "test"),
        ("cat", "dog", "test"),
        ("trainset/a", "trainset/b", "rest/a", "rest/b"),
        ("cat_train", "cat_test", "dog_train", "dog_test"),
        ("trainA", "trainB", "testA", "testB"),
    ],
)
def test_splits_that_are_none_are_refused_with_what_to_rename(tmp_path, folders):
    fill(tmp_path, dict.fromkeys(folders, 4))
    top = [path.name for path in sorted(tmp_path.iterdir())]
    with pytest.raises(data.DataError, match="mixes splits with something else") as refused:
        load(tmp_path)
    assert all(f"{name} (" in str(refused.value) for name in top) and "name its folders" in str(refused.value)


@pytest.mark.parametrize("second", ["b", "other"])
def test_classes_that_may_be_splits_are_told(tmp_path, second):
    fill(tmp_path, dict.fromkeys(("imagesTr/a", "imagesTr/b", "imagesTs/a", f"imagesTs/{second}"), 4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert load(tmp_path).classes == ("imagesTr", "imagesTs")
    [message] = [str(w.message) for w in told]
    assert ("all classes hold the folders a, b" in message) is (second == "b")
    assert "in folders inside class folders, read as of the class: 16, such as" in message


@pytest.mark.parametrize(
    "folders",
    [
        ("a/test", "b/test", "a", "b"),  # its own test images would be trained on
        ("a/train", "a/test", "b/train", "b/test"),
        ("a", "b", "b/deeper/Validation"),
        ("train/a", "train/b", "train/b/val"),
    ],
)
def test_splits_inside_classes_are_refused(tmp_path, folders):
    fill(tmp_path, dict.fromkeys(folders, 4))
    with pytest.raises(data.DataError, match="hold folders that are called like splits: .*train/CLASS"):
        load(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_whose_name_is_no_text_is_refused(tmp_path, name):
    fill(tmp_path, SMALL)
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/" + name)
    with pytest.raises(data.DataError, match=r"names of classes .*'(caf.udce9|two.nlines)'. Rename"):
        load(tmp_path)


def test_an_empty_split_is_not_replaced_in_silence(tmp_path):
    fill(tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(data.DataError, match=r"val \(validation, without class folders\)"):
        load(tmp_path)


def test_too_few_images_or_classes_and_unlike_splits_are_refused(tmp_path, own):
    fill(tmp_path / "classes", {"train": 1, "ship": 1})
    with pytest.raises(data.DataError, match="classes needs.*there are ship: 1, train: 1"):
        load(tmp_path / "classes")
    with pytest.raises(data.DataError, match="no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="empty needs 2 to 256 class folders.*there are none"):
        load(tmp_path / "empty")
    for i in range(2, 10):
        next((own / "cat").glob(f"{i}.*")).unlink()
    with pytest.raises(data.DataError, match="at least 3 images each.*there are cat: 2, dog: 10"):
        load(own)
    fill(tmp_path / "unlike", {"train/a": 4, "train/b": 4, "test/a": 4})
    with pytest.raises(data.DataError, match="test needs.*the same in every split.*there are a: 4"):
        load(tmp_path / "unlike")


def test_more_classes_than_a_byte_holds_are_refused_before_any_image_is_opened(tmp_path):
    for number in range(257):
        for name in "012":
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / f"{name}.png").touch()
    with pytest.raises(data.DataError, match="2 to 256 class folders.*and 237 more"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["HEIC", "tga", "jp2"])
def test_formats_that_pillow_does_not_open_or_misreads_are_refused(own, suffix):
    (own / "cat" / f"photo.{suffix}").touch()
    with pytest.raises(
        data.DataError, match=rf"\.{suffix} cannot be read here: 1 files, .*photo.*pillow-heif"
    ):
        load(own)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_format_that_pillow_misreads_is_refused_whatever_its_suffix(tmp_path, name):
    grey(RAMP).save(tmp_path / name, format="TGA" if name == "a.png" else "JPEG2000")
    with pytest.raises(ValueError, match="whatever its suffix: convert it to PNG"):
        images.read_image(tmp_path / name, 16)


def test_cmyk_that_does_not_say_what_is_ink_is_refused(tmp_path):
    cmyk().save(tmp_path / "a.jpg", quality=100)
    content = (tmp_path / "a.jpg").read_bytes()
    start = content.index(b"\xff\xee")  # APP14, Adobe's mark
    (tmp_path / "a.jpg").write_bytes(content[:start] + content[start + 16 :])
    with pytest.raises(ValueError, match="CMYK, and not said whether 0 is ink or paper"):
        images.read_image(tmp_path / "a.jpg", 16)


def test_unreadable_images_are_named_together(own):
    for name in ("cat", "dog"):
        for file in sorted((own / name).iterdir())[:4]:
            file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(data.DataError, match="8 of 20 images cannot be read") as refused:
        load(own)
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 + image_folder.NAMED + 1 and "0.png" in lines[1] and lines[-1].strip() == "…"


def test_an_image_that_lost_its_contents_is_told(own):
    grey(RAMP, np.uint16).save(own / "cat" / "dark.png")  # 8 bits in 16: nearly black
    with pytest.warns(UserWarning, match="nearly one colour: 1 images, .*dark.png"):
        load(own)


# --- The splits that are held out ----------------------------------------------------------------------


def test_two_classes_of_twenty_images_are_enough(tmp_path):
    fill(tmp_path, dict.fromkeys(("a", "b"), 20))
    assert labels(load(tmp_path)) == {"train": [14, 14], "validation": [2, 2], "test": [4, 4]}
    fill(tmp_path / "least", dict.fromkeys(("a", "b"), 3))
    assert labels(load(tmp_path / "least")) == {w: [1, 1] for w in data.SPLITS}


def places(loaded):
    files = {which: sum(by_class.values(), []) for which, by_class in loaded.folder.files.items()}
    return {file.name: which for which, own in files.items() for file in own}


def test_an_image_more_moves_few_others_and_names_do_not_matter(tmp_path):
    for number in range(100):
        paint(tmp_path / "ab"[number % 2] / f"{number}.png", size=(6, 6), seed=number)
    before = places(load(tmp_path))
    for number in range(100, 104):
        paint(tmp_path / "ab"[number % 2] / f"0{number}.png", size=(6, 6), seed=number)  # sorts first
    after = places(load(tmp_path))
    moved = [name for name in before if before[name] != after[name]]
    assert len(moved) <= 8  # each pushes one image at most out of test and one out of validation
    test = load(tmp_path).test.images
    for file in list(tmp_path.rglob("*.png")):
        file.rename(file.with_name(f"{hash(file.name) % 1000}_{file.name}"))
    renamed = load(tmp_path).test.images
    assert sorted(i.numpy().tobytes() for i in test) == sorted(i.numpy().tobytes() for i in renamed)


def test_identical_images_stay_in_one_split_and_are_told(tmp_path):
    fill(tmp_path, dict.fromkeys(("a", "b"), 4))
    for number in range(4):
        for copy in range(3):  # other bytes, the same pixels
            with Image.open(tmp_path / "a" / f"{number}.png") as image:
                image.save(tmp_path / "a" / f"{number}_{copy}.bmp")
    Image.open(tmp_path / "a" / "0.png").save(tmp_path / "b" / "same.png")
    with pytest.warns(UserWarning, match="identical images: 17 files of 4, .*(?s:.)*in two classes: 1,"):
        loaded = load(tmp_path)
    seen = {w: {i.numpy().tobytes() for i in getattr(loaded, w).images} for w in data.SPLITS}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"])
    assert not seen["test"] & seen["validation"]


def test_too_few_different_images_are_refused_with_the_number_needed(tmp_path):
    fill(tmp_path, {"a": 4, "b": 2})
    for copy in range(6):
        Image.open(tmp_path / "b" / "0.png").save(tmp_path / "b" / f"copy{copy}.png")
    with pytest.raises(data.DataError, match="no image is left for b in train.*at least 3 different ones"):
        load(tmp_path)


def test_identical_images_in_two_split_folders_are_refused(tmp_path):
    fill(tmp_path / "test", SMALL, fill(tmp_path / "train"))
    for number in range(7):
        with Image.open(tmp_path / "train" / "cat" / f"{number}.png") as image:
            image.save(tmp_path / "test" / "cat" / f"again{number}.bmp")
    with pytest.raises(data.DataError, match="images, 7 pairs, .*keep each in one split") as refused:
        load(tmp_path)
    assert str(refused.value).count(" and ") == image_folder.NAMED


# --- What is passed on ---------------------------------------------------------------------------------


def test_an_image_is_reduced_with_antialias_and_its_middle_kept(tmp_path):
    stripes = np.zeros((64, 192), np.uint8)
    stripes[:, 64:128:2] = 255  # the middle third: one-pixel stripes that must become an even grey
    grey(stripes).save(tmp_path / "a.png")
    inside = images.read_image(tmp_path / "a.png", 8)[:, 1:-1].astype(float)
    assert abs(inside.mean() - 127.5) < 8 and inside.std() < 8


def test_grey_among_colour_becomes_colour(tmp_path):
    for number, name in enumerate(("a", "b")):
        for i, mode in enumerate(("L", "LA", "L")):
            paint(tmp_path / name / f"{i}.png", mode, seed=2 * i + number)
    assert load(tmp_path).channels == 1
    paint(tmp_path / "a" / "colour.png", seed=9)
    loaded = load(tmp_path)
    assert loaded.channels == 3
    assert torch.equal(loaded.test.images[1, 0], loaded.test.images[1, 1])  # of b, where all are grey


def test_digests_tell_which_images_they_are(own):
    before = load(own).digests()
    assert before == load(own).digests() and before.keys() == set(data.SPLITS)
    (own / "cat").rename(own / "wolf")  # the last label, no longer the first
    assert all(before[which] != digest for which, digest in load(own).digests().items())


def test_labels_need_no_second_reading(own, monkeypatch):
    loaded = load(own, 12)
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(data.test_labels(f"imagefolder:{own}"), loaded.test.labels)


def test_the_command_prints_what_it_found(own, tmp_path):
    (own / "cat").rename(own / "猫")
    (own / "dog" / "notes.txt").touch()
    command = [sys.executable, "-m", "nnc_utils.data", f"imagefolder:{own}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "14 train, 2 validation, 4 test; images 3 x 32 x 32; 2 classes: dog, \\u732b" in done.stdout
    assert "class \\u732b: 7 train, 1 validation, 2 test" in done.stdout
    assert "test: 1 in 5 of each class" in done.stdout and f"train: the folder {own}" in done.stdout
    assert "left out: 1, no suffix of an image, such as dog/notes.txt" in done.stdout
