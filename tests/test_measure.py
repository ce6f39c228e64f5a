import os
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest

from nnc_utils import artifact, data, measure, rows, runtimes
from nnc_utils.runtimes import worker
from nnc_utils.runtimes.children import ChildError


def test_latency_measures_by_the_protocol(trained_digits, tmp_path, monkeypatch):
    visits = []
    ask = measure.Child.ask

    def recorded(child, order, **arguments):
        if order == "time" and arguments["seconds"]:
            visits.append((child._name.split()[-1], arguments["key"], arguments["batch"]))
        return ask(child, order, **arguments)

    monkeypatch.setattr(measure.Child, "ask", recorded)
    monkeypatch.setattr(measure, "SAMPLE", 300)  # digits have 360 test pictures
    for name in ("openvino", "executorch"):  # importing them fails now
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"nnc_utils.runtimes.{name}", raising=False)
        monkeypatch.delattr(runtimes, name, raising=False)
    request = {"path": trained_digits / "int8.safetensors", "runtime": "onnxruntime", "precision": "int8"}
    records = measure.latency(
        [request, *(request | {"runtime": name} for name in ("openvino", "executorch"))],
        dataset="digits",
        reference=trained_digits / "base.safetensors",
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
    small, large = visits[:5], visits[4 * 5 : 5 * 5]  # three networks and two identities at a batch
    assert len({*small, *large}) == 2 * 5 and {visit[2] for visit in small} == {1}
    assert visits[: 2 * 25] == 2 * (4 * small + large)  # two rounds
    small = [visit for visit in small if not visit[1].startswith("identity")]
    assert visits[2 * 25 :] == 2 * 4 * small  # again, in new processes
    twice = [r for r in records if r["control"] == "again"]
    records = [r for r in records if r["control"] != "again"]
    timed = [r for r in records if r["control"] != "identity"]
    for first, second in zip([r for r in timed if r["batch"] == 1], twice, strict=True):
        same = ("artifact_sha256", "runtime", "precision", "batch", "threads", "runtime_bytes")
        assert [first[key] for key in same] == [second[key] for key in same]
        assert second["accuracy"] is None is second["load_ms"] and second["p50_ms"] > 0
    assert [file.name for file in tmp_path.parent.glob("latency-*")] == []
    base, int8 = (artifact.read(trained_digits / f"{name}.safetensors") for name in ("base", "int8"))
    networks = {(r["runtime"], r["precision"], r["artifact_sha256"]) for r in records}
    assert networks == {
        ("eager", "fp32", ""), ("onnxruntime", "fp32", ""), ("eager", "fp32", base.sha256),
        ("onnxruntime", "fp32", base.sha256), ("onnxruntime", "int8", int8.sha256),
    }  # fmt: skip
    assert len(records) == 2 * len(networks)
    labels = data.load("digits").test.labels.numpy()
    for record in records:
        assert 0 < record["p50_ms"] <= record["p90_ms"] and record["iqr_ms"] >= 0
        assert (
            record["rounds"] == len(record["rounds_p50_ms"].split()) == 2 * (4 if record["batch"] == 1 else 1)
        )
        assert record["samples"] >= record["rounds"] * 2
        assert record["throughput"] == pytest.approx(1e3 * record["batch"] / record["p50_ms"], rel=1e-4)
        assert (record["control"] == "identity") == (record["artifact_sha256"] == "")
        if record["control"] == "identity":
            assert record["peak_rss_mb"] > 20
            continue
        sha256, how = record["artifact_sha256"], (record["runtime"], record["precision"])
        found = np.load(tmp_path / rows.timed_evidence(SimpleNamespace(**record)))
        eager = np.load(tmp_path / rows.evidence(sha256))
        assert record["accuracy"] == round(100 * (found == labels).mean(), 4)
        assert (record["agreement"] is None) == (record["precision"] == "fp32")  # seen to be what eager says
        assert (tmp_path / rows.evidence(sha256, *how)).exists() == (record["precision"] == "int8")
        if record["precision"] == "int8":
            assert record["agreement"] == round(100 * (found == eager).mean(), 4) > 97
        assert record["stored_codes"] == (1 if record["precision"] == "int8" else None)
        assert (
            20 < record["peak_rss_mb"] < 1500 and record["load_ms"] > 0 and record["runtime_bytes"] > 10_000
        )


def test_what_takes_least_is_visited_most():
    job = namedtuple("Job", ["runtime", "images", "key"])
    batches, jobs = (1, 64), [job("eager", "x", key) for key in "ab"]
    points = [(batch, threads) for threads in (1, 2) for batch in batches]
    visits = [measure._Visit(job.key, job, *point) for job in jobs for point in points]
    asked = []

    class Runtime:
        def ask(self, order, *, key, batch, **about):
            asked.append((key, batch))
            return [1]

    made = measure._time({("eager", False): Runtime()}, visits, rounds=1, share=0.1)
    around = [[(f"{key} {threads}", batch) for key in "ab"] for batch, threads in points]
    assert asked == 4 * around[0] + around[1] + around[2] + around[3]
    assert {len(made[v]) for v in visits if (v.batch, v.threads) != (1, 1)} == {1}


@pytest.mark.parametrize(("threads", "seconds"), [(1, 0.01), (2, 0.01), (2, 0.0)])
def test_several_threads_get_time_to_spread(tmp_path, monkeypatch, threads, seconds):
    monkeypatch.setattr(worker, "SPREAD", 0.5)
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 2, 2), np.float32))
    times = []
    process = worker.Worker("eager")
    process._sessions["a"] = SimpleNamespace(
        threads=threads, predict=lambda inputs: times.append(time.perf_counter())
    )
    samples = process.time(key="a", images=str(tmp_path / "x.npy"), batch=1, seconds=seconds)
    assert (times[-len(samples)] - times[0] >= 0.5) == (threads > 1 and seconds > 0)


def test_fp32_that_does_not_say_what_eager_says_is_classified_as_a_whole(
    trained_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "SAMPLE", 300)
    base = trained_digits / "base.safetensors"
    sha256 = artifact.read(base).sha256
    labels = data.load("digits").test.labels.numpy().astype(np.uint8)
    asked = []

    class Runtime:
        def ask(self, order, *, target, first=None, **about):
            asked.append(first)
            np.save(target, (labels[:first] + 1) % 10 if first else labels)

    job = measure._Job(
        str(base), artifact.read(base), "onnxruntime", "fp32", tmp_path / "scratch/x", tmp_path
    )
    job.file.parent.mkdir()
    about = {"dataset": "digits", "folder": tmp_path, "batch": 8, "threads": 1}
    found = measure._classify(Runtime(), job, {sha256: labels}, **about)
    assert found["accuracy"] == 100 == found["agreement"] and asked == [300, None]
    assert (tmp_path / rows.evidence(sha256, "onnxruntime", "fp32")).exists()


def test_latency_refuses_what_cannot_be_timed(trained_digits, tmp_path):
    where = {"dataset": "digits", "reference": trained_digits / "base.safetensors", "folder": tmp_path}
    base = {"path": trained_digits / "base.safetensors"}
    with pytest.raises(ValueError, match="eager has no precision 'int8'"):
        measure.latency([{**base, "runtime": "eager", "precision": "int8"}], **where)
    if not runtimes.available("inductor"):
        compiled = {**base, "runtime": "inductor", "precision": "fp32"}
        with pytest.raises(ValueError, match=r"inductor is compiled for \[1, 64\] only"):
            measure.latency([compiled], **where, batches=(1, 8))
    with pytest.raises(ValueError, match="rounds 0"):
        measure.latency([], **where, rounds=0)
    with pytest.raises(ChildError, match="could not convert: LoweringError: .*no activation range"):
        measure.latency([{**base, "runtime": "onnxruntime", "precision": "int8"}], **where)
    assert not list(tmp_path.parent.glob("latency-*"))


def test_others_at_work_are_told(capsys):
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)
    busy = measure._busy()
    burn.kill()
    burn.wait()
    assert busy > measure.BUSY / (os.cpu_count() or 1)
    assert ("warning: other processes" in capsys.readouterr().out) == (busy > measure.BUSY)
