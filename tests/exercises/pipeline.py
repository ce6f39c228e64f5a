"""Answers to the exercises of 06_pipeline."""

import math

import numpy as np
import torch
from torch.nn import functional

from nnc_utils import batch_norm, pipeline
from nnc_utils.pruning import channel_removal, channels


def narrower(network, images, labels, *, macs, multiple, score="fisher", fix=True, norm=True, first=False):
    scores = channels.scores(network, score, images=images, labels=labels)
    kept = channels.within_macs(network.spec, scores, macs=macs, multiple=multiple)
    if first:
        network = batch_norm.reestimate(network, images)
    removed = channel_removal.remove_channels(network, kept)
    narrow = channels.compensated(network, kept, images) if fix else removed
    return batch_norm.reestimate(narrow, images) if norm else narrow


def pruned(**other):
    """`narrower` with other options than it is given."""
    return lambda *given, **options: narrower(*given, **options | other)


def few_for_norm(network, images, labels, **options):
    narrow = narrower(network, images, labels, **options, norm=False)
    return batch_norm.reestimate(narrow, images[:16])


def twice_the_budget(*given, macs, multiple):
    return narrower(*given, macs=2 * macs, multiple=multiple)


def entropy_and_divergence(*, student_logits, teacher_logits, labels, temperature, alpha):
    hard = -student_logits.log_softmax(1).gather(1, labels[:, None]).mean()
    p = (teacher_logits / temperature).softmax(1)
    cross = functional.cross_entropy(student_logits / temperature, p)
    return (1 - alpha) * hard + alpha * temperature**2 * (cross + (p * p.log()).sum(1).mean())


def mixed(
    *, factor=lambda t: t**2, divisor=lambda logits: len(logits), swap=False, soften=True, exchange=False
):
    def loss(*, student_logits, teacher_logits, labels, temperature, alpha):
        hard = functional.cross_entropy(student_logits, labels)
        both = (teacher_logits, student_logits) if swap else (student_logits, teacher_logits)
        log_q, log_p = ((z / (temperature if soften else 1)).log_softmax(1) for z in both)
        soft = functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / divisor(log_q)
        a = 1 - alpha if exchange else alpha
        return (1 - a) * hard + a * factor(temperature) * soft

    return loss


def by_exponent(file_bytes, budget, low, high, steps=6):
    a, b = math.log10(low), math.log10(high)
    if file_bytes(high) > budget:
        raise ValueError(f"{budget} bytes cannot be met")
    for _ in range(steps):
        middle = (a + b) / 2
        if file_bytes(10**middle) > budget:
            a = middle
        else:
            b = middle
    return 10**b


def bisected(middle_of=lambda a, b: (a * b) ** 0.5, give=lambda low, high: high, turned=False, refuse=True):
    def price_for(file_bytes, budget, low, high, steps=6):
        if refuse and file_bytes(high) > budget:
            raise ValueError(f"{budget} bytes cannot be met" if refuse is True else "impossible")
        for _ in range(steps):
            middle = middle_of(low, high)
            fits = (file_bytes(middle) <= budget) != turned
            low, high = (low, middle) if fits else (middle, high)
        return give(low, high)

    return price_for


def scanned(file_bytes, budget, low, high, steps=6):
    return next(x for x in np.geomspace(low, high, 500) if file_bytes(x) <= budget)


def factors(sizes):
    dense, half, pruned, rounded = (sizes[x] for x in ("dense", "dense, fp16", "pruned", "rounded only"))
    return (dense / rounded) * (half / pruned)


def near(codes, tolerance=1e-4):
    return ((codes - codes.round()).abs() <= tolerance).float().mean()


def by_channel(weight, scale):
    return np.mean([float(near(row / step)) for row, step in zip(weight, scale)])


def below_is_off(weight, scale):
    return ((weight.flatten(1) / scale[:, None]) % 1 <= 1e-4).float().mean()


WIDTHS = [0.005 * step for step in range(1, 201)]


def from_below(macs_of, budget):
    fit = [width for width in WIDTHS if macs_of(width) <= budget]
    return fit[-1] if fit else WIDTHS[0]


def in_proportion(stages, epochs, total):
    whole = sum(epochs[stage] for stage in stages if stage in epochs)
    return {stage: total * epochs[stage] / whole if stage in epochs else 0.0 for stage in stages}


def trained(scale):
    """Each stage's own length times a factor, from the sum of the lengths and the total."""
    return lambda stages, epochs, total: {
        stage: scale(sum(epochs[s] for s in stages), total) * epochs[stage] for stage in stages
    }


def rest_to_last(stages, epochs, total):
    own = {stage: epochs[stage] for stage in stages}
    return own | {stages[-1]: own[stages[-1]] + total - sum(own.values())}


def rest_halved(stages, epochs, total):
    rest = total - sum(epochs[stage] for stage in stages)
    return {stage: epochs[stage] + rest / len(stages) for stage in stages}


def one_by_default(stages, epochs, total):
    own = {stage: epochs.get(stage, 1.0) for stage in stages}
    return {stage: total * length / sum(own.values()) for stage, length in own.items()}


RIGHT = {
    "6.1": [pipeline.prune],
    "6.2": [entropy_and_divergence],
    "6.3": [by_exponent],
    "6.4": [factors],
    "6.5": [by_channel],
    "6.6": [from_below],
    "6.7": [in_proportion],
}
WRONG = {
    "6.1": [
        (lambda *given, **options: channel_removal.groups(given[0].spec), "A network is asked for"),
        (twice_the_budget, "are allowed"),
        (pruned(multiple=1), "multiples of 4"),
        (pruned(score="l1"), "Fisher scores"),
        (pruned(fix=False), "not compensated"),
        (pruned(norm=False), "wide network's statistics"),
        (pruned(first=True), "batch-norm comes last"),
        (few_for_norm, "all these images"),
    ],
    "6.2": [
        (mixed(factor=lambda t: 1, divisor=torch.numel, exchange=True), "which term α weighs"),
        (mixed(factor=lambda t: 1), "T² is missing: softened"),
        (mixed(factor=lambda t: t), "square of T"),
        (mixed(divisor=torch.numel), "divide by the images alone"),
        (mixed(factor=lambda t: 1, divisor=torch.numel), "Two bugs are left"),
        (mixed(divisor=lambda logits: 1), "sum over the batch"),
        (mixed(swap=True), "swapped"),
        (mixed(soften=False), "before the softmax"),
    ],
    "6.3": [
        (bisected(give=lambda low, high: low), "return the end that fits"),
        (bisected(turned=True), "the wrong way"),
        (bisected(lambda a, b: (a + b) / 2), "of a log scale"),
        (bisected(refuse=False), "raise a ValueError"),
        (bisected(refuse="without the budget"), "does not name the budget"),
        (scanned, "You rounded"),
        (lambda file_bytes, *given: file_bytes(bisected()(file_bytes, *given)), "number of bytes"),
    ],
    "6.4": [
        (lambda x: x["dense"] / x["rounded only"] * x["dense"] / x["pruned"], "counts twice"),
        (lambda x: x["dense, fp16"] / x["rounded only"] * x["dense, fp16"] / x["pruned"], "in neither"),
        (lambda x: x["dense"] / x["rounded only"] + x["dense, fp16"] / x["pruned"], "you add them"),
        (lambda x: x["dense"] / x["rounded only"] * x["dense"] / x["pruned"] / 2, "does not halve"),
        (lambda x: 1 / factors(x), "Times smaller"),
        (lambda x: x["dense"] / x["pruned, distilled, rounded"], "That is measured"),
    ],
    "6.5": [
        (lambda weight, scale: near(weight / scale.max()), "one for all"),
        (lambda weight, scale: near(weight / scale.view(1, -1, 1, 1)), "along the inputs"),
        (lambda weight, scale: 1 - by_channel(weight, scale), "has left its integers"),
        (lambda weight, scale: 100 * by_channel(weight, scale), "not percent"),
        (below_is_off, "to either side"),
        (lambda weight, scale: near(weight / scale.view(-1, *[1] * (weight.ndim - 1)), 0.1), "has left it"),
        (lambda weight, scale: near(weight / scale.view(-1, 1, 1, 1)), "Of a linear layer"),
    ],
    "6.6": [
        (lambda macs_of, budget: budget / macs_of(1.0), "square of the width"),
        (lambda macs_of, budget: (budget / macs_of(1.0)) ** 0.5, "Only about"),
        (lambda macs_of, budget: from_below(macs_of, budget) + 0.005, "MACs, at most"),
        (lambda macs_of, budget: WIDTHS[0], "That is the narrowest"),
        (lambda macs_of, budget: from_below(macs_of, budget - 1), "exactly the MACs"),
        (lambda macs_of, budget: macs_of(from_below(macs_of, budget)), "not its MACs"),
        (
            lambda macs_of, budget: next((x for x in WIDTHS[::-1] if macs_of(x) <= budget), 1.0),
            "no width fits",
        ),
    ],
    "6.7": [
        (trained(lambda own, total: 1), "train less than"),
        (lambda stages, epochs, total: dict.fromkeys(stages, total / len(stages)), "twice as long"),
        (rest_to_last, "each gets its share"),
        (rest_halved, "What is left is halved"),
        (trained(lambda own, total: own / total), "upside down"),
        (trained(lambda own, total: total), "`total` itself"),
        (lambda stages, epochs, total: in_proportion(epochs, epochs, total), "you give"),
        (lambda stages, epochs, total: in_proportion(stages, epochs, 2.0), "stands alone"),
        (one_by_default, "without an entry"),
    ],
}
