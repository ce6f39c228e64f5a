"""ONNX Runtime on the CPU: fp32, and int8 from quantize/dequantize pairs.

"int8" has U8 activations, for which x86 has instructions. "s8s8" has S8 ones, what other tools write by
default: its integer kernels are those without such instructions.

On x86 processors without VNNI its kernel for U8 activations and S8 weights adds two products in 16 bits
and saturates: codes up to ±127 may give wrong sums there, codes up to ±64 (7 bits) cannot. Its precision
mode is on there: for such codes alone it shifts the weights to U8 and takes a slower kernel that is exact.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    import onnx

    from nnc_utils.artifact import Artifact

PRECISIONS = ("fp32", "int8", "s8s8")
INTEGER = ("conv", "linear", "add")
SUFFIX = ".onnx"
INTEGER_KERNELS = {"QLinearConv": "conv", "QGemm": "linear", "QLinearAdd": "add"}
INTEGER_KERNELS |= {"QLinearGlobalAveragePool": "average_pool"}
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Sum", "GlobalAveragePool", "Relu")


@cache
def _may_saturate() -> bool:
    """Whether this processor lacks VNNI, as far as is known; with it the precision mode only costs time."""
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def session_options(threads: int) -> ort.SessionOptions:
    """Options of a session with so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # a graph optimized for this machine is wanted, no warning needed
    return options


def _options(precision: str, threads: int) -> ort.SessionOptions:
    options = session_options(threads)
    if _may_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if precision == "s8s8":  # else such activations are turned into U8 or floats
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    return options


class OnnxRuntimeSession:
    """An inference session of a file, or of a serialized model; see `runtimes.Session`."""

    def __init__(self, model: Path | bytes, precision: str, threads: int) -> None:
        self._model, self._precision = model if isinstance(model, bytes) else str(model), precision
        self._session = self._open(_options(precision, threads))
        self.runtime_bytes = len(model) if isinstance(model, bytes) else model.stat().st_size

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return ort.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])

    @property
    def threads(self) -> int:
        """As the session has them."""
        return self._session.get_session_options().intra_op_num_threads

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        return self._session.run(None, {"images": images})[0]

    @cached_property
    def integer_operators(self) -> dict[str, int]:
        """Counted in the graph that the runtime executes, which it writes down once more for this."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            options = _options(self._precision, 1)
            options.optimized_model_filepath = os.path.join(folder, "executed.onnx")
            self._open(options)
            return count_operators(onnx.load(options.optimized_model_filepath))

    def profile(self, images: np.ndarray, runs: int = 50) -> dict[str, dict[str, float]]:
        """Operator -> calls and milliseconds of one prediction; so many runs count, as many go before."""
        with tempfile.TemporaryDirectory() as folder:
            options = _options(self._precision, self.threads)
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(folder, "profile")
            session = self._open(options)
            for _ in range(2 * runs):
                session.run(None, {"images": images})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        calls = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        times: dict[str, dict[str, float]] = {}
        for event in calls[len(calls) // 2 :]:
            entry = times.setdefault(event["args"]["op_name"], {"calls": 0.0, "ms": 0.0})
            entry["calls"] += 1 / runs
            entry["ms"] += event["dur"] / 1e3 / runs
        return times


def count_operators(executed: onnx.ModelProto) -> dict[str, int]:
    """Kinds of integer operators in a graph that ONNX Runtime optimized, and those left in floats."""
    producers = {output: node for node in executed.graph.node for output in node.output}
    counts: Counter[str] = Counter()
    for node in executed.graph.node:
        if node.op_type in INTEGER_KERNELS:
            counts[INTEGER_KERNELS[node.op_type]] += 1
        elif node.op_type in FLOAT:
            counts[f"float {node.op_type}"] += 1
        elif node.op_type.endswith("MaxPool"):  # takes either; what wrote its input tells
            source = producers.get(node.input[0])
            while source is not None and source.op_type in ("Transpose", "ReorderInput"):
                source = producers.get(source.input[0])
            integer = source is not None and source.op_type.startswith("Q")
            counts["max_pool" if integer else f"float {node.op_type}"] += 1
    return dict(counts)


def write(artifact: Artifact, precision: str, target: Path) -> None:
    """Write an artifact as ONNX."""
    from nnc_utils.runtimes import qdq

    target.write_bytes(qdq.onnx_model(artifact, precision).SerializeToString())


def write_identity(shape: tuple[int, int, int], target: Path) -> None:
    """Write a graph with one Identity node."""
    from nnc_utils.runtimes import qdq

    target.write_bytes(qdq.identity_model(shape).SerializeToString())


def load(path: Path, precision: str, threads: int) -> OnnxRuntimeSession:
    """A session of an ONNX file."""
    return OnnxRuntimeSession(Path(path), precision, threads)
