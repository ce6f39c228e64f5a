"""Checkers of 02_quantization: quantizers, k-means, curvature, compensation, allocation and rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils.exercises import exercise, expect, judge, near, parts, same


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same random numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("2.1")
def scale_and_zero_point(answer: Callable) -> None:
    """`answer` (weights, bits, symmetric) -> scale and zero-point."""
    weights = torch.tensor([[-1.4, 0.2], [0.35, 0.7]])
    given = parts(answer(weights, 4, True), "scale, zero-point")
    known = [
        (0.1, "The largest weight without its sign is asked for: here it is negative. Take abs() first."),
        (1.4 / 8, "The last symmetric code is 2^(b−1) − 1, so that codes reach as far down as up."),
        (1.4 / 15, "Half of the symmetric codes are for negative weights: the last one is 2^(b−1) − 1."),
    ]
    judge(given[0], 0.2, "Symmetric: max|w| / (2^(b−1) − 1) is asked for.", known)
    same(given[1], 0, "Symmetric codes have the zero-point 0.")
    scale, zero_point = answer(weights, 3, False)  # 0 lies 4.67 steps above the smallest weight
    known = [(2.1 / 8, "From 0 to 2^b − 1 there are 2^b codes, but one step less.")]
    judge(scale, 0.3, "Affine: the range from the smallest to the largest weight is 2^b − 1 steps.", known)
    known = [
        (-5, "Its sign is wrong: the zero-point is one of the codes, and the smallest weight has code 0."),
        (1.4 / 0.3, "A zero-point is a code: round it to a whole number."),
        (4, "Round the zero-point to the nearest code: int() and floor() cut it off."),
    ]
    judge(zero_point, 5, "The zero-point is the code of 0: round(−smallest / s).", known)
    for weights, zero_point in ((torch.tensor([1.0, 3.0]), 0), (torch.tensor([-1.0, -3.0]), 3)):
        given = [float(number) for number in answer(weights, 2, False)]
        no_code = "No code stands for 0 where all weights have one sign: widen the range to 0."
        expect(not near(given[0], 2 / 3), no_code)
        same(given, (1, zero_point), "Where all weights have one sign, 0 is an end of the range.")


@exercise("2.2")
def per_channel(answer: Callable) -> None:
    """`answer` (weights, bits) -> rounded weights, with a scale for each output channel."""
    weights = normal(3, 4, 2, 2) * torch.tensor([1.0, 0.1, 3.0]).view(3, 1, 1, 1)
    weights[0, 1, 0, 1] = -4.0  # the largest of its channel is negative

    def by(peaks: Tensor) -> Tensor:
        return (weights / peaks * 7).round() * peaks / 7

    size = weights.abs()
    known = [
        (by(size.max()), "Your scale is one for the tensor: one for each output channel is asked for."),
        (
            by(size.amax((0, 2, 3), True)),
            "Your scales are those of input channels: output channels come first.",
        ),
        (
            by(size.amax(1, True)),
            "You have a scale for each place of the kernel: all of a channel share one.",
        ),
        (by(weights.amax((1, 2, 3), True)), "A channel's largest weight may be negative: take abs() first."),
        (
            by(size.mean((1, 2, 3), True)),
            "That is a mean: the largest weight of a channel gets the last code.",
        ),
        (
            (weights / size.amax((1, 2, 3), True) * 7).round(),
            "Those are codes: multiply by the scales again.",
        ),
    ]
    scales = torch.stack([channel.abs().max() / 7 for channel in weights])
    zeros = torch.zeros(3, dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(weights, scales, zeros, 0, -7, 7)
    judge(answer(weights, 4), wanted, "A channel's largest |w| gets the last code, 2^(b−1) − 1.", known)
    given = answer(torch.tensor([[0.0, 0.0], [0.5, -1.0]]), 2)  # of a classifier
    not_a_number = "A channel of zeros has become NaN: its scale must not be 0."
    expect(not bool(torch.as_tensor(given).isnan().any()), not_a_number)
    same(given, [[0, 0], [0, -1]], "A channel of zeros stays zeros; the classifier's weights are (out, in).")


@exercise("2.3")
def kmeans_round(answer: Callable) -> None:
    """`answer` (values, importance, codebook) -> the codebook after one round."""
    values = torch.tensor([0.0, 0.4, 1.1, 2.6, 4.0], dtype=torch.float64)
    importance = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    codebook = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    known = [
        ([0.2, 1.85, 4.0], "You take plain means: weight each value by its importance."),
        ([0.6, 1.85, 8.0], "Divide by the sum of the importances, not by the number of values."),
        ([1.2, 3.7, 8.0], "Those are sums: a mean divides by the sum of the importances."),
        ([0.1, 1.85, 2.0], "Above the line stands Σ importance · value, not Σ value."),
        ([0.0, 2.3 / 4, 10.6 / 3], "You give each value the next level above it, not the nearest one."),
        ([2.3 / 5, 2.6, 4.0], "You give each value the next level below it, not the nearest one."),
    ]
    given = answer(values, importance, codebook)
    said = "Each level moves to the weighted mean of the values nearest to it."
    judge(given, [0.3, 1.85, 4.0], said, known)
    kept = codebook.tolist() == [0.0, 2.0, 4.0]
    expect(kept, "You change the codebook that was given: k-means compares it with the moved one.")
    codebook = torch.tensor([0.1, 0.5, 1.0, 9.0], dtype=torch.float64)  # nothing is near to 9
    values, importance = values[:3], importance[:3] * torch.tensor([0, 1, 1])
    given = torch.as_tensor(answer(values, importance, codebook))
    expect(
        bool(given.isfinite().all()),
        "A level has become 0 / 0: it has no values, or they have no importance.",
    )
    expect(not near(given[-1], 0), "A level without values has moved to 0: leave it where it is.")
    expect(len(given) == 4, "A level without values is gone: leave it where it is.")
    same(given, [0.1, 0.4, 1.1, 9.0], "A level whose values have no importance stays where it is.")


@exercise("2.4")
def fisher(answer: Callable) -> None:
    """`answer` (model, weight, images, labels) -> mean of the squared gradients."""
    model, images, labels = nn.Linear(3, 2, bias=False), normal(5, 3, seed=2), torch.tensor([0, 1, 1, 0, 1])
    model.weight.data = normal(2, 3, seed=1)
    shares = (images @ model.weight.detach().T).softmax(1)

    def gradients(of: Tensor) -> Tensor:  # a linear classifier has a closed formula, (images, out, in)
        return (shares - functional.one_hot(of, 2))[:, :, None] * images[:, None]

    each = gradients(labels)
    wanted = each.square().mean(0)
    known = [
        (each.mean(0).square(), "You square the mean: gradients of different images cancel before that."),
        (each.sum(0).square(), "You square a sum: gradients of different images cancel before that."),
        (each.sum(0).square() / 5, "You square the sum of a batch, then divide: take one image at a time."),
        (wanted * 5, "That is the sum over the images: divide by their number."),
        (
            wanted / 5,
            "You divide each loss, so that the square divides twice: divide the sum of the squares.",
        ),
        (each.abs().mean(0), "That is the mean size of the gradients: square them."),
        (wanted.sqrt(), "No root is asked for: the mean of the squares."),
        (
            gradients(shares.argmax(1)).square().mean(0),
            "Take the labels that are given, not the likeliest ones.",
        ),
    ]
    given = answer(model, model.weight, images, labels)
    judge(given, wanted, "The mean over the images of each one's squared gradient is asked for.", known)
    given = answer(model, model.weight, images[:1], labels[:1])
    same(given, each[0].square(), "With a single image it is that one's squared gradient.")


@exercise("2.5")
def target(answer: Callable) -> None:
    """`answer` (weights, errors, factor, j) -> what column j aims at."""
    inputs = normal(20, 4, seed=3)
    inputs[:, 1:] += inputs[:, :1]
    moment, j = inputs.T @ inputs / 20, 2
    factor = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    weights, errors = normal(3, 4, seed=4), 0.3 * normal(3, 4, seed=5)
    errors[:, j:] = 0
    # without the factor: the change of least δᵀ H δ while this column and all later ones may move
    change = torch.linalg.solve(moment[j:, j:], moment[j:, :j] @ errors[:, :j].T)[0]
    own, above, diagonal = weights[:, j], errors[:, :j] @ factor[:j, j], factor[j, j]
    greedy = errors[:, :j] @ moment[:j, j] / moment[j, j]
    last = errors[:, j - 1] * factor[j - 1, j] / diagonal
    known = [
        (own, "The errors have no effect: R is 0 below its diagonal, so take its column j, not its row."),
        (own - change, "The sign is wrong: `errors` is w − ŵ, and δ is ŵ − w."),
        (change, "That is the change alone: add the weights."),
        (own + above, "Divide by R's entry on the diagonal: that is what δ of this column is multiplied by."),
        (own + above / diagonal**2, "Divide by R's entry on the diagonal once, not twice."),
        (own + greedy, "Those are entries of H, as if later columns could not compensate: take R's."),
        (own + last, "The errors of all columns before j count, not only that of the last one."),
    ]
    given = answer(weights, errors, factor, j)
    judge(given, own + change, "w plus the sum of errors × R above the diagonal, divided by R on it.", known)
    given = answer(weights, torch.zeros(3, 4), factor, 0)
    same(given, weights[:, 0], "Nothing comes before column 0: it aims at its own weights.")


@exercise("2.6")
def widths(answer: Callable) -> None:
    """`answer` (cost, loss, budget) -> layer -> width."""
    cost = {"a": {2: 20, 4: 40, 8: 80}, "b": {2: 200, 4: 400, 8: 800}, "c": {2: 10, 4: 21, 8: 42}}
    loss = {"a": {2: 9.0, 4: 2.0, 8: 0.1}, "b": {2: 1.0, 4: 0.3, 8: 0.25}, "c": {2: 0.5, 4: 0.01, 8: 0.02}}

    def total(table: dict, chosen: dict) -> float:
        return sum(table[name][width] for name, width in chosen.items())

    every = [dict(zip(cost, choice)) for choice in itertools.product((2, 4, 8), repeat=3)]
    for budget in (480, 300, 301, 2000, 230):  # at each of these some price reaches the least loss
        given = answer(cost, loss, budget)
        mapping = isinstance(given, dict) and given.keys() == cost.keys()
        expect(mapping, "Return a mapping with each layer's width: {'a': 4, …}.")
        allowed = all(width in cost[name] for name, width in given.items())
        expect(allowed, "Return the widths, which are the keys of a layer's cost: not bytes or losses.")
        taken, harm = total(cost, given), total(loss, given)
        expect(taken <= budget, f"Your choice takes {taken} bytes: the budget is {budget}.")
        least = 1e-9 + min(total(loss, chosen) for chosen in every if total(cost, chosen) <= budget)
        if harm > least:
            equal = len(set(given.values())) == 1
            expect(
                given["a"] > 2 or not equal,
                f"All widths are the smallest: {budget - taken} bytes are left. The price is far too high.",
            )
            expect(not equal, "All layers have the same width: they differ in what a byte buys.")
            expect(budget != 301, "A choice that takes exactly the budget keeps it: ≤ is asked for, not <.")
            expect(budget != 2000, "Where the budget is ample, each layer takes its width of least loss.")
        lower = f"A lower price keeps the budget of {budget}, too: loss {least:.2f} instead of {harm:.2f}."
        expect(harm <= least, lower)


@exercise("2.7")
def straight_through(answer: Callable) -> None:
    """`answer` (weights, scale, last) -> rounded weights with LSQ's gradients."""
    weights = torch.tensor([[0.3, -1.3, 2.1], [9.0, -5.0, 0.0]], requires_grad=True)
    for step, last in ((0.8, 3), (2.0, 1)):
        scale = torch.tensor(step, requires_grad=True)
        ratio = weights.detach() / scale.detach()
        known = [
            (ratio.round() * step, "You do not clamp: ±Q are the last codes."),
            (ratio.round().clamp(-last - 1, last) * step, "The codes end at −Q, not at −Q − 1."),
            (ratio.round().clamp(-last, last), "Those are the codes: multiply by the scale again."),
            (weights, "The rounding itself must stay: only its gradient is passed over."),
        ]
        rounded = answer(weights, scale, last)
        wanted = torch.fake_quantize_per_tensor_affine(weights.detach(), step, 0, -last, last)
        judge(rounded, wanted, "The values: round(w / s), at most ±Q, times s.", known)
        expect(rounded.requires_grad, "No gradient comes back at all: detach the rounding only.")
        above = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.25, 7.0]])
        own, of_scale = torch.autograd.grad(rounded, (weights, scale), above, allow_unused=True)
        expect(of_scale is not None, "No gradient reaches the scale: do not detach it.")
        nothing = own is None or not own.any()
        expect(not nothing, "No gradient reaches the weights: the derivative of round() is 0.")
        inside = ratio.abs() < last
        known = [
            (above, "Outside the range the gradient of a weight is 0: the clamp must keep its gradient.")
        ]
        late = "Whether a weight is inside is decided by its ratio, not by its code: clamp before you round."
        ends = ratio.round().abs()  # what clamp passes at ±Q itself is a matter of torch's version
        known += [(above * (ends <= last), late), (above * (ends < last), late)]
        judge(own, above * inside, "A weight inside the range gets the gradient 1, outside 0.", known)
        codes = ratio.round().clamp(-last, last)
        known = [((above * codes).sum(), "The scale's gradient is the code alone: w / s depends on s, too.")]
        wanted = (above * torch.where(inside, codes - ratio, codes)).sum()
        judge(of_scale, wanted, "The scale's gradient: round(w/s) − w/s inside, ±Q outside.", known)
