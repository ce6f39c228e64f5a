"""Are the committed tables what the committed evidence says? Every number again, by another way.

Written against the measurement protocol rather than with the code that writes the tables: a mistake there
should show here. Accuracies, intervals and speed-ups are NumPy's alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import federated
from bench.publish import COMMITTED_BYTES, kept_artifacts
from bench.tables import ResultError, artifact_name, labels_name, read_rows
from nnc_utils.provenance import file_sha256, json_sha256
from nnc_utils.rows import (
    AGAIN,
    OWN_CLASSES,
    CompressionRow,
    LatencyRow,
    SummaryRow,
    evidence,
    timed_evidence,
    to_frame,
)

EXACT = 6e-5  # stored with four decimals
LIMIT = -0.3  # percentage points: within it, a network is as good as its reference
AGREEMENT = {1: 99.5, 0: 99.0}  # stored_codes -> least agreement in percent
LOOKED_AT = ("quantization", "pruning", "pipeline")  # techniques whose claims are races on validation
CLAIM_SEEDS = 3
ROUNDS = 5  # of timing, at least
HEADER_SHARE, HEADER_BYTES = 1.01, 100_000  # an fp32 file beyond its parameters: statistics, names
REQUIRED = ("seed", "parameters", "parameters_sha256", "commit", "versions", "hardware", "wall_seconds")


def problems(profile_dir: Path, *, rescore: bool = True) -> list[str]:
    """What is wrong with the tables of a profile; an empty list when nothing is.

    With `rescore` the committed networks predict again, where the data set can be had.
    """
    told = []
    try:
        for problem in _Audit(Path(profile_dir), rescore).problems():
            told.append(problem)  # noqa: PERF402, what was told before an error stays
    except (ResultError, OSError, KeyError, ValueError) as error:
        told.append(f"{type(error).__name__}: {error}")
    return told


class _Audit:
    """The tables and evidence of one profile."""

    def __init__(self, folder: Path, rescore: bool) -> None:
        self.folder, self.rescore = folder, rescore
        self.compression: list[CompressionRow] = read_rows(folder / "compression.csv", CompressionRow)
        self.latency: list[LatencyRow] = read_rows(folder / "latency.csv", LatencyRow)
        self.summary: list[SummaryRow] = read_rows(folder / "summary.csv", SummaryRow)
        self.provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        self.networks = {row.artifact_sha256: row for row in self.compression}
        self.used: set[str] = set()

    def problems(self) -> Iterator[str]:
        if not self.compression:
            yield "compression.csv has no rows"
        for row in self.compression:
            yield from self._compression(row)
        yield from self._references()
        for row in self.latency:
            yield from self._latency(row)
        for check in (self._summary, self._provenance, self._claims, self._artifacts, self._federated):
            yield from check()
        if left := {file.name for file in (self.folder / "predictions").glob("*")} - self.used:
            yield f"predictions of no row: {', '.join(sorted(left))}"

    def load(self, name: str) -> np.ndarray:
        """A file of predictions/."""
        self.used.add(name)
        return np.load(self.folder / "predictions" / name, allow_pickle=False)

    def right(self, name: str, dataset: str) -> np.ndarray:
        """For each test image 1 where the named predictions are right, else 0."""
        predictions, labels = self.load(name), self.load(labels_name(dataset))
        if predictions.shape != labels.shape:
            raise ResultError(f"{name} is about {predictions.shape} images, the labels about {labels.shape}")
        return (predictions == labels).astype(np.float64)

    def difference(self, row: CompressionRow) -> np.ndarray:
        """For each test image what a network gets right and its reference does not: 1, 0 or -1."""
        sides = (
            self.right(evidence(sha), row.dataset) for sha in (row.artifact_sha256, row.reference_sha256)
        )
        return np.subtract(*sides)

    def _compression(self, row: CompressionRow) -> Iterator[str]:
        what, right = _name(row), self.right(evidence(row.artifact_sha256), row.dataset)
        if (row.correct, row.total) != (right.sum(), len(right)):
            said = f"{right.sum():.0f} of {len(right)}"
            yield f"{what}: {row.correct} of {row.total} right, but its predictions say {said}"
        mean, low, high = _interval(100 * self.difference(row))
        seen = {
            "accuracy": 100 * right.mean(),
            "accuracy_delta": mean,
            "delta_ci_low": low,
            "delta_ci_high": high,
        }
        yield from _differs(what, row, seen)

    def _references(self) -> Iterator[str]:
        baselines = [r for r in self.compression if r.technique == "baseline" and r.control == ""]
        for key, count in Counter((r.dataset, r.seed) for r in baselines).items():
            if count > 1:
                yield f"{count} baselines without a control name for {key}: only one is the reference"
        named = {(r.dataset, r.seed): r.artifact_sha256 for r in baselines}
        fits: dict[str, tuple[float, float]] = {}  # bytes of the reference in fp32, from its ratios
        for row in self.compression:
            if row.division == "closed" and row.reference_sha256 != named.get((row.dataset, row.seed)):
                yield f"{_name(row)}: closed division, but its reference is not the baseline of its seed"
            if row.reference_sha256 not in self.networks:
                yield f"{_name(row)}: its reference {row.reference_sha256[:16]} has no row"
                continue
            weights = 4 * self.networks[row.reference_sha256].params
            low, high = ((row.size_ratio + e) * row.artifact_bytes for e in (-EXACT, EXACT))
            if high < weights or low > HEADER_SHARE * weights + HEADER_BYTES:
                yield f"{_name(row)}: size_ratio × artifact_bytes is {low:.0f}, the weights are {weights}"
            least, most = fits.get(row.reference_sha256, (low, high))
            fits[row.reference_sha256] = max(low, least), min(high, most)
            if max(low, least) > min(high, most):
                yield f"{_name(row)}: size_ratio {row.size_ratio} is against other bytes than before"

    def _latency(self, row: LatencyRow) -> Iterator[str]:
        if row.control == "identity" or row.p50_ms is None:
            return
        what = f"{_name(row)} {row.runtime} {row.precision} batch {row.batch} threads {row.threads}"
        columns = ("dataset", "model", "technique", "method", "settings", "seed")
        columns += () if row.control == AGAIN else ("control", "headline")
        same = [r for r in self.compression if r.artifact_sha256 == row.artifact_sha256]
        if not same:
            yield f"{what}: no compression row for artifact {row.artifact_sha256[:16]}"
            return
        wrong = [
            [c for c in columns if getattr(row, c) != getattr(r, c)] for r in same
        ]  # a file of several rows
        for column in min(wrong, key=len):
            yield f"{what}: {column} differs from the one in compression.csv"
        if row.rounds < ROUNDS and row.profile != "smoke":
            yield f"{what}: {row.rounds} rounds, needed are {ROUNDS}"
        if row.accuracy is not None:
            seen = {"accuracy": 100 * self.right(timed_evidence(row), row.dataset).mean()}
            if row.agreement is not None:
                alike = self.load(timed_evidence(row)) == self.load(evidence(row.artifact_sha256))
                seen |= {"agreement": 100 * alike.mean()}
            yield from _differs(what, row, seen)
            least = AGREEMENT.get(row.stored_codes, 0) if row.agreement is not None else 0
            if row.precision in OWN_CLASSES and row.agreement is None:
                yield f"{what}: its accuracy is not that of the code that was timed"
            elif least and row.agreement < least:
                yield f"{what}: agreement {row.agreement} is below {least}"
        elif row.headline:
            yield f"{what}: carries a claim, but its runtime was not scored"
        yield from self._speedups(what, row)

    def _speedups(self, what: str, row: LatencyRow) -> Iterator[str]:
        mine = np.array(row.medians)
        if not (1 - EXACT) * mine.min() <= row.p50_ms <= (1 + EXACT) * mine.max():
            yield f"{what}: p50_ms is {row.p50_ms}, but its rounds are from {mine.min()} to {mine.max()}"
        alike = ("run", "dataset", "seed", "batch", "threads")
        times = {
            other.runtime: other
            for other in self.latency
            if other.technique == "baseline" and other.precision == "fp32" and other.p50_ms is not None
            if other.control == (AGAIN if row.control == AGAIN else "")
            if self.networks[other.artifact_sha256].control == ""
            if all(getattr(other, column) == getattr(row, column) for column in alike)
        }
        if "eager" not in times:
            yield f"{what}: the uncompressed network was not timed in eager fp32 beside it"
            return
        fastest = min(times.values(), key=lambda other: other.p50_ms)
        for column, other in (("speedup_eager_fp32", times["eager"]), ("speedup_best_fp32", fastest)):
            its = np.array(other.medians)
            if len(its) != len(mine):
                yield f"{what}: {len(mine)} rounds, the uncompressed network {len(its)}"
                return
            yield from _differs(what, row, {column: float(np.median(its / mine))})

    def _summary(self) -> Iterator[str]:
        columns = ("dataset", "technique", "method", "settings", "control")
        groups: dict[tuple, list[CompressionRow]] = {}
        for row in self.compression:
            groups.setdefault(tuple(getattr(row, c) for c in columns), []).append(row)
        keys = [tuple(getattr(row, c) for c in columns) for row in self.summary]
        if sorted(keys) != sorted(groups):
            yield "summary.csv and compression.csv are not of the same configurations"
            return
        for row, key in zip(self.summary, keys, strict=True):
            rows, what = groups[key], f"summary.csv, {' '.join(key)}".rstrip()
            mean, low, high = _interval(100 * np.mean([self.difference(r) for r in rows], axis=0))
            seen = {"seeds": len(rows), "headline": max(r.headline for r in rows), "delta_mean": mean}
            seen |= {"delta_ci_low": low, "delta_ci_high": high, "no_loss": int(round(low, 4) >= LIMIT)}
            seen |= {"accuracy_mean": np.mean([r.accuracy for r in rows])}
            for column in ("size_ratio", "artifact_bytes", "params", "macs"):
                seen[column] = np.mean([getattr(r, column) for r in rows])
            if len(rows) > 1:
                seen["accuracy_sd"] = np.std([r.accuracy for r in rows], ddof=1)
            elif row.accuracy_sd is not None:
                yield f"{what}: a deviation between seeds, but one seed"
            yield from _differs(what, row, seen)

    def _provenance(self) -> Iterator[str]:
        for row in (*self.compression, *self.latency):
            record = self.provenance.get(row.run)
            if record is None:
                yield f"a row is of the run {row.run}, which provenance.json does not have"
            elif (row.commit, row.profile) != (record["commit"], record["profile"]):
                yield f"{row.run}: commit {row.commit} or profile {row.profile} is not its provenance's"
        for run, record in self.provenance.items():
            if missing := [key for key in REQUIRED if not record.get(key) and record.get(key) != 0]:
                yield f"provenance of {run} lacks {', '.join(missing)}"
            elif json_sha256(record["parameters"]) != record["parameters_sha256"]:
                yield f"provenance of {run}: the parameters do not have their hash"

    def _claims(self) -> Iterator[str]:
        """A claim was looked at on validation; three seeds' claim is the one that their looks choose."""
        looks: dict[tuple, list[tuple[CompressionRow, list[float]]]] = {}
        for row in self.compression:
            record = self.provenance.get(row.run, {})
            looked = record.get("extra", {}).get("validation_delta", {})
            own = [
                e["path"] for e in record.get("artifacts", []) if e["artifact_sha256"] == row.artifact_sha256
            ]
            seen = [looked[name] for name in (Path(path).stem for path in own) if name in looked]
            if seen and not row.control:
                looks.setdefault((row.dataset, row.method, row.settings), []).append((row, seen[0]))
            elif row.headline and row.technique in LOOKED_AT:
                yield f"{_name(row)}: a claim that validation did not look at"
        races: dict[tuple, list[tuple]] = {}
        for seen in looks.values():
            row = seen[0][0]
            if len({r.headline for r, _ in seen}) > 1:
                yield f"{_name(row)}: a claim of some seeds and not of others"
            if len(seen) >= CLAIM_SEEDS:
                mean = np.mean([look[1] for _, look in seen])
                half = np.linalg.norm([look[1] - look[0] for _, look in seen]) / len(seen)
                lost = row.technique == "pruning" and row.macs < self.networks[row.reference_sha256].macs
                cost = np.mean([r.macs if lost else r.artifact_bytes for r, _ in seen])
                entry = (_name(row), row.headline, cost, mean - half, mean + half)
                races.setdefault((row.dataset, row.technique, row.division, lost), []).append(entry)
        for competing in races.values():
            likely = [entry for entry in competing if entry[3] >= LIMIT]
            for name, claimed, cost, low, high in competing:
                better = any(e[2] < cost for e in likely) if low >= LIMIT else bool(likely) or high < 0
                better |= not likely and any(e[3] > low for e in competing)
                if claimed and better:
                    yield f"{name}: claimed, but the validation images of its seeds choose another or none"
            if likely and not any(claimed for _, claimed, *_ in competing):
                yield f"{likely[0][0]}: the validation images call it likely within 0.3 points, and no claim"
            if sum(claimed for _, claimed, *_ in competing) > 1:
                yield f"{', '.join(e[0] for e in competing if e[1])}: more than one claim of one race"

    def _artifacts(self) -> Iterator[str]:
        entries = {e["artifact_sha256"]: e for r in self.provenance.values() for e in r.get("artifacts", [])}
        unwanted = {file.name for file in (self.folder / "artifacts").glob("*")}
        kept = kept_artifacts(to_frame(self.compression, CompressionRow), to_frame(self.summary, SummaryRow))
        for row in self.compression:
            entry = entries.get(row.artifact_sha256)
            if row.headline and entry is None and row.technique != "peer":
                yield f"{_name(row)}: its artifact is not in provenance.json"
            if entry and (parts := entry.get("zeros")):  # batch-norm may have zeros, too
                zeros, weights = (sum(counts) for counts in zip(*parts.values(), strict=True))
                if not 0 <= row.params - row.nonzeros - zeros <= row.params - weights:
                    yield f"{_name(row)}: {zeros} zeros do not go with its nonzeros"
            if entry is None or row.artifact_sha256 not in kept:
                continue
            if entry["bytes"] != row.artifact_bytes:
                yield f"{_name(row)}: artifact_bytes {row.artifact_bytes}, the file had {entry['bytes']}"
            if entry["bytes"] > COMMITTED_BYTES:
                continue
            file = self.folder / "artifacts" / artifact_name(row.artifact_sha256)
            unwanted.discard(file.name)
            yield from self._score_again(row, file, entry["sha256"])
        if unwanted:
            yield f"artifacts of neither a claim nor the pipeline: {', '.join(sorted(unwanted))}"

    def _federated(self) -> Iterator[str]:
        """Bytes are those of the ledger that a run kept; differences and ratios come from the evidence."""
        file = self.folder / federated.FILE
        rows = read_rows(file, federated.FederatedRow) if file.is_file() else []
        known = {row.artifact_sha256: row for row in rows}
        ledgers = {run: record.get("extra", {}).get("federated") for run, record in self.provenance.items()}
        if not rows and any(ledgers.values()):
            yield f"{federated.FILE} is missing: a run has sent bytes"
        for row in rows:
            network, other = self.networks[row.artifact_sha256], known.get(row.against_sha256)
            kept = [own for own in ledgers[row.run].values() if _bytes_of(own) == _bytes_of(vars(row))]
            if not kept or kept[0]["rounds"] != row.rounds:
                yield f"{_name(row)}: its bytes and rounds are not those that its run has kept"
            yield from _differs(_name(row), row, {"accuracy": network.accuracy})
            if other:
                gained = np.subtract(
                    *(self.right(evidence(o.artifact_sha256), row.dataset) for o in (row, other))
                )
                mean, low, high = _interval(100 * gained)
                seen = {"accuracy_delta": mean, "delta_ci_low": low, "delta_ci_high": high}
                seen |= {"times_fewer_bytes": sum(_bytes_of(vars(other))) / sum(_bytes_of(vars(row)))}
                yield from _differs(_name(row), row, seen)

    def _score_again(self, row: CompressionRow, file: Path, sha256: str) -> Iterator[str]:
        from nnc_utils import artifact, data, evaluation, models

        if not file.is_file():
            yield f"{_name(row)}: artifacts/{file.name} is missing"
            return
        if file_sha256(file) != sha256 or file.stat().st_size != row.artifact_bytes:
            yield f"{file.name} is not the file that was measured"
            return
        stored = artifact.read(file)
        counts = {"params": models.parameters(stored.spec), "macs": models.macs(stored.spec)}
        yield from _differs(file.name, row, counts | {"nonzeros": stored.nonzeros})
        if stored.sha256 != row.artifact_sha256:
            yield f"{file.name}: its checksum is not the row's"
        if not self.rescore:
            return
        try:
            images = data.load(row.dataset)
        except data.DataError:
            return
        if not np.array_equal(self.load(labels_name(row.dataset)), images.test.labels.numpy()):
            yield f"the labels of {row.dataset} are not those of its test split"
            return

        def normalize(batch: Any) -> Any:
            return data.normalize(batch, stored.mean, stored.std)

        again = evaluation.predict(artifact.network(stored), images.test, normalize=normalize)
        share = (again == self.load(evidence(row.artifact_sha256))).mean()
        if share < 0.999:  # another processor may round a close call differently
            yield f"{file.name}: scored again, {100 * share:.2f} % of the predictions are the committed ones"


def _name(row: CompressionRow | LatencyRow | federated.FederatedRow) -> str:
    return " ".join(filter(None, (row.run, row.method, row.settings, row.control)))


def _bytes_of(record: dict[str, Any]) -> tuple[int, int]:
    return record["up_bytes"], record["down_bytes"]


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    images = len(values)
    squares = ((values - values.sum() / (images + 2)) ** 2).sum() + 2 * 100**2
    squares += 2 * (values.sum() / (images + 2)) ** 2
    half = max(1.96 * np.sqrt(squares / (images + 1) / images), 300 / images)
    return values.mean(), values.mean() - half, values.mean() + half


def _differs(what: str, row: object, seen: dict[str, float]) -> Iterator[str]:
    for column, value in seen.items():
        stated = getattr(row, column)
        if stated is None or abs(stated - value) > EXACT:
            yield f"{what}: {column} is {stated}, but the evidence says {value:.4f}"
