"""What is claimed, chosen by the validation pictures of all seeds together."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from nnc_utils.rows import NO_LOSS, CompressionRow
from nnc_utils.tables import ResultError, Run, point_of

SEEDS_OF_A_CLAIM = 3


class Choice(NamedTuple):
    """What all seeds' validation pictures say of a point: its difference in points, and if it is chosen."""

    low: float
    mean: float
    high: float
    chosen: bool


def claimed_once(runs: list[Run]) -> list[CompressionRow]:
    """The rows of all runs with one choice of what is claimed, which every seed follows.

    Each seed's own validation pictures may like another point best; a claim over seeds is of one point: what
    `chosen_over_seeds` finds, and where that has nothing to choose from, what the first seed chose.
    """
    rows = [row for run in runs for row in run.compression]
    chosen: dict[tuple, int] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        chosen.setdefault(point_of(row), row.headline)
    together, macs = chosen_over_seeds(runs), _macs(runs)
    decided = {_race(row, macs) for row in rows if point_of(row) in together}
    for row in rows:
        if _race(row, macs) in decided:
            chosen[point_of(row)] = int(point_of(row) in together and together[point_of(row)].chosen)
    seeds = {point: len({row.seed for row in rows if point_of(row) == point}) for point in chosen}
    ripe = {point for point, wanted in chosen.items() if wanted and seeds[point] >= SEEDS_OF_A_CLAIM}
    settled = {(row.technique, row.division) for row in rows if point_of(row) in ripe}
    for row in rows:
        if (row.technique, row.division) in settled and point_of(row) not in ripe:
            chosen[point_of(row)] = 0
    return [row.model_copy(update={"headline": chosen[point_of(row)]}) for row in rows]


def chosen_over_seeds(runs: list[Run]) -> dict[tuple, Choice]:
    """What the validation pictures of all seeds choose together.

    In each technique and division the smallest file that is likely without loss: the lower end of its
    difference to its reference is `rows.NO_LOSS` or more (of equal ones the first by name). Where none is,
    the file whose lower end is highest, unless all of its interval is below 0. Networks that lost channels
    are a race of their own, by MACs. Only points compete that `SEEDS_OF_A_CLAIM` seeds or more looked at. The
    interval is that of the mean over the seeds, their errors taken as independent.

    Returns
    -------
    Point (`POINT`) -> its `Choice`.
    """
    macs = _macs(runs)
    races: dict[Race, dict[tuple, tuple]] = {}  # point -> how much it is wanted, its interval
    for point, found in _files(runs).items():
        looks = [_looks(run)[name] for run, _, name in found if name in _looks(run)]
        if len({row.seed for run, row, name in found if name in _looks(run)}) < SEEDS_OF_A_CLAIM:
            continue
        mean = statistics.fmean(mean for _, mean, _ in looks)
        half = sum((mean - low) ** 2 for low, mean, _ in looks) ** 0.5 / len(looks)
        race = _race(found[0][1], macs)
        costs = ("macs", "artifact_bytes") if race.cut else ("artifact_bytes",)
        wanted = [statistics.fmean(getattr(row, cost) for _, row, _ in found) for cost in costs]
        races.setdefault(race, {})[point] = [*wanted, point], (mean - half, mean, mean + half)
    choices = {}
    for competing in races.values():
        likely = [point for point, (_, (low, _, _)) in competing.items() if low >= NO_LOSS]
        best = min(likely, key=lambda point: competing[point][0], default=None)
        if not likely:
            near = max(
                competing, key=lambda p: (competing[p][1][0], [-cost for cost in competing[p][0][:-1]])
            )
            best = near if competing[near][1][2] >= 0 else None
        choices |= {p: Choice(*interval, p == best) for p, (_, interval) in competing.items()}
    return choices


def looked_at_by_all(runs: list[Run]) -> list[Run]:
    """The runs, their validation differences completed for the points that other seeds looked at.

    A notebook stops looking at the first file that is likely without loss, in every seed at another one.
    What is missing is looked at now. A point whose file or pictures are not here stays out, which is printed.
    """
    from nnc_utils import artifact, claims, data

    more: dict[str, dict[str, list[float]]] = {}
    for found in _files(runs).values():
        lacking = [(run, row, name) for run, row, name in found if name not in _looks(run)]
        if len(found) < SEEDS_OF_A_CLAIM or len(lacking) == len(found):
            continue
        for run, row, name in lacking:
            sha256 = row.reference_sha256
            made = (r for r in runs if sha256 in {a.artifact_sha256 for a in r.record.artifacts})
            try:
                path, against = run.artifact(name), next(made, run).artifact(sha256)
                pictures = data.load(row.dataset, size=artifact.read(path).spec.size)
            except (ResultError, data.DataError) as error:
                print(f"{run.run} {row.method} {row.point} stays out of what the seeds choose: {error}")
                continue
            alone = {("closed", "bytes"): [path]}  # closed: compared with just the file that is given
            seen = claims.choose(alone, baseline=against, pictures=pictures)
            more.setdefault(run.run, {})[name] = seen.looked[path.stem]
    extras = [run.extra | {"validation_delta": _looks(run) | more.get(run.run, {})} for run in runs]
    return [
        Run(run.folder, run.record.model_copy(update={"extra": extra})) if run.run in more else run
        for run, extra in zip(runs, extras, strict=True)
    ]


def _files(runs: list[Run]) -> dict[tuple, list[tuple[Run, CompressionRow, str]]]:
    """Point -> the run, row and file name of each of its seeds; of our own methods, without controls."""
    found: dict[tuple, list[tuple[Run, CompressionRow, str]]] = {}
    for run in runs:
        for row in run.compression:
            same = [r.path for r in run.record.artifacts if r.artifact_sha256 == row.artifact_sha256]
            names = sorted((Path(path).stem for path in same), key=lambda name: name not in _looks(run))
            if names and not row.control:
                found.setdefault(point_of(row), []).append((run, row, names[0]))
    return found


def _looks(run: Run) -> dict[str, list[float]]:
    return run.extra.get("validation_delta") or {}


def _macs(runs: list[Run]) -> dict[str, int]:
    return {row.artifact_sha256: row.macs for run in runs for row in run.compression}


class Race(NamedTuple):
    """Points that compete for one claim have these in common."""

    dataset: str
    technique: str
    division: str
    control: bool
    cut: bool  # the network lost channels or blocks, so that MACs count


def _race(row: CompressionRow, macs: dict[str, int]) -> Race:
    cut = row.technique == "pruning" and row.macs < macs.get(row.reference_sha256, 0)
    return Race(row.dataset, row.technique, row.division, bool(row.control), cut)
