"""Which networks are timed in which runtimes."""

from types import SimpleNamespace

import pandas as pd
import pytest
from small_networks import PLAIN, network, quantized, saved

from bench import latency
from nnc_utils import models, runtimes
from nnc_utils.configurations import ConfigurationError

INT8, NARROW = {"method": "uniform", "bits": 7}, {"method": "channels", "macs": 4}
MASKED, STAGE = {"method": "weights", "sparsity": 0.9}, {"method": "pipeline", "macs": 6, "lambda_": 1e-9}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Upstream has a network in fp32 and in 7 bits, a narrow one, a masked one, and one behind a stage."""
    folder = tmp_path_factory.mktemp("timed")
    narrow = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.0625)
    built = {"dense": network(PLAIN), "masked": network(PLAIN, seed=1), "int8": quantized(network(PLAIN))}
    built |= {
        "narrow": network(narrow),
        "stage": network(narrow, seed=1),
        "claim": quantized(network(narrow)),
    }
    shas = {name: saved(model, folder / f"{name}.safetensors").sha256 for name, model in built.items()}
    paths = {sha256: folder / f"{name}.safetensors" for name, sha256 in shas.items()}

    def row(name, control="", headline=0):
        return SimpleNamespace(artifact_sha256=shas[name], control=control, headline=headline, seed=1)

    known = {"int8": row("int8"), "narrow": row("narrow"), "masked": row("masked")}
    known |= {"stage": row("stage", "after_prune"), "claim": row("claim", headline=1)}
    run = SimpleNamespace(artifact=paths.get, compression=[*known.values()])
    named = {"uniform": "int8", "channels": "narrow", "weights": "masked"}

    def rows_of(configuration, stage=""):
        name = {"prune": "stage", "distill": "claim"}.get(stage) or named.get(configuration.method)
        return [(run, known[name])] if name and configuration.settings.get("bits") != 3 else []

    baseline = SimpleNamespace(baseline=row("dense"), artifact=lambda name: paths[shas["dense"]])
    return SimpleNamespace(
        baseline=baseline, rows_of=rows_of, run=SimpleNamespace(upstream=[run]), seed=1, extra={}
    )


def test_narrow_networks_run_everywhere_others_in_onnx_runtime(bench, monkeypatch):
    monkeypatch.setattr(runtimes, "available", lambda *_: "not installed")
    mappings = [
        INT8,
        NARROW,
        MASKED,
        STAGE | {"stage": "prune"},
        STAGE | {"stage": "distill"},
    ]  # one pipeline
    timing = latency.Timing(bench, mappings, ["eager", "inductor", "onnxruntime", "openvino"])
    asked = {}
    for r in timing.requests():
        asked.setdefault((r["path"].stem, r["precision"]), []).append(r["runtime"])
    everywhere = ["eager", "inductor", "onnxruntime", "openvino"]
    assert asked == {
        ("dense", "fp32"): everywhere, ("dense", "bf16"): ["openvino"], ("int8", "int8"): everywhere,
        ("narrow", "fp32"): ["eager", "onnxruntime", "openvino"], ("masked", "fp32"): ["onnxruntime"],
        ("stage", "fp32"): ["onnxruntime"], ("claim", "int8"): ["eager", "onnxruntime", "openvino"],
        ("int8", "s8s8"): ["onnxruntime"],
    }  # fmt: skip


def test_all_faults_are_named_before_any_work(bench):
    with pytest.raises(ConfigurationError) as caught:
        latency.Timing(bench, [INT8 | {"bits": 3}, STAGE], ["eager", "tensorrt"])
    for fault in (
        "unknown runtime tensorrt: one of eager",
        'no upstream run has uniform {"bits":3}',
        "pipeline",
    ):
        assert fault in str(caught.value).replace(": 3", ":3")


def test_a_table_shows_each_network_once():
    row = {"batch": 1, "threads": 1, "p50_ms": 2.0, "control": "", "runtime": "eager", "precision": "fp32"}
    row |= {"method": "uniform", "settings": '{"bits": 7}'}
    others = [{"batch": 8}, {"threads": 2}, {"p50_ms": None}, {"control": "again"}, {"control": "identity"}]
    shown = latency.show(pd.DataFrame([row, *(row | other for other in others)]), {"p50_ms": "ms"})
    assert shown.to_dict("list") == {"where": ["eager fp32"], "ms": [2.0]} and "7-bit" in shown.index[0]
