#!/usr/bin/env bash
# torchao 0.18.0, torch 2.14.1: quantize_(network, IntxWeightOnlyConfig(weight_dtype=...)) with 1 and 2 bits.
# Expected: 1 bit is accepted (the documentation: "torch.intx, where 1 <= x <= 8"), so it keeps the sign, as binary
#   weights do; and symmetric quantization of a negated weight is the negated quantized weight.
# Seen: with 1 bit every weight becomes 0, whatever it was: the codes are -1 and 0, the scale is twice the largest
#   weight, and nothing is beyond a half. With 2 bits, codes -2 to 1, the largest weight of a row loses a third if it
#   is positive, and grows by a third if it is negative. No warning. The tensor has the shape and the type that it
#   should have.
# Where it shows: sweeps over bits, networks whose sign is folded from one layer into the next.
# Fails where torchao behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchao==0.18.0 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error::UserWarning:torchao - <<'PYTHON'
import torch
import torchao
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_

torch.manual_seed(0)
weights = torch.randn(16, 64)
weights[:, 0] = 4.0  # the largest of each row


def quantized(weights, kind):
    network = nn.Sequential(nn.Linear(*weights.T.shape, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(weights)
    quantize_(network, IntxWeightOnlyConfig(weight_dtype=kind))
    return network[0].weight.dequantize()


print("torchao", torchao.__version__, "torch", torch.__version__)
for kind, largest in (
    (torch.int1, (0, 0)),
    (torch.int2, (2 / 3, 4 / 3)),
    (torch.int4, (14 / 15, 14 / 15)),
    (torch.int8, (1, 1)),
):
    restored, mirrored = quantized(weights, kind), quantized(-weights, kind)
    zeros = float((restored == 0).float().mean())
    error = float((restored - weights).norm() / weights.norm())
    seen = restored[0, 0].item() / 4, mirrored[0, 0].item() / -4
    print(f"{kind}: {zeros:.0%} zeros, error {error:.2f}; the largest weight times {seen[0]:.3f}, negated {seen[1]:.3f}")
    assert (zeros == 1) == (kind is torch.int1), "1 bit keeps something now"
    assert all(abs(a - b) < 0.01 for a, b in zip(seen, largest, strict=True)), "another scale than was seen"
print("as described")
PYTHON
