"""Soft labels: the student learns the teacher's probabilities, not the right class alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def kd(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """How far the student's softened probabilities are from the teacher's (Hinton et al., 2015).

    ``T**2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over the images. Gradients of a
    softened softmax shrink with 1 / T**2; the factor keeps them as large as those of a label term beside it.

    Parameters
    ----------
    student_logits, teacher_logits : (images, classes).
    temperature : T above 0; 1 leaves the probabilities as they are.

    Raises
    ------
    ValueError
        For logits of two shapes, or a temperature that is not above 0.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> float(kd(student_logits=logits, teacher_logits=logits, temperature=4.0))
    0.0
    """
    _check(student_logits, teacher_logits, temperature)
    student = functional.log_softmax(student_logits / temperature, 1)
    teacher = functional.log_softmax(teacher_logits / temperature, 1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def dkd(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    target: float = 1.0,
    others: float = 8.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al., 2022, equation 7): the right class and the others apart.

    The divergence of `kd` is that of "right class or not" and, times the teacher's doubt, that among the
    other classes: a sure teacher hardly teaches what those are like. Here each part has its own weight.

    Parameters
    ----------
    student_logits, teacher_logits : (images, classes), 3 classes or more for the second part to say anything.
    labels : the true classes, int64 (images,).
    temperature : above 0.
    target, others : weights of the two parts; `kd` has 1, and 1 minus the teacher's probability of the
        right class.
    """
    _check(student_logits, teacher_logits, temperature)
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}: one for each of {len(student_logits)} images is needed"
        )
    # By number, not by mask: how many a mask takes is known once an accelerator has come that far.
    right = functional.one_hot(labels, student_logits.shape[1]).bool()
    places = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    places = places + (places >= labels[:, None])  # of the other classes
    whole, among = [], []
    for logits in (student_logits, teacher_logits):
        log = functional.log_softmax(logits / temperature, 1)
        of_right = log.gather(1, labels[:, None]).squeeze(1)
        of_others = log.masked_fill(right, -torch.inf).logsumexp(1)
        whole.append(torch.stack([of_right, of_others], 1))
        among.append(functional.log_softmax((logits / temperature).gather(1, places), 1))
    parts = (
        functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        for student, teacher in (whole, among)
    )
    of_target, of_others = parts
    return temperature**2 * (target * of_target + others * of_others)


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits "
            f"{tuple(teacher_logits.shape)}: (images, classes) of the same images and classes is needed"
        )
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless it is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}: a number above 0 is needed, such as 4")
