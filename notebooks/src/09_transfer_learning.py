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
# # 09 · Transfer learning: a compressed network as a start
#
# Networks are seldom trained from new weights. They start from a network of another task, for which there were more
# images. Deployed networks are compressed. Is a **compressed** network a worse start? And how many bytes does a second
# task add, if the first one's file is on the device already?
#
# **You will be able to** say what a network knows of a task that it has never seen, freeze a network so that it is
# frozen, and fine-tune with masks and codes kept. You will store a second task as a small difference that refuses another
# base.
# **You need** [01](01_baseline.ipynb), and a rough idea of [02](02_quantization.ipynb) and [03](03_pruning.ipynb).
# **Time:** 45 minutes to read, 45 for the six exercises, a minute to run.
#
# **Contents.**
# [1 · A task never seen](#1-·-What-does-a-network-know-of-a-task-that-it-has-never-seen?).
# [2 · Frozen](#2-·-Is-a-frozen-network-frozen?).
# [3 · The worth of a start](#3-·-What-is-a-start-worth?).
# [4 · Compressed starts](#4-·-Is-a-compressed-network-a-worse-start?).
# [5 · Codes that stay codes](#5-·-Can-codes-stay-codes?).
# [6 · Small differences](#6-·-How-small-is-a-second-task?).
# [7 · The right base](#7-·-Of-which-file-is-it-a-difference?).
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
labels: int = 10  # [1, 100000] training images of each class of the second task, in the lesson
seen: int = 640  # [2, 100000000] images that each training for the second task sees
learning_rate: float = 0.05  # [0.00001, 1] peak of each training
share: float = 0.01  # (0, 1) of the weights that a sparse difference changes
seed: int = 1  # [0, 1000000] which images are labelled, new weights, the order
dataset: str = "digits:5-9"  # the second task: a name, some of its classes, or imagefolder:PATH
# what the benchmark at the end runs
configurations: list = [
    {"method": "transfer", "start": "dense", "labels": 10},
    {"method": "transfer", "start": "dense", "train": "head", "labels": 10},
    {"method": "transfer", "start": "dense", "train": "sparse", "labels": 10},
    {"method": "transfer", "start": "int8", "train": "kept", "labels": 10},
    {"method": "transfer", "start": "zeros", "train": "kept", "labels": 10},
    {"method": "transfer", "start": "channels", "labels": 10},
    {"method": "transfer", "start": "channels", "train": "sparse", "labels": 10},
]  # starts and trainings; of each number of labels the first one, which others are compared with
controls: list = [{"method": "transfer", "start": "scratch", "labels": 10}]  # from new weights
compress_epochs: float = 1.0  # [0.001, 1000] on the first task, behind what is pruned or rounded
batch_size: int = 32  # [2, 4096] images a step; half of what a training sees at most
upstream: list = []  # run folder of 01_baseline, the first task; empty: five digits, on narrow channels
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
profile: str = "smoke"  # where the result belongs: smoke, transfer or one of yours
run_dir: str = ""  # folder of this run; empty: results/smoke/09_transfer_learning

# %% tags=["setup"]
import matplotlib.pyplot as plt
import pandas as pd
import torch

from bench.transfer import TransferBench
from nnc_utils import artifact, encoding, evaluation, figures, models, training
from nnc_utils.exercises import check, predictions

bench = TransferBench("09_transfer_learning", globals())
network, first, second = bench.dense, bench.images, bench.target

# %% [markdown]
# ## 1 · What does a network know of a task that it has never seen?
#
# The network has learned the **first task**: with the defaults, to tell the digits 0 to 4 apart. The **second task**
# has other classes. Few of its training images are labelled: that is why anybody transfers. Here the labels of the
# others are known, too: on those images and on validation the accuracy is measured.

# %% tags=["nbval-check-output"]
figures.style()
for name, task in (("first task", first), ("second task", second)):
    counts = f"{len(task.train)} images to train, {len(task.test)} to test"
    print(f"{name}: classes {', '.join(task.classes)}; {counts}")

# %%
figure, panels = plt.subplots(2, 8, figsize=(9, 2.8))
for row, task in zip(panels, (first, second), strict=True):
    for axes, image, label in zip(row, task.train.images, task.train.labels, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(), cmap=None if len(image) == 3 else "gray")
        axes.set_title(task.classes[label], fontsize=9)
        axes.axis("off")
figures.show(figure, "Eight training images of the first task, and eight of the second")

# %% [markdown]
# ### Exercise 9.1 · As many labels of each class
#
# Draw `count` images of each class, as a real study would label them. `labels` is (n,), whole numbers from 0. Return the
# places of the drawn images as one tensor, no image twice. The same seed draws the same images, another seed others.
#
# <details><summary>Hint 1</summary>A generator with a seed of its own:
# <code>torch.Generator().manual_seed(seed)</code>.</details>
# <details><summary>Hint 2</summary>Shuffle all places by <code>torch.randperm</code>, then take the first so many of each
# class.</details>


# %% tags=["exercise"]
def draw(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The places of so many images of each class."""
    ### BEGIN SOLUTION
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.1", draw)

# %% [markdown]
# Without any training, a network's features can tell new classes apart. Average the features of the labelled images of
# each class. A new image belongs to the class whose mean is nearest
# ([Mensink et al., 2013](https://doi.org/10.1109/TPAMI.2013.83)).
#
# ### Exercise 9.2 · The nearest class mean
#
# `features` are (n, d) with `labels` (n,), `others` are (m, d). Return the class of the nearest mean for each of the
# others, (m,).
#
# <details><summary>Hint 1</summary><code>features[labels == k].mean(0)</code> is the mean of class k.</details>
# <details><summary>Hint 2</summary><code>torch.cdist(others, means)</code> holds all distances, (m,
# classes).</details>


# %% tags=["exercise"]
def nearest(features: torch.Tensor, labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The class whose mean is nearest."""
    ### BEGIN SOLUTION
    means = torch.stack([features[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    return torch.cdist(others, means).argmin(1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.2", nearest)

# %% [markdown]
# Where in the network are the features that a new task needs? *Predict* the accuracy of the nearest mean on the last
# stage's features, with ten labels a class. Five classes by chance give 20 %.

# %%
predictions.predict("nearest class mean on the last stage's features (%)", 60)


# %%
from nnc_utils.data import Split


def apart(places):
    """Images that measure, a thousand at most: training images that were not drawn, and validation."""
    others = torch.ones(len(second.train), dtype=torch.bool)
    others[places] = False
    images = torch.cat([second.train.images[others], second.validation.images])
    truth = torch.cat([second.train.labels[others], second.validation.labels])
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))[:1000]
    return Split(images[order], truth[order])


def outputs(network, images):
    """What each stage puts out for images, averaged over its pixels; and the pixels themselves."""
    kept, hooks = {"pixels": images.flatten(1)}, []
    for name in ("layer1", "layer2", "layer3", "layer4"):

        def hook(module, inputs, out, name=name):
            kept[name] = out.mean((2, 3))

        hooks.append(network.get_submodule(name).register_forward_hook(hook))
    with torch.inference_mode():
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    return kept


# %%
chosen = draw(second.train.labels, labels, seed)
judges = apart(chosen)
known = outputs(network, second.normalize(second.train.images[chosen]))
unknown = outputs(network, second.normalize(judges.images))
right = {}
for name, features in known.items():
    answers = nearest(features, second.train.labels[chosen], unknown[name])
    right[name] = 100 * float((answers == judges.labels).float().mean())

# %%
figure, axes = plt.subplots(figsize=(6, 3))
axes.bar([name.replace("layer", "stage ") for name in right], list(right.values()))
axes.set(ylabel="accuracy (%)", title=f"What tells new classes apart, with {labels} labels each?")
figures.show(figure, "Accuracy of the nearest class mean on pixels and on the features of each stage")

# %% tags=["machine-dependent"]
predictions.measured("nearest class mean on the last stage's features (%)", right["layer4"])
best = max(right, key=right.get)
print(f"best: {best.replace('layer', 'stage ')}, {right[best]:.1f} %; last stage: {right['layer4']:.1f} %")

# %% [markdown]
# **What it means.** A stage before the last one knows more: the last has forgotten what the first task did not need.
# Early stages are general, late ones specific ([Yosinski et al., 2014](https://arxiv.org/abs/1411.1792)). On the tiny,
# centred digits the pixels are the best: they know *where* something is, which a mean over a stage's pixels forgets. So a
# new head alone has little to work with here, and the nearest mean of pixels is a rival to remember.
#
# ## 2 · Is a frozen network frozen?
#
# The cheapest transfer trains a **new [head](../docs/glossary.md#head-and-body)**, the classifier, and freezes the body. Its gradient is switched off, so it
# should not move. *Predict*: ten batches pass through such a body in train mode, and nothing is trained. By how many percent
# do its features change?

# %%
predictions.predict("features of a frozen body change by (%)", 1)

# %% tags=["machine-dependent"]
import copy

body = copy.deepcopy(network)
for parameter in body.parameters():
    parameter.requires_grad_(False)
inputs = second.normalize(second.train.images[chosen])
before = outputs(body, inputs)["layer4"]
body.train()
with torch.no_grad():
    for _ in range(10):
        body(inputs)
change = (outputs(body, inputs)["layer4"] - before).norm() / before.norm()
predictions.measured("features of a frozen body change by (%)", 100 * float(change))

# %% [markdown]
# **What it means.** It is not. Batch-norm's means and variances are no parameters: no gradient moves them, each forward
# pass in train mode does. A body that several heads share is then another one for each of them, and nothing raises an error.
#
# ### Exercise 9.3 · Find the bug: a frozen body that moves
#
# ```python
# network.train()
# for name, parameter in network.named_parameters():
#     parameter.requires_grad_(name.startswith("fc."))
# functional.cross_entropy(network(inputs), labels).backward()
# with torch.no_grad():
#     network.fc.weight -= rate * network.fc.weight.grad
# ```
#
# Take one step of SGD on the head `network.fc`, weight and bias, on the mean cross-entropy of a batch. All else in the
# network's state stays bit for bit as it was, batch-norm's statistics, too. The function may be called again and again.
#
# <details><summary>Hint 1</summary>Which mode uses batch-norm's running statistics and leaves them alone?</details>
# <details><summary>Hint 2</summary><code>torch.autograd.grad(loss, list(network.fc.parameters()))</code> gives the
# gradients of the head, and keeps none for the next call.</details>


# %% tags=["exercise"]
def head_step(network: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
    """One step of the head."""
    ### BEGIN SOLUTION
    loss = torch.nn.functional.cross_entropy(network.eval()(inputs), labels)
    gradients = torch.autograd.grad(loss, list(network.fc.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(network.fc.parameters(), gradients):
            parameter -= rate * gradient
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.3", head_step)

# %% [markdown]
# ## 3 · What is a start worth?
#
# Fine-tuning trains everything, from the first task's weights and a new head. Its rival starts from new weights. For an
# honest comparison both see the same labelled images, **equally many times**: `seen` images in all, whether 50 or all of
# them are labelled. Both get the same learning rate and the first task's normalization.


# %%
import dataclasses


def with_new_head(network):
    """A copy of a network with a new classifier for the second task."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(network)
    tuned.fc = torch.nn.Linear(tuned.fc.in_features, len(second.classes))
    tuned.spec = dataclasses.replace(tuned.spec, classes=len(second.classes))
    return tuned


def tune(network, labels, loss=training.cross_entropy):
    """Train a network, in place, on so many labels a class; returns its accuracy on the other images."""
    places = draw(second.train.labels, labels, seed)
    judges = apart(places)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    places = places[order].repeat(-(-seen // len(places)))[:seen]  # each image as often as it takes
    few = dataclasses.replace(second, train=Split(second.train.images[places], second.train.labels[places]))
    options = {"batch_size": min(batch_size, seen), "augment": bench.recipe["augment"], "seed": seed}
    training.fit(network, few, epochs=1, learning_rate=learning_rate, loss=loss, **options)
    return evaluation.accuracy(evaluation.predict(network, judges, normalize=second.normalize), judges.labels)


# %% [markdown]
# *Predict*: with ten labels a class, by how many percentage points is the fine-tuned network better?

# %%
predictions.predict("fine-tuned minus from scratch, 10 labels a class (pp)", 10)

# %% tags=["machine-dependent"]
curve = {"from scratch": {}, "fine-tuned": {}}
for count in (labels, 4 * labels):
    torch.manual_seed(seed)
    new = models.build(network.spec)
    tuned = with_new_head(network)
    curve["from scratch"][count] = tune(with_new_head(new), count)
    curve["fine-tuned"][count] = tune(tuned, count)
    if count == labels:
        first_tuned = tuned
curve = pd.DataFrame(curve)
curve["difference (pp)"] = curve["fine-tuned"] - curve["from scratch"]
predictions.measured("fine-tuned minus from scratch, 10 labels a class (pp)", curve.iloc[0, 2])
curve.rename_axis("labels a class").round(1)

# %% [markdown]
# **What it means.** With few labels and a short training it is worth a lot.
#
# **What would fool you.** A start can save two things: labels, and training. With the defaults each training is short, and
# the nearest mean of pixels beats both. A from-scratch rival with ten times the steps comes near here, since these images
# are easy: raise `seen` and look. Whether a start saves *labels* shows only where the rival has converged. On photographs
# it often does; on some fine-grained tasks it hardly does ([Kornblith et al., 2019](https://arxiv.org/abs/1805.08974)). With
# many images and a long training new weights come as far ([He et al., 2019](https://arxiv.org/abs/1811.08883), in
# detection).
#
# ## 4 · Is a compressed network a worse start?
#
# Three ways to compress the first task's network, each as in its own notebook: rounded to 8 bits, the smallest 90 % of
# the weights set to 0, three quarters of the MACs removed with their channels. None is trained again on the first task.
# Then all are fine-tuned alike, here in floats: zeros may become weights again.
#
# *Predict*: which share of the dense start's gain over new weights is left to the start with 90 % zeros?

# %%
predictions.predict("gain that the start with 90 % zeros keeps (%)", 80)

# %%
from nnc_utils import batch_norm, pipeline
from nnc_utils.pruning import unstructured
from nnc_utils.quantization import uniform

scoring, truth = bench.sample(128)
masks = unstructured.masks(unstructured.scores(network, "magnitude"), 0.9)
starts = {
    "dense": network,
    "8 bits": uniform.quantize_network(network, bits=8, per_channel=True),
    "90 % zeros": batch_norm.reestimate(unstructured.masked(network, masks), scoring),
    "channels, MACs ÷ 4": pipeline.prune(network, scoring, truth, macs=models.macs(network.spec) / 4),
}

# %% tags=["machine-dependent"]
lines = {}
for name, start in starts.items():
    answers = evaluation.predict(start, first.validation, normalize=first.normalize)
    plain = copy.deepcopy(start)
    for layer in models.layers(plain.spec):
        encoding.fold(plain.get_submodule(layer.name))  # masks and codes become plain weights
    line = {"first task (%)": evaluation.accuracy(answers, first.validation.labels)}
    lines[name] = line | {"second task (%)": tune(with_new_head(plain), labels)}
table = pd.DataFrame(lines).T
gain = table["second task (%)"] - curve["from scratch"].iloc[0]
predictions.measured(
    "gain that the start with 90 % zeros keeps (%)", 100 * gain["90 % zeros"] / gain["dense"]
)
table.assign(gain_pp=gain).rename(columns={"gain_pp": "gain over new weights (pp)"}).round(1)

# %% [markdown]
# **What it means.** With 8 bits it is not: rounding changes weights by less than fine-tuning does. With channels removed
# it is here. What is removed is gone, and the first task's accuracy does not tell whether the second task needed it:
# compare the two columns. Average accuracy hides what a network lost
# ([Hooker et al., 2019](https://arxiv.org/abs/1911.05248), on single classes).
#
# **What would fool you.** One seed. Twenty steps on fifty images end several percentage points higher or lower with other
# images, or from weights that differ in the last bit. A start that seems better than the dense one is most likely that.
# The full benchmark has three seeds and longer trainings.
#
# ## 5 · Can codes stay codes?
#
# Fine-tuning in floats makes a large file again. Masks are easy to keep: a weight times its mask stays 0. Codes need more
# thought. A step of SGD is mostly smaller than half a scale. If each step is rounded, it is lost.
#
# ### Exercise 9.4 · A rounded weight that learns
#
# As in the quantization-aware training of [02](02_quantization.ipynb), the network sees
# $\text{scale} \cdot \operatorname{round}(w / \text{scale})$. `gradient(seen)` is the loss's gradient at
# the weight that the network sees. Take so many steps of SGD on the float weight *behind* the rounding, and return what
# the network sees in the end. The given weight stays as it is.
#
# <details><summary>Hint 1</summary>Two things: where the gradient is computed, and where the step goes.</details>
# <details><summary>Hint 2</summary>Each step: round, ask for the gradient there, and subtract it from the float
# weight.</details>


# %% tags=["exercise"]
def train_rounded(weight: torch.Tensor, scale: float, gradient, rate: float, steps: int) -> torch.Tensor:
    """What the network sees after these steps."""
    ### BEGIN SOLUTION
    for _ in range(steps):
        weight = weight - rate * gradient((weight / scale).round() * scale)
    return (weight / scale).round() * scale
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.4", train_rounded)

# %% tags=["nbval-check-output"]
goal = torch.tensor([0.44, -0.26, 0.07])
begin = torch.tensor([0.4, -0.5, 0.0])
for steps in (1, 10, 100):
    there = train_rounded(begin, 0.1, lambda seen: seen - goal, 0.05, steps)
    print(f"{steps:3} steps: {[round(float(w), 1) for w in there]}")
stuck = begin
for _ in range(100):
    stuck = ((stuck - 0.05 * (stuck - goal)) / 0.1).round() * 0.1
print(f"rounded after each of 100 steps: {[round(float(w), 1) for w in stuck]}")

# %% [markdown]
# The weights get near their goal, and those rounded after each step stay where they were. A goal between two codes is never
# met: the weight swings between them.
#
# The package's parametrizations do the same. A file of codes loads with `trainable=True`: masks and quantizers are
# attached, `fit` keeps them, and saving writes codes again. *Predict*: which share of the 8-bit codes changes in this
# fine-tuning?

# %%
predictions.predict("8-bit codes that fine-tuning changes (%)", 30)


# %% tags=["machine-dependent"]
def codes(network):
    """All convolutions' codes in one row."""
    names = [layer.name for layer in models.layers(network.spec) if layer.kind == "conv"]
    return torch.cat([encoding.encoded(network.get_submodule(name)).codes.flatten() for name in names])


of_first = {"mean": first.mean, "std": first.std, "classes": first.classes}
file = bench.path("lesson/int8.safetensors")
artifact.save(starts["8 bits"], file, **of_first)
rounded = with_new_head(artifact.load(file, trainable=True))
was = codes(rounded)
in_codes, in_floats = tune(rounded, labels), lines["8 bits"]["second task (%)"]
print(f"accuracy with codes kept {in_codes:.1f} %, in floats {in_floats:.1f} %")
changed = 100 * float((codes(rounded) != was).float().mean())
predictions.measured("8-bit codes that fine-tuning changes (%)", changed)
print(
    f"bytes of a file: codes kept {file.stat().st_size:,}, in 32 bits {artifact.fp32_bytes(network.spec):,}"
)

# %% [markdown]
# **What it means.** They can: about as accurate as in floats, in a file that is a quarter as large.
#
# ## 6 · How small is a second task?
#
# The device has the first task's file. What does the second one *add*? A new head alone: a kilobyte. Everything
# fine-tuned: a whole file. Between them lies the **difference** $\Delta = w_2 - w_1$ of the weights. Is it simple? Two
# ways to be simple: of **low rank**, $\Delta \approx U V$ with few columns in $U$
# ([LoRA, Hu et al., 2021](https://arxiv.org/abs/2106.09685)); or **[sparse](../docs/glossary.md#sparse-difference)**, with few places that are not 0
# ([Guo et al., 2021](https://arxiv.org/abs/2012.07463)).
#
# ### Exercise 9.5 · The best of a rank
#
# `difference` is a convolution's, (out, in, height, width). A row of its matrix is an output channel. Return the nearest
# difference whose matrix has this rank, in the same shape: the largest singular values and their vectors
# (Eckart and Young, 1936).
#
# <details><summary>Hint 1</summary><code>torch.linalg.svd(matrix, full_matrices=False)</code> returns U, the values from
# the largest on, and V transposed.</details>
# <details><summary>Hint 2</summary>Multiply the first columns of U by their values, then by the first rows of V
# transposed.</details>


# %% tags=["exercise"]
def best_of_rank(difference: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest difference of a rank."""
    ### BEGIN SOLUTION
    left, sizes, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    return (left[:, :rank] * sizes[:rank] @ right[:rank]).view_as(difference)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.5", best_of_rank)

# %% [markdown]
# A rank of $r$ costs $r$ (rows + columns) numbers. A sparse difference costs a number and a place for each weight that
# changes. Which keeps more of $\|\Delta\|^2$ for as many numbers? *Predict* the share that rank 1 keeps, over all
# convolutions.

# %%
predictions.predict("share of ‖Δ‖² that rank 1 keeps (%)", 30)


# %%
def largest(difference, count):
    """The difference at its `count` largest places, 0 elsewhere."""
    least = difference.abs().flatten().topk(count).values[-1]
    return difference * (difference.abs() >= least)


convs = [layer for layer in models.layers(network.spec) if layer.kind == "conv"]
deltas = [
    (first_tuned.get_submodule(c.name).weight - network.get_submodule(c.name).weight).detach() for c in convs
]
energy, kept = sum(float(d.square().sum()) for d in deltas), {"low rank": {}, "sparse": {}}
for rank in (1, 2, 4, 8):
    numbers = [min(rank * sum(d.flatten(1).shape), d.numel()) for d in deltas]
    pairs = {
        "low rank": [best_of_rank(d, rank) for d in deltas],
        "sparse": [
            largest(d, max(1, n // 2)) for d, n in zip(deltas, numbers, strict=True)
        ],  # value and place
    }
    for name, simple in pairs.items():
        kept[name][sum(numbers)] = 100 * sum(float(s.square().sum()) for s in simple) / energy

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for (name, line), marker in zip(kept.items(), figures.MARKERS):
    axes.plot(list(line), list(line.values()), marker=marker, label=name)
axes.set(xscale="log", xlabel="numbers stored", ylabel="share of ‖Δ‖² kept (%)", title="Which keeps more?")
axes.set_xticks(list(kept["low rank"]))
axes.xaxis.set_major_formatter("{x:,.0f}")
axes.minorticks_off()
axes.legend()
figures.show(figure, "Share of the difference kept against the numbers stored: of low rank, and sparse")

# %% tags=["machine-dependent"]
predictions.measured("share of ‖Δ‖² that rank 1 keeps (%)", next(iter(kept["low rank"].values())))

# %% [markdown]
# **What it means.** The lines lie close together, and neither is simple: half of the squared norm needs thousands of numbers.
# But norm is not accuracy, and entropy coding makes places cheap: a mask of 1 % costs a twelfth of a bit for each weight, a
# code under a byte. So the package stores sparse differences. It trains on after the choice of places, here as long again:
# what stays makes up for what went.

# %% tags=["machine-dependent"]
from nnc_utils.transfer import delta

base = bench.path("lesson/dense.safetensors")
artifact.save(network, base, **of_first)
small = delta.sparse(network, first_tuned, share)
by_hand = largest(torch.cat([d.flatten() for d in deltas]), round(share * sum(d.numel() for d in deltas)))
stored = torch.cat([small.get_submodule(c.name).parametrizations.weight[0].values.flatten() for c in convs])
print("the package chooses the same places:", torch.equal(by_hand != 0, stored != 0))
accuracy = {"all": curve["fine-tuned"].iloc[0], "sparse": tune(small, labels)}
size = delta.save(small, base, bench.path("lesson/second.safetensors"), classes=second.classes)
print(f"sparse {accuracy['sparse']:.1f} %, all {accuracy['all']:.1f} %")
print(f"{size:,} bytes on top of {base.stat().st_size:,}")

# %% [markdown]
# ## 7 · Of which file is it a difference?
#
# A difference means nothing without its base. Added to another network, even to the same one after one more epoch, it
# gives a network that runs, and is wrong. So its file names the base, by a hash (SHA-256) of the base's contents.
#
# ### Exercise 9.6 · A difference knows its base
#
# `difference` has three entries: `base`, the SHA-256 of its weight's bytes in hexadecimal; `places` in the flat weight;
# `values`, which are added there. Return the second task's weight in the first one's shape. The first weight is needed
# still: it must not change. For another weight raise a `ValueError` that says what is wrong.
#
# <details><summary>Hint 1</summary><code>hashlib.sha256(weight.numpy().tobytes()).hexdigest()</code> is a weight's
# SHA-256.</details>
# <details><summary>Hint 2</summary><code>weight.clone().flatten()</code> is a copy that can be changed.</details>

# %% tags=["exercise"]
import hashlib


def second_weight(weight: torch.Tensor, difference: dict) -> torch.Tensor:
    """The weight with a difference that is its own."""
    ### BEGIN SOLUTION
    if hashlib.sha256(weight.numpy().tobytes()).hexdigest() != difference["base"]:
        raise ValueError("this is a difference to another weight")
    changed = weight.clone().flatten()
    changed[difference["places"]] += difference["values"]
    return changed.view_as(weight)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("9.6", second_weight)

# %% tags=["machine-dependent"]
loaded, classes = delta.load(bench.path("lesson/second.safetensors"), base)
answers = evaluation.predict(loaded, judges, normalize=second.normalize)
print(f"{base.name} + second.safetensors: classes {', '.join(classes)}")
print(f"read back: {evaluation.accuracy(answers, judges.labels):.1f} %; in memory {accuracy['sparse']:.1f} %")
try:
    delta.load(bench.path("lesson/second.safetensors"), file)
except delta.DeltaError as error:
    print(str(error).replace(f"{file.parent}/", ""))

# %% [markdown]
# **What would fool you.** Accuracy of the network in memory, before its difference was rounded and written. In the
# benchmark every accuracy of a difference is that of base and difference read back.
#
# ## Benchmark
#
# All trainings for the second task see as many images, of the same labelled ones. Each start is a file of the first task.
# "kB added" is what the second task adds: a difference, a head, or a whole network. A fresh process scores the test images
# of each file. The difference in accuracy is that to the uncompressed start, all of it fine-tuned, with as many labels.

# %% tags=["benchmark"]
candidates = bench.build(configurations + controls)

# %% tags=["benchmark"]
rows = bench.measure(candidates)
bench.show(rows)

# %% tags=["benchmark"]
figures.show(bench.figure(rows), "Test accuracy on the second task against the kilobytes that it adds")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# ## The committed results
#
# The same cells on photographs: five classes of CIFAR-10, then the other five, with 10, 50, 250 and all labels a class.

# %% tags=["machine-dependent"]
from bench.committed import committed

results = committed("transfer")
if results is None:
    print("not committed yet: `make benchmark PROFILE=transfer` measures them")
else:
    display(bench.show(results.rows[results.rows["technique"] == "transfer"]))

# %% [markdown]
# ## Your predictions
#
# How near were they? The bars begin at 1: no bar means that you understood.

# %%
figures.show(
    predictions.show(), "For each prediction a bar: what was measured, divided by what was predicted"
)

# %% [markdown]
# ## Summary
#
# - The last stage keeps what its own task needed. Of another task an earlier stage can know more.
# - Frozen parameters are not a frozen network: batch-norm's statistics move in train mode.
# - A start can save training and labels. It saves labels only where it beats new weights that have converged.
# - Rounding to 8 bits changes a start less than training does. What is pruned is gone, and the first task's accuracy hides it.
# - A second task is a small file on top of the first one's, if the file says which base it needs.
#
# <!-- numbers:begin -->
# **In numbers.** The tables of this notebook are not committed yet: `make benchmark PROFILE=transfer` measures them.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why can a stage in the middle tell new classes apart better than the last one?</summary>The last
# stage was trained to put each class of the first task in one place. What does not help there is lost, and the second task
# may need it.</details>
# <details><summary>2. All parameters of a body have <code>requires_grad=False</code>. What may still change in
# training?</summary>Batch-norm's running means and variances, in each forward pass in train mode. Put the body into eval
# mode.</details>
# <details><summary>3. Why do both rivals see as many images, and not as many epochs?</summary>An epoch of 50 images is a
# step or two. With equal epochs, more labels would also mean more training.</details>
# <details><summary>4. With which normalization does the second task go through the network?</summary>With the first one's:
# the weights were trained for inputs of that scale.</details>
# <details><summary>5. A start gains 20 percentage points after 20 steps and none after 2,000. What did it save?</summary>Training, and
# no labels: from new weights as few labels lead as far.</details>
# <details><summary>6. Two compressed networks are as accurate on the first task. Are they equally good starts?</summary>Not
# by that. Each kept what the first task needs; they may have lost different things that it does not need.</details>
# <details><summary>7. Why does SGD not move a weight that is rounded after each step?</summary>Most steps are below half a
# scale, so each is rounded away. A float weight behind the rounding adds them up.</details>
# <details><summary>8. When is a low-rank difference smaller than a sparse one?</summary>When few directions hold most of it:
# rank r costs r times rows plus columns, whatever the number of weights that change.</details>
# <details><summary>9. Why is a difference's base named by a hash and not by a file name?</summary>A name stays when the
# contents change. A difference to other contents gives a network that runs and is wrong.</details>
# <details><summary>10. You serve twenty tasks on a device. What do you compare?</summary>Twenty compressed files, against
# one base and twenty differences: their bytes together, and the accuracy of each. A base with fewer channels makes both
# smaller, and may be the worse start.</details>
#
# **Try it.** (1) Raise `seen` to 6400: how much of the gain was training, how much labels? (2) Add
# `{"method": "transfer", "start": "pipeline", "train": "kept", "labels": 10}` to `configurations`. (3) Your own images:
# run [01](01_baseline.ipynb) with `-p dataset imagefolder:/FIRST`, and with `-p weights /FILE.pth` if you have a network
# of your own; then this notebook with `-y "upstream: [FOLDER_OF_01]" -p dataset imagefolder:/SECOND`.
#
# **Further reading.** [Mudrakarta et al., 2019](https://arxiv.org/abs/1810.10703), batch-norm alone as a second task;
# [Mallya et al., 2018](https://arxiv.org/abs/1801.06519), a mask as a second task;
# [Chen et al., 2021](https://arxiv.org/abs/2012.06908), pruned starts that transfer.
#
# Next: [10_report](10_report.ipynb): how to read the tables.
