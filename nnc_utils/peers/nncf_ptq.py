"""NNCF's post-training quantization of an OpenVINO model, run by OpenVINO.

The preset is the default one for networks of ReLUs, "performance": symmetric weights and activations.
`fast_bias_correction=False` is what NNCF documents as slower and more accurate. Where the processor has
no VNNI, its kernels saturate, and weights of 7 bits (`OverflowFix.ENABLE`) are the documented remedy.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

from nnc_utils import artifact as artifacts
from nnc_utils import peers
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.openvino import count_operators  # before nncf and openvino: no telemetry

import nncf  # isort: skip
import openvino  # isort: skip
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix  # isort: skip


def make(source: Path, images: np.ndarray, folder: Path) -> Path:
    """Quantize an artifact's OpenVINO model on all images; writes an .xml and a .bin file."""
    artifact = artifacts.read(source)
    target = folder / f"{artifact.sha256[:16]}.nncf.xml"
    nncf.set_log_level(logging.ERROR)
    overflow = OverflowFix.FIRST_LAYER if peers.vnni() else OverflowFix.ENABLE  # the first is the default
    with tempfile.TemporaryDirectory() as scratch:
        float_model = Path(scratch) / "fp32.onnx"
        float_model.write_bytes(qdq.onnx_model(artifact, "fp32").SerializeToString())
        quantized = nncf.quantize(
            openvino.convert_model(float_model),
            nncf.Dataset([image[None] for image in images]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(images),
            fast_bias_correction=False,
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=overflow),
        )
        openvino.save_model(quantized, target, compress_to_fp16=False)
    return target


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """A compiled model, refused if it computes a layer in floats."""
    core = openvino.Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    qdq.check_integer(artifacts.read(source).spec, count_operators(compiled), ("conv", "linear"))
    codes = [node.data for node in core.read_model(path).get_ops() if _is_codes(node)]
    zeros = sum(c.size - np.count_nonzero(c) for c in codes)
    return peers.Loaded(lambda images: compiled(images)[0], int(zeros))


def _is_codes(node: openvino.Node) -> bool:
    constant = node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8"
    return constant and len(node.shape) > 1
