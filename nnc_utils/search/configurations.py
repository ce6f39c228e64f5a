"""What 05 measures: networks that a search found, and its rivals."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from nnc_utils.configurations import Configuration, Times

FOUND_BY = {
    "winner": "the best of all methods",
    "evolution": "evolution",
    "reinforce": "REINFORCE",
    "gradient": "gradients",
    "random": "random search",
    "random_near_limit": "random search near the limit",
    "optuna_nsga2": "Optuna's NSGA-II",
    "random_alone": "random search, each trained alone",
    "narrow_resnet18": "a narrow ResNet-18 by hand",
    "three_stage": "a three-stage ResNet by hand",
}


class Searched(Configuration):
    """A network within a constraint, by what found it."""

    technique: ClassVar[str] = "search"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    method: Literal[tuple(FOUND_BY)]
    macs: Times | None = None  # times fewer than ResNet-18's
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    distill: bool = False
    compressed: bool = False  # its teacher is what the pipeline made of the baseline

    @model_validator(mode="after")
    def _constrained(self) -> Searched:
        if self.macs is None and self.latency_ms is None:
            raise ValueError("without a constraint the largest network wins: give macs, latency_ms or both")
        if self.compressed and not self.distill:
            raise ValueError("compressed is about the teacher: give distill, too")
        return self

    @property
    def race(self) -> str:
        return "" if self.control else "accuracy"

    @property
    def control(self) -> str:
        return self.method if self.method in ("narrow_resnet18", "three_stage") else ""

    @property
    def title(self) -> str:
        limits = [f"{self.macs:g}× fewer MACs"] if self.macs else []
        limits += [f"{self.latency_ms:g} ms"] if self.latency_ms else []
        how = ", distilled" * self.distill + " from the compressed network" * self.compressed
        return f"{', '.join(limits)}, {FOUND_BY[self.method]}{how}"
