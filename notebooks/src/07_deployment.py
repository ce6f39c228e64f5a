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
# # 07 · Deployment: the same file in several runtimes
#
# A smaller file is not yet a faster network. Speed is what a [*runtime*](../docs/glossary.md#runtime) makes of it: which operators it fuses, whether
# it has integer kernels, how many threads it may use.
#
# **You will be able to** fold batch-norm, run a layer in integers by hand, see whether a runtime really uses integers, time a
# network so that the number holds, and say which speed-up is yours. **You need** [02](02_quantization.ipynb) and
# [03](03_pruning.ipynb). **Time:** an hour to read, 45 minutes for the seven exercises, a minute to run.
#
# **Contents.**
# [1 · Folding batch-norm](#1-·-What-does-a-runtime-do-first?).
# [2 · A layer in integers](#2-·-How-does-a-layer-run-in-integers?).
# [3 · Are the file's codes the runtime's?](#3-·-Are-the-codes-in-the-file-those-that-run?)
# [4 · Does it run in integers?](#4-·-Does-it-really-run-in-integers?)
# [5 · What does one timing say?](#5-·-What-does-one-timing-say?)
# [6 · The benchmark: which speed-up do you quote?](#6-·-Which-speed-up-do-you-quote?)
# [7 · What does signed int8 cost?](#7-·-What-does-signed-int8-cost?)
# [8 · What does a mask gain?](#8-·-What-does-a-mask-gain?)
# [9 · Multiplications, bytes, milliseconds](#9-·-Do-multiplications,-bytes-and-milliseconds-agree?).
# [10 · Which networks are worth having?](#10-·-Which-networks-are-worth-having?)
# [11 · What fits a device?](#11-·-What-fits-a-device?)
# [12 · Are the answers the same?](#12-·-Are-the-answers-the-same?)
# [13 · Would you measure the same again?](#13-·-Would-you-measure-the-same-again?)
# Then [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).
#
# Write down your prediction before you run a cell.

# %% tags=["parameters"]
networks: list = [  # configurations of upstream runs; the first one in every runtime
    {"method": "uniform", "bits": 7},
    {"method": "channels", "macs": 4, "compensate": True, "train": "finetune"},
    {"method": "channels", "macs": 4, "compensate": True, "train": "finetune", "int8": True},
    {"method": "weights", "sparsity": 0.9, "train": "finetune"},
]
in_runtimes: list = ["eager", "onnxruntime"]  # and openvino, executorch; inductor with batches of 1 and 64
batches: list = [1, 16]  # [1, 4096] images at once
threads: list = [1, 2]  # [1, 256] threads a runtime may use
seconds: float = 4.0  # [1, 36000] for the timing, all rounds together
# how the benchmark is run, and where its run belongs
rounds: int = 5  # [1, 1000] visits to each pair of runtime and network, more at the smallest
again: bool = True  # time the smallest batch and the fewest threads once more
upstream: list = []  # run folders of 01, 02, 03, and of 04, 05, 06; empty: the first three's defaults
seed: int = 1  # [0, 1000000] of the networks that are timed
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/07_deployment

# %% tags=["setup"]
import pandas as pd
import torch

from bench.latency import Timing, once, show
from bench.session import Bench
from nnc_utils import artifact, figures, models, runtimes
from nnc_utils.exercises import check, predictions

figures.style()
bench = Bench("07_deployment", globals())
timing = Timing(bench, networks, in_runtimes)

# %% [markdown]
# ## 1 · What does a runtime do first?
#
# It [**folds**](../docs/glossary.md#folding) batch-norm into the convolution before it: both are linear, so one multiplication does the work of two
# ([Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3.2). For output channel $c$
#
# $$w'_c = w_c \cdot \frac{\gamma_c}{\sqrt{\sigma_c^2 + \varepsilon}}, \qquad b'_c = \beta_c - \mu_c \cdot \frac{\gamma_c}{\sqrt{\sigma_c^2 + \varepsilon}}$$
#
# ### Exercise 7.1 · Fold batch-norm into a convolution
#
# `weight` is (out, in, k, k). `norm` is the batch-norm behind it, in evaluation: $\gamma$ is `norm.weight`, $\beta$ is
# `norm.bias`, $\mu$ and $\sigma^2$ are `norm.running_mean` and `norm.running_var`, each (out,). Return the weight and the
# bias of the one convolution that does the work of both.
#
# <details><summary>Hint 1</summary>Both formulas hold the same factor: compute it first. ε is <code>norm.eps</code>.</details>
# <details><summary>Hint 2</summary><code>factor.view(-1, 1, 1, 1)</code> stretches one number for each output channel over its
# kernels.</details>


# %% tags=["exercise"]
def fold(weight: torch.Tensor, norm: torch.nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with the batch-norm behind it folded in."""
    ### BEGIN SOLUTION
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.1", fold)

# %% [markdown]
# *Predict*: how far apart are the two on an image? Not at all on paper; in float32 by rounding.

# %% tags=["machine-dependent"]
fp32 = artifact.read(bench.baseline.artifact("fp32"))
network, images = artifact.network(fp32), bench.images
batch = images.normalize(images.validation.images[:32])
stem, norm = network.conv1, network.bn1
with torch.inference_mode():
    weight, bias = fold(stem.weight, norm)
    apart = norm(stem(batch))
    folded = torch.conv2d(batch, weight, bias, stem.stride, stem.padding)
print(f"largest difference {(apart - folded).abs().max():.1e} where values reach {apart.abs().max():.1f}")

# %% [markdown]
# The package folds every layer of a file so:

# %% tags=["checks"]
from nnc_utils.runtimes import qdq

for ours, theirs in zip((weight, bias), qdq.float_layers(fp32)["conv1"]):
    torch.testing.assert_close(ours, theirs)

# %% [markdown]
# ## 2 · How does a layer run in integers?
#
# The file of 7-bit weights holds whole numbers. Folding multiplies only the *scale* of a channel; its **codes** stay, and a
# negative $\gamma$ flips their signs. With codes $q_w$, $q_x$ of weight and input, scales $s_w$, $s_x$ and the input's
# zero-point $z_x$ an output is
#
# $$\begin{gathered} y = s_x s_w \Big( \sum (q_x - z_x)\, q_w + q_b \Big) \\ q_b = \mathrm{round}\!\Big(\frac{b'}{s_x s_w}\Big) \end{gathered}$$
#
# where $b'$ is the folded bias. The sum is whole numbers only.
#
# ### Exercise 7.2 · The integers of a layer
#
# The file gives `codes` (out, in, k, k) and `scale` (out,), batch-norm gives `factor` (out,), which may be negative,
# and the folded `bias` (out,). Return three tensors: the codes that run; the scale of the sums, which is $s_x$ times
# the *folded* scale $s_w$, positive, (out,); and the bias in codes of that scale.
#
# <details><summary>Hint 1</summary>factor = sign · |factor|. One of the two goes into the codes, the other into the
# scale.</details>
# <details><summary>Hint 2</summary>The bias is added to the sums before they are multiplied by their scale: divide by
# it.</details>


# %% tags=["exercise"]
def integers(codes, scale, factor, bias, input_scale: float) -> tuple[torch.Tensor, ...]:
    """Codes, scale of the sums and bias in codes of a layer with its batch-norm folded in."""
    ### BEGIN SOLUTION
    sum_scale = input_scale * scale * factor.abs()
    return codes * factor.sign().view(-1, 1, 1, 1), sum_scale, (bias / sum_scale).round()
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.2", integers)

# %% [markdown]
# A kernel does not subtract $z_x$ from each input. It multiplies the codes as they are and corrects the result by a number that
# is known beforehand: $\sum (q_x - z_x)\, q_w = \sum q_x q_w - z_x \sum q_w$.
#
# ### Exercise 7.3 · Find the bug: the border
#
# These lines are right inside the image and wrong along its border:
#
# ```python
# padded = functional.pad(inputs, [padding] * 4)
# sums = functional.conv2d(padded, codes, bias, stride)
# return sums - zero_point * codes.sum((1, 2, 3)).view(-1, 1, 1)
# ```
#
# `inputs` are unsigned codes (n, in, h, w), `codes` those of the weights (out, in, k, k), `bias` codes (out,). Return the right
# sums.
#
# <details><summary>Hint 1</summary>The float network pads with the number 0. Which code stands for it?</details>
# <details><summary>Hint 2</summary><code>functional.pad</code> takes a <code>value</code>.</details>


# %% tags=["exercise"]
from torch.nn import functional


def multiply(inputs, codes, bias, zero_point: int, stride: int, padding: int) -> torch.Tensor:
    """Sums of an integer convolution, (n, out, h', w')."""
    ### BEGIN SOLUTION
    padded = functional.pad(inputs, [padding] * 4, value=zero_point)
    sums = functional.conv2d(padded, codes, bias, stride)
    return sums - zero_point * codes.sum((1, 2, 3)).view(-1, 1, 1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.3", multiply)

# %% [markdown]
# Now the whole layer: the sums become codes again, by [requantization](../docs/glossary.md#requantization). The package's `fold_batch_norm` gives factor and bias of exercise 7.1. *Predict*: do 16 bits hold the
# sum, or does it need 32?


# %%
predictions.predict("bits of the largest sum", 16)

# %% tags=["machine-dependent"]
def rounded(values: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """Unsigned 8-bit codes."""
    return ((values / scale).round() + zero_point).clamp(0, 255)


int8 = timing.networks[0].stored
(scale_in, zero_in), (scale_out, zero_out) = int8.ranges["quant_input"], int8.ranges["quant_stem"]
factor, bias = models.fold_batch_norm(int8.tensors, "bn1")
stored = int8.weights["conv1"]
codes, scales, bias_codes = integers(
    stored.codes.double(), stored.scale.double(), factor, bias, input_scale=scale_in
)
inputs = rounded(batch.double(), scale_in, zero_in)
sums = multiply(inputs, codes, bias_codes, zero_in, stem.stride[0], stem.padding[0])
outputs = rounded(sums * scales.view(1, -1, 1, 1), scale_out, zero_out)
largest = int(sums.abs().max())
print(f"largest sum {largest:,}: {largest.bit_length() + 1} bits with its sign")
predictions.measured("bits of the largest sum", largest.bit_length() + 1)

# %% [markdown]
# The clamp at 0 is the ReLU, since the [zero-point](../docs/glossary.md#scale-and-zero-point) behind a ReLU is 0. Do these integers agree with the network whose
# activations were rounded during [calibration](../docs/glossary.md#calibration)?

# %% tags=["nbval-check-output"]
network = artifact.network(int8)
places = models.activations(network)
with torch.inference_mode():
    eager = places["quant_stem"](network.bn1(network.conv1(places["quant_input"](batch))).relu())
same = ((eager / scale_out).round() + zero_out == outputs).double().mean()
print("more than 99 % of the output codes are equal:", bool(same > 0.99))
print("codes as the package lowers them:", torch.equal(qdq.lower(int8).layers["conv1"].codes.double(), codes))

# %% [markdown]
# ## 3 · Are the codes in the file those that run?
#
# A library's own observers would choose scales anew and round the weights again. Here every runtime gets the file's
# integers, by one [lowering](../docs/glossary.md#lowering).
# Compare |codes| in the file, layer by layer, with those in the ONNX graph. (ExecuTorch gets the same, its activations less
# 128; only its classifier's input gets a new range for each image.)

# %% tags=["nbval-check-output"]
import onnx

model = qdq.onnx_model(int8, "int8")
graph = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
same = [
    torch.equal(torch.tensor(graph[f"{name}.weight.codes"]).abs().int(), weight.codes.abs().int())
    for name, weight in int8.weights.items()
]
print(f"|codes| equal in file and graph: {sum(same)} of {len(same)} layers")

# %% [markdown]
# ## 4 · Does it really run in integers?
#
# A graph may *say* int8 and still run in float: one missing pair of quantize and dequantize nodes is enough, and the only
# symptom is that nothing got faster. So count in the graph that the runtime optimized. *Predict* the counts from the Spec.

# %% tags=["nbval-check-output"]
session = runtimes.prepare("onnxruntime", int8, "int8", 1)
kinds = [step.kind for step in qdq.steps(int8.spec)]
print("predicted:", {kind: kinds.count(kind) for kind in ("conv", "add", "linear")})
print("measured: ", {kind: session.integer_operators[kind] for kind in ("conv", "add", "linear")})

# %% [markdown]
# Now break it on purpose: one tensor between two steps is no longer rounded.
#
# ### Exercise 7.4 · Which operators fall back to floats?
#
# `qdq.steps(spec)` lists what the network computes. Each step has a `name`, one tensor that it writes, `output`, and one or two
# that it reads, `inputs`. An operator runs in integers only if *all* of its tensors are integers (the logits excepted).
# Return the names of the steps that fall back when the tensor `lost` stays in floats.
#
# <details><summary>Hint 1</summary>An addition has two inputs, and a block's output has more than one reader.</details>


# %% tags=["exercise"]
def fall_back(spec: models.Spec, lost: str) -> list[str]:
    """Names of the steps that write or read a tensor."""
    ### BEGIN SOLUTION
    return [step.name for step in qdq.steps(spec) if lost in (step.output, *step.inputs)]
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.4", fall_back)

# %% [markdown]
# Ask the runtime. The second tensor is the output of a block.


# %% tags=["nbval-check-output"]
def without(lost: str) -> dict[str, int]:
    """Integer operators of ONNX Runtime when one tensor is no longer rounded."""
    graph = qdq.onnx_model(int8, "int8")
    for node in [n for n in graph.graph.node if f"{lost}.codes" in (*n.input, *n.output)]:
        graph.graph.node.remove(node)
    for node in graph.graph.node:
        for place, tensor in enumerate(node.input):
            if tensor == lost:
                node.input[place] = f"{lost}.float"
    onnxruntime = runtimes.adapter("onnxruntime")
    return onnxruntime.OnnxRuntimeSession(graph.SerializeToString(), "int8", 1).integer_operators


for lost in ("layer2.0.quant1", "layer3.0.quant_out"):
    counts = without(lost)
    fallen = {kind: kinds.count(kind) - counts[kind] for kind in ("conv", "add")}
    print(f"without {lost}: predicted {', '.join(fall_back(int8.spec, lost))}; measured {fallen}")
try:
    qdq.check_integer(int8.spec, counts)
except RuntimeError as error:
    print("refused:", str(error).partition(" (")[0])

# %% [markdown]
# **What it means.** Whatever writes the tensor and whatever reads it lost its integer kernel. The network still gives the same
# classes. Only the count tells.
#
# ### Ship int8, run float
#
# You will not always write the file yourself. Here are five ways to get "int8" for ONNX Runtime, all of the same network. Each
# file loads, and no warning says what it runs in. *Predict* for each how many of its 21 convolutions and linear layers run in
# integers.

# %%
guesses = {"static, defaults": 21, "static, uint8 activations": 21, "static, 16-bit activations": 21}
guesses |= {"dynamic, defaults": 21, "this suite": 21}
for way, layers in guesses.items():
    predictions.predict(f"integer layers: {way}", layers)

# %%
import logging

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization import QuantType

from nnc_utils import doctor
from nnc_utils.doctor import text


class Reader(quantization.CalibrationDataReader):
    """Gives the calibration images once."""

    def __init__(self):
        self.batches = iter([{"images": batch.numpy()}])

    def get_next(self):
        return next(self.batches, None)


logging.getLogger().setLevel(logging.ERROR)  # it warns of batch-norm, which is folded here

# %%
folder = bench.path("scratch/int8")
folder.mkdir(parents=True, exist_ok=True)
onnx.save(qdq.onnx_model(fp32, "fp32"), folder / "fp32.onnx")
onnx.save(qdq.onnx_model(int8, "int8"), folder / "this suite.onnx")
quantization.quantize_dynamic(folder / "fp32.onnx", folder / "dynamic, defaults.onnx")
activations = {"defaults": QuantType.QInt8, "uint8 activations": QuantType.QUInt8}
for name, kind in (activations | {"16-bit activations": QuantType.QUInt16}).items():
    target = folder / f"static, {name}.onnx"
    quantization.quantize_static(folder / "fp32.onnx", target, Reader(), activation_type=kind)

# %% [markdown]
# The [doctor](../docs/doctor.md) lets the runtime compile each file, and reads the graph that it then executes.

# %% tags=["machine-dependent"]
reports = {way: doctor.examine(folder / f"{way}.onnx") for way in guesses}
for way, report in reports.items():
    layers = [layer for layer in report.layers if layer.macs]
    predictions.measured(f"integer layers: {way}", sum(layer.integer for layer in layers))
    print(f"  {text.summary(report)}; {', '.join(report.named()) or 'healthy'}")

# %% [markdown]
# Which layers did the defaults lose? Look where a tensor has two readers. Whoever writes or reads it is lost.

# %% tags=["machine-dependent"]
lines = text.render(reports["static, defaults"]).splitlines()
print(*(line for line in lines if " floats " in line), sep="\n")

# %% [markdown]
# Add 128 to signed codes, and they are unsigned: the same numbers under other names. `--fix` does that, and checks both files on
# the same images.

# %% tags=["machine-dependent"]
np.save(folder / "images.npy", images.normalize(images.validation.images[:200]).numpy())
before, after = folder / "static, defaults.onnx", folder / "repaired.onnx"
found = doctor.repair(before, after, inputs=str(folder / "images.npy"))
print(text.repaired(found))
print(text.summary(doctor.examine(folder / "repaired.onnx")))

# %% [markdown]
# **What it means.** "Quantized" is a property of a file, "runs in integers" one of a file, a runtime and a processor. A share of
# MACs belongs beside each int8 latency: `python -m nnc_utils.doctor FILE --least 0.95` fails a build that loses it.
#
# **What would fool you.** Dynamic quantization multiplies integers in every layer, and may still be slower than floats: signed
# weights take the slow kernel. And a share of 100 % on this processor says nothing about yours.
#
# ## 5 · What does one timing say?
#
# The [latency](../docs/glossary.md#latency) is the time for one image; [throughput](../docs/glossary.md#throughput) needs many at once. *Predict*: how much longer than the
# median does the first prediction take? And is the mean above or below the median?

# %%
predictions.predict("first prediction ÷ median", 2)

# %% tags=["machine-dependent"]
import gc
import time

session = runtimes.prepare("onnxruntime", fp32, "fp32", 1)
image, milliseconds = batch[:1].numpy(), []
gc.disable()  # no collection of garbage while the clock runs
for _ in range(300):
    start = time.perf_counter_ns()
    session.predict(image)
    milliseconds.append((time.perf_counter_ns() - start) / 1e6)
gc.enable()
samples = pd.Series(milliseconds[30:])  # the first tenth warms up
print(f"first {milliseconds[0]:.3f} ms, median {samples.median():.3f} ms, mean {samples.mean():.3f} ms")
predictions.measured("first prediction ÷ median", milliseconds[0] / samples.median())
print(f"90 % take less than {samples.quantile(0.9):.3f} ms, the slowest {samples.max():.3f} ms")

# %% [markdown]
# **What it means.** Whatever else the machine does only adds time: the mean follows the outliers, the median does not.
#
# **What would fool you.** The first call allocates memory and packs weights. A minute later the machine may be slower: two
# networks have to be timed *in turn*, a moment apart.
#
# ## 6 · Which speed-up do you quote?
#
# *Predict* with arithmetic: times fewer multiplications (MACs), times what the processor's instructions give. With
# dot-product instructions (VNNI) one multiplies four times as many 8-bit numbers as one in fp32; without, three
# instructions do that work, which is 4/3 times as many. A network with its channels removed gains in both precisions; a
# mask leaves all multiplications.
#
# Each runtime lives in a process of its own, blocked while another is timed. A round visits every pair of runtime and
# network; a speed-up is the median of the ratios *within* a round. It is given twice: against fp32 in eager PyTorch,
# which is what most reports do, and against the fastest fp32 runtime, which is what you would otherwise use.
#
# ### Exercise 7.5 · Find the bug: a speed-up
#
# This line flatters the network, and a minute in which the machine was slow may spoil it:
#
# ```python
# return statistics.median(fp32["eager"]) / statistics.median(own)
# ```
#
# `own` holds the milliseconds of the compressed network, one number for each round. `fp32` holds those of the uncompressed one
# in each runtime, in the same rounds. Return how many times as fast the compressed network is as the fastest fp32 runtime, which
# is the one with the lowest median.
#
# <details><summary>Hint 1</summary>Choose the runtime first: <code>min</code> takes a <code>key</code>.</details>
# <details><summary>Hint 2</summary><code>zip</code> gives the two times of each round: divide, then take the median.</details>


# %% tags=["exercise"]
import statistics


def speedup(own: list[float], fp32: dict[str, list[float]]) -> float:
    """Times as fast as the fastest fp32 runtime; the milliseconds are one for each round."""
    ### BEGIN SOLUTION
    fastest = min(fp32.values(), key=statistics.median)
    return statistics.median(reference / mine for reference, mine in zip(fastest, own))
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.5", speedup)

# %% tags=["benchmark", "machine-dependent"]
protocol = {"batches": batches, "threads": threads, "rounds": rounds, "seconds": seconds, "again": again}
table = timing.measure(**protocol)
speedups = {"p50_ms": "ms", "speedup_eager_fp32": "÷ eager", "speedup_best_fp32": "÷ fastest fp32"}
show(table, speedups, threads=min(threads)).round(2)

# %% tags=["benchmark", "machine-dependent"]
done = timing.finish()

# %% [markdown]
# Your speed-ups from the rounds, beside the table's column:


# %% tags=["machine-dependent"]
def medians(row: pd.Series) -> list[float]:
    """Of each round, in milliseconds."""
    return [float(median) for median in row["rounds_p50_ms"].split()]


single = once(table, threads=min(threads))
dense = single[single["artifact_sha256"] == timing.reference.row.artifact_sha256]
uncompressed = {row["runtime"]: medians(row) for _, row in dense.iterrows() if row["precision"] == "fp32"}
for _, row in single[single["precision"] == "int8"].iterrows():
    ours, theirs = speedup(medians(row), uncompressed), row["speedup_best_fp32"]
    print(f"{row['title']}, {row['runtime']}: {ours:.2f}, in the table {theirs:.2f}")

# %% [markdown]
# And what did arithmetic predict?

# %% tags=["machine-dependent"]
from nnc_utils import provenance

vnni = {"avx512_vnni", "avx_vnni", "i8mm"} & set(provenance.hardware()["flags"])
instructions = {"fp32": 1, "s8s8": 1, "bf16": 2, "int8": 4 if vnni else 4 / 3}
known = {network.row.artifact_sha256: network.row for network in (timing.reference, *timing.networks)}
single = single[single["artifact_sha256"].isin(known)]
fewer = [timing.reference.row.macs / known[sha256].macs for sha256 in single["artifact_sha256"]]
predicted = pd.Series(fewer, single.index) * single["precision"].map(instructions)
compared = pd.DataFrame({"network": single["title"], "where": single["runtime"] + " " + single["precision"]})
compared["predicted ÷"] = predicted
compared["measured ÷"] = single["speedup_best_fp32"]
compared["measured / predicted"] = compared["measured ÷"] / predicted
print("dot-product instructions:", ", ".join(sorted(vnni)) or "none")
compared[(predicted > 1) & (single["runtime"] != "eager")].set_index("network").round(2)

# %% [markdown]
# **What it means.** The gain over eager contains what *fusing* gave, before any compression. The gain over the fastest fp32
# runtime is what int8 and fewer channels gave. Arithmetic guides, it does not bind: a network whose weights do not fit the caches
# waits for them, and gains more when they shrink; calls and small layers take their share, and it gains less.
#
# **What would fool you.** Quoting the larger ratio. Timing fp32 with one thread and int8 with two. A bf16 kernel called
# "fp32". An int8 graph on a processor without the instructions for it.
#
# ## 7 · What does signed int8 cost?
#
# The same codes with *signed* activations (`s8s8`), a shift by 128. x86's instructions multiply unsigned by signed numbers;
# ONNX Runtime computes signed by signed without them. *Predict*: in which operator is the difference?

# %% tags=["machine-dependent"]
profiles = {}
for precision in ("fp32", "int8", "s8s8"):
    file = fp32 if precision == "fp32" else int8
    profile_of = runtimes.prepare("onnxruntime", file, precision, 1).profile(image, runs=20)
    kinds = {"Conv": 0.0, "other": 0.0}
    for operator, entry in profile_of.items():
        kinds["Conv" if "Conv" in operator else "other"] += entry["ms"]
    profiles[precision] = kinds
shares = pd.DataFrame(profiles).T.rename(columns={"Conv": "convolutions (ms)", "other": "all others (ms)"})
shares.round(3)

# %% [markdown]
# **What it means.** What `s8s8` loses, it loses in the convolutions: no instruction, no speed. A profile slows the network down
# and is taken once; compare its lines with each other, not with the medians above.
#
# ## 8 · What does a mask gain?
#
# [03](03_pruning.ipynb) sets most single weights to zero by a mask. *Predict*: the time of the masked network in ONNX Runtime
# over that of the dense one.

# %%
predictions.predict("time of the masked network ÷ of the dense one", 0.5)

# %% tags=["machine-dependent"]
ort = single[(single["runtime"] == "onnxruntime") & (single["precision"] == "fp32")].set_index(
    "artifact_sha256"
)
dense = ort.loc[timing.reference.row.artifact_sha256]
for sha256, row in ort.drop(index=dense.name).iterrows():
    ratio = statistics.median(mine / whole for mine, whole in zip(medians(row), medians(dense)))
    zeros = 1 - known[sha256].nonzeros / known[sha256].params
    print(f"{row['title']}: {zeros:.0%} zeros, {ratio:.2f} times the time of the dense network")
predictions.measured("time of the masked network ÷ of the dense one", ratio)

# %% [markdown]
# **What it means.** A dense kernel does not look for zeros: it multiplies them like any other number. Removed channels are gone
# from the shapes, and from the time.
#
# ## 9 · Do multiplications, bytes and milliseconds agree?
#
# Three numbers are quoted for "smaller". If one stood for another, the three bars of a network would be equal. *Predict* the
# network whose bars differ most.

# %% tags=["machine-dependent"]
import textwrap

import matplotlib.pyplot as plt

ort = single[(single["runtime"] == "onnxruntime") & (single["precision"] != "s8s8")].iloc[::-1]
whole = timing.reference.row
bars = {
    "MACs": [whole.macs / known[sha256].macs for sha256 in ort["artifact_sha256"]],
    "bytes of the file": [known[sha256].size_ratio for sha256 in ort["artifact_sha256"]],
    "milliseconds": [dense["p50_ms"] / p50 for p50 in ort["p50_ms"]],
}
labels = [textwrap.fill(f"{title}, {kind}", 34) for title, kind in zip(ort["title"], ort["precision"])]
figure, axes = plt.subplots(figsize=(9, 0.8 * len(ort) + 1))
pd.DataFrame(bars, labels).plot.barh(ax=axes, width=0.8)
axes.set(xscale="log", xlabel="times smaller, or faster, in ONNX Runtime", ylabel="")
axes.set_title("Do multiplications, bytes and milliseconds agree?")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
figures.show(
    figure, "For each network three bars on a log axis: MACs, bytes and milliseconds against the dense one"
)

# %% [markdown]
# **What it means.** A ratio of MACs is never a speed-up, nor is one of bytes: the runtime and its kernels decide.
#
# ## 10 · Which networks are worth having?
#
# A network is worth having if none is both faster and better: those are on the **frontier**. Each stands in its fastest
# runtime.

# %% tags=["machine-dependent"]
figures.show(
    figures.frontier(table, threads=min(threads)),
    "Test accuracy against median milliseconds, each network in its fastest runtime",
)

# %% [markdown]
# ## 11 · What fits a device?
#
# A microcontroller has a flash memory of about 1 MB and 256 kB for what flows between layers. The weights are in the
# file; what flows follows from the Spec: all tensors that a later step still needs, one byte a number in int8 ([Lin et
# al., 2020](https://arxiv.org/abs/2007.10319) search for networks under these two limits). *Predict*: which limit
# binds?
#
# ### Exercise 7.6 · Memory for what flows
#
# `order` lists the steps as in exercise 7.4; the first one reads the image. `sizes` gives the numbers in each tensor. While a step
# runs, memory holds its output, its inputs, and every tensor that a later step still reads. Return the most numbers that it
# holds at once.
#
# <details><summary>Hint 1</summary>First note for each tensor the number of the last step that reads it.</details>
# <details><summary>Hint 2</summary>Then go through the steps with a set of held tensors: add the output, count, drop what nobody
# reads any more.</details>


# %% tags=["exercise"]
def peak(order: list[qdq.Step], sizes: dict[str, int]) -> int:
    """Numbers of the tensors that are held at once, at most."""
    ### BEGIN SOLUTION
    last = {name: number for number, step in enumerate(order) for name in step.inputs}
    most, held = 0, set(order[0].inputs)
    for number, step in enumerate(order):
        held.add(step.output)
        most = max(most, sum(sizes[name] for name in held))
        held = {name for name in held if last.get(name, number) > number}
    return most
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.6", peak)


# %% tags=["machine-dependent"]
def tensor_sizes(spec: models.Spec) -> dict[str, int]:
    """Numbers in each tensor of a network, for one image."""
    sizes = {"quant_input": spec.channels * spec.size**2}
    for step in qdq.steps(spec):
        before, layer = sizes[step.inputs[0]], step.layer
        pooled = {"max_pool": before // 4, "average_pool": models.layers(spec)[-1].in_channels}
        shape = layer.out_channels * layer.size_out**2 if layer else pooled.get(step.kind, before)
        sizes[step.output] = shape
    return sizes


for timed in timing.networks[:1] + [n for n in timing.networks if n.stored.spec != fp32.spec][:1]:
    own = timed.stored.spec
    weights = sum(layer.parameters for layer in models.layers(own))
    flow = peak(qdq.steps(own), tensor_sizes(own))
    fits = "fits" if weights < 1e6 and flow < 256_000 else "does not fit"
    print(f"{timed.row.macs:,} MACs in int8: {weights:,} bytes of weights, {flow:,} flow: {fits}")

# %% [markdown]
# **What would fool you.** The bytes of the file: an entropy-coded artifact is decoded before it runs. And these are this
# processor's milliseconds: export the network (`python -m nnc_utils.export`) and time it on the device.
#
# The device may be a phone's browser. `--to web` writes [a page](../docs/browser.md) in which the network runs on the
# visitor's machine; one thread of WebAssembly has integer kernels, too. Draw, or choose an image:
#
# ![The page in a browser: an image of an ankle boot, the probability of each class, and a table of networks with size and milliseconds.](../docs/browser.png)
#
# ## 12 · Are the answers the same?
#
# **Agreement** is the share of test images to which the runtime gives the class that the artifact gives in eager PyTorch.
# *Predict* it for int8. (Where a runtime computes in fp32, or from the same codes in `s8s8`, the first 250 images are
# compared; if they agree the accuracy is the [artifact](../docs/glossary.md#artifact)'s, and no agreement is given.)

# %% tags=["machine-dependent"]
answers = {"accuracy": "accuracy (%)", "agreement": "agreement (%)"}
show(table[table["runtime"] != "eager"], answers, threads=min(threads)).round(2)

# %% [markdown]
# A few tenths of a percent below 100 is rounding. Much less can be *saturation*: without VNNI fast kernels add two products in
# 16 bits, and 255·127 + 255·127 does not fit. ONNX Runtime has a slower, exact kernel for such codes, which this suite asks for.
#
# ### Exercise 7.7 · Choose the width
#
# A kernel adds so many `products` of an unsigned 8-bit input with a signed code of a weight, in a signed `accumulator`
# of so many bits. Codes of $b$ bits reach $\pm(2^{b-1} - 1)$. Choose the largest $b$ from 2 to 8 for which *no* image
# can overflow the sum; 0 if none fits.
#
# <details><summary>Hint 1</summary>The worst image has 255 everywhere. The accumulator reaches 2<sup>bits − 1</sup> − 1.</details>
# <details><summary>Hint 2</summary><code>max(..., default=0)</code> is 0 for an empty list.</details>


# %% tags=["exercise"]
def most_bits(accumulator: int, products: int) -> int:
    """The most bits of a weight's code with which a sum of products cannot overflow."""
    ### BEGIN SOLUTION
    limit = 2 ** (accumulator - 1) - 1
    fitting = [bits for bits in range(2, 9) if products * 255 * (2 ** (bits - 1) - 1) <= limit]
    return max(fitting, default=0)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("7.7", most_bits)

# %% [markdown]
# *Predict* the largest sum of two products for 8 and for 7 bits.

# %% tags=["nbval-check-output"]
for bits in (8, 7):
    largest = 2 * 255 * (2 ** (bits - 1) - 1)
    print(f"{bits} bits: {largest:,} of {2**15 - 1:,}: {'saturates' if largest > 2**15 - 1 else 'fits'}")
print(
    f"chosen: {most_bits(16, 2)} bits for two products in 16 bits, {most_bits(32, 9 * 512)} for a layer in 32"
)

# %% [markdown]
# That is why the first network here has codes of 7 bits.
#
# ## 13 · Would you measure the same again?
#
# Everything was timed a second time, in new processes. *Predict*: which ratio holds better, against eager or against the fastest fp32?

# %% tags=["machine-dependent"]
pair = ["artifact_sha256", "runtime", "precision"]
first = single[(single["batch"] == min(batches)) & (single["threads"] == min(threads))]
second = table[table["control"] == "again"]
both = first.merge(second, on=pair, suffixes=("", " again"))
ratios = {"speedup_eager_fp32": "÷ eager", "speedup_best_fp32": "÷ fastest fp32"}
changes = pd.DataFrame({"milliseconds": 100 * (both["p50_ms again"] / both["p50_ms"] - 1).abs()})
for column, heading in ratios.items():
    changes[heading] = 100 * (both[f"{column} again"] / both[column] - 1).abs()
changes = changes.assign(network=both["title"], where=both["runtime"] + " " + both["precision"])
print(
    f"{len(both)} timed twice; largest change in percent, then each network:" if again else "set again=True"
)
print(changes[["milliseconds", *ratios.values()]].max().round(1).to_string())
changes.set_index(["network", "where"]).round(1)

# %% [markdown]
# **What it means.** Read the largest change as the uncertainty of every number above: a speed-up smaller than it is none. On an
# idle machine a ratio within a round holds better than a time, since a slow minute weighs on both of its terms. After a warning
# that other processes are at work nothing holds: stop them and measure again.
#
# ## The committed results
#
# The same cells, run on a ResNet-18 trained on Fashion-MNIST, on the machine named in the report. What is the fastest network of
# each technique in ONNX Runtime?

# %% tags=["machine-dependent"]
from bench.folder import root

tables = [root() / f"results/{name}/latency.csv" for name in ("full", "standard", "quick")]
file = next(file for file in tables if file.is_file())
committed = once(figures.read_table(file))
committed = committed[
    (committed["runtime"] == "onnxruntime") & ~committed["control"].str.startswith("after_")
]
fastest = committed.sort_values("p50_ms").drop_duplicates("technique")
columns = ["title", "precision", "p50_ms", "speedup_eager_fp32", "speedup_best_fp32", "accuracy"]
headings = ["network", "precision", "ms", "÷ eager", "÷ fastest fp32", "accuracy (%)"]
best = fastest.iloc[0]
times = f"{best['speedup_best_fp32']:.1f} times as fast as the fastest fp32 runtime"
print(f"{file.parent.name}: {best['title']} is {times}")
fastest[columns].set_axis(headings, axis=1).set_index("network").round(2)

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
# - A runtime folds, fuses and picks kernels. Count its integer operators; the name of a file proves nothing.
# - A kernel pads with the zero-point, and its accumulator must hold the worst sum. Both follow from the codes alone.
# - Time in turn, warm up, quote medians of ratios. Say against what.
# - The change between two timings is the uncertainty of a speed-up. Whatever is smaller is no difference.
# - Channels that are removed save time everywhere. Masks save none, int8 as much as the instructions give.
#
# <!-- numbers:begin -->
# **In numbers.** In int8, without training, a network is 4.20× as fast as in the fastest fp32 runtime, and 10.3× as
# fast as in eager PyTorch. The pipeline's network takes 0.173 ms for an image: 18.0× as fast as the fastest fp32
# runtime.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why does folding batch-norm leave the codes of the weights alone?</summary>Folding multiplies all
# weights of an output channel by one factor. The scale of the channel takes its size; only the sign of a negative factor
# goes into the codes.</details>
# <details><summary>2. Which number does a kernel on unsigned codes pad with, and why?</summary>With the zero-point of the
# input: that is the code of the number 0, with which the float network pads.</details>
# <details><summary>3. Why is the ReLU no operation in the integer network?</summary>The zero-point behind a ReLU is 0, so
# the clamp of the output's codes at 0 is the ReLU.</details>
# <details><summary>4. A tensor between two convolutions is not rounded. Why does that cost two integer
# kernels?</summary>The first convolution has to write floats and the second has to read them. An operator runs in
# integers only if all of its tensors are.</details>
# <details><summary>5. How do you notice that an int8 file runs in floats?</summary>Count the integer operators of the
# graph that the runtime optimized, and compare with the Spec. The classes stay the same, so accuracy does not show
# it.</details>
# <details><summary>6. Why the median of many calls, and not the mean or the first?</summary>The first call allocates and
# packs weights. What else the machine does only adds time: a few slow calls move the mean, hardly the median.</details>
# <details><summary>7. Why are ratios taken within a round?</summary>A slow minute weighs on both of its terms, so the
# ratio holds better than a time. Medians of two different minutes do not have that.</details>
# <details><summary>8. What is in a speed-up against eager PyTorch besides the compression?</summary>What fusing and the
# runtime gave: it would have come without compressing anything. Against the fastest fp32 runtime it is taken
# out.</details>
# <details><summary>9. Why does a mask save no time in these runtimes?</summary>A dense kernel multiplies zeros like any
# other number, and the shapes are unchanged. Removed channels change the shapes.</details>
# <details><summary>10. Why can codes of 7 bits not saturate the 16-bit sum of two products?</summary>The worst image
# gives 2 · 255 · 63, which is below 2<sup>15</sup>. With 127 in place of 63 it is above.</details>
# <details><summary>11. A network's file fits the flash memory. Does the network fit the device?</summary>Not necessarily:
# the tensors that flow have to fit the working memory at once, a block's input included, which waits for the addition.
# And an entropy-coded file is decoded first.</details>
# <details><summary>12. A speed-up changes by several percent when it is timed again. What can you claim?</summary>No
# difference that is smaller than that change. Idle the machine and measure again.</details>
#
# **Try it.** (1) Set `batches = [1, 8, 64]`: at which batch does int8 pay most? (2) Set `threads = [1]` and then all your
# cores: what happens to batch 1? (3) Add `{"method": "channels", "macs": 4, "compensate": True}` to `networks`: predict its
# time. (4) In section 4 take `quant_stem`: predict what falls back, then count. (5) Export a network and classify an image
# with it.
#
# **Further reading.** [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), how a network runs in integers;
# [Lin et al., 2020](https://arxiv.org/abs/2007.10319), networks for microcontrollers.
#
# Next: [08_federated_learning](08_federated_learning.ipynb): what training sends, compressed.
