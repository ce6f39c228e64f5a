"""The int8 doctor on ONNX Runtime: each rule on a small network that shows it and on one that does not."""

import json
import re
from pathlib import Path

import doctor_models as made
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType

from nnc_utils import doctor
from nnc_utils.doctor import fix, in_onnxruntime, rules
from nnc_utils.doctor.__main__ import main
from nnc_utils.doctor.in_onnxruntime import session

ALLOWING_SIGNED = {"session.qdqisint8allowed": "1"}
BEFORE_RELUS = ("conv1", "conv2", "conv4")  # conv3 goes into the add
SYMMETRIC = made.UNSIGNED | {"extra_options": {"ActivationSymmetric": True}}


def healthy(folder):
    return made.static(made.network(), folder, **made.UNSIGNED)


def behind_activations(folder, settings=made.UNSIGNED, **kinds):
    """Quantized behind the activations alone."""
    model = made.static(made.network(**kinds), folder, **settings)
    return made.bypassed(model, *BEFORE_RELUS, "add")


def left_batch_norm(folder):
    model = made.static(made.network(batch_norm=True), folder, **made.UNSIGNED)
    return made.bypassed(model, *made.CONVOLUTIONS, *(f"{name}.norm" for name in BEFORE_RELUS), "add")


def float_bias(folder):
    settings = made.UNSIGNED | {"extra_options": {"QuantizeBias": False}}
    return made.bypassed(made.static(made.network(), folder, **settings), "logits_QuantizeLinear_Input")


def quantized_bias(folder):
    return made.bypassed(healthy(folder), "logits_QuantizeLinear_Input")


# rule -> (a network that shows it, the layers it names, one that does not, entries of the session)
ALL = {*made.CONVOLUTIONS, "add", "fc"}
CASES = {
    "signed-activations": (
        lambda folder: made.static(made.network(), folder),
        {"conv1", "conv2", "add"},
        healthy,
        {},
    ),
    "signed-kernels": (lambda folder: made.static(made.network(), folder), ALL, healthy, ALLOWING_SIGNED),
    "scale-of-shape-1": (
        lambda folder: made.with_scales_of_shape_1(healthy(folder)),
        {"add"},
        healthy,
        {},
    ),
    "zero-point-behind-relu": (
        lambda folder: behind_activations(folder, SYMMETRIC),
        {"conv1", "conv2", "conv4", "add"},
        behind_activations,
        {},
    ),
    "batch-norm-behind": (left_batch_norm, set(made.CONVOLUTIONS), behind_activations, {}),
    "bias-of-another-scale": (
        lambda folder: made.static(made.network(one_bias=True), folder, **made.UNSIGNED),
        {"conv2", "conv3", "conv4"},
        healthy,
        {},
    ),
    "operator-before": (
        lambda folder: made.bypassed(quantized_bias(folder), "features"),
        {"fc"},
        quantized_bias,
        {},
    ),
    "float-bias": (float_bias, {"fc"}, quantized_bias, {}),
    "output-of-the-graph": (
        lambda folder: made.with_output(healthy(folder), "conv3"),
        {"conv3"},
        lambda folder: made.with_output(healthy(folder), "conv3_DequantizeLinear_Output"),
        {},
    ),
    "operator-between": (
        lambda folder: behind_activations(folder, activation="HardSwish"),
        {"conv1", "conv2", "conv4"},
        lambda folder: made.static(made.network(activation="HardSwish"), folder, **made.UNSIGNED),
        {},
    ),
    "no-quantizer-behind": (
        lambda folder: made.bypassed(healthy(folder), "conv3"),
        {"conv3"},
        healthy,
        {},
    ),
    "no-quantizer-before": (
        lambda folder: made.bypassed(healthy(folder), "images"),
        {"conv1"},
        healthy,
        {},
    ),
    "wide-activations": (
        lambda folder: made.static(made.network(), folder, activation_type=QuantType.QUInt16),
        ALL,
        healthy,
        {},
    ),
    "no-integer-kernel": (
        lambda folder: made.static(made.network(transpose=True), folder, **made.UNSIGNED),
        {"up"},
        healthy,
        {},
    ),
    "signed-dynamic-weights": (
        lambda folder: made.dynamic(made.network(), folder),
        {*(f"{name}_quant" for name in made.CONVOLUTIONS), "fc_MatMul_quant"},
        lambda folder: made.dynamic(made.network(), folder, weight_type=QuantType.QUInt8),
        {},
    ),
    "float-file": (lambda folder: made.network(), ALL, healthy, {}),
}
CHANGED = (
    "signed-activations",
    "scale-of-shape-1",
    "zero-point-behind-relu",
    "batch-norm-behind",
    "float-bias",
    "bias-of-another-scale",
    "operator-before",
    "signed-dynamic-weights",
)
NEWER = (
    "The rules were seen in {seen}, and this is another version: look at what the tests of the rules say, "
    "change the table where its behaviour is another one, and then its versions."
)


def examined(model, folder, entries=None):
    onnx.save(model, folder / "net.onnx")
    return in_onnxruntime.examine(folder / "net.onnx", entries or {})


def outputs(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return session(model, options).run(["logits"], {"images": made.images(64)})[0]


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_names_the_layers_that_show_it(rule, tmp_path):
    sick, layers, _, entries = CASES[rule]
    report = examined(sick(tmp_path), tmp_path, entries)
    assert set(report.named()[rule]) == layers
    assert list(report.named()) == [rule]
    floats = {layer.name for layer in report.layers if not layer.integer and layer.macs}
    assert floats == (
        {name for name in layers if name != "add"} if rules.TABLE[rule].effect == "float" else set()
    )


@pytest.mark.parametrize("rule", CASES)
def test_and_is_silent_without(rule, tmp_path):
    _, _, well, entries = CASES[rule]
    report = examined(well(tmp_path), tmp_path, entries)
    assert rule not in report.named()
    assert rules.TABLE[rule].effect == "slow" or report.share > 0.99


def test_masks_are_a_note(tmp_path):
    assert examined(made.network(mask=True), tmp_path).notes == ("masks-left",)
    assert examined(made.network(), tmp_path).notes == ()


@pytest.mark.parametrize(
    "settings",
    [
        made.UNSIGNED,
        made.UNSIGNED | {"quant_format": QuantFormat.QOperator},
        made.UNSIGNED | {"weight_type": QuantType.QUInt8, "per_channel": False},
        made.UNSIGNED | {"reduce_range": True},
    ],
    ids=["pairs", "operators", "unsigned weights", "7 bits"],
)
def test_healthy_files_name_nothing(settings, tmp_path):
    report = examined(made.static(made.network(), tmp_path, **settings), tmp_path)
    assert (report.named(), report.share) == ({}, 1)


def test_macs(tmp_path):
    macs = {layer.name: layer.macs for layer in examined(made.network(transpose=True), tmp_path).layers}
    area, kernel = made.SIZE**2, 9
    expected = {"conv1": area * made.WIDTH * 3 * kernel, "fc": made.WIDTH * made.CLASSES, "add": 0}
    expected |= dict.fromkeys(made.CONVOLUTIONS[1:], area * made.WIDTH**2 * kernel)
    assert macs == expected | {"up": area * made.WIDTH**2 * 4}


def test_a_fixed_batch(tmp_path):
    """The layers are those of an open one; both files are compared batch by batch."""
    model = made.static(made.network(), tmp_path)
    open_layers = examined(model, tmp_path).layers
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert examined(model, tmp_path).layers == open_layers
    found = fix.fix(tmp_path / "net.onnx", tmp_path / "fixed.onnx", "")
    assert found["agreement"] == 1
    assert in_onnxruntime.examine(tmp_path / "fixed.onnx", {}).share == 1


def test_versions():
    seen = f"ONNX Runtime {onnxruntime.__version__}"
    assert seen == rules.TABLE["signed-activations"].runtime, NEWER.format(
        seen=rules.TABLE["signed-activations"].runtime
    )


@pytest.mark.parametrize("rule", CHANGED)
def test_what_fix_changes(rule, tmp_path):
    sick, _, _, _ = CASES[rule]
    model = sick(tmp_path)
    before = outputs(model)
    assert fix.repair(model)[rule]
    onnx.checker.check_model(model)
    report = examined(model, tmp_path)
    assert (report.named(), report.share) == ({}, 1)
    after = outputs(model)
    assert np.abs(before - after).max() < 0.05 * before.std()
    assert rules.TABLE[rule].fix


def test_fix_leaves_a_healthy_file_alone(tmp_path):
    model = healthy(tmp_path)
    before = model.SerializeToString()
    assert not +fix.repair(model)
    onnx_before = onnx.ModelProto.FromString(before)
    assert list(onnx_before.graph.node) == list(model.graph.node)


# --- the command --------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    onnx.save(made.static(made.network(), tmp_path), tmp_path / "net.onnx")
    assert main([str(tmp_path / "net.onnx"), "--least", "0.95"]) == 1
    said = capsys.readouterr().out
    assert "62.8% (3 of 5 layers, 0 of 1 additions)" in said
    assert re.search(r"^conv1 +conv +Conv +floats +62,208 +5\.9% +signed-activations$", said, re.MULTILINE)
    assert "signed-activations: conv1, conv2, add\n" in said and "QuantType.QUInt8" in said
    fixed = tmp_path / "fixed.onnx"
    arguments = ["--fix", str(fixed), "--json", "--least", "0.95"]
    assert main([str(tmp_path / "net.onnx"), *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["integer_macs"], document["named"]) == (1, {})
    assert document["repaired"]["agreement"] == 1 and document["file"] == str(fixed)


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    onnx.save(made.static(made.network(), tmp_path), tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", made.images(20))
    before, after = tmp_path / "net.onnx", tmp_path / "fixed.onnx"
    assert doctor.repair(before, after, inputs=str(tmp_path / "images.npy"))["agreement"] == 1
    after.unlink()
    monkeypatch.setattr(doctor, "AGREEMENT", 1.01)
    with pytest.raises(doctor.DoctorError, match="less than 101.0%: nothing was written"):
        doctor.repair(before, after)
    with pytest.raises(doctor.DoctorError, match="writes another one"):
        doctor.repair(before, before)
    assert not list(tmp_path.glob("*fixed*"))


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 500
    return err


def test_what_is_no_network_takes_one_line(tmp_path, capsys):
    onnx.save(healthy(tmp_path), tmp_path / "net.onnx")
    whole = (tmp_path / "net.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.onnx").write_text("no network")
    for name in ("cut", "foreign"):
        assert f"{name}.onnx" in refusal(capsys, tmp_path / f"{name}.onnx")
    assert "is no file" in refusal(capsys, tmp_path / "missing.onnx")
    assert "has to end with one of .pt2, .pte" in refusal(capsys, tmp_path / "net.bin")
    assert "unknown runtime 'tensorrt'" in refusal(capsys, tmp_path / "net.onnx", "--runtime", "tensorrt")
    assert "executorch is given" in refusal(capsys, tmp_path / "net.onnx", "--runtime", "executorch")
    assert "KEY=VALUE" in refusal(capsys, tmp_path / "net.onnx", "--entry", "freezing")
    assert "nothing that --fix changes" in refusal(
        capsys, tmp_path / "net.onnx", "--fix", tmp_path / "fixed.onnx"
    )
    assert sorted(path.name for path in tmp_path.glob("*fixed*")) == []


def test_what_is_too_large_takes_one_line(tmp_path, capsys):
    with open(tmp_path / "huge.onnx", "wb") as file:
        file.truncate(2**40)
    assert "at most 1,431,655,765" in refusal(capsys, tmp_path / "huge.onnx")
    shape = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    stored = [helper.make_tensor("shape", TensorProto.INT64, [1], [2**37])]
    output = [helper.make_tensor_value_info("zeros", TensorProto.FLOAT, [2**37])]
    onnx.save(
        helper.make_model(helper.make_graph([shape], "bomb", [], output, stored)), tmp_path / "bomb.onnx"
    )
    refusal(capsys, tmp_path / "bomb.onnx", "--gigabytes", "2")
    onnx.save(healthy(tmp_path), tmp_path / "net.onnx")
    assert "not done in 0.05 s" in refusal(capsys, tmp_path / "net.onnx", "--seconds", "0.05")


def test_the_page_shows_the_table():
    page = Path(__file__).parents[1] / "docs" / "doctor.md"
    assert page.read_text(encoding="utf-8").endswith(f"\n{rules.markdown()}\n")
