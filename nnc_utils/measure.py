"""How long artifacts take in their runtimes, by the protocol; `latency` gets file names and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from nnc_utils.runtimes.children import Child, ChildError
from nnc_utils.runtimes.worker import worker

BUSY = 10  # percent of the processor that others may use before a warning
SWEEPS = 4  # times that a round goes over all networks where that takes least: smallest batch, fewest threads
CONVERTERS = 2  # processes that convert networks, or start, at a time
IDENTITY_SECONDS = 0.05  # enough for thousands of calls
SAMPLE = 250  # test images by which a runtime is seen to compute what eager does,
ALIKE = 99.5  # where it gives so many percent of their classes
SCRATCH = ".latency-scratch"  # a folder inside the given one, for what only the measuring needs


@dataclass(frozen=True, eq=False)
class _Job:
    """One network in one runtime; without a file it is the runtime's identity network."""

    runtime: str
    precision: str
    network: Artifact  # for the identity: whose input it has
    images: Path  # normalized test images
    path: str = ""
    file: Path | None = None

    @property
    def process(self) -> tuple[str, bool]:
        """Which worker it is in: of which runtime, and whether with the identity network alone."""
        return self.runtime, self.file is None

    def session(self, threads: int) -> str:
        """Its name in the worker."""
        return f"{self.network.sha256} {self.precision} {threads}" if self.file else f"identity {threads}"


_Visit = tuple[_Job, int, int]  # with its batch and threads


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
    computes in fp32 (or in `s8s8`, from int8's codes) is seen to be the same by the first 250 images;
    where that fails, by all.

    Parameters
    ----------
    requests : mappings with path (an artifact), runtime and precision.
    reference : the uncompressed artifact; it is timed in fp32 in eager and every runtime requested.
    folder : for the predictions, of eager (as `score` leaves them) and of each runtime.
    seconds : for the timing, shared by all visits alike; slow networks get at least 2 samples in each.
    again : time the smallest batch and number of threads once more, in new processes: do the times hold?

    Returns
    -------
    Records with the columns of latency.csv that measuring knows (`rows.latency_rows` computes ratios), path,
    samples and cpu_busy_before (percent). Without `agreement` the accuracy is the artifact's in eager;
    `load_ms` and `peak_rss_mb` are of a fresh process that predicts one image. The control is "identity" for
    a runtime's identity network, "again" for a second timing. Where a runtime is missing, or refuses to run
    a network, the records hold "why".
    """
    if rounds < 1 or seconds <= 0 or not batches or min(*batches, *threads) < 1:
        raise ValueError(
            f"rounds {rounds}, seconds {seconds}, batches {batches}, threads {threads}: all must be above 0"
        )
    folder = Path(folder).absolute()
    missing = _asked(requests, str(reference), batches)
    scores = scoring.score(dict.fromkeys(path for path, _, _ in missing), dataset=dataset, folder=folder)
    sha256 = {score["path"]: score["sha256"] for score in scores}
    points = [(batch, count) for count in threads for batch in batches]
    with _scratch(folder) as scratch:
        # One job for each content: two files may well hold the same network.
        contents = {
            (sha256[path], *where): (path, *where) for (path, *where), why in missing.items() if not why
        }
        jobs = _jobs(list(contents.values()), dataset=dataset, scratch=scratch)
        known = _probes(jobs, threads[0])
        for job in [job for job in jobs if "why" in known[job]]:
            missing[job.path, job.runtime, job.precision] = known[job]["why"]
            jobs.remove(job)
        firsts = {job.runtime: job for job in jobs[::-1]}.values()
        identities = [_Job(job.runtime, "fp32", job.network, job.images) for job in firsts]

        def classify(workers: Mapping[tuple[str, bool], Child]) -> None:
            largest = {"batch": max(batches), "threads": max(threads)}
            for job in jobs:
                known[job] |= _classify(workers[job.process], job, dataset=dataset, folder=folder, **largest)
            for job in identities:
                memory = round(workers[job.process].ask("memory"), 1)
                about = {"precision": "fp32", "control": "identity", "artifact_sha256": ""}
                known[job] = about | {"peak_rss_mb": memory}

        passes = sum(_sweeps(point, points) for point in points)
        share = seconds / rounds / passes / (len(jobs) + len(identities))
        timing = {"rounds": rounds, "share": share, "scratch": scratch}
        records = _timed(identities + jobs, known, points=points, then=classify, **timing)
        if again:
            once = dict.fromkeys(("accuracy", "agreement", "load_ms", "peak_rss_mb"))
            twice = _timed(jobs, known, points=[(min(batches), min(threads))], **timing)
            records += [record | once | {"control": AGAIN} for record in twice]
    absent = [
        {"path": path, "artifact_sha256": sha256[path], "runtime": runtime, "precision": precision}
        | {"batch": batch, "threads": count, "rounds": 0, "control": "", "why": why}
        for (path, runtime, precision), why in missing.items()
        for batch, count in points
        if why
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
    """How long one image takes in each of many artifacts, for a model of latency; no row of a table.

    Rounds over all of them in one resident process, each network for so many seconds; of each the median
    of a round, and of those the lowest but one, since what else the machine does only adds. The artifacts
    need not be trained: the images are noise. The folder is for what the runtime loads.
    """
    if why := runtimes.available(runtime, precision):
        raise RuntimeError(f"{runtime} {precision}: {why}")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    medians: dict[str, list[float]] = {str(key): [] for key in range(len(networks))}
    images = {}
    with worker(runtime, folder) as process:
        for key, path in zip(medians, networks):
            network = artifacts.read(path)
            _converted(process, path, network, runtime, precision, folder, key=key, threads=threads)
            channels, size = _shape(network)
            images[key] = folder / f"noise_{channels}_{size}.npy"
            noise = np.random.default_rng(0).normal(size=(4, channels, size, size))
            np.save(images[key], noise.astype(np.float32))
        for _ in range(rounds):
            for key, found in medians.items():
                samples = process.ask("time", key=key, images=str(images[key]), batch=1, seconds=seconds)
                found.append(float(np.median(samples)) / 1e6)
    return [sorted(found)[min(1, rounds - 1)] for found in medians.values()]


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder of our own inside the given one; what a killed run left there is removed first."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _asked(
    requests: Sequence[Mapping[str, Any]], reference: str, batches: Sequence[int]
) -> dict[tuple[str, str, str], str]:
    """What to time as (path, runtime, precision), the reference first -> why it is missing, or ""."""
    asked = [(str(r["path"]), r["runtime"], r["precision"]) for r in requests]
    for _, name, precision in asked:
        if not runtimes.available(name):
            runtimes.check_precision(name, precision)
            compiled = getattr(runtimes.adapter(name), "BATCHES", batches)
            if not set(batches) <= set(compiled):
                raise ValueError(f"batches {batches}: {name} is compiled for {sorted(compiled)} only")
    names = dict.fromkeys(("eager", *(name for _, name, _ in asked)))
    asked = [(reference, name, "fp32") for name in names] + asked
    once = {(os.path.abspath(path), *where): (path, *where) for path, *where in asked}
    why = {where: runtimes.available(*where) for where in {(name, kind) for _, name, kind in asked}}
    return {key: why[key[1:]] for key in once.values()}


def _jobs(present: Sequence[tuple[str, str, str]], *, dataset: str, scratch: Path) -> list[_Job]:
    """The networks as their runtimes load them, converted by a process for each runtime, some at a time."""
    networks = {path: artifacts.read(path) for path, _, _ in present}
    files = {}

    def convert(name: str) -> None:
        wanted = [(path, precision) for path, runtime, precision in present if runtime == name]
        with worker(name, scratch, beside_others=True) as process:
            first = _shape(networks[wanted[0][0]])  # written here, where the compiler is loaded
            process.ask("identity", key="", shape=first, threads=1, folder=str(scratch))
            for path, precision in wanted:
                file = _converted(process, path, networks[path], name, precision, scratch)
                files[path, name, precision] = file
                print(f"converted {Path(path).stem} for {name} {precision}", flush=True)

    with ThreadPoolExecutor(CONVERTERS) as pool:
        list(pool.map(convert, dict.fromkeys(runtime for _, runtime, _ in present)))
    images = {path: _images(path, network, dataset, scratch) for path, network in networks.items()}
    return [_Job(r, kind, networks[p], images[p], p, files[p, r, kind]) for p, r, kind in present]


def _converted(process, path, network, runtime, precision, folder, *, key="", threads=1) -> Path:
    """Let a worker convert and load an artifact; an integer network that would run in floats is refused."""
    source = os.path.abspath(path)
    file = process.ask("convert", source=source, precision=precision, folder=str(folder))
    process.ask("load", key=key, path=file, precision=precision, threads=threads)
    if precision in runtimes.INTEGERS:
        counts = process.ask("operators", key=key)
        qdq.check_integer(network.spec, counts, runtimes.adapter(runtime).INTEGER)
    return Path(file)


def _shape(network: Artifact) -> list[int]:
    """Channels and size of its images."""
    return [network.spec.channels, network.spec.size]


def _images(path: str, network: Artifact, dataset: str, scratch: Path) -> Path:
    """The normalized test images as a file; networks that want the same share one."""
    file = scratch / f"{hash((network.mean, network.std, network.spec.size)):x}.npy"
    if not file.exists():
        test = scoring.matching(dataset, path, network).test
        np.save(file, data.normalize(test.images, network.mean, network.std).numpy())
    return file


def _probes(jobs: Sequence[_Job], threads: int) -> dict[_Job, dict[str, Any]]:
    """Load time and memory of each job after one prediction of one image, in a process of its own.

    Some processes start at a time; then one loads and predicts while the others are blocked. A runtime may
    take an integer network and refuse to run it: that one gets "why".
    """
    known = {}
    for start in range(0, len(jobs), CONVERTERS):
        with contextlib.ExitStack() as stack:
            some = jobs[start : start + CONVERTERS]
            probes = [stack.enter_context(worker(job.runtime, job.file.parent)) for job in some]
            for probe in probes:
                probe.ask("memory")  # answered when its runtime is imported
            for job, probe in zip(some, probes):
                file = str(job.file)
                loaded = probe.ask("load", key="", path=file, precision=job.precision, threads=threads)
                try:
                    probe.ask("time", key="", images=str(job.images), batch=1, seconds=0.0)
                except ChildError as error:
                    if job.precision == "fp32":
                        raise
                    known[job] = {"why": f"{job.runtime} refuses to run {Path(job.path).stem} ({error})"}
                    continue
                memory = round(probe.ask("memory"), 1)
                known[job] = {"control": "", "load_ms": round(loaded["load_ms"], 3), "peak_rss_mb": memory}
                known[job]["runtime_bytes"] = loaded["runtime_bytes"]
    return known


def _timed(
    jobs: Sequence[_Job],
    known: Mapping[_Job, dict[str, Any]],
    *,
    points: Sequence[tuple[int, int]],
    rounds: int,
    share: float,
    scratch: Path,
    then: Callable[[Mapping[tuple[str, bool], Child]], None] = lambda workers: None,
) -> list[dict[str, Any]]:
    """Records of all jobs at all points (batch, threads), a share of seconds a visit, in new processes.

    `then` may ask these more.
    """
    visits = [(job, *point) for job in jobs for point in points]
    with contextlib.ExitStack() as stack:
        names = dict.fromkeys(job.process for job in jobs)
        workers = {name: stack.enter_context(worker(name[0], scratch)) for name in names}

        def ready(name: tuple[str, bool]) -> None:
            for job, count in dict.fromkeys((job, count) for job, _, count in visits if job.process == name):
                order = {"key": job.session(count), "threads": count}
                if job.file:
                    order |= {"path": str(job.file), "precision": job.precision}
                else:
                    order |= {"shape": _shape(job.network), "folder": str(scratch)}
                used = workers[name].ask("load" if job.file else "identity", **order)["threads"]
                if used != count:
                    raise ChildError(f"{job.runtime} was told to use {count} threads and uses {used}")

        with ThreadPoolExecutor(CONVERTERS) as pool:
            list(pool.map(ready, workers))
        busy = _busy()
        samples = _time(workers, visits, rounds=rounds, share=share)
        then(workers)
    return [
        {"runtime": job.runtime, "batch": batch, "threads": threads}
        | _summary(samples[job, batch, threads], batch=batch)
        | {"cpu_busy_before": busy, **known[job]}
        for job, batch, threads in visits
    ]


def _time(
    workers: Mapping[tuple[str, bool], Child], visits: Sequence[_Visit], *, rounds: int, share: float
) -> dict[_Visit, list[list[int]]]:
    """Nanoseconds of the predictions in each visit, a list for each time that it was visited."""
    samples: dict[_Visit, list[list[int]]] = {visit: [] for visit in visits}
    points = list(dict.fromkeys(visit[1:] for visit in visits))
    start = time.perf_counter()
    for number in range(1, rounds + 1):
        for point in [p for p in points for _ in range(_sweeps(p, points))]:
            for visit in (v for v in visits if v[1:] == point):
                job, batch, threads = visit
                longest = share if job.file else min(share, IDENTITY_SECONDS)
                order = {"key": job.session(threads), "images": str(job.images), "batch": batch}
                samples[visit].append(workers[job.process].ask("time", seconds=longest, **order))
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
    process: Child, job: _Job, *, dataset: str, folder: Path, batch: int, threads: int
) -> dict[str, Any]:
    """What the timed session says about the test set, against the labels and the artifact in eager."""
    network, integers = job.network, job.precision in runtimes.INTEGERS
    expected = np.load(folder / evidence(network.sha256))
    labels = scoring.matching(dataset, job.path, network).test.labels
    record = {"path": job.path, "artifact_sha256": network.sha256, "precision": job.precision}
    record["stored_codes"] = int(qdq.stored_codes(network)) if integers else None
    file = folder / evidence(network.sha256, job.runtime, job.precision)
    order = {"key": job.session(threads), "images": str(job.images), "batch": batch}
    as_eager = job.precision not in OWN_CLASSES and not (job.precision == "fp32" and network.ranges)
    if as_eager and len(labels) > SAMPLE:
        sample = job.file.parent / file.name
        process.ask("predict", target=str(sample), first=SAMPLE, **order)
        if evaluation.accuracy(np.load(sample), expected[:SAMPLE]) >= ALIKE:
            return record | {"accuracy": round(evaluation.accuracy(expected, labels), 4), "agreement": None}
    process.ask("predict", target=str(file), **order)
    accuracy, agreement = (evaluation.accuracy(np.load(file), truth) for truth in (labels, expected))
    return record | {"accuracy": round(accuracy, 4), "agreement": round(agreement, 4)}


def _busy() -> float:
    """Percent of the processor that others use while every worker is blocked; says so if it is much."""
    busy = psutil.cpu_percent(interval=1.0)
    if busy > BUSY:
        print(
            f"warning: other processes use {busy:.0f} % of the processor: stop them and measure again",
            flush=True,
        )
    return busy
