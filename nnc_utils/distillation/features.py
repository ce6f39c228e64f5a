"""Features: the student's stages shall compute what the teacher's do, or relate pictures as they do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

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
    """Logits, and what some stages put out.

    Parameters
    ----------
    network : a network of `models.build`, or one around it that has a `spec`.
    images : normalized, (images, channels, size, size).
    stages : names such as "layer1".

    Returns
    -------
    Logits (images, classes), and for each stage its output (images, channels, height, width).
    """
    kept: dict[str, Tensor] = {}

    def keep(stage: str):
        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            kept[stage] = output

        return hook

    core = getattr(network, "student", network)
    hooks = [core.get_submodule(stage).register_forward_hook(keep(stage)) for stage in stages]
    try:
        return network(images), kept
    finally:
        for hook in hooks:
            hook.remove()


class WithRegressors(nn.Module):
    """A student with a 1x1 convolution behind each stage that maps its channels to the teacher's.

    Needed for hints only (Romero et al., 2015, "FitNets"): the convolutions are trained with the student and
    left behind, `student` is the network.

    Parameters
    ----------
    student : a network of `models.build`.
    teacher : the teacher's Spec.
    stages : names of the stages that are compared.

    Raises
    ------
    ValueError
        For a stage that one of them does not have.
    """

    def __init__(self, student: ResNet, teacher: Spec, stages: Iterable[str]) -> None:
        super().__init__()
        self.student, self.spec = student, student.spec
        self.regressors = nn.ModuleDict()
        for stage in check_stages(teacher, check_stages(student.spec, stages)):
            ours, theirs = (
                spec.stages[int(stage[5:]) - 1][-1].widths[-1] for spec in (student.spec, teacher)
            )
            self.regressors[stage] = nn.Conv2d(ours, theirs, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits."""
        return self.student(images)


def hint(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two stages' outputs (Romero et al., 2015, equation 3).

    Divided by the teacher's mean square, so that one weight serves stages of any scale.

    Parameters
    ----------
    student : what the regressor made of the student's stage, (images, channels, height, width).
    teacher : the same number of images and channels; where one has more pixels it is averaged down.

    Raises
    ------
    ValueError
        Where no regressor joins the two: other images or channels, or heights of which neither is a whole
        multiple of the other.
    """
    student, teacher = same_size(full(student), full(teacher))
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has {student.shape[1]} channels, the teacher {teacher.shape[1]}: "
            "put a 1x1 convolution between them, see WithRegressors"
        )
    return functional.mse_loss(student, teacher) / teacher.square().mean().clamp(min=1e-12)


def similarity(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Whether pictures that are alike to the teacher are to the student (Tung and Mori, 2019, equation 4).

    The squared difference of the two matrices of the batch's inner products, each row at unit length, divided
    by the number of pairs. Stages of any width and size can be compared.

    Parameters
    ----------
    student, teacher : (images, ...) of the same images.
    """
    _check_images(student, teacher)
    relations = []
    for features in (student, teacher):
        rows = full(features).flatten(1)
        relations.append(functional.normalize(rows @ rows.T, dim=1))
    return (relations[0] - relations[1]).square().mean()


def full(features: Tensor) -> Tensor:
    """In fp32 at least: sums over half-precision features lose too much."""
    return features.float() if features.dtype.itemsize < 4 else features


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both stages' outputs, the larger averaged down to the smaller's height and width."""
    _check_images(student, teacher)
    sizes = [tuple(features.shape[2:]) for features in (student, teacher)]
    if any(len(size) != 2 for size in sizes):
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: pictures are needed"
        )
    small, large = sorted(sizes)
    if any(b % a for a, b in zip(small, large, strict=True)):
        raise ValueError(
            f"the student's stage is {sizes[0][0]}x{sizes[0][1]}, the teacher's {sizes[1][0]}x{sizes[1][1]}: "
            "one has to be a whole multiple of the other, compare stages of like size"
        )
    return tuple(functional.adaptive_avg_pool2d(features, small) for features in (student, teacher))


def _check_images(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"the student saw {len(student)} images, the teacher {len(teacher)}: the same are needed"
        )
