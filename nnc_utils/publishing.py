"""Finished runs become a profile's tables, with their evidence: ``results/<profile>/``; and back again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from nnc_utils.over_seeds import claimed_once, looked_at_by_all
from nnc_utils.provenance import BEGUN, file_sha256, root, write_atomically
from nnc_utils.rows import CompressionRow, LatencyRow, evidence, labels_of, timed_evidence
from nnc_utils.tables import (
    POINT,
    ResultError,
    Run,
    artifact_name,
    check_seeds,
    committed_runs,
    labels_name,
    named_pipeline,
    point_of,
    read_run,
    summarize,
    to_frame,
)

ATTEMPT = "attempt"  # control of a point that fell short
RESTORED = "restored"  # in a run folder's mark: written from the tables
COMMITTED_BYTES = 450_000  # larger artifacts stay out of the repository


def kept_artifacts(compression: pd.DataFrame, summary: pd.DataFrame) -> set[str]:
    """Whose files are committed where they are small enough: those of claims, and the pipeline's."""
    kept = set(compression[compression["headline"] == 1]["artifact_sha256"])
    point = named_pipeline(summary)
    if point is not None:
        same = compression[(compression[POINT] == point[POINT]).all(axis=1)]
        kept.add(same.sort_values("seed")["artifact_sha256"].iloc[0])
    return kept


def _kept(finished: list[Run], committed: list[Run]) -> list[Run]:
    """The committed rows that go with the finished runs; what goes is printed.

    They are of other runs and other points, and of networks whose references are in the tables.
    """

    def point(row: CompressionRow) -> tuple:
        return (*(getattr(row, column) for column in POINT), row.seed)

    here = {run.run for run in finished}
    again = {point(row) for run in finished for row in run.compression}
    others = [run for run in committed if run.run not in here]
    kept = [
        run.with_rows(compression=[row for row in run.compression if point(row) not in again])
        for run in others
    ]
    there, before = set[str](), None
    while there != before:  # a row that goes may have been the reference of another
        there, before = (
            {r.artifact_sha256 for run in [*finished, *kept] for r in run.compression} | {""},
            there,
        )
        kept = [
            run.with_rows(
                compression=[row for row in run.compression if row.reference_sha256 in there],
                latency=run.latency if {row.artifact_sha256 for row in run.latency} <= there else [],
            )
            for run in kept
        ]
    for run in committed:  # a run has one record: rows that it had with other parameters cannot stay
        if run.run in here and (gone := sum(point(row) not in again for row in run.compression)):
            print(f"{gone} of {len(run.compression)} rows of {run.run} go: it was made again without them")
    for run, left in zip(others, kept, strict=True):
        rows, stay = (len(r.compression) + len(r.latency) for r in (run, left))
        if stay < rows:
            print(f"{rows - stay} of {rows} rows of {run.run} go: measured again, or their reference is gone")
    return [run for run in kept if run.is_evidence]


def _attempt(run: Run) -> Run:
    """The points of a committed run as attempts that fell short, under a name of their own."""
    name = f"{run.run},{ATTEMPT}"
    rows = [
        row.model_copy(update={"run": name, "control": ATTEMPT, "headline": 0})
        for row in run.compression
        if not row.control
    ]
    return run.with_rows(run=name, compression=rows, latency=[])


def publish(runs: list[Path], profile: str, *, keep: bool = False, attempts: Collection[str] = ()) -> Path:
    """Write a profile's tables and their evidence; what was there before goes.

    compression.csv, latency.csv, summary.csv, provenance.json, predictions/ (of every row, and the
    labels), artifacts/ (`kept_artifacts`, as far as they are small enough to commit).

    Parameters
    ----------
    runs : run folders of this profile, a row's reference among them.
    profile : its name.
    keep : let committed rows stay of runs that are not among `runs`, such as another machine's, if
        their references are in the tables and `runs` do not have their points; it is printed which go.
    attempts : committed runs whose points become attempts that fell short, before others take their names.

    Returns
    -------
    ``results/<profile>``, in which figures/ waits for figures.

    Raises
    ------
    ResultError
        When a run is unfinished or not as it was measured, evidence is missing, or no such run is committed.
    """
    out = root() / "results" / profile
    finished, committed = [read_run(folder) for folder in runs], committed_runs(out) if keep else []
    if unknown := set(attempts) - {run.run for run in committed}:
        raise ResultError(f"not committed: {', '.join(sorted(unknown))}; committed runs become attempts")
    committed = [_attempt(run) if run.run in attempts else run for run in committed]
    finished += _kept(finished, committed)
    finished.sort(key=lambda run: (run.record.notebook, run.record.seed))
    profiles = {run.record.profile for run in finished}
    names = [run.record.run for run in finished]
    if profiles != {profile} or len(set(names)) != len(names):
        raise ResultError(
            f"runs of profile {profile}, each once, are needed, not {', '.join(names) or 'none'}"
        )
    finished = looked_at_by_all(finished)
    compression = claimed_once(finished)
    claimed = {row.artifact_sha256 for row in compression if row.headline}
    sizes = {row.artifact_sha256: row.artifact_bytes for row in compression}
    for run in finished:  # before anything is written: the file of a claim may lie on another machine
        for sha256 in {entry.artifact_sha256 for entry in run.record.artifacts} & claimed:
            if sizes[sha256] <= COMMITTED_BYTES:
                run.artifact(sha256)
    table = to_frame(compression, CompressionRow)
    check_seeds(table)
    zeros = _zeros([*finished, *committed])
    points = {(row.artifact_sha256, point_of(row)) for row in compression if row.headline}
    latency = [
        row.model_copy(update={"headline": int((row.artifact_sha256, point_of(row)) in points)})
        for run in finished
        for row in run.latency
    ]

    (out / "figures").mkdir(parents=True, exist_ok=True)
    kept = {"predictions": set(), "artifacts": set()}
    for name, content in _evidence(finished).items():
        _place(out / "predictions" / name, content)
        kept["predictions"].add(name)
    summary = summarize(table, out / "predictions")
    wanted, provenance = kept_artifacts(table, summary), {}
    for run in finished:
        record = run.record.model_dump(exclude={"compression", "latency", "run"})
        for entry in record["artifacts"]:
            sha256 = entry["artifact_sha256"]
            name = artifact_name(sha256)
            entry["bytes"], entry["headline"] = sizes.get(sha256), sha256 in claimed
            entry["committed"] = "not: neither a claim nor the pipeline"
            entry.pop("zeros")
            entry |= {"zeros": zeros[sha256]} if sha256 in zeros else {}
            if sha256 in wanted and entry["bytes"] > COMMITTED_BYTES:
                entry["committed"] = f"not: {entry['bytes']:,} bytes are more than {COMMITTED_BYTES:,}"
            elif sha256 in wanted:
                entry["committed"] = f"artifacts/{name}"
                _place(out / "artifacts" / name, run.artifact(sha256).read_bytes())
                kept["artifacts"].add(name)
        provenance[run.record.run] = record
    _place(out / "compression.csv", _csv(table))
    _place(out / "latency.csv", _csv(to_frame(latency, LatencyRow)))
    _place(out / "summary.csv", _csv(summary))
    _place(out / "provenance.json", (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())
    for folder, names in kept.items():
        for file in (out / folder).glob("*"):
            if file.name not in names:
                file.unlink()
    return out


def restore(profile: str) -> list[Run]:
    """Write run folders from a profile's tables, for those of its committed runs that were not made here.

    They hold rows, predictions and those artifacts that are committed: enough for other runs to build on,
    unless these ask for another artifact, which `Run.artifact` refuses. `publish` never takes a row from
    them. Nothing makes such a run again by itself: delete its folder for that.

    Parameters
    ----------
    profile : its name.

    Returns
    -------
    The runs that were written.

    Raises
    ------
    ResultError
        When the profile has no tables, or a file of them is missing or not what they say.
    """
    tables, written = root() / "results" / profile, []
    committed = committed_runs(tables)
    if not committed:
        raise ResultError(f"{tables} has no tables to restore runs from: publish the profile first")
    for run in committed:
        folder = root() / "results/runs" / run.run
        if not is_restored(folder) and any((folder / name).is_file() for name in (BEGUN, "result.json")):
            continue  # made here, or being made
        folder.mkdir(parents=True, exist_ok=True)  # a run that only timed has no other file
        for name, _ in _needed([run]):
            _place(folder / "predictions" / name, _committed(tables / "predictions" / name))
        for entry in run.record.artifacts:
            kept = tables / "artifacts" / artifact_name(entry.artifact_sha256)
            if kept.is_file():
                _place(folder / entry.path, _committed(kept, entry.sha256))
        write_atomically(folder / BEGUN, RESTORED)
        text = json.dumps(run.record.model_dump(mode="json"), indent=1, allow_nan=False)
        write_atomically(folder / "result.json", text)
        os.utime(folder / "result.json", (0, 0))  # a workflow sees none that is newer than what builds on it
        written.append(read_run(folder))
    return written


def is_restored(folder: Path) -> bool:
    """Whether a run folder was written from committed tables and nothing has been made in it since."""
    mark = folder / BEGUN
    return mark.is_file() and mark.read_text(encoding="utf-8") == RESTORED


def _committed(file: Path, sha256: str = "") -> bytes:
    if not file.is_file() or (sha256 and file_sha256(file) != sha256):
        raise ResultError(f"{file} is missing or not what was measured: bring it back from version control")
    return file.read_bytes()


def _zeros(runs: list[Run]) -> dict[str, dict[str, tuple[int, int]]]:
    """Of masked networks: artifact -> part -> zeros and weights, as said before or as the file here says."""
    from nnc_utils import artifact, encoding

    found = {a.artifact_sha256: a.zeros for run in runs for a in run.record.artifacts if a.zeros}
    for run in runs:
        sparse = {
            r.artifact_sha256 for r in run.compression if r.technique == "pruning" and r.nonzeros < r.params
        }
        for sha256 in sparse - set(found):
            try:
                weights = artifact.read(run.artifact(sha256)).weights
            except ResultError:  # the file is elsewhere
                continue
            if any(weight.mask is not None for weight in weights.values()):
                found[sha256] = parts = {}
                for layer, weight in weights.items():
                    part, values = layer.partition(".")[0], encoding.decode(weight)
                    zeros, total = parts.get(part, (0, 0))
                    zeros += values.numel() - int(values.count_nonzero())
                    parts[part] = zeros, total + values.numel()
    return found


def _needed(runs: list[Run]) -> list[tuple[str, str]]:
    """Predictions that rows need, their own and their references': file name, and the run of the row."""
    needed = []
    for row in (row for run in runs for row in run.compression):
        needed += [(evidence(row.artifact_sha256), row.run), (evidence(row.reference_sha256), row.run)]
    for row in (row for run in runs for row in run.latency if row.accuracy is not None):
        needed.append((timed_evidence(row), row.run))
    return list(dict.fromkeys(needed))


def _evidence(runs: list[Run]) -> dict[str, bytes]:
    """File name -> content: predictions of every row and of its reference, the labels."""
    found: dict[str, bytes] = {}
    for name, owner in _needed(runs):
        files = [run.folder / "predictions" / name for run in sorted(runs, key=lambda run: run.run != owner)]
        content = next((file.read_bytes() for file in files if file.is_file()), None)
        if content is None or found.setdefault(name, content) != content:
            why = "are missing" if content is None else "are not those of another run with the same artifact"
            raise ResultError(f"the predictions {name} of a row of {owner} {why}: run its notebook again")
    for dataset in {row.dataset for run in runs for row in run.compression}:
        stream = io.BytesIO()
        np.save(stream, labels_of(dataset), allow_pickle=False)
        found[labels_name(dataset)] = stream.getvalue()
    return found


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _csv(frame: pd.DataFrame) -> bytes:
    # whole numbers stay whole where a column has gaps
    text = frame.astype(object).where(frame.notna(), None).to_csv(index=False, lineterminator="\n")
    return text.encode()
