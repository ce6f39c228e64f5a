"""Small residual networks with random weights, for the tests of the runtimes."""

import copy
import functools
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from nnc_utils import artifact, curvature, encoding, models
from nnc_utils.models import BlockSpec, Spec
from nnc_utils.quantization import activations

ODD = Spec(
    *(2, 12, 5, "small", 7, "basic"),
    (
        (BlockSpec((5, 7), (5, 3)), BlockSpec((6, 9), (3, 7), 2, "projection")),
        (BlockSpec((9, 11), (1, 3), 1, "none"), BlockSpec((3, 11), (3, 1))),
    ),
)
POOLED = models.resnet(50, channels=3, size=32, classes=4, width=0.05)
PLAIN = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.125)


@functools.cache
def _network(spec, seed):
    """A network, and torch's random state behind its making."""
    torch.manual_seed(seed)
    model = models.build(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.weight.data[::3] *= -1
            module.weight.data[1] = 0
    model.train()(images(spec, 64))
    return model.eval(), torch.get_rng_state()


def network(spec, *, seed=0):
    """A network whose batch-norm has seen data, some of its scales negative and one of them 0."""
    model, state = _network(spec, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def with_statistics(model, seed=0):
    """Fill batch-norm with values that no mistake of order could hide."""
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and ("bn" in name or "downsample.1" in name):
            tensor.normal_(0.5, 0.3)
    return model.eval()


def images(spec, count, *, seed=1):
    """Normalized images."""
    return torch.randn(
        count, spec.channels, spec.size, spec.size, generator=torch.Generator().manual_seed(seed)
    )


def quantized(model, *, bits=7, per_channel=True):
    """The network with uniform weights and calibrated activations."""
    for layer in models.layers(model.spec):
        module = model.get_submodule(layer.name)
        largest = module.weight.detach().flatten(1).abs().amax(1)
        scale = (largest if per_channel else largest.amax()) / (2 ** (bits - 1) - 1)
        parametrize.register_parametrization(module, "weight", encoding.UniformWeight(scale, bits=bits))
    return activations.calibrate(model, images(model.spec, 128))


@functools.cache
def artifact_of(spec, *, bits=7, per_channel=True):
    """The artifact of a quantized network, which nobody changes."""
    model = quantized(network(spec), bits=bits, per_channel=per_channel)
    with tempfile.TemporaryDirectory() as folder:
        return saved(model, Path(folder) / "a.safetensors")


def affine(weight, *, bits, per_channel=True):
    """The weight in affine codes over its range, 0 included."""
    rows = weight.detach().flatten(1) if per_channel else weight.detach().flatten()
    low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    largest = 2**bits - 1
    scale = (high - low) / largest
    zero_point = (-low / scale).round()
    codes = (rows / scale[..., None]).round() + zero_point[..., None]
    codes = codes.clamp(0, largest).view(weight.shape).short()
    return encoding.Uniform(codes, scale, 0 if per_channel else None, bits, None, zero_point.short())


def codebook(weight, *, levels, mask=None):
    """The weight in evenly spaced levels over its range, the middle one 0."""
    codes = (weight.detach() / weight.detach().abs().amax() + 1) * (levels - 1) / 2
    book = torch.linspace(-1, 1, levels) * weight.detach().abs().amax()
    book[levels // 2] = 0
    codes = codes.round().to(torch.uint8)
    return encoding.Codebook(codes if mask is None else codes.masked_fill(~mask, 0), book, mask)


def saved(model, path):
    """As an artifact."""
    spec = model.spec
    mean, std = [0.5] * spec.channels, [0.25] * spec.channels
    return artifact.save(model, path, mean=mean, std=std, classes=[str(i) for i in range(spec.classes)])


def without_pair(model, tensor):
    """An ONNX model of `qdq` in which one tensor is not rounded."""
    pair = [node for node in model.graph.node if f"{tensor}.codes" in (*node.input, *node.output)]
    assert [node.op_type for node in pair] == ["QuantizeLinear", "DequantizeLinear"]
    for node in pair:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [f"{tensor}.float" if name == tensor else name for name in node.input]
    return model


def kronecker(rows, columns, *, seed=0, images=400):
    """A random curvature of full rank of a layer, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(images, columns, generator=generator) @ mixed
    outputs = torch.randn(images, rows, generator=generator) @ torch.randn(rows, rows, generator=generator)
    return curvature.Curvature(inputs.T @ inputs / images, outputs.T @ outputs / images)
