"""PyTorch's compiler, ahead of time: a package of machine code compiled from the exported graph.

A program is compiled for each batch size of `BATCHES`: with a batch left open, torch 2.14 compiles the
quantized graph to wrong numbers. Other sizes are composed of these. A classifier of at most 16 inputs and
classes is computed in floats; such a network is refused in int8.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export.pt2_archive._package import load_pt2  # up here it is no part of the load time

from nnc_utils.artifact import Artifact
from nnc_utils.runtimes import exported
from nnc_utils.runtimes import threads as torch_threads

PRECISIONS = ("fp32", "int8")
INTEGER = ("conv", "linear")  # adds read and write 8-bit codes, but are computed in float registers
SUFFIX = ".pt2"
BATCHES = (64, 1)
COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++")))  # those that it tries
# what calls in the generated C++ are named after -> kind of step, the first that fits
KERNELS = {"qconv": "conv", "qlinear": "linear", "convolution": "float conv"}
KERNELS |= {"linear": "float linear", "addmm": "float linear"}


def missing(precision: str) -> str:
    """It compiles on this machine."""
    if not any(map(shutil.which, COMPILERS)):
        tried = ", ".join(COMPILERS)
        return f"no C++ compiler: none of {tried} is there (Debian, Ubuntu: apt-get install g++)"
    if precision == "int8":
        try:
            _register_integer_patterns()
        except ImportError:
            return "torchao is not installed"
    return ""


def _register_integer_patterns() -> None:
    """What importing torchao's quantizer does; without it Inductor takes float kernels."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401


class InductorSession:
    """The programs of a package; see `runtimes.Session`."""

    def __init__(self, package: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        programs = load_pt2(str(package)).aoti_runners
        self._programs = {batch: programs[f"batch{batch}"] for batch in BATCHES}
        self._threads, self.runtime_bytes = threads, package.stat().st_size
        with zipfile.ZipFile(package) as content:
            code = [name for name in content.namelist() if name.endswith(".wrapper.cpp")]
            self._code = [content.read(name).decode() for name in code]

    @property
    def threads(self) -> int:
        """What PyTorch says."""
        return torch_threads.use(self._threads)

    @property
    def integer_operators(self) -> dict[str, int]:
        """Counted in the C++ that was compiled: the fewest of any program, of floats the most."""
        programs = []
        for code in self._code:
            calls = re.findall(r"aoti_torch_cpu_\w+(?=\()", code)
            kinds = (next((kind for name, kind in KERNELS.items() if name in call), "") for call in calls)
            programs.append(Counter(filter(None, kinds)))
        kinds = set().union(*programs)
        return {k: (max if k.startswith("float") else min)(p[k] for p in programs) for k in kinds}

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        torch_threads.use(self._threads)
        inputs, logits = torch.from_numpy(np.ascontiguousarray(images)), []
        while len(inputs):
            batch = next(batch for batch in BATCHES if batch <= len(inputs))
            logits.append(self._programs[batch](inputs[:batch]))
            inputs = inputs[batch:]
        return torch.cat(logits).numpy()


@torch.no_grad()  # with gradients Inductor would not fold constants and take its integer kernels
def _compile(module: nn.Module, shape: tuple[int, ...], target: Path) -> None:
    import torch._inductor
    from torch._inductor.package import package_aoti

    options = {"aot_inductor.package": True, "freezing": True, "cpp.dynamic_threads": True}
    programs = {}
    for batch in BATCHES:
        program, example = exported.export(module, shape, batch=batch).module(), torch.zeros(batch, *shape)
        programs[f"batch{batch}"] = torch._inductor.aot_compile(program, (example,), options=options)
    package_aoti(str(target), programs)


def write(artifact: Artifact, precision: str, target: Path) -> None:
    """Compile an artifact to a package."""
    if precision == "int8":
        _register_integer_patterns()
    spec = artifact.spec
    _compile(exported.Network(artifact, precision), (spec.channels, spec.size, spec.size), target)


def write_identity(shape: tuple[int, int, int], target: Path) -> None:
    """Compile a program that copies its input."""
    _compile(exported.Copy(), shape, target)


def load(path: Path, precision: str, threads: int) -> InductorSession:
    """A session of a package."""
    return InductorSession(Path(path), threads)
