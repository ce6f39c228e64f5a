"""Answers to the exercises of 09_transfer_learning."""

import hashlib

import torch
from torch.nn import functional


def means(features, labels):
    return torch.stack([features[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


def by_a_loop(features, labels, others):
    middle = means(features, labels)
    return torch.tensor([int((middle - one).square().sum(1).argmin()) for one in others])


def sums(features, labels, others):
    wrong = torch.stack([features[labels == k].sum(0) / len(features) for k in range(int(labels.max()) + 1)])
    return torch.cdist(others, wrong).argmin(1)


def step(mode="eval", moved=("fc",), sign=1.0, reduction="mean", clear=True, bias=1.0):
    """A step of SGD, with its mistakes as options."""

    def head_step(network, inputs, labels, rate):
        getattr(network, mode)()
        loss = functional.cross_entropy(network(inputs), labels, reduction=reduction)
        if clear:
            network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.startswith(moved):
                    parameter -= sign * rate * (bias if name.endswith("bias") else 1) * parameter.grad

    return head_step


def in_train_mode_with_statistics_restored(network, inputs, labels, rate):
    kept = {name: tensor.clone() for name, tensor in network.bn.state_dict().items()}
    step("train")(network, inputs, labels, rate)
    network.bn.load_state_dict(kept)


def with_an_optimizer(network, inputs, labels, rate):
    network.eval()
    optimizer = torch.optim.SGD(network.fc.parameters(), lr=rate)
    optimizer.zero_grad()
    functional.cross_entropy(network(inputs), labels).backward()
    optimizer.step()


def by_lists(labels, count, seed):
    draw, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        chosen += places[torch.randperm(len(places), generator=draw)[:count]].tolist()
    return torch.tensor(chosen)


def anything(labels, count, seed):
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: 3 * count]


def with_repetition(labels, count, seed):
    draw = torch.Generator().manual_seed(seed)
    places = [(labels == label).nonzero().flatten() for label in labels.unique()]
    return torch.cat([own[torch.randint(3, (count,), generator=draw)] for own in places])


def first(labels, count, seed):
    return torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()])


def seen(weight, scale):
    return (weight / scale).round() * scale


def stuck(weight, scale, gradient, rate, steps):
    for _ in range(steps):
        weight = seen(seen(weight, scale) - rate * gradient(seen(weight, scale)), scale)
    return weight


def behind(weight, scale, gradient, rate, steps):
    for _ in range(steps):
        weight = weight - rate * gradient(seen(weight, scale))
    return weight


def in_place(weight, scale, gradient, rate, steps):
    for _ in range(steps):
        weight -= rate * gradient(seen(weight, scale))
    return seen(weight, scale)


def in_floats(weight, scale, gradient, rate, steps):
    for _ in range(steps):
        weight = weight - rate * gradient(weight)
    return weight


def recursive(weight, scale, gradient, rate, steps):
    if not steps:
        return torch.fake_quantize_per_tensor_affine(weight, scale, 0, -128, 127)
    seen_now = torch.fake_quantize_per_tensor_affine(weight, scale, 0, -128, 127)
    return recursive(weight - rate * gradient(seen_now), scale, gradient, rate, steps - 1)


def svd(x):
    return torch.linalg.svd(x.flatten(1), full_matrices=False)


def ranks(x, chosen, sizes=True):
    u, s, v = svd(x)
    return (u[:, chosen] * (s[chosen] if sizes else 1)) @ v[chosen]


def by_projection(x, rank):
    matrix = x.flatten(1)
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
    return (matrix @ vectors @ vectors.T).view_as(x)


def by_pixels(x, rank):
    rows = x.permute(0, 2, 3, 1)
    u, s, v = torch.linalg.svd(rows.reshape(-1, rows.shape[-1]), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).view(rows.shape).permute(0, 3, 1, 2)


def is_its_base(weight, difference):
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest() == difference["base"]


def trusting(weight, difference):
    flat = weight.flatten().clone()
    flat[difference["places"]] += difference["values"]
    return flat.view(weight.shape)


def checked(how, error=ValueError):
    def second(weight, difference):
        if not is_its_base(weight, difference):
            raise error("this difference is to another weight")
        return how(weight, difference)

    return second


def added_in_place(weight, difference):
    weight.view(-1)[difference["places"]] += difference["values"]
    return weight


def replaced(weight, difference):
    flat = weight.flatten().clone()
    flat[difference["places"]] = difference["values"]
    return flat.view(weight.shape)


def silent(weight, difference):
    if not is_its_base(weight, difference):
        raise ValueError
    return trusting(weight, difference)


RIGHT = {
    "9.2": [by_a_loop],
    "9.3": [with_an_optimizer],
    "9.1": [by_lists],
    "9.4": [recursive],
    "9.5": [by_projection],
    "9.6": [checked(lambda w, d: w + torch.zeros(w.numel()).scatter(0, d["places"], d["values"]).view_as(w))],
}
WRONG = {
    "9.2": [
        (lambda x, y, z: torch.cdist(z, means(x, y)).argmax(1), "farthest"),
        (lambda x, y, z: torch.cdist(z, means(x, y)).min(1).values, "Those are the distances"),
        (lambda x, y, z: torch.cdist(z, x).argmin(1), "numbers of images"),
        (lambda x, y, z: y[torch.cdist(z, x).argmin(1)], "nearest image's class"),
        (lambda x, y, z: (z @ means(x, y).T).argmax(1), "favours long means"),
        (sums, "number of all images"),
        (lambda x, y, z: torch.cdist(z, means(x, y), p=1).argmin(1), "The class of the nearest mean"),
    ],
    "9.3": [
        (step("train"), "new statistics"),
        (step(moved=("fc", "conv")), "The body has moved"),
        (lambda *given: None, "The head has not moved"),
        (step(bias=0), "The head's bias"),
        (step(sign=-1), "That step climbs"),
        (in_train_mode_with_statistics_restored, "that of train mode"),
        (step(reduction="sum"), "the summed loss"),
        (step(bias=2), "One step of SGD"),
        (step(clear=False), "still there"),
    ],
    "9.1": [
        (lambda y, n, seed: by_lists(y, n, seed).tolist(), "as one tensor"),
        (lambda y, n, seed: by_lists(y, n, seed).float(), "whole numbers"),
        (lambda y, n, seed: anything(y, n, seed)[:n], "so many in all"),
        (lambda y, n, seed: by_lists(y, n, seed) + len(y), "outside"),
        (anything, "4 of each are asked for"),
        (with_repetition, "drawn twice"),
        (lambda y, n, seed: by_lists(y, n, int(torch.randint(10**6, ()))), "The same seed"),
        (first, "Each seed draws the same"),
    ],
    "9.4": [
        (behind, "the float weight behind"),
        (lambda *given: (behind(*given) / given[1]).round(), "Those are the codes"),
        (stuck, "small steps are lost"),
        (in_floats, "train without rounding"),
        (lambda *given: seen(in_floats(*given), given[1]), "round at the end only"),
        (lambda w, s, g, r, n: seen(w - n * r * g(seen(w, s)), s), "computed once"),
        (lambda w, s, g, r, n: seen(w, s), "has not moved"),
        (in_place, "You changed the weight"),
        (lambda w, s, g, r, n: seen(behind(w, s, g, -r, n), s), "took all the steps"),
    ],
    "9.5": [
        (lambda x, r: ranks(x, slice(-r, None)).view_as(x), "Those are the smallest"),
        (lambda x, r: ranks(x, slice(r), sizes=False).view_as(x), "singular values are missing"),
        (lambda x, r: ranks(x, slice(r)), "the difference's shape again"),
        (lambda x, r: ranks(x, slice(r - 1)).view_as(x), "One rank is missing"),
        (by_pixels, "A row is an output channel"),
        (lambda x, r: x, "Nothing is left out"),
        (lambda x, r: -ranks(x, slice(r)).view_as(x), "largest singular values"),
    ],
    "9.6": [
        (checked(replaced), "add them"),
        (checked(lambda w, d: trusting(torch.zeros_like(w), d)), "the difference alone"),
        (checked(lambda w, d: trusting(w, d).flatten()), "its shape again"),
        (checked(added_in_place), "has changed"),
        (trusting, "not its own"),
        (silent, "in words"),
        (checked(trusting, AssertionError), "raise a ValueError"),
        (checked(lambda w, d: trusting(w, d) + 1), "with the values added"),
    ],
}
