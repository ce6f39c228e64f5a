"""What an architecture costs, what it may cost, and how well it does: cached evaluations.

A cost is a sum over stem, blocks and classifier, each of which depends on few decisions. So it is kept in
tables: the cost of an architecture is a handful of look-ups, and that of a *distribution* over architectures
is exact, too (`gradient.expected_cost`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnc_utils import batch_norm, models
from nnc_utils.data import Data, Split
from nnc_utils.models import Layer
from nnc_utils.search.space import Architecture, Space, halved
from nnc_utils.search.supernet import Supernet
from nnc_utils.training import default_device, fast_bf16, network_digest

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
    int8_bytes : bytes of its weights as integers, see `int8_bytes`.
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


def tables(space: Space, cost: Part) -> Tables:
    """Look up what every stem, block and classifier of a space costs."""
    kernel, stride, pool = models.STEMS[space.stem]
    about = (kernel, stride, space.size, space.sizes[0] if not pool else halved(space.size))
    stem = [cost([_conv("conv1", space.channels, w, *about)], "stem") for w in space.widths[0]]
    size, stages = space.sizes[0], []
    for stage, widths in enumerate(space.widths):
        blocks = []
        for block in range(space.blocks):
            halves = stage > 0 and block == 0
            after = space.sizes[stage]
            [kernels] = [
                c.options for c in space.choices if (c.stage, c.block, c.about) == (stage, block, "kernel")
            ]
            [links] = [
                c.options
                for c in space.choices
                if (c.stage, c.block, c.about) == (stage, block, "connection")
            ]
            table = [
                [
                    [[cost(_block(b, w, k, link, size, after), link) for link in links] for k in kernels]
                    for b in (space.widths[stage - 1] if halves else (w,))
                ]
                for w in widths
            ]
            array = np.array(table, float)  # (width, width before, kernel, connection)
            blocks.append(array.swapaxes(0, 1) if halves else array[:, 0])
            size = after
        stages.append(tuple(blocks))
    fc = [
        cost([Layer("fc", "linear", w, space.classes, 1, 1, 1, 1, None)], "classifier")
        for w in space.widths[-1]
    ]
    return Tables(np.array(stem, float), tuple(stages), np.array(fc, float))


def _conv(name: str, inputs: int, out: int, kernel: int, stride: int, size: int, after: int) -> Layer:
    return Layer(name, "conv", inputs, out, kernel, stride, size, after, "bn")


def _block(before: int, width: int, kernel: int, connection: str, size: int, after: int) -> list[Layer]:
    stride = 2 if after != size else 1
    found = [_conv("conv1", before, width, kernel, stride, size, after)]
    found += [_conv("conv2", width, width, 3, 1, after, after)]
    if connection == "projection":
        found += [_conv("downsample.0", before, width, 1, stride, size, after)]
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


# --- How well it does ---------------------------------------------------------------------------


class Evaluator:
    """Validation accuracy of architectures with the supernet's weights, each looked at once.

    Parameters
    ----------
    supernet : trained; moved to where it is fast and left there.
    pictures : calibration images come from train, the others from validation.
    calibration : training images that re-estimate each candidate's batch-norm.
    validation : validation images that score it, from the first; all of them if there are fewer.
    file : in which evaluations are kept, a line each; where it is of the same weights and images it is read.
    """

    def __init__(
        self,
        supernet: Supernet,
        pictures: Data,
        *,
        calibration: int = 512,
        validation: int = 2500,
        batch_size: int = 256,
        file: str | Path | None = None,
    ) -> None:
        self.device = default_device()
        digest = network_digest(supernet)
        self.supernet, self.batch_size = supernet.eval().to(self.device), batch_size
        train, held = pictures.train, pictures.validation
        self.calibration = self._ready(
            pictures, Split(train.images[:calibration], train.labels[:calibration])
        )
        self.images = self._ready(pictures, Split(held.images[:validation], held.labels[:validation]))
        self.labels = held.labels[:validation].to(self.device)
        self.known: dict[Architecture, float] = {}
        self.file = Path(file) if file else None
        self._call = {"supernet": digest, "calibration": len(self.calibration), "images": len(self.images)}
        self._read()

    @property
    def cost(self) -> int:
        """Images that go through the supernet for one evaluation."""
        return len(self.calibration) + len(self.images)

    def __call__(self, architecture: Architecture) -> float:
        """Validation accuracy in percent."""
        if architecture not in self.known:
            self.known[architecture] = found = self._evaluate(architecture)
            if self.file:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([architecture, found]) + "\n")
        return self.known[architecture]

    @torch.no_grad()
    def _evaluate(self, architecture: Architecture) -> float:
        network = self.supernet.cut(architecture)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            batch_norm.take_statistics(network, self.calibration, batch_size=self.batch_size)
            hits = [
                (network(images).argmax(1) == labels).sum()
                for images, labels in zip(
                    self.images.split(4 * self.batch_size),
                    self.labels.split(4 * self.batch_size),
                    strict=True,
                )
            ]
        return 100 * int(torch.stack(hits).sum()) / len(self.labels)

    def _ready(self, pictures: Data, split: Split) -> Tensor:
        images = pictures.normalize(split.images.to(self.device))
        return images.to(memory_format=torch.channels_last)

    def _read(self) -> None:
        if not self.file:
            return
        try:
            first, *lines = self.file.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == self._call:
                self.known = {tuple(a): accuracy for a, accuracy in map(json.loads, _whole(lines))}
                return
        except (OSError, ValueError):
            pass  # missing, or no such file: begun anew
        self.file.write_text(json.dumps(self._call) + "\n", encoding="utf-8")


def _whole(lines: Iterable[str]) -> list[str]:
    """Without a last line that a killed run did not finish."""
    return [line for line in lines if line.endswith("]")]


def described(costs: Costs, architecture: Architecture) -> dict[str, float | str]:
    """An architecture in words and numbers, for tables."""
    spec = costs.space.spec(architecture)
    stages = "  ".join(
        f"{stage[0].widths[0]}:" + "".join(f"{b.kernels[0]}{b.connection[0]}" for b in stage)
        for stage in spec.stages
    )
    return {"stages": stages} | {name: costs.of(architecture, name) for name in costs.tables}


def as_json(constraints: Constraints) -> dict[str, float]:
    """The constraints for a result."""
    return {name: limit for name, limit in asdict(constraints).items() if limit is not None}
