"""Networks as data: a `Spec` says what a residual network is, `build` makes the module.

Parameters and multiplications are read off the Spec, so a pruned, searched or thin network is
described, counted and built in the same way as ResNet-18 itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
    """One residual block.

    Parameters
    ----------
    widths : output channels of each convolution.
    kernels : odd kernel size of each convolution.
    stride : of the first convolution (basic) or the second (bottleneck).
    connection : what is added to the block's output: its input ("identity"), a 1x1 convolution of
        its input ("projection") or nothing ("none").
    """

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int = 1
    connection: str = "identity"


@dataclass(frozen=True)
class Spec:
    """The architecture of a residual network.

    Parameters
    ----------
    channels, size : input channels; input height and width in pixels.
    classes : number of classes.
    stem : one of `STEMS`.
    stem_width : output channels of the first convolution.
    block : "basic" or "bottleneck".
    stages : the blocks of each stage.

    Raises
    ------
    SpecError
        When the fields describe no network; the message names the layers at fault.

    Examples
    --------
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
                tuple(
                    BlockSpec(tuple(b["widths"]), tuple(b["kernels"]), b["stride"], b["connection"])
                    for b in stage
                )
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
    if len(block.widths) != convolutions or len(block.kernels) != convolutions:
        raise SpecError(
            f"{name} has {len(block.widths)} widths and {len(block.kernels)} kernels: "
            f"this kind of block has {convolutions} convolutions"
        )
    _positive(f"{name}: stride", block.stride)
    for i, (out, kernel) in enumerate(zip(block.widths, block.kernels, strict=True), 1):
        _positive(f"{name}.conv{i}: width", out)
        _positive(f"{name}.conv{i}: kernel", kernel)
        if kernel % 2 == 0:
            raise SpecError(f"{name}.conv{i} has kernel {kernel}: only odd kernels keep the picture centred")
    if block.connection not in CONNECTIONS:
        raise SpecError(f"{name}: unknown connection {block.connection!r}: one of {', '.join(CONNECTIONS)}")
    last = f"{name}.conv{convolutions}"
    if block.connection == "identity" and block.widths[-1] != width:
        raise SpecError(
            f"{last} has {block.widths[-1]} channels, but the identity connection adds the {width} channels "
            f"of {before} to them: make the two equal, or use connection='projection'"
        )
    if block.connection == "identity" and block.stride != 1:
        raise SpecError(
            f"{name} has stride {block.stride}, so {last} is smaller than {before}, which the identity "
            "connection adds to it: use stride 1 or connection='projection'"
        )


def resnet(
    depth: int = 18,
    *,
    channels: int = 3,
    size: int = 224,
    classes: int = 1000,
    stem: str = "imagenet",
    width: float = 1.0,
) -> Spec:
    """The Spec of ResNet-18, -34 or -50 (He et al., 2016; stride as in torchvision).

    Parameters
    ----------
    depth : 18, 34 or 50.
    channels, size, classes, stem : see `Spec`.
    width : factor on every width, rounded to whole channels.
    """
    if depth not in RESNETS:
        raise SpecError(f"unknown depth {depth!r}: one of {', '.join(map(str, RESNETS))}")
    if not 0 < width <= 16:
        raise SpecError(f"width is {width!r}: a factor above 0 and at most 16 is needed")
    block, depths = RESNETS[depth]
    scaled = [max(1, round(w * width)) for w in (64, 128, 256, 512)]
    stages, before = [], scaled[0]
    for stage, (out, blocks) in enumerate(zip(scaled, depths, strict=True)):
        widths, kernels = ((out, out), (3, 3)) if block == "basic" else ((out, out, 4 * out), (1, 3, 1))
        stages.append([])
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            connection = "identity" if stride == 1 and widths[-1] == before else "projection"
            stages[-1].append(BlockSpec(widths, kernels, stride, connection))
            before = widths[-1]
    return Spec(channels, size, classes, stem, scaled[0], block, tuple(map(tuple, stages)))


def with_widths(spec: Spec, widths: Mapping[str, int]) -> Spec:
    """The Spec with other output channels; `widths` names every convolution."""
    numbers = iter(named_blocks(spec))
    stages = []
    for stage in spec.stages:
        blocks = []
        for block in stage:
            name, _ = next(numbers)
            new = tuple(widths[f"{name}.conv{i}"] for i in range(1, len(block.widths) + 1))
            blocks.append(dataclasses.replace(block, widths=new))
        stages.append(tuple(blocks))
    return dataclasses.replace(spec, stem_width=widths["conv1"], stages=tuple(stages))


# --- Reading a Spec -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer: what it is called, its shape, where it works.

    `size_in` and `size_out` are heights (and widths) in pixels; `batch_norm` is the name of the
    normalization behind it, None for the classifier.
    """

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
        """Multiplications for one picture."""
        return self.in_channels * self.out_channels * self.kernel**2 * self.size_out**2


def named_blocks(spec: Spec) -> list[tuple[str, BlockSpec]]:
    """The blocks with torchvision's names, in order: ("layer1.0", BlockSpec(...)), ..."""
    return [
        (f"layer{s}.{b}", block) for s, stage in enumerate(spec.stages, 1) for b, block in enumerate(stage)
    ]


def _shrink(size: int, kernel: int, stride: int) -> int:
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def layers(spec: Spec) -> list[Layer]:
    """Every convolution and linear layer, in the order of the module's state_dict."""
    kernel, stride, pool = STEMS[spec.stem]
    size = _shrink(spec.size, kernel, stride)
    found = [Layer("conv1", "conv", spec.channels, spec.stem_width, kernel, stride, spec.size, size, "bn1")]
    size = _shrink(size, 3, 2) if pool else size
    width = spec.stem_width
    for name, block in named_blocks(spec):
        before, inside, stage_in = width, width, size
        for i, (out, kernel) in enumerate(zip(block.widths, block.kernels, strict=True)):
            stride = block.stride if i == BLOCKS[spec.block][1] else 1
            after = _shrink(size, kernel, stride)
            norm = f"{name}.bn{i + 1}"
            found.append(Layer(f"{name}.conv{i + 1}", "conv", inside, out, kernel, stride, size, after, norm))
            inside, size = out, after
        if block.connection == "projection":
            norm = f"{name}.downsample.1"
            found.append(
                Layer(f"{name}.downsample.0", "conv", before, inside, 1, block.stride, stage_in, size, norm)
            )
        width = inside
    found.append(Layer("fc", "linear", width, spec.classes, 1, 1, 1, 1, None))
    return found


def parameters(spec: Spec) -> int:
    """Trainable parameters: weights, batch-norm scales and shifts, the classifier's bias."""
    return sum(layer.parameters for layer in layers(spec))


def macs(spec: Spec) -> int:
    """Multiplications of convolutions and linear layers for one picture, before quantizing."""
    return sum(layer.macs for layer in layers(spec))


def fold_batch_norm(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Batch-norm in evaluation as a factor and a summand of each channel, float64.

    Parameters
    ----------
    tensors : holds its weight, bias, running_mean and running_var, as a state_dict does.
    name : of the batch-norm, such as "bn1".
    """
    parts = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (tensors[f"{name}.{part}"].double() for part in parts)
    factor = gamma / (variance + BATCH_NORM_EPSILON).sqrt()
    return factor, beta - mean * factor


# --- Building a module --------------------------------------------------------------------------


class Activation(nn.Module):
    """A place where integer runtimes store the tensor as unsigned 8-bit integers.

    Passes its input on until it gets a range; then rounds it to ``scale * (q - zero_point)``,
    q in 0..255, with the straight-through gradient of `torch.fake_quantize_per_tensor_affine`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        self.zero_point: int = 0

    def forward(self, tensor: Tensor) -> Tensor:
        if self.scale is None:
            return tensor
        return torch.fake_quantize_per_tensor_affine(tensor, self.scale, self.zero_point, 0, 255)

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale:.4g}, zero_point={self.zero_point}"


def activations(model: nn.Module) -> dict[str, Activation]:
    """The `Activation` places of a network by name, in the order of its forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Activation)}


def check_images(model: nn.Module, images: Tensor, *, least: int = 1) -> None:
    """Raise a ValueError unless these are normalized images, `least` of them or more, for this network."""
    wanted = (model.spec.channels, model.spec.size, model.spec.size)
    if len(images) < least or tuple(images.shape[1:]) != wanted:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: at least {least} of shape {wanted} is needed"
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: normalized floats are needed, as by Data.normalize")


def check_labels(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless these are the classes of the images, int64, of this network."""
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, images {tuple(images.shape)}: "
            "one label for each image is needed"
        )
    classes = model.spec.classes
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels are {labels.dtype} from {int(labels.min())} to {int(labels.max())}: "
            f"int64 from 0 to {classes - 1} is needed"
        )


class PickingConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride that picks its pixels first; the numbers are the same.

    In channels-last order with fewer input channels than a vector register holds, oneDNN's own
    stride corrupts memory or gives a wrong gradient of the weight (oneDNN issue 6035).
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def _conv(layer: Layer) -> nn.Conv2d:
    # From one pixel to one pixel any stride is the same; with 2 oneDNN's bf16 leaves those gradients of the
    # weight that are 0 as it found the memory (torch 2.14.1).
    stride = layer.stride if layer.size_in > 1 else 1
    kind = PickingConv2d if layer.kernel == 1 and stride > 1 and layer.in_channels < 16 else nn.Conv2d
    padding = layer.kernel // 2
    return kind(layer.in_channels, layer.out_channels, layer.kernel, stride, padding, bias=False)


class Block(nn.Module):
    """A residual block: convolutions, each with batch-norm, and a connection around them."""

    def __init__(self, block: BlockSpec, shapes: dict[str, Layer]) -> None:
        super().__init__()
        self.connection = block.connection
        self.convolutions = len(block.widths)
        for i in range(1, self.convolutions + 1):
            self.add_module(f"conv{i}", _conv(shapes[f"conv{i}"]))
            self.add_module(f"bn{i}", nn.BatchNorm2d(shapes[f"conv{i}"].out_channels))
            if i < self.convolutions or block.connection != "none":
                self.add_module(f"quant{i}", Activation())
        if block.connection == "projection":
            projection = shapes["downsample.0"]
            self.downsample = nn.Sequential(_conv(projection), nn.BatchNorm2d(projection.out_channels))
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
            out = out + (
                inputs if self.connection == "identity" else self.quant_downsample(self.downsample(inputs))
            )
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
            blocks = []
            for b, block in enumerate(stage):
                prefix = f"layer{s}.{b}."
                inside = {n.removeprefix(prefix): v for n, v in shapes.items() if n.startswith(prefix)}
                blocks.append(Block(block, inside))
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
    """The module of a Spec, freshly initialized (He et al., 2015, as torchvision does).

    Examples
    --------
    >>> model = build(resnet(18, channels=1, size=28, classes=10, stem="small"))
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    model = ResNet(spec)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


# --- Weights from elsewhere ---------------------------------------------------------------------


def load_pretrained(model: ResNet, weights: str | Path) -> list[str]:
    """Copy ImageNet weights into a network, as far as its shapes allow.

    Parameters
    ----------
    model : changed in place. For a one-channel input the first convolution takes the sum of the
        weights over the colours, which is what it does to a grey picture.
    weights : "imagenet" (torchvision's own for this depth, downloaded), or a local file in
        torchvision's format (.pt or .pth without pickled code, or .safetensors).

    Returns
    -------
    Names of the layers that keep their fresh initialization because the file has none of their
    shape: the classifier where the classes differ, the stem where its kernel does.

    Raises
    ------
    ValueError
        When the weights are of another network, or the depth has none by name.
    FileNotFoundError
    """
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (model.state_dict(), _read_weights(weights, model.spec))
    )
    another = "these are the weights of another network"
    if more := sorted(theirs.keys() - ours.keys()):
        raise ValueError(f"{weights}: the network has no {more[0]} ({len(more)} such names): {another}")
    colours = theirs.get("conv1.weight")
    if colours is not None and colours.shape[1] == 3 and model.spec.channels == 1:
        theirs["conv1.weight"] = colours.sum(1, keepdim=True)
    fresh = [
        name for name, tensor in ours.items() if name not in theirs or theirs[name].shape != tensor.shape
    ]
    for name in fresh:
        if name.rpartition(".")[0] not in ("conv1", "fc"):
            given = f"of shape {tuple(theirs[name].shape)}" if name in theirs else "missing"
            needed = f"the network's is of shape {tuple(ours[name].shape)}"
            raise ValueError(f"{weights}: {name} is {given}, {needed}: {another}")
    for name in ours.keys() - fresh:
        ours[name].copy_(theirs[name])
    return sorted({name.rpartition(".")[0] for name in fresh})


def _read_weights(weights: str | Path, spec: Spec) -> dict[str, Tensor]:
    if str(weights) == "imagenet":
        import torchvision

        depth = next((d for d, (b, n) in RESNETS.items() if (b, n) == _shape(spec)), None)
        if depth is None:
            raise ValueError("ImageNet weights by name exist for ResNet-18, -34 and -50: give a file instead")
        return torchvision.models.get_model_weights(f"resnet{depth}").DEFAULT.get_state_dict(check_hash=True)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give 'imagenet' or a file in torchvision's format")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _shape(spec: Spec) -> tuple[str, tuple[int, ...]]:
    return spec.block, tuple(len(stage) for stage in spec.stages)
