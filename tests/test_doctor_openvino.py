"""The int8 doctor on OpenVINO: each rule on a small network that shows it and on one that does not."""

import logging

import doctor_models as made
import onnx
import pytest
from onnxruntime.quantization import QuantType

pytest.importorskip("openvino")
# in_openvino comes before openvino: no telemetry
from nnc_utils.doctor import DoctorError, examine, in_openvino, rules  # noqa: E402
from nnc_utils.runtimes.openvino import count_operators  # noqa: E402

import openvino  # noqa: E402, isort: skip
from openvino import opset13 as ops  # noqa: E402, isort: skip


def saved(model, folder, **settings):
    """As OpenVINO's own file."""
    onnx.save(model, folder / "source.onnx")
    converted = openvino.convert_model(folder / "source.onnx")
    openvino.save_model(converted, folder / "net.xml", **settings)
    return folder / "net.xml"


def report(path):
    return in_openvino.examine(path, {})


def compressed(folder, mode):
    """What NNCF's `compress_weights` makes of the float network."""
    nncf = pytest.importorskip("nncf")
    nncf.set_log_level(logging.ERROR)
    model = openvino.convert_model(saved(made.network(), folder).with_name("source.onnx"))
    openvino.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode]), folder / "net.xml")
    return folder / "net.xml"


@pytest.mark.parametrize(
    "settings", [{}, made.UNSIGNED, {"per_channel": True, "weight_type": QuantType.QInt8}]
)
def test_healthy_files_name_nothing(settings, tmp_path):
    """Signed activations are no matter for OpenVINO."""
    for path in (
        saved(made.static(made.network(), **settings), tmp_path),
        tmp_path / "source.onnx",
    ):
        found = report(path)
        assert (found.named(), found.share, len(found.layers)) == ({}, 1, 5)


def test_transposed_convolutions_and_folded_batch_norm_run_in_integers(tmp_path):
    for kinds in ({"transpose": True}, {"batch_norm": True}, {"activation": "HardSwish"}):
        model = made.static(made.network(**kinds), **made.UNSIGNED)
        between = ("conv1", "conv2", "conv4", "conv1.norm", "conv2.norm", "conv4.norm", "conv3")
        model = made.bypassed(model, *(between if "batch_norm" in kinds else ()))
        assert report(saved(model, tmp_path)).named() == {}


def test_float_files(tmp_path):
    found = report(saved(made.network(), tmp_path))
    assert list(found.named()) == ["float-file"] and found.share == 0
    assert not any(layer.integer for layer in found.layers)


def test_wide_activations(tmp_path):
    model = made.static(made.network(), activation_type=QuantType.QUInt16)
    found = report(saved(model, tmp_path))
    assert found.share == 0 and len(found.named()["wide-activations"]) >= 4


def test_a_layer_left_out_keeps_its_weights_in_32_bits(tmp_path):
    """Asked for fp16; a float network gets it, and one with a quantized layer does not."""
    settings = made.UNSIGNED | {"nodes_to_exclude": ["conv3", "conv4"]}
    path = saved(made.static(made.network(), **settings), tmp_path, compress_to_fp16=True)
    found = report(path)
    assert found.notes == ("float-weights-kept",)
    named = found.named()["no-quantizer-before"]
    assert named == ["conv3/WithoutBiases", "conv4/WithoutBiases"]
    assert path.with_suffix(".bin").stat().st_size > 4 * 2 * made.WIDTH**2 * 9
    assert report(saved(made.network(), tmp_path, compress_to_fp16=True)).notes == ()


def test_compressed_weights_compute_in_floats(tmp_path):
    """In 4 bits convolutions have as many bytes as in 8."""
    sizes = {}
    for mode, notes in (("INT8_ASYM", ()), ("INT4_SYM", ("int4-as-int8",))):
        path = compressed(tmp_path, mode)
        found = report(path)
        assert (found.share, found.notes) == (0, notes)
        assert len(found.named()["weights-only"]) == 5
        compiled = openvino.Core().compile_model(tmp_path / "net.xml", "CPU")
        assert not {"conv", "linear"} & set(count_operators(compiled))
        sizes[mode] = path.with_suffix(".bin").stat().st_size
    assert sizes["INT8_ASYM"] == sizes["INT4_SYM"]


@pytest.mark.parametrize("damage", ["foreign", "without weights", "cut weights"])
def test_a_damaged_file_takes_one_line(damage, tmp_path):
    path = saved(made.network(), tmp_path)
    weights = path.with_suffix(".bin")
    if damage == "foreign":
        path.write_text("<html></html>")
    else:
        weights.write_bytes(weights.read_bytes()[:100] if damage == "cut weights" else b"")
    with pytest.raises(DoctorError, match=r"net\.xml: ") as error:
        examine(path)
    assert "\n" not in str(error.value)


def test_macs(tmp_path):
    macs = sorted(layer.macs for layer in report(saved(made.network(transpose=True), tmp_path)).layers)
    area, inner = made.SIZE**2, made.WIDTH**2
    expected = [inner * 9 * area] * 3 + [
        area * made.WIDTH * 3 * 9,
        inner * 4 * area,
        made.WIDTH * made.CLASSES,
    ]
    assert macs == sorted(expected)


def test_the_constants_of_long_graphs():
    """Each addition reads the one before twice: 2^60 paths lead to the last."""
    for start, count in ((ops.parameter([1]), 0), (ops.constant([1.0]), 1)):
        node = start
        for _ in range(60):
            node = ops.add(node, node)
        assert len(in_openvino._constants(node)) == count


def test_in_a_process_of_its_own(tmp_path):
    path = saved(made.static(made.network()), tmp_path)
    found = examine(path)
    assert found.runtime == rules.TABLE["float-weights-kept"].runtime and found.share == 1
    assert found == examine(path, runtime="openvino", entries=["INFERENCE_PRECISION_HINT=f32"])
