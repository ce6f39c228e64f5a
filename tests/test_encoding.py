"""encoding.py: round trips, sizes against Shannon's entropy, bytes against a decoder in plain integers."""

import copy
import math
import struct

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parametrize

from nnc_utils import encoding, entropy
from nnc_utils.encoding import Codebook, Dense, EncodingError, Uniform
from nnc_utils.parametrizations import CodebookWeight, UniformWeight, ZeroMask, column


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


def bits_of(value):
    """All that distinguishes a field of an encoding."""
    tensor = isinstance(value, torch.Tensor)
    return (value.dtype, value.shape, value.numpy().tobytes()) if tensor else value


def same(a, b):
    """Equality of two encodings in every bit and every field."""
    fields = ({name: bits_of(value) for name, value in vars(each).items()} for each in (a, b))
    return type(a) is type(b) and next(fields) == next(fields)


def edge_cases():
    zeros, one = torch.zeros(4, 3, 3, 3, dtype=torch.int16), torch.ones(4)
    nothing, indices = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.uint8)
    lone_channel, kept_head = zeros.clone(), torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    lone_channel[2] = torch.arange(27).view(3, 3, 3) - 13
    kept_head[0] = True
    return [
        Uniform(zeros, one, 0, 8),
        Uniform(zeros + 5, one, 0, 4),
        Uniform(torch.tensor([[-32767, 32767]], dtype=torch.int16), one[0], None, 16),
        Uniform(lone_channel, one, 0, 5),
        Uniform(torch.tensor([[-1]], dtype=torch.int16), one[0], None, 2),
        Uniform(zeros, one, 0, 4, torch.zeros_like(kept_head)),
        Uniform(zeros + 1, one, 0, 4, torch.ones_like(kept_head)),
        # The last symbols, which the coder takes first, are all the first value of the alphabet.
        Uniform(zeros + kept_head, one, 0, 2, kept_head),
        Uniform(torch.tensor([[0, 255]]).short(), one[0], None, 8, None, torch.tensor(255).short()),
        Codebook(indices, torch.tensor([-0.5])),
        Codebook(indices + 255, torch.arange(256.0)),
        Codebook(indices, torch.tensor([-1.0, 1]), nothing),
        Dense(torch.tensor([[0.5]])),
        Dense(torch.zeros(3, 2), nothing),
        Dense(torch.tensor([[-0.0, 1e-42, 3e38]])),
    ]


def again(original):
    """Packed and unpacked."""
    return encoding.unpack(*encoding.pack(original))


class TestRoundTrip:
    @pytest.mark.parametrize(
        "original",
        [
            *(uniform(bits=bits, axis=None, keep=keep) for bits in (2, 8, 16) for keep in (None, 0.3)),
            *(uniform(bits=bits, keep=keep) for bits in (2, 3, 4, 6, 11, 13) for keep in (None, 0.03)),
            *(dense(dtype=d, keep=keep) for d in (torch.float32, torch.float16) for keep in (None, 0.5)),
            *(affine(bits=bits, axis=axis) for bits in (2, 5, 8) for axis in (None, 0)),
            *(codebook(levels=n, keep=keep) for n in (1, 2, 3, 200, 256) for keep in (None, 0.03)),
            *edge_cases(),
        ],
    )
    def test_all_bits_come_back(self, original):
        assert same(original, again(original))

    @pytest.mark.parametrize("original", [uniform(), affine(bits=5)])
    def test_decode_subtracts_the_zero_point_and_scales(self, original):
        zero_point = 0 if original.zero_point is None else original.zero_point.numpy()[:, None, None, None]
        signed = original.codes.numpy() - zero_point
        expected = signed.astype(np.float32) * original.scale.numpy()[:, None, None, None]
        assert (encoding.decode(original).numpy() == expected).all()

    @pytest.mark.parametrize("levels", [1, 5, 256])
    def test_decode_looks_levels_up(self, levels):
        original = codebook(levels=levels, keep=0.5)
        expected = np.where(original.mask.numpy(), original.codebook.numpy()[original.codes.numpy()], 0)
        assert encoding.decode(original).numpy().tobytes() == expected.tobytes()
        assert original.bits == max(1, math.ceil(math.log2(levels)))

    def test_bytes_by_hand(self):
        """A header that says that all bits are stored as they are, then these."""
        head = bytes([2, 0, 0])
        description = {"kind": "codebook", "levels": 3, "shape": [2, 2], "mask": True}
        mask = bytes([1, 0, 0, 0b1011])
        codes = head + bytes([2 | 0 << 2 | 1 << 4])
        streams = {"codes": codes, "mask": mask, "codebook": struct.pack("<3f", -1.5, 0.25, 4)}
        streams = {name: np.frombuffer(data, np.uint8) for name, data in streams.items()}
        found = encoding.unpack(description, streams)
        assert encoding.decode(found).tolist() == [[4.0, -1.5], [0.0, 0.25]]
        streams["codes"] = np.frombuffer(head + bytes([2 | 3 << 2 | 1 << 4]), np.uint8)
        with pytest.raises(EncodingError, match="symbol 3 is above 2"):
            encoding.unpack(description, streams)

    def test_ternary_zeros_are_no_mask(self):
        ternary, masked = uniform(bits=2), uniform(bits=2, keep=0.5)
        assert (ternary.codes == 0).any()
        assert again(ternary).mask is None
        kept_zero = (masked.codes == 0) & masked.mask
        assert kept_zero.any()
        assert again(masked).mask[kept_zero].all()


class TestSize:
    @pytest.mark.parametrize("keep", [None, 0.1])
    @pytest.mark.parametrize(
        "make, options",
        [
            *((uniform, {"bits": bits}) for bits in (2, 4, 8)),
            *((codebook, {"levels": n}) for n in (2, 5, 256)),
        ],
    )
    def test_close_to_the_entropy(self, make, options, keep):
        original = make((64, 64, 3, 3), keep=keep, **options)
        kept = original.codes if keep is None else original.codes[original.mask]
        _, streams = encoding.pack(original)
        for numbers, name in ((kept, "codes"), (original.mask, "mask")):
            if numbers is not None:
                counts = np.unique(numbers.numpy(), return_counts=True)[1]
                ideal = numbers.numel() * stats.entropy(counts, base=2) / 8
                table = 2 * (int(kept.max()) - int(kept.min()) + 1) if name == "codes" else 4
                assert ideal <= streams[name].size <= 1.01 * ideal + 3 + table + 8

    def test_never_much_larger_than_the_plain_codes(self):
        for bits in range(2, 17):
            for count in (1, 2, 10, 100):
                original = uniform((1, count), bits=bits, axis=None, spread=3)
                assert encoding.payload_bits(original) <= 8 * (math.ceil(count * bits / 8) + 3 + 4)

    def test_all_but_codes_and_masks_take_their_plain_bytes(self):
        constant = Uniform(torch.full((64, 64, 3, 3), 3, dtype=torch.int16), torch.tensor(1.0), None, 4)
        assert encoding.payload_bits(constant) == 8 * (3 + 4)
        assert encoding.payload_bits(dense((8, 4))) == 2 * encoding.payload_bits(
            dense((8, 4), dtype=torch.float16)
        )
        masked = dense(keep=0.25)
        for original, stream, size in (
            (masked, "values", 4 * int(masked.mask.sum())),
            (affine(), "scale", 32),
            (affine(), "zero_point", 8),
            (codebook(levels=5), "codebook", 20),
        ):
            _, streams = encoding.pack(original)
            assert streams[stream].size == size
            assert encoding.payload_bits(original) == 8 * sum(stream.size for stream in streams.values())


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
            (Uniform(codes + 8, one, None, 4), "codes from 8 to 8: -7 to 7"),
            (Uniform(codes - 2, one, None, 2), "-1 to 1 is allowed"),
            (Uniform(codes, one, None, 1), "2 to 16"),
            (Uniform(codes, one, None, 17), "2 to 16"),
            (Uniform(codes, one, 0, 4), r"scale has shape \(\): \(2,\) is needed"),
            (Uniform(codes, one * 0, None, 4), "positive"),
            (Uniform(codes, one * math.nan, None, 4), "positive"),
            (Uniform(codes, one * 1e38, None, 4), "infinite"),
            (Uniform(codes.float(), one, None, 4), "integers"),
            (Uniform(codes + 1, one, None, 4, nothing), "outside the mask"),
            (Uniform(codes, one, None, 9, None, zero), "bits is 9: .* from 2 to 8"),
            (Uniform(codes, one, None, 4, ~nothing, zero), "affine codes take no mask"),
            (Uniform(codes - 1, one, None, 4, None, zero), "codes from -1 to -1: 0 to 15"),
            (Uniform(codes, one, None, 4, None, zero + 16), "zero-points from 16"),
            (Codebook(indices, torch.tensor([1.0, 1.0])), "above the one before"),
            (Codebook(indices, torch.tensor([0.0, math.nan])), "not finite"),
            (Codebook(indices, torch.arange(257.0)), "257 levels: 1 to 256"),
            (Codebook(indices + 2, torch.arange(2.0)), "codes from 2 to 2: 0 to 1"),
            (Codebook(indices + 1, torch.arange(2.0), nothing), "outside the mask"),
            (Dense(torch.tensor([[math.nan, 1.0]])), "1 of 2 weights"),
            (Dense(torch.zeros(2, 3, dtype=torch.bfloat16)), "bfloat16"),
        ],
    )
    def test_to_write(self, bad, words):
        with pytest.raises(EncodingError, match=words):
            encoding.pack(bad)

    @pytest.mark.parametrize("largest", [1, 14, 2000])
    def test_bytes_cut_or_changed(self, largest):
        """No change of the frequencies or the entropy-coded words passes, and no other length."""
        random = np.random.default_rng(0)
        symbols = random.binomial(largest, 0.1, count := 1600).astype(np.uint16)
        stream = entropy.pack(symbols, largest=largest)
        assert (entropy.unpack(stream, count, largest=largest) == symbols).all()
        coded = range(3, stream.size - math.ceil(count * int(stream[0]) / 8))
        assert len(coded) > 60
        for at in coded:
            changed = stream.copy()
            changed[at] ^= random.integers(1, 256)
            with pytest.raises(EncodingError):
                entropy.unpack(changed, count, largest=largest)
        longer = [np.append(stream, np.zeros(more, np.uint8)) for more in (1, 2, 4)]
        for other in [stream[:size] for size in range(stream.size)] + longer:
            with pytest.raises(EncodingError):
                entropy.unpack(other, count, largest=largest)


class TestOnANetwork:
    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounds_as_torch_does(self, bits, per_channel, zero):
        """Value and gradient of torch's fake quantization; with powers of 2 as scales both divide exactly."""
        low, high = encoding.code_range(bits, affine=zero)
        generator = torch.Generator().manual_seed(bits)
        scale = 2.0 ** torch.arange(-3, 3) if per_channel else torch.tensor(0.5)
        zero_point = torch.randint(0, high + 1, scale.shape, generator=generator).short() if zero else None
        spread = torch.randn(6, 5, 3, 3, generator=generator) * (high - low) / 2
        weight = spread * column(scale, 4)
        ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
        quantizer = UniformWeight(scale, bits=bits, zero_point=zero_point)
        shift = zero_point.int() if zero else torch.zeros_like(scale).int()
        out = quantizer(ours)
        if per_channel:
            expected = torch.fake_quantize_per_channel_affine(theirs, scale, shift, 0, low, high)
        else:
            expected = torch.fake_quantize_per_tensor_affine(theirs, 0.5, int(shift), low, high)
        assert torch.equal(out, expected)
        upstream = torch.randn(6, 5, 3, 3, generator=generator)
        out.backward(upstream)
        expected.backward(upstream)
        codes = weight / column(scale, 4) + column(shift, 4)
        inside = torch.minimum((codes - low).abs(), (codes - high).abs()) > 0.51  # at borders they differ
        assert torch.equal(ours.grad[inside], theirs.grad[inside])
        assert (ours.grad == 0).any()
        stored = Uniform(quantizer.codes(weight), scale, 0 if per_channel else None, bits, None, zero_point)
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
        found = again(encoding.encoded(layer))
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

    @pytest.mark.parametrize(
        ("original", "trained"),
        [(uniform((4, 16), bits=4, keep=0.5), "codes"), (codebook((4, 16), levels=4, keep=0.5), "codebook")],
    )
    def test_training_keeps_zeros_and_moves_codes_or_levels(self, original, trained):
        layer = nn.Linear(16, 4)
        encoding.attach(layer, original)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, weight_decay=0.1)
        for _ in range(9):
            optimizer.zero_grad()
            layer(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
        found = encoding.encoded(layer)
        assert torch.equal(encoding.decode(found), layer.weight)
        assert torch.equal(found.mask, original.mask)
        assert (layer.weight[~original.mask] == 0).all()
        assert not torch.equal(getattr(found, trained), getattr(original, trained))

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
        found = again(encoding.encoded(layer))
        assert found.codebook.tolist() == [-7.0, -2.0, 0.0, 0.5]
        assert encoding.decode(found).numpy().tobytes() == layer.weight.detach().numpy().tobytes()
        assert chain[0].codebook.tolist()[0] == 0.5

    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_learned_scales_have_the_gradient_of_lsq(self, bits, per_channel, zero):
        """Equation 3 in closed form; finite differences where they mean the same."""
        generator = torch.Generator().manual_seed(bits)
        low, high = encoding.code_range(bits, affine=zero)
        scale = 2.0 ** torch.arange(-3, 3).double() if per_channel else torch.tensor(0.5).double()
        zero_point = torch.randint(0, high + 1, scale.shape, generator=generator).short() if zero else None
        shift = column(zero_point, 4) if zero else torch.tensor(0)
        ends = low - shift, high - shift
        ratio = torch.randn(6, 5, 3, 3, generator=generator).double() * high * 0.7
        ratio[:, :1] = ends[1].double()
        weight = (ratio * column(scale, 4)).requires_grad_()
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
            codes = (weight.detach() / column(scale, 4)).clamp(*ends)
            return upstream * (torch.where(inside, codes + error, clipped) * column(scale, 4))

        step = 1e-6 * scale
        each = (loss(scale + step) - loss(scale - step)) / column(2 * step, 4)
        expected = share * (each.flatten(1).sum(1) if per_channel else each.sum())
        torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-6, atol=1e-6)

    def test_learned_scales_are_copied_saved_and_attached_as_plain_ones(self):
        layer, plain = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        learned = UniformWeight(torch.rand(8) / 20 + 0.01, bits=4, learn_scale=True)
        parametrize.register_parametrization(layer, "weight", learned)
        copied, found = copy.deepcopy(layer), encoding.encoded(layer)
        encoding.attach(plain, found)
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

    def test_foreign_parametrizations_are_named(self):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        with pytest.raises(EncodingError, match="_WeightNorm"):
            encoding.encoded(layer)
        mask, codes = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.uint8)
        quantizer, shared = UniformWeight(torch.tensor(1.0), bits=4), CodebookWeight(codes, torch.ones(1))
        for chain in (
            [quantizer, ZeroMask(mask)],
            [ZeroMask(mask), shared],
            [ZeroMask(mask), ZeroMask(~mask)],
        ):
            layer = nn.Linear(3, 2)
            for parametrization in chain:
                parametrize.register_parametrization(layer, "weight", parametrization)
            names = ", ".join(type(parametrization).__name__ for parametrization in chain)
            with pytest.raises(
                EncodingError, match=f"parametrizations {names}: .*; CodebookWeight, ZeroMask"
            ):
                encoding.encoded(layer)

    def test_weights_that_cannot_be_stored(self):
        layer = nn.Linear(3, 2)
        assert torch.equal(encoding.encoded(layer, torch.float16).values, layer.weight.detach().half())
        with pytest.raises(EncodingError, match="float64"):
            encoding.encoded(copy.deepcopy(layer).double())
        with pytest.raises(EncodingError, match="shape"):
            encoding.attach(layer, dense())
        nn.init.constant_(layer.weight, 1e6)
        with pytest.raises(EncodingError, match="infinite as torch.float16"):
            encoding.encoded(layer, torch.float16)
        nn.init.constant_(layer.weight, math.nan)
        with pytest.raises(EncodingError, match="6 of 6 weights are not finite"):
            encoding.encoded(layer)
