"""What is written of committed tables, and which profile a reader is shown."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from result_files import timed_twice

from bench import committed, pairs, publish, readme, report, tables
from bench.folder import environment as environment_of_children
from nnc_utils import artifact, data, encoding, rows

ONE = '{"bits":8}'


def altered(path, where, **values):
    """Change columns of the rows of a CSV for which `where` is true."""
    frame = pd.read_csv(path, keep_default_na=False, dtype=str)
    frame.loc[where(frame), list(values)] = [str(value) for value in values.values()]
    frame.to_csv(path, index=False)


def quantized(frame):
    return frame["technique"] == "quantization"


def section(text, heading):
    return text.split(f"## {heading}")[1].split("\n## ")[0]


def test_the_readme_gets_the_best_profile_between_its_markers(published):
    root = published.parents[1]
    assert readme.update(root) and not readme.update(root)
    text = (root / "README.md").read_text()
    assert text.startswith("# T\n") and text.endswith("\nrest\n") and "\nold\n" not in text
    for file in (published / "artifacts").iterdir():
        assert f"](results/quick/artifacts/{file.name})" in text
    (published / "figures/headline.png").write_bytes(b"png")
    assert readme.update(root)
    assert "](results/quick/figures/headline.png)" in (root / "README.md").read_text()
    published.rename(root / "results/standard")
    readme.update(root)
    assert "results/standard/report.md" in (root / "README.md").read_text()
    (root / "README.md").write_text("no markers")
    with pytest.raises(tables.ResultError, match="headline:begin"):
        readme.update(root)


def test_the_command_writes_figure_report_and_readme(published, monkeypatch):
    root = published.parents[1]
    (published / "compression.csv").rename(root / "before.csv")
    command = [sys.executable, "-m", "bench", "publish", "--profile", "quick"]  # from runs, then the report
    environment = environment_of_children() | {"NNC_ROOT": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (published / "compression.csv").read_bytes() == (root / "before.csv").read_bytes()
    assert (published / "figures/headline.png").read_bytes().startswith(b"\x89PNG")
    assert "headline.png" in (published / "report.md").read_text()
    assert "results/quick/figures/headline.png" in (root / "README.md").read_text()
    with pytest.raises(SystemExit):
        report.main(["publish"])  # of which profile?
    with pytest.raises(SystemExit, match="no tables of full"):
        report.main(["report", "--profile", "full"])
    monkeypatch.setattr(report, "publish_finished", lambda *_: (root / "README.md" / "a").touch())
    with pytest.raises(SystemExit, match="Not a directory"):
        report.main(["publish", "--profile", "quick"])


def test_a_profile_is_chosen_by_what_its_table_holds(published):
    root = published.parent.parent
    chosen = committed.committed_profile
    assert chosen(root, ("full", "quick")) == published
    assert chosen(root, ("full", "quick"), technique="quantization") == published
    assert chosen(root, ("full", "quick"), technique="pruning") is None
    assert chosen(root, timed=True) == published
    part = published.parent / "standard"  # one without times yet: it is not what the README shows
    shutil.copytree(published, part)
    (part / "latency.csv").write_text((published / "latency.csv").read_text().splitlines()[0] + "\n")
    assert chosen(root) == part
    assert chosen(root, timed=True) == published


def test_the_headline_is_six_rows_at_most_and_six_columns(published):
    lines = report.text(published, "headline").splitlines()
    [head, _, dense, int8] = [line for line in lines if line.startswith("|")]
    assert head.count("|") == 7
    cells = [cell.strip() for cell in int8.strip("|").split("|")]
    summary = pd.read_csv(published / "summary.csv").set_index("technique").loc["quantization"]
    assert cells[:2] == ["int8, without training", f"{summary['accuracy_mean']:.2f} %"]
    assert cells[2].startswith(f"{summary['delta_mean']:+.2f} [") and cells[2].endswith(": **cannot tell**")
    assert cells[3].endswith(f"**{summary['size_ratio']:.2f}×** smaller")
    assert cells[4:] == ["0.500 ms, ONNX Runtime", "**4.00×**"]
    assert dense.endswith("| 2.000 ms, ONNX Runtime | 1× |") and "| – |" in dense
    altered(published / "summary.csv", quantized, no_loss=1, delta_ci_low=-0.2)
    assert ": **yes** |" in report.text(published, "headline")


def test_the_report_begins_with_findings_and_shows_a_table_each_technique(published):
    text = report.text(published)
    findings = text.split("## Six networks")[0]
    ratio = pd.read_csv(published / "summary.csv").set_index("technique")["size_ratio"]["quantization"]
    assert f"In int8 the network is {ratio:.2f}× smaller and 4.00× as fast" in findings
    assert "(claim)" not in section(text, "Quantization")  # of one seed
    assert f"| cannot tell | {ratio:.2f}× | 0.500 ms (4.00×), ONNX Runtime |" in section(text, "Quantization")
    assert "- Other hardware" in section(text, "What is not shown") and "## Pruning" not in text


def test_a_techniques_table_holds_claims_and_what_no_smaller_file_beats(published):
    tables = committed.Tables(published)
    ratios, deltas = [2, 4, 6, 8, 10], [0.0, -0.5, -0.2, -0.9, -1.0]
    more = pd.concat([tables.summary[quantized(tables.summary)]] * 5).assign(
        size_ratio=ratios, delta_mean=deltas, headline=[0, 0, 0, 1, 0]
    )
    tables.summary = more
    assert list(tables.best_of("quantization")["size_ratio"]) == [2, 6, 8, 10]
    assert list(tables.best_of("quantization", most=2)["size_ratio"]) == [2, 8]


def test_the_report_says_what_holds(published):
    report.write(published)
    for name in report.TEXTS:
        assert (published / f"{name}.md").read_text() == report.text(published, name) + "\n"
    text = report.text(published, "details")
    claim = section(text, "Chosen on validation")
    assert (
        "**these images cannot tell** whether within 0.3 pp. " in claim
        and "4.00× as fast as the fastest fp32 runtime" in claim
    )
    assert "quick/07_deployment/seed=1" in text and "more than 450,000" in text
    altered(published / "summary.csv", quantized, no_loss=1, delta_ci_low=-0.2)
    text = report.text(published, "details")
    assert ": within 0.3 pp" in section(text, "Chosen")


def test_a_line_is_of_the_code_that_was_timed(published):
    lines = section(report.text(published, "details"), "Every timed network").splitlines()
    cells = [
        cell.strip()
        for cell in next(line for line in lines if "onnxruntime int8" in line).strip("|").split("|")
    ]
    right = np.load(next((published / "predictions").glob("*.onnxruntime.int8.npy")))
    labels = np.load(published / "predictions/labels-digits.npy")
    assert cells[2] == f"{100 * (right == labels).mean():.2f}"  # and not of eager
    assert cells[-3:] == ["0.500", "8.00×", "4.00×"]


def test_the_share_of_macs_in_integers_is_shown_where_it_is_known(published):
    before = report.text(published, "details")
    assert "in integers" not in before
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    for folder in [folder for folder in folders if folder.parent.name == "02_quantization"]:
        record = json.loads((folder / "result.json").read_text())
        sha256, share = record["compression"][0]["artifact_sha256"], 0.628 if folder.name == "seed=1" else 1.0
        record["extra"]["integer_macs"] = {sha256: share}
        (folder / "result.json").write_text(json.dumps(record))
    publish.publish(folders, "quick")
    heading = "What other tools' files compute in integers"
    shown = section(after := report.text(published, "details"), heading)
    assert [line.split(" | ")[-1] for line in shown.splitlines() if " % |" in line] == ["62.8 % |"]
    assert after.replace(f"## {heading}{shown}\n", "") == before


def test_older_code_is_told_in_one_sentence(published, monkeypatch):
    monkeypatch.setattr(committed, "is_older", lambda record: False)
    assert "Older code" not in report.text(published, "details")
    monkeypatch.setattr(committed, "is_older", lambda record: record["notebook"] == "02_quantization")
    text = report.text(published, "details")
    assert text.count("Older code than this repository's measured 2 of 5 runs") == 1


def test_the_report_says_how_far_two_measurements_are_apart(example, published):
    [pair] = committed.twice(pd.DataFrame(timed_twice(example))).to_dict("records")
    assert pair["precision"] == "int8"  # the uncompressed network is the measure, not measured
    assert pair["speedup_eager_fp32 apart"] == pytest.approx(150.0)  # 8 and 20 times
    assert pair["speedup_best_fp32 apart"] == pytest.approx(25.0)  # 4 and 5
    path = published / "latency.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame = frame[frame["control"] != "identity"]
    frame["speedup_best_fp32"] = frame["speedup_best_fp32"].astype(float)
    for factor, said in ((1.05, "None is further apart"), (1.155, ", 16 % |")):
        second = frame.assign(
            control="again", headline=0, speedup_best_fp32=frame["speedup_best_fp32"] * factor
        )
        pd.concat([frame, second]).to_csv(path, index=False)
        assert said in section(report.text(published, "details"), "Time, measured twice")


def test_the_report_says_how_restless_the_host_was(published):
    assert committed.unrest(pd.read_csv(published / "latency.csv")) == 0
    altered(
        published / "latency.csv", lambda frame: frame["rounds"] == "5", rounds_p50_ms="1.0 1.0 1.2 1.4 1.4"
    )
    assert committed.unrest(pd.read_csv(published / "latency.csv")) == pytest.approx(100 / 3)


def test_the_report_says_how_many_configurations_have_one_seed_only(published):
    frame = pd.read_csv(published / "summary.csv", keep_default_na=False)
    for seeds, said in ((1, "of 2 of 2"), ([3, 1], "of 1 of 2"), (3, None)):
        frame.assign(seeds=seeds).to_csv(published / "summary.csv", index=False)
        text = section(report.text(published, "details"), "Not measured")
        assert (said or "none") in text if said else "spread between seeds" not in text


def test_the_report_says_where_the_zeros_lie(example, published):
    from conftest import _run, _score, write_notebook

    root, digits = published.parents[1], data.load("digits")
    folders = [root / folder.relative_to(example.root) for folder in example.folders]
    write_notebook(root, "03_pruning", "from nnc_utils import training\n")
    run = _run(root, "03_pruning", 1, [tables.read_run(folders[0])])
    network = artifact.load(folders[0] / "artifacts/network.safetensors")
    for layer in ("conv1", "layer4.1.conv2"):  # of the one a quarter stays, of the other nothing
        weight = network.get_submodule(layer).weight.detach()
        kept = (torch.arange(weight.numel()) % 4 == 0).view(weight.shape) & (layer == "conv1")
        kept.view(-1)[0] = True
        encoding.attach(network.get_submodule(layer), encoding.Dense(weight * kept, kept))
    path = run.path("artifacts/masked.safetensors")
    stored = artifact.save(network, path, mean=digits.mean, std=digits.std, classes=digits.classes)
    named = {"model": "tiny", "technique": "pruning", "method": "weights", "settings": '{"sparsity":0.3}'}
    row = rows.compression_row(
        _score(path, stored, digits), run=run, dataset="digits", reference=run.upstream[0], **named
    )
    run.finish(compression=[row])
    publish.publish([*folders, run.folder], "quick")
    shown = section(report.text(published, "details"), "Where do the zeros lie?")
    heading, _, line = [text.split("|")[1:-1] for text in shown.splitlines() if text.startswith("|")]
    parts = ["all", "conv1", *(f"layer{n}" for n in range(1, 5)), "fc"]
    assert [part.strip() for part in heading[2:]] == parts
    name, _, total, stem, *shares = (part.strip() for part in line)
    assert name == "30 % zeros by magnitude, seed 1" and stem == "75.0"
    last = 64 * 9 * (32 + 3 * 64) + 32 * 64
    assert shares == ["0.0"] * 3 + [f"{100 * 64 * 64 * 9 / last:.1f}", "0.0"]
    weights = sum(math.prod(weight.shape) for weight in stored.weights.values())
    assert total == f"{100 * (64 * 64 * 9 + 0.75 * network.conv1.weight.numel()) / weights:.1f}"
    # without the file what was published stays known, whether the run is here or not
    path.unlink()
    before = (published / "compression.csv").read_bytes()
    for here in ([*folders, run.folder], folders):
        publish.publish(here, "quick", keep=True)
        assert (published / "compression.csv").read_bytes() == before
        assert shown in report.text(published, "details")


def pair(ours, theirs, verdict, low=0.8, *, seeds=3):
    """A pair as `pairs.pairs` has it; both sides as (method, settings)."""
    sides = pd.DataFrame([ours, theirs], columns=["method", "settings"]).assign(control="", technique="")
    delta = {"accuracy_delta": low + 0.2, "delta_ci_low": low, "delta_ci_high": low + 0.4}
    table = rows.with_settings(sides)
    return pairs.Pair(table.iloc[0], table.iloc[1], 1000, 2000, delta, seeds, verdict)


def test_the_report_says_whether_the_order_matters(published, monkeypatch):
    assert "Does the order matter?" not in report.text(published, "details")
    ours = ("pipeline", '{"bits":4,"macs":8}')
    orders = [
        json.dumps({"bits": 4, "macs": 8, "stages": s})
        for s in (["distill", "prune", "quantize"], ["quantize"])
    ]
    orders[1] = orders[1].replace('"macs": 8, ', "")
    told = [pair(ours, ("pipeline", settings), "below") for settings in orders]
    monkeypatch.setattr(committed.Tables, "pairs", told)
    lines = section(report.text(published, "details"), "Does the order matter?").splitlines()
    [line] = [line for line in lines if "below" in line]  # the other is no order of all stages
    assert "distill → prune → quantize" in line and "| 2,000 |" in line
