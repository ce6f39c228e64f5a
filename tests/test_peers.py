"""The production counterparts, on a very small network; what is not installed is skipped and says so."""

import dataclasses
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from small_networks import PLAIN, images, network, quantized, saved

from bench import integers
from nnc_utils import artifact, encoding, models, peers
from nnc_utils.runtimes import qdq

SETTINGS = {
    "ort_static": [{}, {"scheme": "S8S8"}, {"calibration": "Percentile"}],
    "nncf_ptq": [{}],
    "torchao_pt2e": [{}],
    "nncodec": [{"qp": -32}],
    **{name: [{}] for name in ("gzip", "xz", "zstd")},
}
CASES = [(name, settings) for name in peers.NAMES for settings in SETTINGS[name]]


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    """Compiling imports setuptools, which puts packages of its own on the path of all later tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def need(name):
    if why := peers.available(name):
        pytest.skip(f"{name}: {why}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same network in fp32, and with 8-bit codes and activations."""
    folder = tmp_path_factory.mktemp("sources")
    model = network(PLAIN)
    saved(model, folder / "fp32.safetensors")
    saved(quantized(network(PLAIN), bits=8), folder / "int8.safetensors")
    return folder


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_a_peer_agrees_with_the_fp32_network(sources, tmp_path, name, settings):
    need(name)
    source = sources / ("int8" if name in ("gzip", "xz", "zstd") else "fp32")
    source = source.with_suffix(".safetensors")
    path = peers.make(name, source, images(PLAIN, 72, seed=3).numpy(), tmp_path, **settings)
    written = [file for file in tmp_path.iterdir() if file.is_file()]
    assert sorted(written) == sorted(peers.files(path)), "what is counted is all that was written"
    assert peers.measured(path)[1] == sum(file.stat().st_size for file in written)
    assert peers.measured(path)[1] < artifact.fp32_bytes(PLAIN)
    loaded = peers.load(name, path, source)
    integers.note_share(extra := {}, name, {"path": path, "sha256": "of the file"})
    assert extra == ({"integer_macs": {"of the file": 1.0}} if name in peers.RUNTIMES else {})
    pictures = images(PLAIN, 200, seed=5)
    with torch.inference_mode():
        expected = artifact.load(sources / "fp32.safetensors")(pictures)
    logits = loaded.predict(pictures.numpy())
    assert logits.shape == expected.shape and logits.dtype == np.float32
    assert (logits.argmax(1) == expected.argmax(1).numpy()).mean() > 0.95
    error = np.sqrt(((logits - expected.numpy()) ** 2).mean()) / expected.std()
    assert 0 < error < 0.2, "near the fp32 logits, but not the fp32 network itself"
    weights = sum(np.prod(layer.weight_shape) for layer in models.layers(PLAIN))
    assert 0 < loaded.zeros < 0.2 * weights


def test_unknown_and_absent_peers_say_so(monkeypatch, tmp_path, sources):
    with pytest.raises(ValueError, match="unknown peer 'tflite': one of ort_static, "):
        peers.peer("tflite")
    monkeypatch.setenv("NNCODEC_VENV", str(tmp_path))
    assert peers.available("nncodec") == "not installed: run workflow/setup_env.py --nncodec"
    with pytest.raises(ImportError, match="setup_env.py --nncodec"):
        peers.make("nncodec", sources / "fp32.safetensors", None, tmp_path, qp=-20)
    if not peers.available("torchao_pt2e"):
        monkeypatch.setenv("PATH", "")
        assert "no C++ compiler" in peers.available("torchao_pt2e")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "aarch64"}, True),  # only x86 may saturate
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": True}, True),
        ({"architecture": "x86_64", "avx512_vnni": False, "amx_int8": True}, True),
    ],
)
def test_vnni_is_what_the_processor_says(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert peers.vnni() is expected


# --- Integers that are none ---------------------------------------------------------------------


def test_onnx_runtime_in_floats_is_refused(sources, tmp_path):
    source = sources / "fp32.safetensors"
    onnx.save(qdq.onnx_model(artifact.read(source), "fp32"), tmp_path / "float.onnx")
    with pytest.raises(RuntimeError, match="not an int8 network: the runtime computes 0 of 20 conv"):
        peers.load("ort_static", tmp_path / "float.onnx", source)
    with pytest.raises(ValueError, match="unknown scheme 'U8U8': one of U8S8, S8S8"):
        peers.make("ort_static", source, images(PLAIN, 4).numpy(), tmp_path, scheme="U8U8")


def test_onnx_runtime_uses_7_bits_where_8_would_saturate(sources, tmp_path, monkeypatch):
    largest = {}
    for vnni in (True, False):
        monkeypatch.setattr(peers, "vnni", lambda vnni=vnni: vnni)
        source = sources / "fp32.safetensors"
        path = peers.make("ort_static", source, images(PLAIN, 8).numpy(), tmp_path)
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        weights = [codes.astype(int) for codes in weights if codes.dtype == np.int8 and codes.ndim > 1]
        largest[vnni] = max(abs(codes).max() for codes in weights)
    assert largest[True] == 127 and largest[False] <= 64


def test_openvino_in_floats_is_refused(sources, tmp_path):
    need("nncf_ptq")
    import openvino

    source = sources / "fp32.safetensors"
    onnx.save(qdq.onnx_model(artifact.read(source), "fp32"), tmp_path / "float.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "float.onnx"), tmp_path / "float.xml")
    with pytest.raises(RuntimeError, match="0 of 20 conv, 0 of 1 linear .*'float conv': 20"):
        peers.load("nncf_ptq", tmp_path / "float.xml", source)


def test_a_program_that_torchao_left_in_floats_is_refused(sources, tmp_path):
    need("torchao_pt2e")
    source = sources / "fp32.safetensors"
    program = torch.export.export(artifact.load(source), (images(PLAIN, 2),))
    torch.export.save(program, tmp_path / "float.pt2")
    with pytest.raises(RuntimeError, match="0 of 20 conv, 0 of 1 linear"):
        peers.load("torchao_pt2e", tmp_path / "float.pt2", source)


# --- Codecs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
@pytest.mark.parametrize("bits", [8, 12, None], ids=lambda bits: f"bits={bits}")
def test_plain_compressors_lose_nothing(sources, tmp_path, name, bits):
    need(name)
    from nnc_utils.peers import plain

    model = quantized(network(PLAIN), bits=bits) if bits else network(PLAIN)
    given = saved(model, tmp_path / "source.safetensors")
    path = peers.make(name, tmp_path / "source.safetensors", None, tmp_path)
    assert path.read_bytes() == peers.make(name, tmp_path / "source.safetensors", None, tmp_path).read_bytes()
    (tmp_path / "source.safetensors").unlink()
    found = plain.decode(path)
    for field in ("spec", "ranges", "mean", "std", "classes"):
        assert getattr(found, field) == getattr(given, field)
    assert list(found.tensors) == list(given.tensors) and list(found.weights) == list(given.weights)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in given.tensors.items())
    for name, weight in given.weights.items():
        assert torch.equal(encoding.decode(found.weights[name]), encoding.decode(weight))
        for field in dataclasses.fields(weight):
            assert type(getattr(found.weights[name], field.name)) is type(getattr(weight, field.name))
    weights = sum(np.prod(layer.weight_shape) for layer in models.layers(PLAIN))
    width = {8: 1, 12: 2, None: 4}[bits]
    assert path.stat().st_size < width * weights + 40_000, "codes in as few bytes as hold them"


def state(seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"conv.weight": (16, 8, 3, 3), "fc.weight": (10, 16), "fc.bias": (10,), "scale": (16,)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def step(qp):
    """ISO/IEC 15938-17, with a density of 2: 4 more double it."""
    return (4 + qp % 4) * 2.0 ** (qp // 4 - 2)


@pytest.mark.parametrize("settings", [None, {"use_dq": False, "nonweight_qp": -70}], ids=["best", "own"])
def test_nncodec_is_told_its_settings(sources, tmp_path, monkeypatch, settings):
    """Needs nothing of NNCodec's: what its process is given, and what the file is called."""
    from nnc_utils.peers import nncodec

    told = []

    def run(order, arrays, wanted, target):
        told.append((order, json.loads(wanted.read_text()), dict(np.load(arrays))))

    monkeypatch.setattr(nncodec, "_run", run)
    source = sources / "fp32.safetensors"
    path = peers.make("nncodec", source, None, tmp_path, qp=-20, settings=settings)
    [(order, wanted, arrays)] = told
    assert order == "encode" and wanted == {"qp": -20, **(settings or nncodec.BEST)}
    assert ("use_dq=False" in path.name) == bool(settings) and "qp-20" in path.name
    weights = artifact.load(source).state_dict()
    np.testing.assert_array_equal(arrays["conv1.weight"], weights["conv1.weight"].numpy())
    factor = weights["bn1.weight"] / (weights["bn1.running_var"] + 1e-5).sqrt()
    np.testing.assert_allclose(arrays["bn1.weight"], factor.numpy(), rtol=1e-6)
    assert "bn1.running_var" not in arrays


@pytest.mark.parametrize("qp", [-30, -13])
def test_nncodec_rounds_to_multiples_of_its_step(tmp_path, qp):
    need("nncodec")
    from nnc_utils.peers import nncodec

    given, plain = state(), nncodec.DEFAULTS | {"use_dq": False}
    found = nncodec.decode(nncodec.encode(given, tmp_path / "a.nnc", qp=qp, settings=plain))
    assert {name: array.shape for name, array in found.items()} == {n: a.shape for n, a in given.items()}
    for name, array in given.items():
        unit = step(qp if array.ndim > 1 else plain["nonweight_qp"])
        rounded = np.round(array / unit) * unit
        assert np.abs(found[name] - rounded).max() < (1e-5 if array.ndim > 1 else unit)
    found = nncodec.decode(nncodec.encode(given, tmp_path / "b.nnc", qp=qp, settings=nncodec.DEFAULTS))
    error = np.abs(found["conv.weight"] - given["conv.weight"])
    # two quantizers take turns, each with a spacing of two steps
    assert error.max() < 2 * step(qp) and error.mean() < step(qp)


def test_nncodec_is_deterministic_and_repairs_batch_norm(sources, tmp_path):
    need("nncodec")
    from nnc_utils.peers import nncodec

    source, pictures = sources / "fp32.safetensors", images(PLAIN, 256, seed=3)
    first = peers.make("nncodec", source, None, tmp_path, qp=-14)
    again = first.read_bytes()
    assert peers.make("nncodec", source, None, tmp_path, qp=-14).read_bytes() == again
    second = peers.make("nncodec", source, pictures.numpy(), tmp_path, qp=-14, reestimate=True)
    assert second != first and second.read_bytes() != again
    before, after = nncodec.decode(first), nncodec.decode(second)
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same >= {f"{layer.name}.weight" for layer in models.layers(PLAIN)}
    assert not same & {"bn1.weight", "bn1.bias"}
    with torch.inference_mode():
        expected = artifact.load(source)(pictures).numpy()
    plain, repaired = (
        np.square(peers.load("nncodec", path, source).predict(pictures.numpy()) - expected).mean()
        for path in (first, second)
    )
    assert repaired < 0.8 * plain, "its images move batch-norm to where the decoded weights need it"


def test_nncodec_folds_batch_norm_without_changing_the_network(sources, tmp_path):
    need("nncodec")
    source, fine = sources / "fp32.safetensors", {"use_dq": True, "nonweight_qp": -70}
    path = peers.make("nncodec", source, None, tmp_path, qp=-60, settings=fine)
    pictures = images(PLAIN, 50)
    with torch.inference_mode():
        expected = artifact.load(source)(pictures).numpy()
    found = peers.load("nncodec", path, source).predict(pictures.numpy())
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_nncodec_says_what_is_wrong(sources, tmp_path):
    need("nncodec")
    from nnc_utils.peers import nncodec

    with pytest.raises(ValueError, match=r"count is int64 \(\): float32 of 1 or more dimensions is needed"):
        nncodec.encode({"count": np.array(3)}, tmp_path / "a.nnc", qp=-20)
    with pytest.raises(ValueError, match="at least 2 of shape"):
        few = images(PLAIN, 1).numpy()
        peers.make("nncodec", sources / "fp32.safetensors", few, tmp_path, qp=-20, reestimate=True)
    (tmp_path / "broken.nnc").write_bytes(b"nothing of the kind")
    with pytest.raises(RuntimeError, match="NNCodec could not decode; it said last"):
        nncodec.decode(tmp_path / "broken.nnc")
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'speed'"):
        nncodec.encode(state(), tmp_path / "a.nnc", qp=-20, settings={"speed": 1})
    assert not (tmp_path / "a.nnc").exists()


@pytest.mark.parametrize("kind", ["magnitude", "taylor", "bn_scale"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_torch_pruning_gives_a_narrower_network_within_the_budget(kind, everywhere):
    """What it keeps computes what the masked network computes: every kept filter is one of the given ones."""
    need("torch_pruning")
    spec = models.resnet(18, channels=1, size=8, classes=10, stem="small", width=0.25)
    model = network(spec)
    pictures, labels = images(model.spec, 32), torch.arange(32) % 10
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner, budget = peers.peer("torch_pruning"), models.macs(model.spec) / 3
    about = {"images": pictures, "labels": labels, "everywhere": everywhere}
    narrow = pruner.prune(model, kind, macs=budget, **about)
    assert 0.6 * budget < models.macs(narrow.spec) <= budget and not narrow.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.isfinite(narrow(pictures)).all()
    # one input channel: a filter of the first convolution is one of the given filters
    given = model.conv1.weight.detach().flatten(1)
    apart = torch.cdist(narrow.conv1.weight.detach().flatten(1), given).amin(1)
    assert (apart == 0).all()
    widths = [layer.out_channels for layer in models.layers(narrow.spec)]
    assert min(widths) >= 1 and (everywhere or len(set(widths)) > 4)


def test_torch_pruning_says_what_is_wrong():
    need("torch_pruning")
    model, pruner = network(PLAIN), peers.peer("torch_pruning")
    about = {"images": images(model.spec, 4), "labels": torch.arange(4)}
    with pytest.raises(ValueError, match="unknown importance 'l3': one of magnitude, taylor, bn_scale"):
        pruner.prune(model, "l3", macs=1e5, **about)
    with pytest.raises(ValueError, match="10 are wanted: allow more"):
        pruner.prune(model, "magnitude", macs=10, **about)
