#!/usr/bin/env bash
# onnxruntime 1.32.0, x86: a network whose layers have equal biases, quantized by quantize_static (uint8 activations).
# Expected: each convolution between its quantizers runs in integers.
# Seen: only the first. PyTorch's TorchScript exporter stores equal tensors once and hands the others an Identity.
#   quantize_static gives the one bias the scale of its first layer (input's x weight's); the runtime takes an integer
#   kernel only where a bias has the scale of the layer's own sums, and says nothing about the others.
# Where it shows: biases that are all 0, as of untrained networks with their batch-norm folded. A ResNet-18 of
#   torchvision without weights runs 5 of its 21 layers in integers; each layer with a bias of its own: 21.
# Fails where onnxruntime behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2
cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

LAYERS = 3
random = np.random.default_rng(0)
images = random.normal(size=(4, 8, 6, 6)).astype(np.float32)


class Reader(quantization.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x0": images}])

    def get_next(self):
        return next(self.batches, None)


def integer_convolutions(*, stored_once: bool) -> int:
    nodes, constants = [], {"bias0": np.zeros(8, np.float32)}
    for i in range(LAYERS):
        constants[f"weight{i}"] = random.normal(size=(8, 8, 3, 3)).astype(np.float32)
        if i and stored_once:
            nodes.append(helper.make_node("Identity", ["bias0"], [f"bias{i}"]))
        elif i:
            constants[f"bias{i}"] = constants["bias0"]
        conv = helper.make_node("Conv", [f"x{i}", f"weight{i}", f"bias{i}"], [f"x{i + 1}"], pads=[1] * 4)
        nodes.append(conv)
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, images.shape)] for name in ("x0", f"x{LAYERS}")
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", *ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    settings = {"activation_type": quantization.QuantType.QUInt8, "per_channel": True}
    quantization.quantize_static(model, "int8.onnx", Reader(), **settings)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "executed.onnx", 3
    onnxruntime.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
    return sum(node.op_type == "QLinearConv" for node in onnx.load("executed.onnx").graph.node)


print("onnxruntime", onnxruntime.__version__)
for stored_once, seen in ((False, LAYERS), (True, 1)):
    count = integer_convolutions(stored_once=stored_once)
    print(f"equal biases stored {'once' if stored_once else 'each'}: {count} of {LAYERS} in integers")
    assert count == seen, "another number than was seen"
PYTHON
