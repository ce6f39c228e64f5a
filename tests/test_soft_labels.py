"""Soft labels against their formulas in NumPy and SciPy, and finite differences."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr, zscore

from nnc_utils.distillation.soft_labels import dist, dkd, kd

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
PAIR = {"student_logits": STUDENT, "teacher_logits": TEACHER}


def divergence(teacher, student):
    """KL of probabilities (classes,), in plain NumPy."""
    return sum(p * np.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0)


def formula(temperature, student=STUDENT, teacher=TEACHER):
    pairs = zip(teacher.numpy() / temperature, student.numpy() / temperature, strict=True)
    return temperature**2 * np.mean([divergence(softmax(t), softmax(s)) for t, s in pairs])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20])
def test_soft_labels_are_their_formula(temperature):
    assert kd(**PAIR, temperature=temperature).item() == pytest.approx(formula(temperature), rel=1e-12)


def test_standardized_logits_are_z_scores_and_how_sure_a_network_is_costs_nothing():
    student, teacher = (torch.from_numpy(zscore(logits.numpy(), axis=1)) for logits in (STUDENT, TEACHER))
    found = kd(**PAIR, temperature=2.0, standardize=True).item()
    assert found == pytest.approx(formula(2.0, student, teacher), rel=1e-5)
    surer = {"student_logits": 5 * TEACHER + 3, "teacher_logits": TEACHER, "temperature": 2.0}
    assert kd(**surer, standardize=True).item() < 1e-6 < kd(**surer).item()


def test_correlations_are_pearson_s():
    probabilities = [softmax(logits.numpy() / 4, 1) for logits in (STUDENT, TEACHER)]
    inter = np.mean([1 - pearsonr(ours, theirs)[0] for ours, theirs in zip(*probabilities, strict=True)])
    columns = zip(*(p.T for p in probabilities), strict=True)
    intra = np.mean([1 - pearsonr(ours, theirs)[0] for ours, theirs in columns])
    found = dist(**PAIR, temperature=4.0, inter=2.0, intra=3.0).item()
    assert found == pytest.approx(16 * (2 * inter + 3 * intra), rel=1e-9)
    nothing = torch.zeros(6, 5, requires_grad=True)  # a student that says nothing yet: no correlation
    value = dist(student_logits=nothing, teacher_logits=TEACHER.float(), temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(4) and nothing.grad.isfinite().all()


LOSSES = {"kd": kd, "dkd": lambda **about: dkd(labels=LABELS, **about), "dist": dist}
LOSSES["standardized"] = lambda **about: kd(**about, standardize=True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_gradients_zero_and_shifts(loss):
    def value(student):
        return loss(student_logits=student, teacher_logits=TEACHER, temperature=3.0)

    assert torch.autograd.gradcheck(value, STUDENT.clone().requires_grad_())
    assert value(TEACHER).item() == pytest.approx(0, abs=1e-12)
    assert value(STUDENT).item() > 0.1
    shift = torch.randn(6, 1, dtype=torch.float64, generator=GENERATOR)  # the same probabilities
    assert value(STUDENT + shift).item() == pytest.approx(value(STUDENT).item(), rel=1e-12)
    assert value(1e3 * STUDENT).isfinite()  # probabilities that underflow


def test_decoupled_is_its_formula():
    expected = 0
    rows = zip(STUDENT.numpy() / 2, TEACHER.numpy() / 2, LABELS.tolist(), strict=True)
    for student, teacher, label in rows:
        p, q = softmax(teacher), softmax(student)
        two = [np.array([x[label], 1 - x[label]]) for x in (p, q)]
        rest = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        expected += 1.5 * divergence(*two) + 7 * divergence(*rest)
    found = dkd(**PAIR, labels=LABELS, temperature=2.0, target=1.5, others=7.0)
    assert found.item() == pytest.approx(4 * expected / 6, rel=1e-12)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"student_logits have shape \(6, 5\), teacher_logits \(6, 4\)"):
        kd(student_logits=STUDENT, teacher_logits=TEACHER[:, :4], temperature=4.0)
    with pytest.raises(TypeError):
        kd(STUDENT, TEACHER, temperature=4.0)  # which is whose cannot be left to the order
