"""What an architecture costs, and what it may cost.

A cost is a sum over stem, blocks and classifier, each of which depends on few decisions. So each of these
terms is kept in a table: the cost of an architecture is a handful of look-ups, and the mean cost of a
*distribution* over architectures is exact, too (`gradient.Relaxed.cost`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nnc_utils import models
from nnc_utils.models import Layer, Spec
from nnc_utils.search.space import Architecture, Space

PartCost = Callable[[list[Layer], str], float]  # layers of a stem, block or classifier, connection -> cost


class InfeasibleError(ValueError):
    """No network of the space keeps the limits; the message says what the smallest costs."""


COSTS: dict[str, PartCost] = {
    "macs": lambda layers, _: sum(layer.macs for layer in layers),
    "params": lambda layers, _: sum(layer.parameters for layer in layers),
    # one byte a weight; a scale and a bias of 4 bytes each a channel
    "int8_bytes": lambda layers, _: sum(math.prod(x.weight_shape) + 8 * x.out_channels for x in layers),
}


def parts(spec: Spec) -> list[tuple[list[Layer], str]]:
    """Stem, blocks and classifier: the layers of each, and its connection."""
    layers = models.layers(spec)
    blocks = [
        ([layer for layer in layers if layer.name.startswith(f"{name}.")], block.connection)
        for name, block in models.named_blocks(spec)
    ]
    return [([layers[0]], "stem"), *blocks, ([layers[-1]], "classifier")]


@dataclass(frozen=True)
class Term:
    """What stem, classifier or a block costs: `values` has an axis for each of the decisions at `places`.

    An architecture has it where its number at `depth` is one of `when`.
    """

    depth: int
    when: range
    places: tuple[int, ...]
    values: np.ndarray


def terms(space: Space, costs: Mapping[str, PartCost]) -> dict[str, list[Term]]:
    """The terms of each cost: of the stem, of each block that there may be, of the classifier."""
    place, last = space.places, len(space.widths) - 1
    widths = [place[stage, -1, "width"] for stage in range(last + 1)]
    wanted = [(0, 1, 0, [widths[0]]), (last, 1, -1, [widths[last]])]  # stage, depth, part, decisions
    if space.shallowest(last) == 0:  # the classifier of networks without it
        wanted.append((last, 0, -1, [widths[last - 1]]))
    for stage, block in itertools.product(range(last + 1), range(space.blocks)):
        before = [widths[stage - 1]] if stage and not block else []
        decisions = [place[stage, block, "inner"], place[stage, block, "kernel"]]
        wanted.append((stage, block + 1, 1 + stage + block, [*before, widths[stage], *decisions]))
    all_terms: dict[str, list[Term]] = {name: [] for name in costs}
    for stage, least, part, places in wanted:
        depth, numbers = place[stage, -1, "depth"], np.array(space.smallest)
        first = numbers[depth] = least - space.shallowest(stage)
        when = range(first, first + 1 if least == 0 else space.options[depth])
        values = {name: np.empty(space.options[places]) for name in costs}
        for index in np.ndindex(*space.options[places]):
            numbers[places] = index
            layers_and_connection = parts(space.spec(numbers))[part]
            for name, cost in costs.items():
                values[name][index] = cost(*layers_and_connection)
        for name in costs:
            all_terms[name].append(Term(depth, when, tuple(places), values[name]))
    return all_terms


class Costs:
    """What the architectures of a space cost, and the most that they may; an error where none may.

    Limits are of "macs" and "latency_ms" of an image, "params" and "int8_bytes"; `latency` predicts the
    milliseconds of a part, such as `latency.Predictor.part`.
    """

    def __init__(self, space: Space, limits: Mapping[str, float], latency: PartCost | None = None) -> None:
        costs = COSTS | ({"latency_ms": latency} if latency else {})
        if not limits:
            raise ValueError("without a limit the largest network wins: give one, such as macs")
        self.space, self.limits = space, dict(limits)
        self.terms = terms(space, costs)
        for name, limit in self.limits.items():
            if name not in costs:
                raise ValueError(
                    f"{name} is limited, but known are {', '.join(costs)}, latency_ms with a predictor"
                )
            least = self.of(space.smallest, name)
            if not least <= limit < math.inf:
                limit = f"no network has {name} of at most {limit:,.6g}"
                raise InfeasibleError(f"{limit}: the smallest of this space has {least:,.6g}")

    def of(self, architecture: Architecture, name: str) -> float:
        """One cost of an architecture: the sum of the terms of what it has."""
        total = 0.0
        for term in self.terms[name]:
            if architecture[term.depth] in term.when:
                total += term.values[tuple(architecture[place] for place in term.places)]
        return float(total)

    def ratio(self, architecture: Architecture) -> float:
        """The largest cost as a share of its limit: at most 1 where all are kept."""
        return max(self.of(architecture, name) / limit for name, limit in self.limits.items())

    def draw(self, random: np.random.Generator, *, least: float = 0.0, tries: int = 100_000) -> Architecture:
        """A random architecture whose `ratio` is in [least, 1], drawn uniformly among those."""
        for _ in range(tries):
            architecture = self.space.sample(random)
            if least <= self.ratio(architecture) <= 1:
                return architecture
        raise InfeasibleError(f"none of {tries:,} random networks costs {least:g} to 1 of {self.limits}")


def described(costs: Costs, architecture: Architecture) -> dict[str, float | str]:
    """An architecture in words and numbers; `16: 32/5` is a stage of 16 with a block of 32 inside, 5x5."""
    stages = "  ".join(
        f"{stage[0].widths[-1]}: " + ", ".join(f"{block.widths[0]}/{block.kernels[0]}" for block in stage)
        for stage in costs.space.spec(architecture).stages
    )
    return {"stages": stages} | {name: costs.of(architecture, name) for name in costs.terms}
