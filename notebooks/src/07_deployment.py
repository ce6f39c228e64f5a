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
# A smaller file is not yet a faster network. Speed is what a *runtime* makes of it: which operators it
# fuses, whether it has integer kernels, how many threads it may use. Here the artifacts of the other
# notebooks run in the runtimes that people ship with, and every speed-up is given twice: against fp32
# in eager PyTorch, which is what most reports do, and against the fastest fp32 runtime, which is what a
# practitioner would otherwise use.

# %% tags=["parameters"]
points: list = ["uniform_per_channel:bits=7", "hessian_rounding:rate=1e-10 bn"]  # of 02_quantization
batches: list = [1, 64]  # [1, 4096] pictures at once
threads: list = [1, 2]  # [1, 256] threads a runtime may use
rounds: int = 5  # [1, 1000] visits to each pair of runtime and network
seconds: float = 8.0  # [1, 36000] for the timing, all rounds together
upstream: list = []  # run folders of 01_baseline and 02_quantization; empty: those of their defaults
seed: int = 1  # [0, 1000000] only names the run; nothing here is drawn
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/07_deployment

# %%
import shutil

import onnx
import pandas as pd
import torch

from nnc_utils import artifact, data, figures, measure, results, runtimes
from nnc_utils.run import start
from nnc_utils.runtimes import qdq

run = start("07_deployment", globals(), needs=("01_baseline", "02_quantization"))
figures.style()
baseline, quantized = run.upstream
reference = baseline.baseline
made = {f"{row.method}:{row.point}": row for row in quantized.compression if row.technique == "quantization"}
if unknown := set(points) - set(made):
    raise ValueError(
        f"no artifact of {quantized.run} is called {', '.join(unknown)}: it has {', '.join(made)}"
    )
files, networks = {}, []
for name, row in made.items():
    file = quantized.folder / quantized.record.extra["files"][name]
    if name in points or row.headline and artifact.read(file).ranges:  # codebooks have no int8 form
        networks.append(row)
        files[row.artifact_sha256] = file
fp32 = artifact.read(baseline.artifact("fp32"))
int8 = artifact.read(files[networks[0].artifact_sha256])
spec = fp32.spec

# %% [markdown]
# ## What does a runtime make of a network?
#
# First it **folds** batch-norm into the convolution before it: both are linear, so one multiplication
# can do the work of two. For output channel $c$
#
# $$w'_c = w_c \cdot \frac{\gamma_c}{\sqrt{\sigma_c^2 + \varepsilon}}, \qquad b'_c = \beta_c - \mu_c \cdot \frac{\gamma_c}{\sqrt{\sigma_c^2 + \varepsilon}}$$
#
# Predict: how far apart will the two be on a picture? Not at all on paper; in float32 by rounding.

# %%
network = artifact.network(fp32)
factor = network.bn1.weight / (network.bn1.running_var + network.bn1.eps).sqrt()
pictures = data.load(reference.dataset, size=spec.size)
images = pictures.normalize(pictures.validation.images[:32])
with torch.inference_mode():
    apart = network.bn1(network.conv1(images))
    folded = torch.nn.functional.conv2d(
        images,
        network.conv1.weight * factor.view(-1, 1, 1, 1),
        network.bn1.bias - network.bn1.running_mean * factor,
        stride=network.conv1.stride,
        padding=network.conv1.padding,
    )
print(f"largest difference {(apart - folded).abs().max():.1e} where values reach {apart.abs().max():.1f}")

# %% [markdown]
# Then integers. Folding multiplies only the *scale* of a channel; its **codes** stay those of the file,
# and a negative $\gamma$ flips their signs. So a runtime can be given the file's own integers. Compare
# the codes in the file, layer by layer and channel by channel, with those in the ONNX graph.

# %% tags=["nbval-check-output"]
model = qdq.onnx_model(int8, "int8")
stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
same = [
    torch.equal(torch.tensor(stored[f"{name}.weight.codes"]).abs().int(), weight.codes.abs().int())
    for name, weight in int8.weights.items()
]
print(f"|codes| equal in file and graph: {sum(same)} of {len(same)} layers")

# %% [markdown]
# ## Does it really run in integers?
#
# A graph may *say* int8 and still run in float: one missing pair of quantize and dequantize nodes is
# enough, and the only symptom is that nothing got faster. So the runtime's own optimized graph is
# counted, and a network that falls short is refused. Predict the counts from the Spec; then break one.

# %% tags=["nbval-check-output"]
session = runtimes.prepare("onnxruntime", int8, "int8", 1)
kinds = [step.kind for step in qdq.steps(spec)]
print("predicted:", {kind: kinds.count(kind) for kind in ("conv", "add", "linear")})
print("measured: ", {kind: session.integer_operators[kind] for kind in ("conv", "add", "linear")})
broken = dict(session.integer_operators)
broken["conv"] -= 1  # as if one convolution had stayed in float
try:
    qdq.check_integer(spec, broken)
except RuntimeError as error:
    print("refused:", str(error).partition(" (")[0])

# %% [markdown]
# ## How much faster will it be?
#
# Predict: a vector register holds four times as many 8-bit as 32-bit numbers, so at best int8 is about
# four times as fast in the layers that do the multiplications, a little more with dot-product
# instructions (VNNI), and not at all in what the binding between Python and the runtime costs. An
# **identity** network, one operator that does nothing, shows that cost.
#
# Each runtime lives in a process of its own, waiting while another is timed; a round visits every pair
# of runtime and network once, so that a slow minute of the machine hits all alike. The medians are
# over all rounds.

# %%
requests = [
    {"path": baseline.artifact("fp32"), "runtime": runtime, "precision": "fp32"} for runtime in runtimes.NAMES
]
requests += [
    {"path": files[row.artifact_sha256], "runtime": "onnxruntime", "precision": "int8"} for row in networks
]
for part in run.upstream:  # the classes that each artifact gave in eager are known already
    for file in (part.folder / "predictions").glob("*.npy"):
        shutil.copy(file, run.path(f"predictions/{file.name}"))
measured = measure.latency(
    requests,
    dataset=reference.dataset,
    reference=baseline.artifact("fp32"),
    folder=run.path("predictions"),
    batches=batches,
    threads=threads,
    rounds=rounds,
    seconds=seconds,
)
rows = results.latency_rows(measured, [reference, *networks], reference_sha256=reference.artifact_sha256)
table = pd.DataFrame(rows)
columns = ["runtime", "precision", "method", "point", "batch", "threads", "p50_ms", "p90_ms", "throughput"]
table[columns].round(3)

# %%
for count in threads:
    figures.show(
        figures.latency_bars(table, threads=count),
        f"Median milliseconds for one picture with threads={count}, by runtime and precision",
    )

# %% [markdown]
# ## Which speed-up do you quote?
#
# The prediction of "four times" was about arithmetic. Look at both ratios for each int8 network.

# %%
ratios = table[table["precision"] == "int8"]
ratios = ratios[
    ["method", "point", "batch", "threads", "p50_ms", "speedup_eager_fp32", "speedup_best_fp32"]
].copy()
ratios["best fp32 / predicted 4"] = ratios["speedup_best_fp32"] / 4
ratios.round(2)

# %% [markdown]
# **What it means.** The gain over eager contains what *fusing* gave, before any compression; the gain
# over the best fp32 runtime is what *int8* gave. With more threads one picture offers each thread less
# work, and the ratio falls.
#
# **What would fool you.** Quoting the larger ratio. Timing fp32 with one thread and int8 with two. A bf16
# kernel called "fp32". An int8 graph on a processor without the instructions for it.
#
# ## Did the answers stay the same?
#
# The class that the runtime gives is compared with the class that the artifact gives in eager PyTorch,
# on every test picture: **agreement**. Accuracy below is the runtime's own, by the code path that was
# timed.

# %%
answers = table[(table["batch"] == 1) & (table["threads"] == threads[0]) & (table["control"] != "identity")]
answers[["runtime", "precision", "method", "point", "accuracy", "agreement", "stored_codes", "runtime_bytes"]]

# %% [markdown]
# **What would fool you.** Agreement below 100 % is no rounding noise alone. On processors without VNNI the
# fast kernel adds two products in 16 bits, and 255·127 + 255·127 does not fit: the sum *saturates*. ONNX
# Runtime has a slower, exact kernel for such codes, which this suite asks for. Codes of 7 bits cannot
# overflow, whatever the picture, and keep the fast one. Predict the largest sum for each width:

# %% tags=["nbval-check-output"]
for bits in (8, 7):
    largest = 2 * 255 * (2 ** (bits - 1) - 1)
    print(f"{bits} bits: {largest:,} of {2**15 - 1:,}: {'saturates' if largest > 2**15 - 1 else 'fits'}")

# %%
busy = max(record.get("cpu_busy_before", 0) for record in measured)
finished = run.finish(latency=rows, extra={"cpu_busy_before": busy})
print(f"{finished.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, on the machine named in the report.

# %%
committed = results.committed_profile()
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    full = figures.read_table(committed / "latency.csv")
    figures.show(
        figures.latency_bars(full),
        f"The committed medians of the {committed.name} profile at batch 1, one thread",
    )

# %% [markdown]
# ## What you can now measure
#
# Whether a network runs in integers, what that is worth on your machine, and whether its answers are
# still the same.
#
# **Try it.** (1) Set `batches = [1, 8, 64]`: at which batch does int8 pay most? (2) Set `threads` to all your
# cores: what happens to batch 1? (3) Send `per_channel:4` as int8: predict its time before you run.
