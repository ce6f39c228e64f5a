"""Runs read back, and their summary over seeds."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from result_files import edit

from bench import tables


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
        common = {
            "dataset": "digits",
            "technique": "quantization",
            "method": "m",
            "settings": "",
            "control": "",
        }
        sha = {"artifact_sha256": f"b{seed}" * 32, "reference_sha256": f"a{seed}" * 32}
        sizes = {"size_ratio": 4.0 + seed, "artifact_bytes": 1000, "params": 10, "macs": 20}
        accuracy = 100 * right["b", seed].mean()
        record = {"seed": seed, "division": "closed", "headline": 1, "accuracy": accuracy, "train_images": 0}
        records.append(common | sha | sizes | record)
    summary = tables.summarize(pd.DataFrame(records), tmp_path).iloc[0]
    other = [*records[:2], records[2] | {"train_images": 8, "run": "of 8"}]
    with pytest.raises(tables.ResultError, match=r"its seeds saw .* 8 \(of 8\) images"):
        tables.summarize(pd.DataFrame([{"run": "r"} | record for record in other]), tmp_path)

    differences = [sum(right["b", s][i] - right["a", s][i] for s in (1, 2, 3)) / 3 * 100 for i in range(500)]
    mean = sum(differences) / 500
    more = [*differences, 100, -100]  # an image that is won and one that is lost
    deviation = math.sqrt(sum((d - sum(more) / 502) ** 2 for d in more) / 501)
    half = 1.96 * deviation / math.sqrt(500)
    assert summary["delta_mean"] == pytest.approx(mean, abs=1e-4)
    assert summary["delta_ci_low"] == pytest.approx(mean - half, abs=1e-4)
    assert summary["delta_ci_high"] == pytest.approx(mean + half, abs=1e-4)
    assert summary["no_loss"] == int(mean - half >= -0.3)
    accuracies = pd.Series([100 * right["b", s].mean() for s in (1, 2, 3)])
    assert summary["accuracy_sd"] == pytest.approx(accuracies.std(), abs=1e-4)
    assert (summary["seeds"], summary["size_ratio"]) == (3, 6.0)


def test_read_run_trusts_nothing(published):
    folder = published.parents[0] / "runs/quick/02_quantization/seed=1"
    run = tables.read_run(folder)
    assert run.artifact("network").is_file() and run.dataset == "digits"
    assert run.artifact(run.compression[0].artifact_sha256) == run.artifact("network")
    with pytest.raises(tables.ResultError, match="it has network"):
        run.artifact("nothing")
    good = (folder / "result.json").read_text()

    edit(folder, parameters={"seed": 7})
    with pytest.raises(tables.ResultError, match="hash"):
        tables.read_run(folder)
    (folder / "result.json").write_text(good)
    [entry] = json.loads(good)["artifacts"]
    edit(folder, artifacts=[entry | {"path": "../seed=2/artifacts/network.safetensors"}])
    with pytest.raises(tables.ResultError, match="outside"):
        tables.read_run(folder)
    old = {name: value for name, value in json.loads(good).items() if name not in ("seed", "profile")}
    (folder / "result.json").write_text(json.dumps(old | {"width": 1}))
    with pytest.raises(tables.ResultError, match="of another version .*Field required, and 2 more") as told:
        tables.read_run(folder)
    assert "\n" not in str(told.value)
    (folder / "result.json").write_text(good[:-20])
    with pytest.raises(tables.ResultError, match="not valid"):
        tables.read_run(folder)
    (folder / "result.json").write_text(good)
    content = bytearray(run.artifact("network").read_bytes())
    content[-1] ^= 1
    run.artifact("network").write_bytes(content)
    with pytest.raises(tables.ResultError, match="differs"):
        tables.read_run(folder)
    run.artifact(
        "network"
    ).unlink()  # left on the machine that trained it: its rows count, who wants it is told
    left = tables.read_run(folder)
    assert left.compression == run.compression
    with pytest.raises(tables.ResultError, match="is missing: bring it"):
        left.artifact("network")
    (folder / "result.json").unlink()
    with pytest.raises(tables.ResultError, match="no finished run"):
        tables.read_run(folder)


@pytest.mark.parametrize("low", [-0.3, -0.3001])
def test_no_loss_is_the_lower_end_at_least_minus_0_3(monkeypatch, published, low):
    monkeypatch.setattr(
        tables,
        "differences",
        lambda **arrays: {"accuracy_delta": 0.0, "delta_ci_low": low, "delta_ci_high": 0.2},
    )
    frame = pd.read_csv(published / "compression.csv", keep_default_na=False)
    assert set(tables.summarize(frame, published / "predictions")["no_loss"]) == {int(low == -0.3)}


def test_the_smallest_claim_is_named_or_else_the_nearest():
    """The smallest file has the largest ratio."""
    summary = pd.DataFrame(
        {
            "size_ratio": [100.0, 160.0, 130.0, 200.0],
            "headline": [1, 1, 1, 0],
            "delta_ci_low": [0.0, -0.2, -0.1, -3],
        }
    )
    assert tables.smallest_claim(summary)["size_ratio"] == 160.0
    assert tables.smallest_claim(summary.assign(headline=0))["size_ratio"] == 100.0
    assert tables.smallest_claim(summary.head(0)) is None


@pytest.mark.parametrize("accuracy, told", [(75, True), (75.1, False)])
def test_a_baseline_that_only_guesses_is_told_to_who_builds_on_it(accuracy, told, capsys):
    labels = torch.tensor([1, 0, 1, 1], dtype=torch.uint8)
    assert ("always naming the same class on 75.00 %" in tables.guessing(accuracy, labels)) is told
    row = SimpleNamespace(technique="baseline", accuracy=accuracy)
    extra = SimpleNamespace(images={"test": "abc"})
    run = SimpleNamespace(record=SimpleNamespace(extra=extra), compression=[row], run="01")
    split = SimpleNamespace(test=SimpleNamespace(labels=labels), digests=lambda: extra.images)
    tables.Run.check_images(run, SimpleNamespace(images=split))
    assert ("cannot lose what it has not learned" in capsys.readouterr().out) is told
