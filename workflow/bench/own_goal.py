"""What an engineer asks of a network ("20x smaller", "10x faster", "0.5 points"), and what answers it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import factor

GIVEN = "give '20x smaller', '10x faster', '0.5 points', or several with commas between them"
PART = re.compile(
    r"(?P<value>\d+(\.\d+)?)\s*((x|×|times)\s*(?P<kind>smaller|faster)|(percentage\s+)?points?|pp)"
)

HELPS = {
    "smaller": "06 by hand, as the README says, with a larger `lambda_` or `macs`",
    "faster": "smaller images (SIZE), or 06 by hand, as the README says, with a larger `macs`",
    "points": "a trained start (WEIGHTS), more epochs (EPOCHS), more images",
}


class GoalError(ValueError):
    """A goal that nobody can read; the message says how to write one."""


@dataclass(frozen=True)
class Goal:
    """Times smaller and times faster (0: not asked), and percentage points to lose (None: not asked)."""

    smaller: float = 0
    faster: float = 0
    points: float | None = None

    def __str__(self) -> str:
        told = [f"{self.smaller:g}× smaller"] if self.smaller else []
        told += [f"{self.faster:g}× faster"] if self.faster else []
        return ", ".join(told + ([] if self.points is None else [f"at most {self.points:g} points lost"]))


@dataclass(frozen=True)
class Offer:
    """A measured network; `faster` None: not timed.

    `lost`: percentage points on validation images, against the better of the uncompressed network and the
    same trained on: one reference for all.
    """

    name: str
    sha256: str
    bytes: int
    smaller: float
    faster: float | None
    lost: float


def parse(text: str) -> Goal:
    """The goal that a text like "20x smaller, 1 point" asks for.

    >>> parse("20x smaller, 0.5 points")
    Goal(smaller=20.0, faster=0, points=0.5)
    """
    asked: dict[str, float] = {}
    for part in re.split(r"(?<!\d),|,(?!\d)|;|\band\b", text.strip().lower()):
        match = PART.fullmatch(part.strip())
        if not match:
            raise GoalError(f"no goal in {part.strip() or text!r}: {GIVEN}")
        kind, value = match["kind"] or "points", float(match["value"])
        if kind in asked or (value > 100 if kind == "points" else value <= 1):
            limits = "each once; more than 1x, and at most 100 points"
            raise GoalError(f"the goal {part.strip()!r} cannot be: {limits}")
        asked[kind] = value
    return Goal(**asked)


def shortfalls(goal: Goal, offer: Offer) -> dict[str, float]:
    """By which share an offer misses each part of the goal; without the parts that it meets."""
    misses = {
        "smaller": goal.smaller / offer.smaller - 1,
        "faster": goal.faster / offer.faster - 1 if offer.faster else float(goal.faster > 0) * 1e3,
        "points": 0 if goal.points is None else (offer.lost - goal.points) / max(goal.points, 1),
    }
    return {part: miss for part, miss in misses.items() if miss > 1e-9}


def best(goal: Goal, offers: Sequence[Offer]) -> Offer:
    """The offer that answers the goal; if none meets it (`shortfalls`), the nearest.

    Where points are asked it is the smallest file. Otherwise it is the one that loses least on validation
    images, since a smaller file that has forgotten its task helps nobody; of equals the smallest.
    """
    meeting = [offer for offer in offers if not shortfalls(goal, offer)]
    if not meeting:
        return min(offers, key=lambda o: (sum(shortfalls(goal, o).values()), o.bytes))
    if goal.points is None:
        return min(meeting, key=lambda offer: (offer.lost, offer.bytes))
    return min(meeting, key=lambda offer: offer.bytes)


def verdict(goal: Goal, offer: Offer, images: int) -> list[str]:
    """What answers the goal by so many validation images; where it does not meet it, what would help."""
    speed = "not timed" if offer.faster is None else f"{factor(offer.faster)} as fast"
    has = f"{factor(offer.smaller)} smaller, {speed}, {offer.lost:.2f} points lost"
    missing = shortfalls(goal, offer)
    if not missing:
        return [f"Chosen on {images:,} validation images: {offer.name} ({has})."]
    helps = "; ".join(f"{part}: {HELPS[part]}" for part in missing)
    nearest = f"No network meets it on {images:,} validation images. The nearest is {offer.name} ({has})."
    return [nearest, f"What would help. {helps}."]


def can_tell(points: float, low: float, high: float, images: int) -> str:
    """What the test images say of "at most so many points lost", from the difference's interval."""
    if low >= -points:
        return f"The {images:,} test images say: at most {points:g} points are lost."
    if high < -points:
        return f"The {images:,} test images say: more than {points:g} points are lost."
    needed = f"at least {max(300 / points, images + 1):,.0f} are needed" if points else "no number can show 0"
    return f"Whether at most {points:g} points are lost, {images:,} test images cannot tell: {needed}."
