#!/usr/bin/env bash
# torch 2.14.1, CPU: the gradient of clamp where a value lies exactly on a bound.
# Expected: one function, one gradient: that of x.clamp(-1, 1), whether the bounds are numbers or tensors.
# Seen: 0 on a bound that is a number, 0.5 on one that is a tensor of the same value; inside 1, outside 0 in both.
#   hardtanh and relu6 give 0, too.
# Where it shows: quantization-aware training that rounds before it clamps. Every weight whose code is the first or the
#   last lies exactly on a bound, so with numbers as bounds it gets no gradient, and with learned (tensor) bounds half.
# Fails where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn import functional

print("torch", torch.__version__)
one = torch.tensor(1.0)
clamps = {
    "numbers": (lambda x: x.clamp(-1, 1), [0.0, 0.0, 1.0, 0.0, 0.0]),
    "tensors": (lambda x: x.clamp(-one, one), [0.0, 0.5, 1.0, 0.5, 0.0]),
    "hardtanh": (functional.hardtanh, [0.0, 0.0, 1.0, 0.0, 0.0]),
}
values = [-1.5, -1.0, 0.25, 1.0, 1.5]
for name, (clamp, seen) in clamps.items():
    x = torch.tensor(values, requires_grad=True)
    clamp(x).sum().backward()
    print(f"{name:9} x = {values}: gradient {x.grad.tolist()}")
    assert x.grad.tolist() == seen, "another gradient than was seen"

weights = torch.tensor([0.9, -1.1, 0.2, 1.4], requires_grad=True)  # codes -1, 0, 1 for a step of 1
for bounds, at_the_bound in (((-1, 1), 0.0), ((-one, one), 0.5)):
    codes = weights + (weights.round() - weights).detach()  # straight through the rounding
    (gradient,) = torch.autograd.grad(codes.clamp(*bounds).sum(), weights)
    print(f"codes {codes.detach().tolist()}, bounds as {type(bounds[1]).__name__}: gradient {gradient.tolist()}")
    assert gradient.tolist() == [at_the_bound, at_the_bound, 1.0, at_the_bound]
PYTHON
