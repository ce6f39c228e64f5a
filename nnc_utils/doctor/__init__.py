"""The int8 doctor: which layers of a file a runtime computes in integers, and why not the others.

``python -m nnc_utils.doctor FILE``. The runtime compiles the file in a process of its own, bounded in time
and memory. What is reported is read from the graph that it then executes; rules.csv holds the rules that look
for the reason of each layer in floats.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

READS = {  # runtime -> what it is given; an artifact is exported to the runtime's int8 first
    "onnxruntime": (".onnx", ".safetensors"),
    "openvino": (".xml", ".onnx", ".safetensors"),
    "executorch": (".pte", ".safetensors"),
    "inductor": (".pt2",),
}
RUNTIMES = tuple(READS)
DEFAULTS = {suffix: runtime for runtime in reversed(RUNTIMES) for suffix in READS[runtime]}
SECONDS, GIGABYTES = 120.0, 8.0  # what a process may take
AGREEMENT = 0.995  # of a repaired file with the one before
MOST = 1_000_000  # seconds or gigabytes
SHARE_OF_MEMORY = 6  # a file may have this fraction of the memory: reading and compiling copy it


class DoctorError(ValueError):
    """A file that cannot be examined, or not within its bounds; one line says why."""


@dataclass(frozen=True)
class Layer:
    """One layer as a runtime executes it; `macs` are of one image, `rules` names of `rules.TABLE`."""

    name: str
    kind: str  # "conv", "linear" or "add"
    runs: str  # the kernel, as the runtime calls it
    integer: bool
    macs: int = 0
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the doctor found; `notes` are the names of rules that concern the file as a whole."""

    file: str
    runtime: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the multiplications, how many are of integers."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.integer) / total

    def named(self) -> dict[str, list[str]]:
        """Rule -> the layers that it names; none for a rule that concerns the file."""
        found: dict[str, list[str]] = {note: [] for note in self.notes}
        for layer in self.layers:
            for rule in layer.rules:
                found.setdefault(rule, []).append(layer.name)
        return found

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "integer_macs": self.share, "named": self.named()}


def examine(
    path: str | Path,
    *,
    runtime: str = "",
    entries: Iterable[str] = (),
    seconds: float = SECONDS,
    gigabytes: float = GIGABYTES,
) -> Report:
    """Let a runtime compile a file, and report what it executes.

    Parameters
    ----------
    runtime : one of `RUNTIMES`; unless given that of the file's suffix.
    entries : "KEY=VALUE", settings of the runtime: entries of ONNX Runtime's session, of Inductor's config.
    seconds, gigabytes : what the process may take.

    Raises
    ------
    DoctorError
        In one line: a suffix or runtime that is unknown, a file that is foreign, damaged or too large.
    """
    path = Path(path)
    runtime = runtime or DEFAULTS.get(path.suffix, "")
    if not runtime:
        raise DoctorError(f"{path}: the name has to end with one of {', '.join(DEFAULTS)}")
    if runtime not in RUNTIMES:
        raise DoctorError(f"unknown runtime {runtime!r}: one of {', '.join(RUNTIMES)}")
    if path.suffix not in READS[runtime]:
        raise DoctorError(f"{path}: {runtime} is given files that end with {', '.join(READS[runtime])}")
    entries = list(entries)
    if wrong := [entry for entry in entries if "=" not in entry]:
        raise DoctorError(f"{wrong[0]!r} is no setting: KEY=VALUE is")
    bounds = {"seconds": seconds, "gigabytes": gigabytes}
    answer = ask("examine", path, **bounds, runtime=runtime, entries=entries)
    layers = tuple(Layer(**{**layer, "rules": tuple(layer["rules"])}) for layer in answer.pop("layers"))
    if not sum(layer.macs for layer in layers):
        raise DoctorError(f"{path} holds no convolution or linear layer that the doctor knows")
    return Report(layers=layers, file=str(path), runtime=answer["runtime"], notes=tuple(answer["notes"]))


def repair(
    path: str | Path,
    out: str | Path,
    *,
    inputs: str = "",
    seconds: float = SECONDS,
    gigabytes: float = GIGABYTES,
) -> dict[str, Any]:
    """Write an ONNX file that computes the same in integers; what was changed, and how alike both compute.

    Both run on the same inputs: random ones, or those of a .npy file. DoctorError, and no file, where there
    is nothing to change, or some output agrees (see `fix.agreement_of`) for less than 199 inputs in 200.
    """
    path, out = Path(path), Path(out)
    if path.suffix != ".onnx" or out.suffix != ".onnx" or out.resolve() == path.resolve():
        raise DoctorError(f"{path} to {out}: --fix reads an .onnx file and writes another one")
    if not out.parent.is_dir():
        raise DoctorError(f"{out} cannot be written: {out.parent} is no folder")
    unchecked = out.with_name(f".{out.name}")
    try:
        found = ask("fix", path, seconds=seconds, gigabytes=gigabytes, out=str(unchecked), inputs=inputs)
        if found["agreement"] < AGREEMENT:
            raise DoctorError(
                f"{path}: the repaired file's outputs agree for "
                f"{found['agreement']:.1%} of the inputs, less than {AGREEMENT:.1%}: nothing was "
                "written (--inputs gives it real inputs)"
            )
        unchecked.replace(out)
    finally:
        unchecked.unlink(missing_ok=True)
    return found


def ask(order: str, path: Path, *, seconds: float, gigabytes: float, **arguments: Any) -> Any:
    """Have a process of its own do something with a file, and wait for its answer."""
    if not path.is_file():
        raise DoctorError(f"{path} is no file")
    if not (0 < seconds < MOST and 0 < gigabytes < MOST):
        raise DoctorError(f"{seconds:g} seconds, {gigabytes:g} GB: allowed are numbers from 0 to {MOST:,}")
    size, most = _size(path), int(gigabytes * 2**30 / SHARE_OF_MEMORY)
    if size > most:
        raise DoctorError(f"{path} has {size:,} bytes: at most {most:,} with {gigabytes:g} GB of memory")
    order = {"order": order, "path": str(path), "gigabytes": gigabytes, **arguments}
    package = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    started = subprocess.Popen(
        [sys.executable, "-m", "nnc_utils.doctor.child"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": package},
    )
    try:
        said, complained = started.communicate(json.dumps(order), timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(psutil.Error):  # they may have ended meanwhile
            for process in psutil.Process(started.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        started.kill()
        started.wait()
        raise DoctorError(f"{path}: not done in {seconds:g} s, the process was ended") from None
    if not said.endswith("\n"):  # it was killed, or the runtime ended it
        last = (complained.strip().splitlines() or [f"nothing, its code is {started.returncode}"])[-1]
        raise DoctorError(f"{path}: the process broke off within {gigabytes:g} GB; it said {last[:300]}")
    answer = json.loads(said)
    if "error" in answer:
        raise DoctorError(f"{path}: {' '.join(answer['error'].split())[:300]}")
    return answer["answer"]


def _size(path: Path) -> int:
    """Of a file and what lies beside it under the same name: weights of OpenVINO and of large ONNX files."""
    beside = (f"{path.stem}.bin", f"{path.name}.data", f"{path.name}_data")
    files = [path, *map(path.with_name, beside if path.suffix in (".onnx", ".xml") else ())]
    return sum(file.stat().st_size for file in files if file.is_file())
