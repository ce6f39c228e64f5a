"""encoding.py: round trips, sizes against Shannon's entropy, bytes against a decoder in plain integers."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn
from torch.nn.utils import parametrize

from nnc_utils import encoding
from nnc_utils.encoding import Dense, EncodingError, Uniform, UniformWeight, ZeroMask


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


class TestRefused:
    codes = torch.zeros(2, 3, dtype=torch.int16)
    one = torch.tensor(1.0)

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
            (Uniform(codes[:0], one, None, 4), "nothing to encode"),
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

    def test_a_shape_far_beyond_the_stream_takes_no_memory(self):
        description, streams = encoding.pack(uniform((8, 4, 3, 3), bits=8))
        with pytest.raises(EncodingError, match="do not hold"):
            encoding.unpack(description | {"shape": [8, 4, 8192, 8192]}, streams)

    @pytest.mark.parametrize("shape", [[8, 4, 3, 2], [8, 4, 3, 4], [8, 5, 3, 3], [8, 3, 3, 3]])
    def test_counts_near_the_right_one(self, shape):
        for original in (uniform(bits=2, spread=1), uniform(bits=3), uniform(bits=3, keep=0.1), dense()):
            description, streams = encoding.pack(original)
            with pytest.raises(EncodingError):
                encoding.unpack(description | {"shape": shape}, streams)

    @pytest.mark.parametrize("keep", [None, 0.4])
    @pytest.mark.parametrize("bits", [2, 6, 13])
    def test_each_byte_changed(self, bits, keep):
        """No change of frequencies or entropy-coded words passes; what passes elsewhere is valid."""
        original = uniform((8, 12, 3, 3), bits=bits, keep=keep, spread=0.7 if bits == 2 else 0.2)
        description, streams = encoding.pack(original)
        random = np.random.default_rng(0)
        counts = {"mask": original.codes.numel(), "codes": original.codes.numel()}
        if keep:
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
        for original in (uniform(bits=4, keep=0.5), uniform(bits=12), dense(keep=0.5)):
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

    @pytest.mark.parametrize("original", [uniform(keep=0.5), uniform(bits=16), dense(keep=0.5), dense()])
    def test_attach_then_read(self, original):
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        encoding.attach(layer, uniform(bits=3, keep=0.9, seed=5))
        encoding.attach(layer, original)
        assert same(original, encoding.encoded(layer))
        assert same(original, encoding.encoded(copy.deepcopy(layer)))

    @pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 1, 3, 3), (8, 4, 1, 1), (8, 4)])
    def test_results_are_laid_out_as_the_weight(self, shape):
        for weight in (torch.randn(shape), torch.randn(*shape[:1], 9, *shape[2:])[:, : shape[1]]):
            if weight.ndim == 4 and weight.is_contiguous():
                layer = nn.Conv2d(shape[1], shape[0], shape[2])
                weight = layer.to(memory_format=torch.channels_last).weight.detach().copy_(weight)
            for parametrization in (
                ZeroMask(torch.rand(shape) < 0.5),
                UniformWeight(torch.rand(8) + 0.1, bits=4),
                UniformWeight(torch.tensor(0.1), bits=4),
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
        with pytest.raises(EncodingError, match="UniformWeight, ZeroMask"):
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
