"""Answers to the exercises of 07_deployment."""

import statistics

import torch
from torch.nn import functional

from nnc_utils.runtimes import qdq


def fold(weight, norm, *, eps=True, root=True, gamma=True, axis=0, sign=1, mean=True):
    variance = norm.running_var + (norm.eps if eps else 0)
    factor = (norm.weight if gamma else 1) / (variance.sqrt() if root else variance)
    shape = [1] * 4
    shape[axis] = -1
    shift = norm.running_mean * (factor if mean else 1)
    return weight * factor.view(shape), norm.bias - sign * shift


def by_einsum(weight, norm):
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return torch.einsum("o,oikl->oikl", scale, weight), torch.addcmul(norm.bias, norm.running_mean, -scale)


def integers(codes, scale, factor, bias, s_x):
    sums = scale * s_x * torch.where(factor < 0, -factor, factor)
    flipped = torch.where(factor.view(-1, 1, 1, 1) < 0, -codes, codes)
    return flipped, sums, torch.round(bias / sums)


def unflipped(codes, *rest):
    return codes, *integers(codes, *rest)[1:]


def sign_in_the_scale(codes, scale, factor, bias, s_x):
    sums = scale * s_x * factor
    return codes, sums, (bias / sums).round()


def factor_in_the_codes(codes, scale, factor, bias, s_x):
    _, sums, rounded = integers(codes, scale, factor, bias, s_x)
    return codes * factor.view(-1, 1, 1, 1), sums, rounded


def without_input_scale(codes, scale, factor, bias, s_x):
    return integers(codes, scale, factor, bias, 1.0)


def bias_by(change):
    def answer(codes, scale, factor, bias, s_x):
        flipped, sums, _ = integers(codes, scale, factor, bias, s_x)
        return flipped, sums, change(bias, scale, factor.abs(), s_x)

    return answer


def summed(inputs, codes, bias, zero_point, stride, padding, *, pad=True, sign=-1, axes=(1, 2, 3)):
    padded = functional.pad(inputs, [padding] * 4, value=zero_point if pad else 0)
    return functional.conv2d(padded, codes, bias, stride) + sign * zero_point * codes.sum(axes).view(-1, 1, 1)


def subtracted(inputs, codes, bias, zero_point, stride, padding):
    return functional.conv2d(inputs - zero_point, codes, bias, stride, padding)


def without_bias(inputs, codes, bias, *rest):
    return subtracted(inputs, codes, None, *rest)


def touching(spec, lost):
    order = qdq.steps(spec)
    return [s.name for s in order if s.output == lost] + [s.name for s in order if lost in s.inputs]


def median_ratio(own, reference, middle=statistics.median):
    return middle([theirs / mine for theirs, mine in zip(reference, own)])


def fastest(fp32, by=statistics.median):
    return sorted(fp32.values(), key=by)[0]


def peak(order, sizes):
    """Backwards: a tensor is needed from its last reader up to its writer."""
    held, most = set(), 0
    for step in reversed(order):
        held |= {step.output, *step.inputs}
        most = max(most, sum(sizes[name] for name in held))
        held -= {step.output}
    return most


def freed_early(order, sizes):
    last = {name: number for number, step in enumerate(order) for name in step.inputs}
    held, most = {"quant_input"}, 0
    for number, step in enumerate(order):
        held = {name for name in held if last[name] > number} | {step.output}
        most = max(most, sum(sizes[name] for name in held))
    return most


def pairs(order, sizes):
    return max(sum(sizes[name] for name in step.inputs) + sizes[step.output] for step in order)


def without_image(order, sizes):
    return peak(order, sizes | {"quant_input": 0})


def bits(accumulator, products, *, limit=None, largest=255, codes=lambda b: 2 ** (b - 1) - 1):
    limit = 2 ** (accumulator - 1) - 1 if limit is None else limit
    return max([b for b in range(2, 9) if products * largest * codes(b) <= limit], default=0)


def down_from_eight(accumulator, products):
    width = 8
    while width > 1 and products * 255 * (2 ** (width - 1) - 1) >= 2 ** (accumulator - 1):
        width -= 1
    return width if width > 1 else 0


RIGHT = {
    "7.1": [by_einsum],
    "7.2": [integers],
    "7.3": [subtracted],
    "7.4": [touching],
    "7.5": [lambda own, fp32: median_ratio(own, fastest(fp32))],
    "7.6": [peak],
    "7.7": [down_from_eight],
}
WRONG = {
    "7.1": [
        (lambda w, n: fold(w, n, eps=False), "ε is missing"),
        (lambda w, n: fold(w, n, root=False), "square root"),
        (lambda w, n: fold(w, n, gamma=False), "γ, which is"),
        (lambda w, n: fold(w, n, axis=1), "input channels"),
        (lambda w, n: (w * w / fold(w, n)[0], n.bias), "The folded weight is"),
        (lambda w, n: (fold(w, n)[0], n.bias), "mean is missing"),
        (lambda w, n: fold(w, n, sign=-1), "not added"),
        (lambda w, n: fold(w, n, mean=False), "goes through batch-norm"),
        (lambda w, n: fold(w, n)[0], "In this order"),
    ],
    "7.2": [
        (unflipped, "change their signs"),
        (sign_in_the_scale, "A scale is positive"),
        (factor_in_the_codes, "stay whole numbers"),
        (without_input_scale, "input's scale is missing"),
        (bias_by(lambda b, s, f, s_x: b / (s * f * s_x)), "round it"),
        (bias_by(lambda b, s, f, s_x: (b / (s * f)).round()), "divide by s_x"),
        (bias_by(lambda b, s, f, s_x: (b / (s * s_x)).round()), "folded scale"),
        (bias_by(lambda b, s, f, s_x: b), "The bias in codes is"),
    ],
    "7.3": [
        (lambda *given: summed(*given, pad=False), "along the border"),
        (lambda *given: summed(*given, sign=0), "never subtracted"),
        (lambda *given: summed(*given, pad=False, sign=0), "Pad with the zero-point, and"),
        (lambda *given: summed(*given, sign=1), "not added"),
        (lambda *given: summed(*given, axes=(0, 1, 2, 3)), "sum over three axes"),
        (without_bias, "bias is missing"),
    ],
    "7.4": [
        (lambda spec, lost: touching(spec, lost)[:1], "the writer alone"),
        (lambda spec, lost: touching(spec, lost)[1:], "You name the readers"),
        (
            lambda spec, lost: [s.name for s in qdq.steps(spec) if lost in (s.output, s.inputs[0])],
            "two inputs",
        ),
        (
            lambda spec, lost: [s.output for s in qdq.steps(spec) if s.name in touching(spec, lost)],
            "Those are tensors",
        ),
        (
            lambda spec, lost: [s.name for s in qdq.steps(spec) if s.name not in touching(spec, lost)],
            "neither write nor read",
        ),
        (lambda spec, lost: len(touching(spec, lost)), "A list"),
    ],
    "7.5": [
        (lambda own, fp32: median_ratio(own, fp32["eager"]), "against eager"),
        (lambda own, fp32: 1 / median_ratio(own, fastest(fp32)), "Turned round"),
        (
            lambda own, fp32: min(map(statistics.median, fp32.values())) / statistics.median(own),
            "within each",
        ),
        (lambda own, fp32: sum(fastest(fp32)) / sum(own), "sum or a mean of times"),
        (lambda own, fp32: median_ratio(own, fastest(fp32), statistics.mean), "moves a mean"),
        (lambda own, fp32: median_ratio(own, map(min, zip(*fp32.values()))), "One runtime for all"),
        (lambda own, fp32: median_ratio(own, fastest(fp32, min)), "one quick round"),
        (lambda own, fp32: median_ratio(own, fastest(fp32), statistics.median_low), "Of two rounds"),
    ],
    "7.6": [
        (lambda order, sizes: sum(sizes.values()), "every tensor"),
        (lambda order, sizes: max(sizes.values()), "one tensor"),
        (pairs, "waits until it is added"),
        (freed_early, "reads while it writes"),
        (without_image, "The image is there"),
    ],
    "7.7": [
        (lambda a, p: bits(a, 1), "one product"),
        (lambda a, p: bits(a, p, limit=2**a - 1), "The accumulator has a sign"),
        (lambda a, p: bits(a, p, largest=127), "unsigned"),
        (lambda a, p: bits(a, p, codes=lambda b: 2**b - 1), "Weights have a sign"),
        (lambda a, p: max(bits(a, p), 1) + 1, "first width that overflows"),
        (lambda a, p: 7, "16 bits for 1 products: 8"),
    ],
}
