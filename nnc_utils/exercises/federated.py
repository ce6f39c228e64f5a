"""Checkers of 08_federated_learning: averages, rounding, the largest, what is held back, both ways, masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnc_utils.exercises import exercise, expect, judge, near, parts, same, tell

DRAW = torch.Generator().manual_seed(0)
UPDATE = torch.randn(40, generator=DRAW)
MODULUS = 2**16


@exercise("8.1")
def weighted(average: Callable) -> None:
    """`average` (updates, images) -> the mean update, a client weighed by its images."""
    updates = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 8.0]), torch.tensor([-5.0, 0.0, 4.0])]
    images, together = [10, 30, 60], torch.stack(updates)
    counts = torch.tensor(images, dtype=torch.float32)
    summed = (together * counts[:, None]).sum(0)
    wrong = [
        (together.mean(0), "Each client counts the same: one with twice the images is to weigh twice."),
        (summed, "Divide by the number of all images: your update is that many times too long."),
        (summed / 3, "You divide by the number of clients: the weights are to sum to 1."),
        (together.sum(0), "That is the sum of the updates, and nobody's images count."),
        (
            (together * counts.square()[:, None]).sum(0) / counts.square().sum(),
            "Each client is weighed by the square of its images.",
        ),
        (
            (together / counts[:, None]).sum(0) / (1 / counts).sum(),
            "Your weights are upside down: who has more images is to weigh more.",
        ),
        ((summed / 100).mean(), "That is one number: an update has one for each parameter."),
    ]
    given = average(own := [update.clone() for update in updates], images)
    judge(given, summed / 100, "The sum of images / all images · update is asked for.", wrong)
    expect(all(map(torch.equal, own, updates)), "You changed the updates that were given.")
    given = average([updates[0].clone(), updates[1].clone()], [5, 0])
    same(given, updates[0], "A client without images changes nothing.")


@exercise("8.2")
def without_a_bias(stochastic_codes: Callable) -> None:
    """`stochastic_codes` (update, step, draws) -> whole numbers whose mean is update / step."""
    step, ratios = 0.5, torch.tensor([-1.75, -0.75, 0.0, 0.25, 1.75, 2.0])
    draws = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(1))
    update = (step * ratios).expand(20_000, 6)
    given = stochastic_codes(update.clone(), step, draws)
    expect(isinstance(given, Tensor), "Return a tensor: a code for each number of the update.")
    expect(given.shape == draws.shape, f"The shape is {tuple(given.shape)}: that of the update is asked for.")
    mean, lower = given.double().mean(0), ratios.floor()
    up, fraction = mean - lower, ratios - lower  # how often it is rounded up, and how often it should be

    def about(value: Tensor, wanted: Tensor) -> bool:
        return bool((value - wanted).abs().max() < 0.02)

    between, negative = fraction > 0, ratios < 0
    whole = torch.equal(given, given.round())
    multiples = not whole and about(mean, step * ratios)
    expect(not multiples, "Those are multiples of the step: the codes themselves are asked for.")
    expect(whole, "Codes are whole numbers: yours are not.")
    for wrong, said in (
        (ratios.round(), "The draws do not count: you round to the nearest, and small updates are lost."),
        (lower, "You always round down: up with the probability of the fraction is asked for."),
        (ratios.ceil(), "You always round up: that adds half a step on average."),
        (step * ratios, "You do not divide by the step: a code counts steps."),
        (ratios + 0.5, "You add a draw and round to the nearest: that is half a step too much on average."),
    ):
        expect(not about(mean, wrong), said)
    expect(
        not about(up[between], torch.tensor(0.5)),
        "You toss a coin: at a fraction of ¼ only one code in four is to be the upper one.",
    )
    expect(
        not about(up[between], 1 - fraction[between]),
        "The probabilities are swapped: at a fraction of ¼ you round up three times in four.",
    )
    expect(
        about(mean[negative], ratios[negative]) or not about(mean[~negative], ratios[~negative]),
        "Below 0 it is biased: a conversion to whole numbers cuts towards 0, and `floor` does not.",
    )
    expect(about(mean, ratios), "The mean of the codes is to be update / step: round up with that fraction.")
    beside = bool((given - ratios).abs().max() <= 1)
    expect(beside, "Only the two whole numbers beside update / step may be drawn.")
    again = stochastic_codes(update.clone(), step, draws)
    expect(torch.equal(given, again), "The same draws give other codes: draw nothing yourself, use `draws`.")


@exercise("8.3")
def the_largest(largest: Callable) -> None:
    """`largest` (update, count) -> a mask with so many True, where the update is largest in size."""
    right = torch.zeros(40, dtype=torch.bool)
    right[UPDATE.abs().topk(10).indices] = True
    upper = torch.zeros_like(right)
    upper[UPDATE.topk(10).indices] = True
    smallest = torch.zeros_like(right)
    smallest[(-UPDATE.abs()).topk(10).indices] = True
    wrong = [
        (upper, "Those are the largest with their signs: large negative numbers count, too."),
        (smallest, "Those are the smallest in size."),
        (~right, "Your mask is inverted: True is what is sent."),
        (UPDATE * right, "Those are the numbers: a mask of True and False is asked for."),
        (UPDATE.abs().topk(10).indices, "Those are the places: a mask has True at them."),
        (UPDATE.abs() > UPDATE.abs().sort().values[-10], "One too few: the last of them counts, too."),
    ]
    given = largest(UPDATE.clone(), 10)
    judge(given, right, "A mask that is True at the 10 numbers of the largest size is asked for.", wrong)
    expect(torch.as_tensor(given).dtype == torch.bool, "A mask is of True and False: `dtype=torch.bool`.")
    alike = torch.tensor([2.0, -2.0, 2.0, 1.0, 2.0])
    kept = int(torch.as_tensor(largest(alike, 2)).sum())
    expect(
        kept == 2,
        f"Of numbers that are alike you keep {kept}: compare places, not sizes, so that 2 of them are sent.",
    )


@exercise("8.4")
def held_back(feedback: Callable) -> None:
    """`feedback` (update, residual, compress) -> (received, residual)."""
    update, residual = UPDATE[:6].clone(), UPDATE[6:12].clone()
    draw, calls = torch.Generator().manual_seed(2), []

    def compress(vector: Tensor) -> Tensor:
        """Rounds at random, so that two calls differ."""
        calls.append(vector.clone())
        return torch.floor(vector + torch.rand(len(vector), generator=draw))

    received, left = parts(feedback(update.clone(), residual.clone(), compress), "received, residual")
    expect(bool(calls), "Nothing was compressed: what is sent goes through `compress`.")
    expect(len(calls) == 1, "You compress twice: each time it rounds otherwise, so keep what was received.")
    wanted = update + residual
    tell(
        calls[0],
        [
            (update, "The residual is not sent: what was held back comes on top of the new update."),
            (residual, "Only the residual is sent: the new update is missing."),
            (update - residual, "The residual has the wrong sign: add it to the update."),
        ],
    )
    same(calls[0], wanted, "update + residual is to be compressed.")
    sent = torch.floor(wanted + torch.rand(6, generator=torch.Generator().manual_seed(2)))
    swapped = near(left, sent) and not near(received, sent)
    expect(not swapped, "In this order, please: first what was received, then the new residual.")
    same(received, sent, "What the server receives is what `compress` returns.")
    wrong = [
        (sent - wanted, "The residual has the wrong sign: it is what should have arrived, less what did."),
        (update - sent, "The old residual is lost: what should have arrived is update + residual."),
        (residual + wanted - sent, "The old residual counts twice: it is in what was sent already."),
        (wanted, "You keep all of it: what arrived is not to be sent again."),
        (sent, "You keep what arrived: what did not is asked for."),
        (torch.zeros(6), "Nothing is kept: then what rounding took is lost."),
    ]
    judge(left, wanted - sent, "The new residual is update + residual − received.", wrong)


@exercise("8.5")
def the_way_down(broadcast: Callable) -> None:
    """`broadcast` (weights, shared, compress) -> the clients' weights after the server's message."""
    weights, shared = UPDATE[:8].clone(), UPDATE[8:16].clone()
    messages = []

    def compress(vector: Tensor) -> Tensor:
        messages.append(vector.clone())
        return (4 * vector).round() / 4

    given = broadcast(weights.clone(), shared.clone(), compress)
    expect(bool(messages), "Nothing was compressed: what is sent goes through `compress`.")
    difference = weights - shared
    arrived = (4 * difference).round() / 4
    tell(
        messages[0],
        [
            (weights, "You send the weights themselves: the difference is small, and its step is finer."),
            (-difference, "The difference has the wrong sign: subtract what clients have."),
        ],
    )
    same(messages[0], difference, "weights − shared is to be compressed.")
    wrong = [
        (arrived, "That is the message: clients add it to what they have."),
        (weights + arrived, "Clients do not have the server's weights: add the message to theirs."),
        (shared - arrived, "The message has the wrong sign."),
        (weights, "Clients never see the server's weights: they have what they had, and the message."),
        (shared, "Clients stay where they were: add the message."),
    ]
    judge(given, shared + arrived, "shared + the compressed difference is asked for.", wrong)


@exercise("8.6")
def lost_share(lost: Callable) -> None:
    """`lost` (update, received) -> the squared length of what is lost, as a share of the update's."""
    received = UPDATE.round() + 0.25
    gone = received - UPDATE
    right = gone.square().sum() / UPDATE.square().sum()
    wrong = [
        (right.sqrt(), "That is the ratio of the lengths: their squares are asked for."),
        (gone.square().sum() / received.square().sum(), "Divide by the update, not by what was received."),
        (gone.square().mean(), "That is the mean square of what is lost: divide by the update's."),
        (gone.square().sum(), "That is the square of what is lost: divide by the update's."),
        ((gone / UPDATE).square().mean(), "Sum first, then divide: each number's own ratio blows up near 0."),
        (gone.sum().square() / UPDATE.sum().square(), "Square each number before you sum, not the sum."),
        (gone.abs().sum() / UPDATE.abs().sum(), "Those are sums of sizes: squares are asked for."),
        (1 - right, "That is the share that arrives: what is lost is asked for."),
        (
            received.square().sum() / UPDATE.square().sum(),
            "That is how long the received update is: what is lost is the difference of the two.",
        ),
    ]
    given = lost(UPDATE.clone(), received)
    judge(given, right, "‖received − update‖² ÷ ‖update‖² is asked for.", wrong)
    same(lost(UPDATE.clone(), torch.zeros(40)), 1.0, "If nothing arrives, all is lost: the share is 1.")


@exercise("8.7")
def masks_cancel(hide: Callable) -> None:
    """`hide` (codes, client, seeds) -> codes that only their sum over the clients reveals."""
    seeds = [[0, 5, 7], [5, 0, 9], [7, 9, 0]]
    codes = torch.randint(-3, 4, (3, 50), generator=torch.Generator().manual_seed(3))
    hidden = [hide(own.clone(), client, seeds) for client, own in enumerate(codes)]
    right = all(isinstance(one, Tensor) and one.shape == (50,) for one in hidden)
    expect(right, "Return a tensor: a hidden code for each code.")
    masks = [(one - own) % MODULUS for one, own in zip(hidden, codes, strict=True)]
    expect(all(bool(mask.any()) for mask in masks), "A client's codes are readable: no mask is added.")
    varied = all(len(mask.unique()) > 1 for mask in masks)
    expect(varied, "All of a client's codes get the same number: each gets one of its own.")
    together, wanted = sum(hidden) % MODULUS, codes.sum(0) % MODULUS
    expect(bool(together.any()), "The codes are missing: only masks are sent, and their sum is 0.")
    zeros = torch.zeros(9, dtype=torch.int64)
    pair = [hide(zeros.clone(), client, [[0, 5], [5, 0]]) % MODULUS for client in (0, 1)]
    expect(not torch.equal(*pair), "Both clients of a pair add their mask: one of them subtracts it.")
    cancel = not bool((sum(pair) % MODULUS).any())
    expect(cancel, "Two clients' masks do not cancel: each pair has one, and a client has none with itself.")
    expect(torch.equal(together, wanted), "The masks do not cancel: a client has one with *each* other.")
    inside = all(bool((one >= 0).all() and (one < MODULUS).all()) for one in hidden)
    expect(inside, "Hidden codes are to lie in 0 to 65,535: a sum that is not reduced gives its size away.")
