"""Finished runs and committed tables, read and checked, and the summary over seeds.

A run folder holds artifacts, predictions and, written last, ``result.json``. `bench.publish` turns run
folders into ``results/<profile>/``; `bench.report` writes about that.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer

from nnc_utils.provenance import file_sha256, json_sha256
from nnc_utils.rows import (
    NO_LOSS,
    CompressionRow,
    LatencyRow,
    Row,
    Sha256,
    SummaryRow,
    differences,
    evidence,
    read_predictions,
    to_frame,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

KEY = ["dataset", "technique", "method", "settings", "control"]  # what the seeds of a configuration share


class ResultError(ValueError):
    """A run folder or a table that cannot be trusted."""


class ArtifactRecord(BaseModel):
    """A file of a run. `zeros`, of a masked network: its stem, stages and classifier -> zeros and weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    sha256: Sha256
    artifact_sha256: Sha256
    headline: bool = False
    zeros: dict[str, tuple[int, int]] = {}


class Extra(BaseModel):
    """What a run tells others beside its rows. A notebook may add keys of its own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    files: dict[str, str] = {}  # label of a network -> its file below the run folder
    validation_delta: dict[str, tuple[float, float, float]] = {}  # file name -> low, mean, high in points
    missing: dict[str, str] = {}  # what could not be measured -> why
    integer_macs: dict[Sha256, float] = {}  # another tool's file -> its share of MACs in integers, 0 to 1
    search: dict[str, Any] = {}  # of 05: what each search found, and what it cost
    images: dict[str, str] = {}  # split -> digest, of own images (`Data.digests`)
    latency: dict[str, Any] = {}  # of 05: milliseconds of blocks and of networks in a runtime
    failures: list[dict[str, Any]] = []  # of 00: published lines that fail, for the README
    fewest_samples: int | None = None  # of 07: predictions behind a median, at least
    cpu_busy_before: float | None = None  # of 07: percent that other processes used before the first round

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


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
    code: dict[str, str] | None = None  # module that its processes loaded -> hash, for `provenance.changed`
    code_sha256: str = ""  # of the whole package, in runs of before `code`
    commit: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    upstream: dict[str, Sha256]
    wall_seconds: float
    dataset: str
    compression: list[CompressionRow]
    latency: list[LatencyRow]
    artifacts: list[ArtifactRecord]
    extra: Extra = Extra()


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what its result.json says (`record`)."""

    folder: Path
    record: RunRecord

    def __getattr__(self, name: str) -> Any:
        """The record's own fields, such as `run`, `dataset` and `compression`."""
        if name == "record":
            raise AttributeError(name)
        return getattr(self.record, name)

    @property
    def extra(self) -> dict[str, Any]:
        """What the notebook told others beside its rows, as JSON; typed it is `record.extra`."""
        return self.record.extra.model_dump(mode="json")

    @property
    def baseline(self) -> CompressionRow:
        """The row that others are compared with."""
        baselines = [row for row in self.compression if row.technique == "baseline" and not row.control]
        if len(baselines) != 1:
            raise ResultError(f"{self.run} has {len(baselines)} baselines: a reference needs to be one")
        return baselines[0]

    @property
    def is_evidence(self) -> bool:
        """Whether tables need it: it has rows, or it searched, timed what they look up, or saw lines fail."""
        extra = self.record.extra
        return bool(self.compression or self.latency or extra.search or extra.latency or extra.failures)

    def check_images(self, bench: Any) -> None:
        """ResultError, if `bench.images`, own images, are not those that the run saw. Tells of guessing."""
        saw = self.record.extra.images
        now = bench.images.digests() if saw else {}
        if differ := ", ".join(which for which in saw if saw[which] != now[which]):
            raise ResultError(
                f"{self.run} in {self.folder} saw other {differ} images than {self.dataset} has now: run it "
                "again, and what builds on it, or put the folder back as it was"
            )
        for row in self.compression if saw else ():
            if row.technique == "baseline" and (told := guessing(row.accuracy, bench.images.test.labels)):
                print(f"{self.run}: {told}")

    def with_changes(self, **fields: Any) -> Run:
        """The same run with these fields of its record in place of its own."""
        return Run(self.folder, self.record.model_copy(update=fields))

    def artifact(self, name: str) -> Path:
        """The file of an artifact, by its checksum or by its file name without suffix."""
        record = self._record_of(name)
        places = [record.path, f"artifacts/{artifact_name(record.artifact_sha256)}"]  # run; committed
        for place in places:
            if (self.folder / place).is_file():
                return self.folder / place
        where = self.folder / record.path
        again = f"delete {self.folder}" if (self.folder / "result.json").is_file() else "run its notebook"
        raise ResultError(f"{where} is missing: bring it from where it was made, or {again} to have it made")

    def score(self, name: str) -> dict[str, Any]:
        """path, sha256 and predictions of an artifact: a reference for `compression_row`."""
        record = self._record_of(name)
        predictions = self.folder / "predictions" / evidence(record.artifact_sha256)
        if not predictions.is_file():
            raise ResultError(f"{self.run}: {name} was never scored, there is no {predictions}")
        path = self.folder / record.path
        return {"path": path, "sha256": record.artifact_sha256, "predictions": predictions}

    def _record_of(self, name: str) -> ArtifactRecord:
        for record in self.artifacts:
            if name in (record.artifact_sha256, Path(record.path).stem):
                return record
        known = ", ".join(Path(record.path).stem for record in self.artifacts) or "none"
        raise ResultError(f"{self.run} has no artifact {name!r}: it has {known}")


def read_run(folder: Path) -> Run:
    """Read a finished run and check it: its rows, and the bytes of every artifact that is there.

    Large artifacts may have been left on the machine that made them: `Run.artifact` refuses those.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise ResultError(f"{folder} is no finished run: it has no result.json. Run its notebook first")
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault, count = error.errors()[0], error.error_count()
        where = ".".join(map(str, fault["loc"])) or "it"
        said = f"{where}: {fault['msg']}" + (f", and {count - 1} more" if count > 1 else "")
        told = f"{path} is not valid, or of another version of this suite ({said})"
        raise ResultError(f"{told}: run its notebook again") from None
    if json_sha256(record.parameters) != record.parameters_sha256:
        raise ResultError(f"{path}: the parameters do not have the hash that stands beside them")
    for entry in record.artifacts:
        file = Path(folder) / entry.path
        if not file.resolve().is_relative_to(Path(folder).resolve()):
            raise ResultError(f"{path} names {entry.path}, a file outside its run folder")
        if file.is_file() and file_sha256(file) != entry.sha256:
            raise ResultError(f"{file} differs from the one that was measured: run {record.notebook} again")
    return Run(Path(folder), record)


def committed_runs(profile_dir: Path) -> list[Run]:
    """The runs that a profile's tables are of: rows, evidence, and of the artifacts those small enough."""
    folder = Path(profile_dir)
    kinds = {"compression": CompressionRow, "latency": LatencyRow}
    if not all((folder / name).is_file() for name in ("provenance.json", *(f"{kind}.csv" for kind in kinds))):
        return []
    rows = {name: read_rows(folder / f"{name}.csv", kind) for name, kind in kinds.items()}
    runs = []
    for name, record in json.loads((folder / "provenance.json").read_text(encoding="utf-8")).items():
        own = {kind: [row for row in rows[kind] if row.run == name] for kind in kinds}
        entries = [{k: e[k] for k in ArtifactRecord.model_fields if k in e} for e in record["artifacts"]]
        runs.append(Run(folder, RunRecord(**record | own | {"run": name, "artifacts": entries})))
    return runs


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


def labels_name(dataset: str) -> str:
    """File name of a data set's test labels."""
    return f"labels-{re.sub(r'[^A-Za-z0-9.-]+', '_', dataset)}.npy"


def artifact_name(sha256: str) -> str:
    """File name of a committed artifact."""
    return f"{sha256[:16]}.safetensors"


def key_of(row: CompressionRow | LatencyRow) -> tuple:
    """What rows of several seeds, and of several runtimes, share: `KEY`."""
    return tuple(getattr(row, column) for column in KEY)


def guessing(accuracy: float, labels: Tensor) -> str:
    """Says where an accuracy in percent is no more than naming always the same class gives; else empty."""
    always = 100 * int(labels.int().bincount().max()) / len(labels)
    if accuracy > always:
        return ""
    return (
        f"the uncompressed network is right on {accuracy:.2f} % of the images, always naming the same class "
        f"on {always:.2f} %. Compressing cannot lose what it has not learned: train it longer or on more "
        "images"
    )


def smallest_claim(summary: pd.DataFrame) -> pd.Series | None:
    """Of rows of summary.csv the smallest claim, or else what is nearest to its reference."""
    claims = summary[summary["headline"] == 1].sort_values("size_ratio")
    best = claims if len(claims) else summary.sort_values("delta_ci_low")
    return best.iloc[-1] if len(best) else None


BUDGET = 0.99  # of the images that another seed saw: clients drop incomplete batches, each split its own


def summarize(compression: pd.DataFrame, predictions: Path) -> pd.DataFrame:
    """One row per configuration, over its seeds (the protocol's rule 4); `predictions` has the labels, too.

    no_loss = 1 where the interval's lower end is at least `rows.NO_LOSS`. ResultError: the seeds of a
    configuration cannot be averaged, since one is there twice, or their training was unequal.
    """
    rows = []
    for key, group in compression.groupby(KEY, sort=False):
        named = dict(zip(KEY, key, strict=True))
        if group["seed"].duplicated().any() or group["division"].nunique() > 1:
            raise ResultError(f"{named}: a seed occurs twice, or its rows are of two divisions")
        few, most = group["train_images"].agg(["min", "max"])
        if few < BUDGET * most:
            saw = ", ".join(f"{row['train_images']:,} ({row['run']})" for _, row in group.iterrows())
            raise ResultError(f"{named}: its seeds saw {saw} images; train them again with one budget")
        deltas = differences(
            compressed=[read_predictions(predictions / evidence(s)) for s in group["artifact_sha256"]],
            reference=[read_predictions(predictions / evidence(s)) for s in group["reference_sha256"]],
            labels=read_predictions(predictions / labels_name(named["dataset"])),
        )
        accuracies = [float(a) for a in group["accuracy"]]
        sizes = ("size_ratio", "artifact_bytes", "params", "macs")
        rows.append(
            SummaryRow(
                **named,
                **{column: round(float(group[column].mean()), 4) for column in sizes},
                seeds=len(group),
                headline=int(group["headline"].max()),
                division=group["division"].iloc[0],
                accuracy_mean=round(statistics.fmean(accuracies), 4),
                accuracy_sd=round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None,
                delta_mean=deltas.pop("accuracy_delta"),
                **deltas,
                no_loss=int(deltas["delta_ci_low"] >= NO_LOSS),
            )
        )
    return to_frame(rows, SummaryRow)
