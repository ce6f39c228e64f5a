#!/usr/bin/env bash
# Pillow 13.0.0 with JPEG 2000 in colour of 16 bits a channel (written by imagecodecs 2026.3.6, lossless).
# Expected: values scaled to 8 bits, white 255; grey files of 16 bits keep all their bits ("I;16") and are right.
# Seen: the brightest values of a colour file come out as 0, so white is black; all others are right to a rounding.
# Why: the shift from 16 to 8 bits rounds up, and what then is 256 is cut to a byte.
# Fails where Pillow behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 imagecodecs==2026.3.6 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import io

import imagecodecs
import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__, "imagecodecs", imagecodecs.__version__)
for channels in (1, 3):
    stored = np.zeros((32, 32, channels), np.uint16)
    for column, value in enumerate((0, 9_000, 65_000, 65_535)):
        stored[:, 8 * column : 8 * column + 8] = value
    stored = stored[..., 0] if channels == 1 else stored
    coded = bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat="jp2"))
    assert np.array_equal(imagecodecs.jpeg2k_decode(coded), stored), "the file itself is right"
    with Image.open(io.BytesIO(coded)) as image:
        seen = np.asarray(image)[0, 4::8].reshape(4, -1)[:, 0].tolist()
        print(f"{channels} channels, mode {image.mode}: 0, 9000, 65000 and 65535 are read as {seen}")
    assert seen == ([0, 9_000, 65_000, 65_535] if channels == 1 else [0, 35, 254, 0]), "another result than was seen"
PYTHON
