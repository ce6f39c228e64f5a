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
# # 01 · The baseline: what "small", "fast" and "accurate" mean
#
# Compression is a claim about three numbers: bytes, milliseconds and accuracy. Before anything is compressed, this
# notebook trains the [baseline](../docs/glossary.md#baseline), with which everything is compared. It counts each of the three numbers by hand once. In
# every section you **predict** a number, then **measure** it, then look at the **ratio** of the two. A ratio of 1 means
# that you understood. Another ratio is where you learn something.
#
# **You will be able to** count parameters and MACs, train a network that has converged, and say how accurate, how small
# and how fast it is, and how sure you are. **You need** Python and a rough idea of a convolution. **Time:** 45
# minutes to read, 45 for the six exercises, a minute to run with the defaults. These use scikit-learn's digits: 8×8 images
# that come with the library.
#
# **Contents.**
# [1 · The images](#1-·-What-are-the-images?).
# [2 · The network](#2-·-What-is-the-network?).
# [3 · Parameters](#3-·-How-many-parameters,-and-where?).
# [4 · MACs](#4-·-What-does-one-image-cost?).
# [5 · Training](#5-·-How-is-it-trained,-and-has-it-converged?).
# [6 · Bytes](#6-·-How-many-bytes?).
# [7 · Milliseconds](#7-·-How-fast-is-it?).
# [8 · Accuracy](#8-·-How-accurate-is-it,-and-how-sure-are-we?).
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
dataset: str = "digits"  # name: digits, fashion_mnist, cifar10, cifar100 or imagefolder:PATH
stem: str = "small"  # {imagenet, small, small_stride2} the first convolution
width: float = 1.0  # [0.01, 4] factor on every number of channels
epochs: float = 8.0  # [0.01, 1000] passes over the training images; the last may be a part
learning_rate: float = 0.05  # [1e-6, 10] peak of the one-cycle schedule
seed: int = 1  # [0, 1000000] of the weights, the order and the augmentation
# what the benchmark also sets
size: int = 0  # 0 or [8, 1024] pixels the images are resized to; 0: as they are (your own: 32)
depth: int = 18  # {18, 34, 50} layers of the residual network; 50 is the teacher
weights: str = ""  # start from these: imagenet, or a file in torchvision's format; empty: new weights
pretrained: str = ""  # a trained network of this suite in the repository; empty: it is trained here
batch_size: int = 32  # [2, 4096] images a step
augment: bool = False  # shift and mirror the training images; pays when there are many epochs
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/01_baseline

# %% tags=["setup"]
import matplotlib.pyplot as plt
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import artifact, data, evaluation, figures, models, training
from nnc_utils.baseline import Train
from nnc_utils.exercises import check, predictions

figures.style()
bench = Bench("01_baseline", globals())

# %% [markdown]
# ## 1 · What are the images?
#
# Each data set is split three ways. The network learns from **train**. Every choice (how long to train, how many bits,
# which layers) is made on **validation**. **Test** is looked at once, for the number that is reported. Choosing on the
# test set is the quietest way to fool yourself: the best of ten networks on one test set looks better than any of them
# is.

# %% tags=["nbval-check-output"]
images = bench.images
for name in ("train", "validation", "test"):
    split = getattr(images, name)
    print(f"{name:10} {len(split):6,} images of {images.channels} × {images.size} × {images.size} pixels")
print(f"{len(images.classes)} classes: {', '.join(images.classes)}")

# %%
figure, panels = plt.subplots(1, 10, figsize=(11, 1.6))
for axes, image, label in zip(panels, images.train.images, images.train.labels, strict=False):
    axes.imshow(image.permute(1, 2, 0).squeeze(), cmap=None if len(image) == 3 else "gray")
    axes.set_title(images.classes[label], fontsize=9)
    axes.axis("off")
figures.show(figure, f"Ten training images of {dataset} with their classes")

# %% [markdown]
# ## 2 · What is the network?
#
# The network is a ResNet-18 ([He et al., 2016](https://arxiv.org/abs/1512.03385)): a stem, four stages of two residual
# blocks, and a classifier. Its architecture is data. A [**Spec**](../docs/glossary.md#spec) lists the stem, the blocks of each stage, the width and
# kernel of every convolution, and how each block is connected. `build(spec)` turns it into a module. A pruned or
# searched network will be nothing but another Spec.

# %% tags=["nbval-check-output"]
shape = {"channels": images.channels, "size": images.size, "classes": len(images.classes)}
spec = models.resnet(depth, width=width, stem=stem, **shape)
torch.manual_seed(seed)
model = models.build(spec)
layers = models.layers(spec)
print(f"{len(layers)} layers, of which {sum(x.kind == 'conv' for x in layers)} convolutions; the first six:")
fields = {
    "in": "in_channels",
    "out": "out_channels",
    "kernel": "kernel",
    "stride": "stride",
    "pixels": "size_out",
}
pd.DataFrame({name: [getattr(x, field) for x in layers[:6]] for name, field in fields.items()}).set_index(
    pd.Index([x.name for x in layers[:6]], name="layer")
)

# %% tags=["nbval-check-output"]
if pretrained:
    model = bench.pretrained.network
    print(f"all weights are those of {pretrained}, which was trained before")
elif weights:
    from nnc_utils.pretrained import load_pretrained

    fresh = load_pretrained(model, weights)
    print(f"weights from {weights}; new, because their shapes differ: {', '.join(fresh) or 'none'}")
else:
    print("all weights are new")

# %% [markdown]
# ## 3 · How many parameters, and where?
#
# A convolution from $c$ to $d$ channels with a $k \times k$ kernel has $c \cdot d \cdot k^2$ weights, and the batch-norm
# behind it has $2d$ parameters. From stage to stage the width doubles.
#
# ### Exercise 1.1 · Parameters of a layer
#
# A layer knows its `kind` ("conv" or "linear"), `in_channels`, `out_channels`, `kernel` and whether a `batch_norm` follows.
# A convolution here has no bias; the classifier has one. Return the number of [parameters](../docs/glossary.md#parameters).
#
# <details><summary>Hint 1</summary>Weights first: each output channel has one kernel for each input channel.</details>
# <details><summary>Hint 2</summary>Batch-norm multiplies each channel by a factor and adds a shift.</details>


# %% tags=["exercise"]
def parameters_of(layer: models.Layer) -> int:
    """The parameters of a layer, its batch-norm's included."""
    ### BEGIN SOLUTION
    kernel = layer.kernel**2 if layer.kind == "conv" else 1
    weights = layer.in_channels * layer.out_channels * kernel
    return weights + (2 if layer.batch_norm else 1) * layer.out_channels
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.1", parameters_of)

# %% [markdown]
# *Predict*: what share of all parameters is in the last of the four stages? A naive guess stands there; put yours.

# %%
predictions.predict("parameters in the last stage (%)", 25)

# %% tags=["nbval-check-output"]
predicted_parameters = sum(parameters_of(layer) for layer in layers)
counted = sum(p.numel() for p in model.parameters())
print(
    f"predicted {predicted_parameters:,}   counted {counted:,}   ratio {counted / predicted_parameters:.3f}"
)
print(f"the package says the same: {models.parameters(spec) == counted}")

# %% tags=["nbval-check-output"]
stages = [layer.name.split(".")[0] for layer in layers]
shares = pd.DataFrame(
    {"parameters": [x.parameters for x in layers], "MACs": [x.macs for x in layers]}, index=stages
)
shares = shares.groupby(level=0, sort=False).sum()
shares = 100 * shares / shares.sum()
last = shares.loc["layer4", "parameters"]
predictions.measured("parameters in the last stage (%)", last)

# %% [markdown]
# **What it means.** Nearly all parameters are in the last stage, where the images have become tiny. A method that
# shrinks the *file* must work there. Keep that in mind for the next count.
#
# ## 4 · What does one image cost?
#
# Work is counted in [**MACs**](../docs/glossary.md#macs), multiply-accumulate operations of convolutions and linear layers for one image. A
# convolution with an output of $h \times w$ pixels takes $c \cdot d \cdot k^2 \cdot h \cdot w$ of them. PyTorch's own
# counter reports floating-point operations, two for each MAC.
#
# ### Exercise 1.2 · MACs of a layer
#
# Beside the fields of exercise 1.1 a layer knows `size_in` and `size_out`, the height and width of its input and its output
# in pixels (1 for the classifier). Return its MACs for one image.
#
# <details><summary>Hint 1</summary>At one pixel of the output, each weight is used once.</details>
# <details><summary>Hint 2</summary>With stride 2 the output has a quarter of the input's pixels.</details>


# %% tags=["exercise"]
def macs_of(layer: models.Layer) -> int:
    """Multiply-accumulate operations of a layer for one image."""
    ### BEGIN SOLUTION
    return layer.in_channels * layer.out_channels * layer.kernel**2 * layer.size_out**2
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.2", macs_of)

# %% [markdown]
# *Predict*: is the last stage's share of the MACs larger or smaller than its share of the parameters?

# %%
predictions.predict("MACs in the last stage (%)", 75)

# %% tags=["nbval-check-output"]
from torch.utils.flop_counter import FlopCounterMode

predicted_macs = sum(macs_of(layer) for layer in layers)
with FlopCounterMode(display=False) as counter, torch.inference_mode():
    model.eval()(torch.zeros(1, images.channels, images.size, images.size))
counted_macs = counter.get_total_flops() // 2
print(f"predicted {predicted_macs:,}   counted {counted_macs:,}   ratio {counted_macs / predicted_macs:.3f}")
predictions.measured("MACs in the last stage (%)", shares.loc["layer4", "MACs"])

# %%
figure, axes = plt.subplots(figsize=(8, 2.8))
shares.plot.bar(ax=axes, rot=0, color=["C0", "C1"])
for bars in axes.containers:
    axes.bar_label(bars, fmt="%.0f %%", fontsize=8)
axes.set(title="Where are the parameters, and where is the work?", ylabel="share (%)", xlabel="")
axes.legend(ncols=2, loc="upper left")
axes.margins(y=0.3)
figures.show(figure, "Shares of parameters and MACs of each stage: parameters grow towards the last stage")

# %% [markdown]
# **What would fool you.** Parameters and MACs disagree about which layers matter. Pruning can make a file much smaller
# and no faster, or the other way round. And a ratio of MACs is not a speed-up: we will measure milliseconds.
#
# ## 5 · How is it trained, and has it converged?
#
# Stochastic gradient descent with Nesterov momentum lowers the cross-entropy of a batch. The learning rate makes *one
# cycle* ([Smith, 2018](https://arxiv.org/abs/1803.09820)): up to `learning_rate`, then down to almost nothing.
# Weight decay acts on the weights of convolutions and classifier, not on batch-norm or biases. This is the whole loop.

# %%
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR


def train(network: torch.nn.Module, some: data.Data, passes: int) -> torch.nn.Module:
    """One cycle of Nesterov's SGD on the processor."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, learning_rate, momentum=0.9, nesterov=True, fused=True)
    steps = passes * (len(some.train) // batch_size)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps, cycle_momentum=False)
    device = torch.device("cpu")
    network.train().to(memory_format=torch.channels_last)
    for epoch in range(1, passes + 1):
        for batch, labels in training.batches(some, epoch, seed, batch_size, augment, device):
            with torch.autocast("cpu", torch.bfloat16, enabled=training.fast_bf16(device)):
                loss = functional.cross_entropy(network(batch).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


# %% [markdown]
# [`training.fit`](../nnc_utils/training.py) is this loop with a progress line, and with a checkpoint after each epoch.
# Every network of the course is trained by it; the loss is its argument. Does it give the same network? We ask with a
# narrow one and nine batches.

# %% tags=["checks", "machine-dependent"]
from dataclasses import replace

train_split = data.Split(images.train.images[: 9 * batch_size], images.train.labels[: 9 * batch_size])
few, narrow = replace(images, train=train_split), models.resnet(18, width=width / 8, stem=stem, **shape)
recipe = {"learning_rate": learning_rate, "batch_size": batch_size, "augment": augment, "seed": seed}
twins = []
for _ in range(2):
    torch.manual_seed(seed)
    twins.append(models.build(narrow))
train(twins[0], few, 2)
training.fit(twins[1], few, epochs=2, device="cpu", **recipe)
ours, theirs = (torch.cat([p.flatten() for p in twin.parameters()]) for twin in twins)
print(f"the same weights, bit for bit: {torch.equal(ours, theirs)}")

# %% [markdown]
# Now the baseline. *Predict*: at which epoch will the validation accuracy stop rising? A `pretrained` network was trained
# by the same loop, for hours: its epochs lie beside its file, and nothing is trained here.

# %% tags=["machine-dependent"]
if pretrained:
    history = bench.pretrained.history
else:
    history = bench.fit(model, "train", epochs=epochs, validate=True, **recipe)
print(f"{len(history)} epochs, {history.images:,} images, {history.seconds:.0f} seconds")

# %% tags=["machine-dependent"]
curve = history.to_frame()
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
left.plot(curve["epoch"], curve["loss"], marker="o")
left.set(title="Does the loss still fall?", xlabel="epoch", ylabel="cross-entropy on train")
right.plot(curve["epoch"], curve["validation"], marker="s", color="C1")
right.set(title="Does accuracy still rise?", xlabel="epoch", ylabel="validation accuracy (%)")
figures.show(figure, "Training loss falling and validation accuracy rising with the epochs")
rise = curve["validation"].iloc[-1] - curve["validation"].iloc[-max(2, len(curve) // 5) :].iloc[0]
verdict = "has converged" if abs(rise) <= 0.5 else "has not converged: train longer"
if (one := 100 / len(images.validation)) > 0.5:
    verdict = f"may have converged or not, since one of {len(images.validation)} images is {one:.1f} pp"
print(f"over the last fifth of the epochs accuracy changed by {rise:+.2f} pp: the network {verdict}")

# %% [markdown]
# **What would fool you.** An under-trained baseline. If accuracy still rises at the end, any method that trains a little
# longer "improves" the network while compressing it. Retrained networks are therefore compared with the dense network
# that got **the same additional training**.
#
# ## 6 · How many bytes?
#
# A float32 takes four bytes. The network is saved as an [**artifact**](../docs/glossary.md#artifact): one safetensors file with Spec, weights,
# batch-norm statistics, preprocessing and class names.
#
# ### Exercise 1.3 · The length of a file
#
# Return the bytes that parameters and running statistics of these layers take in float32. Use `parameters_of`.
#
# <details><summary>Hint 1</summary>In inference batch-norm needs a running mean and a running variance for each channel. They
# are no parameters, but without them the file is not the network.</details>


# %% tags=["exercise"]
def file_bytes(layers: list[models.Layer]) -> int:
    """Bytes of the parameters and running statistics of layers, in float32."""
    ### BEGIN SOLUTION
    running = sum(2 * layer.out_channels for layer in layers if layer.batch_norm)
    return 4 * (sum(parameters_of(layer) for layer in layers) + running)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.3", file_bytes)

# %% [markdown]
# Now ask the file system. And is the *file* the network? Only if loading it gives the same logits, bit for bit.

# %% tags=["machine-dependent"]
path = bench.path("scratch/by_hand.safetensors")
artifact.save(model, path, mean=images.mean, std=images.std, classes=images.classes)
predicted_bytes, measured_bytes = file_bytes(layers), path.stat().st_size
print(f"predicted {predicted_bytes:,} bytes   measured {measured_bytes:,}   ", end="")
print(f"ratio {measured_bytes / predicted_bytes:.4f}")
print(f"the rest: {measured_bytes - predicted_bytes:,} bytes of description")

some = images.normalize(images.validation.images[:64])
with torch.inference_mode():
    print("the same logits after reloading:", torch.equal(model(some), artifact.load(path)(some)))

# %% [markdown]
# ## 7 · How fast is it?
#
# *Predict*: the time of one image, its [latency](../docs/glossary.md#latency), is at least its MACs divided by the MACs a second that this processor reaches in a
# large matrix product. Then measure one image in plain ("eager") PyTorch.

# %% tags=["machine-dependent"]
import statistics
import timeit


def median_seconds(work, repeats: int = 100) -> float:
    """The median time of a call, after a few that do not count."""
    timeit.repeat(work, number=1, repeat=10)
    return statistics.median(timeit.repeat(work, number=1, repeat=repeats))


threads = torch.get_num_threads()
torch.set_num_threads(1)
matrix, one = torch.randn(512, 512), some[:1].contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    macs_a_second = 512**3 / median_seconds(lambda: matrix @ matrix)
    measured_ms = 1e3 * median_seconds(lambda: model(one))
torch.set_num_threads(threads)
predicted_ms = 1e3 * predicted_macs / macs_a_second
print(f"one thread: predicted at least {predicted_ms:.3f} ms, measured {measured_ms:.3f} ms,", end=" ")
print(f"ratio {measured_ms / predicted_ms:.1f}")

# %% [markdown]
# **What it means.** One image does not fill the processor. Launching dozens of operators one by one from Python, small
# matrices and memory traffic take much of the time. A runtime that fuses the operators removes part of it *without any
# compression*. So a speed-up "against eager PyTorch" says little about a compression method.
# [07_deployment](07_deployment.ipynb) always gives a second ratio, against the fastest fp32 runtime.
#
# **What would fool you.** The first call (it allocates and chooses kernels), another number of threads, another batch
# size, a busy machine, a mean that one hiccup moves. The tables of this course have medians over interleaved rounds, at
# a fixed number of threads.
#
# ## 8 · How accurate is it, and how sure are we?
#
# [Accuracy](../docs/glossary.md#accuracy) is correct ÷ number of images.
#
# ### Exercise 1.4 · Find the bug: accuracy over batches
#
# A network predicts in batches; the last is often smaller. Many scripts average the accuracies of the batches. Return the
# percent of *all* images that are right.
#
# <details><summary>Hint 1</summary>An image of a small batch must not count more than one of a large batch.</details>


# %% tags=["exercise"]
def accuracy(batches: list) -> float:
    """Percent of right predictions; each batch is a pair of arrays: predictions (n,) and labels (n,)."""
    ### BEGIN SOLUTION
    right = sum((predictions == labels).sum() for predictions, labels in batches)
    return 100 * float(right) / sum(len(labels) for _, labels in batches)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.4", accuracy)

# %% [markdown]
# ### Exercise 1.5 · How sure is an accuracy?
#
# With $n$ test images an accuracy $p$, as a share, has the standard error $\sqrt{p(1-p)/n}$. A 95 % interval reaches
# 1.96 of them to either side. Return half its width in [percentage points](../docs/glossary.md#percentage-points-pp), for an accuracy in percent.
#
# <details><summary>Hint 1</summary>Divide the accuracy by 100 first, and multiply the result by 100.</details>


# %% tags=["exercise"]
def half_width(accuracy: float, images: int) -> float:
    """Half of the 95 % interval of an accuracy in percent, in percentage points."""
    ### BEGIN SOLUTION
    p = accuracy / 100
    return 100 * 1.96 * (p * (1 - p) / images) ** 0.5
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.5", half_width)

# %% [markdown]
# *Predict* the half-width from the validation accuracy, before the test images are looked at.

# %% tags=["machine-dependent"]
seen, n = history[-1].validation, len(images.test)
predicted_half = half_width(seen, n)
print(f"validation {seen:.2f} %: on {n:,} test images the interval will be ±{predicted_half:.2f} pp")

# %% [markdown]
# The network is now built once more from its parameters (nothing is trained twice), saved, and scored by a *fresh
# process*, which gets nothing but the file.

# %% tags=["benchmark"]
rows = bench.measure(bench.build([Train()]))

# %% tags=["machine-dependent"]
from bench.tables import guessing

row = rows.iloc[0]
half = half_width(row["accuracy"], row["total"])
right, total = int(row["correct"]), int(row["total"])
print(f"test {row['accuracy']:.2f} % ({right:,} of {total:,} right), 95 % interval ±{half:.2f} pp")
print(f"predicted ±{predicted_half:.2f} pp, ratio {half / max(predicted_half, 1e-9):.2f}")
print(guessing(row["accuracy"], images.test.labels) or "that is more than always naming the same class")

# %% [markdown]
# **What it means.** Two networks that are measured on *different* images cannot be told apart within this interval.
# Scored on the *same* images they can: most images are right or wrong for both, and only the few on which they differ
# count. All later comparisons use that [**paired** interval](../docs/glossary.md#paired-interval):
#
# $$\begin{gathered} \bar d \pm 1.96 \cdot \frac{\mathrm{sd}(d)}{\sqrt n} \\ d_i = \text{compressed right}_i - \text{reference right}_i \end{gathered}$$
#
# For the deviation one image that is won and one that is lost are added
# ([Bonett and Price, 2012](https://doi.org/10.3102/1076998611411915)). That matters where few images differ.
#
# ### Exercise 1.6 · The paired interval
#
# `right` and `before` say of each image whether the compressed network and its reference are right. Return lower end, mean and
# upper end in percentage points.
#
# <details><summary>Hint 1</summary>A bool becomes a number by <code>.astype(float)</code>; d is 100, 0 or −100.</details>
# <details><summary>Hint 2</summary><code>np.append(d, [100, -100])</code> adds the two images; <code>.std(ddof=1)</code> is their deviation. The mean
# and n stay those of d.</details>


# %% tags=["exercise"]
import numpy as np


def interval(right: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """The paired 95 % interval of compressed minus reference accuracy; both are bool (n,)."""
    ### BEGIN SOLUTION
    d = 100 * (right.astype(float) - before.astype(float))
    half = 1.96 * np.append(d, [100, -100]).std(ddof=1) / len(d) ** 0.5
    return d.mean() - half, d.mean(), d.mean() + half
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("1.6", interval)

# %% [markdown]
# *Predict*: a reference is right on 93 % of 10,000 images; another network wins 20 of them and loses 30. Is the
# difference of −0.10 pp real?

# %% tags=["nbval-check-output"]
before = np.arange(10_000) >= 700
right = before.copy()
right[:20], right[-30:] = True, False

low, mean, high = interval(right, before)
print(f"paired: {mean:+.2f} pp, 95 % interval [{low:+.2f}, {high:+.2f}]")
verdict = "worse" if high < 0 else "not distinguishable"
unpaired = 2**0.5 * half_width(93, 10_000)
print(
    f"the other network is {verdict}; an unpaired interval would be ±{unpaired:.2f}, not ±{high - mean:.2f}"
)

# %% tags=["checks", "nbval-check-output"]
package = evaluation.paired_interval(compressed_correct=right, reference_correct=before)
print("the package says the same:", [round(float(v), 4) for v in (low, mean, high)], end=" ")
print([round(v, 4) for v in (package.low, package.mean, package.high)])

# %% [markdown]
# **What would fool you.** Two networks that differ on *no* image of a small test set. Without the two added images the
# interval would have no width, but the truth may still differ. With $n$ images and no difference the [**rule of three**](../docs/glossary.md#rule-of-three)
# allows ±300/n pp ([Hanley and Lippman-Hand, 1983](https://doi.org/10.1001/jama.1983.03330370053031)). No interval of
# this course is narrower.

# %% tags=["nbval-check-output"]
for count in (len(images.test), 10_000):
    bound = 300 / count
    said = "can" if bound <= 0.3 else "cannot"
    print(
        f"{count:,} images without a difference: within ±{bound:.2f} pp; they {said} show a loss below 0.3 pp"
    )

# %% [markdown]
# ## Benchmark
#
# One measurement of one artifact is one [**row**](../docs/glossary.md#row). Tables, figures and reports are made of rows only.

# %% tags=["benchmark"]
bench.finish()
rows[["model", "params", "macs", "artifact_bytes", "correct", "total", "accuracy"]].T

# %% [markdown]
# ## The committed results
#
# The same notebook, run on all of Fashion-MNIST with longer trainings. How much do seeds differ?

# %% tags=["machine-dependent"]
from bench.committed import committed

table = committed("baseline").rows
seeds = table[(table["method"] == "train") & (table["control"] == "")].set_index("seed")
accuracies = seeds["accuracy"]
spread = accuracies.max() - accuracies.min()
print(f"{accuracies.mean():.2f} % over {len(seeds)} seeds, which differ by {spread:.2f} pp", end="; ")
print(f"{seeds['artifact_bytes'].iloc[0]:,} bytes, {seeds['macs'].iloc[0]:,} MACs")
seeds[["profile", "train_images", "train_seconds", "correct", "accuracy"]].round(2)

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
# - Parameters are in the last stages, work is spread: bytes and MACs are different goals.
# - A baseline has to have converged, or every later comparison flatters compression.
# - The size is the length of a file that a fresh process can load. The accuracy is that of the file.
# - Choices are made on validation images. The test set is scored once, for the number that is reported.
# - Paired intervals on the same images tell networks apart that unpaired ones cannot.
#
# <!-- numbers:begin -->
# **In numbers.** On Fashion-MNIST the uncompressed network has 11.2 million parameters and 122 million MACs. Its
# file takes 44.7 MB. It is right on 94.20 % of 10,000 test images. Its fastest fp32 runtime, ExecuTorch, takes 3.12
# ms for an image.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why does halving every width not halve the parameters of a convolution?</summary>A convolution has in × out ×
# kernel² weights. Both numbers of channels are halved, so a quarter is left.</details>
# <details><summary>2. Which of parameters, MACs and bytes changes with the size of the images?</summary>MACs: the kernels are applied at
# more pixels. Parameters and bytes stay.</details>
# <details><summary>3. Why does batch-norm count two parameters a channel, and four numbers in the file?</summary>Its factor and its
# shift are trained. The running mean and variance are only recorded, but inference needs them.</details>
# <details><summary>4. PyTorch's counter says twice as many operations as you counted. Who is right?</summary>Both: a MAC is a
# multiplication and an addition.</details>
# <details><summary>5. A paper compares a pruned network that trained 10 more epochs with its baseline. What is missing?</summary>The
# baseline with the same 10 epochs more.</details>
# <details><summary>6. Why is the mean over the batches' accuracies wrong?</summary>The last batch is smaller, so its images count
# more.</details>
# <details><summary>7. Why is the test set looked at once?</summary>The best of many configurations on one test set looks better than any
# of them is. Choices are made on validation.</details>
# <details><summary>8. A network loses 0.2 pp on 400 test images. What can you say?</summary>Nothing yet: that is less than one image.
# Even with no difference the interval is ±0.75 pp.</details>
# <details><summary>9. Two networks are right on 94.0 % and 93.8 % of the same 10,000 images. Can they be told apart?</summary>That depends
# on how many images they differ on. The paired interval says it; the two accuracies do not.</details>
# <details><summary>10. A network takes 5 ms in eager PyTorch and 1 ms in a runtime. How much did compression gain?</summary>Nothing: it
# is the same network. A compressed network is compared with the fastest fp32 runtime.</details>
#
# **Try it.** (1) Set `stem = "small_stride2"`: predict MACs and parameters before you run. Which one changes? (2) Set
# `width = 0.5`: by which factor does each of the three numbers shrink, and why not by the same? (3) Set `epochs = 2` and
# read the verdict under the curves: would you accept this baseline?
#
# **Further reading.** [He et al., 2016](https://arxiv.org/abs/1512.03385), the network;
# [Smith, 2018](https://arxiv.org/abs/1803.09820), the learning rate; [Sze et al., 2017](https://arxiv.org/abs/1703.09039),
# how much of a network's energy is arithmetic.
#
# Next: [02_quantization](02_quantization.ipynb), fewer bits for each weight.
