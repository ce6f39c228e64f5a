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
# This is how compressing a ResNet-18 is commonly explained. The figures are **claims** as they are published, read here
# as those of the whole network after the step. None of them was measured:
#
# | step | what the recipe says | claimed |
# |---|---|---|
# | 1 | quantize the network to int8 | 4× smaller, 2–3× faster on a GPU |
# | 2 | prune the quantized network, each layer by the norm of its filters | 8× smaller |
# | 3 | distill a ResNet-50 into a ResNet-18, by the divergence of their outputs | 10× smaller, "high accuracy" |
#
# We rewrite it, run it, and look at what each step leaves: bytes of a file, milliseconds, accuracy. Lines that fail are
# run all the same, and their messages are shown: you will meet them again. One step repairs each of them, and the notebook
# that teaches the step is named. Where a claim can be measured, it stands as a *prediction*: put your own number in its place
# before you run the cell.
#
# **You will be able to** check a compression claim: by its file, by milliseconds, and by what the network still does.
# **You need** Python and a rough idea of a convolution. **Time:** half an hour to read, a minute to run with the
# defaults, on scikit-learn's digits.
#
# **Contents.**
# [1 · Quantize](#1-·-%22Quantize-to-int8%22:-on-which-backend?).
# [2 · Prune](#2-·-%22Prune-the-quantized-network%22:-which-weight?).
# [3 · Distill](#3-·-%22Distill%22:-what-is-left-of-the-first-two-steps?).
# Then [claimed, as published, done right](#Claimed,-as-published,-done-right),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
amount: float = 0.65  # [0.05, 0.9] share of each layer's filters that step 2 removes
width: float = 0.25  # [0.05, 1] of a student that is small, as a factor on ResNet-18's channels
teacher_epochs: float = 1.5  # [0.001, 1000] of the ResNet-50's training
epochs: float = 3.0  # [0.001, 1000] of the training of each other network
learning_rate: float = 0.01  # [0.00001, 1] peak of each training
seed: int = 1  # [0, 1000000] of new weights, the order and the augmentation
# what the benchmark also sets
batch_size: int = 32  # [2, 4096] images a step
calibration_images: int = 256  # [1, 60000] training images that show the ranges of activations
checked_images: int = 500  # [20, 60000] validation images, at most, on which accuracies are measured
seconds: float = 1.5  # [0.1, 3600] for each of the three timings
upstream: list = []  # run folder of 01_baseline; empty: that of its defaults
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/00_the_usual_recipe

# %% tags=["setup"]
import matplotlib.pyplot as plt
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import artifact, data, evaluation, figures, models, runtimes, training
from nnc_utils.exercises import predictions

figures.style()
bench = Bench("00_the_usual_recipe", globals())
model, images, spec = bench.dense, bench.images, bench.dense.spec

# %% [markdown]
# Three helpers. The first runs a line of the recipe and keeps what a reader would see. The second asks the file system.
# The third counts right answers on validation images.

# %%
import textwrap
import warnings
from collections.abc import Callable

failures = []


def provoke(step: int, tried: str, action: Callable[[], object]) -> None:
    """Run a line of the recipe, and keep the message with which it fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
            own = [f"only a warning: {w.message}" for w in caught if w.category is UserWarning]
            message = own[0] if own else "no error"
        except Exception as error:  # whatever it is: it is what a reader would see
            message = f"{type(error).__name__}: {error}"
    message = textwrap.shorten(message, 230, placeholder=" ...")
    failures.append({"step": step, "tried": tried, "says": message})
    print(f">>> {tried}\n{textwrap.fill(message, 100)}\n")


# %% tags=["machine-dependent"]
check = data.Split(images.validation.images[:checked_images], images.validation.labels[:checked_images])
seen, _ = bench.sample(calibration_images)
one = images.normalize(check.images[:1])


def file_bytes(network: torch.nn.Module) -> int:
    """The length of the file that torch.save makes of a network's state_dict."""
    path = bench.path("scratch.pt")
    torch.save(network.state_dict(), path)
    return path.stat().st_size


def accuracy(predict: Callable[[torch.Tensor], object]) -> float:
    """Percent of the validation images that are right."""
    with torch.inference_mode():
        logits = [torch.as_tensor(predict(images.normalize(batch))) for batch in check.images.split(64)]
    return evaluation.accuracy(torch.cat(logits).argmax(1).numpy(), check.labels)


fp32 = {"bytes": file_bytes(model), "accuracy": accuracy(model)}
print(f"ResNet-{bench.recipe['depth']} on {images.name}: {fp32['bytes']:,} bytes,", end=" ")
print(f"{fp32['accuracy']:.1f} % of {len(check)} validation images")

# %% [markdown]
# ## 1 · "Quantize to int8": on which backend?
#
# An integer stands for a float by a scale: 8 bits instead of 32. PyTorch has engines that compute with such integers.
# The recipe names one, `qint8`. That is the name of a *data type*.

# %% tags=["nbval-check-output"]
from torch.ao import quantization

provoke(1, "engine = 'qint8'", lambda: setattr(torch.backends.quantized, "engine", "qint8"))
provoke(1, "get_default_qconfig('qint8')", lambda: quantization.get_default_qconfig("qint8"))

# %% [markdown]
# The second message lists the real names. **The step that repairs it:** ask which of them this machine has. What a backend
# is, and which is fast where, is in [07_deployment](07_deployment.ipynb).

# %% tags=["machine-dependent"]
engines = torch.backends.quantized.supported_engines
engine = next(name for name in ("x86", "fbgemm", "qnnpack") if name in engines)
torch.backends.quantized.engine = engine
print(f"engines here: {', '.join(engines)}; we take {engine}")

# %% [markdown]
# ### Which lines do nothing, and say little?
#
# Batch-norm is [folded](../docs/glossary.md#folding) into the convolution before it. Then observers are inserted that watch the ranges of the
# activations, and everything is converted. *Predict*: which of these lines raise an error, and which do nothing?

# %% tags=["nbval-check-output"]
import copy

draft = copy.deepcopy(model)
provoke(1, "fuse_modules(model)", lambda: quantization.fuse_modules(draft))
provoke(1, "fuse_modules(model, ['layer1'])", lambda: quantization.fuse_modules(draft, ["layer1"]))
draft.train()  # as training leaves it
provoke(1, "fuse_modules(..., ['conv1', 'bn1'])", lambda: quantization.fuse_modules(draft, ["conv1", "bn1"]))
draft.eval()
provoke(1, "prepare(model)", lambda: quantization.prepare(draft, inplace=True))
provoke(1, "convert(model)", lambda: quantization.convert(draft, inplace=True))
integer = sum(isinstance(layer, torch.ao.nn.quantized.Conv2d) for layer in draft.modules())
silent = [f["tried"] for f in failures if "Error" not in f["says"]]
print(f"{integer} of {len(models.layers(spec)) - 1} convolutions became integers; without an error: {silent}")

# %% [markdown]
# `fuse_modules` wants names, of *layers*, in eval mode. `prepare` without a `qconfig` inserts nothing, and `convert` then
# converts nothing: the network is fp32, and it works. **The step that repairs it:** the pairs follow from the
# [Spec](../nnc_utils/models.py). Why folding is exact is shown in [07_deployment](07_deployment.ipynb).

# %%
pairs = [[layer.name, layer.batch_norm] for layer in models.layers(spec) if layer.batch_norm]


def converted(network: torch.nn.Module, stubs: bool = False) -> torch.nn.Module:
    """Fused, prepared, shown some images, and converted."""
    network = copy.deepcopy(network).eval()
    for layer in network.modules():
        if isinstance(layer, models.PickingConv2d):  # of very narrow networks; the same numbers
            layer.__class__ = torch.nn.Conv2d
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all of this is deprecated
        network = quantization.fuse_modules(network, pairs)
        network = quantization.QuantWrapper(network) if stubs else network
        network.qconfig = quantization.get_default_qconfig(engine)
        network = quantization.prepare(network)
        with torch.inference_mode():
            network(seen)
        return quantization.convert(network)


# %% [markdown]
# ### Where do integers begin, and what adds them?
#
# A converted convolution takes integers. Somebody has to make them of the image: a **stub** at the entrance, and one at
# the exit. And a residual network *adds*: `out + inputs` is no module that could be converted.

# %% tags=["nbval-check-output"]
provoke(1, "the converted network, an image", lambda: converted(model)(one))
provoke(1, "the same between two stubs", lambda: converted(model, stubs=True)(one))

# %% [markdown]
# "QuantizedCPU" has no kernel for the plain `+`. **The step that repairs it:** the sum becomes a module of its own, with a
# range of its own. [02_quantization](02_quantization.ipynb) teaches where ranges are needed and how they are chosen.


# %% tags=["nbval-check-output"]
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
print("it runs; logits of an image:", tuple(published_int8(one).shape))

# %% [markdown]
# ### Is it four times smaller?
#
# *Predict*: the weights take 8 bits instead of 32. And the time? An integer instruction does up to four times as many
# multiplications; but the claim is about a GPU.

# %%
predictions.predict("times smaller: int8", 4)

# %% tags=["machine-dependent"]
published = {1: {"bytes": file_bytes(published_int8), "accuracy": accuracy(published_int8)}}
predictions.measured("times smaller: int8", fp32["bytes"] / published[1]["bytes"])
print(f"accuracy {fp32['accuracy']:.1f} % before, {published[1]['accuracy']:.1f} % after")

# %% tags=["machine-dependent"]
on_gpu = "no GPU here: not measured"
if torch.cuda.is_available():
    here = one.to("cuda")
    provoke(1, "the int8 network on the GPU", lambda: copy.deepcopy(published_int8).to("cuda")(here))
    on_gpu = failures.pop()["says"]
print(on_gpu)

# %% [markdown]
# **What it means.** Once it runs, the claim about bytes holds. The claim about speed names a GPU, and these kernels are
# the processor's: what they give there stands below.
#
# ### Done right: integers that a runtime computes with
#
# The same idea in this course's form: codes and scales in a file, and a range at every place where a [runtime](../docs/glossary.md#runtime) stores a
# tensor. An integer runtime is then *asked* how much of it really runs in integers, and refused otherwise.
# [02_quantization](02_quantization.ipynb) builds the codes, [07_deployment](07_deployment.ipynb) the runtimes.

# %%
from nnc_utils.quantization import activations, uniform


def int8_file(network: torch.nn.Module, name: str) -> artifact.Artifact:
    """A network in 8 bits a weight and 8 bits an activation, as it comes back from its file."""
    network = uniform.quantize_network(network, bits=8, per_channel=True)
    path = bench.path(f"artifacts/{name}.safetensors")
    saving = {"mean": images.mean, "std": images.std, "classes": images.classes}
    artifact.save(activations.calibrate(network, seen), path, **saving)
    return artifact.read(path)


def session(file: artifact.Artifact, precision: str) -> Callable:
    """A prediction in ONNX Runtime; in int8 it raises if anything would run in floats."""
    ready = runtimes.prepare("onnxruntime", file, precision, 1)
    return lambda inputs: ready.predict(inputs.numpy())


right = {1: int8_file(model, "int8")}
fastest = session(artifact.read(bench.baseline.artifact("fp32")), "fp32")
ready = {1: session(right[1], "int8")}

# %% [markdown]
# ### And how fast is it?
#
# Median times of one image on one thread, all networks in turn, so that a slow moment hits all of them.

# %%
import statistics
import time


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call on one thread, all calls in turn."""
    times = {name: [] for name in calls}
    threads, end = torch.get_num_threads(), time.perf_counter() + seconds
    torch.set_num_threads(1)
    with torch.inference_mode():
        while time.perf_counter() < end or min(map(len, times.values())) < 8:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - begin))
    torch.set_num_threads(threads)
    return {name: statistics.median(own[3:]) for name, own in times.items()}


# %% tags=["machine-dependent"]
calls = {"fp32, eager PyTorch": lambda: model(one), "int8, eager PyTorch": lambda: published_int8(one)}
calls |= {"fp32, ONNX Runtime": lambda: fastest(one), "int8, ONNX Runtime": lambda: ready[1](one)}
first = pd.DataFrame({"ms an image": milliseconds(calls)})
for base in ("fp32, eager PyTorch", "fp32, ONNX Runtime"):
    first[f"× {base}"] = first.loc[base, "ms an image"] / first["ms an image"]
gain = first.loc["int8, ONNX Runtime"].iloc[1:].round(1).tolist()
print(f"int8 in ONNX Runtime: {gain[0]}× against eager PyTorch, {gain[1]}× against the same runtime in fp32")
first.round(2)

# %% [markdown]
# **What would fool you.** Part of a speed-up against eager PyTorch is what a good runtime gives to *fp32*. The last
# column is the honest one.
#
# ## 2 · "Prune the quantized network": which weight?
#
# In each layer, the filters with the smallest norm are to go
# ([Li et al., 2017](https://arxiv.org/abs/1608.08710)). The recipe goes through `layer1` to `layer4`; those are *stages*,
# boxes of blocks of layers. And the weights of an int8 network are no parameters. *Predict*: what does each line say?

# %% tags=["nbval-check-output"]
from torch.nn.utils import prune

smallest = {"name": "weight", "amount": amount, "n": 2, "dim": 0}
provoke(2, "ln_structured(model.layer1, ...)", lambda: prune.ln_structured(model.layer1, **smallest))
layer = published_int8.module.layer1[0].conv2
provoke(2, "ln_structured(int8.layer1[0].conv2, ...)", lambda: prune.ln_structured(layer, **smallest))
provoke(2, "the norm of its integers", lambda: layer.weight().norm(2))
fresh, state = models.build(spec), published_int8.module.state_dict()
provoke(2, "float.load_state_dict(int8.state_dict())", lambda: fresh.load_state_dict(state))
provoke(2, "the same with strict=False", lambda: fresh.load_state_dict(state, strict=False))

# %% [markdown]
# These tools lead nowhere from the quantized network, and its state_dict does not lead back into a float one. Whoever
# "prunes the quantized model" has gone back to fp32, and step 1 is lost. **The step that repairs it:** prune first,
# quantize last, and name layers, which the Spec lists. [03_pruning](03_pruning.ipynb) teaches both.
#
# ### Is a masked network smaller?
#
# Without a share $a$ of the filters, a convolution has $1-a$ of its outputs and $1-a$ of its inputs. *Predict* the file
# from that. Then [mask](../docs/glossary.md#mask) as the recipe does, and ask the file system.

# %%
predictions.predict("times smaller: masked", 8)

# %% tags=["machine-dependent"]
masked = copy.deepcopy(model)
for layer in models.layers(spec)[:-1]:
    prune.ln_structured(masked.get_submodule(layer.name), **smallest)
with_masks = file_bytes(masked)
for layer in models.layers(spec)[:-1]:
    prune.remove(masked.get_submodule(layer.name), "weight")
published[2] = {"bytes": file_bytes(masked), "accuracy": accuracy(masked)}
zeros = sum(int((masked.get_submodule(x.name).weight == 0).sum()) for x in models.layers(spec))
print(f"{zeros / models.parameters(spec):.0%} of the weights are zero")
predictions.measured("times smaller: masked", fp32["bytes"] / published[2]["bytes"])
print(f"by its shapes {1 / (1 - amount) ** 2:.1f}; with the masks {fp32['bytes'] / with_masks:.2f}")
print(f"accuracy {fp32['accuracy']:.1f} % before, {published[2]['accuracy']:.1f} % after")

# %% [markdown]
# **What it means.** While the masks are there, the file holds every weight *and* every mask. `prune.remove` removes the
# masks, not the filters: a zero takes four bytes like any other number. The recipe trains nothing at this point.
#
# ### Done right: channels that are gone
#
# A channel is taken out of *all* layers that write and read it; what a residual connection adds has to shrink on both
# sides. The result is a narrower network, an ordinary one. It is fine-tuned, and quantized *after* that.

# %% tags=["machine-dependent"]
from nnc_utils.pruning import channel_removal, channels

options = {"learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
options["augment"] = bench.recipe["augment"]
budget = models.macs(spec) * (1 - amount) ** 2
kept = channels.within_macs(spec, channels.scores(model, "l2"), macs=budget, uniform=True)
narrow = channel_removal.remove_channels(model, kept)
before = accuracy(narrow)
training.fit(narrow, images, epochs=epochs, **options)
narrow_bytes, right[2] = file_bytes(narrow), int8_file(narrow, "narrow_int8")
ready[2] = session(right[2], "int8")
print(f"accuracy {before:.1f} % after pruning, {accuracy(narrow):.1f} % after fine-tuning")
print(f"times smaller: {fp32['bytes'] / narrow_bytes:.1f} in fp32,", end=" ")
print(f"{fp32['bytes'] / right[2].nbytes:.1f} in int8")

# %% [markdown]
# Does a mask make the file smaller, or the network faster? *Predict* the height of each bar, as a share of the first.

# %% tags=["machine-dependent"]
steps = {"fp32": model, "masked": masked, "channels\nremoved": narrow}
times = milliseconds({name: lambda network=network: network(one) for name, network in steps.items()})
megabytes = {"fp32": fp32["bytes"], "masked": published[2]["bytes"], "channels\nremoved": narrow_bytes}
figure, panels = plt.subplots(1, 2, figsize=(9, 3))
shown = (
    ("megabytes of the file", {k: v / 1e6 for k, v in megabytes.items()}),
    ("milliseconds an image", times),
)
for axes, (label, values) in zip(panels, shown, strict=True):
    axes.bar_label(axes.bar(list(values), list(values.values()), color=["C7", "C1", "C0"]), fmt="%.1f")
    axes.set(ylabel=label)
    axes.margins(y=0.15)
panels[0].set_title("Is the file smaller?")
panels[1].set_title("Is the network faster?")
figures.show(
    figure, "The masked network has the bytes and the milliseconds of fp32, the narrow one has fewer"
)
ratio = megabytes["fp32"] / megabytes["masked"]
print(f"masked: {ratio:.1f}× smaller, {times['fp32'] / times['masked']:.1f}× faster")

# %% [markdown]
# **What would fool you.** "Sparsity" is a share of zeros, not of bytes, and not of milliseconds. A filter that is masked
# is not even gone for the network: batch-norm still adds its shift to that channel.
#
# ## 3 · "Distill": what is left of the first two steps?
#
# A ResNet-50 teaches a *new* ResNet-18, by the divergence of their [softened outputs](../docs/glossary.md#soft-labels) alone (after
# [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), who also used the labels). *Predict*, before anything is
# trained, how large the [student](../docs/glossary.md#teacher-and-student)'s file will be: four bytes times the parameters of a ResNet-18.
# And how many times smaller than the network of the start is that?

# %%
predictions.predict("times smaller: distilled", 10)

# %% tags=["machine-dependent"]
from torch.nn import functional

torch.manual_seed(seed)
shape = {key: getattr(spec, key) for key in ("channels", "size", "classes", "stem")}
large = models.build(models.resnet(50, **shape))
training.fit(large, images, epochs=teacher_epochs, **options)


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, T: float = 4.0) -> torch.Tensor:
    """What Hinton's soft labels lower: T² KL(teacher, student), both softened by T."""
    aims = (teacher_logits.float() / T).softmax(1)
    return T**2 * functional.kl_div((student_logits.float() / T).log_softmax(1), aims, reduction="batchmean")


def by_divergence_alone(student, inputs, labels):
    """The recipe's loss. `labels` stands in the signature, and nowhere else."""
    with torch.no_grad():
        teacher_logits = large.to(inputs.device)(inputs)
    return divergence(student(inputs), teacher_logits)


student = models.build(spec)
training.fit(student, images, epochs=epochs, loss=by_divergence_alone, **options)
large.cpu()
published[3] = {"bytes": file_bytes(student), "accuracy": accuracy(student)}

# %% tags=["nbval-check-output"]
kinds = {str(p.dtype).removeprefix("torch.") for p in student.parameters()}
zeros = sum(int((p == 0).sum()) for p in student.parameters() if p.ndim > 1)
print(f"bytes: predicted {4 * models.parameters(spec):,}, measured {published[3]['bytes']:,}")
predictions.measured("times smaller: distilled", fp32["bytes"] / published[3]["bytes"])
print(f"against the ResNet-50: {models.parameters(large.spec) / models.parameters(spec):.2f} times smaller")
print(f"left of step 1: weights are {', '.join(kinds)}; left of step 2: {zeros} weights are zero")

# %% [markdown]
# **What it means.** The "distilled" network is the one from the start, trained anew: nothing of the first two steps is in
# it. Not even against its teacher is it as small as claimed.
#
# ### Does a loss without labels repeat the teacher's mistakes?
#
# Whoever learns from the divergence alone never hears that the teacher is wrong. On the training images which the
# teacher gets wrong, what does the student say? *Predict* the larger share: the teacher's class, or the label?

# %% tags=["machine-dependent"]
probe = data.Split(images.train.images[:400], images.train.labels[:400])
answers = [evaluation.predict(net, probe, normalize=images.normalize) for net in (large, student)]
teachers, students = (torch.as_tensor(answer).long() for answer in answers)
wrong = teachers != probe.labels
shares = [100 * float((students == target)[wrong].float().mean()) for target in (teachers, probe.labels)]
print(
    f"of {int(wrong.sum())} images that the teacher gets wrong, the student says the teacher's class", end=" "
)
print(f"on {shares[0]:.0f} %, the label on {shares[1]:.0f} %")
own, theirs = accuracy(large), published[3]["accuracy"]
print(f"right on validation: the teacher {own:.1f} %, its student {theirs:.1f} %,", end=" ")
print(f"the ResNet-18 of the start, which had labels, {fp32['accuracy']:.1f} %")

# %% [markdown]
# ### Done right: a student that is small, distilled with labels
#
# The student is a *narrow* ResNet-18, its teacher is the network that we want to compress, the labels have half of the
# loss, and it is quantized at the end. [04_distillation](04_distillation.ipynb) teaches it, and asks what this one does
# not: would the student have been as good alone?

# %% tags=["machine-dependent"]
torch.manual_seed(seed)
small = models.build(models.resnet(18, width=width, **shape))


def with_labels(student, inputs, labels):
    """Half of the loss are the labels, half the soft labels of the network that is compressed."""
    with torch.no_grad():
        teacher_logits = model.to(inputs.device)(inputs)
    student_logits = student(inputs)
    soft = divergence(student_logits, teacher_logits)
    return 0.5 * functional.cross_entropy(student_logits.float(), labels) + 0.5 * soft


training.fit(small, images, epochs=epochs, loss=with_labels, **options)
model.cpu()
right[3] = int8_file(small, "small_int8")
ready[3] = session(right[3], "int8")
predicted = models.parameters(spec) / models.parameters(small.spec) * 4
print(f"times smaller: predicted {predicted:.0f}, measured {fp32['bytes'] / right[3].nbytes:.0f}")

# %% [markdown]
# ## Claimed, as published, done right
#
# Everything once more, all networks in turn, on one thread. "As published" is the recipe after its failing lines were
# repaired. Where a network is done right, its accuracy is that of the integer runtime, which reads the file.

# %%
titles = {1: "1 · int8", 2: "2 · pruned", 3: "3 · distilled"}
calls = {"eager": lambda: model(one), "fp32": lambda: fastest(one)}
for step, network in ((1, published_int8), (2, masked), (3, student)):
    calls[f"published {step}"] = lambda network=network: network(one)
    calls[f"right {step}"] = lambda step=step: ready[step](one)
times = milliseconds(calls)
best = min(times["eager"], times["fp32"])


def measured(nbytes: int, ms: float, percent: float) -> dict[str, str]:
    """The figures of one network against fp32."""
    return {
        "times smaller": f"{fp32['bytes'] / nbytes:.2f}×",
        "times faster than fp32, eager": f"{times['eager'] / ms:.2f}×",
        "times faster than the fastest fp32": f"{best / ms:.2f}×",
        "accuracy, pp against fp32": f"{percent - fp32['accuracy']:+.1f}",
    }


# %% tags=["machine-dependent"]
claims = {  # as they are published; none of these was measured here
    ("1 · int8", "times smaller"): "4×",
    ("1 · int8", "times faster on a GPU"): "2–3×",
    ("2 · pruned", "times smaller"): "8×",
    ("3 · distilled", "times smaller"): "10×",
    ("3 · distilled", "accuracy, pp against fp32"): '"high"',
}
lines = []
for step, title in titles.items():
    before, after = published[step], right[step]
    theirs = measured(before["bytes"], times[f"published {step}"], before["accuracy"])
    ours = measured(after.nbytes, times[f"right {step}"], accuracy(ready[step]))
    if step == 1:
        theirs["times faster on a GPU"] = ours["times faster on a GPU"] = (
            "no GPU" if "no GPU" in on_gpu else "error"
        )
    for number in theirs:
        line = {"step": title, "figure": number, "claimed": claims.get((title, number), "–")}
        lines.append(line | {"as published": theirs[number], "done right": ours[number]})
table = pd.DataFrame(lines)
table.set_index(["step", "figure"])

# %% tags=["machine-dependent"]
smaller = table[table["figure"] == "times smaller"].set_index("step").drop(columns="figure")
smaller = smaller.apply(lambda column: column.str.rstrip("×").astype(float))
figure, axes = plt.subplots(figsize=(8, 3.4))
smaller.plot.bar(ax=axes, rot=0, color=["C7", "C1", "C0"], logy=True, width=0.8)
for bars in axes.containers:
    axes.bar_label(bars, fmt="%.3g×", fontsize=9)
axes.set(xlabel="", ylabel="times smaller than fp32", title="How much smaller is the file after each step?")
axes.margins(y=0.2)
axes.legend(loc="upper left", fontsize=9)
figures.show(figure, "Times smaller after each step: claimed, as published, and done right, logarithmic")
fell = [title for title, row in smaller.iterrows() if row["as published"] < 0.9 * row["claimed"]]
print(f"claims about bytes that do not hold as published: {', '.join(fell) or 'none'}")
mute = sum("Error" not in failure["says"] for failure in failures)
print(f"lines of the recipe that ended with an error: {len(failures) - mute}; that did nothing: {mute}")

# %% [markdown]
# **What it means.** The ideas are good, their order and their bookkeeping are not. **Prune** what a network has too much
# of, **distill** into what is left, **quantize** last, and ask the *file* after each step.
# [06_pipeline](06_pipeline.ipynb) joins them.
#
# **What would fool you.** Accuracies here are measured on few validation images, after short trainings and with one seed.
# They show that a network works, and rank nothing. A teacher that had no time to learn is the first reason why its
# student did not: read that sentence before you blame the loss. Claims are made from test images, with intervals, in the
# other notebooks and in [10_report](10_report.ipynb).

# %% tags=["benchmark"]
done = bench.finish(table=lines, failures=failures)

# %% [markdown]
# ## The committed results
#
# This notebook's own table is a lesson, not a benchmark. What do the same three ideas give at full size, on ResNet-18 and
# Fashion-MNIST, when they are done right?

# %% tags=["machine-dependent"]
from nnc_utils.provenance import root

tables = [root() / "results" / name / "summary.csv" for name in ("full", "standard", "quick")]
committed = next(pd.read_csv(path) for path in tables if path.is_file())
committed = committed[(committed["no_loss"] == 1) & committed["control"].isna()]
for technique in ("quantization", "pruning", "distillation", "pipeline"):
    best_of = committed[committed["technique"] == technique].sort_values("size_ratio").tail(1)
    for _, row in best_of.iterrows():  # the smallest file within 0.3 pp
        interval = f"[{row['delta_ci_low']:+.2f}, {row['delta_ci_high']:+.2f}]"
        print(f"{technique}: {row['size_ratio']:.0f}× smaller, {row['delta_mean']:+.2f} pp {interval}")
    if best_of.empty:
        print(f"{technique}: no configuration within 0.3 pp")

# %% [markdown]
# ## Your predictions
#
# If you left the claims where they stood, their bars say what is left of them. A claim without a bar holds.

# %%
shown = "For each prediction a bar: what was measured, divided by what was predicted"
figures.show(predictions.show(), shown)

# %% [markdown]
# ## Summary
#
# - The name of a data type is no backend; `convert` may convert nothing and say nothing.
# - A mask is not a smaller network. A zero takes as many bytes and milliseconds as any other number.
# - Three steps in a row compress only if each keeps what the one before has done.
# - Three good ideas in the wrong order undo each other: prune, distill, and quantize last.
# - After each step, ask the file, the milliseconds, and the labels.
#
# <!-- numbers:begin -->
# **In numbers.** On Fashion-MNIST, of 14 published lines 12 raise an error as printed. Step 1 · int8: 4× smaller is
# claimed, 3.96× is left as published, 4.45× done right. Step 2 · pruned: 8× smaller is claimed, 1.00× is left as
# published, 34.82× done right. Step 3 · distilled: 10× smaller is claimed, 1.00× is left as published, 67.34× done
# right.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why does the engine called qint8 not exist?</summary>qint8 is a data type. A backend is a library that computes with it, such as x86 or qnnpack.</details>
# <details><summary>2. Which of the recipe's lines fail without a message?</summary>Those that convert nothing: without a configuration and without modules that fit, the network comes back as it was.</details>
# <details><summary>3. Why can a residual network not be converted as it stands?</summary>Its addition has no integer version unless a module stands for it: plus signs on quantized tensors raise an error.</details>
# <details><summary>4. Why is a masked file with its masks twice as large?</summary>Each mask is stored beside the weights, in as many numbers.</details>
# <details><summary>5. Why does a mask not make the network faster?</summary>The kernel multiplies zeros as it multiplies any other number.</details>
# <details><summary>6. What is left of the first two steps after the third?</summary>Nothing: the student is a new network with weights of its own.</details>
# <details><summary>7. What does a loss without labels learn from a bad teacher?</summary>The teacher's mistakes, exactly.</details>
# <details><summary>8. Why is four times smaller not quite reached by int8?</summary>Scales, batch-norm and the description take bytes, too; what stays in floats is not four times smaller.</details>
# <details><summary>9. In which order do the three ideas keep what the one before has done?</summary>Prune what there is too much of, distill into what is left, quantize last.</details>
#
# **Try it.** (1) Set `amount = 0.5`: predict all three sizes of step 2 before you run. (2) Compress the masked
# network's file with `gzip`: does the mask pay then, and what of it does a runtime see? (3) Set `teacher_epochs = 4`:
# does the student by divergence alone still say the teacher's mistakes? (4) Convert the masked network instead of the
# dense one: how many of the claimed 4× × 8× does the file show?
#
# **Further reading.** [Li et al., 2017](https://arxiv.org/abs/1608.08710), filters and their norms;
# [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), integer-only inference;
# [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), soft labels.
#
# Next: [01_baseline](01_baseline.ipynb), what "small", "fast" and "accurate" mean.
