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
points: list = ["uniform_per_channel:bits=7"]  # of 02_quantization; all but the first in ONNX Runtime only
batches: list = [1, 16]  # [1, 4096] pictures at once
in_runtimes: list = ["eager", "onnxruntime"]  # and openvino, executorch; inductor with batches of 1 and 64
narrow: str = "channels_fisher:macs=4x mended tuned"  # of 03_pruning, which has it with " int8", too
masked: str = "magnitude_global:sparsity=0.9 tuned"  # of 03_pruning
joined: list = []  # of 06_pipeline, whose run is then in upstream; stages of a pipeline in ONNX Runtime only
threads: list = [1, 2]  # [1, 256] threads a runtime may use
rounds: int = 5  # [1, 1000] visits to each pair of runtime and network, more at the smallest
seconds: float = 4.0  # [1, 36000] for the timing, all rounds together
again: bool = False  # time the smallest batch, fewest threads, once more: do the speed-ups hold?
upstream: list = []  # run folders of 01, 02, 03, and of 04, 05, 06; empty: the first three's defaults
seed: int = 1  # [0, 1000000] of the networks that are timed
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/07_deployment

# %%
import shutil

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pandas as pd
import torch

# %%
from nnc_utils import (
    artifact,
    data,
    figures,
    measure,
    models,
    provenance,
    results,
    runtimes,
)
from nnc_utils.run import start
from nnc_utils.runtimes import qdq

figures.style()
# %%
run = start("07_deployment", globals(), needs=("01_baseline", "02_quantization", "03_pruning"))
baseline, *others = run.upstream
reference = baseline.baseline
if unknown := set(in_runtimes) - set(runtimes.NAMES):
    raise ValueError(f"unknown runtime {', '.join(unknown)}: one of {', '.join(runtimes.NAMES)}")
made, paths = {}, {}
wanted = {"02": points, "03": [narrow, f"{narrow} int8", masked], "04": [], "05": [], "06": joined}
for number, asked in wanted.items():
    found, parts = {}, [other for other in others if other.record.notebook.startswith(number)]
    for part in parts:
        own = {results.label(row): row for row in part.compression}
        own = {name: row for name, row in own.items() if name in part.record.extra.get("files", {})}
        found |= own
        paths |= {name: part.folder / part.record.extra["files"][name] for name in own}
    made |= found
    if unknown := set(asked) - set(found):
        runs = ", ".join(part.run for part in parts) or f"{number}, which is not in upstream,"
        raise ValueError(f"no artifact of {runs} is called {', '.join(unknown)}: it has {', '.join(found)}")

# %%
networks = [made[name] for name in points]
narrow_row, narrow_int8_row, mask_row = (made[name] for name in (narrow, f"{narrow} int8", masked))
cut = [narrow_row, narrow_int8_row, mask_row]
small = [made[name] for name in joined]
files = {made[name].artifact_sha256: path for name, path in paths.items()}
fp32 = artifact.read(baseline.artifact("fp32"))
int8 = artifact.read(files[networks[0].artifact_sha256])
spec = fp32.spec


def to_time(row: results.CompressionRow) -> bool:
    """Decoded to floats in the uncompressed network's shape it would take that network's time."""
    network = artifact.read(files[row.artifact_sha256])
    return network.spec != spec or bool(network.ranges)


chosen = [*networks, *cut, *small]
claims = [row for row in made.values() if row.headline and row not in chosen and to_time(row)]

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
# the codes in the file, layer by layer and channel by channel, with those in the ONNX graph. (ExecuTorch gets the
# same codes, its activations less 128; only its classifier's input gets a new range for each picture.)

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
lost = "layer2.0.quant1"  # what is between two convolutions is no longer rounded
for node in [n for n in model.graph.node if f"{lost}.codes" in (*n.input, *n.output)]:
    model.graph.node.remove(node)
for node in model.graph.node:
    for place, tensor in enumerate(node.input):
        if tensor == lost:
            node.input[place] = f"{lost}.float"
adapter = runtimes.adapter("onnxruntime")
broken = adapter.OnnxRuntimeSession(model.SerializeToString(), "int8", 1).integer_operators
print("without one pair:", {kind: broken[kind] for kind in ("conv", "add", "linear")})
try:
    qdq.check_integer(spec, broken)
except RuntimeError as error:
    print("refused:", str(error).partition(" (")[0])

# %% [markdown]
# ## Two ways to leave weights away
#
# In [03_pruning](03_pruning.ipynb) whole **channels** were removed, and most single weights set to zero by a **mask**.
# Both are files like any other. *Predict* for each how many bytes and how many multiplications are left.

# %%
shown = ["method", "point", "artifact_bytes", "size_ratio", "macs", "nonzeros", "accuracy"]
pd.DataFrame([row.model_dump() for row in (reference, narrow_row, narrow_int8_row, mask_row)])[shown]

# %% [markdown]
# **What it means.** Channels count twice in a convolution, in its inputs and in its outputs. The mask leaves all
# multiplications where they were: a zero is multiplied like any other number.
#
# ## How much faster will it be?
#
# *Predict*: where the processor has dot-product instructions (VNNI), one of them multiplies four times as many
# 8-bit numbers as one in fp32 does; without, three instructions do it, which is 4/3 times as many. A network
# that does not fit the caches waits for its weights, of which int8 has a quarter of the bytes. And nothing changes in
# what the binding between Python and the runtime costs: an **identity** network, one operator that does
# nothing, shows that.
#
# Each runtime lives in a process of its own, waiting while another is timed. A round visits every pair of runtime
# and network at one batch, one after the other, so that a slow minute of the machine hits all alike. The medians
# are over all rounds; a speed-up is the median of the ratios *within* a round, in which both were timed a moment
# apart. It need not be the ratio of the two medians beside it. Each visit begins with a warm-up, a longer one with
# several threads: woken up, they share one core until the operating system has spread them.

# %%
def requested(row, precision: str, names: list[str]) -> list[dict]:
    """A network in these runtimes, as far as they have the precision; what is missing is said later."""
    return [
        {"path": files[row.artifact_sha256], "runtime": name, "precision": precision}
        for name in names
        if runtimes.available(name) or precision in runtimes.adapter(name).PRECISIONS
    ]


files[reference.artifact_sha256] = baseline.artifact("fp32")
several = [name for name in in_runtimes if name != "inductor"]  # it compiles each network for half a minute
requests = requested(reference, "fp32", in_runtimes) + requested(networks[0], "int8", in_runtimes)
requests += requested(reference, "bf16", [name for name in in_runtimes if name == "openvino"])
for row in networks[1:]:
    requests += requested(row, "int8", ["onnxruntime"])
requests += requested(narrow_row, "fp32", several) + requested(narrow_int8_row, "int8", several)
requests += requested(narrow_int8_row, "s8s8", ["onnxruntime"])
requests += requested(mask_row, "fp32", ["onnxruntime"])
for row in (*small, *claims):
    precision = "int8" if artifact.read(files[row.artifact_sha256]).ranges else "fp32"
    whole = row in small and not row.control.startswith(results.AFTER)  # a pipeline, or a rival of one
    requests += requested(row, precision, several if whole else ["onnxruntime"])

# %%
known = {row.artifact_sha256: row for row in (reference, *networks, *cut, *small, *claims)}
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
    again=again,
)
missing = {f"{m['runtime']} {m['precision']}": m["why"] for m in measured if "why" in m}
for name, why in missing.items():
    print(f"{name}: {why}")
rows = results.latency_rows(measured, [*known.values()], reference_sha256=reference.artifact_sha256)
table = pd.DataFrame(rows).reindex(columns=results.LatencyRow.columns())
columns = ["runtime", "precision", "method", "point", "batch", "threads", "p50_ms", "p90_ms", "throughput"]
first = table[(table["control"] != results.AGAIN) & table["p50_ms"].notna()]
first[columns].round(3)

# %%
figures.show(
    figures.latency_bars(table, threads=min(threads)),
    f"Median milliseconds for one picture with threads={min(threads)}, by runtime and precision",
)

# %% [markdown]
# ## Which speed-up do you quote?
#
# The prediction is about arithmetic: times fewer multiplications, times what the processor's instructions give for the
# precision. Look at both ratios for each network in fewer bits or with fewer channels.

# %%
vnni = {"avx512_vnni", "avx_vnni", "i8mm"} & set(provenance.hardware()["flags"])
by_precision = {"fp32": 1, "s8s8": 1, "bf16": 2, "int8": 4 if vnni else 4 / 3}
fewer = first["artifact_sha256"].map({sha256: reference.macs / row.macs for sha256, row in known.items()})
ratios = first.assign(predicted=fewer * first["precision"].map(by_precision))
ratios = ratios[(ratios["predicted"] > 1) | (ratios["precision"] == "s8s8")]
columns = ["runtime", "precision", "method", "point", "batch", "threads", "p50_ms"]
ratios = ratios[[*columns, "speedup_eager_fp32", "speedup_best_fp32", "predicted"]].copy()
ratios["measured / predicted"] = ratios["speedup_best_fp32"] / ratios["predicted"]
ratios.round(2)

# %% [markdown]
# **What it means.** The gain over eager contains what *fusing* gave, before any compression; the gain
# over the best fp32 runtime is what *int8* and the choice of the runtime gave together: for int8 alone, compare the fp32 and the
# int8 row of one runtime. A network with fewer channels has what these gave in both.
#
# **What would fool you.** Quoting the larger ratio. Timing fp32 with one thread and int8 with two. A bf16
# kernel called "fp32". An int8 graph on a processor without the instructions for it.
#
# ## What does signed int8 cost, and what does a mask gain?
#
# The same network with *signed* activations (`s8s8`) has the same codes but for a shift by 128. x86's
# instructions multiply unsigned by signed numbers; ONNX Runtime does signed by signed without them. Where does
# the time of one picture go? The runtime's own profile, operator by operator. Predict: in which
# line is the difference?

# %%
image = images[:1].numpy()
profiles = {}
for label, file, precision in (
    ("fp32", baseline.artifact("fp32"), "fp32"),
    ("fp32, masked", files[mask_row.artifact_sha256], "fp32"),
    ("fp32, narrow", files[narrow_row.artifact_sha256], "fp32"),
    ("int8, narrow (u8s8)", files[narrow_int8_row.artifact_sha256], "int8"),
    ("int8, narrow (s8s8)", files[narrow_int8_row.artifact_sha256], "s8s8"),
):
    session = runtimes.prepare("onnxruntime", artifact.read(file), precision, 1)
    operators = session.profile(image, runs=20)
    profiles[label] = {name: entry["ms"] for name, entry in operators.items()}
by_operator = pd.DataFrame(profiles).fillna(0.0)
convolutions = by_operator[by_operator.index.str.contains("Conv")].sum()
by_operator.loc["all operators"] = by_operator.sum()
for label in profiles:
    total = by_operator.loc["all operators", label]
    share, against = convolutions[label] / total, total / by_operator.loc["all operators", "fp32"]
    print(f"{label}: {share:.0%} of the time in convolutions, {against:.2f} times as long as fp32")
by_operator.sort_values("fp32", ascending=False).round(4)

# %% [markdown]
# **What it means.** Where `s8s8` loses, it loses in the convolutions: no instruction, no speed. (A profile slows the
# network down and is taken once: it tells shares. Compare its lines with each other, not with the medians above.)
#
# Does the mask gain anything? A kernel that does not look for zeros multiplies them like any other number. The
# interleaved medians decide; *predict* their ratio.

# %%
columns = ["artifact_sha256", "batch", "threads", "p50_ms"]
plain = first[(first["runtime"] == "onnxruntime") & (first["precision"] == "fp32")][columns]
pair = [plain[plain["artifact_sha256"] == row.artifact_sha256] for row in (mask_row, reference)]
both = pair[0].merge(pair[1], on=["batch", "threads"], suffixes=(" masked", " dense"))
both["masked / dense"] = both["p50_ms masked"] / both["p50_ms dense"]
both[["batch", "threads", "p50_ms masked", "p50_ms dense", "masked / dense"]].round(3)

# %% [markdown]
#
# ## How do multiplications, bytes and milliseconds disagree?
#
# Three numbers are quoted for "smaller": multiplications (MACs), bytes of the file, milliseconds. If one
# stood for another, the points would lie on a line. Predict the correlation of their logarithms.

# %%
one = first[(first["batch"] == 1) & (first["threads"] == min(threads)) & (first["control"] != "identity")]
one = one.assign(
    macs=[known[sha256].macs for sha256 in one["artifact_sha256"]],
    bytes=[known[sha256].artifact_bytes for sha256 in one["artifact_sha256"]],
)
correlation = np.log(one[["macs", "bytes", "p50_ms"]].astype(float)).corr()
figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for axes, column, label in zip(panels, ("macs", "bytes"), ("MACs", "bytes of the file"), strict=True):
    for number, (runtime, rows_of) in enumerate(one.groupby("runtime", sort=False)):
        marker = figures.MARKERS[number]
        axes.scatter(rows_of[column], rows_of["p50_ms"], marker=marker, label=figures.name(runtime))
    r = correlation.loc[column, "p50_ms"]
    title = f"{one['artifact_sha256'].nunique()} networks, correlation of the logarithms {r:.2f}"
    axes.set(xscale="log", yscale="log", xlabel=label, title=title)
panels[0].set_ylabel("median milliseconds a picture")
panels[1].legend(fontsize=9)
figures.show(figure, "Milliseconds against MACs and against bytes, for every network in every runtime")
correlation.round(2)

# %% [markdown]
# **What it means.** Points above each other have the same MACs, or the same bytes, and another time: the runtime and
# its kernels decide. A ratio of MACs is never a speed-up.
#
# ## Which networks are worth having?
#
# A network in a runtime is worth having if none is both faster and better: those are on the **frontier**.
# Accuracy is that of the code that was timed, or eager's where the runtime was seen to compute the same.

# %%
figures.show(
    figures.frontier(table, threads=min(threads)),
    "Test accuracy against median milliseconds: a colour a technique, a marker a runtime",
)

# %% [markdown]
# ## What fits a device?
#
# A microcontroller has a flash memory of about 1 MB and a quarter of that for what flows between layers; an
# app may weigh some megabytes; a server counts milliseconds. Measured are bytes of what the runtime loads,
# milliseconds on *this* processor, and memory: the most that a process takes which does nothing else, less what one
# with the runtime's identity network takes, which is Python, its libraries and the runtime. What flows is computed from
# the Spec: the tensors that some step still needs, together, a byte for each number in int8. Of the
# runtimes here ONNX Runtime and ExecuTorch run on phones; none runs on a microcontroller, where the question is
# only whether the numbers would fit.

# %%
DEVICES = {  # what each allows: bytes to load, bytes that flow, megabytes beyond the runtime's, milliseconds
    "microcontroller": {"runtime_bytes": 1_000_000, "flowing_bytes": 256_000},
    "phone app": {"runtime_bytes": 15_000_000, "memory_mb": 100, "p50_ms": 20},
    "small server": {"runtime_bytes": 1_000_000_000, "memory_mb": 1_000, "p50_ms": 1},
}
RUNS_ON = {"phone app": ("onnxruntime", "executorch")}  # others everywhere


def flowing(spec: models.Spec, nbytes: int) -> int:
    """Bytes of the tensors that are needed at once, at most."""
    order, sizes = qdq.steps(spec), {"quant_input": spec.channels * spec.size**2}
    last = {name: number for number, step in enumerate(order) for name in step.inputs}
    most = 0
    pooled = {
        "max_pool": lambda size: size // 4,
        "average_pool": lambda size: models.layers(spec)[-1].in_channels,
    }
    for number, step in enumerate(order):
        layer, shrink = step.layer, pooled.get(step.kind, lambda size: size)
        out = layer.out_channels * layer.size_out**2 if layer else shrink(sizes[step.inputs[0]])
        sizes[step.output] = out
        alive = [size for name, size in sizes.items() if last.get(name, number) >= number]
        most = max(most, sum(alive))
    return nbytes * most


# %%
specs = {sha256: artifact.read(files[sha256]).spec for sha256 in one["artifact_sha256"].unique()}
sizes = {"int8": 1, "s8s8": 1, "bf16": 2, "fp32": 4}
alone = first[first["control"] == "identity"].groupby("runtime")["peak_rss_mb"].max()
fits = one.assign(
    memory_mb=(one["peak_rss_mb"] - one["runtime"].map(alone)).clip(lower=0),
    flowing_bytes=[flowing(specs[s], sizes[p]) for s, p in zip(one["artifact_sha256"], one["precision"])],
)
for device, limits in DEVICES.items():
    within = pd.concat([fits[column] <= limit for column, limit in limits.items()], axis=1).all(axis=1)
    within &= fits["runtime"].isin(RUNS_ON.get(device, in_runtimes))
    fits[device] = within.map({True: "fits", False: "–"})
columns = ["runtime", "precision", "method", "point", "runtime_bytes", "memory_mb", "load_ms", "p50_ms"]
fits[[*columns, "flowing_bytes", *DEVICES]].round(2)

# %% [markdown]
# **What would fool you.** The file's bytes: an entropy-coded artifact is decoded before it runs, and then takes
# `runtime_bytes`. Inductor's package holds the weights once for each batch that it was compiled for. And these are
# this processor's milliseconds: export the network (`python -m nnc_utils.export`) and time it on the device.
#
# ## Did the answers stay the same?
#
# The class that the runtime gives is compared with the class that the artifact gives in eager PyTorch,
# on every test picture: **agreement**. Accuracy below is the runtime's own, by the code path that was
# timed. (Large test sets: where a runtime computes in fp32, or from the same codes in `s8s8`, the first thousand
# pictures are compared, and if they agree the accuracy is the artifact's.)

# %%
one[["runtime", "precision", "method", "point", "accuracy", "agreement", "stored_codes", "runtime_bytes"]]

# %% [markdown]
# **What would fool you.** Agreement a few tenths of a percent below 100 is rounding; much less can be *saturation*. On x86 processors without
# VNNI fast kernels add two products in 16 bits, and 255·127 + 255·127 does not fit. ONNX
# Runtime has a slower, exact kernel for such codes, which this suite asks for. Codes of 7 bits cannot
# overflow, whatever the picture, and keep the fast one. Predict the largest sum for each width:

# %% tags=["nbval-check-output"]
for bits in (8, 7):
    largest = 2 * 255 * (2 ** (bits - 1) - 1)
    print(f"{bits} bits: {largest:,} of {2**15 - 1:,}: {'saturates' if largest > 2**15 - 1 else 'fits'}")

# %% [markdown]
# ## Would you measure the same again?
#
# A speed-up that holds is measured again, in new processes, with the same result. *Predict* which of the two ratios
# holds better: is eager fp32 the steadier measure, or the fastest runtime?

# %%
print(results.holding(table) if again else "timed once: set again=True")

# %%
busy = max(record.get("cpu_busy_before", 0) for record in measured)
fewest = min(record["samples"] for record in measured if "samples" in record)
extra = {"cpu_busy_before": busy, "fewest_samples": fewest, "missing": missing}
finished = run.finish(latency=rows, extra=extra)
print(f"{finished.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, on the machine named in the report.

# %%
committed = results.committed_profile(timed=True)
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    full = figures.read_table(committed / "latency.csv")
    figures.show(
        figures.latency_bars(full),
        f"The committed medians of the {committed.name} profile at batch 1, one thread",
    )
    figures.show(
        figures.frontier(full),
        f"The committed results of the {committed.name} profile: accuracy against milliseconds",
    )

# %% [markdown]
# ## What you can now measure
#
# Whether a network runs in integers, what that is worth on your machine, and whether its answers are
# still the same.
#
# **Try it.** (1) Set `batches = [1, 8, 64]`: at which batch does int8 pay most? (2) Set `threads` to all your
# cores: what happens to batch 1? (3) Add `openvino` and `executorch` to `in_runtimes`. (4) Make a point of 03 with
# `macs=8x` and name it in `narrow`: predict its milliseconds in int8 before you run. (5) Export a network and classify a picture with it.
