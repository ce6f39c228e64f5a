"""Networks of upstream runs in the runtimes: which are timed where, and the rows of latency.csv."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench.candidates import label
from bench.session import Bench
from nnc_utils import artifact, configurations, measure, rows, runtimes
from nnc_utils.artifact import Artifact
from nnc_utils.configurations import ConfigurationError


@dataclass(frozen=True)
class Network:
    """An upstream run's network that is timed."""

    row: rows.CompressionRow
    path: Path

    @functools.cached_property
    def stored(self) -> Artifact:
        """What its file holds."""
        return artifact.read(self.path)

    @property
    def precision(self) -> str:
        """In integers where its activations have ranges."""
        return "int8" if self.stored.ranges else "fp32"


class Timing:
    """What 07 measures: `networks` as configurations of upstream runs, in `in_runtimes`.

    A mapping with `stage` is the network that a pipeline left behind that stage. ConfigurationError names
    every network that no upstream run has, and every unknown runtime.
    """

    def __init__(self, bench: Bench, networks: Iterable[Mapping[str, Any]], in_runtimes: list[str]) -> None:
        self.bench, self.runtimes, self.rows = bench, in_runtimes, []
        self.reference = Network(bench.baseline.baseline, bench.baseline.artifact("fp32"))
        mappings = [dict(mapping) for mapping in networks]
        stages = [mapping.pop("stage", "") for mapping in mappings]
        faults, self.networks = [], []
        if unknown := set(in_runtimes) - set(runtimes.NAMES):
            faults.append(f"unknown runtime {', '.join(unknown)}: one of {', '.join(runtimes.NAMES)}")
        for configuration, stage in zip(configurations.read(mappings, repeated=True), stages):
            if upstream := bench.rows_of(configuration, stage):
                run, row = upstream[0]
                self.networks.append(Network(row, run.artifact(row.artifact_sha256)))
            else:
                faults.append(f"no upstream run has {label(configuration, stage)}")
        if faults:
            raise ConfigurationError("\n".join(faults))

    def claims(self) -> list[Network]:
        """What upstream runs claim, where it runs otherwise than the uncompressed network does."""
        known = {network.row.artifact_sha256 for network in self.networks}
        claimed = []
        for run in self.bench.run.upstream:
            for row in run.compression:
                if row.headline and row.seed == self.bench.seed and row.artifact_sha256 not in known:
                    known.add(row.artifact_sha256)
                    claimed.append(Network(row, run.artifact(row.artifact_sha256)))
        return [n for n in claimed if n.stored.ranges or n.stored.spec != self.reference.stored.spec]

    def requests(self) -> list[dict[str, Any]]:
        """For `measure.latency`: the first network and the uncompressed one in every runtime.

        Narrower ones run wherever nothing has to be compiled for half a minute, all others in ONNX Runtime.
        """
        asked = [(self.reference, "fp32", self.runtimes)]
        asked += [(self.reference, "bf16", [name for name in self.runtimes if name == "openvino"])]
        several = [name for name in self.runtimes if name != "inductor"]
        own = len(self.networks)
        for place, network in enumerate([*self.networks, *self.claims()]):
            narrow = network.stored.spec != self.reference.stored.spec
            whole = narrow and place < own and not network.row.control.startswith(rows.AFTER)
            names = self.runtimes if place == 0 else several if whole else ["onnxruntime"]
            asked.append((network, network.precision, names))
        signed = next((n for n in self.networks if n.precision == "int8"), None)
        asked += [(signed, "s8s8", ["onnxruntime"])] if signed else []
        return [
            {"path": network.path, "runtime": name, "precision": precision}
            for network, precision, names in asked
            for name in names
            if runtimes.available(name) or precision in runtimes.adapter(name).PRECISIONS
        ]

    def measure(self, **protocol: Any) -> pd.DataFrame:
        """Time all, by `measure.latency` with this protocol; the rows as a table with titles."""
        run = self.bench.run
        for upstream in run.upstream:  # the classes that each artifact gave in eager are known already
            for file in (upstream.folder / "predictions").glob("*.npy"):
                shutil.copy(file, run.path(f"predictions/{file.name}"))
        about = {"dataset": self.bench.baseline.dataset, "reference": self.reference.path}
        measured = measure.latency(self.requests(), **about, folder=run.path("predictions"), **protocol)
        absent = [(f"{m['runtime']} {m['precision']}", m) for m in measured if "why" in m]
        self.bench.missing = {f"{Path(m['path']).stem} {where}": m["why"] for where, m in absent}
        for told in dict.fromkeys(f"{where}: {m['why']}" for where, m in absent):
            print(told)
        self.bench.extra["cpu_busy_before"] = max(m.get("cpu_busy_before", 0) for m in measured)
        self.bench.extra["fewest_samples"] = min(m["samples"] for m in measured if "samples" in m)
        known = [network.row for network in (self.reference, *self.networks, *self.claims())]
        reference = self.reference.row.artifact_sha256
        self.rows = rows.latency_rows(measured, known, reference_sha256=reference)
        return pd.DataFrame(self.rows).reindex(columns=rows.LatencyRow.columns())

    def finish(self) -> Any:
        """Write `result.json` with the rows of latency.csv."""
        return self.bench.finish(self.rows)


def show(
    table: pd.DataFrame, columns: Mapping[str, str], *, batch: int = 1, threads: int = 1
) -> pd.DataFrame:
    """A table that fits a page: each network in each runtime once; column of latency.csv -> its heading."""
    own = once(table, batch=batch, threads=threads)
    narrow = pd.DataFrame({"network": own["title"], "where": own["runtime"] + " " + own["precision"]})
    narrow[list(columns.values())] = own[list(columns)]
    return narrow.set_index("network")


def once(table: pd.DataFrame, *, batch: int = 1, threads: int = 1) -> pd.DataFrame:
    """What was timed at one batch and number of threads, with titles; no identity networks, none twice."""
    chosen = (table["batch"] == batch) & (table["threads"] == threads) & table["p50_ms"].notna()
    return rows.with_settings(table[chosen & ~table["control"].isin(("identity", rows.AGAIN))])
