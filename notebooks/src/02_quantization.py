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
# # 02 · Quantization: fewer bits for each weight
#
# A float32 weight takes 32 bits. How few can it take before the network gets worse? The order is a
# practitioner's: look at the weights, build the quantizer $Q$, choose bits for each layer, apply $Q$ to
# the trained weights, repair what rounding broke, train on if that is not enough. Every network ends as
# a file that a fresh process loads; its bytes and its test pictures decide.

# %% tags=["parameters"]
points: list = ["uniform_per_channel:bits=7", "hessian_rounding:rate=1e-10 bn", "qat_lsq:bits=4"]  # files
peers: list = []  # production counterparts, such as ort_static:U8S8, nncodec:qp=-28, xz:bits=7
calibration_images: int = 256  # [1, 100000] training pictures that set ranges and curvature
repair_images: int = 128  # [2, 100000] training pictures for batch-norm re-estimation
train_epochs: float = 0.15  # [0.001, 1000] of quantization-aware training, and of the dense control
learning_rate: float = 0.02  # [0.00001, 1] peak of that training
upstream: list = []  # run folders of 01_baseline and of the first part; empty: 01 with its defaults
part: str = ""  # name of this part of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its points may be claimed
seed: int = 1  # [0, 1000000] which calibration pictures, and the order of training
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/02_quantization

# %%
import functools
import heapq
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

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
    runtimes,
    scoring,
    sensitivity,
)
from nnc_utils import peers as counterparts
from nnc_utils.devices import exact_device

# %%
from nnc_utils.quantization import (
    activations,
    codebook,
    correction,
    hessian_rounding,
    qat,
    uniform,
)
from nnc_utils.quantization.networks import quantized
from nnc_utils.run import start
from nnc_utils.runtimes import qdq
from nnc_utils.training import fit

figures.style()
# %%
run = start("02_quantization", globals(), needs=("01_baseline",))
baseline, *before = run.upstream
reference = baseline.baseline
model = artifact.load(baseline.artifact("fp32"))
pictures = data.load(reference.dataset, size=model.spec.size)
order = torch.randperm(len(pictures.train.labels), generator=torch.Generator().manual_seed(seed))
calibration = pictures.normalize(pictures.train.images[order[:calibration_images]])
print(f"{reference.model} on {reference.dataset}, made by {baseline.run}")

# %%
BITS = ("uniform_per_tensor", "uniform_per_channel", "kmeans", "hessian_kmeans", "qat_ste", "qat_lsq")
SETTINGS = dict.fromkeys(BITS, ("bits",)) | {
    "hessian_rounding": ("rate",),
    "mixed_precision": ("budget", "rule"),
}
SETTINGS |= {"uniform_per_channel": ("bits", "levels")}
SETTINGS |= dict.fromkeys(counterparts.GENERAL, ("bits",)) | {"nncodec": ("qp",)}
FLAGS = {"bn", "float", "one_sided", "rdo"}
WIDTHS = (2, 3, 4, 8)  # among which mixed precision chooses
SETTINGS |= {"ort_static": ("U8S8", "S8S8"), "nncf_ptq": ("",), "torchao_pt2e": ("",)}


def parsed(point: str) -> tuple[str, str, dict[str, str]]:
    """ "kmeans:bits=3 bn" -> "kmeans", "bits=3 bn", {"bits": "3", "bn": ""}."""
    method, _, setting = point.partition(":")
    values = dict(part.partition("=")[::2] for part in setting.split())
    allowed = SETTINGS.get(method, ())
    if not set(values) - FLAGS <= set(allowed) or len(set(values) & set(allowed)) + ("" in allowed) != 1:
        known = ", ".join(f"{name}:{' or '.join(keys)}" for name, keys in SETTINGS.items())
        raise ValueError(
            f"unknown point {point!r}: one of {known}, with = and a value, as in 'kmeans:bits=3 bn'"
        )
    return method, setting, values


# %%
sources = {}  # the files of earlier parts, which peers may compress
for earlier in before:
    sources |= {name: earlier.folder / file for name, file in earlier.extra["files"].items()}
for point in (*points, *peers):  # before any work
    if (parsed(point)[0] in counterparts.NAMES) != (point in peers):
        raise ValueError(f"{point!r}: methods belong into points, production counterparts into peers")
    for key, value in parsed(point)[2].items():
        try:
            float(value if key in ("bits", "levels", "rate", "qp") else 0)
        except ValueError:
            raise ValueError(f"{point!r}: {key} is {value!r}, a number is needed") from None
        if key == "levels" and value not in ("3", "5", "7", "9", "11", "13", "15"):
            raise ValueError(f"{point!r}: levels is an odd number from 3 to 15")
        if key == "budget" and value not in (allowed := [*(f"{bits}bit" for bits in WIDTHS[1:]), "5level"]):
            raise ValueError(f"{point!r}: the budget is one of {', '.join(allowed)}")
    codes = f"uniform_per_channel:{parsed(point)[1]}"
    if parsed(point)[0] in counterparts.GENERAL and codes not in (*points, *sources):
        raise ValueError(f"{point!r} compresses the codes of {codes}: add it to points")

# %% [markdown]
# ## 1 · What do the weights look like?
#
# Before choosing codes, look at what they are for. Divide each layer's weights by their standard
# deviation: a bell curve has 0.3 % of them beyond 3. *Predict*: do these have more?

# %%
shapes = {layer.name: layer for layer in models.layers(model.spec)}
weights = {name: model.get_submodule(name).weight.detach() for name in shapes}
chosen = ["conv1", "layer2.0.conv1", "layer4.1.conv2", "fc"]
figure, axes = plt.subplots(figsize=(8, 3.2))
for name in chosen:
    scaled = (weights[name] / weights[name].std()).flatten().numpy()
    axes.hist(scaled, bins=np.linspace(-6, 6, 81), density=True, histtype="step", label=name)
axes.set(
    xlabel="weight / standard deviation", ylabel="density", yscale="log", title="How are weights spread?"
)
axes.legend()
figures.show(figure, "Histograms of the weights of four layers on a log axis")
pd.DataFrame(
    {
        "layer": name,
        "weights": weights[name].numel(),
        "max / std": float(weights[name].abs().max() / weights[name].std()),
        "beyond 3 std (%)": 100 * float((weights[name].abs() > 3 * weights[name].std()).float().mean()),
    }
    for name in chosen
).round(2)

# %% [markdown]
# **What it means.** Of a bell curve 0.3 % lie beyond 3 deviations. After so short a training the convolutions still are the
# bell curve that they were drawn from; only the classifier has more. But of millions of draws even a bell curve's largest is
# five deviations out, and that one is what the textbook formula of the next section builds its scale on. Nearly all weights live
# in the middle.
#
# ## 2 · Build Q: the uniform quantizer
#
# With $b$ bits a weight becomes one of the whole numbers $-(2^{b-1}-1) \dots 2^{b-1}-1$, its **code**. Let
# the largest weight get the largest code, so that one code is $s = \max|w| / (2^{b-1}-1)$ wide (the
# **scale**), and round:
#
# $$Q(w) = \mathrm{round}\!\left(w \cdot \frac{2^{b-1}-1}{\max|w|}\right), \qquad \hat w = Q(w) \cdot s$$
#
# Look at a 5×5 tensor with 3 bits before you look at a network. By hand: which codes can occur?

# %%
small = torch.linspace(-0.9, 1.2, 25).view(5, 5)
codes = torch.round(small * (2**2 - 1) / small.abs().max()) + 0.0  # + 0.0: no "-0"
scale = small.abs().max() / (2**2 - 1)
figure, panels = plt.subplots(1, 3, figsize=(10, 3))
for axes, values, title in zip(
    panels, (small, codes, codes * scale), ("weights", "codes", "rounded"), strict=True
):
    axes.imshow(values, cmap="coolwarm", vmin=-values.abs().max(), vmax=values.abs().max())
    for (y, x), value in np.ndenumerate(values.numpy()):
        axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8)
    axes.set_title(title)
    axes.axis("off")
figures.show(figure, "A 5x5 tensor: its weights, its 3-bit codes from -3 to 3, and the rounded weights")

# %% [markdown]
# The package's [`quantize`](../nnc_utils/quantization/uniform.py) is this formula. Is it right? Ask
# something independent: PyTorch's own fake quantization.

# %% tags=["nbval-check-output"]
weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
ours = uniform.quantize(weight, bits=4, per_channel=True)
theirs = torch.fake_quantize_per_channel_affine(
    weight, ours.scale, torch.zeros(8, dtype=torch.int32), 0, -7, 7
)
print("codes used:", ours.codes.unique().tolist())
print("same as torch.fake_quantize_per_channel_affine:", torch.equal(encoding.decode(ours), theirs))

# %% [markdown]
# ### What does the formula waste?
#
# Three things. One of the $2^b$ codes never occurs (at 2 bits, a quarter of them). A range centred on 0
# is half empty where the weights are not: **affine** codes add a zero-point. And the range reaches to the
# rarest weight: clipping makes the other steps finer (*percentile*: one weight in a thousand is outside; *mse*: the
# range with the least squared error). Inside a step every position is about as
# likely as another, so the error should be $s/\sqrt{12}$. *Predict* it for each range, then measure.

# %%
layer = "layer3.0.conv2"
weight = weights[layer]
rows = []
for bits in (8, 4, 3, 2):
    for clip in uniform.CLIPS:
        found = uniform.quantize(weight, bits=bits, per_channel=False, clip=clip)
        error = float((encoding.decode(found) - weight).square().mean().sqrt())
        predicted = float(found.scale) / 12**0.5
        rows.append({"bits": bits, "range": clip, "predicted": predicted, "measured": error})
        rows[-1] |= {"ratio": error / predicted, "zeros (%)": 100 * float((found.codes == 0).float().mean())}
pd.DataFrame(rows).round(4)

# %% [markdown]
# **What it means.** While many codes are in use and nothing is clipped the prediction holds; at 8 bits the steps are so fine
# that the few clipped weights are most of the error. With few bits the range by max puts
# most weights into the middle step, where they become 0 and their error is their own size. The range
# with the least squared error (mse) clips far inside the maximum.
#
# ### One scale for the layer, or one for each channel?
#
# With one scale for all (**per tensor**), a channel of small weights uses few of the codes. One scale
# **per channel** costs four bytes each. Predict from the channels' own peaks: the mean square error falls
# to $\frac{1}{C}\sum_c (\max|w_c| / \max|w|)^2$ of the per-tensor error.

# %%
peaks = weight.abs().flatten(1).amax(1)
predicted = float((peaks / peaks.max()).square().mean())
square_error = {
    per_channel: float(
        (encoding.decode(uniform.quantize(weight, bits=8, per_channel=per_channel)) - weight).square().mean()
    )
    for per_channel in (False, True)
}
measured = square_error[True] / square_error[False]
print(f"square error per channel / per tensor: predicted {predicted:.3f}, measured {measured:.3f},", end=" ")
print(f"ratio {measured / predicted:.2f}")

# %% [markdown]
# **What would fool you.** Scales are part of the file. That is why size is measured in bytes of the file,
# never in "bits per weight" alone.
#
# ## 3 · Codes of any value: k-means
#
# Nothing says that levels must be evenly spaced. A **codebook** of $2^b$ values, found by k-means, puts
# them where the weights are (Deep Compression, Han et al., 2016). The result depends on where the
# search starts: evenly over the range (linear), by quantiles (density) or drawn (random); *split*
# begins with one value and divides the worst. Predict: which start keeps the few large weights best?

# %%
rows = []
for start_with in codebook.STARTS:
    levels, codes = codebook.kmeans(weight, 16, start=start_with, seed=seed)
    error = (levels[codes.int()] - weight).flatten()
    largest = weight.flatten().abs().topk(max(1, weight.numel() // 1000)).indices
    rows.append(
        {
            "start": start_with,
            "levels": len(levels),
            "error": float(error.square().mean().sqrt()),
            "error of the largest 0.1 %": float(error[largest].square().mean().sqrt()),
        }
    )
found = uniform.quantize(weight, bits=4, per_channel=False, clip="mse")
error = (encoding.decode(found) - weight).flatten()
rows.append({"start": "(uniform, 4 bits)", "levels": 15, "error": float(error.square().mean().sqrt())})
rows[-1]["error of the largest 0.1 %"] = float(error[largest].square().mean().sqrt())
pd.DataFrame(rows).round(5)

# %% [markdown]
# **What it means.** Run to its end, the search arrives at nearly the same codebook from each start. Where it is stopped early,
# or values lie far out, the start decides.
#
# ### Not every weight matters equally
#
# A change $\delta_i$ of a weight changes the loss by about $\tfrac12 h_i \delta_i^2$, $h_i$ the diagonal of
# the Hessian; at a trained network that is the **Fisher information**, the mean squared gradient with
# labels drawn from the network's own predictions. Weight k-means by it (Choi et al., 2017). Predict: what
# happens to the plain error, and what to the error that counts?

# %%
fisher_of_layer = sensitivity.fisher_diagonal(model, calibration[:128], batch_size=16, seed=seed)[layer]
rows = []
for kind, importance in (("plain", None), ("Hessian-weighted", fisher_of_layer)):
    levels, codes = codebook.kmeans(weight, 4, importance=importance)
    square = (levels[codes.int()] - weight).square()
    loss = float(0.5 * (fisher_of_layer * square).sum())
    rows.append({"k-means at 2 bits": kind, "square error": float(square.mean()), "predicted loss": loss})
pd.DataFrame(rows)

# %% [markdown]
# ## 4 · Errors that cancel: second-order rounding
#
# A layer's sum $w^\top x$ does not mind an error in one weight if another makes up for it, where their
# inputs rise and fall together. With $H = \mathbb{E}[x x^\top]$ the square error of the sum is
# $\delta^\top H \delta$. Two weights, inputs correlated by 0.9, both to be rounded to whole numbers: round
# the first, then *move the second's target* by what the first one's error does to the sum. Predict both
# errors by hand.

# %% tags=["nbval-check-output"]
two = torch.tensor([0.4, 0.4])
moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
nearest = two.round()
first = two[0].round()
target = two[1] + moment[0, 1] / moment[1, 1] * (two[0] - first)
compensated = torch.stack([first, target.round()])
for kind, rounded in (("nearest", nearest), ("compensated", compensated)):
    delta = rounded - two
    print(f"{kind}: {rounded.int().tolist()}, square error of the sum {float(delta @ moment @ delta):.3f}")

# %% [markdown]
# The package does this column by column with a Cholesky factor of $H$
# ([`hessian_rounding`](../nnc_utils/quantization/hessian_rounding.py), the family of OBQ and GPTQ) and adds a
# price: a code is chosen for the smallest **loss + rate · bits**, bits being what the entropy coder of the
# file will take. One number, the `rate`, sets every step of every layer. What an output's error costs is the
# second moment of the loss's gradient there, $G = \mathbb{E}[g g^\top]$: together they predict the loss
# $\tfrac12 \mathrm{tr}(G \delta H \delta^\top)$. On one layer, against rounding to nearest:

# %%
@functools.cache
def curved() -> dict[str, curvature.Curvature]:
    """Of every layer, on the calibration pictures."""
    return curvature.curvatures(model, calibration, seed=seed)


rows = []
for rate in (1e-11, 1e-10, 1e-9):
    found = hessian_rounding.quantize(weight, curved()[layer], rate=rate)
    rows.append(("second-order", f"rate={rate:g}", found))
for bits in (2, 3, 4):
    found = uniform.quantize(weight, bits=bits, per_channel=True, clip="mse")
    rows.append(("nearest", f"bits={bits}", found))
pd.DataFrame(
    {
        "rounding": kind,
        "point": point,
        "bits a weight in the file": encoding.payload_bits(found) / weight.numel(),
        "predicted loss": curved()[layer].loss(encoding.decode(found) - weight),
        "zeros (%)": 100 * float((found.codes == 0).float().mean()),
    }
    for kind, point, found in rows
)

# %% [markdown]
# ### Outputs make up for each other, too
#
# Ten classes see the layer's outputs: many of their errors cancel before the loss notices. So a block of
# rows is rounded knowing what the rows above it did, by a factor of $G$ (two-sided rounding, as in YAQA:
# Tseng et al., 2025). A block has 64 rows: narrower layers have one, and nothing above it. The formula takes
# inputs and gradients as independent, and every pixel, too; the Fisher information itself,
# $\tfrac12 \mathbb{E}[\langle \nabla_W, \delta \rangle^2]$, does not, and one pass over pictures that the
# curvature has not seen measures it. *Predict*: for which kind are loss and price of the bits together less?

# %%
rows, probe = [], calibration[:128]
unseen = pictures.normalize(pictures.train.images[order[-128:]])
for name in ("layer2.0.conv1", "layer4.0.conv1"):
    full = curved()[name]
    alone = curvature.Curvature(full.inputs, full.outputs.diagonal().diag())
    for kind, known in (("columns", alone), ("columns and rows", full)):
        found = hessian_rounding.quantize(weights[name], known, rate=1e-10)
        error = encoding.decode(found) - weights[name]
        measured = curvature.loss_of_errors(model, {name: error}, unseen, seed=seed + 1)[name]
        rows.append({"layer": name, "made up for by": kind, "predicted": full.loss(error)})
        rows[-1] |= {"measured": measured, "ratio": measured / rows[-1]["predicted"]}
        bits = encoding.payload_bits(found)
        rows[-1] |= {"bits a weight": bits / error.numel(), "loss + rate * bits": measured + 1e-10 * bits}
pd.DataFrame(rows).map(lambda value: value if isinstance(value, str) else f"{value:.3g}")

# %% [markdown]
# **What it means.** Rows need not pay in every layer. And the more a rounding makes of the curvature, the more its own
# prediction flatters it: read *measured*.
#
# **What would fool you.** Pictures that are too few: where a layer has more inputs than pictures showed, some
# directions look free, and errors run away there. **Damping** gives every direction a price.

# %% [markdown]
# ## 5 · How many bits does a code take?
#
# A frequent code deserves a short word. **Huffman** (1952) joins the two rarest codes again and again; each
# join puts one bit in front of all words below it. Do it by hand for 16 codes; the entropy
# $H = -\sum p \log_2 p$ is the bound that no code beats.

# %% tags=["nbval-check-output"]
def huffman(counts: dict[int, int]) -> dict[int, str]:
    """The word of each code."""
    heap = [(count, [code]) for code, count in counts.items()]
    heapq.heapify(heap)
    words = dict.fromkeys(counts, "")
    while len(heap) > 1:
        (few, left), (more, right) = heapq.heappop(heap), heapq.heappop(heap)
        words |= {code: "0" + words[code] for code in left} | {code: "1" + words[code] for code in right}
        heapq.heappush(heap, (few + more, left + right))
    return words


message = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, 2, -2]
counts = {code: message.count(code) for code in sorted(set(message))}
words = huffman(counts)
p = np.array(list(counts.values())) / len(message)
print(words)
print(f"Huffman: {sum(len(words[c]) for c in message) / len(message):.3f} bits a code,", end=" ")
print(f"entropy {-(p * np.log2(p)).sum():.3f}, fixed width 3")

# %% [markdown]
# A word has whole bits, at least one: at 95 % zeros that is three times the entropy. The files here use
# **asymmetric numeral systems** (Duda, 2013), an entropy coder that spends fractions of a bit. Predict the stream of a
# layer from the counts of its codes; then pack it, scales and table of frequencies included.

# %%
rows = []
for bits in (8, 7, 4, 2):
    found = uniform.quantize(weight, bits=bits, per_channel=True, clip="mse")
    values, counts = np.unique(found.codes.numpy(), return_counts=True)
    p = counts / counts.sum()
    words = huffman(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    rows.append({"bits": bits, "entropy": float(-(p * np.log2(p)).sum())})
    rows[-1]["Huffman"] = sum(len(words[v]) * n for v, n in zip(values.tolist(), counts)) / counts.sum()
    rows[-1]["the file"] = encoding.payload_bits(found) / found.codes.numel()
    rows[-1]["file / entropy"] = rows[-1]["the file"] / rows[-1]["entropy"]
pd.DataFrame(rows).round(4)

# %% [markdown]
# **What it means.** Huffman's column counts the words only; the file's holds the scales and the frequencies as well, so at two
# bits it can be the larger one. Fractions of a bit pay where one code has nearly all, as after pruning.
#
# ## 6 · Which layer gets how many bits?
#
# Layers differ in how much the loss minds their rounding. Two views: the **trace** of a layer's Hessian
# (HAWQ-V2, Dong et al., 2020; Hutchinson's estimator $v^\top H v$ with random signs $v$), and the loss itself, measured with only
# this layer rounded. Do they agree on the order? Predict with $\tfrac12 \frac{\mathrm{tr} H}{n} \|\delta\|^2$.

# %%
@functools.cache
def nearest(name: str, bits: int, levels: int | None = None) -> encoding.Uniform:
    """A layer's weight rounded to nearest, per channel, in the range with the least squared error."""
    return uniform.quantize(weights[name], bits=bits, per_channel=True, clip="mse", levels=levels)


# %%
probe_labels = pictures.train.labels[order[:calibration_images]][: len(probe)]
diagonal = sensitivity.hessian_diagonal(model, probe[:16], probe_labels[:16], probes=2, seed=seed)
three_bits = {name: nearest(name, 3) for name in weights}
added = sensitivity.loss_increase(
    model, {n: {3: encoding.decode(q)} for n, q in three_bits.items()}, probe[:64], probe_labels[:64]
)
views = pd.DataFrame(
    {
        "layer": name,
        "by the trace": 0.5
        * float(diagonal[name].mean())
        * float((encoding.decode(three_bits[name]) - weights[name]).square().sum()),
        "measured": added[name][3],
    }
    for name in weights
)
figure, axes = plt.subplots(figsize=(9, 3.2))
for column, marker in (("by the trace", "o"), ("measured", "s")):
    axes.plot(views["layer"], views[column], marker=marker, label=column)
axes.tick_params(axis="x", rotation=60, labelsize=8)
axes.set(ylabel="loss added by 3 bits (nats)", title="Which layers mind rounding?")
axes.legend(loc="upper left")
figures.show(
    figure, "The loss that rounding one layer to 3 bits adds, by trace and measured, for every layer"
)

# %% [markdown]
# **What would fool you.** Both are estimates: with so few pictures and probes either is noisy, even negative, and they agree
# neither in order nor in size. And
# layers are not independent: what one breaks, batch-norm behind another may hide.
#
# ### The best widths under a byte budget
#
# Each layer has a cost (bytes in the file) and a harm (predicted loss) at each width. Choose one width a
# layer, total cost at most the budget, total harm least: an **integer programme**, solved exactly. The
# budget here is what 3 bits everywhere take, and the hand rule "convolutions 8, classifier 4" for comparison.

# %%
@functools.cache
def tables() -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Bytes and predicted loss of each layer at each width."""
    cost, harm = {}, {}
    for name, weight in weights.items():
        found = {bits: nearest(name, bits) for bits in WIDTHS}
        cost[name] = {b: encoding.payload_bits(q) / 8 for b, q in found.items()}
        harm[name] = {b: curved()[name].loss(encoding.decode(q) - weight) for b, q in found.items()}
    return cost, harm


cost, harm = tables()
widths = allocation.allocate(cost, harm, budget=sum(c[3] for c in cost.values()))
by_hand = {name: 4 if name == "fc" else 8 for name in weights}
pd.DataFrame(
    {
        "widths": kind,
        "bytes": sum(cost[n][b] for n, b in chosen.items()),
        "predicted loss": sum(harm[n][b] for n, b in chosen.items()),
    }
    for kind, chosen in (
        ("3 everywhere", dict.fromkeys(weights, 3)),
        (" ".join(map(str, widths.values())), widths),
        ("convolutions 8, classifier 4", by_hand),
    )
)

# %% [markdown]
# ## 7 · Activations: what flows between the layers
#
# Integer arithmetic needs integers on both sides. Activations become *unsigned* 8-bit numbers with a
# scale and a **zero-point** $z$, the code that stands for 0:
#
# $$x \approx s_x (q - z), \qquad s_x = \frac{\max x - \min x}{255}, \qquad z = \mathrm{round}(-\min x / s_x)$$
#
# The range comes from training pictures (**calibration**). Behind a ReLU nothing is negative, so $z = 0$,
# and cutting off at 0 *is* the ReLU. Predict $z$ for a range from −1 to 3 before you run the cell.

# %% tags=["nbval-check-output"]
scale, zero_point = activations.affine_range(-1.0, 3.0)
print(f"scale {scale:.5f}, zero-point {zero_point}")
print("after a ReLU:", activations.affine_range(0.0, 6.0)[1])
try:
    activations.affine_range(float("nan"), 1.0)
except ValueError as error:
    print("refused:", error)

# %%
by_range = {
    clip: models.activations(activations.calibrate(model, probe, clip=clip)) for clip in uniform.CLIPS
}
pd.DataFrame(
    {
        "tensor": name,
        "zero-point": place.zero_point,
        **{f"scale by {clip}": found[name].scale for clip, found in by_range.items()},
    }
    for name, place in by_range["max"].items()
).round(5).head(6)

# %% [markdown]
# **What would fool you.** Calibrating on test pictures: the ranges would be chosen by the pictures
# that judge them.
#
# ## 8 · Repairs without training
#
# Rounded weights give other sums than those whose mean and variance batch-norm remembers. **Bias
# correction** subtracts the shift of each channel's mean, as if the layers before were not rounded;
# **batch-norm re-estimation** runs both networks on the same pictures and moves mean and variance by what
# rounding moved. Neither takes a gradient step. Predict which holds at 2 bits, then look at validation pictures.

# %%
repair = pictures.normalize(pictures.train.images[order[:repair_images]])
some = data.Split(pictures.validation.images[:500], pictures.validation.labels[:500])


def accuracy(network: torch.nn.Module) -> float:
    """Percent of the first 500 validation pictures."""
    predictions = evaluation.predict(network, some, normalize=pictures.normalize, device=exact_device())
    return evaluation.accuracy(predictions, some.labels)


rows = []
for bits in (3, 2):
    network = quantized(model, lambda name, layer, bits=bits: nearest(name, bits))
    rows.append({"bits": bits, "rounded": accuracy(network)})
    rows[-1]["bias corrected"] = accuracy(correction.correct_bias(network, repair, original=model))
    rows[-1]["batch-norm re-estimated"] = accuracy(batch_norm.reestimate(network, repair, original=model))
print(f"fp32: {accuracy(model):.1f} % of these pictures")
pd.DataFrame(rows).round(1)

# %% [markdown]
# ## 9 · Training with the rounding
#
# Rounding has the derivative 0 nearly everywhere. The **straight-through estimator** passes the gradient
# as if there were no rounding; clipped weights get none. **LSQ** (Esser et al., 2020) trains the step, too:
# inside the range $\partial \hat w / \partial s = \mathrm{round}(w/s) - w/s$, outside it is $\pm Q$. Predict
# the gradient of $s$ for weights 0.3, 1.2 and 9 at 3 bits ($Q = 3$) and $s = 1$; autograd answers.

# %% tags=["nbval-check-output"]
for value in (0.3, 1.2, 9.0):
    quantizer = encoding.UniformWeight(torch.tensor(1.0), bits=3, learn_scale=True)
    quantizer(torch.tensor([value])).sum().backward()
    share = (1 * 3) ** -0.5  # LSQ's own factor: 1 / sqrt(weights * Q)
    print(f"w = {value}: {float(quantizer.scale.grad) / share:+.2f}")

# %% [markdown]
# Batch-norm stays unfolded while training: weights are rounded before it, exactly as in the file, and a
# runtime folds it into the scales. So the integers that were trained are the integers that run. The first
# convolution and the classifier stay at 8 bits here; the bytes count them, too.
#
# ## Benchmark: the operating points
#
# A point is a method and its setting, such as `hessian_rounding:rate=1e-9 bn`; `bn` stands for
# batch-norm re-estimated, `levels=5` for five levels everywhere (more than 2 bits, less than 3) and
# `budget=5level` for as many bytes. Weights that embed in 8-bit codes get activation ranges as well, so that an
# int8 runtime can use them; codebooks cannot, and keep float activations, as does every point with `float`.

# %%
@functools.cache
def fisher() -> dict[str, torch.Tensor]:
    """Of every weight, on the calibration pictures."""
    return sensitivity.fisher_diagonal(model, calibration, seed=seed)


# %%
HEADER = 500  # bytes that the names of several widths may add to a file, taken off the budget


def rounded(method: str, setting: dict[str, str]) -> torch.nn.Module:
    """A network with rounded weights, by a method that does not train."""
    if method == "hessian_rounding":
        known = curved()
        if "one_sided" in setting:  # what a row's error costs, but not what others could make up for
            known = {n: replace(c, outputs=c.outputs.diagonal().diag()) for n, c in known.items()}
        return hessian_rounding.quantize_network(model, known, rate=float(setting["rate"]))
    if method == "mixed_precision":
        cost, harm = tables()
        bits = by_hand
        if "budget" in setting:
            number, kind = re.fullmatch(
                r"(\d+)(bit|level)", setting["budget"]
            ).groups()  # the same everywhere
            width = (3, int(number)) if kind == "level" else (int(number), None)
            budget = sum(encoding.payload_bits(nearest(name, *width)) for name in weights) / 8 - HEADER
            bits = allocation.allocate(cost, harm, budget=budget)
        return quantized(model, lambda name, layer: nearest(name, bits[name]))
    levels = int(setting["levels"]) if "levels" in setting else None
    bits = levels.bit_length() if levels else int(setting["bits"])
    if method == "kmeans":
        return codebook.quantize_network(model, bits=bits)
    if method == "hessian_kmeans":
        return codebook.quantize_network(model, bits=bits, importance=fisher())
    options = {"per_channel": method == "uniform_per_channel", "clip": "max" if bits > 4 else "mse"}
    return uniform.quantize_network(model, bits=bits, levels=levels, **options)


# %%
def finished(method: str, setting: dict[str, str]) -> torch.nn.Module:
    """The same, repaired, with activation ranges where the codes are those of an int8 runtime."""
    network = rounded(method, setting)
    if "bn" in setting:
        network = batch_norm.reestimate(network, repair, original=model)
    floats = "kmeans" in method or "float" in setting
    return network if floats else activations.calibrate(network, calibration)


# %% [markdown]
# Training methods start from the baseline. Their rival is the dense network with the same extra training
# (`dense_finetuned`): the better of the two on validation is what they are compared with, so that nothing
# wins by curing a baseline that was not trained to its end.

# %%
training = {"learning_rate": learning_rate, "seed": seed, "augment": False}
training["batch_size"] = baseline.record.parameters["batch_size"]
training["epochs"] = max(train_epochs, training["batch_size"] / len(pictures.train))  # a step at least


def trained(method: str, setting: dict[str, str]) -> tuple[torch.nn.Module, dict]:
    """A network after more training, with rounding or (dense_finetuned) without; and what that took."""
    network = artifact.load(baseline.artifact("fp32"), trainable=True)
    if method != "dense_finetuned":
        bits = int(setting["bits"])
        network = qat.prepare(network, calibration, bits=bits, method=method.removeprefix("qat_"))
    name = "_".join([method, *setting.values()])
    history = fit(network, pictures, checkpoint=run.path(f"checkpoint_{name}.pt"), **training)
    if method != "dense_finetuned":
        network = activations.calibrate(network, calibration)
    return network, {"train_images": history.images, "train_seconds": history.seconds}


# %%
def candidate(method: str, setting: str, network: torch.nn.Module, **row) -> dict:
    """A point's network as a file."""
    path = run.path(
        f"artifacts/{method}_{setting.replace('=', '').replace(' ', '_')}.safetensors".replace("_.", ".")
    )
    saved = artifact.save(network, path, mean=pictures.mean, std=pictures.std, classes=pictures.classes)
    print(f"{method} {setting}: {saved.nbytes:,} bytes", flush=True)
    row = {"division": "closed", "control": "", **row}
    return {"method": method, "point": setting, "path": path, "bytes": saved.nbytes, "artifact": saved, **row}


candidates = []
for point in points:
    method, setting, values = parsed(point)
    if not method.startswith("qat"):
        control = "hand_rule" if "rule" in values else "one_sided" if "one_sided" in values else ""
        candidates.append(candidate(method, setting, finished(method, values), control=control))
learned = [parsed(point) for point in points if point.startswith("qat")]
if learned:
    learned = [("dense_finetuned", "", {}), *learned]
for method, setting, values in learned:
    network, took = trained(method, values)
    control = "dense_finetuned" if method == "dense_finetuned" else ""
    candidates.append(candidate(method, setting, network, division="open", control=control, **took))

# %% [markdown]
# There are two **divisions**: *closed*, without a gradient step after the baseline, and *open*, trained on or another
# architecture. The **validation** pictures decide what is claimed (`headline`): in each division the smallest file that
# is likely without loss on test ([`claims`](../nnc_utils/claims.py)). There are fewer of them than of test pictures,
# so their paired interval is narrowed by the root of the ratio; its lower end has to be at least −0.3. From the
# smallest file up, the first that passes is claimed. Only then is the test set looked at.

# %%
dense = next((c["path"] for c in candidates if c["method"] == "dense_finetuned"), None)
orders = {("closed", "bytes"): [], ("open", "bytes"): []}
for c in sorted(candidates, key=lambda c: c["bytes"]):
    if not c["control"] and claim:
        orders[c["division"], "bytes"].append(c["path"])
decided = claims.choose(orders, baseline=baseline.artifact("fp32"), dense=dense, pictures=pictures)
for (division, _), path in decided.claimed.items():
    print(f"claimed in the {division} division: {path.stem}, {decided.looked[path.stem][1]:+.2f} points")

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names.

# %%
scored = functools.partial(scoring.score, dataset=reference.dataset, folder=run.path("predictions"))
scores = scored([c["path"] for c in candidates])
of_rival = next((s for s in scores if Path(s["path"]) == decided.reference), baseline)
columns = ("method", "point", "division", "control", "train_images", "train_seconds")
common = {"run": run, "dataset": reference.dataset, "model": reference.model}
rows = [
    results.compression_row(
        score,
        technique="quantization",
        headline=c["path"] in decided.claimed.values(),
        reference=of_rival if c["division"] == "open" and not c["control"] else baseline,
        **{column: c[column] for column in columns if column in c},
        **common,
    )
    for c, score in zip(candidates, scores, strict=True)
]

# %% [markdown]
# ### Side by side: the production counterparts
#
# The same checkpoint and the same calibration pictures, in the tools that people use: ONNX Runtime's
# static quantization, NNCF for OpenVINO, torchao for Inductor, and for size NNCodec, the ISO/IEC 15938-17
# codec, with gzip, xz and zstd of the plain codes. `bn` gives NNCodec the help that ours gets: batch-norm
# re-estimated for its decoded weights. What is not installed is said.

# %%
sources |= {f"{c['method']}:{c['point']}": c["path"] for c in candidates}
fp32, folder = baseline.artifact("fp32"), run.path("peers/x").parent


def made(name: str, values: dict[str, str]):
    """A peer's file, and the artifact that it was made of."""
    if name in counterparts.GENERAL:
        source = sources[f"uniform_per_channel:bits={values['bits']}"]
        return counterparts.make(name, source, calibration.numpy(), folder), source
    if name == "nncodec":
        settings = {"qp": int(values["qp"]), "reestimate": "bn" in values}
        settings["settings"] = counterparts.peer(name).RDO if "rdo" in values else None
        return counterparts.make(name, fp32, repair.numpy(), folder, **settings), fp32
    settings = {"scheme": next(iter(values))} if name == "ort_static" else {}
    return counterparts.make(name, fp32, calibration.numpy(), folder, **settings), fp32


# %%
for point in peers:
    name, setting, values = parsed(point)
    if why := counterparts.available(name):
        print(f"{name}: {why}")
        continue
    path, source = made(name, values)
    [score] = scored([path], peer=name, source=source)
    rows.append(
        results.compression_row(
            score, technique="peer", method=name, point=setting, reference=baseline, **common
        )
    )

# %%
table = pd.DataFrame([row.model_dump() for row in rows], columns=results.CompressionRow.columns())
shown = ["method", "point", "artifact_bytes", "size_ratio", "accuracy", "accuracy_delta", "delta_ci_low"]
table[[*shown, "delta_ci_high", "division", "headline"]].sort_values("artifact_bytes", ascending=False)

# %%
everything = pd.concat([pd.DataFrame([reference.model_dump()]), table], ignore_index=True)
figures.show(
    figures.size_against_accuracy(everything),
    "Test accuracy against how many times smaller the file is, for every method, with intervals",
)

# %% [markdown]
# ### Who beats whom?
#
# Two intervals that overlap say nothing; the *paired* difference on the same pictures does. "Beats" means
# that its interval is above 0, "below" that it is under 0; "not below" is neither: undecided. Against NNCodec, our point is the largest file that is not larger.

# %%
versus = results.comparisons(table, run.path("predictions"), dataset=reference.dataset)
versus if len(versus) else "no two of these points are to be compared"

# %% [markdown]
# ### Are these real integers?
#
# A network that rounds and then multiplies floats is *fake-quantized*: right for training, no faster and
# no proof. The runtime must get the integers in the file. Lower one file to ONNX Runtime and count
# the operators that really run in integers: one for each convolution, each addition, the classifier.
# Predict the three counts from the Spec.

# %% tags=["nbval-check-output"]
uniform_files = [c for c in candidates if c["artifact"].ranges]
additions = sum(block.connection != "none" for _, block in models.named_blocks(model.spec))
convolutions = sum(x.kind == "conv" for x in shapes.values())
print(f"predicted: {convolutions} convolutions, {additions} additions, 1 linear layer")
for c in uniform_files[:1]:
    session = runtimes.prepare("onnxruntime", c["artifact"], "int8", 1)
    for operator, count in sorted(session.integer_operators.items()):
        print(f"{operator}: {count}")

# %% [markdown]
# And every file with activation ranges: does the runtime, with the codes of the file, say what the file
# says in eager? (On processors without VNNI, 8-bit codes would saturate 16-bit sums. ONNX Runtime then has a
# slower exact kernel; codes up to ±63 need none.)

# %%
lines = []
for c in uniform_files:
    session = runtimes.prepare("onnxruntime", c["artifact"], "int8", torch.get_num_threads())
    inputs = pictures.normalize(some.images).numpy()
    runs = np.concatenate([session.predict(inputs[i : i + 50]).argmax(1) for i in range(0, len(inputs), 50)])
    eager = evaluation.predict(artifact.network(c["artifact"]), some, normalize=pictures.normalize)
    line = {
        "file": c["path"].stem,
        "largest code": max(int(w.codes.abs().max()) for w in c["artifact"].weights.values()),
    }
    lines.append(line | {"stored codes": qdq.stored_codes(c["artifact"])})
    lines[-1]["agreement (%)"] = 100 * float((runs == eager).mean())
pd.DataFrame(lines)

# %% [markdown]
# **What would fool you.** A "quantized" file as large as before, an int8 model whose graph runs in
# float, a speed-up measured on another network. What the integers are worth in milliseconds is the
# question of [07_deployment](07_deployment.ipynb).

# %%
files = {f"{c['method']}:{c['point']}": f"artifacts/{c['path'].name}" for c in candidates}
done = run.finish(compression=rows, extra={"validation_delta": decided.looked, "files": files})
print(f"{done.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, by the best profile that has these methods. Profiles train their
# baseline for different times (quick and medium a little more than one epoch, standard twenty): compare a point with the grey
# line of its own figure only.

# %%
committed = results.committed_profile(profiles=results.ALL_PROFILES, technique="quantization")
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    print(f"profile {committed.name}")
    full = figures.read_table(committed / "compression.csv")
    full = full[full["technique"].isin(["baseline", "quantization", "peer"])]
    figures.show(
        figures.size_against_accuracy(full),
        f"The committed results of the {committed.name} profile: accuracy against size ratio",
    )
    display(results.comparisons(full, committed / "predictions", dataset=full["dataset"].iloc[0]))

# %% [markdown]
# ## What you can now measure
#
# The error of rounding, the bits a code really takes, which layers mind, the bytes of a quantized file, and
# whether the network got worse: on the same pictures, with an interval.
#
# **Try it.** (1) Add `"uniform_per_tensor:bits=4 bn"` to `points`: predict what it loses against per channel.
# (2) Raise the `rate` of `hessian_rounding` tenfold: how much smaller is the file, and which layers pay?
# (3) Leave `bn` away from a point at 3 bits. (4) Calibrate on 8 pictures: what happens to the ranges?
