"""models.py against torchvision, PyTorch's FLOP counter, closed formulas and networks written by hand."""

import doctest
import json

import numpy as np
import pytest
import torch
import torchvision
from small_networks import with_statistics
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nnc_utils import models
from nnc_utils.models import BlockSpec, Spec, SpecError, build, layers, resnet

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHVISION = {depth: getattr(torchvision.models, f"resnet{depth}") for depth in (18, 34, 50)}


def one_block(block="basic", stem_width=8, **fields):
    """A Spec with a single block, by default a legal basic one."""
    count = 2 if block == "basic" else 3
    fields = {"widths": (8,) * count, "kernels": (3,) * count} | fields
    return Spec(3, 16, 5, "small", stem_width, block, ((BlockSpec(**fields),),))


def random_spec(seed):
    """Some legal Spec: any stem, both kinds of block, odd widths, all connections and strides."""
    draw = np.random.default_rng(seed)
    block = str(draw.choice(["basic", "bottleneck"]))
    count = 2 if block == "basic" else 3
    before = stem_width = int(draw.integers(1, 12))
    stages = []
    for _ in range(draw.integers(1, 5)):
        stages.append([])
        for _ in range(draw.integers(1, 4)):
            connection = str(draw.choice(models.CONNECTIONS))
            widths = [int(w) for w in draw.integers(1, 12, count)]
            stride = int(draw.integers(1, 4))
            if connection == "identity":
                widths[-1], stride = before, 1
            kernels = tuple(int(k) for k in draw.choice([1, 3, 5, 7], count))
            stages[-1].append(BlockSpec(tuple(widths), kernels, stride, connection))
            before = widths[-1]
    channels, size, classes = (int(draw.integers(low, high)) for low, high in ((1, 5), (9, 40), (1, 12)))
    stem = str(draw.choice(list(models.STEMS)))
    return Spec(channels, size, classes, stem, stem_width, block, tuple(map(tuple, stages)))


def multiplications(model, images):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() // (2 * len(images))


# --- The same network as torchvision's ----------------------------------------------------------


@pytest.mark.parametrize("depth", TORCHVISION)
def test_same_state_dict_gives_torchvisions_logits(depth):
    theirs = with_statistics(TORCHVISION[depth](num_classes=7))
    ours = build(resnet(depth, size=64, classes=7)).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.std() > 1e-3  # two constant outputs would agree, too
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(
    "depth, parameters, macs",  # as published with torchvision's weights
    [(18, 11_689_512, 1_814_073_344), (34, 21_797_672, 3_663_761_408), (50, 25_557_032, 4_089_184_256)],
)
def test_counts_are_the_published_ones(depth, parameters, macs):
    assert models.parameters(resnet(depth)) == parameters
    assert models.macs(resnet(depth)) == macs


def test_resnet20_is_that_of_the_paper():
    """He et al., 2016, table 6: 0.27 million weights; three projections more than their zeros."""
    spec = models.three_stage(3, channels=3, size=32, classes=10)
    kernels = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms, classifier = 2 * (7 * 16 + 6 * 32 + 6 * 64), 650
    assert models.parameters(spec) == kernels + norms + classifier + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert models.parameters(models.three_stage(3, channels=1, size=28, classes=10)) == 272_186
    assert multiplications(build(spec), torch.randn(2, 3, 32, 32)) == models.macs(spec)


def test_docstring_examples_hold():
    tried = doctest.testmod(models)
    assert tried.attempted > 0 and tried.failed == 0


# --- Any Spec -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_a_random_spec_is_built_counted_and_written_as_it_says(seed):
    spec = random_spec(seed)
    assert Spec.from_json(spec.to_json()) == spec
    model, called = build(spec).eval(), []
    assert models.parameters(spec) == sum(p.numel() for p in model.parameters())
    described = layers(spec)
    weights = [n.removesuffix(".weight") for n, t in model.state_dict().items() if t.ndim in (2, 4)]
    assert [x.name for x in described] == weights
    sizes = {}
    for layer in described:
        module = model.get_submodule(layer.name)
        assert tuple(module.weight.shape) == layer.weight_shape
        if layer.batch_norm:
            assert model.get_submodule(layer.batch_norm).num_features == layer.out_channels
            module.register_forward_hook(
                lambda _, x, out, name=layer.name: sizes.update({name: (x[0].shape[-1], out.shape[-1])})
            )
    places = models.activations(model)
    for name, place in places.items():
        place.register_forward_hook(lambda *_, name=name: called.append(name))
    images = torch.randn(1, spec.channels, spec.size, spec.size)
    assert model(images).shape == (1, spec.classes)
    assert called == list(places)  # in the order of the forward pass
    assert sizes == {layer.name: (layer.size_in, layer.size_out) for layer in described if layer.batch_norm}
    assert models.macs(spec) == multiplications(model, images)


def test_random_specs_cover_every_choice():
    drawn = [random_spec(seed) for seed in range(25)]
    assert {spec.stem for spec in drawn} == set(models.STEMS)
    assert {spec.block for spec in drawn} == set(models.BLOCKS)
    blocks = [block for spec in drawn for _, block in models.named_blocks(spec)]
    assert {block.connection for block in blocks} == set(models.CONNECTIONS)
    assert {kernel for block in blocks for kernel in block.kernels} == {1, 3, 5, 7}


@pytest.mark.parametrize("connection", models.CONNECTIONS)
def test_a_block_computes_its_formula(connection):
    spec = one_block(kernels=(5, 3), widths=(7, 8), connection=connection)
    model = with_statistics(build(spec))
    block, state = model.layer1[0], model.state_dict()

    def normalized(name, tensor):
        mean, var, gain, shift = (
            state[f"layer1.0.{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (tensor - mean) / (var + 1e-5).sqrt() * gain + shift

    inputs = torch.rand(2, 8, 16, 16)
    inside = functional.conv2d(inputs, state["layer1.0.conv1.weight"], padding=2)
    inside = normalized("bn1", inside).clamp(min=0)
    expected = normalized("bn2", functional.conv2d(inside, state["layer1.0.conv2.weight"], padding=1))
    if connection == "identity":
        expected = expected + inputs
    elif connection == "projection":
        skip = functional.conv2d(inputs, state["layer1.0.downsample.0.weight"])
        expected = expected + normalized("downsample.1", skip)
    with torch.no_grad():
        torch.testing.assert_close(block(inputs), expected.clamp(min=0), rtol=1e-4, atol=1e-4)


# oneDNN's backward pass of some convolutions gives wrong gradients of the weight: of 1x1 convolutions with a
# stride in channels-last order with few input channels, and in bf16 of convolutions of a single pixel with a
# stride of 2. `models` builds neither: these tests ask what it builds, on inputs that are computed right.


def test_narrow_strided_projections_pick_their_pixels_first():
    for width in (1, 7, 15, 16, 64):
        spec = one_block(stem_width=width, stride=2, connection="projection")
        projection = build(spec).layer1[0].downsample[0]
        assert isinstance(projection, models.PickingConv2d) == (width < 16)
    guarded = models.PickingConv2d(32, 8, 1, stride=2, bias=False)
    plain = torch.nn.Conv2d(32, 8, 1, stride=2, bias=False)
    plain.load_state_dict(guarded.state_dict())
    images, results = torch.randn(4, 32, 9, 9), []
    for module, layout in ((guarded, torch.channels_last), (plain, torch.contiguous_format)):
        out = module(images.to(memory_format=layout))
        out.square().sum().backward()
        results.append((out, module.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_one_pixel_has_stride_1():
    spec = resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.5)
    [layer] = [x for x in layers(spec) if x.name == "layer4.0.conv1"]
    assert (layer.size_in, layer.stride) == (1, 2)  # what the Spec says
    built, results = build(spec).layer4[0].conv1, []
    assert built.stride == (1, 1)
    images = torch.randn(16, layer.in_channels, 1, 1)
    for stride, layout in ((1, torch.channels_last), (2, torch.contiguous_format)):
        weight = built.weight.detach().clone().requires_grad_()
        out = functional.conv2d(images.to(memory_format=layout), weight, stride=stride, padding=1)
        out.square().sum().backward()
        results.append((out, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_initialization_is_he_et_al():
    model = build(resnet(18, classes=10))
    for layer in layers(model.spec)[:-1]:
        expected = (2 / (layer.out_channels * layer.kernel**2)) ** 0.5
        assert model.get_submodule(layer.name).weight.std().item() == pytest.approx(expected, rel=0.05)


# --- Activation places --------------------------------------------------------------------------


def test_activation_rounds_to_its_range_and_passes_the_gradient_inside():
    place = models.Activation()
    tensor = torch.linspace(-3, 3, 601, requires_grad=True)
    assert place(tensor) is tensor
    place.scale, place.zero_point = 0.01, 100
    codes = (tensor.detach() / 0.01).round() + 100
    rounded = place(tensor)
    torch.testing.assert_close(rounded.detach(), (codes.clamp(0, 255) - 100) * 0.01)
    rounded.sum().backward()
    assert torch.equal(tensor.grad, ((codes >= 0) & (codes <= 255)).float())


# --- What is no Spec ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: one_block(widths=(8, 9)), ["layer1.0.conv2", "9 channels", "conv1", "the 8 channels"]),
        (lambda: one_block(stride=2), ["layer1.0.conv2", "stride 2", "conv1", "projection"]),
        (lambda: one_block(widths=(8, 8, 8), kernels=(3, 3)), ["layer1.0", "3 widths", "2 convolutions"]),
        (lambda: one_block(kernels=(3, 4)), ["layer1.0.conv2", "kernel 4", "odd"]),
        (lambda: one_block(widths=(0, 8)), ["layer1.0.conv1: width", "0"]),
        (lambda: one_block(stride=0), ["layer1.0: stride", "0"]),
        (lambda: one_block(connection="sum"), ["layer1.0", "'sum'", "identity, projection, none"]),
        (lambda: Spec(3, 8, 5, "small", 8, "basic", ()), ["at least one stage"]),
        (lambda: Spec(3, 8, 5, "small", 8, "basic", ((),)), ["at least one block"]),
        (lambda: Spec(3, 8, 5, "big", 8, "basic", ()), ["stem", "'big'", "small_stride2"]),
        (lambda: Spec(3, 8, 5, "small", 8, "dense", ()), ["block", "'dense'", "bottleneck"]),
        (lambda: resnet(classes=0), ["classes", "0"]),
        (lambda: resnet(101), ["depth", "101", "18, 34, 50"]),
    ],
)
def test_a_spec_of_no_network_is_refused_by_name(make, named):
    with pytest.raises(SpecError) as refused:
        make()
    assert all(part in str(refused.value) for part in named), refused.value


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{" * 100_000, '{"stages": [[{}]]}'),
        json.dumps(json.loads(resnet().to_json()) | {"more": 1}),
        resnet().to_json().replace('"identity"', '"none?"'),
        resnet().to_json().replace('"widths":[64,64]', '"widths":[64,NaN]', 1),
    ],
)
def test_text_of_no_spec_is_refused(text):
    with pytest.raises(SpecError):
        Spec.from_json(text)


def test_folded_batch_norm_is_the_module_in_evaluation():
    torch.manual_seed(0)
    model = models.build(models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.125))
    model.train()(torch.randn(16, 1, 8, 8))
    with torch.no_grad():
        model.bn1.weight.uniform_(-1, 1)
        model.bn1.bias.normal_()
    factor, summand = models.fold_batch_norm(model.state_dict(), "bn1")
    inputs = torch.randn(4, len(factor), 5, 5)
    folded = inputs * factor.view(-1, 1, 1) + summand.view(-1, 1, 1)
    torch.testing.assert_close(folded.float(), model.eval().bn1(inputs))
