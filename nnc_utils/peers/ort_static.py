"""ONNX Runtime's static quantization, with the settings its documentation advises.

Those are: the model pre-processed, quantize/dequantize pairs, a scale for each channel, ranges from the
smallest and largest value (the default). U8 activations with S8 weights run on the fast kernels of x86;
where the processor has no VNNI these saturate, and weights of 7 bits (`reduce_range`) are the remedy
(onnxruntime.ai, "Quantize ONNX models").
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from nnc_utils import artifact as artifacts
from nnc_utils import peers
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.onnxruntime import count_operators, session_options

SCHEMES = {"U8S8": quantization.QuantType.QUInt8, "S8S8": quantization.QuantType.QInt8}
BATCH = 64  # at most


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:  # ranges by histogram need batches of one size
        size = next(size for size in range(min(BATCH, len(images)), 0, -1) if len(images) % size == 0)
        self._batches = (images[start : start + size] for start in range(0, len(images), size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def make(
    source: Path, images: np.ndarray, folder: Path, *, scheme: str = "U8S8", calibration: str = "MinMax"
) -> Path:
    """Quantize an artifact's ONNX model.

    Parameters
    ----------
    scheme : "U8S8" or "S8S8": activations, then weights; weights of 7 bits for the first without VNNI.
    calibration : "MinMax", "Entropy" or "Percentile".
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}: one of {', '.join(SCHEMES)}")
    artifact = artifacts.read(source)
    target = folder / f"{artifact.sha256[:16]}.ort_{scheme}_{calibration}.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(qdq.onnx_model(artifact, "fp32"), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(target),
            _Reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=scheme == "U8S8" and not peers.vnni(),
            activation_type=SCHEMES[scheme],
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[calibration],
        )
    return target


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """A session, refused if it computes a layer in floats."""
    with tempfile.TemporaryDirectory() as scratch:
        options = session_options(threads)
        # on x86 most layers with S8 activations would otherwise run in floats
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.optimized_model_filepath = str(Path(scratch) / "executed.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        executed = onnx.load(options.optimized_model_filepath)
    qdq.check_integer(artifacts.read(source).spec, count_operators(executed))
    codes = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    zeros = sum(c.size - np.count_nonzero(c) for c in codes if c.dtype == np.int8 and c.ndim > 1)
    return peers.Loaded(lambda images: session.run(None, {"images": images})[0], int(zeros))
