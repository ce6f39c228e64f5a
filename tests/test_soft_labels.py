"""Soft labels against their formulas in NumPy, finite differences, and the bugs that make them do nothing."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch.nn import functional

from nnc_utils.distillation.soft_labels import dkd, kd

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


@pytest.mark.filterwarnings("ignore:reduction")  # it is one of the bugs
@pytest.mark.parametrize(
    "bug",
    [
        lambda s, t: 16 * functional.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="mean"),
        lambda s, t: functional.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean"),
        lambda s, t: kd(student_logits=t, teacher_logits=s, temperature=4.0),
        lambda s, t: kd(student_logits=s, teacher_logits=t.roll(1, 0), temperature=4.0),
    ],
    ids=["mean over classes, too", "T**2 left out", "logits swapped", "another image's teacher"],
)
def test_the_oracle_tells_the_known_silent_bugs_apart(bug):
    """What the formula's test would say if `kd` were written like this."""
    assert bug(STUDENT, TEACHER).item() != pytest.approx(formula(4.0), rel=0.02)


def test_softening_leaves_the_gradient_as_large():
    """For high T it is (student - teacher) / (images * classes), of logits without their means."""
    student = STUDENT.clone().requires_grad_()
    kd(student_logits=student, teacher_logits=TEACHER, temperature=1e4).backward()
    centred = [logits - logits.mean(1, keepdim=True) for logits in (STUDENT, TEACHER)]
    expected = (centred[0] - centred[1]) / STUDENT.numel()
    torch.testing.assert_close(student.grad, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [kd, lambda **about: dkd(labels=LABELS, **about)], ids=["kd", "dkd"])
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


def test_the_two_parts_add_up_to_plain_soft_labels():
    """KL = target part + (1 - the teacher's probability of the right class) * the others' (equation 6)."""
    doubt = 1 - np.exp(log_softmax(TEACHER.numpy() / 3, 1))[np.arange(6), LABELS]
    total = 0
    for row in range(6):
        one = {name: x[row : row + 1] for name, x in {**PAIR, "labels": LABELS}.items()}
        total += dkd(**one, temperature=3.0, target=1.0, others=float(doubt[row])).item()
    assert total / 6 == pytest.approx(kd(**PAIR, temperature=3.0).item(), rel=1e-10)


def test_what_is_refused():
    with pytest.raises(ValueError, match="temperature is 0: a number above 0 is needed, such as 4"):
        kd(**PAIR, temperature=0)
    with pytest.raises(ValueError, match=r"student_logits have shape \(6, 5\), teacher_logits \(6, 4\)"):
        kd(student_logits=STUDENT, teacher_logits=TEACHER[:, :4], temperature=4.0)
    with pytest.raises(TypeError):
        kd(STUDENT, TEACHER, temperature=4.0)  # which is whose cannot be left to the order
