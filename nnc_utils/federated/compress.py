"""What is sent of an update: rounded, the largest of it, entropy-coded; and what was not sent is kept.

Two kinds of rounding: `stochastic` is right on average, so that the errors of many clients cancel; `nearest`
never makes an error larger than the update itself, which is what error feedback needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnc_utils import encoding
from nnc_utils.encoding import Dense, Encoding, Uniform
from nnc_utils.entropy import EncodingError

State = dict[str, Tensor]  # a network's weights, biases and batch-norm by name, or a difference of two
VECTOR_BITS = 8  # of biases and batch-norm, which are few and are all sent


@dataclass(frozen=True)
class Compressor:
    """How an update is made small.

    bits : 2 to 8 a value; None for float32.
    share : of the entries of each weight, the largest are sent; 1 for all.
    rounding : "stochastic" or "nearest", to `bits`.
    """

    bits: int | None = None
    share: float = 1.0
    rounding: str = "stochastic"

    def of(self, shape: torch.Size) -> Compressor:
        """What it does to a tensor of this shape."""
        if len(shape) > 1:
            return self
        return dataclasses.replace(self, bits=self.bits and VECTOR_BITS, share=1.0)


def _scale(values: Tensor, bits: int) -> Tensor:
    """The largest value gets the largest code; of zeros the scale does not matter."""
    scale = values.abs().max() / (2 ** (bits - 1) - 1)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _uniform(codes: Tensor, scale: Tensor, bits: int) -> Uniform:
    largest = 2 ** (bits - 1) - 1
    return Uniform(codes.clamp(-largest, largest).to(torch.int16), scale, None, bits)


def stochastic(values: Tensor, bits: int, generator: torch.Generator) -> Uniform:
    """Rounded up or down by chance, so that the mean over many draws is the value (Alistarh et al., 2017)."""
    scale = _scale(values, bits)
    return _uniform((values / scale + torch.rand(values.shape, generator=generator)).floor(), scale, bits)


def nearest(values: Tensor, bits: int) -> Uniform:
    """Rounded to the nearest code: the error is nowhere larger than the value."""
    scale = _scale(values, bits)
    return _uniform((values / scale).round(), scale, bits)


def top(values: Tensor, share: float) -> Tensor:
    """Which entries are the largest in size: a bool mask with a share of them, one at least."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.abs().flatten().topk(max(1, round(share * values.numel()))).indices] = True
    return mask.view(values.shape)


def encode(values: Tensor, compressor: Compressor, generator: torch.Generator) -> Encoding:
    """One tensor of an update, compressed."""
    own = compressor.of(values.shape)
    mask = top(values, own.share) if own.share < 1 else None
    kept = values.clone() if mask is None else values.masked_fill(~mask, 0)
    if own.bits is None:
        return Dense(kept, mask)
    rounded = nearest(kept, own.bits) if own.rounding == "nearest" else stochastic(kept, own.bits, generator)
    return dataclasses.replace(rounded, mask=mask)


def to_bytes(update: State, compressor: Compressor, generator: torch.Generator) -> tuple[bytes, State]:
    """An update as bytes, and the update that is read from them.

    The length of each stream in 4 bytes, then the streams of `encoding.pack`: names, shapes and widths are
    known at the other end. An `EncodingError` for numbers that are not finite.
    """
    streams, decoded = [], {}
    for name, values in update.items():
        encoded = encode(values, compressor, generator)
        streams += encoding.pack(encoded)[1].values()
        decoded[name] = encoding.decode(encoded)
    lengths = np.array([stream.size for stream in streams], "<u4")
    return b"".join([lengths.tobytes(), *(stream.tobytes() for stream in streams)]), decoded


def _description(shape: torch.Size, compressor: Compressor) -> dict:
    own = compressor.of(shape)
    rest = {"shape": list(shape), "mask": own.share < 1}
    if own.bits is None:
        return {"kind": "dense", "dtype": "float32", **rest}
    return {"kind": "uniform", "bits": own.bits, "axis": None, "affine": False, **rest}


def from_bytes(body: bytes, shapes: Mapping[str, torch.Size], compressor: Compressor) -> State:
    """The update in the bytes of `to_bytes`; an `EncodingError` for any others."""
    descriptions = {name: _description(shape, compressor) for name, shape in shapes.items()}
    streams = [(name, part) for name, own in descriptions.items() for part in encoding.stream_names(own)]
    data = np.frombuffer(body, np.uint8)
    lengths = np.frombuffer(body[: 4 * len(streams)].ljust(4 * len(streams), b"\0"), "<u4").astype(np.int64)
    if 4 * len(streams) + lengths.sum() != len(body):
        raise EncodingError(f"{len(body)} bytes are no update of {len(shapes)} tensors")
    ends = 4 * len(streams) + lengths.cumsum()
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in shapes}
    for (name, part), end, length in zip(streams, ends, lengths, strict=True):
        parts[name][part] = data[end - length : end]
    try:
        return {
            name: encoding.decode(encoding.unpack(own, parts[name])) for name, own in descriptions.items()
        }
    except (ValueError, RuntimeError) as error:
        raise EncodingError(f"no update: {error}") from None


class Feedback:
    """A sender that adds to the next update what the one before did not carry (Seide et al., 2014).

    That pays if the compressor's error is smaller than what it is given; with `stochastic` rounding to 2 bits
    it is larger, and `residual` grows from one update to the next. Without `keep` it forgets.
    """

    def __init__(self, compressor: Compressor, *, keep: bool = True) -> None:
        self.compressor, self.keep = compressor, keep
        self.residual: State = {}
        self._wanted: State = {}

    def send(self, update: State, generator: torch.Generator) -> tuple[bytes, State]:
        """As `to_bytes`, of the update and the residual together."""
        self._wanted = {name: values + self.residual.get(name, 0) for name, values in update.items()}
        body, decoded = to_bytes(self._wanted, self.compressor, generator)
        if self.keep:
            self.residual = {name: self._wanted[name] - decoded[name] for name in decoded}
        return body, decoded

    def take_back(self) -> None:
        """What was sent last has not arrived: it is all to be sent later."""
        self.residual = self._wanted if self.keep else {}
