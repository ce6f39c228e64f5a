#!/usr/bin/env bash
# openvino 2026.4.1, CPU: ONNX files of opset 13 to 17 with ReduceLogSumExp(axes=[1]), which is what
# PyTorch's TorchScript exporter makes of x - x.logsumexp(1, keepdim=True).
# Expected: log-probabilities of each image, as ONNX defines it and as onnxruntime runs it: their exponentials
#   add up to 1 for each image.
# Seen: with a batch of one image all is right. With a batch of 8 they add up to 1 for the 8 images together,
#   and an image's numbers depend on the others in its batch: the attribute "axes" is not read, and the sum
#   runs over all axes. As it keeps its dimensions, it broadcasts, and the output's shape is right. ReduceL1
#   and ReduceLogSum are so, too; ReduceSum, ReduceMean, ReduceMax and ReduceL2 are right, and so is opset 18,
#   where the axes are an input. The class with the highest score is the same. No error, no warning.
# Where it shows: perplexity, calibration and distillation losses, energies for unknown classes, weights
#   normalized by their L1 norm; not in a test with one image, and not in the accuracy.
# Fails where OpenVINO behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 numpy
cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

CLASSES, LARGEST_BATCH = 10, 8
random = np.random.default_rng(0)
core = openvino.Core()


def both(operator, opset, batch, minus):
    """Outputs of onnxruntime and OpenVINO: the reduced scores, or the scores minus them."""
    scores = random.normal(size=(batch, CLASSES)).astype(np.float32) ** 2 + 0.1
    constants, inputs, attributes = [], ["x"], {"axes": [1]}
    if opset >= 18 or operator == "ReduceSum":
        constants, inputs, attributes = [numpy_helper.from_array(np.array([1]), "axes")], ["x", "axes"], {}
    nodes = [helper.make_node(operator, inputs, ["reduced" if minus else "y"], keepdims=1, **attributes)]
    if minus:
        nodes.append(helper.make_node("Sub", ["x", "reduced"], ["y"]))
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("x", ["batch", CLASSES]), ("y", None))
    ]
    graph = helper.make_graph(nodes, "net", *ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, "net.onnx")
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    compiled = core.compile_model("net.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return session.run(None, {"x": scores})[0], compiled(scores)[0]


print("openvino", version("openvino"), "onnxruntime", onnxruntime.__version__)
for opset in (13, 17, 18):
    for batch in (1, LARGEST_BATCH):
        outputs = both("ReduceLogSumExp", opset, batch, minus=True)
        right, seen = (np.exp(output).sum(axis=1) for output in outputs)
        sums = f"{right.mean():.3f} in onnxruntime, {seen.mean():.3f} in OpenVINO"
        print(f"opset {opset}, {batch} images: the probabilities of one add up to {sums}")
        assert np.allclose(right, 1, atol=1e-5), "onnxruntime is wrong, too"
        if opset < 18 and batch > 1:
            assert abs(seen.sum() - 1) < 1e-5 and seen.max() < 0.5, "something else than a sum over all"
        else:
            assert np.allclose(seen, 1, atol=1e-5), "wrong here, too"

for operator in ("ReduceL1", "ReduceLogSum", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"):
    right, seen = both(operator, 17, LARGEST_BATCH, minus=False)
    print(f"opset 17, {operator}: {right.shape} in onnxruntime, {seen.shape} in OpenVINO")
    if operator in ("ReduceL1", "ReduceLogSum"):
        assert right.shape == (LARGEST_BATCH, 1) and seen.shape == (1, 1), "the axes are read now"
    else:
        assert np.allclose(right, seen, rtol=1e-5), "wrong here, too"
print("as described")
PYTHON
