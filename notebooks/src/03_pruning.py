# ---
# jupyter:
#   jupytext:
#     formats: ipynb,src//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Pruning: fewer weights, fewer channels, fewer layers
#
# What can be cut from a trained network? The order is a practitioner's: a baseline, a score of **importance**
# for each part, the **cut**, **fine-tuning**, and all that once more. Some cuts make a *file* smaller and leave the
# arithmetic as it was; others give an ordinary, smaller network that every runtime makes faster. Each
# network ends as a file that a fresh process loads.

# %% tags=["parameters"]
points: list = ["magnitude_global:sparsity=0.9 tuned", "channels_fisher:macs=4x mended tuned int8"]  # files
peers: list = []  # production counterparts, such as torch_pruning_taylor:macs=4x even tuned
scoring_images: int = 128  # [2, 100000] training pictures for gradients, curvature and batch-norm
train_epochs: float = 0.5  # [0.001, 1000] of fine-tuning, all steps together, and of the dense control
learning_rate: float = 0.02  # [0.00001, 1] peak of that training
steps: int = 3  # [1, 100] cuts of an iterative or gradual schedule
multiple: int = 8  # [1, 64] of which the number of channels is, as far as a layer has so many
upstream: list = []  # run folders of 01_baseline and of the first part; empty: 01 with its defaults
part: str = ""  # name of this part of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its points may be claimed
seed: int = 1  # [0, 1000000] which pictures score, random scores, the order of training
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/03_pruning

# %%
import copy
import functools
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from scipy.stats import spearmanr

# %%
from nnc_utils import (
    allocation,
    artifact,
    batch_norm,
    claims,
    curvature,
    data,
    encoding,
    evaluation,
    figures,
    models,
    results,
    scoring,
    sensitivity,
)
from nnc_utils import peers as counterparts
from nnc_utils.devices import exact_device
from nnc_utils.distillation import teaching
from nnc_utils.pruning import channels, obs, schedules, structured, unstructured
from nnc_utils.quantization import activations, uniform
from nnc_utils.run import start
from nnc_utils.training import TrainingError, cross_entropy, fit

figures.style()
# %%
run = start("03_pruning", globals(), needs=("01_baseline",))
baseline, *before = run.upstream
for earlier, name in itertools.product(before, ("train_epochs", "learning_rate")):
    if (given := earlier.record.parameters[name]) != globals()[name]:
        raise ValueError(f"{name} is {globals()[name]}, but {given} in {earlier.run}: parts share it")
reference = baseline.baseline
model = artifact.load(baseline.artifact("fp32"), trainable=True).eval()
spec = model.spec
pictures = data.load(reference.dataset, size=spec.size)
order = torch.randperm(len(pictures.train.labels), generator=torch.Generator().manual_seed(seed))
chosen = order[:scoring_images]
seen, seen_labels = pictures.normalize(pictures.train.images[chosen]), pictures.train.labels[chosen].long()
print(f"{reference.model} on {reference.dataset}, made by {baseline.run}")

# %%
WEIGHTS = {f"{kind}_global": kind for kind in ("magnitude", "random")}
WEIGHTS |= {kind: kind for kind in ("gradient", "taylor", "obd_fisher", "obd_hessian")}
CHANNELS = {f"channels_{kind}": kind for kind in channels.SCORES}
PEERS = {f"torch_pruning_{kind}": kind for kind in ("magnitude", "taylor", "bn_scale")}
CONTROLS = {name: name for name in ("dense_finetuned", "from_scratch", "small_dense")}
CONTROLS |= dict.fromkeys(("random_global", "channels_random"), "random")
TRAINED, CUTS = ("tuned", "taught"), ("iterative", "gradual")  # flags
MASK = (*TRAINED, "bn")
SETTINGS = dict.fromkeys(WEIGHTS, (("sparsity",), (*MASK, *CUTS))) | {"obs_block": (("sparsity",), MASK)}
SETTINGS |= {"magnitude_layerwise": (("sparsity", "rates"), (*MASK, "scanned")), "nm_2_4": (("keep",), MASK)}
SETTINGS |= dict.fromkeys(CHANNELS, (("macs",), (*TRAINED, *CUTS, "mended", "even", "int8")))
SETTINGS |= dict.fromkeys(PEERS, (("macs",), (*TRAINED, "even"))) | {"blocks": (("removed",), TRAINED)}
SETTINGS |= {"from_scratch": (("macs",), ()), "small_dense": (("macs",), ("int8",))}
RATES = (0.5, 0.8, 0.9, 0.95, 0.98)  # of the sensitivity scan


def parsed(point: str) -> tuple[str, str, dict[str, str]]:
    """ "taylor:sparsity=0.9 bn" -> "taylor", "sparsity=0.9 bn", {"sparsity": "0.9", "bn": ""}."""
    method, _, setting = point.partition(":")
    values = dict(part.partition("=")[::2] for part in setting.split())
    if point == "dense_finetuned":
        return point, "", {}
    keys, flags = SETTINGS.get(method, ((), ()))
    if not set(values) <= {*keys, *flags} or len(set(values) & set(keys)) != 1:
        known = ", ".join(f"{name}:{' or '.join(found)}" for name, (found, _) in SETTINGS.items())
        own = f"; flags of {method}: {', '.join(flags) or 'none'}" if keys else ""
        raise ValueError(f"unknown point {point!r}: one of {known}, with = and a value{own}")
    return method, setting, values


# %%
widths = {}  # MACs -> the Spec that a method of channels found, for from_scratch
for row, path in ((row, made.artifact(row.artifact_sha256)) for made in before for row in made.compression):
    if row.method in CHANNELS and not row.control:
        widths.setdefault(parsed(f"{row.method}:{row.point}")[2]["macs"], artifact.read(path).spec)

# %%
ALLOWED = {  # whether a value makes sense, and what would
    "sparsity": (lambda text: 0 <= float(text) < 1, "a share of zeros in [0, 1), such as 0.9"),
    "macs": (lambda text: text[-1] == "x" and float(text[:-1]) >= 1, "how many times fewer, such as 4x"),
    "rates": (lambda text: text == "hand", "hand"),
    "keep": (lambda text: text == "2of4", "2of4"),
    "removed": (lambda text: 1 <= int(text) <= sum(len(stage) - 1 for stage in spec.stages), "whole blocks"),
}
for place, point in enumerate([*points, *peers]):  # before any work
    method, _, values = parsed(point)
    if (method in PEERS) != (place >= len(points)):
        raise ValueError(f"{point!r}: methods belong into points, production counterparts into peers")
    for key in set(values) & set(ALLOWED):
        fits, needed = ALLOWED[key]
        try:
            sensible = fits(values[key])
        except (ValueError, IndexError):
            sensible = False
        if not sensible:
            raise ValueError(f"{point!r}: {key} is {values[key]!r}, needed is {needed}")
    if set(TRAINED) <= set(values):
        raise ValueError(f"{point!r}: either tuned or taught, which is tuned with a teacher")
    if set(CUTS) & set(values) and not set(TRAINED) & set(values):
        raise ValueError(f"{point!r}: a schedule trains between its cuts, add 'tuned'")
    if "scanned" in values and float(values.get("sparsity", 0)) not in RATES:
        raise ValueError(f"{point!r}: the scan knows the rates {', '.join(map(str, RATES))}")
    cut = [parsed(p) for p in points[:place]]
    cut = [v["macs"] for name, _, v in cut if name in CHANNELS and name not in CONTROLS]
    if method == "from_scratch" and values["macs"] not in {*cut, *widths}:
        raise ValueError(f"{point!r}: name the point of channels whose widths it takes before it")

# %% [markdown]
# ## 1 · What can be cut?
#
# Most weights are small. If they were spread like a bell curve, $|w| < \tfrac12\sigma$ would hold for
# $\operatorname{erf}(0.5/\sqrt 2)$ of them. *Predict* that share, then count it in three layers.

# %%
weights = {x.name: model.get_submodule(x.name).weight.detach() for x in models.layers(spec)}
predicted = math.erf(0.5 / 2**0.5)
rows = []
for name in ("conv1", "layer2.0.conv1", "layer4.1.conv2"):
    measured = float((weights[name].abs() < 0.5 * weights[name].std()).float().mean())
    rows.append({"layer": name, "predicted share": predicted, "measured": measured})
    rows[-1]["ratio"] = measured / predicted
pd.DataFrame(rows).round(3)

# %% [markdown]
# A **mask** $m$ says which weights stay: the network computes with $m \odot w$. Cut the smallest
# 60 % of a 5×5 tensor by hand before you run the cell: which values stay?

# %%
small = torch.linspace(-0.9, 1.2, 25).view(5, 5)
kept = unstructured.masks({"small": small.abs()}, 0.6)["small"]
figure, panels = plt.subplots(1, 3, figsize=(10, 3))
for axes, values, title in zip(
    panels, (small, kept.float(), small * kept), ("weights", "mask", "masked"), strict=True
):
    axes.imshow(values, cmap="coolwarm", vmin=-1.2, vmax=1.2)
    for (y, x), value in np.ndenumerate(values.numpy()):
        axes.text(x, y, f"{value + 0.0:.2g}", ha="center", va="center", fontsize=8)
    axes.set_title(title)
    axes.axis("off")
figures.show(figure, "A 5x5 tensor: its weights, a mask that keeps the ten largest, and the masked weights")

# %% [markdown]
# ## 2 · Importance: what would the loss say?
#
# A weight is important if the loss minds its absence. To second order, for a change $\delta$ of the weights
#
# $$\Delta L \approx g^\top \delta + \tfrac12\, \delta^\top H \delta, \qquad g = \partial L/\partial w$$
#
# and cutting one weight is $\delta = -w$. So there are scores of three orders: **magnitude** $|w|$ takes
# every slope and curvature as equal; **Taylor** $|w \cdot g|$ is the first term; **Optimal Brain Damage** $\tfrac12 h w^2$
# is the second, with the diagonal of $H$ alone, measured itself or as Fisher information. The **gradient's size**
# $|g|$ is often called second-order. It is not: it holds no curvature, nor the weight. *Predict*: which
# ranks single weights of the classifier as the loss does when they are cut, one at a time?

# %%
layer = "fc"
places = torch.randperm(weights[layer].numel(), generator=torch.Generator().manual_seed(seed))[:30]
known = {
    kind: unstructured.scores(model, kind, images=seen[:64], labels=seen_labels[:64], seed=seed)
    for kind in ("magnitude", "gradient", "taylor", "obd_fisher", "obd_hessian")
}
cut_one = {}
for place in places.tolist():
    cut_one[place] = weights[layer].clone()
    cut_one[place].view(-1)[place] = 0
harm = sensitivity.loss_increase(model, {layer: cut_one}, seen[:64], seen_labels[:64])[layer]
measured = [abs(harm[place]) for place in places.tolist()]
pd.DataFrame(
    {"score": kind, "rank correlation": spearmanr(found[layer].flatten()[places], measured).statistic}
    for kind, found in known.items()
).round(2)

# %% [markdown]
# **What it means.** The scores that know the loss rank single weights well, magnitude does not. That was easy: one small
# change, on the pictures that made the scores. But cuts come in millions, and slopes of either sign then cancel while curvatures add up. So look at many: cut 50 to 90 % at
# one stroke, without any training, and count right answers on validation pictures.

# %%
some = data.Split(pictures.validation.images[:500], pictures.validation.labels[:500])


def accuracy(network: torch.nn.Module, count: int = 250) -> float:
    """Percent of the first validation pictures."""
    first = data.Split(some.images[:count], some.labels[:count])
    predictions = evaluation.predict(network, first, normalize=pictures.normalize, device=exact_device())
    return evaluation.accuracy(predictions, first.labels)


shares = (0.5, 0.8, 0.9)
curves = {kind: [] for kind in ("magnitude", "taylor", "obd_fisher")}
for kind, share in ((kind, share) for kind in curves for share in shares):
    try:
        curves[kind].append(accuracy(unstructured.masked(model, unstructured.masks(known[kind], share))))
    except ValueError as error:  # a layer would be empty: no network
        print(kind, share, error)
        curves[kind].append(np.nan)
figure, axes = plt.subplots()
for (kind, values), marker in zip(curves.items(), figures.MARKERS, strict=False):
    axes.plot(shares, values, marker=marker, label=kind)
axes.axhline(accuracy(model), color="grey", linewidth=1)
axes.set(
    xlabel="share of zeros", ylabel="validation accuracy (%)", title="One cut, no training: what is left?"
)
axes.legend()
figures.show(
    figure, "Accuracy after cutting a share of all weights at once, by three scores, falling with the share"
)

# %% [markdown]
# A global threshold compares layers, and each score has its own idea of them. Where a score is small in all of a layer, the
# layer is emptied: that is an error here and not a network. What do three of them keep of each stage at 90 %?

# %%
left = {}
for kind in ("magnitude", "taylor", "gradient"):
    scores = torch.cat([values.flatten() for values in known[kind].values()])
    threshold = scores.kthvalue(round(0.9 * len(scores))).values
    stages = {}
    for name, values in known[kind].items():
        stages.setdefault(name.split(".")[0], []).append((values > threshold).flatten())
    left[kind] = {stage: 100 * float(torch.cat(parts).float().mean()) for stage, parts in stages.items()}
pd.DataFrame(left).round(1)

# %% [markdown]
# ## 3 · Optimal Brain Surgeon: the others make up for it
#
# A weight that is cut need not be missed if the others take over. With the whole matrix $H$, the best answer to
# cutting weight $q$ and what it costs are (Hassibi and Stork, 1993)
#
# $$\delta = -\frac{w_q}{[H^{-1}]_{qq}}\, H^{-1} e_q, \qquad \Delta L = \frac{w_q^2}{2\,[H^{-1}]_{qq}}$$
#
# Two weights of 1 whose inputs are correlated by 0.9. By hand: what does the second one become when the first is cut,
# and how much of the damage is left?

# %% tags=["nbval-check-output"]
moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
inverse = torch.linalg.inv(moment)
delta = -inverse[:, 0] / inverse[0, 0]
print(f"the second weight becomes {1 + float(delta[1]):.2f}")
print(f"loss {float(delta @ moment @ delta) / 2:.3f} instead of {float(moment[0, 0]) / 2:.3f}")

# %% [markdown]
# For a layer, $H$ is the Kronecker product of two second moments, of its inputs and of the loss's gradient at its
# outputs ([`curvature`](../nnc_utils/curvature.py)); the surviving weights of all rows at once are found by
# conjugate gradients ([`obs`](../nnc_utils/pruning/obs.py)). Cut 90 % of one layer. *Predict* the loss with and without
# the correction, then measure it on pictures that the curvature has not seen.

# %%
curved = curvature.curvatures(model, seen, seed=seed)
layer = "layer3.0.conv2"
kept = unstructured.masks({layer: obs.scores({layer: weights[layer]}, curved)[layer]}, {layer: 0.9})[layer]
candidates = {0: weights[layer] * kept, 1: obs.corrected(weights[layer], kept, curved[layer])}
unseen = pictures.normalize(some.images[:128]), some.labels[:128].long()
measured = sensitivity.loss_increase(model, {layer: candidates}, *unseen)[layer]
pd.DataFrame(
    {
        "weights that stay": "as they are" if number == 0 else "corrected",
        "predicted loss": curved[layer].loss(candidate - weights[layer]),
        "measured": measured[number],
    }
    for number, candidate in candidates.items()
).round(5)

# %% [markdown]
# **What would fool you.** The prediction holds for small changes around a minimum. And a correction fitted to few
# pictures fits their noise, too: damping keeps it in check.
#
# ## 4 · One threshold, or a rate for each layer?
#
# **Global**: one threshold for all layers together. **Layer-wise**: a rate for each: the same everywhere, set by hand
# (tutorials raise it from stage to stage), or from a **sensitivity scan**: cut one layer at several rates, the
# others whole, and look at the loss on validation pictures. *Predict*: which stage minds most?

# %%
HAND = {"conv1": 0.5, "layer1": 0.3, "layer2": 0.4, "layer3": 0.5, "layer4": 0.6, "fc": 0.7}


@functools.cache
def scan() -> tuple[dict[str, dict[float, float]], dict[str, dict[float, float]]]:
    """Bytes of each layer at each rate (fp16 survivors), and the loss that it adds."""
    candidates, cost = {}, {}
    for name, weight in weights.items():
        masks = {r: unstructured.masks({name: weight.abs()}, {name: r})[name] for r in RATES}
        candidates[name] = {rate: weight * mask for rate, mask in masks.items()}
        stored = {r: encoding.Dense((weight * mask).half(), mask) for r, mask in masks.items()}
        cost[name] = {rate: encoding.payload_bits(dense) / 8 for rate, dense in stored.items()}
    images, labels = pictures.normalize(some.images[:64]), some.labels[:64].long()
    return cost, sensitivity.loss_increase(model, candidates, images, labels)


def rates(values: dict[str, str]) -> dict[str, float]:
    """A share of zeros for each layer."""
    if "rates" in values:
        return {name: HAND[name.split(".")[0]] for name in weights}
    share = float(values["sparsity"])
    if "scanned" not in values:
        return dict.fromkeys(weights, share)
    cost, harm = scan()
    return allocation.allocate(cost, harm, budget=sum(costs[share] for costs in cost.values()))


# %%
cost, harm = scan()
by_scan = rates({"sparsity": "0.9", "scanned": ""})
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4))
for name, colour in zip(weights, sns.color_palette("viridis", len(weights)), strict=True):
    panels[0].plot(RATES, [harm[name][rate] for rate in RATES], color=colour, marker=".")
panels[0].set(xlabel="share of zeros in one layer", ylabel="loss added (nats)", title="Which layer minds?")
handles = [plt.Line2D([], [], color=c, label=n) for n, c in zip(("first", "last"), ("#440154", "#fde725"))]
panels[0].legend(handles=handles, title="layer")
names = list(weights)
panels[1].plot(names, [by_scan[name] for name in names], marker="o", label="scanned, bytes of 0.9 everywhere")
panels[1].plot(names, [HAND[name.split(".")[0]] for name in names], marker="s", label="by hand, other bytes")
panels[1].tick_params(axis="x", rotation=70, labelsize=7)
panels[1].set(ylabel="share of zeros", title="Rates for each layer")
panels[1].legend(fontsize=8, loc="lower right")
figures.show(
    figure, "Left: loss against the share of zeros, a line a layer. Right: rates from the scan, and by hand"
)

# %% [markdown]
# ### A pattern that hardware likes: two of four
#
# Sparse tensor cores skip zeros if of four neighbouring inputs exactly two stay. The mask is then no free choice.
# What does the restriction cost: what share of the squared weights is lost, against the best free half?

# %%
free = unstructured.masks({layer: weights[layer].abs()}, 0.5)[layer]
pattern = unstructured.two_of_four({layer: weights[layer].abs()})[layer]
energy = float(weights[layer].square().sum())
lost = {
    n: float((weights[layer] * ~m).square().sum()) / energy for n, m in (("free", free), ("2:4", pattern))
}
print({name: f"{share:.1%} of the squares lost" for name, share in lost.items()})
print("first fours:", pattern[0, :8, 0, 0].int().tolist(), "two of each stay")

# %% [markdown]
# **What would fool you.** Fewer non-zeros are no speed-up. A runtime needs kernels that skip zeros;
# [07_deployment](07_deployment.ipynb) times a masked network.
#
# ## 5 · What does a mask save in the file?
#
# The file holds which weights stay and their values, as fp16. With a share $z$ of zeros, an entropy coder needs
# $H(z) = -z\log_2 z - (1-z)\log_2(1-z)$ bits a weight for the mask, and $16\,(1-z)$ for the values:
#
# $$\text{ratio} = \frac{32}{H(z) + 16\,(1 - z)}$$
#
# *Predict* it for 90 %, then write the file.

# %%
saving = {"mean": pictures.mean, "std": pictures.std, "classes": pictures.classes, "dtype": torch.float16}
masked = unstructured.masked(model, unstructured.masks(known["magnitude"], 0.9))
saved = artifact.save(masked, run.path("scratch/masked.safetensors"), **saving)
entropy = -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)
predicted = 32 / (entropy + 1.6)
measured = artifact.fp32_bytes(spec) / saved.nbytes
print(f"predicted {predicted:.1f} times smaller, measured {measured:.1f}, ratio {measured / predicted:.2f}")

# %% [markdown]
# **What it means.** The formula knows one share for all; the file has a mask with its own entropy for each layer, and
# batch-norm and the header, too.
#
# ## 6 · Channels: a cut that makes an ordinary network
#
# Take a whole output channel away, and the layers that read it lose an input: the arithmetic shrinks on both sides.
# But a residual addition needs the same channels from both its inputs, so layers are cut in **coupled groups**.
# Before you look: which layers share their channels with the first convolution?

# %%
groups = structured.groups(spec)
names = [x.name for x in models.layers(spec)]
figure, axes = plt.subplots(figsize=(10, 3.4))
colours = dict(zip(groups, sns.color_palette("colorblind", 4) * len(groups), strict=False))
for level, (group, members) in enumerate(groups.items()):
    places = [names.index(writer) for writer in members.writers]
    axes.plot(places, [level] * len(places), color=colours[group], marker="o", linewidth=2)
    readers = [names.index(reader) for reader in members.readers]
    axes.scatter(readers, [level] * len(readers), marker="|", s=120, color=colours[group])
axes.set_xticks(range(len(names)), names, rotation=70, fontsize=7)
axes.set_yticks(range(len(groups)), groups, fontsize=7)
axes.set_title("Coupled groups: ● layers that write the same channels, | layers that read them")
figures.show(
    figure, "For each group of coupled channels, the layers that write them and those that read them"
)

# %% [markdown]
# Now remove half of the channels of every group, for good: out comes a narrower Spec with its weights. MACs are
# inputs times outputs. *Predict* how many are left; and predict how far its logits are from those of a twin that
# keeps all channels but multiplies the removed ones by 0.

# %%
fisher = channels.scores(model, "fisher", images=seen, labels=seen_labels)
half = {name: values.topk(len(values) // 2).indices.sort().values for name, values in fisher.items()}
narrow = structured.remove_channels(model, half)
twin = copy.deepcopy(model)
norms = {x.name: x.batch_norm for x in models.layers(spec)}
for name, kept in half.items():
    for writer in groups[name].writers:
        gone = torch.ones(len(fisher[name]), dtype=torch.bool)
        gone[kept] = False
        norm = twin.get_submodule(norms[writer])
        norm.weight.data[gone], norm.bias.data[gone] = 0.0, 0.0
with torch.inference_mode():
    apart = float((narrow(seen[:32]) - twin(seen[:32])).abs().max())
predicted, measured = 0.5 * 0.5, models.macs(narrow.spec) / models.macs(spec)  # inputs times outputs
print(f"MACs left: predicted {predicted:.3f}, measured {measured:.3f}; logits apart by {apart:.0e}")

# %% [markdown]
# ### The readers make up for it
#
# Cut half of everything: is the network lost? Batch-norm re-estimated on some pictures brings part of it back. And what a
# removed channel said may be said by those that stay: for each layer that reads the group, least squares gives the weights that come nearest to
# the old sums, $W' = W H_{\cdot S} H_{SS}^{-1}$ with $H$ the second moment of its inputs and $S$ the channels that stay
# (He et al., 2017). No gradient step is taken. How much of the accuracy comes back by each? (Re-estimating alone moves the
# dense network, too: it stands beside.)

# %%
def narrowed(network, score, budget: float, known: dict | None = None, even: bool = False):
    """Channels removed until the MACs are within the budget; with a curvature, the readers mended."""
    kept = channels.within_macs(network.spec, score, macs=budget, everywhere=even, multiple=multiple)
    network = network if known is None else obs.compensated(network, kept, known)
    return structured.remove_channels(network, kept)


rows = []
for times in (2, 4, 8):
    budget = models.macs(spec) / times
    plain, mended = narrowed(model, fisher, budget), narrowed(model, fisher, budget, curved)
    rows.append({"fewer MACs": f"{times}x", "cut": accuracy(plain)})
    rows[-1]["batch-norm re-estimated"] = accuracy(batch_norm.reestimate(plain, seen))
    rows[-1]["mended, too"] = accuracy(batch_norm.reestimate(mended, seen))
again = accuracy(batch_norm.reestimate(model, seen))
print(f"dense: {accuracy(model):.1f} % of these pictures, batch-norm re-estimated {again:.1f} %")
pd.DataFrame(rows).round(1)

# %% [markdown]
# ## 7 · Layers: whole residual blocks
#
# A block with an identity connection can go: its input then passes it by. *Predict* which one the network misses
# least: one early or one late in a stage of many channels?

# %%
able = [name for name, block in models.named_blocks(spec) if block.connection == "identity"]


def without(network, gone: list[str]):
    """The network without some blocks, its batch-norm re-estimated."""
    return batch_norm.reestimate(structured.remove_blocks(network, gone), seen)


def least_missed(count: int) -> list[str]:
    """Blocks to remove, one after the other, each the one that validation pictures miss least."""
    gone: list[str] = []
    while len(gone) < count:
        removable = [n for n in able if n not in gone and _stage_stays([*gone, n])]
        gone.append(max(removable, key=lambda name: accuracy(without(model, [*gone, name]), 500)))
    return gone


def _stage_stays(gone: list[str]) -> bool:
    left = [name.split(".")[0] for name, _ in models.named_blocks(spec) if name not in gone]
    return len(set(left)) == len(spec.stages)


rows = []
for name in able:
    shallow = without(model, [name])
    rows.append({"removed": name, "MACs left (%)": 100 * models.macs(shallow.spec) / models.macs(spec)})
    rows[-1] |= {"parameters left (%)": 100 * models.parameters(shallow.spec) / models.parameters(spec)}
    rows[-1]["accuracy"] = accuracy(shallow)
pd.DataFrame(rows).round(1)

# %% [markdown]
# **What it means.** With a few hundred pictures each is a good part of a point, so these accuracies can hardly be ranked. What
# differs for sure is the saving: every block has about as many MACs, but late ones hold nearly all of the parameters.
#
# ## 8 · Fine-tune, and repeat
#
# After the cut the network trains on, its zeros held. Cutting **iteratively**, a bit at a time with training in
# between, lets it adapt; the **gradual** schedule $z_t = z_{\text{end}}(1-(1-t)^3)$ cuts much while much is superfluous, and
# little in the end. All see the same number of training pictures. Predict from the formula: after half the steps, what
# share of the zeros is there?

# %%
figure, axes = plt.subplots(figsize=(6, 3))
for kind, marker in (("one_shot", "o"), ("iterative", "s"), ("gradual", "^")):
    times = 1 if kind == "one_shot" else 6
    planned = schedules.sparsities(0.9, kind, times)
    cuts = np.arange(times) / times  # each cut comes before its part of the training
    axes.plot([0, *cuts, 1], [0, *planned, 0.9], marker=marker, label=kind, drawstyle="steps-post")
axes.set(xlabel="share of the fine-tuning", ylabel="share of zeros", title="When is how much cut?")
axes.legend()
figures.show(figure, "The share of zeros over the training for three schedules that end at 90 %")

# %% [markdown]
# ## Benchmark: the operating points
#
# A point is a method and its setting, such as `channels_fisher:macs=4x mended tuned`. Flags: `tuned`
# fine-tunes (with `iterative` or `gradual` in several cuts); `taught`, too, and the network before the cut is its teacher
# ([04_distillation](04_distillation.ipynb)); `bn` re-estimates a masked network's batch-norm (where channels or blocks go, ours
# or a counterpart's, it always is); `mended` lets the readers make up for removed channels; `even` takes the same share of each
# group; `scanned` takes rates from the scan; and `int8` adds the finished network in 7-bit integers, with which runtimes compute.
# The other files hold fp16.

# %%
def one_cut(network, method: str, values: dict[str, str], share: float):
    """The network after one cut: `share` of the weights at 0, or `share` of the dense network's MACs left."""
    about = {"images": seen, "labels": seen_labels, "seed": seed}
    if method in CHANNELS:
        known = curvature.curvatures(network, seen, seed=seed) if "mended" in values else None
        score = channels.scores(network, CHANNELS[method], **about)
        return narrowed(network, score, share * models.macs(spec), known, "even" in values)
    if method in PEERS:
        options = {"images": seen, "labels": seen_labels, "everywhere": "even" in values}
        pruner = counterparts.peer("torch_pruning")
        return pruner.prune(network, PEERS[method], macs=share * models.macs(spec), **options)
    if method == "blocks":
        return structured.remove_blocks(network, least_missed(int(values["removed"])))
    if method == "obs_block":
        return obs.prune_network(network, curved, sparsity=share)
    score = unstructured.scores(network, WEIGHTS.get(method, "magnitude"), **about)
    if method == "nm_2_4":
        return unstructured.masked(network, unstructured.two_of_four(score))
    target = rates(values) if method == "magnitude_layerwise" else share
    return unstructured.masked(network, unstructured.masks(score, target))


# %%
recipe = baseline.record.parameters
training = {key: recipe[key] for key in ("augment", "batch_size")}


def tuned(
    network, name: str, part: int = 1, epochs=train_epochs, peak=learning_rate, loss=cross_entropy
) -> dict:
    """What it took to train the network on, in place; each part of a schedule sees other pictures."""
    where, order = run.path(f"checkpoint_{name}_{part}.pt"), seed + 1_000_003 * (part - 1)
    about = {"epochs": epochs, "learning_rate": peak, "loss": loss, "checkpoint": where, "seed": order}
    history = fit(network, pictures, **about, **training)
    return {"train_images": history.images, "train_seconds": history.seconds}


def shares_of(values: dict[str, str]) -> list[float]:
    """The share of each cut: of zeros, or of MACs that are left."""
    kind = next((flag for flag in CUTS if flag in values), "one_shot")
    count = 1 if kind == "one_shot" else steps
    if "macs" in values:
        return schedules.shares(1 / float(values["macs"][:-1]), kind, count)
    return schedules.sparsities(float(values.get("sparsity", 0.5)), kind, count)


# %%
@functools.lru_cache(maxsize=2)  # int8 comes behind its float network
def finished(method: str, setting: str) -> tuple[torch.nn.Module, dict]:
    """A point's network but for its rounding, and what its training took."""
    values = dict(part.partition("=")[::2] for part in setting.split())
    network, took, name = copy.deepcopy(model), {}, f"{method}_{setting}".replace(" ", "_")
    if method == "dense_finetuned":
        return network, tuned(network.train(), name)
    cuts = shares_of(values)
    for number, share in enumerate(cuts, 1):
        network = one_cut(network.eval(), method, values, share)
        if network.spec != spec:
            network = batch_norm.reestimate(network, seen)
        if set(TRAINED) & set(values):
            loss = cross_entropy
            if "taught" in values:
                loss = teaching.taught_by(copy.deepcopy(model), teaching.Recipe(), network.spec)
            step = tuned(network.train(), name, number, train_epochs / len(cuts), loss=loss)
            took = {key: took.get(key, 0) + value for key, value in step.items()}
    if "bn" in values:
        network = batch_norm.reestimate(network, seen, original=None if took else model)
    if method in CHANNELS and method not in CONTROLS:
        widths.setdefault(values["macs"], network.spec)
    return network.eval(), took


# %% [markdown]
# The honest rivals: the dense network with the same extra training (`dense_finetuned`), random scores, the pruned
# architecture **from scratch** with the baseline's training and the fine-tuning's together, and a plain narrow
# network of as many MACs, trained as long (`small_dense`).

# %%
def from_the_start(method: str, times: str) -> tuple[torch.nn.Module, dict]:
    """A network that was never pruned, trained for the whole budget."""
    wanted = widths.get(times)
    if method == "small_dense":
        about = {key: getattr(spec, key) for key in ("channels", "size", "classes", "stem")}
        plain = (
            models.resnet(recipe["depth"], width=float(width), **about) for width in np.arange(1, 0, -0.005)
        )
        budget = models.macs(spec) / float(times[:-1])
        wanted = next(candidate for candidate in plain if models.macs(candidate) <= budget)
    if wanted is None:
        raise ValueError(f"no network of channels with {times} fewer MACs was made")
    torch.manual_seed(seed)
    network, epochs = models.build(wanted), recipe["epochs"] + train_epochs
    return network, tuned(network.train(), f"{method}_{times}", epochs=epochs, peak=recipe["learning_rate"])


# %%
TECHNIQUES = {"small_dense": "baseline"} | dict.fromkeys(PEERS, "peer")


def candidate(point: str) -> dict:
    """A point's network as a file, and what its row will say."""
    method, setting, values = parsed(point)
    row = {"technique": TECHNIQUES.get(method, "pruning"), "method": method, "point": setting}
    row |= {"control": CONTROLS.get(method, "")}
    if method in ("from_scratch", "small_dense"):
        network, took = from_the_start(method, values["macs"])
    else:
        network, took = finished(method, " ".join(s for s in setting.split() if s != "int8"))
    if "int8" in values:
        rounded = uniform.quantize_network(network, bits=7, per_channel=True)
        network = activations.calibrate(rounded, seen)
    name = f"{method}_{setting}".replace("=", "").replace(" ", "_").rstrip("_")
    path = run.path(f"artifacts/{name}.safetensors")
    saved = artifact.save(network, path, **saving)
    print(f"{point}: {saved.nbytes:,} bytes, {models.macs(network.spec):,} MACs", flush=True)
    row |= {"division": "open" if took or network.spec != spec else "closed"} | took
    return {"path": path, "bytes": saved.nbytes, "macs": models.macs(network.spec), "row": row}


# %%
missing = {}
if peers and (why := counterparts.available("torch_pruning")):
    missing = dict.fromkeys(peers, why)
    print(f"Torch-Pruning: {why}")
learned = any(set(TRAINED) & set(parsed(point)[2]) for point in (*points, *peers))
plain = [[point.replace(" int8", ""), point] for point in points]  # int8 comes beside its float network
wanted = list(dict.fromkeys(sum(plain, [])))
has_dense = [made for made in before if "dense_finetuned" in {row.method for row in made.compression}]
if learned and not has_dense:
    wanted = list(dict.fromkeys(["dense_finetuned", *wanted]))
candidates = []
for point in wanted + ([] if missing else peers):
    try:
        candidates.append(candidate(point))
    except (ValueError, TrainingError) as error:  # one point that cannot be made costs no other
        missing[point] = str(error)
        print(f"{point}: {error}", flush=True)

# %% [markdown]
# The **validation** pictures decide what is claimed, before the test set is looked at: in each division (closed: no
# gradient step after the baseline; open: all else) the smallest masked file and the channel-pruned network with the fewest MACs that are likely without loss on test
# ([`claims`](../nnc_utils/claims.py)); with three seeds, their pictures together
# ([`chosen_over_seeds`](../nnc_utils/over_seeds.py)).

# %%
dense = next((c["path"] for c in candidates if c["row"]["method"] == "dense_finetuned"), None)
if has_dense:  # an earlier part trained it
    dense = has_dense[0].artifact("dense_finetuned")
MASKS = (*WEIGHTS, "magnitude_layerwise", "obs_block", "nm_2_4")
orders = {}
for division, (counted, methods) in itertools.product(
    ("closed", "open"), (("bytes", MASKS), ("macs", (*CHANNELS, "blocks")))
):
    able_to = [c for c in candidates if c["row"]["division"] == division and c["row"]["method"] in methods]
    able_to = [c for c in able_to if not c["row"]["control"] and "int8" not in c["row"]["point"]]
    able_to.sort(key=lambda c: (c[counted], c["bytes"]))
    orders[division, counted] = [c["path"] for c in able_to if claim]
decided = claims.choose(orders, baseline=baseline.artifact("fp32"), dense=dense, pictures=pictures)
for (division, counted), path in decided.claimed.items():
    print(f"claimed in the {division} division, fewest {counted}: {path.stem}")

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names.

# %%
scores = scoring.score(
    [c["path"] for c in candidates], dataset=reference.dataset, folder=run.path("predictions")
)
against = {"closed": baseline, "open": baseline}
if decided.reference == dense:
    of_dense = [made.score("dense_finetuned") for made in has_dense]
    [against["open"]] = of_dense or [s for s in scores if Path(s["path"]) == dense]
rows = [
    results.compression_row(
        score,
        run=run,
        dataset=reference.dataset,
        model=reference.model,
        reference=baseline if c["path"] == dense else against[c["row"]["division"]],
        headline=c["path"] in decided.claimed.values(),
        **c["row"],
    )
    for c, score in zip(candidates, scores, strict=True)
]
table = pd.DataFrame([row.model_dump() for row in rows])
shown = ["method", "point", "control", "size_ratio", "macs", "nonzeros", "accuracy", "accuracy_delta"]
table[[*shown, "delta_ci_low", "delta_ci_high", "headline"]].sort_values("macs", kind="stable")

# %%
everything = pd.concat([pd.DataFrame([reference.model_dump()]), table], ignore_index=True)
figures.show(
    figures.macs_against_accuracy(everything),
    "Test accuracy against how many times fewer MACs, by method, with intervals",
)

# %% [markdown]
# ### Who beats whom?
#
# At each number of MACs and with the same training, Fisher scores, mended or not, against each counterpart, random scores and
# networks that were never cut, on the same test pictures; and each score of weights against their magnitudes, at as many zeros. Which of ours is compared was fixed before. "Beats" means that the paired interval is above 0, "below" that it is under 0; "not below" is neither: undecided.

# %%
versus = results.comparisons(everything, run.path("predictions"), dataset=reference.dataset)
versus if len(versus) else "no two of these points are to be compared"

# %% [markdown]
# **What would fool you.** A ratio of MACs is no speed-up, a mask is none at all; how many milliseconds a narrower network
# takes is the question of [07_deployment](07_deployment.ipynb). A pruned network that beats an under-trained baseline: the
# dense network deserves the same extra training. And "90 % pruned" may be 90 % of one large layer.

# %%
files = {f"{c['row']['method']}:{c['row']['point']}": f"artifacts/{c['path'].name}" for c in candidates}
done = run.finish(
    compression=rows, extra={"validation_delta": decided.looked, "files": files, "missing": missing}
)
print(f"{done.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, by the best profile that has these methods. Profiles train their
# baseline for different times (quick and medium a little more than one epoch, standard twenty): compare a point with the grey
# line of its own figure only.

# %%
committed = results.committed_profile(profiles=results.ALL_PROFILES, technique="pruning")
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    print(f"profile {committed.name}")
    full = figures.read_table(committed / "compression.csv")
    cut = full[full["technique"].isin(["baseline", "pruning"]) | full["method"].isin(PEERS)]
    figures.show(
        figures.macs_against_accuracy(cut),
        f"The committed results of the {committed.name} profile: accuracy against MACs",
    )
    narrower = ("channels", "torch_pruning", "blocks", "from_scratch", "small_dense")
    masks_only = cut[~cut["method"].str.startswith(narrower)]
    if (masks_only["technique"] == "pruning").any():
        figures.show(
            figures.size_against_accuracy(masks_only),
            f"The committed results of the {committed.name} profile: accuracy against size of masked files",
        )
    versus = results.comparisons(cut, committed / "predictions", dataset=full["dataset"].iloc[0])
    display(versus if len(versus) else "no two of these points are to be compared")

# %% [markdown]
# **Second order, in one shot.** Look again at section 2's figure, of digits: which score is ahead at 90 % zeros? Does the table above
# agree? Where it has second-order scores *below* magnitudes, here is what to look at: such a score says what one weight
# costs close to the trained network, while the others stay or make up for it. Nine of ten weights cut are far from there, and what
# they cost together is not the sum of what each costs alone. One threshold over all layers then takes more than it should where single
# weights are cheapest, in the last stage, which has most of them. The
# [report of standard](../results/standard/report.md#where-do-the-zeros-lie) lists in which part of each masked network the
# zeros lie, beside what it lost.
#
# **Was the large network worth training?** The table holds `channels_fisher` against two that were never cut, where a profile has
# them, trained for the large network's pictures and those of the fine-tuning together. `small_dense`, a plain narrow network, never saw
# the large one; `from_scratch` has nothing of it but the widths. Elsewhere such networks were as good as pruned ones
# (Liu et al., 2019). Does the verdict contradict that? "Not below" does not; nor does it show that they are equal: look at the width of the
# interval and at the number of seeds. Where ours was `taught` it had a teacher besides, so even "beats" would not be due to pruning
# alone. What pruning does save is time, if you have the large network already: its `train_seconds` in `compression.csv` count from
# there. `channels_random` is the control of the scores: it differs in *which* channels go, and in how many of each layer.
#
# ## What you can now measure
#
# What a weight, a channel or a block is worth to the loss; what a mask saves in the file, and what removing channels saves
# in arithmetic; whether a pruned network is worse than the dense one with the same training.
#
# **Try it.** (1) Add `"obs_block:sparsity=0.9 bn"` and `"magnitude_global:sparsity=0.9 bn"`: predict what correcting is worth.
# (2) Leave `mended` away. (3) `"channels_random:macs=4x mended tuned"`: how much is importance worth once the readers make up
# for it? (4) Set `multiple = 1`: how many channels are left, and does the runtime like it?
