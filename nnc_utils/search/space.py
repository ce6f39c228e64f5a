"""The space of a search: residual networks as tuples of small integers, and back to a `Spec`.

An architecture is one number for each decision. Decisions about blocks that it does not have are 0, so that
one network has one tuple.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from nnc_utils.models import STEMS, BlockSpec, Spec

Architecture = tuple[int, ...]

KERNELS = (3, 5)  # of the first convolution of a block; of 2 pixels and fewer 5x5 sees no more than 3x3


@dataclass(frozen=True)
class Choice:
    """One decision: which stage, which block of it (-1: the whole stage), which kind, among which options."""

    stage: int
    block: int
    kind: str  # width or depth; inner (a block's width between its convolutions) or kernel
    options: tuple[int, ...]

    def matters(self, depth: int) -> bool:
        """Whether the decision is about something that there is, in a stage of so many blocks."""
        return self.kind == "depth" or depth > max(self.block, 0)


@dataclass(frozen=True)
class Space:
    """Residual networks of basic blocks, of three or four stages.

    Input and stem are as in `models.Spec`, the stem as wide as the first stage. Each stage has one of its
    `widths`, growing, and at most so many `blocks`; inside each block there is another of these widths. The
    last of more than three stages may be missing: ResNet-18's is 512 wide and holds three quarters of its
    weights, networks for small images have none (He et al., 2016, section 4.2). Every block is residual:
    with shared weights one cannot learn to be a difference to its input and to do without it.
    """

    channels: int
    size: int
    classes: int
    stem: str
    widths: tuple[tuple[int, ...], ...]
    blocks: int = 2

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of the image in each stage."""
        _, stride, pool = STEMS[self.stem]
        halvings = (stride > 1) + pool
        return tuple(-(-self.size // 2 ** (halvings + stage)) for stage in range(len(self.widths)))

    def shallowest(self, stage: int) -> int:
        """The fewest blocks of a stage."""
        return 0 if stage == len(self.widths) - 1 > 2 else 1

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The decisions, in the order of an architecture's numbers."""
        choices = []
        for stage, widths in enumerate(self.widths):
            choices += [Choice(stage, -1, "width", widths)]
            depths = tuple(range(self.shallowest(stage), self.blocks + 1))
            choices += [Choice(stage, -1, "depth", depths)]
            for block in range(self.blocks):
                sees = self.sizes[stage] if block or not stage else self.sizes[stage - 1]
                kernels = tuple(kernel for kernel in KERNELS if kernel == KERNELS[0] or kernel < 2 * sees)
                choices += [Choice(stage, block, "inner", widths), Choice(stage, block, "kernel", kernels)]
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
        """How many different architectures there are: for each depth of a stage what its decisions allow."""
        total = 1
        for stage in range(len(self.widths)):
            of_stage = [choice for choice in self.choices if choice.stage == stage and choice.kind != "depth"]
            depths = self.choices[self.places[stage, -1, "depth"]].options
            total *= sum(math.prod(len(c.options) for c in of_stage if c.matters(d)) for d in depths)
        return total

    def value(self, architecture: Architecture, stage: int, block: int, kind: str) -> int:
        """What an architecture has chosen there: a width, a depth, a kernel."""
        place = self.places[stage, block, kind]
        return self.choices[place].options[architecture[place]]

    def active(self, architecture: Architecture) -> np.ndarray:
        """Which decisions matter: not those about blocks that the architecture does not have; bool."""
        depths = [self.value(architecture, stage, -1, "depth") for stage in range(len(self.widths))]
        return np.array([choice.matters(depths[choice.stage]) for choice in self.choices])

    def canonical(self, numbers: Architecture | np.ndarray) -> Architecture:
        """The numbers, with 0 where they do not matter."""
        numbers = tuple(int(number) for number in numbers)
        return tuple(n if a else 0 for n, a in zip(numbers, self.active(numbers), strict=True))

    def spec(self, architecture: Architecture) -> Spec:
        """The architecture as a Spec."""
        stages = []
        for stage in range(len(self.widths)):
            blocks, width = [], self.value(architecture, stage, -1, "width")
            for block in range(self.value(architecture, stage, -1, "depth")):
                inner, kernel = (self.value(architecture, stage, block, k) for k in ("inner", "kernel"))
                shape = (2, "projection") if stage and not block else (1, "identity")
                blocks.append(BlockSpec((inner, width), (kernel, 3), *shape))
            stages += [tuple(blocks)] if blocks else []
        stem = self.stem, self.value(architecture, 0, -1, "width")
        return Spec(self.channels, self.size, self.classes, *stem, "basic", tuple(stages))

    @property
    def largest(self) -> Architecture:
        """The widest and deepest with 5x5 kernels: it contains all others."""
        return tuple(int(count) - 1 for count in self.options)

    @property
    def smallest(self) -> Architecture:
        """The narrowest: fewest stages, one block in each, 3x3 kernels."""
        return (0,) * len(self.choices)

    def sample(self, random: np.random.Generator) -> Architecture:
        """Every decision drawn uniformly from its options."""
        return self.canonical(random.integers(self.options))

    def sample_from(self, chances: np.ndarray, random: np.random.Generator) -> Architecture:
        """Each decision drawn by its own probabilities, (decisions, options)."""
        numbers = (random.random((len(chances), 1)) > chances.cumsum(1)).sum(1)
        return self.canonical(numbers.clip(max=self.options - 1))

    def narrow(self, random: np.random.Generator) -> Architecture:
        """The narrowest layers; everything else drawn."""
        is_width = [choice.kind in ("width", "inner") for choice in self.choices]
        return self.canonical(np.where(is_width, 0, random.integers(self.options)))

    def mutate(self, parent: Architecture, random: np.random.Generator) -> Architecture:
        """Another option for one decision that matters; what a new block is like is drawn."""
        child = np.where(self.active(parent), parent, random.integers(self.options))
        place = random.choice(np.flatnonzero(self.active(parent) & (self.options > 1)))
        child[place] = (parent[place] + random.integers(1, self.options[place])) % self.options[place]
        return self.canonical(child)


def around(
    *, channels: int, size: int, classes: int, stem: str, widest: float = 0.5, blocks: int = 3
) -> Space:
    """Narrow ResNet-18s and three-stage ResNets: sixteenths of ResNet-18's widths up to `widest`, from 8."""
    most = round(16 * widest)
    if not 1 <= most <= 16 or abs(most - 16 * widest) > 1e-9:
        raise ValueError(f"widest is {widest}: sixteenths from 1/16 to 1 are needed, such as 0.375 or 0.5")
    widths = tuple(
        tuple(sorted({max(8, full * share // 16) for share in range(1, most + 1)}))
        for full in (64, 128, 256, 512)
    )
    return Space(channels, size, classes, stem, widths, blocks)
