"""Finished runs and what becomes of them: CSV tables with their evidence, and the summary.

A run folder holds artifacts, predictions and, written last, ``result.json``. `publish` turns run
folders into ``results/<profile>/``; `nnc_utils.results` makes text of that.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from nnc_utils.provenance import file_sha256, json_sha256, root, write_atomically
from nnc_utils.rows import (
    NO_LOSS,
    CompressionRow,
    LatencyRow,
    Row,
    Sha256,
    SummaryRow,
    differences,
    evidence,
    labels_of,
    read_predictions,
    timed_evidence,
)

COMMITTED_BYTES = 450_000  # larger artifacts stay out of the repository
SEEDS_OF_A_CLAIM = 3
PIPELINE = "prune_distill_quantize"  # held against the other orders, and against every rival
POINT = ["dataset", "technique", "method", "point", "control"]


class ResultError(ValueError):
    """A run folder or a table that cannot be trusted."""


class ArtifactRecord(BaseModel):
    """A file of a run: where, its SHA-256, the SHA-256 that the artifact carries, if it backs a claim.

    Of a masked network also where its zeros lie, as soon as it is published: layer -> zeros, weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    sha256: Sha256
    artifact_sha256: Sha256
    headline: bool = False
    zeros: dict[str, tuple[int, int]] = {}


class RunRecord(BaseModel):
    """What result.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    notebook: str
    notebook_sha256: Sha256
    run: str
    profile: str
    seed: int
    parameters: dict[str, Any]
    parameters_sha256: Sha256
    code_sha256: Sha256
    commit: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    upstream: dict[str, Sha256]
    wall_seconds: float
    dataset: str
    compression: list[CompressionRow]
    latency: list[LatencyRow]
    artifacts: list[ArtifactRecord]
    extra: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what its result.json says (`record`)."""

    folder: Path
    record: RunRecord

    @property
    def run(self) -> str:
        """How rows name it."""
        return self.record.run

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.record.dataset

    @property
    def compression(self) -> list[CompressionRow]:
        """Its compression rows."""
        return self.record.compression

    @property
    def baseline(self) -> CompressionRow:
        """The row that others are compared with."""
        found = [row for row in self.compression if row.technique == "baseline" and not row.control]
        if len(found) != 1:
            raise ResultError(f"{self.run} has {len(found)} baselines: a reference needs to be one")
        return found[0]

    @property
    def latency(self) -> list[LatencyRow]:
        """Its latency rows."""
        return self.record.latency

    @property
    def extra(self) -> dict[str, Any]:
        """What the notebook wanted later ones to know."""
        return self.record.extra

    def with_rows(self, **rows: list) -> Run:
        """The same run with these `compression` or `latency` rows in place of its own."""
        return Run(self.folder, self.record.model_copy(update=rows))

    def artifact(self, name: str) -> Path:
        """The file of an artifact, by its checksum or by its file name without suffix."""
        record = self._record_of(name)
        places = [record.path, f"artifacts/{artifact_name(record.artifact_sha256)}"]  # run; committed
        path = next((self.folder / p for p in places if (self.folder / p).is_file()), self.folder / places[0])
        if not path.is_file():
            raise ResultError(f"{path} is missing: bring it from where it was made, or run its notebook")
        return path

    def score(self, name: str) -> dict[str, Any]:
        """path, sha256 and predictions of an artifact: a reference for `compression_row`."""
        record = self._record_of(name)
        predictions = self.folder / "predictions" / evidence(record.artifact_sha256)
        if not predictions.is_file():
            raise ResultError(f"{self.run}: {name} was never scored, there is no {predictions}")
        path = self.folder / record.path
        return {"path": path, "sha256": record.artifact_sha256, "predictions": predictions}

    def _record_of(self, name: str) -> ArtifactRecord:
        for record in self.record.artifacts:
            if name in (record.artifact_sha256, Path(record.path).stem):
                return record
        known = ", ".join(Path(record.path).stem for record in self.record.artifacts) or "none"
        raise ResultError(f"{self.run} has no artifact {name!r}: it has {known}")


def read_run(folder: Path) -> Run:
    """Read a finished run and check it: its rows, its hashes, the bytes of every artifact that is there.

    Large artifacts may have been left on the machine that made them: `Run.artifact` refuses those.

    Raises
    ------
    ResultError
        When it is unfinished, or anything in it does not agree; the message says what.
    """
    folder = Path(folder)
    path = folder / "result.json"
    if not path.is_file():
        raise ResultError(f"{folder} is no finished run: it has no result.json. Run its notebook first")
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ResultError(f"{path} is not valid: {error}") from None
    if json_sha256(record.parameters) != record.parameters_sha256:
        raise ResultError(f"{path}: the parameters do not have the hash that stands beside them")
    for entry in record.artifacts:
        file = folder / entry.path
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ResultError(f"{path} names {entry.path}, a file outside its run folder")
        if file.is_file() and file_sha256(file) != entry.sha256:
            raise ResultError(f"{file} differs from the one that was measured: run {record.notebook} again")
    for row in (*record.compression, *record.latency):
        if (row.run, row.profile) != (record.run, record.profile):
            raise ResultError(f"{path}: a row is of run {row.run}, profile {row.profile}")
    return Run(folder, record)


def read_rows(path: Path, kind: type[Row]) -> list[Any]:
    """The rows of a CSV, checked; a table without the protocol's columns in order is a ResultError."""
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != kind.columns():
            raise ResultError(f"{path} has the columns {reader.fieldnames}: {kind.columns()} are needed")
        rows = []
        for record in reader:
            try:
                rows.append(kind.from_csv(record))
            except (ValidationError, TypeError) as error:
                raise ResultError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def to_frame(rows: Iterable[Row], kind: type[Row]) -> pd.DataFrame:
    """Rows as a data frame with the protocol's columns."""
    return pd.DataFrame([row.model_dump() for row in rows], columns=kind.columns())


def labels_name(dataset: str) -> str:
    """File name of a data set's test labels."""
    return f"labels-{re.sub(r'[^A-Za-z0-9.-]+', '_', dataset)}.npy"


def artifact_name(sha256: str) -> str:
    """File name of a committed artifact."""
    return f"{sha256[:16]}.safetensors"


def summarize(compression: pd.DataFrame, predictions: Path) -> pd.DataFrame:
    """One row per operating point, over its seeds (the protocol's rule 4).

    Parameters
    ----------
    compression : the table.
    predictions : folder with the predictions of every artifact and the labels.

    Returns
    -------
    The table of `SummaryRow`; no_loss = 1 where the interval's lower end is at least `rows.NO_LOSS`.
    """
    rows = []
    for key, group in compression.groupby(POINT, sort=False):
        point = dict(zip(POINT, key, strict=True))
        labels = read_predictions(predictions / labels_name(point["dataset"]))
        deltas = differences(
            compressed=[read_predictions(predictions / evidence(s)) for s in group["artifact_sha256"]],
            reference=[read_predictions(predictions / evidence(s)) for s in group["reference_sha256"]],
            labels=labels,
        )
        accuracies = [float(a) for a in group["accuracy"]]
        sizes = ("size_ratio", "artifact_bytes", "params", "macs")
        means = {column: round(float(group[column].mean()), 4) for column in sizes}
        if group["seed"].duplicated().any() or group["division"].nunique() > 1:
            raise ResultError(f"{point}: a seed occurs twice, or its rows are of two divisions")
        rows.append(
            SummaryRow(
                **point,
                **means,
                seeds=len(group),
                headline=int(group["headline"].max()),
                division=group["division"].iloc[0],
                accuracy_mean=round(statistics.fmean(accuracies), 4),
                accuracy_sd=round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None,
                delta_mean=deltas["accuracy_delta"],
                delta_ci_low=deltas["delta_ci_low"],
                delta_ci_high=deltas["delta_ci_high"],
                no_loss=int(deltas["delta_ci_low"] >= NO_LOSS),
            )
        )
    return to_frame(rows, SummaryRow)


class Choice(NamedTuple):
    """What all seeds' validation pictures say of a point: its difference in points, and if it is chosen."""

    low: float
    mean: float
    high: float
    chosen: bool


def claimed_once(runs: list[Run]) -> list[CompressionRow]:
    """The rows of all runs with one choice of what is claimed, which every seed follows.

    Each seed's own validation pictures may like another point best; a claim over seeds is of one point: what
    `chosen_over_seeds` finds, and where that has nothing to choose from, what the first seed chose.
    """
    rows = [row for run in runs for row in run.compression]
    chosen: dict[tuple, int] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        chosen.setdefault(_point(row), row.headline)
    together, macs = chosen_over_seeds(runs), _macs(runs)
    decided = {_race(row, macs) for row in rows if _point(row) in together}
    for row in rows:
        if _race(row, macs) in decided:
            chosen[_point(row)] = int(_point(row) in together and together[_point(row)].chosen)
    return [row.model_copy(update={"headline": chosen[_point(row)]}) for row in rows]


def chosen_over_seeds(runs: list[Run]) -> dict[tuple, Choice]:
    """What the validation pictures of all seeds choose together.

    In each technique and division the smallest file that is likely without loss: the lower end of its
    difference to its reference is `rows.NO_LOSS` or more. Where none is, the file whose lower end is highest,
    unless all of its interval is below 0. Networks that lost channels are a race of their own, by MACs. Only
    points compete that `SEEDS_OF_A_CLAIM` seeds or more looked at. The interval is that of the mean over the
    seeds, their errors taken as independent.

    Returns
    -------
    Point (`POINT`) -> its `Choice`.
    """
    macs = _macs(runs)
    races: dict[tuple, dict[tuple, tuple]] = {}  # point -> how much it is wanted, its interval
    for point, found in _files(runs).items():
        looks = [_looks(run)[name] for run, _, name in found if name in _looks(run)]
        if len({row.seed for run, row, name in found if name in _looks(run)}) < SEEDS_OF_A_CLAIM:
            continue
        mean = statistics.fmean(mean for _, mean, _ in looks)
        half = sum((mean - low) ** 2 for low, mean, _ in looks) ** 0.5 / len(looks)
        race = _race(found[0][1], macs)
        costs = ("macs", "artifact_bytes") if race[-1] else ("artifact_bytes",)
        wanted = [statistics.fmean(getattr(row, cost) for _, row, _ in found) for cost in costs]
        races.setdefault(race, {})[point] = [*wanted, point], (mean - half, mean, mean + half)
    choices = {}
    for competing in races.values():
        likely = [point for point, (_, (low, _, _)) in competing.items() if low >= NO_LOSS]
        best = min(likely, key=lambda point: competing[point][0], default=None)
        if not likely:
            near = max(
                competing, key=lambda p: (competing[p][1][0], [-cost for cost in competing[p][0][:-1]])
            )
            best = near if competing[near][1][2] >= 0 else None
        choices |= {p: Choice(*interval, p == best) for p, (_, interval) in competing.items()}
    return choices


def looked_at_by_all(runs: list[Run]) -> list[Run]:
    """The runs, their validation differences completed for the points that other seeds looked at.

    A notebook stops looking at the first file that is likely without loss, in every seed at another one.
    What is missing is looked at now. A point whose file or pictures are not here stays out, which is printed.
    """
    from nnc_utils import artifact, claims, data

    more: dict[str, dict[str, list[float]]] = {}
    for found in _files(runs).values():
        lacking = [(run, row, name) for run, row, name in found if name not in _looks(run)]
        if len(found) < SEEDS_OF_A_CLAIM or len(lacking) == len(found):
            continue
        for run, row, name in lacking:
            sha256 = row.reference_sha256
            made = (r for r in runs if sha256 in {a.artifact_sha256 for a in r.record.artifacts})
            try:
                path, against = run.artifact(name), next(made, run).artifact(sha256)
                pictures = data.load(row.dataset, size=artifact.read(path).spec.size)
            except (ResultError, data.DataError) as error:
                print(f"{run.run} {row.method} {row.point} stays out of what the seeds choose: {error}")
                continue
            alone = {("closed", "bytes"): [path]}  # closed: compared with just the file that is given
            seen = claims.choose(alone, baseline=against, pictures=pictures)
            more.setdefault(run.run, {})[name] = seen.looked[path.stem]
    extras = [run.extra | {"validation_delta": _looks(run) | more.get(run.run, {})} for run in runs]
    return [
        Run(run.folder, run.record.model_copy(update={"extra": extra})) if run.run in more else run
        for run, extra in zip(runs, extras, strict=True)
    ]


def _files(runs: list[Run]) -> dict[tuple, list[tuple[Run, CompressionRow, str]]]:
    """Point -> the run, row and file name of each of its seeds; of our own methods, without controls."""
    found: dict[tuple, list[tuple[Run, CompressionRow, str]]] = {}
    for run in runs:
        for row in run.compression:
            same = [r.path for r in run.record.artifacts if r.artifact_sha256 == row.artifact_sha256]
            names = sorted((Path(path).stem for path in same), key=lambda name: name not in _looks(run))
            if names and not row.control:
                found.setdefault(_point(row), []).append((run, row, names[0]))
    return found


def _looks(run: Run) -> dict[str, list[float]]:
    return run.extra.get("validation_delta") or {}


def _macs(runs: list[Run]) -> dict[str, int]:
    return {row.artifact_sha256: row.macs for run in runs for row in run.compression}


def _race(row: CompressionRow, macs: dict[str, int]) -> tuple:
    """Whom a point competes with for a claim; at the end, whether it lost channels."""
    cut = row.technique == "pruning" and row.macs < macs.get(row.reference_sha256, 0)
    return row.dataset, row.technique, row.division, bool(row.control), cut


def _point(row: CompressionRow | LatencyRow) -> tuple:
    return tuple(getattr(row, column) for column in POINT)


def named_pipeline(summary: pd.DataFrame) -> pd.Series | None:
    """The point that stands for `PIPELINE`: its smallest claim, or else what is nearest to no loss."""
    ours = summary[(summary["method"] == PIPELINE) & (summary["control"] == "")]
    claims = ours[ours["headline"] == 1].sort_values("size_ratio")
    found = claims if len(claims) else ours.sort_values("delta_ci_low")
    return found.iloc[-1] if len(found) else None


def kept_artifacts(compression: pd.DataFrame, summary: pd.DataFrame) -> set[str]:
    """Whose files are committed where they are small enough: those of claims, and the pipeline's."""
    kept = set(compression[compression["headline"] == 1]["artifact_sha256"])
    point = named_pipeline(summary)
    if point is not None:
        same = compression[(compression[POINT] == point[POINT]).all(axis=1)]
        kept.add(same.sort_values("seed")["artifact_sha256"].iloc[0])
    return kept


def committed_runs(profile_dir: Path) -> list[Run]:
    """The runs that a profile's tables are of: rows, evidence, and of the artifacts those small enough."""
    kinds = {"compression": CompressionRow, "latency": LatencyRow}
    folder = Path(profile_dir)
    if not all((folder / name).is_file() for name in ("provenance.json", *(f"{kind}.csv" for kind in kinds))):
        return []
    rows = {name: read_rows(folder / f"{name}.csv", kind) for name, kind in kinds.items()}
    runs = []
    for name, record in json.loads((folder / "provenance.json").read_text(encoding="utf-8")).items():
        record |= {"run": name} | {kind: [row for row in rows[kind] if row.run == name] for kind in kinds}
        entries = [{k: e[k] for k in ArtifactRecord.model_fields if k in e} for e in record["artifacts"]]
        runs.append(Run(folder, RunRecord(**record | {"artifacts": entries})))
    return runs


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
    return [run for run in kept if run.compression or run.latency]


def publish(runs: list[Path], profile: str, *, keep: bool = False) -> Path:
    """Write a profile's tables and their evidence; what was there before goes.

    compression.csv, latency.csv, summary.csv, provenance.json, predictions/ (of every row, and the
    labels), artifacts/ (`kept_artifacts`, as far as they are small enough to commit).

    Parameters
    ----------
    runs : run folders of this profile, a row's reference among them.
    profile : its name.
    keep : let committed rows stay of runs that are not among `runs`, such as another machine's, if
        their references are in the tables and `runs` do not have their points; it is printed which go.

    Returns
    -------
    ``results/<profile>``, in which figures/ waits for figures.

    Raises
    ------
    ResultError
        When a run is unfinished or not as it was measured, or evidence is missing.
    """
    out = root() / "results" / profile
    finished = [read_run(folder) for folder in runs]
    if keep:
        finished += _kept(finished, committed_runs(out))
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
    points = {(row.artifact_sha256, _point(row)) for row in compression if row.headline}
    latency = [
        row.model_copy(update={"headline": int((row.artifact_sha256, _point(row)) in points)})
        for run in finished
        for row in run.latency
    ]

    (out / "figures").mkdir(parents=True, exist_ok=True)
    kept = {"predictions": set(), "artifacts": set()}
    for name, content in _evidence(finished).items():
        _place(out / "predictions" / name, content)
        kept["predictions"].add(name)
    table = to_frame(compression, CompressionRow)
    summary = summarize(table, out / "predictions")
    wanted, provenance = kept_artifacts(table, summary), {}
    pruned = {row.artifact_sha256 for row in compression if row.technique == "pruning"}
    for run in finished:
        record = run.record.model_dump(exclude={"compression", "latency", "run"})
        for entry in record["artifacts"]:
            sha256 = entry["artifact_sha256"]
            name = artifact_name(sha256)
            entry["bytes"], entry["headline"] = sizes.get(sha256), sha256 in claimed
            entry["committed"] = "not: neither a claim nor the pipeline"
            if sha256 in pruned and not entry["zeros"]:
                entry["zeros"] = _zeros(run, sha256)
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


def _zeros(run: Run, sha256: str) -> dict[str, tuple[int, int]]:
    """Layer -> zeros and weights of a masked network whose file is here, else nothing."""
    from nnc_utils import artifact, encoding

    try:
        weights = artifact.read(run.artifact(sha256)).weights
    except ResultError:
        return {}
    if all(weight.mask is None for weight in weights.values()):
        return {}
    values = {layer: encoding.decode(weight) for layer, weight in weights.items()}
    return {layer: (v.numel() - int(v.count_nonzero()), v.numel()) for layer, v in values.items()}


def _evidence(runs: list[Run]) -> dict[str, bytes]:
    """File name -> content: predictions of every row and of its reference, the labels."""
    needed = []
    for row in (row for run in runs for row in run.compression):
        needed += [(evidence(row.artifact_sha256), row.run), (evidence(row.reference_sha256), row.run)]
    for row in (row for run in runs for row in run.latency):
        if row.accuracy is not None:
            needed.append((timed_evidence(row), row.run))
    found: dict[str, bytes] = {}
    for name, owner in dict.fromkeys(needed):
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
