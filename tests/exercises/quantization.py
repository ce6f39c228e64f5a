"""Answers to the exercises of 02_quantization."""

import itertools

import torch
from torch.nn import functional

from nnc_utils import encoding
from nnc_utils.quantization import uniform


def affine(weights, bits, *, codes=0, widen=True, sign=1, rounded=round):
    low, high = (float(weights.min()), float(weights.max()))
    if widen:
        low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1 + codes)
    return scale, rounded(-sign * low / scale)


def quantizer(last=lambda bits: 2 ** (bits - 1) - 1, size=torch.abs, zero=0, **options):
    return lambda weights, bits, symmetric: (
        (float(size(weights).max()) / last(bits), zero) if symmetric else affine(weights, bits, **options)
    )


def from_above(weights, bits, symmetric):
    if symmetric:
        return 2 * torch.maximum(weights.max(), -weights.min()) / (2**bits - 2), 0
    low, high = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    return (high - low) / (2**bits - 1), 2**bits - 1 - round(high * (2**bits - 1) / (high - low))


def by(dims, size=torch.abs, reduce=torch.amax, codes=False, least=1e-9):
    """Rounds with a scale for each place that is left when these dimensions are reduced."""

    def rounded(weights, bits):
        own = dims if weights.ndim == 4 else 1
        scale = (reduce(size(weights), own, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=least)
        return (weights / scale).round() * (1 if codes else scale)

    return rounded


def per_channel(weights, bits):
    return encoding.decode(uniform.quantize(weights, bits=bits, per_channel=True))


def clusters(values, importance, codebook, *, choose=None, mean=None, empty=lambda level: level):
    """One round of k-means with a loop over the levels."""
    nearest = (values[:, None] - codebook).abs().argmin(1) if choose is None else choose(values, codebook)
    after = []
    for code, level in enumerate(codebook):
        own, counts = values[nearest == code], importance[nearest == code]
        weighted = (own * counts).sum() / counts.sum() if mean is None else mean(own, counts)
        after.append(weighted if counts.sum() > 0 else torch.as_tensor(empty(level), dtype=values.dtype))
    return torch.stack([level for level in after if not torch.isinf(level)])


def in_place(values, importance, codebook):
    codebook[:] = clusters(values, importance, codebook)
    return codebook


def above(values, codebook):
    return torch.bucketize(values, codebook)


def below(values, codebook):
    return torch.bucketize(values, codebook, right=True) - 1


def gradients(model, weight, images, labels):
    losses = functional.cross_entropy(model(images), labels, reduction="none")
    return torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])


def of_gradients(function):
    return lambda *given: function(gradients(*given))


def likeliest(model, weight, images, labels):
    return gradients(model, weight, images, model(images).argmax(1)).square().mean(0)


def target(sign=1, power=1, own=1):
    return lambda weights, errors, factor, j: (
        own * weights[:, j] + sign * (errors @ factor)[:, j] / factor[j, j] ** power
    )


def by_row(weights, errors, factor, j):
    return weights[:, j] + errors @ factor[j] / factor[j, j]


def by_moment(weights, errors, factor, j):
    moment = factor @ factor.T
    return weights[:, j] + errors @ moment[:, j] / moment[j, j]


def of_the_last(weights, errors, factor, j):
    return weights[:, j] + errors[:, j - 1] * factor[j - 1, j] / factor[j, j]


def total(table, chosen):
    return sum(table[name][width] for name, width in chosen.items())


def exact(cost, loss, budget):
    every = [dict(zip(cost, widths)) for widths in itertools.product(*cost.values())]
    return min((c for c in every if total(cost, c) <= budget), key=lambda chosen: total(loss, chosen))


def at(cost, loss, price):
    return {n: min(cost[n], key=lambda width: loss[n][width] + price * cost[n][width]) for n in cost}


def by_prices(powers, keeps=lambda taken, budget: taken <= budget, step_back=0):
    """The first of rising prices at which the budget is kept, or one that comes before it."""

    def allocate(cost, loss, budget):
        fits = [keeps(total(cost, at(cost, loss, 2.0**power)), budget) for power in powers]
        return at(cost, loss, 2.0 ** powers[(fits.index(True) if any(fits) else -1) - step_back])

    return allocate


FINE = [k / 50 for k in range(-2000, 2000)]


def same_for_all(cost, loss, budget):
    return max(
        (
            dict.fromkeys(cost, width)
            for width in (2, 4, 8)
            if total(cost, dict.fromkeys(cost, width)) <= budget
        ),
        key=lambda chosen: total(cost, chosen),
    )


def largest_loss_first(cost, loss, budget):
    chosen = dict.fromkeys(cost, 2)
    while True:
        name = max(chosen, key=lambda name: loss[name][chosen[name]])
        wider = chosen | {name: min(8, 2 * chosen[name])}
        if wider == chosen or total(cost, wider) > budget:
            return chosen
        chosen = wider


class LSQ(torch.autograd.Function):
    """The formulas of the paper, by hand."""

    @staticmethod
    def forward(ctx, weights, scale, last):
        ctx.save_for_backward(weights / scale)
        ctx.last = last
        return (weights / scale).round().clamp(-last, last) * scale

    @staticmethod
    def backward(ctx, above):
        [ratio] = ctx.saved_tensors
        inside = ratio.abs() < ctx.last
        of_scale = torch.where(inside, ratio.round() - ratio, ctx.last * ratio.sign())
        return above * inside, (above * of_scale).sum(), None


def passed(values, gradient_of):
    return gradient_of + (values - gradient_of).detach()


def lsq(low=0, times=True, held=False):
    def rounded(weights, scale, last):
        ratio = (weights / (scale.detach() if held else scale)).clamp(-last - low, last)
        return passed(ratio.round(), ratio) * (scale if times else 1)

    return rounded


def clamp_passed(weights, scale, last):
    ratio = weights / scale
    return passed(ratio.round().clamp(-last, last), ratio) * scale


def plain_sums(values, importance, codebook):
    nearest = (values[:, None] - codebook).abs().argmin(1)
    one_hot = torch.nn.functional.one_hot(nearest, len(codebook)).to(values)
    return (one_hot.T @ values) / (one_hot.T @ importance)


RIGHT = {
    "2.1": [from_above],
    "2.2": [per_channel],
    "2.3": [clusters],
    "2.4": [of_gradients(lambda each: each.square().mean(0))],
    "2.5": [target()],
    "2.6": [by_prices(FINE), lambda *given: dict(reversed(exact(*given).items()))],
    "2.7": [LSQ.apply],
}
WRONG = {
    "2.1": [
        (quantizer(size=lambda weights: weights), "here it is negative"),
        (quantizer(last=lambda bits: 2 ** (bits - 1)), "as far down as up"),
        (quantizer(last=lambda bits: 2**bits - 1), "Half of the symmetric codes"),
        (quantizer(zero=8), "have the zero-point 0"),
        (quantizer(codes=1), "one step less"),
        (quantizer(sign=-1), "Its sign is wrong"),
        (quantizer(rounded=float), "round it to a whole number"),
        (quantizer(rounded=int), "cut it off"),
        (quantizer(widen=False), "No code stands for 0"),
        (lambda weights, bits, symmetric: affine(weights, bits)[0], "In this order"),
    ],
    "2.2": [
        (by((0, 1, 2, 3)), "one for the tensor"),
        (by((0, 2, 3)), "input channels"),
        (by(1), "place of the kernel"),
        (by((1, 2, 3), size=lambda weights: weights), "may be negative"),
        (by((1, 2, 3), reduce=torch.mean), "That is a mean"),
        (by((1, 2, 3), codes=True), "Those are codes"),
        (by((1, 2, 3), least=0), "has become NaN"),
        (lambda weights, bits: per_channel(weights, bits).flatten(1), "The shape is (3, 16)"),
    ],
    "2.3": [
        (lambda *given: clusters(*given, mean=lambda own, counts: own.mean()), "plain means"),
        (lambda *given: clusters(*given, mean=lambda own, counts: (own * counts).mean()), "number of values"),
        (lambda *given: clusters(*given, mean=lambda own, counts: own @ counts), "Those are sums"),
        (lambda *given: clusters(*given, choose=above), "next level above"),
        (lambda *given: clusters(*given, choose=below), "next level below"),
        (in_place, "codebook that was given"),
        (lambda *given: clusters(*given, empty=lambda level: torch.nan), "0 / 0"),
        (lambda values, importance, codebook: plain_sums(values, importance, codebook), "Above the line"),
        (lambda *given: clusters(*given, empty=lambda level: 0.0), "has moved to 0"),
        (lambda *given: clusters(*given, empty=lambda level: torch.inf), "is gone"),
    ],
    "2.4": [
        (of_gradients(lambda each: each.mean(0).square()), "You square the mean"),
        (of_gradients(lambda each: each.sum(0).square()), "You square a sum"),
        (of_gradients(lambda each: each.sum(0).square() / len(each)), "one image at a time"),
        (of_gradients(lambda each: each.square().sum(0)), "divide by their number"),
        (of_gradients(lambda each: (each / len(each)).square().sum(0)), "divides twice"),
        (of_gradients(lambda each: each.abs().mean(0)), "mean size"),
        (of_gradients(lambda each: each.square().mean(0).sqrt()), "No root"),
        (likeliest, "likeliest"),
    ],
    "2.5": [
        (by_row, "not its row"),
        (target(sign=-1), "The sign is wrong"),
        (target(own=0), "the change alone"),
        (target(power=0), "is multiplied by"),
        (target(power=2), "not twice"),
        (by_moment, "entries of H"),
        (of_the_last, "not only that of the last one"),
    ],
    "2.6": [
        (lambda cost, loss, budget: at(cost, loss, 0), "takes 901 bytes"),
        (by_prices(FINE, step_back=1), "takes 501 bytes"),
        (lambda cost, loss, budget: at(cost, loss, 2.0**40), "the smallest"),
        (same_for_all, "the same width"),
        (by_prices(FINE, keeps=lambda taken, budget: taken < budget), "exactly the budget"),
        (by_prices([power for power in FINE if power > -8]), "ample"),
        (largest_loss_first, "the budget of 480"),
        (by_prices(range(-40, 41, 2)), "the budget of 300"),
        (lambda cost, loss, budget: total(cost, exact(cost, loss, budget)), "each layer's width"),
        (lambda cost, *given: {n: cost[n][w] for n, w in exact(cost, *given).items()}, "not bytes"),
    ],
    "2.7": [
        (lambda weights, scale, last: (weights / scale).round().clamp(-last, last) * scale, "round() is 0"),
        (lambda weights, scale, last: passed((weights / scale).round() * scale, weights), "do not clamp"),
        (lsq(low=1), "not at −Q − 1"),
        (lsq(times=False), "multiply by the scale again"),
        (lambda weights, scale, last: weights, "must stay"),
        (lambda *given: lsq()(*given).detach(), "at all"),
        (lambda weights, scale, last: lsq()(weights, scale.detach(), last), "reaches the scale"),
        (clamp_passed, "Outside the range"),
        (
            lambda w, s, last: (w / s + ((w / s).round() - w / s).detach()).clamp(-last, last) * s,
            "before you round",
        ),
        (lsq(held=True), "the code alone"),
    ],
}
