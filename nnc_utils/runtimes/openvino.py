"""OpenVINO on the CPU: fp32 and bf16 of the float model, int8 of the quantize/dequantize pairs.

OpenVINO computes a float model in bf16 or fp16 where the processor has it, unless it is told not to; so
the precision is set and read back.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# else importing OpenVINO (and NNCF) starts a process that reports it to the vendor, and stays behind
sys.modules.setdefault("openvino_telemetry", None)
import openvino  # noqa: E402

if TYPE_CHECKING:
    import onnx

    from nnc_utils.artifact import Artifact

PRECISIONS = ("fp32", "bf16", "int8")
FLOATS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "int8": openvino.Type.f32}
INTEGER = ("conv", "linear")  # an add is computed where the convolution before it writes its output
SUFFIX = ".xml"


def missing(precision: str) -> str:
    """bf16 needs a processor that has it."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "no bf16 in this processor" if precision == "bf16" and "BF16" not in capabilities else ""


def files(path: Path) -> list[Path]:
    """The graph and its weights."""
    return [path, path.with_suffix(".bin")]


class OpenVinoSession:
    """A compiled model; see `runtimes.Session`."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_PRECISION_HINT"] = FLOATS[precision]
        self._compiled = openvino.Core().compile_model(model, "CPU", options)
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        if used != FLOATS[precision]:
            raise RuntimeError(f"OpenVINO was told to use {FLOATS[precision]} and uses {used}")
        self._request = self._compiled.create_infer_request()
        self.runtime_bytes = sum(file.stat().st_size for file in files(model))

    @property
    def threads(self) -> int:
        """As the compiled model has them."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    @property
    def integer_operators(self) -> dict[str, int]:
        """Counted in the graph that the runtime executes."""
        return count_operators(self._compiled)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        self._request.infer([images], share_inputs=True)
        return self._request.get_output_tensor(0).data.copy()


def count_operators(compiled: openvino.CompiledModel) -> dict[str, int]:
    """Kinds of layers that a compiled model computes in integers, and those in floats."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        attributes = node.get_rt_info()
        kind = {"Convolution": "conv", "FullyConnected": "linear"}.get(_text(attributes["layerType"]))
        if kind:
            # a layer whose weights alone are codes says u8, too; its primitive is one of floats
            floats = _text(attributes["primitiveType"]).lower().endswith(("_f32", "_f16", "_bf16"))
            integer = _text(attributes["runtimePrecision"]) in ("u8", "i8") and not floats
            counts[kind if integer else f"float {kind}"] += 1
    return dict(counts)


def _text(value: object) -> str:
    return str(getattr(value, "astype", lambda kind: value)(str))


def _save(model: onnx.ModelProto, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        source.write_bytes(model.SerializeToString())
        openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)


def write(artifact: Artifact, precision: str, target: Path) -> None:
    """Write an artifact as OpenVINO's .xml and .bin files."""
    from nnc_utils.runtimes import qdq

    _save(qdq.onnx_model(artifact, "int8" if precision == "int8" else "fp32"), target)


def write_identity(shape: tuple[int, int, int], target: Path) -> None:
    """Write a model whose output is its input."""
    from nnc_utils.runtimes import qdq

    _save(qdq.identity_model(shape), target)


def load(path: Path, precision: str, threads: int) -> OpenVinoSession:
    """A session of an .xml file, whose .bin lies beside it."""
    return OpenVinoSession(Path(path), precision, threads)
