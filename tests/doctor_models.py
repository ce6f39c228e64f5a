"""Small ONNX networks for the doctor: a residual one of ReLUs, and what the real tools make of it."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

WIDTH, SIZE, CLASSES = 16, 12, 10
CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4")
UNSIGNED = {"activation_type": quantization.QuantType.QUInt8, "per_channel": True}
_MADE: dict[tuple, bytes] = {}  # what the tools made; most tests begin with one of a few files


def network(
    *, batch_norm=False, activation="Relu", transpose=False, mask=False, one_bias=False, pool=False
) -> onnx.ModelProto:
    """conv1, a block of conv2 and conv3 with its residual add, conv4, pool, fc."""
    random = np.random.default_rng(0)
    nodes, constants = [], {}

    def node(kind, inputs, name, **attributes):
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(name, *shape):
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        constants[name] = random.normal(0, scale, shape).astype(np.float32)
        return name

    def convolution(name, source, channels, *, act=True):
        weight = constant(f"{name}.weight", WIDTH, channels, 3, 3)
        if mask:
            constants[f"{name}.mask"] = (constants[weight] > 0).astype(np.int8)
            floats = node("Cast", [f"{name}.mask"], f"{name}.mask.float", to=TensorProto.FLOAT)
            weight = node("Mul", [weight, floats], f"{name}.masked")
        copies = one_bias and name != "conv1"  # as PyTorch exports equal biases
        bias = node("Identity", ["conv1.bias"], f"{name}.bias") if copies else constant(f"{name}.bias", WIDTH)
        inputs = [source, weight, bias]
        output = node("Conv", inputs, name, kernel_shape=[3, 3], pads=[1] * 4)
        if batch_norm:
            parts = [constant(f"{name}.{part}", WIDTH) for part in ("gamma", "beta", "mean", "variance")]
            constants[parts[0]][1] = 0  # a channel that is its bias alone
            constants[parts[3]] = np.abs(constants[parts[3]]) + np.float32(0.5)
            output = node("BatchNormalization", [name, *parts], f"{name}.norm")
        return node(activation, [output], f"{name}.act") if act else output

    stem = convolution("conv1", "images", 3)
    stem = node("MaxPool", [stem], "pooled", kernel_shape=[2, 2]) if pool else stem
    inner = convolution("conv3", convolution("conv2", stem, WIDTH), WIDTH, act=False)
    last = convolution("conv4", node("Relu", [node("Add", [inner, stem], "add")], "add.act"), WIDTH)
    if transpose:
        weight = constant("up.weight", WIDTH, WIDTH, 2, 2)
        last = node("ConvTranspose", [last, weight], "up", kernel_shape=[2, 2], strides=[2, 2])
    features = node("Flatten", [node("GlobalAveragePool", [last], "pool")], "features")
    weight, bias = constant("fc.weight", CLASSES, WIDTH), constant("fc.bias", CLASSES)
    nodes.append(helper.make_node("Gemm", [features, weight, bias], ["logits"], name="fc", transB=1))
    ends = [_value("images", 3, SIZE, SIZE)], [_value("logits", CLASSES)]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "small", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])


def images(count=8):
    return np.random.default_rng(1).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


class _Reader(quantization.CalibrationDataReader):
    def __init__(self):
        self._batches = iter([{"images": images()}])

    def get_next(self):
        return next(self._batches, None)


def static(model: onnx.ModelProto, **settings) -> onnx.ModelProto:
    """ONNX Runtime's `quantize_static` with its defaults but for the settings."""
    return _made(quantization.quantize_static, model, settings, _Reader())


def dynamic(model: onnx.ModelProto, **settings) -> onnx.ModelProto:
    """ONNX Runtime's `quantize_dynamic`."""
    return _made(quantization.quantize_dynamic, model, settings)


def _made(tool, model, settings, *reader) -> onnx.ModelProto:
    """A copy of what a tool makes of a network, which it is asked for once."""
    key = tool, model.SerializeToString(), repr(settings)
    if key not in _MADE:
        logging.disable(logging.WARNING)  # it advises to pre-process
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "float.onnx", Path(folder) / "net.onnx"
            onnx.save(model, source)
            tool(source, target, *reader, **settings)
            _MADE[key] = target.read_bytes()
        logging.disable(logging.NOTSET)
    return onnx.ModelProto.FromString(_MADE[key])


def bypassed(model: onnx.ModelProto, *tensors: str) -> onnx.ModelProto:
    """Without the quantizers of some tensors, as tools place them that quantize behind the activation."""
    for quantize in [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in tensors]:
        (pair,) = [n for n in model.graph.node if quantize.output[0] in n.input]
        if pair.output[0] == "logits":
            (producer,) = [n for n in model.graph.node if quantize.input[0] in n.output]
            producer.output[0] = "logits"
        for node in model.graph.node:
            node.input[:] = [quantize.input[0] if name == pair.output[0] else name for name in node.input]
        model.graph.node.remove(quantize)
        model.graph.node.remove(pair)
    return model


def with_float_weight(model: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """One layer's weight as it was before it was quantized."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    (pair,) = [n for n in model.graph.node if n.input[0] == f"{layer}.weight_quantized"]
    codes, scale = (numpy_helper.to_array(stored[name]) for name in pair.input[:2])
    weight = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
    model.graph.initializer.append(numpy_helper.from_array(weight, pair.output[0]))
    model.graph.node.remove(pair)
    return model


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    model.graph.output.append(_value(name, WIDTH, SIZE, SIZE))
    return model


def with_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """The last layer becomes a call of a function that the model holds."""
    gemm = model.graph.node.pop()
    own = helper.make_opsetid("own", 1)
    ends = gemm.input, gemm.output
    model.functions.append(helper.make_function("own", "Last", *ends, [gemm], model.opset_import))
    model.opset_import.append(own)
    model.graph.node.append(helper.make_node("Last", *ends, domain="own"))
    return model


def with_fused_convolution(model: onnx.ModelProto) -> onnx.ModelProto:
    """The first convolution as ONNX Runtime writes it down."""
    model.graph.node[0].op_type, model.graph.node[0].domain = "FusedConv", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def four_bits(accuracy_level: int) -> onnx.ModelProto:
    """A linear layer of 32 inputs whose weights have 4 bits."""
    random = np.random.default_rng(0)
    arrays = {"codes": random.integers(0, 256, (CLASSES, 1, 16)).astype(np.uint8)}
    arrays["scales"] = np.ones(CLASSES, np.float32)
    sizes = {"K": 32, "N": CLASSES, "bits": 4, "block_size": 32, "accuracy_level": accuracy_level}
    node = helper.make_node("MatMulNBits", ["x", *arrays], ["logits"], "fc", domain="com.microsoft", **sizes)
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "small", [_value("x", 32)], [_value("logits", CLASSES)], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def with_scales_of_shape_1(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale") and not tensor.dims:
            tensor.dims.append(1)
    return model
