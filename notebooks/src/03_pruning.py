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
# What can be removed from a trained network? A practitioner scores each part, removes the lowest, lets the rest make up
# for it, and trains on. Some removals make a *file* smaller and leave the arithmetic as it was. Others give an ordinary,
# smaller network that every [runtime](../docs/glossary.md#runtime) makes faster.
#
# **You will be able to** mask weights by magnitude, gradient and curvature; correct the weights that stay; remove
# channels across residual connections; and tell a smaller file from a smaller computation. **You need**
# [01](01_baseline.ipynb). **Time:** 75 minutes to read, an hour for the seven exercises, a minute to run.
#
# **Contents.**
# [1 · What is a mask?](#1-·-What-is-a-mask?)
# [2 · Which weights matter?](#2-·-Which-weights-matter?)
# [3 · Can the others make up for it?](#3-·-Can-the-others-make-up-for-it?)
# [4 · What fooled us](#4-·-What-fooled-us).
# [5 · The same share for each layer?](#5-·-The-same-share-for-each-layer?)
# [6 · Two of four](#6-·-Two-of-four:-a-pattern-that-hardware-likes).
# [7 · What does a mask save?](#7-·-What-does-a-mask-save?)
# [8 · Removing channels](#8-·-Removing-channels:-a-smaller-network).
# [9 · Which channels?](#9-·-Which-channels?)
# [10 · Compensating the layers behind](#10-·-Compensating-the-layers-behind).
# [11 · Removing blocks](#11-·-Removing-blocks).
# [12 · When to prune, and fine-tuning](#12-·-When-to-prune,-and-fine-tuning).
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
sparsity: float = 0.9  # (0, 1) share of the weights that a mask removes
macs: float = 16.0  # [1, 1000] how many times fewer multiplications (MACs) removing channels leaves
train_epochs: float = 2.0  # [0.001, 1000] of fine-tuning, all steps together, and of the dense control
learning_rate: float = 0.002  # [0.00001, 1] peak of that training
scoring_images: int = 128  # [2, 100000] training images for gradients, curvature and batch-norm
seed: int = 1  # [0, 1000000] which images score, random scores, the order of training
# what the benchmark at the end runs
configurations: list = [
    {"method": "weights", "sparsity": 0.9},
    {"method": "weights", "sparsity": 0.9, "train": "finetune"},
    {"method": "channels", "macs": 4},
    {"method": "channels", "macs": 4, "compensate": True},
    {"method": "channels", "macs": 4, "compensate": True, "train": "finetune"},
    {"method": "channels", "macs": 4, "compensate": True, "train": "finetune", "int8": True},
]  # pruned networks, each fine-tuned one beside what it was before
peers: list = []  # other tools, such as {"method": "torch_pruning", "macs": 4, "uniform": True}
steps: int = 3  # [1, 100] of an iterative or gradual schedule
multiple: int = 8  # [1, 64] of which the number of channels is, as far as a layer has so many
upstream: list = []  # run folders of 01_baseline and of earlier shards; empty: 01 with its defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its configurations may be claimed
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/03_pruning

# %% tags=["setup"]
import matplotlib.pyplot as plt
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import figures, models
from nnc_utils.exercises import check, predictions

bench = Bench("03_pruning", globals())
model, images = bench.dense, bench.images
seen, seen_labels = bench.sample(scoring_images)

# %% [markdown]
# ## 1 · What is a mask?
#
# A [mask](../docs/glossary.md#mask) $m$ says which weights stay: the network computes with $m \odot w$. Most weights are small. If they were spread
# like a bell curve, $|w| < \tfrac12\sigma$ would hold for $\operatorname{erf}(0.5/\sqrt 2)$ of them.
#
# *Predict*: which share is that? Is the measured share of a trained network above or below?

# %% tags=["machine-dependent"]
import math

figures.style()
weights = {x.name: model.get_submodule(x.name).weight.detach() for x in models.layers(model.spec)}
predicted = math.erf(0.5 / 2**0.5)
for name in ("conv1", "layer2.0.conv1", "layer4.1.conv2"):
    measured = float((weights[name].abs() < 0.5 * weights[name].std()).float().mean())
    print(f"{name:15} predicted {predicted:.2f}, measured {measured:.2f}, ratio {measured / predicted:.2f}")

# %% [markdown]
# **Magnitude pruning** removes the smallest weights ([Han et al., 2015](https://arxiv.org/abs/1506.02626)). A
# **threshold** does it: the largest score that goes.
#
# ### Exercise 3.1 · A mask from scores
#
# `score` is a tensor of any shape, with a number for each weight; a higher one means keep. A score may be negative.
# Return a bool tensor of the same shape: False for the lowest `share` of all scores, as a whole number (`round`), True
# for the others.
#
# <details><summary>Hint 1</summary>How many weights go? <code>score.numel()</code> says how many there are.</details>
# <details><summary>Hint 2</summary><code>score.flatten().kthvalue(k).values</code> is the k-th smallest score. It goes,
# too.</details>

# %% tags=["exercise"]
def mask_of(score: torch.Tensor, share: float) -> torch.Tensor:
    """True where a weight stays: all but the lowest share of the scores."""
    ### BEGIN SOLUTION
    lowest = round(share * score.numel())  # so many go
    threshold = score.flatten().kthvalue(lowest).values
    return score > threshold
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.1", mask_of)

# %% [markdown]
# *Predict*: 60 % of a 5×5 tensor go by magnitude. Which values stay?

# %% tags=["nbval-check-output"]
small = torch.linspace(-0.9, 1.2, 25).view(5, 5)
kept = mask_of(small.abs(), 0.6)
print((small * kept).numpy().round(2) + 0.0)

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3))
shown = {"weights": small, "mask": kept.float(), "masked weights": small * kept}
for axes, (title, values) in zip(panels, shown.items(), strict=True):
    axes.imshow(values, cmap="coolwarm", vmin=-1.2, vmax=1.2)
    for y, x in torch.cartesian_prod(torch.arange(5), torch.arange(5)).tolist():
        axes.text(x, y, f"{float(values[y, x]) + 0.0:.2g}", ha="center", va="center", fontsize=8)
    axes.set_title(title)
    axes.axis("off")
figures.show(figure, "A 5x5 tensor: its weights, a mask that keeps the ten largest, and the masked weights")

# %% [markdown]
# A whole network has many layers. **Global** pruning has one threshold for all of them. **Layer-wise** pruning has one
# for each. Both are the function above: on all scores together, or on those of a layer.

# %% tags=["nbval-check-output"]
from nnc_utils.pruning import unstructured


def global_masks(scores: dict, share: float) -> dict:
    """One threshold for all layers."""
    everything = mask_of(torch.cat([score.flatten() for score in scores.values()]), share)
    parts = everything.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


magnitude = {name: weight.abs() for name, weight in weights.items()}
ours = {"global": global_masks(magnitude, sparsity)}
ours["layer-wise"] = {name: mask_of(score, sparsity) for name, score in magnitude.items()}
package = (
    unstructured.masks(magnitude, sparsity),
    unstructured.masks(magnitude, dict.fromkeys(weights, sparsity)),
)
for (name, masks), theirs in zip(ours.items(), package, strict=True):
    print(f"the package's {name} masks are the same:", all(torch.equal(masks[n], theirs[n]) for n in masks))

# %% [markdown]
# **What would fool you.** "90 % pruned" says nothing of where. Look at the layers: one threshold may leave a layer
# nearly empty.
#
# ## 2 · Which weights matter?
#
# A weight matters if the loss rises without it. For a change $\delta$ of the weights, to second order,
#
# $$\Delta L \approx g^\top \delta + \tfrac12\, \delta^\top H \delta, \qquad g = \partial L/\partial w$$
#
# and removing one weight is $\delta = -w$. An estimate of that is the weight's [score](../docs/glossary.md#saliency-score). **Magnitude** $|w|$ takes every slope and curvature as equal. **Taylor**
# $|w \cdot g|$ is the first term ([Molchanov et al., 2017](https://arxiv.org/abs/1611.06440)). [**Optimal Brain Damage**](../docs/glossary.md#obd-obs)
# $\tfrac12 h w^2$ is the second, with the diagonal of $H$ alone
# ([LeCun et al., 1989](https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html)).
# The [Fisher information](../docs/glossary.md#fisher-information) stands for $H$: the mean square of the gradient, with labels drawn from the network's own
# predictions.
#
# ### Exercise 3.2 · Three scores of a weight
#
# `weight`, `slope` and `fisher` have one shape. `slope` is the loss's mean gradient, `fisher` the mean *square* of the
# gradient, so it is $h$ already. Return the three scores above in the same shape; none is negative.
#
# <details><summary>Hint 1</summary>Without the weight, δ is −w. Put it into each term of ΔL.</details>
# <details><summary>Hint 2</summary>Squares and h are never negative; w and g can be.</details>

# %% tags=["exercise"]
def saliencies(weight: torch.Tensor, slope: torch.Tensor, fisher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of a layer's weights, by their names: "magnitude", "Taylor" and "OBD"."""
    ### BEGIN SOLUTION
    taylor = (weight * slope).abs()
    damage = weight**2 * fisher / 2
    return {"magnitude": weight.abs(), "Taylor": taylor, "OBD": damage}
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.2", saliencies)

# %% [markdown]
# The gradients come from one image after the other.

# %%
from torch.nn import functional


def importance(network: models.ResNet, inputs: torch.Tensor, labels: torch.Tensor) -> dict:
    """Score -> layer -> one number a weight, from the gradients of one image after the other."""
    layers = {x.name: network.get_submodule(x.name).weight for x in models.layers(network.spec)}
    slope, fisher = ({name: torch.zeros_like(w) for name, w in layers.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    for image, label in zip(inputs.split(1), labels.split(1), strict=True):
        logits = network(image)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).flatten()
        for total, truth, power in ((slope, label, 1), (fisher, drawn, 2)):
            loss = functional.cross_entropy(logits, truth)
            gradients = torch.autograd.grad(loss, list(layers.values()), retain_graph=True)
            for name, gradient in zip(layers, gradients, strict=True):
                total[name] += gradient**power / len(inputs)
    found = {name: saliencies(w.detach(), slope[name], fisher[name]) for name, w in layers.items()}
    return {kind: {name: own[kind] for name, own in found.items()} for kind in ("magnitude", "Taylor", "OBD")}


some = seen[:32], seen_labels[:32]
scores = importance(model, *some)

# %% tags=["nbval-check-output"]
from nnc_utils import sensitivity

theirs = {
    kind: unstructured.scores(model, kind, images=some[0], labels=some[1]) for kind in ("magnitude", "taylor")
}
fisher = sensitivity.fisher_diagonal(model, some[0], batch_size=1, seed=seed)
pairs = {"magnitude": theirs["magnitude"], "Taylor": theirs["taylor"]}
pairs["OBD"] = {name: weight**2 * fisher[name] / 2 for name, weight in weights.items()}
for kind, package in pairs.items():
    close = all(torch.allclose(scores[kind][n], package[n], rtol=1e-2, atol=1e-9) for n in package)
    print(f"{kind}: the package's scores are the same: {close}")

# %% [markdown]
# *Predict*: which of the three ranks single weights as the loss does? The judge removes 30 weights of the classifier,
# one at a time, and measures.

# %% tags=["machine-dependent"]
from scipy.stats import spearmanr

places = torch.randperm(weights["fc"].numel(), generator=torch.Generator().manual_seed(seed))[:30].tolist()
without = {}
for place in places:
    without[place] = weights["fc"].clone()
    without[place].view(-1)[place] = 0
harm = sensitivity.loss_increase(model, {"fc": without}, *some)["fc"]
measured = [abs(harm[place]) for place in places]
ranks = {kind: float(spearmanr(s["fc"].flatten()[places], measured).statistic) for kind, s in scores.items()}
print({kind: round(rank, 2) for kind, rank in ranks.items()})
print(f"{max(ranks, key=ranks.get)} ranks single weights best, {min(ranks, key=ranks.get)} worst")

# %% [markdown]
# That was easy: one small change, on the images that made the scores. But weights go in thousands. *Predict*: does the
# same score win when it decides which half of all weights goes, or which nine tenths?

# %%
def accuracy(network: models.ResNet, count: int = 200) -> float:
    """Percent of right answers on the first validation images."""
    split = images.validation
    inputs = images.normalize(split.images[:count])
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in inputs.split(100)])
    return 100 * float((logits.argmax(1) == split.labels[:count]).float().mean())


shares, curves = (0.5, 0.8, 0.9), {}
for kind, score in scores.items():
    masks = (global_masks(score, share) for share in shares)
    curves[kind] = [accuracy(unstructured.masked(model, mask)) for mask in masks]
figure, axes = plt.subplots(figsize=(7, 3.5))
for (kind, values), marker in zip(curves.items(), figures.MARKERS, strict=False):
    axes.plot(shares, values, marker=marker)
    axes.annotate(kind, (shares[-1], values[-1]), (8, 0), textcoords="offset points")
axes.axhline(accuracy(model), color="grey", linewidth=1)
axes.set(xlabel="share of zeros", ylabel="validation accuracy (%)", xlim=(0.48, 1))
axes.set_title("Pruned at once, no training: what is left?")
figures.show(
    figure,
    "Accuracy after removing a share of all weights at once, by three scores, and of the dense network",
)

# %% tags=["machine-dependent"]
bound = 300 / min(200, len(images.validation))  # pp, the rule of three: they can tell no smaller difference


def ahead(accuracies: dict[str, float]) -> str:
    """The names of the best and of those that the images cannot tell from it."""
    best = [name for name, value in accuracies.items() if value >= max(accuracies.values()) - bound]
    return " and ".join(best) if len(best) < len(accuracies) else "these images cannot tell"


for number, share in enumerate(shares):
    ends = {kind: values[number] for kind, values in curves.items()}
    told = ", ".join(f"{kind} {value:.1f} %" for kind, value in ends.items())
    print(f"at {share:.0%} zeros: {told}; ahead: {ahead(ends)}")

# %% [markdown]
# **What it means.** On digits the lead changes with the share; the committed results below show it at full size. A score
# says what *one* weight costs close to the trained network, while all others stay as they are. Nine of ten weights are
# far from there: what they cost together is not the sum of what each costs alone. And one threshold for such scores
# over all layers takes nearly everything from layers in which single weights are cheap.
# Sections 3 and 4 show what curvature is good for: not to compare layers, but to let the weights that stay take over.
#
# **What would fool you.** The **gradient's size** $|g|$ is often called second-order. It holds no curvature, nor the
# weight.
#
# ## 3 · Can the others make up for it?
#
# A weight that is removed need not be missed if the others take over. With the whole matrix $H$, the best answer to
# removing weight $q$, and what it costs, are
# ([Hassibi and Stork, 1993](https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html),
# [**Optimal Brain Surgeon**](../docs/glossary.md#obd-obs))
#
# $$\delta = -\frac{w_q}{[H^{-1}]_{qq}}\, H^{-1} e_q, \qquad \Delta L = \frac{w_q^2}{2\,[H^{-1}]_{qq}}$$
#
# Two weights of 1 whose inputs are correlated by 0.9. *Predict* by hand: what does the second become when the first
# goes, and how much of the damage is left?

# %% tags=["nbval-check-output"]
moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
inverse = torch.linalg.inv(moment)
delta = -inverse[:, 0] / inverse[0, 0]
print(f"the second weight becomes {1 + float(delta[1]):.2f}")
print(f"loss {float(delta @ moment @ delta) / 2:.3f} instead of {float(moment[0, 0]) / 2:.3f}")

# %% [markdown]
# Many weights at once: the outputs of a layer with the weight $W$ are $Wx$. Which $W'$ with zeros outside a mask comes
# nearest to them on the inputs $x$ that the layer really gets? Only the inputs' second moment
# $H = \operatorname{E}[x x^\top]$ counts. No gradient, no label:
#
# $$\operatorname{E}\,\lVert W'x - Wx\rVert^2 = \operatorname{tr}\,(W'-W)\,H\,(W'-W)^\top$$
#
# Each row $w$ is a least-squares problem of its own. With $S$ the columns that stay in it, $H_{SS}\,w'_S = H_{S\cdot}\,w$.
#
# ### Exercise 3.3 · Correct the weights that stay
#
# `weight` is (out, n), `kept` its mask, `moment` is $H$, (n, n). Return the weight whose outputs come nearest to the old
# ones, with zeros outside the mask. Each row has its own $S$.
#
# <details><summary>Hint 1</summary>A row of the mask selects: <code>moment[stay]</code> are the rows S of H, and
# <code>moment[stay][:, stay]</code> is their square part.</details>
# <details><summary>Hint 2</summary>The right side has the <em>whole</em> old row, with the weights that go: what they
# did is to be made up for.</details>
# <details><summary>Hint 3</summary><code>torch.linalg.solve(A, b)</code> solves A x = b; <code>new[row, stay] =
# x</code> puts it in place.</details>

# %% tags=["exercise"]
def corrected(weight: torch.Tensor, kept: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Each row's weights that stay, nearest to its old sums; 0 elsewhere."""
    ### BEGIN SOLUTION
    new = torch.zeros_like(weight)
    for row, stay in enumerate(kept):
        new[row, stay] = torch.linalg.solve(moment[stay][:, stay], moment[stay] @ weight[row])
    return new
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.3", corrected)

# %% [markdown]
# **Reconstruction** prunes in rounds, since a corrected weight has taken over what others did: score the corrected
# weights by $w_q^2/[H^{-1}]_{qq}$, remove some, correct again ([Frantar and Alistarh, 2022](https://arxiv.org/abs/2208.11580);
# [SparseGPT, 2023](https://arxiv.org/abs/2301.00774)).

# %%
from nnc_utils.pruning import reconstruct


def reconstructed(weight: torch.Tensor, moment: torch.Tensor, share: float, rounds: int = 4):
    """A weight (out, n) with a share of zeros, and its mask."""
    now, kept = weight, torch.ones_like(weight, dtype=torch.bool)
    inverse = torch.linalg.inv(moment).diagonal()
    for number in range(1, rounds + 1):
        zeros = 1 - (1 - share) ** (number / rounds)  # each round removes the same share of what is left
        score = now.square() / inverse
        kept = mask_of(score.masked_fill(~kept, -1.0), zeros)
        now = corrected(weight, kept, moment)
    return now, kept


# %% tags=["nbval-check-output"]
generator = torch.Generator().manual_seed(0)
toy = torch.randn(4, 6, generator=generator)
inputs = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
moment = reconstruct.damped(inputs.T @ inputs / len(inputs))  # the diagonal raised by 5 % of its mean
new, kept = reconstructed(toy, moment, 0.5)
package = reconstruct.prune_layer(toy, inputs.T @ inputs / len(inputs), 0.5)
print("the package's mask and weights are the same:", end=" ")
print(torch.equal(package[1], kept), torch.allclose(package[0], new, atol=1e-2))
for name, weight in (("masked", toy * mask_of(toy.abs(), 0.5)), ("reconstructed", new)):
    print(
        f"{name:13} {float((inputs @ (weight - toy).T).square().sum() / (inputs @ toy.T).square().sum()):.1%}"
    )

# %% [markdown]
# The package solves all rows at once by a few steps of conjugate gradients. Now a real layer. *Predict* the loss on
# images that it has not seen: with the mask alone, and reconstructed with as many zeros.

# %% tags=["machine-dependent"]
from nnc_utils import curvature

layer, split = "layer3.0.conv2", images.validation
unseen = images.normalize(split.images[:64]), split.labels[:64].long()
input_moments = curvature.input_moments(model, seen)
new, kept = reconstruct.prune_layer(weights[layer], input_moments[layer], sparsity)
changed = {0: weights[layer] * mask_of(magnitude[layer], sparsity), 1: new}
measured = sensitivity.loss_increase(model, {layer: changed}, *unseen)[layer]
for number, name in enumerate(("masked", "reconstructed")):
    change = (changed[number] - weights[layer]).flatten(1)
    wrong = float(((change @ input_moments[layer]) * change).sum())
    right = float(((weights[layer].flatten(1) @ input_moments[layer]) * weights[layer].flatten(1)).sum())
    print(
        f"{name:13} squared error {wrong / right:.1%} of the outputs' squares, loss {measured[number]:+.4f}"
    )
effect = "helps" if measured[1] < measured[0] else "does not help"
print(f"reconstruction {effect} on these {len(unseen[1])} unseen images")

# %% [markdown]
# **What it means.** The weights that stay take over most of what the others did. How much each layer should lose is
# another question. Its own squared error cannot say it, since layers differ in scale; here each layer loses the share
# that the global threshold of magnitudes takes from it.
#
# **What would fool you.** A correction fitted to few images fits their noise, too; damping holds it back.
#
# ## 4 · What fooled us
#
# For a long time our own tables said that Optimal Brain Surgeon is far worse than magnitude. Twenty years of papers say
# the opposite. The mask was fine, and so were the weights. The *repair behind them* was at fault.
#
# Batch-norm remembers a mean $\mu$ and a variance of each channel over all training. A few images give $m_0$ before the
# pruning and $m_1$ behind it. The repair kept what the memory knew better, $\mu + (m_1 - m_0)$, and scaled the variance.
# Sensible, as long as the channel lives. But a pruned channel may become **constant**: its deviation is nearly 0, and
# the difference $\mu - m_0$, measured in the *old* channel, is now divided by it.
#
# *Predict*: a channel had deviation 1, its memory is off by 0.05, batch-norm adds $\epsilon = 10^{-5}$ to the variance.
# Pruned, its deviation is 0. What constant leaves batch-norm?

# %% tags=["nbval-check-output"]
print(f"the constant: {0.05 / (1.0 * 1e-5 / (1 + 1e-5) + 1e-5) ** 0.5:.0f} deviations")

# %% [markdown]
# ### Exercise 3.4 · Find the bug: a repair of batch-norm
#
# `memory`, `before` and `after` are pairs of tensors (channels,): a mean and a variance each. The first is batch-norm's
# memory ($\mu$, $\sigma^2$), the others are what a few images give before the pruning ($m_0$, $v_0$) and behind it ($m_1$,
# $v_1$). The variance below is right. The mean is the fault:
#
# ```python
# mean = memory[0] + (after[0] - before[0])
# variance = (memory[1] + eps) * (after[1] + eps) / (before[1] + eps) - eps
# ```
#
# Return mean and variance so that the memory's surplus $\mu - m_0$ counts in the channel's *own* deviations: as many new
# ones behind the pruning as old ones before it. A channel that has become constant gets exactly its constant.
#
# <details><summary>Hint 1</summary>How many old deviations is the surplus? A deviation is the root of a
# variance.</details>
# <details><summary>Hint 2</summary>Start from what the images give now, m₁. Add eps to a variance that you divide by: a
# channel may have been constant before, too.</details>

# %% tags=["exercise"]
def in_own_deviations(memory: tuple, before: tuple, after: tuple, eps: float = 1e-5) -> tuple:
    """Batch-norm's mean and variance behind the pruning, both (channels,)."""
    ### BEGIN SOLUTION
    surplus = (memory[0] - before[0]) / (before[1] + eps).sqrt()
    mean = after[0] + surplus * after[1].sqrt()
    variance = (memory[1] + eps) * (after[1] + eps) / (before[1] + eps) - eps
    return mean, variance
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.4", in_own_deviations)

# %%
from torch import nn

from nnc_utils import batch_norm


def faulty(memory: tuple, before: tuple, after: tuple, eps: float = 1e-5) -> tuple:
    """The memory moved by as much as the channel's mean; the variance scaled, at most by 1."""
    ratio = (after[1] + eps) / (before[1] + eps)
    grown = (after[1] - before[1]).clamp(min=0)
    return memory[0] + after[0] - before[0], memory[1] * ratio.clamp(max=1) + grown


def repaired(pruned: models.ResNet, original: models.ResNet, inputs: torch.Tensor, rule) -> models.ResNet:
    """A pruned network whose batch-norms follow a rule: memory, before, after -> mean, variance."""
    networks = (original, *(batch_norm.reestimate(net, inputs) for net in (original, pruned, pruned)))
    norms = ([module for module in net.modules() if isinstance(module, nn.BatchNorm2d)] for net in networks)
    for *given, norm in zip(*norms, strict=True):
        pairs = [(one.running_mean, one.running_var) for one in given]
        norm.running_mean, norm.running_var = rule(*pairs, norm.eps)
    return networks[-1]


# %% [markdown]
# Now the experiment that misled us: scores of
# second order under one threshold, which leave dead channels behind; then the same mask with the weights that stay
# corrected; and magnitude for comparison. *Predict* for each network which of three bars is the highest.

# %% tags=["machine-dependent"]
from nnc_utils import encoding

zeros = 0.8
masks = {kind: global_masks(scores[kind], zeros) for kind in ("magnitude", "OBD")}
networks = {kind: unstructured.masked(model, mask) for kind, mask in masks.items()}
networks["OBD, corrected"] = unstructured.masked(model, masks["OBD"])
for name, kept in masks["OBD"].items():
    weight, moment = weights[name].flatten(1), reconstruct.damped(input_moments[name])
    new = reconstruct.corrected(weight, kept.flatten(1), moment, start=weight)
    encoding.attach(networks["OBD, corrected"].get_submodule(name), encoding.Dense(new.view_as(kept), kept))
rows = {}
for kind, network in networks.items():
    rows[kind] = {
        "as it is": accuracy(network),
        "faulty repair": accuracy(repaired(network, model, seen[:64], faulty)),
        "in its own deviations": accuracy(repaired(network, model, seen[:64], in_own_deviations)),
    }
ours, package = repaired(network, model, seen[:64], in_own_deviations), batch_norm.reestimate
theirs = package(network, seen[:64], original=model)
same = (torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours.buffers(), theirs.buffers()))
print("the package's statistics are the same:", all(same))

# %% tags=["machine-dependent"]
table = pd.DataFrame(rows).T
axes = table.plot.bar(rot=0, figsize=(7, 3.5))
axes.axhline(accuracy(model), color="grey", linewidth=1)
axes.set(ylabel="validation accuracy (%)", title="The same networks, three times batch-norm")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figures.show(
    axes.figure, "Accuracy of three pruned networks: as they are, with the faulty and the right repair"
)
table.round(1)

# %% [markdown]
# **What it means.** A step that helps nine methods may ruin the tenth, and the table then blames the method. Measure
# before *and* behind each repair. When a result contradicts every paper, look for the fault in your own house first.
#
# **What would fool you.** One number at the end of a chain. Every step of the chain is a suspect.
#
# ## 5 · The same share for each layer?
#
# Layers differ in what they can lose. A **sensitivity scan** prunes one layer at several shares, the others whole, and
# looks at the loss on validation images. *Predict*: which of the five layers suffers most?

# %%
TRIED = (0.5, 0.8, 0.9, 0.95, 0.98)


def scan(name: str) -> dict[float, float]:
    """The loss that pruning one layer adds, at each share."""
    pruned = {share: weights[name] * mask_of(magnitude[name], share) for share in TRIED}
    return sensitivity.loss_increase(model, {name: pruned}, *unseen)[name]


harm = {name: scan(name) for name in ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer4.1.conv2", "fc")}
figure, axes = plt.subplots(figsize=(7, 3.5))
for (name, added), marker in zip(harm.items(), figures.MARKERS, strict=False):
    axes.plot(TRIED, list(added.values()), marker=marker, label=name)
axes.set(xlabel="share of zeros in one layer", ylabel="loss added (nats)", title="Which layer suffers?")
axes.set_yscale("symlog", linthresh=0.01)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figures.show(figure, "Loss added against the share of zeros in one layer, for five layers")

# %% [markdown]
# With as many bytes as the same share everywhere, which shares have the least loss? That is the allocation of
# [02](02_quantization.ipynb), with shares in the place of bits. Tutorials raise the share by hand from stage to stage.
#
# ### Exercise 3.5 · Choose under a budget
#
# `cost` and `harm` are dictionaries: layer -> share of zeros -> bytes, or added loss. Return a dictionary, layer -> share:
# the choice with the least *sum* of harm whose bytes together are at most `budget`. Few layers have few combinations:
# try them all.
#
# <details><summary>Hint 1</summary><code>itertools.product(*cost.values())</code> gives each combination of shares, one
# for each layer; <code>dict(zip(cost, shares))</code> is the choice.</details>
# <details><summary>Hint 2</summary>First drop the choices that the budget does not pay for. Then <code>min(...,
# key=...)</code>.</details>

# %% tags=["exercise"]
import itertools


def choose(cost: dict, harm: dict, budget: float) -> dict[str, float]:
    """The share of zeros of each layer that adds the least loss within a budget of bytes."""
    ### BEGIN SOLUTION
    choices = [dict(zip(cost, shares)) for shares in itertools.product(*cost.values())]
    paid = [choice for choice in choices if sum(cost[n][z] for n, z in choice.items()) <= budget]
    return min(paid, key=lambda choice: sum(harm[n][z] for n, z in choice.items()))
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.5", choose)

# %% [markdown]
# *Predict*: how many times less loss than with 0.9 everywhere?

# %% tags=["machine-dependent"]
from nnc_utils import allocation

cost = {name: {share: 2 * (1 - share) * weights[name].numel() for share in TRIED} for name in harm}  # fp16
budget = sum(prices[0.9] for prices in cost.values())
chosen = choose(cost, harm, budget)
print("shares of zeros:", chosen)
print("the package's are the same:", chosen == allocation.allocate(cost, harm, budget=budget))
added = {
    "0.9 everywhere": sum(h[0.9] for h in harm.values()),
    "these": sum(harm[n][z] for n, z in chosen.items()),
}
print(", ".join(f"{name}: {loss:.3f} nats added" for name, loss in added.items()))
print(f"{max(harm, key=lambda name: harm[name][0.98])} suffers most of these five")

# %% [markdown]
# **What it means.** Layers with few weights suffer most and cost least, so they keep more. The package scans all layers
# (`candidates.scan`). They have too many combinations to try, so an integer program finds the best one. The sum of the layers' losses is a guess: pruned together, they do not add up.
#
# ## 6 · Two of four: a pattern that hardware likes
#
# Sparse tensor cores skip zeros if of four neighbouring inputs [exactly two stay](../docs/glossary.md#24-sparsity)
# ([Mishra et al., 2021](https://arxiv.org/abs/2104.08378)). The mask is then no free choice. *Predict*: which share of
# the squared weights does the pattern lose, against the best free half?

# %%
predictions.predict("squares lost by two of four ÷ by a free half", 2)

# %% tags=["nbval-check-output"]
def two_of_four(score: torch.Tensor) -> torch.Tensor:
    """True for the best two of each four neighbouring inputs."""
    fours = score.unflatten(1, (-1, 4))
    second = fours.sort(dim=2, descending=True).values[:, :, 1:2]
    return (fours >= second).flatten(1, 2)


row = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.8, 0.7, 0.6, 0.5]])
print("kept:", two_of_four(row).int().tolist()[0], "free half:", mask_of(row, 0.5).int().tolist()[0])
pattern = {name: two_of_four(score) for name, score in magnitude.items() if score.shape[1] % 4 == 0}
same = (torch.equal(pattern[name], unstructured.of_four(magnitude[name])) for name in pattern)
print("the package's masks are the same:", all(same))

# %% tags=["machine-dependent"]
squares = weights[layer].square()
lost = {"free": ~mask_of(magnitude[layer], 0.5), "two of four": ~pattern[layer]}
lost = {name: float(squares[gone].sum() / squares.sum()) for name, gone in lost.items()}
print(", ".join(f"{name} loses {share:.1%} of the squares" for name, share in lost.items()))
print(f"the pattern costs {lost['two of four'] / lost['free']:.1f} times as much")
predictions.measured("squares lost by two of four ÷ by a free half", lost["two of four"] / lost["free"])

# %% [markdown]
# **What would fool you.** Fewer non-zeros are no speed-up. A runtime needs kernels that skip them;
# [07](07_deployment.ipynb) times a masked network.
#
# ## 7 · What does a mask save?
#
# The file holds which weights stay, and their values as fp16. With a share $z$ of zeros, the [sparsity](../docs/glossary.md#sparsity), an entropy coder needs
# $H(z) = -z\log_2 z - (1-z)\log_2(1-z)$ bits a weight for the mask, and $16\,(1-z)$ for the values:
#
# $$\text{times smaller} = \frac{32}{H(z) + 16\,(1 - z)}$$
#
# ### Exercise 3.6 · How many times smaller?
#
# `share` is $z$, in [0, 1). Return how many times smaller than float32 the file becomes. Without any zero the mask needs no
# bit, though Python knows no logarithm of 0.
#
# <details><summary>Hint 1</summary>Bits have the logarithm to base 2, <code>math.log2</code>.</details>
# <details><summary>Hint 2</summary>A part of size 0 adds nothing to the entropy: sum over the parts that are above
# 0.</details>

# %% tags=["exercise"]
import math


def times_smaller(share: float) -> float:
    """Bits of a float32 divided by the bits of a masked weight: its place in the mask and its fp16 value."""
    ### BEGIN SOLUTION
    entropy = -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0)
    return 32 / (entropy + 16 * (1 - share))
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("3.6", times_smaller)

# %% [markdown]
# *Predict* it for 90 % in your head, then write the file.

# %%
predictions.predict("times smaller with these zeros", 10)

# %% tags=["machine-dependent"]
from nnc_utils import artifact

masked = unstructured.masked(model, global_masks(magnitude, sparsity))
preprocessing = {"mean": images.mean, "std": images.std, "classes": images.classes}
saved = artifact.save(masked, bench.path("scratch/masked.safetensors"), dtype=torch.float16, **preprocessing)
predicted = times_smaller(sparsity)
measured = artifact.fp32_bytes(model.spec) / saved.nbytes
print(f"predicted {predicted:.1f} times smaller, measured {measured:.1f}, ratio {measured / predicted:.2f}")
predictions.measured("times smaller with these zeros", measured)
print(f"MACs: {models.macs(masked.spec) / models.macs(model.spec):.0%} of before")

# %% [markdown]
# **What it means.** The formula knows one share for all layers. In the file each layer's mask has its own entropy; the
# header and batch-norm need bytes, too. The [MACs](../docs/glossary.md#macs) did not move.
#
# ## 8 · Removing channels: a smaller network
#
# [Structured pruning](../docs/glossary.md#structured-pruning) removes whole channels. Remove an output channel of one convolution, and the next
# one loses an input. Inside a residual block that is all:
# rows go where the channel is **written**, columns go where it is **read**.
#
# ### Exercise 3.7 · Remove channels inside a block
#
# `block` has `conv1`, `bn1` and `conv2`; `kept` are the numbers of the channels between the two convolutions that stay.
# The weights of a convolution are (out, in, k, k). Give `narrow`, a copy of the block, the smaller tensors; the `block`
# stays as it is. Replace a parameter by `nn.Parameter(tensor)`, a running statistic by a plain tensor.
#
# <details><summary>Hint 1</summary><code>conv1</code> writes the channels: <code>block.conv1.weight[kept]</code>. Which
# dimension has <code>conv2</code> for what it reads?</details>
# <details><summary>Hint 2</summary>Batch-norm has four tensors with a number for each channel: <code>weight</code>,
# <code>bias</code>, <code>running_mean</code> and <code>running_var</code>.</details>

# %% tags=["exercise"]
import copy


def without_channels(block: nn.Module, kept: torch.Tensor) -> nn.Module:
    """The block with only some of the channels between its two convolutions."""
    narrow = copy.deepcopy(block)
    ### BEGIN SOLUTION
    narrow.conv1.weight = nn.Parameter(block.conv1.weight[kept])  # writes them
    for part in ("weight", "bias"):
        setattr(narrow.bn1, part, nn.Parameter(getattr(block.bn1, part)[kept]))
    for part in ("running_mean", "running_var"):
        setattr(narrow.bn1, part, getattr(block.bn1, part)[kept])
    narrow.conv2.weight = nn.Parameter(block.conv2.weight[:, kept])  # reads them
    ### END SOLUTION
    return narrow


# %% tags=["checks", "nbval-check-output"]
check("3.7", without_channels)

# %% [markdown]
# The judge is a **masked twin**, which keeps all channels but multiplies the removed ones by 0. *Predict*: how far apart
# are the two outputs?

# %%
def silenced(network: nn.Module, norm: str, kept: torch.Tensor) -> nn.Module:
    """The masked twin: the other channels of one batch-norm are 0."""
    twin = copy.deepcopy(network)
    gone = torch.ones(twin.get_submodule(norm).num_features, dtype=torch.bool)
    gone[kept] = False
    for part in ("weight", "bias"):
        getattr(twin.get_submodule(norm), part).data[gone] = 0
    return twin


# %% tags=["nbval-check-output"]
block = model.layer1[0]
kept = torch.arange(0, len(block.bn1.weight), 2)
features = torch.randn(2, block.conv1.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    apart = (without_channels(block, kept)(features) - silenced(block, "bn1", kept)(features)).abs().max()
print(f"narrow block and masked twin agree within 1e-4: {bool(apart < 1e-4)}")

# %% [markdown]
# Now the *outputs* of a block. A residual connection adds two tensors, which must have the same channels. *Predict*:
# which other layers lose a channel when the first convolution does?

# %% tags=["nbval-check-output"]
def streams(spec: models.Spec) -> dict[str, list[str]]:
    """First writer -> all layers that write the same residual stream."""
    writers, stream = {"conv1": ["conv1"]}, "conv1"
    for name, block in models.named_blocks(spec):
        last = f"{name}.conv{len(block.widths)}"
        if block.connection == "identity":  # its output is added to the stream: the same channels
            writers[stream].append(last)
            continue
        stream = last  # a new stream begins, and the projection writes it, too
        writers[stream] = [last] + [f"{name}.downsample.0"] * (block.connection == "projection")
    return writers


from nnc_utils.pruning import channel_removal

groups = channel_removal.groups(model.spec)
print("with conv1 go:", ", ".join(streams(model.spec)["conv1"][1:]))
print("they are read by:", ", ".join(groups["conv1"].readers))
same = all(list(groups[name].writers) == own for name, own in streams(model.spec).items())
print(f"the package's groups are the same: {same}; {len(groups)} groups with those inside blocks")

# %% [markdown]
# `remove_channels` does both for every group: out comes a narrower Spec with its weights, an ordinary network. Keep half
# of each group. *Predict*: how many MACs are left? (Inputs times outputs.)

# %%
predictions.predict("MACs left with half of the channels (%)", 50)

# %% tags=["nbval-check-output"]
half = {name: torch.arange(len(weights[name]))[::2] for name in groups}
narrow, twin = channel_removal.remove_channels(model, half), model
norms = {x.name: x.batch_norm for x in models.layers(model.spec)}
for name, kept in half.items():
    for writer in groups[name].writers:
        twin = silenced(twin, norms[writer], kept)
with torch.inference_mode():
    apart = (narrow(seen[:8]) - twin(seen[:8])).abs().max()
print(f"narrow network and masked twin agree within 1e-3: {bool(apart < 1e-3)}")
left = models.macs(narrow.spec) / models.macs(model.spec)
predictions.measured("MACs left with half of the channels (%)", 100 * left)
print(f"MACs left: predicted {0.5 * 0.5:.3f}, measured {left:.3f}, ratio {left / 0.25:.3f}")

# %% [markdown]
# ## 9 · Which channels?
#
# Put a **gate**, a factor of 1, behind each channel. The derivative of an image's loss by the gate says what the loss
# would do if the channel became a little weaker. Its mean square, halved, is the **Fisher** score
# ([Theis et al., 2018](https://arxiv.org/abs/1801.05787)); its mean size is the Taylor score. A gate stands behind every
# layer that writes the channel.

# %% tags=["nbval-check-output"]
from nnc_utils.pruning import channels


def fisher_scores(network: models.ResNet, inputs: torch.Tensor, labels: torch.Tensor) -> dict:
    """Half the mean square of the loss's derivative by each channel's gate."""
    network = copy.deepcopy(network)
    gates = {name: torch.ones(len(inputs), len(weights[name]), 1, 1, requires_grad=True) for name in groups}
    for name, group in groups.items():
        for writer in group.writers:
            norm = network.get_submodule(norms[writer])
            norm.register_forward_hook(lambda module, inputs, output, name=name: output * gates[name])
    loss = functional.cross_entropy(network(inputs), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, list(gates.values()))
    return {name: slope.flatten(1).square().mean(0) / 2 for name, slope in zip(gates, slopes, strict=True)}


fisher = fisher_scores(model, *some)
package = channels.scores(model, "fisher", images=some[0], labels=some[1])
print(
    "the package's scores are the same:",
    all(torch.allclose(fisher[n], package[n], rtol=1e-3) for n in fisher),
)

# %% [markdown]
# A budget of MACs needs a threshold: scores are divided by their group's mean, and one threshold for all groups is
# searched by bisection (`channels.within_macs`). *Predict*: do early or late groups lose more?

# %% tags=["machine-dependent"]
fisher = channels.scores(model, "fisher", images=seen, labels=seen_labels)
budget = models.macs(model.spec) / macs
chosen = channels.within_macs(model.spec, fisher, macs=budget, multiple=multiple)
shares = pd.Series({name: len(kept) / len(fisher[name]) for name, kept in chosen.items()})
stages = shares.groupby(lambda name: name.split(".")[0], sort=False).mean()
print("share of channels that stays:", stages.round(2).to_dict())
print(f"{stages.idxmin()} loses most, {stages.idxmax()} least")

# %% [markdown]
# **What would fool you.** Raw scores of all groups under one threshold: the stage whose scores are far smaller would
# lose nearly all its channels. *Isomorphic* pruning ([Fang et al., 2024](https://arxiv.org/abs/2407.04616)) compares only groups that
# like layers write and read, `normalize="isomorphic"`. Here the groups inside all blocks are alike, whatever their
# stage. Section 10 shows what that is worth.
#
# ## 10 · Compensating the layers behind
#
# The channels that stay can take over part of what a removed channel did. Layer after layer, least squares gives the
# weights whose sums come nearest to those in the whole network ([He et al., 2017](https://arxiv.org/abs/1707.06168)).
# $X$ is what the layer sees in the smaller network, one row an output pixel; $E$ is what its sums lack there; $W$ are
# its weights for the channels that stay:
#
# $$W' = W + E^\top X\,(X^\top X)^{-1}$$

# %% tags=["nbval-check-output"]
def compensated(weight: torch.Tensor, inputs: torch.Tensor, sums: torch.Tensor, damping=0.0):
    """Weights whose sums of these inputs are nearest to those of the whole network."""
    missing = sums - inputs @ weight.T
    moment = inputs.T @ inputs
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment))
    return weight + torch.linalg.solve(moment, inputs.T @ missing).T


draw = torch.Generator().manual_seed(0)
inputs = torch.randn(200, 5, generator=draw) @ torch.randn(5, 5, generator=draw)  # correlated
weight, stay = torch.randn(2, 5, generator=draw), torch.tensor([0, 2, 3])
sums = inputs @ weight.T
new = compensated(weight[:, stay], inputs[:, stay], sums)
for name, w in (("as they are", weight[:, stay]), ("compensated", new)):
    error = float((inputs[:, stay] @ w.T - sums).square().mean() / sums.square().mean())
    print(f"{name:12} {error:.1%} of the sums' squares lost")
exact = torch.linalg.lstsq(inputs[:, stay], sums).solution
print("torch's least squares gives the same:", torch.allclose(new.T, exact, atol=1e-4))

# %% tags=["nbval-check-output"]
def classifier_inputs(network: models.ResNet, images: torch.Tensor) -> torch.Tensor:
    """What the classifier sees, one row an image."""
    found = []
    hook = network.fc.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    return found[0]


group = next(name for name, group in groups.items() if "fc" in group.readers)
kept = torch.arange(0, weights["fc"].shape[1], 2)
package = channels.compensated(model, {group: kept}, seen)
ours, theirs = (classifier_inputs(network, seen) for network in (package, model))
new = compensated(weights["fc"][:, kept], ours, theirs @ weights["fc"].T, damping=0.05)
print(
    "the package's weights of the classifier are the same:", torch.allclose(new, package.fc.weight, atol=1e-3)
)

# %% [markdown]
# How much of the accuracy comes back? Re-estimating batch-norm on some training images helps, too, and no gradient step
# is taken. *Predict* the order of the three columns.

# %% tags=["machine-dependent"]
rows = {}
for times, normalize in ((2, "group"), (macs, "isomorphic"), (macs, "group")):
    options = {"macs": models.macs(model.spec) / times, "multiple": multiple, "normalize": normalize}
    kept = channels.within_macs(model.spec, fisher, **options)
    plain = channel_removal.remove_channels(model, kept)
    repaired = batch_norm.reestimate(channels.compensated(model, kept, seen), seen)
    rows[f"{times:g}× fewer MACs, {normalize}"] = {
        "removed": accuracy(plain),
        "batch-norm re-estimated": accuracy(batch_norm.reestimate(plain, seen)),
        "compensated, too": accuracy(repaired),
    }
table = pd.DataFrame(rows).T
print(f"dense: {accuracy(model):.1f} %; ahead at {macs:g}×: {ahead(table.iloc[-1].to_dict())}")
table.round(1)

# %% [markdown]
# **What it means.** Most of what "pruning destroys" is not knowledge but scale: the next batch-norm expects other sums.
# Measure without training first; then you know what training has to do.
#
# ## 11 · Removing blocks
#
# A block with an identity connection can go: its input then passes it by. *Predict*: which one saves most MACs, which
# one most parameters?

# %% tags=["machine-dependent"]
def without_block(network: models.ResNet, name: str) -> models.ResNet:
    """The layers of a shallower network; its Spec is left to the package."""
    shallow, (stage, number) = copy.deepcopy(network), name.split(".")
    blocks = [b for i, b in enumerate(getattr(shallow, stage)) if i != int(number)]
    setattr(shallow, stage, nn.Sequential(*blocks))
    return shallow


rows = {}
for name in (name for name, block in models.named_blocks(model.spec) if block.connection == "identity"):
    shallow = channel_removal.remove_blocks(model, [name])
    with torch.inference_mode():
        assert torch.equal(shallow(seen[:4]), without_block(model, name)(seen[:4])), "the package differs"
    rows[name] = {"MACs left (%)": 100 * models.macs(shallow.spec) / models.macs(model.spec)}
    rows[name]["parameters left (%)"] = 100 * models.parameters(shallow.spec) / models.parameters(model.spec)
    rows[name]["accuracy (%)"] = accuracy(batch_norm.reestimate(shallow, seen))
table = pd.DataFrame(rows).T
print(f"{table['parameters left (%)'].idxmin()} saves most parameters; all save about as many MACs")
table.round(1)

# %% [markdown]
# **What would fool you.** A few hundred validation images cannot rank these accuracies: 1 image of 200 is half a
# percentage point. What differs for sure is the saving.
#
# ## 12 · When to prune, and fine-tuning
#
# After the removal the network trains on; its zeros are held. **One-shot** removes all at once, **iterative** a share of
# what is left, with training in between. The **gradual** schedule removes much while much is superfluous
# ([Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878)):
#
# $$z_t = z_{\text{end}}\,\bigl(1-(1-t)^3\bigr)$$
#
# *Predict*: after half of the steps, which share of the zeros is there?

# %% tags=["nbval-check-output"]
from nnc_utils.pruning import schedules


def gradual(final: float, count: int) -> list[float]:
    """The share of zeros after each step of a cubic schedule."""
    return [final * (1 - (1 - step / count) ** 3) for step in range(1, count + 1)]


ours = gradual(0.9, 6)
print("shares of zeros:", [round(share, 3) for share in ours])
print(f"after half of the steps {ours[2] / 0.9:.1%} of the zeros are there")
theirs = schedules.sparsities(0.9, "gradual", 6)
print(
    "the package's shares are the same:", all(abs(a - b) < 1e-12 for a, b in zip(ours, theirs, strict=True))
)

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for kind, marker in (("one_shot", "o"), ("iterative", "s"), ("gradual", "^")):
    count = 1 if kind == "one_shot" else 6
    planned = schedules.sparsities(0.9, kind, count)
    begins = [step / count for step in range(count)]  # each removal comes before its part of the training
    shown = {"marker": marker, "drawstyle": "steps-post", "label": kind.replace("_", "-")}
    axes.plot([0, *begins, 1], [0, *planned, 0.9], **shown)
axes.set(
    xlabel="share of the fine-tuning",
    ylabel="share of zeros",
    title="When is how much removed?",
    xlim=(-0.02, 1.02),
)
axes.legend(loc="lower right")
figures.show(figure, "The share of zeros over the training for three schedules that end at 90 %")

# %% [markdown]
# Does fine-tuning help? The compensated network of section 10 trains on for `train_epochs`, at a low and at a high peak
# of the learning rate. The baseline has converged: a high peak first destroys what it knows. *Predict* the accuracy of
# each row.

# %% tags=["machine-dependent"]
from nnc_utils import training

table = {"before training": accuracy(repaired)}
for peak in (learning_rate, 50 * learning_rate):
    tried = copy.deepcopy(repaired)
    options = {"augment": bench.recipe["augment"], "batch_size": bench.recipe["batch_size"], "seed": seed}
    training.fit(tried, images, epochs=train_epochs, learning_rate=peak, **options)
    table[f"fine-tuned, peak {peak:g}"] = accuracy(tried)
before, *after = table.values()
for name, value in zip(("low", "high"), after, strict=True):
    change = value - before
    effect = "helps" if change > bound else "hurts" if change < -bound else "cannot be told from none"
    print(f"the {name} peak {effect}: {change:+.1f} percentage points")
pd.Series(table, name="validation accuracy (%)").round(1).to_frame()

# %% [markdown]
# **What would fool you.** Fine-tuning that cures an under-trained baseline. The dense network deserves the same extra
# training; the benchmark has it as a row.
#
# ## Benchmark
#
# A configuration is data: `{"method": "channels", "macs": 4, "compensate": True, "train": "finetune"}`.
# [`candidates.py`](../nnc_utils/pruning/candidates.py) joins the steps above. Validation images decide what is claimed.
# Then a fresh process scores the test images of each file, once.

# %% tags=["benchmark"]
candidates = bench.build(configurations + peers)

# %% tags=["benchmark"]
rows = bench.measure(candidates)
bench.show(rows)

# %% tags=["benchmark"]
figure = figures.size_against_accuracy(bench.with_reference(rows))
figures.show(figure, "Test accuracy against times smaller: pruned networks before and after fine-tuning")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# **What it means.** Compare each fine-tuned row with the row before it. Where a repair without training is already at
# the dense network's level, training has little left to bring. 1 of 400 test images is a quarter of a percentage point:
# look at the intervals.
#
# **What would fool you.** A ratio of MACs is no speed-up, and a mask is none at all: milliseconds are measured in
# [07](07_deployment.ipynb). "90 % pruned" may be 90 % of one large layer.
#
# ## The committed results
#
# The same cells, run on ResNet-18 and Fashion-MNIST. Who is above whom?

# %% tags=["machine-dependent"]
from bench.committed import committed

results = committed("pruning")
print(f"profile {results.name}")
figures.show(
    results.figure(), "Committed test accuracy against times fewer MACs: pruned networks and their rivals"
)

# %% tags=["machine-dependent"]
results.verdicts()

# %% [markdown]
# **Does second order beat magnitudes there?** Nine tenths of all weights go without training; batch-norm is
# re-estimated. Scores alone compete under one threshold; OBS and reconstruction also correct the weights that stay.

# %% tags=["machine-dependent"]
from nnc_utils import configurations as known

table = pd.read_csv(results.folder / "compression.csv").fillna("")
table = table[table["method"].isin(["weights", "obs", "reconstruct"])].drop_duplicates(["method", "settings"])
accuracies = {}
for row in table.itertuples():
    one = known.of_row(row.method, row.settings)
    if one.sparsity == 0.9 and one.reestimate and not one.trains:
        name = one.title.split(" by ")[-1].split(",")[0] if row.method == "weights" else one.title
        accuracies[name.removesuffix(", batch-norm re-estimated")] = row.accuracy
for name, value in accuracies.items():
    print(f"{value:6.2f} %   {value - accuracies['magnitude']:+7.2f} pp against magnitude   {name}")
above = [name for name, value in accuracies.items() if value > accuracies["magnitude"]]
print("above magnitude:", "; ".join(above) or "none")

# %% [markdown]
# **What it means.** The formulas hold for one weight, while all others stay. One threshold for scores of second order
# takes too many where single weights are cheapest: in the last stage. The
# [details](../results/standard/details.md#where-do-the-zeros-lie) lists where the zeros lie. Where the weights that stay are
# corrected, and each layer has its own share, curvature pays. A row of OBS near chance is the fault of section 4.
#
# **Was the large network worth training?** `from_scratch` copies the pruned architecture with new weights; the narrow
# ResNet scales all widths equally. Both train for the large network's images and the fine-tuning's together. Elsewhere
# such networks were as good as pruned ones ([Liu et al., 2019](https://arxiv.org/abs/1810.05270)). "Cannot tell" is no
# proof of equality: look at the width of the interval. What pruning does save is time, if you have the large network already.

# %% [markdown]
# ## Your predictions
#
# How near were they? The bars begin at 1: no bar means that you understood.

# %%
shown = "For each prediction a bar: what was measured, divided by what was predicted"
figures.show(predictions.show(), shown)

# %% [markdown]
# ## Summary
#
# - A mask makes a file smaller and leaves the arithmetic as it was. Removing channels and blocks shrinks both.
# - Rows go where a channel is written, columns where it is read; a residual stream is one group.
# - Least squares and batch-norm repair most of the damage without a gradient step.
# - Scores of second order cannot compare layers. Correcting the weights that stay is what curvature is good for.
# - A repair can ruin what it should restore: measure before and behind each step.
#
# <!-- numbers:begin -->
# **In numbers.** For fewer multiplications, the same layers: 3× fewer MACs, channels by Fisher, compensated,
# distilled; 7.65× smaller, at -0.24 [-0.39, -0.09] pp. A mask with 90 % zeros by magnitude, distilled: 15.8×
# smaller, at -0.06 [-0.17, +0.06] pp, and as many multiplications as before.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Which weights does magnitude pruning remove, and what decides where they lie?</summary>Those
# whose absolute value is smallest. One threshold for all layers decides by size alone, so that some layers lose far
# more than others; one for each layer takes the same share everywhere.</details>
# <details><summary>2. Why can a score that ranks single weights perfectly lose against magnitude at nine tenths of
# zeros?</summary>It holds for one weight close to the trained network, while all others stay. Thousands of removals are
# far from there, and their costs do not add up.</details>
# <details><summary>3. What do Taylor and Optimal Brain Damage take from the loss's expansion?</summary>Taylor the first
# term, the weight times its gradient. Optimal Brain Damage the second, half the curvature times the square of the
# weight, with the diagonal of H alone.</details>
# <details><summary>4. What does Optimal Brain Surgeon do that Optimal Brain Damage cannot?</summary>It uses the whole
# H, and so knows how the other weights have to change to make up for the one that goes.</details>
# <details><summary>5. Why does the reconstruction of a layer need neither labels nor gradients?</summary>It compares
# the layer's outputs before and behind the pruning. Their squared error depends on the inputs by their second moment
# alone.</details>
# <details><summary>6. Why does a repair of batch-norm ruin a channel that has become constant?</summary>A difference of
# means that was small in the old deviation is divided by the new one, which is nearly 0.</details>
# <details><summary>7. Why is the best choice of shares not the same share everywhere?</summary>Layers differ in what
# they can lose and in what their weights cost. Small layers that mind much keep much and cost little.</details>
# <details><summary>8. Does a pattern of two of four lose as much as the best free half?</summary>No, more: of four
# large neighbours two have to go, and of four small ones two have to stay.</details>
# <details><summary>9. Why is a file with 90 % zeros not ten times smaller than the same file in fp16, and no
# faster?</summary>The mask needs bits, too: the entropy of which weights stay. The arithmetic still multiplies by each
# zero.</details>
# <details><summary>10. Why must the projection of a residual stream lose the same channels as the last convolution of
# its block?</summary>Their outputs are added, so they need the same channels. All that write a stream are one
# group.</details>
# <details><summary>11. Half of the channels of each group go. Which share of the MACs stays, and why?</summary>About a
# quarter: a convolution's MACs are inputs times outputs, and both are halved. The first layer keeps the image's
# channels, the last one the classes.</details>
# <details><summary>12. Fine-tuning helped. What else has to be measured before pruning gets the praise?</summary>The
# network before the training, the dense network with the same additional training, and a narrow network with an equal
# training budget.</details>
#
# **Try it.** (1) Add `{"method": "reconstruct", "sparsity": 0.9, "reestimate": True}` to `configurations`, and the
# same of `weights`: what is the correction worth? (2) Add `{"method": "channels", "score": "random", "macs": 4,
# "compensate": True}`: how much is the score worth once the readers make up for it? (3) Set `multiple = 1`: how many
# channels are left, and does the runtime of [07](07_deployment.ipynb) like it?
#
# **Further reading.** [What is the state of neural network pruning?](https://arxiv.org/abs/2003.03033) (Blalock et al.,
# 2020); [oBERT](https://arxiv.org/abs/2203.07259) (Kurtic et al., 2022), Optimal Brain Surgeon in blocks.
#
# Next: [04_distillation](04_distillation.ipynb), learning from a teacher.
