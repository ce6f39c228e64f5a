"""The committed tables of a profile, and what its report asks of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bench import pairs
from bench.claims import chosen_over_seeds
from bench.tables import KEY, ResultError, committed_runs, labels_name, read_rows, smallest_claim
from nnc_utils import figures, provenance
from nnc_utils import rows as row_kinds
from nnc_utils.rows import AGAIN, ATTEMPT, evidence, read_predictions, timed_evidence

PROFILES = ("full", "standard", "quick")  # what the README shows, the best first
ALL_PROFILES = (
    "full",
    "standard",
    "headline",
    "techniques",
    "medium",
    "quick",
    "usual",
    "cifar",
    "federated",
    "transfer",
    "transfer_null",
)
COLLAPSED = 20.0  # percentage points apart
FASTEST, EAGER = "speedup_best_fp32", "speedup_eager_fp32"
TIMING = ["artifact_sha256", "runtime", "precision", "batch", "threads"]  # what was timed, and how


class Tables:
    """The committed tables of one profile, and what a report asks of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "compression.csv").is_file():
            raise ResultError(f"{self.folder} has no tables yet: run the benchmark of this profile first")
        self.compression = self._read("compression", row_kinds.CompressionRow)
        self.summary = self._read("summary", row_kinds.SummaryRow)
        self.timings = self._read("latency", row_kinds.LatencyRow)
        self.latency = self.timings[self.timings["control"] != AGAIN]
        self.again = self.timings[self.timings["control"] == AGAIN]
        self.provenance = json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))
        self.profile, self.dataset, self.images = self.compression.iloc[0][["profile", "dataset", "total"]]
        self.seeds = self.summary["seeds"].max()
        self.baselines = self.compression[_is_baseline(self.compression)]
        self.dense_macs = self.baselines["macs"].max()

    def _read(self, name: str, kind: type[row_kinds.Row]) -> pd.DataFrame:
        return row_kinds.with_settings(row_kinds.to_frame(read_rows(self.folder / f"{name}.csv", kind), kind))

    @functools.cached_property
    def pairs(self) -> list[pairs.Pair]:
        """Who was held against whom."""
        return pairs.pairs(self.compression, self.folder / "predictions", dataset=self.dataset)

    def gaps(self) -> list[dict]:
        """What teachers close of the gap to the uncompressed network."""
        folder = self.folder / "predictions"
        return pairs.gaps(self.compression, folder, dataset=self.dataset).to_dict("records")

    @functools.cached_property
    def chosen(self) -> dict:
        """What the validation images of all seeds chose together."""
        return chosen_over_seeds(committed_runs(self.folder))

    @functools.cached_property
    def points(self) -> pd.DataFrame:
        """The configurations that are no controls, with times fewer MACs, and their first network in int8."""
        points = self.summary[self.summary["control"] == ""].reset_index(drop=True)
        points = points.assign(fewer=self.dense_macs / points["macs"])
        timed = pd.DataFrame([self._in_int8(point) for _, point in points.iterrows()], index=points.index)
        return points.join(timed.reindex(columns=[FASTEST, EAGER, "runtime", "runtime_low", "agreement"]))

    def _in_int8(self, point: pd.Series) -> dict[str, Any]:
        network = self.rows_of(point).iloc[0]
        timed = self.timed(network["artifact_sha256"])
        for _, row in timed[timed["precision"] == "int8"].head(1).iterrows():
            low = self.differences(network, row)["delta_ci_low"]
            return row[[FASTEST, EAGER, "runtime", "agreement"]].to_dict() | {"runtime_low": low}
        return {}

    @functools.cached_property
    def pipeline(self) -> pd.Series | None:
        """The pipeline that stands for the others."""
        return pairs.the_pipeline(self.summary)

    @functools.cached_property
    def rivals(self) -> list[pairs.Pair]:
        """The pipeline against each narrow network and other tool."""
        point, folder = self.pipeline, self.folder / "predictions"
        return [] if point is None else pairs.rivals(self.compression, point, folder)

    def rows_of(self, point: pd.Series) -> pd.DataFrame:
        """The rows of a configuration, by seed."""
        return self.compression[(self.compression[KEY] == point[KEY]).all(axis=1)].sort_values("seed")

    def over_seeds(self, row: pd.Series) -> pd.Series:
        """The row of summary.csv that a row belongs to; its difference is named as in compression.csv."""
        point = self.summary[(self.summary[KEY] == row[KEY]).all(axis=1)].iloc[0]
        return point.rename({"delta_mean": "accuracy_delta"})

    def networks(self) -> pd.DataFrame:
        """The first seed's row of each baseline, claim, pipeline and rival, and of what was timed in int8."""
        table = self.compression
        runtimes = self.latency[self.latency["precision"] == "int8"].groupby("artifact_sha256")["runtime"]
        chosen = table["artifact_sha256"].map(runtimes.nunique()).fillna(0) > 1
        chosen |= _is_baseline(table) | pairs.narrow_rivals(table) | (table["headline"] == 1)
        if self.pipeline is not None:
            chosen |= (table[KEY] == self.pipeline[KEY]).all(axis=1)
        shown = table[chosen].assign(after=~_is_baseline(table)).sort_values("seed", kind="stable")
        return shown.drop_duplicates(["model", *KEY]).sort_values(["after", "size_ratio"], kind="stable")

    def claims(self) -> pd.DataFrame:
        """Of `networks` what is claimed."""
        networks = self.networks()
        return networks[(networks["headline"] == 1) & (networks["technique"] != "baseline")]

    def timed(self, sha256: str) -> pd.DataFrame:
        """An artifact at batch 1 with the fewest threads: in eager, and in the fastest of each precision."""
        rows = self.latency[(self.latency["artifact_sha256"] == sha256) & (self.latency["batch"] == 1)]
        rows = rows[(rows["threads"] == rows["threads"].min()) & (rows["precision"] != "s8s8")]
        rows = rows.assign(other=rows["runtime"] != "eager").sort_values("p50_ms", kind="stable")
        rows = rows[rows["p50_ms"].notna() & (~rows["other"] | ~rows.duplicated(["precision", "other"]))]
        return rows.sort_values(["other", "precision"], kind="stable")

    def differences(self, row: pd.Series, timed: pd.Series | None = None) -> dict[str, float]:
        """Accuracy against the reference on the test images, in eager or as a row of latency.csv has it."""
        folder = self.folder / "predictions"
        own = evidence(row["artifact_sha256"]) if timed is None else timed_evidence(timed)
        return row_kinds.differences(
            compressed=[read_predictions(folder / own)],
            reference=[read_predictions(folder / evidence(row["reference_sha256"]))],
            labels=read_predictions(folder / labels_name(row["dataset"])),
        )

    def int8_without_training(self) -> pd.Series | None:
        """The fastest configuration in int8 without a gradient step, within 0.3 points if any is."""
        points = self.points[(self.points["division"] == "closed") & self.points[FASTEST].notna()]
        points = points.sort_values(["no_loss", FASTEST], ascending=False, kind="stable")
        return points.iloc[0] if len(points) else None

    def smallest(self) -> pd.Series | None:
        """The smallest claim within 0.3 points."""
        good = self.summary[(self.summary["no_loss"] == 1) & (self.summary["headline"] == 1)]
        good = good[good["technique"] != "baseline"]
        return good.sort_values("size_ratio").iloc[-1] if len(good) else None

    def headline(self) -> list[tuple[str, pd.Series]]:
        """What the README shows, named plainly: fp32, int8, and what stands for each of four techniques.

        That is the smallest claim of those that were timed, or else of all; without a claim the nearest.
        """
        points, int8 = self.summary[self.summary["control"] == ""], self.int8_without_training()
        shown = [("ResNet-18, uncompressed", self.summary[_is_baseline(self.summary)].iloc[0])]
        shown.append(("int8, without training", int8))
        closed = (points["technique"] == "quantization") & (points["division"] == "closed")
        if int8 is not None:
            closed &= (points[KEY] != int8[KEY]).any(axis=1)
        shown.append(("quantized without training", self._stands_for(points[closed])))
        for technique, name in {"pruning": "pruned", "distillation": "distilled student"}.items():
            shown.append((name, self._stands_for(points[points["technique"] == technique])))
        whole = pairs.where(self.points, {"method": "pipeline", "stages": pairs.PIPELINE})
        shown.append(("pipeline: pruned, distilled, quantized", self._stands_for(self.points[whole])))
        by_point = {tuple(point[KEY]): (name, point) for name, point in reversed(shown) if point is not None}
        return list(by_point.values())[::-1]

    def _stands_for(self, points: pd.DataFrame) -> pd.Series | None:
        timed = [self.fastest(point) is not None for _, point in points.iterrows()]
        claimed = points[(points["headline"] == 1).to_numpy() & np.array(timed, bool)]
        return smallest_claim(claimed if len(claimed) else points)

    def best_of(self, technique: str, most: int = 8) -> pd.DataFrame:
        """A technique's claims and the configurations that no smaller file beats, the largest file first.

        At most so many: of those that are no claim the most accurate.
        """
        own = self.summary[(self.summary["technique"] == technique) & (self.summary["control"] == "")]
        own = own.sort_values(["size_ratio", "delta_mean"], ascending=False, kind="stable")
        beaten = own["delta_mean"] <= own["delta_mean"].cummax().shift(fill_value=-np.inf)
        shown = own[~beaten | (own["headline"] == 1)]
        shown = shown.sort_values(["headline", "delta_mean"], ascending=False, kind="stable").head(most)
        return shown.sort_values("size_ratio", kind="stable")

    def masked(self) -> pd.Series | None:
        """What stands for networks with zeros at single places."""
        points = self.summary[(self.summary["method"] == "weights") & (self.summary["control"] == "")]
        return self._stands_for(points)

    def taught(self) -> pairs.Pair | None:
        """A distilled student against the same one alone: the claim's pair, or else that of most seeds."""
        told = [pair for pair in self.told("distillation") if pair.theirs["method"] == "student_alone"]
        return told[0] if told else None

    def told(self, technique: str) -> list[pairs.Pair]:
        """A technique's pairs, two methods once: those of claims first, of most seeds, the decided.

        Who collapsed is no rival.
        """

        def weight(pair: pairs.Pair) -> tuple:
            return pair.ours["headline"], pair.seeds, pair.verdict != "not below"

        shown = [p for p in self.pairs if p.ours["technique"] == technique and not p.ours["control"]]
        shown = [p for p in shown if abs(p.difference["accuracy_delta"]) < COLLAPSED]
        methods = {(p.ours["method"], p.theirs["method"]): p for p in sorted(shown, key=weight)}
        return sorted(methods.values(), key=weight, reverse=True)

    def fastest(self, point: pd.Series) -> pd.Series | None:
        """The fastest timing of a configuration's first seed; of the uncompressed network that in fp32."""
        timed = self.timed(self.rows_of(point).iloc[0]["artifact_sha256"])
        timed = timed[timed["precision"] == "fp32"] if point["technique"] == "baseline" else timed
        return timed.sort_values("p50_ms").iloc[0] if len(timed) else None

    def ranking(self, division: str) -> pd.DataFrame:
        """A division's configurations: first those within 0.3 points, the smallest file first."""
        own = self.summary[self.summary["division"] == division]
        return own.sort_values(["no_loss", "size_ratio"], ascending=False, kind="stable")

    def orders(self) -> list[pairs.Pair]:
        """The pipeline against its stages in another order, at the same budgets."""
        stages, column = set(pairs.PIPELINE.split(",")), pairs.SETTING + "stages"
        return [pair for pair in self.pairs if set(str(pair.theirs.get(column, "")).split(",")) == stages]

    def attempts(self, network: pd.Series) -> int:
        """How many attempts of a claim's technique and division fell short on the test set."""
        same = ["dataset", "technique", "division"]
        alike = self.summary[(self.summary[same] == network[same]).all(axis=1)]
        return int(((alike["control"] == ATTEMPT) & (alike["no_loss"] == 0)).sum())

    def zeros(self) -> tuple[list[str], list[dict]]:
        """Of masked networks the percent of zeros in all weights, and in stem, stages and classifier."""
        records = [record for run in self.provenance.values() for record in run["artifacts"]]
        known = {record["artifact_sha256"]: record["zeros"] for record in records if "zeros" in record}
        parts = {part for counts in known.values() for part in counts}
        rows = self.compression[self.compression["artifact_sha256"].isin(known)].sort_values("seed")
        lines = []
        for _, row in rows.drop_duplicates(KEY).iterrows():
            counts = known[row["artifact_sha256"]]
            zeros, weights = map(sum, zip(*counts.values(), strict=True))
            shares = {part: 100 * count / total for part, (count, total) in counts.items()}
            lines.append({"row": row, "all": 100 * zeros / weights, **shares})
        return sorted(parts, key=lambda part: (part == "fc", part)), sorted(
            lines, key=lambda line: line["all"]
        )

    def in_integers(self) -> list[tuple[pd.Series, float]]:
        """The first seed's rows of other tools whose share of MACs in integers is known, with that share."""
        runs = self.provenance.values()
        known = dict(share for run in runs for share in run["extra"].get("integer_macs", {}).items())
        rows = self.compression[self.compression["artifact_sha256"].isin(known)]
        rows = rows.sort_values("seed", kind="stable").drop_duplicates(KEY)
        return [(row, known[row["artifact_sha256"]]) for _, row in rows.iterrows()]

    def not_timed(self) -> dict[str, str]:
        """Runtimes without numbers, and why."""
        absent = self.latency[self.latency["p50_ms"].isna()]
        return {f"{row['runtime']} {row['precision']}": self.why(row) for _, row in absent.iterrows()}

    def why(self, row: pd.Series) -> str:
        """Why a row has no numbers."""
        missing = self.provenance[row["run"]]["extra"].get("missing", {})
        return missing.get(f"{row['runtime']} {row['precision']}", "not installed")

    def older(self) -> list[str]:
        """Runs that were measured with older code than this repository's."""
        return [run for run, record in self.provenance.items() if is_older(record)]

    def machines(self) -> dict[str, list[str]]:
        """Versions and machine in words -> the runs that were made with them."""
        told: dict[str, list[str]] = {}
        for run, record in sorted(self.provenance.items()):
            versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
            machine = ", ".join(f"{k}: {v}" for k, v in record["hardware"].items() if k != "load_average")
            told.setdefault(f"Versions: {versions}.\n\nMachine: {machine}.", []).append(run)
        return told


def _is_baseline(table: pd.DataFrame) -> pd.Series:
    """Whether each row is of an uncompressed network."""
    return (table["technique"] == "baseline") & (table["control"] == "")


def is_older(record: dict[str, Any]) -> bool:
    """Whether a run was measured with other code than this repository's, or does not say with which."""
    return record.get("code") is None or bool(provenance.changed(record["code"]))


def committed_profile(
    folder: Path | None = None,
    profiles: tuple[str, ...] = PROFILES,
    *,
    technique: str = "",
    timed: bool = False,
) -> Path | None:
    """The tables of the best profile that has some (of a technique, with times), or None."""
    for profile in profiles:
        profile_dir = (folder or provenance.root()) / "results" / profile
        table = profile_dir / "compression.csv"
        if not table.is_file() or technique and technique not in set(pd.read_csv(table)["technique"]):
            continue
        if not timed or len(pd.read_csv(profile_dir / "latency.csv")):
            return profile_dir
    return None


NOTEBOOKS = {  # technique -> its notebook, and the figure that its committed results are shown in
    "baseline": ("01_baseline", "size"),
    "quantization": ("02_quantization", "size"),
    "pruning": ("03_pruning", "macs"),
    "distillation": ("04_distillation", "parameters"),
    "search": ("05_architecture_search", "parameters"),
    "pipeline": ("06_pipeline", "size"),
    "transfer": ("09_transfer_learning", "size"),
}


class Committed:
    """The committed results of a technique's notebook, beside the uncompressed network.

    `name` is the profile's, `rows` a row each network and seed with `title`.
    """

    def __init__(self, technique: str, profile_dir: Path) -> None:
        self.notebook, self.kind = NOTEBOOKS[technique]
        self.folder, self.name = profile_dir, profile_dir.name
        table = figures.read_table(profile_dir / "compression.csv")
        own = (table["run"].map(row_kinds.notebook_of) == self.notebook) & (table["control"] != ATTEMPT)
        self.rows = table[own | _is_baseline(table)].reset_index(drop=True)

    def figure(self, kind: str = "") -> Figure:
        """Accuracy against "size", "macs" or "parameters", with at most six named series."""
        drawn = {"size": figures.size_against_accuracy, "macs": figures.macs_against_accuracy}
        drawn["parameters"] = figures.parameters_against_accuracy
        return drawn[kind or self.kind](self.rows)

    def verdicts(self, count: int = 10) -> pd.DataFrame:
        """Who beats whom: `count` paired comparisons, those of claims and of most seeds first."""
        folder, dataset = self.folder / "predictions", self.rows["dataset"].iloc[0]
        told = pairs.pairs(self.rows, folder, dataset=dataset)
        told.sort(key=lambda pair: (pair.ours["headline"], pair.seeds), reverse=True)
        columns = ["ours", "theirs", "difference (pp) [95 %]", "seeds", "verdict"]
        return pd.DataFrame([pair.line() for pair in told[:count]], columns=[*columns]).set_index("ours")


def committed(technique: str) -> Committed | None:
    """The committed results of the best profile that has this technique: here, or in this package's clone."""
    for folder in (provenance.root(), Path(__file__).resolve().parents[2]):
        if profile_dir := committed_profile(folder, ALL_PROFILES, technique=technique):
            return Committed(technique, profile_dir)
    return None


def second_tasks(summary: pd.DataFrame) -> str:
    """What starts are worth for a second task: a line each, a column for each number of labels; or "".

    `summary` has titles and settings (`rows.with_settings`), and the difference to the uncompressed start.
    """
    own = summary[summary["technique"] == "transfer"]
    if own.empty:
        return ""
    labels = own["setting.labels"].replace(0, np.inf)  # all of them stand last
    differences = [
        row_kinds.interval_text({**row, "accuracy_delta": row["delta_mean"]}) for _, row in own.iterrows()
    ]
    told = [f"{a:.1f} % ({d})" for a, d in zip(own["accuracy_mean"], differences, strict=True)]
    lines = own["title"].str.rsplit(",", n=1).str[0]
    table = pd.DataFrame({"start and training": lines, "labels": labels, "told": told})
    table = table.pivot(index="start and training", columns="labels", values="told").reindex(lines.unique())
    names = ["all labels" if count == np.inf else f"{count:g} labels a class" for count in table.columns]
    return table.set_axis(names, axis=1).fillna("–").to_markdown()


def twice(timings: pd.DataFrame) -> pd.DataFrame:
    """What was timed twice, with the speed-ups of the second time ("... again") and by how many percent they
    differ ("... apart"). The uncompressed network in fp32 is what others are compared with, and omitted.
    """
    ratios, second = [FASTEST, EAGER], timings["control"] == AGAIN
    again = timings[second][[*TIMING, *ratios]]
    both = timings[~second].merge(again, on=TIMING, suffixes=("", " again"))
    both = both[both["p50_ms"].notna() & ~(_is_baseline(both) & (both["precision"] == "fp32"))]
    apart = {f"{r} apart": 100 * (both[f"{r} again"] / both[r] - 1).abs() for r in ratios}
    return both.assign(**apart, farthest=pd.DataFrame(apart).max(axis=1))


def unrest(timings: pd.DataFrame) -> float | None:
    """Percent of their median that the middle half of a network's rounds spans, half of the networks more."""
    most = timings[(timings["rounds"] == timings["rounds"].max()) & (timings["control"] != "identity")]
    rounds = [np.array(text.split(), float) for text in most["rounds_p50_ms"].dropna() if text]
    spreads = [np.subtract(*np.percentile(own, (75, 25))) / np.median(own) for own in rounds]
    return 100 * float(np.median(spreads)) if spreads else None
