"""Second-order rounding: each weight's error is compensated by the weights that are rounded after it.

The loss is that of `curvature.Curvature`, for D = rounded - weight. Errors are compensated within a row by
the columns that follow, as in OBQ and GPTQ (Frantar et al., 2022), and by the blocks of rows that follow.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from nnc_utils import encoding
from nnc_utils.curvature import Curvature, upper_factor
from nnc_utils.encoding import Uniform
from nnc_utils.quantization.networks import quantized
from nnc_utils.quantization.uniform import check_weight

BITS = 8
# Seven bits of the eight: more would let the 16-bit sums of processors without VNNI saturate, and an
# entropy coder takes nothing for codes that do not occur.
LARGEST = encoding.code_range(7, affine=False)[1]
COLUMNS = 128  # columns between two updates of the later ones' sums, and of the prices of bits
ROWS = 64  # rows that are rounded at a time, without compensating each other
# Of the inputs and of the gradients; chosen among eight pairs on validation images of the quick baseline.
DAMPING = (0.05, 0.3)


def quantize(
    weight: Tensor, curvature: Curvature, *, lambda_: float, damping=DAMPING, mask: Tensor | None = None
) -> Uniform:
    """Round a weight so that loss and coded bits together are smallest: ``loss + lambda_ * bits``.

    Parameters
    ----------
    weight : (out, in) or (out, in, kernel, kernel).
    curvature : of this layer.
    lambda_ : the loss, in nats an image, that one saved bit may cost; sets the steps, too.
    damping : of H and of G (see `upper_factor`); more trusts the images less.
    mask : bool in the weight's shape, True = kept; the others stay 0.

    Returns 8-bit codes in ±63, entropy-coded far below 8 bits, and a scale for each output channel.

    With ``H = R @ R.T`` and ``G = S @ S.T``, both upper triangular, the loss is half the square of
    ``S.T @ D @ R``. Its entry at a row and a column holds only errors of rows and columns up to there,
    so that each weight in turn can bring its own entry near 0: GPTQ's compensation with the factor of H
    instead of its inverse's; for rows, too, it is two-sided (Tseng et al., 2025, "Model-preserving
    adaptive rounding"), here in blocks. A weight takes the nearest code, the next one towards 0, or 0,
    each at its price in bits: entropy-constrained quantization (Chou et al., 1989) with the counts so far.
    The step is that whose next bit is worth its price: ``loss = h * step**2 / 24`` a weight falls by a
    factor of 4 for each bit, so ``loss * log(4) = lambda_``, h the geometric mean of a row's columns.
    """
    check_weight(weight)
    rows = weight.detach().flatten(1)
    along, across = (
        upper_factor(moment, share) for moment, share in zip((curvature.inputs, curvature.outputs), damping)
    )
    blocks = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]
    # What a row's error costs when later blocks compensate it, those of its own block do not.
    outputs = torch.cat([across[block, block].square().sum(1) for block in blocks])
    outputs = outputs.clamp(min=1e-3 * float(outputs.mean()) + 1e-30)
    typical = torch.exp(2 * along.diagonal().log().mean())
    scale = (24 * lambda_ / (math.log(4) * outputs * typical)).sqrt()
    scale = torch.maximum(scale, rows.abs().amax(1) / LARGEST)
    counts = _count((rows / scale[:, None]).round().clamp(-LARGEST, LARGEST).numpy())
    counts = counts * (rows.numel() / 8 / counts.sum()) + 1e-3  # a guess, soon outweighed
    kept = torch.ones_like(rows) if mask is None else mask.flatten(1).float()
    codes, felt = torch.zeros_like(rows), torch.zeros_like(rows)
    for block in blocks:
        pushed = -across[: block.start, block].T @ felt[: block.start]
        wanted = torch.linalg.solve_triangular(across[block, block].T.contiguous(), pushed, upper=False)
        columns = [x.T.contiguous().numpy() for x in (rows[block], kept[block], wanted)]
        steps = {"outputs": outputs[block].numpy(), "scale": scale[block].numpy()}
        rounded = _round_columns(*columns, along, **steps, lambda_=lambda_, counts=counts)
        codes[block] = torch.from_numpy(rounded).T
        felt[block] = (rows[block] - codes[block] * scale[block, None]) @ along
    return Uniform(codes.reshape(weight.shape).to(torch.int16), scale, axis=0, bits=BITS, mask=mask)


def _round_columns(columns, kept, wanted, factor: Tensor, *, outputs, scale, lambda_: float, counts):
    """The codes of some rows, (n, rows) as are the weights, what is kept, and ``errors.T @ R`` wanted."""
    # By numpy, whose small operations take a fraction of torch's time. Adds to the counts in place.
    columns, wanted = columns / scale, wanted / scale
    codes, errors = np.zeros_like(columns), np.zeros_like(columns)
    trials, rows = np.zeros((3, columns.shape[1]), columns.dtype), np.arange(columns.shape[1])
    for start in range(0, len(columns), COLUMNS):
        block = slice(start, start + COLUMNS)
        local = factor[block, block].T.contiguous().numpy()
        own = local.diagonal()[:, None]
        # by torch: numpy's threads would keep torch's waiting, and the other way round
        carried = (factor[:start, block].T @ torch.from_numpy(errors[:start])).numpy()
        targets = columns[block] + (carried - wanted[block]) / own
        local = local / own
        curve = 0.5 * outputs * (scale * own) ** 2
        # rolled, so that a code below 0 is an index from the end
        price = np.roll(lambda_ * -np.log2(counts / counts.sum()), -LARGEST)
        for i, j in enumerate(range(start, start + len(local))):
            target = targets[i] + np.dot(local[i, :i], errors[start:j])
            np.clip(np.rint(target), -LARGEST, LARGEST, out=trials[0])
            np.subtract(trials[0], np.sign(trials[0]), out=trials[1])
            cost = curve[i] * np.square(target - trials) + price[trials.astype(np.intp)]
            codes[j] = kept[j] * trials[cost.argmin(0), rows]
            errors[j] = columns[j] - codes[j]
        counts += _count(codes[block])
    return codes


def _count(codes: np.ndarray) -> np.ndarray:
    return np.bincount(codes.astype(int).ravel() + LARGEST, minlength=2 * LARGEST + 1).astype(np.float32)


def quantize_network(
    model: nn.Module, curvature: dict[str, Curvature], *, lambda_: float, damping=DAMPING
) -> nn.Module:
    """A copy of a network with every layer rounded by `quantize`, at one price of a bit; a mask stays."""

    def rule(name: str, layer: nn.Module) -> Uniform:
        options = {"lambda_": lambda_, "damping": damping, "mask": encoding.mask_of(layer)}
        return quantize(layer.weight, curvature[name], **options)

    return quantized(model, rule)
