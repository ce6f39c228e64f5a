"""What OpenVINO executes on the CPU: the runtime model of a compiled model."""

from __future__ import annotations

import math
from pathlib import Path

from nnc_utils.doctor import Layer, Report
from nnc_utils.runtimes.openvino import _text as text  # before openvino: no telemetry

import openvino  # isort: skip

LONGEST = 6  # operators that are fused behind a layer
SIDE = 224  # where a model leaves the size of its images open
KINDS = {"Convolution": 1, "GroupConvolution": 2, "ConvolutionBackpropData": 1}
KINDS |= {"GroupConvolutionBackpropData": 2, "MatMul": 0}  # leading dimensions of the weight: channels
# operators that a quantizer may stand behind: of codes, or that only move them
PASSING = ("Convert", "Multiply", "Subtract", "Reshape", "MaxPool", "Transpose", "Squeeze", "Unsqueeze")
INTEGERS = ("i8", "u8", "i4", "u4")
COMPUTING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def examine(path: Path, settings: dict[str, str]) -> Report:
    """An .xml or .onnx file; the settings are properties of the CPU plug-in."""
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({port: _closed(port.get_partial_shape()) for port in model.inputs})
    properties = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", **settings}
    executed = core.compile_model(model, "CPU", properties).get_runtime_model().get_ops()
    kernels = {}
    for kernel in executed:
        about = {key: text(value) for key, value in kernel.get_rt_info().items()}
        if about["layerType"] in COMPUTING:
            kernels |= dict.fromkeys(about["originalLayersNames"].split(","), about)
    found, quantized, batch = [], _is_quantized(model), model.inputs[0].get_shape()[0]
    for node in model.get_ordered_ops():
        if node.get_type_name() not in KINDS:
            continue
        about = _kernel(node, kernels)
        if about is None and _constants(node):
            continue  # computed once, when the model is compiled
        runs = about["primitiveType"] if about else "fused"
        # a layer whose weights alone are compressed has runtimePrecision u8, and yet a primitive of floats
        integer = runs.lower().endswith("_i8")
        kind = "conv" if KINDS[node.get_type_name()] else "linear"
        rules = () if integer else _reasons(node, quantized)
        found.append(Layer(node.get_friendly_name(), kind, runs, integer, _macs(node) // batch, rules))
    version = openvino.__version__.split("-")[0]
    return Report(str(path), f"OpenVINO {version}", tuple(found), _notes(model, path))


def _kernel(node: openvino.Node, kernels: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """What computes a layer: a kernel made from it, or from what follows it and was fused into it."""
    for _ in range(LONGEST):
        name = node.get_friendly_name()
        for original, about in kernels.items():
            if original == name or original.startswith(f"{name}/"):
                return about
        readers = list(node.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() in KINDS:
            return None
        node = readers[0].get_node()
    return None


def _closed(shape: openvino.PartialShape) -> list[int]:
    """One image, where the batch is left open; the usual size where that is."""
    return [dim.get_length() if dim.is_static else 1 if axis == 0 else SIDE for axis, dim in enumerate(shape)]


def _macs(node: openvino.Node) -> int:
    kind, weight = node.get_type_name(), list(node.get_input_shape(1))
    if kind == "MatMul":
        inner = node.get_input_shape(0)[-2 if node.get_attributes()["transpose_a"] else -1]
        return math.prod(node.get_output_shape(0)) * inner
    at = node.get_input_shape(0) if "Backprop" in kind else node.get_output_shape(0)
    return math.prod(at) * math.prod(weight[KINDS[kind] :])


def _source(node: openvino.Node, port: int) -> openvino.Node:
    return node.input_value(port).get_node()


def _quantizer(node: openvino.Node) -> openvino.Node:
    """The first operator before a layer's input that does more than to move or scale codes."""
    node = _source(node, 0)
    while node.get_type_name() in PASSING:
        node = _source(node, 0)
    return node


def _constants(node: openvino.Node) -> list[openvino.Node]:
    """The constants that a weight is made from; none where it is computed."""
    found, waiting, seen = [], [node], {node.get_name()}
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Constant":
            found.append(node)
        elif not node.get_input_size():
            return []
        sources = [_source(node, port) for port in range(node.get_input_size())]
        sources = {source.get_name(): source for source in sources if source.get_name() not in seen}
        waiting += sources.values()
        seen |= set(sources)
    return found


def _type(node: openvino.Node) -> str:
    return node.get_output_element_type(0).get_type_name()


def _is_quantized(model: openvino.Model) -> bool:
    return any(node.get_type_name() == "FakeQuantize" or _stored_codes(node) for node in model.get_ops())


def _stored_codes(node: openvino.Node) -> bool:
    constant = node.get_type_name() == "Constant"
    return constant and _type(node) in INTEGERS and len(node.get_output_shape(0)) > 1


def _reasons(node: openvino.Node, quantized: bool) -> tuple[str, ...]:
    if not quantized:
        return ("float-file",)
    before, weights = _quantizer(node), _constants(_source(node, 1))
    if before.get_type_name() != "FakeQuantize":
        return ("weights-only" if any(map(_stored_codes, weights)) else "no-quantizer-before",)
    if before.get_attributes()["levels"] > 256:
        return ("wide-activations",)
    codes = any(map(_stored_codes, weights)) or _source(node, 1).get_type_name() == "FakeQuantize"
    return () if codes else ("no-quantizer-before",)


def _notes(model: openvino.Model, path: Path) -> tuple[str, ...]:
    """The rules that concern the file: what takes bytes."""
    layers = [node for node in model.get_ops() if node.get_type_name() in KINDS]
    weights = [(node, constant) for node in layers for constant in _constants(_source(node, 1))]
    mode = ["nncf", "weight_compression", "mode"]
    asked = model.has_rt_info(mode) and "int4" in text(model.get_rt_info(mode)).lower()
    floats = [c for _, c in weights if _type(c) == "f32" and len(c.get_output_shape(0)) > 1]
    full = [c for c in floats if math.prod(c.get_output_shape(0)) > max(c.get_output_shape(0))]  # no scales
    wide = [c for node, c in weights if _stored_codes(c) and KINDS[node.get_type_name()] and "8" in _type(c)]
    found = {
        "int4-as-int8": bool(asked and wide),
        "float-weights-kept": path.suffix == ".xml" and bool(full) and _is_quantized(model),
    }
    return tuple(name for name, shown in found.items() if shown)
