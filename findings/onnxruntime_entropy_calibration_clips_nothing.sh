#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static(calibrate_method=CalibrationMethod.Entropy) on activations with rare outliers.
# Expected: KL-divergence calibration, as in the slides that its source cites (128 levels out of 2048 bins): a
#   threshold far below the largest value, so that the bulk gets a fine scale.
# Seen: the scale and zero point of MinMax, to the last bit, for each distribution tried. The histogram has 128 bins
#   and is merged into 128 levels, so the search over thresholds has one candidate, the whole range. The calibrator
#   itself takes num_bins, and with 512 it clips; quantize_static has no option that reaches it.
# Where it shows: "entropy calibration does not help this network". It was not tried.
# Fails where onnxruntime behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2
cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import logging

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import CalibrationMethod, calibrate

BATCHES, VALUES = 8, 4096
logging.disable()
random = np.random.default_rng(0)
normal = random.normal(size=(BATCHES, 1, VALUES)).astype(np.float32)
outlier = normal.copy()
outlier[0, 0, 0] = 100
distributions = {
    "normal, one value of 100": outlier,
    "heavy tails": random.standard_t(2, size=normal.shape).astype(np.float32),
    "behind a ReLU": np.maximum(outlier, 0),
}


class Reader(quantization.CalibrationDataReader):
    def __init__(self, activations):
        self.batches = ({"x": batch} for batch in activations)

    def get_next(self):
        return next(self.batches, None)


weight = random.normal(size=(VALUES, 2)).astype(np.float32)
ends = [
    [helper.make_tensor_value_info(*end)]
    for end in (("x", TensorProto.FLOAT, [1, VALUES]), ("y", TensorProto.FLOAT, [1, 2]))
]
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])], "net", *ends, [numpy_helper.from_array(weight, "w")]
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float.onnx")


def scale_and_zero_point(activations, method):
    with contextlib.redirect_stdout(io.StringIO()):
        quantization.quantize_static("float.onnx", "int8.onnx", Reader(activations), calibrate_method=method)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load("int8.onnx").graph.initializer}
    return constants["x_scale"].item(), constants["x_zero_point"].item()


def upper_threshold(activations, bins):
    with contextlib.redirect_stdout(io.StringIO()):
        options = {"num_bins": bins}
        calibrator = calibrate.create_calibrator(
            "float.onnx", calibrate_method=CalibrationMethod.Entropy, extra_options=options
        )
        calibrator.collect_data(Reader(activations))
        return calibrator.compute_data()["x"].range_value[1].item()


print("onnxruntime", onnxruntime.__version__)
for name, activations in distributions.items():
    seen = {
        method.name: scale_and_zero_point(activations, method)
        for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy)
    }
    print(f"{name}: largest value {activations.max():.1f}, scale and zero point {seen}")
    assert seen["Entropy"] == seen["MinMax"], "entropy clips now"
for bins, clips in ((128, False), (512, True)):
    threshold = upper_threshold(outlier, bins)
    print(f"the calibrator with {bins} bins: threshold {threshold:.1f} where the largest value is 100")
    assert (threshold < 50) == clips, "another threshold than was seen"
print("as described")
PYTHON
