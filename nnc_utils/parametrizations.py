"""What stands between a weight that trains and the weight that a layer computes with: masks, quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def code_range(bits: int, *, affine: bool) -> tuple[int, int]:
    """Smallest and largest code: ±(2**(bits-1) - 1); if affine, so with a zero-point, 0 and 2**bits - 1."""
    largest = 2 ** (bits - 1) - 1
    return (0, 2**bits - 1) if affine else (-largest, largest)


def column(scale: Tensor, dimensions: int) -> Tensor:
    """A scale () or (out,) in a shape that multiplies a weight (out, ...) of so many dimensions."""
    return scale.view(-1, *[1] * (dimensions - 1)) if scale.ndim else scale


def look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """The codebook's levels at the codes' places; differentiable in the codebook."""
    return (codebook + 0.0).index_select(0, codes.flatten().int()).view(codes.shape)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight, 0 outside the mask; -0.0 becomes 0.0, which a file keeps."""
    return weight * mask + 0.0


def fold(module: nn.Module) -> None:
    """Make a module's weight the plain parameter that its parametrizations compute."""
    if not parametrize.is_parametrized(module, "weight"):
        return
    weight = module.weight.detach()
    # Not by remove_parametrizations: it takes `weight` from the class, which a deep copy shares.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.weight = nn.Parameter(weight)


def _laid_out_as(weight: Tensor, result: Tensor) -> Tensor:
    """The result with the weight's strides, wherever only those of dimensions of size 1 differ.

    Elementwise operations set those as they like, and they decide whether a convolution takes the kernel
    of another memory format, which rounds differently from a plain weight's.
    """
    lengths = zip(weight.shape, weight.stride(), result.stride(), strict=True)
    differ = [size for size, wanted, stride in lengths if wanted != stride]
    if not differ or max(differ) > 1:
        return result
    return result.as_strided(weight.shape, weight.stride())


class ZeroMask(nn.Module):
    """Parametrization that sets weights to 0 and keeps them there; mask : bool, True = kept."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return _laid_out_as(weight, masked(weight, self.mask))


class UniformWeight(nn.Module):
    """Parametrization that rounds weights to ``scale * (code - zero_point)``.

    The gradient passes where the weight is within the codes' range and is 0 outside: the clipped
    straight-through estimator (Bengio et al., 2013; Jacob et al., 2018).

    Parameters
    ----------
    scale, bits, zero_point : as in `encoding.Uniform`.
    learn_scale : make the scale a parameter, with the gradient of LSQ (Esser et al., 2020, equation 3 and
        section 2.2). A weight adds round(w/s) - w/s, or Q where w/s reaches an end Q of the range (counted
        from the zero-point), all of it times 1 / sqrt(weights for each scale * largest code).
    """

    def __init__(
        self, scale: Tensor, *, bits: int, zero_point: Tensor | None = None, learn_scale: bool = False
    ) -> None:
        super().__init__()
        scale = scale.detach().clone()
        if learn_scale:  # its absolute value is the step: one that crosses 0 costs no finished training
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", None if zero_point is None else zero_point.detach().clone())
        self.bits, self.axis, self.learn_scale = bits, 0 if scale.ndim else None, learn_scale
        self.range = code_range(bits, affine=zero_point is not None)

    @property
    def step(self) -> Tensor:
        """The scale that weights are rounded with; positive."""
        return self.scale.abs() if self.learn_scale else self.scale

    def _ratio(self, weight: Tensor, scale: Tensor) -> Tensor:
        low, high = self.range
        if self.zero_point is not None:
            zero_point = column(self.zero_point, weight.ndim)
            low, high = low - zero_point, high - zero_point
        ratio = weight / column(scale, weight.ndim)
        clipped = ratio.clamp(low, high)
        if self.learn_scale:  # to LSQ the ends of the range are outside
            return torch.where((low < ratio) & (ratio < high), ratio, clipped.detach())
        return clipped

    def codes(self, weight: Tensor) -> Tensor:
        """The whole numbers that a weight rounds to, int16."""
        codes = self._ratio(weight.detach(), self.step.detach()).round().to(torch.int16)
        return codes if self.zero_point is None else codes + column(self.zero_point, weight.ndim)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.step
        if self.learn_scale:
            share = (weight.numel() / scale.numel() * self.range[1]) ** -0.5
            scale = scale.detach() + share * (scale - scale.detach())  # adds 0, and scales the gradient
        ratio = self._ratio(weight, scale)
        # Exact: a float less than 1 away from a whole number reaches it by adding their difference.
        codes = ratio + (ratio.round() - ratio).detach()
        return _laid_out_as(weight, codes * column(scale, weight.ndim))


class CodebookWeight(nn.Module):
    """Parametrization that puts a codebook's levels in the place of weights.

    The levels are trained: the gradient of each is the sum of its weights' (Han et al., 2016, section 3).
    The weight underneath counts no more and gets no gradient, so a `ZeroMask` has to come after. The codes
    are uint8 in the weight's shape, the codebook (levels,) in any order.
    """

    def __init__(self, codes: Tensor, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.clone())
        self.codebook = nn.Parameter(codebook.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        result = look_up(self.codebook, self.codes)
        return _laid_out_as(weight, torch.empty_like(weight).copy_(result))
