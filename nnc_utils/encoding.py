"""How one weight tensor is stored: `Dense`, `Uniform` or `Codebook`, each behind an optional zero-mask.

`pack` turns an encoding into bytes, `unpack` turns bytes back and trusts none of them. On a network an
encoding lives as torch parametrizations of ``module.weight`` (`CHAINS`), which training preserves;
`encoded` reads them and `attach` puts them there.

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

import copy
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
    """Weights ``(codes - zero_point) * scale``; the codes have the `code_range` of their width.

    Parameters
    ----------
    codes : int16 in the weight's shape; 0 outside the mask.
    scale : positive float32, of shape () for the tensor or (out,) for its output channels.
    axis : None for a scale of the tensor, 0 for scales of the output channels.
    bits : 2 to 16.
    mask : bool in the weight's shape, True = kept; None when no zero is a decision (a code may well be 0).
    zero_point : None for symmetric codes; for affine ones the code of the weight 0, int16 in the scale's
        shape, 0 to 2**bits - 1. Affine codes have at most 8 bits and no mask.
    """

    codes: Tensor
    scale: Tensor
    axis: int | None
    bits: int
    mask: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)


@dataclass(frozen=True, eq=False)
class Codebook:
    """Weights ``codebook[codes]``, those outside the mask 0 (weight sharing; Han et al., 2016).

    Parameters
    ----------
    codes : uint8 in the weight's shape, indices into the codebook; 0 outside the mask.
    codebook : float32 of shape (levels,), 1 to 256 levels, each above the one before.
    mask : bool in the weight's shape, True = kept; None when no zero is a decision.
    """

    codes: Tensor
    codebook: Tensor
    mask: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def bits(self) -> int:
        """Width of an index that is not entropy-coded."""
        return max(1, (len(self.codebook) - 1).bit_length())


Encoding = Dense | Uniform | Codebook


def largest_code(bits: int) -> int:
    """The symmetric codes of a width run from minus this to plus this."""
    return 2 ** (bits - 1) - 1


def code_range(bits: int, *, affine: bool) -> tuple[int, int]:
    """Smallest and largest code: ±(2**(bits-1) - 1); if affine, so with a zero-point, 0 and 2**bits - 1."""
    return (0, 2**bits - 1) if affine else (-largest_code(bits), largest_code(bits))


def decode(encoding: Encoding) -> Tensor:
    """The weight that an encoding stands for, float32."""
    if isinstance(encoding, Dense):
        return encoding.values.float()
    if isinstance(encoding, Codebook):
        weight = _look_up(encoding.codebook, encoding.codes)
        return weight if encoding.mask is None else _masked(weight, encoding.mask)
    codes, dimensions = encoding.codes.float(), encoding.codes.ndim
    if encoding.zero_point is not None:
        codes = codes - _column(encoding.zero_point, dimensions)
    return codes * _column(encoding.scale, dimensions)


def _look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    return (codebook + 0.0).index_select(0, codes.flatten().int()).view(codes.shape)


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    return weight * mask + 0.0  # -0.0 becomes 0.0, which a file keeps


def _column(scale: Tensor, dimensions: int) -> Tensor:
    return scale.view(-1, *[1] * (dimensions - 1)) if scale.ndim else scale


# --- Bytes --------------------------------------------------------------------------------------


def pack(encoding: Encoding) -> tuple[dict, dict[str, np.ndarray]]:
    """An encoding as bytes.

    Returns
    -------
    A description for JSON ("kind", "shape", "mask"; "dtype", or "bits", "axis" and "affine", or "levels")
    and the streams it names (`stream_names`), uint8.

    Raises
    ------
    EncodingError
        For codes or values that `unpack` would refuse.
    """
    _check(encoding)
    description, streams = _describe(encoding), {}
    mask = None
    if encoding.mask is not None:
        mask = encoding.mask.flatten().numpy()
        streams["mask"] = _pack_symbols(mask.astype(np.uint16), largest=1)
    values = encoding.values if isinstance(encoding, Dense) else encoding.codes
    values = values.flatten().numpy()
    kept = values if mask is None else values[mask]
    if isinstance(encoding, Dense):
        streams["values"] = _bytes(kept)
        return description, streams
    low, high = _code_range(description)
    streams["codes"] = _pack_symbols((kept.astype(np.int32) - low).astype(np.uint16), largest=high - low)
    if isinstance(encoding, Codebook):
        streams["codebook"] = _bytes(encoding.codebook.numpy())
        return description, streams
    streams["scale"] = _bytes(encoding.scale.numpy())
    if encoding.zero_point is not None:
        streams["zero_point"] = _bytes(encoding.zero_point.numpy().astype(np.uint8))
    return description, streams


def _describe(encoding: Encoding) -> dict:
    if isinstance(encoding, Dense):
        description = {"kind": "dense", "dtype": str(encoding.values.dtype).removeprefix("torch.")}
    elif isinstance(encoding, Codebook):
        description = {"kind": "codebook", "levels": encoding.codebook.numel()}
    else:
        affine = encoding.zero_point is not None
        description = {"kind": "uniform", "bits": encoding.bits, "axis": encoding.axis, "affine": affine}
    return description | {"shape": list(encoding.shape), "mask": encoding.mask is not None}


def _code_range(description: Mapping) -> tuple[int, int]:
    if description["kind"] == "codebook":
        return 0, description["levels"] - 1
    return code_range(description["bits"], affine=description["affine"])


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

    def numbers(stream: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.from_numpy(_numbers(streams[stream], math.prod(shape), dtype, stream).reshape(shape))

    kept = None if mask is None else torch.from_numpy(mask).view(shape)
    if description["kind"] == "dense":
        dtype = {"float32": "<f4", "float16": "<f2"}[description["dtype"]]
        encoding: Encoding = Dense(spread(_numbers(streams["values"], count, dtype, "values")), kept)
    else:
        low, high = _code_range(description)
        symbols = _unpack_symbols(streams["codes"], count, largest=high - low, what="codes")
        if description["kind"] == "codebook":
            codebook = numbers("codebook", (description["levels"],), "<f4")
            encoding = Codebook(spread(symbols.astype(np.uint8)), codebook, kept)
        else:
            symbols += np.uint16(low % 2**16)  # wraps around to the negative codes
            axis = description["axis"]
            scales = () if axis is None else shape[:1]
            zero_point = numbers("zero_point", scales, "u1").short() if description["affine"] else None
            scale = numbers("scale", scales, "<f4")
            encoding = Uniform(
                spread(symbols.view(np.int16)), scale, axis, description["bits"], kept, zero_point
            )
    _check(encoding)
    return encoding


def stream_names(description: Mapping) -> tuple[str, ...]:
    """Names of the streams of a description, in the order in which a file keeps their lengths."""
    names = {"dense": ("values",), "uniform": ("codes", "scale"), "codebook": ("codes", "codebook")}
    mask = ("mask",) if description["mask"] else ()
    return mask + names[description["kind"]] + (("zero_point",) if description.get("affine") else ())


def check_description(description: Mapping) -> None:
    """Raise an `EncodingError` unless this is a description that `pack` could have written."""
    fields = {"dense": {"dtype"}, "uniform": {"bits", "axis", "affine"}, "codebook": {"levels"}}
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
    if kind == "codebook":
        _check_whole("levels", description["levels"], 1, 256)
    if kind == "uniform":
        axis, affine = description["axis"], description["affine"]
        if type(affine) is not bool:
            raise EncodingError(f"affine is {affine!r}: true or false is needed")
        _check_whole("bits", description["bits"], 2, 8 if affine else 16)
        if affine and description["mask"]:
            raise EncodingError("affine codes take no mask: use symmetric codes, whose 0 is the weight 0")
        if axis is not None and (type(axis) is not int or axis != 0):
            raise EncodingError(
                f"axis is {axis!r}: None (one scale) or 0 (one for each output channel) is needed"
            )


def _check_whole(what: str, number: object, least: int, most: int) -> None:
    if type(number) is not int or not least <= number <= most:
        raise EncodingError(f"{what} is {number!r}: a whole number from {least} to {most} is needed")


def payload_bits(packed: Encoding | tuple[dict, Mapping[str, np.ndarray]]) -> int:
    """Exact size in bits of an encoding, or of what `pack` made of it: all streams, scales included."""
    _, streams = packed if isinstance(packed, tuple) else pack(packed)
    return 8 * sum(stream.size for stream in streams.values())


def _check(encoding: Encoding) -> None:
    check_description(_describe(encoding))
    values = encoding.values if isinstance(encoding, Dense) else encoding.codes
    if isinstance(encoding, Dense):
        _check_finite(values)
    else:
        _check_codes(encoding)
    mask = encoding.mask
    if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape):
        raise EncodingError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"bool of shape {tuple(values.shape)} is needed"
        )
    if mask is not None and ((values != 0) & ~mask).any():
        raise EncodingError("weights outside the mask are not 0")


def _check_codes(encoding: Uniform | Codebook) -> None:
    low, high = _code_range(_describe(encoding))
    if isinstance(encoding, Codebook):
        codebook, dtypes = encoding.codebook, (torch.uint8,)
        reach = f"{codebook.numel()} levels"
        _check_kind("codebook", codebook, torch.float32, (codebook.numel(),))
        if not torch.isfinite(codebook).all() or not (codebook.diff() > 0).all():
            raise EncodingError("the codebook's levels are not finite, or not each above the one before")
    else:
        scale, dtypes = encoding.scale, (torch.int8, torch.int16, torch.int32, torch.int64)
        reach, scales = f"{encoding.bits} bits", () if encoding.axis is None else encoding.shape[:1]
        _check_kind("scale", scale, torch.float32, scales)
        if not (scale > 0).all() or not torch.isfinite(scale * high).all():
            raise EncodingError(
                f"a scale is not positive, or so large that weights are infinite ({float(scale.min()):.3g} "
                f"to {float(scale.max()):.3g}); a learned scale may need a lower learning rate"
            )
        if encoding.zero_point is not None:
            _check_kind("zero-point", encoding.zero_point, torch.int16, scales)
            _check_reach("zero-points", encoding.zero_point, low, high, reach)
    if encoding.codes.dtype not in dtypes:
        needed = "uint8 is" if isinstance(encoding, Codebook) else "signed integers are"
        raise EncodingError(f"the codes are {encoding.codes.dtype}: {needed} needed")
    _check_reach("codes", encoding.codes, low, high, reach)


def _check_kind(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise EncodingError(
            f"the {what} is {tensor.dtype} of shape {tuple(tensor.shape)}: {dtype} of shape {shape} is needed"
        )


def _check_reach(what: str, tensor: Tensor, low: int, high: int, reach: str) -> None:
    least, most = (int(bound) for bound in torch.aminmax(tensor))
    if least < low or most > high:
        raise EncodingError(f"{what} run from {least} to {most}: {reach} reach from {low} to {high}")


def _check_finite(values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise EncodingError(f"{bad} of {values.numel()} weights are not finite")


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return np.frombuffer(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes(), np.uint8)


def _numbers(stream: np.ndarray, count: int, dtype: str, what: str) -> np.ndarray:
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
        return _laid_out_as(weight, _masked(weight, self.mask))


class UniformWeight(nn.Module):
    """Parametrization that rounds weights to ``scale * (code - zero_point)``.

    The gradient passes where the weight is within the codes' range and is 0 outside: the clipped
    straight-through estimator (Bengio et al., 2013; Jacob et al., 2018).

    Parameters
    ----------
    scale : positive float32 of shape () or, one for each output channel, (out,).
    bits : 2 to 16, with a zero-point 2 to 8.
    zero_point : None for symmetric codes, or int16 in the scale's shape, 0 to 2**bits - 1.
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
        self.bits = bits
        self.axis = 0 if scale.ndim else None
        self.learn_scale = learn_scale
        self.range = code_range(bits, affine=zero_point is not None)

    @property
    def step(self) -> Tensor:
        """The scale that weights are rounded with; positive."""
        return self.scale.abs() if self.learn_scale else self.scale

    def _ratio(self, weight: Tensor, scale: Tensor) -> Tensor:
        low, high = self.range
        if self.zero_point is not None:
            zero_point = _column(self.zero_point, weight.ndim)
            low, high = low - zero_point, high - zero_point
        ratio = weight / _column(scale, weight.ndim)
        clipped = ratio.clamp(low, high)
        if self.learn_scale:  # to LSQ the ends of the range are outside
            return torch.where((low < ratio) & (ratio < high), ratio, clipped.detach())
        return clipped

    def codes(self, weight: Tensor) -> Tensor:
        """The whole numbers that a weight rounds to, int16."""
        codes = self._ratio(weight.detach(), self.step.detach()).round().to(torch.int16)
        return codes if self.zero_point is None else codes + _column(self.zero_point, weight.ndim)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.step
        if self.learn_scale:
            share = (weight.numel() / scale.numel() * self.range[1]) ** -0.5
            scale = scale.detach() + share * (scale - scale.detach())  # adds 0, and scales the gradient
        ratio = self._ratio(weight, scale)
        # Exact: a float less than 1 away from a whole number reaches it by adding their difference.
        codes = ratio + (ratio.round() - ratio).detach()
        return _laid_out_as(weight, codes * _column(scale, weight.ndim))

    def extra_repr(self) -> str:
        affine = self.zero_point is not None
        return f"bits={self.bits}, axis={self.axis}, affine={affine}, learn_scale={self.learn_scale}"


class CodebookWeight(nn.Module):
    """Parametrization that puts a codebook's levels in the place of weights.

    The levels are trained: the gradient of each is the sum of its weights' (Han et al., 2016, section 3).
    The weight underneath counts no more and gets no gradient, so a `ZeroMask` has to come after.

    Parameters
    ----------
    codes : uint8 in the weight's shape.
    codebook : float32 of shape (levels,), in any order.
    """

    def __init__(self, codes: Tensor, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.clone())
        self.codebook = nn.Parameter(codebook.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        result = _look_up(self.codebook, self.codes)
        return _laid_out_as(weight, torch.empty_like(weight).copy_(result))

    def extra_repr(self) -> str:
        return f"levels={len(self.codebook)}"


# What `encoded` reads and `attach` writes.
CHAINS = (
    [],
    [ZeroMask],
    [UniformWeight],
    [ZeroMask, UniformWeight],
    [CodebookWeight],
    [CodebookWeight, ZeroMask],
)


def encoded(module: nn.Module, dtype: torch.dtype = torch.float32) -> Encoding:
    """The encoding of a module's weight, read off its parametrizations.

    A codebook that was trained is sorted, and levels that became equal are merged.

    Parameters
    ----------
    module : a convolution or linear layer.
    dtype : float32 or float16, for a weight that is not quantized.

    Raises
    ------
    EncodingError
        For a weight that is not finite or not float32, a scale or codebook that training led astray, or
        parametrizations that are not one of `CHAINS`.
    """
    attached = parametrize.is_parametrized(module, "weight")
    parametrizations = list(module.parametrizations.weight) if attached else []
    kinds = [type(parametrization) for parametrization in parametrizations]
    if kinds not in CHAINS:
        allowed = "; ".join(", ".join(kind.__name__ for kind in chain) for chain in CHAINS[1:])
        raise EncodingError(
            f"weight has the parametrizations {', '.join(kind.__name__ for kind in kinds)}: a file holds, in "
            f"this order, {allowed}; fold others into the weight with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    found = {kind: copy.deepcopy(p).cpu() for kind, p in zip(kinds, parametrizations)}
    mask = found[ZeroMask].mask.contiguous() if ZeroMask in found else None
    if CodebookWeight in found:
        encoding: Encoding = _sorted_codebook(found[CodebookWeight], mask)
    else:
        weight = module.parametrizations.weight.original if attached else module.weight
        weight = weight.detach().cpu()
        if weight.dtype != torch.float32:
            raise EncodingError(f"the weight is {weight.dtype}: float32 is needed, as by model.float()")
        _check_finite(weight)
        weight = weight.contiguous() if mask is None else weight.contiguous().masked_fill(~mask, 0.0)
        if UniformWeight in found:
            uniform = found[UniformWeight]
            scale, codes = uniform.step.detach(), uniform.codes(weight)
            encoding = Uniform(codes, scale, uniform.axis, uniform.bits, mask, uniform.zero_point)
        else:
            values = weight.to(dtype)
            if not torch.isfinite(values).all():
                raise EncodingError(f"weights up to {float(weight.abs().max()):.3g} are infinite as {dtype}")
            encoding = Dense(values.clone(), mask)
    _check(encoding)
    return encoding


def _sorted_codebook(weight: CodebookWeight, mask: Tensor | None) -> Codebook:
    levels, places = torch.unique(weight.codebook.detach(), return_inverse=True)
    codes = places.to(torch.uint8)[weight.codes.contiguous().int()]
    return Codebook(codes if mask is None else codes.masked_fill(~mask, 0), levels, mask)


def mask_of(module: nn.Module) -> Tensor | None:
    """The mask of a module's weight, True = kept; None where it has none."""
    attached = module.parametrizations.weight if parametrize.is_parametrized(module, "weight") else []
    return next((found.mask for found in attached if isinstance(found, ZeroMask)), None)


def fold(module: nn.Module) -> None:
    """Make a module's weight the plain parameter that its parametrizations compute."""
    if not parametrize.is_parametrized(module, "weight"):
        return
    weight = module.weight.detach()
    # Not by remove_parametrizations: it takes `weight` from the class, which a deep copy shares.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.weight = nn.Parameter(weight)


@torch.no_grad()
def attach(module: nn.Module, encoding: Encoding) -> None:
    """Give a module an encoding's weight and, as parametrizations (`CHAINS`), its mask and its quantizer.

    Parameters
    ----------
    module : a convolution or linear layer; changed in place. What was attached before goes.
    encoding : of the weight's shape.

    Raises
    ------
    EncodingError
        When the shapes differ.
    """
    fold(module)
    if tuple(module.weight.shape) != encoding.shape:
        raise EncodingError(
            f"the encoding has shape {encoding.shape}, the weight {tuple(module.weight.shape)}"
        )
    module.weight.copy_(decode(encoding))
    chain: list[nn.Module] = [] if encoding.mask is None else [ZeroMask(encoding.mask)]
    if isinstance(encoding, Uniform):
        chain.append(UniformWeight(encoding.scale, bits=encoding.bits, zero_point=encoding.zero_point))
    elif isinstance(encoding, Codebook):
        chain.insert(0, CodebookWeight(encoding.codes, encoding.codebook))
    for parametrization in chain:
        parametrize.register_parametrization(module, "weight", parametrization.to(module.weight.device))
