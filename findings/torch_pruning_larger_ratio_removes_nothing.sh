#!/usr/bin/env bash
# torch-pruning 1.6.1, torch 2.14.1: BasePruner(pruning_ratio=..., round_to=8) on convolutions of 64 channels.
# Expected: "round channels to the nearest multiple": a larger ratio leaves at most as many channels. With ratio 0.9, 6.4
#   channels would be left, so 8.
# Seen: up to 0.875 channels are removed, and 8 are left. From 0.89 on all 64 stay: channels are rounded down, 7 to 0;
#   a layer without channels is refused, and then it is left whole. No error, no warning. Without round_to, 0.9 leaves 6.
# Where it shows: a search over ratios finds that pruning more costs nothing in accuracy.
# Fails where torch-pruning behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torch-pruning==1.6.1 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error::UserWarning - <<'PYTHON'
from importlib.metadata import version

import torch
import torch_pruning
from torch import nn


def channels(ratio, round_to):
    """What is left of the two inner layers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 3)]
    network, image = nn.Sequential(*layers).eval(), torch.randn(1, 3, 16, 16)
    importance = torch_pruning.importance.GroupMagnitudeImportance()
    settings = {"pruning_ratio": ratio, "round_to": round_to, "ignored_layers": [network[4]]}
    torch_pruning.pruner.BasePruner(network, image, importance=importance, **settings).step()
    network(image)
    return [network[0].out_channels, network[2].out_channels]


print("torch-pruning", version("torch-pruning"))
for ratio, plain, rounded in ((0.5, 32, 32), (0.75, 16, 16), (0.875, 8, 8), (0.89, 7, 64), (0.9, 6, 64)):
    seen = channels(ratio, None), channels(ratio, 8)
    print(f"ratio {ratio}: {seen[0]} channels are left, with round_to=8 {seen[1]}")
    assert seen == ([plain] * 2, [rounded] * 2), "others than were seen"
print("as described")
PYTHON
