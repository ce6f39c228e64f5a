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
# Compression is a claim about three numbers: bytes, milliseconds and accuracy. Before anything is
# compressed, this notebook trains the network that everything is compared with, and makes each of
# the three numbers by hand once. In every section you **predict** a number first, then **measure**
# it, then look at the **ratio** of the two. A ratio of 1 means that you understood; another ratio
# is where you learn something.
#
# You need: Python, and a rough idea of what a convolution is. With the defaults below everything
# runs on scikit-learn's digits, 8×8 pictures that come with the library, in under a minute.

# %% tags=["parameters"]
dataset: str = "digits"  # name: digits, fashion_mnist, cifar10, cifar100 or imagefolder:PATH
size: int = 0  # [0, 1024] pixels the pictures are resized to; 0: as they are (your own: 32)
depth: int = 18  # {18, 34, 50} layers of the residual network; 50 is the teacher
stem: str = "small"  # {imagenet, small, small_stride2} the first convolution
width: float = 1.0  # [0.01, 4] factor on every number of channels
weights: str = ""  # start from these: imagenet, or a file in torchvision's format; empty: from chance
epochs: float = 4.0  # [0.01, 1000] passes over the training pictures; the last may be a part
batch_size: int = 32  # [1, 4096] pictures a step
learning_rate: float = 0.05  # [1e-6, 10] peak of the one-cycle schedule
augment: bool = False  # shift and mirror the training pictures; pays when there are many epochs
seed: int = 1  # [0, 1000000] of the weights, the order and the augmentation
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/01_baseline

# %%
import statistics
import timeit

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from torch.utils.flop_counter import FlopCounterMode

from nnc_utils import artifact, data, evaluation, figures, models, results, scoring, training
from nnc_utils.run import start

run = start("01_baseline", globals())
torch.manual_seed(seed)
figures.style()

# %% [markdown]
# ## What are the pictures?
#
# Each data set is split three ways. The network learns from **train**; every choice (how long to
# train, how many bits, which layers) is made on **validation**; **test** is looked at once, for the
# number that is reported. Choosing on the test set is the quietest way to fool yourself: the best of
# ten networks on one test set looks better than any of them is.

# %%
pictures = data.load(dataset, size=size or None)
counts = {name: len(getattr(pictures, name)) for name in ("train", "validation", "test")}
print(f"{pictures.name}: {counts}, {pictures.channels} x {pictures.size} x {pictures.size} pixels")

# %%
figure, panels = plt.subplots(1, 10, figsize=(11, 1.6))
for axes, image, label in zip(panels, pictures.train.images, pictures.train.labels, strict=False):
    axes.imshow(image.permute(1, 2, 0).squeeze(), cmap=None if len(image) == 3 else "gray")
    axes.set_title(pictures.classes[label], fontsize=9)
    axes.axis("off")
figures.show(figure, f"Ten training pictures of {dataset} with their classes")

# %% [markdown]
# ## What is the network?
#
# A network's architecture is data: a **Spec** lists the stem, the blocks of each stage, the width and
# kernel of every convolution and how each block is connected. `build(spec)` turns it into a module.
# A pruned or searched network will be nothing but another Spec.

# %%
spec = models.resnet(
    depth,
    channels=pictures.channels,
    size=pictures.size,
    classes=len(pictures.classes),
    stem=stem,
    width=width,
)
model = models.build(spec)
if weights:
    print("not in these weights, so new:", ", ".join(models.load_pretrained(model, weights)) or "nothing")
pd.DataFrame(
    {"layer": x.name, "in": x.in_channels, "out": x.out_channels, "kernel": x.kernel, "size out": x.size_out}
    for x in models.layers(spec)
).head(6)

# %% [markdown]
# ### Predict: how many parameters?
#
# A convolution from $c$ to $d$ channels with a $k \times k$ kernel has $c \cdot d \cdot k^2$ weights, and the
# batch-norm behind it has $2d$ parameters. From stage to stage the width doubles, so a convolution's
# weights grow fourfold. Before you run the cell: what share of all parameters do you expect in the last
# of the four stages?

# %% tags=["nbval-check-output"]
shapes = models.layers(spec)
by_stage = pd.Series(
    [torch.Size(x.weight_shape).numel() for x in shapes], index=[x.name.split(".")[0] for x in shapes]
)
predicted_parameters = models.parameters(spec)
counted = sum(p.numel() for p in model.parameters())
print(
    f"predicted {predicted_parameters:,}   counted {counted:,}   ratio {counted / predicted_parameters:.3f}"
)
print((by_stage.groupby(level=0, sort=False).sum() / by_stage.sum() * 100).round(1).to_string())

# %% [markdown]
# **What it means.** Nearly all parameters sit in the last stage, where the pictures have become tiny:
# a method that shrinks the *file* must work there. Keep that in mind for the next count.
#
# ## What does one picture cost?
#
# The work is counted in **MACs**: multiplications of convolutions and linear layers for one picture,
# $c \cdot d \cdot k^2 \cdot h \cdot w$ for each convolution, with the *output* size $h \times w$. PyTorch's own counter reports
# floating-point operations, two for each MAC. Predict the MACs from the Spec, then let PyTorch count.

# %% tags=["nbval-check-output"]
predicted_macs = models.macs(spec)
with FlopCounterMode(display=False) as counter, torch.inference_mode():
    model.eval()(torch.zeros(1, pictures.channels, pictures.size, pictures.size))
counted_macs = counter.get_total_flops() // 2
print(f"predicted {predicted_macs:,}   counted {counted_macs:,}   ratio {counted_macs / predicted_macs:.3f}")
work = pd.Series([x.macs for x in shapes], index=[x.name.split(".")[0] for x in shapes])
print((work.groupby(level=0, sort=False).sum() / work.sum() * 100).round(1).to_string())

# %% [markdown]
# **What would fool you.** Parameters and MACs disagree about which layers matter: pruning can make a
# file much smaller and no faster, or the other way round. And a ratio of MACs is not a speed-up: we
# will measure milliseconds.
#
# ## Train it
#
# One loop trains every network of this course; the loss is its argument. It uses stochastic gradient
# descent with momentum and a *one-cycle* learning rate: up to `learning_rate`, then down to almost
# nothing. This is the whole of a step, and [`training.py`](../nnc_utils/training.py) adds little more
# than the augmentation, the progress line and a checkpoint after each epoch:
#
# ```python
# loss = loss_function(model, images, labels)
# optimizer.zero_grad()
# loss.backward()
# optimizer.step()
# schedule.step()
# ```

# %%
history = training.fit(
    model,
    pictures,
    epochs=epochs,
    batch_size=batch_size,
    learning_rate=learning_rate,
    augment=augment,
    seed=seed,
    validate=True,
    checkpoint=run.path("checkpoint.pt"),
)

# %%
curve = history.to_frame()
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
left.plot(curve["epoch"], curve["loss"], marker="o")
left.set(title="Does the loss still fall?", xlabel="epoch", ylabel="cross-entropy on train")
right.plot(curve["epoch"], curve["validation"], marker="s", color="C1")
right.set(title="Does accuracy still rise?", xlabel="epoch", ylabel="validation accuracy (%)")
figures.show(figure, "Training loss falling and validation accuracy rising with the epochs")

# %% [markdown]
# **What would fool you.** An under-trained baseline. If accuracy still rises at the end, any method
# that trains a little longer "improves" the network while compressing it. The protocol therefore
# compares retrained networks with the dense network *trained on as long*.
#
# ## How many bytes?
#
# A float32 takes four bytes. Predict the file from the parameters alone, save the network as an
# **artifact** (one safetensors file: Spec, weights, batch-norm statistics, preprocessing, class
# names), and ask the file system.

# %%
path = run.path("artifacts/fp32.safetensors")
saved = artifact.save(model, path, mean=pictures.mean, std=pictures.std, classes=pictures.classes)
predicted_bytes = 4 * predicted_parameters
print(f"predicted {predicted_bytes:,} bytes   measured {path.stat().st_size:,} bytes")
print(f"ratio {path.stat().st_size / predicted_bytes:.4f}")

# %% [markdown]
# The rest are batch-norm's running means and variances (two more numbers a channel, which are not
# trained but needed) and the description of the network. Is the *file* the network? Only if loading
# it gives the same logits, bit for bit.

# %% tags=["nbval-check-output"]
some = pictures.normalize(pictures.validation.images[:64])
with torch.inference_mode():
    same = torch.equal(model.eval()(some), artifact.load(path)(some))
print("same logits after reloading:", same)

# %% [markdown]
# ## How accurate is it, and how sure are we?
#
# Accuracy is correct ÷ number of pictures, of the network that a *fresh process* loads from the file.
# With $n$ test pictures an accuracy $p$ has the standard error $\sqrt{p(1-p)/n}$: predict the width of
# the interval before you see the number.

# %%
[score] = scoring.score([path], dataset=dataset, folder=run.path("predictions"))
accuracy = score["correct"] / score["total"]
expected = history[-1].validation / 100
predicted_error = (expected * (1 - expected) / score["total"]) ** 0.5
measured_error = (accuracy * (1 - accuracy) / score["total"]) ** 0.5
print(
    f"validation {100 * expected:.2f} %, test {100 * accuracy:.2f} % ({score['correct']} of {score['total']})"
)
print(f"95 % interval: ±{196 * predicted_error:.2f} points predicted, ±{196 * measured_error:.2f} measured")

# %% [markdown]
# **What it means.** Two networks measured on *different* pictures could not be told apart within this
# interval. Scored on the *same* pictures they can: most pictures are right or wrong for both, and
# only the few on which they differ count. All later comparisons use that *paired* interval:
#
# $$\bar d \pm 1.96 \cdot \frac{\mathrm{sd}(d)}{\sqrt n}, \qquad d_i = \text{compressed right}_i - \text{reference right}_i$$

# %% tags=["nbval-check-output"]
reference = torch.ones(10_000)
reference[:700] = 0  # a reference that is right on 93 % of the pictures
other = reference.clone()
other[:20], other[-30:] = 1, 0  # gains 20 pictures, loses 30
interval = evaluation.paired_interval(compressed_correct=other.numpy(), reference_correct=reference.numpy())
print(f"mean {interval.mean:+.2f} points, 95 % interval {interval.low:+.2f} to {interval.high:+.2f}")

# %% [markdown]
# ## How fast is it?
#
# Predict: the time of one picture is at least its MACs divided by the MACs a second that this
# processor reaches in a large matrix product. Then measure one picture in plain ("eager") PyTorch.

# %%
def median_seconds(work, repeats: int = 100) -> float:
    """The median time of a call, after a few that do not count."""
    timeit.repeat(work, number=1, repeat=10)
    return statistics.median(timeit.repeat(work, number=1, repeat=repeats))


threads = torch.get_num_threads()
torch.set_num_threads(1)
matrix, picture = torch.randn(512, 512), some[:1].contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    macs_a_second = 512**3 / median_seconds(lambda: matrix @ matrix)
    measured_ms = 1e3 * median_seconds(lambda: model(picture))
torch.set_num_threads(threads)
predicted_ms = 1e3 * predicted_macs / macs_a_second
print(f"predicted at least {predicted_ms:.3f} ms, measured {measured_ms:.3f} ms,", end=" ")
print(f"ratio {measured_ms / predicted_ms:.1f}, one thread")

# %% [markdown]
# **What it means.** One picture does not fill the processor: launching dozens of operators one
# by one from Python, small matrices and memory traffic take much of the time. A runtime that fuses the
# operators removes part of it *without any compression*; so a speed-up "against eager PyTorch" says
# little about a compression method. [07_deployment](07_deployment.ipynb) therefore always gives a
# second ratio, against the fastest fp32 runtime.
#
# **What would fool you.** The first call (it allocates and chooses kernels), another number of
# threads, another batch size, a busy machine, a mean that one hiccup moves. The table of this course
# has medians over interleaved rounds, at a fixed number of threads.
#
# ## The row
#
# One measurement of one artifact is one row. The tables, figures and the README are made of rows only.

# %%
row = results.compression_row(
    score,
    run=run,
    dataset=dataset,
    model=f"resnet{depth}",
    technique="baseline",
    method="train",
    control="" if depth == 18 else "teacher",
    train_images=history.images,
    train_seconds=history.seconds,
)
finished = run.finish(compression=[row])
print(f"{finished.run} is finished")
pd.Series(
    row.model_dump(include={"model", "params", "macs", "artifact_bytes", "correct", "total", "accuracy"})
)

# %% [markdown]
# ## The committed results
#
# The same notebook, run on all of Fashion-MNIST, gave the first row of this table.

# %%
committed = results.committed_profile()
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    table = figures.read_table(committed / "compression.csv")
    columns = [
        "model",
        "seed",
        "params",
        "macs",
        "artifact_bytes",
        "accuracy",
        "train_images",
        "train_seconds",
    ]
    display(table[table["technique"] == "baseline"][columns])

# %% [markdown]
# ## What you can now measure
#
# Parameters, MACs, bytes, accuracy with its interval, and milliseconds, of any network.
#
# **Try it.** (1) Set `stem = "small_stride2"`: predict MACs and parameters before you run. Which one changes?
# (2) Set `width = 0.5`: by which factor does each of the three numbers shrink, and why not by the
# same? (3) Train with `epochs = 2` and look at the two curves again: would you accept this baseline?
#
# Next: [02_quantization](02_quantization.ipynb), fewer bits for each weight.
