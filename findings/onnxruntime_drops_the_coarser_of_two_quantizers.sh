#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: two pairs of QuantizeLinear and DequantizeLinear in a row, the first with a step of 0.1,
# the second with one of 0.003.
# Expected: what ONNX defines, whatever the level of optimization: values on the first grid, rounded to the second. 9
#   of them in the second one's range.
# Seen: from ORT_ENABLE_BASIC on the two become one pair with the finer step, and values come out that the first
#   quantizer cannot put out; nearly all of the inputs used. No message. In the other order, too: rounded to 0.003 and
#   then to 0.1, the values come out in steps of 0.003.
# Where it shows: activations of fewer bits simulated in an 8-bit graph (a coarse scale), followed by the quantizer of
#   the next layer or of a branch: the accuracy measured is that of the finer one.
# Fails where onnxruntime behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import GraphOptimizationLevel

inputs = np.linspace(-0.35, 0.35, 201, dtype=np.float32)


def network(steps):
    constants = [numpy_helper.from_array(np.uint8(128).reshape(()), "zero")]
    nodes, last = [], "x"
    for i, step in enumerate(steps):
        constants.append(numpy_helper.from_array(np.asarray(step, np.float32), f"step{i}"))
        nodes.append(helper.make_node("QuantizeLinear", [last, f"step{i}", "zero"], [f"q{i}"]))
        last = "y" if i else "x0"
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"step{i}", "zero"], [last]))
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs.shape)] for name in "xy"]
    graph = helper.make_graph(nodes, "net", *ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]


print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
for steps in ((0.1, 0.003), (0.003, 0.1)):
    model = network(steps)
    (defined,) = ReferenceEvaluator(model).run(None, {"x": inputs})
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        output = run(model, getattr(GraphOptimizationLevel, level))
        count, far = len(np.unique(output)), np.abs(output - defined).max()
        print(f"steps {steps}, {level}: {count} values, at most {far:.3f} from the reference's {len(np.unique(defined))}")
        if level == "ORT_DISABLE_ALL":
            assert far < 1e-6, "without optimizations it is another network, too"
        else:
            assert count > 150 and far > 0.04, "both quantizers are there now"
print("as described")
PYTHON
