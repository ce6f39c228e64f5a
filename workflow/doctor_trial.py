"""The int8 doctor on real networks: ``python workflow/doctor_trial.py [WORD ...]``, words choose rows.

Ways to quantize torchvision's ResNet-18 that leave layers in floats, slow or large; then healthy networks, by
the documented settings of their tools. Is what the doctor names what is expected?
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from onnx import TensorProto, helper
from onnxruntime import quantization
from onnxruntime.quantization import QuantType
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from doctor_speed import Reader
from nnc_utils import doctor
from nnc_utils.runtimes import openvino  # noqa: F401, before nncf and openvino: no telemetry

import nncf  # isort: skip
import openvino as ov  # isort: skip

IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32))
UNSIGNED = {"activation_type": QuantType.QUInt8, "per_channel": True}  # as ONNX Runtime advises on x86
ALLOWING_SIGNED = {"entries": ["session.qdqisint8allowed=1"]}
FREEZING, OPENVINO = {"entries": ["freezing=True"]}, {"runtime": "openvino"}


def network(name: str = "resnet18") -> nn.Module:
    """torchvision's, untrained; biases and means differ from each other, as training leaves them."""
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        module(IMAGES)  # batch-norm's means and variances
    return module.eval()


def exported(module: nn.Module, folder: Path) -> Path:
    """As ONNX; the exporter folds batch-norm."""
    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(module, (IMAGES,), str(folder / "float.onnx"), dynamo=False, **names)
    return folder / "float.onnx"


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def static(folder: Path, name: str = "resnet18", *, layers: tuple = (), **settings: object) -> Path:
    """ONNX Runtime's `quantize_static`, its defaults but for the settings; of layers or a network."""
    source = exported(nn.Sequential(*layers).eval() if layers else network(name), folder)
    quantization.quantize_static(source, folder / "static.onnx", Reader(IMAGES.numpy()), **settings)
    return folder / "static.onnx"


def dynamic(folder: Path) -> Path:
    quantization.quantize_dynamic(exported(network(), folder), folder / "dynamic.onnx")
    return folder / "dynamic.onnx"


def scales_of_shape_1(folder: Path) -> Path:
    model = onnx.load(static(folder, **UNSIGNED))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale") and not tensor.dims:
            tensor.dims.append(1)
    return saved(model, folder)


def behind_activations(folder: Path, **settings: object) -> Path:
    """Without the quantizers before activations, as tools place them that fuse these into the layer."""
    model = onnx.load(static(folder, **UNSIGNED, **settings))
    written = {name: node for node in model.graph.node for name in node.output}
    for node in [node for node in model.graph.node if node.op_type in ("Relu", "HardSwish")]:
        dequantize = written[node.input[0]]
        quantize = written[dequantize.input[0]]
        node.input[0] = quantize.input[0]
        for pair in (quantize, dequantize):
            model.graph.node.remove(pair)
    return saved(model, folder)


def convolution_as_output(folder: Path) -> Path:
    model = onnx.load(static(folder, **UNSIGNED))
    features = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    model.graph.output.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, None))
    return saved(model, folder)


def nncf_torch(folder: Path) -> Path:
    quantized = nncf.quantize(network(), nncf.Dataset([IMAGES]))
    return exported(nncf.strip(quantized, example_input=IMAGES), folder)


def nncf_pruned(folder: Path) -> Path:
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    pruned = nncf.prune(network(), mode=mode, ratio=0.5, examples_inputs=IMAGES)
    return program(nncf.strip(pruned, example_input=IMAGES), folder)


def nncf_onnx(folder: Path, name: str) -> Path:
    model = onnx.load(exported(network(name), folder))
    return saved(nncf.quantize(model, nncf.Dataset([{"images": IMAGES.numpy()}])), folder)


def in_openvino(folder: Path, *, bits: int) -> Path:
    """NNCF in OpenVINO's files: 8 bits but for the linear layer, or weights alone in 4 bits."""
    model = ov.convert_model(exported(network(), folder))
    if bits == 4:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM)
    else:
        linear = nncf.IgnoredScope(types=["MatMul"])
        model = nncf.quantize(model, nncf.Dataset([IMAGES.numpy()]), ignored_scope=linear)
    ov.save_model(model, folder / "net.xml")  # in fp16, its default
    return folder / "net.xml"


def program(module: nn.Module, folder: Path) -> Path:
    torch.export.save(torch.export.export(module, (IMAGES,)), folder / "net.pt2")
    return folder / "net.pt2"


def converted(quantizer: object, name: str) -> nn.Module:
    """As torchao documents it: export, prepare, calibrate, convert."""
    # not strict, X86InductorQuantizer refuses a ReLU that is called twice
    exported_program = torch.export.export(network(name), (IMAGES,), strict=True)
    prepared = prepare_pt2e(exported_program.module(), quantizer)
    prepared(IMAGES)
    return convert_pt2e(prepared)


def inductor(folder: Path, name: str = "resnet18", *, unread: bool = False) -> Path:
    """With or without the float weights that nothing reads any more."""
    config = x86.get_default_x86_inductor_quantization_config()
    module = converted(x86.X86InductorQuantizer().set_global(config), name)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    owned = {parameter for parameter, _ in module.named_parameters()}
    for parameter in set() if unread else owned - used:
        owner, _, attribute = parameter.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    return program(module, folder)


def executorch(folder: Path, name: str = "resnet18", *, is_dynamic: bool = False) -> Path:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnn
    from executorch.exir import to_edge_transform_and_lower

    config = xnn.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
    module = converted(xnn.XNNPACKQuantizer().set_global(config), name)
    quantized = torch.export.export(module, (IMAGES,))
    lowered = to_edge_transform_and_lower(quantized, partitioner=[XnnpackPartitioner()])
    (folder / "net.pte").write_bytes(lowered.to_executorch().buffer)
    return folder / "net.pte"


ONE, TWO = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
UP = (ONE, nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, stride=2), TWO)
SYMMETRIC = {"extra_options": {"ActivationSymmetric": True}}
FLOAT_BIAS = {"extra_options": {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": ["Gemm"]}}
# name, how it is written, the rules expected, what `doctor.examine` is given beside the file
TRIALS = [
    ("quantize_static, defaults", static, "signed-activations", {}),
    ("the same, signed int8 allowed", static, "signed-kernels", ALLOWING_SIGNED),
    ("scales of shape [1]", scales_of_shape_1, "scale-of-shape-1", {}),
    ("zero-point in the middle", partial(behind_activations, **SYMMETRIC), "zero-point-behind-relu", {}),
    ("NNCF of PyTorch, exported", nncf_torch, "batch-norm-behind float-bias operator-before", {}),
    ("quantize_dynamic, defaults", dynamic, "signed-dynamic-weights", {}),
    ("Gemm with a float bias", partial(static, **UNSIGNED, **FLOAT_BIAS), "float-bias", {}),
    ("a convolution as output", convolution_as_output, "output-of-the-graph", {}),
    ("16-bit activations", partial(static, activation_type=QuantType.QUInt16), "wide-activations", {}),
    ("ConvTranspose", partial(static, layers=UP, **UNSIGNED), "no-integer-kernel", {}),
    ("HardSwish", partial(behind_activations, layers=(ONE, nn.Hardswish(), TWO)), "operator-between", {}),
    ("a float layer in OpenVINO", partial(in_openvino, bits=8), "float-weights-kept no-quantizer-before", {}),
    ("XNNPACK, dynamic", partial(executorch, is_dynamic=True), "dynamic-quantization", {}),
    ("convert_pt2e, saved", partial(inductor, unread=True), "unread-weights", FREEZING),
    ("Inductor without freezing", inductor, "no-freezing", {}),
    ("NNCF prune and strip", nncf_pruned, "float-file masks-left", {}),
    ("compress_weights, 4 bits", partial(in_openvino, bits=4), "int4-as-int8 weights-only", {}),
]
for _tool, _write, _given, _names in (  # healthy: nothing is expected
    ("ONNX Runtime, uint8", partial(static, **UNSIGNED), {}, ("resnet18", "mobilenet_v2", "squeezenet1_1")),
    ("NNCF of ONNX in OpenVINO", nncf_onnx, OPENVINO, ("resnet50", "shufflenet_v2_x1_0", "mobilenet_v2")),
    ("Inductor, freezing", inductor, FREEZING, ("resnet18",)),
    ("XNNPACK, static", executorch, {}, ("resnet18", "mobilenet_v3_small")),
):
    TRIALS += [(f"{_tool}: {name}", partial(_write, name=name), "", _given) for name in _names]


def main() -> int:
    """Print a row for each way; 1 where one is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("words", nargs="*", help="only ways that hold one of them")
    words = parser.parse_args().words or [""]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start, verdicts = time.perf_counter(), []
    print("| way | expected | named | MACs in integers | s | right |\n|---|---|---|---|---|---|", flush=True)
    for way, write, expected, given in TRIALS:
        if any(word in way for word in words):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                report = doctor.examine(write(Path(folder)), seconds=300, **given)
            named = " ".join(sorted(report.named()))
            explained = all(layer.integer or layer.rules for layer in report.layers if layer.macs)
            verdicts.append(named == expected and explained)
            columns = [way, expected, named, f"{report.share:.1%}", f"{time.perf_counter() - began:.0f}"]
            print("|", " | ".join([*columns, "yes" if verdicts[-1] else "NO"]), "|", flush=True)
    print(f"{sum(verdicts)} of {len(verdicts)} as expected, in {time.perf_counter() - start:.0f} s")
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
