"""Answers to the exercises of 08_federated_learning."""

import torch

MODULUS = 2**16


def by_rows(updates, images):
    return torch.tensor(images, dtype=torch.float32) @ torch.stack(updates) / sum(images)


def summed(updates, images):
    return sum(update * count for update, count in zip(updates, images))


def in_place_sum(updates, images):
    return sum(update.mul_(count) for update, count in zip(updates, images)) / sum(images)


def upper_or_lower(update, step, draws):
    """The lower whole number, and one more where the draw is below the fraction."""
    lower = torch.floor(update / step)
    return lower + (draws < update / step - lower)


def by_sorting(update, count):
    mask = torch.zeros(len(update), dtype=torch.bool)
    mask[update.abs().argsort(descending=True, stable=True)[:count]] = True
    return mask


def to_a_mask(update, places):
    mask = torch.zeros(len(update), dtype=torch.bool)
    mask[places] = True
    return mask


def in_place(update, residual, compress):
    residual += update
    received = compress(residual)
    residual -= received
    return [received, residual]


def held(**changed):
    """Error feedback with one thing changed; each is a function of what there is."""

    def feedback(update, residual, compress):
        wanted = changed.get("wanted", lambda update, residual: update + residual)(update, residual)
        received = compress(wanted)
        there = {"update": update, "residual": residual, "received": received, "wanted": update + residual}
        left = changed.get("left", lambda wanted, received, **_: wanted - received)(**there)
        return received, left

    return feedback


def twice(update, residual, compress):
    return compress(update + residual), update + residual - compress(update + residual)


def uncompressed(update, residual, compress):
    return update + residual, torch.zeros_like(update)


def squares(x):
    return x.square().sum()


def mask(seed, count):
    return torch.randint(MODULUS, (count,), generator=torch.Generator().manual_seed(seed))


def hidden(signs, *, codes=True, reduced=True, one=False, who=lambda client, other, clients: other != client):
    """Masks with a sign each pair, of those that `who` names."""

    def hide(own, client, seeds):
        total = own.clone() if codes else torch.zeros_like(own)
        for other, seed in enumerate(seeds[client]):
            if who(client, other, len(seeds)):
                total += signs(client, other) * mask(seed, 1 if one else len(own))
        return total % MODULUS if reduced else total

    return hide


def first_adds(client, other):
    return 1 if client < other else -1


RIGHT = {
    "8.1": [by_rows],
    "8.2": [upper_or_lower],
    "8.3": [by_sorting],
    "8.4": [in_place],
    "8.5": [lambda w, s, compress: compress(w - s).add(s)],
    "8.6": [lambda u, r: (u - r).norm() ** 2 / torch.dot(u, u)],
    "8.7": [hidden(lambda client, other: -first_adds(client, other))],
}
WRONG = {
    "8.1": [
        (lambda u, n: torch.stack(u).mean(0), "counts the same"),
        (summed, "number of all images"),
        (lambda u, n: summed(u, n) / len(u), "number of clients"),
        (lambda u, n: sum(u), "sum of the updates"),
        (lambda u, n: summed(u, [k * k for k in n]) / sum(k * k for k in n), "square of its images"),
        (lambda u, n: (summed(u, n) / sum(n)).mean(), "one number"),
        (lambda u, n: summed(u, [1 / (k or 1) for k in n]) / sum(1 / (k or 1) for k in n), "upside down"),
        (lambda u, n: summed(u, n[::-1]) / sum(n), "images / all images · update"),
        (lambda u, n: summed(u, [max(k, 1) for k in n]) / sum(max(k, 1) for k in n), "without images"),
        (in_place_sum, "changed the updates"),
    ],
    "8.2": [
        (lambda u, s, d: torch.round(u / s), "draws do not count"),
        (lambda u, s, d: torch.floor(u / s), "always round down"),
        (lambda u, s, d: torch.ceil(u / s), "always round up"),
        (lambda u, s, d: torch.floor(u + d), "do not divide by the step"),
        (lambda u, s, d: torch.round(u / s + d), "half a step too much"),
        (lambda u, s, d: torch.floor(u / s) + (d < 0.5), "toss a coin"),
        (lambda u, s, d: torch.floor(u / s) + (d > u / s - torch.floor(u / s)), "swapped"),
        (lambda u, s, d: (u / s + d).int(), "cuts towards 0"),
        (lambda u, s, d: s * torch.floor(u / s + d), "multiples of the step"),
        (lambda u, s, d: u / s + d - 0.5, "Codes are whole numbers"),
        (lambda u, s, d: torch.floor(u / s + 4 * d - 1.5), "Only the two whole numbers"),
        (lambda u, s, d: torch.floor(u * s + d), "The mean of the codes"),
        (lambda u, s, d: torch.floor(u / s + d).mean(0), "that of the update"),
        (lambda u, s, d: torch.floor(u / s + torch.rand_like(d)), "draw nothing yourself"),
    ],
    "8.3": [
        (lambda u, k: to_a_mask(u, u.topk(k).indices), "with their signs"),
        (lambda u, k: to_a_mask(u, (-u.abs()).topk(k).indices), "smallest in size"),
        (lambda u, k: ~by_sorting(u, k), "inverted"),
        (lambda u, k: u * by_sorting(u, k), "Those are the numbers"),
        (lambda u, k: u.abs().topk(k).indices, "Those are the places"),
        (lambda u, k: u.abs() > u.abs().sort().values[-k], "One too few"),
        (lambda u, k: u.abs() >= u.abs().sort().values[-k], "that are alike"),
        (lambda u, k: by_sorting(u, k).float(), "True and False: `dtype"),
        (lambda u, k: to_a_mask(u, list(range(k))), "of the largest size"),
    ],
    "8.4": [
        (uncompressed, "Nothing was compressed"),
        (twice, "compress twice"),
        (held(wanted=lambda update, residual: update), "The residual is not sent"),
        (held(wanted=lambda update, residual: residual), "Only the residual is sent"),
        (held(wanted=lambda update, residual: update - residual), "wrong sign: add it"),
        (lambda u, m, compress: held()(u, m, compress)[::-1], "In this order"),
        (held(left=lambda wanted, received, **_: received - wanted), "less what did"),
        (held(left=lambda update, received, **_: update - received), "old residual is lost"),
        (held(left=lambda wanted, residual, received, **_: residual + wanted - received), "counts twice"),
        (held(left=lambda wanted, **_: wanted), "keep all of it"),
        (held(left=lambda received, **_: received), "keep what arrived"),
        (held(left=lambda received, **_: 0 * received), "Nothing is kept"),
        (held(wanted=lambda update, residual: 2 * update + residual), "is to be compressed"),
    ],
    "8.5": [
        (lambda w, s, compress: w, "Nothing was compressed"),
        (lambda w, s, compress: compress(w), "send the weights themselves"),
        (lambda w, s, compress: s - compress(s - w), "difference has the wrong sign"),
        (lambda w, s, compress: compress(w - s), "That is the message"),
        (lambda w, s, compress: w + compress(w - s), "do not have the server's weights"),
        (lambda w, s, compress: s - compress(w - s), "The message has the wrong sign"),
        (lambda w, s, compress: w + 0 * compress(w - s), "never see the server's weights"),
        (lambda w, s, compress: s + 0 * compress(w - s), "stay where they were"),
        (lambda w, s, compress: s + compress((w - s) / 2), "is to be compressed"),
    ],
    "8.6": [
        (lambda u, r: (r - u).norm() / u.norm(), "ratio of the lengths"),
        (lambda u, r: squares(r - u) / squares(r), "not by what was received"),
        (lambda u, r: (r - u).square().mean(), "mean square"),
        (lambda u, r: squares(r - u), "That is the square of what is lost"),
        (lambda u, r: ((r - u) / u).square().mean(), "Sum first"),
        (lambda u, r: (r - u).sum().square() / u.sum().square(), "Square each number"),
        (lambda u, r: (r - u).abs().sum() / u.abs().sum(), "sums of sizes"),
        (lambda u, r: 1 - squares(r - u) / squares(u), "share that arrives"),
        (lambda u, r: squares(r) / squares(u), "how long the received update is"),
    ],
    "8.7": [
        (lambda codes, client, seeds: codes, "readable"),
        (hidden(lambda client, other: 1), "Both clients of a pair"),
        (hidden(first_adds, codes=False), "codes are missing"),
        (hidden(first_adds, reduced=False), "0 to 65,535"),
        (hidden(first_adds, one=True), "one of its own"),
        (hidden(first_adds, who=lambda client, other, clients: True), "none with itself"),
        (hidden(first_adds, who=lambda client, other, clients: other == (client + 1) % clients), "*each*"),
        (lambda codes, client, seeds: hidden(first_adds)(codes, client, seeds)[:1], "a hidden code for each"),
    ],
}
