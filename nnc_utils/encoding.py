"""How one weight tensor is stored: `Dense`, `Uniform` or `Codebook`, each behind an optional zero-mask.

`pack` turns an encoding into bytes, codes and masks laid out as `entropy` says, other numbers as they are,
little-endian; `unpack` turns them back. On a network an encoding lives as torch parametrizations of the
weight (`CHAINS`), which training preserves: `encoded` reads them, `attach` puts them there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnc_utils import entropy, parametrizations
from nnc_utils.entropy import EncodingError
from nnc_utils.parametrizations import CodebookWeight, UniformWeight, ZeroMask, code_range, column, fold

DTYPES = {"float32": "<f4", "float16": "<f2"}
# What `encoded` reads and `attach` writes.
CHAINS = (
    *([], [ZeroMask], [UniformWeight], [ZeroMask, UniformWeight]),
    *([CodebookWeight], [CodebookWeight, ZeroMask]),
)


class _Stored:
    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple((self.values if isinstance(self, Dense) else self.codes).shape)


@dataclass(frozen=True, eq=False)
class Dense(_Stored):
    """Floating-point weights.

    values : float32 or float16, in the weight's shape; 0 outside the mask.
    mask : bool in the weight's shape, True = kept; None when no zero is a decision.
    """

    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Uniform(_Stored):
    """Weights ``(codes - zero_point) * scale``; the codes have the `code_range` of their width.

    codes : int16 in the weight's shape; 0 outside the mask.
    scale : positive float32, of shape () for the tensor or (out,) for its output channels.
    axis : None for a scale of the tensor, 0 for scales of the output channels.
    bits : 2 to 16; 2 to 8 with a zero-point.
    mask : as in `Dense`; a kept code may well be 0.
    zero_point : the code of the weight 0, int16 in the scale's shape, without a mask; None: symmetric codes.
    """

    codes: Tensor
    scale: Tensor
    axis: int | None
    bits: int
    mask: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Codebook(_Stored):
    """Weights ``codebook[codes]``, those outside the mask 0 (weight sharing; Han et al., 2016).

    codes : uint8 in the weight's shape, indices into the codebook; 0 outside the mask.
    codebook : float32 of shape (levels,), 1 to 256 levels, each above the one before.
    mask : as in `Dense`.
    """

    codes: Tensor
    codebook: Tensor
    mask: Tensor | None = None

    @property
    def bits(self) -> int:
        """Width of an index that is not entropy-coded."""
        return max(1, (len(self.codebook) - 1).bit_length())


Encoding = Dense | Uniform | Codebook


def decode(encoding: Encoding) -> Tensor:
    """The weight that an encoding stands for, float32."""
    if isinstance(encoding, Dense):
        return encoding.values.float()
    if isinstance(encoding, Codebook):
        weight = parametrizations.look_up(encoding.codebook, encoding.codes)
        return weight if encoding.mask is None else parametrizations.masked(weight, encoding.mask)
    codes, dimensions = encoding.codes.float(), encoding.codes.ndim
    if encoding.zero_point is not None:
        codes = codes - column(encoding.zero_point, dimensions)
    return codes * column(encoding.scale, dimensions)


# --- Bytes --------------------------------------------------------------------------------------


def _describe(encoding: Encoding) -> dict:
    if isinstance(encoding, Dense):
        description = {"kind": "dense", "dtype": str(encoding.values.dtype).removeprefix("torch.")}
    elif isinstance(encoding, Codebook):
        description = {"kind": "codebook", "levels": len(encoding.codebook)}
    else:
        affine = encoding.zero_point is not None
        description = {"kind": "uniform", "bits": encoding.bits, "axis": encoding.axis, "affine": affine}
    return description | {"shape": list(encoding.shape), "mask": encoding.mask is not None}


def stream_names(description: Mapping) -> tuple[str, ...]:
    """Names of the streams of a description, in the order in which a file keeps their lengths."""
    names = {"dense": ("values",), "uniform": ("codes", "scale"), "codebook": ("codes", "codebook")}
    mask = ("mask",) if description["mask"] else ()
    return mask + names[description["kind"]] + (("zero_point",) if description.get("affine") else ())


def _ends(description: Mapping) -> tuple[int, int]:
    """Smallest and largest code."""
    levels = description.get("levels")
    return (0, levels - 1) if levels else code_range(description["bits"], affine=description["affine"])


def pack(encoding: Encoding) -> tuple[dict, dict[str, np.ndarray]]:
    """An encoding as bytes: a description for JSON and the streams it names (`stream_names`), uint8.

    The description has kind, shape and mask; dtype, or bits, axis and affine, or levels. Raises an
    `EncodingError` for codes, scales, levels or values that do not fit each other.
    """
    _check(encoding)
    description, streams = _describe(encoding), {}
    mask = slice(None) if encoding.mask is None else encoding.mask
    dtypes = {"values": DTYPES.get(description.get("dtype")), "zero_point": "u1"}
    for name in stream_names(description):
        tensor = getattr(encoding, name)
        if name in ("values", "codes"):
            tensor = tensor[mask].flatten()
        if name in ("mask", "codes"):
            low, high = (0, 1) if name == "mask" else _ends(description)
            symbols = (tensor.flatten().int() - low).numpy().astype(np.uint16)
            streams[name] = entropy.pack(symbols, largest=high - low)
        else:
            streams[name] = np.frombuffer(tensor.numpy().astype(dtypes.get(name, "<f4")).tobytes(), np.uint8)
    return description, streams


def unpack(description: Mapping, streams: Mapping[str, np.ndarray]) -> Encoding:
    """The encoding that `pack` turned into bytes; a `ValueError` or `RuntimeError` for all that it would not
    have written.

    Memory grows with the shape in the description, which short streams may honestly have (a constant
    tensor needs no bits): bound it before calling.
    """
    kind, shape, mask = description["kind"], tuple(description["shape"]), None
    count = math.prod(shape)
    if kind == "uniform":  # before anything is computed with it
        bits, axis = description["bits"], description["axis"]
        _need(isinstance(bits, int) and bits in range(2, 17), f"bits is {bits!r:.80}: 2 to 16 are needed")
        _need(axis is None or axis == 0, f"axis is {axis!r:.80}: null or 0 is needed")
    if description["mask"]:
        mask = torch.from_numpy(entropy.unpack(streams["mask"], count, largest=1).astype(bool)).view(shape)
        count = int(mask.sum())

    def numbers(stream: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        stored = np.frombuffer(streams[stream].tobytes(), dtype)
        return torch.from_numpy(stored.astype(stored.dtype.newbyteorder("="))).view(shape)

    if kind == "dense":
        kept = numbers("values", DTYPES[description["dtype"]], (count,))
    else:
        low, high = _ends(description)
        symbols = entropy.unpack(streams["codes"], count, largest=high - low).astype(np.int32) + low
        kept = torch.from_numpy(symbols.astype(np.uint8 if kind == "codebook" else np.int16))
    values = kept.view(shape) if mask is None else kept.new_zeros(shape).masked_scatter_(mask, kept)
    if kind == "dense":
        encoding: Encoding = Dense(values, mask)
    elif kind == "codebook":
        encoding = Codebook(values, numbers("codebook", "<f4", (description["levels"],)), mask)
    else:
        scales = () if axis is None else shape[:1]
        zero_point = numbers("zero_point", "u1", scales).short() if description["affine"] else None
        encoding = Uniform(values, numbers("scale", "<f4", scales), axis, bits, mask, zero_point)
    _check(encoding)
    return encoding


def payload_bits(encoding: Encoding) -> int:
    """Exact size of an encoding in bits: all streams, scales included."""
    return 8 * sum(stream.size for stream in pack(encoding)[1].values())


def _need(condition: object, otherwise: str) -> None:
    if not condition:
        raise EncodingError(otherwise)


def _check(encoding: Encoding) -> None:
    """Raise an `EncodingError` unless the numbers of an encoding can be stored."""
    mask, values = encoding.mask, encoding.values if isinstance(encoding, Dense) else encoding.codes
    _need(mask is None or not values[~mask].any(), "weights outside the mask are not 0")
    if isinstance(encoding, Dense):
        _need(values.dtype in (torch.float32, torch.float16), f"{values.dtype}: float32 or float16 is needed")
        return _check_finite(values)
    zero_point = None
    if isinstance(encoding, Codebook):
        book = encoding.codebook
        _need(1 <= len(book) <= 256, f"the codebook has {len(book)} levels: 1 to 256 are allowed")
        rising = book.isfinite().all() and (book.diff() > 0).all()
        _need(rising, "the codebook's levels are not finite, or not each above the one before")
    else:
        scale, bits, zero_point = encoding.scale, encoding.bits, encoding.zero_point
        most = 16 if zero_point is None else 8
        _need(bits in range(2, most + 1), f"bits is {bits!r}: a whole number from 2 to {most} is needed")
        _need(zero_point is None or mask is None, "affine codes take no mask: use symmetric codes")
        shape = () if encoding.axis is None else encoding.shape[:1]
        _need(scale.shape == shape, f"the scale has shape {tuple(scale.shape)}: {shape} is needed")
        _need(
            (scale > 0).all() and (scale * 2**bits).isfinite().all(),
            f"a scale is not positive, or so large that weights are infinite ({float(scale.min()):.3g} "
            f"to {float(scale.max()):.3g}); a learned scale may need a lower learning rate",
        )
    low, high = _ends(_describe(encoding))
    for name, codes in (("codes", values), ("zero-points", zero_point)):
        if codes is not None:
            _need(not codes.is_floating_point(), f"the {name} are {codes.dtype}: integers are needed")
            least, most = map(int, torch.aminmax(codes))
            _need(low <= least and most <= high, f"{name} from {least} to {most}: {low} to {high} is allowed")


def _check_finite(values: Tensor) -> None:
    broken = int((~values.isfinite()).sum())
    _need(not broken, f"{broken} of {values.numel()} weights are not finite")


# --- On a network -------------------------------------------------------------------------------


def _attached(module: nn.Module) -> list[nn.Module]:
    return list(module.parametrizations.weight) if parametrize.is_parametrized(module, "weight") else []


def mask_of(module: nn.Module) -> Tensor | None:
    """The mask of a module's weight, True = kept; None where it has none."""
    return next((own.mask for own in _attached(module) if isinstance(own, ZeroMask)), None)


def encoded(module: nn.Module, dtype: torch.dtype = torch.float32) -> Encoding:
    """The encoding of a module's weight, read off its parametrizations; float weights as this dtype.

    A codebook that was trained is sorted, and levels that became equal are merged.

    Raises
    ------
    EncodingError
        For a weight that is not finite or not float32, a scale or codebook that training led astray, or
        parametrizations that are not one of `CHAINS`.
    """
    attached = _attached(module)
    kinds = [type(parametrization) for parametrization in attached]
    if kinds not in CHAINS:
        names, *allowed = (", ".join(kind.__name__ for kind in chain) for chain in (kinds, *CHAINS[1:]))
        raise EncodingError(
            f"weight has the parametrizations {names}: a file holds, in this order, {'; '.join(allowed)}; "
            "fold others into the weight with torch.nn.utils.parametrize.remove_parametrizations"
        )
    own = {kind: copy.deepcopy(parametrization).cpu() for kind, parametrization in zip(kinds, attached)}
    mask = own[ZeroMask].mask.contiguous() if ZeroMask in own else None
    weight = (module.parametrizations.weight.original if own else module.weight).detach().cpu().contiguous()
    if CodebookWeight in own:
        levels, places = torch.unique(own[CodebookWeight].codebook.detach(), return_inverse=True)
        codes = places.to(torch.uint8)[own[CodebookWeight].codes.contiguous().int()]
        encoding: Encoding = Codebook(codes if mask is None else codes.masked_fill(~mask, 0), levels, mask)
    else:
        _need(
            weight.dtype == torch.float32, f"the weight is {weight.dtype}: float32, as by .float(), is needed"
        )
        _check_finite(weight)
        weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
        if quantizer := own.get(UniformWeight):
            codes, scale = quantizer.codes(weight), quantizer.step.detach()
            encoding = Uniform(codes, scale, quantizer.axis, quantizer.bits, mask, quantizer.zero_point)
        else:
            encoding = Dense(weight.to(dtype, copy=True), mask)
            most = float(weight.abs().max())
            _need(encoding.values.isfinite().all(), f"weights up to {most:.3g} are infinite as {dtype}")
    _check(encoding)
    return encoding


@torch.no_grad()
def attach(module: nn.Module, encoding: Encoding) -> None:
    """Give a layer an encoding's weight and, as parametrizations (`CHAINS`), its mask and its quantizer.

    In place; what was attached before goes. Raises an `EncodingError` when the shapes differ.
    """
    fold(module)
    shape = tuple(module.weight.shape)
    _need(shape == encoding.shape, f"the encoding has shape {encoding.shape}, the weight {shape}")
    module.weight.copy_(decode(encoding))
    chain: list[nn.Module] = [] if encoding.mask is None else [ZeroMask(encoding.mask)]
    if isinstance(encoding, Uniform):
        chain.append(UniformWeight(encoding.scale, bits=encoding.bits, zero_point=encoding.zero_point))
    elif isinstance(encoding, Codebook):
        chain.insert(0, CodebookWeight(encoding.codes, encoding.codebook))
    for parametrization in chain:
        parametrize.register_parametrization(module, "weight", parametrization.to(module.weight.device))
