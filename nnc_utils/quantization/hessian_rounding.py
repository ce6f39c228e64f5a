"""Second-order rounding: each weight's error is made up for by the weights that are rounded after it.

What a changed weight does to the loss depends on the others. Per layer the loss is taken as

    1/2 * sum over output channels c of  outputs[c] * d[c] @ H @ d[c],      d = rounded - weight

with H the second moment of the layer's inputs and outputs[c] that of the loss's gradient at output c: the
Kronecker-factored Fisher information (Martens and Grosse, 2015; convolutions: Grosse and Martens, 2016).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import encoding, models
from nnc_utils.encoding import Uniform
from nnc_utils.models import Layer
from nnc_utils.quantization.networks import quantized
from nnc_utils.training import progress

BITS = 8
# Seven bits of the eight: more would let the 16-bit sums of processors without VNNI saturate, and an
# entropy coder takes nothing for codes that do not occur.
LARGEST = encoding.largest_code(7)
BLOCK = 128  # columns between two updates of all later ones; a matter of time only


@dataclass(frozen=True)
class Curvature:
    """How the loss curves in one layer's weight, (out, n) with n = in * kernel * kernel.

    Parameters
    ----------
    inputs : (n, n), mean of ``x @ x.T`` over images and pixels, x what one output pixel sees.
    outputs : (out,), sum over the pixels of the mean squared gradient of the loss.
    """

    inputs: Tensor
    outputs: Tensor

    def loss(self, error: Tensor) -> float:
        """The loss, in nats an image, that an error of the layer's weight adds."""
        rows = error.flatten(1)
        return float(0.5 * (self.outputs * ((rows @ self.inputs) * rows).sum(1)).sum())

    def factor(self, damping: float) -> Tensor:
        """Upper triangular R with ``R @ R.T`` = inputs, its diagonal raised by the damping's share."""
        raised = self.inputs.diagonal() * damping
        floor = 1e-6 * self.inputs.diagonal().mean() + 1e-30
        lower = torch.linalg.cholesky((self.inputs + torch.diag(raised + floor)).flip(0, 1))
        return lower.flip(0, 1)


def curvatures(
    model: nn.Module, images: Tensor, *, rows: int = 8192, batch_size: int = 128, seed: int = 0
) -> dict[str, Curvature]:
    """Measure each layer's curvature on training images.

    Parameters
    ----------
    model : a network of `models.build`; not changed. Batch-norm works as in evaluation.
    images : normalized float images, (n, channels, size, size).
    rows : output pixels from which the inputs' moment is estimated: early layers have them from a few
        images. It should be above in * kernel * kernel of every layer.
    batch_size : images a pass.
    seed : of the labels, which are drawn from the network's own predictions (see `sensitivity`).

    Returns
    -------
    Layer -> `Curvature`.

    Raises
    ------
    ValueError
        For no images, images of another shape, activations that are not finite.
    """
    models.check_images(model, images)
    network = copy.deepcopy(model).eval().requires_grad_(False)
    layers = models.layers(model.spec)
    seen = dict.fromkeys((layer.name for layer in layers), 0)
    inputs = {x.name: torch.zeros(x.in_channels * x.kernel**2, x.in_channels * x.kernel**2) for x in layers}
    outputs = {x.name: torch.zeros(x.out_channels) for x in layers}

    def watch(layer: Layer):
        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            pixels = layer.size_out**2
            taken = given[0].detach()[: max(0, math.ceil(rows / pixels) - seen[layer.name])]
            if len(taken):
                patches = taken
                if layer.kind == "conv":
                    patches = functional.unfold(taken, layer.kernel, 1, layer.kernel // 2, layer.stride)
                    patches = patches.transpose(1, 2).flatten(0, 1)
                inputs[layer.name].addmm_(patches.T, patches)
                seen[layer.name] += len(taken)

            def add(gradient: Tensor) -> None:
                squares = gradient.square()
                outputs[layer.name] += squares.sum(0) if squares.ndim == 2 else squares.sum((0, 2, 3))

            output.register_hook(add)

        return hook

    for layer in layers:
        network.get_submodule(layer.name).register_forward_hook(watch(layer))
    generator = torch.Generator().manual_seed(seed)
    for batch in progress(images.split(batch_size), "curvature"):
        logits = network(batch.contiguous(memory_format=torch.channels_last).requires_grad_())
        if not logits.isfinite().all():
            raise ValueError("logits are not finite: the network or the images hold NaN or inf")
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).flatten()
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {
        x.name: Curvature(inputs[x.name] / (seen[x.name] * x.size_out**2), outputs[x.name] / len(images))
        for x in layers
    }


def quantize(
    weight: Tensor,
    curvature: Curvature,
    *,
    rate: float,
    damping: float = 0.05,
    mask: Tensor | None = None,
) -> Uniform:
    """Round a weight so that loss and coded bits together are smallest: ``loss + rate * bits``.

    Parameters
    ----------
    weight : (out, in) or (out, in, kernel, kernel).
    curvature : of this layer.
    rate : the loss, in nats an image, that one saved bit may cost; sets the steps, too.
    damping : share by which H's diagonal is raised; more trusts the calibration images less.
    mask : bool in the weight's shape, True = kept; the other weights are 0 and stay it.

    Returns
    -------
    8-bit codes in ±63, entropy-coded far below 8 bits, and a scale for each output channel.

    Raises
    ------
    ValueError
        For a rate that is not positive, weights that are not finite, a curvature of another shape.

    Notes
    -----
    Column after column is rounded; what the errors so far do to a column's sum is added to its target
    first, which is the error compensation of Frantar et al., 2022 (GPTQ) and 2022 (OBQ), written with the
    Cholesky factor of H itself instead of its inverse's. A column may take the nearest code, the next
    one towards 0, or 0, each at its price in bits: entropy-constrained quantization (Chou et al., 1989)
    with the counts of the columns before. The step is the one whose error costs as much as the bit it
    saves: ``loss = h * step**2 / 24`` a weight falls by a factor of 4 for each bit.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate is {rate!r}: a positive number of nats a bit is needed, such as 1e-9")
    if not torch.isfinite(weight).all():
        raise ValueError("the weights are not finite: the training diverged")
    rows = weight.detach().flatten(1)
    if (len(curvature.outputs), len(curvature.inputs)) != tuple(rows.shape):
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}, the curvature is of "
            f"({len(curvature.outputs)}, {len(curvature.inputs)}): both have to be of one layer"
        )
    factor = curvature.factor(damping)
    outputs = curvature.outputs.clamp(min=1e-3 * float(curvature.outputs.mean()) + 1e-30)
    typical = torch.exp(2 * factor.diagonal().log().mean())
    scale = (12 * rate / (math.log(4) * outputs * typical)).sqrt()
    scale = torch.maximum(scale, rows.abs().amax(1) / LARGEST)
    kept = None if mask is None else mask.flatten(1).T.float()
    codes = _round_columns(rows.T.contiguous(), factor, outputs, scale, rate, kept).T
    return Uniform(codes.reshape(weight.shape).to(torch.int16), scale, axis=0, bits=BITS, mask=mask)


def _round_columns(
    columns: Tensor, factor: Tensor, outputs: Tensor, scale: Tensor, rate: float, kept: Tensor | None
) -> Tensor:
    """The codes, (n, out) like the columns."""
    codes, errors = torch.zeros_like(columns), torch.zeros_like(columns)
    counts = _count((columns / scale).round().clamp(-LARGEST, LARGEST))
    counts = counts * (columns.numel() / 8 / counts.sum()) + 1e-3  # a guess, soon outweighed
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        carried = factor[:start, start:stop].T @ errors[:start]
        price = rate * -(counts / counts.sum()).log2()
        for j in range(start, stop):
            own = factor[j, j]
            shift = (carried[j - start] + factor[start:j, j] @ errors[start:j]) / own
            target = (columns[j] + shift) / scale
            curve = 0.5 * outputs * (own * scale).square()
            nearest = target.round().clamp(-LARGEST, LARGEST)
            best, least = nearest, curve * (target - nearest).square() + price[(nearest + LARGEST).long()]
            for trial in (nearest - nearest.sign(), torch.zeros_like(nearest)):
                cost = curve * (target - trial).square() + price[(trial + LARGEST).long()]
                best, least = torch.where(cost < least, trial, best), torch.minimum(cost, least)
            codes[j] = best if kept is None else best * kept[j]
            errors[j] = columns[j] - scale * codes[j]
        counts += _count(codes[start:stop])
    return codes


def _count(codes: Tensor) -> Tensor:
    return torch.bincount((codes + LARGEST).long().flatten(), minlength=2 * LARGEST + 1).float()


def quantize_network(
    model: nn.Module, curvature: dict[str, Curvature], *, rate: float, damping: float = 0.05
) -> nn.Module:
    """A copy of a network with every layer rounded by `quantize`, at the same price of a bit in all.

    Parameters
    ----------
    model : a network of `models.build`; not changed. An `encoding.ZeroMask` of it stays.
    curvature : of each layer, from `curvatures`.
    rate, damping : see `quantize`.
    """

    def rule(name: str, layer: nn.Module) -> Uniform:
        mask = encoding.mask_of(layer)
        return quantize(layer.weight, curvature[name], rate=rate, damping=damping, mask=mask)

    return quantized(model, rule)
