"""What Inductor compiles an exported program to, read from the code that it writes.

torch.export's files can run code when they are loaded: examine those that you trust.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from unittest import mock

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

from nnc_utils.doctor import Layer, Report

KINDS = dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"), "conv")
KINDS |= dict.fromkeys(("linear", "addmm", "mm", "matmul", "bmm", "baddbmm"), "linear")
# what calls in the code that Inductor writes are named after -> kind, whether it is of integers
CALLS = {"qconv": ("conv", True), "qlinear": ("linear", True)}
CALLS |= {"convolution": ("conv", False), "linear": ("linear", False), "addmm": ("linear", False)}
CALLS |= {"_int_mm": ("linear", True), "mm": ("linear", False)}


def examine(path: Path, settings: dict[str, str]) -> Report:
    """A .pt2 file of `torch.export.save`; the settings are Inductor's, "freezing" among them."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401, registers integer kernels

    program = torch.export.load(path)
    config = {"force_disable_caches": True, "compile_threads": 1}  # else there is no code, or other processes
    config |= {key: _literal(value) for key, value in settings.items()}
    kernels: dict[str, list[tuple[str, bool | None]]] = {"conv": [], "linear": []}
    for call in _calls(program, config):
        kind, integer = next(CALLS[name] for name in CALLS if name in call)
        kernels[kind].append((call, integer))
    layers, quantized = [], any("dequantize" in str(node.target) for node in program.graph.nodes)
    nodes = [node for node in program.graph.nodes if getattr(node.target, "_opname", "") in KINDS]
    for kind, called in kernels.items():
        count = sum(KINDS[node.target._opname] == kind for node in nodes)
        if len(called) != count:  # some are fused into loops: nobody knows which layers the calls are of
            integer = None if any(integer for _, integer in called) else False
            kernels[kind] = [(f"{len(called)} calls for {count} layers", integer)] * count
    batch = next(iter(program.example_inputs[0] or program.example_inputs[1].values())).shape[0]
    for node in nodes:
        kind = KINDS[node.target._opname]
        call, integer = kernels[kind].pop(0)  # the code calls them in the graph's order
        frozen = bool(config.get("freezing"))
        rules = _reasons(node, quantized, frozen=frozen) if integer is False else ()
        layers.append(Layer(node.name, kind, call, bool(integer), macs(node) // batch, rules))
    return Report(str(path), f"Inductor of torch {torch.__version__}", tuple(layers), notes(program))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def _calls(program: torch.export.ExportedProgram, config: dict[str, object]) -> list[str]:
    """The layers' kernels in the code that Inductor writes for the program, in order."""
    arguments, keywords = program.example_inputs
    torch._dynamo.reset()
    # nobody reads the outputs, so the loops between the kernels do nothing: compiling them takes longest
    idle = mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    with torch.no_grad(), torch._inductor.config.patch(config), idle:
        compiled = torch.compile(program.module(), dynamic=False)
        _, sources = run_and_get_code(compiled, *arguments, **keywords)
    code = "\n".join(source.partition("def call(")[2] for source in sources)
    names = re.findall(r"(?:torch\.ops\.\w+|extern_kernels)\.(\w+)(?=[.(])", code)
    return [name for name in names if any(call in name for call in CALLS)]


def _reasons(node: torch.fx.Node, quantized: bool, *, frozen: bool) -> tuple[str, ...]:
    if not quantized:
        return ("float-file",)
    if not all("dequantize" in str(read.target) for read in _operands(node)):
        return ("no-quantizer-before",)
    return () if frozen else ("no-freezing",)


def _operands(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
    """What a layer multiplies; what addmm and baddbmm are given first is added."""
    return node.args[1:3] if "add" in node.target._opname else node.args[:2]


def macs(node: torch.fx.Node) -> int:
    """Multiplications of a layer for all images of the example."""
    # of an open batch the size that the example has
    source, weight, output = (tuple(map(int, n.meta["val"].shape)) for n in (*_operands(node), node))
    if KINDS[node.target._opname] == "linear":
        return math.prod(output) * source[-1]
    at = source if "transpose" in node.target._opname else output
    return math.prod(at) * math.prod(weight[1:])


def notes(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The rules that concern the file: what takes bytes."""
    stored = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target}
    weights = {n for n in program.graph.nodes if n.name in stored and getattr(n.meta["val"], "ndim", 0) > 1}
    products = [n.args[:2] for n in program.graph.nodes if getattr(n.target, "_opname", "") == "mul"]
    masked = [both for both in products if weights.issuperset(both)]  # a weight and its zeros and ones
    found = {
        "unread-weights": any(not weight.users for weight in weights),
        "masks-left": any(left.meta["val"].shape == right.meta["val"].shape for left, right in masked),
    }
    return tuple(name for name, shown in found.items() if shown)
