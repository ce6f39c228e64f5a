"""Checkers of 04_distillation: soft labels, a loss with bugs, correlations, features and cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils.distillation import soft_labels as package
from nnc_utils.exercises import exercise, expect, judge, same, tell

DRAW = torch.Generator().manual_seed(0)
OURS, THEIRS = (2 * torch.randn(3, 5, generator=DRAW) for _ in range(2))  # logits of student and teacher
FEATURES = torch.randn(3, 2, 3, 5, generator=DRAW)  # some are negative; height and width differ
FEATURES[1] = 0


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """How far q is from p, the mean over the rows of probabilities."""
    return (p * (p / q).log()).sum(1).mean()


@exercise("4.1")
def soft_term(soft_labels: Callable) -> None:
    """`soft_labels` (student logits, teacher logits, T) -> T² times the divergence."""
    q, p = ((logits.double() / 4).softmax(1) for logits in (OURS, THEIRS))
    right = 16 * divergence(p, q)
    wrong = [
        (right / 16, "T² is missing: without it the teacher's weight falls as T grows."),
        (right / 4, "That is T times the divergence: the gradient shrinks with T², not with T."),
        (right / 5, "You divide by the number of classes, too: sum over them, and average over the images."),
        (right * 3, "That is the sum over the images: their mean is asked for."),
        (16 * divergence(q, p), "Teacher and student are swapped: the teacher's p weighs the logarithms."),
        (
            16 * (p * (p.log() - q)).sum(1).mean(),
            "`kl_div` takes the logarithm of the student's probabilities, then the teacher's probabilities.",
        ),
        (
            -16 * (p * q.log()).sum(1).mean(),
            "That is the cross-entropy: the divergence has the teacher's p log p, too.",
        ),
        (
            16 * divergence(THEIRS.double().softmax(1), q),
            "The temperature softens both networks: your teacher is as sure as before.",
        ),
        (
            16 * divergence(THEIRS.double().softmax(1), OURS.double().softmax(1)),
            "You multiply by T², but divide no logits by T.",
        ),
        (
            16 * divergence((THEIRS.double() / 4).softmax(0), (OURS.double() / 4).softmax(0)),
            "Your softmax runs over the images: dimension 1 holds the classes.",
        ),
    ]
    given = soft_labels(OURS, THEIRS, 4.0)
    said = "T² times the sum over classes of p · log(p / q), mean over images, is asked for."
    judge(given, right, said, wrong)
    sure = torch.tensor([[200.0, 0, 0], [0, 0, 0]])
    given = torch.as_tensor(soft_labels(sure, sure.roll(1, 1), 1.0))
    expect(
        bool(given.isfinite().all()),
        "With logits of 200 a probability rounds to 0, and its logarithm is not finite: use `log_softmax`.",
    )
    same(given, 100.0, "Two images, one with logits of 200 for different classes: 200 / 2 is asked for.")


def networks() -> tuple[nn.Module, nn.Module]:
    """A tiny student and a tiny teacher in train mode, with batch-norm; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).train() for _ in range(2)]
    made[1][2].running_mean.fill_(0.5)
    return made[0], made[1]


@exercise("4.2")
def whole_loss(distillation_loss: Callable) -> None:
    """`distillation_loss` (student, teacher, inputs, labels, T, alpha) -> the loss of section 2."""
    inputs = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    student, teacher = networks()
    with torch.no_grad():
        ours, theirs = copy.deepcopy(student)(inputs), copy.deepcopy(teacher).eval()(inputs)
        hard, softened = (functional.cross_entropy(logits, labels) for logits in (ours, ours / 3))
        soft = package.kd(student_logits=ours, teacher_logits=theirs, temperature=3.0)
        swapped = package.kd(student_logits=theirs, teacher_logits=ours, temperature=3.0)
    given = distillation_loss(student, teacher, inputs, labels, 3.0, 0.7)
    expect(isinstance(given, Tensor), "Return the loss as a tensor: a training needs its gradient.")
    expect(
        int(teacher[2].num_batches_tracked) == 0,
        "Your teacher is in train mode: its batch-norm normalizes with the batch, and its statistics drift.",
    )
    expect(student.training, "You put the student into eval mode: it is the one that is trained.")
    expect(given.requires_grad, "No gradient reaches the student: only the teacher's pass goes without.")
    given.backward()
    expect(
        all(parameter.grad is None for parameter in teacher.parameters()),
        "A gradient flows into the teacher: its pass belongs under `torch.no_grad()`.",
    )
    given = given.detach()
    wrong = [
        (0.7 * hard + 0.3 * soft, "α is on the wrong term: it is the share of the soft labels."),
        (0.3 * softened + 0.7 * soft, "The label term has T = 1: do not divide its logits."),
        (0.3 * hard + 0.7 * swapped, "Student and teacher are swapped in the soft term."),
        (0.3 * hard + 0.7 * 9 * soft, "The soft term has its T² already: `soft_labels` multiplies by it."),
        (hard + 0.7 * soft, "The label term has no weight: it is 1 − α."),
        (0.7 * soft, "The label term is missing."),
    ]
    judge(given, 0.3 * hard + 0.7 * soft, "(1 − α) · label term + α · soft term is asked for.", wrong)
    given = distillation_loss(*networks(), inputs, labels, 3.0, 1.0).detach()
    same(given, soft, "With α = 1 the teacher alone speaks.")


@exercise("4.3")
def without_the_label(other_classes: Callable) -> None:
    """`other_classes` (logits, labels, T) -> probabilities among the other classes."""
    logits, labels = OURS[:2].double(), torch.tensor([0, 4])
    mask = functional.one_hot(labels, 5).bool()
    p = (logits / 2).softmax(1)
    right = p.masked_fill(mask, 0) / (1 - p[[0, 1], labels])[:, None]
    at_one = logits.softmax(1).masked_fill(mask, 0)
    wrong = [
        (p, "The label's class is still there: its probability is to be 0."),
        (p * ~mask, "Each row is to sum to 1: after the label's class is gone, the others share the whole."),
        ((logits / 2).masked_fill(mask, 0).softmax(1), "A logit of 0 does not remove a class: e⁰ is 1."),
        (mask, "Your mask is inverted: only the label's class is left."),
        (at_one / at_one.sum(1, keepdim=True), "The temperature is missing."),
    ]
    given = other_classes(logits, labels, 2.0)
    judge(given, right, "The softmax of logits / T over all classes but the label's is asked for.", wrong)
    given = other_classes(torch.tensor([[200.0, 0, 0]]), torch.tensor([0]), 1.0)
    expect(
        bool(torch.as_tensor(given).isfinite().all()),
        "Of a sure network 1 − p_y is 0, and you divide by it: remove the class before the softmax.",
    )
    same(given, [[0, 0.5, 0.5]], "A sure network whose other logits are 0 has ½ for each of them.")


@exercise("4.4")
def rows_correlate(pearson: Callable) -> None:
    """`pearson` (a, b) -> the correlation of each row."""
    a, b = OURS.double(), THEIRS.double()
    right = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(a, b)])
    left_a, left_b = (x - x.mean(1, keepdim=True) for x in (a, b))
    columns = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a.T, b.T)]
    wrong = [
        (
            functional.cosine_similarity(a, b, dim=1),
            "Subtract each row's mean first: that is the cosine of the rows as they are.",
        ),
        (
            functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=1),
            "Each row has a mean of its own: you subtract that of the whole tensor.",
        ),
        (torch.stack(columns), "You correlate the columns: each row of a goes with the same row of b."),
        ((left_a * left_b).mean(1), "That is the covariance: divide by the deviations."),
        ((left_a * left_b).sum(1), "The sum of the products has no scale yet: give both rows length 1."),
        (right * 4 / 5, "Your mean divides by n, your deviations by n − 1: divide all by the same."),
        (1 - right, "That is the loss: r itself is asked for."),
        (right.mean(), "A number for each row is asked for, not their mean."),
    ]
    given = pearson(a, b)
    judge(given, right, "Pearson's r of each row of a with the same row of b is asked for.", wrong)
    alike = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4]])
    given = pearson(alike, torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
    expect(
        bool(torch.as_tensor(given).isfinite().all()),
        "Values that are all alike have deviation 0, and you divide by it: return 0 for such a row.",
    )
    same(given, [0.0, -1.0], "r is 0 for a row whose values are all alike, and −1 for one that falls.")


@exercise("4.5")
def alike(relations: Callable) -> None:
    """`relations` (features) -> which images are alike, rows of length 1."""
    features = FEATURES[[0, 2]].double()
    dot = torch.tensor([[(one * other).sum() for other in features] for one in features]).double()
    lengths = dot.square().sum(1).sqrt()
    pooled = features.mean((2, 3)) @ features.mean((2, 3)).T
    columns = features.flatten(1).T @ features.flatten(1)
    wrong = [
        (dot, "G has no lengths yet: divide each row by its length."),
        (
            dot / (dot.diag()[:, None] * dot.diag()).sqrt(),
            "You give the features length 1: the rows of G are to have it.",
        ),
        (dot / lengths, "Each column has length 1: each row is asked for."),
        (dot / dot.square().sum().sqrt(), "The whole matrix has length 1: each row is asked for."),
        (
            functional.normalize(pooled, dim=1),
            "You average over the pixels: each pixel of each channel is a number of Q.",
        ),
        (
            functional.normalize(columns, dim=1),
            "That is QᵀQ, features with features: images with images is QQᵀ.",
        ),
        (dot / dot.sum(1, keepdim=True), "Each row sums to 1: the sum of its squares is to be 1."),
    ]
    given = relations(features)
    judge(given, dot / lengths[:, None], "G = QQᵀ, each row divided by its length, is asked for.", wrong)
    given = torch.as_tensor(relations(FEATURES))
    expect(
        bool(given.isfinite().all()), "An image whose features are all 0 has a row of zeros: you divide by 0."
    )
    expect(given.shape == (3, 3) and not given[1].any(), "The row of an image without features is zeros.")


@exercise("4.6")
def where_active(attention: Callable) -> None:
    """`attention` (features) -> maps of pixels, length 1."""
    features = FEATURES[[0, 2]].double()
    squares = features.square().mean(1).flatten(1)
    wrong = [
        (
            functional.normalize(features.mean(1).flatten(1), dim=1),
            "You average signed values: +1 and −1 are both active. Square first.",
        ),
        (
            functional.normalize(features.abs().mean(1).flatten(1), dim=1),
            "That is the mean of absolute values: A has squares.",
        ),
        (squares, "The maps have no length 1 yet."),
        (squares / squares.sum(1, keepdim=True), "Each map sums to 1: the sum of its squares is to be 1."),
        (squares.softmax(1), "That is a softmax: divide each map by its length."),
        (
            functional.normalize(squares, dim=0),
            "You give length 1 over the images: each image's own map is to have it.",
        ),
        (
            functional.normalize(features.square().mean((2, 3)), dim=1),
            "You average over the pixels: the channels are to go.",
        ),
        (squares / squares.square().sum().sqrt(), "All maps together have length 1: each has to."),
    ]
    given = attention(features)
    tell(given, wrong)
    lengths = squares.square().sum(1, keepdim=True).sqrt()
    same(
        given, squares / lengths, "Mean square over the channels, a row of pixels of length 1, is asked for."
    )
    given = torch.as_tensor(attention(FEATURES))
    expect(bool(given.isfinite().all()), "A stage that is active nowhere has length 0, and you divide by it.")
    expect(given.shape == (3, 15) and not given[1].any(), "A map of zeros stays one.")


@exercise("4.7")
def within_budget(choose: Callable) -> None:
    """`choose` (budget, student's MACs, teacher's MACs, copies) -> the way, and its epochs."""

    def chosen(budget: float) -> tuple[str, float]:
        given = choose(budget, 10, 60, 4)
        expect(
            isinstance(given, tuple) and len(given) == 2 and given[0] in ("online", "cached"),
            'Two things are asked for: "online" or "cached", and the number of epochs.',
        )
        return given[0], float(given[1])

    way, epochs = chosen(900)  # 900 / (30 + 60) = 10 online; (900 - 4 * 60) / 30 = 22 cached
    known = [
        (30, "The teacher is not free: it sees each copy once, or online each image in each epoch."),
        (28, "The teacher sees each of the copies once, not one of them."),
        (66, "The student goes forward and backward: about three times its MACs."),
        (10, "A cache is paid for once, and leaves more epochs here than an online teacher."),
    ]
    tell(epochs, known)
    expect(way == "cached", "The cache leaves more epochs here: name it.")
    same(epochs, 22.0, "What the cache leaves of the budget, divided by the student's epoch, is asked for.")
    way, epochs = chosen(270)  # 3 online, 1 cached
    expect(abs(epochs - 270 / 210) > 1e-6, "An online teacher goes forward only: it learns nothing.")
    expect(way == "online", "Of a small budget the cache takes nearly all: online leaves more epochs.")
    same(epochs, 3.0, "Budget ÷ (3 × student + teacher) is asked for.")
    way, epochs = chosen(90)
    expect(
        way == "online" and abs(epochs - 1) < 1e-6,
        "Where the budget pays for no cache, online is what is left.",
    )
