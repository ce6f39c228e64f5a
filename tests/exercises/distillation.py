"""Answers to the exercises of 04_distillation."""

import copy

import torch
from torch.nn import functional

from nnc_utils.distillation import soft_labels as package


def soft(s, t, T, *, factor=2, dim=1, softened=True, reduction="batchmean"):
    """A soft term with one thing changed."""
    log_q = (s / T).log_softmax(dim)
    p = (t / T if softened else t).softmax(dim)
    if reduction == "mean":
        return T**factor * functional.kl_div(log_q, p, reduction="sum") / p.numel()
    return T**factor * functional.kl_div(log_q, p, reduction=reduction)


def by_hand(s, t, T):
    q, p = (s / T).softmax(1), (t / T).softmax(1)
    return T**2 * (p * (p / q).log()).sum(1).mean()


def log_of_logits(s, t, T):
    log_q, log_p = ((x / T) - (x / T).logsumexp(1, keepdim=True) for x in (s, t))
    return T**2 * (log_p.exp() * (log_p - log_q)).sum() / len(s)


def loss(student, teacher, inputs, labels, T, alpha, **changed):
    """The whole loss with one thing changed."""
    student.train(changed.get("student_trains", True))
    teacher.train(changed.get("teacher_trains", False))
    with torch.set_grad_enabled(changed.get("teacher_learns", False)):
        theirs = teacher(inputs)
    with torch.set_grad_enabled(changed.get("student_learns", True)):
        ours = student(inputs)
    hard = functional.cross_entropy(ours / T if changed.get("softened") else ours, labels)
    pair = (theirs, ours) if changed.get("swapped") else (ours, theirs)
    soft_part = T ** changed.get("power", 0) * soft(*pair, T)
    return changed.get("label", 1 - alpha) * hard + changed.get("share", alpha) * soft_part


def with_a_copy(student, teacher, inputs, labels, T, alpha):
    theirs = copy.deepcopy(teacher).eval()(inputs).detach()
    ours = student(inputs)
    term = package.kd(student_logits=ours, teacher_logits=theirs, temperature=T)
    return functional.cross_entropy(ours, labels).lerp(term, alpha)


def change(**changed):
    return lambda *given: loss(*given, **changed)


def as_quoted(student, teacher, inputs, labels, T, alpha):
    """The loss with all five bugs, from the text of the exercise."""
    student_logits, teacher_logits = student(inputs).float(), teacher(inputs).float()
    hard = functional.cross_entropy(student_logits / T, labels)
    return alpha * hard + (1 - alpha) * soft(teacher_logits, student_logits, T)


def swapped_weights(student, teacher, inputs, labels, T, alpha):
    return loss(student, teacher, inputs, labels, T, alpha, label=alpha, share=1 - alpha)


def a_class_less(logits, labels, T):
    """Image by image, without the label's logit."""
    rows = torch.zeros_like(logits)
    for row, image, label in zip(rows, logits, labels.tolist()):
        left = [c for c in range(len(image)) if c != label]
        row[left] = (image[left] / T).softmax(0)
    return rows


def mask(logits, labels):
    return functional.one_hot(labels, logits.shape[1]).bool()


def divided(logits, labels, T):
    p = (logits / T).softmax(1).masked_fill(mask(logits, labels), 0)
    return p / p.sum(1, keepdim=True)


def centred(x, dim=1):
    return x - x.mean(dim, keepdim=True)


def products(a, b):
    return centred(a) * centred(b)


def of_rows(a, b):
    deviations = a.std(1, correction=0) * b.std(1, correction=0)
    return torch.where(deviations > 0, products(a, b).mean(1) / deviations.clamp(min=1e-9), 0.0)


def dot(features):
    return torch.einsum("ichw,jchw->ij", features, features)


def gram(features):
    product = dot(features)
    return product / product.norm(dim=1, keepdim=True).clamp(min=1e-9)


def unit(x, dim=1):
    return functional.normalize(x, dim=dim)


def summed(features):
    maps = (features**2).sum(1).reshape(len(features), -1)
    return maps / (maps**2).sum(1, keepdim=True).sqrt().clamp(min=1e-9)


def squares(features):
    return features.square().mean(1).flatten(1)


def better(online, cached):
    return max(("online", online), ("cached", cached), key=lambda pair: pair[1])


def compared(budget, student, teacher, copies):
    if budget > copies * (3 * student + teacher):
        return "cached", (budget - copies * teacher) / (3 * student)
    return "online", budget / (3 * student + teacher)


RIGHT = {
    "4.1": [log_of_logits],
    "4.2": [with_a_copy],
    "4.3": [a_class_less],
    "4.4": [of_rows],
    "4.5": [gram],
    "4.6": [summed],
    "4.7": [compared],
}
WRONG = {
    "4.1": [
        (lambda s, t, T: soft(s, t, T, factor=0), "T² is missing"),
        (lambda s, t, T: soft(s, t, T, factor=1), "T times the divergence"),
        (lambda s, t, T: soft(s, t, T, reduction="mean"), "number of classes"),
        (lambda s, t, T: soft(s, t, T, reduction="sum"), "sum over the images"),
        (lambda s, t, T: soft(t, s, T), "swapped"),
        (lambda s, t, T: soft(s, t, T, softened=False), "as sure as before"),
        (lambda s, t, T: T**2 * soft(s, t, 1), "divide no logits"),
        (lambda s, t, T: soft(s, t, T, dim=0), "over the images: dimension 1"),
        (
            lambda s, t, T: T**2 * functional.cross_entropy(s / T, (t / T).softmax(1)),
            "That is the cross-entropy",
        ),
        (
            lambda s, t, T: (
                T**2 * functional.kl_div((s / T).softmax(1), (t / T).softmax(1), reduction="batchmean")
            ),
            "takes the logarithm",
        ),
        (by_hand, "logits of 200"),
        (lambda s, t, T: (s - t).square().mean(), "p · log(p / q)"),
    ],
    "4.2": [
        (as_quoted, "its batch-norm normalizes with the batch"),
        (change(teacher_trains=True), "Your teacher is in train mode"),
        (change(student_trains=False), "the student into eval mode"),
        (change(student_learns=False), "No gradient reaches the student"),
        (change(teacher_learns=True), "gradient flows into the teacher"),
        (swapped_weights, "α is on the wrong term"),
        (change(softened=True), "has T = 1"),
        (change(swapped=True), "swapped in the soft term"),
        (change(power=2), "has its T² already"),
        (change(label=1), "has no weight"),
        (change(label=0), "label term is missing"),
        (change(share=1), "(1 − α) · label term"),
        (lambda *given: loss(*given).item(), "as a tensor"),
    ],
    "4.3": [
        (lambda x, y, T: (x / T).softmax(1), "still there"),
        (lambda x, y, T: (x / T).softmax(1) * ~mask(x, y), "sum to 1"),
        (lambda x, y, T: (x / T).masked_fill(mask(x, y), 0).softmax(1), "e⁰ is 1"),
        (lambda x, y, T: (x / T).masked_fill(~mask(x, y), -torch.inf).softmax(1), "inverted"),
        (lambda x, y, T: x.masked_fill(mask(x, y), -torch.inf).softmax(1), "temperature is missing"),
        (divided, "you divide by it"),
        (
            lambda x, y, T: (x / T).masked_fill(mask(x, y), -torch.inf).softmax(0),
            "all classes but the label's",
        ),
    ],
    "4.4": [
        (lambda a, b: functional.cosine_similarity(a, b, dim=1), "rows as they are"),
        (lambda a, b: functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=1), "the whole tensor"),
        (lambda a, b: functional.cosine_similarity(centred(a, 0), centred(b, 0), dim=0), "the columns"),
        (lambda a, b: products(a, b).mean(1), "That is the covariance"),
        (lambda a, b: products(a, b).sum(1), "no scale yet"),
        (lambda a, b: 1 - of_rows(a, b), "That is the loss"),
        (lambda a, b: of_rows(a, b).mean(), "not their mean"),
        (lambda a, b: products(a, b).mean(1) / (a.std(1) * b.std(1)), "by n − 1"),
        (lambda a, b: -of_rows(a, b), "Pearson's r of each row"),
        (lambda a, b: products(a, b).sum(1) / (centred(a).norm(dim=1) * centred(b).norm(dim=1)), "all alike"),
    ],
    "4.5": [
        (dot, "no lengths yet"),
        (lambda x: unit(x.flatten(1)) @ unit(x.flatten(1)).T, "You give the features length 1"),
        (lambda x: unit(dot(x), 0), "Each column"),
        (lambda x: dot(x) / dot(x).norm(), "The whole matrix"),
        (lambda x: unit(x.mean((2, 3)) @ x.mean((2, 3)).T), "average over the pixels"),
        (lambda x: unit(x.flatten(1).T @ x.flatten(1)), "QᵀQ"),
        (lambda x: dot(x) / dot(x).sum(1, keepdim=True), "sums to 1"),
        (lambda x: dot(x) / dot(x).norm(dim=1, keepdim=True), "you divide by 0"),
    ],
    "4.6": [
        (lambda x: unit(x.mean(1).flatten(1)), "signed values"),
        (lambda x: unit(x.abs().mean(1).flatten(1)), "absolute values"),
        (squares, "no length 1 yet"),
        (lambda x: squares(x) / squares(x).sum(1, keepdim=True), "sums to 1"),
        (lambda x: squares(x).softmax(1), "That is a softmax"),
        (lambda x: unit(squares(x), 0), "over the images"),
        (lambda x: unit(x.square().mean((2, 3))), "average over the pixels"),
        (lambda x: squares(x) / squares(x).norm(), "All maps together"),
        (lambda x: squares(x) / squares(x).norm(dim=1, keepdim=True), "active nowhere"),
        (lambda x: unit(x.square().mean(1)), "a row of pixels"),
    ],
    "4.7": [
        (lambda b, s, t, c: better(b / (3 * s + t), b / (3 * s)), "is not free"),
        (lambda b, s, t, c: better(b / (3 * s + t), (b - t) / (3 * s)), "not one of them"),
        (lambda b, s, t, c: better(b / (s + t), (b - c * t) / s), "forward and backward"),
        (lambda b, s, t, c: ("online", b / (3 * s + t)), "paid for once"),
        (lambda b, s, t, c: better(b / (3 * s + 3 * t), (b - c * t) / (3 * s)), "goes forward only"),
        (lambda b, s, t, c: ("cached", (b - c * t) / (3 * s)), "takes nearly all"),
        (lambda b, s, t, c: ("online", better(b / (3 * s + t), (b - c * t) / (3 * s))[1]), "name it"),
        (lambda b, s, t, c: better(b / (3 * s + t), abs(b - c * t) / (3 * s)), "pays for no cache"),
        (lambda b, s, t, c: max(b / (3 * s + t), (b - c * t) / (3 * s)), "Two things"),
    ],
}
