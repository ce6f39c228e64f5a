"""Rows, tables and their text, against numbers computed by hand or with other code."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from nnc_utils import (
    artifact,
    audit,
    data,
    encoding,
    evaluation,
    over_seeds,
    paired,
    provenance,
    publishing,
    results,
    rows,
    tables,
)
from nnc_utils.reports import committed
from nnc_utils.reports.claims import claims_text

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


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def edit(folder, **changes):
    path = folder / "result.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(record))


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


def times(*milliseconds):
    """What is measured of as many rounds as are given; of one, five like it."""
    rounds = milliseconds * (5 if len(milliseconds) == 1 else 1)
    p50 = float(np.median(rounds))
    found = {"p50_ms": p50, "p90_ms": max(rounds), "iqr_ms": 0.0}
    return found | {"rounds_p50_ms": " ".join(map(str, rounds))}


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


def timed_twice(example):
    """Rows of two networks in two runtimes, the second time with other numbers."""
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    base, int8 = (example.scores[name, 1]["sha256"] for name in ("01_baseline", "02_quantization"))
    milliseconds = {
        ("", base, "eager", "fp32"): 4.0,
        ("", base, "onnxruntime", "fp32"): 2.0,
        ("", int8, "onnxruntime", "int8"): 0.5,
        ("again", base, "eager", "fp32"): 8.0,
        ("again", base, "onnxruntime", "fp32"): 2.0,
        ("again", int8, "onnxruntime", "int8"): 0.4,
    }
    measured = [
        {"control": control, "artifact_sha256": sha256, "runtime": runtime, "precision": precision}
        | {**times(ms), "batch": 1, "threads": 1, "rounds": 5}
        for (control, sha256, runtime, precision), ms in milliseconds.items()
    ]
    return rows.latency_rows(measured, networks, reference_sha256=base)


def test_what_was_timed_again_is_against_what_was_timed_again(example):
    built = timed_twice(example)
    found = {(r["control"], r["runtime"], r["precision"]): r for r in built}
    assert found["", "onnxruntime", "int8"]["speedup_eager_fp32"] == 8.0
    assert found["again", "onnxruntime", "int8"]["speedup_eager_fp32"] == 20.0
    assert found["again", "onnxruntime", "int8"]["speedup_best_fp32"] == 5.0
    assert {r["headline"] for r in built if r["control"] == "again"} == {0}


def test_the_report_says_how_far_two_measurements_are_apart(example, published):
    [pair] = results.twice(pd.DataFrame(timed_twice(example))).to_dict("records")
    assert pair["precision"] == "int8"  # the uncompressed network is the measure, not measured
    assert pair["speedup_eager_fp32 apart"] == pytest.approx(150.0)  # 8 and 20 times
    assert pair["speedup_best_fp32 apart"] == pytest.approx(25.0)  # 4 and 5
    assert "Timed once." in results.report(published)
    path = published / "latency.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame = frame[frame["control"] != "identity"]
    frame["speedup_best_fp32"] = frame["speedup_best_fp32"].astype(float)
    second = frame.assign(control="again", headline=0, speedup_best_fp32=frame["speedup_best_fp32"] * 1.05)
    pd.concat([frame, second]).to_csv(path, index=False)
    text = results.report(published)
    assert "None is further apart" in text and "within 5.0 %" in text
    second["speedup_best_fp32"] *= 1.1
    pd.concat([frame, second]).to_csv(path, index=False)
    assert "Further apart" in (text := results.report(published)) and ", 16 % |" in text
    assert text.count("again") < 16 and "(again)" not in results.table(published)


def test_the_report_says_how_restless_the_host_was(published):
    assert "rounds spans 0 % of their median" in results.report(published)
    path = published / "latency.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame["rounds_p50_ms"] = "1.0 1.0 1.2 1.4 1.4"
    frame.to_csv(path, index=False)
    assert "rounds spans 33 % of their median" in results.report(published)


def test_the_report_says_how_many_points_have_one_seed_only(published):
    path = published / "summary.csv"
    frame = pd.read_csv(path, keep_default_na=False)

    def text(seeds):
        frame.assign(seeds=seeds).to_csv(path, index=False)
        return results.report(published)

    said = f"seeds of {{}} of {len(frame)} points: they have one"
    alone, some, all_three = text(1), text([3] + [1] * (len(frame) - 1)), text(3)
    assert "test images, 1 seed. " in alone and said.format(len(frame)) in alone
    assert "test images, 1 to 3 seeds. " in some and said.format(len(frame) - 1) in some
    assert "test images, 3 seeds. " in all_three and "spread between seeds" not in all_three


def test_the_summary_pairs_images_over_the_seeds(tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 500).astype(np.uint8)
    np.save(tmp_path / "labels-digits.npy", labels)
    records, right = [], {}
    for seed in (1, 2, 3):
        for name, share in (("a", 0.95), ("b", 0.94)):
            hit = generator.random(500) < share
            right[name, seed] = hit.astype(float)
            np.save(tmp_path / f"{f'{name}{seed}' * 8}.npy", np.where(hit, labels, (labels + 1) % 10))
        common = {"dataset": "digits", "technique": "quantization", "method": "m", "point": "", "control": ""}
        sha = {"artifact_sha256": f"b{seed}" * 32, "reference_sha256": f"a{seed}" * 32}
        sizes = {"size_ratio": 4.0 + seed, "artifact_bytes": 1000, "params": 10, "macs": 20}
        accuracy = 100 * right["b", seed].mean()
        record = {"seed": seed, "division": "closed", "headline": 1, "accuracy": accuracy, "train_images": 0}
        records.append(common | sha | sizes | record)
    found = tables.summarize(pd.DataFrame(records), tmp_path).iloc[0]
    other = [*records[:2], records[2] | {"train_images": 8, "run": "of 8"}]
    with pytest.raises(tables.ResultError, match=r"its seeds saw .* 8 \(of 8\) pictures"):
        tables.summarize(pd.DataFrame([{"run": "r"} | record for record in other]), tmp_path)

    differences = [sum(right["b", s][i] - right["a", s][i] for s in (1, 2, 3)) / 3 * 100 for i in range(500)]
    mean = sum(differences) / 500
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 499)
    half = 1.96 * deviation / math.sqrt(500)
    assert found["delta_mean"] == pytest.approx(mean, abs=1e-4)
    assert found["delta_ci_low"] == pytest.approx(mean - half, abs=1e-4)
    assert found["delta_ci_high"] == pytest.approx(mean + half, abs=1e-4)
    assert found["no_loss"] == int(mean - half >= -0.3)
    accuracies = pd.Series([100 * right["b", s].mean() for s in (1, 2, 3)])
    assert found["accuracy_sd"] == pytest.approx(accuracies.std(), abs=1e-4)
    assert (found["seeds"], found["size_ratio"]) == (3, 6.0)


def test_all_of_two_seeds_claim_what_the_first_one_chose(example):
    made = [tables.read_run(folder) for folder in example.folders][::-1]
    rows = [row for run in made for row in run.compression]
    for chosen in (0, 1):  # by the first seed; the second one liked another point
        wanted = {1: chosen, 2: 1 - chosen}
        mixed = [
            run.with_rows(
                compression=[r.model_copy(update={"headline": wanted[r.seed]}) for r in run.compression]
            )
            for run in made
        ]
        claimed = over_seeds.claimed_once(mixed)
        assert len(claimed) == len(rows) > 2 and {row.headline for row in claimed} == {chosen}
        assert [row.artifact_sha256 for row in claimed] == [row.artifact_sha256 for row in rows]


def looked_at(example, seed, points, *, technique="pipeline"):
    """A run of a seed: a row each point (name, MACs, bytes, validation difference); the notebook chose c."""
    whole = next(tables.read_run(f) for f in example.folders if f.parent.name == "01_baseline")
    template = whole.compression[0].model_copy(update={"macs": 1000, "artifact_sha256": "f" * 64})
    rows, files, looked = [template], [], {}
    for name, macs, size, mean in points:
        sha = f"{seed}{name}" * 32
        about = {"technique": technique, "method": "m", "point": name, "seed": seed, "macs": macs}
        about |= {"artifact_bytes": size, "artifact_sha256": sha, "reference_sha256": "f" * 64}
        rows.append(template.model_copy(update=about | {"headline": int(name == "c"), "division": "open"}))
        files.append(tables.ArtifactRecord(path=f"{name}.safetensors", sha256=sha, artifact_sha256=sha))
        if mean is not None:
            looked[name] = [mean - 0.3, mean, mean + 0.3]
    record = {"run": f"quick/n/seed={seed}", "seed": seed, "compression": rows, "artifacts": files}
    record["extra"] = {"validation_delta": looked}
    return tables.Run(whole.folder, whole.record.model_copy(update=record))


def chosen_of(runs):
    return {
        row.point for row in over_seeds.claimed_once(runs) if row.headline and row.technique != "baseline"
    }


@pytest.mark.parametrize(
    "small, large, chosen",
    [
        ([0.0, -0.5, 0.2], [0.1, 0.1, 0.1], {"a"}),  # lower end -0.1 - 0.17
        ([0.0, -0.7, 0.2], [0.1, 0.1, 0.1], {"b"}),  # -0.17 - 0.17 is below -0.3
        ([0.0, -0.7, 0.2], [-0.9, -0.9, -0.9], {"a"}),  # neither is likely: the nearer one
        ([-0.9, -0.9, -0.9], [0.0, -0.7, 0.2], {"b"}),
        ([0.0, -0.7, 0.2], [0.0, -0.7, 0.2], {"a"}),  # as near: the smaller one
        ([-0.9, -0.9, -0.9], [-0.2, -0.2, -0.2], set()),  # the nearer one is a loss: -0.2 + 0.17 is below 0
        ([0.0, -0.7, 0.2], [None, 0.1, 0.1], {"a"}),  # a seed did not look at the large one
    ],
)
def test_three_seeds_choose_over_all_their_validation_pictures(example, small, large, chosen):
    def run(seed):
        points = [("a", 10, 100, small[seed - 1]), ("b", 10, 200, large[seed - 1]), ("c", 10, 50, None)]
        return looked_at(example, seed, points)

    assert chosen_of([run(seed) for seed in (3, 1, 2)]) == chosen  # and no more c, which one seed had chosen
    rows = over_seeds.claimed_once([run(seed) for seed in (3, 1, 2)])
    assert [row.seed for row in rows if row.point in chosen and row.headline] == [3, 1, 2] * len(chosen)
    assert chosen_of([run(seed) for seed in (1, 2)]) == {"c"}  # two seeds: as the first one's notebook has it


def test_seeds_choose_cut_channels_by_macs_and_masks_by_bytes(example):
    points = [("a", 250, 200, 0.0), ("b", 500, 100, 0.0), ("c", 1000, 50, -0.9), ("d", 1000, 60, 0.0)]
    cut = [looked_at(example, seed, points, technique="pruning") for seed in (1, 2, 3)]
    assert chosen_of(cut) == {"a", "d"}
    assert chosen_of([looked_at(example, seed, points) for seed in (1, 2, 3)]) == {"d"}  # by bytes alone


def test_points_that_share_a_file_are_both_looked_at(example):
    runs = [looked_at(example, seed, [("a", 10, 100, 0.0), ("b", 10, 90, -0.9)]) for seed in (1, 2, 3)]
    for run in runs:
        run.compression.append(run.compression[1].model_copy(update={"point": "twin of a"}))
    chosen = {point[3]: choice.chosen for point, choice in over_seeds.chosen_over_seeds(runs).items()}
    assert chosen == {"a": True, "twin of a": False, "b": False}


@pytest.fixture
def three_seeds(published):
    """The example with a third seed, a copy of the second; only the first looked at validation pictures."""
    folders = sorted((published.parent / "runs/quick").glob("0[12]*/seed=[12]"))
    for folder in [f for f in folders if f.name == "seed=2"]:
        copy = shutil.copytree(folder, folder.with_name("seed=3"))
        text = (copy / "result.json").read_text().replace("seed=2", "seed=3")
        (copy / "result.json").write_text(text)
        record = json.loads(text)
        edit(copy, seed=3, compression=[row | {"seed": 3} for row in record["compression"]])
        folders.append(copy)
    for folder in folders:
        if not folder.match("02_quantization/seed=1"):
            edit(folder, extra={})
    return published, folders


def test_what_a_seed_did_not_look_at_is_looked_at_before_three_choose(three_seeds):
    published, folders = three_seeds
    publishing.publish(folders, "quick")
    provenance = json.loads((published / "provenance.json").read_text())
    looks = [provenance[f"quick/02_quantization/seed={s}"]["extra"]["validation_delta"] for s in (1, 2, 3)]
    assert looks[0] == {"network": [-0.2, 0.0, 0.2]} and looks[1] == looks[2] != looks[0]
    [[low, mean, high]] = looks[2].values()
    run = tables.read_run(folders[-1])
    digits = data.load("digits").validation
    right = [
        evaluation.predict(artifact.load(path), digits, normalize=data.load("digits").normalize)
        == digits.labels.numpy()
        for path in (
            run.artifact("network"),
            folders[-1].parents[1] / "01_baseline/seed=3/artifacts/network.safetensors",
        )
    ]
    assert mean == pytest.approx(100 * (right[0].mean() - right[1].mean())) and low <= mean <= high
    assert {row["headline"] for row in read(published / "compression.csv")} == {"1"}
    claimed = {f"{row['artifact_sha256'][:16]}.safetensors" for row in read(published / "compression.csv")}
    assert {file.name for file in (published / "artifacts").iterdir()} < claimed  # the small ones
    results.report(published)
    assert "On validation" in (published / "report.md").read_text()
    assert audit.problems(published) == []
    text = (published / "compression.csv").read_text()
    for_all = re.sub(r"(bits=8,\d,closed,,)1", r"\g<1>0", text)
    assert for_all.count(",closed,,0,") == 3
    (published / "compression.csv").write_text(for_all)
    assert any("likely without loss, and no claim" in problem for problem in audit.problems(published))


def test_a_claim_whose_file_is_elsewhere_is_refused_before_anything_is_written(three_seeds, capsys):
    published, folders = three_seeds
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    (folders[-1] / "artifacts/network.safetensors").unlink()
    with pytest.raises(results.ResultError, match="is missing: bring it"):
        publishing.publish(folders, "quick")
    assert "seed=3 uniform_per_channel bits=8 stays out of what the seeds choose" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}


@pytest.mark.parametrize("low", [-0.3, -0.3001])
def test_no_loss_is_the_lower_end_at_least_minus_0_3(monkeypatch, published, low):
    found = {"accuracy_delta": 0.0, "delta_ci_low": low, "delta_ci_high": 0.2}
    monkeypatch.setattr(tables, "differences", lambda **arrays: found)
    frame = pd.read_csv(published / "compression.csv", keep_default_na=False)
    assert set(tables.summarize(frame, published / "predictions")["no_loss"]) == {int(low == -0.3)}


def test_read_run_trusts_nothing(published):
    folder = published.parents[0] / "runs/quick/02_quantization/seed=1"
    run = tables.read_run(folder)
    assert run.artifact("network").is_file() and run.dataset == "digits"
    assert run.artifact(run.compression[0].artifact_sha256) == run.artifact("network")
    with pytest.raises(results.ResultError, match="it has network"):
        run.artifact("nothing")
    good = (folder / "result.json").read_text()

    edit(folder, parameters={"seed": 7})
    with pytest.raises(results.ResultError, match="hash"):
        tables.read_run(folder)
    (folder / "result.json").write_text(good)
    record = json.loads(good)
    edit(folder, artifacts=[record["artifacts"][0] | {"path": "../seed=2/artifacts/network.safetensors"}])
    with pytest.raises(results.ResultError, match="outside"):
        tables.read_run(folder)
    edit(
        folder,
        artifacts=record["artifacts"],
        compression=[record["compression"][0] | {"run": "quick/x/seed=1"}],
    )
    with pytest.raises(results.ResultError, match="a row is of run"):
        tables.read_run(folder)
    (folder / "result.json").write_text(good[:-20])
    with pytest.raises(results.ResultError, match="not valid"):
        tables.read_run(folder)
    (folder / "result.json").write_text(good)
    content = bytearray(run.artifact("network").read_bytes())
    content[-1] ^= 1
    run.artifact("network").write_bytes(content)
    with pytest.raises(results.ResultError, match="differs"):
        tables.read_run(folder)
    run.artifact("network").unlink()  # left on the machine that made it: its rows count, who wants it is told
    left = tables.read_run(folder)
    assert left.compression == run.compression
    with pytest.raises(results.ResultError, match="is missing: bring it"):
        left.artifact("network")
    (folder / "result.json").unlink()
    with pytest.raises(results.ResultError, match="no finished run"):
        tables.read_run(folder)


def test_the_report_says_where_the_zeros_lie(example, published):
    from conftest import _run, _score, write_notebook

    root, digits = published.parents[1], data.load("digits")
    folders = [root / folder.relative_to(example.root) for folder in example.folders]
    write_notebook(root, "03_pruning", "from nnc_utils import training\n")
    run = _run(root, "03_pruning", 1, [results.read_run(folders[0])])
    network = artifact.load(folders[0] / "artifacts/network.safetensors")
    for layer in ("conv1", "layer4.1.conv2"):  # of the one a quarter stays, of the other nothing
        weight = network.get_submodule(layer).weight.detach()
        kept = (torch.arange(weight.numel()) % 4 == 0).view(weight.shape) & (layer == "conv1")
        kept.view(-1)[0] = True
        encoding.attach(network.get_submodule(layer), encoding.Dense(weight * kept, kept))
    path = run.path("artifacts/masked.safetensors")
    stored = artifact.save(network, path, mean=digits.mean, std=digits.std, classes=digits.classes)
    about = {"model": "tiny", "technique": "pruning", "method": "magnitude_global", "point": "sparsity=0.3"}
    row = rows.compression_row(
        _score(path, stored, digits), run=run, dataset="digits", reference=run.upstream[0], **about
    )
    run.finish(compression=[row])
    results.publish([*folders, run.folder], "quick")
    section = results.report_text(published).split("## Where do the zeros lie?")[1].split("##")[0]
    heading, _, *lines = [text.split("|")[1:-1] for text in section.splitlines() if text.startswith("|")]
    assert [part.strip() for part in heading[2:]] == [
        "all",
        "conv1",
        *(f"layer{n}" for n in range(1, 5)),
        "fc",
    ]
    [[name, _, total, stem, *shares]] = [[part.strip() for part in line] for line in lines]
    assert name == "tiny magnitude_global sparsity=0.3, seed 1" and stem == "75.0"
    last = 64 * 9 * (32 + 3 * 64) + 32 * 64
    assert shares == ["0.0"] * 3 + [f"{100 * 64 * 64 * 9 / last:.1f}", "0.0"]
    weights = sum(math.prod(weight.shape) for weight in stored.weights.values())
    assert total == f"{100 * (64 * 64 * 9 + 0.75 * network.conv1.weight.numel()) / weights:.1f}"
    # without the file what was published stays known, whether the run is here or not
    path.unlink()
    before = (published / "compression.csv").read_bytes()
    for here in ([*folders, run.folder], folders):
        results.publish(here, "quick", keep=True)
        assert (published / "compression.csv").read_bytes() == before
        assert section in results.report_text(published)


def test_the_report_says_what_changed_from_quick(published, monkeypatch):
    larger = published.parent / "standard"
    shutil.copytree(published, larger)
    pairs = {published: "beats", larger: "below"}

    def compared(rows, predictions, *, dataset):
        about = {"ours": "a", "theirs": "b", "points": "+1 [+0, +2]", "verdict": pairs[predictions.parent]}
        return pd.DataFrame([about, about | {"ours": "c", "verdict": "equal"}])

    monkeypatch.setattr(committed, "comparisons", compared)
    summary = pd.read_csv(larger / "summary.csv")
    rounded = summary["technique"] == "quantization"
    summary.loc[rounded, ["delta_mean", "delta_ci_low", "delta_ci_high"]] = [-2.0, -3.0, -1.0]
    summary.to_csv(larger / "summary.csv", index=False)
    heading = "## What changed from the quick profile?"
    assert heading not in results.report_text(published)
    section = results.report_text(larger).split(heading)[1].split("##")[0]
    point, pair = [line.split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    assert point[0] == "| uniform_per_channel bits=8" and point[3] == "no, -2.00 [-3.00, -1.00] |"
    assert pair == ["| a against b", "which is better?", "beats, +1 [+0, +2]", "below, +1 [+0, +2] |"]
    shutil.copy(published / "summary.csv", larger)
    pairs[larger] = "beats"
    assert "_none_" in results.report_text(larger).split(heading)[1].split("##")[0]


def test_publish_leaves_what_the_rows_need_and_nothing_else(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    for leftover in ("predictions/old.npy", "artifacts/old.safetensors"):
        (published / leftover).write_bytes(b"x")
    (published / "compression.csv").write_text("broken")
    assert results.publish(folders, "quick") == published
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before
    # five artifacts' worth of evidence: 4 in eager, 4 of runtimes, labels; of artifacts only the small ones
    assert len(list((published / "predictions").iterdir())) == 9
    assert [file.stat().st_size < 450_000 for file in (published / "artifacts").iterdir()] == [True, True]
    record = json.loads((published / "provenance.json").read_text())["quick/01_baseline/seed=1"]
    assert "more than 450,000" in record["artifacts"][0]["committed"]
    assert str(published.parents[1]) not in (published / "provenance.json").read_text()


def test_what_another_machine_committed_stays_beside_what_is_here(published, capsys):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    here = [folder for folder in folders if folder.name == "seed=1"]
    for folder in set(folders) - set(here):
        shutil.rmtree(folder)
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    results.publish(here, "quick", keep=True)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before
    assert capsys.readouterr().out == ""
    results.publish([folder for folder in here if "07" in str(folder)], "quick", keep=True)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before


def test_a_committed_run_whose_reference_is_gone_goes(published, capsys):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=1"))
    path, other = published / "compression.csv", "0" * 64
    table = read(path)
    [baseline] = [row for row in table if row["run"] == "quick/01_baseline/seed=2"]
    places = [published / "predictions" / rows.evidence(sha) for sha in (baseline["artifact_sha256"], other)]
    shutil.copy(*places)
    baseline |= {"artifact_sha256": other, "reference_sha256": other}
    pd.DataFrame(table).to_csv(path, index=False)
    results.publish(folders, "quick", keep=True)
    assert "1 of 1 rows of quick/02_quantization/seed=2 go: " in capsys.readouterr().out
    kept = ("01_baseline/seed=1", "01_baseline/seed=2", "02_quantization/seed=1")
    assert {row["run"] for row in read(path)} == {f"quick/{name}" for name in kept}


def test_a_committed_row_that_was_measured_again_goes_alone(published, capsys):
    committed = tables.committed_runs(published)
    [again] = [run for run in committed if run.run == "quick/02_quantization/seed=1"]
    other = again.compression[0].model_copy(update={"point": "bits=7"})
    older = tables.Run(again.folder, again.record.model_copy(update={"run": "quick/older"}))
    older = older.with_rows(compression=[*again.compression, other])
    [kept] = publishing._kept(committed, [older])
    assert kept.compression == [other]
    assert "1 of 2 rows of quick/older go: measured again" in capsys.readouterr().out


def test_a_row_that_its_run_no_longer_makes_goes_with_a_word(published, capsys):
    committed = tables.committed_runs(published)
    [old] = [run for run in committed if run.run == "quick/02_quantization/seed=1"]
    new = old.with_rows(compression=[old.compression[0].model_copy(update={"point": "bits=7"})])
    assert publishing._kept([new], [old]) == []
    gone = len(old.compression)
    assert f"{gone} of {gone} rows of {old.run} go: it was made again" in capsys.readouterr().out


def test_points_that_fell_short_stay_as_attempts(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    short = [f"quick/02_quantization/seed={seed}" for seed in (1, 2)]
    before = {tuple(row.values()) for row in read(published / "compression.csv")}
    results.publish(folders, "quick", keep=True, attempts=short)
    made = read(published / "compression.csv")
    attempts = [row for row in made if row["control"] == "attempt"]
    assert [(row["run"], row["headline"]) for row in attempts] == [(f"{run},attempt", "0") for run in short]
    assert {tuple(row.values()) for row in made if row not in attempts} == before
    assert audit.problems(published, rescore=False) == []
    (published / results.HISTORY).write_text("What was tried before.\n")
    shown = results.Tables(published)
    assert "What was tried before.\n\n" in claims_text(shown)
    attempt = shown.summary["control"] == "attempt"
    for column, value, said in (
        ("no_loss", 0, True),
        ("technique", "pruning", False),
        ("technique", "quantization", True),
        ("division", "open", False),
        ("division", "closed", True),
        ("no_loss", 1, False),
    ):
        shown.summary.loc[attempt, column] = value
        assert ("fell short on the test set (control `attempt`): 1." in claims_text(shown)) == said
    results.publish(folders, "quick", keep=True)  # and they stay
    assert read(published / "compression.csv") == made
    with pytest.raises(results.ResultError, match="not committed: quick/nowhere"):
        results.publish(folders, "quick", keep=True, attempts=["quick/nowhere"])


def test_publish_fails_without_evidence_or_run(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    with pytest.raises(results.ResultError, match="predictions"):
        results.publish(folders[2:], "quick")  # the baselines are missing, and with them the references
    with pytest.raises(results.ResultError, match="each once"):
        results.publish([folders[0], folders[0]], "quick")
    evidence = (
        folders[2] / "predictions" / rows.evidence(tables.read_run(folders[2]).compression[0].artifact_sha256)
    )
    evidence.unlink()
    with pytest.raises(results.ResultError, match="are missing"):
        results.publish(folders, "quick")


def test_the_table_joins_size_accuracy_and_time(published):
    lines = results.table(published).splitlines()
    int8 = next(line for line in lines if "onnxruntime int8" in line)
    cells = [cell.strip() for cell in int8.strip("|").split("|")]
    assert cells[0] == "tiny uniform_per_channel bits=8"
    assert cells[-3:] == ["0.500", "8.00×", "4.00×"]
    right = np.load(next((published / "predictions").glob("*.onnxruntime.int8.npy")))
    labels = np.load(published / "predictions/labels-digits.npy")
    assert cells[2] == f"{100 * (right == labels).mean():.2f}"  # of the code that was timed, not of eager
    assert results.STALE_NOTE not in "\n".join(lines)


def test_rows_of_older_code_are_marked(published, monkeypatch):
    monkeypatch.setattr(committed, "code_sha256", lambda path: "0" * 64 if "02_" in path.name else None)
    path = published / "provenance.json"
    record = json.loads(path.read_text())
    for run in record.values():  # the others are up to date
        run["code_sha256"] = run["code_sha256"] if run["notebook"] == "02_quantization" else None
    path.write_text(json.dumps(record))
    text = results.table(published)
    marked = {
        line.split("|")[1].strip() for line in text.splitlines() if "†" in line and line.startswith("|")
    }
    assert marked == {"tiny uniform_per_channel bits=8 †"}
    assert results.STALE_NOTE in text and "†" not in results.without_marks(text)


def test_the_report_says_what_holds(published):
    text = results.report(published)
    assert (published / "report.md").read_text() == text + "\n"
    warning, verdict, _, _, claim = text.split("\n\n")[1:6]
    assert "A claim needs 3 seeds" in warning
    for said in (verdict, claim):
        assert "no loss" in said and "4.00× as fast as the fastest fp32 runtime" in said
    assert (
        "Smallest without loss** of what validation chose: `uniform_per_channel bits=8`" in verdict
        and "pipeline" not in verdict
    )
    assert results.report_text(published) == text
    assert "quick/07_deployment/seed=1" in text and "more than 450,000" in text
    ratio = pd.read_csv(published / "summary.csv").set_index("technique")["size_ratio"]["quantization"]
    assert (
        f"| quantization | closed | uniform_per_channel bits=8, {ratio:.2f}× |" in text
    )  # where it stops paying
    frame = pd.read_csv(published / "summary.csv", keep_default_na=False)
    frame.loc[frame["technique"] == "quantization", ["delta_ci_low", "no_loss"]] = [-0.5, 0]
    frame.to_csv(published / "summary.csv", index=False)
    text = results.report(published)
    assert "no loss is **not shown**" in text.split("\n\n")[5]
    assert "of what validation chose: none" in text.split("\n\n")[2]
    assert f"| quantization | closed | none | – | uniform_per_channel bits=8, {ratio:.2f}× |" in text


def test_the_readme_gets_the_best_profile_between_its_markers(published):
    root = published.parents[1]
    assert results.update_readme(root) and not results.update_readme(root)
    text = (root / "README.md").read_text()
    assert text.startswith("# T\n") and text.endswith("\nrest\n") and "old" not in text
    assert results.table(published) in text and results.verdict(published) in text
    for file in (published / "artifacts").iterdir():
        assert re.search(rf"\[\S+ .*, seed \d\]\(results/quick/artifacts/{file.name}\)", text)
    (published / "figures/headline.png").write_bytes(b"png")
    assert results.update_readme(root)
    assert re.search(
        r"!\[[^\]]{20,}\]\(results/quick/figures/headline.png\)", (root / "README.md").read_text()
    )
    published.rename(root / "results/standard")
    results.update_readme(root)
    assert "results/standard/report.md" in (root / "README.md").read_text()
    (root / "README.md").write_text("no markers")
    with pytest.raises(results.ResultError, match="headline:begin"):
        results.update_readme(root)


def test_make_report_writes_figure_report_and_readme(published):
    root = published.parents[1]
    command = [sys.executable, "-m", "nnc_utils.results", "report"]
    environment = {"NNC_ROOT": str(root), "PYTHONPATH": str(provenance.PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (published / "figures/headline.png").read_bytes().startswith(b"\x89PNG")
    assert "headline.png" in (published / "report.md").read_text()
    assert "results/quick/figures/headline.png" in (root / "README.md").read_text()
    # what is finished, without the workflow: the same tables
    before = (published / "compression.csv").read_bytes()
    (published / "compression.csv").unlink()
    command[-1:] = ["publish", "--profile", "quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (published / "compression.csv").read_bytes() == before
    done = subprocess.run(command[:-2], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "publish needs --profile" in done.stderr


def test_a_runs_name_says_its_notebook():
    assert rows.run_name("quick", "03_pruning", 2, "channels") == "quick/03_pruning/seed=2,channels"
    assert rows.notebook_of(rows.run_name("full", "06_pipeline", 1)) == "06_pipeline"


def test_methods_are_compared_at_the_same_setting_or_in_no_more_bytes(tmp_path):
    labels = np.arange(1000) % 10
    np.save(tmp_path / tables.labels_name("digits"), labels.astype(np.uint8))

    def row(method, point, size, wrong, control=""):
        sha256 = f"{len(made):064x}"[::-1]
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "artifact_bytes": size, "artifact_sha256": sha256})
        made[-1] |= {"seed": 1, "control": control or np.nan, "technique": "quantization", "train_images": 0}

    made = []
    row("kmeans", "bits=2", 100, 300)
    row("hessian_kmeans", "bits=2", 101, 200)
    row("hessian_kmeans", "bits=3", 150, 100)  # no counterpart
    row("uniform_per_channel", "bits=3 bn", 150, 100)
    row("uniform_per_channel", "bits=3", 150, 100)  # another setting
    row("mixed_precision", "budget=3bit bn", 149, 100)
    row("uniform_per_channel", "levels=5 bn", 100, 300)
    row("mixed_precision", "budget=5level bn", 99, 200)
    row("mixed_precision", "rule=hand", 400, 10, "hand_rule")  # has no budget
    row("magnitude_global", "sparsity=0.9 bn", 200, 100)
    for score in ("taylor", "obd_fisher", "obd_hessian", "obs_block"):
        row(score, "sparsity=0.9 bn", 199, 200)
    row("taylor", "sparsity=0.8 bn", 300, 0)  # no counterpart
    row("nncodec", "qp=-30", 120, 50)
    row("hessian_rounding", "rate=1e-9", 90, 400)
    row("hessian_rounding", "rate=1e-10", 119, 60)
    row("hessian_rounding", "rate=1e-11", 121, 0)  # larger than NNCodec's
    row("hessian_rounding", "rate=1e-10 one_sided", 120, 80, "one_sided")  # not ours to compare with NNCodec
    found = results.comparisons(pd.DataFrame(made), tmp_path, dataset="digits")
    assert found[["ours", "theirs", "verdict"]].values.tolist() == [
        ["hessian_kmeans bits=2", "kmeans bits=2", "beats"],
        ["mixed_precision budget=3bit bn", "uniform_per_channel bits=3 bn", "equal"],
        ["mixed_precision budget=5level bn", "uniform_per_channel levels=5 bn", "beats"],
        *(
            [f"{score} sparsity=0.9 bn", "magnitude_global sparsity=0.9 bn", "below"]
            for score in ("taylor", "obd_fisher", "obd_hessian", "obs_block")
        ),
        ["hessian_rounding rate=1e-10", "nncodec qp=-30", "below"],
        ["hessian_rounding rate=1e-10", "hessian_rounding rate=1e-10 one_sided", "beats"],
    ]
    assert found["points"][0].startswith("+10.00 [")
    # by hand: d is 1 for 100 of 1000 pictures
    half = 1.96 * np.sqrt(0.1 * 0.9 * 1000 / 999) / np.sqrt(1000) * 100
    assert found["points"][0] == f"+10.00 [{10 - half:+.2f}, {10 + half:+.2f}]"


def test_a_profile_is_chosen_by_what_its_table_holds(published):
    root = published.parent.parent
    assert results.committed_profile(root, ("full", "quick")) == published
    assert results.committed_profile(root, ("full", "quick"), technique="quantization") == published
    assert results.committed_profile(root, ("full", "quick"), technique="pruning") is None
    assert results.committed_profile(root, timed=True) == published
    part = published.parent / "standard"  # one without times yet: it is not what the README shows
    shutil.copytree(published, part)
    (part / "latency.csv").write_text((published / "latency.csv").read_text().splitlines()[0] + "\n")
    assert results.committed_profile(root) == part
    assert results.committed_profile(root, timed=True) == published
    assert "results/quick" in results.readme_block(root)


def test_fisher_channels_meet_each_network_of_equal_macs_and_training(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    np.save(tmp_path / tables.labels_name("digits"), labels)
    made = []

    def add(method, point, wrong, control="", *, images=200, seed=1, run="03_pruning", technique="pruning"):
        sha256 = f"{len(made) + 1:016x}" + "0" * 48
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "control": control, "technique": technique})
        made[-1] |= {"artifact_bytes": 100, "artifact_sha256": sha256, "train_images": images, "seed": seed}
        made[-1] |= {"run": f"quick/{run}/seed={seed}"}

    add("channels_fisher", "macs=4x mended tuned", 50)
    add("channels_fisher", "macs=4x tuned", 90)
    add("channels_fisher", "macs=4x mended tuned int8", 55)
    add("channels_fisher", "macs=4x mended iterative tuned", 65)
    add("channels_fisher", "macs=4x mended taught", 0)
    add("channels_fisher", "macs=4x mended", 20, images=0)  # not trained on: nothing to compare with
    add("channels_fisher", "macs=8x mended tuned", 90)
    add("channels_fisher", "macs=4x mended tuned", 0, "attempt")
    add("channels_l2", "macs=4x mended tuned", 10)  # not what was fixed before
    add("torch_pruning_taylor", "macs=4x even tuned", 80)
    add("torch_pruning_taylor", "macs=8x even tuned", 10)
    add("torch_pruning_bn_scale", "macs=4x even tuned", 80, images=300)  # of another budget
    add("torch_pruning_bn_scale", "macs=4x even tuned", 80, "attempt")
    add("channels_random", "macs=4x mended tuned", 70, "random")
    add("channels_random", "macs=8x mended tuned", 70, "random", images=300)  # of another budget
    add("from_scratch", "macs=4x", 30, "from_scratch", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=4x", 60, "small_dense", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=4x int8", 60, "small_dense", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=8x", 60, "small_dense", run="06_pipeline")  # its first training is not counted
    add("torch_pruning_taylor", "macs=4x even tuned", 0, seed=2)  # a seed without ours
    seed_1 = {"images": 1000, "technique": "baseline", "run": "01_baseline"}
    mended, plain = "channels_fisher macs=4x mended tuned", "channels_fisher macs=4x tuned"
    taught, eighth = "channels_fisher macs=4x mended taught", "channels_fisher macs=8x mended tuned"
    step_by_step = "channels_fisher macs=4x mended iterative tuned"
    cut = {
        (mended, "torch_pruning_taylor macs=4x even tuned", "beats"),
        (mended, "channels_random macs=4x mended tuned", "beats"),
        (plain, "torch_pruning_taylor macs=4x even tuned", "below"),
        (eighth, "torch_pruning_taylor macs=8x even tuned", "below"),
    }
    never_cut = {
        (mended, "from_scratch macs=4x", "below"),
        (mended, "small_dense macs=4x", "beats"),
        (f"{mended} int8", "small_dense macs=4x int8", "beats"),
        (plain, "from_scratch macs=4x", "below"),
        (plain, "small_dense macs=4x", "below"),
        (taught, "from_scratch macs=4x", "beats"),
        (taught, "small_dense macs=4x", "beats"),
        (step_by_step, "from_scratch macs=4x", "below"),
        (step_by_step, "small_dense macs=4x", "below"),
    }

    def told():
        found = results.comparisons(pd.DataFrame(made), tmp_path, dataset="digits")
        assert (found["seeds"] == 1).all()
        return {tuple(pair) for pair in found[["ours", "theirs", "verdict"]].values.tolist()}

    assert told() == cut  # how long the baseline was trained is not known
    add("train", "", 0, **seed_1 | {"images": 999})
    assert told() == cut
    made.pop()
    add("dense_finetuned", "", 0, "dense_finetuned", **seed_1)  # not the baseline
    assert told() == cut
    add("train", "", 0, **seed_1)
    assert told() == cut | never_cut
    made.pop()
    for row in made:  # of one run: its notebook sees to it
        row["run"] = row["run"].replace("/controls", "")
    assert told() == cut | never_cut


def test_taught_students_meet_those_alone_over_all_seeds(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    np.save(tmp_path / tables.labels_name("digits"), labels)
    made = []

    def row(method, point, wrong, *, seed, control="", images=100, technique="distillation"):
        sha256 = f"{len(made) + 1:016x}" + "0" * 48
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "artifact_bytes": 100 + seed, "control": control})
        made[-1] |= {"artifact_sha256": sha256, "seed": seed, "train_images": images, "technique": technique}

    for seed in (1, 2):
        row("train", "", 20, seed=seed, technique="baseline", images=900)
        row("student_alone", "width=0.25", 60, seed=seed, control="student_alone")
        row("student_longer", "width=0.25,times=2", 50, seed=seed, control="student_longer", images=200)
        row("kd", "width=0.25,T=4,alpha=0.9", 50 if seed == 1 else 30, seed=seed)
        row("kd", "width=0.25,T=4,alpha=0.9,shuffled", 90, seed=seed, control="shuffled_teacher")
        row("self", "width=0.25,T=4,alpha=0.9", 40, seed=seed, images=200)
        row("kd", "width=0.5,T=4,alpha=0.9", 10, seed=seed)  # nobody of its width is alone
        row("student_alone", "width=0.125", 20, seed=seed, control="student_alone")
        row("dkd", "width=0.125,T=4,alpha=0.5,others=8", 10, seed=seed)
    compression = pd.DataFrame(made)
    found = results.comparisons(compression, tmp_path, dataset="digits")
    assert sorted(found[["ours", "theirs", "seeds", "verdict"]].values.tolist()) == [
        ["dkd width=0.125,T=4,alpha=0.5,others=8", "student_alone width=0.125", 2, "beats"],
        ["kd width=0.25,T=4,alpha=0.9", "student_alone width=0.25", 2, "beats"],
        ["kd width=0.25,T=4,alpha=0.9,shuffled", "student_alone width=0.25", 2, "below"],
        ["self width=0.25,T=4,alpha=0.9", "student_longer width=0.25,times=2", 2, "beats"],
    ]
    # d is the mean over the seeds: 1 for 10 pictures, 1/2 for 20 of 1000
    difference = np.repeat([1.0, 0.5, 0.0], [10, 20, 970])
    half = 100 * 1.96 * difference.std(ddof=1) / np.sqrt(1000)
    by_name = found.set_index("ours")
    assert by_name["points"]["kd width=0.25,T=4,alpha=0.9"] == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    assert by_name["bytes"]["kd width=0.25,T=4,alpha=0.9"] == 102  # (101 + 102) / 2, rounded to even
    closed = results.gaps(compression, tmp_path, dataset="digits").set_index("student")["closed"].to_dict()
    assert closed == {
        "kd width=0.25,T=4,alpha=0.9": "50 %",  # 2 points of 4; the shuffled teacher is not asked
        "dkd width=0.125,T=4,alpha=0.5,others=8": "no gap",
    }


def test_the_pipeline_is_held_against_orders_and_every_rival():
    def row(method, point, nbytes, seed=1, technique="pipeline", control=""):
        about = {"technique": technique, "method": method, "point": point, "control": control}
        about |= {"artifact_bytes": nbytes, "seed": seed, "run": f"quick/06_pipeline/seed={seed}"}
        return about | {"train_images": 8}

    ours = [row(tables.PIPELINE, "bits=3", 80, s) for s in (1, 2)]
    ours += [row(tables.PIPELINE, "bits=4", 100, s) for s in (1, 2)]
    rivals = [row("small_dense", "", 99, s, "baseline", "small_dense") for s in (1, 2)]
    rivals += [row("small_dense_qat4", "", 79, 1, "baseline", "small_dense_qat4")]  # smaller than any of ours
    rivals += [
        row("prune_only", "macs=6x", 400, 1),
        row("prune_only", "bits=3,macs=6x", 90, 1),
    ]  # other budgets
    rivals += [row("xz", "bits=4", 120, 1, "peer"), row("prune_only", "bits=4", 500, 3)]  # no such seed
    rivals += [row("quantize_prune_distill", "bits=3", 70, 2)]  # another order: the same budgets
    rivals += [row("zstd", "bits=4", 120, 1, "peer") | {"train_images": 15}]  # another training
    stages = [row(tables.PIPELINE, "bits=4", 10, 1, control="after_prune")]
    pairs = paired._against_pipeline(pd.DataFrame(ours + rivals + stages))
    found = {(mine["point"], other["method"], other["seed"]) for mine, other in pairs}
    assert found == {
        ("bits=3", "small_dense", 1),
        ("bits=3", "small_dense", 2),
        ("bits=4", "xz", 1),
        ("bits=3", "quantize_prune_distill", 2),
        ("bits=3", "small_dense_qat4", 1),
    }
    ours = [row(tables.PIPELINE, "macs=6x,bits=4", 100)]  # an order that has one of its budgets
    [(mine, other)] = paired._against_pipeline(pd.DataFrame(ours + [row("prune_only", "macs=6x", 400)]))
    assert (mine["point"], other["point"]) == ("macs=6x,bits=4", "macs=6x")
    assert paired._against_pipeline(pd.DataFrame(rivals)) == []


def test_a_winner_is_held_against_the_network_by_hand():
    def row(method, point, seed, control="", notebook="05_architecture_search"):
        about = {"run": f"quick/{notebook}/seed={seed}", "method": method, "point": point, "seed": seed}
        return about | {"control": control}

    made = [row("gradient", f"macs=16x{taught}", seed) for taught in ("", " taught") for seed in (1, 2)]
    made += [row("thin_resnet18", "macs=16x", seed, "thin_resnet18") for seed in (1, 2)]
    made += [row("thin_resnet18", "macs=16x taught", 2, "thin_resnet18")]
    made += [row("torch_pruning", "macs=16x", 1, notebook="06_pipeline")]
    pairs = paired._against_thin(pd.DataFrame(made))
    found = [
        (mine["method"], mine["point"], mine["seed"], other["point"], other["seed"]) for mine, other in pairs
    ]
    assert found == [
        ("gradient", "macs=16x", 1, "macs=16x", 1),
        ("gradient", "macs=16x", 2, "macs=16x", 2),
        ("gradient", "macs=16x taught", 2, "macs=16x taught", 2),
    ]
