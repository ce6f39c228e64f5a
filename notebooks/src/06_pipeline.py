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
# # 06 · The pipeline: prune, distill, quantize
#
# Each technique alone makes a network a few times to some tens of times smaller. This notebook joins three of them and
# asks three questions. Do the gains multiply? Does the order matter? Does the result beat a narrow network with an equal
# training budget?
#
# **You will be able to** join compression stages, read off what each stage gives, and test the result against its
# toughest fair rival. **You need** [02](02_quantization.ipynb), [03](03_pruning.ipynb) and [04](04_distillation.ipynb).
# **Time:** 45 minutes to read, 45 for the seven exercises, a minute to run.
#
# **Contents.**
# [1 · Where do we start?](#1-·-Where-do-we-start?)
# [2 · Prune](#2-·-Prune:-how-much-is-left-at-16-times-fewer-MACs?).
# [3 · Distill](#3-·-Distill:-how-much-comes-back?).
# [4 · Round](#4-·-Round:-what-is-a-bit-worth?).
# [5 · Do the gains multiply?](#5-·-Do-the-gains-multiply?)
# [6 · Does the order matter?](#6-·-Does-the-order-matter?)
# [7 · The narrow rival](#7-·-The-narrow-rival).
# [8 · All steps in one figure](#8-·-All-steps-in-one-figure).
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
macs: float = 16.0  # [1, 1000] how many times fewer multiplications (MACs) pruning leaves
lambda_: float = 1e-10  # (0, 1) the loss that one bit of the file may cost
epochs: float = 4.0  # [0.01, 1000] of distillation in sections 3 to 7; the rival gets as many more
temperature: float = 4.0  # [0.1, 100] of the teacher's soft labels
alpha: float = 0.9  # [0, 1] share of the soft labels in the loss
seed: int = 1  # [0, 1000000] of new weights, of the images that score, of the order of training
# what the benchmark at the end runs
configurations: list = [{"method": "pipeline", "macs": 16, "lambda_": 1e-10}]  # pipelines
controls: list = [{"method": "small_dense", "macs": 16, "lambda_": 1e-10}]  # rivals
peers: list = []  # other tools, such as {"method": "torch_pruning_nncf", "macs": 16}
prune_epochs: float = 0.5  # [0.001, 1000] of training behind the stage prune
quantize_epochs: float = 0.5  # [0.001, 1000] of training with the rounding
distill_epochs: float = 1.0  # [0.001, 1000] of the stage distill; each network trains for all three
learning_rate: float = 0.01  # [0.00001, 1] peak of these three, and of the trainings in the sections
batch_size: int = 0  # 0 or [2, 4096] images a step of these trainings; 0: as the baseline
copies: int = 0  # [0, 64] augmentations of each image with cached teacher logits; 0: online
scoring_images: int = 256  # [2, 100000] training images for scores, curvature, ranges and batch-norm
multiple: int = 8  # [1, 64] channel counts are multiples of this; smaller layers excepted
runtime: str = "onnxruntime"  # {onnxruntime, openvino, executorch} in which budgets of milliseconds are timed
upstream: list = []  # run folders of 01_baseline (own seed first), 05, earlier shards; empty: 01's defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its configurations may be claimed
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/06_pipeline

# %% tags=["setup"]
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import artifact, batch_norm, curvature, evaluation, figures, models, pipeline, training
from nnc_utils.exercises import check, predictions

figures.style()
bench = Bench("06_pipeline", globals())
dense, images = bench.dense, bench.images
seen, seen_labels = bench.sample(scoring_images)

# %% [markdown]
# ## 1 · Where do we start?
#
# We start from the ResNet-18 of 01, trained on scikit-learn's digits unless `upstream` names another run. Every step of this
# notebook is judged by three numbers: the bytes of a file, the [MACs](../docs/glossary.md#macs) of an image, and the share of
# right answers. `measure` saves a network, loads the file again and counts. It looks at **validation** images only; the
# test images are kept for the end. From here on files hold float16: that factor of 2 is not pruning's.

# %% tags=["machine-dependent"]
steps = {}  # name -> bytes, MACs, accuracy, and which validation images are right


def saved(name: str, network: torch.nn.Module, dtype=torch.float16) -> artifact.Artifact:
    """A network as a file."""
    path = bench.path(f"scratch/{name.replace(' ', '_')}.safetensors")
    described = {"mean": images.mean, "std": images.std, "classes": images.classes}
    return artifact.save(network, path, dtype=dtype, **described)


def measure(name: str, network: torch.nn.Module, dtype=torch.float16) -> dict:
    """Bytes, MACs and validation accuracy of a network, of its file."""
    nbytes = saved(name, network, dtype).nbytes
    loaded = artifact.load(bench.path(f"scratch/{name.replace(' ', '_')}.safetensors"))
    answers = evaluation.predict(loaded, images.validation, normalize=images.normalize)
    right = answers == images.validation.labels.numpy()
    steps[name] = {"bytes": nbytes, "MACs": models.macs(network.spec), "right": right}
    steps[name]["accuracy (%)"] = 100 * right.mean()
    return steps[name]


first = measure("dense", dense, torch.float32)
half = measure("dense, fp16", dense)
print(f"{first['bytes']:,} bytes, {first['MACs']:,} MACs, {first['accuracy (%)']:.2f} % of validation")

# %% [markdown]
# ## 2 · Prune: how much is left at 16 times fewer MACs?
#
# A narrower network is smaller *and* faster, so it comes first. A Fisher score estimates how much the loss rises if a
# channel is removed ([Theis et al., 2018](https://arxiv.org/abs/1801.05787)). Remove the lowest-scoring channels until
# the network has 16 times fewer MACs. Then refit the next layer's remaining weights by least squares, which
# [**compensates**](../docs/glossary.md#compensation) for the missing input, and re-estimate batch-norm on the same images. All four steps are built in
# [03](03_pruning.ipynb).
#
# ### Exercise 6.1 · The stage prune
#
# `images` (n, C, H, W) are normalized training images and `labels` (n,) their classes. Return the network with at most
# `macs` MACs: by the four steps, in that order. Pass `multiple` on: it keeps the widths at multiples of 8, which
# integer kernels like.
#
# <details><summary>Hint 1</summary>Three functions of <code>channels</code> and one of <code>batch_norm</code>, a line each:
# <code>scores</code>, <code>within_macs</code>, <code>compensated</code>, <code>reestimate</code>.</details>
# <details><summary>Hint 2</summary><code>channels.scores(network, "fisher", images=images, labels=labels)</code>. What it
# returns goes into <code>within_macs</code>, beside <code>network.spec</code>.</details>
# <details><summary>Hint 3</summary><code>compensated</code> removes the channels, too. It gets the wide network and the numbers
# of the channels that stay.</details>

# %% tags=["exercise"]
from nnc_utils.pruning import channels


def prune_to(
    network: models.ResNet, images: torch.Tensor, labels: torch.Tensor, *, macs: float, multiple: int
) -> models.ResNet:
    """The network with its lowest-scoring channels removed, without any training."""
    ### BEGIN SOLUTION
    scores = channels.scores(network, "fisher", images=images, labels=labels)
    kept = channels.within_macs(network.spec, scores, macs=macs, multiple=multiple)
    narrow = channels.compensated(network, kept, images)
    return batch_norm.reestimate(narrow, images)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.1", prune_to)

# %% [markdown]
# *Predict*: with 16 times fewer MACs, how many times fewer parameters? Most parameters are in the last stage, most MACs
# are not.

# %%
predictions.predict("times fewer parameters", 16)

# %% tags=["machine-dependent"]
budget = models.macs(dense.spec) / macs
pruned = prune_to(dense, seen, seen_labels, macs=budget, multiple=multiple)
row = measure("pruned", pruned)
fewer_parameters = models.parameters(dense.spec) / models.parameters(pruned.spec)
print(f"MACs {macs:g}× fewer asked, {first['MACs'] / row['MACs']:.2f}× measured")
print(f"parameters {fewer_parameters:.1f}× fewer")
predictions.measured("times fewer parameters", fewer_parameters)
print(f"accuracy without any training: {row['accuracy (%)']:.2f} %")

# %% tags=["machine-dependent"]
package = pipeline.prune(dense, seen, seen_labels, macs=budget, multiple=multiple)
some = images.normalize(images.validation.images[:32])
with torch.inference_mode():
    same = torch.equal(pruned(some), package(some))
print(f"the package's stage `prune` gives the same network: {same}")

# %% [markdown]
# **What would fool you.** "90 % pruned" says nothing about bytes or MACs: 90 % of what? Count both, every time.
#
# ## 3 · Distill: how much comes back?
#
# The pruned network has lost some of what it knew. It trains on, with the dense network as its teacher. The loss mixes
# labels $y$ and the teacher's softened probabilities $p$ ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)):
#
# $$L = (1-\alpha)\,\text{CE}(q^{(1)}, y) + \alpha\, T^2\, \text{KL}(p^{(T)} \,\|\, q^{(T)})$$
#
# The student's probabilities are $q$. A superscript is the **temperature** by which logits are divided before the
# softmax: $T$ is `temperature`, and 1 changes nothing. CE is the cross-entropy with the labels, KL how far $q$ is from
# $p$. The share of the teacher, $\alpha$, is `alpha`. Gradients of softened probabilities shrink by $T^2$; the factor
# undoes that.
#
# ### Exercise 6.2 · Find the bugs: a loss that learns something else
#
# This function runs, and the loss falls. It has **three** bugs, and no error tells of them.
# Both logits are (images, classes), `labels` (images,). Return the loss of the formula, averaged over the images.
#
# ```python
# hard = functional.cross_entropy(student_logits, labels)
# log_q, log_p = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
# soft = functional.kl_div(log_q, log_p, log_target=True)
# return alpha * hard + (1 - alpha) * soft
# ```
#
# <details><summary>Hint 1</summary>Compare the last line with the formula, factor by factor.</details>
# <details><summary>Hint 2</summary>By what does <code>kl_div</code> divide unless told otherwise? Its documentation has a
# warning: by images × classes. <code>reduction</code> changes that.</details>

# %% tags=["exercise"]
from torch.nn import functional


def mixed_loss(
    *,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """The mean over a batch of the loss by labels and by the teacher's softened probabilities."""
    ### BEGIN SOLUTION
    hard = functional.cross_entropy(student_logits, labels)
    log_q, log_p = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    soft = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - alpha) * hard + alpha * temperature**2 * soft
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.2", mixed_loss)

# %% [markdown]
# The pruned network trains with this loss beside the dense one, which computes its logits for each batch.

# %%
import copy
from dataclasses import replace

from nnc_utils.data import Split

# Of larger data sets the first 2,000 images, so that a training takes seconds. Digits has fewer.
few = replace(images, train=Split(images.train.images[:2000], images.train.labels[:2000]))


def soft_labels(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a student beside the dense network."""
    with torch.no_grad():
        teacher_logits = dense(inputs)
    logits = {"student_logits": model(inputs).float(), "teacher_logits": teacher_logits.float()}
    return mixed_loss(**logits, labels=labels, temperature=temperature, alpha=alpha)


def trained(
    network: models.ResNet, loss=training.cross_entropy, length: float = epochs, peak: float = learning_rate
):
    """A copy of the network, trained on."""
    network = copy.deepcopy(network).train()
    common = {"augment": bench.recipe["augment"], "batch_size": bench.recipe["batch_size"], "seed": seed}
    training.fit(network, few, epochs=length, learning_rate=peak, loss=loss, **common)
    return network.eval()


# %% [markdown]
# *Predict*: how much of the lost accuracy comes back in a few epochs?

# %% tags=["machine-dependent"]
distilled = trained(pruned, soft_labels)
row, before = measure("pruned, distilled", distilled), steps["pruned"]
lost = first["accuracy (%)"] - before["accuracy (%)"]
back = row["accuracy (%)"] - before["accuracy (%)"]
print(f"pruning lost {lost:.2f} percentage points, distillation brought back {back:.2f}")
count = len(images.validation.labels)
print(f"on {count} validation images, where one is {100 / count:.2f} points")

# %% [markdown]
# ## 4 · Round: what is a bit worth?
#
# Now each weight becomes a small integer. Plain rounding takes the nearest one. **Second-order rounding** takes the one
# for which loss and bits together cost least: $\Delta L + \lambda \cdot \text{bits}$, where $\Delta L$ is estimated from
# the curvature (built in [02](02_quantization.ipynb)). [$\lambda$](../docs/glossary.md#λ-lambda_) is the loss that one bit may cost. Entropy coding then
# makes frequent integers cheap. Activations get 8 bits; a few training images [**calibrate**](../docs/glossary.md#calibration) their ranges. Files, tables
# and the benchmark call this stage *quantize*.
#
# *Predict*: the file holds 16 bits a weight now. How many will be left?

# %%
predictions.predict("bits of a parameter in the file", 4)

# %% tags=["machine-dependent"]
from nnc_utils.quantization import activations, hessian_rounding


def quantize(network: models.ResNet, price: float = lambda_, curved: dict | None = None) -> models.ResNet:
    """Integers for weights and activations, without any training."""
    curved = curved or curvature.curvatures(network, seen, seed=seed)
    rounded = hessian_rounding.quantize_network(network, curved, lambda_=price)
    rounded = batch_norm.reestimate(rounded, seen, original=network)
    return activations.calibrate(rounded, seen)


joined = quantize(distilled)
row, before = measure("pruned, distilled, rounded", joined), steps["pruned, distilled"]
bits = 8 * row["bytes"] / models.parameters(joined.spec)
predictions.measured("bits of a parameter in the file", bits)
print(f"{before['bytes'] / row['bytes']:.1f}× smaller than before; {bits:.1f} bits per parameter in the file")
print(f"accuracy {before['accuracy (%)']:.2f} % before, {row['accuracy (%)']:.2f} % after")

# %% [markdown]
# ### Exercise 6.3 · The λ of a budget
#
# In practice a budget is given, not λ: a file of at most `budget` bytes. `file_bytes(lambda_)` gives a file's length; it
# falls as λ grows. Search between `low` and `high` by halving the interval `steps` times, **on a log scale**,
# and return the end that fits the budget. If not even `high` fits, raise a `ValueError` that names the budget. Each call
# of `file_bytes` rounds a whole network: make at most `steps` + 1 of them.
#
# <details><summary>Hint 1</summary>The middle of two numbers on a log scale is <code>(low * high) ** 0.5</code>.</details>
# <details><summary>Hint 2</summary>If the middle fits, a smaller λ may fit, too: the middle becomes <code>high</code>. So
# <code>high</code> always fits.</details>

# %% tags=["exercise"]
from collections.abc import Callable


def price_for(
    file_bytes: Callable[[float], int], budget: float, low: float, high: float, steps: int = 6
) -> float:
    """About the smallest λ between low and high whose file has at most so many bytes."""
    ### BEGIN SOLUTION
    if (least := file_bytes(high)) > budget:
        raise ValueError(f"a file of {budget:,} bytes is asked for, {least:,} is the smallest: allow more")
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if file_bytes(middle) <= budget else (middle, high)
    return high
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.3", price_for)

# %% [markdown]
# Let the file be half as large as now, or as small as it gets. *Predict*: how many times larger must $\lambda$ be, and what does it cost?

# %%
predictions.predict("λ for half the file, times as large", 2)

# %% tags=["machine-dependent"]
curved = curvature.curvatures(distilled, seen, seed=seed)


def file_bytes(price: float) -> int:
    """The length of the distilled network's file at a price of a bit."""
    return saved("trial", quantize(distilled, price, curved)).nbytes


high = 1e3 * lambda_
price = price_for(file_bytes, max(row["bytes"] // 2, file_bytes(high)), low=lambda_, high=high)
halved = measure("half the file", quantize(distilled, price, curved))
print(f"λ = {price:.1e}, {price / lambda_:.0f} times larger; {halved['bytes']:,} of {row['bytes']:,} bytes")
predictions.measured("λ for half the file, times as large", price / lambda_)
print(f"accuracy {row['accuracy (%)']:.2f} % before, {halved['accuracy (%)']:.2f} % now")

# %% [markdown]
# ## 5 · Do the gains multiply?
#
# Let rounding alone shrink the file $a$ times, and pruning alone $b$ times. If the two were independent, together they
# would make it $a \cdot b$ times smaller.
#
# ### Exercise 6.4 · Find the bug: a factor counted twice
#
# `sizes` has the bytes of the files `"dense"` (float32), `"dense, fp16"`, `"pruned"` (float16) and `"rounded only"`. A
# report promises this product of two factors, and it is too large. Return the right product.
#
# ```python
# return sizes["dense"] / sizes["rounded only"] * sizes["dense"] / sizes["pruned"]
# ```
#
# <details><summary>Hint 1</summary>Which of these files hold 32 bits a weight, which 16?</details>
# <details><summary>Hint 2</summary>Rounding starts from float32, so its factor contains the step to float16. Pruning's must not
# contain it once more: compare two files of one kind.</details>

# %% tags=["exercise"]
def promised(sizes: dict[str, int]) -> float:
    """How many times smaller than float32 a file would be if the gains of rounding and pruning multiplied."""
    ### BEGIN SOLUTION
    return sizes["dense"] / sizes["rounded only"] * sizes["dense, fp16"] / sizes["pruned"]
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.4", promised)

# %% [markdown]
# *Predict* the ratio of measured to predicted: above 1 or below?

# %% tags=["machine-dependent"]
alone = measure("rounded only", quantize(dense))
sizes = {name: step["bytes"] for name, step in steps.items()}
by_rounding, predicted = first["bytes"] / alone["bytes"], promised(sizes)
measured = first["bytes"] / steps["pruned, distilled, rounded"]["bytes"]
ratio = measured / predicted
print(f"rounding alone {by_rounding:.0f}×, pruning alone {half['bytes'] / sizes['pruned']:.1f}× smaller")
print(f"predicted {predicted:.0f}×, measured {measured:.0f}×, ratio {ratio:.2f}")
overlap = f"The gains overlap: the file is {1 / ratio:.1f} times larger than the product promises."
print("The gains multiply." if ratio > 0.9 else overlap)

# %% [markdown]
# **What it means.** A dense network has many weights that may become 0 for almost nothing, and zeros cost next to no
# bits. Pruning has already removed most of those. So the second stage finds less to gain.
#
# ## 6 · Does the order matter?
#
# Swap the last two steps: round first, then distill. A rounded weight is an integer times its channel's **step**.
# `pipeline.unrounded` gives back the same values as plain floats, which can be trained.
#
# ### Exercise 6.5 · Is a weight still an integer?
#
# `weight` is (out, in, k, k), or (out, in) of a linear layer; `scale` (out,) has the step of each output channel. Return
# the share of the weights, from 0 to 1, that are an integer times the step. A file keeps integers only, so allow no more
# than float32's own rounding: a ten-thousandth of a step.
#
# <details><summary>Hint 1</summary>Divide each weight by the step of its own channel. The step needs the shape (out, 1, …), with as
# many dimensions as the weight.</details>
# <details><summary>Hint 2</summary>How far is a number from its nearest integer? <code>.round()</code> finds it.</details>

# %% tags=["exercise"]
def share_on_grid(weight: torch.Tensor, scale: torch.Tensor) -> float:
    """The share of weights that are an integer times their channel's step, to a ten-thousandth of a step."""
    ### BEGIN SOLUTION
    step = scale.view(-1, *[1] * (weight.ndim - 1))
    codes = weight / step
    return float(((codes - codes.round()).abs() <= 1e-4).float().mean())
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.5", share_on_grid)

# %% [markdown]
# *Predict*: after one gradient step on the plain floats, how many are still an integer times the step?

# %% tags=["machine-dependent"]
from nnc_utils import encoding

rounded_first = quantize(pruned)
layer = rounded_first.get_submodule("layer1.0.conv1")
before, scale = layer.weight.detach().clone(), encoding.encoded(layer).scale
plain = pipeline.unrounded(rounded_first).train()
functional.cross_entropy(plain(seen[:64]), seen_labels[:64]).backward()
moved = plain.get_submodule("layer1.0.conv1").weight
after = (moved - learning_rate * moved.grad).detach()
print(f"{before.unique().numel()} different values before the step, {after.unique().numel()} after it")
shares = (100 * share_on_grid(weight, scale) for weight in (before, after))
print("on an integer: {:.0f} % before, {:.0f} % after".format(*shares))

# %% [markdown]
# So rounded weights cannot simply train on. [**Quantization-aware training**](../docs/glossary.md#quantization-aware-training-qat) keeps float weights behind the integers and
# learns each channel's step ([LSQ, Esser et al., 2020](https://arxiv.org/abs/1902.08153); built in
# [02](02_quantization.ipynb)). The swapped order goes back to floats, starts LSQ from the steps of the first rounding,
# trains with the rounding in the loop, and rounds once more.

# %% tags=["machine-dependent"]
from nnc_utils.quantization import qat


def train_rounded(network: models.ResNet) -> models.ResNet:
    """Distill with the rounding in the loop, then round once more."""
    layers = {x.name: network.get_submodule(x.name) for x in models.layers(network.spec)}
    scales = {name: encoding.encoded(layer).scale for name, layer in layers.items()}  # where LSQ starts
    floats = pipeline.unrounded(network)
    in_the_loop = qat.prepare(floats, seen, bits=hessian_rounding.BITS, method="lsq", scales=scales)
    return quantize(pipeline.unrounded(trained(in_the_loop, soft_labels)))


measure("pruned, rounded, distilled", train_rounded(rounded_first))
orders = ["pruned, distilled, rounded", "pruned, rounded, distilled"]
pd.DataFrame(steps).T.loc[orders].drop(columns="right")

# %% [markdown]
# Which is better? Both were scored on the same images, so only images on which they differ count. The [**paired
# difference**](../docs/glossary.md#paired-interval), in percentage points (pp), stands with its 95 % interval, as in [01](01_baseline.ipynb).

# %% tags=["machine-dependent"]
def between(ours: str, theirs: str) -> str:
    """The paired difference of two steps on the validation images, as a sentence."""
    right, reference = steps[ours]["right"], steps[theirs]["right"]
    interval = evaluation.paired_interval(compressed_correct=right, reference_correct=reference)
    low, mean, high = interval.low, interval.mean, interval.high
    verdict = "ours is better" if low > 0 else "ours is worse" if high < 0 else "these images cannot tell"
    smaller = steps[theirs]["bytes"] / steps[ours]["bytes"]
    return f"{mean:+.2f} pp [{low:+.2f}, {high:+.2f}] at {smaller:.2f}× smaller: {verdict}"


print("distill before rounding, against rounding first:", between(*orders))

# %% [markdown]
# **What it means.** If you distill first, rounding sees a repaired network. If you round first, training moves the
# weights, and they must be rounded again. Look at the interval before you believe in either order: a few hundred images
# decide little.
#
# ## 7 · The narrow rival
#
# Anyone would first try something simpler: a **narrow ResNet-18** with as many MACs. It trains from new weights for as
# long as the dense network and the distillation together, without a teacher, and is rounded in the same way. What the
# pipeline is worth is the difference to *this* network, not to the large one.
#
# ### Exercise 6.6 · How narrow is the rival?
#
# `macs_of(width)` gives the MACs of a ResNet-18 whose channel counts are all multiplied by `width`. Return the largest
# of the widths 1, 0.995, 0.99, … 0.005 whose MACs are at most `budget`; if none is, return the narrowest.
#
# <details><summary>Hint 1</summary><code>np.arange(1, 0, -0.005)</code> holds the widths, the largest first. Stop at the first that
# fits.</details>
# <details><summary>Hint 2</summary>A formula will not do: a layer's MACs grow with the square of the width, the stem's do not, and
# channel counts are rounded. Ask <code>macs_of</code>.</details>

# %% tags=["exercise"]
import numpy as np


def rival_width(macs_of: Callable[[float], int], budget: float) -> float:
    """The largest width, in steps of 0.005, of a network within a budget of MACs."""
    ### BEGIN SOLUTION
    for width in np.arange(1, 0, -0.005):
        if macs_of(width) <= budget:
            break
    return float(width)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.6", rival_width)

# %% [markdown]
# *Predict*: at which width has the network 16 times fewer MACs?

# %% tags=["machine-dependent"]
from nnc_utils.baseline import narrow_resnet


def resnet_of(width: float) -> models.Spec:
    """The baseline's architecture, narrower."""
    same = {name: getattr(dense.spec, name) for name in ("channels", "size", "classes", "stem")}
    return models.resnet(bench.recipe["depth"], width=width * bench.recipe["width"], **same)


width = rival_width(lambda width: models.macs(resnet_of(width)), budget)
narrow_spec = resnet_of(width)
print(f"width {width:.3f}, {first['MACs'] / models.macs(narrow_spec):.1f}× fewer MACs")
print(f"the package takes the same: {narrow_resnet(dense.spec, bench.recipe, macs) == narrow_spec}")
print(f"parameters: rival {models.parameters(narrow_spec):,}, pruned {models.parameters(pruned.spec):,}")

# %% [markdown]
# *Predict*: is the rival's accuracy above or below the pipeline's?

# %% tags=["machine-dependent"]
torch.manual_seed(seed)
narrow = models.build(narrow_spec)
narrow = trained(narrow, length=bench.recipe["epochs"] + epochs, peak=bench.recipe["learning_rate"])
measure("narrow", narrow)
measure("narrow, rounded", quantize(narrow))
ours, rival = steps["pruned, distilled, rounded"], steps["narrow, rounded"]
print(f"pipeline {ours['bytes']:,} bytes, rival {rival['bytes']:,} bytes")

# %% tags=["machine-dependent"]
print("pipeline against the narrow rival:", between("pruned, distilled, rounded", "narrow, rounded"))
print("pipeline against the dense network:", between("pruned, distilled, rounded", "dense"))

# %% [markdown]
# ## 8 · All steps in one figure
#
# Right is smaller, up is better.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(8, 4))
for (name, step), marker, down in zip(steps.items(), figures.MARKERS, [-16, 10] * 5, strict=False):
    place = (first["bytes"] / step["bytes"], step["accuracy (%)"])
    axes.plot(*place, marker, markersize=8)
    axes.annotate(name, place, (0, down), textcoords="offset points", fontsize=8, ha="center")
axes.set(xscale="log", xlabel="times smaller (file)", ylabel="validation accuracy (%)")
axes.set(title="What does each step give?", xlim=(0.6, 2000))
axes.margins(y=0.15)
figures.show(figure, "Validation accuracy against times smaller, after each step, with the rivals")

# %% tags=["machine-dependent"]
table = pd.DataFrame(steps).T.drop(columns="right")
table["times smaller"] = first["bytes"] / table["bytes"]
table.astype(float).round({"accuracy (%)": 2, "times smaller": 1})

# %% [markdown]
# **What would fool you.** You are fooled when a pipeline is compared with the large network only, when its stages train
# longer than the rival, or when a ratio omits the header, batch-norm and scales.
#
# ## Benchmark
#
# A pipeline is data: `{"method": "pipeline", "stages": ["prune", "distill", "quantize"], "macs": 16, "lambda_": 1e-10}`.
# [`pipeline.py`](../nnc_utils/pipeline.py) turns the list of stages into a network, with the functions above. Every
# configuration trains for the same number of images. Validation images decide what is claimed; only then does a fresh
# process score the test images of each file, once.
#
# ### Exercise 6.7 · The same training for all
#
# What a list of stages does not train, its other stages get, in proportion to their own lengths. `epochs` has the length
# of each stage's own training; a stage without an entry trains for 0. Return the lengths for `stages`, as a mapping,
# so that they sum to `total`.
#
# <details><summary>Hint 1</summary>One factor for all stages of the list: <code>total</code> by the sum of their own
# lengths.</details>
# <details><summary>Hint 2</summary><code>epochs.get(stage, 0)</code> is 0 for a stage without an entry.</details>

# %% tags=["exercise"]
def lengths(stages: list[str], epochs: dict[str, float], total: float) -> dict[str, float]:
    """The epochs of each of these stages, so that every list of stages trains for as many in all."""
    ### BEGIN SOLUTION
    own = {stage: epochs.get(stage, 0) for stage in stages}
    scale = total / sum(own.values())
    return {stage: scale * length for stage, length in own.items()}
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("6.7", lengths)

# %% [markdown]
# Rounding at a price needs no training, so the stages before it get its epochs. *Predict* the two lengths that the
# progress lines of the benchmark will show.

# %% tags=["machine-dependent"]
own = {"prune": prune_epochs, "distill": distill_epochs}
total = prune_epochs + distill_epochs + quantize_epochs
for stages in (["prune", "distill", "quantize"], ["prune", "quantize"], ["narrow", "distill"]):
    shared = lengths(stages, own, total)
    print(" → ".join(f"{stage} {length:.2f}" for stage, length in shared.items()), "epochs")

# %% tags=["benchmark"]
candidates = bench.build(configurations + controls + peers)

# %% tags=["benchmark"]
rows = bench.measure(candidates)
bench.show(rows)

# %% tags=["benchmark"]
figure = figures.size_against_accuracy(bench.with_reference(rows))
figures.show(figure, "Test accuracy against times smaller: pipeline, its stages and rivals")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 and Fashion-MNIST. The table says which rivals the pipeline beats there.

# %% tags=["machine-dependent"]
from bench.committed import committed

results = committed("pipeline")
print(f"profile {results.name}")
figures.show(
    results.figure(), "Committed test accuracy against times smaller: pipelines, rivals and other tools"
)

# %% tags=["machine-dependent"]
results.verdicts()

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
# - Judge every step by a file that was saved and loaded again: its bytes, its MACs, its accuracy.
# - The step from float32 to float16 belongs to no method. Count it once.
# - Pruning and rounding both profit from the same weights, those that hardly matter: their gains overlap.
# - Training after rounding needs the rounding in the loop, and a second rounding.
# - The rival is a narrow network with an equal training budget and the same rounding. Say what you gain over *it*.
#
# <!-- numbers:begin -->
# **In numbers.** The pipeline's file is 133.8× smaller than the uncompressed network's, at -0.11 [-0.298, +0.09] pp.
# Of 9 rivals of equal training it is more accurate than 3 and less accurate than none; 6 differences are too small
# to tell. 5 of them have smaller files.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Which three numbers judge every step, and of what are they taken?</summary>Bytes, MACs and accuracy. Bytes and
# accuracy are those of a file that was saved and loaded again, not of the network in memory.</details>
# <details><summary>2. Why is the step from float32 to float16 shown apart?</summary>It halves the file without any method. Whoever counts
# it as pruning's, or counts it twice in a product of factors, promises too much.</details>
# <details><summary>3. Why does pruning come before distillation?</summary>Removing channels changes what the network computes; training
# then repairs the network that will be used. Removing channels after training would leave the damage in.</details>
# <details><summary>4. What does compensation change that re-estimating batch-norm cannot?</summary>Compensation changes the weights of the
# layers that read removed channels, by least squares. Batch-norm only shifts and scales each channel's sums.</details>
# <details><summary>5. Pruning leaves 16 times fewer MACs. Why not 16 times fewer parameters?</summary>Parameters are mostly in the last
# stage, MACs are spread over all. The two ratios depend on where channels were removed.</details>
# <details><summary>6. What goes wrong in distillation without the factor T²?</summary>Gradients of the softened term shrink by about
# T², so the labels rule the loss although α says otherwise. Nothing fails; the teacher is just hardly heard.</details>
# <details><summary>7. What is λ, and what happens to the file if it grows?</summary>The loss that one bit may cost. With a larger λ more
# weights become 0 or another cheap integer, and the file shrinks while the loss grows.</details>
# <details><summary>8. Why is the product of the two factors not reached?</summary>Rounding turns unimportant weights into zeros, which
# cost next to no bits. Pruning removes many of the same weights, so both factors count the same gain.</details>
# <details><summary>9. Why can rounded weights not simply train on?</summary>A gradient step is no multiple of the step between
# integers: after it hardly a weight is on its grid. The rounding has to be in the training, and be done once more
# behind it.</details>
# <details><summary>10. Why must the narrow rival get the baseline's epochs, too?</summary>The pipeline starts from a trained network. Its
# training is part of what the pipeline has cost; a rival without it is only under-trained.</details>
# <details><summary>11. Two networks with as many MACs: are their files as large?</summary>No. Parameters depend on which layers are
# narrow: a pruned and a uniformly narrow network have other shares in the last stage.</details>
# <details><summary>12. The paired interval of two orders contains 0. What may you say?</summary>That these images cannot tell which is
# better. It does not show that they are equal.</details>
#
# **Try it.** (1) Set `lambda_ = 1e-8`: what is left? `python -m nnc_utils.inspect FILE` shows each layer. (2) Give
# the pipeline `"sparsity": 0.5`, so that half of the weights it keeps become 0: does the file shrink by half? (3) Add
# `{"method": "pipeline", "stages": ["narrow", "distill", "quantize"], "macs": 16, "bits": 4}` to `configurations`: what
# are the large network's weights worth?
#
# **Further reading.** [Han et al., 2016](https://arxiv.org/abs/1510.00149), the pipeline that became the model of many;
# [Theis et al., 2018](https://arxiv.org/abs/1801.05787), Fisher pruning beside a teacher's soft labels;
# [Blalock et al., 2020](https://arxiv.org/abs/2003.03033), how seldom pruning is compared with fair rivals.
#
# Next: [07_deployment](07_deployment.ipynb): what runtimes make of these files.
