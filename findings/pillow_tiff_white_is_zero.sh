#!/usr/bin/env bash
# Pillow 13.0.0 with TIFFs whose PhotometricInterpretation is 0, "WhiteIsZero" (written by tifffile 2026.3.3).
# Expected: one treatment for all depths: either the stored numbers, or 0 shown as white.
# Seen: 8 bits are inverted on reading, so that 0 becomes 255 in mode "L"; 16 bits come as they are stored, in mode
#   "I;16", and nothing in the image object but tag 262 says that they are a negative. A scan of 8 bits and the same
#   scan of 16 bits are each other's negative.
# Fails where Pillow behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os

import numpy as np
import PIL
import tifffile
from PIL import Image

print("Pillow", PIL.__version__, "tifffile", tifffile.__version__)
for kind in (np.uint8, np.uint16):
    top = np.iinfo(kind).max
    stored = np.array([[0, top // 4, top]], kind)
    for photometric in ("minisblack", "miniswhite"):
        path = os.path.join(os.environ["FOLDER"], f"{photometric}.tif")
        tifffile.imwrite(path, stored, photometric=photometric)
        with Image.open(path) as image:
            seen, tag = np.asarray(image), image.tag_v2[262]
            print(f"{kind.__name__} {photometric}: stored {stored.tolist()}, {image.mode} {seen.tolist()}, tag 262 is {tag}")
        inverted = kind is np.uint8 and photometric == "miniswhite"
        assert tag == (photometric == "minisblack")
        assert np.array_equal(seen, top - stored if inverted else stored), "another treatment than was seen"
print("8 bits are inverted, 16 bits are not")
PYTHON
