"""Answers to the exercises of 05_architecture_search."""

import itertools
import math

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from scipy.optimize import nnls


def counted(widths, ways, may_be_missing=False):
    fillings = sum(math.prod(ways[:depth]) for depth in range(1, len(ways) + 1))
    return widths * fillings + (1 if may_be_missing else 0)


def entry(term, architecture):
    return term.values[tuple(np.array(architecture)[list(term.places)])]


def summed(terms, architecture, has=lambda number, when: number in when, take=entry):
    return sum(take(term, architecture) for term in terms if has(architecture[term.depth], term.when))


def backwards(term, architecture):
    return np.flip(term.values)[tuple(architecture[place] for place in term.places)]


def fit(inputs, times, *, weights=None, target=None, undo=True, solve=nnls):
    scale, weights = inputs.max(0), 1 / times if weights is None else weights
    target = times * weights if target is None else target
    coefficients = solve(inputs / scale * weights[:, None], target)[0]
    return coefficients / scale if undo else coefficients


def unconstrained(inputs, target):
    return np.linalg.lstsq(inputs, target, rcond=None)


def probabilities(z):
    return z.softmax(1).detach()


def sandwich(network, images, labels, others, *, target=probabilities, reduce=sum, teacher=lambda z: z):
    """Cross-entropy as a sum over classes, written out."""
    z = teacher(network(images))
    soft = target(z)
    largest = -z.log_softmax(1)[range(len(z)), labels].mean()
    rest = [-(soft * network(images, other).log_softmax(1)).sum(1).mean() for other in others]
    return reduce([largest, *rest])


def one_hot_labels(network, images, labels, others):
    return sandwich(network, images, labels, others, target=lambda z: F.one_hot(labels, z.shape[1]).float())


def hard(z):
    return F.one_hot(z.argmax(1), z.shape[1]).float()


def divergences(network, images, labels, others):
    z = network(images)
    kl = [
        F.kl_div(network(images, other).log_softmax(1), probabilities(z), reduction="batchmean")
        for other in others
    ]
    return F.cross_entropy(z, labels) + sum(kl)


def swapped(network, images, labels, others):
    z = network(images)
    rest = [F.cross_entropy(probabilities(z), network(images, other)) for other in others]
    return F.cross_entropy(z, labels) + sum(rest)


def queries(top, sure, whole=math.ceil):
    return whole(round(math.log(1 - sure) / math.log(1 - top), 9))


def policy(chances, chosen, matters, advantages, *, reduce=np.mean, direction="one-hot - p"):
    rows = []
    for numbers, exists, advantage in zip(chosen, matters, advantages):
        one_hot = np.zeros_like(chances)
        one_hot[range(len(numbers)), numbers] = 1
        p = (one_hot * chances).sum(1, keepdims=True)
        step = {
            "one-hot - p": one_hot - chances,
            "one-hot": one_hot,
            "of p": p * (one_hot - chances),
            "by p": one_hot / chances,
            "of all": one_hot - 1 / chances.shape[1],
        }[direction]
        rows.append(advantage * exists[:, None] * step)
    return reduce(rows, axis=0)


def masked_early(chances, chosen, matters, advantages):
    one_hot = np.eye(chances.shape[1])[chosen] * matters[..., None]
    return (advantages[:, None, None] * (one_hot - chances)).mean(0)


def by_pairs(x, y, *, below=None):
    """Kendall's tau by loops over the pairs."""
    concordant = discordant = of_x = of_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        product = (x[i] - x[j]) * (y[i] - y[j])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        of_x, of_y = of_x + (x[i] != x[j]), of_y + (y[i] != y[j])
    if below:
        return below(concordant, discordant, of_x, of_y, len(x))
    return (concordant - discordant) / math.sqrt(of_x * of_y)


def ties(x, y):
    same_x, same_y = (np.subtract.outer(values, values) == 0 for values in (x, y))
    return 2 * by_pairs(x, y, below=lambda c, d, *_: c - d) / math.sqrt(same_x.sum() * same_y.sum())


RIGHT = {
    "5.1": [counted],
    "5.2": [summed],
    "5.3": [fit],
    "5.4": [sandwich],
    "5.5": [queries],
    "5.6": [policy],
    "5.7": [by_pairs],
}
WRONG = {
    "5.1": [
        (lambda widths, ways, missing=False: widths * math.prod(ways) + missing, "deepest stages alone"),
        (lambda widths, ways, missing=False: widths * sum(ways) + missing, "they do not add"),
        (lambda widths, ways, missing=False: widths * len(ways) * math.prod(ways), "several times"),
        (lambda widths, ways, missing=False: counted(1, ways, missing), "also has a width"),
        (lambda widths, ways, missing=False: counted(widths, ways), "one choice more"),
        (lambda widths, ways, missing=False: widths * counted(1, ways, missing), "has no width"),
        (lambda widths, ways, missing=False: widths * (ways[0] + math.prod(ways[:2])), "widths · ways"),
        (
            lambda widths, ways, missing=False: (
                widths * sum(math.prod(ways[:d]) for d in range(1, 3)[: len(ways)])
            ),
            "Three blocks",
        ),
    ],
    "5.2": [
        (lambda terms, a: summed(terms, a, lambda number, when: True), "all tables"),
        (lambda terms, a: summed(terms, a, lambda number, when: number not in when), "does not have"),
        (lambda terms, a: summed(terms, a, lambda number, when: number > when.start), "holds its start"),
        (lambda terms, a: summed(terms, a, lambda number, when: number >= when.start), "also ends"),
        (lambda terms, a: summed(terms, a, take=lambda term, _: term.values.mean()), "mean of each table"),
        (
            lambda terms, a: sum(entry(term, a) for term in terms if term.depth in term.when),
            "is a place",
        ),
        (lambda terms, a: summed(terms[:1], a), "in the loop"),
        (lambda terms, a: summed(terms, a, take=backwards), "three stages"),
    ],
    "5.3": [
        (lambda inputs, times: fit(inputs, times, weights=np.ones(len(times))), "absolute errors"),
        (lambda inputs, times: fit(inputs, times, target=times), "the target is not"),
        (lambda inputs, times: fit(inputs, times, undo=False), "by the scale"),
        (lambda inputs, times: (times[:, None] / inputs).mean(0), "mean of t / x"),
        (lambda inputs, times: fit(inputs, times, weights=times**-0.5), "divide by √t"),
        (lambda inputs, times: fit(inputs, times, solve=unconstrained), "negative coefficient"),
        (lambda inputs, times: fit(inputs, times, solve=unconstrained).clip(0), "non-negative coefficients"),
    ],
    "5.4": [
        (lambda n, x, y, others: F.cross_entropy(n(x), y), "learn nothing"),
        (
            lambda n, x, y, others: sandwich(n, x, y, others, reduce=lambda ls: sum(ls[1:])),
            "loss from the labels",
        ),
        (lambda n, x, y, others: sandwich(n, x, y, others, reduce=lambda ls: sum(ls) / len(ls)), "a third"),
        (
            lambda n, x, y, others: sandwich(
                n, x, y, others, reduce=lambda ls: ls[0] + sum(ls[1:]) / max(len(ls) - 1, 1)
            ),
            "averaged",
        ),
        (divergences, "Kullback-Leibler"),
        (one_hot_labels, "learn from the labels"),
        (lambda n, x, y, others: sandwich(n, x, y, others, target=hard), "hard classes"),
        (lambda n, x, y, others: sandwich(n, x, y, others, target=lambda z: z.detach()), "no probabilities"),
        (swapped, "swapped"),
        (
            lambda n, x, y, others: sandwich(n, x, y, others, target=lambda z: probabilities(z.T).T),
            "over the images",
        ),
        (
            lambda n, x, y, others: sandwich(n, x, y, others, target=lambda z: z.softmax(1)),
            "please the others",
        ),
        (
            lambda n, x, y, others: sandwich(n, x, y, others, teacher=torch.Tensor.detach),
            "which tensor did you detach",
        ),
        (lambda n, x, y, others: sandwich(n, x, y, others).detach(), "has no gradient"),
        (
            lambda n, x, y, others: sandwich(n, x, y, others, target=lambda z: (z.detach() / 4).softmax(1)),
            "Another loss",
        ),
    ],
    "5.5": [
        (lambda top, sure: math.ceil(1 / top), "on average"),
        (lambda top, sure: queries(top, sure, math.floor), "Round up"),
        (lambda top, sure: queries(top, sure, float), "Queries are whole"),
        (lambda top, sure: queries(1 - top, sure), "not topⁿ"),
        (lambda top, sure: queries(sure, top), "swap"),
        (lambda top, sure: queries(top, sure) + 1, "29 draws suffice"),
        (lambda top, sure: math.floor(math.log(1 - sure) / math.log(1 - top)) + 1, "that is enough"),
        (lambda top, sure: math.ceil(sure / top) + 1, "(1 − 0.1)ⁿ"),
    ],
    "5.6": [
        (lambda *given: -policy(*given), "sign"),
        (lambda p, c, m, a: policy(p, c, np.ones_like(m), a), "multiply by `matters`"),
        (lambda *given: policy(*given, reduce=np.sum), "sum over the samples"),
        (lambda *given: policy(*given, direction="one-hot"), "subtract p"),
        (lambda *given: policy(*given, direction="of p"), "gradient of p"),
        (lambda *given: policy(*given, direction="by p"), "by the logits"),
        (lambda p, c, m, a: policy(p, c, m, np.ones(len(a))), "advantages are not in it"),
        (lambda *given: policy(*given, direction="of all"), "one-hot − p"),
        (masked_early, "still get −p"),
        (lambda p, c, m, a: len(m) * policy(p, c, m, a) / m.sum(0)[:, None], "samples in which"),
    ],
    "5.7": [
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: 2 * (c - d) / (n * (n - 1) / 2)),
            "pair twice",
        ),
        (lambda x, y: -by_pairs(x, y), "turned around"),
        (lambda x, y: by_pairs(x, y, below=lambda c, d, *_: c / (c + d)), "discordant ones"),
        (lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: 2 * (c - d) / n**2), "with itself"),
        (lambda x, y: np.corrcoef(x, y)[0, 1], "only their order"),
        (lambda x, y: scipy.stats.spearmanr(x, y).statistic, "of the ranks"),
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: (c - d) / (n * (n - 1) / 2)),
            "Ties still count",
        ),
        (lambda x, y: by_pairs(x, y, below=lambda c, d, *_: (c - d) / (c + d)), "either score"),
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: (c - d) / of_x),
            "ties of x alone",
        ),
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: (c - d) / of_y),
            "ties of y alone",
        ),
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: 2 * (c - d) / (of_x + of_y)),
            "With ties another",
        ),
        (lambda x, y: by_pairs(x, y) / 2, "once above"),
        (ties, "You count the ties"),
        (
            lambda x, y: by_pairs(x, y, below=lambda c, d, of_x, of_y, n: 2 * (c - d) / (4 * of_x * of_y)),
            "root is missing",
        ),
    ],
}
