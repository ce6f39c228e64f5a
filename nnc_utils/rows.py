"""One measurement is one row: its columns, what they may hold, and how they are computed.

The columns and their order are those of the measurement protocol. Notebooks build rows with
`compression_row` and `latency_rows`; differences, intervals and ratios are computed here only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nnc_utils.provenance import commit

NO_LOSS = -0.3  # percentage points: "no loss" means that the interval's lower end is not below
APART = 10  # percent: times that are no further apart are taken for equal
AGAIN = "again"  # control of what was timed a second time
AFTER = "after_"  # begins the control of a network between two stages, as "after_prune"
BASELINE = "01_baseline"
JOINED = "06_pipeline"  # the notebook whose peers are held against the pipeline
OWN_CLASSES = ("int8", "bf16")  # precisions that round where eager does not: no row without agreement
ROUNDING = 5e-5  # accuracies are stored with four decimals

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Flag = Annotated[int, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]
Name = Annotated[str, Field(min_length=1)]
Technique = Literal["baseline", "quantization", "pruning", "distillation", "search", "pipeline", "peer"]
Division = Literal["closed", "open"]


class Row(BaseModel):
    """What rows share: unknown columns are refused, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def columns(cls) -> list[str]:
        """The columns in their order."""
        return list(cls.model_fields)

    @classmethod
    def from_csv(cls, record: Mapping[str, str]) -> Row:
        """Read a row of a CSV: an empty field is None where the column may be empty of a number."""
        may_be_none = {name for name, field in cls.model_fields.items() if field.default is None}
        return cls(**{k: None if v == "" and k in may_be_none else v for k, v in record.items()})


class CompressionRow(Row):
    """One artifact on the test set."""

    profile: Name
    run: Name
    dataset: Name
    model: Name
    technique: Technique
    method: Name
    point: str
    seed: Count
    division: Division
    control: str
    headline: Flag
    simulated: Flag
    params: Annotated[int, Field(ge=1)]
    nonzeros: Count
    macs: Annotated[int, Field(ge=1)]
    artifact_bytes: Annotated[int, Field(ge=1)]
    size_ratio: Positive
    bits_per_weight: Positive
    correct: Count
    total: Annotated[int, Field(ge=1)]
    accuracy: Percent
    accuracy_delta: Number
    delta_ci_low: Number
    delta_ci_high: Number
    reference_sha256: Sha256
    train_images: Count
    train_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    artifact_sha256: Sha256
    commit: Name

    @model_validator(mode="after")
    def _agrees(self) -> CompressionRow:
        if self.correct > self.total:
            raise ValueError(f"{self.correct} correct of {self.total} images")
        if abs(self.accuracy - 100 * self.correct / self.total) > ROUNDING + 1e-9:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.total} images")
        if not self.delta_ci_low <= self.accuracy_delta <= self.delta_ci_high:
            raise ValueError(
                f"the difference {self.accuracy_delta} is outside its interval "
                f"[{self.delta_ci_low}, {self.delta_ci_high}]"
            )
        if self.nonzeros > self.params:
            raise ValueError(f"{self.nonzeros} non-zeros among {self.params} parameters")
        return self


class LatencyRow(Row):
    """One artifact in one runtime. Measurements are empty where the runtime is not installed.

    `rounds_p50_ms` holds the median of each round, with spaces between: the speed-ups are of rounds.

    Without `agreement` the accuracy is the artifact's in eager: the runtime was seen to compute the same.
    """

    profile: Name
    run: Name
    dataset: Name
    model: Name
    technique: Technique
    method: Name
    point: str
    seed: Count
    control: str
    headline: Flag
    runtime: Name
    precision: Name
    stored_codes: Flag | None = None
    batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    rounds: Count
    p50_ms: Positive | None = None
    p90_ms: Positive | None = None
    iqr_ms: Annotated[float, Field(ge=0)] | None = None
    throughput: Positive | None = None
    accuracy: Percent | None = None
    agreement: Percent | None = None
    speedup_eager_fp32: Positive | None = None
    speedup_best_fp32: Positive | None = None
    peak_rss_mb: Positive | None = None
    load_ms: Annotated[float, Field(ge=0)] | None = None
    runtime_bytes: Count | None = None
    artifact_sha256: Sha256 | Literal[""]
    commit: Name
    rounds_p50_ms: str = ""

    @property
    def medians(self) -> list[float]:
        """The median of each round, in milliseconds."""
        return [float(median) for median in self.rounds_p50_ms.split()]

    @model_validator(mode="after")
    def _agrees(self) -> LatencyRow:
        times = (self.p50_ms, self.p90_ms, self.iqr_ms)
        if any(t is None for t in times) != all(t is None for t in times):
            raise ValueError("p50_ms, p90_ms and iqr_ms are either all measured or all empty")
        if self.p50_ms is not None and self.p90_ms < self.p50_ms:
            raise ValueError(f"p90 {self.p90_ms} ms is below p50 {self.p50_ms} ms")
        if self.p50_ms is not None and len(self.medians) != self.rounds:
            raise ValueError(f"{self.rounds} rounds, but {len(self.medians)} medians of rounds")
        if not all(0 < median < float("inf") for median in self.medians):
            raise ValueError(f"rounds_p50_ms is {self.rounds_p50_ms!r}: milliseconds above 0 are needed")
        if not self.artifact_sha256 and self.control != "identity":
            raise ValueError("only the identity network has no artifact")
        return self


class SummaryRow(Row):
    """One operating point over its seeds."""

    dataset: Name
    technique: Technique
    method: Name
    point: str
    control: str
    seeds: Annotated[int, Field(ge=1)]
    headline: Flag
    division: Division
    accuracy_mean: Percent
    accuracy_sd: Number | None = None
    delta_mean: Number
    delta_ci_low: Number
    delta_ci_high: Number
    no_loss: Flag
    size_ratio: Positive
    artifact_bytes: Positive
    params: Positive
    macs: Positive


# --- Names of runs ------------------------------------------------------------------------------


def run_name(profile: str, notebook: str, seed: int, part: str = "") -> str:
    """How rows name a run: "quick/03_pruning/seed=1,channels"."""
    return f"{profile}/{notebook}/seed={seed}" + (f",{part}" if part else "")


def label(row: CompressionRow) -> str:
    """How other notebooks name an artifact: method, point, and the stage that it was saved behind."""
    return f"{row.method}:{row.point}" + (f" {row.control}" if row.control.startswith(AFTER) else "")


def notebook_of(run: str) -> str:
    """The notebook of a run by the name that `run_name` gave it."""
    return run.split("/")[1]


# --- Evidence: the predictions behind a row -----------------------------------------------------


def evidence(sha256: str, runtime: str = "", precision: str = "") -> str:
    """File name of an artifact's test predictions, in eager or in another runtime."""
    return ".".join(part for part in (sha256[:16], runtime, precision, "npy") if part)


def timed_evidence(row: Any) -> str:
    """File name of the predictions that a latency row's accuracy is of: without agreement, those of eager."""
    own = row.agreement is not None and row.agreement == row.agreement  # NaN: an empty cell
    return evidence(row.artifact_sha256, *((row.runtime, row.precision) if own else ()))


def read_predictions(path: Path) -> np.ndarray:
    """The classes predicted for the test images, uint8 of shape (images,)."""
    predictions = np.load(path, allow_pickle=False)
    if predictions.dtype != np.uint8 or predictions.ndim != 1:
        raise ValueError(f"{path} holds {predictions.dtype} {predictions.shape}: uint8 (images,) is needed")
    return predictions


def differences(*, compressed: Iterable, reference: Iterable, labels: np.ndarray) -> dict[str, float]:
    """Accuracy lost or won against a reference, with its paired 95 % interval.

    Parameters
    ----------
    compressed, reference : predictions of each seed, (images,) each and in the same order.
    labels : the true classes, (images,).

    Returns
    -------
    accuracy_delta, delta_ci_low, delta_ci_high in percentage points.
    """
    from nnc_utils import evaluation

    interval = evaluation.paired_interval(
        compressed_correct=np.stack([p == labels for p in compressed]),
        reference_correct=np.stack([p == labels for p in reference]),
    )
    low, mean, high = (round(float(v), 4) for v in (interval.low, interval.mean, interval.high))
    return {"accuracy_delta": mean, "delta_ci_low": low, "delta_ci_high": high}


# --- Building rows ------------------------------------------------------------------------------


def compression_row(
    score: Mapping[str, Any],
    *,
    run: Any,
    dataset: str,
    model: str,
    technique: str,
    method: str,
    reference: Any = None,
    point: str = "",
    division: str = "closed",
    control: str = "",
    headline: int = 0,
    train_images: int = 0,
    train_seconds: float = 0.0,
) -> CompressionRow:
    """A row of compression.csv from what `scoring.score` measured on the test set.

    Parameters
    ----------
    score : of this artifact: path, sha256, params, nonzeros, macs, artifact_bytes, bits_per_weight,
        simulated, correct, total, predictions (file).
    run : what `start` returned.
    reference : what it is compared with: the finished run of the baseline, or a score of another
        artifact. None for a baseline, which is its own reference.
    headline : 1 if this point was chosen on validation before the test set was scored.

    Raises
    ------
    ValueError
        When score and predictions do not agree about the data set's labels.
    """
    if reference is None:
        reference = score
    elif hasattr(reference, "compression"):
        reference = reference.score(reference.baseline.artifact_sha256)
    labels, predictions = labels_of(dataset), read_predictions(score["predictions"])
    correct = int((predictions == labels).sum()) if predictions.shape == labels.shape else -1
    if (correct, len(labels)) != (score["correct"], score["total"]):
        raise ValueError(
            f"{score['path']}: {score['correct']} of {score['total']} right is not what its predictions say "
            f"about the {len(labels)} test images of {dataset}: was another data set or split scored?"
        )
    before = read_predictions(reference["predictions"])
    sizes = {key: int(score[key]) for key in ("params", "nonzeros", "macs", "artifact_bytes", "simulated")}
    return CompressionRow(
        profile=run.profile,
        run=run.name,
        dataset=dataset,
        model=model,
        technique=technique,
        method=method,
        point=point,
        seed=run.seed,
        division=division,
        control=control,
        headline=int(headline),
        **sizes,
        size_ratio=round(_fp32_bytes(Path(reference["path"]), run) / sizes["artifact_bytes"], 4),
        bits_per_weight=round(float(score["bits_per_weight"]), 4),
        correct=correct,
        total=len(labels),
        accuracy=round(100 * correct / len(labels), 4),
        **differences(compressed=[predictions], reference=[before], labels=labels),
        reference_sha256=reference["sha256"],
        train_images=int(train_images),
        train_seconds=round(float(train_seconds), 2),
        artifact_sha256=score["sha256"],
        commit=commit(),
    )


@functools.lru_cache(maxsize=8)
def labels_of(dataset: str) -> np.ndarray:
    """The true classes of a data set's test images, uint8."""
    from nnc_utils import data

    return data.load(dataset).test.labels.numpy().astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _fp32_bytes_of(path: Path) -> int:
    from nnc_utils import artifact

    return artifact.fp32_bytes(artifact.read(path).spec)


@functools.lru_cache(maxsize=8)
def _fp32_bytes_as_made(dataset: str, size: int, depth: int, width: float, stem: str) -> int:
    from nnc_utils import artifact, data, models

    pictures = data.load(dataset, size=size or None)
    about = {"channels": pictures.channels, "size": pictures.size, "classes": len(pictures.classes)}
    return artifact.fp32_bytes(models.resnet(depth, width=width, stem=stem, **about))


def _fp32_bytes(path: Path, run: Any) -> int:
    """Bytes of the reference in fp32; where its file was left elsewhere, of what 01's parameters describe."""
    if path.is_file():
        return _fp32_bytes_of(path)
    for made in (r.record for r in run.upstream if r.record.notebook == BASELINE):
        if made.seed == run.seed:
            about = {key: made.parameters[key] for key in ("size", "depth", "width", "stem")}
            return _fp32_bytes_as_made(made.dataset, **about)
    raise ValueError(f"{path} is missing, and no run of {BASELINE} with seed {run.seed} tells its size")


def latency_rows(
    measured: Iterable[Mapping[str, Any]], networks: Iterable[CompressionRow], *, reference_sha256: str
) -> list[dict[str, Any]]:
    """Rows of latency.csv from what `measure.latency` measured.

    Parameters
    ----------
    measured : the columns from `runtime` to `runtime_bytes`, and artifact_sha256 ("" or
        control="identity" for a runtime's identity network).
    networks : the compression rows of the artifacts; what they are called comes from there.
    reference_sha256 : the uncompressed network. Both speed-ups are against it in fp32, at the same
        batch and threads: in eager, and in the fastest runtime that was measured. Each is the median over
        the rounds of the ratio within a round, because what disturbs the machine slows both. What was timed
        "again" is against what was timed again.
    """
    named = {row.artifact_sha256: row for row in networks}
    wanted = [c for c in LatencyRow.columns() if c not in ("profile", "run", "dataset", "commit")]
    rows = []
    for measurement in measured:
        sha256 = measurement.get("artifact_sha256", "")
        row = {"model": "identity", "technique": "baseline", "method": "identity", "point": "", "headline": 0}
        row |= {"control": "identity", "artifact_sha256": sha256}
        if measurement.get("control") != "identity" and sha256:
            if sha256 not in named:
                raise ValueError(f"artifact {sha256[:16]} was timed but has no compression row")
            columns = ("model", "technique", "method", "point", "control", "headline", "seed")
            row |= {column: getattr(named[sha256], column) for column in columns}
            if measurement.get("control") == AGAIN:
                row |= {"control": AGAIN, "headline": 0}
        rows.append(row | {k: v for k, v in measurement.items() if k in wanted and k not in row})
    for row in rows:
        row |= _speedups(row, rows, reference_sha256)
    return rows


def _speedups(row: Mapping, rows: list[dict], reference_sha256: str) -> dict[str, float | None]:
    same = [
        other
        for other in rows
        if other["artifact_sha256"] == reference_sha256
        and other["precision"] == "fp32"
        and (other["batch"], other["threads"]) == (row["batch"], row["threads"])
        and (other["control"] == AGAIN) == (row["control"] == AGAIN)
        and other.get("p50_ms")
    ]
    eager = next((other for other in same if other["runtime"] == "eager"), None)
    fastest = min(same, key=lambda other: other["p50_ms"], default=None)
    known = row.get("p50_ms") and row["control"] != "identity"
    against = {"speedup_eager_fp32": eager, "speedup_best_fp32": fastest}
    return {
        name: round(_times_as_fast(row, other), 4) if known and other else None
        for name, other in against.items()
    }


def _times_as_fast(row: Mapping, other: Mapping) -> float:
    """How many times as fast as another row, by the medians of the same rounds."""
    rounds = ([float(median) for median in r["rounds_p50_ms"].split()] for r in (row, other))
    return float(np.median([its / mine for mine, its in zip(*rounds, strict=True)]))
