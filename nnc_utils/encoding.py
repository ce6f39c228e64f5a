"""How one weight tensor is stored: `Dense` floats or `Uniform` integer codes, behind an optional zero-mask.

`pack` turns an encoding into bytes, `unpack` turns bytes back and trusts none of them. On a network an
encoding lives as torch parametrizations of ``module.weight`` (`ZeroMask`, then `UniformWeight`), which
training preserves; `encoded` reads them and `attach` puts them there.

The integers are entropy-coded by asymmetric numeral systems (Duda et al., 2015) under their own
frequencies, which are stored beside them. Packed symbols are, little-endian throughout:

    1 byte      how many of the lowest bits of each symbol are stored as they are
    1 byte      the smallest value of the remaining high bits
    1 byte      how many values follow it; if none, the next two parts are empty
    2 bytes     for each value its frequency; the frequencies sum to 2**16
    4 bytes     for each word of the entropy coder
    the low bits, packed, the first symbol in the lowest bit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import constriction
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TOTAL = 2**16  # what a frequency table sums to
LARGEST_TENSOR = 2**31  # weights in one tensor
# What the entropy coder starts from: with fewer bits, some symbols would leave no trace in it.
START = 2**24 - 1
CHUNK = 2**20  # symbols decoded at a time: a multiple of 8, so that packed bits end on a byte
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class EncodingError(ValueError):
    """An encoding that cannot be written, or bytes that are none."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Floating-point weights.

    Parameters
    ----------
    values : float32 or float16, in the weight's shape; 0 outside the mask.
    mask : bool in the same shape, True = kept; None when no zero is a decision.
    """

    values: Tensor
    mask: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True, eq=False)
class Uniform:
    """Weights ``codes * scale``, codes in ±(2**(bits-1) - 1).

    Parameters
    ----------
    codes : int16 in the weight's shape; 0 outside the mask.
    scale : positive float32, of shape () for the tensor or (out,) for its output channels.
    axis : None for a scale of the tensor, 0 for scales of the output channels.
    bits : 2 to 16.
    mask : bool in the weight's shape, True = kept; None when no zero is a decision (a code may well be 0).
    """

    codes: Tensor
    scale: Tensor
    axis: int | None
    bits: int
    mask: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)


Encoding = Dense | Uniform


def largest_code(bits: int) -> int:
    """The codes of a width run from minus this to plus this."""
    return 2 ** (bits - 1) - 1


def decode(encoding: Encoding) -> Tensor:
    """The weight that an encoding stands for, float32."""
    if isinstance(encoding, Dense):
        return encoding.values.float()
    return encoding.codes.float() * _column(encoding.scale, encoding.codes.ndim)


def _column(scale: Tensor, dimensions: int) -> Tensor:
    return scale.view(-1, *[1] * (dimensions - 1)) if scale.ndim else scale


# --- Bytes --------------------------------------------------------------------------------------


def pack(encoding: Encoding) -> tuple[dict, dict[str, np.ndarray]]:
    """An encoding as bytes.

    Returns
    -------
    A description for JSON ("kind", "shape", "mask"; "dtype" or "bits" and "axis") and the streams it
    names (`stream_names`), uint8.

    Raises
    ------
    EncodingError
        For codes or values that `unpack` would refuse.
    """
    _check(encoding)
    description: dict = {"kind": "dense" if isinstance(encoding, Dense) else "uniform"}
    streams = {}
    mask = None
    if encoding.mask is not None:
        mask = encoding.mask.flatten().numpy()
        streams["mask"] = _pack_symbols(mask.astype(np.uint16), largest=1)
    if isinstance(encoding, Dense):
        description["dtype"] = str(encoding.values.dtype).removeprefix("torch.")
        values = encoding.values.flatten().numpy()
        streams["values"] = _bytes(values if mask is None else values[mask])
    else:
        description |= {"bits": encoding.bits, "axis": encoding.axis}
        codes = encoding.codes.flatten().numpy()
        kept = codes if mask is None else codes[mask]
        symbols = (kept.astype(np.int32) + largest_code(encoding.bits)).astype(np.uint16)
        streams["codes"] = _pack_symbols(symbols, largest=2 * largest_code(encoding.bits))
        streams["scale"] = _bytes(encoding.scale.numpy())
    return description | {"shape": list(encoding.shape), "mask": mask is not None}, streams


def unpack(description: Mapping, streams: Mapping[str, np.ndarray]) -> Encoding:
    """The encoding that `pack` turned into bytes.

    Memory grows with the shape in the description, which short streams may honestly have (a constant
    tensor needs no bits): bound it before calling.

    Raises
    ------
    EncodingError
        When description and streams do not agree in every byte, or describe no valid encoding.
    """
    check_description(description)
    names = stream_names(description)
    if set(streams) != set(names):
        raise EncodingError(f"streams {sorted(streams)} given, {sorted(names)} described")
    shape = tuple(description["shape"])
    count, mask = math.prod(shape), None
    if description["mask"]:
        mask = _unpack_symbols(streams["mask"], count, largest=1, what="mask").astype(bool)
        count = int(mask.sum())

    def spread(kept: np.ndarray) -> Tensor:
        if mask is None:
            return torch.from_numpy(kept).view(shape)
        full = np.zeros(mask.size, kept.dtype)
        full[mask] = kept
        return torch.from_numpy(full).view(shape)

    kept = None if mask is None else torch.from_numpy(mask).view(shape)
    if description["kind"] == "dense":
        dtype = {"float32": "<f4", "float16": "<f2"}[description["dtype"]]
        encoding: Encoding = Dense(spread(_floats(streams["values"], count, dtype, "values")), kept)
    else:
        bits, axis = description["bits"], description["axis"]
        symbols = _unpack_symbols(streams["codes"], count, largest=2 * largest_code(bits), what="codes")
        symbols -= np.uint16(largest_code(bits))  # wraps around to the negative codes
        codes = spread(symbols.view(np.int16))
        scales = _floats(streams["scale"], 1 if axis is None else shape[0], "<f4", "scale")
        scale = torch.from_numpy(scales)
        encoding = Uniform(codes, scale[0] if axis is None else scale, axis, bits, kept)
    _check(encoding)
    return encoding


def stream_names(description: Mapping) -> tuple[str, ...]:
    """Names of the streams of a description, in the order in which a file keeps their lengths."""
    mask = ("mask",) if description["mask"] else ()
    return mask + (("values",) if description["kind"] == "dense" else ("codes", "scale"))


def check_description(description: Mapping) -> None:
    """Raise an `EncodingError` unless this is a description that `pack` could have written."""
    fields = {"dense": {"dtype"}, "uniform": {"bits", "axis"}}
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in fields:
        raise EncodingError(f"unknown kind of encoding {kind!r}: one of {', '.join(fields)}")
    wanted = {"kind", "shape", "mask"} | fields[kind]
    if set(description) != wanted:
        raise EncodingError(f"a {kind} encoding is described by {sorted(wanted)}, not {sorted(description)}")
    shape = description["shape"]
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 8
        or any(type(n) is not int or n < 1 for n in shape)
    ):
        raise EncodingError(f"shape is {shape!r}: 1 to 8 whole numbers of at least 1 are needed")
    if math.prod(shape) > LARGEST_TENSOR:
        raise EncodingError(f"shape {shape} holds more than {LARGEST_TENSOR} weights")
    if type(description["mask"]) is not bool:
        raise EncodingError(f"mask is {description['mask']!r}: true or false is needed")
    if kind == "dense" and description["dtype"] not in tuple(DTYPES):
        raise EncodingError(f"unknown dtype {description['dtype']!r}: one of {', '.join(DTYPES)}")
    if kind == "uniform":
        _check_widths(description["bits"], description["axis"])


def payload_bits(packed: Encoding | tuple[dict, Mapping[str, np.ndarray]]) -> int:
    """Exact size in bits of an encoding, or of what `pack` made of it: all streams, scales included."""
    _, streams = packed if isinstance(packed, tuple) else pack(packed)
    return 8 * sum(stream.size for stream in streams.values())


def _check_widths(bits: object, axis: object) -> None:
    if type(bits) is not int or not 2 <= bits <= 16:
        raise EncodingError(f"bits is {bits!r}: a whole number from 2 to 16 is needed")
    if axis is not None and (type(axis) is not int or axis != 0):
        raise EncodingError(
            f"axis is {axis!r}: None (one scale) or 0 (one for each output channel) is needed"
        )


def _check(encoding: Encoding) -> None:
    values = encoding.values if isinstance(encoding, Dense) else encoding.codes
    if not values.numel() or not values.ndim:
        raise EncodingError(f"a weight of shape {tuple(values.shape)} holds nothing to encode")
    mask = encoding.mask
    if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape):
        raise EncodingError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"bool of shape {tuple(values.shape)} is needed"
        )
    if mask is not None and ((values != 0) & ~mask).any():
        raise EncodingError("weights outside the mask are not 0")
    if isinstance(encoding, Dense):
        if values.dtype not in DTYPES.values():
            raise EncodingError(f"the values are {values.dtype}: float32 or float16 is needed")
        _check_finite(values)
        return
    _check_widths(encoding.bits, encoding.axis)
    largest = largest_code(encoding.bits)
    if values.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise EncodingError(f"the codes are {values.dtype}: signed integers are needed")
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < -largest or high > largest:
        raise EncodingError(
            f"codes run from {low} to {high}: {encoding.bits} bits reach from {-largest} to {largest}"
        )
    scale, shape = encoding.scale, () if encoding.axis is None else (values.shape[0],)
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape:
        raise EncodingError(
            f"the scale is {scale.dtype} of shape {tuple(scale.shape)}: float32 of shape {shape} is needed"
        )
    if not (scale > 0).all() or not torch.isfinite(scale * largest).all():
        raise EncodingError("a scale is not positive, or so large that weights are infinite")


def _check_finite(values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise EncodingError(f"{bad} of {values.numel()} weights are not finite")


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return np.frombuffer(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes(), np.uint8)


def _floats(stream: np.ndarray, count: int, dtype: str, what: str) -> np.ndarray:
    if stream.size != count * np.dtype(dtype).itemsize:
        raise EncodingError(f"{what}: {stream.size} bytes given, {count * np.dtype(dtype).itemsize} needed")
    little = np.frombuffer(stream.tobytes(), dtype)
    return little.astype(little.dtype.newbyteorder("="))


# --- Entropy coding -----------------------------------------------------------------------------


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Whole numbers near the counts' shares that sum to TOTAL, at least 1 where the count is."""
    used = counts > 0
    table = used + counts * (TOTAL - int(used.sum())) // int(counts.sum())
    table[counts.argmax()] += TOTAL - table.sum()
    return table


def _model(table: np.ndarray) -> constriction.stream.model.Model:
    # float64 holds the frequencies and each product that `perfect=False` forms of them exactly, so
    # that every platform derives the same model.
    return constriction.stream.model.Categorical(table.astype(np.float64), perfect=False, lazy=False)


def _pack_symbols(symbols: np.ndarray, *, largest: int) -> np.ndarray:
    """Symbols in 0..largest as bytes, split into high and low bits where that takes fewest bytes."""
    if not symbols.size:
        return np.zeros(0, np.uint8)
    bits = largest.bit_length()
    counts = np.bincount(symbols, minlength=2**bits)
    best = None
    for low in range(max(0, bits - 8), bits + 1):
        shared = counts.reshape(-1, 2**low).sum(1)
        used = np.flatnonzero(shared)
        first, last = int(used[0]), int(used[-1])
        cost, table = symbols.size * low / 8, None
        if last > first:
            table = _frequencies(shared[first : last + 1])
            high_counts = shared[used]
            cost += 2 * table.size - float(high_counts @ np.log2(table[used - first] / TOTAL)) / 8
            cost += 7  # at most: START, and rounding up to whole words
        if best is None or cost < best[0]:
            best = cost, low, first, last, table
    _, low, first, last, table = best
    parts = [np.array([low, first, last - first], np.uint8)]
    if table is not None:
        coder = constriction.stream.stack.AnsCoder(np.array([START], np.uint32))
        coder.encode_reverse((symbols >> low).astype(np.int32) - first, _model(table))
        parts += [_bytes(table.astype(np.uint16)), _bytes(coder.get_compressed())]
    for start in range(0, symbols.size if low else 0, CHUNK):
        octets = symbols[start : start + CHUNK].astype("<u2").view(np.uint8).reshape(-1, 2)
        lowest = np.unpackbits(octets, axis=1, count=low, bitorder="little")
        parts.append(np.packbits(lowest, bitorder="little"))
    return np.concatenate(parts)


def _unpack_symbols(stream: np.ndarray, count: int, *, largest: int, what: str) -> np.ndarray:
    """The `count` symbols in 0..largest that `_pack_symbols` packed, uint16."""
    if not count:
        if stream.size:
            raise EncodingError(f"{what}: {stream.size} bytes given for no symbols")
        return np.zeros(0, np.uint16)
    if stream.size < 3:
        raise EncodingError(f"{what}: {stream.size} bytes are too few")
    low, first, more = (int(byte) for byte in stream[:3])
    bits = largest.bit_length()
    if not max(0, bits - 8) <= low <= bits or (first + more) << low > largest:
        raise EncodingError(f"{what}: {low} low bits below values {first} to {first + more} exceed {largest}")
    table_bytes = 2 * (more + 1) if more else 0
    tail = stream.size - (count * low + 7) // 8
    if tail < 3 + table_bytes or (tail - 3 - table_bytes) % 4 or (not more and tail != 3):
        raise EncodingError(f"{what}: {stream.size} bytes do not hold {count} symbols")
    symbols = np.empty(count, np.uint16)
    raw = stream[tail:]
    coder, model = _decoder(stream[3:tail], count, more + 1, what) if more else (None, None)
    for start in range(0, count, CHUNK):
        part = symbols[start : start + CHUNK]
        part[:] = first << low
        if coder is not None:
            part += coder.decode(model, part.size).astype(np.uint16) << low
        if low:
            octets = raw[start * low // 8 : (start + CHUNK) * low // 8]
            lowest = np.unpackbits(octets, count=part.size * low, bitorder="little").reshape(-1, low)
            padded = np.packbits(lowest, axis=1, bitorder="little")
            part += padded[:, 0]
            if low > 8:
                part += padded[:, 1].astype(np.uint16) << 8
    if coder is not None and coder.get_compressed().tolist() != [START]:
        raise EncodingError(f"{what}: the entropy-coded words do not hold {count} symbols")
    if int(symbols.max()) > largest:
        raise EncodingError(f"{what}: symbol {int(symbols.max())} is above {largest}")
    return symbols


def _decoder(
    stream: np.ndarray, count: int, values: int, what: str
) -> tuple[constriction.stream.stack.AnsCoder, constriction.stream.model.Model]:
    table = np.frombuffer(stream[: 2 * values].tobytes(), "<u2").astype(np.int64)
    words = np.frombuffer(stream[2 * values :].tobytes(), "<u4").astype(np.uint32)
    if table.sum() != TOTAL:
        raise EncodingError(f"{what}: frequencies sum to {table.sum()}, not {TOTAL}")
    # Each symbol takes at least the bits of the likeliest, so that many symbols need many words.
    least_bits = -count * math.log2((int(table.max()) + 1) / TOTAL)
    if not words.size or not words[-1] or least_bits > 32 * words.size + 64:
        raise EncodingError(f"{what}: {words.size} words do not hold {count} symbols")
    return constriction.stream.stack.AnsCoder(words), _model(table)


# --- On a network -------------------------------------------------------------------------------


def _laid_out_as(weight: Tensor, result: Tensor) -> Tensor:
    """The result with the weight's strides, wherever only those of dimensions of size 1 differ.

    Elementwise operations set those as they like, and they decide whether a convolution takes the kernel
    of another memory format, which rounds differently from a plain weight's.
    """
    lengths = zip(weight.shape, weight.stride(), result.stride(), strict=True)
    if result.stride() == weight.stride() or any(
        size > 1 and ours != theirs for size, ours, theirs in lengths
    ):
        return result
    return result.as_strided(weight.shape, weight.stride())


class ZeroMask(nn.Module):
    """Parametrization that sets weights to 0 and keeps them there.

    Parameters
    ----------
    mask : bool in the weight's shape, True = kept.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return _laid_out_as(weight, weight * self.mask + 0.0)  # -0.0 becomes 0.0, which a file keeps


class UniformWeight(nn.Module):
    """Parametrization that rounds weights to ``scale * code``.

    The gradient passes where the weight is within the codes' range and is 0 outside: the clipped
    straight-through estimator (Bengio et al., 2013; Jacob et al., 2018).

    Parameters
    ----------
    scale : positive float32 of shape () or, one for each output channel, (out,).
    bits : 2 to 16.
    """

    def __init__(self, scale: Tensor, *, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.bits = bits
        self.axis = 0 if scale.ndim else None

    def _ratio(self, weight: Tensor) -> Tensor:
        largest = largest_code(self.bits)
        return (weight / _column(self.scale, weight.ndim)).clamp(-largest, largest)

    def codes(self, weight: Tensor) -> Tensor:
        """The whole numbers that a weight rounds to, int16."""
        return self._ratio(weight.detach()).round().to(torch.int16)

    def forward(self, weight: Tensor) -> Tensor:
        ratio = self._ratio(weight)
        # Exact: a float less than 1 away from a whole number reaches it by adding their difference.
        codes = ratio + (ratio.round() - ratio).detach()
        return _laid_out_as(weight, codes * _column(self.scale, weight.ndim))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}"


def encoded(module: nn.Module, dtype: torch.dtype = torch.float32) -> Encoding:
    """The encoding of a module's weight, read off its parametrizations.

    Parameters
    ----------
    module : a convolution or linear layer.
    dtype : float32 or float16, for a weight that is not quantized.

    Raises
    ------
    EncodingError
        For a weight that is not finite or not float32, or parametrizations other than `ZeroMask` and
        `UniformWeight` in this order.
    """
    attached = parametrize.is_parametrized(module, "weight")
    parametrizations = list(module.parametrizations.weight) if attached else []
    found = [type(parametrization) for parametrization in parametrizations]
    if found not in ([], [ZeroMask], [UniformWeight], [ZeroMask, UniformWeight]):
        raise EncodingError(
            f"weight has the parametrizations {', '.join(kind.__name__ for kind in found)}: a file holds a "
            "ZeroMask, a UniformWeight, or both in this order; fold others into the weight with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = module.parametrizations.weight.original if attached else module.weight
    weight = weight.detach().cpu()
    if weight.dtype != torch.float32:
        raise EncodingError(f"the weight is {weight.dtype}: float32 is needed, as by model.float()")
    weight = weight.contiguous()
    mask = parametrizations[0].mask.cpu().contiguous() if ZeroMask in found else None
    _check_finite(weight)
    weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
    if UniformWeight not in found:
        values = weight.to(dtype)
        if not torch.isfinite(values).all():
            raise EncodingError(f"weights up to {float(weight.abs().max()):.3g} are infinite as {dtype}")
        return Dense(values.clone(), mask)
    uniform = parametrizations[-1]
    scale = uniform.scale.cpu()
    codes = UniformWeight(scale, bits=uniform.bits).codes(weight)
    return Uniform(codes, scale.clone(), uniform.axis, uniform.bits, mask)


@torch.no_grad()
def attach(module: nn.Module, encoding: Encoding) -> None:
    """Give a module an encoding's weight and, as parametrizations, its mask and its quantizer.

    Parameters
    ----------
    module : a convolution or linear layer; changed in place. What was attached before goes.
    encoding : of the weight's shape.

    Raises
    ------
    EncodingError
        When the shapes differ.
    """
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
    if tuple(module.weight.shape) != encoding.shape:
        raise EncodingError(
            f"the encoding has shape {encoding.shape}, the weight {tuple(module.weight.shape)}"
        )
    module.weight.copy_(decode(encoding))
    device = module.weight.device
    if encoding.mask is not None:
        parametrize.register_parametrization(module, "weight", ZeroMask(encoding.mask.to(device)))
    if isinstance(encoding, Uniform):
        quantizer = UniformWeight(encoding.scale.to(device), bits=encoding.bits)
        parametrize.register_parametrization(module, "weight", quantizer)
