#!/usr/bin/env bash
# Pillow 13.0.0 with colour TIFFs of 16 bits, stored plane by plane (PlanarConfiguration 2; written by
# tifffile 2026.3.3).
# Expected: one and the same image, whether the planes are compressed or not: Pillow's RGB has 8 bits, so the
#   upper byte of each number. What Pillow cannot read it refuses.
# Seen: compressed (deflate, LZW, PackBits) and interleaved files are read so. Without compression each byte
#   is taken for a pixel: low and high byte in turn, the upper half of the image alone, stretched over the
#   whole. Errors of up to 255, in the mode and the size that are right; no error, no warning.
# Bands beyond red, green and blue: compressed planes open as RGB, and the others are gone without a word;
#   without compression the same file is refused. tifffile reads all bands of both.
# Where it shows: scans and microscope images, where planes and 16 bits are common; classes that differ in how
#   their files were written.
# Fails where Pillow behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy
cd "$folder" && "$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import PIL
import tifffile
from PIL import Image, UnidentifiedImageError

HEIGHT, WIDTH = 40, 60
random = np.random.default_rng(0)


def write(planes, planar, compression):
    """The file, and what tifffile reads in it: height x width x bands."""
    stored = planes if planar == "separate" else np.moveaxis(planes, 0, -1)
    tifffile.imwrite(
        "image.tif",
        stored,
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        extrasamples=["unspecified"] * (len(planes) - 3),
    )
    read = tifffile.imread("image.tif")
    return np.moveaxis(read, 0, -1) if planar == "separate" else read


def opened():
    with Image.open("image.tif") as image:
        return image.mode, np.asarray(image)


print("Pillow", PIL.__version__, "tifffile", tifffile.__version__)
planes = random.integers(0, 2**16, (3, HEIGHT, WIDTH), np.uint16)
flat_bytes = planes.astype("<u2").view(np.uint8).reshape(3, -1)
halves = np.moveaxis(flat_bytes[:, : HEIGHT * WIDTH].reshape(3, HEIGHT, WIDTH), 0, -1)
for planar in ("contig", "separate"):
    for compression in (None, "zlib", "lzw", "packbits"):
        right = write(planes, planar, compression)
        assert np.array_equal(right, np.moveaxis(planes, 0, -1)), "tifffile reads something else"
        mode, seen = opened()
        error = int(np.abs(seen.astype(int) - (right >> 8)).max())
        print(f"{planar}, {compression or 'uncompressed'}: mode {mode}, at most {error} from the upper bytes")
        assert mode == "RGB" and seen.shape == right.shape, "another mode or size than was seen"
        if planar == "separate" and compression is None:
            assert error > 200 and np.array_equal(seen, halves), "something else than bytes as pixels"
        else:
            assert error == 0, "wrong here, too"

planes = random.integers(0, 2**8, (5, HEIGHT, WIDTH), np.uint8)
for compression in (None, "zlib"):
    right = write(planes, "separate", compression)
    assert np.array_equal(right, np.moveaxis(planes, 0, -1)), "tifffile reads something else"
    try:
        mode, seen = opened()
    except UnidentifiedImageError:
        mode, seen = "refused", None
    print(f"{len(planes)} bands of 8 bits, {compression or 'uncompressed'}: {mode}")
    assert mode == ("refused" if compression is None else "RGB"), "changed"
    assert seen is None or np.array_equal(seen, right[..., :3]), "changed"
print("as described")
PYTHON
