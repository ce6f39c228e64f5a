"""Checkers of 05_architecture_search: counting, look-ups, fits, losses, budgets, gradients and ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional

from nnc_utils import models
from nnc_utils.exercises import exercise, expect, judge, near, same, tell
from nnc_utils.search.costs import COSTS, terms
from nnc_utils.search.space import Space


@exercise("5.1")
def count(stage_choices: Callable) -> None:
    """`stage_choices` (widths, ways of each block, whether it may be missing) -> how many stages."""
    given = stage_choices(2, (4, 3))
    known = [
        (2 * 12, "You count the deepest stages alone: a stage of one block is a choice, too."),
        (2 * (4 + 3), "A stage of two blocks has both: their ways multiply, 4 · 3, they do not add."),
        (2 * 2 * 12, "A stage of one block decides nothing about a second: you count it several times."),
        (4 + 12, "The stage also has a width, and each filling goes with each width."),
    ]
    tell(given, known)
    wanted = sum(1 for depth in (1, 2) for _ in itertools.product(range(2), *map(range, (4, 3)[:depth])))
    same(given, wanted, "2 widths · (4 + 4 · 3) fillings is asked for.", tolerance=0)
    same(stage_choices(3, (5,)), 15, "A stage of one block has widths · ways choices.", tolerance=0)
    same(stage_choices(2, (4, 3, 2)), 80, "Three blocks: 2 · (4 + 4 · 3 + 4 · 3 · 2).", tolerance=0)
    given = stage_choices(2, (4, 3), True)
    expect(not near(given, 32), "A stage that may be missing has one choice more: no block.")
    expect(not near(given, 34), "A missing stage has no width: it is one choice, not one for each width.")
    same(given, 33, "With a stage that may be missing it is 32 + 1.", tolerance=0)


@functools.cache
def costed() -> tuple[Space, list]:
    """A tiny space whose fourth stage may be missing, and the terms of its MACs."""
    space = Space(1, 8, 10, "small", ((4, 8), (4, 8), (8,), (8, 16)), blocks=2)
    return space, terms(space, {"macs": COSTS["macs"]})["macs"]


@exercise("5.2")
def cost(look_up: Callable) -> None:
    """`look_up` (terms, architecture) -> MACs; the oracle counts those of the network."""
    space, parts = costed()
    shallow = space.canonical([0 if c.kind == "depth" else len(c.options) - 1 for c in space.choices])

    def total(numbers: tuple, has: Callable, of: list = parts) -> float:
        """The entries of these numbers, of the parts that are said to be there."""
        return sum(
            term.values[tuple(numbers[place] for place in term.places)]
            for term in of
            if has(numbers[term.depth], term.when)
        )

    given = look_up(parts, shallow)
    known = [
        (total(shallow, lambda n, when: True), "You add all tables: blocks that are not there cost nothing."),
        (total(shallow, lambda n, when: n not in when), "You add the parts that the network does not have."),
        (
            total(shallow, lambda n, when: n > when.start),
            "A range holds its start, too: ask whether the number is in it.",
        ),
        (
            sum(term.values.mean() for term in parts if shallow[term.depth] in term.when),
            "You take the mean of each table: the entry at the architecture's numbers is asked for.",
        ),
        (
            sum(total(shallow, lambda n, when: True, [term]) for term in parts if term.depth in term.when),
            "`term.depth` is a place: ask whether the number that stands there is in the range.",
        ),
        (total(shallow, lambda n, when: n in when, parts[:1]), "One table alone: is `return` in the loop?"),
    ]
    said = "Those are not the MACs of a network of three stages."
    judge(given, models.macs(space.spec(shallow)), said, known)
    given = look_up(parts, space.largest)
    twice = total(space.largest, lambda n, when: n >= when.start)
    expect(not near(given, twice), "A range also ends: a network has one of the two classifiers.")
    same(given, models.macs(space.spec(space.largest)), "Those are not the MACs of the largest network.")
    for seed in range(5):
        drawn = space.sample(np.random.default_rng(seed))
        wanted = models.macs(space.spec(drawn))
        same(look_up(parts, drawn), wanted, f"Those are not the MACs of the network {drawn}.")


@exercise("5.3")
def relative(fit_coefficients: Callable) -> None:
    """`fit_coefficients` (inputs (blocks, features), times (blocks,)) -> coefficients (features,)."""
    x, t = np.array([1.0, 10.0]), np.array([2.0, 10.0])
    least = (x / t).sum() / ((x / t) ** 2).sum()  # of one feature: where the derivative is 0
    given = fit_coefficients(x[:, None], t)
    for wrong, said in (
        ((x * t).sum() / (x**2).sum(), "That minimizes absolute errors: the slowest block decides."),
        (
            x.sum() / ((x / t) ** 2).sum(),
            "The inputs are divided by the times, the target is not: t / t is 1.",
        ),
        (10 * least, "These belong to the scaled inputs: divide the coefficients by the scale, too."),
        ((t / x).mean(), "That is the mean of t / x: least squares of the relative errors is asked for."),
        (
            x.sum() / (x**2 / t).sum(),
            "You divide by √t, which weighs the squares with 1/t: divide by t itself.",
        ),
    ):
        expect(not near(given, [wrong]), said)
    same(given, [least], "For one feature Σ (x/t) / Σ (x/t)² is asked for.")
    x, t = np.array([[1.0, 0], [1, 1], [1, 2]]), np.array([3.0, 2, 1])
    given = fit_coefficients(x, t)
    expect(np.min(given) >= 0, "A negative coefficient: more work would take less time. Use `nnls`.")
    least = (1 / t).sum() / (1 / t**2).sum()  # the second feature's derivative is positive there
    same(given, [least, 0], "The best non-negative coefficients differ here from yours.")


@exercise("5.4")
def sandwich(sandwich_by_hand: Callable) -> None:
    """`sandwich_by_hand` (network, images, labels, others) -> loss; value and gradient are compared."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, generator=generator), torch.tensor([0, 2, 1, 1])
    weights = torch.randn(3, 3, generator=generator).requires_grad_()

    def network(images: Tensor, architecture: tuple | None = None) -> Tensor:
        return images @ weights * (1.0 if architecture is None else architecture[0])

    def losses(others: list, target: Callable) -> tuple[Tensor, Tensor]:
        """The loss of the largest, from labels, and the sum of those of the others, from some target."""
        z = network(images)
        terms = [functional.cross_entropy(network(images, other), target(z)) for other in others]
        return functional.cross_entropy(z, labels), sum(terms, torch.zeros(()))

    def soft(z: Tensor) -> Tensor:
        return z.detach().softmax(1)

    others = [(0.5,), (-0.25,)]
    largest, rest = losses(others, soft)
    given = sandwich_by_hand(network, images, labels, others)
    entropy = functional.cross_entropy(network(images), soft(network(images)))
    known = [
        (largest, "The others learn nothing: their losses are missing."),
        (rest, "The largest network learns nothing: its loss from the labels is missing."),
        (
            (largest + rest) / 3,
            "That is the mean of the losses: each network then learns at a third of its rate.",
        ),
        (largest + rest / 2, "The losses of the others are averaged: the sum is asked for."),
        (
            largest + rest - 2 * entropy,
            "That is the Kullback-Leibler divergence: cross-entropy is asked for.",
        ),
        (
            sum(losses(others, lambda z: labels)),
            "The others learn from the labels: soft labels are asked for.",
        ),
        (
            sum(losses(others, lambda z: z.argmax(1))),
            "The others learn hard classes: the probabilities of the largest network are asked for.",
        ),
        (sum(losses(others, lambda z: z.detach())), "Logits are no probabilities: take their softmax."),
        (
            largest
            + sum(functional.cross_entropy(soft(network(images)), network(images, o)) for o in others),
            "Logits and target are swapped: `F.cross_entropy(logits, target)`.",
        ),
        (
            sum(losses(others, lambda z: z.detach().softmax(0))),
            "The softmax runs over the images: the classes of an image are to add up to 1.",
        ),
    ]
    judge(given, (largest + rest).detach(), "Another loss than L comes out.", known)
    expect(torch.as_tensor(given).requires_grad, "The loss has no gradient: detach the soft labels alone.")
    [gradient] = torch.autograd.grad(given, weights)
    [wanted] = torch.autograd.grad(largest + rest, weights)
    [pleasing] = torch.autograd.grad(sum(losses(others, lambda z: z.softmax(1))), weights)
    expect(
        not near(gradient, pleasing),
        "The largest learns to please the others: a gradient flows through its soft labels.",
    )
    same(gradient, wanted, "The value is right, the gradient is not: which tensor did you detach?")
    alone = sandwich_by_hand(network, images, labels, []).detach()
    same(alone, largest.detach(), "Without others the loss of the largest is left.")


@exercise("5.5")
def budget(queries_needed: Callable) -> None:
    """`queries_needed` (top, sure) -> the fewest random draws; chances are added up by their cases."""
    given = queries_needed(0.1, 0.95)
    known = [
        (10, "So many draws hold one of the best 10 % on average, but in 35 of 100 searches they hold none."),
        (28, "Round up: 28 draws are not sure enough."),
        (2, "All draws have to miss for a failure: with (1 − top)ⁿ, not topⁿ."),
        (1, "One draw finds the best 10 % in 10 of 100 searches: did you swap `top` and `sure`?"),
        (30, "29 draws suffice: the smallest number is asked for."),
    ]
    tell(given, known)
    expect(not near(given, np.log(0.05) / np.log(0.9)), "Queries are whole: round up.")
    same(given, 29, "The smallest n with (1 − 0.1)ⁿ ≤ 1 − 0.95 is asked for.", tolerance=0)
    given = queries_needed(0.5, 0.75)
    expect(not near(given, 3), "Two draws are exactly 75 % sure at `top` 0.5, and that is enough.")
    same(given, 2, "At `top` 0.5 two draws of (0.5)² miss in 25 of 100 searches.", tolerance=0)
    for top, sure in ((0.05, 0.95), (0.3, 0.2)):
        queries = int(queries_needed(top, sure))
        found, before = (1 - scipy.stats.binom.pmf(0, n, top) for n in (queries, queries - 1))
        expect(found >= sure > before, f"For top {top} and sure {sure} {queries} is not the smallest number.")


@exercise("5.6")
def reinforce(policy_gradient: Callable) -> None:
    """`policy_gradient` (chances, chosen, matters, advantages) -> (decisions, options); autograd's."""
    logits = torch.tensor([[0.4, -0.3, 1.0], [0.2, 0.9, -0.6]], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 2], [1, 0], [1, 1], [2, 2]])
    matters = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    of_chosen = logits.log_softmax(1).expand(4, 2, 3).gather(2, chosen[..., None])[..., 0]

    def gradient(values: Tensor) -> Tensor:
        """Of the mean over samples of advantage times these values, (samples, decisions), by the logits."""
        mean = (advantages[:, None] * values).sum(1).mean()
        return torch.autograd.grad(mean, logits, retain_graph=True)[0]

    wanted, chances = gradient(of_chosen * matters), logits.detach().softmax(1)
    arrays = (tensor.numpy() for tensor in (chances, chosen, matters, advantages))
    given = policy_gradient(*arrays)
    one_hot = functional.one_hot(chosen, 3).double() * matters[..., None]
    known = [
        (-wanted, "The sign is turned around: what did better than usual is to become likelier."),
        (gradient(of_chosen), "Decisions that do not matter get a gradient: multiply by `matters`."),
        (4 * wanted, "That is the sum over the samples: their mean is asked for."),
        (
            (advantages[:, None, None] * one_hot).mean(0),
            "You push what was drawn, but do not subtract p: what is drawn often is pushed often.",
        ),
        (
            (advantages[:, None, None] * (one_hot - chances)).mean(0),
            "Decisions that do not matter still get −p: multiply the whole difference by `matters`.",
        ),
        (
            4 * wanted / matters.sum(0)[:, None],
            "You divide by the samples in which a decision matters: the mean over all of them is asked for.",
        ),
        (
            gradient(of_chosen.exp() * matters),
            "That is the gradient of p: the gradient of log p is asked for.",
        ),
        (
            (advantages[:, None, None] * one_hot / chances).mean(0),
            "That is the gradient by p, not by the logits.",
        ),
        (
            torch.autograd.grad((of_chosen * matters).sum(1).mean(), logits)[0],
            "The advantages are not in it: good and bad samples push the same way.",
        ),
    ]
    tell(given, known)
    otherwise = "The mean over all samples of advantage · (one-hot − p), where it matters, is asked for."
    same(given, wanted, otherwise)
    nothing = policy_gradient(chances.numpy(), chosen.numpy(), np.zeros((4, 2), bool), advantages.numpy())
    same(nothing, np.zeros((2, 3)), "If no decision matters, there is no gradient.")


@exercise("5.7")
def ranks(tau: Callable) -> None:
    """`tau` (x, y: (networks,)) -> Kendall's tau-b; SciPy's."""
    x, y = np.array([1.0, 2, 3, 10]), np.array([1.0, 3, 2, 4])  # no ties; 5 of 6 pairs concordant
    given = tau(x, y)
    known = [
        (4 / 3, "More than 1: the outer difference holds each pair twice, above and below."),
        (-2 / 3, "The sign is turned around: the same order is 1."),
        (8 / 12**2, "The root is missing: √(n_x n_y)."),
        (4 / 12, "Each pair is counted once above, but twice below: the outer difference holds it twice."),
        (8 / 4, "You count the ties, and each network with itself: those that are not tied are asked for."),
        (5 / 6, "That is the share of concordant pairs: subtract the discordant ones."),
        (8 / 16, "A network is no pair with itself: n (n − 1) differences, not n²."),
        (np.corrcoef(x, y)[0, 1], "That is the correlation of the values: only their order counts."),
        (
            scipy.stats.spearmanr(x, y).statistic,
            "That is the correlation of the ranks: pairs are to be counted.",
        ),
    ]
    judge(given, 4 / 6, "Without ties 5 concordant and 1 discordant of 6 pairs give 4/6.", known)
    x, y = np.array([1.0, 1, 2, 3, 0]), np.array([1.0, 2, 3, 3, 3])  # 9 and 7 pairs are not tied
    given, pairs = tau(x, y), np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))
    known = [
        (pairs.sum() / 20, "Ties still count below: only pairs that are not tied belong there."),
        (
            pairs.sum() / (pairs**2).sum(),
            "You drop a pair if either score ties: count the pairs of each alone.",
        ),
        (pairs.sum() / 18, "You leave out the ties of x alone: √(n_x n_y) leaves out those of y, too."),
        (pairs.sum() / 14, "You leave out the ties of y alone: √(n_x n_y) leaves out those of x, too."),
    ]
    judge(given, scipy.stats.kendalltau(x, y).statistic, "With ties another τ is asked for.", known)
    same(tau(x, x), 1.0, "τ of a score with itself is 1.")
