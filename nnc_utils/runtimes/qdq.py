"""The one lowering to integers: every integer runtime gets the codes that are in the artifact.

`steps` lists what a network computes, `lower` turns an artifact into 8-bit integers with their
scales, `onnx_model` writes either form down as ONNX, `check_integer` says whether a runtime took it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from nnc_utils import encoding, models
from nnc_utils.artifact import Artifact
from nnc_utils.models import Layer, Spec

PRECISIONS = ("fp32", "int8", "s8s8")
OPSET, IR_VERSION = 17, 8  # of the ONNX that is written: read by ONNX Runtime and OpenVINO since 2022
# A bias above this could carry the 32-bit sum over its end; products alone stay far below.
BIAS_LIMIT = 2**30
SIGNED_SHIFT = 128  # from U8 codes to the S8 codes that mean the same
# Where a channel's scale vanishes, its product with an input's scale must still be a normal float.
SMALLEST_SCALE = 2.0**-90


class LoweringError(ValueError):
    """An artifact that cannot be written down as asked."""


@dataclass(frozen=True)
class Step:
    """One operation. Tensors are called as the `models.Activation` that rounds them.

    The max-pool has no rounding of its own: its output, "maxpool", has the range of its input.
    """

    kind: str  # "conv", "linear", "add", "max_pool" or "average_pool"
    name: str  # the layer's, or the block's and ".add"
    inputs: tuple[str, ...]
    output: str
    relu: bool = False  # whether a ReLU follows
    layer: Layer | None = None  # shape of a convolution or linear layer


def steps(spec: Spec) -> list[Step]:
    """What a network computes between "quant_input" and "logits", in order."""
    shapes = {layer.name: layer for layer in models.layers(spec)}
    order = [Step("conv", "conv1", ("quant_input",), "quant_stem", True, shapes["conv1"])]
    if models.STEMS[spec.stem][2]:
        order.append(Step("max_pool", "maxpool", ("quant_stem",), "maxpool"))
    for name, block in models.named_blocks(spec):
        skip = tensor = order[-1].output
        last = len(block.widths)
        for i in range(1, last + 1):
            added = i == last and block.connection != "none"
            output = f"{name}.quant{i}" if i < last or added else f"{name}.quant_out"
            conv = f"{name}.conv{i}"
            order.append(Step("conv", conv, (tensor,), output, not added, shapes[conv]))
            tensor = output
        if block.connection == "projection":
            conv, output = f"{name}.downsample.0", f"{name}.quant_downsample"
            order.append(Step("conv", conv, (skip,), output, False, shapes[conv]))
            skip = output
        if block.connection != "none":
            order.append(Step("add", f"{name}.add", (tensor, skip), f"{name}.quant_out", True))
    order.append(Step("average_pool", "avgpool", (order[-1].output,), "quant_pool"))
    order.append(Step("linear", "fc", ("quant_pool",), "logits", False, shapes["fc"]))
    return order


def check_integer(
    spec: Spec, counts: Mapping[str, int], kinds: Iterable[str] = ("conv", "linear", "add")
) -> None:
    """RuntimeError unless a runtime computes every convolution, linear layer and add in integers.

    `counts` is a session's `integer_operators`, `kinds` what the runtime has integer kernels for.
    """
    all_kinds = [step.kind for step in steps(spec)]
    wanted = {kind: all_kinds.count(kind) for kind in kinds}
    wrong = [f"{counts.get(k, 0)} of {n} {k}" for k, n in wanted.items() if counts.get(k, 0) != n]
    if wrong:
        raise RuntimeError(
            f"not an int8 network: the runtime computes {', '.join(wrong)} operators in integers "
            f"(it runs {dict(counts)}); this is not to be reported as int8"
        )


# --- Integers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntegerLayer:
    """A layer with its batch-norm folded in: ``scale * codes`` and ``input's scale * scale * bias``.

    `codes` int8 in ±127, shape of the weight; `scale` float32 (out,); `bias` int32 (out,).
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class IntegerNetwork:
    """A network in 8-bit integers: its steps, each layer's integers, each tensor's (scale, zero-point)."""

    spec: Spec
    steps: tuple[Step, ...]
    layers: dict[str, IntegerLayer]
    ranges: dict[str, tuple[float, int]]


def stored_codes(artifact: Artifact) -> bool:
    """Whether int8 computes with the |codes| of the file in every layer, none being rounded anew."""
    return all(_embeds(weight) for weight in artifact.weights.values())


def _embeds(weight: encoding.Encoding) -> bool:
    return isinstance(weight, encoding.Uniform) and weight.bits <= 8 and weight.zero_point is None


def lower(artifact: Artifact) -> IntegerNetwork:
    """An artifact as 8-bit integers.

    Folding batch-norm multiplies a channel's scale by γ/√(σ²+ε) and leaves its codes alone but for
    their sign, so symmetric codes of at most 8 bits stay those of the file. Any other encoding
    (floats, wider or affine codes, codebooks) is rounded anew, each channel over its largest weight.
    LoweringError where activation ranges are missing or cannot stand for a ReLU, or a number is not finite.
    """
    order = tuple(steps(artifact.spec))
    ranges, layers = _ranges(artifact, order), {}
    for step in order:
        if step.layer is not None:
            factor, bias = _fold(artifact, step.layer)
            input_scale = ranges[step.inputs[0]][0]
            layers[step.name] = _integers(artifact.weights[step.name], factor, bias, input_scale)
    return IntegerNetwork(artifact.spec, order, layers, ranges)


def float_layers(artifact: Artifact) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each layer with its batch-norm folded in, float32: never rounded but decoded."""
    folded = {}
    for layer in models.layers(artifact.spec):
        factor, bias = _fold(artifact, layer)
        weight = encoding.decode(artifact.weights[layer.name]).double()
        folded[layer.name] = ((weight * _column(factor, weight)).float(), bias.float())
    return folded


def _ranges(artifact: Artifact, order: tuple[Step, ...]) -> dict[str, tuple[float, int]]:
    # Logits stay as they are: the classifier's sums are integers all the same, and 8 bits would tie classes.
    rounded = ["quant_input", *(s.output for s in order if s.output not in ("maxpool", "logits"))]
    missing = [name for name in rounded if name not in artifact.ranges]
    if missing:
        others = " and others" if len(missing) > 3 else ""
        raise LoweringError(
            f"the artifact has no activation range for {', '.join(missing[:3])}{others}: calibrate the "
            "network and save it again, or ask for precision 'fp32'"
        )
    ranges = {name: artifact.ranges[name] for name in rounded}
    for step in order:
        if step.kind == "max_pool":
            ranges[step.output] = ranges[step.inputs[0]]
        if step.relu and ranges[step.output][1] != 0:
            raise LoweringError(
                f"{step.output} has zero-point {ranges[step.output][1]}: behind a ReLU it has to be "
                "0, so that clamping the codes at 0 is the ReLU"
            )
    return ranges


def _fold(artifact: Artifact, layer: Layer) -> tuple[Tensor, Tensor]:
    """Factor and bias of each output channel, float64: what batch-norm makes of the weight."""
    norm, tensors = layer.batch_norm, artifact.tensors
    if norm is None:
        bias = tensors[f"{layer.name}.bias"].double()
        factor = torch.ones_like(bias)
    else:
        factor, bias = models.fold_batch_norm(tensors, norm)
    if not (factor.isfinite().all() and bias.isfinite().all()):
        raise LoweringError(f"{norm or layer.name} holds numbers that are not finite (NaN or infinite)")
    return factor, bias


def _integers(weight: encoding.Encoding, factor: Tensor, bias: Tensor, input_scale: float) -> IntegerLayer:
    if _embeds(weight):
        codes, scale = weight.codes.double(), weight.scale.double().expand(len(factor))
    else:
        values = encoding.decode(weight).double()
        scale = values.flatten(1).abs().amax(1) / 127
        codes = (values / _column(scale.clamp(min=SMALLEST_SCALE), values)).round()
    # Codes of 0 mean 0 at any scale, but XNNPACK refuses one of 256 steps of the output, which 1 can become.
    scale = scale.where(codes.flatten(1).any(1), 0)
    codes, folded = codes * _column(factor.sign(), codes), scale * factor.abs()
    # A channel of 0, or with γ≈0, carries only its bias: its scale grows until that fits, its codes shrink.
    fitting = torch.maximum(folded, bias.abs() / (input_scale * BIAS_LIMIT)).clamp(min=SMALLEST_SCALE)
    codes = (codes * _column(folded / fitting, codes)).round()
    fitting = fitting.float()
    bias = (bias / (input_scale * fitting.double())).round()
    return IntegerLayer(codes.to(torch.int8), fitting, bias.to(torch.int32))


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.ndim - 1))


# --- ONNX ---------------------------------------------------------------------------------------


def onnx_model(artifact: Artifact, precision: str) -> onnx.ModelProto:
    """An artifact as an ONNX model: float32 "images" (batch, C, H, W) -> float32 "logits".

    "fp32" has decoded weights, batch-norm folded, activations never rounded; "int8" the integers of `lower`,
    each tensor between a quantize and a dequantize node; "s8s8" the same with signed activations.
    """
    if precision == "fp32":
        return _float_model(artifact)
    if precision in ("int8", "s8s8"):
        return integer_model(lower(artifact), signed=precision == "s8s8")
    raise LoweringError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")


def _float_model(artifact: Artifact) -> onnx.ModelProto:
    nodes, constants, layers = [], {}, float_layers(artifact)
    for step in steps(artifact.spec):
        inputs = ["images" if name == "quant_input" else name for name in step.inputs]
        if step.layer is not None:
            constants[f"{step.name}.weight"], constants[f"{step.name}.bias"] = layers[step.name]
            inputs += [f"{step.name}.weight", f"{step.name}.bias"]
        if step.kind == "linear":
            nodes.append(helper.make_node("Flatten", [inputs[0]], ["features"]))
            inputs[0] = "features"
        before = f"{step.output}.before_relu" if step.relu else step.output
        nodes.append(_operator(step, inputs, before))
        if step.relu:
            nodes.append(helper.make_node("Relu", [before], [step.output], name=f"{step.name}.relu"))
    return _model(artifact.spec, nodes, constants)


def integer_model(network: IntegerNetwork, *, signed: bool = False) -> onnx.ModelProto:
    """What `onnx_model` writes for int8; signed activations are slow on x86, whose fast kernels are U8S8."""
    nodes, constants = [], {}
    kind, shift = (torch.int8, SIGNED_SHIFT) if signed else (torch.uint8, 0)

    def rounded(tensor: str, output: str, scale: Tensor | float, zero_point: int) -> None:
        constants[f"{output}.scale"] = torch.tensor(scale, dtype=torch.float32)
        constants[f"{output}.zero_point"] = torch.tensor(zero_point - shift, dtype=kind)
        parameters = [f"{output}.scale", f"{output}.zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [tensor, *parameters], [f"{output}.codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{output}.codes", *parameters], [output]))

    def constant(name: str, codes: Tensor, scale: Tensor) -> str:
        constants[f"{name}.codes"], constants[f"{name}.scale"] = codes, scale
        constants[f"{name}.zero_point"] = torch.zeros(len(scale), dtype=codes.dtype)
        parameters = [f"{name}.scale", f"{name}.zero_point"]
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.codes", *parameters], [name], axis=0))
        return name

    rounded("images", "quant_input", *network.ranges["quant_input"])
    for step in network.steps:
        inputs = list(step.inputs)
        if step.layer is not None:
            layer = network.layers[step.name]
            inputs.append(constant(f"{step.name}.weight", layer.codes, layer.scale))
            input_scale = torch.tensor(network.ranges[step.inputs[0]][0], dtype=torch.float32)
            inputs.append(constant(f"{step.name}.bias", layer.bias, input_scale * layer.scale))
        if step.kind == "linear":
            # Rounded again behind the flattening, which is so a mere change of the codes' shape.
            nodes.append(helper.make_node("Flatten", [inputs[0]], ["features.float"]))
            rounded("features.float", "features", *network.ranges[step.inputs[0]])
            inputs[0] = "features"
        # No node for a ReLU: codes that are clamped at 0, where 0 is the zero-point, are one.
        if step.output == "logits":
            nodes.append(_operator(step, inputs, "logits"))
        else:
            nodes.append(_operator(step, inputs, f"{step.output}.float"))
            rounded(f"{step.output}.float", step.output, *network.ranges[step.output])
    return _model(network.spec, nodes, constants)


def _operator(step: Step, inputs: list[str], output: str) -> onnx.NodeProto:
    operator, attributes = {
        "conv": ("Conv", {}),
        "linear": ("Gemm", {"transB": 1}),
        "add": ("Add", {}),
        "max_pool": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}),
        "average_pool": ("GlobalAveragePool", {}),
    }[step.kind]
    if step.kind == "conv":
        kernel, stride = step.layer.kernel, step.layer.stride
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
    return helper.make_node(operator, inputs, [output], name=step.name, **attributes)


def identity_model(shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A graph with one Identity node, for images (C, H, W): what calling a runtime costs."""
    return _graph([helper.make_node("Identity", ["images"], ["same"])], shape, {"same": shape})


def _model(spec: Spec, nodes: list[onnx.NodeProto], constants: dict[str, Tensor]) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in constants.items()]
    return _graph(nodes, (spec.channels, spec.size, spec.size), {"logits": (spec.classes,)}, stored)


def _graph(nodes, shape, outputs, constants=()) -> onnx.ModelProto:
    ends = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
            for name, shape in end.items()
        ]
        for end in ({"images": shape}, outputs)
    ]
    graph = helper.make_graph(nodes, "nnc_utils", *ends, constants)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="nnc_utils")
