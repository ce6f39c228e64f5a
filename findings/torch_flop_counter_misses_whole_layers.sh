#!/usr/bin/env bash
# torch 2.14.1, CPU: torch.utils.flop_counter.FlopCounterMode around the forward pass of layers that torch itself
# offers.
# Expected: two operations for each multiplication and addition of the matrix products, whatever the mode: a network
#   computes the same in training and in evaluation. GRU and Linear are counted so.
# Seen: nn.LSTM counts 0, where a GRU of the same size counts all. nn.TransformerEncoderLayer counts its projections
#   in training, and 0 in evaluation without gradients, where it runs as one fused operator. The two products of
#   attention count in no mode: the operator that scaled_dot_product_attention takes on a CPU has no formula. No
#   warning that anything is left out.
# Where it shows: "the teacher costs nothing"; costs of a search over layers that are mixed of counted and uncounted
#   ones.
# Fails where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

IMAGES, TOKENS, WIDTH, HIDDEN = 2, 10, 16, 32
tokens = torch.randn(IMAGES, TOKENS, WIDTH)
heads = torch.randn(IMAGES, 2, TOKENS, WIDTH // 2)


def counted(layer, *inputs, train):
    if isinstance(layer, nn.Module):
        layer.train(train)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        layer(*inputs)
    return counter.get_total_flops()


each = 2 * IMAGES * TOKENS  # of one weight, for all tokens
attention = 2 * 2 * IMAGES * TOKENS**2 * WIDTH
projections = each * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN)
encoder = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, dropout=0.0, batch_first=True)
cases = {
    "Linear": (nn.Linear(WIDTH, HIDDEN), (tokens,), each * WIDTH * HIDDEN, [1, 1]),
    "GRU": (nn.GRU(WIDTH, HIDDEN, batch_first=True), (tokens,), each * 3 * HIDDEN * (WIDTH + HIDDEN), [1, 1]),
    "LSTM": (nn.LSTM(WIDTH, HIDDEN, batch_first=True), (tokens,), each * 4 * HIDDEN * (WIDTH + HIDDEN), [0, 0]),
    "attention": (functional.scaled_dot_product_attention, (heads, heads, heads), attention, [0, 0]),
    "encoder layer": (encoder, (tokens,), projections + attention, [projections / (projections + attention), 0]),
}
print("torch", torch.__version__)
for name, (layer, inputs, computed, seen) in cases.items():
    shares = [counted(layer, *inputs, train=train) / computed for train in (True, False)]
    print(f"{name}: {computed} operations; counted in training {shares[0]:.0%}, in evaluation {shares[1]:.0%}")
    assert shares == seen, "other operations are counted now"
print("as described")
PYTHON
