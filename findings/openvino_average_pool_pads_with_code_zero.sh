#!/usr/bin/env bash
# openvino 2026.4.1, CPU: a quantized average pooling with padding that counts, as of PyTorch's AvgPool2d(3, 1, 1).
# Expected: the padding counts as the number 0, as in the float network, as ONNX defines it and as onnxruntime runs
#   it.
# Seen: pooling runs on the codes, and the padding is the code 0, which means the number 0 only where the zero point
#   is 0. With onnxruntime's default, int8 and a zero point of -128 behind a ReLU, code 0 is the middle of the range,
#   and 5 of a corner's 9 values are padding: 28 % of the range too much. Inside, all is right. With uint8 all is
#   right behind a ReLU, and not behind a hard swish, whose values begin at -0.375. Padding that does not count is
#   right, too.
# Where it shows: a network loses accuracy in one runtime only; the same file is right in another.
# Fails where OpenVINO behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2
cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import logging

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnxruntime import quantization

logging.disable()
SHAPE = (1, 3, 6, 6)
random = np.random.default_rng(0)
normal = random.normal(size=(8, *SHAPE)).astype(np.float32)
activations = {"ReLU": np.maximum(normal, 0), "hard swish": normal * np.clip(normal / 6 + 0.5, 0, 1)}


class Reader(quantization.CalibrationDataReader):
    def __init__(self, batches):
        self.batches = ({"x": batch} for batch in batches)

    def get_next(self):
        return next(self.batches, None)


def save_network(*, counts):
    """An average over 3 x 3 values."""
    pooling = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": int(counts)}
    nodes = [helper.make_node("AveragePool", ["x"], ["y"], **pooling)]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)] for name in "xy"]
    graph = helper.make_graph(nodes, "net", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float.onnx")


def in_onnxruntime(path, image):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": image})[0]


def in_openvino(path, image):
    network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return network(image)[0]


print("openvino", openvino.__version__, "onnxruntime", onnxruntime.__version__)
for name, batches in activations.items():
    for kind in (quantization.QuantType.QUInt8, quantization.QuantType.QInt8):
        for counts in (True, False):
            save_network(counts=counts)
            quantization.quantize_static(
                "float.onnx",
                "int8.onnx",
                Reader(batches),
                activation_type=kind,
                extra_options={"ForceQuantizeNoInputCheck": True},  # the pooling, without a layer before it
            )
            assert onnx.load("int8.onnx").graph.node[0].op_type == "QuantizeLinear"
            right = in_onnxruntime("float.onnx", batches[0])
            errors = [
                np.abs(run("int8.onnx", batches[0]) - right) / np.ptp(batches)
                for run in (in_onnxruntime, in_openvino)
            ]
            inside = errors[1][..., 1:-1, 1:-1].max()
            shown = f"onnxruntime {errors[0].max():.3f}, openvino {errors[1].max():.3f} (inside {inside:.3f})"
            padding = "counts" if counts else "does not count"
            print(f"{name}, {kind}, padding {padding}: largest error, of the range: {shown}")
            zero_point_is_0 = name == "ReLU" and kind is quantization.QuantType.QUInt8
            wrong = counts and not zero_point_is_0
            assert errors[0].max() < 0.01 and inside < 0.01
            assert (errors[1].max() > 0.04) == wrong, "another padding than was seen"
print("as described")
PYTHON
