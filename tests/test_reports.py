"""Committed tables as text: the headline and the report."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from result_files import timed_twice

from nnc_utils import artifact, data, encoding, results, rows, tables
from nnc_utils.reports import committed


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

    asked = []

    def compared(compression, predictions, *, dataset):
        asked.append(predictions.parent)
        about = {"ours": "a", "theirs": "b", "points": "+1 [+0, +2]", "verdict": pairs[predictions.parent]}
        return pd.DataFrame([about, about | {"ours": "c", "verdict": "equal"}])

    monkeypatch.setattr(committed, "comparisons", compared)
    summary = pd.read_csv(larger / "summary.csv")
    rounded = summary["technique"] == "quantization"
    summary.loc[rounded, ["delta_mean", "delta_ci_low", "delta_ci_high"]] = [-2.0, -3.0, -1.0]
    summary.to_csv(larger / "summary.csv", index=False)
    heading = "## What changed from the quick profile?"
    assert heading not in results.report_text(published)
    asked.clear()
    section = results.report_text(larger).split(heading)[1].split("##")[0]
    assert sorted(asked) == sorted([published, larger])  # the pairs of a profile are compared once
    point, pair = [line.split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    assert point[0] == "| uniform_per_channel bits=8" and point[3] == "no, -2.00 [-3.00, -1.00] |"
    assert pair == ["| a against b", "which is better?", "beats, +1 [+0, +2]", "below, +1 [+0, +2] |"]
    shutil.copy(published / "summary.csv", larger)
    pairs[larger] = "beats"
    assert "_none_" in results.report_text(larger).split(heading)[1].split("##")[0]


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


def test_the_report_says_whose_notebook_was_edited_since(published, monkeypatch):
    path = published / "provenance.json"
    record = json.loads(path.read_text())
    edited = next(name for name, run in sorted(record.items()) if run["notebook"] == "02_quantization")
    known = {run["notebook"]: run["notebook_sha256"] for run in record.values()}
    record[edited]["notebook_sha256"] = "1" * 64
    monkeypatch.setattr(committed, "code_sha256", lambda path: record[edited]["code_sha256"])
    monkeypatch.setattr(committed, "notebook_sha256", lambda path: known[path.stem])
    for run in record.values():
        run["code_sha256"] = record[edited]["code_sha256"]
    path.write_text(json.dumps(record))
    says = [line for line in results.report(published).splitlines() if "its notebook: older" in line]
    assert len(says) == 1 and says[0].startswith(f"| {edited} |")
    assert results.STALE_NOTE not in results.table(published)  # a notebook's cells are not the package


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


def test_the_report_says_whether_the_order_matters(published, monkeypatch):
    assert "Does the order matter?" not in results.report_text(published)
    ours = {"ours": f"{tables.PIPELINE} macs=8x", "bytes": "1000", "seeds": "1"}
    pairs = [
        {"theirs": "distill_prune_quantize macs=8x", "verdict": "below", "points": "-1.00 [-1.20, -0.80]"},
        {"theirs": "quantize_prune_distill macs=8x", "verdict": "beats", "points": "+1.00 [+0.80, +1.20]"},
        {"theirs": "prune_distill macs=8x", "verdict": "below", "points": "-2.00 [-2.20, -1.80]"},
    ]
    pairs = [ours | pair | {"their bytes": "2000"} for pair in pairs]
    monkeypatch.setattr(committed.Tables, "pairs", pairs)
    section = results.report_text(published).split("## Does the order matter?")[1].split("##")[0]
    below, above = (f"`{pair['theirs']}` (2,000 bytes, {pair['points']})" for pair in pairs[:2])
    assert f"`{tables.PIPELINE} macs=8x` (1,000 bytes): It is below {below}. It is above {above}." in section
    assert "-2.00" not in section  # not an order of all stages
