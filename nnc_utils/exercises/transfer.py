"""Checkers of 09_transfer_learning: class means, a frozen body, labels, latent weights, and differences."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from nnc_utils.exercises import Wrong, exercise, expect, judge, same, tell


@exercise("9.2")
def class_means(nearest: Callable) -> None:
    """`nearest` (features, labels, others) -> the class whose mean is nearest to each of the others."""
    features = torch.tensor([[0.0, 8], [0, 8.5], [0, 9], [-6, 0], [16, 0], [24, 0]])
    labels = torch.tensor([1, 1, 1, 0, 0, 2])
    others = torch.tensor([[5.0, 0], [4, 8], [18, 1], [3, 5.5], [1.5, 3.3], [9, 1]])
    means = torch.tensor([[5.0, 0], [0, 8.5], [24, 0]])
    distances = torch.cdist(others, means)
    overall = torch.cdist(others, torch.stack([features[labels == k].sum(0) / 6 for k in range(3)]))
    wrong = [
        (distances.argmax(1), "That is the farthest mean: the smallest distance is asked for."),
        (distances.min(1).values, "Those are the distances: which class has the smallest one?"),
        (torch.cdist(others, features).argmin(1), "Those are numbers of images: return their classes."),
        (labels[torch.cdist(others, features).argmin(1)], "That is the nearest image's class: average."),
        ((others @ means.T).argmax(1), "The largest product favours long means: take the distance."),
        (overall.argmin(1), "You divide a class's sum by the number of all images: its own counts."),
    ]
    right = distances.argmin(1)
    judge(nearest(features, labels, others), right, "The class of the nearest mean is asked for.", wrong)


def frozen_example() -> tuple[nn.Module, Tensor, Tensor]:
    """A tiny network with batch-norm and a head `fc`, and a batch of 6 images."""
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("conv", nn.Conv2d(1, 4, 3))
        network.add_module("bn", nn.BatchNorm2d(4))
        network.add_module("flat", nn.Flatten())
        network.add_module("fc", nn.Linear(16, 3))
    network.bn.running_mean.fill_(0.3)
    return network, torch.randn(6, 1, 4, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2])


def of_the_head(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of a head's weight and bias, in one row."""
    loss = functional.cross_entropy(network(inputs), labels)
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, [*network.fc.parameters()])])


@exercise("9.3")
def only_the_head(head_step: Callable) -> None:
    """`head_step` (network, inputs, labels, rate): one step of the head; the body stays bit for bit."""
    network, inputs, labels = frozen_example()
    before = copy.deepcopy(network)
    modes = [copy.deepcopy(before).train(train) for train in (False, True)]
    right, trained = (of_the_head(one, inputs, labels) for one in modes)
    head_step(network.train(), inputs, labels, 0.5)
    state, first = network.state_dict(), before.state_dict()
    moved = {name for name in state if not torch.equal(state[name], first[name])}
    expect(
        not moved & {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"},
        "The batch-norm of the body has new statistics: in train mode each forward pass changes them.",
    )
    body = {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}
    expect(not moved & body, "The body has moved: only fc may.")
    expect("fc.weight" in moved, "The head has not moved.")
    expect("fc.bias" in moved, "The head's bias has not moved.")
    head = parameters_to_vector(before.fc.parameters())
    step = (head - parameters_to_vector(network.fc.parameters())) / 0.5
    wrong = [
        (-right, "That step climbs: subtract the gradient."),
        (trained, "Its gradient is that of train mode, where a batch normalizes itself: use eval mode."),
        (right * 6, "That is the gradient of the summed loss: the mean over the images is asked for."),
    ]
    said = "One step of SGD is asked for: parameter − rate · gradient, for weight and bias."
    judge(step, right, said, wrong, tolerance=1e-3)
    once = copy.deepcopy(network).eval()
    second = of_the_head(once, inputs, labels)
    head_step(network, inputs, labels, 0.5)
    step = (parameters_to_vector(once.fc.parameters()) - parameters_to_vector(network.fc.parameters())) / 0.5
    said = "A second call takes another step than the first: is the first one's gradient still there?"
    same(step, second, said, tolerance=1e-3)


@exercise("9.1")
def so_many_of_each(draw: Callable) -> None:
    """`draw` (labels, count, seed) -> indices, so many of each class, other ones for another seed."""
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 30)
    given = draw(labels, 4, 0)
    expect(isinstance(given, Tensor) and given.ndim == 1, "Return the indices as one tensor (n,).")
    expect(not given.is_floating_point() and given.dtype != torch.bool, "Indices are whole numbers.")
    expect(len(given) != 4, "That is so many in all: so many of each class are asked for.")
    expect(bool(((given >= 0) & (given < len(labels))).all()), "An index is outside of the labels.")
    counts = torch.bincount(labels[given], minlength=3).tolist()
    expect(counts == [4, 4, 4], f"Of the classes you draw {counts} images: 4 of each are asked for.")
    expect(len(given.unique()) == len(given), "An image is drawn twice.")
    expect(torch.equal(given, draw(labels, 4, 0)), "The same seed has to draw the same images.")
    others = [draw(labels, 4, seed) for seed in (1, 2)]
    expect(
        any(set(given.tolist()) != set(one.tolist()) for one in others),
        "Each seed draws the same images: the first ones of a file are often of one kind.",
    )


@exercise("9.4")
def latent(train_rounded: Callable) -> None:
    """`train_rounded` (weight, scale, gradient, rate, steps) -> what the network sees in the end."""
    weight, scale, rate, steps = torch.tensor([0.02, 0.315, -0.17]), 0.1, 0.5, 4
    goal = torch.tensor([0.28, 0.26, -0.2])

    def gradient(seen: Tensor) -> Tensor:
        return seen - goal

    def seen(w: Tensor) -> Tensor:
        return (w / scale).round() * scale

    float_only = stuck = behind = once = weight
    for _ in range(steps):
        float_only = float_only - rate * gradient(float_only)
        stuck = seen(seen(stuck) - rate * gradient(seen(stuck)))
        behind = behind - rate * gradient(seen(behind))
        once = once - rate * gradient(seen(weight))
    wrong = [
        (behind, "That is the float weight behind: return what the network sees, the rounded one."),
        ((behind / scale).round(), "Those are the codes: times the scale they are the weight."),
        (stuck, "You round after each step, and small steps are lost: keep a float weight behind."),
        (float_only, "You train without rounding: the gradient is that of the rounded weight."),
        (seen(float_only), "You round at the end only: each gradient is that of the rounded weight."),
        (seen(once), "The gradient is computed once: each step has its own."),
        (seen(weight), "The weight has not moved."),
    ]
    given = train_rounded(own := weight.clone(), scale, gradient, rate, steps)
    judge(given, seen(behind), "The rounding of a float weight that took all the steps is asked for.", wrong)
    expect(torch.equal(own, weight), "You changed the weight that was given.")


@exercise("9.5")
def of_a_rank(best_of_rank: Callable) -> None:
    """`best_of_rank` (difference, rank) -> the nearest difference of that rank, in its shape."""
    difference = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    matrix = difference.flatten(1)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    shape = difference.shape
    pixels = difference.permute(0, 2, 3, 1).reshape(-1, 3)
    u, s, v = torch.linalg.svd(pixels, full_matrices=False)
    other = (u[:, :2] * s[:2] @ v[:2]).view(4, 2, 2, 3).permute(0, 3, 1, 2)
    wrong = [
        ((left[:, -2:] * sizes[-2:] @ right[-2:]).view(shape), "Those are the smallest: keep the largest."),
        ((left[:, :2] @ right[:2]).view(shape), "The singular values are missing between the two factors."),
        ((left[:, :2] * sizes[:2] @ right[:2]), "That is the matrix: give it the difference's shape again."),
        ((left[:, :1] * sizes[:1] @ right[:1]).view(shape), "One rank is missing: `[:rank]` has so many."),
        (other, "A row is an output channel: `flatten(1)` makes the matrix."),
        (difference, "Nothing is left out."),
    ]
    known = [(w, said) for w, said in wrong if tuple(w.shape) == tuple(shape)]
    given = best_of_rank(difference, 2)
    tell(given, [(w, said) for w, said in wrong if tuple(w.shape) != tuple(shape)])
    right_one = (left[:, :2] * sizes[:2] @ right[:2]).view(shape)
    judge(given, right_one, "The largest singular values with their vectors are asked for.", known)


@exercise("9.6")
def only_its_base(second: Callable) -> None:
    """`second` (weight, difference) -> the second task's weight; another base is a ValueError."""
    weight = torch.tensor([[1.0, 2], [3, 4]])
    digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    difference = {"base": digest, "places": torch.tensor([1, 2]), "values": torch.tensor([0.5, -1.0])}
    right = torch.tensor([[1.0, 2.5], [2, 4]])
    wrong = [
        (torch.tensor([[1.0, 0.5], [-1, 4]]), "You put the values in the weights' place: add them."),
        (torch.tensor([[0.0, 0.5], [-1, 0]]), "That is the difference alone: the first weight is missing."),
        (right.flatten(), "Give the weight its shape again."),
    ]
    tell(given := second(weight, difference), [w for w in wrong if w[0].ndim == 1])
    judge(given, right, "The weight with the values added at their places is asked for.", wrong[:2])
    expect(
        torch.equal(weight, torch.tensor([[1.0, 2], [3, 4]])),
        "The first task's weight has changed: it needs its own network still. Work on a copy.",
    )
    try:
        second(weight + 1e-6, difference)
    except ValueError as error:
        told = str(error)
    except Exception as error:
        raise Wrong(f"You raise a {type(error).__name__}: for another base raise a ValueError.") from None
    else:
        raise Wrong("You take a base that is not its own: then every number that comes out is wrong.")
    expect(len(told) > 10, "Say in the ValueError what is wrong, in words.")
