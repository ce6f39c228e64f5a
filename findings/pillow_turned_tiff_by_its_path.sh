#!/usr/bin/env bash
# Pillow 13.0.0 with an uncompressed grey TIFF of one strip, not square, whose Orientation tag says "turned by 90°".
# Expected: the same pixels whether Image.open gets the file's path or the open file.
# Seen: by the path its pixels are scrambled, rows cut at the wrong length; by the open file they are right. No error, no
#   warning. Grey of 8 and 16 bits, palettes, RGBA and CMYK are hit; RGB, LZW, several strips and square images are not.
# Why: only by a path Pillow maps the strip into memory, and by then it has exchanged width and height.
# Fails where Pillow behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.3.5
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os

import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__)
path = os.path.join(os.environ["FOLDER"], "a.tif")
ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))
exif = Image.Exif()
for mode in ("L", "RGB"):
    for orientation, turned in ((1, ramp), (6, np.rot90(ramp, -1))):
        exif[0x0112] = orientation
        Image.fromarray(ramp).convert(mode).save(path, exif=exif)
        with Image.open(path) as image:
            by_path = np.asarray(image.convert("L"))
        with open(path, "rb") as file, Image.open(file) as image:
            by_file = np.asarray(image.convert("L"))
        right = [np.array_equal(read, turned) for read in (by_path, by_file)]
        print(f"{mode}, orientation {orientation}: right by its path {right[0]}, by the open file {right[1]}")
        assert right == [not (mode == "L" and orientation == 6), True], "another result than was seen"
        if not right[0]:
            print(f"  by its path: {by_path.shape}, first row {by_path[0, :12].tolist()} ...")
            print(f"  expected: {turned.shape}, first row {turned[0, :12].tolist()} ...")
PYTHON
