"""PyTorch's compiler, ahead of time: a package of machine code made of the exported graph.

A program is compiled for each batch size of `BATCHES`: with a batch left open, torch 2.14 compiles the
quantized graph to wrong numbers. Other sizes are made up of these. A classifier of at most 16 inputs and
classes is computed in floats; such a network is refused in int8.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export.pt2_archive._package import load_pt2  # up here it is no part of the load time

from nnc_utils import artifact as artifacts
from nnc_utils.artifact import Artifact
from nnc_utils.runtimes import exported

PRECISIONS = ("fp32", "int8")
INTEGER = ("conv", "linear")  # adds read and write 8-bit codes, but are computed in float registers
BATCHES = (64, 1)
COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++")))  # those that it tries
# what calls in the generated C++ are named after -> kind of step, the first that fits
KERNELS = {
    "qconv": "conv",
    "qlinear": "linear",
    "convolution": "float conv",
    "linear": "float linear",
    "addmm": "float linear",
}


def missing(precision: str) -> str:
    """It compiles on this machine."""
    if not any(map(shutil.which, COMPILERS)):
        return (
            f"no C++ compiler: none of {', '.join(COMPILERS)} is there (Debian, Ubuntu: apt-get install g++)"
        )
    if precision == "int8":
        try:
            import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
        except ImportError:
            return "torchao is not installed"
    return ""


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
        """What PyTorch says; the number belongs to the process, so each session sets its own again."""
        self._use_threads()
        return torch.get_num_threads()

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    @property
    def integer_operators(self) -> dict[str, int]:
        """Counted in the C++ that was compiled: the fewest of any program, of floats the most."""
        programs = []
        for code in self._code:
            calls = re.findall(r"aoti_torch_cpu_\w+(?=\()", code)
            kinds = (next((kind for name, kind in KERNELS.items() if name in call), "") for call in calls)
            programs.append(Counter(filter(None, kinds)))
        found = set().union(*programs)
        return {k: (max if k.startswith("float") else min)(p[k] for p in programs) for k in found}

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        self._use_threads()
        inputs, logits = torch.from_numpy(np.ascontiguousarray(images)), []
        while len(inputs):
            batch = next(batch for batch in BATCHES if batch <= len(inputs))
            logits.append(self._programs[batch](inputs[:batch]))
            inputs = inputs[batch:]
        return torch.cat(logits).numpy()


@torch.no_grad()  # with gradients Inductor would not fold constants and take its integer kernels
def _write(module: nn.Module, shape: tuple[int, ...], target: Path) -> Path:
    import torch._inductor
    from torch._inductor.package import package_aoti

    programs = {}
    for batch in BATCHES:
        program = exported.export(module, shape, batch=batch)
        options = {"aot_inductor.package": True, "freezing": True, "cpp.dynamic_threads": True}
        programs[f"batch{batch}"] = torch._inductor.aot_compile(
            program.module(), (torch.zeros(batch, *shape),), options=options
        )
    package_aoti(str(target), programs)
    return target


def prepare(artifact: Artifact, precision: str, threads: int) -> InductorSession:
    """An artifact, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        return load(_compiled(artifact, precision, Path(folder)), precision, threads)


def convert(source: Path, precision: str, folder: Path) -> Path:
    """Write the package of an artifact's file."""
    return _compiled(artifacts.read(source), precision, Path(folder))


def _compiled(artifact: Artifact, precision: str, folder: Path) -> Path:
    if precision == "int8":  # importing it registers the patterns that become integer kernels
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    spec, target = artifact.spec, folder / f"{artifact.sha256[:16]}.{precision}.pt2"
    shape = (spec.channels, spec.size, spec.size)
    return _write(exported.Network(artifact, precision), shape, target)


def load(path: Path, precision: str, threads: int) -> InductorSession:
    """A session of a package."""
    return InductorSession(Path(path), threads)


def identity(shape: tuple[int, int], threads: int, folder: Path) -> InductorSession:
    """A program that copies its input."""
    channels, size = shape
    target = folder / f"identity_{channels}_{size}.pt2"
    if not target.exists():
        _write(exported.Copy(), (channels, size, size), target)
    return load(target, "fp32", threads)
