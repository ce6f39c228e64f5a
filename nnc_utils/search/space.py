"""The space of a search: residual networks as tuples of small integers, and back to a `Spec`.

An architecture is one number for each decision. Decisions about blocks that it does not have are 0, so that
one network has one tuple.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from nnc_utils.models import STEMS, BlockSpec, Spec

Architecture = tuple[int, ...]

KERNELS = (3, 5)  # of the first convolution of a block; of 2 pixels and fewer 5x5 sees no more than 3x3
FIRST = ("projection", "none")  # connections of a block that halves the picture
LATER = ("identity", "projection", "none")  # of the others


def halved(size: int) -> int:
    """Height and width behind a stride of 2."""
    return (size + 1) // 2


@dataclass(frozen=True)
class Choice:
    """One decision: which stage, which block of it (-1: the whole stage), about what, among which options."""

    stage: int
    block: int
    about: str
    options: tuple[int | str, ...]


@dataclass(frozen=True)
class Space:
    """Residual networks of basic blocks, between narrow and half of ResNet-18 or more.

    Parameters
    ----------
    channels, size, classes, stem : as in `models.Spec`; the stem is as wide as the first stage.
    widths : the widths that each stage may have, growing.
    blocks : the most blocks of a stage.

    Examples
    --------
    >>> space = around(channels=1, size=28, classes=10, stem="small_stride2")
    >>> f"{space.cardinality:.1e}"
    '1.9e+09'
    >>> space.spec(space.smallest).stages[3]
    (BlockSpec(widths=(32, 32), kernels=(3, 3), stride=2, connection='none'),)
    """

    channels: int
    size: int
    classes: int
    stem: str
    widths: tuple[tuple[int, ...], ...]
    blocks: int = 2

    def __post_init__(self) -> None:
        if not self.widths or not all(self.widths) or self.blocks < 1:
            raise ValueError("a space needs a stage, a width of each stage and a block")
        for widths in self.widths:
            if list(widths) != sorted(set(widths)) or widths[0] < 1:
                raise ValueError(
                    f"widths {widths}: different numbers above 0, the smallest first, are needed"
                )

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of the picture in each stage."""
        _, stride, pool = STEMS[self.stem]
        first = halved(self.size) if stride > 1 else self.size
        found = [halved(first) if pool else first]
        for _ in self.widths[1:]:
            found.append(halved(found[-1]))
        return tuple(found)

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The decisions, in the order of an architecture's numbers."""
        found = []
        for stage, widths in enumerate(self.widths):
            found += [Choice(stage, -1, "width", widths)]
            found += [Choice(stage, -1, "depth", tuple(range(1, self.blocks + 1)))]
            for block in range(self.blocks):
                sees = self.sizes[stage] if block or not stage else self.sizes[stage - 1]
                kernels = tuple(kernel for kernel in KERNELS if kernel == KERNELS[0] or kernel < 2 * sees)
                found += [Choice(stage, block, "kernel", kernels)]
                connections = FIRST if stage and not block else LATER
                found += [Choice(stage, block, "connection", connections)]
        return tuple(found)

    @functools.cached_property
    def options(self) -> np.ndarray:
        """How many options each decision has, (decisions,)."""
        return np.array([len(choice.options) for choice in self.choices])

    @property
    def cardinality(self) -> int:
        """How many different architectures there are."""

        def of(stage: int) -> int:
            per_block = [
                prod(len(c.options) for c in self.choices if (c.stage, c.block) == (stage, b))
                for b in range(self.blocks)
            ]
            return len(self.widths[stage]) * sum(prod(per_block[: d + 1]) for d in range(self.blocks))

        return prod(of(stage) for stage in range(len(self.widths)))

    @functools.cached_property
    def places(self) -> dict[tuple[int, int, str], int]:
        """Where in an architecture a decision is: (stage, block, about what) -> place."""
        return {(c.stage, c.block, c.about): place for place, c in enumerate(self.choices)}

    def value(self, architecture: Architecture, stage: int, block: int, about: str) -> int | str:
        """What an architecture has chosen there: a width, a depth, a kernel, a connection."""
        place = self.places[stage, block, about]
        return self.choices[place].options[architecture[place]]

    def active(self, architecture: Architecture) -> np.ndarray:
        """Which decisions matter: not those about blocks that the architecture does not have; bool."""
        depth = [self.value(architecture, stage, -1, "depth") for stage in range(len(self.widths))]
        return np.array([choice.block < depth[choice.stage] for choice in self.choices])

    def canonical(self, numbers: Architecture | np.ndarray) -> Architecture:
        """The numbers, with 0 where they do not matter."""
        numbers = tuple(int(number) for number in numbers)
        return tuple(n if a else 0 for n, a in zip(numbers, self.active(numbers), strict=True))

    def check(self, architecture: Architecture) -> None:
        """Raise a ValueError unless this is an architecture of the space."""
        if len(architecture) != len(self.choices) or not all(
            0 <= number < len(choice.options)
            for number, choice in zip(architecture, self.choices, strict=True)
        ):
            most = tuple(int(count) - 1 for count in self.options)
            raise ValueError(f"{architecture} is no architecture of this space: 0 to {most} is needed")

    def spec(self, architecture: Architecture) -> Spec:
        """The architecture as a Spec."""
        self.check(architecture)
        stages = []
        for stage in range(len(self.widths)):
            width = self.value(architecture, stage, -1, "width")
            stages.append(
                tuple(
                    BlockSpec(
                        (width, width),
                        (self.value(architecture, stage, block, "kernel"), 3),
                        2 if stage and not block else 1,
                        self.value(architecture, stage, block, "connection"),
                    )
                    for block in range(self.value(architecture, stage, -1, "depth"))
                )
            )
        stem_width = stages[0][0].widths[0]
        return Spec(self.channels, self.size, self.classes, self.stem, stem_width, "basic", tuple(stages))

    @property
    def largest(self) -> Architecture:
        """The widest and deepest, 5x5 kernels, every connection a projection: it contains all others."""
        return tuple(
            choice.options.index("projection") if choice.about == "connection" else len(choice.options) - 1
            for choice in self.choices
        )

    @property
    def smallest(self) -> Architecture:
        """The narrowest: one block a stage, 3x3 kernels, no connection."""
        return self.canonical(
            [choice.options.index("none") if choice.about == "connection" else 0 for choice in self.choices]
        )

    # --- Moving about ---------------------------------------------------------------------------

    def sample(self, random: np.random.Generator) -> Architecture:
        """Every decision drawn evenly from its options."""
        return self.canonical(random.integers(self.options))

    def narrow(self, random: np.random.Generator) -> Architecture:
        """The narrowest stages; everything else drawn."""
        drawn = random.integers(self.options)
        wide = [choice.about == "width" for choice in self.choices]
        return self.canonical(np.where(wide, 0, drawn))

    def mutate(self, parent: Architecture, random: np.random.Generator) -> Architecture:
        """Another option for one decision that matters; what a new block is like is drawn."""
        child = np.where(self.active(parent), parent, random.integers(self.options))
        place = random.choice(np.flatnonzero(self.active(parent) & (self.options > 1)))
        child[place] = (parent[place] + random.integers(1, self.options[place])) % self.options[place]
        return self.canonical(child)

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """Each architecture that differs in one decision that matters (new blocks are the first option)."""
        for place in np.flatnonzero(self.active(architecture)):
            for number in range(self.options[place]):
                if number != architecture[place]:
                    yield self.canonical((*architecture[:place], number, *architecture[place + 1 :]))


def around(
    *,
    channels: int,
    size: int,
    classes: int,
    stem: str,
    widest: float = 0.5,
    blocks: int = 2,
) -> Space:
    """A space around thin ResNet-18s: widths in sixteenths of ResNet-18's, at least 8 channels.

    Parameters
    ----------
    widest : the largest width as a share of ResNet-18's, in sixteenths.
    blocks : the most blocks of a stage; ResNet-18 has 2.
    """
    most = round(16 * widest)
    if not 1 <= most <= 16 or abs(most - 16 * widest) > 1e-9:
        raise ValueError(f"widest is {widest}: sixteenths from 1/16 to 1 are needed, such as 0.375 or 0.5")
    widths = tuple(
        tuple(sorted({max(8, full * share // 16) for share in range(1, most + 1)}))
        for full in (64, 128, 256, 512)
    )
    return Space(channels, size, classes, stem, widths, blocks)
