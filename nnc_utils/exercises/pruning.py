"""Checkers of 03_pruning: masks, scores, corrections, budgets and smaller networks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from nnc_utils import models
from nnc_utils.exercises import Wrong, exercise, expect, judge, parts, same


@exercise("3.1")
def masks(mask_of: Callable) -> None:
    """`mask_of` (score, share) -> bool in the score's shape, False for the lowest share."""
    score = torch.tensor([[0.2, 3.0, -0.8, 1.1, 0.1], [0.4, 0.5, 2.0, 0.3, 0.6], [0.9, 1.5, 0.7, 2.5, -1.0]])
    ranks = score.flatten().argsort().argsort().view_as(score)
    given = mask_of(score, 0.4)
    expect(
        isinstance(given, torch.Tensor) and given.dtype == torch.bool,
        "A mask is a bool tensor: True where a weight stays.",
    )
    for wrong, said in (
        (ranks < 6, "Your mask is inverted: it is True for the lowest scores."),
        (ranks >= 9, "You keep that share: it is the share that goes."),
        (ranks >= 5, "One weight too many stays: the score that equals the threshold goes, too."),
        (score > 0.4 * score.max(), "The share counts weights; it is no share of the largest score."),
        (score.abs() > 0.6, "You take the absolute value: a score below 0 is the lowest already."),
        (score > score.kthvalue(2, dim=1, keepdim=True).values, "Each row has its own threshold: take one."),
    ):
        expect(not torch.equal(given, wrong), said)
    same(given, ranks >= 6, "All but the six lowest of these 15 scores stay.")
    given = mask_of(score, 0.45)  # 6.75 of 15 weights
    expect(not torch.equal(given, ranks >= 6), "Round to the nearest whole number: 6.75 weights are 7.")
    same(given, ranks >= 7, "45 % of 15 scores are 7 weights that go.")


@exercise("3.2")
def scores(saliencies: Callable) -> None:
    """`saliencies` (weight, slope, fisher) -> "magnitude", "Taylor" and "OBD" in the weight's shape."""
    weight = torch.tensor([[-2.0, 0.0, 0.5], [1.5, -0.1, 3.0]])
    slope = torch.tensor([[0.3, -1.0, -0.2], [0.1, 0.7, 0.0]])
    fisher = torch.tensor([[0.5, 4.0, 0.2], [0.0, 0.9, 0.3]])
    given = saliencies(weight, slope, fisher)
    names = ["magnitude", "Taylor", "OBD"]
    expect(
        isinstance(given, dict) and sorted(given) == sorted(names), f"A dictionary with {names} is asked for."
    )
    exact = {"magnitude": weight.abs(), "Taylor": (weight * slope).abs(), "OBD": weight.square() * fisher / 2}
    for name, wrong, said in (
        ("magnitude", weight, "Magnitude is the absolute value: −2 matters more than 0.5."),
        ("Taylor", weight * slope, "Taylor's score is an absolute value: both signs of the change count."),
        ("Taylor", slope.abs(), "That is the gradient's size: multiply by the weight; 0 is not missed."),
        ("OBD", 2 * exact["OBD"], "The second term of the expansion has a factor of ½."),
        ("OBD", weight.abs() * fisher / 2, "In the second term the weight is squared."),
        ("OBD", (weight * fisher).square() / 2, "`fisher` is a mean square already: do not square it again."),
        ("OBD", (weight * slope).square() / 2, "The squared mean gradient is no mean square: use `fisher`."),
        ("OBD", fisher / 2, "That is the curvature alone: how far the weight moves counts, too."),
    ):
        close = given[name] is not None and torch.allclose(torch.as_tensor(given[name]), wrong)
        expect(not close, said)
    for name in names:
        same(given[name], exact[name], f"{name} differs from its formula.")


@exercise("3.3")
def correction(corrected: Callable) -> None:
    """`corrected` (weight (out, n), kept, moment (n, n)) -> the weight nearest to the old sums."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    weight = torch.randn(4, 4, generator=generator)
    kept = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    moment = inputs.T @ inputs / 50
    given = corrected(weight.clone(), kept.clone(), moment.clone())
    shaped = isinstance(given, torch.Tensor) and given.shape == weight.shape
    expect(shaped, "The result has the shape of the weight.")
    expect(not bool(given[~kept].any()), "A weight outside the mask is not 0: assign to those that stay.")
    expect(
        not torch.allclose(given, weight * kept, atol=1e-5),
        "You only mask: the right side needs the whole old row, with the weights that go.",
    )
    exact, whole, first, crossed = torch.zeros(4, 4, 4)
    for row, stay in enumerate(kept):
        exact[row, stay] = torch.linalg.lstsq(inputs[:, stay], inputs @ weight[row]).solution
        whole[row, stay] = torch.linalg.inv(moment)[stay][:, stay] @ (moment[stay] @ weight[row])
        first[row, stay] = torch.linalg.lstsq(inputs[:, stay], inputs @ weight[0]).solution
        gone = torch.linalg.solve(moment[stay][:, stay], moment[stay][:, ~stay] @ weight[row, ~stay])
        crossed[row, stay] = weight[row, stay] - gone
    for wrong, said in (
        (whole, "Take the part of H first, then its inverse: a part of the inverse is another matrix."),
        (crossed, "The sign is wrong: what the others did is added to the weights that stay."),
        (first, "Each row makes up for its own weights: use `weight[row]`."),
    ):
        expect(not torch.allclose(given, wrong, atol=1e-4), said)
    same(given, exact, "That is not the least-squares solution of each row.", tolerance=1e-3)


@exercise("3.4")
def repair(in_own_deviations: Callable) -> None:
    """`in_own_deviations` (memory, before, after, eps) -> mean and variance of each channel."""
    memory, before, after = (
        (torch.tensor(mean), torch.tensor(variance))
        for mean, variance in (
            ([1.0, 0.5, -2.0], [1.2, 4.4, 1.0]),
            ([0.8, 0.9, -2.1], [1.0, 4.0, 1.0]),
            ([0.3, 0.2, 3.0], [4.0, 1.0, 0.0]),
        )
    )
    mean, variance = parts(in_own_deviations(memory, before, after, 1e-5), "mean, variance")
    surplus, ratio = memory[0] - before[0], after[1] / before[1]
    for wrong, said in (
        (after[0] + surplus, "That is the faulty line: the surplus still counts in old deviations."),
        (after[0], "You forget what the memory knew better: the surplus μ − m₀ counts in new deviations."),
        (after[0] + surplus * ratio, "That is the ratio of variances: a deviation is its root."),
        (memory[0] + surplus * ratio.sqrt(), "Start from what the images give behind the pruning, m₁."),
        (after[0] - surplus * ratio.sqrt(), "The sign is wrong: the surplus is memory minus images, μ − m₀."),
        (after[0] + surplus / (ratio + 1e-5).sqrt(), "Your ratio is upside down: new deviation over old."),
    ):
        close = mean is not None and torch.allclose(torch.as_tensor(mean), wrong, rtol=1e-3, atol=1e-3)
        expect(not close, said)
    same(mean, after[0] + surplus * ratio.sqrt(), "m₁ + (μ − m₀) · s₁ / s₀ is asked for.", tolerance=1e-3)
    same(variance, memory[1] * ratio, "The variance was right: σ² · v₁ / v₀.", tolerance=1e-3)
    dead = (torch.zeros(1), torch.zeros(1))
    same(
        in_own_deviations(dead, dead, dead, 1e-5)[0],
        [0.0],
        "A channel that was constant before divides by 0: add eps to the variance.",
    )


def _total(table: dict, choice: dict) -> float:
    return sum(table[layer][share] for layer, share in choice.items())


@exercise("3.5")
def budget(choose: Callable) -> None:
    """`choose` (cost, harm, budget) -> layer -> share, the least harm within the budget."""
    cost = {
        "a": {0.0: 10, 0.5: 5, 0.9: 1},
        "b": {0.0: 100, 0.5: 50, 0.9: 10},
        "c": {0.0: 60, 0.5: 30, 0.9: 6},
    }
    harm = {"a": {0.0: 0, 0.5: 3, 0.9: 9}, "b": {0.0: 0, 0.5: 1, 0.9: 6}, "c": {0.0: 0, 0.5: 2, 0.9: 4}}
    choices = [dict(zip(cost, shares)) for shares in itertools.product((0.0, 0.5, 0.9), repeat=3)]
    known = {  # budget -> choices that are within it but not the best
        115: {
            (0.9, 0.9, 0.9): "That is the smallest file: the budget allows more, and less harm.",
            (0.5, 0.5, 0.5): "That is the same share everywhere: each layer may have its own.",
            (0.0, 0.9, 0.5): "You give each layer as many bytes: one may spend what another saves.",
            (0.5, 0.5, 0.0): "You spend as many bytes as you can: the harm is to be small.",
        },
        57: {(0.5, 0.9, 0.9): "One cheap step after the other goes too far: compare whole choices."},
        90: {(0.0, 0.5, 0.9): "A choice that takes exactly the budget is allowed: at most, not below."},
    }
    for most, wrongs in known.items():
        given = choose(cost, harm, most)
        named = isinstance(given, dict) and list(given) == list(cost)
        expect(named, "A dictionary with a share for each layer is asked for.")
        size, added = _total(cost, given), _total(harm, given)
        expect(size <= most, f"Your choice takes {size} bytes, the budget is {most}.")
        for wrong, said in wrongs.items():
            expect(tuple(given.values()) != wrong, said)
        least = min(_total(harm, choice) for choice in choices if _total(cost, choice) <= most)
        expect(added == least, f"Yours adds {added}; with {most} bytes another choice adds {least}.")


@exercise("3.6")
def ratio(times_smaller: Callable) -> None:
    """`times_smaller` (share of zeros) -> how many times smaller than float32 the file is."""
    given = times_smaller(0.75)
    bits = 2 - 0.75 * math.log2(3)  # the entropy of 3 to 1
    known = [
        (8.0, "You forget the mask: where the values stand takes bits, too."),
        (32 / (1 + 4), "A bit for each weight is more than the mask needs: an entropy coder takes H(z)."),
        (32 / (bits * math.log(2) + 4), "That is the natural logarithm: bits have the one to base 2."),
        (32 / (bits + 8), "You keep the values as float32: fp16 has 16 bits."),
        (32 / (bits + 12), "z is the share of zeros: the values that stay are 1 − z."),
        ((bits + 4) / 32, "Your ratio is upside down: the file before, divided by the file behind."),
        (16 / (bits + 4), "Compared with float32, please: 32 bits a weight."),
    ]
    judge(given, 32 / (bits + 4), "32 / (H(z) + 16 (1 − z)) is asked for.", known)
    try:
        dense = times_smaller(0.0)
    except (ValueError, ZeroDivisionError):
        raise Wrong("Without zeros your function fails: leave the part of size 0 out of the sum.") from None
    same(dense, 2.0, "Without zeros only fp16 makes it smaller, 2 times: 0 · log 0 counts as 0.")


@exercise("3.7")
def narrower(without_channels: Callable) -> None:
    """`without_channels` (block, kept) -> the block with fewer channels between its convolutions."""
    spec = models.resnet(18, channels=1, size=8, classes=2, stem="small", width=1 / 8)
    generator = torch.Generator().manual_seed(7)
    for name, kept in (("layer1.0", [1, 2, 5, 7]), ("layer2.0", [3])):
        block = models.build(spec).eval().get_submodule(name)
        for tensor in block.state_dict().values():
            if tensor.ndim:  # variances must be positive; a factor of batch-norm may be negative
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_var.abs_()
        before = copy.deepcopy(block.state_dict())
        narrow = without_channels(block, torch.tensor(kept))
        expect(isinstance(narrow, nn.Module), "A block is asked for: end in `return narrow`.")
        untouched = all(torch.equal(before[key], tensor) for key, tensor in block.state_dict().items())
        expect(untouched, "You change the block itself: give the smaller tensors to its copy.")
        after = narrow.state_dict()
        expect(after["conv1.weight"].shape[0] == len(kept), "conv1 writes the channels: select its rows.")
        for part in ("weight", "bias", "running_mean", "running_var"):
            fits = len(after[f"bn1.{part}"]) == len(kept)
            expect(fits, f"bn1.{part} still has a number for each old channel.")
        expect(
            after["conv2.weight"].shape[:2] == (before["conv2.weight"].shape[0], len(kept)),
            "conv2 reads the channels: select its columns, and keep all rows.",
        )
        gone = [number for number in range(len(before["bn1.weight"])) if number not in kept]
        for part in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            rows = before[part]
            if len(gone) == len(kept):
                expect(not torch.equal(after[part], rows[gone]), "You keep the channels that should go.")
            first = torch.equal(after[part], rows[: len(kept)])
            expect(not first, f"{part} has the first channels, not those of `kept`.")
        twin = copy.deepcopy(block)
        twin.bn1.weight.data[gone] = twin.bn1.bias.data[gone] = 0
        features = torch.randn(2, block.conv1.in_channels, 5, 5, generator=generator)
        with torch.no_grad():
            same(narrow(features), twin(features), "Your block computes something else than its masked twin.")
