"""Features: the student's stages shall compute what the teacher's do, or relate images as they do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import sample
from nnc_utils.models import ResNet, Spec


def check_stages(spec: Spec, stages: Iterable[str]) -> tuple[str, ...]:
    """The stages; a ValueError names those that the network does not have, and those it has."""
    known = [f"layer{number}" for number in range(1, len(spec.stages) + 1)]
    stages = tuple(stages)
    if unknown := [stage for stage in stages if stage not in known]:
        raise ValueError(f"no stage {', '.join(map(repr, unknown))}: the network has {', '.join(known)}")
    return stages


def outputs(
    network: nn.Module, images: Tensor, stages: Iterable[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (images, classes), and outputs (images, channels, height, width) of stages such as "layer1"."""
    return sample.with_outputs(getattr(network, "student", network), stages, images)


class WithRegressors(nn.Module):
    """A student with a 1x1 convolution behind each stage that maps its channels to the teacher's.

    Needed for hints only (Romero et al., 2015, "FitNets"): the convolutions train with the student and are
    omitted from the result, `student`.
    """

    def __init__(self, student: ResNet, teacher: Spec, stages: Iterable[str]) -> None:
        super().__init__()
        self.student, self.spec = student, student.spec
        self.regressors = nn.ModuleDict()
        for stage in check_stages(teacher, check_stages(student.spec, stages)):
            number = int(stage.removeprefix("layer")) - 1
            ours, theirs = (spec.stages[number][-1].widths[-1] for spec in (student.spec, teacher))
            self.regressors[stage] = nn.Conv2d(ours, theirs, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits."""
        return self.student(images)


def hint(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two stages' outputs (Romero et al., 2015, equation 3).

    Divided by the teacher's mean square, so that one weight serves stages of any scale. Both are (images,
    channels, height, width) with the same channels (`WithRegressors`); the larger is averaged down.
    """
    student, teacher = same_size(full(student), full(teacher))
    return functional.mse_loss(student, teacher) / teacher.square().mean().clamp(min=1e-12)


def similarity(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Whether images that are alike to the teacher are to the student (Tung and Mori, 2019, equation 4).

    The mean squared difference of the two matrices of inner products, each row at unit length; student
    and teacher are (images, ...), of any width and size.
    """
    rows = [full(features).flatten(1) for features in (student, teacher)]
    ours, theirs = (functional.normalize(row @ row.T, dim=1) for row in rows)
    return (ours - theirs).square().mean()


def full(features: Tensor) -> Tensor:
    """In fp32 at least: sums over half-precision features lose too much."""
    return features.float() if features.dtype.itemsize < 4 else features


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both stages' outputs, the larger averaged down to the smaller's height and width."""
    small = min(student.shape[2:], teacher.shape[2:])
    return tuple(functional.adaptive_avg_pool2d(features, small) for features in (student, teacher))
