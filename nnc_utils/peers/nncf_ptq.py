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

PRESETS = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}


def make(
    source: Path,
    images: np.ndarray,
    folder: Path,
    *,
    preset: str = "performance",
    fast_bias_correction: bool = False,
) -> Path:
    """Quantize an artifact's OpenVINO model on all images; writes an .xml and a .bin file.

    Parameters
    ----------
    preset : "performance" or "mixed" (asymmetric activations).
    fast_bias_correction : whether NNCF corrects biases by its faster, coarser way.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    artifact = artifacts.read(source)
    target = folder / f"{artifact.sha256[:16]}.nncf.xml"
    nncf.set_log_level(logging.ERROR)
    overflow = OverflowFix.FIRST_LAYER if peers.vnni() else OverflowFix.ENABLE  # the first is the default
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "fp32.onnx"
        given.write_bytes(qdq.onnx_model(artifact, "fp32").SerializeToString())
        quantized = nncf.quantize(
            openvino.convert_model(given),
            nncf.Dataset([image[None] for image in images]),
            preset=PRESETS[preset],
            subset_size=len(images),
            fast_bias_correction=fast_bias_correction,
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=overflow),
        )
        openvino.save_model(quantized, target, compress_to_fp16=False)
    return target


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """A compiled model, refused if it computes a layer in floats."""
    core = openvino.Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    _check(artifacts.read(source), compiled)
    codes = [node.data for node in core.read_model(path).get_ops() if _is_codes(node)]
    zeros = sum(c.size - np.count_nonzero(c) for c in codes)
    return peers.Loaded(lambda images: compiled(images)[0], int(zeros))


def _is_codes(node: openvino.Node) -> bool:
    constant = node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8"
    return constant and len(node.shape) > 1


def _check(artifact: artifacts.Artifact, compiled: openvino.CompiledModel) -> None:
    counts = count_operators(compiled)
    kinds = [step.kind for step in qdq.steps(artifact.spec)]
    wanted = {kind: kinds.count(kind) for kind in ("conv", "linear")}
    if counts != wanted:
        raise RuntimeError(
            f"not an int8 network: OpenVINO computes {counts}, the Spec has {wanted}; this is not to be "
            "reported as int8"
        )
