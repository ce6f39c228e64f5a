#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: activations quantized (QuantizeLinear, DequantizeLinear), the convolution's weight left in
# floats, as for a layer that loses too much with 8 bits.
# Expected: the convolution in floats between the two quantizers, as the graph says and as ONNX defines it. At most
#   one step of the output's quantizer apart from the same session without optimizations.
# Seen: when the session is made, the weight is rounded to int8 with one scale for the whole tensor (not one a
#   channel), and the layer runs in integers, from ORT_ENABLE_BASIC on, with no message. Channels whose weights are
#   below 1/254 of the largest one become zero: they put out a constant.
# The bias is rounded to int32 in steps of input scale x weight scale, and saturates where those are small: a channel
#   with int8 weights of its own (tiny) scale and a float bias of 1 puts out another number.
# Where it shows: a comparison "weights in floats, activations in 8 bits" measures something else; mixed precision.
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
from onnxruntime import GraphOptimizationLevel

CHANNELS = 8
random = np.random.default_rng(0)
image = random.normal(size=(1, CHANNELS, 6, 6)).astype(np.float32)
loudness = np.logspace(-3, 0, CHANNELS, dtype=np.float32)  # of each output channel's weights
weight = random.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32) * loudness[:, None, None, None]


def network(output_scale, weights, nodes):
    """One convolution between the quantizers of its input and its output."""
    constants = weights | {
        "x_scale": np.float32(1 / 32),
        "y_scale": np.asarray(output_scale, np.float32),
        "zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
        *nodes,
        helper.make_node("QuantizeLinear", ["c", "y_scale", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_scale", "zero"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, image.shape)] for name in "xy"]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model, level):
    """The output, and the operators that were executed."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, "executed.onnx"
    options.log_severity_level = 3  # the one warning at 2 is that the executed graph is written
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": image})
    return output[0], [node.op_type for node in onnx.load("executed.onnx").graph.node]


print("onnxruntime", onnxruntime.__version__)
convolution = helper.make_node("Conv", ["xd", "w"], ["c"], pads=[1] * 4)
model = network(1e-3, {"w": weight}, [convolution])  # fine enough to see the quiet channels
plain, operators = run(model, GraphOptimizationLevel.ORT_DISABLE_ALL)
assert "Conv" in operators and np.ptp(plain[0]) > 0
for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
    output, operators = run(model, getattr(GraphOptimizationLevel, level))
    values = [len(np.unique(channel)) for channel in output]
    print(f"float weight, {level}: {operators}; different values in each channel: {values}")
    print("  without optimizations:", [len(np.unique(channel)) for channel in plain])
    assert values[0] == 1 < len(np.unique(plain[0])), "the quiet channel is alive now"
assert "QLinearConv" in operators, "the layer runs in floats now"

tiny = {
    "w": np.ones((CHANNELS, CHANNELS, 3, 3), np.int8),
    "w_scale": np.float32(1e-9),
    "b": np.ones(CHANNELS, np.float32),
}
nodes = [
    helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"]),
    helper.make_node("Conv", ["xd", "wd", "b"], ["c"], pads=[1] * 4),
]
model = network(1 / 64, tiny, nodes)
plain, output = (
    run(model, getattr(GraphOptimizationLevel, level))[0].mean() for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
)
print(f"weights near 0, bias 1: {plain:.3f} without optimizations, {output:.3f} with them")
assert abs(plain - 1) < 0.02 and output < 0.1, "another bias than was seen"
print("as described")
PYTHON
