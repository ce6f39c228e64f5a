"""How long artifacts take in their runtimes, by the protocol; `latency` gets file names and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nnc_utils import artifact as artifacts
from nnc_utils import data, evaluation, runtimes, scoring
from nnc_utils.artifact import Artifact
from nnc_utils.rows import AGAIN, OWN_CLASSES, evidence
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.children import Child, ChildError, worker

BUSY = 10  # percent of the processor that others may use before a warning
SWEEPS = 4  # times that a round goes over all networks where that takes least: smallest batch, fewest threads
CONVERTERS = 2  # processes that convert networks, or start, at a time
IDENTITY_SECONDS = 0.05  # enough for thousands of calls
SAMPLE = 1000  # test pictures by which a runtime is seen to compute what eager does,
ALIKE = 99.5  # where it gives so many percent of their classes


@dataclass(frozen=True)
class _Job:
    """One network in one runtime; `key` names it in the worker, together with the threads."""

    path: str
    network: Artifact
    runtime: str
    precision: str
    file: Path
    images: Path

    @property
    def key(self) -> str:
        return f"{self.network.sha256} {self.precision}"


@dataclass(frozen=True)
class _Visit:
    """One session at one batch; `key` is its network's, None that of the runtime's identity network."""

    key: str | None
    job: _Job  # for an identity network: whose input it has
    batch: int
    threads: int

    @property
    def process(self) -> tuple[str, bool]:
        """Which worker it is in: of which runtime, and whether with the identity network alone."""
        return self.job.runtime, self.key is None

    @property
    def session(self) -> str:
        """Its name in the worker."""
        return f"{self.key or 'identity'} {self.threads}"


def latency(
    requests: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    reference: str | Path,
    folder: str | Path,
    batches: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1, 2),
    rounds: int = 5,
    seconds: float = 60.0,
    again: bool = False,
) -> list[dict[str, Any]]:
    """Time networks in their runtimes, and let each runtime classify the test set by the same code.

    Each runtime lives in one worker process, blocked while another is timed, its identity network in another
    one. A round visits every pair of network and runtime, with a warm-up at each visit: all at one batch and
    number of threads, then all at the next, and several times at the smallest batch with the fewest threads.
    What is compared is thus timed within seconds, so that a machine's changes of speed weigh on both.

    The whole test set is classified where the runtime rounds what eager does not, in int8 and bf16. What it
    computes in fp32 (or in `s8s8`, from int8's codes) is seen to be the same by the first thousand pictures;
    where that fails, by all.

    Parameters
    ----------
    requests : mappings with path (an artifact), runtime and precision.
    dataset : name, as for `data.load`.
    reference : the uncompressed artifact; it is timed in fp32 in eager and every runtime requested.
    folder : for the predictions, of eager (as `score` leaves them) and of each runtime.
    batches, threads : at which to time.
    rounds : at least 5 for numbers that are published.
    seconds : for the timing, about, shared by all visits alike; slow networks get at least 2 samples in each.
    again : time the smallest batch and number of threads once more, in new processes: do the times hold?

    Returns
    -------
    Records with the columns of latency.csv that measuring knows (ratios are made from them by
    `rows.latency_rows`), path, samples (how many) and cpu_busy_before (percent). Without `agreement` the
    accuracy is the artifact's in eager. `load_ms` and `peak_rss_mb` are of a fresh process that predicts one
    picture. An identity network a runtime has control "identity", and the memory of a process with nothing
    else; what was timed `again` has control "again". Where a runtime is missing the record holds "why"
    instead of numbers.

    Raises
    ------
    ChildError, ValueError, RuntimeError
        When a worker fails, a request cannot be met, or an int8 network would run in floats.
    """
    if rounds < 1 or seconds <= 0 or not batches or min(*batches, *threads) < 1:
        raise ValueError(
            f"rounds {rounds}, seconds {seconds}, batches {batches}, threads {threads}: "
            "all have to be above 0"
        )
    for name in dict.fromkeys(r["runtime"] for r in requests):
        compiled = () if runtimes.available(name) else getattr(runtimes.adapter(name), "BATCHES", ())
        if compiled and not set(batches) <= set(compiled):
            raise ValueError(f"batches {batches}: {name} is compiled for {sorted(compiled)} only")
    folder = Path(folder).absolute()
    asked, missing = _asked(requests, str(reference))
    scores = scoring.score(dict.fromkeys(path for path, _, _ in asked), dataset=dataset, folder=folder)
    sha256 = {s["path"]: s["sha256"] for s in scores}
    eager = {s["sha256"]: np.load(s["predictions"]) for s in scores}
    points = [(batch, count) for count in threads for batch in batches]

    for leftover in folder.parent.glob("latency-*"):  # of a killed run of this folder
        shutil.rmtree(leftover)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="latency-") as scratch:
        # One job for each content: two files may well hold the same network.
        present = {(sha256[a[0]], a[1], a[2]): a for a in asked if not missing[a[1:]]}
        jobs = _jobs(list(present.values()), dataset=dataset, folder=Path(scratch))
        known = _probes(jobs, threads[0])

        def classify(workers: Mapping[str, Child]) -> None:
            most = {"batch": max(batches), "threads": max(threads)}
            for job in jobs:
                about = _classify(workers[job.runtime], job, eager, dataset=dataset, folder=folder, **most)
                known[job.runtime, job.key] |= about

        passes = sum(_sweeps(point, points) for point in points)
        visits = passes * (len(jobs) + len({job.runtime for job in jobs}))
        options = {"rounds": rounds, "share": seconds / rounds / visits, "temporary": Path(scratch)}
        records = _timed(jobs, known, points=points, **options, then=classify)
        if again:
            once = ("accuracy", "agreement", "load_ms", "peak_rss_mb")
            columns = dict.fromkeys(once) | {"control": AGAIN}
            smallest = [(min(batches), min(threads))]
            twice = _timed(jobs, known, points=smallest, **options, identities=False)
            records += [record | columns for record in twice]
    absent = [
        {"path": path, "artifact_sha256": sha256[path], "runtime": runtime, "precision": precision}
        | {"batch": batch, "threads": count, "rounds": 0, "control": "", "why": missing[runtime, precision]}
        for path, runtime, precision in asked
        for batch, count in points
        if missing[runtime, precision]
    ]
    return records + absent


def milliseconds(
    networks: Sequence[str | Path],
    *,
    runtime: str,
    precision: str,
    folder: str | Path,
    threads: int = 1,
    rounds: int = 5,
    seconds: float = 0.03,
) -> list[float]:
    """How long one picture takes in each of many artifacts, for a model of latency; no row of a table.

    Rounds over all of them in one resident process; of each the median of a round, and of those the lowest
    but one, since what else the machine does only adds.

    Parameters
    ----------
    networks : artifacts, which need not be trained; the pictures are noise.
    runtime, precision, threads : as for `runtimes.prepare`.
    folder : for what the runtime loads.
    seconds : for one network in one round.

    Raises
    ------
    ChildError, RuntimeError
        When the runtime is missing, or an int8 network would run in floats.
    """
    if why := runtimes.available(runtime, precision):
        raise RuntimeError(f"{runtime} {precision}: {why}")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found: list[list[float]] = [[] for _ in networks]
    with worker(runtime, folder) as process:
        visits = []
        for number, path in enumerate(networks):
            network, source = artifacts.read(path), os.path.abspath(path)
            file = process.ask("convert", source=source, precision=precision, folder=str(folder))
            process.ask("load", key=str(number), path=file, precision=precision, threads=threads)
            if precision in runtimes.INTEGERS:
                counted = process.ask("operators", key=str(number))
                qdq.check_integer(network.spec, counted, runtimes.adapter(runtime).INTEGER)
            images = folder / f"noise_{network.spec.channels}_{network.spec.size}.npy"
            if not images.exists():
                shape = (4, network.spec.channels, network.spec.size, network.spec.size)
                np.save(images, np.random.default_rng(0).normal(size=shape).astype(np.float32))
            visits.append(str(images))
        for _ in range(rounds):
            for number, images in enumerate(visits):
                taken = process.ask("time", key=str(number), images=images, batch=1, seconds=seconds)
                found[number].append(float(np.median(taken)) / 1e6)
    return [sorted(medians)[min(1, rounds - 1)] for medians in found]


def _timed(
    jobs: Sequence[_Job],
    known: Mapping[tuple[str, str], dict[str, Any]],
    *,
    points: Sequence[tuple[int, int]],
    rounds: int,
    share: float,
    temporary: Path,
    identities: bool = True,
    then: Callable[[Mapping[str, Child]], None] = lambda workers: None,
) -> list[dict[str, Any]]:
    """Records of all jobs at all points (batch, threads), in new processes; `then` may ask these more.

    A visit gets a `share` of seconds.
    """
    visits = [_Visit(job.key, job, *point) for job in jobs for point in points]
    if identities:
        firsts = {job.runtime: job for job in jobs[::-1]}
        visits = [_Visit(None, job, *point) for job in firsts.values() for point in points] + visits
    with contextlib.ExitStack() as stack:
        names = dict.fromkeys(visit.process for visit in visits)
        workers = {name: stack.enter_context(worker(name[0], temporary)) for name in names}

        def ready(name: tuple[str, bool]) -> None:
            for visit in {v.session: v for v in visits if v.process == name}.values():
                _open(workers[name], visit)

        with ThreadPoolExecutor(CONVERTERS) as pool:
            list(pool.map(ready, workers))
        busy = _busy()
        samples = _time(workers, visits, rounds=rounds, share=share)
        memory = {name[0]: process.ask("memory") for name, process in workers.items() if name[1]}
        then({runtime: process for (runtime, identity), process in workers.items() if not identity})
    identity = {"precision": "fp32", "control": "identity", "artifact_sha256": ""}
    records = []
    for visit in visits:
        if visit.key:
            about = known[visit.job.runtime, visit.key]
        else:
            about = identity | {"peak_rss_mb": round(memory[visit.job.runtime]["peak_rss_mb"], 1)}
        where = {"runtime": visit.job.runtime, "batch": visit.batch, "threads": visit.threads}
        summary = _summary(samples[visit], batch=visit.batch) | {"cpu_busy_before": busy}
        records.append(where | summary | about)
    return records


def _asked(
    requests: Iterable[Mapping[str, Any]], reference: str
) -> tuple[list[tuple[str, str, str]], dict[tuple[str, str], str]]:
    """What to time as (path, runtime, precision), the reference included, and why which are missing."""
    asked = [(str(r["path"]), r["runtime"], r["precision"]) for r in requests]
    names = dict.fromkeys(("eager", *(name for _, name, _ in asked)))
    for _, name, precision in asked:
        if not runtimes.available(name):
            runtimes.check_precision(name, precision)
    asked = [(reference, name, "fp32") for name in names] + asked
    missing = {pair: runtimes.available(*pair) for pair in {(name, p) for _, name, p in asked}}
    unique = {(os.path.abspath(path), name, precision): path for path, name, precision in asked}
    return [(path, name, precision) for (_, name, precision), path in unique.items()], missing


def _jobs(present: Sequence[tuple[str, str, str]], *, dataset: str, folder: Path) -> list[_Job]:
    """The networks as their runtimes load them, converted by a process for each runtime, some at a time.

    The same files are loaded whenever they are timed, so their integer operators are counted once, here.
    """
    networks = {path: artifacts.read(path) for path, _, _ in present}
    made = {}

    def convert(name: str) -> None:
        wanted = [(path, kind) for path, runtime, kind in present if runtime == name]
        with worker(name, folder, beside_others=True) as process:
            first = networks[wanted[0][0]]  # compiled here, where the compiler is loaded
            process.ask("identity", key="", shape=_shape(first), threads=1, folder=str(folder))
            for path, precision in wanted:
                source = os.path.abspath(path)
                file = process.ask("convert", source=source, precision=precision, folder=str(folder))
                if precision in runtimes.INTEGERS:  # counted here, likewise
                    process.ask("load", key=file, path=file, precision=precision, threads=1)
                    found, kinds = process.ask("operators", key=file), runtimes.adapter(name).INTEGER
                    qdq.check_integer(networks[path].spec, found, kinds)
                made[path, name, precision] = Path(file)
                print(f"made {Path(path).stem} for {name} {precision}", flush=True)

    with ThreadPoolExecutor(CONVERTERS) as pool:
        list(pool.map(convert, dict.fromkeys(runtime for _, runtime, _ in present)))
    pictures = {path: _pictures(path, network, dataset, folder) for path, network in networks.items()}
    return [_Job(p, networks[p], r, kind, made[p, r, kind], pictures[p]) for p, r, kind in present]


def _pictures(path: str, network: Artifact, dataset: str, folder: Path) -> Path:
    """The normalized test pictures as a file; networks that want the same share one."""
    file = folder / f"{hash((network.mean, network.std, network.spec.size)):x}.npy"
    if not file.exists():
        test = scoring.matching(dataset, path, network).test
        np.save(file, data.normalize(test.images, network.mean, network.std).numpy())
    return file


def _shape(network: Artifact) -> list[int]:
    """Channels and size of its pictures."""
    return [network.spec.channels, network.spec.size]


def _probes(jobs: Sequence[_Job], threads: int) -> dict[tuple[str, str], dict[str, Any]]:
    """What is known of each job after one prediction of one picture in a process of its own.

    Some processes start at a time; then one loads and predicts while the others are blocked.
    """
    known = {}
    for start in range(0, len(jobs), CONVERTERS):
        with contextlib.ExitStack() as stack:
            some = jobs[start : start + CONVERTERS]
            probes = [stack.enter_context(worker(job.runtime, job.file.parent)) for job in some]
            for probe in probes:
                probe.ask("memory")  # answered when its runtime is imported
            for job, probe in zip(some, probes, strict=True):
                known[job.runtime, job.key] = _probe(probe, job, threads)
    return known


def _probe(process: Child, job: _Job, threads: int) -> dict[str, Any]:
    """Load time and memory of a network in a fresh process."""
    loaded = process.ask("load", key="", path=str(job.file), precision=job.precision, threads=threads)
    process.ask("time", key="", images=str(job.images), batch=1, seconds=0.0)
    memory = process.ask("memory")
    return {
        "control": "",
        "load_ms": round(loaded["load_ms"], 3),
        "peak_rss_mb": round(memory["peak_rss_mb"], 1),
        "runtime_bytes": loaded["runtime_bytes"],
    }


def _open(process: Child, visit: _Visit) -> None:
    """Make a visit's session in its worker."""
    job, about = visit.job, {"key": visit.session, "threads": visit.threads}
    if visit.key is None:
        process.ask("identity", shape=_shape(job.network), folder=str(job.images.parent), **about)
        return
    loaded = process.ask("load", path=str(job.file), precision=job.precision, **about)
    if loaded["threads"] != visit.threads:
        raise ChildError(
            f"{job.runtime} was told to use {visit.threads} threads and uses {loaded['threads']}"
        )


def _time(
    workers: Mapping[tuple[str, bool], Child], visits: Sequence[_Visit], *, rounds: int, share: float
) -> dict[_Visit, list[list[int]]]:
    """Nanoseconds of the predictions in each visit, a list for each time that it was made."""
    samples: dict[_Visit, list[list[int]]] = {visit: [] for visit in visits}
    points = list(dict.fromkeys((visit.batch, visit.threads) for visit in visits))
    start = time.perf_counter()
    for number in range(1, rounds + 1):
        for point in [p for p in points for _ in range(_sweeps(p, points))]:
            for visit in (v for v in visits if (v.batch, v.threads) == point):
                about = {"key": visit.session, "images": str(visit.job.images), "batch": visit.batch}
                longest = share if visit.key else min(share, IDENTITY_SECONDS)
                samples[visit].append(workers[visit.process].ask("time", seconds=longest, **about))
        print(f"timed round {number} of {rounds}, {time.perf_counter() - start:.0f} s", flush=True)
    return samples


def _sweeps(point: tuple[int, int], points: Sequence[tuple[int, int]]) -> int:
    """How often a round goes over the networks at this batch and number of threads."""
    return SWEEPS if point == min(points) else 1


def _summary(visits: Sequence[Sequence[int]], *, batch: int) -> dict[str, Any]:
    samples = np.concatenate(visits) / 1e6
    first, p50, third, p90 = np.percentile(samples, (25, 50, 75, 90))
    return {
        "rounds": len(visits),
        "rounds_p50_ms": " ".join(f"{np.median(visit) / 1e6:.6g}" for visit in visits),
        "p50_ms": float(f"{p50:.6g}"),
        "p90_ms": float(f"{p90:.6g}"),
        "iqr_ms": float(f"{third - first:.6g}"),
        "throughput": float(f"{1e3 * batch / p50:.6g}"),
        "samples": len(samples),
    }


def _classify(
    process: Child,
    job: _Job,
    eager: Mapping[str, np.ndarray],
    *,
    dataset: str,
    folder: Path,
    batch: int,
    threads: int,
) -> dict[str, Any]:
    """What the timed session says about the test set, against the labels and the artifact in eager."""
    sha256 = job.network.sha256
    expected, file = eager[sha256], folder / evidence(sha256, job.runtime, job.precision)
    about = {"path": job.path, "artifact_sha256": sha256, "precision": job.precision}
    integers = job.precision in runtimes.INTEGERS
    about["stored_codes"] = int(qdq.stored_codes(job.network)) if integers else None
    labels = scoring.matching(dataset, job.path, job.network).test.labels
    order = {"key": f"{job.key} {threads}", "images": str(job.images), "batch": batch}
    as_eager = job.precision not in OWN_CLASSES and not (job.precision == "fp32" and job.network.ranges)
    if as_eager and len(labels) > SAMPLE:
        sample = job.file.parent / file.name
        process.ask("predict", target=str(sample), first=SAMPLE, **order)
        if evaluation.accuracy(np.load(sample), expected[:SAMPLE]) >= ALIKE:
            return about | {"accuracy": round(evaluation.accuracy(expected, labels), 4), "agreement": None}
    process.ask("predict", target=str(file), **order)
    predictions = np.load(file)
    return about | {
        "accuracy": round(evaluation.accuracy(predictions, labels), 4),
        "agreement": round(evaluation.accuracy(predictions, expected), 4),
    }


def _busy() -> float:
    """Percent of the processor that others use while every worker is blocked; says so if it is much."""
    busy = psutil.cpu_percent(interval=1.0)
    if busy > BUSY:
        print(
            f"warning: other processes use {busy:.0f} % of the processor: times will be too long and "
            "uneven; stop them and measure again",
            flush=True,
        )
    return busy
