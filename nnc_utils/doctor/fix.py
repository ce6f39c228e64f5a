"""What can be repaired in an ONNX file without new calibration, and a check of both files on the same inputs.

The codes of the weights stay what they are, but for the sign that a folded batch-norm gives them, and so do
the scales of the activations. Behind a ReLU the range above the calibrated one is no longer clipped.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from nnc_utils.doctor.in_onnxruntime import load, random_inputs, session
from nnc_utils.doctor.onnx_graph import MOVING, PASSED, Graph
from nnc_utils.doctor.onnx_rules import bias_of_another_scale, is_middle, is_relu

INPUTS, BATCH = 256, 32
NEAR = 0.1  # of a standard deviation: so alike are outputs of one value
# operators whose output is not negative if their input is not
KEEPING = (*MOVING, "AveragePool", "GlobalAveragePool", "ReduceMean")
KEEPING += ("QuantizeLinear", "DequantizeLinear")
BIAS_LIMIT = 2**30  # of a bias in int32: room for the products
SMALLEST_SCALE = 2.0**-90
UNREAD = ("QuantizeLinear", "DequantizeLinear", "Identity", "Constant")  # what repairs leave without a reader


def fix(path: Path, out: Path, inputs: str) -> dict:
    """Write a repaired file, and compare it with the first.

    Returns
    -------
    "changes": kind -> how many, "agreement": `agreement_of` the output that agrees least, "difference": the
    largest one between their outputs, in standard deviations of these.
    """
    model = load(path)
    changes = {name: count for name, count in repair(model).items() if count}
    if not changes:
        raise ValueError("there is nothing that --fix changes")
    onnx.checker.check_model(model)
    onnx.save(model, out)
    batch = len(next(iter(random_inputs(model).values())))
    fed = random_inputs(model, max(INPUTS, batch))
    if inputs:
        fed = dict.fromkeys(fed, np.load(inputs, allow_pickle=False))
    both = list(zip(*(_outputs(onnx.load(file), fed) for file in (path, out))))
    agreement = min(agreement_of(before, after) for before, after in both)
    difference = max(float(np.abs(a - b).max() / max(a.std(), 1e-12)) for a, b in both)
    return {"changes": changes, "agreement": agreement, "difference": difference}


def agreement_of(before: np.ndarray, after: np.ndarray) -> float:
    """The share of rows with the same largest value; of one value, with nearly the same."""
    if before.shape[1] == 1:
        return float((np.abs(before - after) <= NEAR * before.std()).mean())
    return float((before.argmax(1) == after.argmax(1)).mean())


def _outputs(model: onnx.ModelProto, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """(inputs, values) of each output, in batches of the size that the file has."""
    runner, count = session(model, ort.SessionOptions()), len(next(iter(fed.values())))
    given = runner.get_inputs()[0].shape[0]
    batch = given if isinstance(given, int) else min(count, BATCH)
    if count < batch:
        raise ValueError(f"{count} inputs are fewer than the {batch} that the file reads at once")
    end = count - count % batch if batch == given else count  # whole batches
    parts = [slice(start, start + batch) for start in range(0, end, batch)]
    runs = [runner.run(None, {name: value[part] for name, value in fed.items()}) for part in parts]
    outputs = [np.concatenate(list(map(np.atleast_1d, run))).astype(np.float64) for run in zip(*runs)]
    return [output.reshape(len(output), -1) for output in outputs]


def repair(model: onnx.ModelProto) -> Counter[str]:
    """Change a model in place; rule -> how often."""
    changes: Counter[str] = Counter()
    changes["scale-of-shape-1"] = _scalars(model)
    changes["operator-before"] = _quantize_again(model)
    changes["batch-norm-behind"] = _fold_batch_norm(model)
    changes += _unsigned(model) + _integer_biases(model)
    changes["signed-dynamic-weights"] = _unsigned_dynamic(model)
    if any(changes.values()):
        _drop_unread(model.graph)
    del model.graph.value_info[:]  # types of the tensors in between, as they were
    return changes


def _store(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    """Add a constant under a name of its own."""
    taken, number = {tensor.name for tensor in model.graph.initializer}, len(model.graph.initializer)
    while f"{name}.doctor{number}" in taken:
        number += 1
    name = f"{name}.doctor{number}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
    return name


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove quantizers and constants that nothing reads any more."""
    read, unread = set(), [None]
    while unread:
        read = _read(graph)
        unread = [n for n in graph.node if n.op_type in UNREAD and not read.intersection(n.output)]
        for node in unread:
            graph.node.remove(node)
    read |= {value.name for value in graph.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in read:
            del graph.initializer[place]


def _read(graph: onnx.GraphProto) -> set[str]:
    """The tensors that nodes read, also those in graphs within nodes, and the outputs."""
    names = {output.name for output in graph.output}.union(*(node.input for node in graph.node))
    inner = [g for node in graph.node for a in node.attribute for g in (a.g, *a.graphs)]
    return names.union(*map(_read, inner))


def _scalars(model: onnx.ModelProto) -> int:
    """Scales and zero-points of whole activations get the shape []."""
    graph, changed = Graph(model), 0
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and graph.array(node.input[0]) is None:
            for name in node.input[1:]:
                if name in graph.constants and list(graph.constants[name].dims) == [1]:
                    del graph.constants[name].dims[:]
                    changed += 1
    return changed


def _weight(graph: Graph, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and the scales of their channels of a symmetric int8 weight; None for any other."""
    node, pair = graph.producers.get(name), graph.pair(name)
    if pair is None or pair.zero_point.dtype != np.int8 or pair.zero_point.any():
        return None
    codes = graph.array(node.input[0])
    if codes is None:  # NNCF stores floats and quantizes them when the file is loaded
        quantizer = graph.producers.get(node.input[0])
        values = graph.array(quantizer.input[0]) if quantizer is not None else None
        if values is None:
            return None
        scale = pair.scale.reshape(-1, *[1] * (values.ndim - 1)) if pair.scale.ndim else pair.scale
        codes = np.clip(np.rint(values / scale), -128, 127).astype(np.int8)
    return codes, np.broadcast_to(pair.scale.reshape(-1), len(codes)).astype(np.float64)


def _dequantized(model: onnx.ModelProto, before: onnx.NodeProto, codes: np.ndarray, scale: np.ndarray) -> str:
    """A constant of integers with a scale for each channel, dequantized before a node."""
    name = f"{before.name or before.output[0]}.{'bias' if codes.ndim == 1 else 'weight'}"
    zeros = np.zeros(len(scale), codes.dtype)
    inputs = [_store(model, name, array) for array in (codes, scale.astype(np.float32), zeros)]
    node = helper.make_node("DequantizeLinear", inputs, [f"{inputs[0]}.float"], axis=0)
    model.graph.node.insert(list(model.graph.node).index(before), node)
    return node.output[0]


def _fold_batch_norm(model: onnx.ModelProto) -> int:
    """Batch-norm behind a quantized convolution becomes part of its scales and an int32 bias."""
    graph, count = Graph(model), 0
    for norm in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        conv = graph.producers.get(norm.input[0])
        alone = len(graph.readers[norm.input[0]]) == 1 and norm.input[0] not in graph.outputs
        if conv is None or conv.op_type != "Conv" or not alone:
            continue
        weight, source = _weight(graph, conv.input[1]), graph.pair(graph.original(conv.input[0], PASSED))
        parts = [graph.values(name) for name in norm.input[1:5]]
        bias = graph.values(conv.input[2]) if len(conv.input) > 2 else np.zeros(1)
        known = weight is not None and source is not None and all(p is not None for p in (*parts, bias))
        if not known or source.scale.size != 1:
            continue
        gamma, beta, mean, variance = parts
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        bias = beta + (bias - mean) * factor
        codes, scale = weight
        # a channel that batch-norm all but removes carries its bias alone: its scale grows until that fits
        fitting = np.maximum(scale * np.abs(factor), np.abs(bias) / (source.scale.item() * BIAS_LIMIT))
        fitting = np.maximum(fitting, SMALLEST_SCALE)
        column = (-1, *[1] * (codes.ndim - 1))
        folded = np.rint(codes * (scale * factor / fitting).reshape(column)).clip(-127, 127).astype(np.int8)
        rounded = np.rint(bias / (source.scale.item() * fitting)).astype(np.int32)
        inputs = [_dequantized(model, conv, folded, fitting)]
        inputs.append(_dequantized(model, conv, rounded, source.scale.item() * fitting))
        conv.input[1:] = inputs
        conv.output[0] = norm.output[0]
        model.graph.node.remove(norm)
        count += 1
    return count


def _unsigned(model: onnx.ModelProto) -> Counter[str]:
    """Activations become uint8, and behind a ReLU their zero-point 0; the scales stay."""
    graph, changes = Graph(model), Counter()
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        pair, readers = graph.parameters(node), graph.readers[node.output[0]]
        known = pair is not None and pair.zero_point.size == 1 and pair.zero_point.dtype.itemsize == 1
        if not known or graph.array(node.input[0]) is not None:
            continue
        if any(reader.op_type != "DequantizeLinear" for reader in readers) or node.output[0] in graph.outputs:
            continue
        signed, zero_point = pair.zero_point.dtype.kind == "i", int(pair.zero_point.item())
        relu = is_middle(pair) and not_negative(graph, node.input[0])
        if not (signed or relu):
            continue
        moved = 0 if relu else zero_point + 128
        name = _store(model, f"{node.output[0]}.zero_point", np.array(moved, np.uint8))
        for other in (node, *readers):
            other.input[2:] = [name]
        changes["zero-point-behind-relu" if relu else "signed-activations"] += 1
    return changes


def not_negative(graph: Graph, name: str) -> bool:
    """Whether a tensor is that of a ReLU, or only moved or pooled since."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in KEEPING:
        node = graph.producers.get(node.input[0])
    return node is not None and is_relu(graph, node)


def _quantize_again(model: onnx.ModelProto) -> int:
    """Behind what only moves codes they are quantized again, with the scale that they have."""
    graph, count = Graph(model), 0
    for node, kind in graph.layers():
        if kind != "add" and graph.pair(node.input[1]) is None:
            continue  # a weight in floats: it stays a layer of floats
        for place in (0, 1) if kind == "add" else (0,):
            source = graph.original(node.input[place], MOVING)
            if source == graph.original(node.input[place], PASSED) or graph.pair(source) is None:
                continue
            names = [f"{node.name or node.output[0]}.{place}.{part}" for part in ("codes", "floats")]
            parameters = graph.producers[source].input[1:]
            pair = [
                helper.make_node("QuantizeLinear", [node.input[place], *parameters], names[:1]),
                helper.make_node("DequantizeLinear", [names[0], *parameters], names[1:]),
            ]
            at = list(model.graph.node).index(node)
            for new in reversed(pair):
                model.graph.node.insert(at, new)
            node.input[place] = names[1]
            count += 1
    return count


def _integer_biases(model: onnx.ModelProto) -> Counter[str]:
    """A Gemm's bias in floats, and any of another scale, becomes int32 with the scale of the layer's sums."""
    graph, changes = Graph(model), Counter()
    for node in [n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2]:
        bias, scale = graph.values(node.input[2]), graph.bias_scale(node)
        wrong = bias_of_another_scale(graph, node)
        floats = node.op_type == "Gemm" and graph.pair(node.input[2]) is None
        if bias is None or scale is None or bias.ndim != 1 or not (floats or wrong):
            continue
        scale = np.broadcast_to(np.maximum(scale, SMALLEST_SCALE), bias.shape)
        if (np.abs(bias) / scale > BIAS_LIMIT).any():
            continue
        node.input[2] = _dequantized(model, node, np.rint(bias / scale).astype(np.int32), scale)
        changes["bias-of-another-scale" if wrong else "float-bias"] += 1
    return changes


def _unsigned_dynamic(model: onnx.ModelProto) -> int:
    """Signed weights of dynamic quantization become unsigned, and their zero-point 128."""
    graph, count = Graph(model), 0
    for node in [n for n in model.graph.node if n.op_type in ("ConvInteger", "MatMulInteger")]:
        codes = graph.array(node.input[1])
        if codes is None or codes.dtype != np.int8:
            continue
        given = graph.array(node.input[3]) if len(node.input) > 3 and node.input[3] else np.zeros((), np.int8)
        if given is None:
            continue
        inputs = [*node.input, "", ""][:4]
        inputs[1] = _store(model, node.input[1], (codes.astype(np.int16) + 128).astype(np.uint8))
        inputs[3] = _store(model, f"{node.input[1]}.zero", (given.astype(np.int16) + 128).astype(np.uint8))
        node.input[:] = inputs
        count += 1
    return count
