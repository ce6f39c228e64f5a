"""The committed tables hold, and the audit would say so if they did not."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from result_files import change, read

from bench import audit, report
from bench.committed import ALL_PROFILES
from nnc_utils import provenance

RESULTS = provenance.PACKAGE.parent / "results"
COMMITTED = [RESULTS / name for name in ALL_PROFILES if (RESULTS / name / "compression.csv").is_file()]
EACH = pytest.mark.parametrize("profile", COMMITTED, ids=lambda path: path.name)


@EACH
def test_committed_results_are_what_their_evidence_says(profile):
    assert audit.problems(profile) == []


@EACH
def test_the_committed_report_is_that_of_the_tables(profile, read_once):
    def facts(text):  # which runs are of older code comes and goes with the code around them
        return [line for line in text.splitlines() if "older code than" not in line.lower()]

    for name in report.TEXTS:
        there = (profile / f"{name}.md").read_text(encoding="utf-8")
        assert facts(there) == facts(report.text(profile, name)), "run `make report`"


def numbers(table, columns):
    return [[float(row[column]) for column in columns] for row in table]


@EACH
def test_every_accuracy_and_interval_again_in_a_few_lines_of_numpy(profile):
    """Beside the audit, which could share a mistake with the reader of the tables."""
    rows = read(profile / "compression.csv")
    labels = {
        name: np.load(profile / f"predictions/labels-{name}.npy") for name in {r["dataset"] for r in rows}
    }
    own, reference = (
        np.stack([np.load(profile / f"predictions/{r[c][:16]}.npy") == labels[r["dataset"]] for r in rows])
        for c in ("artifact_sha256", "reference_sha256")
    )
    d = 100.0 * own - 100.0 * reference
    won_and_lost = np.tile([100.0, -100.0], (len(d), 1))
    mean, half = d.mean(1), 1.96 * np.hstack([d, won_and_lost]).std(1, ddof=1) / np.sqrt(d.shape[1])
    half = np.maximum(half, 300 / d.shape[1])
    columns = ("accuracy", "accuracy_delta", "delta_ci_low", "delta_ci_high")
    again = np.stack([100 * own.mean(1), mean, mean - half, mean + half], axis=1)
    assert np.abs(again - numbers(rows, columns)).max() < 6e-5


def last_digit(text):
    return text[:-1] + str((int(text[-1]) + 1) % 10)


INT8 = {"runtime": "onnxruntime", "precision": "int8"}
QUANTIZED = {"method": "uniform"}


@pytest.mark.parametrize(
    ("table", "where", "column", "value", "message"),
    [
        ("compression", QUANTIZED, "correct", last_digit, "but its predictions say"),
        ("compression", QUANTIZED, "delta_ci_low", "-0.1", "delta_ci_low is -0.1"),
        ("compression", QUANTIZED, "delta_ci_high", "0.1", "delta_ci_high is 0.1"),
        ("compression", QUANTIZED, "size_ratio", lambda text: str(float(text) + 0.1), "other bytes"),
        ("compression", QUANTIZED, "artifact_bytes", last_digit, "artifact_bytes"),
        ("compression", QUANTIZED, "params", last_digit, "params"),
        ("compression", QUANTIZED, "macs", last_digit, "macs"),
        ("compression", QUANTIZED, "nonzeros", "7", "nonzeros"),
        ("compression", QUANTIZED, "reference_sha256", "0" * 64, "No such file"),
        ("compression", QUANTIZED, "artifact_sha256", "0" * 64, "No such file"),
        ("compression", QUANTIZED, "run", "quick/nowhere/seed=1", "provenance.json does not have"),
        ("compression", QUANTIZED, "commit", "abc", "provenance's"),
        ("compression", QUANTIZED, "technique", "baseline", "2 baselines"),
        ("compression", QUANTIZED | {"seed": "2"}, "headline", "0", "a claim of some seeds and not of"),
        ("latency", INT8, "accuracy", "99.9", "accuracy is 99.9"),
        ("latency", INT8, "agreement", "100.0", "agreement is 100.0"),
        ("latency", INT8, "agreement", "", "not that of the code that was timed"),
        ("latency", INT8, "p50_ms", "0.4", "p50_ms is 0.4, but its rounds are from 0.5 to 0.5"),
        ("latency", INT8, "rounds_p50_ms", "0.5 0.5 0.4 0.4 0.4", "speedup_eager_fp32 is 8.0, but"),
        ("latency", INT8, "rounds_p50_ms", "0.5 0.5 0.5 0.5", "5 rounds, but 4 medians"),
        ("latency", INT8, "rounds_p50_ms", "0.5 0.5 nan 0.5 0.5", "p50_ms is 0.5"),
        ("latency", INT8, "rounds_p50_ms", "0.5 0.5 fast 0.5 0.5", "convert string to float: 'fast'"),
        ("latency", INT8, "rounds", "4", "4 rounds, but 5 medians"),
        ("latency", INT8, "speedup_eager_fp32", "8.1", "speedup_eager_fp32 is 8.1"),
        ("latency", INT8, "speedup_best_fp32", "8.0", "speedup_best_fp32 is 8.0"),
        ("latency", INT8, "headline", "0", "headline differs"),
        ("latency", {"runtime": "eager", "batch": "1"}, "runtime", "inductor", "No such file"),
        ("summary", QUANTIZED, "delta_ci_low", "-0.01", "delta_ci_low is -0.01"),
        ("summary", QUANTIZED, "no_loss", "1", "no_loss is 1"),
        ("summary", QUANTIZED, "accuracy_mean", last_digit, "accuracy_mean"),
        ("summary", QUANTIZED, "accuracy_sd", "", "accuracy_sd is None"),
        ("summary", QUANTIZED, "seeds", "3", "seeds is 3"),
        ("summary", QUANTIZED, "size_ratio", lambda text: str(float(text) + 0.001), "size_ratio"),
    ],
)
def test_one_changed_field_is_found(published, table, where, column, value, message):
    change(published / f"{table}.csv", where, **{column: value})
    found = audit.problems(published, rescore=False)
    assert any(message in problem for problem in found), found


def test_a_file_may_be_that_of_several_configurations(published):
    path = published / "compression.csv"
    [row] = [r for r in read(path) if QUANTIZED.items() <= r.items()][:1]
    pd.DataFrame([*read(path), row | {"settings": '{"bits":7}'}]).to_csv(path, index=False)
    assert not any("batch" in problem for problem in audit.problems(published, rescore=False))


def test_one_changed_prediction_is_found(published):
    for file in sorted((published / "predictions").iterdir()):
        original = file.read_bytes()
        predictions = np.load(file)
        predictions[5] = (predictions[5] + 1) % 10
        np.save(file, predictions)
        assert audit.problems(published, rescore=False), file.name
        file.write_bytes(original)
    assert audit.problems(published, rescore=False) == []


def test_a_changed_missing_or_foreign_artifact_is_found(published):
    first, second = sorted((published / "artifacts").iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any("not the file that was measured" in p for p in audit.problems(published, rescore=False))
    first.write_bytes(second.read_bytes())
    assert any("not the file that was measured" in p for p in audit.problems(published, rescore=False))
    first.unlink()
    assert any("is missing" in p for p in audit.problems(published, rescore=False))
    first.write_bytes(content)
    (published / "artifacts/extra.safetensors").write_bytes(content)
    assert any("nor the pipeline: extra.safetensors" in p for p in audit.problems(published, rescore=False))


def test_artifacts_are_scored_again(published):
    """Predictions, labels and rows that agree with each other do not help when the network says otherwise."""
    path = sorted((published / "artifacts").iterdir())[0]
    evidence = published / "predictions" / f"{path.stem}.npy"
    labels = np.load(published / "predictions/labels-digits.npy")
    predictions = np.load(evidence)
    wrong = np.flatnonzero(predictions != labels)[:2]
    predictions[wrong] = (labels[wrong] + 1 + (predictions[wrong] == (labels[wrong] + 1) % 10)) % 10
    np.save(evidence, predictions)  # still wrong, so every count stays
    assert any("scored again" in problem for problem in audit.problems(published))


def test_leftover_evidence_and_lacking_provenance_are_found(published):
    np.save(published / "predictions/ffff.npy", np.zeros(400, np.uint8))
    assert any("of no row: ffff.npy" in problem for problem in audit.problems(published, rescore=False))
    (published / "predictions/ffff.npy").unlink()
    path = published / "provenance.json"
    record = json.loads(path.read_text())
    del record["quick/01_baseline/seed=1"]["hardware"]
    record["quick/01_baseline/seed=2"]["parameters"]["seed"] = 3
    del record["quick/02_quantization/seed=1"]["extra"]["validation_delta"]
    path.write_text(json.dumps(record))
    found = audit.problems(published, rescore=False)
    assert any("a claim that validation did not look at" in p for p in found)
    assert any("lacks hardware" in p for p in found) and any("have their hash" in p for p in found)


@pytest.mark.parametrize(("zeros", "told"), [(0, False), (10, True)])
def test_zeros_go_with_the_counts_of_their_row(published, zeros, told):
    path = published / "provenance.json"
    record = json.loads(path.read_text())
    entry = record["quick/01_baseline/seed=1"]["artifacts"][0]
    rows = pd.read_csv(published / "compression.csv").set_index("artifact_sha256")
    row = rows.loc[entry["artifact_sha256"]]
    entry["zeros"] = {"conv1": [int(row["params"] - row["nonzeros"]) + zeros, 0]}
    path.write_text(json.dumps(record))
    found = audit.problems(published, rescore=False)
    assert any("zeros do not go with its nonzeros" in problem for problem in found) == told


@pytest.mark.parametrize("damage", ["columns", "no rows", "no provenance"])
def test_damaged_tables_are_a_problem_not_a_crash(published, damage):
    path = published / "compression.csv"
    if damage == "columns":
        path.write_text(path.read_text().replace("accuracy_delta", "delta"))
    elif damage == "no rows":
        path.write_text(path.read_text().splitlines()[0] + "\n")
    else:
        (published / "provenance.json").write_text("{")
    assert audit.problems(published, rescore=False)


def test_a_claim_whose_runtime_disagrees_with_the_file_is_found(published):
    """Consistent numbers, but too few of the runtime's answers are those of the file (rule 16)."""
    [evidence] = (published / "predictions").glob("*.onnxruntime.int8.npy")
    labels = np.load(published / "predictions/labels-digits.npy")
    predictions = np.load(evidence)
    predictions[:3] = (predictions[:3] + 1) % 10
    np.save(evidence, predictions)
    eager = np.load(evidence.with_name(evidence.name.split(".")[0] + ".npy"))
    agreement = f"{100 * (predictions == eager).mean():.4f}"
    for batch in ("1", "64"):
        accuracy = f"{100 * (predictions == labels).mean():.4f}"
        change(published / "latency.csv", INT8 | {"batch": batch}, agreement=agreement, accuracy=accuracy)
    found = audit.problems(published, rescore=False)
    assert len(found) == 2 and all("is below 99.5" in problem for problem in found), found


def contradictions(quick, larger):
    """Pairs that one profile tells apart one way, and another with the same reference the other way."""
    if not set(quick.baselines["artifact_sha256"]) & set(larger.baselines["artifact_sha256"]):
        return []

    def decided(tables):
        ends = {}
        for pair in tables.pairs:
            low, high = pair.difference["delta_ci_low"], pair.difference["delta_ci_high"]
            key = tuple(
                (side["method"], side["settings"], side["control"]) for side in (pair.ours, pair.theirs)
            )
            if low > 0 or high < 0:
                ends[key] = low > 0
        return ends

    ours, theirs = decided(quick), decided(larger)
    return [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]


@pytest.mark.parametrize("profile", [p for p in COMMITTED if p.name != "quick"], ids=lambda path: path.name)
def test_quick_says_nothing_that_longer_training_contradicts(profile, read_once):
    assert contradictions(read_once(RESULTS / "quick"), read_once(profile)) == []


def test_a_contradiction_is_one_where_both_intervals_exclude_zero_and_the_reference_is_the_same():
    def tables(sha256, *ends):
        sides = [{"method": name, "settings": "", "control": ""} for name in ("kd", "student_alone")]
        pairs = [
            SimpleNamespace(
                ours=sides[0], theirs=sides[1], difference={"delta_ci_low": low, "delta_ci_high": high}
            )
            for low, high in ends
        ]
        return SimpleNamespace(baselines=pd.DataFrame({"artifact_sha256": [sha256]}), pairs=pairs)

    assert len(contradictions(tables("a", (-0.9, -0.1)), tables("a", (0.1, 0.5)))) == 1
    for other in (tables("b", (0.1, 0.5)), tables("a", (-0.1, 0.5)), tables("a", (-0.5, -0.1)), tables("a")):
        assert contradictions(tables("a", (-0.9, -0.1)), other) == []
