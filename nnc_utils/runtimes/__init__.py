"""Runtimes behind one small interface; an adapter a module, imported by name when it is needed.

An adapter declares `PRECISIONS`, `INTEGER` (the kinds of `qdq.Step` that it has integer kernels for) and the
`SUFFIX` of its files ("" for eager, which loads the artifact itself), and offers

- `write(artifact, precision, target)`: the runtime's file from an artifact,
- `write_identity(shape, target)`: that of a network that returns its input (C, H, W): the cost of a call,
- `load(path, precision, threads)`: a `Session` of such a file; needs nothing but the runtime,
- `missing(precision)`, what the library lacks on this machine, and `files(path)`, where there are several.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from nnc_utils.artifact import Artifact

NAMES = ("eager", "inductor", "onnxruntime", "openvino", "executorch")
INTEGERS = ("int8", "s8s8")  # precisions whose kernels are counted


class Session(Protocol):
    """A network that is ready to run."""

    runtime_bytes: int  # of what the runtime loads
    threads: int  # read back from the runtime, not what was asked for
    integer_operators: dict[
        str, int
    ]  # kind of `qdq.Step` -> how many run in integers; "float ...": in floats

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""


def adapter(name: str) -> ModuleType:
    """The module of a runtime; ValueError for an unknown name, ImportError without its library."""
    if name not in NAMES:
        raise ValueError(f"unknown runtime {name!r}: one of {', '.join(NAMES)}")
    return importlib.import_module(f"nnc_utils.runtimes.{name}")


def available(name: str, precision: str = "") -> str:
    """Empty when a runtime (and one of its precisions) can be used here, otherwise why not."""
    if why := why_not(lambda: adapter(name)):
        return why
    module = adapter(name)
    return module.missing(precision) if hasattr(module, "missing") else ""


def why_not(load: Callable[[], ModuleType]) -> str:
    """Empty when loading a module of this package works, otherwise which library it lacks or broke."""
    try:
        load()
    except ModuleNotFoundError as error:
        return "not installed" if not (error.name or "").startswith("nnc_utils") else f"broken: {error}"
    except (ImportError, OSError) as error:
        return f"installed but broken: {error}"
    return ""


def check_precision(name: str, precision: str) -> None:
    """Refuse a precision that a runtime does not have."""
    allowed = adapter(name).PRECISIONS
    if precision not in allowed:
        raise ValueError(f"{name} has no precision {precision!r}: one of {', '.join(allowed)}")


def files(name: str, path: Path) -> list[Path]:
    """The files that a runtime loads: what `convert` wrote, and what lies beside it."""
    module = adapter(name)
    return module.files(path) if hasattr(module, "files") else [path]


def convert(name: str, source: Path, precision: str, folder: Path) -> Path:
    """The file that a runtime loads, written from an artifact's file; in the folder if it is a new one."""
    from nnc_utils import artifact as artifacts  # not above: a worker that only loads does without PyTorch

    module = adapter(name)
    if not module.SUFFIX:
        return Path(source)
    stored = artifacts.read(source)
    target = Path(folder) / f"{stored.sha256[:16]}.{precision}{module.SUFFIX}"
    module.write(stored, precision, target)
    return target


def identity(name: str, shape: tuple[int, int], threads: int, folder: Path) -> Session:
    """A session that returns its input (channels, size); its file stays in the folder for the next time."""
    (channels, size), module = shape, adapter(name)
    target = Path(folder) / f"identity_{channels}_{size}{module.SUFFIX}" if module.SUFFIX else None
    if target and not target.exists():
        module.write_identity((channels, size, size), target)
    return module.load(target, "fp32", threads)


def prepare(name: str, artifact: Artifact, precision: str, threads: int) -> Session:
    """An artifact ready to run in a runtime, in integers through and through where that is asked.

    `precision` is "fp32" (decoded weights, activations never rounded), "int8" (`qdq.lower`) or another of the
    adapter's `PRECISIONS`; `threads` are for one prediction. RuntimeError when an integer network would run
    in floats, ValueError for an unknown name, ImportError when the runtime is not `available`.
    """
    module = adapter(name)
    check_precision(name, precision)
    if not module.SUFFIX:
        return module.load(artifact, precision, threads)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"network{module.SUFFIX}"
    module.write(artifact, precision, path)
    session = module.load(path, precision, threads)
    session.folder = folder  # goes when the session does
    if precision in INTEGERS:
        from nnc_utils.runtimes import qdq

        qdq.check_integer(artifact.spec, session.integer_operators, module.INTEGER)
    return session
