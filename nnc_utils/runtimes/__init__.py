"""Runtimes behind one small interface; an adapter a module, imported by name when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from nnc_utils.artifact import Artifact

NAMES = ("eager", "inductor", "onnxruntime", "openvino", "executorch")
INTEGERS = ("int8", "s8s8")  # precisions whose kernels are counted
OPSET, IR_VERSION = 17, 8  # of the ONNX that is written: read by ONNX Runtime and OpenVINO since 2022


class Session(Protocol):
    """A network that is ready to run.

    `runtime_bytes` is the size of what the runtime loads; `threads` is read back from the runtime, not
    what was asked for; `integer_operators` counts, by kind of `qdq.Step`, what runs in 8-bit integers,
    and under "float ..." the operators that could and do not.
    """

    runtime_bytes: int
    threads: int

    @property
    def integer_operators(self) -> dict[str, int]: ...

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""


class Adapter(Protocol):
    """What each module of this package offers.

    `PRECISIONS` names what the runtime computes in, `INTEGER` the kinds of `qdq.Step` that it has integer
    kernels for. `missing(precision)`, where there is one, says what the library lacks on this machine, and
    `files(path)` which files a network is, where it is several.
    """

    PRECISIONS: tuple[str, ...]
    INTEGER: tuple[str, ...]

    def prepare(self, artifact: Artifact, precision: str, threads: int) -> Session:
        """An artifact ready to run."""

    def convert(self, source: Path, precision: str, folder: Path) -> Path:
        """The file that the runtime loads, made of an artifact's file; in the folder if it is a new one."""

    def load(self, path: Path, precision: str, threads: int) -> Session:
        """A session of what `convert` made; needs nothing but the runtime."""

    def identity(self, shape: tuple[int, int], threads: int, folder: Path) -> Session:
        """A network that gives its input (channels, size) back: the cost of calling the runtime.

        What has to be compiled for it is left in the folder, and found there the next time.
        """


def adapter(name: str) -> ModuleType:
    """The module of a runtime.

    Raises
    ------
    ValueError
        For a name that is none of `NAMES`.
    ImportError
        When its library is missing or broken.
    """
    if name not in NAMES:
        raise ValueError(f"unknown runtime {name!r}: one of {', '.join(NAMES)}")
    return importlib.import_module(f"nnc_utils.runtimes.{name}")


def available(name: str, precision: str = "") -> str:
    """Empty when a runtime (and one of its precisions) can be used here, otherwise why not.

    Such as "not installed", "no C++ compiler" or "no bf16 in this processor".
    """
    if why := why_not(lambda: adapter(name)):
        return why
    module = adapter(name)
    return module.missing(precision) if hasattr(module, "missing") else ""


def files(name: str, path: Path) -> list[Path]:
    """The files that a runtime loads: what `convert` made, and what lies beside it."""
    module = adapter(name)
    return module.files(path) if hasattr(module, "files") else [path]


def why_not(load: Callable[[], ModuleType]) -> str:
    """Empty when loading a module of this package works, otherwise which library it lacks or broke."""
    try:
        load()
    except ModuleNotFoundError as error:
        return "not installed" if not (error.name or "").startswith("nnc_utils") else f"broken: {error}"
    except (ImportError, OSError) as error:
        return f"installed but broken: {error}"
    return ""


def prepare(name: str, artifact: Artifact, precision: str, threads: int) -> Session:
    """An artifact ready to run in a runtime, in integers through and through where that is asked.

    Parameters
    ----------
    name : one of `NAMES`.
    artifact : an `artifact.Artifact`.
    precision : "fp32" (decoded weights, activations never rounded), "int8" (`qdq.lower`), or another of
        the adapter's `PRECISIONS`.
    threads : for one prediction.

    Raises
    ------
    ValueError
        For an unknown runtime or a precision it does not have.
    ImportError
        When the runtime is not `available`.
    RuntimeError
        When integers were asked for and something runs in floats.
    """
    module = adapter(name)
    check_precision(name, precision)
    session = module.prepare(artifact, precision, threads)
    if precision in INTEGERS:
        from nnc_utils.runtimes import qdq

        qdq.check_integer(artifact.spec, session.integer_operators, module.INTEGER)
    return session


def check_precision(name: str, precision: str) -> None:
    """Refuse a precision that a runtime does not have."""
    allowed = adapter(name).PRECISIONS
    if precision not in allowed:
        raise ValueError(f"{name} has no precision {precision!r}: one of {', '.join(allowed)}")
