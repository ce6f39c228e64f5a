"""Whole numbers as bytes, entropy-coded by asymmetric numeral systems (Duda et al., 2015).

The symbols are coded under their own frequencies, which are stored beside them. Little-endian throughout:

    1 byte      how many of the lowest bits of each symbol are stored as they are
    1 byte      the smallest value of the remaining high bits
    1 byte      how many values follow it; if none, the next two parts are empty
    2 bytes     for each value its frequency; the frequencies sum to 2**16
    4 bytes     for each word of the entropy coder
    the low bits, packed, the first symbol in the lowest bit
"""

from __future__ import annotations

import math

import constriction
import numpy as np

TOTAL = 2**16  # what a frequency table sums to
# What the entropy coder starts from: with fewer bits, some symbols would leave no trace in it.
START = 2**24 - 1


class EncodingError(ValueError):
    """Numbers that cannot be written, or bytes that hold none."""


def pack(symbols: np.ndarray, *, largest: int) -> np.ndarray:
    """Symbols in 0..largest, uint16 (n,), as bytes, split into high and low bits where that takes fewest."""
    if not symbols.size:
        return np.zeros(0, np.uint8)
    bits = largest.bit_length()
    counts = np.bincount(symbols, minlength=2**bits)
    splits = [_split(counts, low) for low in range(max(0, bits - 8), bits + 1)]
    _, low, first, table = min(splits, key=lambda split: split[0])
    parts = [np.array([low, first, len(table) - 1], np.uint8)]
    if len(table) > 1:
        coder = constriction.stream.stack.AnsCoder(np.array([START], np.uint32))
        coder.encode_reverse((symbols >> low).astype(np.int32) - first, _model(table))
        parts += [table.astype("<u2").view(np.uint8), coder.get_compressed().astype("<u4").view(np.uint8)]
    low_bits = (symbols[:, None] >> np.arange(low, dtype=np.uint16) & 1).astype(np.uint8)
    return np.concatenate([*parts, np.packbits(low_bits, bitorder="little")])


def _split(counts: np.ndarray, low: int) -> tuple[float, int, int, np.ndarray]:
    """Bytes that symbols of these counts take (at most) with `low` plain bits, low, first value, frequencies.

    Frequencies are whole numbers near the counts' shares, at least 1 where the count is, and sum to TOTAL.
    """
    high_counts = counts.reshape(-1, 2**low).sum(1)
    used = np.flatnonzero(high_counts)
    first, shares = int(used[0]), high_counts[used[0] : used[-1] + 1]
    table = (shares > 0) + shares * (TOTAL - used.size) // int(shares.sum())
    table[shares.argmax()] += TOTAL - table.sum()
    cost = int(counts.sum()) * low / 8
    if len(table) > 1:
        cost += 2 * table.size - float(high_counts[used] @ np.log2(table[used - first] / TOTAL)) / 8
        cost += 7  # at most: START, and rounding up to whole words
    return cost, low, first, table


def _model(table: np.ndarray) -> constriction.stream.model.Model:
    # float64 holds the frequencies and each product that `perfect=False` forms of them exactly, so
    # that every platform derives the same model.
    return constriction.stream.model.Categorical(table.astype(np.float64), perfect=False, lazy=False)


def unpack(stream: np.ndarray, count: int, *, largest: int) -> np.ndarray:
    """The `count` symbols in 0..largest that `pack` turned into bytes, uint16; else an `EncodingError`."""
    if not count and not stream.size:
        return np.zeros(0, np.uint16)
    low, first, more = (int(byte) for byte in np.resize(stream[:3], 3))
    words, tail = 3 + 2 * (more + 1) * (more > 0), stream.size - math.ceil(count * low / 8)
    if low > 16 or (tail != 3 if not more else tail <= words or (tail - words) % 4):
        raise EncodingError(f"{stream.size} bytes do not hold {count} symbols")
    symbols = np.full(count, first, np.uint16)
    if more:
        table = np.frombuffer(stream[3:words].tobytes(), "<u2").astype(np.int64)
        compressed = np.frombuffer(stream[words:tail].tobytes(), "<u4").astype(np.uint32)
        if table.sum() != TOTAL or not compressed[-1]:
            raise EncodingError("the frequencies or words are not those of an entropy coder")
        coder = constriction.stream.stack.AnsCoder(compressed)
        symbols += coder.decode(_model(table), count).astype(np.uint16)
        if coder.get_compressed().tolist() != [START]:
            raise EncodingError(f"the entropy-coded words do not hold {count} symbols")
    low_bits = np.unpackbits(stream[tail:], count=count * low, bitorder="little").reshape(count, low)
    symbols = (symbols << low) + low_bits @ (1 << np.arange(low, dtype=np.uint16))
    if symbols.max() > largest:
        raise EncodingError(f"symbol {symbols.max()} is above {largest}")
    return symbols
