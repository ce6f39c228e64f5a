"""Networks as data: a `Spec` says what a residual network is, `build` makes the module.

Parameters and multiplications are read off the Spec, so a pruned, searched or narrow network is
described, counted and built in the same way as ResNet-18 itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# name -> (kernel, stride, max-pool behind it)
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False), "small_stride2": (3, 2, False)}
# name -> (convolutions in a block, the one that carries the stride)
BLOCKS = {"basic": (2, 0), "bottleneck": (3, 1)}
CONNECTIONS = ("identity", "projection", "none")
BATCH_NORM_EPSILON = 1e-5  # of nn.BatchNorm2d
RESNETS = {18: ("basic", (2, 2, 2, 2)), 34: ("basic", (3, 4, 6, 3)), 50: ("bottleneck", (3, 4, 6, 3))}


class SpecError(ValueError):
    """A Spec that describes no network."""


@dataclass(frozen=True)
class BlockSpec:
    """One residual block: output channels and odd kernel size of each convolution, and its connection.

    `stride` is that of the first convolution (basic) or the second (bottleneck). `connection` is what is
    added to the output: the block's input ("identity"), a 1x1 convolution of it ("projection"), or "none".
    """

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int = 1
    connection: str = "identity"


@dataclass(frozen=True)
class Spec:
    """The architecture of a residual network for square images of `size` pixels.

    `stem` is one of `STEMS`, `stem_width` its output channels, `block` "basic" or "bottleneck", `stages` the
    blocks of each stage. Fields that describe no network are a `SpecError` that names the layers at fault.

    >>> spec = resnet(18, channels=1, size=28, classes=10, stem="small_stride2")
    >>> parameters(spec)
    11172810
    """

    channels: int
    size: int
    classes: int
    stem: str
    stem_width: int
    block: str
    stages: tuple[tuple[BlockSpec, ...], ...]

    def __post_init__(self) -> None:
        for field, allowed in (("stem", STEMS), ("block", BLOCKS)):
            if getattr(self, field) not in allowed:
                raise SpecError(f"unknown {field} {getattr(self, field)!r}: one of {', '.join(allowed)}")
        for field in ("channels", "size", "classes", "stem_width"):
            _positive(field, getattr(self, field))
        if not self.stages or not all(self.stages):
            raise SpecError("a network needs at least one stage, and each stage at least one block")
        before, width = "conv1", self.stem_width
        for name, block in named_blocks(self):
            _check_block(name, block, BLOCKS[self.block][0], before, width)
            before, width = f"{name}.conv{len(block.widths)}", block.widths[-1]

    def to_json(self) -> str:
        """The Spec as one line of JSON; `Spec.from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Spec:
        """Read what `to_json` wrote; anything else is a `SpecError`."""
        try:
            fields = json.loads(text)
            stages = tuple(
                tuple(BlockSpec(tuple(b.pop("widths")), tuple(b.pop("kernels")), **b) for b in stage)
                for stage in fields.pop("stages")
            )
            return Spec(**fields, stages=stages)
        except SpecError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SpecError(f"not a Spec in JSON: {error!r}") from None


def _positive(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(f"{what} is {value!r}: a whole number of at least 1 is needed")


def _check_block(name: str, block: BlockSpec, convolutions: int, before: str, width: int) -> None:
    if {len(block.widths), len(block.kernels)} != {convolutions}:
        raise SpecError(
            f"{name} has {len(block.widths)} widths and {len(block.kernels)} kernels: "
            f"this kind of block has {convolutions} convolutions"
        )
    _positive(f"{name}: stride", block.stride)
    for i, (out, kernel) in enumerate(zip(block.widths, block.kernels, strict=True), 1):
        _positive(f"{name}.conv{i}: width", out)
        if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
            raise SpecError(f"{name}.conv{i} has kernel {kernel!r}: an odd number keeps the image centred")
    if block.connection not in CONNECTIONS:
        raise SpecError(f"{name}: unknown connection {block.connection!r}: one of {', '.join(CONNECTIONS)}")
    if block.connection == "identity" and (block.widths[-1] != width or block.stride != 1):
        raise SpecError(
            f"{name}.conv{convolutions} has {block.widths[-1]} channels and stride {block.stride}, but its "
            f"identity connection adds the {width} channels of {before}: make these equal and the stride 1, "
            "or use connection='projection'"
        )


def resnet(
    depth: int = 18, *, channels=3, size=224, classes=1000, stem: str = "imagenet", width: float = 1
) -> Spec:
    """ResNet-18, -34 or -50 (He et al., 2016); `width` is a factor on every number of channels, rounded."""
    if depth not in RESNETS:
        raise SpecError(f"unknown depth {depth!r}: one of {', '.join(map(str, RESNETS))}")
    block, depths = RESNETS[depth]
    same = {"channels": channels, "size": size, "classes": classes, "stem": stem}
    return _residual(block, [64, 128, 256, 512], depths, width, same)


def three_stage(blocks: int = 3, *, channels: int, size: int, classes: int, width: float = 1) -> Spec:
    """The ResNet for small images (He et al., 2016, section 4.2): 3 gives ResNet-20, 18 ResNet-110.

    A 3x3 stem of stride 1, then so many basic blocks in each of three stages 16, 32 and 64 wide, times
    `width`. Where the width grows the connection is a projection; the paper's adds zeros.
    """
    same = {"channels": channels, "size": size, "classes": classes, "stem": "small"}
    return _residual("basic", [16, 32, 64], [blocks] * 3, width, same)


def _residual(block: str, full: list[int], depths: Sequence[int], width: float, same: dict) -> Spec:
    """Stages of these full widths, each but the first halving the image; `same` is the rest of the Spec."""
    scaled = [max(1, round(w * width)) for w in full]
    stages, before = [], scaled[0]
    for stage, (out, blocks) in enumerate(zip(scaled, depths, strict=True)):
        widths, kernels = ((out, out), (3, 3)) if block == "basic" else ((out, out, 4 * out), (1, 3, 1))
        stages.append([])
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            connection = "identity" if stride == 1 and widths[-1] == before else "projection"
            stages[-1].append(BlockSpec(widths, kernels, stride, connection))
            before = widths[-1]
    return Spec(**same, stem_width=scaled[0], block=block, stages=tuple(map(tuple, stages)))


def with_widths(spec: Spec, widths: Mapping[str, int]) -> Spec:
    """The Spec with other output channels; `widths` names every convolution."""
    blocks = iter(
        dataclasses.replace(b, widths=tuple(widths[f"{name}.conv{i + 1}"] for i in range(len(b.widths))))
        for name, b in named_blocks(spec)
    )
    stages = tuple(tuple(next(blocks) for _ in stage) for stage in spec.stages)
    return dataclasses.replace(spec, stem_width=widths["conv1"], stages=stages)


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer: name, shape, height and width in pixels, name of its batch-norm."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size_in: int
    size_out: int
    batch_norm: str | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight: (out, in, kernel, kernel) or (out, in)."""
        plane = (self.kernel, self.kernel) if self.kind == "conv" else ()
        return (self.out_channels, self.in_channels, *plane)

    @property
    def parameters(self) -> int:
        """Trainable parameters: the weight, and its batch-norm's scales and shifts or the bias."""
        return math.prod(self.weight_shape) + self.out_channels * (2 if self.batch_norm else 1)

    @property
    def macs(self) -> int:
        """Multiplications for one image."""
        return self.in_channels * self.out_channels * self.kernel**2 * self.size_out**2


def named_blocks(spec: Spec) -> list[tuple[str, BlockSpec]]:
    """The blocks with torchvision's names, in order: ("layer1.0", BlockSpec(...)), ..."""
    return [(f"layer{s}.{b}", x) for s, stage in enumerate(spec.stages, 1) for b, x in enumerate(stage)]


def _size_after(size: int, kernel: int, stride: int) -> int:
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def layers(spec: Spec) -> list[Layer]:
    """Every convolution and linear layer, in the order of the module's state_dict."""
    kernel, stride, pool = STEMS[spec.stem]
    size, width = _size_after(spec.size, kernel, stride), spec.stem_width
    result = [Layer("conv1", "conv", spec.channels, width, kernel, stride, spec.size, size, "bn1")]
    size = _size_after(size, 3, 2) if pool else size
    for name, block in named_blocks(spec):
        before, size_before = width, size
        for i, (out, kernel) in enumerate(zip(block.widths, block.kernels, strict=True)):
            stride, size_in = block.stride if i == BLOCKS[spec.block][1] else 1, size
            size, conv, norm = _size_after(size, kernel, stride), f"{name}.conv{i + 1}", f"{name}.bn{i + 1}"
            result.append(Layer(conv, "conv", width, out, kernel, stride, size_in, size, norm))
            width = out
        if block.connection == "projection":
            layer, norm = f"{name}.downsample.0", f"{name}.downsample.1"
            result.append(Layer(layer, "conv", before, width, 1, block.stride, size_before, size, norm))
    return [*result, Layer("fc", "linear", width, spec.classes, 1, 1, 1, 1, None)]


def parameters(spec: Spec) -> int:
    """Trainable parameters: weights, batch-norm scales and shifts, the classifier's bias."""
    return sum(layer.parameters for layer in layers(spec))


def macs(spec: Spec) -> int:
    """Multiplications of convolutions and linear layers for one image, before quantizing."""
    return sum(layer.macs for layer in layers(spec))


def fold_batch_norm(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Batch-norm `name` ("bn1") of a state_dict, in evaluation: factor and summand a channel, float64."""
    parts = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (tensors[f"{name}.{part}"].double() for part in parts)
    factor = gamma / (variance + BATCH_NORM_EPSILON).sqrt()
    return factor, beta - mean * factor


class Activation(nn.Module):
    """A place where integer runtimes store the tensor as unsigned 8-bit integers.

    Passes its input on until it gets a range; then rounds it to ``scale * (q - zero_point)``,
    q in 0..255, with the straight-through gradient of `torch.fake_quantize_per_tensor_affine`.
    """

    scale: float | None = None
    zero_point: int = 0

    def forward(self, tensor: Tensor) -> Tensor:
        if self.scale is None:
            return tensor
        return torch.fake_quantize_per_tensor_affine(tensor, self.scale, self.zero_point, 0, 255)


def activations(model: nn.Module) -> dict[str, Activation]:
    """The `Activation` places of a network by name, in the order of its forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Activation)}


def check_images(model: nn.Module, images: Tensor, *, least: int = 1) -> None:
    """Raise a ValueError unless these are normalized images for this network, `least` or more."""
    wanted = (model.spec.channels, model.spec.size, model.spec.size)
    if len(images) < least or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
        raise ValueError(
            f"images of shape {tuple(images.shape)} are {images.dtype}: normalized floats, "
            f"at least {least} of shape {wanted}, are needed"
        )


def check_labels(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless these are the classes of the images, int64, of this network."""
    fits = labels.shape == images.shape[:1] and labels.dtype == torch.int64
    if not fits or labels.min() < 0 or labels.max() >= model.spec.classes:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and are {labels.dtype} from {int(labels.min())} to "
            f"{int(labels.max())}: int64 from 0 to {model.spec.classes - 1}, one an image, is needed"
        )


class PickingConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride that picks its pixels first, then convolves with stride 1.

    The numbers are those of `nn.Conv2d`. It is there because oneDNN's own backward pass of such a
    convolution gives wrong gradients of the weight when the tensors are in channels-last order and
    the input has fewer channels than a vector register holds (oneDNN issue 6035).
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def _conv(layer: Layer) -> nn.Conv2d:
    # From one pixel to one pixel every stride gives the same. With a stride of 2 oneDNN's bf16 backward pass
    # leaves the gradients of weights beside the middle unset instead of 0 (torch 2.14.1): stride 1 is built.
    stride = layer.stride if layer.size_in > 1 else 1
    kind = PickingConv2d if layer.kernel == 1 and stride > 1 and layer.in_channels < 16 else nn.Conv2d
    return kind(layer.in_channels, layer.out_channels, layer.kernel, stride, layer.kernel // 2, bias=False)


class Block(nn.Module):
    """A residual block: convolutions, each with batch-norm, and a connection around them."""

    def __init__(self, block: BlockSpec, prefix: str, shapes: dict[str, Layer]) -> None:
        super().__init__()
        self.connection = block.connection
        self.convolutions = len(block.widths)
        for i, width in enumerate(block.widths, 1):
            self.add_module(f"conv{i}", _conv(shapes[f"{prefix}conv{i}"]))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            if i < self.convolutions or block.connection != "none":
                self.add_module(f"quant{i}", Activation())
        if block.connection == "projection":
            projection = _conv(shapes[f"{prefix}downsample.0"])
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(block.widths[-1]))
            self.quant_downsample = Activation()
        self.relu = nn.ReLU(inplace=True)
        self.quant_out = Activation()

    def forward(self, inputs: Tensor) -> Tensor:
        out = inputs
        for i in range(1, self.convolutions + 1):
            out = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(out))
            if i < self.convolutions:
                out = self.get_submodule(f"quant{i}")(self.relu(out))
        if self.connection != "none":
            out = self.get_submodule(f"quant{self.convolutions}")(out)
            identity = self.connection == "identity"
            out = out + (inputs if identity else self.quant_downsample(self.downsample(inputs)))
        return self.quant_out(self.relu(out))


class ResNet(nn.Module):
    """The network of a `Spec`, with torchvision's parameter names; logits of shape (batch, classes)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        shapes = {layer.name: layer for layer in layers(spec)}
        self.quant_input = Activation()
        self.conv1 = _conv(shapes["conv1"])
        self.bn1 = nn.BatchNorm2d(spec.stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.quant_stem = Activation()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if STEMS[spec.stem][2] else nn.Identity()
        for s, stage in enumerate(spec.stages, 1):
            blocks = [Block(block, f"layer{s}.{b}.", shapes) for b, block in enumerate(stage)]
            self.add_module(f"layer{s}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.quant_pool = Activation()
        self.fc = nn.Linear(shapes["fc"].in_channels, spec.classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.quant_stem(self.relu(self.bn1(self.conv1(self.quant_input(images)))))
        out = self.maxpool(out)
        for s in range(1, len(self.spec.stages) + 1):
            out = self.get_submodule(f"layer{s}")(out)
        out = self.quant_pool(self.avgpool(out)).flatten(1)
        return self.fc(out)


def build(spec: Spec) -> ResNet:
    """The module of a Spec, freshly initialized (He et al., 2015, as torchvision does)."""
    model = ResNet(spec)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
