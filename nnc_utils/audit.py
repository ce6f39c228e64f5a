"""Are the committed tables what the committed evidence says? Every number again, by another way.

Written against the measurement protocol rather than with the code that makes the tables: a mistake
there should show here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nnc_utils.provenance import file_sha256, json_sha256
from nnc_utils.publishing import COMMITTED_BYTES, kept_artifacts
from nnc_utils.rows import (
    AGAIN,
    OWN_CLASSES,
    CompressionRow,
    LatencyRow,
    SummaryRow,
    evidence,
    timed_evidence,
)
from nnc_utils.tables import (
    ResultError,
    artifact_name,
    labels_name,
    read_rows,
    to_frame,
)

EXACT = 6e-5  # stored with four decimals
AGREEMENT = {1: 99.5, 0: 99.0}  # stored_codes -> least agreement in percent
LOOKED_AT = ("quantization", "pruning", "pipeline")  # techniques whose claims no loss decides
CLAIM_SEEDS = 3
ROUNDS = 5  # of timing, at least
HEADER_SHARE, HEADER_BYTES = 1.01, 100_000  # an fp32 file beyond its parameters: statistics, names
REQUIRED = ("seed", "parameters", "parameters_sha256", "commit", "versions", "hardware", "wall_seconds")


def problems(profile_dir: Path, *, rescore: bool = True) -> list[str]:
    """What is wrong with the tables of a profile; an empty list when nothing is.

    Parameters
    ----------
    profile_dir : ``results/<profile>``.
    rescore : let the committed networks predict again, where the data set can be had.
    """
    found = []
    try:
        for problem in _Audit(Path(profile_dir), rescore).problems():
            found.append(problem)  # one by one: what is found before an error stays
    except (ResultError, OSError, KeyError, ValueError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


class _Audit:
    """The tables and evidence of one profile."""

    def __init__(self, folder: Path, rescore: bool) -> None:
        self.folder, self.rescore = folder, rescore
        self.compression = read_rows(folder / "compression.csv", CompressionRow)
        self.latency = read_rows(folder / "latency.csv", LatencyRow)
        self.summary = read_rows(folder / "summary.csv", SummaryRow)
        self.provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        self.used: set[str] = set()

    def problems(self) -> Iterator[str]:
        """Everything that is wrong, a line each."""
        if not self.compression:
            yield "compression.csv has no rows"
        for row in self.compression:
            yield from self._compression(row)
        yield from self._references()
        for row in self.latency:
            yield from self._latency(row)
        yield from self._summary()
        yield from self._provenance()
        yield from self._claims()
        yield from self._artifacts()
        left = {file.name for file in (self.folder / "predictions").glob("*")} - self.used
        if left:
            yield f"predictions of no row: {', '.join(sorted(left))}"

    def right(self, name: str, dataset: str) -> np.ndarray:
        """For each test image 1 where the named predictions are right, else 0."""
        predictions, labels = self.load(name), self.load(labels_name(dataset))
        if predictions.shape != labels.shape:
            raise ResultError(f"{name} is about {predictions.shape} images, the labels about {labels.shape}")
        return (predictions == labels).astype(np.float64)

    def load(self, name: str) -> np.ndarray:
        """A file of predictions/."""
        self.used.add(name)
        return np.load(self.folder / "predictions" / name, allow_pickle=False)

    def _compression(self, row: CompressionRow) -> Iterator[str]:
        what = f"compression.csv, {row.run} {row.method} {row.point} {row.control}".rstrip()
        right = self.right(evidence(row.artifact_sha256), row.dataset)
        reference = self.right(evidence(row.reference_sha256), row.dataset)
        if (row.correct, row.total) != (right.sum(), len(right)):
            said = f"{right.sum():.0f} of {len(right)}"
            yield f"{what}: {row.correct} of {row.total} right, but its predictions say {said}"
        mean, low, high = _interval(100 * (right - reference))
        found = {"accuracy": 100 * right.mean(), "accuracy_delta": mean, "delta_ci_low": low}
        yield from _differs(what, row, found | {"delta_ci_high": high})

    def _references(self) -> Iterator[str]:
        baselines = [r for r in self.compression if r.technique == "baseline" and r.control == ""]
        for key, count in Counter((r.dataset, r.seed) for r in baselines).items():
            if count > 1:
                yield f"{count} baselines without a control name for {key}: only one is the reference"
        named = {(r.dataset, r.seed): r.artifact_sha256 for r in baselines}
        known = {r.artifact_sha256: r for r in self.compression}
        fits: dict[str, tuple[float, float]] = {}  # bytes of the reference's state_dict, from its ratios
        for row in self.compression:
            what = f"compression.csv, {row.run} {row.method} {row.point}"
            if row.division == "closed" and row.reference_sha256 != named.get((row.dataset, row.seed)):
                yield f"{what}: closed division, but its reference is not the baseline of its seed"
            if row.reference_sha256 not in known:
                yield f"{what}: its reference {row.reference_sha256[:16]} has no row"
                continue
            weights = 4 * known[row.reference_sha256].params
            low, high = ((row.size_ratio + e) * row.artifact_bytes for e in (-EXACT, EXACT))
            if high < weights or low > HEADER_SHARE * weights + HEADER_BYTES:
                yield f"{what}: size_ratio × artifact_bytes is {low:.0f}, its reference's weights {weights}"
            least, most = fits.get(row.reference_sha256, (low, high))
            fits[row.reference_sha256] = max(low, least), min(high, most)
            if max(low, least) > min(high, most):
                yield f"{what}: size_ratio {row.size_ratio} is against other bytes than in the rows before"

    def _latency(self, row: LatencyRow) -> Iterator[str]:
        if row.control == "identity" or row.p50_ms is None:
            return
        what = f"latency.csv, {row.run} {row.method} {row.point} {row.runtime} {row.precision}"
        what += f" batch {row.batch} threads {row.threads}"
        networks = {r.artifact_sha256: r for r in self.compression}
        if row.artifact_sha256 not in networks:
            yield f"{what}: no compression row for artifact {row.artifact_sha256[:16]}"
            return
        about = (row.technique, row.method, row.point)  # a file may be that of several points
        same = [r for r in self.compression if r.artifact_sha256 == row.artifact_sha256]
        named = [r for r in same if (r.technique, r.method, r.point) == about]
        named = [r for r in named if r.control == row.control] or named
        network = (named or same)[0]
        columns = ("dataset", "model", "technique", "method", "point", "seed")
        for column in columns if row.control == AGAIN else (*columns, "control", "headline"):
            if getattr(row, column) != getattr(network, column):
                yield f"{what}: {column} differs from the one in compression.csv"
        if row.rounds < ROUNDS and row.profile != "smoke":
            yield f"{what}: {row.rounds} rounds, needed are {ROUNDS}"
        if row.accuracy is not None:
            found = {"accuracy": 100 * self.right(timed_evidence(row), row.dataset).mean()}
            if row.agreement is not None:
                same = self.load(timed_evidence(row)) == self.load(evidence(row.artifact_sha256))
                found |= {"agreement": 100 * same.mean()}
            yield from _differs(what, row, found)
            if row.precision in OWN_CLASSES and row.agreement is None:
                yield f"{what}: its accuracy is not that of the code that was timed"
            elif (
                None not in (row.stored_codes, row.agreement) and row.agreement < AGREEMENT[row.stored_codes]
            ):
                yield f"{what}: agreement {row.agreement} is below {AGREEMENT[row.stored_codes]}"
        elif row.headline:
            yield f"{what}: carries a claim, but its runtime was not scored"
        mine = np.array(row.medians)
        if not (1 - EXACT) * mine.min() <= row.p50_ms <= (1 + EXACT) * mine.max():
            yield f"{what}: p50_ms is {row.p50_ms}, but its rounds are from {mine.min()} to {mine.max()}"
        times = {
            other.runtime: other
            for other in self.latency
            if other.technique == "baseline" and other.precision == "fp32"
            if other.control == (AGAIN if row.control == AGAIN else "")
            if networks[other.artifact_sha256].control == ""
            if (other.run, other.dataset, other.seed) == (row.run, row.dataset, row.seed)
            if other.p50_ms is not None
            if (other.batch, other.threads) == (row.batch, row.threads)
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
        columns = ("dataset", "technique", "method", "point", "control")
        groups: dict[tuple, list[CompressionRow]] = {}
        for row in self.compression:
            groups.setdefault(tuple(getattr(row, c) for c in columns), []).append(row)
        found = [tuple(getattr(row, c) for c in columns) for row in self.summary]
        if sorted(found) != sorted(groups):
            yield "summary.csv and compression.csv are not of the same operating points"
            return
        for row, key in zip(self.summary, found, strict=True):
            rows, what = groups[key], f"summary.csv, {' '.join(key)}".rstrip()
            per_seed = [
                self.right(evidence(r.artifact_sha256), r.dataset)
                - self.right(evidence(r.reference_sha256), r.dataset)
                for r in rows
            ]
            mean, low, high = _interval(100 * np.mean(per_seed, axis=0))
            values = {"seeds": len(rows), "headline": max(r.headline for r in rows), "delta_mean": mean}
            values |= {"delta_ci_low": low, "delta_ci_high": high, "no_loss": int(round(low, 4) >= -0.3)}
            values |= {"accuracy_mean": np.mean([r.accuracy for r in rows])}
            values |= {c: np.mean([getattr(r, c) for r in rows]) for c in ("size_ratio", "artifact_bytes")}
            values |= {c: np.mean([getattr(r, c) for r in rows]) for c in ("params", "macs")}
            if len(rows) > 1:
                values["accuracy_sd"] = np.std([r.accuracy for r in rows], ddof=1)
            elif row.accuracy_sd is not None:
                yield f"{what}: a deviation between seeds, but one seed"
            yield from _differs(what, row, values)

    def _provenance(self) -> Iterator[str]:
        for row in (*self.compression, *self.latency):
            record = self.provenance.get(row.run)
            if record is None:
                yield f"a row is of the run {row.run}, which provenance.json does not have"
            elif (row.commit, row.profile) != (record["commit"], record["profile"]):
                yield f"{row.run}: commit {row.commit} or profile {row.profile} is not its provenance's"
        for run, record in self.provenance.items():
            missing = [key for key in REQUIRED if not record.get(key) and record.get(key) != 0]
            if missing:
                yield f"provenance of {run} lacks {', '.join(missing)}"
            elif json_sha256(record["parameters"]) != record["parameters_sha256"]:
                yield f"provenance of {run}: the parameters do not have their hash"

    def _claims(self) -> Iterator[str]:
        """A claim was looked at on validation; three seeds' claim is the one that their looks choose."""
        looks: dict[tuple, list[tuple[CompressionRow, list[float]]]] = {}
        macs = {row.artifact_sha256: row.macs for row in self.compression}
        for row in self.compression:
            record = self.provenance.get(row.run, {})
            files = [
                e["path"] for e in record.get("artifacts", []) if e["artifact_sha256"] == row.artifact_sha256
            ]
            looked = (record.get("extra") or {}).get("validation_delta") or {}
            found = [looked[name] for name in (Path(file).stem for file in files) if name in looked]
            if found and not row.control:
                looks.setdefault((row.dataset, row.method, row.point), []).append((row, found[0]))
            elif row.headline and row.technique in LOOKED_AT:
                yield f"{row.run} {row.method} {row.point}: a claim that validation did not look at"
        races: dict[tuple, list[tuple]] = {}
        for (_, method, point), found in looks.items():
            row = found[0][0]
            if len({r.headline for r, _ in found}) > 1:
                yield f"{method} {point}: a claim of some seeds and not of others"
            if len(found) >= CLAIM_SEEDS:
                mean = np.mean([look[1] for _, look in found])
                half = np.linalg.norm([look[1] - look[0] for _, look in found]) / len(found)
                lost = row.technique == "pruning" and row.macs < macs[row.reference_sha256]
                cost = np.mean([r.macs if lost else r.artifact_bytes for r, _ in found])
                race = (row.dataset, row.technique, row.division, lost)
                entry = (f"{method} {point}", row.headline, cost, mean - half, mean + half)
                races.setdefault(race, []).append(entry)
        for competing in races.values():
            likely = [entry for entry in competing if entry[3] >= -0.3]
            for name, claimed, cost, low, high in competing:
                better = any(e[2] < cost for e in likely) if low >= -0.3 else bool(likely) or high < 0
                better |= not likely and any(e[3] > low for e in competing)
                if claimed and better:
                    yield f"{name}: claimed, but the validation pictures of its seeds choose another or none"
            if likely and not any(claimed for _, claimed, *_ in competing):
                yield f"{likely[0][0]}: the validation pictures call it likely without loss, and no claim"
            if sum(claimed for _, claimed, *_ in competing) > 1:
                yield f"{', '.join(e[0] for e in competing if e[1])}: more than one claim of one race"

    def _artifacts(self) -> Iterator[str]:
        entries = {e["artifact_sha256"]: e for r in self.provenance.values() for e in r.get("artifacts", [])}
        files = {file.name for file in (self.folder / "artifacts").glob("*")}
        tables = to_frame(self.compression, CompressionRow), to_frame(self.summary, SummaryRow)
        kept, unwanted = kept_artifacts(*tables), set(files)
        for row in self.compression:
            entry = entries.get(row.artifact_sha256)
            if row.headline and entry is None and row.technique != "peer":
                yield f"{row.run} {row.method} {row.point}: its artifact is not in provenance.json"
            if entry and (parts := entry.get("zeros")):  # batch-norm may have zeros, too
                zeros, weights = (sum(counts) for counts in zip(*parts.values(), strict=True))
                if not 0 <= row.params - row.nonzeros - zeros <= row.params - weights:
                    yield f"{row.run} {row.method} {row.point}: {zeros} zeros do not go with its nonzeros"
            if entry is None or row.artifact_sha256 not in kept:
                continue
            if entry["bytes"] != row.artifact_bytes:
                size = entry["bytes"]
                yield f"{row.run} {row.method}: artifact_bytes {row.artifact_bytes}, the file had {size}"
            if entry["bytes"] > COMMITTED_BYTES:
                continue
            name = artifact_name(row.artifact_sha256)
            if name not in files:
                yield f"{row.run} {row.method} {row.point}: artifacts/{name} is missing"
                continue
            unwanted.discard(name)
            yield from self._score_again(row, self.folder / "artifacts" / name, entry["sha256"])
        if unwanted:
            yield f"artifacts of neither a claim nor the pipeline: {', '.join(sorted(unwanted))}"

    def _score_again(self, row: CompressionRow, file: Path, sha256: str) -> Iterator[str]:
        from nnc_utils import artifact, data, evaluation, models

        if file_sha256(file) != sha256 or file.stat().st_size != row.artifact_bytes:
            yield f"{file.name} is not the file that was measured"
            return
        stored = artifact.read(file)
        found = {"params": models.parameters(stored.spec), "macs": models.macs(stored.spec)}
        yield from _differs(file.name, row, found | {"nonzeros": stored.nonzeros})
        if stored.sha256 != row.artifact_sha256:
            yield f"{file.name}: its checksum is not the row's"
        if not self.rescore:
            return
        try:
            images = data.load(row.dataset)
        except data.DataError:
            return
        labels = self.load(labels_name(row.dataset))
        if not np.array_equal(labels, images.test.labels.numpy()):
            yield f"the labels of {row.dataset} are not those of its test split"
            return

        def normalize(pictures: Any) -> Any:
            return data.normalize(pictures, stored.mean, stored.std)

        again = evaluation.predict(artifact.network(stored), images.test, normalize=normalize)
        share = (again == self.load(evidence(row.artifact_sha256))).mean()
        if share < 0.999:  # another processor may round a close call differently
            yield f"{file.name}: scored again, {100 * share:.2f} % of the predictions are the committed ones"


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def _differs(what: str, row: object, found: dict[str, float]) -> Iterator[str]:
    for column, value in found.items():
        given = getattr(row, column)
        if given is None or abs(given - value) > EXACT:
            yield f"{what}: {column} is {given}, but the evidence says {value:.4f}"
