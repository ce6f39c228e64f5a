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
# # 00 · The usual recipe: what is left of it when it is measured
#
# This is how compressing a ResNet-18 is commonly explained. The figures are **claims** as they are published,
# read here as those of the whole network after the step; none of them was measured:
#
# | step | what the recipe says | claimed |
# |---|---|---|
# | 1 | quantize the network to int8 | 4× smaller, 2–3× faster on a GPU |
# | 2 | prune the quantized network, each layer by the norm of its filters | 8× smaller |
# | 3 | distill a ResNet-50 into a ResNet-18, by the divergence of their outputs | 10× smaller, "high accuracy" |
#
# We rewrite it, run it, and look at what each step leaves: bytes of a file, milliseconds, accuracy. Lines that
# fail are run all the same, and their messages shown: you will meet them again. Each is mended in one step,
# and the notebook that teaches that step is named. You need nothing but Python and a rough idea of a
# convolution; with the defaults it runs on scikit-learn's digits in under a minute.

# %% tags=["parameters"]
amount: float = 0.65  # [0.05, 0.9] share of each layer's filters that step 2 gives up
width: float = 0.25  # [0.05, 1] of a student that is small, as a factor on ResNet-18's channels
teacher_epochs: float = 1.5  # [0.001, 1000] of the ResNet-50's training
epochs: float = 2.0  # [0.001, 1000] of the training of each other network
batch_size: int = 32  # [2, 4096] pictures a step
learning_rate: float = 0.01  # [0.00001, 1] peak of each training
calibration_images: int = 256  # [1, 60000] training pictures that show the ranges of activations
checked_images: int = 500  # [20, 60000] validation pictures, at most, that accuracies are of
seconds: float = 1.5  # [0.1, 3600] for each of the three timings
upstream: list = []  # run folder of 01_baseline; empty: that of its defaults
seed: int = 1  # [0, 1000000] of new weights, the order and the augmentation
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/00_the_usual_recipe

# %%
import copy
import json
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.ao import quantization
from torch.nn import functional
from torch.nn.utils import prune

# %%
from nnc_utils import artifact, data, evaluation, figures, models, results, runtimes, training
from nnc_utils.distillation import teaching
from nnc_utils.pruning import channels, structured
from nnc_utils.quantization import activations, uniform
from nnc_utils.run import start

figures.style()
run = start("00_the_usual_recipe", globals(), needs=("01_baseline",))
[baseline] = run.upstream
model = artifact.load(baseline.artifact("fp32")).eval()
options = {"learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
options["augment"] = baseline.record.parameters["augment"]
spec = model.spec
pictures = data.load(baseline.baseline.dataset, size=spec.size)
some = data.Split(pictures.train.images[:calibration_images], pictures.train.labels[:calibration_images])
seen = pictures.normalize(some.images)
check = pictures.validation
check = data.Split(check.images[:checked_images], check.labels[:checked_images])
print(
    f"{baseline.baseline.model} on {pictures.name}; accuracies are of {len(check.labels)} validation pictures"
)

# %% [markdown]
# Three helpers. The first runs a line of the recipe and keeps what a reader would see; the second asks the file
# system; the third takes the median time of one picture, all networks in turn so that a slow moment hits all.

# %%
failures = []


def provoke(step: int, tried: str, action: Callable[[], object]) -> None:
    """Run a line of the recipe, and keep the message with which it fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
            said = next(
                (f"only a warning: {w.message}" for w in caught if w.category is UserWarning), "no error"
            )
        except Exception as error:  # whatever it is: it is what a reader would see
            said = f"{type(error).__name__}: {error}"
    said = textwrap.shorten(said, 230, placeholder=" ...")
    failures.append({"step": step, "tried": tried, "says": said})
    print(f">>> {tried}\n{textwrap.fill(said, 100)}\n")


def file_bytes(network: nn.Module, name: str) -> int:
    """The length of the file that torch.save makes of a network's state_dict."""
    path = run.path(f"{name}.pt")
    torch.save(network.state_dict(), path)
    nbytes = path.stat().st_size
    path.unlink()
    return nbytes


# %%
one = pictures.normalize(check.images[:1])


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call on one thread, all calls in turn."""
    taken = {name: [] for name in calls}
    threads, end = torch.get_num_threads(), time.perf_counter() + seconds
    torch.set_num_threads(1)
    with torch.inference_mode():
        while time.perf_counter() < end or min(map(len, taken.values())) < 8:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                taken[name].append(1e3 * (time.perf_counter() - begin))
    torch.set_num_threads(threads)
    return {name: statistics.median(times[3:]) for name, times in taken.items()}


def accuracy(predict: Callable[[torch.Tensor], object]) -> float:
    """Percent of the validation pictures that are right."""
    with torch.inference_mode():
        said = [np.asarray(predict(pictures.normalize(x))) for x in check.images.split(64)]
    return evaluation.accuracy(np.concatenate(said).argmax(1), check.labels)


# %% [markdown]
# ## Step 1 · "Quantize to int8": on which backend?
#
# An integer stands for a float by a scale: 8 bits instead of 32. PyTorch has engines that compute with such
# integers. The recipe names one, `qint8`. That is the name of a *data type*.

# %% tags=["nbval-check-output"]
provoke(1, "engine = 'qint8'", lambda: setattr(torch.backends.quantized, "engine", "qint8"))
provoke(1, "get_default_qconfig('qint8')", lambda: quantization.get_default_qconfig("qint8"))

# %% [markdown]
# The second message lists the real names. **The step that mends it:** ask which of them this machine has. What a
# backend is, and which is fast where, is in [07_deployment](07_deployment.ipynb).

# %%
engine = next(e for e in ("x86", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines)
torch.backends.quantized.engine = engine
qconfig = quantization.get_default_qconfig(engine)
print("engines here:", torch.backends.quantized.supported_engines, "taken:", engine)

# %% [markdown]
# ## What shall be fused, and prepared?
#
# Batch-norm is folded into the convolution before it, then observers are put in that watch the ranges of the
# activations, then everything is converted. *Predict*: which of these lines raise an error, and which of them
# does nothing and says little?

# %% tags=["nbval-check-output"]
draft = copy.deepcopy(model)
provoke(1, "fuse_modules(model)", lambda: quantization.fuse_modules(draft))
provoke(1, "fuse_modules(model, ['layer1'])", lambda: quantization.fuse_modules(draft, ["layer1"]))
draft.train()  # as training leaves it
provoke(1, "fuse_modules(..., ['conv1', 'bn1'])", lambda: quantization.fuse_modules(draft, ["conv1", "bn1"]))
draft.eval()
provoke(1, "prepare(model)", lambda: quantization.prepare(draft, inplace=True))
provoke(1, "convert(model)", lambda: quantization.convert(draft, inplace=True))
integer = sum(isinstance(layer, torch.ao.nn.quantized.Conv2d) for layer in draft.modules())
print(f"convolutions of {len(models.layers(spec)) - 1} that became integers: {integer}")

# %% [markdown]
# `fuse_modules` wants names, of *layers*, in eval mode; `prepare` without a `qconfig` puts nothing in, and `convert`
# then converts nothing: the network is fp32, and it works. **The step that mends it:** the pairs follow from the
# [Spec](../nnc_utils/models.py). Why folding is exact is shown in [07_deployment](07_deployment.ipynb).

# %%
pairs = [[layer.name, layer.batch_norm] for layer in models.layers(spec) if layer.batch_norm]


def converted(network: nn.Module, stubs: bool = False) -> nn.Module:
    """Fused, prepared, shown some pictures, and converted."""
    network = copy.deepcopy(network).eval()
    for layer in network.modules():
        if isinstance(layer, models.PickingConv2d):  # of very thin networks; the same numbers
            layer.__class__ = nn.Conv2d
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all of this is deprecated
        network = quantization.fuse_modules(network, pairs)
        network = quantization.QuantWrapper(network) if stubs else network
        network.qconfig = qconfig
        network = quantization.prepare(network)
        with torch.inference_mode():
            network(seen)
        return quantization.convert(network)


print(f"{len(pairs)} pairs, such as {pairs[:2]}")

# %% [markdown]
# ## Where do integers begin, and what adds them?
#
# A converted convolution takes integers: somebody has to make them of the picture (a **stub** at the entrance,
# and one at the exit). And a residual network *adds*: `out + inputs` is no module that could be converted.

# %% tags=["nbval-check-output"]
provoke(1, "the converted network, a picture", lambda: converted(model)(one))
provoke(1, "the same between two stubs", lambda: converted(model, stubs=True)(one))

# %% [markdown]
# "QuantizedCPU" has no kernel for the plain `+`. **The step that mends it:** the sum becomes a module of its own,
# with a range of its own. [02_quantization](02_quantization.ipynb) teaches where ranges are needed and how they are
# chosen: here at both inputs and the output of every addition.


# %%
class AddingBlock(models.Block):
    """The residual block, its sum in a module that can be converted."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = inputs
        for i in range(1, self.convolutions + 1):
            out = self.relu(out) if i > 1 else out
            out = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(out))
        aside = self.downsample(inputs) if self.connection == "projection" else inputs
        return self.relu(self.sum.add(out, aside))


adding = copy.deepcopy(model)
for name, _ in models.named_blocks(spec):
    block = adding.get_submodule(name)
    block.__class__, block.sum = AddingBlock, torch.ao.nn.quantized.FloatFunctional()
published_int8 = converted(adding, stubs=True)
print("logits of a picture:", published_int8(one).shape)

# %% [markdown]
# ## Is it four times smaller, and faster?
#
# *Predict*: the weights take 8 bits instead of 32. And the time? An integer instruction does up to four times as
# many multiplications; but the claim is about a GPU.

# %%
published = {1: {"bytes": file_bytes(published_int8, "int8"), "accuracy": accuracy(published_int8)}}
fp32 = {"bytes": file_bytes(model, "fp32"), "accuracy": accuracy(model)}
print(f"times smaller: predicted {32 / 8:g}, measured {fp32['bytes'] / published[1]['bytes']:.2f}")
print(f"accuracy {fp32['accuracy']:.1f} % before, {published[1]['accuracy']:.1f} % after")
gpu = {"as published": "GPU: not measured here", "done right": "GPU: not measured here"}
if torch.cuda.is_available():
    here = one.to("cuda")
    provoke(1, "the int8 network on the GPU", lambda: copy.deepcopy(published_int8).to("cuda")(here))
    gpu["as published"] = f"GPU: {failures[-1]['says']}"
else:
    print(gpu["as published"])

# %% [markdown]
# **What it means.** Once it runs, the claim about bytes holds. The claim about speed names a GPU, and these kernels are
# the processor's: what they give there stands below.
#
# ### Done right: integers that a runtime computes with
#
# The same idea in this course's form: codes and scales in a file, ranges at every place where a runtime stores a
# tensor; then an integer runtime that is *asked* how much of it really runs in integers, and refused otherwise.
# [02_quantization](02_quantization.ipynb) builds the codes, [07_deployment](07_deployment.ipynb) the runtimes.

# %%
about = {"mean": pictures.mean, "std": pictures.std, "classes": pictures.classes}


def int8_file(network: nn.Module, name: str) -> artifact.Artifact:
    """A network in 8 bits a weight and 8 bits an activation, as it comes back from its file."""
    network = uniform.quantize_network(network, bits=8, per_channel=True)
    path = run.path(f"artifacts/{name}.safetensors")
    artifact.save(activations.calibrate(network, seen), path, **about)
    return artifact.read(path)


def session(file: artifact.Artifact, precision: str) -> Callable[[torch.Tensor], np.ndarray]:
    """A prediction in ONNX Runtime; in int8 it raises if anything would run in floats."""
    ready = runtimes.prepare("onnxruntime", file, precision, 1)
    return lambda images: ready.predict(images.numpy())


# %%
right = {1: int8_file(model, "int8")}
ready = {"fp32": session(artifact.read(baseline.artifact("fp32")), "fp32"), 1: session(right[1], "int8")}
times = milliseconds(
    {
        "fp32, eager PyTorch": lambda: model(one),
        "int8, eager PyTorch": lambda: published_int8(one),
        "fp32, ONNX Runtime": lambda: ready["fp32"](one),
        "int8, ONNX Runtime": lambda: ready[1](one),
    }
)
first = pd.DataFrame({"ms a picture": times})
first["times fp32 eager"] = times["fp32, eager PyTorch"] / first["ms a picture"]
first["times fp32 ONNX Runtime"] = times["fp32, ONNX Runtime"] / first["ms a picture"]
first.round(2)

# %% [markdown]
# **What would fool you.** Part of a speed-up against eager PyTorch is what a good runtime gives to *fp32*. The
# last column is the honest one.
#
# ## Step 2 · "Prune the quantized network": which weight?
#
# For each layer, the filters with the smallest norm shall go. The recipe goes through `layer1` to `layer4`; those
# are *stages*, boxes of blocks of layers. And the weights of an int8 network are no parameters. *Predict*: what
# does each line say?

# %% tags=["nbval-check-output"]
cut = {"name": "weight", "amount": amount, "n": 2, "dim": 0}
provoke(2, "ln_structured(model.layer1, ...)", lambda: prune.ln_structured(model.layer1, **cut))
layer = published_int8.module.layer1[0].conv2
provoke(2, "ln_structured(int8.layer1[0].conv2, ...)", lambda: prune.ln_structured(layer, **cut))
provoke(2, "the norm of its integers", lambda: layer.weight().norm(2))
fresh, state = models.build(spec), published_int8.module.state_dict()
provoke(2, "float.load_state_dict(int8.state_dict())", lambda: fresh.load_state_dict(state))
provoke(2, "the same with strict=False", lambda: fresh.load_state_dict(state, strict=False))

# %% [markdown]
# There is no way on from the quantized network with these tools, and none back into a float one by its state_dict: who
# "prunes the quantized model" has gone back to fp32, and step 1 is lost. **The step that mends it:** cut first, quantize last, and name layers, which the Spec lists.
# [03_pruning](03_pruning.ipynb) teaches both.
#
# ## Is a masked network smaller?
#
# With a share $a$ of the filters gone, a convolution has $1-a$ of its outputs and $1-a$ of its inputs. *Predict*
# the file from that; then mask as the recipe does, and ask the file system.

# %%
masked = copy.deepcopy(model)
for layer in models.layers(spec)[:-1]:
    prune.ln_structured(masked.get_submodule(layer.name), **cut)
with_masks = file_bytes(masked, "masked")
for layer in models.layers(spec)[:-1]:
    prune.remove(masked.get_submodule(layer.name), "weight")
published[2] = {"bytes": file_bytes(masked, "removed"), "accuracy": accuracy(masked)}
zeros = sum(int((masked.get_submodule(x.name).weight == 0).sum()) for x in models.layers(spec))
print(f"zeros among the weights: {zeros / models.parameters(spec):.0%}")
print(f"times smaller: predicted {1 / (1 - amount) ** 2:.1f},", end=" ")
print(f"measured {fp32['bytes'] / with_masks:.2f} with the masks,", end=" ")
print(f"{fp32['bytes'] / published[2]['bytes']:.2f} after prune.remove")
print(f"accuracy {fp32['accuracy']:.1f} % before, {published[2]['accuracy']:.1f} % after")

# %% [markdown]
# **What it means.** While the masks are there, the file holds every weight *and* every mask. `prune.remove` removes the
# masks, not the filters: a zero takes four bytes like any other number. The recipe trains nothing at this point.
#
# ### Done right: channels that are gone
#
# A channel is taken out of *all* layers that write and read it; what a residual connection adds has to shrink on
# both sides. Out comes a narrower network, an ordinary one. It is trained a little, and quantized *after* that.

# %%
budget = models.macs(spec) * (1 - amount) ** 2
score = channels.scores(model, "l2")
narrow = structured.remove_channels(model, channels.within_macs(spec, score, macs=budget, everywhere=True))
before = accuracy(narrow)
training.fit(narrow, pictures, epochs=epochs, **options)
narrow_bytes = file_bytes(narrow, "narrow")
right[2] = int8_file(narrow, "narrow_int8")
ready[2] = session(right[2], "int8")
print(f"accuracy {before:.1f} % when cut, {accuracy(narrow):.1f} % after training")
print(f"times smaller: {fp32['bytes'] / narrow_bytes:.1f} in fp32,", end=" ")
print(f"{fp32['bytes'] / right[2].nbytes:.1f} in int8")

# %% [markdown]
# Does a mask make the file smaller, or the network faster? *Predict* the height of each bar, as a share of the
# first one.

# %%
steps = {"fp32": model, "masked": masked, "channels removed": narrow}
times |= milliseconds(
    {f"{name}, eager": lambda network=network: network(one) for name, network in steps.items()}
)
megabytes = [fp32["bytes"], with_masks, published[2]["bytes"], narrow_bytes]
figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 3.2))
names = ["fp32", "with masks", "after\nprune.remove", "channels\nremoved"]
bars = left.bar(names, [size / 1e6 for size in megabytes], color=["C7", "C1", "C1", "C0"])
left.bar_label(bars, fmt="%.1f")
left.set(ylabel="megabytes of the file", title="Is the file smaller?")
bars = middle.bar(["fp32", "masked", "channels\nremoved"], [times[f"{n}, eager"] for n in steps])
for bar, colour in zip(bars, ("C7", "C1", "C0"), strict=True):
    bar.set_color(colour)
middle.bar_label(bars, fmt="%.2f")
left.margins(y=0.15)
middle.margins(y=0.15)
middle.set(ylabel="milliseconds a picture, eager", title="Is the network faster?")
figures.show(
    figure, "Megabytes and milliseconds: the masked network has those of fp32, the narrow one has fewer"
)

# %% [markdown]
# **What would fool you.** "Sparsity" is a share of zeros, no share of bytes, and no share of milliseconds. And a
# filter that is masked is not even gone for the network: batch-norm still adds its shift to that channel.
#
# ## Step 3 · "Distill": what is left of the first two steps?
#
# A ResNet-50 teaches a *new* ResNet-18, by the divergence of their softened outputs alone. *Predict*, before
# anything is trained, how large the student's file will be: four bytes times the parameters of a ResNet-18.

# %%
torch.manual_seed(seed)
shape = {key: getattr(spec, key) for key in ("channels", "size", "classes", "stem")}
large = models.build(models.resnet(50, **shape))
training.fit(large, pictures, epochs=teacher_epochs, **options)
T = 4.0


def by_divergence_alone(student, images, labels):
    """The recipe's loss. `labels` stands in the signature, and nowhere else."""
    with torch.no_grad():
        aim = (large(images).float() / T).softmax(1)
    return T**2 * functional.kl_div((student(images).float() / T).log_softmax(1), aim, reduction="batchmean")


student = models.build(spec)
large.to(training.default_device())
training.fit(student, pictures, epochs=epochs, loss=by_divergence_alone, **options)
large.cpu()
published[3] = {"bytes": file_bytes(student, "distilled"), "accuracy": accuracy(student)}

# %%
kinds = {str(p.dtype) for p in student.parameters()}
zeros = sum(int((p == 0).sum()) for p in student.parameters() if p.ndim > 1)
print(f"bytes: predicted {4 * models.parameters(spec):,}, measured {published[3]['bytes']:,}")
print(f"times smaller than at the start: {fp32['bytes'] / published[3]['bytes']:.2f}")
print(f"and smaller than the ResNet-50: {models.parameters(large.spec) / models.parameters(spec):.2f}")
print(f"what it keeps of step 1: weights are {', '.join(kinds)}; of step 2: {zeros} weights are zero")

# %% [markdown]
# **What it means.** The "distilled" network is the one from the start, trained anew: nothing of the first two steps is in
# it. Not even against its teacher is it as small as claimed.
#
# ### A loss without labels
#
# Whoever learns from the divergence alone never hears that the teacher is wrong. On the training pictures which the
# teacher gets wrong, what does the student say: the teacher's class or the label? *Predict* the larger bar.

# %%
probe = data.Split(pictures.train.images[:400], pictures.train.labels[:400])
said = {}
for name, network in (("teacher", large), ("student", student)):
    said[name] = torch.as_tensor(evaluation.predict(network, probe, normalize=pictures.normalize)).long()
wrong = said["teacher"] != probe.labels
answers = {
    "the teacher's class": said["student"] == said["teacher"],
    "the label": said["student"] == probe.labels,
}
answers["another"] = ~(answers["the teacher's class"] | answers["the label"])
shares = {name: 100 * int((hit & wrong).sum()) / max(1, int(wrong.sum())) for name, hit in answers.items()}
figure, axes = plt.subplots(figsize=(6, 2.4))
axes.bar_label(axes.barh(list(shares), list(shares.values()), color=["C1", "C0", "C7"]), fmt=" %.0f %%")
axes.set(
    xlabel="percent",
    title=f"What the student says where the teacher is wrong ({int(wrong.sum())} pictures)",
)
axes.invert_yaxis()
axes.margins(x=0.12)
figures.show(figure, "What the student says of pictures that its teacher gets wrong")

# %%
own, theirs = accuracy(large), published[3]["accuracy"]
print(f"right on validation: the teacher {own:.1f} %, its student {theirs:.1f} %,", end=" ")
print(f"the ResNet-18 of the start, which had labels, {fp32['accuracy']:.1f} %")

# %% [markdown]
# ### Done right: a student that is small, taught with labels
#
# The student is a *thin* ResNet-18, its teacher the network we want to compress, the labels have their share of the
# loss, and it is quantized at the end. [04_distillation](04_distillation.ipynb) teaches it, and asks what this one
# does not: would the student have been as good alone?

# %%
torch.manual_seed(seed)
thin = models.build(models.resnet(18, width=width, **shape))
loss = teaching.taught_by(copy.deepcopy(model), teaching.Recipe(temperature=T, alpha=0.5), thin.spec)
training.fit(thin, pictures, epochs=epochs, loss=loss, **options)
right[3] = int8_file(thin, "thin_int8")
ready[3] = session(right[3], "int8")
predicted = models.parameters(spec) / models.parameters(thin.spec) * 4
print(f"times smaller: predicted {predicted:.0f}, measured {fp32['bytes'] / right[3].nbytes:.0f}")

# %% [markdown]
# ## The table: claimed, as published, done right
#
# Everything once more, all networks in turn, on one thread. "As published" is the recipe after its failing lines
# were mended. Of the networks done right, accuracy is that of the integer runtime, from the file.

# %%
calls = {"eager": lambda: model(one), "fp32": lambda: ready["fp32"](one)}
for step, network in ((1, published_int8), (2, masked), (3, student)):
    calls[f"published {step}"] = lambda network=network: network(one)
    calls[f"right {step}"] = lambda step=step: ready[step](one)
took = milliseconds(calls)
best = min(took["eager"], took["fp32"])


def measured(nbytes: int, ms: float, percent: float) -> dict[str, str]:
    """The figures of one network against fp32."""
    return {
        "times smaller": f"{fp32['bytes'] / nbytes:.2f}×",
        "times faster than fp32 in eager PyTorch": f"{took['eager'] / ms:.2f}×",
        "times faster than the fastest fp32 here": f"{best / ms:.2f}×",
        "accuracy, points against fp32": f"{percent - fp32['accuracy']:+.1f}",
    }


# %%
CLAIMS = {  # as they are published; none of these was measured here
    ("1 · int8", "times smaller"): "4×",
    ("1 · int8", "times faster on a GPU"): "2–3×",
    ("2 · pruned", "times smaller"): "8×",
    ("3 · distilled", "times smaller"): "10×",
    ("3 · distilled", "accuracy, points against fp32"): '"high accuracy"',
}
lines = []
for step, title in ((1, "1 · int8"), (2, "2 · pruned"), (3, "3 · distilled")):
    known = published[step]
    theirs = measured(known["bytes"], took[f"published {step}"], known["accuracy"])
    ours = measured(right[step].nbytes, took[f"right {step}"], accuracy(ready[step]))
    if step == 1:
        theirs["times faster on a GPU"], ours["times faster on a GPU"] = gpu.values()
    for figure_of in theirs:
        claim = CLAIMS.get((title, figure_of), "–")
        line = {"step": title, "figure": figure_of, "claimed": claim}
        lines.append(line | {"as published": theirs[figure_of], "done right": ours[figure_of]})
teachers = {"as published": f"{own - fp32['accuracy']:+.1f}", "done right": "+0.0"}
lines.append(
    {"step": "3 · distilled", "figure": "its teacher, points against fp32", "claimed": "–"} | teachers
)
table = pd.DataFrame(lines)
table.set_index(["step", "figure"])

# %%
smaller = table[table["figure"] == "times smaller"].set_index("step")
smaller = smaller[["claimed", "as published", "done right"]].apply(lambda c: c.str.rstrip("×").astype(float))
figure, axes = plt.subplots(figsize=(8, 3.4))
for place, (column, colour) in enumerate(zip(smaller, ("C7", "C1", "C0"), strict=True)):
    bars = axes.bar(np.arange(len(smaller)) + 0.27 * (place - 1), smaller[column], 0.25, color=colour)
    axes.bar_label(bars, labels=[f"{value:.3g}×" for value in smaller[column]], fontsize=9)
    bars.set_label(column)
axes.set_xticks(range(len(smaller)), smaller.index)
axes.set(
    yscale="log", ylabel="times smaller than fp32", title="How much smaller is the file after each step?"
)
axes.axhline(1, color="black", linewidth=1)
axes.margins(y=0.15)
axes.legend(fontsize=9)
figures.show(figure, "Times smaller after each step: claimed, as published, and done right, logarithmic")
mute = sum("Error" not in failure["says"] for failure in failures)
print(f"lines of the recipe that ended with an error: {len(failures) - mute}; that did nothing: {mute}")

# %% [markdown]
# **What it means.** The ideas are good, their order and their bookkeeping are not: **cut** what a network has too many of,
# **teach** what is left, **quantize** last, and ask the *file* after each step. `06_pipeline` joins them.
#
# **What would fool you.** Accuracies here are of few validation pictures, after short trainings and with one seed: they
# show that a network works, and rank nothing. A teacher that had no time to learn is the first reason why its student
# did not: read the last line before you blame the loss. Claims are made from test pictures, with intervals, in the other
# notebooks and in [10_report](10_report.ipynb). And the times are of this processor.

# %%
done = run.finish(extra={"table": lines, "failures": failures})
print(f"{done.run} is finished")

# %% [markdown]
# ## The committed results
#
# The same table, of ResNet-18 on Fashion-MNIST, with the trainings that its profile has time for.

# %%
committed = results.committed_profile(timed=True)
runs = json.loads((committed / "provenance.json").read_text()) if committed else {}
known = next((record for record in runs.values() if record["notebook"] == run.notebook), None)
if known is None:
    print("No committed table yet: `make benchmark` makes it.")
else:
    about = known["parameters"]
    print(
        f"profile {committed.name}: {about['teacher_epochs']} epochs for the published recipe's ResNet-50,",
        end=" ",
    )
    print(f"{about['epochs']} for the other networks, {about['checked_images']} validation pictures")
    display(pd.DataFrame(known["extra"]["table"]).set_index(["step", "figure"]))

# %% [markdown]
# ## What you can now measure
#
# Whether a "compressed" network is smaller, faster, and still itself: by its file, by a clock, and by what it keeps.
#
# **Try it.** (1) Set `amount = 0.5`: predict all three sizes of step 2 before you run. (2) Compress the masked network's
# file with `gzip`: does the mask pay then, and what of it does a runtime see? (3) Set `teacher_epochs` three times as
# high: does the student by divergence alone say the teacher's mistakes more clearly? (4) Convert the masked network
# instead of the dense one: how many of the claimed 4× × 8× does the file show?
#
# Next: [01_baseline](01_baseline.ipynb), what "small", "fast" and "accurate" mean.
