"""torchao's quantization of an exported program (PT2E) for x86, compiled by Inductor.

A process that has not imported torchao's quantizer runs the quantized program in floats, and a program
may come out of it unquantized without a word (pytorch#160095): both are refused here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from nnc_utils import artifact as artifacts
from nnc_utils import models, peers

BATCH = 64  # Inductor compiles for one shape; a smaller batch is padded
COMPILERS = ("g++", "clang++", "c++")


def missing(name: str) -> str:
    """Inductor compiles on this machine, each time."""
    if any(map(shutil.which, COMPILERS)):
        return ""
    return f"no C++ compiler: none of {', '.join(COMPILERS)} is there (Debian, Ubuntu: apt-get install g++)"


def make(source: Path, images: np.ndarray, folder: Path) -> Path:
    """Quantize an artifact's exported program; weights of 7 bits where the processor has no VNNI."""
    artifact = artifacts.read(source)
    network = artifacts.network(artifact).to(memory_format=torch.channels_last)
    batch = _channels_last(images[:2])  # goes into the file, too; of one image the batch would be fixed
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(network, (batch,), dynamic_shapes=shapes, strict=True).module()
    settings = x86.get_default_x86_inductor_quantization_config(reduce_range=not peers.vnni())
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(settings))
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            prepared(_channels_last(images[start : start + BATCH]))
    converted = convert_pt2e(prepared)
    _drop_unused(converted)
    program = torch.export.export(converted, (batch,), dynamic_shapes=shapes)
    _check(program, artifact)
    target = folder / f"{artifact.sha256[:16]}.torchao.pt2"
    torch.export.save(program, target)
    return target


def _drop_unused(converted: torch.fx.GraphModule) -> None:
    """Remove the float weights, which the conversion leaves behind and a file would hold."""
    used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    for name, _ in list(converted.named_parameters()):
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(converted.get_submodule(owner), attribute)


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """The program, compiled at the first prediction."""
    artifact = artifacts.read(source)
    program = torch.export.load(path)
    _check(program, artifact)
    codes = [t for t in (*program.state_dict.values(), *program.constants.values()) if _is_codes(t)]
    zeros = sum(t.numel() - int(torch.count_nonzero(t)) for t in codes)
    torch.set_num_threads(threads)
    module = program.module()
    move_exported_model_to_eval(module)
    return peers.Loaded(_predictor(torch.compile(module, dynamic=False), _layers(artifact)[0]), zeros)


def _predictor(compiled: Callable, convolutions: int) -> Callable[[np.ndarray], np.ndarray]:
    checked, before = False, _integer_convolutions()

    @torch.no_grad()
    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal checked
        logits = []
        with torch._inductor.config.patch(freezing=True):
            for start in range(0, len(images), BATCH):
                batch = np.take(images, range(start, start + BATCH), axis=0, mode="clip")
                logits.append(compiled(_channels_last(batch)).numpy())
        if not checked:
            found = _integer_convolutions() - before
            if found < convolutions:
                raise RuntimeError(
                    f"not an int8 network: Inductor computes {found} of {convolutions} convolutions in "
                    "integers; this is not to be reported as int8"
                )
            checked = True
        return np.concatenate(logits)[: len(images)]

    return predict


def _integer_convolutions() -> int:
    """How many Inductor has compiled in this process."""
    return sum(counters["inductor"][f"{kind}_lower_count"] for kind in ("qconv_unary", "qconv2d_binary"))


def _channels_last(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).contiguous(memory_format=torch.channels_last)


def _is_codes(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8 and tensor.ndim > 1


def _layers(artifact: artifacts.Artifact) -> tuple[int, int]:
    layers = models.layers(artifact.spec)
    convolutions = sum(len(layer.weight_shape) == 4 for layer in layers)
    return convolutions, len(layers) - convolutions


def _check(program: torch.export.ExportedProgram, artifact: artifacts.Artifact) -> None:
    """Each layer must have a dequantized input and a dequantized weight."""
    counts = [0, 0]
    for node in program.graph.nodes:
        kind = {"conv2d": 0, "linear": 1}.get(getattr(node.target, "_opname", ""))
        if kind is not None and all("dequantize" in str(given.target) for given in node.args[:2]):
            counts[kind] += 1
    if tuple(counts) != _layers(artifact):
        raise RuntimeError(
            f"torchao quantized {counts[0]} convolutions and {counts[1]} linear layers of "
            f"{_layers(artifact)}: this is not to be reported as int8"
        )
