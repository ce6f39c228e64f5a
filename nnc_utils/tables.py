"""Finished runs and committed tables, read and checked, and the summary over seeds.

A run folder holds artifacts, predictions and, written last, ``result.json``. `nnc_utils.publishing` turns
run folders into ``results/<profile>/``; `nnc_utils.reports` makes text of that.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from nnc_utils.provenance import file_sha256, json_sha256
from nnc_utils.rows import (
    JOINED,
    NO_LOSS,
    CompressionRow,
    LatencyRow,
    Row,
    Sha256,
    SummaryRow,
    differences,
    evidence,
    notebook_of,
    read_predictions,
)

PIPELINE = "prune_distill_quantize"  # held against the other orders, and against every rival
THIN = ("small_dense", "small_dense_qat4", "small_dense_distilled", "searched")  # controls: its rivals
POINT = ["dataset", "technique", "method", "point", "control"]


class ResultError(ValueError):
    """A run folder or a table that cannot be trusted."""


class ArtifactRecord(BaseModel):
    """A file of a run: where, its SHA-256, the SHA-256 that the artifact carries, if it backs a claim.

    Of a masked network also where its zeros lie, as soon as it is published: stem, stage or classifier, by
    its name in the network -> zeros, weights.
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

    @property
    def is_evidence(self) -> bool:
        """Whether tables need it: it has rows, or it searched, or timed what searches look up."""
        return bool(self.compression or self.latency or {"search", "latency"} & set(self.extra))

    def with_rows(self, **rows: Any) -> Run:
        """The same run with these `compression` or `latency` rows (and name `run`) in place of its own."""
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

    def row(self, name: str) -> CompressionRow:
        """The first row of an artifact, which is named as for `artifact`."""
        sha256 = self._record_of(name).artifact_sha256
        for row in self.compression:
            if row.artifact_sha256 == sha256:
                return row
        raise ResultError(f"{self.run} has no row of its artifact {name!r}")

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


def check_seeds(compression: pd.DataFrame) -> None:
    """Refuse, as ResultError, a point whose seeds cannot be averaged: one twice, or of unequal training."""
    for key, group in compression.groupby(POINT, sort=False):
        point = dict(zip(POINT, key, strict=True))
        if group["seed"].duplicated().any() or group["division"].nunique() > 1:
            raise ResultError(f"{point}: a seed occurs twice, or its rows are of two divisions")
        if group["train_images"].nunique() > 1:
            saw = ", ".join(f"{row['train_images']:,} ({row['run']})" for _, row in group.iterrows())
            raise ResultError(f"{point}: its seeds saw {saw} pictures; make them again with one budget")


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
    check_seeds(compression)
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


def point_of(row: CompressionRow | LatencyRow) -> tuple:
    """What rows of several seeds, and of several runtimes, share: `POINT`."""
    return tuple(getattr(row, column) for column in POINT)


def of_the_pipelines_notebook(compression: pd.DataFrame) -> pd.Series:
    """Which rows are of the pipeline's notebook."""
    return compression["run"].map(notebook_of) == JOINED


def named_pipeline(summary: pd.DataFrame) -> pd.Series | None:
    """The point that stands for `PIPELINE`: its smallest claim, or else what is nearest to no loss."""
    ours = summary[(summary["method"] == PIPELINE) & (summary["control"] == "")]
    claims = ours[ours["headline"] == 1].sort_values("size_ratio")
    found = claims if len(claims) else ours.sort_values("delta_ci_low")
    return found.iloc[-1] if len(found) else None


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
