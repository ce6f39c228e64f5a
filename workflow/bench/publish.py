"""Finished runs become a profile's tables, with their evidence: ``results/<profile>/``; and back again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from bench import federated
from bench.claims import claimed_once
from bench.pairs import the_pipeline
from bench.tables import (
    KEY,
    ResultError,
    Run,
    artifact_name,
    committed_runs,
    key_of,
    labels_name,
    read_run,
    summarize,
)
from nnc_utils.provenance import BEGUN, file_sha256, root, write_atomically
from nnc_utils.rows import ATTEMPT, CompressionRow, LatencyRow, evidence, labels_of, timed_evidence, to_frame

RESTORED = "restored"  # in a run folder's mark: written from the tables
COMMITTED_BYTES = 450_000  # larger artifacts stay out of the repository


def publish(
    runs: list[Path],
    profile: str,
    *,
    keep: bool = False,
    attempts: Collection[str] = (),
    out: Path | None = None,
) -> Path:
    """Write a profile's tables, predictions and small artifacts to ``results/<profile>`` (or `out`), in place
    of others.

    `runs` are run folders, a row's reference among them. `keep` lets committed rows stay of other runs, such
    as another machine's, if their references are in the tables and `runs` lack their configurations.
    `attempts` are committed runs that fell short: their rows stay beside those measured since. ResultError:
    a run is unfinished or not as it was measured, evidence is missing, or no such run is committed.
    """
    out = out or root() / "results" / profile
    finished, committed = [read_run(folder) for folder in runs], committed_runs(out) if keep else []
    if unknown := set(attempts) - {run.run for run in committed}:
        raise ResultError(f"not committed: {', '.join(sorted(unknown))}; committed runs become attempts")
    finished += _kept(finished, [_attempt(run) if run.run in attempts else run for run in committed])
    finished.sort(key=lambda run: (run.notebook, run.seed))
    names = [run.run for run in finished]
    if {run.profile for run in finished} != {profile} or len(set(names)) != len(names):
        raise ResultError(
            f"runs of profile {profile}, each once, are needed, not {', '.join(names) or 'none'}"
        )
    rows = claimed_once(finished)
    claims = {(row.artifact_sha256, key_of(row)) for row in rows if row.headline}
    claimed = {sha256 for sha256, _ in claims}
    latency = [
        row.model_copy(update={"headline": int((row.artifact_sha256, key_of(row)) in claims)})
        for run in finished
        for row in run.latency
    ]
    sizes = {row.artifact_sha256: row.artifact_bytes for row in rows}
    for run in finished:  # before anything is written: the file of a claim may lie on another machine
        for sha256 in {entry.artifact_sha256 for entry in run.artifacts} & claimed:
            if sizes[sha256] <= COMMITTED_BYTES:
                run.artifact(sha256)
    files = {f"predictions/{name}": content for name, content in _evidence(finished).items()}
    for name, content in files.items():
        _place(out / name, content)
    compression = to_frame(rows, CompressionRow)
    summary = summarize(compression, out / "predictions")
    wanted, zeros, provenance = kept_artifacts(compression, summary), _zeros([*finished, *committed]), {}
    for run in finished:
        record = run.record.model_dump(exclude={"compression", "latency", "run"})
        for entry in record["artifacts"]:
            sha256 = entry["artifact_sha256"]
            entry |= {"bytes": sizes.get(sha256), "headline": sha256 in claimed}
            entry |= {"zeros": zeros.get(sha256), "committed": "not: neither a claim nor the pipeline"}
            if not entry["zeros"]:
                del entry["zeros"]
            if sha256 in wanted and entry["bytes"] > COMMITTED_BYTES:
                entry["committed"] = f"not: {entry['bytes']:,} bytes are more than {COMMITTED_BYTES:,}"
            elif sha256 in wanted:
                entry["committed"] = f"artifacts/{artifact_name(sha256)}"
                files[entry["committed"]] = run.artifact(sha256).read_bytes()
                _place(out / entry["committed"], files[entry["committed"]])
        provenance[run.run] = record
    _place(out / "compression.csv", _csv(compression))
    _place(out / "latency.csv", _csv(to_frame(latency, LatencyRow)))
    _place(out / "summary.csv", _csv(summary))
    ledgers = {run.run: run.extra["federated"] for run in finished if "federated" in run.extra}
    (out / federated.FILE).unlink(missing_ok=True)
    if ledgers:
        federated_rows = federated.rows_of(compression, ledgers, out / "predictions")
        _place(out / federated.FILE, _csv(to_frame(federated_rows, federated.FederatedRow)))
    _place(out / "provenance.json", (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())
    for file in [*(out / "predictions").glob("*"), *(out / "artifacts").glob("*")]:
        if file.relative_to(out).as_posix() not in files:
            file.unlink()
    (out / "figures").mkdir(exist_ok=True)
    return out


def kept_artifacts(compression: pd.DataFrame, summary: pd.DataFrame) -> set[str]:
    """Whose files are committed where they are small enough: those of claims, and the pipeline's."""
    kept = set(compression[compression["headline"] == 1]["artifact_sha256"])
    if (point := the_pipeline(summary)) is not None:
        same = compression[(compression[KEY] == point[KEY]).all(axis=1)]
        kept.add(same.sort_values("seed")["artifact_sha256"].iloc[0])
    return kept


def _kept(finished: list[Run], committed: list[Run]) -> list[Run]:
    """The committed rows that go with the finished runs; what goes is printed.

    They are of other runs and other configurations, and of networks whose references are in the tables.
    """
    new = {(key_of(row), row.seed) for run in finished for row in run.compression}
    names = {run.run for run in finished}
    others = [run for run in committed if run.run not in names]
    kept = [
        run.with_changes(compression=[r for r in run.compression if (key_of(r), r.seed) not in new])
        for run in others
    ]
    known, before = set[str](), None
    while known != before:  # a row that goes may have been the reference of another
        before, known = known, {r.artifact_sha256 for run in [*finished, *kept] for r in run.compression}
        kept = [
            run.with_changes(
                compression=[row for row in run.compression if row.reference_sha256 in known],
                latency=run.latency if {r.artifact_sha256 for r in run.latency} <= known | {""} else [],
            )
            for run in kept
        ]
    for run in committed:  # a run has one record: rows that it had with other parameters cannot stay
        if run.run in names and (gone := sum((key_of(r), r.seed) not in new for r in run.compression)):
            print(f"{gone} of {len(run.compression)} rows of {run.run} go: it was made again without them")
    for run, left in zip(others, kept, strict=True):
        rows, stay = (len(r.compression) + len(r.latency) for r in (run, left))
        if stay < rows:
            print(f"{rows - stay} of {rows} rows of {run.run} go: measured again, or their reference is gone")
    return [run for run in kept if run.is_evidence]


def _attempt(run: Run) -> Run:
    """The rows of a committed run as attempts that fell short, under a name of their own."""
    name = f"{run.run},{ATTEMPT}"
    changes = {"run": name, "control": ATTEMPT, "headline": 0}
    rows = [row.model_copy(update=changes) for row in run.compression if not row.control]
    return run.with_changes(run=name, compression=rows, latency=[])


def restore(profile: str) -> list[Run]:
    """Write run folders from a profile's tables, for those of its committed runs that were not made here.

    They hold rows, predictions and those artifacts that are committed: enough for other runs to build on,
    unless these ask for another artifact, which `Run.artifact` refuses. `publish` never takes a row from
    them. Nothing makes such a run again by itself: delete its folder for that.
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
        for entry in run.artifacts:
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
    """Of masked networks: artifact -> part -> zeros and weights, as recorded before or as the file says."""
    from nnc_utils import artifact, encoding

    known = {a.artifact_sha256: a.zeros for run in runs for a in run.artifacts if a.zeros}
    for run in runs:
        masked = {
            r.artifact_sha256 for r in run.compression if r.technique == "pruning" and r.nonzeros < r.params
        }
        for sha256 in masked - set(known):
            try:
                weights = artifact.read(run.artifact(sha256)).weights
            except ResultError:  # the file is elsewhere
                continue
            if any(weight.mask is not None for weight in weights.values()):
                known[sha256] = parts = {}
                for layer, weight in weights.items():
                    values, part = encoding.decode(weight), layer.partition(".")[0]
                    zeros, total = parts.get(part, (0, 0))
                    zeros += values.numel() - int(values.count_nonzero())
                    parts[part] = zeros, total + values.numel()
    return known


def _needed(runs: list[Run]) -> list[tuple[str, str]]:
    """Predictions that rows need, their own and their references': file name, and the run of the row."""
    needed = []
    for row in (row for run in runs for row in run.compression):
        needed += [(evidence(row.artifact_sha256), row.run), (evidence(row.reference_sha256), row.run)]
    needed += [(timed_evidence(r), r.run) for run in runs for r in run.latency if r.accuracy is not None]
    return list(dict.fromkeys(needed))


def _evidence(runs: list[Run]) -> dict[str, bytes]:
    """File name -> content: predictions of every row and of its reference, the labels."""
    contents: dict[str, bytes] = {}
    for name, owner in _needed(runs):
        files = [run.folder / "predictions" / name for run in sorted(runs, key=lambda run: run.run != owner)]
        content = next((file.read_bytes() for file in files if file.is_file()), None)
        if content is None or contents.setdefault(name, content) != content:
            why = "are missing" if content is None else "are not those of another run with the same artifact"
            raise ResultError(f"the predictions {name} of a row of {owner} {why}: run its notebook again")
    for dataset in {row.dataset for run in runs for row in run.compression}:
        stream = io.BytesIO()
        np.save(stream, labels_of(dataset), allow_pickle=False)
        contents[labels_name(dataset)] = stream.getvalue()
    return contents


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _csv(frame: pd.DataFrame) -> bytes:
    # whole numbers stay whole where a column has gaps
    text = frame.astype(object).where(frame.notna(), None).to_csv(index=False, lineterminator="\n")
    return text.encode()
