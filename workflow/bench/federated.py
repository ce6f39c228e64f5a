"""What rounds of 08 sent, beside what their networks get right: ``federated.csv``, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from bench.committed import ALL_PROFILES
from bench.tables import read_rows
from nnc_utils.configurations import of_row
from nnc_utils.provenance import root
from nnc_utils.rows import (
    Count,
    Name,
    Number,
    Percent,
    Positive,
    Row,
    Sha256,
    differences,
    evidence,
    interval_text,
    labels_of,
    read_predictions,
    to_frame,
)

FILE, METHODS = "federated.csv", ("fedavg", "fedavg_equal_bytes", "flower")
LOST = -0.5  # percentage points that a compressed run may lose against FedAvg in float32


class FederatedRow(Row):
    """One run of rounds, against FedAvg in float32 of the same seed and clients, where there is one.

    `up_bytes` and `down_bytes` are of all clients, counted at the server's sockets; `agreed` clients held the
    network that was scored. `times_fewer_bytes` is of both directions together.
    """

    profile: Name
    run: Name
    dataset: Name
    method: Literal["fedavg", "fedavg_equal_bytes", "flower"]
    settings: str
    control: str
    seed: Count
    dirichlet: Positive
    clients: Annotated[int, Field(ge=1)]
    agreed: Count
    rounds: Annotated[int, Field(ge=1)]
    up_bytes: Count
    down_bytes: Count
    train_images: Count
    accuracy: Percent
    against_sha256: Sha256 | Literal[""]
    accuracy_delta: Number | None = None
    delta_ci_low: Number | None = None
    delta_ci_high: Number | None = None
    times_fewer_bytes: Positive | None = None
    artifact_sha256: Sha256


def rows_of(compression: pd.DataFrame, ledgers: Mapping[str, dict], predictions: Path) -> list[FederatedRow]:
    """The rows of networks that rounds made; `ledgers`: a run's name -> its `extra["federated"]`."""
    own = compression[compression["method"].isin(METHODS)].fillna({"settings": "", "control": ""})
    records = [_record(row, ledgers) for row in own.to_dict("records")]
    float32 = {_place(record): record for record in records if record["control"] == "fedavg_fp32"}
    rows = []
    for record in records:
        other = float32.get(_place(record))
        against = {"against_sha256": ""}
        if other and other is not record:
            against = {"against_sha256": other["artifact_sha256"]} | _delta([record], [other], predictions)
            against["times_fewer_bytes"] = round(_bytes(other) / _bytes(record), 4)
        rows.append(FederatedRow(**record, **against))
    return rows


def _record(row: Mapping[str, Any], ledgers: Mapping[str, dict]) -> dict[str, Any]:
    configuration = of_row(row["method"], row["settings"])
    ledger = ledgers[row["run"]][configuration.slug]
    known = {**ledger, **row, "dirichlet": configuration.run.dirichlet}
    return {name: known[name] for name in FederatedRow.model_fields if name in known and "delta" not in name}


def _place(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in ("dataset", "seed", "dirichlet", "clients"))


def _bytes(record: Mapping[str, Any]) -> int:
    return record["up_bytes"] + record["down_bytes"]


def _delta(ours: list[Mapping], theirs: list[Mapping], predictions: Path) -> dict[str, float]:
    """The paired difference over seeds."""
    sides = [
        [read_predictions(predictions / evidence(one["artifact_sha256"])) for one in side]
        for side in (ours, theirs)
    ]
    return differences(compressed=sides[0], reference=sides[1], labels=labels_of(ours[0]["dataset"]))


def summary(rows: Iterable[FederatedRow], predictions: Path) -> pd.DataFrame:
    """A line each configuration, over its seeds: bytes, accuracy, and the difference to FedAvg in float32."""
    frame, lines = to_frame(rows, FederatedRow), []
    for (method, settings), group in frame.groupby(["method", "settings"], sort=False):
        line = {"configuration": of_row(method, settings).title, "seeds": len(group)}
        line |= {"rounds": group["rounds"].mean(), "MB up": group["up_bytes"].mean() / 1e6}
        line |= {"MB down": group["down_bytes"].mean() / 1e6, "accuracy (%)": group["accuracy"].mean()}
        if (group["against_sha256"] != "").all():
            theirs = [{"artifact_sha256": sha256} for sha256 in group["against_sha256"]]
            delta = _delta(group.to_dict("records"), theirs, predictions)
            line |= {"times fewer bytes": group["times_fewer_bytes"].mean()}
            line |= {"difference (pp) [95 %]": interval_text(delta), "within 0.5 pp": _within(delta)}
        lines.append(line)
    return pd.DataFrame(lines).set_index("configuration").round(2)


def _within(delta: Mapping[str, float]) -> str:
    if delta["delta_ci_low"] >= LOST:
        return "yes"
    return "no" if delta["delta_ci_high"] < LOST else "cannot tell"


def table(rows: pd.DataFrame, bench: Any) -> pd.DataFrame:
    """What a notebook shows of what `bench.measure` gave."""
    predictions = bench.path("predictions")
    return summary(rows_of(rows, {bench.run.name: bench.extra["federated"]}, predictions), predictions)


def curve(bench: Any) -> pd.DataFrame:
    """Validation accuracy against megabytes of both directions together, as the rounds went on."""
    lines = []
    for candidate in bench.candidates:
        for record in bench.extra["federated"][candidate.configuration.slug]["history"]:
            if record["validation"] is not None:
                line = {"configuration": candidate.configuration.title, "round": record["round"]}
                line |= {"megabytes": _bytes(record) / 1e6, "validation (%)": record["validation"]}
                lines.append(line)
    return pd.DataFrame(lines)


def committed() -> pd.DataFrame | None:
    """The `summary` of the committed rows; None where no profile has some."""
    for profile in ALL_PROFILES:
        folder = root() / "results" / profile
        if (folder / FILE).is_file():
            return summary(read_rows(folder / FILE, FederatedRow), folder / "predictions")
    return None
