"""The int8 doctor on ONNX Runtime: each rule on a small network that shows it and on one that does not."""

import json
import re
from importlib import metadata
from pathlib import Path

import doctor_models as made
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType

from nnc_utils import doctor
from nnc_utils.doctor import fix, in_onnxruntime, onnx_rules, rules
from nnc_utils.doctor.__main__ import main
from nnc_utils.doctor.in_onnxruntime import session
from nnc_utils.doctor.onnx_graph import Graph

BEFORE_RELUS = ("conv1", "conv2", "conv4")  # conv3 goes into the add
SYMMETRIC = made.UNSIGNED | {"extra_options": {"ActivationSymmetric": True}}


def healthy():
    return made.static(made.network(), **made.UNSIGNED)


def behind_activations(settings=made.UNSIGNED, **kinds):
    """Quantized behind the activations alone."""
    return made.bypassed(made.static(made.network(**kinds), **settings), *BEFORE_RELUS, "add")


def left_batch_norm(**kinds):
    model = made.static(made.network(batch_norm=True, **kinds), **made.UNSIGNED)
    return made.bypassed(model, *made.CONVOLUTIONS, *(f"{name}.norm" for name in BEFORE_RELUS), "add")


def without_quantized_bias():
    return made.static(made.network(), **made.UNSIGNED | {"extra_options": {"QuantizeBias": False}})


def float_weight():
    return made.with_float_weight(without_quantized_bias(), "conv3")


def quantized_bias():
    return made.bypassed(healthy(), "logits_QuantizeLinear_Input")


ALL = {*made.CONVOLUTIONS, "add", "fc"}
CASES = {  # rule -> a network that shows it, and the layers it names
    "signed-activations": (lambda: made.static(made.network()), {"conv1", "conv2", "add"}),
    "signed-kernels": (lambda: made.static(made.network()), ALL),
    "scale-of-shape-1": (lambda: made.with_scales_of_shape_1(healthy()), {"add"}),
    "zero-point-behind-relu": (lambda: behind_activations(SYMMETRIC), {*BEFORE_RELUS, "add"}),
    "batch-norm-behind": (left_batch_norm, set(made.CONVOLUTIONS)),
    "bias-of-another-scale": (
        lambda: made.static(made.network(one_bias=True), **made.UNSIGNED),
        {"conv2", "conv3", "conv4"},
    ),
    "operator-before": (lambda: made.bypassed(quantized_bias(), "features"), {"fc"}),
    "float-bias": (lambda: made.bypassed(without_quantized_bias(), "logits_QuantizeLinear_Input"), {"fc"}),
    "output-of-the-graph": (lambda: made.with_output(healthy(), "conv3"), {"conv3"}),
    "operator-between": (lambda: behind_activations(activation="HardSwish"), set(BEFORE_RELUS)),
    "no-quantizer-behind": (lambda: made.bypassed(healthy(), "conv3"), {"conv3"}),
    "no-quantizer-before": (lambda: made.bypassed(healthy(), "images"), {"conv1"}),
    "wide-activations": (lambda: made.static(made.network(), activation_type=QuantType.QUInt16), ALL),
    "no-integer-kernel": (lambda: made.static(made.network(transpose=True), **made.UNSIGNED), {"up"}),
    "weights-rounded-on-loading": (float_weight, {"conv3"}),
    "signed-dynamic-weights": (
        lambda: made.dynamic(made.network()),
        {*(f"{name}_quant" for name in made.CONVOLUTIONS), "fc_MatMul_quant"},
    ),
    "float-file": (made.network, ALL),
}
SILENT = {  # rule -> a network without what it looks for, where that is not the healthy one
    "signed-kernels": healthy,
    "zero-point-behind-relu": behind_activations,
    "batch-norm-behind": behind_activations,
    "operator-before": quantized_bias,
    "float-bias": quantized_bias,
    "output-of-the-graph": lambda: made.with_output(healthy(), "conv3_DequantizeLinear_Output"),
    "operator-between": lambda: made.static(made.network(activation="HardSwish"), **made.UNSIGNED),
    "signed-dynamic-weights": lambda: made.dynamic(made.network(), weight_type=QuantType.QUInt8),
}
ENTRIES = {"signed-kernels": {"session.qdqisint8allowed": "1"}}  # of the session
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


def examined(model, folder, entries=None):
    onnx.save(model, folder / "net.onnx")
    return in_onnxruntime.examine(folder / "net.onnx", entries or {})


def outputs(model, count=64):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return session(model, options).run(["logits"], {"images": made.images(count)})[0]


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_names_the_layers_that_show_it(rule, tmp_path):
    sick, layers = CASES[rule]
    report = examined(sick(), tmp_path, ENTRIES.get(rule))
    assert set(report.named()[rule]) == layers
    assert list(report.named()) == [rule]
    floats = {layer.name for layer in report.layers if not layer.integer and layer.macs}
    assert floats == (
        {name for name in layers if name != "add"} if rules.TABLE[rule].effect == "float" else set()
    )


@pytest.mark.parametrize("rule", SILENT)
def test_and_is_silent_without(rule, tmp_path):
    """All are on the healthy network, too: test_healthy_files_name_nothing."""
    report = examined(SILENT[rule](), tmp_path, ENTRIES.get(rule))
    assert rule not in report.named()
    assert rules.TABLE[rule].effect == "slow" or report.share > 0.99


def test_the_remedy_of_weights_rounded_on_loading(tmp_path):
    """Without the quantizer behind it, the layer is what the file says."""
    report = examined(made.bypassed(float_weight(), "conv3"), tmp_path)
    assert {layer.name: layer.integer for layer in report.layers}["conv3"] is False
    assert "weights-rounded-on-loading" not in report.named()


def test_pooling_behind_a_quantizer_changes_no_reason(tmp_path):
    """ONNX Runtime quantizes again behind it; what follows is in floats only for a reason of its own."""
    model = made.bypassed(made.static(made.network(pool=True), **made.UNSIGNED), "pooled")
    assert not +fix.repair(model)
    assert (examined(model, tmp_path).named(), examined(model, tmp_path).share) == ({}, 1)
    model = made.bypassed(left_batch_norm(pool=True), "pooled")
    assert examined(model, tmp_path).named() == {"batch-norm-behind": list(made.CONVOLUTIONS)}
    before = outputs(model)
    assert fix.repair(model)["batch-norm-behind"] == len(made.CONVOLUTIONS)
    assert (examined(model, tmp_path).named(), examined(model, tmp_path).share) == ({}, 1)
    assert np.abs(before - outputs(model)).max() < 0.05 * before.std()


def test_masks_are_a_note(tmp_path):
    assert examined(made.network(mask=True), tmp_path).notes == ("masks-left",)
    assert examined(made.network(), tmp_path).notes == ()


def test_other_multiplications_are_a_note(tmp_path):
    model = made.network()
    model.graph.node.append(helper.make_node("Einsum", ["logits"], ["sums"], equation="ij->i"))
    assert examined(model, tmp_path).notes == ("not-counted",)


@pytest.mark.parametrize("change", [made.with_fused_convolution, made.with_function])
def test_layers_of_another_form_count(change, tmp_path):
    whole = sum(layer.macs for layer in examined(made.network(), tmp_path).layers)
    assert sum(layer.macs for layer in examined(change(made.network()), tmp_path).layers) == whole


@pytest.mark.parametrize("level", [0, 4])
def test_weights_of_four_bits(level, tmp_path):
    """ONNX Runtime decompresses them, unless it is asked to quantize activations as well."""
    (layer,) = examined(made.four_bits(level), tmp_path).layers
    assert (layer.integer, layer.rules) == ((True, ()) if level else (False, ("weights-only",)))
    assert layer.macs == 32 * made.CLASSES


def test_pairs_of_weights_alone_are_no_float_file(tmp_path):
    model = healthy()
    activations = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert set(examined(made.bypassed(model, *activations), tmp_path).named()) == {"no-quantizer-before"}


def small_graph(nodes, **constants):
    stored = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    return Graph(onnx.ModelProto(graph=onnx.GraphProto(node=nodes, initializer=stored)))


def test_long_graphs():
    """Each addition reads the one before twice: 2^600 paths lead to the last."""
    names = ["start", *(f"sum{number}" for number in range(600))]
    nodes = [helper.make_node("Add", [one] * 2, [other]) for one, other in zip(names, names[1:])]
    assert len(small_graph(nodes).layers()) == 600
    assert small_graph(nodes, start=1.0).layers() == []


def test_a_clip_is_a_relu_where_its_lowest_value_is_0():
    for inputs, relu in ((["x", "zero"], True), (["x", "below"], False), (["x", "", "zero"], False)):
        node = helper.make_node("Clip", inputs, ["y"])
        assert onnx_rules.is_relu(small_graph([node], zero=0.0, below=-1.0), node) == relu


def test_weights_are_called_dynamic_only_in_dynamic_files():
    kernel = helper.make_node("MatMulIntegerToFloat", ["x", "weight"], ["y"])
    types = {"weight": TensorProto.INT8}
    assert onnx_rules.slow(small_graph([]), kernel, types) == ()
    dynamic = small_graph([helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])])
    assert onnx_rules.slow(dynamic, kernel, types) == ("signed-dynamic-weights",)


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
    report = examined(made.static(made.network(), **settings), tmp_path)
    assert (report.named(), report.share) == ({}, 1)


def test_macs(tmp_path):
    macs = {layer.name: layer.macs for layer in examined(made.network(transpose=True), tmp_path).layers}
    area, kernel = made.SIZE**2, 9
    expected = {"conv1": area * made.WIDTH * 3 * kernel, "fc": made.WIDTH * made.CLASSES, "add": 0}
    expected |= dict.fromkeys(made.CONVOLUTIONS[1:], area * made.WIDTH**2 * kernel)
    assert macs == expected | {"up": area * made.WIDTH**2 * 4}


def test_a_fixed_batch(tmp_path):
    """The layers are those of an open one; both files are compared batch by batch."""
    model = made.static(made.network())
    open_layers = examined(model, tmp_path).layers
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert examined(model, tmp_path).layers == open_layers
    found = fix.fix(tmp_path / "net.onnx", tmp_path / "fixed.onnx", "")
    assert found["agreement"] == 1
    assert in_onnxruntime.examine(tmp_path / "fixed.onnx", {}).share == 1
    np.save(tmp_path / "few.npy", made.images(3))
    with pytest.raises(ValueError, match="3 inputs are fewer than the 4"):
        fix.fix(tmp_path / "net.onnx", tmp_path / "fixed.onnx", str(tmp_path / "few.npy"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = fix.INPUTS + 1
    onnx.save(model, tmp_path / "net.onnx")
    assert fix.fix(tmp_path / "net.onnx", tmp_path / "fixed.onnx", "")["agreement"] == 1


def test_what_is_compared(tmp_path, monkeypatch):
    """Every output; all inputs of an open batch; of a single value how near it is."""
    one = np.linspace(-1, 1, 200)[:, None]
    assert fix.agreement_of(one, one + 0.01) == 1 and fix.agreement_of(one, -one) < 0.1
    two = np.hstack([one, -one])
    assert fix.agreement_of(two, 2 * two) == 1 and fix.agreement_of(two, -two) == 0
    model = made.static(made.network())
    (logits,) = fix._outputs(model, {"images": made.images(70)})
    assert logits.shape == (70, made.CLASSES) and np.allclose(
        logits[64:], outputs(model, 70)[64:], atol=0.05 * logits.std()
    )
    onnx.save(model, tmp_path / "net.onnx")
    answers = iter([[two, two], [two, -two]])
    monkeypatch.setattr(fix, "_outputs", lambda model, fed: next(answers))
    assert fix.fix(tmp_path / "net.onnx", tmp_path / "fixed.onnx", "")["agreement"] == 0


SEEN = {part.rpartition(" ")[::2] for rule in rules.TABLE.values() for part in rule.runtime.split(", ")}


@pytest.mark.parametrize(("tool", "seen"), sorted(SEEN - {("", "all")}))
def test_versions(tool, seen):
    package = "onnxruntime" if tool == "ONNX Runtime" else tool.lower()
    try:
        installed = metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        pytest.skip(f"no {tool}")
    assert installed == seen, (
        f"The rules were seen in {tool} {seen}, and this is another version: look at what the tests of the "
        "rules say, change the table where its behaviour is another one, and then its versions."
    )


@pytest.mark.parametrize("rule", CHANGED)
def test_what_fix_changes(rule, tmp_path):
    model = CASES[rule][0]()
    before, size = outputs(model), model.ByteSize()
    assert fix.repair(model)[rule]
    assert model.ByteSize() < 1.1 * size
    onnx.checker.check_model(model)
    report = examined(model, tmp_path)
    assert (report.named(), report.share) == ({}, 1)
    after = outputs(model)
    assert np.abs(before - after).max() < 0.05 * before.std()


def test_the_table_says_what_fix_changes():
    assert {rule.name for rule in rules.TABLE.values() if rule.fix} == set(CHANGED)


def test_what_fix_leaves(tmp_path):
    """Batch-norm behind an output; a layer whose weight is in floats; what a graph within a node reads."""
    model = made.with_output(left_batch_norm(), "conv1")
    assert fix.repair(model)["batch-norm-behind"] == len(made.CONVOLUTIONS) - 1
    onnx.checker.check_model(model)
    model = made.static(made.network(), **made.UNSIGNED, nodes_to_exclude=["fc"])
    assert not fix.repair(made.bypassed(model, "features"))["operator-before"]
    inner = helper.make_graph([helper.make_node("Identity", ["kept"], ["y"])], "inner", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = small_graph([node], kept=1.0, dropped=1.0).model.graph
    fix._drop_unread(graph)
    assert [tensor.name for tensor in graph.initializer] == ["kept"]


def test_fix_leaves_a_healthy_file_alone():
    model = healthy()
    before = model.SerializeToString()
    assert not +fix.repair(model)
    onnx_before = onnx.ModelProto.FromString(before)
    assert list(onnx_before.graph.node) == list(model.graph.node)


# --- the command --------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    onnx.save(made.static(made.network()), tmp_path / "net.onnx")
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
    onnx.save(made.static(made.network()), tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", made.images(20))
    before, after = tmp_path / "net.onnx", tmp_path / "fixed.onnx"
    assert doctor.repair(before, after, inputs=str(tmp_path / "images.npy"))["agreement"] == 1
    after.unlink()
    monkeypatch.setattr(doctor, "AGREEMENT", 1.01)
    with pytest.raises(doctor.DoctorError, match="less than 101.0%: nothing was written"):
        doctor.repair(before, after)
    with pytest.raises(doctor.DoctorError, match="writes another one"):
        doctor.repair(before, before)
    with pytest.raises(doctor.DoctorError, match="writes another one"):
        doctor.repair(before, tmp_path / ".." / tmp_path.name / "net.onnx")
    assert not list(tmp_path.glob("*fixed*"))


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 500
    return err


def test_what_is_no_network_takes_one_line(tmp_path, capsys):
    onnx.save(healthy(), tmp_path / "net.onnx")
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
    ends = [made._value("x", 2)], [made._value("y", 2)]
    relu = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", *ends)
    onnx.save(helper.make_model(relu), tmp_path / "relu.onnx")
    assert "no convolution or linear layer" in refusal(capsys, tmp_path / "relu.onnx")
    assert "nothing that --fix changes" in refusal(
        capsys, tmp_path / "net.onnx", "--fix", tmp_path / "fixed.onnx"
    )
    assert sorted(path.name for path in tmp_path.glob("*fixed*")) == []


def test_what_is_too_large_takes_one_line(tmp_path, capsys):
    with open(tmp_path / "huge.onnx", "wb") as file:
        file.truncate(2**40)
    assert "at most 1,431,655,765" in refusal(capsys, tmp_path / "huge.onnx")
    rows, columns = 2**14, 3 * 2**14  # 3 GiB of floats: only the bound refuses them
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["zeros"])]
    nodes.append(helper.make_node("MatMul", ["x", "zeros"], ["y"]))
    stored = [helper.make_tensor("shape", TensorProto.INT64, [2], [rows, columns])]
    ends = [made._value("x", rows)], [made._value("y", columns)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "bomb", *ends, stored)), tmp_path / "bomb.onnx")
    assert re.search("memory|alloc", refusal(capsys, tmp_path / "bomb.onnx", "--gigabytes", "2"))
    onnx.save(healthy(), tmp_path / "net.onnx")
    assert "not done in 0.05 s" in refusal(capsys, tmp_path / "net.onnx", "--seconds", "0.05")
    for gigabytes in ("nan", "inf", "-1"):
        assert "from 0 to 1,000,000" in refusal(capsys, tmp_path / "net.onnx", "--gigabytes", gigabytes)


def test_a_process_that_ends_as_it_is_ended(tmp_path, capsys, monkeypatch):
    onnx.save(made.network(), tmp_path / "net.onnx")

    def gone(number):
        raise doctor.psutil.NoSuchProcess(number)

    monkeypatch.setattr(doctor.psutil, "Process", gone)
    assert "not done" in refusal(capsys, tmp_path / "net.onnx", "--seconds", "0.05")


def test_the_size_counts_what_lies_beside(tmp_path):
    for name in ("net[1].onnx", "net[1].onnx.data"):
        (tmp_path / name).write_bytes(b"0" * 10)
    assert doctor._size(tmp_path / "net[1].onnx") == 20


def test_the_page_shows_the_table():
    page = Path(__file__).parents[1] / "docs" / "doctor.md"
    assert page.read_text(encoding="utf-8").endswith(f"\n{rules.markdown()}\n")
