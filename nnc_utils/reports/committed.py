"""The committed tables of a profile, as its report needs them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from nnc_utils.paired import comparisons, gaps, thin_rivals
from nnc_utils.provenance import code_sha256, notebook_sha256, root
from nnc_utils.rows import (
    AGAIN,
    CompressionRow,
    LatencyRow,
    SummaryRow,
    differences,
    evidence,
    read_predictions,
    timed_evidence,
)
from nnc_utils.tables import POINT, ResultError, labels_name, named_pipeline, read_rows, to_frame

PROFILES = ("full", "standard", "quick")  # what the README shows, the best first
ALL_PROFILES = ("full", "standard", "medium", "quick")
RATIO = "speedup_best_fp32"
SAME, OLDER, EDITED = (  # the code that a run was made with
    "this repository's",
    "older than this repository's",
    "this repository's; its notebook: older",
)
TIMING = ["artifact_sha256", "runtime", "precision", "batch", "threads"]  # what was timed, and how


class Tables:
    """The committed tables of one profile."""

    def __init__(self, profile_dir: Path) -> None:
        self.folder = Path(profile_dir)
        if not (self.folder / "compression.csv").is_file():
            raise ResultError(f"{self.folder} has no tables yet: run the benchmark of this profile first")
        kinds = {"compression": CompressionRow, "latency": LatencyRow, "summary": SummaryRow}
        frames = {name: to_frame(read_rows(self.folder / f"{name}.csv", k), k) for name, k in kinds.items()}
        self.compression, latency, self.summary = frames.values()
        self.latency, self.again = latency[latency["control"] != AGAIN], latency[latency["control"] == AGAIN]
        self.provenance = json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))
        self.code = {run: _code(record) for run, record in self.provenance.items()}
        self.stale = {run for run, code in self.code.items() if code == OLDER}

    @functools.cached_property
    def pairs(self) -> list[dict[str, str]]:
        """Who beats whom, of `paired.comparisons`, in words."""
        return self._compared(comparisons)

    @functools.cached_property
    def closed_gaps(self) -> list[dict[str, str]]:
        """What teachers close of the gap to the uncompressed network, of `paired.gaps`, in words."""
        return self._compared(gaps)

    def _compared(self, kind: Callable[..., pd.DataFrame]) -> list[dict[str, str]]:
        found = [
            kind(rows, self.folder / "predictions", dataset=dataset)
            for dataset, rows in self.compression.groupby("dataset")
        ]
        return pd.concat(found).astype(str).to_dict("records")

    def networks(self) -> pd.DataFrame:
        """The rows of the headline, of each the first seed.

        Each baseline, what a claim rests on, what was timed in integers in more than one runtime, the
        pipeline and its thin rivals.
        """
        baseline = baselines(self.compression)
        runtimes = self.latency[self.latency["precision"] == "int8"].groupby("artifact_sha256")["runtime"]
        spread = self.compression["artifact_sha256"].map(runtimes.nunique()).fillna(0) > 1
        rivals = thin_rivals(self.compression)
        point = named_pipeline(self.summary)
        pipeline = False if point is None else (self.compression[POINT] == point[POINT]).all(axis=1)
        claimed = self.compression["headline"] == 1
        chosen = self.compression[baseline | spread | rivals | pipeline | claimed]
        chosen = chosen.assign(after=~baseline).sort_values("seed", kind="stable")  # 07 times the first seed
        chosen = chosen.drop_duplicates(["dataset", "model", "technique", "method", "point", "control"])
        return chosen.sort_values(["after", "size_ratio"], kind="stable")

    def timed(self, sha256: str) -> pd.DataFrame:
        """An artifact at batch 1 with the fewest threads: in eager, and in the fastest of each precision."""
        rows = self.latency[(self.latency["artifact_sha256"] == sha256) & (self.latency["batch"] == 1)]
        rows = rows[(rows["threads"] == rows["threads"].min()) & (rows["precision"] != "s8s8")]
        rows = rows.assign(other=rows["runtime"] != "eager").sort_values("p50_ms", kind="stable")
        rows = rows[rows["p50_ms"].notna() & (~rows["other"] | ~rows.duplicated(["precision", "other"]))]
        return rows.sort_values(["other", "precision"], kind="stable")

    def why(self, row: pd.Series) -> str:
        """Why a row has no numbers."""
        missing = self.provenance[row["run"]]["extra"].get("missing", {})
        return missing.get(f"{row['runtime']} {row['precision']}", "not installed")

    def differences(self, row: pd.Series, timed: pd.Series | None = None) -> dict[str, float]:
        """Accuracy against the reference on the test images, in eager or as a row of latency.csv has it."""
        folder = self.folder / "predictions"
        own = evidence(row["artifact_sha256"]) if timed is None else timed_evidence(timed)
        return differences(
            compressed=[read_predictions(folder / own)],
            reference=[read_predictions(folder / evidence(row["reference_sha256"]))],
            labels=read_predictions(folder / labels_name(row["dataset"])),
        )


def baselines(compression: pd.DataFrame) -> pd.Series:
    """Whether each row is of an uncompressed network."""
    return (compression["technique"] == "baseline") & (compression["control"] == "")


def _code(record: dict) -> str:
    """Whether the code that a run was made with is the code here, in words."""
    notebook = root() / "notebooks" / f"{record['notebook']}.ipynb"
    if not notebook.is_file():
        return SAME
    if code_sha256(notebook) != record["code_sha256"]:
        return OLDER
    return SAME if notebook_sha256(notebook) == record["notebook_sha256"] else EDITED


def committed_profile(
    folder: Path | None = None,
    profiles: Iterable[str] = PROFILES,
    *,
    technique: str = "",
    timed: bool = False,
) -> Path | None:
    """The tables of the best profile that has some (of a technique, with times), or None."""
    for profile in profiles:
        profile_dir = (folder or root()) / "results" / profile
        table = profile_dir / "compression.csv"
        if not table.is_file() or technique and technique not in set(pd.read_csv(table)["technique"]):
            continue
        if not timed or len(pd.read_csv(profile_dir / "latency.csv")):
            return profile_dir
    return None
