"""What 09 measures: a start, how it is trained for the second task, and how many labels that has."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nnc_utils.configurations import Configuration, Share

Start = Literal["dense", "scratch", "int8", "zeros", "channels", "distilled", "pipeline"]
STARTS = {"dense": "the uncompressed network", "scratch": "new weights", "int8": "8-bit integers"}
STARTS |= {"zeros": "90 % zeros", "channels": "channels removed", "distilled": "a distilled student"}
STARTS |= {"pipeline": "the pipeline"}
TRAINED = {"head": "only a new head", "all": "all in floats", "kept": "all, masks and codes kept"}
TRAINED |= {"sparse": "a sparse difference"}
KEPT = ("int8", "zeros", "pipeline")  # they have masks or codes to keep


class Transfer(Configuration):
    """A network of the first task, trained for the second."""

    method: Literal["transfer"] = "transfer"
    technique: ClassVar[str] = "transfer"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    what: ClassVar[str] = "{of}, {trained}, {count} labels a class"
    start: Start
    train: Literal["head", "all", "kept", "sparse"] = "all"
    labels: Annotated[int, Field(ge=0)] = 0  # a class; 0: all
    share: Share = 0.01  # of the weights that a sparse difference changes

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.train == "kept" and self.start not in KEPT:
            raise ValueError(f"kept: {self.start} has no masks or codes; {', '.join(KEPT)} have")
        if self.start == "scratch" and self.train != "all":
            raise ValueError("scratch: new weights are all trained")
        return self

    @property
    def control(self) -> str:
        return "from_scratch" if self.start == "scratch" else ""

    def words(self) -> dict[str, Any]:
        share = f" of {100 * self.share:g} %" if self.train == "sparse" else ""
        named = {"of": STARTS[self.start], "trained": TRAINED[self.train] + share}
        return dict(self) | named | {"count": self.labels or "all"}
