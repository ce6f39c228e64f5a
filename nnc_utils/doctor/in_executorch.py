"""What ExecuTorch executes: XNNPACK's graphs in a program, and the operators outside them."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from executorch.exir._serialize._program import deserialize_pte_binary

from nnc_utils.doctor import Layer, Report
from nnc_utils.runtimes.executorch import KINDS as COUNTED
from nnc_utils.runtimes.executorch import xnnpack_graph

KINDS = COUNTED | {"XNNConvTranspose2d": "conv", "XNNBatchMatrixMultiply": "linear"}
OUTSIDE = {"aten::convolution": "conv"}
OUTSIDE |= dict.fromkeys(("aten::linear", "aten::addmm", "aten::mm", "aten::bmm"), "linear")


def examine(path: Path, settings: dict[str, str]) -> Report:
    """A .pte file; it has no settings."""
    program = deserialize_pte_binary(path.read_bytes()).program
    found: list[Layer] = []
    for plan in program.execution_plan:
        batch = next(filter(None, (_shape(plan.values[index].val) for index in plan.inputs)), [1])[0]
        for delegate in plan.delegates:
            if delegate.id == "XnnpackBackend":
                data = program.backend_delegate_data[delegate.processed.index].data
                found += _delegated(xnnpack_graph(data), len(found), batch)
        found += _outside(plan, len(found), batch)
    dynamic = any("dynamic" in layer.runs for layer in found)
    quantized = dynamic or any(layer.integer for layer in found)
    layers = [replace(layer, rules=_reasons(layer, dynamic, quantized)) for layer in found]
    return Report(str(path), f"ExecuTorch {version('executorch')}", tuple(layers))


def _delegated(graph: dict, before: int, batch: int) -> list[Layer]:
    """The layers of one of XNNPACK's graphs; a program does not hold their names, so they are numbered."""
    values = [_value(value) for value in graph["xvalues"]]
    found = []
    for node in graph["xnodes"]:
        operator, about = node["xnode_union_type"].removeprefix("_"), node["xnode_union"]
        if operator not in KINDS:
            continue
        kind = KINDS[operator]
        read = [values[about[key]] for key in ("input1_id", "input2_id", "filter_id") if key in about]
        if kind == "add" and any(math.prod(dims) == 1 for _, dims in read):
            continue  # of a number, as within a hard sigmoid
        integer = all(name.startswith("q") for name, _ in read)
        source = read[0][0]
        runs = f"{operator} {'dynamic ' if source.startswith('qd') else ''}{source}"
        macs = 0
        output = values[about["output_id"]][1]
        if operator == "XNNConvTranspose2d":
            kernel = [about[key] for key in ("kernel_height", "kernel_width", "group_output_channels")]
            macs = math.prod(read[0][1][1:]) * math.prod(kernel)
        elif kind == "linear":
            macs = math.prod(output) * read[0][1][-1] // batch
        elif kind == "conv":
            kernel = values[about["filter_id"]][1]
            # depthwise weights are (1, height, width, channels): each output has one channel of them
            channels = kernel[-1] if "Depthwise" in operator else kernel[0]
            macs = math.prod(output[1:]) * math.prod(kernel) // channels
        found.append(Layer(f"{kind} {before + len(found) + 1}", kind, runs, integer, macs))
    return found


def _value(value: dict) -> tuple[str, list[int]]:
    """Data type, such as fp32 or qint8, and shape of a tensor."""
    value = value["xvalue_union"]
    value = value.get("tensor_value", value)
    return value["datatype"].removeprefix("xnn_datatype_"), value["dims"]


def _outside(plan: object, before: int, batch: int) -> list[Layer]:
    """The layers that portable kernels compute, one by one as the program calls them."""
    found = []
    for call in (instruction.instr_args for chain in plan.chains for instruction in chain.instructions):
        operator = plan.operators[call.op_index].name if hasattr(call, "op_index") else ""
        if operator in OUTSIDE:
            name = f"{OUTSIDE[operator]} {before + len(found) + 1}"
            macs = _macs(operator, [plan.values[index].val for index in call.args]) // batch
            found.append(Layer(name, OUTSIDE[operator], operator, False, macs))
    return found


def _shape(value: object) -> list[int]:
    return list(getattr(value, "sizes", None) or [])


def _macs(operator: str, values: list) -> int:
    tensors = list(filter(None, map(_shape, values)))
    if operator == "aten::convolution":  # input, weight, ..., output; the seventh value: is it transposed?
        return math.prod(tensors[0 if values[6].bool_val else -1]) * math.prod(tensors[1][1:])
    inner = (tensors[1] if operator == "aten::addmm" else tensors[0])[-1]
    return math.prod(tensors[-1]) * inner


def _reasons(layer: Layer, dynamic: bool, quantized: bool) -> tuple[str, ...]:
    if layer.integer:
        return ()
    if layer.runs in OUTSIDE:
        return ("not-delegated",)
    if dynamic and layer.kind != "linear":
        return ("dynamic-quantization",)
    return ("no-quantizer-before" if quantized else "float-file",)
