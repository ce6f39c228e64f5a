#!/usr/bin/env bash
# onnx 1.23.2: version_converter.convert_version on a network that upsamples linearly: Upsample of opset 9 or
# Resize of opset 10, as files of 2019 have them.
# Expected: the same function with newer operators. Opset 10 divides a pixel's position by the scale, which
#   Resize of opset 11 can say: coordinate_transformation_mode="asymmetric".
# Seen: up to opset 10 all is the same. From 11 on the attribute is left out, and its default is "half_pixel":
#   the output moves by half an input pixel less half an output one, 0, 0.5, 1, 1.5 becomes 0, 0.25, 0.75,
#   1.25. With scale 1/2 it is another image: the mean of two neighbours in place of each second pixel. The
#   file passes the checker, and onnxruntime runs the old and the new one as ONNX defines each. No warning.
# Where it shows: segmentation and detection heads lose a little accuracy "by quantization", where a toolchain
#   converts the file to a newer opset first.
# Fails where onnx behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter

WIDTH = 8
ramp = np.arange(WIDTH, dtype=np.float32).reshape(1, 1, 1, WIDTH)


def network(operator, opset, scale):
    scales = numpy_helper.from_array(np.array([1, 1, 1, scale], np.float32), "scales")
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, int(width)])]
        for name, width in (("x", WIDTH), ("y", WIDTH * scale))
    ]
    node = helper.make_node(operator, ["x", "scales"], ["y"], mode="linear")
    graph = helper.make_graph([node], "net", *ends, [scales])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=5)


def run(model):
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, {"x": ramp})[0].ravel()


print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
for operator, opset, scale in (("Upsample", 9, 2.0), ("Resize", 10, 2.0), ("Resize", 10, 0.5)):
    model = network(operator, opset, scale)
    before = run(model)
    positions = np.arange(int(WIDTH * scale))
    asymmetric = np.minimum(positions / scale, WIDTH - 1)
    half_pixel = np.clip((positions + 0.5) / scale - 0.5, 0, WIDTH - 1)
    print(f"{operator} of opset {opset}, scale {scale}: {before[:4].tolist()}")
    assert np.allclose(before, asymmetric), "the old operator is another one"
    for target in (10, 11, 13, 21):
        if target == opset:
            continue
        converted = version_converter.convert_version(model, target)
        after = run(converted)
        attributes = [a for node in converted.graph.node for a in node.attribute]
        modes = [a.s for a in attributes if a.name == "coordinate_transformation_mode"]
        print(f"  converted to {target}: {after[:4].tolist()}, coordinate_transformation_mode {modes}")
        assert np.allclose(after, asymmetric if target == 10 else half_pixel) and not modes, "changed"
print("as described")
PYTHON
