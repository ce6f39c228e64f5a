"""torchao's quantization of an exported program (PT2E) for x86, compiled by Inductor.

A process that has not imported torchao's quantizer runs the quantized program in floats, and a program
may come out of it unquantized without a word (pytorch#160095): both are refused here.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from nnc_utils import artifact as artifacts
from nnc_utils import peers
from nnc_utils.models import Spec
from nnc_utils.runtimes import qdq

BATCH = 64  # Inductor compiles for one shape; a smaller batch is padded
COMPILERS = ("g++", "clang++", "c++")
KINDS = {"conv2d": "conv", "linear": "linear"}


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
    used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    for name, _ in list(converted.named_parameters()):
        if name not in used:  # the float weights, which the conversion leaves behind and a file would hold
            owner, _, attribute = name.rpartition(".")
            delattr(converted.get_submodule(owner), attribute)
    program = torch.export.export(converted, (batch,), dynamic_shapes=shapes)
    _check(program, artifact.spec)
    target = folder / f"{artifact.sha256[:16]}.torchao.pt2"
    torch.export.save(program, target)
    return target


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """The program, compiled at the first prediction and refused if it computes a convolution in floats."""
    spec, program = artifacts.read(source).spec, torch.export.load(path)
    _check(program, spec)
    codes = [t for t in (*program.state_dict.values(), *program.constants.values()) if _is_codes(t)]
    zeros = sum(t.numel() - int(torch.count_nonzero(t)) for t in codes)
    torch.set_num_threads(threads)
    module = program.module()
    move_exported_model_to_eval(module)
    compiled, before, checked = torch.compile(module, dynamic=False), _compiled_convolutions(), False

    @torch.no_grad()
    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal checked
        logits = []
        with torch._inductor.config.patch(freezing=True):
            for start in range(0, len(images), BATCH):
                batch = np.take(images, range(start, start + BATCH), axis=0, mode="clip")
                logits.append(compiled(_channels_last(batch)).numpy())
        if not checked:
            qdq.check_integer(spec, {"conv": _compiled_convolutions() - before}, ("conv",))
            checked = True
        return np.concatenate(logits)[: len(images)]

    return peers.Loaded(predict, zeros)


def _compiled_convolutions() -> int:
    """How many Inductor has compiled to integer kernels in this process."""
    return sum(counters["inductor"][f"{kind}_lower_count"] for kind in ("qconv_unary", "qconv2d_binary"))


def _channels_last(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).contiguous(memory_format=torch.channels_last)


def _is_codes(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8 and tensor.ndim > 1


def _check(program: torch.export.ExportedProgram, spec: Spec) -> None:
    """Each layer must have a dequantized input and a dequantized weight."""
    counts: Counter[str] = Counter()
    for node in program.graph.nodes:
        kind = KINDS.get(getattr(node.target, "_opname", ""))
        if kind and all("dequantize" in str(read.target) for read in node.args[:2]):
            counts[kind] += 1
    qdq.check_integer(spec, counts, tuple(KINDS.values()))
