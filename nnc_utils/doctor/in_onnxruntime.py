"""What ONNX Runtime executes on the CPU: the graph that it writes down after optimizing it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from onnx import helper

from nnc_utils.doctor import Layer, Report, onnx_rules
from nnc_utils.doctor.onnx_graph import WEIGHT, Graph, macs

SIDE = 224  # where a model leaves the size of its images open
INTEGER = re.compile(r"QLinear|QGemm|Integer|DynamicQuantizeMatMul")
AROUND = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Cast", "Mul", "ReorderInput", "ReorderOutput")


def examine(path: Path, settings: dict[str, str]) -> Report:
    """A .onnx file; the settings are entries of the session."""
    model = load(path)
    graph = Graph(model)
    layers = graph.layers()
    names = [node.name or node.output[0] for node, _ in layers]
    for number, (node, _) in enumerate(layers):
        node.name = f"@{number}@"  # a kernel's name holds that of the node it was made from
    executed = _executed(model, settings)
    types = {tensor.name: tensor.data_type for tensor in executed.graph.initializer}
    kernels = {}
    for kernel in executed.graph.node:
        for number in re.findall(r"@(\d+)@", kernel.name) if kernel.op_type not in AROUND else ():
            kernels[int(number)] = kernel
    shapes, found = _shapes(model, graph, [node for node, _ in layers]), []
    batch = next(iter(random_inputs(model).values())).shape[0]
    for number, (node, kind) in enumerate(layers):
        if number not in kernels and graph.fixed(node.output[0]):
            continue  # computed once, when the file is loaded
        # a float kernel for blocks of channels (NCHWc) has another name, or computes two layers
        kernel = kernels.get(number, onnx.NodeProto(op_type=f"{node.op_type} (in blocks, or fused)"))
        integer = bool(INTEGER.search(kernel.op_type)) or _asks_for_int8(kernel)
        signed = len(kernel.input) > 2 and types.get(kernel.input[2]) == onnx.TensorProto.INT8
        runs = kernel.op_type + (" (signed)" if integer and signed else "")
        rules = onnx_rules.reasons(graph, node)
        if integer:
            rules = (*onnx_rules.rounded(graph, node), *onnx_rules.slow(graph, kernel, types))
        found.append(Layer(names[number], kind, runs, integer, macs(node, shapes) // batch, rules))
    return Report(str(path), f"ONNX Runtime {ort.__version__}", tuple(found), onnx_rules.notes(graph))


def load(path: Path) -> onnx.ModelProto:
    """A model without functions of its own: their layers are in its graph."""
    model = onnx.load(path)
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _asks_for_int8(kernel: onnx.NodeProto) -> bool:
    """Whether a MatMulNBits, whose weights are integers, is to quantize what it reads, too."""
    return any(a.name == "accuracy_level" and a.i == 4 for a in kernel.attribute)


def session(model: onnx.ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
    """On the CPU with one thread, without warnings."""
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _executed(model: onnx.ModelProto, settings: dict[str, str]) -> onnx.ModelProto:
    options = ort.SessionOptions()
    for entry in settings.items():
        options.add_session_config_entry(*entry)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "executed.onnx")
        session(model, options)
        return onnx.load(options.optimized_model_filepath)


def random_inputs(model: onnx.ModelProto, count: int | None = None) -> dict[str, np.ndarray]:
    """Normal numbers for each input; `count` of them, else one batch. `SIDE` is an open height or width."""
    constants, inputs = {tensor.name for tensor in model.graph.initializer}, {}
    random = np.random.default_rng(0)
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        given = [dim.dim_value for dim in tensor.shape.dim]
        shape = [size or (SIDE if axis > 1 else 3) for axis, size in enumerate(given)]
        shape[:1] = [count or given[0] or 1] if given else []
        kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        inputs[value.name] = random.normal(size=shape).astype(kind)
    return inputs


def _shapes(model: onnx.ModelProto, graph: Graph, layers: list[onnx.NodeProto]) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a layer reads and writes, from one run without optimizations."""
    wanted = {name for n in layers for name in (n.input[0], n.input[WEIGHT.get(n.op_type, 1)], n.output[0])}
    inputs = random_inputs(model)
    shapes = {name: tuple(tensor.dims) for name, tensor in graph.constants.items()}
    shapes |= {name: array.shape for name, array in inputs.items()}
    traced = onnx.ModelProto()
    traced.CopyFrom(model)
    del traced.graph.output[:]
    computed = sorted(wanted - set(shapes))
    traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = session(traced, options).run(computed, inputs) if computed else []
    return shapes | {name: output.shape for name, output in zip(computed, outputs)}
