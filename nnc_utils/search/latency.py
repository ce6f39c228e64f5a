"""How long will a network take? A model fitted to measured blocks, which a search asks instead of a clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from nnc_utils.models import Layer, Spec
from nnc_utils.search.costs import parts
from nnc_utils.search.space import Space

FEATURES = (
    "network",  # each call of the runtime
    "convolutions",
    "1x1 MACs",
    "3x3 MACs",
    "5x5 MACs",
    "stem MACs",
    "outputs",
    "gathered inputs",  # each output pixel reads the pixels under its kernel
    "weights",
    "additions",
)
INPUTS, OUTPUTS = 4, 16  # integer kernels work on so many channels at once, or on zeros in their place


def features(layers: list[Layer], connection: str) -> np.ndarray:
    """What a part of a network costs a runtime, in the units of `FEATURES`.

    Parameters
    ----------
    layers : of a block; or the first convolution, with connection "stem", or the classifier.
    connection : of the block.
    """
    found = dict.fromkeys(FEATURES, 0.0)
    found["network"] = float(connection == "stem")
    for layer in layers:
        pixels = layer.size_out**2
        if layer.kind == "conv":
            found["convolutions"] += 1
            padded = _padded(layer.in_channels, INPUTS) * _padded(layer.out_channels, OUTPUTS)
            kind = "stem" if connection == "stem" else f"{layer.kernel}x{layer.kernel}"
            found[f"{kind} MACs"] += padded * layer.kernel**2 * pixels
            found["gathered inputs"] += layer.in_channels * layer.kernel**2 * pixels
        found["outputs"] += layer.out_channels * pixels
        found["weights"] += float(np.prod(layer.weight_shape))
    if connection in ("identity", "projection"):
        found["additions"] += 1
    return np.array(list(found.values()))


def _padded(channels: int, multiple: int) -> int:
    return -(-channels // multiple) * multiple


@dataclass(frozen=True)
class Predictor:
    """Milliseconds of a picture, a sum over a network's parts.

    Parameters
    ----------
    coefficients : milliseconds of one unit of each feature, none below 0.
    seen : the networks that it was fitted to.
    """

    coefficients: np.ndarray
    seen: frozenset[str] = field(repr=False)

    def part(self, layers: list[Layer], connection: str) -> float:
        """Milliseconds of a part; a cost for `costs.Costs`."""
        return float(features(layers, connection) @ self.coefficients)

    def of(self, spec: Spec) -> float:
        """Milliseconds of a network."""
        return sum(self.part(*part) for part in parts(spec))

    def error(self, measured: Iterable[tuple[Spec, float]]) -> float:
        """Mean absolute percentage error on networks that it has not seen.

        Raises
        ------
        ValueError
            For one that it was fitted to, or none.
        """
        measured = list(measured)
        known = [spec for spec, _ in measured if spec.to_json() in self.seen]
        if known or not measured:
            raise ValueError(
                f"{len(known)} of {len(measured)} networks were fitted to: others, at least one, test"
            )
        return 100 * float(np.mean([abs(self.of(spec) / ms - 1) for spec, ms in measured]))


def fit(measured: Iterable[tuple[Spec, float]]) -> Predictor:
    """The coefficients, none negative, with the least squares of *relative* errors.

    Parameters
    ----------
    measured : networks and their milliseconds.
    """
    measured = list(measured)
    if not measured or not all(0 < ms < np.inf for _, ms in measured):
        raise ValueError("measured networks, each with a time above 0, are needed")
    inputs = np.stack([sum(features(*part) for part in parts(spec)) for spec, _ in measured])
    scale = np.maximum(inputs.max(0), 1.0)
    times = np.array([ms for _, ms in measured])
    found, _ = nnls(inputs / scale / times[:, None], np.ones(len(times)))
    return Predictor(found / scale, frozenset(spec.to_json() for spec, _ in measured))


def blocks(space: Space, count: int, random: np.random.Generator) -> list[Spec]:
    """Networks of one block, one stage or two neighbouring stages, to be measured; different ones.

    In front stands a stem that makes as many channels as the first block gets, at that block's size.
    """
    found: dict[str, Spec] = {}
    for _ in range(100 * count):
        spec = space.spec(space.sample(random))
        stage = int(random.integers(len(spec.stages)))
        before = spec.stages[stage - 1][-1].widths[-1] if stage else spec.stem_width
        size = space.sizes[max(stage - 1, 0)]
        chosen = [spec.stages[stage][:1]], [spec.stages[stage]], spec.stages[stage : stage + 2]
        stages = tuple(chosen[random.integers(3)])
        alone = Spec(space.channels, size, space.classes, "small", before, "basic", stages)
        found.setdefault(alone.to_json(), alone)
        if len(found) == count:
            break
    return list(found.values())
