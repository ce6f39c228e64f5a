import dataclasses
import hashlib
import os
import subprocess
import sys
import time
import types

import numpy as np
import psutil
import pytest
import torch
from small_networks import PLAIN, quantized, saved

from nnc_utils import artifact, data, measure, models, peers, rows, runtimes
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.children import ChildError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained network on digits, and the same in 7-bit integers."""
    folder = tmp_path_factory.mktemp("artifacts")
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.build(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pictures = digits.normalize(digits.train.images)
    for _ in range(3):
        for batch in torch.randperm(len(pictures)).split(64):
            loss = torch.nn.functional.cross_entropy(model(pictures[batch]), digits.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    about = {"mean": digits.mean, "std": digits.std, "classes": digits.classes}
    artifact.save(model, folder / "base.safetensors", **about)
    artifact.save(quantized(model), folder / "int8.safetensors", **about)
    return folder


def test_score_is_the_reloaded_artifacts_accuracy(files, tmp_path, capfd):
    paths = [files / "int8.safetensors", files / "base.safetensors"]
    scores = measure.score(paths, dataset="digits", folder=tmp_path)
    digits = data.load("digits")
    for path, score in zip(paths, scores, strict=True):
        stored = artifact.read(path)
        with torch.inference_mode():
            classes = artifact.network(stored)(digits.normalize(digits.test.images)).argmax(1)
        predictions = np.load(score["predictions"])
        assert predictions.dtype == np.uint8 and (predictions != classes.numpy()).sum() <= 1
        assert score["correct"] == (predictions == digits.test.labels.numpy()).sum() > 200
        assert score["predictions"] == str(tmp_path / f"{stored.sha256[:16]}.npy")
        expected = {"path": str(path), "sha256": stored.sha256, "total": 400}
        expected |= {"artifact_bytes": path.stat().st_size, "params": models.parameters(PLAIN)}
        expected |= {"macs": models.macs(PLAIN), "nonzeros": stored.nonzeros}
        assert expected.items() <= score.items()
    assert capfd.readouterr().out.count("scored ") == 2
    changed = np.load(scores[0]["predictions"]) * 0
    np.save(scores[0]["predictions"], changed)  # found there, it is taken as it is
    again = list(measure._score([str(paths[0])], "digits", tmp_path, "test"))
    assert again[0]["correct"] == (digits.test.labels == 0).sum()
    assert measure.score([], dataset="digits", folder=tmp_path) == []


def test_a_peers_file_is_scored_like_an_artifact(files, tmp_path):
    """xz of the codes decodes to the artifact: same predictions, and a row that its file decides."""
    source, about = files / "int8.safetensors", {"dataset": "digits", "folder": tmp_path / "predictions"}
    path = peers.make("xz", source, None, tmp_path)
    [own] = measure.score([source], **about)
    [found] = measure.score([path], peer="xz", source=source, **about)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["sha256"] == sha256 and found["predictions"].endswith(f"{sha256[:16]}.npy")
    np.testing.assert_array_equal(np.load(found["predictions"]), np.load(own["predictions"]))
    assert found["artifact_bytes"] == path.stat().st_size and found["simulated"] is True
    weights = sum(np.prod(layer.weight_shape) for layer in models.layers(PLAIN))
    assert found["bits_per_weight"] == 8 * path.stat().st_size / weights
    assert all(found[name] == own[name] for name in ("params", "macs", "nonzeros", "correct", "total"))
    run = types.SimpleNamespace(profile="smoke", name="r", seed=1)
    about = {"run": run, "dataset": "digits", "model": "m", "technique": "peer", "method": "xz"}
    row = rows.compression_row(found, reference=own, **about)
    assert row.size_ratio == round(artifact.fp32_bytes(PLAIN) / path.stat().st_size, 4)
    assert (row.accuracy_delta, row.simulated, row.artifact_sha256) == (0, 1, sha256)


def test_a_peers_runtime_predicts_itself(files, tmp_path):
    source, digits = files / "base.safetensors", data.load("digits")
    pictures = digits.normalize(digits.train.images[:128]).numpy()
    path = peers.make("ort_static", source, pictures, tmp_path)
    about = {"dataset": "digits", "folder": tmp_path, "split": "validation"}
    [score] = measure.score([path], peer="ort_static", source=source, **about)
    images = digits.normalize(digits.validation.images).numpy()
    expected = peers.load("ort_static", path, source).predict(images).argmax(1)
    np.testing.assert_array_equal(np.load(score["predictions"]), expected)
    assert score["simulated"] is False and score["params"] == models.parameters(PLAIN) > score["nonzeros"]
    with pytest.raises(ValueError, match="peer 'xz' and source '': both are needed, or none"):
        measure.score([path], peer="xz", **about)
    with pytest.raises(ChildError, match="not an int8 network|InvalidProtobuf|INVALID_PROTOBUF"):
        measure.score([source], peer="ort_static", source=source, **about)


def test_validation_does_not_pass_for_test(files, tmp_path):
    path = files / "base.safetensors"
    [validation] = measure._score([str(path)], "digits", tmp_path, "validation")
    assert validation["total"] == 200 and not (tmp_path / rows.evidence(validation["sha256"])).exists()


def test_errors_of_the_child_come_back(files, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((files / "base.safetensors").read_bytes()[:-7])
    with pytest.raises(ChildError, match="broken.safetensors: truncated"):
        measure.score([broken], dataset="digits", folder=tmp_path)
    spec = dataclasses.replace(PLAIN, classes=3)
    saved(models.build(spec), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="1 channels and 3 classes: digits has 1 channels and 10 classes"):
        next(measure._score([str(tmp_path / "other.safetensors")], "digits", tmp_path, "test"))


def test_the_scoring_child_dies_with_its_parent(files, tmp_path):
    code = f"""
from nnc_utils import measure
measure.score([{str(files / "base.safetensors")!r}] * 10000, dataset="digits", folder={str(tmp_path)!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    parent.stdout.readline()  # one artifact is scored: the child is at work
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_latency_measures_by_the_protocol(files, tmp_path, monkeypatch):
    visits = []
    ask = measure.Child.ask

    def recorded(child, order, **arguments):
        if order == "time" and arguments["seconds"]:
            visits.append((child._name.split()[-1], arguments["key"], arguments["batch"]))
        return ask(child, order, **arguments)

    monkeypatch.setattr(measure.Child, "ask", recorded)
    for name in ("openvino", "executorch"):  # importing them fails now
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"nnc_utils.runtimes.{name}", raising=False)
        monkeypatch.delattr(runtimes, name, raising=False)
    request = {"path": files / "int8.safetensors", "runtime": "onnxruntime", "precision": "int8"}
    records = measure.latency(
        [request, *(request | {"runtime": name} for name in ("openvino", "executorch"))],
        dataset="digits",
        reference=files / "base.safetensors",
        folder=tmp_path,
        batches=(1, 8),
        threads=(1,),
        rounds=2,
        seconds=1.0,
        again=True,
    )
    about = {"profile": "smoke", "run": "r", "dataset": "digits", "model": "m", "technique": "baseline"}
    about |= {"method": "m", "point": "", "seed": 1, "headline": 0, "commit": "c"}
    for record in records:
        rows.LatencyRow(**about, **{k: v for k, v in record.items() if k in rows.LatencyRow.columns()})
    absent = [r for r in records if "why" in r]
    assert {(r["runtime"], r["precision"], r["batch"], r["why"], r.get("p50_ms")) for r in absent} == {
        (name, precision, batch, "not installed", None)
        for name in ("openvino", "executorch")
        for precision in ("fp32", "int8")
        for batch in (1, 8)
    }
    records = [r for r in records if "why" not in r]
    quarter = len(visits) // 4  # two rounds, then two more in new processes
    assert visits == 4 * visits[:quarter] and len(set(visits)) == quarter == 2 * 5
    twice = [r for r in records if r["control"] == "again"]
    records = [r for r in records if r["control"] != "again"]
    timed = [r for r in records if r["control"] != "identity"]
    for first, second in zip(timed, twice, strict=True):
        same = ("artifact_sha256", "runtime", "precision", "batch", "threads", "runtime_bytes")
        assert [first[key] for key in same] == [second[key] for key in same]
        assert second["accuracy"] is None is second["load_ms"] and second["p50_ms"] > 0
    assert [file.name for file in tmp_path.parent.glob("latency-*")] == []
    base, int8 = (artifact.read(files / f"{name}.safetensors") for name in ("base", "int8"))
    networks = {(r["runtime"], r["precision"], r["artifact_sha256"]) for r in records}
    assert networks == {
        ("eager", "fp32", ""), ("onnxruntime", "fp32", ""), ("eager", "fp32", base.sha256),
        ("onnxruntime", "fp32", base.sha256), ("onnxruntime", "int8", int8.sha256),
    }  # fmt: skip
    assert len(records) == 2 * len(networks)
    labels = data.load("digits").test.labels.numpy()
    for record in records:
        assert 0 < record["p50_ms"] <= record["p90_ms"] and record["iqr_ms"] >= 0
        assert record["samples"] >= 2 * 3 and record["rounds"] == 2
        assert record["throughput"] == pytest.approx(1e3 * record["batch"] / record["p50_ms"], rel=1e-4)
        assert (record["control"] == "identity") == (record["artifact_sha256"] == "")
        if record["control"] == "identity":
            continue
        sha256, how = record["artifact_sha256"], (record["runtime"], record["precision"])
        found = np.load(tmp_path / rows.evidence(sha256, *how))
        eager = np.load(tmp_path / rows.evidence(sha256))
        assert record["accuracy"] == round(100 * (found == labels).mean(), 4)
        assert record["agreement"] == round(100 * (found == eager).mean(), 4) > 97
        assert record["stored_codes"] == (1 if record["precision"] == "int8" else None)
        assert (
            20 < record["peak_rss_mb"] < 1500 and record["load_ms"] > 0 and record["runtime_bytes"] > 10_000
        )


def test_latency_refuses_what_cannot_be_timed(files, tmp_path):
    where = {"dataset": "digits", "reference": files / "base.safetensors", "folder": tmp_path}
    base = {"path": files / "base.safetensors"}
    with pytest.raises(ValueError, match="eager has no precision 'int8'"):
        measure.latency([{**base, "runtime": "eager", "precision": "int8"}], **where)
    if not runtimes.available("inductor"):
        compiled = {**base, "runtime": "inductor", "precision": "fp32"}
        with pytest.raises(ValueError, match=r"inductor is compiled for \[1, 64\] only"):
            measure.latency([compiled], **where, batches=(1, 8))
    with pytest.raises(ValueError, match="rounds 0"):
        measure.latency([], **where, rounds=0)
    with pytest.raises(qdq.LoweringError, match="no activation range"):
        measure._job(str(base["path"]), "onnxruntime", "int8", dataset="digits", folder=tmp_path)


def test_others_at_work_are_told(capsys):
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)
    busy = measure._busy()
    burn.kill()
    burn.wait()
    assert busy > measure.BUSY / (os.cpu_count() or 1)
    assert ("warning: other processes" in capsys.readouterr().out) == (busy > measure.BUSY)


def test_hardware_says_what_measured():
    hardware = measure.hardware()
    assert hardware["cpu"] and hardware["cores"] == os.cpu_count() >= hardware["usable_cores"] >= 1
    assert abs(hardware["memory_gb"] - psutil.virtual_memory().total / 1e9) < 0.1
    assert set(hardware["flags"]) <= set(measure.FLAGS) and len(hardware["load_average"]) == 3
