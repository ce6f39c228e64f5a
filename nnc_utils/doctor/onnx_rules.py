"""How the rules on ONNX files are detected; what they mean stands in rules.csv."""

from __future__ import annotations

import re

import numpy as np
from onnx import NodeProto, TensorProto

from nnc_utils.doctor.onnx_graph import KINDS, MOVING, PASSED, Graph, Pair

SIGNED = TensorProto.INT8
NOT_COUNTED = re.compile(r"Attention|LSTM|^(If|Loop|Scan|GRU|RNN|Einsum)$")  # operators that multiply
BEFORE_QUANTIZERS = ("Relu", "Clip", "BatchNormalization", "QuantizeLinear", *KINDS)


def reasons(graph: Graph, node: NodeProto) -> tuple[str, ...]:
    """The names of the rules that say why ONNX Runtime computes a layer in floats."""
    if node.op_type == "MatMulNBits":
        return ("weights-only",)
    if not any("quantize" in other.op_type.lower() for other in graph.nodes):
        return ("float-file",)
    if node.op_type == "ConvTranspose":
        return ("no-integer-kernel",)
    inputs = [graph.original(name, MOVING) for name in node.input[:2]]
    source, weight = map(graph.pair, inputs)
    if source is None or weight is None:
        return () if node.op_type == "Add" else ("no-quantizer-before",)
    between, quantizer = graph.behind(node)
    written = graph.parameters(quantizer) if quantizer is not None else None
    pairs = [pair for pair in (source, weight, written) if pair is not None]
    float_bias = node.op_type == "Gemm" and len(node.input) > 2 and graph.pair(node.input[2]) is None
    found = {
        "batch-norm-behind": any(other.op_type == "BatchNormalization" for other in between),
        "zero-point-behind-relu": bool(between) and is_relu(graph, between[-1]) and is_middle(written),
        "wide-activations": any(pair.zero_point.dtype.itemsize == 2 for pair in pairs),
        "scale-of-shape-1": node.op_type == "Add"
        and any(pair.scale.ndim or pair.zero_point.ndim for pair in pairs),
        "float-bias": float_bias and quantizer is None,
        "bias-of-another-scale": bias_of_another_scale(graph, node),
        "operator-before": inputs != [graph.original(name, PASSED) for name in node.input[:2]],
        **_no_quantizer_behind(graph, node, between, quantizer),
    }
    signed = any(pair.zero_point.dtype.kind == "i" for pair in (source, written) if pair is not None)
    names = tuple(name for name, shown in found.items() if shown)
    return names or (("signed-activations",) if signed else ())


def is_relu(graph: Graph, node: NodeProto) -> bool:
    """Whether what a node writes is never negative; a Clip may have another lower bound, or none."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    lowest = graph.array(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    return lowest is not None and lowest.item() >= 0


def is_middle(pair: Pair | None) -> bool:
    """Whether half of the codes stand for negative numbers."""
    if pair is None or pair.zero_point.size != 1:
        return False
    return int(pair.zero_point.item()) == (0 if pair.zero_point.dtype.kind == "i" else 128)


def bias_of_another_scale(graph: Graph, node: NodeProto) -> bool:
    """Whether a layer's int32 bias has not the scale of its sums."""
    bias = graph.pair(node.input[2]) if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else None
    scale = graph.bias_scale(node)
    return bias is not None and scale is not None and not np.allclose(bias.scale, scale, rtol=0.01, atol=0)


def _no_quantizer_behind(
    graph: Graph, node: NodeProto, between: list[NodeProto], quantizer: NodeProto | None
) -> dict[str, bool]:
    """Why a runtime finds no codes for a convolution or an addition to write."""
    if KINDS[node.op_type] == "linear":
        return {}
    output = False
    if quantizer is None:
        chain = [node, *between]
        output = any(name in graph.outputs for other in chain for name in other.output)
        between = [*between, *graph.readers[chain[-1].output[0]]]
    other = any(n.op_type not in BEFORE_QUANTIZERS for n in between)
    return {
        "output-of-the-graph": output,
        "operator-between": other,
        "no-quantizer-behind": quantizer is None and not (output or other),
    }


def rounded(graph: Graph, node: NodeProto) -> tuple[str, ...]:
    """The rule that says that the file holds the weight of an integer layer in floats."""
    if node.op_type not in ("Conv", "Gemm"):
        return ()
    weight = graph.original(node.input[1], MOVING)
    return ("weights-rounded-on-loading",) if graph.fixed(weight) and graph.pair(weight) is None else ()


def slow(graph: Graph, kernel: NodeProto, types: dict[str, int]) -> tuple[str, ...]:
    """The names of the rules that say why an integer kernel is a slow one."""
    dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in graph.nodes)
    if kernel.op_type == "MatMulIntegerToFloat" and not dynamic:
        return ()
    if kernel.op_type in ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return ("signed-dynamic-weights",) if types.get(kernel.input[1]) == SIGNED else ()
    if len(kernel.input) > 2 and types.get(kernel.input[2]) == SIGNED:
        return ("signed-kernels",)
    return ()


def notes(graph: Graph) -> tuple[str, ...]:
    """The names of the rules that concern the whole file."""
    found = {
        "masks-left": any(is_mask(graph, node) for node in graph.nodes),
        "not-counted": any(NOT_COUNTED.search(node.op_type) for node in graph.nodes),
    }
    return tuple(name for name, shown in found.items() if shown)


def is_mask(graph: Graph, node: NodeProto) -> bool:
    """Whether a node multiplies two constants of one shape, a weight and its zeros and ones."""
    if node.op_type != "Mul":
        return False
    names = [graph.original(name, ("Identity", "Cast")) for name in node.input]  # masks are stored in bytes
    both = [graph.constants.get(name) for name in names]
    return None not in both and both[0].dims == both[1].dims and len(both[0].dims) > 1
