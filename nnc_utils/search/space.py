"""The space of a search: residual networks as tuples of small integers, and back to a `Spec`.

An architecture is one number for each decision. Decisions about blocks that it does not have are 0, so that
one network has one tuple.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from nnc_utils.models import STEMS, BlockSpec, Spec

Architecture = tuple[int, ...]

KERNELS = (3, 5)  # of the first convolution of a block; of 2 pixels and fewer 5x5 sees no more than 3x3
FIRST = ("projection", "none")  # connections of a block that halves the image
LATER = ("identity", "projection", "none")  # of the others


@dataclass(frozen=True)
class Choice:
    """One decision: which stage, which block of it (-1: the whole stage), which kind, among which options."""

    stage: int
    block: int
    kind: str  # width, depth, kernel or connection
    options: tuple[int | str, ...]


@dataclass(frozen=True)
class Space:
    """Residual networks of basic blocks.

    Input and stem are as in `models.Spec`, the stem as wide as the first stage. Each stage has one of its
    `widths`, growing, and at most so many `blocks`.

    >>> space = around(channels=1, size=28, classes=10, stem="small_stride2")
    >>> f"{space.cardinality:.1e}"
    '1.9e+09'
    """

    channels: int
    size: int
    classes: int
    stem: str
    widths: tuple[tuple[int, ...], ...]
    blocks: int = 2

    def __post_init__(self) -> None:
        growing = (widths and widths[0] > 0 and list(widths) == sorted(set(widths)) for widths in self.widths)
        if not self.widths or not all(growing) or self.blocks < 1:
            raise ValueError(f"{self.widths}, {self.blocks} blocks: growing widths and a block are needed")

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of the image in each stage."""
        _, stride, pool = STEMS[self.stem]
        halvings = (stride > 1) + pool
        return tuple(-(-self.size // 2 ** (halvings + stage)) for stage in range(len(self.widths)))

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The decisions, in the order of an architecture's numbers."""
        choices = []
        for stage, widths in enumerate(self.widths):
            choices += [Choice(stage, -1, "width", widths)]
            choices += [Choice(stage, -1, "depth", tuple(range(1, self.blocks + 1)))]
            for block in range(self.blocks):
                sees = self.sizes[stage] if block or not stage else self.sizes[stage - 1]
                kernels = tuple(kernel for kernel in KERNELS if kernel == KERNELS[0] or kernel < 2 * sees)
                connections = FIRST if stage and not block else LATER
                choices += [Choice(stage, block, "kernel", kernels)]
                choices += [Choice(stage, block, "connection", connections)]
        return tuple(choices)

    @functools.cached_property
    def options(self) -> np.ndarray:
        """How many options each decision has, (decisions,)."""
        return np.array([len(choice.options) for choice in self.choices])

    @functools.cached_property
    def places(self) -> dict[tuple[int, int, str], int]:
        """Where in an architecture a decision stands: (stage, block, kind) -> place."""
        return {(c.stage, c.block, c.kind): place for place, c in enumerate(self.choices)}

    @property
    def cardinality(self) -> int:
        """How many different architectures there are: widths x sum over depths of the blocks' options."""
        total = 1
        for stage, widths in enumerate(self.widths):
            first = self.places[stage, 0, "kernel"]
            in_block = (
                self.options[first : first + 2 * self.blocks].reshape(-1, 2).prod(1)
            )  # kernel, connection
            total *= len(widths) * int(in_block.cumprod().sum())
        return total

    def value(self, architecture: Architecture, stage: int, block: int, kind: str) -> int | str:
        """What an architecture has chosen there: a width, a depth, a kernel, a connection."""
        place = self.places[stage, block, kind]
        return self.choices[place].options[architecture[place]]

    def active(self, architecture: Architecture) -> np.ndarray:
        """Which decisions matter: not those about blocks that the architecture does not have; bool."""
        depths = [self.value(architecture, stage, -1, "depth") for stage in range(len(self.widths))]
        return np.array([choice.block < depths[choice.stage] for choice in self.choices])

    def canonical(self, numbers: Architecture | np.ndarray) -> Architecture:
        """The numbers, with 0 where they do not matter."""
        numbers = tuple(int(number) for number in numbers)
        return tuple(n if a else 0 for n, a in zip(numbers, self.active(numbers), strict=True))

    def spec(self, architecture: Architecture) -> Spec:
        """The architecture as a Spec; a ValueError where it is none of this space."""
        most = tuple(int(count) - 1 for count in self.options)
        if (
            len(architecture) != len(most)
            or np.min(architecture) < 0
            or np.any(np.array(architecture) > most)
        ):
            raise ValueError(f"{architecture} is no architecture of this space: 0 to {most} is needed")
        stages = []
        for stage in range(len(self.widths)):
            blocks, width = [], self.value(architecture, stage, -1, "width")
            for block in range(self.value(architecture, stage, -1, "depth")):
                kernels = (self.value(architecture, stage, block, "kernel"), 3)
                connection = self.value(architecture, stage, block, "connection")
                blocks.append(BlockSpec((width, width), kernels, 2 if stage and not block else 1, connection))
            stages.append(tuple(blocks))
        stem_width = stages[0][0].widths[0]
        return Spec(self.channels, self.size, self.classes, self.stem, stem_width, "basic", tuple(stages))

    @property
    def largest(self) -> Architecture:
        """The widest and deepest, 5x5 kernels, every connection a projection: it contains all others."""
        return tuple(
            choice.options.index("projection") if choice.kind == "connection" else len(choice.options) - 1
            for choice in self.choices
        )

    @property
    def smallest(self) -> Architecture:
        """The narrowest: one block a stage, 3x3 kernels, no connection."""
        return self.canonical(
            [choice.options.index("none") if choice.kind == "connection" else 0 for choice in self.choices]
        )

    def sample(self, random: np.random.Generator) -> Architecture:
        """Every decision drawn uniformly from its options."""
        return self.canonical(random.integers(self.options))

    def sample_from(self, chances: np.ndarray, random: np.random.Generator) -> Architecture:
        """Each decision drawn by its own probabilities, (decisions, options)."""
        numbers = (random.random((len(chances), 1)) > chances.cumsum(1)).sum(1)
        return self.canonical(numbers.clip(max=self.options - 1))

    def narrow(self, random: np.random.Generator) -> Architecture:
        """The narrowest stages; everything else drawn."""
        drawn = random.integers(self.options)
        return self.canonical(np.where([choice.kind == "width" for choice in self.choices], 0, drawn))

    def mutate(self, parent: Architecture, random: np.random.Generator) -> Architecture:
        """Another option for one decision that matters; what a new block is like is drawn."""
        child = np.where(self.active(parent), parent, random.integers(self.options))
        place = random.choice(np.flatnonzero(self.active(parent) & (self.options > 1)))
        child[place] = (parent[place] + random.integers(1, self.options[place])) % self.options[place]
        return self.canonical(child)


def around(
    *, channels: int, size: int, classes: int, stem: str, widest: float = 0.5, blocks: int = 2
) -> Space:
    """A space around narrow ResNet-18s: widths in sixteenths of ResNet-18's up to `widest`, at least 8."""
    most = round(16 * widest)
    if not 1 <= most <= 16 or abs(most - 16 * widest) > 1e-9:
        raise ValueError(f"widest is {widest}: sixteenths from 1/16 to 1 are needed, such as 0.375 or 0.5")
    widths = tuple(
        tuple(sorted({max(8, full * share // 16) for share in range(1, most + 1)}))
        for full in (64, 128, 256, 512)
    )
    return Space(channels, size, classes, stem, widths, blocks)
