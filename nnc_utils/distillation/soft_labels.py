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

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> float(kd(student_logits=logits, teacher_logits=logits, temperature=4.0))
    0.0
    """
    _check(student_logits, teacher_logits, temperature)
    student = functional.log_softmax(student_logits / temperature, 1)
    teacher = functional.log_softmax(teacher_logits / temperature, 1)
    return temperature**2 * _divergence(student, teacher)


def dkd(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    target=1.0,
    others=8.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al., 2022, equation 7): the right class and the others apart.

    The divergence of `kd` is that of "right class or not" and, times the teacher's doubt, that among the
    other classes: a sure teacher hardly teaches what those are like. Here each part has its own weight.

    Parameters
    ----------
    student_logits, teacher_logits : (images, classes), 3 classes or more for the second part to say anything.
    labels : the true classes, int64 (images,).
    target, others : weights of the two parts; `kd` has 1, and 1 minus the teacher's probability of the label.
    """
    _check(student_logits, teacher_logits, temperature)
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
    return temperature**2 * (target * _divergence(*whole) + others * _divergence(*among))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, mean over the images."""
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits "
            f"{tuple(teacher_logits.shape)}: (images, classes) of the same images and classes is needed"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}: a number above 0 is needed, such as 4")
