"""The quantizers against PyTorch's own fake quantization and against closed formulas."""

import math

import pytest
import torch

from nnc_utils import encoding, models
from nnc_utils.quantization import activations, uniform

SPEC = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.125)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build(SPEC).eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_per_channel_equals_torch_fake_quantize(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    ours = uniform.quantize(weight, bits=bits, per_channel=True)
    top = 2 ** (bits - 1) - 1
    theirs = torch.fake_quantize_per_channel_affine(weight, ours.scale, torch.zeros(6).int(), 0, -top, top)
    assert torch.equal(encoding.decode(ours), theirs)
    assert ours.codes.abs().flatten(1).amax(1).tolist() == [top] * 6  # each channel uses its whole range


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_tensor_equals_torch_fake_quantize(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    ours = uniform.quantize(weight, bits=bits, per_channel=False)
    top = 2 ** (bits - 1) - 1
    theirs = torch.fake_quantize_per_tensor_affine(weight, float(ours.scale), 0, -top, top)
    assert torch.allclose(encoding.decode(ours), theirs, atol=0, rtol=0)
    assert float(ours.scale) == pytest.approx(float(weight.abs().max()) / top)


def test_rounding_error_is_the_step_over_root_twelve():
    weight = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).view(1, -1) * 2 - 1
    rounded = uniform.quantize(weight, bits=6, per_channel=False)
    error = (encoding.decode(rounded) - weight).square().mean().sqrt()
    assert float(error) == pytest.approx(float(rounded.scale) / math.sqrt(12), rel=0.01)


def test_zeros_and_single_values_are_exact():
    weight = torch.stack([torch.zeros(9), torch.full((9,), -0.37), torch.eye(3).flatten()])
    rounded = uniform.quantize(weight, bits=4, per_channel=True)
    assert torch.isfinite(rounded.scale).all() and (rounded.scale > 0).all()
    assert torch.allclose(encoding.decode(rounded), weight, rtol=1e-6)
    assert not encoding.decode(uniform.quantize(torch.zeros(2, 3), bits=8, per_channel=False)).any()


@pytest.mark.parametrize("bits", [1, 17, 0, -3, 4.0, True])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match="from 2 to 16"):
        uniform.quantize(torch.ones(2, 2), bits=bits, per_channel=True)


@pytest.mark.parametrize("levels", [3, 5, 7])
def test_fewer_levels_than_the_width_has(levels):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(levels))
    ours = uniform.quantize(weight, bits=3, levels=levels, per_channel=True)
    top = levels // 2
    theirs = torch.fake_quantize_per_channel_affine(weight, ours.scale, torch.zeros(6).int(), 0, -top, top)
    assert torch.equal(encoding.decode(ours), theirs)
    assert len(ours.codes.unique()) == levels


@pytest.mark.parametrize("levels, symmetric", [(4, True), (1, True), (9, True), (5, False)])
def test_levels_that_a_width_does_not_have_are_named(levels, symmetric):
    with pytest.raises(ValueError, match="odd number from 3 to 7"):
        uniform.quantize(torch.ones(2, 2), bits=3, levels=levels, per_channel=True, symmetric=symmetric)


def test_weights_that_are_not_finite_name_their_layer(model):
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1: 1 weights are not finite"):
        uniform.quantize_network(model, bits=8, per_channel=True)
    with pytest.raises(ValueError, match="holds nothing"):
        uniform.quantize(torch.ones(0, 3), bits=8, per_channel=False)


def test_a_network_computes_with_its_rounded_weights_and_the_original_is_untouched(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = uniform.quantize_network(model, bits=3, per_channel=True)
    by_hand = models.build(SPEC).eval()
    by_hand.load_state_dict(before)
    with torch.no_grad():
        for layer in models.layers(SPEC):
            weight = by_hand.get_submodule(layer.name).weight
            peak = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
            weight.copy_(torch.round(weight / peak * 3) * (peak / 3))
        images = torch.randn(4, 1, 8, 8)
        assert torch.allclose(quantized(images), by_hand(images), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_for_each_layer(model):
    widths = {layer.name: 8 for layer in models.layers(SPEC)} | {"layer4.1.conv2": 2}
    quantized = uniform.quantize_network(model, bits=widths, per_channel=False)
    assert len(quantized.layer4[1].conv2.weight.unique()) <= 3
    with pytest.raises(ValueError, match="layer9"):
        uniform.quantize_network(model, bits=widths | {"layer9": 8}, per_channel=False)
    with pytest.raises(ValueError, match="fc"):
        uniform.quantize_network(
            model, bits={k: v for k, v in widths.items() if k != "fc"}, per_channel=False
        )


@pytest.mark.parametrize("low, high", [(0.0, 6.0), (-1.0, 3.0), (-5.0, -1.0), (2.0, 4.0), (0.0, 0.0)])
def test_affine_range_holds_zero_exactly_and_covers_the_range(low, high):
    scale, zero_point = activations.affine_range(low, high)
    assert scale > 0 and 0 <= zero_point <= 255
    ends = torch.tensor([low, 0.0, high])
    back = torch.fake_quantize_per_tensor_affine(ends, scale, zero_point, 0, 255)
    assert back[1] == 0
    assert (back - ends).abs().max() <= scale / 2 + 1e-6


def test_calibration_sees_the_smallest_and_largest_value(model):
    images = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    calibrated = activations.calibrate(model, images, batch_size=16)
    stem = torch.relu(model.bn1(model.conv1(images))).detach()
    place = calibrated.quant_stem
    assert place.zero_point == 0
    assert place.scale * 255 == pytest.approx(float(stem.max()), rel=1e-5)
    signed = calibrated.quant_input
    assert signed.scale * (0 - signed.zero_point) == pytest.approx(float(images.min()), abs=signed.scale)
    assert all(place.scale is not None for place in models.activations(calibrated).values())
    assert all(place.scale is None for place in models.activations(model).values())
    calibrated.train()(images).sum().backward()  # the copy can be trained on
    assert calibrated.conv1.weight.grad.abs().sum() > 0


def test_calibration_refuses_what_it_cannot_use(model):
    with pytest.raises(ValueError, match="at least 1"):
        activations.calibrate(model, torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(1, 8, 8\)"):
        activations.calibrate(model, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        activations.calibrate(model, torch.full((2, 1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="two finite bounds"):
        activations.affine_range(1.0, -1.0)


# --- Affine codes and clipped ranges ------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_affine_codes_equal_torch_fake_quantize(bits, per_channel):
    weight = torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits)) * 3 - 1
    ours = uniform.quantize(weight, bits=bits, per_channel=per_channel, symmetric=False)
    scale, zero = ours.scale, ours.zero_point.int()
    if per_channel:
        theirs = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, 0, 2**bits - 1)
    else:
        theirs = torch.fake_quantize_per_tensor_affine(weight, float(scale), int(zero), 0, 2**bits - 1)
    assert torch.allclose(encoding.decode(ours), theirs, rtol=1e-6, atol=1e-7)
    assert int(ours.codes.min()) == 0 and int(ours.codes.max()) == 2**bits - 1


def test_affine_codes_win_where_the_weights_are_not_centred():
    weight = torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) + 0.5
    errors = [
        (encoding.decode(uniform.quantize(weight, bits=4, per_channel=True, symmetric=s)) - weight).square()
        for s in (True, False)
    ]
    # 15 steps over [0, 1.5] against 7: the step is 7/15, its square error (7/15)**2
    assert float(errors[1].mean() / errors[0].mean()) == pytest.approx((7 / 15) ** 2, rel=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_range_is_the_best_of_a_search_over_all(symmetric):
    weight = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 30.0  # an outlier
    ours = encoding.decode(
        uniform.quantize(weight, bits=3, per_channel=True, symmetric=symmetric, clip="mse")
    )
    for row, found in zip(weight, ours):
        low, high = (-row.abs().max(), row.abs().max()) if symmetric else (row.min(), row.max())
        steps = 6 if symmetric else 7
        best = math.inf
        for factor in torch.linspace(1, 0.2, 17):
            step = factor * (high - low) / steps
            zero = 0 if symmetric else int(torch.round(-low * factor / step))
            bounds = (-3, 3) if symmetric else (0, 7)
            trial = torch.fake_quantize_per_tensor_affine(row, float(step), zero, *bounds)
            best = min(best, float((trial - row).square().sum()))
        assert float((found - row).square().sum()) == pytest.approx(best, rel=1e-4)


def test_the_percentile_range_leaves_one_weight_in_a_thousand_outside():
    weight = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    rounded = uniform.quantize(weight, bits=8, per_channel=False, clip="percentile")
    outside = int((weight.abs() > float(rounded.scale) * 127 * (1 + 1e-6)).sum())
    assert outside == pytest.approx(100, abs=2)
    both = uniform.quantize(weight, bits=8, per_channel=False, clip="percentile", symmetric=False)
    assert int(((encoding.decode(both) - weight).abs() > 2 * float(both.scale)).sum()) <= 100


@pytest.mark.parametrize("clip", uniform.CLIPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_channels_and_single_values_are_exact_under_every_range(clip, symmetric):
    weight = torch.stack([torch.zeros(9), torch.full((9,), -0.37)])
    rounded = uniform.quantize(weight, bits=4, per_channel=True, clip=clip, symmetric=symmetric)
    assert torch.allclose(encoding.decode(rounded), weight, rtol=1e-6)


def test_unknown_ranges_and_affine_widths_above_a_byte_are_refused(model):
    with pytest.raises(ValueError, match="unknown clip 'min': one of max, percentile, mse"):
        uniform.quantize(torch.ones(2, 2), bits=4, per_channel=True, clip="min")
    with pytest.raises(ValueError, match="from 2 to 8"):
        uniform.quantize(torch.ones(2, 2), bits=9, per_channel=True, symmetric=False)
    with pytest.raises(ValueError, match="unknown clip 'min'"):
        activations.calibrate(model, torch.zeros(1, 1, 8, 8), clip="min")


def test_a_mask_stays_and_the_first_network_still_works(model):
    layer = model.layer1[0].conv1
    kept = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", encoding.ZeroMask(kept))
    first = uniform.quantize_network(model, bits=8, per_channel=True)
    second = uniform.quantize_network(first, bits=4, per_channel=True)
    for network in (model, first, second):
        assert torch.equal(encoding.mask_of(network.layer1[0].conv1), kept)
        assert not network.layer1[0].conv1.weight[~kept].any()
    assert encoding.encoded(first.conv1).bits == 8 and encoding.encoded(second.conv1).bits == 4


def test_activation_ranges_by_percentile_and_mse_are_narrower_and_no_worse(model):
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = 300.0  # an outlier stretches the largest range, whose steps become coarse
    widths = {}
    for clip in ("max", "percentile", "mse"):
        place = activations.calibrate(model, images, clip=clip).quant_input
        rounded = torch.fake_quantize_per_tensor_affine(images, place.scale, place.zero_point, 0, 255)
        widths[clip] = (place.scale, float((rounded - images)[1:].square().mean()))
        if clip == "mse":
            errors = float((rounded - images).square().mean())
        elif clip == "max":
            most = float((rounded - images).square().mean())
    assert widths["percentile"][0] < 0.1 * widths["max"][0] and widths["percentile"][1] < widths["max"][1]
    assert errors <= most and widths["mse"][0] <= widths["max"][0]
