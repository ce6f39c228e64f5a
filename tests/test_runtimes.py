import gc
import importlib
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from small_networks import ODD, PLAIN, POOLED, artifact_of, images, network, quantized, saved, without_pair

from nnc_utils import artifact, models, provenance, runtimes
from nnc_utils.models import BlockSpec, Spec
from nnc_utils.quantization import activations, uniform
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes import worker as worker_module
from nnc_utils.runtimes.children import ChildError
from nnc_utils.runtimes.worker import Worker, peak_rss, worker

INT8 = [name for name in runtimes.NAMES if name != "eager"]
# six convolutions, two adds, and more than 16 inputs of the classifier, which Inductor wants
TINY = Spec(
    *(1, 8, 10, "small_stride2", 8, "basic"),
    ((BlockSpec((8, 20), (3, 3), 2, "projection"), BlockSpec((12, 20), (3, 3))),),
)


@pytest.fixture
def stored(tmp_path):
    return saved(quantized(network(TINY)), tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(runtime, precision, threads) -> a session of the same file, which is converted once."""
    folder, files = tmp_path_factory.mktemp("runtimes"), {}
    saved(quantized(network(TINY)), folder / "a.safetensors")

    def load(name, precision, threads=1):
        if why := runtimes.available(name, precision):
            pytest.skip(f"{name} {precision}: {why}")
        if (name, precision) not in files:
            source = folder / "a.safetensors"
            files[name, precision] = runtimes.convert(name, source, precision, folder)
        return runtimes.adapter(name).load(files[name, precision], precision, threads)

    load.artifact, load.files = artifact.read(folder / "a.safetensors"), files
    return load


@pytest.mark.parametrize("name", runtimes.NAMES)
def test_fp32_rounds_no_activation(name, opened):
    model = artifact.network(opened.artifact)
    for place in models.activations(model).values():
        place.scale = None
    for threads in (1, 2):
        session = opened(name, "fp32", threads)
        for count in (1, 9, 70):  # Inductor and ExecuTorch make them up of smaller batches
            pictures = images(TINY, count)
            with torch.inference_mode():
                expected = model(pictures).numpy()
            found = session.predict(pictures.numpy())
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            assert found.dtype == np.float32 and session.threads == threads


@pytest.mark.parametrize("name", INT8)
def test_int8_computes_with_the_same_integers_everywhere(name, opened):
    session = opened(name, "int8")
    qdq.check_integer(TINY, session.integer_operators, runtimes.adapter(name).INTEGER)
    assert {"conv", "linear"} <= set(runtimes.adapter(name).INTEGER)
    assert not [kind for kind in session.integer_operators if kind.startswith("float")]
    pictures = images(TINY, 66)
    with torch.inference_mode():
        eager = artifact.network(opened.artifact)(pictures).numpy()
    found = session.predict(pictures.numpy())
    assert np.abs(found - eager).max() < 0.05 * np.abs(eager).max()
    assert (found.argmax(1) == eager.argmax(1)).mean() > 0.97


@pytest.mark.parametrize(
    ("name", "exact", "coarse", "least", "most"),
    [("onnxruntime", "int8", "s8s8", 0, 0.02), ("openvino", "fp32", "bf16", 1e-4, 0.1)],
)
def test_other_kernels_differ_by_rounding(opened, name, exact, coarse, least, most):
    """And OpenVINO computes in bf16 only where it is asked to."""
    one, other = opened(name, exact), opened(name, coarse)
    assert one.integer_operators == other.integer_operators
    pictures = images(TINY, 20).numpy()
    expected = one.predict(pictures)
    assert least <= np.abs(other.predict(pictures) - expected).max() / np.abs(expected).max() < most


@pytest.mark.parametrize("name", ["inductor", "openvino", "executorch"])
def test_one_missing_pair_is_seen(name, stored, monkeypatch):
    """Without the rounding of one tensor, what reads it and what writes it is no integer operator."""
    if why := runtimes.available(name, "int8"):
        pytest.skip(why)
    lost = "layer1.0.quant1"
    if name == "openvino":
        model = without_pair(qdq.onnx_model(stored, "int8"), lost)
        monkeypatch.setattr(qdq, "onnx_model", lambda *_: model)
    else:
        from nnc_utils.runtimes import exported

        monkeypatch.setattr(runtimes.adapter(name), "BATCHES", (1,), raising=False)
        for part in ("_quantize", "_dequantize"):
            whole = getattr(exported.Network, part)

            def without(self, tensor, name, whole=whole):
                return tensor if name == lost else whole(self, tensor, name)

            monkeypatch.setattr(exported.Network, part, without)
    with pytest.raises(RuntimeError, match="not an int8 network"):
        runtimes.prepare(name, stored, "int8", 1)


@pytest.mark.parametrize("name, spec", [("openvino", ODD), ("openvino", POOLED), ("executorch", ODD)])
def test_other_networks_run_in_integers_too(name, spec):
    if why := runtimes.available(name, "int8"):
        pytest.skip(why)
    stored = artifact_of(spec)
    pictures = images(spec, 70)
    found = runtimes.prepare(name, stored, "int8", 1).predict(pictures.numpy())
    with torch.inference_mode():
        eager = artifact.network(stored)(pictures).numpy()
    # a rounding that falls on the other side moves on through the layers
    assert np.abs(found - eager).max() < 0.005 * len(models.layers(spec)) * np.abs(eager).max()


@pytest.mark.parametrize("name", ["onnxruntime", "executorch"])
def test_channels_of_zeros_run_in_integers(name, tmp_path):
    """Their batch-norm has seen nothing but zeros since they were pruned, and divides by √ε."""
    if why := runtimes.available(name, "int8"):
        pytest.skip(why)
    model = network(TINY)
    block = model.layer1[0]
    for channel, bias in ((3, 0.5), (4, 0.0)):
        block.conv1.weight.data[channel] = 0
        block.bn1.running_mean[channel] = block.bn1.running_var[channel] = 0
        block.bn1.weight.data[channel], block.bn1.bias.data[channel] = 1, bias
    model = uniform.quantize_network(model, bits=7, per_channel=True)
    stored = saved(activations.calibrate(model, images(TINY, 128)), tmp_path / "a.safetensors")
    pictures = images(TINY, 66)
    with torch.inference_mode():
        eager = artifact.network(stored)(pictures).numpy()
    found = runtimes.prepare(name, stored, "int8", 1).predict(pictures.numpy())
    assert np.abs(found - eager).max() < 0.05 * np.abs(eager).max()


def test_executorch_sessions_of_several_numbers_of_threads_take_turns(opened):
    sessions = [opened("executorch", "int8", threads) for threads in (1, 2, 1)]
    pictures = images(TINY, 3).numpy()
    expected = sessions[0].predict(pictures)
    for session in 4 * sessions:
        np.testing.assert_array_equal(session.predict(pictures), expected)
        assert session.threads == session._threads


def test_openvino_starts_no_process_that_stays(tmp_path):
    if why := runtimes.available("openvino"):
        pytest.skip(why)
    with worker("openvino", tmp_path) as process:
        process.ask("identity", key="k", shape=[1, 8], threads=1, folder=str(tmp_path))
        assert psutil.Process(process.process.pid).children(recursive=True) == []


def test_executorch_holds_the_codes_of_the_file(opened):
    opened("executorch", "int8")
    from executorch.exir._serialize._program import deserialize_pte_binary

    from nnc_utils.runtimes import executorch

    content = deserialize_pte_binary(opened.files["executorch", "int8"].read_bytes())
    graph = executorch.xnnpack_graph(content.program.backend_delegate_data[0].data)
    stored = content.named_data.pte_data
    found = []
    for node in (n["xnode_union"] for n in graph["xnodes"] if "filter_id" in n["xnode_union"]):
        tensor = graph["xvalues"][node["filter_id"]]["xvalue_union"]["tensor_value"]
        key = graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"]
        codes = np.frombuffer(content.named_data.buffers[stored[key].buffer_index], np.int8)
        found.append(codes[: np.prod(tensor["dims"])].reshape(tensor["dims"]))
    layers = models.layers(TINY)
    depthwise = {layer.name for layer in layers if layer.in_channels == 1}  # its channels come last
    order = [step.name for step in qdq.steps(TINY) if step.layer is not None]
    assert len(found) == len(layers)
    lowered = qdq.lower(opened.artifact).layers
    for name, codes in zip(order, found, strict=True):
        codes = np.moveaxis(codes, -1, 0) if name in depthwise else codes
        ours = opened.artifact.weights[name].codes.abs().flatten(1).sort().values
        theirs = np.sort(np.abs(codes.reshape(len(ours), -1).astype(int)), axis=1)
        kept = lowered[name].codes.flatten(1).any(1).numpy()  # but where batch-norm's scale is 0
        assert kept.mean() > 0.8
        np.testing.assert_array_equal(theirs[kept], ours.numpy()[kept])


def test_int8_counts_bytes_and_a_profile(stored):
    session = runtimes.prepare("onnxruntime", stored, "int8", 2)
    assert session.integer_operators == {"conv": 6, "add": 2, "linear": 1, "average_pool": 1}
    profile = session.profile(images(TINY, 1).numpy(), runs=5)
    calls = {"QLinearConv": 6, "QLinearAdd": 2, "QGemm": 1}
    assert {name: round(profile[name]["calls"], 6) for name in calls} == calls
    assert all(entry["ms"] >= 0 for entry in profile.values())
    assert session.runtime_bytes == len(qdq.onnx_model(stored, "int8").SerializeToString())
    assert session.threads == 2
    weights = sum(w.codes.numel() for w in stored.weights.values())
    assert weights < session.runtime_bytes < 4 * weights


def test_prepare_refuses_int8_that_runs_in_floats(stored, monkeypatch):
    whole = qdq.onnx_model(stored, "fp32")
    monkeypatch.setattr(qdq, "onnx_model", lambda *_: whole)
    with pytest.raises(RuntimeError, match="not an int8 network"):
        runtimes.prepare("onnxruntime", stored, "int8", 1)


def test_wide_codes_do_not_saturate_a_sum(tmp_path):
    """Products of one sign, each near 255 * 127: two of them are beyond 16 bits."""
    bright = torch.full((4, PLAIN.channels, PLAIN.size, PLAIN.size), 2.0)
    logits = {}
    for bits in (8, 7):
        model = network(PLAIN)
        with torch.no_grad():
            for layer in (model.conv1, model.layer1[0].conv1):
                layer.weight.fill_(0.5)
        file = saved(quantized(model, bits=bits), tmp_path / f"{bits}.safetensors")
        with torch.inference_mode():
            eager = artifact.network(file)(bright).numpy()
        session = runtimes.prepare("onnxruntime", file, "int8", 1)
        error = session.predict(bright.numpy()) - eager
        logits[bits] = np.abs(error).max() / np.abs(eager).max()
    assert logits[7] < 0.05 and logits[8] < 0.05


@pytest.mark.parametrize("lacks", [True, False])
def test_exact_sums_are_asked_for_where_the_processor_lacks_vnni(stored, monkeypatch, lacks):
    adapter = runtimes.adapter("onnxruntime")
    monkeypatch.setattr(adapter, "_may_saturate", lambda: lacks)
    options = runtimes.prepare("onnxruntime", stored, "int8", 1)._session.get_session_options()
    if lacks:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry("session.x64quantprecision")
    monkeypatch.undo()
    flags = provenance.hardware()["flags"]
    assert adapter._may_saturate() == (not {"avx512_vnni", "avx_vnni"} & set(flags))


@pytest.mark.parametrize("name", runtimes.NAMES)
def test_identity_gives_its_input_back(name, tmp_path, monkeypatch):
    if why := runtimes.available(name):
        pytest.skip(why)
    if name == "inductor":  # its programs compile for seconds
        monkeypatch.setattr(runtimes.adapter(name), "BATCHES", (1,))
    pictures = images(ODD, 3).numpy()
    for _ in range(2):  # made, then found
        session = runtimes.identity(name, (ODD.channels, ODD.size), 1, tmp_path)
        np.testing.assert_array_equal(session.predict(pictures), pictures)
    assert len(list(tmp_path.iterdir())) == {"eager": 0, "openvino": 2}.get(name, 1)


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_converted_file_is_the_prepared_network(name, stored, tmp_path):
    if why := runtimes.available(name):
        pytest.skip(why)
    module = runtimes.adapter(name)
    pictures = images(TINY, 4).numpy()
    for precision in module.PRECISIONS:
        if runtimes.available(name, precision):
            continue
        file = runtimes.convert(name, tmp_path / "a.safetensors", precision, tmp_path)
        session = module.load(file, precision, 1)
        assert session.runtime_bytes == sum(part.stat().st_size for part in runtimes.files(name, file))
        prepared = runtimes.prepare(name, stored, precision, 1)
        np.testing.assert_array_equal(session.predict(pictures), prepared.predict(pictures))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_a_missing_library_is_said_not_raised(name, monkeypatch):
    assert runtimes.available("eager") == runtimes.available("onnxruntime") == ""
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails now
    monkeypatch.delitem(sys.modules, f"nnc_utils.runtimes.{name}", raising=False)
    monkeypatch.delattr(runtimes, name, raising=False)
    assert runtimes.available(name) == "not installed"
    with pytest.raises(ImportError):
        importlib.import_module(f"nnc_utils.runtimes.{name}")


def test_inductor_says_what_it_lacks(monkeypatch):
    from nnc_utils.runtimes import inductor

    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    assert "no C++ compiler" in runtimes.available("inductor", "fp32")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", None)
    assert runtimes.available("inductor", "int8") == "torchao is not installed"


def test_unknown_names_are_refused(stored):
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt': one of eager, inductor, onnxruntime"):
        runtimes.prepare("tensorrt", stored, "fp32", 1)
    with pytest.raises(ValueError, match="eager has no precision 'int8': one of fp32"):
        runtimes.prepare("eager", stored, "int8", 1)


# --- The worker ---------------------------------------------------------------------------------


def test_worker_holds_its_runtime_only_and_answers_errors(stored, tmp_path):
    file = runtimes.convert("onnxruntime", tmp_path / "a.safetensors", "int8", tmp_path)
    pictures = images(TINY, 10).numpy()
    np.save(tmp_path / "images.npy", pictures)
    with worker("onnxruntime") as process:
        loaded = process.ask("load", key="k", path=str(file), precision="int8", threads=1)
        assert loaded["threads"] == 1 and loaded["load_ms"] > 0
        files = {"key": "k", "images": str(tmp_path / "images.npy")}
        samples = process.ask("time", batch=64, seconds=0.05, **files)
        assert len(samples) >= 3 and min(samples) > 0
        process.ask("predict", batch=3, target=str(tmp_path / "p.npy"), **files)
        whole = runtimes.prepare("onnxruntime", stored, "int8", 1).predict(pictures).argmax(1)
        np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), whole)
        # PyTorch alone would take more than this.
        assert 20 < process.ask("memory") < 150
        with pytest.raises(ChildError, match="could not load: .*nothing.onnx"):
            process.ask("load", key="k", path="nothing.onnx", precision="int8", threads=1)


class Slow:
    """A session that notes what each call saw."""

    def __init__(self, threads=1, seconds=0.0):
        self.threads, self.seconds, self.times, self.collecting = threads, seconds, [], []

    def predict(self, inputs):
        self.times.append(time.perf_counter())
        self.collecting.append(gc.isenabled())
        time.sleep(self.seconds)


def timed(folder, session, seconds):
    np.save(folder / "x.npy", np.zeros((2, 1, 2, 2), np.float32))
    process = Worker("eager")
    process._sessions["a"] = session
    return process.time(key="a", images=str(folder / "x.npy"), batch=1, seconds=seconds)


@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_a_visit_warms_up_and_collects_no_garbage(tmp_path, seconds):
    session = Slow(seconds=0.004)
    samples = timed(tmp_path, session, seconds)
    warm = len(session.times) - len(samples)
    assert warm >= 1 and session.times[warm] - session.times[0] >= seconds / 10
    assert len(samples) >= worker_module.FEWEST and min(samples) >= 4e6
    assert session.collecting == [True] * warm + [False] * len(samples) and gc.isenabled()


@pytest.mark.parametrize(("threads", "seconds"), [(1, 0.01), (2, 0.01), (2, 0.0)])
def test_several_threads_get_time_to_spread(tmp_path, monkeypatch, threads, seconds):
    monkeypatch.setattr(worker_module, "SPREAD", 0.3)
    session = Slow(threads)
    samples = timed(tmp_path, session, seconds)
    warming = session.times[-len(samples)] - session.times[0]
    assert (warming >= 0.3) == (threads > 1 and seconds > 0)


def test_worker_that_dies_tells_its_last_words():
    with worker("nothing") as process, pytest.raises(ChildError, match="unknown runtime 'nothing'"):
        process.ask("memory")


def test_peak_rss_is_this_processs_own():
    code = "from nnc_utils.runtimes.worker import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < psutil.Process().memory_info().rss <= peak_rss() * 1.05


def test_worker_dies_with_its_parent_in_the_middle_of_an_order(tmp_path):
    np.save(tmp_path / "images.npy", images(TINY, 2).numpy())
    order = {"key": "k", "images": str(tmp_path / "images.npy"), "batch": 1, "seconds": 600}
    code = f"""
from nnc_utils.runtimes.children import Child
process = Child("nnc_utils.runtimes.worker", "onnxruntime")
process.ask("identity", key="k", shape=[1, 8], threads=1, folder={str(tmp_path)!r})
print(process.process.pid, flush=True)
process.ask("time", **{order!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
