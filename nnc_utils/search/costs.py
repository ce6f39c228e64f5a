"""What an architecture costs, and what it may cost.

A cost is a sum over stem, blocks and classifier, each of which depends on few decisions. So it is kept in
tables: the cost of an architecture is a handful of look-ups, and that of a *distribution* over architectures
is exact, too (`gradient.Relaxed.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from nnc_utils import models
from nnc_utils.models import Layer, Spec
from nnc_utils.search.space import Architecture, Space

Part = Callable[[list[Layer], str], float]  # layers of a stem, block or classifier, connection -> cost


class InfeasibleError(ValueError):
    """No network of the space meets the constraints."""


@dataclass(frozen=True)
class Constraints:
    """The most that a network may cost; None where it does not matter.

    Parameters
    ----------
    macs : multiplications for one picture.
    params : parameters, as `models.parameters` counts them.
    int8_bytes : bytes of its weights as integers, see `layer_int8_bytes`.
    latency_ms : milliseconds for one picture, as a `latency.Predictor` predicts them.
    """

    macs: float | None = None
    params: float | None = None
    int8_bytes: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if not 0 < limit < math.inf:
                raise ValueError(f"{name} is {limit!r}: a number above 0, or None, is needed")
        if not self.limits:
            raise ValueError("without a constraint the largest network wins: give one, such as macs")

    @property
    def limits(self) -> dict[str, float]:
        """The constraints that there are."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def layer_int8_bytes(layer: Layer) -> int:
    """Bytes of a layer in integers: one a weight, a scale and a bias of 4 bytes each a channel."""
    return math.prod(layer.weight_shape) + 8 * layer.out_channels


COSTS: dict[str, Part] = {
    "macs": lambda layers, _: sum(layer.macs for layer in layers),
    "params": lambda layers, _: sum(layer.parameters for layer in layers),
    "int8_bytes": lambda layers, _: sum(map(layer_int8_bytes, layers)),
}


@dataclass(frozen=True)
class Tables:
    """One cost of a whole space.

    Parameters
    ----------
    stem : (widths of the first stage,).
    blocks : for each stage and block, (width before, width, kernel, connection). A stage's later blocks, and
        the first stage's first, come behind the same width: (width, kernel, connection).
    classifier : (widths of the last stage,).
    """

    stem: np.ndarray
    blocks: tuple[tuple[np.ndarray, ...], ...]
    classifier: np.ndarray


def parts(spec: Spec) -> list[tuple[list[Layer], str]]:
    """Stem, blocks and classifier: the layers of each, and its connection."""
    layers = models.layers(spec)
    found = [([layers[0]], "stem")]
    for name, block in models.named_blocks(spec):
        inside = [layer for layer in layers if layer.name.startswith(f"{name}.")]
        found.append((inside, block.connection))
    return [*found, ([layers[-1]], "classifier")]


def tables(space: Space, cost: Part) -> Tables:
    """Look up what every stem, block and classifier of a space costs."""
    widths = [(stage, -1, "width") for stage in range(len(space.widths))]
    stages = []
    for stage, width in enumerate(widths):
        blocks = []
        for block in range(space.blocks):
            before = [widths[stage - 1]] if stage and not block else []
            decisions = [*before, width, (stage, block, "kernel"), (stage, block, "connection")]
            blocks.append(_table(space, cost, 1 + stage + block, decisions))
        stages.append(tuple(blocks))
    stem, classifier = _table(space, cost, 0, widths[:1]), _table(space, cost, -1, widths[-1:])
    return Tables(stem, tuple(stages), classifier)


def _table(space: Space, cost: Part, part: int, decisions: list[tuple[int, int, str]]) -> np.ndarray:
    """What a part of the smallest network costs with all options of some decisions, an axis each."""
    stage, block, _ = decisions[-1]
    smallest, places = np.array(space.smallest), [space.places[decision] for decision in decisions]
    smallest[space.places[stage, -1, "depth"]] = max(block, 0)  # so that there is this block
    found = np.empty(space.options[places])
    for numbers in np.ndindex(found.shape):
        smallest[places] = numbers
        found[numbers] = cost(*parts(space.spec(smallest))[part])
    return found


class Costs:
    """What the architectures of a space cost.

    Parameters
    ----------
    space : of which architectures are asked.
    latency : the cost "latency_ms" of a part, such as `latency.Predictor.part`; without, there is none.
    """

    def __init__(self, space: Space, latency: Part | None = None) -> None:
        self.space = space
        parts = COSTS | ({"latency_ms": latency} if latency else {})
        self.tables = {name: tables(space, part) for name, part in parts.items()}

    def of(self, architecture: Architecture, name: str) -> float:
        """One cost of an architecture."""
        table, space = self.tables[name], self.space
        depth = 2 * space.blocks + 2
        total, before = 0.0, architecture[0]
        total += table.stem[before]
        for stage, blocks in enumerate(table.blocks):
            width, extra, *rest = architecture[stage * depth : (stage + 1) * depth]
            for block in range(extra + 1):
                kernel, link = rest[2 * block : 2 * block + 2]
                index = (before, width, kernel, link) if stage and not block else (width, kernel, link)
                total += blocks[block][index]
            before = width
        return float(total + table.classifier[before])

    def ratio(self, architecture: Architecture, constraints: Constraints) -> float:
        """The largest cost as a share of what is allowed: at most 1 where all constraints are met."""
        return max(self.of(architecture, name) / limit for name, limit in constraints.limits.items())

    def check(self, constraints: Constraints) -> None:
        """Raise an `InfeasibleError` with what the smallest network costs, where even that is too much."""
        for name, limit in constraints.limits.items():
            if name not in self.tables:
                raise InfeasibleError(
                    f"{name} is constrained, but nothing predicts it: give Costs a predictor"
                )
            least = self.of(self.space.smallest, name)
            if least > limit:
                raise InfeasibleError(
                    f"no network has {name} of at most {limit:,.6g}: "
                    f"the smallest of this space has {least:,.6g}"
                )

    def draw(
        self,
        constraints: Constraints,
        random: np.random.Generator,
        *,
        least: float = 0.0,
        tries: int = 100_000,
    ) -> Architecture:
        """A random architecture whose `ratio` is in [least, 1], drawn evenly among those."""
        for _ in range(tries):
            found = self.space.sample(random)
            if least <= self.ratio(found, constraints) <= 1:
                return found
        raise InfeasibleError(
            f"none of {tries:,} random networks costs between {least:g} and 1 of {constraints}: widen it"
        )


def described(costs: Costs, architecture: Architecture) -> dict[str, float | str]:
    """An architecture in words and numbers, for tables."""
    spec = costs.space.spec(architecture)
    stages = "  ".join(
        f"{stage[0].widths[0]}:" + "".join(f"{b.kernels[0]}{b.connection[0]}" for b in stage)
        for stage in spec.stages
    )
    return {"stages": stages} | {name: costs.of(architecture, name) for name in costs.tables}
