"""What is claimed, decided on validation images before the test set is scored: by one seed, then by all.

A race is what competes for one claim. Its winner is the smallest file that is likely within 0.3 points of its
reference; networks that lost channels or blocks race by MACs, students
and searched networks by accuracy (`session.Bench`).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.tables import Run, key_of
from nnc_utils import artifact, evaluation
from nnc_utils.data import Data
from nnc_utils.devices import exact_device
from nnc_utils.rows import NO_LOSS, CompressionRow

SEEDS_OF_A_CLAIM = 3


class Chosen(NamedTuple):
    """What one seed's validation images decided."""

    reference: Path  # the file that the open division is compared with
    claimed: dict[tuple[str, str], Path]  # race -> the file that is claimed; without those where none passed
    looked: dict[str, list[float]]  # file name -> lower end, mean, upper end of its difference in points


def choose(
    races: Mapping[tuple[str, str], Iterable[Path]],
    *,
    baseline: Path,
    dense: Path | None = None,
    images: Data,
) -> Chosen:
    """In each race, the first file that is likely within 0.3 points on the test set.

    There are fewer validation than test images, so a paired interval on them is wider by the root of the
    ratio. Narrowed by that, its lower end has to be at least `rows.NO_LOSS`.

    `races` maps (division, what is counted) to artifacts, the most wanted first. The closed division is
    compared with `baseline`, the fp32 network; the open one with the better, on validation, of that and
    `dense`, which was trained on for as long, so that nothing wins by curing an under-trained baseline.
    """
    split, options = images.validation, {"normalize": images.normalize, "device": exact_device()}
    labels = split.labels.numpy()

    @functools.cache
    def right(path: Path) -> np.ndarray:
        return evaluation.predict(artifact.load(path), split, **options) == labels

    better = dense is not None and right(dense).sum() > right(baseline).sum()
    against = {"closed": baseline, "open": dense if better else baseline}
    narrowed = (len(labels) / len(images.test.labels)) ** 0.5
    claimed, looked = {}, {}
    for (division, counted), files in races.items():
        for path in map(Path, files):
            interval = evaluation.paired_interval(
                compressed_correct=right(path), reference_correct=right(against[division])
            )
            looked[path.stem] = [interval.low, interval.mean, interval.high]
            if interval.mean - narrowed * (interval.mean - interval.low) >= NO_LOSS:
                claimed.setdefault((division, counted), path)
    return Chosen(against["open"], claimed, looked)


class Choice(NamedTuple):
    """What all seeds' validation images say: a difference in percentage points, and if it is chosen."""

    low: float
    mean: float
    high: float
    chosen: bool


class Race(NamedTuple):
    """Configurations that compete for one claim have these in common."""

    dataset: str
    technique: str
    division: str
    control: bool
    removed: bool  # the network lost channels or blocks, so that MACs count


def chosen_over_seeds(runs: list[Run]) -> dict[tuple, Choice]:
    """What the validation images of all seeds choose together.

    In each race the smallest file whose lower end is at least `rows.NO_LOSS` (of equals the first by name).
    Where there is none, the file whose lower end is highest, unless all of its interval is below 0. Only what
    `SEEDS_OF_A_CLAIM` seeds or more looked at competes. The interval is that of the mean over the seeds,
    their errors taken as independent. Gives each configuration (`tables.KEY`) its `Choice`.
    """
    macs = _macs(runs)
    looks: dict[tuple, list[tuple[CompressionRow, tuple[float, float, float]]]] = {}
    for run in runs:
        for row in run.compression:
            files = [Path(a.path).stem for a in run.artifacts if a.artifact_sha256 == row.artifact_sha256]
            names = [name for name in sorted(files) if name in run.record.extra.validation_delta]
            if names and not row.control:
                looks.setdefault(key_of(row), []).append((row, run.record.extra.validation_delta[names[0]]))
    races: dict[Race, dict[tuple, tuple[list, Choice]]] = {}
    for key, seen in looks.items():
        if len({row.seed for row, _ in seen}) < SEEDS_OF_A_CLAIM:
            continue
        mean = statistics.fmean(mean for _, (_, mean, _) in seen)
        half = sum((mean - low) ** 2 for _, (low, mean, _) in seen) ** 0.5 / len(seen)
        race = _race(seen[0][0], macs)
        counted = ("macs", "artifact_bytes") if race.removed else ("artifact_bytes",)
        costs = [statistics.fmean(getattr(row, cost) for row, _ in seen) for cost in counted]
        races.setdefault(race, {})[key] = costs, Choice(mean - half, mean, mean + half, False)
    choices: dict[tuple, Choice] = {}
    for competing in races.values():
        likely = [key for key, (_, choice) in competing.items() if choice.low >= NO_LOSS]
        best = min(likely, key=lambda key: (competing[key][0], key), default=None)
        if not likely:
            near = max(competing, key=lambda key: (competing[key][1].low, [-c for c in competing[key][0]]))
            best = near if competing[near][1].high >= 0 else None
        choices |= {key: choice._replace(chosen=key == best) for key, (_, choice) in competing.items()}
    return choices


def claimed_once(runs: list[Run]) -> list[CompressionRow]:
    """The rows of all runs with one choice of what is claimed, which every seed follows.

    Each seed's own validation images may like another configuration best; a claim over seeds is of one: what
    `chosen_over_seeds` says, and where that has nothing to choose from, what the first seed chose. Where a
    technique has a claim of `SEEDS_OF_A_CLAIM` seeds, fewer seeds claim nothing beside it.
    """
    rows = [row for run in runs for row in run.compression]
    together, macs = chosen_over_seeds(runs), _macs(runs)
    decided = {_race(row, macs) for row in rows if key_of(row) in together}
    seeds: dict[tuple, set[int]] = {}
    headline: dict[tuple, int] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        key = key_of(row)
        seeds.setdefault(key, set()).add(row.seed)
        headline.setdefault(key, row.headline)
        if _race(row, macs) in decided:
            headline[key] = int(key in together and together[key].chosen)
    # where a technique's claim has enough seeds (ripe), no configuration of fewer seeds is claimed beside it
    ripe = {key for key, claimed in headline.items() if claimed and len(seeds[key]) >= SEEDS_OF_A_CLAIM}
    settled = {(row.technique, row.division) for row in rows if key_of(row) in ripe}
    unripe = {key_of(row) for row in rows if (row.technique, row.division) in settled} - ripe
    headline |= dict.fromkeys(unripe, 0)
    return [row.model_copy(update={"headline": headline[key_of(row)]}) for row in rows]


def _macs(runs: list[Run]) -> dict[str, int]:
    return {row.artifact_sha256: row.macs for run in runs for row in run.compression}


def _race(row: CompressionRow, macs: dict[str, int]) -> Race:
    removed = row.technique == "pruning" and row.macs < macs.get(row.reference_sha256, 0)
    return Race(row.dataset, row.technique, row.division, bool(row.control), removed)
