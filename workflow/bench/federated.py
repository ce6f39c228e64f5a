"""What rounds of 08 sent, beside what their networks get right: ``federated.csv``, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
from pydantic import Field

from bench.committed import ALL_PROFILES
from bench.tables import read_rows
from nnc_utils import figures
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
    ledgers = bench.extra["federated"]
    own = [(candidate.configuration.title, candidate.configuration.slug) for candidate in bench.candidates]
    return pd.concat([_curve(title, ledgers[slug]) for title, slug in own], ignore_index=True)


def _curve(title: str, ledger: Mapping[str, Any]) -> pd.DataFrame:
    seen = [record for record in ledger["history"] if record["validation"] is not None]
    about = {"configuration": title, "round": [record["round"] for record in seen]}
    about["megabytes"] = [_bytes(record) / 1e6 for record in seen]
    return pd.DataFrame(about | {"validation (%)": [record["validation"] for record in seen]})


def draw(folder: Path) -> Path | None:
    """The committed curves, means over the seeds, a panel for each Dirichlet value; None without rows."""
    if not (folder / FILE).is_file():
        return None
    ledgers = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    rows, curves = to_frame(read_rows(folder / FILE, FederatedRow), FederatedRow), []
    for row in rows.to_dict("records"):
        configuration = of_row(row["method"], row["settings"])
        ledger = ledgers[row["run"]]["extra"]["federated"][configuration.slug]
        said = configuration.title.replace(f", Dirichlet {row['dirichlet']:g}", "")
        curves.append(_curve(said, ledger).assign(dirichlet=row["dirichlet"]))
    means = (
        pd.concat(curves).groupby(["dirichlet", "configuration", "round"], sort=False).mean().reset_index()
    )
    figure, panels = plt.subplots(
        1, rows["dirichlet"].nunique(), figsize=(11, 5.2), sharey=True, squeeze=False
    )
    for axes, (alpha, panel) in zip(panels[0], means.groupby("dirichlet", sort=True)):
        for (name, run), marker in zip(panel.groupby("configuration", sort=True), figures.MARKERS):
            axes.plot(run["megabytes"], run["validation (%)"], marker=marker, label=name)
        axes.set(xscale="log", xlabel="megabytes, both directions", title=f"Dirichlet {alpha:g}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15))
    panels[0][0].set_ylabel("validation accuracy (%)")
    figure.savefig(path := folder / "figures/federated.png", bbox_inches="tight")
    plt.close(figure)
    return path


def of(folder: Path) -> pd.DataFrame | None:
    """The `summary` of a profile's committed rows; None where it has none."""
    if not (folder / FILE).is_file():
        return None
    return summary(read_rows(folder / FILE, FederatedRow), folder / "predictions")


def committed() -> pd.DataFrame | None:
    """The same of the best profile that has such rows."""
    tables = (of(root() / "results" / profile) for profile in ALL_PROFILES)
    return next((table for table in tables if table is not None), None)
