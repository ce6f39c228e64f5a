"""The quantizers against PyTorch's own fake quantization and against closed formulas."""

import math

import pytest
import torch
from small_networks import PLAIN, images, network

from nnc_utils import encoding, models
from nnc_utils.quantization import activations, correction, uniform


@pytest.fixture
def model():
    return network(PLAIN)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake_quantized(weight, rounded, low, high):
    """By PyTorch, over the same scales."""
    zero = torch.zeros_like(rounded.scale) if rounded.zero_point is None else rounded.zero_point
    if rounded.axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, float(rounded.scale), int(zero), low, high)
    return torch.fake_quantize_per_channel_affine(weight, rounded.scale, zero.int(), 0, low, high)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_symmetric_codes_equal_torch_fake_quantize(bits, per_channel):
    weight, top = draw(6, 5, 3, 3, seed=bits), 2 ** (bits - 1) - 1
    ours = uniform.quantize(weight, bits=bits, per_channel=per_channel)
    assert torch.equal(encoding.decode(ours), fake_quantized(weight, ours, -top, top))
    peaks = weight.abs().flatten(1).amax(1) if per_channel else weight.abs().max()
    assert torch.allclose(ours.scale, peaks / top)  # each range uses all of its codes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_affine_codes_equal_torch_fake_quantize(bits, per_channel):
    weight = torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits)) * 3 - 1
    ours = uniform.quantize(weight, bits=bits, per_channel=per_channel, symmetric=False)
    theirs = fake_quantized(weight, ours, 0, 2**bits - 1)
    assert torch.allclose(encoding.decode(ours), theirs, rtol=1e-6, atol=1e-7)
    assert int(ours.codes.min()) == 0 and int(ours.codes.max()) == 2**bits - 1


@pytest.mark.parametrize("levels", [3, 5, 7])
def test_fewer_levels_than_the_width_has(levels):
    weight = draw(6, 5, 3, 3, seed=levels)
    ours = uniform.quantize(weight, bits=3, levels=levels, per_channel=True)
    assert torch.equal(encoding.decode(ours), fake_quantized(weight, ours, -(levels // 2), levels // 2))
    assert len(ours.codes.unique()) == levels


@pytest.mark.parametrize("clip", uniform.CLIPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_channels_and_single_values_are_exact(clip, symmetric):
    weight = torch.stack([torch.zeros(9), torch.full((9,), -0.37), 0.5 * torch.eye(3).flatten()])
    for per_channel in (True, False):
        part = weight if per_channel else weight[:2]
        rounded = uniform.quantize(part, bits=4, per_channel=per_channel, clip=clip, symmetric=symmetric)
        assert torch.allclose(encoding.decode(rounded), part, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_range_is_the_best_of_a_search_over_all(symmetric):
    weight = draw(3, 2000)
    weight[0, 0] = 30.0  # an outlier
    rounded = uniform.quantize(weight, bits=3, per_channel=True, symmetric=symmetric, clip="mse")
    for row, ours in zip(weight, encoding.decode(rounded)):
        low, high = (-row.abs().max(), row.abs().max()) if symmetric else (row.min(), row.max())
        steps, bounds = (6, (-3, 3)) if symmetric else (7, (0, 7))
        best = math.inf
        for factor in torch.linspace(1, 0.2, 17):
            step = factor * (high - low) / steps
            zero = 0 if symmetric else int(torch.round(-low * factor / step))
            trial = torch.fake_quantize_per_tensor_affine(row, float(step), zero, *bounds)
            best = min(best, float((trial - row).square().sum()))
        assert float((ours - row).square().sum()) == pytest.approx(best, rel=1e-4)


def test_the_percentile_range_leaves_one_weight_in_a_thousand_outside():
    weight = draw(1, 100_000)
    rounded = uniform.quantize(weight, bits=8, per_channel=False, clip="percentile")
    assert int((weight.abs() > float(rounded.scale) * 127 * (1 + 1e-6)).sum()) == pytest.approx(100, abs=2)
    affine = uniform.quantize(weight, bits=8, per_channel=False, clip="percentile", symmetric=False)
    scale, zero = float(affine.scale), int(affine.zero_point)
    beyond = [int((weight < -zero * scale - scale).sum()), int((weight > (255 - zero) * scale + scale).sum())]
    assert all(count == pytest.approx(50, abs=10) for count in beyond)


def test_what_cannot_be_quantized_is_named(model):
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1: 1 weights are not finite"):
        uniform.quantize_network(model, bits=8, per_channel=True)
    for options, why in (
        ({"weight": torch.ones(0, 3)}, "holds nothing"),
        ({"clip": "min"}, "unknown clip 'min': one of max, percentile, mse"),
        ({"bits": 17}, "from 2 to 16"),
        ({"bits": 4.0}, "from 2 to 16"),
        ({"bits": 9, "symmetric": False}, "from 2 to 8"),
        ({"levels": 4}, "odd number from 3 to 7"),
        ({"levels": 9}, "odd number from 3 to 7"),
        ({"levels": 5, "symmetric": False}, "odd number from 3 to 7"),
    ):
        with pytest.raises(ValueError, match=why):
            uniform.quantize(**{"weight": torch.ones(2, 2), "bits": 3, "per_channel": True} | options)


# --- Networks -----------------------------------------------------------------------------------


def test_a_network_computes_with_its_rounded_weights_and_the_original_is_untouched(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = uniform.quantize_network(model, bits=3, per_channel=True)
    by_hand = network(PLAIN)
    with torch.no_grad():
        for layer in models.layers(PLAIN):
            weight = by_hand.get_submodule(layer.name).weight
            peak = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
            weight.copy_(torch.round(weight / peak * 3) * (peak / 3))
        assert torch.allclose(quantized(images(PLAIN, 4)), by_hand(images(PLAIN, 4)), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_for_each_layer(model):
    widths = {layer.name: 8 for layer in models.layers(PLAIN)} | {"layer4.1.conv2": 2}
    quantized = uniform.quantize_network(model, bits=widths, per_channel=False)
    assert len(quantized.layer4[1].conv2.weight.unique()) <= 3
    for wrong, named in ((widths | {"layer9": 8}, "layer9"), ({"conv1": 8}, "fc")):
        with pytest.raises(ValueError, match=named):
            uniform.quantize_network(model, bits=wrong, per_channel=False)


def test_a_mask_stays_and_the_first_network_still_works(model):
    layer = model.layer1[0].conv1
    kept = draw(*layer.weight.shape) > 0
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", encoding.ZeroMask(kept))
    first = uniform.quantize_network(model, bits=8, per_channel=True)
    second = uniform.quantize_network(first, bits=4, per_channel=True)
    for each in (model, first, second):
        assert torch.equal(encoding.mask_of(each.layer1[0].conv1), kept)
        assert not each.layer1[0].conv1.weight[~kept].any()
    assert encoding.encoded(first.conv1).bits == 8 and encoding.encoded(second.conv1).bits == 4


# --- Activations --------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.0, 6.0), (-1.0, 3.0), (-5.0, -1.0), (2.0, 4.0), (0.0, 0.0)])
def test_affine_range_holds_zero_exactly_and_covers_the_range(low, high):
    scale, zero_point = activations.affine_range(low, high)
    assert scale > 0 and 0 <= zero_point <= 255
    ends = torch.tensor([low, 0.0, high])
    back = torch.fake_quantize_per_tensor_affine(ends, scale, zero_point, 0, 255)
    assert back[1] == 0
    assert (back - ends).abs().max() <= scale / 2 + 1e-6


def test_calibration_sees_the_smallest_and_largest_value(model):
    batch = images(PLAIN, 50)
    calibrated = activations.calibrate(model, batch, batch_size=16)
    stem = torch.relu(model.bn1(model.conv1(batch))).detach()
    place = calibrated.quant_stem
    assert place.zero_point == 0
    assert place.scale * 255 == pytest.approx(float(stem.max()), rel=1e-5)
    signed = calibrated.quant_input
    assert signed.scale * (0 - signed.zero_point) == pytest.approx(float(batch.min()), abs=signed.scale)
    assert all(place.scale is not None for place in models.activations(calibrated).values())
    assert all(place.scale is None for place in models.activations(model).values())
    again = activations.calibrate(calibrated, batch)  # of the float activations, not of rounded ones
    assert again.quant_stem.scale == place.scale
    calibrated.train()(batch).sum().backward()  # the copy can be trained on
    assert calibrated.conv1.weight.grad.abs().sum() > 0


def test_the_percentile_range_of_activations_clips_both_ends_of_a_signed_tensor(model):
    """Against quantiles; the smaller end must not keep its outlier, nor the larger one be cut twice."""
    batch = draw(1024, 1, 8, 8)
    batch[0, 0, 0, 0], batch[1, 0, 0, 0] = -300.0, 500.0
    calibrated = activations.calibrate(model, batch, clip="percentile", batch_size=1024)
    place = calibrated.quant_input
    low, high = -place.zero_point * place.scale, (255 - place.zero_point) * place.scale
    wanted = torch.quantile(batch.flatten().double(), torch.tensor([0.0005, 0.9995]).double())
    assert [low, high] == pytest.approx(wanted.tolist(), abs=1.5 * place.scale)
    stem = torch.relu(model.bn1(model.conv1(batch))).detach().flatten()
    stem = stem[:: max(1, len(stem) // activations.SAMPLE)]
    top = stem.sort().values[-1 - int(len(stem) * 0.001)]  # behind a ReLU all of it is above
    assert calibrated.quant_stem.scale * 255 == pytest.approx(float(top), rel=0.02)


def test_the_mse_range_of_activations_has_no_larger_error(model):
    batch = draw(256, 1, 8, 8)
    batch[0, 0, 0, 0] = 300.0  # an outlier stretches the largest range, whose steps become coarse
    errors = {}
    for clip in ("max", "mse"):
        place = activations.calibrate(model, batch, clip=clip).quant_input
        rounded = torch.fake_quantize_per_tensor_affine(batch, place.scale, place.zero_point, 0, 255)
        errors[clip] = float((rounded - batch).square().mean())
    low, high = float(batch.min()), float(batch.max())
    trials = []
    for shrink in torch.linspace(1, 0.2, 17).tolist():
        scale, zero_point = activations.affine_range(shrink * low, shrink * high)
        rounded = torch.fake_quantize_per_tensor_affine(batch, scale, zero_point, 0, 255)
        trials.append(float((rounded - batch).square().mean()))
    assert errors["max"] == trials[0] and errors["mse"] == min(trials)


def test_calibration_refuses_what_it_cannot_use(model):
    for batch, why in (
        (torch.zeros(0, 1, 8, 8), "at least 1"),
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\).*\(1, 8, 8\)"),
        (torch.full((2, 1, 8, 8), float("nan")), "not finite"),
    ):
        with pytest.raises(ValueError, match=why):
            activations.calibrate(model, batch)
    with pytest.raises(ValueError, match="unknown clip 'min'"):
        activations.calibrate(model, torch.zeros(1, 1, 8, 8), clip="min")


# --- Bias correction ----------------------------------------------------------------------------


def test_bias_correction_restores_the_mean_of_each_output(model):
    batch = images(PLAIN, 64)
    rounded = uniform.quantize_network(model, bits=3, per_channel=True)
    fixed = correction.correct_bias(rounded, batch, original=model, batch_size=32)
    # the first layer has the same input in both, so its mean behind batch-norm must be the float one's
    with torch.no_grad():
        wanted, off, got = (each.bn1(each.conv1(batch)).mean((0, 2, 3)) for each in (model, rounded, fixed))
    assert torch.allclose(got, wanted, atol=1e-5)
    assert float((off - wanted).abs().max()) > 1e-3
    alone = network(PLAIN)  # only the classifier rounded
    alone.fc.weight.data = rounded.fc.weight.detach().clone()
    with torch.no_grad():
        wanted = model(batch).mean(0)
        got = correction.correct_bias(alone, batch, original=model)(batch).mean(0)
    assert torch.allclose(got, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="at least"):
        correction.correct_bias(model, batch[:0], original=model)
