"""Soft labels: the student learns the teacher's probabilities, not the right class alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def kd(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float, standardize: bool = False
) -> Tensor:
    """How far the student's softened probabilities are from the teacher's (Hinton et al., 2015).

    ``T**2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over the images. Gradients of a
    softened softmax shrink with 1 / T**2; the factor keeps them as large as those of a label term beside it.

    Parameters
    ----------
    student_logits, teacher_logits : (images, classes).
    temperature : T above 0; 1 leaves the probabilities as they are.
    standardize : each image's logits, of both, get mean 0 and deviation 1 first (Sun et al., 2024): the
        student need not be as sure as its teacher, only rank the classes as it does.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> float(kd(student_logits=logits, teacher_logits=logits, temperature=4.0))
    0.0
    """
    _check(student_logits, teacher_logits)
    both = [student_logits, teacher_logits]
    if standardize:
        both = [functional.layer_norm(logits, logits.shape[1:], eps=1e-6) for logits in both]
    return temperature**2 * _divergence(*(functional.log_softmax(logits / temperature, 1) for logits in both))


def dkd(
    *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature, target=1.0, others=8.0
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
    _check(student_logits, teacher_logits)
    right = functional.one_hot(labels, student_logits.shape[1]).bool()
    whole, among = [], []
    for logits in (student_logits, teacher_logits):
        log = functional.log_softmax(logits / temperature, 1)
        of_right = log.gather(1, labels[:, None]).squeeze(1)
        of_others = log.masked_fill(right, -torch.inf).logsumexp(1)
        whole.append(torch.stack([of_right, of_others], 1))
        among.append(functional.log_softmax((logits / temperature).masked_fill(right, -1e9), 1))
    return temperature**2 * (target * _divergence(*whole) + others * _divergence(*among))


def dist(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float, inter=2.0, intra=2.0
) -> Tensor:
    """How badly the student's softened probabilities correlate with the teacher's (Huang et al., 2022).

    ``T**2 * (inter * (1 - r of each image's classes) + intra * (1 - r of each class's images))`` with
    Pearson's r, means over images and over classes. What a student cannot match,
    such as how sure its teacher is, costs nothing as long as the order and the proportions are right.

    Parameters
    ----------
    student_logits, teacher_logits : (images, classes); `intra` says something from 3 images on.
    inter, intra : weights of the two correlations.
    """
    _check(student_logits, teacher_logits)
    student, teacher = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits))
    between, within = _correlation(student, teacher), _correlation(student.T, teacher.T)
    return temperature**2 * (inter * (1 - between).mean() + intra * (1 - within).mean())


def _correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's r of each row; 0 for a row whose values are all alike."""
    pair = (rows - rows.mean(1, keepdim=True) for rows in (ours, theirs))
    ours, theirs = (functional.normalize(rows, dim=1, eps=1e-6) for rows in pair)
    return (ours * theirs).sum(1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, mean over the images."""
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits "
            f"{tuple(teacher_logits.shape)}: (images, classes) of the same images and classes is needed"
        )
