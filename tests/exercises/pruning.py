"""Answers to the exercises of 03_pruning."""

import copy
import itertools
import math

import torch
from scipy.stats import entropy
from torch import nn


def highest(score, share, *, floor=False):
    goes = (int if floor else round)(share * score.numel())
    mask = torch.ones(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort()[:goes]] = False
    return mask.view_as(score)


def at_least(score, share):
    return score >= score.flatten().kthvalue(round(share * score.numel())).values


def by_row(score, share):
    return torch.stack([highest(row, share) for row in score])


def scores(w, g, h, *, magnitude=None, taylor=None, damage=None):
    changed = {"magnitude": magnitude, "Taylor": taylor, "OBD": damage}
    right = {"magnitude": abs(w), "Taylor": abs(w) * abs(g), "OBD": 0.5 * h * w * w}
    return {name: right[name] if changed[name] is None else changed[name] for name in right}


def by_columns(weight, kept, moment, *, own=True, right=1.0, whole=False):
    """Row by row, over the numbers of the columns; `right` weighs what the removed weights did."""
    new = weight * 0
    for row in range(len(weight)):
        stay, gone = kept[row].nonzero().flatten(), (~kept[row]).nonzero().flatten()
        old = weight[row if own else 0]
        sums = moment[stay][:, stay] @ old[stay] + right * moment[stay][:, gone] @ old[gone]
        if whole:
            new[row, stay] = torch.linalg.inv(moment)[stay][:, stay] @ sums
        else:
            new[row, stay] = torch.linalg.pinv(moment[stay][:, stay]) @ sums
    return new


def nowhere_zero(weight, kept, moment):
    return torch.where(kept, by_columns(weight, kept, moment), weight)


def statistics(memory, before, after, eps, *, power=0.5, start=None, sign=1, keep=1, safe=True):
    (mean, variance), (m0, v0), (m1, v1) = memory, before, after
    ratio = v1 / (v0 + eps if safe else v0)
    start = m1 if start is None else start
    return start + keep * sign * (mean - m0) * ratio**power, variance * ratio


def total(table, choice):
    return sum(table[layer][share] for layer, share in choice.items())


def all_of(cost):
    return [dict(zip(cost, shares)) for shares in itertools.product(*cost.values())]


def recursive(cost, harm, budget):
    """Layer by layer, best first of all that the rest of the budget pays for."""
    [layer, *rest] = cost
    found = []
    for share, price in cost[layer].items():
        if not rest and price <= budget:
            found.append({layer: share})
        elif rest and (behind := recursive({n: cost[n] for n in rest}, harm, budget - price)):
            found.append({layer: share, **behind})
    return min(found, key=lambda choice: total(harm, choice)) if found else None


def below(cost, harm, budget):
    return min((c for c in all_of(cost) if total(cost, c) < budget), key=lambda c: total(harm, c))


def uniform(cost, harm, budget):
    paid = [c for c in all_of(cost) if total(cost, c) <= budget and len(set(c.values())) == 1]
    return min(paid, key=lambda c: total(harm, c))


def spent(cost, harm, budget):
    return max((c for c in all_of(cost) if total(cost, c) <= budget), key=lambda c: total(cost, c))


def last_alone(cost, harm, budget):
    return min((c for c in all_of(cost) if total(cost, c) <= budget), key=lambda c: harm["c"][c["c"]])


def fair(cost, harm, budget):
    return {n: min((z for z in own if own[z] <= budget / 3), key=harm[n].get) for n, own in cost.items()}


def greedy(cost, harm, budget):
    choice, after = dict.fromkeys(cost, 0.0), {0.0: 0.5, 0.5: 0.9}
    while total(cost, choice) > budget:
        steps = {n: harm[n][after[z]] - harm[n][z] for n, z in choice.items() if z in after}
        layer = min(steps, key=steps.get)
        choice[layer] = after[choice[layer]]
    return choice


def smaller(share, *, mask=None, value=16.0, kept=None, before=32.0):
    mask = entropy([share, 1 - share], base=2) if mask is None else mask
    return before / (mask + value * (1 - share if kept is None else kept))


def plain_entropy(share):
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def narrow(block, kept, *, norm=None, reads=None, copied=True, columns=True, parts=None):
    """`norm` and `reads`: the channels that batch-norm and the second convolution take, if others."""
    thin = copy.deepcopy(block) if copied else block
    norm, reads = (kept if other is None else other for other in (norm, reads))
    thin.conv1.weight = nn.Parameter(block.conv1.weight.detach().index_select(0, kept))
    state = {name: tensor[norm] for name, tensor in block.bn1.state_dict().items() if tensor.ndim}
    thin.bn1 = nn.BatchNorm2d(len(kept)).eval()
    for name, tensor in state.items():
        if name in (parts or state):
            getattr(thin.bn1, name).data = tensor
        else:
            getattr(thin.bn1, name).data = getattr(block.bn1, name).data
    thin.conv2.weight = nn.Parameter(block.conv2.weight.detach().index_select(int(columns), reads))
    return thin


def complement(block, kept):
    gone = [c for c in range(len(block.bn1.weight)) if c not in kept.tolist()]
    return narrow(block, torch.tensor(gone)[: len(kept)])


RIGHT = {
    "3.1": [highest],
    "3.2": [scores],
    "3.3": [by_columns],
    "3.4": [statistics],
    "3.5": [recursive],
    "3.6": [smaller],
    "3.7": [narrow],
}
WRONG = {
    "3.1": [
        (lambda score, share: ~highest(score, share), "inverted"),
        (lambda score, share: highest(score, 1 - share), "the share that goes"),
        (at_least, "equals the threshold"),
        (lambda score, share: score > share * score.max(), "no share of the largest score"),
        (lambda score, share: highest(score.abs(), share), "absolute value"),
        (by_row, "Each row"),
        (lambda score, share: highest(score, share, floor=True), "nearest whole number"),
        (lambda score, share: highest(score, share).float(), "bool tensor"),
        (lambda score, share: highest(score, share).flatten(), "shape is (15,)"),
    ],
    "3.2": [
        (lambda w, g, h: scores(w, g, h, magnitude=w), "−2 matters more"),
        (lambda w, g, h: scores(w, g, h, taylor=w * g), "both signs"),
        (lambda w, g, h: scores(w, g, h, taylor=g.abs()), "the gradient's size"),
        (lambda w, g, h: scores(w, g, h, damage=h * w**2), "factor of ½"),
        (lambda w, g, h: scores(w, g, h, damage=h * w.abs() / 2), "weight is squared"),
        (lambda w, g, h: scores(w, g, h, damage=(h * w) ** 2 / 2), "do not square it again"),
        (lambda w, g, h: scores(w, g, h, damage=(g * w) ** 2 / 2), "mean gradient is no mean square"),
        (lambda w, g, h: scores(w, g, h, damage=h / 2), "curvature alone"),
        (lambda w, g, h: scores(w, g, h, damage=w**2 / h.clamp(min=0.1) / 2), "OBD differs"),
        (lambda w, g, h: abs(w), "A dictionary"),
    ],
    "3.3": [
        (lambda weight, kept, moment: weight * kept, "You only mask"),
        (nowhere_zero, "outside the mask"),
        (lambda weight, kept, moment: by_columns(weight, kept, moment, whole=True), "part of the inverse"),
        (lambda weight, kept, moment: by_columns(weight, kept, moment, right=-1.0), "sign is wrong"),
        (lambda weight, kept, moment: by_columns(weight, kept, moment, own=False), "its own weights"),
        (lambda weight, kept, moment: by_columns(weight, kept, moment @ moment), "least-squares"),
        (lambda weight, kept, moment: by_columns(weight, kept, moment)[0], "shape of the weight"),
    ],
    "3.4": [
        (lambda *given: statistics(*given, power=0), "faulty line"),
        (lambda *given: statistics(*given, keep=0), "knew better"),
        (lambda *given: statistics(*given, power=1), "ratio of variances"),
        (lambda *given: statistics(*given, start=given[0][0]), "Start from"),
        (lambda *given: statistics(*given, sign=-1), "sign is wrong"),
        (lambda *given: (statistics(*given)[0], given[0][1]), "variance was right"),
        (lambda *given: statistics(*given, safe=False), "divides by 0"),
        (lambda *given: statistics(*given)[0], "In this order"),
    ],
    "3.5": [
        (lambda cost, harm, budget: dict.fromkeys(cost, 0.0), "bytes, the budget is"),
        (lambda cost, harm, budget: dict.fromkeys(cost, 0.9), "smallest file"),
        (uniform, "same share everywhere"),
        (fair, "one may spend what another saves"),
        (spent, "as many bytes as you can"),
        (greedy, "compare whole choices"),
        (below, "exactly the budget"),
        (last_alone, "another choice"),
        (lambda *given: tuple(recursive(*given).values()), "A dictionary"),
    ],
    "3.6": [
        (lambda z: smaller(z, mask=0), "forget the mask"),
        (lambda z: smaller(z, mask=1), "A bit for each weight"),
        (lambda z: smaller(z, mask=entropy([z, 1 - z])), "natural logarithm"),
        (lambda z: smaller(z, value=32), "fp16 has 16"),
        (lambda z: smaller(z, kept=z), "the share of zeros"),
        (lambda z: 1 / smaller(z), "upside down"),
        (lambda z: smaller(z, before=16), "Compared with float32"),
        (lambda z: smaller(z, mask=plain_entropy(z)), "your function fails"),
        (lambda z: smaller(z) if z else smaller(z, mask=1), "0 · log 0"),
        (lambda z: smaller(z, mask=0.5), "is asked for"),
    ],
    "3.7": [
        (lambda block, kept: narrow(block, kept, columns=False), "its columns"),
        (complement, "channels that should go"),
        (lambda block, kept: narrow(block, kept, norm=torch.arange(len(kept))), "first channels"),
        (lambda block, kept: narrow(block, kept, reads=kept.flip(0)), "masked twin"),
        (lambda block, kept: narrow(block, kept, copied=False), "block itself"),
        (lambda block, kept: narrow(block, kept, parts=("weight", "bias")), "bn1.running_mean"),
        (lambda block, kept: copy.deepcopy(block), "select its rows"),
        (lambda block, kept: block.conv1.weight[kept], "A block is asked for"),
    ],
}
