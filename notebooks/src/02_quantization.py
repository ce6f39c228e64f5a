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
# A float32 weight takes 32 bits. How few can it take before the network gets worse? This notebook
# builds the uniform quantizer from its formula, gives it one scale for a whole layer and then one for
# each channel, rounds the activations too, and ends with files whose integers an int8 runtime uses as
# they are. No training: every network here is the trained baseline, rounded.

# %% tags=["parameters"]
points: list = ["per_tensor:8", "per_channel:8", "per_channel:7", "per_channel:4"]  # scales:bits, each a file
calibration_images: int = 512  # [1, 100000] training pictures that set the activation ranges
upstream: list = []  # run folder of 01_baseline; empty: the small network of its defaults
seed: int = 1  # [0, 1000000] which calibration pictures
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/02_quantization

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from nnc_utils import artifact, data, encoding, evaluation, figures, measure, models, results, runtimes
from nnc_utils.quantization import activations, uniform
from nnc_utils.run import start

run = start("02_quantization", globals(), needs=("01_baseline",))
figures.style()
[baseline] = run.upstream
reference = baseline.baseline
model = artifact.load(baseline.artifact("fp32"))
pictures = data.load(reference.dataset, size=model.spec.size)
print(f"{reference.model} on {reference.dataset}, made by {baseline.run}")

# %% [markdown]
# ## What does rounding do?
#
# With $b$ bits a weight becomes one of the whole numbers $-(2^{b-1}-1) \dots 2^{b-1}-1$, its **code**; the
# largest weight gets the largest code, and everything between is rounded:
#
# $$Q(w) = \mathrm{round}\!\left(w \cdot \frac{2^{b-1}-1}{\max|w|}\right), \qquad \hat w = Q(w) \cdot s, \qquad s = \frac{\max|w|}{2^{b-1}-1}$$
#
# $s$ is the **scale**: the step between two neighbouring values. Look at a 5×5 tensor with 3 bits
# before you look at a network. By hand: which codes can occur?

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
# The package's [`quantize`](../nnc_utils/quantization/uniform.py) is this formula, with a scale for the
# tensor or for each channel. Is it right? Ask something independent: PyTorch's own fake quantization.

# %% tags=["nbval-check-output"]
weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
ours = uniform.quantize(weight, bits=4, per_channel=True)
theirs = torch.fake_quantize_per_channel_affine(
    weight, ours.scale, torch.zeros(8, dtype=torch.int32), 0, -7, 7
)
print("codes used:", ours.codes.unique().tolist())
print("same as torch.fake_quantize_per_channel_affine:", torch.equal(encoding.decode(ours), theirs))

# %% [markdown]
# ### Predict: how large is the error?
#
# Inside a step every position is about as likely as another, so the rounding error is spread evenly
# over $[-s/2, s/2]$. Its root mean square is then $s/\sqrt{12}$. Measure it on a real layer, from 8 bits
# down to 2. Where will the prediction break?

# %%
layer = "layer3.0.conv2"
weight = model.get_submodule(layer).weight.detach()
rows = []
for bits in (8, 7, 6, 5, 4, 3, 2):
    rounded = uniform.quantize(weight, bits=bits, per_channel=False)
    error = (encoding.decode(rounded) - weight).square().mean().sqrt()
    rows.append({"bits": bits, "predicted": float(rounded.scale) / 12**0.5, "measured": float(error)})
errors = pd.DataFrame(rows)
errors["ratio"] = errors["measured"] / errors["predicted"]
errors["zeros (%)"] = [
    100 * float((uniform.quantize(weight, bits=b, per_channel=False).codes == 0).float().mean())
    for b in errors["bits"]
]
errors.round(5)

# %% [markdown]
# **What it means.** While many codes are in use the prediction holds. With few bits most weights fall
# into the middle step and become 0: their error is their own size, no longer a random position inside
# a step. The step is set by $\max|w|$, the rarest weight of all.
#
# ## One scale for the layer, or one for each channel?
#
# The channels of a layer differ in size. With one scale for all (**per tensor**), a channel of small
# weights uses only a few of the codes. One scale **per channel** costs four bytes a channel and lets
# each use all of them. Predict the gain from the channels' own peaks: the mean square error falls to
# $\frac{1}{C}\sum_c (\max|w_c| / \max|w|)^2$ of the per-tensor error.

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

# %%
figure, axes = plt.subplots(figsize=(8, 3))
axes.fill_between(range(len(peaks)), peaks.sort(descending=True).values, step="mid")
axes.axhline(float(peaks.max()), color="C1")
axes.annotate(
    "one scale for the tensor serves this",
    (len(peaks), float(peaks.max())),
    (0, -14),
    ha="right",
    textcoords="offset points",
)
axes.set(
    title=f"Do the channels of {layer} differ?",
    xlabel="output channel, sorted",
    ylabel="max |w| of the channel",
)
figures.show(
    figure, "Largest absolute weight of each output channel, sorted: most are well below the largest of all"
)

# %% [markdown]
# **What would fool you.** Scales are part of the file. They cost little here; with one scale for every
# few weights ("group-wise") they would not. That is why size is measured in bytes of the file, never
# in "bits per weight" alone.
#
# ## How many bytes does a code take?
#
# An 8-bit code takes at most 8 bits. But large codes are rare, and an **entropy coder** spends
# $-\log_2 p$ bits on a code of probability $p$: on average the entropy $H = -\sum p \log_2 p$. Predict
# the size of this layer's stream from the counts of its codes; then pack it.

# %%
rows = []
for bits in (8, 7, 4, 2):
    rounded = uniform.quantize(weight, bits=bits, per_channel=True)
    p = np.unique(rounded.codes.numpy(), return_counts=True)[1] / rounded.codes.numel()
    measured = encoding.payload_bits(rounded) / rounded.codes.numel()
    rows.append({"bits": bits, "entropy": float(-(p * np.log2(p)).sum()), "measured bits a weight": measured})
streams = pd.DataFrame(rows)
streams["ratio"] = streams["measured bits a weight"] / streams["entropy"]
streams.round(4)

# %% [markdown]
# **What it means.** The file stays close to the entropy; what is above it are the scales and the table of
# probabilities. A code of 8 bits takes fewer than 8: the file shrinks by more than the factor
# $32/b$ of the usual tables.
#
# ## Activations: what flows between the layers
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
generator = torch.Generator().manual_seed(seed)
chosen = torch.randperm(len(pictures.train.labels), generator=generator)[:calibration_images]
calibration = pictures.normalize(pictures.train.images[chosen])
calibrated = activations.calibrate(model, calibration)
places = models.activations(calibrated)
pd.DataFrame(
    {"tensor": name, "scale": p.scale, "zero-point": p.zero_point} for name, p in places.items()
).round(5).head(6)

# %% [markdown]
# **What would fool you.** Calibrating on test pictures: the ranges would be chosen by the pictures
# that judge them.
#
# ## Benchmark: the operating points
#
# Each point is one network with rounded weights and activations, calibrated on the same pictures. The
# **validation** pictures decide which point is claimed (`headline`): the smallest file without loss there,
# by the same paired interval that judges the claim on test. Only then is the test set looked at.

# %%
def make(point: str) -> tuple[str, int, torch.nn.Module]:
    """A network at one operating point, such as "per_channel:8"."""
    scales, _, bits = point.partition(":")
    if scales not in ("per_tensor", "per_channel") or not bits.isdigit():
        raise ValueError(
            f"unknown point {point!r}: per_tensor:BITS or per_channel:BITS, such as per_channel:8"
        )
    network = uniform.quantize_network(model, bits=int(bits), per_channel=scales == "per_channel")
    return f"uniform_{scales}", int(bits), activations.calibrate(network, calibration)


networks = [make(point) for point in points]
labels = pictures.validation.labels.numpy()
reference_right = evaluation.predict(model, pictures.validation, normalize=pictures.normalize) == labels
candidates = []
for method, bits, network in networks:
    path = run.path(f"artifacts/{method}_{bits}.safetensors")
    saved = artifact.save(network, path, mean=pictures.mean, std=pictures.std, classes=pictures.classes)
    right = evaluation.predict(network, pictures.validation, normalize=pictures.normalize) == labels
    interval = evaluation.paired_interval(compressed_correct=right, reference_correct=reference_right)
    candidates.append(
        {"method": method, "bits": bits, "path": path, "bytes": saved.nbytes, "interval": interval}
    )
    print(f"{method}, {bits} bits: {saved.nbytes:,} bytes,", end=" ")
    print(
        f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}] points on validation", flush=True
    )

# %%
without_loss = [c for c in candidates if c["interval"].no_loss]
claimed = min(without_loss, key=lambda c: c["bytes"])["path"] if without_loss else None
print("claimed:", claimed.name if claimed else "no point is without loss on validation")

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names.

# %%
scores = measure.score(
    [c["path"] for c in candidates], dataset=reference.dataset, folder=run.path("predictions")
)
rows = [
    results.compression_row(
        score,
        run=run,
        reference=baseline,
        dataset=reference.dataset,
        model=reference.model,
        technique="quantization",
        method=candidate["method"],
        point=f"bits={candidate['bits']}",
        headline=int(candidate["path"] == claimed),
    )
    for candidate, score in zip(candidates, scores, strict=True)
]
table = pd.DataFrame([row.model_dump() for row in rows])
table[
    [
        "method",
        "point",
        "artifact_bytes",
        "size_ratio",
        "accuracy",
        "accuracy_delta",
        "delta_ci_low",
        "headline",
    ]
]

# %%
everything = pd.concat([pd.DataFrame([reference.model_dump()]), table], ignore_index=True)
figures.show(
    figures.size_against_accuracy(everything),
    "Test accuracy against how many times smaller the file is, per tensor and per channel, with intervals",
)

# %% [markdown]
# ## Are these real integers?
#
# A network that rounds and then multiplies floats is *fake-quantized*: right for training, no faster and
# no proof. The runtime must get the integers in the file. Lower one file to ONNX Runtime and count
# the operators that really run in integers: one for each convolution, each addition, the classifier.
# Predict the three counts from the Spec.

# %% tags=["nbval-check-output"]
session = runtimes.prepare("onnxruntime", artifact.read(candidates[0]["path"]), "int8", 1)
shapes = models.layers(model.spec)
additions = sum(block.connection != "none" for _, block in models.named_blocks(model.spec))
print(
    f"predicted: {sum(x.kind == 'conv' for x in shapes)} convolutions, {additions} additions, 1 linear layer"
)
for operator, count in sorted(session.integer_operators.items()):
    print(f"{operator}: {count}")

# %% [markdown]
# **What would fool you.** A "quantized" file as large as before, an int8 model whose graph runs in
# float, a speed-up measured on another network. What the integers are worth in milliseconds is the
# question of [07_deployment](07_deployment.ipynb).

# %%
chosen_on = {c["path"].stem: [c["interval"].low, c["interval"].mean, c["interval"].high] for c in candidates}
finished = run.finish(compression=rows, extra={"validation_delta": chosen_on})
print(f"{finished.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST.

# %%
committed = results.committed_profile()
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    full = figures.read_table(committed / "compression.csv")
    full = full[full["technique"].isin(["baseline", "quantization"])]
    figures.show(
        figures.size_against_accuracy(full),
        f"The committed results of the {committed.name} profile: accuracy against size ratio",
    )

# %% [markdown]
# ## What you can now measure
#
# The error of rounding, the bits a code really takes, the bytes of a quantized file, and whether the
# network got worse: on the same pictures, with an interval.
#
# **Try it.** (1) Add `"per_channel:3"` and `"per_tensor:4"` to `points`: predict which loses more.
# (2) Calibrate on 8 pictures: what happens to the ranges, and to accuracy? (3) Give `quantize_network` a dict
# with 4 bits for the largest layer only. How much smaller is the file, and was it worth it?
