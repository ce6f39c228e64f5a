"""Rows, against numbers computed by hand or with other code."""

import csv
import re
import types

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from result_files import read, timed_twice, times

from bench import tables
from nnc_utils import rows

# the measurement protocol's tables, copied by hand
COMPRESSION = """profile, run, dataset, model, technique, method, settings, seed, division, control, headline,
simulated, params, nonzeros, macs, artifact_bytes, size_ratio, bits_per_weight, correct, total, accuracy,
accuracy_delta, delta_ci_low, delta_ci_high, reference_sha256, train_images, train_seconds, artifact_sha256,
commit"""
LATENCY = """profile, run, dataset, model, technique, method, settings, seed, control, headline, runtime,
precision, stored_codes, batch, threads, rounds, p50_ms, p90_ms, iqr_ms, throughput, accuracy, agreement,
speedup_eager_fp32, speedup_best_fp32, peak_rss_mb, load_ms, runtime_bytes, artifact_sha256, commit,
rounds_p50_ms"""  # the last is ours: the ratios are medians over rounds
SUMMARY = """dataset, technique, method, settings, control, seeds, headline, division, accuracy_mean,
accuracy_sd, delta_mean, delta_ci_low, delta_ci_high, no_loss, size_ratio, artifact_bytes, params, macs"""
KINDS = {
    "compression": (rows.CompressionRow, COMPRESSION),
    "latency": (rows.LatencyRow, LATENCY),
    "summary": (rows.SummaryRow, SUMMARY),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_columns_are_the_protocols(example, name):
    kind, columns = KINDS[name]
    assert kind.columns() == re.split(r",\s*", columns)
    with open(example.root / f"results/quick/{name}.csv", newline="") as stream:
        assert next(csv.reader(stream)) == kind.columns()


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": 101},
        {"division": "half"},
        {"technique": "magic"},
        {"artifact_sha256": "abc"},
        {"size_ratio": float("nan")},
        {"note": "new"},
    ],
)
def test_a_row_outside_its_columns_is_refused(example, changes):
    good = read(example.root / "results/quick/compression.csv")[0]
    assert rows.CompressionRow.from_csv(good).seed == 1
    with pytest.raises(ValidationError, match=next(iter(changes))):
        rows.CompressionRow.from_csv(good | changes)


def test_latency_rows_are_measured_or_empty_as_a_whole(example):
    good = read(example.root / "results/quick/latency.csv")[0]
    empty = dict.fromkeys(("p50_ms", "p90_ms", "iqr_ms", "throughput", "accuracy", "agreement"), "")
    assert rows.LatencyRow.from_csv(good | empty).p50_ms is None
    for changes in ({"p90_ms": ""}, {"rounds": "4"}, {"artifact_sha256": ""}):
        with pytest.raises(ValidationError):
            rows.LatencyRow.from_csv(good | changes)


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
    asked = {"depth": 18, "width": 1 / 8, "stem": "small", "size": 0}
    record = types.SimpleNamespace(notebook="01_baseline", seed=1, parameters=asked, dataset="digits")
    run.upstream = [types.SimpleNamespace(record=record)]
    elsewhere = reference | {"path": score["path"].parent / "not_here.safetensors"}
    assert rows.compression_row(score, reference=elsewhere, **names) == row
    monkeypatch.setattr(rows, "labels_of", lambda dataset: np.roll(example.labels, 1))
    with pytest.raises(ValueError, match="another data set"):
        rows.compression_row(score, reference=reference, **names)


def test_speedups_are_against_eager_and_the_fastest_fp32(example):
    timed = {
        (r["method"], r["runtime"], r["precision"], r["batch"]): r
        for r in read(example.root / "results/quick/latency.csv")
    }
    row = timed["uniform", "onnxruntime", "int8", "1"]
    assert float(row["speedup_eager_fp32"]) == 4.0 / 0.5
    assert float(row["speedup_best_fp32"]) == 2.0 / 0.5
    assert float(timed["train", "eager", "fp32", "64"]["speedup_best_fp32"]) == 0.5


def measured(example, **milliseconds):
    """Latency rows at batch 1 of the baseline, "runtime_precision" -> its times, and of the int8 network."""
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    base, int8 = (example.scores[name, 1]["sha256"] for name in ("01_baseline", "02_quantization"))
    timed = []
    for name, own in milliseconds.items():
        runtime, precision = name.split("_")
        sha256 = int8 if precision == "int8" else base
        row = {"artifact_sha256": sha256, "runtime": runtime, "precision": precision, "rounds": 5}
        timed.append(row | times(*own) | {"batch": 1, "threads": 1})
    built = rows.latency_rows(timed, networks, reference_sha256=base)
    return {f"{row['runtime']}_{row['precision']}": row for row in built}


def test_the_reference_of_a_speedup_is_in_fp32(example):
    """The uncompressed network in bf16 is faster than in any fp32 runtime, and no reference."""
    built = measured(
        example, eager_fp32=[8.0], openvino_fp32=[4.0], openvino_bf16=[2.0], onnxruntime_int8=[1.0]
    )
    assert built["onnxruntime_int8"]["speedup_eager_fp32"] == 8.0
    assert built["onnxruntime_int8"]["speedup_best_fp32"] == 4.0
    assert built["openvino_bf16"]["speedup_best_fp32"] == 2.0


@pytest.mark.parametrize("slow", [(1, 1, 1, 2, 2), (2, 1, 2, 1, 2)])
def test_a_machine_that_is_slow_for_a_while_changes_no_speedup(example, slow):
    """Of five rounds two or three were twice as slow, for whatever was timed in them."""
    eager = [8.0 * a * b for a, b in zip(slow, (1, 1, 1, 1, 1.3), strict=True)]
    int8 = [a * b for a, b in zip(slow, (1.1, 1, 1, 1, 1), strict=True)]
    built = measured(example, eager_fp32=eager, onnxruntime_int8=int8)
    assert [row["speedup_eager_fp32"] for row in built.values()] == [1.0, 8.0]


def test_identity_and_absent_runtimes_get_no_speedup(example):
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    sha256 = example.scores["01_baseline", 1]["sha256"]
    common = {"precision": "fp32", "batch": 1, "threads": 1, "rounds": 5}
    timed = [
        {"artifact_sha256": sha256, "runtime": "eager", **times(2.0), **common},
        {"control": "identity", "runtime": "eager", **times(0.1), **common},
        {"artifact_sha256": sha256, "runtime": "openvino", **common},
    ]
    built = rows.latency_rows(timed, networks, reference_sha256=sha256)
    assert [row["speedup_eager_fp32"] for row in built] == [1.0, None, None]
    assert [row["control"] for row in built] == ["", "identity", ""]
    with pytest.raises(ValueError, match="no compression row"):
        rows.latency_rows([{"artifact_sha256": "0" * 64, **common}], networks, reference_sha256=sha256)


def test_what_was_timed_again_is_against_what_was_timed_again(example):
    built = timed_twice(example)
    timed = {(r["control"], r["runtime"], r["precision"]): r for r in built}
    assert timed["", "onnxruntime", "int8"]["speedup_eager_fp32"] == 8.0
    assert timed["again", "onnxruntime", "int8"]["speedup_eager_fp32"] == 20.0
    assert timed["again", "onnxruntime", "int8"]["speedup_best_fp32"] == 5.0
    assert {r["headline"] for r in built if r["control"] == "again"} == {0}


def test_a_runs_name_says_its_notebook():
    assert rows.run_name("quick", "03_pruning", 2, "channels") == "quick/03_pruning/seed=2,channels"
    assert rows.notebook_of(rows.run_name("full", "06_pipeline", 1)) == "06_pipeline"


def test_settings_become_columns_with_their_defaults():
    frame = pd.DataFrame(
        {
            "method": ["uniform", "channels", "identity", "pipeline"],
            "settings": ['{"bits":8}', '{"compensate":true,"macs":4}', "", '{"lambda_":1e-9,"macs":6}'],
        }
    )
    table = rows.with_settings(frame)
    assert list(table["setting.bits"]) == [8, "", "", ""]
    assert list(table["setting.granularity"]) == ["channel", "", "", ""]
    assert list(table["setting.macs"]) == ["", 4, "", 6] and table["setting.compensate"][1] is True
    assert list(table["setting.score"]) == ["", "fisher", "", ""]
    assert table["setting.stages"][3] == "prune,distill,quantize"
    assert table["title"][0].startswith("8-bit weights") and table["title"][2] == "identity"
    assert rows.with_settings(table) is table


@pytest.mark.parametrize(
    ("low", "high", "said", "text"),
    [
        (-0.2991, 1, "yes", "[-0.299, +1.00]"),  # a third digit says on which side of the limit an end is
        (-0.2997, 1, "yes", "[-0.2997, +1.00]"),
        (-0.31, -0.29, "cannot tell", "[-0.31, -0.29]"),
        (-0.5, -0.3012, "no", "[-0.50, -0.301]"),
    ],
)
def test_within_is_a_matter_of_the_whole_interval(low, high, said, text):
    row = {"accuracy_delta": (low + high) / 2, "delta_ci_low": low, "delta_ci_high": high}
    assert rows.within(row) == said
    assert rows.interval_text(row).endswith(text)
