"""What is claimed and against which network, decided on validation pictures before the test set is scored."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnc_utils import artifact, evaluation
from nnc_utils.data import Data
from nnc_utils.devices import exact_device
from nnc_utils.rows import NO_LOSS


@dataclass(frozen=True)
class Chosen:
    """What the validation pictures decided.

    Parameters
    ----------
    reference : the file that the open division is compared with.
    claimed : key of an order -> the file that is claimed; without those where none passed.
    looked : name of each file that was tried -> the difference to its reference in percentage points on
        the validation pictures: lower end of the 95 % interval, mean, upper end.
    """

    reference: Path
    claimed: dict[tuple[str, str], Path]
    looked: dict[str, list[float]]


def choose(
    orders: Mapping[tuple[str, str], Iterable[Path]],
    *,
    baseline: Path,
    dense: Path | None = None,
    pictures: Data,
) -> Chosen:
    """In each order, the first file that is likely without loss on the test set.

    There are fewer validation than test pictures, so a paired interval on them is wider by the root of the
    ratio. Narrowed by that, its lower end has to be at least `rows.NO_LOSS`.

    Parameters
    ----------
    orders : (division, what is counted) -> artifacts, the most wanted first, as
        ``{("closed", "bytes"): [smallest, ...]}``; a division is "closed" or "open".
    baseline : the fp32 network: what the closed division is compared with.
    dense : the baseline trained on for as long as the open division was. The better of the two on
        validation is what that is compared with, so that nothing wins by curing an under-trained baseline.
    pictures : the data set that all of them are of.

    Raises
    ------
    ValueError
        For an unknown division.
    """
    if unknown := {division for division, _ in orders} - {"closed", "open"}:
        raise ValueError(f"unknown division {', '.join(sorted(unknown))}: one of closed, open")
    split, options = pictures.validation, {"normalize": pictures.normalize, "device": exact_device()}
    labels = split.labels.numpy()

    @functools.cache
    def right(path: Path) -> np.ndarray:
        return evaluation.predict(artifact.load(path), split, **options) == labels

    better = dense is not None and right(dense).sum() > right(baseline).sum()
    against = {"closed": baseline, "open": dense if better else baseline}
    narrowed = (len(labels) / len(pictures.test.labels)) ** 0.5
    claimed, looked = {}, {}
    for (division, counted), files in orders.items():
        for path in map(Path, files):
            interval = evaluation.paired_interval(
                compressed_correct=right(path), reference_correct=right(against[division])
            )
            looked[path.stem] = [interval.low, interval.mean, interval.high]
            if interval.mean - narrowed * (interval.mean - interval.low) >= NO_LOSS:
                claimed[division, counted] = path
                break
    return Chosen(against["open"], claimed, looked)
