"""The protocol of timing, workers' orders carried out in this process; test_runtimes.py has real workers."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Inline

from nnc_utils import artifact, data, measure, rows, runtimes
from nnc_utils.runtimes.children import ChildError
from nnc_utils.runtimes.worker import Worker


@pytest.fixture
def log(monkeypatch, scored_here):
    """Orders as (child, order, arguments)."""
    log = []

    @contextlib.contextmanager
    def worker(name, folder, *, beside_others=False):
        assert folder.name == measure.SCRATCH or not beside_others
        yield Inline(Worker(name), name, log)

    monkeypatch.setattr(measure, "worker", worker)
    monkeypatch.setattr(measure.psutil, "cpu_percent", lambda interval: 3.0)
    return log


def test_an_integer_network_that_a_runtime_refuses_to_run_costs_no_other(
    trained_digits, tmp_path, monkeypatch, log
):
    time = Worker.time

    def refuses(self, **arguments):
        if [a["precision"] for _, order, a in log if order == "load"][-1] == "int8":
            raise RuntimeError("unsupported parameter")
        return time(self, **arguments)

    monkeypatch.setattr(Worker, "time", refuses)
    about = {"dataset": "digits", "reference": trained_digits / "base.safetensors", "folder": tmp_path}
    request = {"path": trained_digits / "int8.safetensors", "precision": "int8", "runtime": "onnxruntime"}
    few = {"batches": (1,), "threads": (1,), "rounds": 1, "seconds": 0.1}
    records = measure.latency([request], **about, **few)
    timed = {(r["runtime"], r["precision"], r["control"]) for r in records if "why" not in r}
    assert timed == {(name, "fp32", what) for name in ("eager", "onnxruntime") for what in ("", "identity")}
    (told,) = [r for r in records if "why" in r]
    assert told["precision"] == "int8" and told["why"].startswith("onnxruntime refuses to run int8 (")
    assert "unsupported parameter" in told["why"]


def test_latency_measures_by_the_protocol(trained_digits, tmp_path, monkeypatch, log):
    monkeypatch.setattr(measure, "SAMPLE", 300)  # digits have 400 test images
    available, absent = runtimes.available, ("openvino", "executorch")
    missing = {name: "not installed" for name in absent}
    monkeypatch.setattr(
        runtimes, "available", lambda name, *kind: missing.get(name) or available(name, *kind)
    )
    request = {"path": trained_digits / "int8.safetensors", "precision": "int8"}
    records = measure.latency(
        [request | {"runtime": name} for name in ("onnxruntime", *absent)],
        dataset="digits",
        reference=trained_digits / "base.safetensors",
        folder=tmp_path,
        batches=(1, 8),
        threads=(1,),
        rounds=2,
        seconds=1.0,
        again=True,
    )
    told = [r for r in records if "why" in r]
    assert {(r["runtime"], r["precision"], r["batch"], r["why"], r.get("p50_ms")) for r in told} == {
        (name, precision, batch, "not installed", None)
        for name in absent
        for precision in ("fp32", "int8")
        for batch in (1, 8)
    }
    records = [r for r in records if "why" not in r]

    timed = [(child, a) for child, order, a in log if order == "time" and a["seconds"]]
    visits = [(child, a["key"], a["batch"]) for child, a in timed]
    small, large = visits[:5], visits[4 * 5 : 5 * 5]  # three networks and two identities at a batch
    assert len({*small, *large}) == 2 * 5 and {visit[2] for visit in small} == {1}
    assert visits[: 2 * 25] == 2 * (4 * small + large)  # two rounds
    assert len({child for child, *_ in small}) == 4  # the identity networks in workers of their own
    small = [visit for visit in small if not visit[1].startswith("identity")]
    twice = visits[2 * 25 :]  # again, in new processes
    assert [v[1:] for v in twice] == [v[1:] for v in 2 * 4 * small]
    assert not {v[0] for v in twice} & {v[0] for v in visits[:50]}
    probes = [child for child, order, a in log if order == "time" and not a["seconds"]]
    assert len({*probes}) == len(probes) == 3 and not {*probes} & {v[0] for v in visits}

    repeated = [r for r in records if r["control"] == "again"]
    records = [r for r in records if r["control"] != "again"]
    first = [r for r in records if r["control"] != "identity" and r["batch"] == 1]
    same = ("artifact_sha256", "runtime", "precision", "batch", "threads", "runtime_bytes")
    for one, other in zip(first, repeated, strict=True):
        assert [one[key] for key in same] == [other[key] for key in same]
        assert other["accuracy"] is None is other["load_ms"] and other["p50_ms"] > 0
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
        times = 2 * (4 if record["batch"] == 1 else 1)
        assert record["rounds"] == len(record["rounds_p50_ms"].split()) == times
        assert record["samples"] >= record["rounds"] * 2 and record["cpu_busy_before"] == 3
        assert record["peak_rss_mb"] > 20
        assert (record["control"] == "identity") == (record["artifact_sha256"] == "")
        if record["control"] == "identity":
            continue
        sha256, where = record["artifact_sha256"], (record["runtime"], record["precision"])
        classes = np.load(tmp_path / rows.timed_evidence(SimpleNamespace(**record)))
        eager, is_int8 = np.load(tmp_path / rows.evidence(sha256)), record["precision"] == "int8"
        assert record["accuracy"] == round(100 * (classes == labels).mean(), 4)
        assert (record["agreement"] is None) == (not is_int8)  # seen to be what eager says
        assert (tmp_path / rows.evidence(sha256, *where)).exists() == is_int8
        assert not is_int8 or record["agreement"] == round(100 * (classes == eager).mean(), 4) > 97
        assert record["stored_codes"] == (1 if is_int8 else None)
        assert record["load_ms"] > 0 and record["runtime_bytes"] > 10_000
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def job(tmp_path, key="", **changes):
    file = tmp_path / "scratch" / "network.onnx" if key else None
    network = SimpleNamespace(sha256=key, ranges={})
    return measure._Job(**{"runtime": "eager", "precision": "fp32", "network": network} | {
        "images": tmp_path, "path": "", "file": file} | changes)  # fmt: skip


def test_what_takes_least_is_visited_most_and_identities_shortly(tmp_path):
    points = [(batch, threads) for threads in (1, 2) for batch in (1, 64)]
    jobs, asked = [job(tmp_path), job(tmp_path, "a"), job(tmp_path, "b")], []

    def ask(order, *, key, batch, seconds, images):
        asked.append((key, batch, seconds))
        return [len(asked)]

    workers = {("eager", identity): SimpleNamespace(ask=ask) for identity in (True, False)}
    visits = [(job, *point) for job in jobs for point in points]
    samples = measure._time(workers, visits, rounds=1, share=0.3)
    cap = measure.IDENTITY_SECONDS
    sweeps = [
        [(f"identity {t}", batch, cap), (f"a fp32 {t}", batch, 0.3), (f"b fp32 {t}", batch, 0.3)]
        for batch, t in points
    ]
    assert asked == 4 * sweeps[0] + sweeps[1] + sweeps[2] + sweeps[3]
    assert samples[jobs[2], 1, 1] == [[3], [6], [9], [12]] and samples[jobs[0], 64, 2] == [[19]]
    asked.clear()
    measure._time(workers, visits[:1], rounds=1, share=cap / 2)
    assert {seconds for *_, seconds in asked} == {cap / 2}


def test_a_summary_is_of_all_samples_and_names_each_visits_median():
    samples = [[1_000_000, 2_000_000, 9_000_000], [4_000_000, 5_000_000]]
    summary = measure._summary(samples, batch=8)
    assert summary == {
        "rounds": 2, "rounds_p50_ms": "2 4.5", "p50_ms": 4.0, "p90_ms": pytest.approx(7.4),
        "iqr_ms": 3.0, "throughput": 2000.0, "samples": 5,
    }  # fmt: skip


@pytest.mark.parametrize("rounds, expected", [(5, [2.0, 20.0]), (1, [3.0, 30.0])])
def test_of_the_rounds_the_lowest_but_one_counts(trained_digits, tmp_path, monkeypatch, rounds, expected):
    """A round that others disturbed, and one that was lucky, both count for nothing."""
    times = {"0": iter([3, 9, 1, 2, 7]), "1": iter([30, 20, 90, 70, 10])}
    visited = []

    class Runtime:
        def ask(self, order, *, key="", images="", **rest):
            if order != "time":
                return "file"
            visited.append(key)
            assert np.load(images).shape == (4, 1, 8, 8)
            p50 = 1_000_000 * next(times[key])
            return [p50, p50, 50 * p50]

    monkeypatch.setattr(measure, "worker", lambda *_: contextlib.nullcontext(Runtime()))
    paths = [trained_digits / "base.safetensors"] * 2
    how = {"runtime": "onnxruntime", "precision": "fp32", "folder": tmp_path, "rounds": rounds}
    assert measure.milliseconds(paths, **how) == expected
    assert visited == ["0", "1"] * rounds
    with pytest.raises(RuntimeError, match="onnxruntime fp32: gone"):
        monkeypatch.setattr(runtimes, "available", lambda *_: "gone")
        measure.milliseconds(paths, **how)


def test_fp32_that_does_not_say_what_eager_says_is_classified_as_a_whole(
    trained_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "SAMPLE", 300)
    network = artifact.read(trained_digits / "base.safetensors")
    labels = data.load("digits").test.labels.numpy().astype(np.uint8)
    asked = []

    class Runtime:
        def ask(self, order, *, target, first=None, **rest):
            asked.append(first)
            np.save(target, (labels[:first] + 1) % 10 if first else labels)

    one = job(tmp_path, "a", runtime="onnxruntime", network=network)
    one.file.parent.mkdir()
    np.save(tmp_path / rows.evidence(network.sha256), labels)
    record = measure._classify(Runtime(), one, dataset="digits", folder=tmp_path, batch=8, threads=1)
    assert record["accuracy"] == 100 == record["agreement"] and asked == [300, None]
    assert (tmp_path / rows.evidence(network.sha256, "onnxruntime", "fp32")).exists()


def test_latency_refuses_what_cannot_be_timed(trained_digits, tmp_path, log):
    """And leaves no scratch behind, removes what a killed run left of it, and touches nothing beside."""
    base, folder = {"path": trained_digits / "base.safetensors"}, tmp_path / "predictions"
    where = {"dataset": "digits", "reference": base["path"], "folder": folder}
    beside = [tmp_path / "latency-2025-my-measurements", tmp_path / measure.SCRATCH, folder / "latency-mine"]
    left = folder / measure.SCRATCH
    for place in (*beside, left):
        place.mkdir(parents=True)
        (place / "kept.csv").write_text("1,2,3")
    with pytest.raises(ValueError, match="eager has no precision 'int8'"):
        measure.latency([{**base, "runtime": "eager", "precision": "int8"}], **where)
    if not runtimes.available("inductor"):
        compiled = {**base, "runtime": "inductor", "precision": "fp32"}
        with pytest.raises(ValueError, match=r"inductor is compiled for \[1, 64\] only"):
            measure.latency([compiled], **where, batches=(1, 8))
    with pytest.raises(ValueError, match="rounds 0"):
        measure.latency([], **where, rounds=0)
    with pytest.raises(ChildError, match="could not convert: .*no activation range"):
        measure.latency([{**base, "runtime": "onnxruntime", "precision": "int8"}], **where)
    assert not left.exists() and all((place / "kept.csv").exists() for place in beside)


@pytest.mark.parametrize("percent", [measure.BUSY, measure.BUSY + 1])
def test_others_at_work_are_told(capsys, monkeypatch, percent):
    monkeypatch.setattr(measure.psutil, "cpu_percent", lambda interval: percent)
    assert measure._busy() == percent
    assert ("warning: other processes" in capsys.readouterr().out) == (percent > measure.BUSY)
