"""One measurement is one row: its columns, what they may hold, and how they are computed.

The columns and their order are those of the measurement protocol. `compression_row` and `latency_rows` build
rows, with their differences and ratios; the paired interval itself is `evaluation.paired_interval`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nnc_utils.provenance import commit

if TYPE_CHECKING:
    import pandas as pd

NO_LOSS = -0.3  # percentage points: "within 0.3" means that the interval's lower end is not below
APART = 10  # percent: times that are no further apart count as equal
AGAIN = "again"  # control of what was timed a second time
AFTER = "after_"  # begins the control of a network between two stages, as "after_prune"
ATTEMPT = "attempt"  # control of a configuration that fell short and was replaced
OWN_CLASSES = ("int8", "bf16")  # precisions that round where eager does not: no row without agreement
SETTING = "setting."  # begins the columns that `with_settings` adds

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Flag = Annotated[int, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]
Name = Annotated[str, Field(min_length=1)]
Technique = Literal["baseline", "quantization", "pruning", "distillation", "search", "pipeline",
                    "federated", "transfer", "peer"]  # fmt: skip
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


class _Named(Row):
    """What was measured, and in which run."""

    profile: Name
    run: Name
    dataset: Name
    model: Name
    technique: Technique
    method: Name
    settings: str  # JSON of the settings that are not their defaults; "" for none
    seed: Count


class CompressionRow(_Named):
    """One artifact on the test set."""

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


class LatencyRow(_Named):
    """One artifact in one runtime. Measurements are empty where the runtime is not installed.

    `rounds_p50_ms` holds the median of each round, with spaces between: the speed-ups are of rounds. Without
    `agreement` the accuracy is the artifact's in eager: the runtime was seen to compute the same.
    """

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
        if (self.p50_ms, self.p90_ms, self.iqr_ms).count(None) not in (0, 3):
            raise ValueError("p50_ms, p90_ms and iqr_ms are either all measured or all empty")
        if self.p50_ms is not None and len(self.medians) != self.rounds:
            raise ValueError(f"{self.rounds} rounds, but {len(self.medians)} medians of rounds")
        if not self.artifact_sha256 and self.control != "identity":
            raise ValueError("only the identity network has no artifact")
        return self


class SummaryRow(Row):
    """One configuration over its seeds."""

    dataset: Name
    technique: Technique
    method: Name
    settings: str
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


def to_frame(rows: Iterable[Row], kind: type[Row]) -> pd.DataFrame:
    """Rows as a data frame with the protocol's columns."""
    import pandas as pd  # takes a second, which no run's start need wait for

    return pd.DataFrame([row.model_dump() for row in rows], columns=kind.columns())


def with_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with `title`, what its configuration is called, and a column for each setting.

    In ``setting.NAME`` defaults are filled in; what is not there, or False, is "". Lists are joined by ",".
    """
    import pandas as pd

    from nnc_utils.configurations import of_row, registry  # imports torch

    if "title" in frame:
        return frame
    keys = list(zip(frame["method"], frame["settings"], strict=True))
    known = {key: of_row(*key) for key in dict.fromkeys(keys) if key[0] in registry()}
    values = {
        key: {SETTING + name: _flat(value) for name, value in one.model_dump(exclude={"method"}).items()}
        for key, one in known.items()
    }
    columns = pd.DataFrame([values.get(key, {}) for key in keys], index=frame.index, dtype=object).fillna("")
    titles = [known[key].title if key in known else key[0] for key in keys]
    return pd.concat([frame, columns], axis=1).assign(title=titles)


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None or value is False else str(value) if isinstance(value, dict) else value


def run_name(profile: str, notebook: str, seed: int, shard: str = "") -> str:
    """How rows name a run: "quick/03_pruning/seed=1,channels"."""
    return f"{profile}/{notebook}/seed={seed}" + (f",{shard}" if shard else "")


def interval_text(row: Any) -> str:
    """A difference and its interval in percentage points; an end near the limit has more digits."""
    ends = [row["delta_ci_low"], row["delta_ci_high"]]
    digits = [next((d for d in (2, 3, 4) if round(end, d) != NO_LOSS), 2) for end in ends]
    low, high = (f"{end:+.{d}f}" for end, d in zip(ends, digits))
    return f"{row['accuracy_delta']:+.2f} [{low}, {high}]"


def within(row: Any) -> str:
    """Whether a network is within 0.3 percentage points of its reference: yes, no or cannot tell."""
    if row["delta_ci_low"] >= NO_LOSS:
        return "yes"
    return "no" if row["delta_ci_high"] < NO_LOSS else "cannot tell"


def notebook_of(run: str) -> str:
    """The notebook of a run by the name that `run_name` gave it."""
    return run.split("/")[1]


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


def labels_of(dataset: str) -> np.ndarray:
    """The true classes of a data set's test images, uint8."""
    from nnc_utils import data

    return data.test_labels(dataset).numpy().astype(np.uint8)


def differences(*, compressed: Iterable, reference: Iterable, labels: np.ndarray) -> dict[str, float]:
    """Accuracy lost or won against a reference, with its paired 95 % interval, in percentage points.

    Parameters
    ----------
    compressed, reference : predictions of each seed, (images,) each and in the same order.
    labels : the true classes, (images,).
    """
    from nnc_utils import evaluation

    interval = evaluation.paired_interval(
        compressed_correct=np.stack([p == labels for p in compressed]),
        reference_correct=np.stack([p == labels for p in reference]),
    )
    low, mean, high = (round(float(v), 4) for v in (interval.low, interval.mean, interval.high))
    return {"accuracy_delta": mean, "delta_ci_low": low, "delta_ci_high": high}


def compression_row(
    score: Mapping[str, Any], *, run: Any, reference: Any = None, **named: Any
) -> CompressionRow:
    """A row of compression.csv from what `scoring.score` measured on the test set.

    Parameters
    ----------
    run : the run that is being written.
    reference : the baseline's finished run, or a score of another artifact; None for a baseline itself.
    named : the columns dataset, model, technique, method; where not empty settings, division, control,
        headline, train_images, train_seconds.

    Raises
    ------
    ValueError
        When score and predictions do not agree about the data set's labels.
    """
    if reference is None:
        reference = score
    elif hasattr(reference, "compression"):
        reference = reference.score(reference.baseline.artifact_sha256)
    labels, predictions = labels_of(named["dataset"]), read_predictions(score["predictions"])
    correct = int((predictions == labels).sum()) if predictions.shape == labels.shape else -1
    if (correct, len(labels)) != (score["correct"], score["total"]):
        raise ValueError(
            f"{score['path']}: {score['correct']} of {score['total']} right is not what its predictions say "
            f"of the {len(labels)} test images of {named['dataset']}: was another data set or split scored?"
        )
    before = read_predictions(reference["predictions"])
    counts = ("params", "nonzeros", "macs", "artifact_bytes", "simulated", "correct", "total")
    named = {"settings": "", "division": "closed", "control": "", "headline": 0, "train_images": 0} | named
    named["train_seconds"] = round(float(named.get("train_seconds", 0)), 2)
    return CompressionRow(
        profile=run.profile,
        run=run.name,
        seed=run.seed,
        **named,
        **{key: int(score[key]) for key in counts},
        size_ratio=round(_fp32_bytes(Path(reference["path"]), run) / score["artifact_bytes"], 4),
        bits_per_weight=round(float(score["bits_per_weight"]), 4),
        accuracy=round(100 * correct / len(labels), 4),
        **differences(compressed=[predictions], reference=[before], labels=labels),
        reference_sha256=reference["sha256"],
        artifact_sha256=score["sha256"],
        commit=commit(),
    )


@functools.lru_cache(maxsize=8)
def _fp32_bytes_of(path: Path) -> int:
    from nnc_utils import artifact

    return artifact.fp32_bytes(artifact.read(path).spec)


def _fp32_bytes(path: Path, run: Any) -> int:
    """Bytes of the reference in fp32; without its file, of what the baseline's parameters describe."""
    from nnc_utils import artifact, data, models

    if path.is_file():
        return _fp32_bytes_of(path)
    for record in (upstream.record for upstream in run.upstream):
        if (record.notebook, record.seed) == ("01_baseline", run.seed):
            asked = record.parameters
            images = data.load(record.dataset, size=asked["size"] or None)
            shape = {"channels": images.channels, "size": images.size, "classes": len(images.classes)}
            spec = models.resnet(asked["depth"], width=asked["width"], stem=asked["stem"], **shape)
            return artifact.fp32_bytes(spec)
    raise ValueError(f"{path} is missing, and no run of 01_baseline with seed {run.seed} tells its size")


def latency_rows(
    measured: Iterable[Mapping[str, Any]], networks: Iterable[CompressionRow], *, reference_sha256: str
) -> list[dict[str, Any]]:
    """Rows of latency.csv from what `measure.latency` measured.

    Parameters
    ----------
    measured : the columns from `runtime` to `runtime_bytes`, and artifact_sha256 ("": an identity network).
    networks : the compression rows of the artifacts, which name them.
    reference_sha256 : the uncompressed network. Both speed-ups are against it in fp32, at the same batch and
        threads: in eager, and in its fastest runtime. Each is the median of the ratios within a round:
        what disturbs the machine slows both. What was timed "again" is against what was timed again.
    """
    named = {row.artifact_sha256: row for row in networks}
    wanted = [c for c in LatencyRow.columns() if c not in ("profile", "run", "dataset", "commit")]
    rows = []
    for measurement in measured:
        sha256 = measurement.get("artifact_sha256", "")
        row = {"model": "identity", "technique": "baseline", "method": "identity", "settings": ""}
        row |= {"headline": 0, "control": "identity", "artifact_sha256": sha256}
        if measurement.get("control") != "identity" and sha256:
            if sha256 not in named:
                raise ValueError(f"artifact {sha256[:16]} was timed but has no compression row")
            columns = ("model", "technique", "method", "settings", "control", "headline", "seed")
            row |= {column: getattr(named[sha256], column) for column in columns}
            if measurement.get("control") == AGAIN:
                row |= {"control": AGAIN, "headline": 0}
        rows.append(row | {k: v for k, v in measurement.items() if k in wanted and k not in row})
    for row in rows:
        row |= _speedups(row, rows, reference_sha256)
    return rows


def _speedups(row: Mapping, rows: list[dict], reference_sha256: str) -> dict[str, float | None]:
    """How many times as fast as the reference in fp32, in eager and in its fastest runtime."""
    references = [
        other
        for other in rows
        if other["artifact_sha256"] == reference_sha256
        and other["precision"] == "fp32"
        and (other["batch"], other["threads"]) == (row["batch"], row["threads"])
        and (other["control"] == AGAIN) == (row["control"] == AGAIN)
        and other.get("p50_ms")
    ]
    eager = next((other for other in references if other["runtime"] == "eager"), None)
    fastest = min(references, key=lambda other: other["p50_ms"], default=None)
    timed = row.get("p50_ms") and row["control"] != "identity"
    against = {"speedup_eager_fp32": eager, "speedup_best_fp32": fastest}
    return {
        column: round(_times_as_fast(row, other), 4) if timed and other else None
        for column, other in against.items()
    }


def _times_as_fast(row: Mapping, other: Mapping) -> float:
    """The median over the rounds of the ratio within a round."""
    rounds = ([float(median) for median in r["rounds_p50_ms"].split()] for r in (row, other))
    return float(np.median([its / mine for mine, its in zip(*rounds, strict=True)]))
