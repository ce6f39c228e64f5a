"""An ONNX graph as the rules look at it: who writes a tensor, who reads it, and how it is quantized."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

KINDS = dict.fromkeys(("Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "FusedConv"), "conv")
KINDS |= dict.fromkeys(("Gemm", "MatMul", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulNBits"), "linear")
# as files hold them that a runtime has optimized
FUSED = ("FusedGemm", "FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
KINDS |= dict.fromkeys(FUSED, "linear")
KINDS |= dict.fromkeys(("Add", "QLinearAdd"), "add")
WEIGHT = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}  # which input it is, 1 in all others
# operators that only move or choose values; behind the first ones ONNX Runtime quantizes again by itself
PASSED = ("Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
MOVING = (*PASSED, "Flatten")
LONGEST = 4  # operators between a layer and its quantizer


@dataclass(frozen=True)
class Pair:
    """How the codes of a tensor are read: `zero_point` has their type."""

    scale: np.ndarray
    zero_point: np.ndarray


class Graph:
    """An ONNX model with what is asked of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.producers |= dict.fromkeys(node.output, node)
            for name in filter(None, node.input):
                self.readers[name].append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {output.name for output in model.graph.output}
        self._fixed = set(self.constants)
        for node in self.nodes:  # they are sorted: each stands behind those that it reads
            if self._fixed.issuperset(filter(None, node.input)):
                self._fixed.update(node.output)

    def layers(self) -> list[tuple[NodeProto, str]]:
        """Each layer with its kind; the addition of a bias is none."""
        found = [(node, KINDS[node.op_type]) for node in self.nodes if node.op_type in KINDS]
        return [(n, kind) for n, kind in found if kind != "add" or not any(map(self.fixed, n.input))]

    def fixed(self, name: str) -> bool:
        """Whether a tensor is a constant, or made from constants alone."""
        return name in self._fixed

    def original(self, name: str, through: tuple[str, ...] = ("Identity",)) -> str:
        """The tensor that another one is a mere copy of; with `MOVING` that which holds the same values."""
        while (node := self.producers.get(name)) is not None and node.op_type in through:
            name = node.input[0]
        return name

    def array(self, name: str) -> np.ndarray | None:
        """The values of a constant; None for what is computed."""
        name = self.original(name)
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def values(self, name: str) -> np.ndarray | None:
        """The values of a constant in float64, also of one that is stored in integers."""
        node, array = self.producers.get(self.original(name)), self.array(name)
        if array is None and node is not None and node.op_type == "DequantizeLinear":
            codes, pair = self.array(node.input[0]), self.parameters(node)
            if codes is not None and pair is not None and (pair.scale.size == 1 or codes.ndim == 1):
                array = (codes.astype(np.float64) - pair.zero_point) * pair.scale
        return None if array is None else array.astype(np.float64)

    def pair(self, name: str) -> Pair | None:
        """How a layer's input is quantized; None for floats."""
        node = self.producers.get(self.original(name))
        return self.parameters(node) if node is not None and node.op_type == "DequantizeLinear" else None

    def parameters(self, node: NodeProto) -> Pair | None:
        """Scale and zero-point of a quantize or dequantize node; None where they are not constants."""
        scale = self.array(node.input[1])
        zero_point = self.array(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        return None if scale is None or zero_point is None else Pair(scale, zero_point)

    def bias_scale(self, node: NodeProto) -> np.ndarray | None:
        """The scale that a layer's sums have, and its bias should: (out,) or (1,); None for floats."""
        source, weight = (self.pair(self.original(name, PASSED)) for name in node.input[:2])
        if source is None or weight is None or source.scale.size != 1:
            return None
        return source.scale.reshape(1).astype(np.float64) * weight.scale.reshape(-1)

    def behind(self, node: NodeProto) -> tuple[list[NodeProto], NodeProto | None]:
        """What follows a layer, up to its quantizer, and that: None if others read, too, or a layer comes."""
        between: list[NodeProto] = []
        while len(between) < LONGEST:
            output = (between or [node])[-1].output[0]
            readers = self.readers[output]
            if output in self.outputs or len(readers) != 1 or readers[0].op_type in KINDS:
                break
            if readers[0].op_type == "QuantizeLinear":
                return between, readers[0]
            between.append(readers[0])
        return between, None


def macs(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiplications of a layer for one image, from the shapes of its tensors."""
    weight, output = shapes[node.input[WEIGHT.get(node.op_type, 1)]], shapes[node.output[0]]
    kind, source = KINDS[node.op_type], shapes[node.input[0]]
    if kind == "add":
        return 0
    if kind == "conv":  # a transposed one multiplies each value that it reads, not each that it writes
        return math.prod(source if node.op_type == "ConvTranspose" else output) * math.prod(weight[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(output) * source[-2 if transposed else -1]
