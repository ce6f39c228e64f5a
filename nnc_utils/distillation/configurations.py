"""What 04 measures: a model per way of teaching, and students without a teacher."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nnc_utils.baseline import DenseFinetuned  # noqa: F401, a method of this notebook
from nnc_utils.configurations import Configuration, Share

Width = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Length = Annotated[float, Field(gt=0, le=1000)]
SIGNALS = {"kd": "soft labels", "dkd": "decoupled soft labels", "hints": "hints", "attention": "attention"}
SIGNALS |= {"similarity": "similarities", "kd_attention": "soft labels and attention"}
SIGNALS |= {"kd_hints": "soft labels and hints", "dist": "correlations"}
SOFT = ("kd", "dkd", "dist")  # they need logits only: of a cache, or of several teachers
TEACHERS = {"baseline": "the baseline", "ensemble": "all seeds", "self": "itself", "resnet50": "ResNet-50"}


class Student(Configuration):
    """What all students share."""

    technique: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    width: Width


class Distilled(Student):
    """A student with a teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"training", "teacher"})
    what: ClassVar[str] = "width {width:g}, {signal} of {who}"
    added: ClassVar[dict[str, Any]] = {"standardize": "logits standardized"}
    added |= {name: name for name in ("compressed", "cached", "shuffled")}
    teacher: Literal["baseline", "ensemble", "self", "resnet50"] = "baseline"
    compressed: bool = False  # the teacher is what the pipeline made of it
    cached: bool = False  # the teacher's logits are computed once, before the training
    shuffled: bool = False  # control: the teacher sees other images

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.cached and self.method not in SOFT:
            raise ValueError(
                f"cached: {self.method} compares features, which are not cached; {', '.join(SOFT)} can be"
            )
        if self.compressed and self.teacher in ("self", "resnet50"):
            raise ValueError(f"compressed: there is no compressed teacher {self.teacher!r}")
        if self.teacher == "ensemble" and self.method not in SOFT:
            raise ValueError(f"teacher 'ensemble' has soft labels only: one of {', '.join(SOFT)}")
        return self

    @property
    def control(self) -> str:
        return "shuffled_teacher" if self.shuffled else ""

    @property
    def race(self) -> str:
        return "" if self.control or self.teacher == "self" else f"accuracy at width {self.width:g}"

    def words(self) -> dict[str, Any]:
        return dict(self) | {"signal": SIGNALS[self.method], "who": TEACHERS[self.teacher]}


class Kd(Distilled):
    method: Literal["kd"] = "kd"
    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    standardize: bool = False  # each image's logits first get mean 0 and deviation 1
    gain: Weight = 1.0  # a factor on the soft labels, 10 for standardized ones in Sun et al. (2024)


class Dkd(Distilled):
    method: Literal["dkd"] = "dkd"
    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    others: Weight = 8.0  # weight of the classes that are not the label


class Dist(Distilled):
    method: Literal["dist"] = "dist"
    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    inter: Weight = 2.0  # of the correlation over the classes of an image
    intra: Weight = 2.0  # of the correlation over the images of a class


class Hints(Distilled):
    method: Literal["hints"] = "hints"
    beta: Weight = 1.0


class Maps(Distilled):
    method: Literal["attention", "similarity"]
    beta: Weight = 100.0


class KdAttention(Kd):
    method: Literal["kd_attention"] = "kd_attention"
    beta: Weight = 100.0


class KdHints(Kd):
    method: Literal["kd_hints"] = "kd_hints"
    beta: Weight = 1.0


class StudentAlone(Student):
    method: Literal["student_alone"] = "student_alone"
    control: ClassVar[str] = "student_alone"
    what: ClassVar[str] = "width {width:g}, alone"


class LabelSmoothing(Student):
    method: Literal["label_smoothing"] = "label_smoothing"
    control: ClassVar[str] = "label_smoothing"
    what: ClassVar[str] = "width {width:g}, labels smoothed by {smoothing:g}"
    smoothing: Share = 0.1


class StudentLonger(Student):
    method: Literal["student_longer"] = "student_longer"
    control: ClassVar[str] = "student_longer"
    what: ClassVar[str] = "width {width:g}, alone, {times:g}× the training"
    times: Length = 2.0


class Resnet50(Configuration):
    """A larger teacher."""

    method: Literal["resnet50"] = "resnet50"
    technique: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    control: ClassVar[str] = "teacher"
    what: ClassVar[str] = "ResNet-50, {epochs:g} epochs"
    epochs: Length = 12.0
