"""encoding.py: round trips, sizes against Shannon's entropy, bytes against a decoder in plain integers."""

import copy
import math
import struct

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn
from torch.nn.utils import parametrize

from nnc_utils import encoding
from nnc_utils.encoding import (
    Codebook,
    CodebookWeight,
    Dense,
    EncodingError,
    Uniform,
    UniformWeight,
    ZeroMask,
)


def uniform(shape=(8, 4, 3, 3), *, bits=8, axis=0, spread=0.3, keep=None, seed=0):
    """Normally distributed codes with random scales and, for keep < 1, a random mask."""
    generator = torch.Generator().manual_seed(seed)
    largest = 2 ** (bits - 1) - 1
    codes = (torch.randn(shape, generator=generator) * spread * largest).round().clamp(-largest, largest)
    scale = torch.rand(() if axis is None else shape[:1], generator=generator) + 0.01
    mask = None if keep is None else torch.rand(shape, generator=generator) < keep
    if mask is not None:
        codes = codes.masked_fill(~mask, 0)
    return Uniform(codes.to(torch.int16), scale, axis, bits, mask)


def dense(shape=(8, 4, 3, 3), *, dtype=torch.float32, keep=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    mask = None if keep is None else torch.rand(shape, generator=generator) < keep
    return Dense(values if mask is None else values.masked_fill(~mask, 0), mask)


def affine(shape=(8, 4, 3, 3), *, bits=8, axis=0, seed=0):
    """Normally distributed unsigned codes with random scales and zero-points."""
    generator = torch.Generator().manual_seed(seed)
    high, scales = 2**bits - 1, () if axis is None else shape[:1]
    codes = ((torch.randn(shape, generator=generator) * 0.15 + 0.5) * high).round().clamp(0, high)
    scale = torch.rand(scales, generator=generator) + 0.01
    zero_point = torch.randint(0, high + 1, scales, generator=generator)
    return Uniform(codes.short(), scale, axis, bits, None, zero_point.short())


def codebook(shape=(8, 4, 3, 3), *, levels=16, keep=None, seed=0):
    """Random levels, the middle ones most often used, and for keep < 1 a random mask."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(shape, generator=generator) * levels / 6 + levels / 2).clamp(0, levels - 1)
    mask = None if keep is None else torch.rand(shape, generator=generator) < keep
    codes = codes.to(torch.uint8)
    book = torch.randn(levels, generator=generator).sort().values
    return Codebook(codes if mask is None else codes.masked_fill(~mask, 0), book, mask)


def same(a, b):
    """Equality of two encodings in every bit and every field."""
    if type(a) is not type(b):
        return False
    for name, one in vars(a).items():
        two = getattr(b, name)
        if not isinstance(one, torch.Tensor):
            if one != two:
                return False
            continue
        if two is None or (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        if one.numpy().tobytes() != two.numpy().tobytes():
            return False
    return True


def as_arrays(streams):
    return {name: np.frombuffer(data, np.uint8) for name, data in streams.items()}


def edge_cases():
    zeros = torch.zeros(4, 3, 3, 3, dtype=torch.int16)
    one = torch.ones(4)
    lone_channel = zeros.clone()
    lone_channel[2] = torch.arange(27).view(3, 3, 3) - 13
    kept_head = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    kept_head[0] = True
    return {
        "all zero": Uniform(zeros, one, 0, 8),
        "one value": Uniform(zeros + 5, one, 0, 4),
        "extremes only": Uniform(torch.tensor([[-32767, 32767]], dtype=torch.int16), one[0], None, 16),
        "zero channels": Uniform(lone_channel, one, 0, 5),
        "one weight": Uniform(torch.tensor([[-1]], dtype=torch.int16), one[0], None, 2),
        "nothing kept": Uniform(zeros, one, 0, 4, torch.zeros_like(zeros, dtype=torch.bool)),
        "all kept": Uniform(zeros + 1, one, 0, 4, torch.ones_like(zeros, dtype=torch.bool)),
        # The last symbols, which the coder takes first, are all the first value of the alphabet.
        "tail of zeros": Uniform(zeros + kept_head, one, 0, 2, kept_head),
        "one level": Codebook(torch.zeros(3, 2, dtype=torch.uint8), torch.tensor([-0.5])),
        "last level only": Codebook(torch.full((3, 2), 255, dtype=torch.uint8), torch.arange(256.0)),
        "nothing kept, levels": Codebook(
            torch.zeros(3, 2, dtype=torch.uint8), torch.tensor([-1.0, 1]), torch.zeros(3, 2, dtype=torch.bool)
        ),
        "ends of the affine codes": Uniform(
            torch.tensor([[0, 255]]).short(), one[0], None, 8, None, torch.tensor(255).short()
        ),
        "one float": Dense(torch.tensor([[0.5]])),
        "nothing kept, floats": Dense(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)),
        "minus zero": Dense(torch.tensor([[-0.0, 1e-42, 3e38]])),
    }


class TestRoundTrip:
    @pytest.mark.parametrize("keep", [None, 0.5, 0.03])
    @pytest.mark.parametrize("axis", [None, 0])
    @pytest.mark.parametrize("bits", range(2, 17))
    def test_uniform(self, bits, axis, keep):
        original = uniform(bits=bits, axis=axis, keep=keep)
        assert same(original, encoding.unpack(*encoding.pack(original)))

    @pytest.mark.parametrize("keep", [None, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_dense(self, dtype, keep):
        original = dense(dtype=dtype, keep=keep)
        assert same(original, encoding.unpack(*encoding.pack(original)))

    @pytest.mark.parametrize("axis", [None, 0])
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_affine(self, bits, axis):
        original = affine(bits=bits, axis=axis)
        found = encoding.unpack(*encoding.pack(original))
        assert same(original, found)
        signed = original.codes.numpy() - encoding._column(original.zero_point, 4).numpy()
        expected = signed.astype(np.float32) * encoding._column(original.scale, 4).numpy()
        assert (encoding.decode(found).numpy() == expected).all()

    @pytest.mark.parametrize("keep", [None, 0.5, 0.03])
    @pytest.mark.parametrize("levels", [1, 2, 3, 16, 200, 256])
    def test_codebook(self, levels, keep):
        original = codebook(levels=levels, keep=keep)
        found = encoding.unpack(*encoding.pack(original))
        assert same(original, found)
        expected = original.codebook.numpy()[original.codes.numpy()]
        if keep:
            expected = np.where(original.mask.numpy(), expected, 0)
        assert encoding.decode(found).numpy().tobytes() == expected.tobytes()
        assert original.bits == max(1, math.ceil(math.log2(levels)))

    def test_bytes_made_by_hand(self):
        """A header that says that all bits are stored as they are, then these."""
        head = bytes([2, 0, 0])
        description = {"kind": "uniform", "bits": 2, "axis": None, "affine": True, "shape": [2, 2]}
        codes = head + bytes([3 | 0 << 2 | 1 << 4 | 2 << 6])
        streams = {"codes": codes, "scale": struct.pack("<f", 0.5), "zero_point": b"\1"}
        found = encoding.unpack(description | {"mask": False}, as_arrays(streams))
        assert encoding.decode(found).tolist() == [[1.0, -0.5], [0.0, 0.5]]
        description = {"kind": "codebook", "levels": 3, "shape": [2, 2], "mask": True}
        mask = bytes([1, 0, 0, 0b1011])
        streams = {"codes": head + bytes([2 | 0 << 2 | 1 << 4]), "mask": mask}
        streams["codebook"] = struct.pack("<3f", -1.5, 0.25, 4)
        found = encoding.unpack(description, as_arrays(streams))
        assert encoding.decode(found).tolist() == [[4.0, -1.5], [0.0, 0.25]]
        streams["codes"] = head + bytes([2 | 3 << 2 | 1 << 4])
        with pytest.raises(EncodingError, match="symbol 3 is above 2"):
            encoding.unpack(description, as_arrays(streams))

    @pytest.mark.parametrize("name", edge_cases())
    def test_edges(self, name):
        original = edge_cases()[name]
        assert same(original, encoding.unpack(*encoding.pack(original)))

    @pytest.mark.parametrize("bits", [2, 8, 12, 16])
    def test_more_symbols_than_one_chunk(self, bits, monkeypatch):
        monkeypatch.setattr(encoding, "CHUNK", 64)
        original = uniform((5, 7, 3, 3), bits=bits, keep=0.7)
        assert same(original, encoding.unpack(*encoding.pack(original)))

    def test_decode_is_codes_times_scale(self):
        original = uniform(bits=8, axis=0)
        expected = original.codes.numpy().astype(np.float32) * original.scale.numpy()[:, None, None, None]
        assert (encoding.decode(original).numpy() == expected).all()

    def test_ternary_zeros_are_no_mask(self):
        ternary, masked = uniform(bits=2), uniform(bits=2, keep=0.5)
        assert (ternary.codes == 0).any()
        assert encoding.unpack(*encoding.pack(ternary)).mask is None
        kept_zero = (masked.codes == 0) & masked.mask
        assert kept_zero.any()
        assert encoding.unpack(*encoding.pack(masked)).mask[kept_zero].all()

    def test_any_integer_type_of_codes(self):
        codes = torch.tensor([[127, -127]])
        for dtype in (torch.int8, torch.int32, torch.int64):
            packed = encoding.pack(Uniform(codes.to(dtype), torch.tensor(1.0), None, 8))
            assert encoding.unpack(*packed).codes.tolist() == codes.tolist()


class TestSize:
    @pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12])
    def test_close_to_the_entropy(self, bits):
        original = uniform((64, 64, 3, 3), bits=bits)
        counts = np.unique(original.codes.numpy(), return_counts=True)[1]
        ideal = original.codes.numel() * entropy(counts, base=2)
        side_information = 8 * (4 * 64 + 3 + 2 * min(2**bits, 256) + 8)
        packed = encoding.pack(original)
        assert encoding.payload_bits(packed) <= 1.01 * ideal + side_information
        if bits <= 8:  # wider codes are spread so thin that no table of all of them would pay
            assert encoding.payload_bits(packed) >= ideal

    @pytest.mark.parametrize("keep", [None, 0.1])
    @pytest.mark.parametrize("levels", [2, 5, 16, 256])
    def test_codebooks_are_close_to_the_entropy(self, levels, keep):
        original = codebook((64, 64, 3, 3), levels=levels, keep=keep)
        kept = original.codes if keep is None else original.codes[original.mask]
        counts = np.unique(kept.numpy(), return_counts=True)[1]
        ideal = kept.numel() * entropy(counts, base=2) / 8
        _, streams = encoding.pack(original)
        assert ideal <= streams["codes"].size <= 1.01 * ideal + 3 + 2 * levels + 8
        assert streams["codebook"].size == 4 * levels

    def test_zero_points_take_a_byte_each(self):
        _, streams = encoding.pack(affine())
        assert [streams[name].size for name in ("scale", "zero_point")] == [32, 8]

    def test_mask_takes_its_entropy(self):
        original = uniform((64, 64, 3, 3), bits=4, keep=0.1)
        kept = int(original.mask.sum())
        _, streams = encoding.pack(original)
        ideal = original.mask.numel() * entropy([kept, original.mask.numel() - kept], base=2) / 8
        assert ideal <= streams["mask"].size <= 1.01 * ideal + 16
        assert streams["codes"].size < kept * 4 / 8 + 64

    def test_never_much_larger_than_the_plain_codes(self):
        for bits in range(2, 17):
            for count in (1, 2, 10, 100):
                original = uniform((1, count), bits=bits, axis=None, spread=3)
                assert encoding.payload_bits(original) <= 8 * (math.ceil(count * bits / 8) + 3 + 4)

    def test_constant_tensor_takes_no_bits_per_weight(self):
        constant = Uniform(torch.full((64, 64, 3, 3), 3, dtype=torch.int16), torch.tensor(1.0), None, 4)
        assert encoding.payload_bits(constant) == 8 * (3 + 4)

    def test_floats(self):
        count = 8 * 4 * 3 * 3
        assert encoding.payload_bits(dense()) == 32 * count
        assert encoding.payload_bits(dense(dtype=torch.float16)) == 16 * count
        masked = dense(keep=0.25)
        _, streams = encoding.pack(masked)
        assert streams["values"].size == 4 * int(masked.mask.sum())
        assert encoding.payload_bits(masked) == 8 * (streams["values"].size + streams["mask"].size)


def decode_in_integers(stream, count):
    """Packed symbols, read in whole numbers only, as the module's text describes them."""
    data = bytes(stream)
    low, first, more = data[:3]
    highs, end = [first] * count, len(data) - math.ceil(count * low / 8)
    if more:
        table = [int.from_bytes(data[i : i + 2], "little") for i in range(3, 5 + 2 * more, 2)]
        assert sum(table) == 2**16
        # Of 2**24 shares each value has one in any case, the rest goes by frequency.
        values = len(table)
        starts = [sum(table[:i]) * (2**24 - values) // 2**16 + i for i in range(values)] + [2**24]
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(5 + 2 * more, end, 4)]
        state = 0
        for i in range(count):
            while state < 2**32 and words:
                state = state << 32 | words.pop()
            share = state % 2**24
            value = next(v for v in range(values) if starts[v] <= share < starts[v + 1])
            state = (state >> 24) * (starts[value + 1] - starts[value]) + share - starts[value]
            highs[i] = first + value
        while words:
            state = state << 32 | words.pop()
        assert state == 2**24 - 1
    raw = int.from_bytes(data[end:], "little")
    return [high << low | (raw >> i * low) % 2**low for i, high in enumerate(highs)]


@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16])
def test_bytes_mean_the_same_in_integer_arithmetic(bits):
    """So no platform's floats decide what a file means."""
    original = uniform((16, 24, 3, 3), bits=bits, spread=0.2, keep=0.6)
    _, streams = encoding.pack(original)
    mask = decode_in_integers(streams["mask"], original.codes.numel())
    assert mask == original.mask.flatten().int().tolist()
    codes = decode_in_integers(streams["codes"], sum(mask))
    assert [c - (2 ** (bits - 1) - 1) for c in codes] == original.codes[original.mask].tolist()
    if bits <= 8:
        unsigned, indices = affine((16, 24, 3, 3), bits=bits), codebook((16, 24, 3, 3), levels=2**bits - 1)
        for other in (unsigned, indices):
            codes = decode_in_integers(encoding.pack(other)[1]["codes"], other.codes.numel())
            assert codes == other.codes.flatten().tolist()


class TestRefused:
    codes = torch.zeros(2, 3, dtype=torch.int16)
    one = torch.tensor(1.0)
    zero = torch.tensor(0).short()
    indices = codes.to(torch.uint8)
    nothing = torch.zeros(2, 3, dtype=torch.bool)

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (Uniform(codes + 8, one, None, 4), "4 bits reach from -7 to 7"),
            (Uniform(codes - 2, one, None, 2), "2 bits reach from -1 to 1"),
            (Uniform(codes, one, None, 1), "2 to 16"),
            (Uniform(codes, one, None, 17), "2 to 16"),
            (Uniform(codes, one, 1, 4), "axis"),
            (Uniform(codes, one, 0, 4), "shape"),
            (Uniform(codes, torch.ones(3), 0, 4), "shape"),
            (Uniform(codes, one.double(), None, 4), "float32"),
            (Uniform(codes, one * 0, None, 4), "positive"),
            (Uniform(codes, -one, None, 4), "positive"),
            (Uniform(codes, one * math.nan, None, 4), "positive"),
            (Uniform(codes, one * 1e38, None, 4), "infinite"),
            (Uniform(codes.float(), one, None, 4), "integers"),
            (Uniform(codes + 1, one, None, 4, torch.zeros(2, 3, dtype=torch.bool)), "outside the mask"),
            (Uniform(codes, one, None, 4, torch.ones(2, 3)), "bool"),
            (Uniform(codes, one, None, 4, torch.ones(3, 2, dtype=torch.bool)), "bool of shape"),
            (Uniform(codes[:0], one, None, 4), "shape is .0, 3.: .* at least 1"),
            (Uniform(one.short(), one, None, 4), "shape is .."),
            (Uniform(codes, one, None, 9, None, zero), "bits is 9: .* from 2 to 8"),
            (Uniform(codes, one, None, 4, ~nothing, zero), "affine codes take no mask"),
            (
                Uniform(codes - 1, one, None, 4, None, zero),
                "codes run from -1 to -1: 4 bits reach from 0 to 15",
            ),
            (Uniform(codes + 16, one, None, 4, None, zero), "codes run from 16"),
            (Uniform(codes, one, None, 4, None, zero - 1), "zero-points run from -1"),
            (Uniform(codes, one, None, 4, None, zero + 16), "zero-points run from 16"),
            (Uniform(codes, one, None, 4, None, zero.int()), "zero-point is torch.int32"),
            (Uniform(codes, one, None, 4, None, zero.view(1)), "zero-point is torch.int16 of shape .1,."),
            (Codebook(indices, torch.tensor([1.0, 1.0])), "above the one before"),
            (Codebook(indices, torch.tensor([1.0, 0.0])), "above the one before"),
            (Codebook(indices, torch.tensor([0.0, math.nan])), "not finite"),
            (Codebook(indices, torch.tensor([0.0, math.inf])), "not finite"),
            (Codebook(indices, torch.tensor([])), "levels is 0: .* from 1 to 256"),
            (Codebook(indices, torch.arange(257.0)), "levels is 257"),
            (Codebook(indices, one), "the codebook is .* of shape .1,. is needed"),
            (Codebook(indices, torch.arange(3.0).double()), "the codebook is torch.float64"),
            (Codebook(indices + 2, torch.arange(2.0)), "codes run from 2 to 2: 2 levels reach from 0 to 1"),
            (Codebook(codes, torch.arange(2.0)), "codes are torch.int16: uint8"),
            (Codebook(indices + 1, torch.arange(2.0), nothing), "outside the mask"),
            (Dense(torch.tensor([[math.nan, 1.0]])), "1 of 2 weights"),
            (Dense(torch.tensor([[math.inf, -math.inf]])), "2 of 2 weights"),
            (Dense(torch.zeros(2, 3, dtype=torch.bfloat16)), "bfloat16"),
        ],
    )
    def test_to_write(self, bad, words):
        with pytest.raises(EncodingError, match=words):
            encoding.pack(bad)

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "codebook"},
            {"affine": True},
            {"affine": 0},
            {"affine": None},
            {"levels": 2},
            {"kind": ["uniform"]},
            {"kind": "dense"},
            {"shape": [8, 4, 3]},
            {"shape": [8, 4, 3, 4]},
            {"shape": [8, 4, 3, -3]},
            {"shape": [8, 4, 3, 3.0]},
            {"shape": [2**20, 2**20]},
            {"shape": [1] * 1000},
            {"shape": "8433"},
            {"bits": 7},
            {"bits": True},
            {"bits": "8"},
            {"axis": None},
            {"axis": 1},
            {"axis": False},
            {"mask": True},
            {"mask": 0},
            {"extra": 1},
        ],
    )
    def test_descriptions(self, change):
        description, streams = encoding.pack(uniform(bits=8))
        with pytest.raises(EncodingError):
            encoding.unpack(description | change, streams)

    @pytest.mark.parametrize(
        "change",
        [{"levels": n} for n in (15, 17, 0, -1, 257, True, 16.0, "16", None)] + [{"mask": True}, {"bits": 4}],
    )
    def test_descriptions_of_codebooks(self, change):
        description, streams = encoding.pack(codebook(levels=16))
        with pytest.raises(EncodingError):
            encoding.unpack(description | change, streams)

    def test_a_shape_far_beyond_the_stream_takes_no_memory(self):
        description, streams = encoding.pack(uniform((8, 4, 3, 3), bits=8))
        with pytest.raises(EncodingError, match="do not hold"):
            encoding.unpack(description | {"shape": [8, 4, 8192, 8192]}, streams)

    @pytest.mark.parametrize("shape", [[8, 4, 3, 2], [8, 4, 3, 4], [8, 5, 3, 3], [8, 3, 3, 3]])
    def test_counts_near_the_right_one(self, shape):
        symmetric = uniform(bits=2, spread=1), uniform(bits=3), uniform(bits=3, keep=0.1)
        for original in (*symmetric, dense(), affine(bits=3), codebook(), codebook(keep=0.1)):
            description, streams = encoding.pack(original)
            with pytest.raises(EncodingError):
                encoding.unpack(description | {"shape": shape}, streams)

    @pytest.mark.parametrize(
        "original",
        [
            *(uniform((8, 12, 3, 3), bits=2, keep=keep, spread=0.7) for keep in (None, 0.4)),
            *(uniform((8, 12, 3, 3), bits=bits, keep=k, spread=0.2) for bits in (6, 13) for k in (None, 0.4)),
            affine((8, 12, 3, 3), bits=4),
            *(codebook((8, 12, 3, 3), levels=11, keep=keep) for keep in (None, 0.4)),
        ],
    )
    def test_each_byte_changed(self, original):
        """No change of frequencies or entropy-coded words passes; what passes elsewhere is valid."""
        description, streams = encoding.pack(original)
        random = np.random.default_rng(0)
        counts = {"mask": original.codes.numel(), "codes": original.codes.numel()}
        if original.mask is not None:
            counts["codes"] = int(original.mask.sum())
        checked = 0
        for name, stream in streams.items():
            raw_bytes = math.ceil(counts[name] * int(stream[0]) / 8) if name in counts else stream.size
            for at in range(stream.size):
                changed = stream.copy()
                changed[at] ^= random.integers(1, 256)
                if 3 <= at < stream.size - raw_bytes:
                    checked += 1
                    with pytest.raises(EncodingError):
                        encoding.unpack(description, streams | {name: changed})
                    continue
                try:
                    found = encoding.unpack(description, streams | {name: changed})
                except EncodingError:
                    continue
                assert same(found, encoding.unpack(*encoding.pack(found)))
        assert checked > 60

    def test_cuts_and_additions(self):
        others = affine(bits=4), codebook(keep=0.5)
        for original in (uniform(bits=4, keep=0.5), uniform(bits=12), dense(keep=0.5), *others):
            description, streams = encoding.pack(original)
            for name, stream in streams.items():
                longer = [np.append(stream, np.zeros(more, np.uint8)) for more in (1, 2, 4)]
                for other in [stream[:size] for size in range(stream.size)] + longer:
                    with pytest.raises(EncodingError):
                        encoding.unpack(description, streams | {name: other})
            with pytest.raises(EncodingError, match="described"):
                encoding.unpack(description, {})
            with pytest.raises(EncodingError, match="described"):
                encoding.unpack(description, streams | {"more": stream})

    def test_noise(self):
        random = np.random.default_rng(1)
        description, streams = encoding.pack(uniform(bits=8))
        for _ in range(2000):
            noise = random.integers(0, 256, random.integers(0, 2000), dtype=np.uint8)
            if noise.size > 3:
                noise[:3] = 0, 0, random.integers(0, 255)
            with pytest.raises(EncodingError):
                encoding.unpack(description, streams | {"codes": noise})


class TestOnANetwork:
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounds_as_torch_does(self, bits, per_channel):
        """Value and gradient of torch's fake quantization; with powers of 2 as scales both divide exactly."""
        largest = 2 ** (bits - 1) - 1
        weight = torch.randn(6, 5, 3, 3) * largest / 4
        scale = 2.0 ** torch.arange(-3, 3) if per_channel else torch.tensor(0.5)
        ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
        out = UniformWeight(scale, bits=bits)(ours)
        if per_channel:
            zero = torch.zeros(6, dtype=torch.int32)
            expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, -largest, largest)
        else:
            expected = torch.fake_quantize_per_tensor_affine(theirs, 0.5, 0, -largest, largest)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(weight)
        out.backward(upstream)
        expected.backward(upstream)
        # On the border itself the conventions differ.
        inside = (weight / encoding._column(scale, 4)).abs().sub(largest).abs() > 0.51
        assert torch.equal(ours.grad[inside], theirs.grad[inside])
        assert (ours.grad == 0).any() or bits == 8

    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounds_affine_codes_as_torch_does(self, bits, per_channel):
        original = affine((6, 5, 3, 3), bits=bits, axis=0 if per_channel else None)
        high, zero = 2**bits - 1, original.zero_point
        scale = 2.0 ** torch.arange(-3, 3) if per_channel else torch.tensor(0.5)
        spread = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)) * high / 2
        weight = spread * encoding._column(scale, 4)
        ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
        quantizer = UniformWeight(scale, bits=bits, zero_point=zero)
        out = quantizer(ours)
        if per_channel:
            expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero.int(), 0, 0, high)
        else:
            expected = torch.fake_quantize_per_tensor_affine(theirs, 0.5, int(zero), 0, high)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(weight)
        out.backward(upstream)
        expected.backward(upstream)
        codes = weight / encoding._column(scale, 4) + encoding._column(zero, 4)
        inside = torch.minimum(codes.abs(), (codes - high).abs()) > 0.51  # borders: conventions differ
        assert torch.equal(ours.grad[inside], theirs.grad[inside])
        assert (ours.grad == 0).any()
        stored = Uniform(quantizer.codes(weight), scale, original.axis, bits, None, zero)
        assert torch.equal(encoding.decode(stored), out)

    @pytest.mark.parametrize("bits", [2, 5, 8, 13, 16])
    def test_forward_is_the_decoded_encoding_bit_for_bit(self, bits):
        layer = nn.Conv2d(4, 8, 3)
        largest = 2 ** (bits - 1) - 1
        scale = torch.rand(8) * 0.1 + 1e-3
        grid = torch.linspace(-1.5, 1.5, layer.weight.numel()).view_as(layer.weight) * largest
        with torch.no_grad():
            layer.weight.copy_(grid * scale.view(-1, 1, 1, 1))
            layer.weight[0, 0, 0, 0] = -0.0
            layer.weight[1, 0, 0] = torch.tensor([0.5, -0.5, -1e-30]) * scale[1]
        mask = torch.rand_like(layer.weight) < 0.6
        parametrize.register_parametrization(layer, "weight", ZeroMask(mask))
        parametrize.register_parametrization(layer, "weight", UniformWeight(scale, bits=bits))
        found = encoding.unpack(*encoding.pack(encoding.encoded(layer)))
        assert encoding.decode(found).numpy().tobytes() == layer.weight.detach().numpy().tobytes()
        assert torch.equal(found.mask, mask)

    @pytest.mark.parametrize(
        "original",
        [
            *(uniform(keep=0.5), uniform(bits=16), dense(keep=0.5), dense()),
            *(affine(), affine(bits=3, axis=None), codebook(levels=256), codebook(levels=5, keep=0.5)),
        ],
    )
    def test_attach_then_read(self, original):
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        encoding.attach(layer, uniform(bits=3, keep=0.9, seed=5))
        encoding.attach(layer, original)
        assert same(original, encoding.encoded(layer))
        assert same(original, encoding.encoded(copy.deepcopy(layer)))
        assert layer.weight.detach().numpy().tobytes() == encoding.decode(original).numpy().tobytes()
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        other = copy.deepcopy(layer)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(layer.state_dict())
        assert same(original, encoding.encoded(other))

    @pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 1, 3, 3), (8, 4, 1, 1), (8, 4)])
    def test_results_are_laid_out_as_the_weight(self, shape):
        for weight in (torch.randn(shape), torch.randn(*shape[:1], 9, *shape[2:])[:, : shape[1]]):
            if weight.ndim == 4 and weight.is_contiguous():
                layer = nn.Conv2d(shape[1], shape[0], shape[2])
                weight = layer.to(memory_format=torch.channels_last).weight.detach().copy_(weight)
            for parametrization in (
                ZeroMask(torch.rand(shape) < 0.5),
                UniformWeight(torch.rand(8) + 0.1, bits=4),
                UniformWeight(torch.tensor(0.1), bits=4, learn_scale=True),
                UniformWeight(torch.rand(8) + 0.1, bits=4, zero_point=torch.arange(8).short()),
                CodebookWeight(torch.randint(0, 5, shape).to(torch.uint8), torch.randn(5)),
            ):
                result = parametrization(weight)
                assert torch.equal(result, parametrization(weight.contiguous().clone()))
                dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
                assert result.stride() == weight.stride() or not dense

    def test_training_keeps_zeros_and_codes(self):
        layer = nn.Linear(16, 4)
        original = uniform((4, 16), bits=4, keep=0.5)
        encoding.attach(layer, original)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
        found = encoding.encoded(layer)
        assert torch.equal(found.mask, original.mask)
        assert (layer.weight[~original.mask] == 0).all()
        assert not torch.equal(found.codes, original.codes)

    def test_a_level_gets_the_sum_of_its_weights_gradients(self):
        original = codebook((4, 16), levels=7, keep=0.6)
        layer = nn.Linear(16, 4)
        encoding.attach(layer, original)
        upstream = torch.randn(4, 16)
        layer.weight.backward(upstream)
        of_level = [upstream[(original.codes == i) & original.mask].sum() for i in range(7)]
        chain = layer.parametrizations.weight
        torch.testing.assert_close(chain[0].codebook.grad, torch.stack(of_level))
        assert chain.original.grad is None

    @pytest.mark.parametrize("keep", [None, 0.6])
    def test_levels_that_crossed_are_sorted_and_merged(self, keep):
        layer = nn.Linear(16, 4)
        encoding.attach(layer, codebook((4, 16), levels=6, keep=keep))
        chain = layer.parametrizations.weight
        chain[0].codebook.data = torch.tensor([0.5, -2.0, -0.0, 0.5, 0.0, -7.0])
        found = encoding.unpack(*encoding.pack(encoding.encoded(layer)))
        assert found.codebook.tolist() == [-7.0, -2.0, 0.0, 0.5]
        assert encoding.decode(found).numpy().tobytes() == layer.weight.detach().numpy().tobytes()
        assert chain[0].codebook.tolist()[0] == 0.5

    def test_training_moves_levels_and_keeps_codes(self):
        layer, original = nn.Linear(16, 4), codebook((4, 16), levels=4, keep=0.5)
        encoding.attach(layer, original)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
        found = encoding.encoded(layer)
        assert torch.equal(encoding.decode(found), layer.weight)
        assert torch.equal(found.mask, original.mask)
        assert not torch.equal(found.codebook, original.codebook)

    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_learned_scales_have_the_gradient_of_lsq(self, bits, per_channel, zero):
        """Equation 3 in closed form; finite differences where they mean the same."""
        generator = torch.Generator().manual_seed(bits)
        low, high = (0, 2**bits - 1) if zero else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        scale = 2.0 ** torch.arange(-3, 3).double() if per_channel else torch.tensor(0.5).double()
        zero_point = torch.randint(0, high + 1, scale.shape, generator=generator).short() if zero else None
        shift = encoding._column(zero_point, 4) if zero else torch.tensor(0)
        ends = low - shift, high - shift
        ratio = torch.randn(6, 5, 3, 3, generator=generator).double() * high * 0.7
        ratio[:, :1] = ends[1].double()
        weight = (ratio * encoding._column(scale, 4)).requires_grad_()
        quantizer = UniformWeight(scale, bits=bits, zero_point=zero_point, learn_scale=True)
        out, upstream = quantizer(weight), torch.randn(6, 5, 3, 3, generator=generator).double()
        out.backward(upstream)
        plain = UniformWeight(scale, bits=bits, zero_point=zero_point)(weight)
        assert torch.equal(out, plain)

        inside = (ratio > ends[0]) & (ratio < ends[1])
        assert inside.any() and (~inside).any()
        assert torch.equal(weight.grad, upstream * inside)
        share = 1 / math.sqrt(ratio.numel() / scale.numel() * high)
        clipped = torch.minimum(torch.maximum(ratio, ends[0]), ends[1])
        each = upstream * torch.where(inside, ratio.round() - ratio, clipped)
        expected = share * (each.flatten(1).sum(1) if per_channel else each.sum())
        torch.testing.assert_close(quantizer.scale.grad, expected)

        # Outside the range weights are Q * scale; inside, the estimator holds the rounding error fixed.
        error = torch.where(inside, ratio.round() - ratio, 0.0)

        def loss(scale):
            column = encoding._column(scale, 4)
            codes = (weight.detach() / column).clamp(*ends)
            return upstream * (torch.where(inside, codes + error, clipped) * column)

        step = 1e-6 * scale
        each = (loss(scale + step) - loss(scale - step)) / encoding._column(2 * step, 4)
        expected = share * (each.flatten(1).sum(1) if per_channel else each.sum())
        torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-6, atol=1e-6)

    def test_learned_scales_are_copied_saved_and_attached_as_plain_ones(self):
        layer = nn.Conv2d(4, 8, 3)
        scale = layer.weight.detach().flatten(1).abs().amax(1) / 7
        learned = UniformWeight(scale, bits=4, learn_scale=True)
        parametrize.register_parametrization(layer, "weight", learned)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        layer.weight.square().sum().backward()
        optimizer.step()
        copied, plain = copy.deepcopy(layer), nn.Conv2d(4, 8, 3)
        found = encoding.encoded(layer)
        encoding.attach(plain, found)
        assert not torch.equal(found.scale, scale)
        assert torch.equal(plain.weight, layer.weight)
        assert {n for n, _ in plain.named_parameters()} == {"parametrizations.weight.original", "bias"}
        plain.load_state_dict(layer.state_dict())
        for other in (copied, plain):
            assert same(found, encoding.encoded(other))
            assert torch.equal(other.weight, layer.weight)
        copied.weight.sum().backward()
        assert copied.parametrizations.weight[0].scale.grad.any()

    @pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
    def test_scales_and_levels_that_training_led_astray(self, bad):
        layer = nn.Linear(3, 2)
        quantizer = UniformWeight(torch.ones(2), bits=4, learn_scale=True)
        parametrize.register_parametrization(layer, "weight", quantizer)
        quantizer.scale.data[1] = bad
        if bad == -0.1:  # the step is its absolute value
            assert encoding.encoded(layer).scale.tolist() == pytest.approx([1.0, 0.1])
            assert torch.equal(encoding.decode(encoding.encoded(layer)), layer.weight)
        else:
            with pytest.raises(EncodingError, match="a scale is not positive, or .* lower learning rate"):
                encoding.encoded(layer)
        encoding.attach(layer, codebook((2, 3), levels=3))
        layer.parametrizations.weight[0].codebook.data[1] = bad
        if math.isfinite(bad):
            encoding.encoded(layer)
            return
        with pytest.raises(EncodingError, match="levels are not finite"):
            encoding.encoded(layer)

    def test_half_precision(self):
        layer = nn.Linear(3, 2)
        found = encoding.encoded(layer, torch.float16)
        assert torch.equal(found.values, layer.weight.detach().half())
        nn.init.constant_(layer.weight, 1e6)
        with pytest.raises(EncodingError, match="infinite as torch.float16"):
            encoding.encoded(layer, torch.float16)

    def test_foreign_parametrizations_are_named(self):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        with pytest.raises(EncodingError, match="_WeightNorm"):
            encoding.encoded(layer)
        layer = nn.Linear(3, 2)
        parametrize.register_parametrization(layer, "weight", UniformWeight(torch.tensor(1.0), bits=4))
        parametrize.register_parametrization(layer, "weight", ZeroMask(torch.ones(2, 3, dtype=torch.bool)))
        with pytest.raises(EncodingError, match="parametrizations UniformWeight, ZeroMask: .* ZeroMask, Uni"):
            encoding.encoded(layer)
        encoding.attach(layer, dense((2, 3), keep=0.5))
        book = codebook((2, 3))
        parametrize.register_parametrization(layer, "weight", CodebookWeight(book.codes, book.codebook))
        with pytest.raises(EncodingError, match="ZeroMask, CodebookWeight: .*; CodebookWeight, ZeroMask"):
            encoding.encoded(layer)

    def test_weights_that_cannot_be_stored(self):
        layer = nn.Linear(3, 2)
        with pytest.raises(EncodingError, match="float64"):
            encoding.encoded(copy.deepcopy(layer).double())
        with pytest.raises(EncodingError, match="shape"):
            encoding.attach(layer, dense())
        nn.init.constant_(layer.weight, math.nan)
        with pytest.raises(EncodingError, match="6 of 6 weights are not finite"):
            encoding.encoded(layer)
