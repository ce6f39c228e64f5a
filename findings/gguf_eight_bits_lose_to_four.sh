#!/usr/bin/env bash
# gguf 0.19.0 (llama.cpp's Python package): blockwise quantization of small weights.
# Expected: a block is divided by its own scale, so the relative error does not depend on the size of the weights, and
#   Q8_0, with 8 bits, is closer than Q4_0, with 4.
# Seen: from a standard deviation of about 1e-5 down Q8_0 is worse than Q4_0. A scale is stored as a half-precision
#   number: the largest weight over 127 in Q8_0, over 8 in Q4_0. Such numbers lose bits below 6e-5 and are 0 below 3e-8.
#   At 1e-4 the error of Q8_0 has doubled; at 1e-6 its tensor is all but zeros, and that of Q4_0 11 % away. No message.
# Where it shows: matrices of small numbers: updates of weights, low-rank factors, gradients.
# Fails where gguf behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def error(size, kind):
    """Of the restored weights, relative to the weights."""
    small = weights * np.float32(size)
    restored = quants.dequantize(quants.quantize(small, kind), kind)
    return float(np.linalg.norm(restored - small) / np.linalg.norm(small))


print("gguf", version("gguf"))
errors = {}
for size in (1, 1e-2, 1e-4, 1e-5, 1e-6):
    errors[size] = [error(size, kind) for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0)]
    print(
        f"standard deviation {size:g}: relative error {errors[size][0]:.2%} with Q8_0, {errors[size][1]:.2%} with Q4_0"
    )
assert errors[1][0] < 0.006 and errors[1e-2][0] < 0.006, "another error than was seen"
assert errors[1e-4][0] > 1.8 * errors[1][0], "Q8_0 is as good with small weights now"
assert errors[1e-5][0] > errors[1e-5][1] and errors[1e-6][0] > 0.9 > 0.2 > errors[1e-6][1], "8 bits win now"
print("as described")
PYTHON
