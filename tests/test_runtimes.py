import importlib
import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from small_networks import ODD, PLAIN, images, network, quantized, saved

from nnc_utils import artifact, runtimes
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.children import ChildError, worker
from nnc_utils.runtimes.worker import peak_rss


@pytest.fixture
def stored(tmp_path):
    return saved(quantized(network(PLAIN)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", runtimes.NAMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_fp32_rounds_no_activation(name, threads, stored):
    session = runtimes.prepare(name, stored, "fp32", threads)
    model = artifact.network(stored)
    for place in [m for m in model.modules() if hasattr(m, "zero_point")]:
        place.scale = None
    pictures = images(PLAIN, 9)
    with torch.inference_mode():
        expected = model(pictures).numpy()
    found = session.predict(pictures.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == np.float32 and session.threads == threads


def test_int8_counts_and_bytes(stored):
    session = runtimes.prepare("onnxruntime", stored, "int8", 2)
    assert session.integer_operators == {"conv": 20, "add": 8, "linear": 1, "average_pool": 1}
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
        asked = session._session.get_session_options().get_session_config_entry("session.x64quantprecision")
        assert asked == "1"  # processors with VNNI need none of it
        error = session.predict(bright.numpy()) - eager
        logits[bits] = np.abs(error).max() / np.abs(eager).max()
    assert logits[7] < 0.05 and logits[8] < 0.05


@pytest.mark.parametrize("name", runtimes.NAMES)
def test_identity_gives_its_input_back(name):
    pictures = images(ODD, 3).numpy()
    np.testing.assert_array_equal(
        runtimes.adapter(name).identity((ODD.channels, ODD.size), 1).predict(pictures), pictures
    )


@pytest.mark.parametrize("name", runtimes.NAMES)
def test_a_converted_file_is_the_prepared_network(name, stored, tmp_path):
    module = runtimes.adapter(name)
    pictures = images(PLAIN, 4).numpy()
    for precision in module.PRECISIONS:
        file = module.convert(tmp_path / "a.safetensors", precision, tmp_path)
        session = module.load(file, precision, 1)
        assert session.runtime_bytes == file.stat().st_size
        prepared = module.prepare(stored, precision, 1)
        np.testing.assert_array_equal(session.predict(pictures), prepared.predict(pictures))


def test_a_missing_library_is_said_not_raised(monkeypatch):
    assert runtimes.available("eager") == runtimes.available("onnxruntime") == ""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it fails now
    monkeypatch.delitem(sys.modules, "nnc_utils.runtimes.onnxruntime", raising=False)
    monkeypatch.delattr(runtimes, "onnxruntime", raising=False)
    assert runtimes.available("onnxruntime") == "not installed"
    with pytest.raises(ImportError):
        importlib.import_module("nnc_utils.runtimes.onnxruntime")


def test_unknown_names_are_refused(stored):
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt': one of eager, onnxruntime"):
        runtimes.prepare("tensorrt", stored, "fp32", 1)
    with pytest.raises(ValueError, match="eager has no precision 'int8': one of fp32"):
        runtimes.prepare("eager", stored, "int8", 1)


# --- The worker ---------------------------------------------------------------------------------


def test_worker_holds_its_runtime_only_and_answers_errors(stored, tmp_path):
    from nnc_utils.runtimes import onnxruntime

    file = onnxruntime.convert(tmp_path / "a.safetensors", "int8", tmp_path)
    pictures = images(PLAIN, 10).numpy()
    np.save(tmp_path / "images.npy", pictures)
    with worker("onnxruntime") as process:
        loaded = process.ask("load", key="k", path=str(file), precision="int8", threads=1)
        assert loaded["threads"] == 1 and loaded["load_ms"] > 0
        files = {"key": "k", "images": str(tmp_path / "images.npy")}
        samples = process.ask("time", batch=64, seconds=0.05, **files)
        assert len(samples) >= 3 and min(samples) > 0
        process.ask("predict", batch=3, target=str(tmp_path / "p.npy"), **files)
        whole = onnxruntime.prepare(stored, "int8", 1).predict(pictures).argmax(1)
        np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), whole)
        # PyTorch alone would take more than this.
        assert 20 < process.ask("memory")["peak_rss_mb"] < 150
        with pytest.raises(ChildError, match="could not load: .*nothing.onnx"):
            process.ask("load", key="k", path="nothing.onnx", precision="int8", threads=1)


def test_worker_that_dies_tells_its_last_words():
    with worker("nothing") as process, pytest.raises(ChildError, match="unknown runtime 'nothing'"):
        process.ask("memory")


def test_peak_rss_is_this_processs_own():
    code = "from nnc_utils.runtimes.worker import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < psutil.Process().memory_info().rss <= peak_rss() * 1.05


def test_worker_dies_with_its_parent_in_the_middle_of_an_order(tmp_path):
    np.save(tmp_path / "images.npy", images(PLAIN, 2).numpy())
    order = {"key": "k", "images": str(tmp_path / "images.npy"), "batch": 1, "seconds": 600}
    code = f"""
from nnc_utils.runtimes.children import Child
process = Child(["nnc_utils.runtimes.worker", "onnxruntime"])
process.ask("identity", key="k", shape=[1, 8], threads=1)
process._process.stdin.write('{json.dumps({"order": "time", **order})}' + "\\n")
process._process.stdin.flush()
print(process._process.pid, flush=True)
process.answer()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
