"""Times in a browser: ratios of the same rounds, other ways to write the same integers, the page's table."""

import shutil
import sys

import numpy as np
import onnxruntime as ort
import pandas as pd
import pytest
from test_web import CHROMIUM

from nnc_utils import artifact, data, provenance, web
from nnc_utils.runtimes import qdq

sys.path.insert(0, str(provenance.PACKAGE.parent / "workflow"))
import web_speed  # noqa: E402

DOCS = provenance.PACKAGE.parent / "docs"


def test_a_ratio_is_that_of_the_rounds():
    def network(label, precision):
        return {
            "label": label,
            "precision": precision,
            "bytes": 2e6,
            "gzip_bytes": 1e6,
            "artifact_sha256": "a",
        }

    networks = [network("base", "fp32"), network("small", "fp32"), network("small", "int8")]
    # the machine is twice as slow in the second round, and once more in the third
    measured = web_speed.rows(networks, [[10, 20, 40], [4, 8, 16], [1, 2, 8]])
    assert measured["p50_ms"].tolist() == [20, 8, 2]
    assert measured["times_own_fp32"].tolist() == [1, 1, 4]
    assert measured["times_first"].tolist() == [1, 2.5, 10]
    text = web_speed.text(measured.assign(browser="B 1", runtime="2", cpu="C"))
    assert "| small" in text and "the most here is 4.0 and 10.0." in text


def test_other_ways_compute_what_int8_computes(trained_digits):
    stored, digits = artifact.read(trained_digits / "int8.safetensors"), data.load("digits")
    images = data.normalize(digits.test.images, stored.mean, stored.std).numpy()

    def logits(model):
        return ort.InferenceSession(model.SerializeToString()).run(None, {"images": images})[0]

    expected = logits(qdq.onnx_model(stored, "int8"))
    for way, (graph, _) in web_speed.WAYS.items():
        model = graph(stored)
        assert np.abs(logits(model) - expected).max() < 0.02 * np.abs(expected).max(), way
        operators = {node.op_type for node in model.graph.node}
        assert ("QLinearConv" in operators) == (way == "int8, pairs folded")
    unsigned = web_speed.unsigned_weights(qdq.onnx_model(stored, "int8"))
    kinds = {
        tensor.data_type for tensor in unsigned.graph.initializer if tensor.name.endswith("weight.codes")
    }
    assert kinds == {2}  # uint8


def test_the_page_says_what_was_measured():
    measured = pd.read_csv(DOCS / "browser.csv")
    assert web_speed.text(measured) in (DOCS / "browser.md").read_text(encoding="utf-8")
    ways = measured.set_index(["network", "numbers"])["p50_ms"]
    for network in set(measured["network"][measured["numbers"] == "int8"]):
        int8, ways_of = ways[network]["int8"], ways[network]
        assert ways_of["int8, S8 activations"] > 3 * int8  # "far slower"
        others = [ways_of[way] for way in web_speed.WAYS if way != "int8, S8 activations"]
        assert min(others) > 0.9 * int8  # "no faster"


@pytest.mark.slow
def test_the_command_writes_table_and_page(trained_digits, tmp_path, monkeypatch, capsys):
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None or not shutil.which("npm"):
        pytest.skip("no Chromium or no npm here")
    shutil.copy(DOCS / "browser.md", tmp_path)
    files = [f"{name}={trained_digits / name}.safetensors" for name in ("base", "int8")]
    monkeypatch.setattr(sys, "argv", ["web_speed", *files, "--ways", "--rounds", "3", "--out", str(tmp_path)])
    assert web_speed.main() == 0
    measured = pd.read_csv(tmp_path / "browser.csv")
    assert measured["numbers"].tolist() == ["fp32", "fp32", "int8", *web_speed.WAYS]
    assert (measured["rounds"] == 3).all() and (measured["p50_ms"] > 0).all()
    page = (tmp_path / "browser.md").read_text(encoding="utf-8")
    assert web_speed.text(measured) in page and page.count("## ") == 3 and web.VERSION in page
    assert web_speed.text(measured) in capsys.readouterr().out
