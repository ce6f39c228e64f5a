#!/usr/bin/env bash
# torchvision 0.29.1, torch 2.14.1, CPU (x86): v2.ToDtype(dtype, scale=True) from floats to integers.
# Expected: 0 to 1 becomes 0 to the largest integer, whatever the floats' precision: 1 is white, and an image
#   that was scaled to floats comes back. From float32 to uint8 and from float64 to uint16 it is so.
#   Conversions that are not safe raise a RuntimeError, as float32 to int32 does.
# Seen: float32 to uint16, and float16 or bfloat16 to uint8: 1 becomes 0, white is black. The image is
#   multiplied by the largest integer + 1 - 0.001; in these types that rounds up to the largest integer + 1,
#   more than the integer holds. The brightest values below white come out one step too bright: 16 bits scaled
#   to float32 and back differ in 128 of the 65,536 values, 8 bits in float16 in 16 of 256.
#   transforms.functional.convert_image_dtype does the same.
# Where it shows: overexposed sky, paper and masks, in images of 16 bits or in a pipeline in half precision.
# Fails where torchvision behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error - <<'PYTHON'
import torch
import torchvision
from torchvision.transforms import functional, v2


def scaled(image, kind):
    return v2.ToDtype(kind, scale=True)(image)


print("torchvision", torchvision.__version__, "torch", torch.__version__)
seen = {  # floats, integers -> values that change on the way there and back, what white becomes
    (torch.float32, torch.uint8): (0, 255),
    (torch.float16, torch.uint8): (16, 0),
    (torch.bfloat16, torch.uint8): (None, 0),
    (torch.float64, torch.uint16): (0, 65535),
    (torch.float32, torch.uint16): (128, 0),
}
for (floats, integers), (changed, white) in seen.items():
    values = torch.arange(torch.iinfo(integers).max + 1).to(integers).reshape(1, 16, -1)
    back = scaled(scaled(values, floats), integers)
    different = int((back.int() != values.int()).sum())
    one = int(scaled(torch.ones(1, 1, 1, dtype=floats), integers))
    print(f"{integers} as {floats} and back: {different} of {values.numel()} values change; 1 becomes {one}")
    assert one == white == int(back.flatten()[-1]), "white is another value than was seen"
    assert int(functional.convert_image_dtype(torch.ones(1, 1, 1, dtype=floats), integers)) == one, "changed"
    assert changed is None or different == changed, "another count than was seen"
try:
    scaled(torch.ones(1, 1, 1), torch.int32)
    raise SystemExit("float32 to int32 is accepted now")
except RuntimeError as error:
    print("float32 to int32:", error)
print("as described")
PYTHON
