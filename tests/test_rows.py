"""Rows, against numbers computed by hand or with other code."""

import csv
import re
import types

import numpy as np
import pytest
from pydantic import ValidationError
from result_files import read, timed_twice, times

from nnc_utils import results, rows, tables

# the measurement protocol's tables, copied by hand
COMPRESSION = """profile, run, dataset, model, technique, method, point, seed, division, control, headline,
simulated, params, nonzeros, macs, artifact_bytes, size_ratio, bits_per_weight, correct, total, accuracy,
accuracy_delta, delta_ci_low, delta_ci_high, reference_sha256, train_images, train_seconds, artifact_sha256,
commit"""


LATENCY = """profile, run, dataset, model, technique, method, point, seed, control, headline, runtime,
precision, stored_codes, batch, threads, rounds, p50_ms, p90_ms, iqr_ms, throughput, accuracy, agreement,
speedup_eager_fp32, speedup_best_fp32, peak_rss_mb, load_ms, runtime_bytes, artifact_sha256, commit,
rounds_p50_ms"""  # the last is ours: the ratios are medians over rounds


SUMMARY = """dataset, technique, method, point, control, seeds, headline, division, accuracy_mean,
accuracy_sd, delta_mean, delta_ci_low, delta_ci_high, no_loss, size_ratio, artifact_bytes, params, macs"""


@pytest.mark.parametrize(
    ("name", "kind", "columns"),
    [
        ("compression", results.CompressionRow, COMPRESSION),
        ("latency", results.LatencyRow, LATENCY),
        ("summary", results.SummaryRow, SUMMARY),
    ],
)
def test_the_columns_are_the_protocols(example, name, kind, columns):
    columns = re.split(r",\s*", columns)
    assert kind.columns() == columns
    with open(example.root / f"results/quick/{name}.csv", newline="") as stream:
        assert next(csv.reader(stream)) == columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 10.1}, "is not"),
        ({"correct": 500}, "500 correct of 400"),
        ({"accuracy_delta": 3.0}, "outside its interval"),
        ({"division": "half"}, "division"),
        ({"technique": "magic"}, "technique"),
        ({"nonzeros": 10**9}, "non-zeros"),
        ({"artifact_sha256": "abc"}, "artifact_sha256"),
        ({"size_ratio": float("nan")}, "size_ratio"),
        ({"note": "new"}, "note"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(example, changes, message):
    good = read(example.root / "results/quick/compression.csv")[0]
    assert results.CompressionRow.from_csv(good).seed == 1
    with pytest.raises(ValidationError, match=message):
        results.CompressionRow.from_csv(good | changes)


def test_latency_rows_are_measured_or_empty_as_a_whole(example):
    good = read(example.root / "results/quick/latency.csv")[0]
    empty = dict.fromkeys(("p50_ms", "p90_ms", "iqr_ms", "throughput", "accuracy", "agreement"), "")
    assert results.LatencyRow.from_csv(good | empty).p50_ms is None
    for changes in ({"p90_ms": ""}, {"p90_ms": "0.1"}, {"artifact_sha256": ""}):
        with pytest.raises(ValidationError):
            results.LatencyRow.from_csv(good | changes)


def test_compression_row_is_what_the_predictions_say(example, monkeypatch):
    reference, score = example.scores["01_baseline", 1], example.scores["02_quantization", 1]
    run = types.SimpleNamespace(profile="quick", name="quick/n/seed=1", seed=1)
    names = {"run": run, "dataset": "digits", "model": "m", "technique": "quantization", "method": "u"}
    row = rows.compression_row(score, reference=reference, **names)
    right, before = (np.load(s["predictions"]) == example.labels for s in (score, reference))
    assert row.correct == right.sum() and row.total == 400
    assert row.accuracy_delta == pytest.approx(100 * (right.mean() - before.mean()), abs=1e-4)
    parameters_and_statistics = 4 * (score["params"] + 2 * 960 // 8 * 5)  # all of it is float32
    assert row.size_ratio * score["artifact_bytes"] == pytest.approx(parameters_and_statistics, rel=0.03)
    assert rows.compression_row(reference, **names).reference_sha256 == reference["sha256"]
    made = {"depth": 18, "width": 1 / 8, "stem": "small", "size": 0}
    made = types.SimpleNamespace(notebook="01_baseline", seed=1, parameters=made, dataset="digits")
    run.upstream = [types.SimpleNamespace(record=made)]
    elsewhere = reference | {"path": score["path"].parent / "not_here.safetensors"}
    assert rows.compression_row(score, reference=elsewhere, **names) == row
    monkeypatch.setattr(rows, "labels_of", lambda dataset: np.roll(example.labels, 1))
    with pytest.raises(ValueError, match="another data set"):
        rows.compression_row(score, reference=reference, **names)


def test_speedups_are_against_eager_and_the_fastest_fp32(example):
    found = {
        (r["method"], r["runtime"], r["precision"], r["batch"]): r
        for r in read(example.root / "results/quick/latency.csv")
    }
    row = found["uniform_per_channel", "onnxruntime", "int8", "1"]
    assert float(row["speedup_eager_fp32"]) == 4.0 / 0.5
    assert float(row["speedup_best_fp32"]) == 2.0 / 0.5
    assert float(found["train", "eager", "fp32", "64"]["speedup_best_fp32"]) == 0.5


def test_a_machine_that_is_slow_for_a_while_changes_no_speedup(example):
    """Of five rounds two or three were twice as slow, for whatever was timed in them."""
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    base, int8 = (example.scores[name, 1]["sha256"] for name in ("01_baseline", "02_quantization"))
    common = {"batch": 1, "threads": 1, "rounds": 5}
    for slow in ((1, 1, 1, 2, 2), (2, 1, 2, 1, 2)):
        measured = [
            {"artifact_sha256": base, "runtime": "eager", "precision": "fp32"},
            {"artifact_sha256": int8, "runtime": "onnxruntime", "precision": "int8"},
        ]
        for row, alone, own in zip(measured, (8.0, 1.0), ((1, 1, 1, 1, 1.3), (1.1, 1, 1, 1, 1)), strict=True):
            row |= {**times(*(alone * a * b for a, b in zip(slow, own, strict=True))), **common}
        built = rows.latency_rows(measured, networks, reference_sha256=base)
        assert [row["speedup_eager_fp32"] for row in built] == [1.0, 8.0]


def test_identity_and_absent_runtimes_get_no_speedup(example):
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    sha256 = example.scores["01_baseline", 1]["sha256"]
    common = {"precision": "fp32", "batch": 1, "threads": 1, "rounds": 5}
    measured = [
        {"artifact_sha256": sha256, "runtime": "eager", **times(2.0), **common},
        {"control": "identity", "runtime": "eager", **times(0.1), **common},
        {"artifact_sha256": sha256, "runtime": "openvino", **common},
    ]
    built = rows.latency_rows(measured, networks, reference_sha256=sha256)
    assert [row["speedup_eager_fp32"] for row in built] == [1.0, None, None]
    assert [row["control"] for row in built] == ["", "identity", ""]
    with pytest.raises(ValueError, match="no compression row"):
        rows.latency_rows([{"artifact_sha256": "0" * 64, **common}], networks, reference_sha256=sha256)


def test_what_was_timed_again_is_against_what_was_timed_again(example):
    built = timed_twice(example)
    found = {(r["control"], r["runtime"], r["precision"]): r for r in built}
    assert found["", "onnxruntime", "int8"]["speedup_eager_fp32"] == 8.0
    assert found["again", "onnxruntime", "int8"]["speedup_eager_fp32"] == 20.0
    assert found["again", "onnxruntime", "int8"]["speedup_best_fp32"] == 5.0
    assert {r["headline"] for r in built if r["control"] == "again"} == {0}


def test_a_runs_name_says_its_notebook():
    assert rows.run_name("quick", "03_pruning", 2, "channels") == "quick/03_pruning/seed=2,channels"
    assert rows.notebook_of(rows.run_name("full", "06_pipeline", 1)) == "06_pipeline"
