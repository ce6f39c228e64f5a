"""The int8 doctor on programs of PyTorch's export: ExecuTorch's .pte, and .pt2 compiled by Inductor."""

import pytest
import torch
from small_networks import quantized, saved
from torch import nn
from torch.nn import functional

from nnc_utils import doctor, models, runtimes
from nnc_utils.doctor import in_inductor, rules

SHAPE = (2, 3, 12, 12)
torchao = pytest.importorskip("torchao")
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402

needs_executorch = pytest.mark.skipif(bool(runtimes.available("executorch")), reason="no executorch")
needs_compiler = pytest.mark.skipif(bool(runtimes.available("inductor", "int8")), reason="no C++ compiler")


class Network(nn.Module):
    """conv1, a block of conv2 and conv3 with its residual add, conv4, fc."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(width, 10)

    def forward(self, images):
        stem = self.conv1(images).relu()
        inner = (self.conv3(self.conv2(stem).relu()) + stem).relu()
        return self.fc(self.conv4(inner).relu().mean((-2, -1)))


def exported(module=None):
    return torch.export.export(module or Network().eval(), (torch.randn(SHAPE),))


def converted(quantizer, module=None):
    prepared = prepare_pt2e(exported(module).module(), quantizer)
    prepared(torch.randn(SHAPE))
    return convert_pt2e(prepared)


class Products(nn.Module):
    """A transposed convolution, a product of two activations, and one with a weight of shape (in, out)."""

    MACS = 12 * 12 * 3 * 8 * 4 + 8 * 8 * 24 * 24 + 8 * 8 * 5  # of one image

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.weight = nn.Parameter(torch.randn(8 * 8, 5))

    def forward(self, images):
        rows = self.up(images).flatten(2)
        return torch.mm(torch.bmm(rows, rows.transpose(1, 2)).flatten(1), self.weight)


def xnnpack(folder, *, module=None, partitioned=True, **settings):
    """Quantized as ExecuTorch documents it, unless there are no settings."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnn
    from executorch.exir import to_edge_transform_and_lower

    config = xnn.get_symmetric_quantization_config(is_per_channel=True, **settings)
    module = converted(xnn.XNNPACKQuantizer().set_global(config), module) if settings else module
    partitioners = [XnnpackPartitioner()] if partitioned else []
    program = to_edge_transform_and_lower(exported(module), partitioner=partitioners)
    (folder / "net.pte").write_bytes(program.to_executorch().buffer)
    return folder / "net.pte"


def examined(path, settings=None):
    from nnc_utils.doctor import in_executorch

    return (in_executorch if path.suffix == ".pte" else in_inductor).examine(path, settings or {})


@pytest.mark.slow
@needs_executorch
def test_static_quantization_is_healthy_in_executorch(tmp_path):
    report = examined(xnnpack(tmp_path, is_dynamic=False))
    assert (report.named(), report.share, report.runtime) == (
        {},
        1,
        rules.TABLE["dynamic-quantization"].runtime,
    )
    area, width = 12 * 12, 16
    macs = [area * width * 3 * 9, *[area * width**2 * 9] * 3, width * 10]
    assert sorted(layer.macs for layer in report.layers if layer.kind != "add") == sorted(macs)


@needs_executorch
@pytest.mark.slow
def test_dynamic_quantization_leaves_convolutions_in_floats(tmp_path):
    report = doctor.examine(xnnpack(tmp_path, is_dynamic=True))
    floats = [layer for layer in report.layers if not layer.integer]
    assert sorted(layer.kind for layer in floats) == ["add", "conv", "conv", "conv"]
    assert report.named() == {"dynamic-quantization": [layer.name for layer in floats]}


@needs_executorch
def test_what_is_not_quantized_or_not_delegated(tmp_path):
    delegated, outside = (examined(xnnpack(tmp_path, partitioned=one)) for one in (True, False))
    assert list(delegated.named()) == ["float-file"]
    assert list(outside.named()) == ["not-delegated"] and outside.share == 0
    assert sum(layer.macs for layer in outside.layers) == sum(layer.macs for layer in delegated.layers)


@needs_executorch
@pytest.mark.slow
def test_additions_of_a_number_are_no_layers(tmp_path):
    """XNNPACK adds 3 within a hard sigmoid, in floats."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardsigmoid(), nn.Conv2d(8, 8, 3)).eval()
    report = examined(xnnpack(tmp_path, module=module, is_dynamic=False))
    assert (report.named(), [layer.kind for layer in report.layers]) == ({}, ["conv", "conv"])


@needs_executorch
@pytest.mark.parametrize("partitioned", [True, False])
def test_transposed_convolutions_and_products_count_in_executorch(partitioned, tmp_path):
    report = examined(xnnpack(tmp_path, module=Products().eval(), partitioned=partitioned))
    assert sum(layer.macs for layer in report.layers) == Products.MACS


@needs_executorch
def test_weights_of_4_bits_in_groups_are_integers(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 32, 12), nn.Flatten(), nn.Linear(32, 10)).eval()
    groups = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(32)}
    quantize_(module, Int8DynamicActivationIntxWeightConfig(**groups))  # of linear layers
    report = examined(xnnpack(tmp_path, module=module))
    assert [(layer.runs, layer.integer, layer.macs) for layer in report.layers] == [
        ("XNNConv2d fp32", False, 32 * 3 * 12 * 12),
        ("XNNFullyConnected dynamic qdint8", True, 32 * 10),
    ]


@pytest.mark.parametrize("suffix", [pytest.param("pte", marks=needs_executorch), "pt2", "safetensors"])
def test_a_damaged_program_takes_one_line(suffix, tmp_path):
    (tmp_path / f"net.{suffix}").write_bytes(b"no program" * 100)
    with pytest.raises(doctor.DoctorError, match=rf"net\.{suffix}: ") as error:
        doctor.examine(tmp_path / f"net.{suffix}")
    assert "\n" not in str(error.value)


def x86_program(folder, *, unread=True):
    module = converted(
        x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    )
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [] if unread else list(module.named_parameters()):
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    torch.export.save(exported(module), folder / "net.pt2")
    return folder / "net.pt2"


@needs_compiler
@pytest.mark.slow
def test_inductor_takes_integer_kernels_only_when_it_freezes(tmp_path):
    report = examined(x86_program(tmp_path))
    assert report.share == 0 and report.notes == ("unread-weights",)
    assert set(report.named()) == {"no-freezing", "unread-weights"}
    assert len(report.named()["no-freezing"]) == len(report.layers) == 5
    report = examined(x86_program(tmp_path, unread=False), {"freezing": "True"})
    assert (report.named(), report.share) == ({}, 1)


class Masked(nn.Module):
    """A convolution pruned as NNCF's `strip` leaves it: the mask is stored beside the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("mask", (self.weight > 0).to(torch.uint8))

    def forward(self, images):
        return functional.conv2d(images, self.weight * self.mask)


def test_transposed_convolutions_and_products_count_in_inductor():
    nodes = exported(Products().eval()).graph.nodes
    layers = [node for node in nodes if getattr(node.target, "_opname", "") in in_inductor.KINDS]
    assert sum(map(in_inductor.macs, layers)) == SHAPE[0] * Products.MACS


def test_calls_that_no_layer_is_known_of(tmp_path, monkeypatch):
    torch.export.save(exported(), tmp_path / "net.pt2")
    for call, reasons in (("qconv2d_pointwise", ()), ("convolution", ("float-file",))):
        monkeypatch.setattr(in_inductor, "_calls", lambda program, config, call=call: [call, "addmm"])
        *convolutions, fc = examined(tmp_path / "net.pt2").layers
        assert {(layer.runs, layer.integer, layer.rules) for layer in convolutions} == {
            ("1 calls for 4 layers", False, reasons)
        }
        assert fc.runs == "addmm"


def test_masks_and_unread_weights_are_notes():
    assert in_inductor.notes(exported(Masked())) == ("masks-left",)
    assert in_inductor.notes(exported()) == ()


def test_masks_that_nncf_leaves():
    """Its `strip` after pruning: NATIVE is the default."""
    if runtimes.available("openvino"):  # before nncf: no telemetry
        pytest.skip("no openvino")
    nncf = pytest.importorskip("nncf")
    network, images = Network().eval(), torch.randn(SHAPE)
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    pruned = nncf.prune(network, mode=mode, ratio=0.5, examples_inputs=images)
    for form, notes in (("NATIVE", ("masks-left",)), ("IN_PLACE", ())):
        stripped = nncf.strip(pruned, strip_format=nncf.StripFormat[form], example_input=images)
        assert in_inductor.notes(exported(stripped)) == notes


def test_an_artifact_is_exported_first(tmp_path):
    """To ONNX Runtime's int8 unless another runtime is asked for."""
    spec = models.resnet(18, channels=1, size=8, classes=10, stem="small", width=1 / 8)
    saved(quantized(models.build(spec).eval()), tmp_path / "net.safetensors")
    report = doctor.examine(tmp_path / "net.safetensors")
    assert (report.named(), report.share, report.runtime) == (
        {},
        1,
        rules.TABLE["signed-activations"].runtime,
    )
    assert sum(layer.macs for layer in report.layers) == models.macs(spec)
    assert len([layer for layer in report.layers if layer.kind != "add"]) == 21
