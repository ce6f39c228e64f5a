"""How long will a network take? A model fitted to measured blocks, asked instead of a runtime."""

from __future__ import annotations

import math
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
    "gathered pixels of few channels",
    "weights",
    "additions",
)
INPUTS, OUTPUTS = 4, 16  # integer kernels work on so many channels at once, or on zeros in their place
FEW = 16  # channels; gathering a pixel of fewer was measured to take a time of its own, however few


def features(layers: list[Layer], connection: str) -> np.ndarray:
    """What a part of a network costs a runtime, in the units of `FEATURES`; arguments as in `costs.parts`."""
    units = dict.fromkeys(FEATURES, 0.0)
    units["network"] = float(connection == "stem")
    for layer in layers:
        pixels, window = layer.size_out**2, layer.kernel**2
        if layer.kind == "conv":
            units["convolutions"] += 1
            padded = INPUTS * math.ceil(layer.in_channels / INPUTS)
            padded *= OUTPUTS * math.ceil(layer.out_channels / OUTPUTS)
            kind = "stem" if connection == "stem" else f"{layer.kernel}x{layer.kernel}"
            units[f"{kind} MACs"] += padded * window * pixels
            units["gathered inputs"] += layer.in_channels * window * pixels
            if connection != "stem" and layer.in_channels < FEW:
                units["gathered pixels of few channels"] += window * pixels
        units["outputs"] += layer.out_channels * pixels
        units["weights"] += math.prod(layer.weight_shape)
    units["additions"] += connection in ("identity", "projection")
    return np.array(list(units.values()))


@dataclass(frozen=True)
class Predictor:
    """Milliseconds of an image as a sum over a network's parts."""

    coefficients: np.ndarray  # milliseconds of one unit of each feature, none below 0
    seen: frozenset[str] = field(repr=False)  # the networks that it was fitted to, in JSON

    def part(self, layers: list[Layer], connection: str) -> float:
        """Milliseconds of a part; a cost for `costs.Costs`."""
        return float(features(layers, connection) @ self.coefficients)

    def of(self, spec: Spec) -> float:
        """Milliseconds of a network."""
        return sum(self.part(*part) for part in parts(spec))

    def error(self, measured: Iterable[tuple[Spec, float]]) -> float:
        """Mean of |predicted / measured - 1| in percent on networks that it was not fitted to."""
        measured = list(measured)
        known = sum(spec.to_json() in self.seen for spec, _ in measured)
        if known or not measured:
            raise ValueError(
                f"{known} of {len(measured)} networks were fitted to: others, at least one, test"
            )
        return 100 * float(np.mean([abs(self.of(spec) / ms - 1) for spec, ms in measured]))


def read(pairs: Iterable[tuple[str, float]]) -> list[tuple[Spec, float]]:
    """Measured networks as `extra` holds them, each a Spec in JSON and its milliseconds."""
    return [(Spec.from_json(text), ms) for text, ms in pairs]


def fit(measured: Iterable[tuple[Spec, float]]) -> Predictor:
    """Non-negative least squares of the *relative* errors of networks with their milliseconds."""
    measured = list(measured)
    inputs = np.stack([sum(features(*part) for part in parts(spec)) for spec, _ in measured])
    scale = np.maximum(inputs.max(0), 1.0)
    times = np.array([ms for _, ms in measured])
    coefficients, _ = nnls(inputs / scale / times[:, None], np.ones(len(times)))
    return Predictor(coefficients / scale, frozenset(spec.to_json() for spec, _ in measured))


def blocks(space: Space, count: int, random: np.random.Generator) -> list[Spec]:
    """Different networks of one block, one stage or two neighbouring stages, to be timed.

    In front stands a stem that makes as many channels as the first block gets, at that block's size.
    """
    drawn: dict[str, Spec] = {}
    for _ in range(100 * count):
        spec = space.spec(space.sample(random))
        stage = int(random.integers(len(spec.stages)))
        before = spec.stages[stage - 1][-1].widths[-1] if stage else spec.stem_width
        size = space.sizes[max(stage - 1, 0)]
        lengths = [spec.stages[stage][:1]], [spec.stages[stage]], spec.stages[stage : stage + 2]
        stages = tuple(lengths[random.integers(3)])
        alone = Spec(space.channels, size, space.classes, "small", before, "basic", stages)
        drawn.setdefault(alone.to_json(), alone)
        if len(drawn) == count:
            break
    return list(drawn.values())
