#!/usr/bin/env bash
# torch 2.14.1, CPU: SGD(momentum=0.9, fused=True) under torch.amp.GradScaler.
# Expected: a step that the scaler skips, because a gradient is not finite, leaves the optimizer as it was. Plain SGD
#   and fused Adam do so: the weights after the next, finite step are those of a first step.
# Seen: fused SGD has a momentum buffer after the skipped step that nothing was written to. It holds what lay in that
#   memory (here the 7s of a freed tensor), and the next step adds 0.9 of it to the gradient. No error, no warning.
# A second face of the same bookkeeping: where a parameter gets its first gradient only after the first step (a layer
#   that is thawed later), fused SGD with momentum raises a TypeError; plain SGD, for loop or foreach, goes on.
# Fails where torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch

SIZE = 100_000


def after_a_skipped_step(make):
    """The optimizer's state behind a skipped first step, and the weight behind one that counts."""
    weight = torch.nn.Parameter(torch.ones(SIZE))
    optimizer, scaler = make(weight), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((weight * float("inf")).sum()).backward()
    leftovers = [torch.full((SIZE,), 7.0) for _ in range(8)]
    del leftovers  # what is freed here may be handed out again
    scaler.step(optimizer)
    scaler.update()
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert torch.equal(weight.detach(), torch.ones(SIZE)), "the skipped step moved the weight"
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    return state, weight.detach()


print("torch", torch.__version__)
results = {}
for fused in (False, True):
    makers = {
        "SGD": lambda weight, fused=fused: torch.optim.SGD([weight], 0.1, momentum=0.9, fused=fused),
        "Adam": lambda weight, fused=fused: torch.optim.Adam([weight], 0.1, fused=fused),
    }
    for name, make in makers.items():
        state, weight = after_a_skipped_step(make)
        results[name, fused] = state, weight
        kind = "fused" if fused else "plain"
        print(f"{kind} {name}: state after the skipped step {sorted(state)}, weight after the next {weight[0]:.4f}")

for case in (("SGD", False), ("Adam", False), ("Adam", True)):
    assert torch.allclose(results[case][1], torch.full((SIZE,), 0.9)), case
state, weight = results["SGD", True]
buffer = state["momentum_buffer"]
share = float((buffer == 7.0).float().mean())
print(f"fused SGD's momentum buffer after a step that was skipped: {share:.0%} of it are 7s of a freed tensor")
assert buffer.abs().max() > 0, "the buffer is clean now"
assert not torch.allclose(weight, torch.full((SIZE,), 0.9)), "the next step is right now"

first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
for fused in (False, True):
    first.grad = second.grad = None
    optimizer = torch.optim.SGD([first, second], 0.1, momentum=0.9, fused=fused)
    first.sum().backward()
    optimizer.step()
    (first.sum() + second.sum()).backward()
    try:
        optimizer.step()
        seen = "goes on"
    except TypeError as error:
        seen = f"TypeError: {error}"
    print("fused" if fused else "plain", "SGD, a parameter's first gradient in step 2:", seen)
    assert seen.startswith("TypeError") == fused, "changed"
print("as described")
PYTHON
