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
# # 04 · Distillation: when is a teacher worth its cost?
#
# A small network, the **student**, learns from a large one, the **teacher**: from its probabilities, from what its stages
# compute, or from where they look. It is said to help; in many reports the student alone, trained as long, is missing.
# Here each student stands beside the same network without a teacher, beside one whose teacher talks about other pictures,
# and beside what the teacher costs.

# %% tags=["parameters"]
points: list = ["kd:width=0.25,T=4,alpha=0.9", "attention:width=0.25,beta=100"]  # students
controls: list = ["student_alone:width=0.25", "attention:width=0.25,beta=100,shuffled"]  # without its help
epochs: float = 2.0  # [0.001, 1000] of each student's training
learning_rate: float = 0.05  # [0.00001, 1] peak of that training
copies: int = 2  # [1, 64] augmentations of each picture in which a teacher looks before ("cached")
teaches: str = "fp32"  # the artifact of an upstream run that teaches: the baseline, or one of 06_pipeline
upstream: list = []  # run folders of 01_baseline, own seed first, and of the first part; empty: 01's defaults
part: str = ""  # name of this part of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its points may be claimed
seed: int = 1  # [0, 1000000] of the students' weights, the order and the augmentation
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/04_distillation

# %%
import copy
import functools
import shutil
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.nn import functional

# %%
from nnc_utils import artifact, data, evaluation, figures, models, results, scoring, training
from nnc_utils.devices import exact_device
from nnc_utils.distillation import attention, calibration, features, soft_labels, teaching
from nnc_utils.run import start

figures.style()
run = start("04_distillation", globals(), needs=("01_baseline",))
baseline, *before = run.upstream
reference, recipe_of_01 = baseline.baseline, baseline.record.parameters
teachers = run.made_before(teaches)  # of own seed, of others
teacher = artifact.load(teachers[0].artifact(teaches)).eval()
pictures = data.load(reference.dataset, size=teacher.spec.size)
print(f"the teacher: {reference.model} on {reference.dataset}, {teaches} of {teachers[0].run}")

# %%
METHODS = {  # what is taught -> the settings it has beside the width
    "kd": {"T": 4.0, "alpha": 0.9},
    "dkd": {"T": 4.0, "alpha": 0.5, "others": 8.0},
    "hints": {"beta": 1.0},
    "similarity": {"beta": 100.0},
    "attention": {"beta": 100.0},
    "kd_attention": {"T": 4.0, "alpha": 0.9, "beta": 100.0},
    "kd_hints": {"T": 4.0, "alpha": 0.9, "beta": 1.0},
    "self": {"T": 4.0, "alpha": 0.9},
    "ensemble": {"T": 4.0, "alpha": 0.9},
}
ALONE = {"student_alone": {}, "label_smoothing": {"smoothing": 0.1}, "student_longer": {"times": 2.0}}
LARGE = {"dense_finetuned": {}, "resnet50": {"epochs": 12.0}}  # a reference and a larger teacher
SETTINGS = METHODS | ALONE | LARGE
LOGITS = ("kd", "dkd", "self", "ensemble")  # what a teacher that has looked before can teach
FLAGS = {"shuffled": METHODS, "cached": LOGITS, "resnet50": set(METHODS) - {"self", "ensemble"}}
if teaches != "fp32":  # every student of theirs then has this in its name
    FLAGS["compressed"] = set(METHODS) - {"self"}


# %%
def parsed(point: str) -> tuple[str, dict[str, float], set[str]]:
    """ "kd:width=0.25,T=2,cached" -> "kd", its settings with the defaults, {"cached"}."""
    method, _, setting = point.partition(":")
    parts = [part.partition("=") for part in setting.split(",") if part]
    flags, given = {key for key, sign, _ in parts if not sign}, {k: v for k, sign, v in parts if sign}
    needed = {"width"} if method not in LARGE else set()
    allowed = {flag for flag, able in FLAGS.items() if method in able}
    if (
        method not in SETTINGS
        or not needed <= set(given) <= needed | set(SETTINGS[method])
        or flags - allowed
    ):
        known = ", ".join(
            f"{name}:width=...{''.join(f',{k}=...' for k in s)}" for name, s in SETTINGS.items()
        )
        flagged = "; ".join(f"with ',{flag}': {', '.join(sorted(able))}" for flag, able in FLAGS.items())
        raise ValueError(f"unknown point {point!r}: one of {known}; {flagged}")
    try:
        return method, SETTINGS[method] | {key: float(value) for key, value in given.items()}, flags
    except ValueError:
        raise ValueError(f"{point!r}: settings are numbers, as in width=0.25") from None


# %%
def named(point: str) -> str:
    """A point with all its settings, so that one student has one name."""
    method, settings, flags = parsed(point)
    order = sorted(settings, key=lambda key: key != "width")
    if method in FLAGS.get("compressed", ()) and "resnet50" not in flags:
        flags = flags | {"compressed"}
    return ",".join([f"{key}={settings[key]:g}" for key in order] + sorted(flags))


def recipe(point: str) -> teaching.Recipe:
    """What the point's teacher teaches."""
    method, settings, flags = parsed(point)
    taught = {"soft": "dkd" if method == "dkd" else "kd" if "T" in settings else ""}
    taught |= {"temperature": settings.get("T", 4.0), "alpha": settings.get("alpha", 0.0)}
    taught |= {"others": settings.get("others", 8.0), "shuffled": "shuffled" in flags}
    taught |= {part: settings["beta"] for part in ("attention", "hints", "similarity") if part in method}
    return teaching.Recipe(**taught)


# %%
about = {key: getattr(teacher.spec, key) for key in ("channels", "size", "classes", "stem")}
have = {point.partition(":")[0] for point in controls} | {row.method for e in before for row in e.compression}
for place, point in enumerate([*points, *controls]):  # before any work
    method, settings, flags = parsed(point)
    if (method not in METHODS or "shuffled" in flags) != (place >= len(points)):
        raise ValueError(
            f"{point!r}: taught students belong into points, those without a teacher's help into controls"
        )
    if "width" in settings:
        student = models.resnet(18, width=settings["width"], **about)  # raises for a width that is none
        features.check_stages(student, recipe(point).compared)
    lengths = settings.get("times", 1.0), settings.get("epochs", 1.0)
    if not 0 <= settings.get("smoothing", 0) < 1 or not all(0 < length <= 1000 for length in lengths):
        raise ValueError(f"{point!r}: smoothing is in [0, 1), times and epochs in (0, 1000]")
    if "resnet50" in flags - have:
        raise ValueError(
            f"{point!r}: put resnet50:epochs=12 into controls, or a run that has it into upstream"
        )
    if method == "ensemble" and len(teachers) == 1:
        raise ValueError(f"{point!r}: an ensemble needs {teaches} of other seeds in upstream")
    if method == "dense_finetuned":
        baseline.artifact("fp32")  # raises where it is not here

# %% [markdown]
# ## 1 · What does a teacher know that a label does not say?
#
# A label says "shirt". The teacher's probabilities say how much like a coat it is. Most of that is hidden in tiny numbers;
# a **temperature** $T$ brings it out, $p_i = e^{z_i/T} / \sum_j e^{z_j/T}$. *Predict*: on a picture of which the teacher is
# 99 % sure, with ten classes, what does the largest probability tend to as $T$ grows?

# %%
some = data.Split(pictures.validation.images[:500], pictures.validation.labels[:500])
known = evaluation.logits(teacher, some, normalize=pictures.normalize)
doubt = known.softmax(1).max(1).values
number = int((doubt - 0.99).abs().argmin())
figure, panels = plt.subplots(1, 4, figsize=(12, 2.8))
panels[0].imshow(some.images[number].permute(1, 2, 0).squeeze(), cmap="gray")
panels[0].set_title(f"label: {pictures.classes[some.labels[number]]}", fontsize=9)
panels[0].axis("off")
for axes, temperature in zip(panels[1:], (1, 4, 20), strict=True):
    axes.bar(range(len(pictures.classes)), (known[number] / temperature).softmax(0))
    axes.set_xticks(range(len(pictures.classes)), pictures.classes, rotation=90, fontsize=7)
    axes.set_title(f"T = {temperature}", fontsize=9)
panels[1].set_ylabel("probability")
figures.show(figure, "A picture, and the teacher's probabilities of its classes at temperatures 1, 4 and 20")

# %% [markdown]
# ## 2 · Soft labels
#
# The student's softened probabilities $q$ shall be the teacher's, $p$ (Hinton et al., 2015):
#
# $$L = (1-\alpha)\,\text{CE}(q^{T=1}, y) + \alpha\, T^2\, \frac1n \sum_{\text{images}} \sum_i p_i \log\frac{p_i}{q_i}$$
#
# Why $T^2$? The gradient of the softened divergence by the student's logits is $(q-p)/T$, and $q-p$ itself shrinks with
# $1/T$. *Predict*: from $T = 2$ to $T = 8$, by which factor does the gradient fall without the $T^2$?

# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(0)
student_logits, teacher_logits = (torch.randn(64, 10, generator=draw) for _ in range(2))
norms = {}
for temperature in (2.0, 8.0):
    leaf = student_logits.clone().requires_grad_()
    value = soft_labels.kd(student_logits=leaf, teacher_logits=teacher_logits, temperature=temperature)
    [gradient] = torch.autograd.grad(value, leaf)
    norms[temperature] = (float((gradient / temperature**2).norm()), float(gradient.norm()))
plain, scaled = (norms[2.0][i] / norms[8.0][i] for i in (0, 1))
print(f"without T²: predicted 16, measured {plain:.1f}; with it: predicted 1, measured {scaled:.2f}")

# %% [markdown]
# ### The bugs that say nothing
#
# Distillation that is wrong still trains: the label term carries it. What does each of the usual mistakes do to the loss and
# to its gradient, against the label term's gradient of the same student? (`mean` divides by the classes, too; the two
# networks swapped; a teacher left in train mode, whose batch-norm looks at the batch; teachings that were computed for
# pictures in another order.)

# %%
images, labels = pictures.normalize(some.images[:64]), some.labels[:64]
torch.manual_seed(seed)
novice = models.build(models.resnet(18, width=0.25, **about)).eval()
with torch.no_grad():
    ours, theirs = novice(images), teacher(images)
    in_train_mode = copy.deepcopy(teacher).train()(images)
T = 4.0


def kl(student, teacher, reduction="batchmean"):
    return functional.kl_div((student / T).log_softmax(1), (teacher / T).softmax(1), reduction=reduction)


variants = {
    "right": lambda s: T**2 * kl(s, theirs),
    "mean instead of batchmean": lambda s: T**2 * kl(s, theirs, "mean"),
    "T² left out": lambda s: kl(s, theirs),
    "student and teacher swapped": lambda s: T**2 * kl(theirs, s),
    "teacher in train mode": lambda s: T**2 * kl(s, in_train_mode),
    "another picture's teaching": lambda s: T**2 * kl(s, theirs.roll(1, 0)),
    "(the label term)": lambda s: functional.cross_entropy(s, labels),
}

# %%
rows = []
for name, loss in variants.items():
    leaf = ours.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of `mean`: it is one of the bugs
        value = loss(leaf)
    [gradient] = torch.autograd.grad(value, leaf)
    rows.append({"variant": name, "loss": value.item(), "gradient": gradient})
right, label_term = rows[0]["gradient"], rows[-1]["gradient"]
for row in rows:
    gradient = row.pop("gradient")
    row["gradient / label term's"] = float(gradient.norm() / label_term.norm())
    row["cosine to the right one"] = float(
        functional.cosine_similarity(gradient.flatten(), right.flatten(), 0)
    )
pd.DataFrame(rows).round(3)

# %% [markdown]
# **What it means.** *gradient / label term's* tells who turns the teacher's voice down, *cosine to the right one* who points
# elsewhere; a teacher in train mode hardly shows on one batch. None of them raises an error. So [`soft_labels`](../nnc_utils/distillation/soft_labels.py) takes its logits by name only, teachers are put
# into eval mode at every step, and stored teachings are bound to their pictures.
#
# ### Decoupled
#
# The divergence is a sum: "right class or not", and $(1 - p_y)$ times the divergence among the *other* classes
# (Zhao et al., 2022). *Predict*: with a teacher that is as sure as this one, how much weight do the other classes have?

# %%
confident = known.softmax(1)[torch.arange(len(some)), some.labels]
print(f"the mean of 1 - p(right class): {1 - float(confident.mean()):.3f}; at T = {T:g}:", end=" ")
softened = (known / T).softmax(1)[torch.arange(len(some)), some.labels]
print(f"{1 - float(softened.mean()):.3f}")

# %% [markdown]
# **What it means.** Plain soft labels pass on what the teacher knows of the other classes with the weight of its softened doubt.
# `dkd` gives that part a weight of its own.
#
# ## 3 · Features
#
# A student can be asked to compute what the teacher computes, stage by stage. Their widths differ, so a trained 1×1
# convolution, the **regressor**, stands between (FitNets). Or only the *relations* are compared: which pictures of a batch are
# alike, $G = \text{rows}(QQ^\top)$ (Tung and Mori, 2019): any two networks have that in common. Pictures sorted by class:
# where is $G$ bright in a trained network, and where in one that knows nothing?

# %%
order = labels.argsort(stable=True)
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6))
for axes, network, title in zip(panels, (teacher, novice), ("teacher", "student, untrained"), strict=True):
    with torch.no_grad():
        _, kept = features.outputs(network, images[order], ["layer4"])
    flat = kept["layer4"].flatten(1)
    axes.imshow(functional.normalize(flat @ flat.T, dim=1), cmap="viridis")
    axes.set_title(title, fontsize=10)
    axes.axis("off")
figures.show(
    figure,
    "Similarity of 64 pictures, sorted by class, in the last stage: blocks for the teacher alone",
)

# %% [markdown]
# ## 4 · Attention
#
# Where is a stage active on a picture? The mean square over its channels, $A = \frac1C\sum_c F_c^2$, each map at unit length. The
# student's maps shall be the teacher's (Zagoruyko and Komodakis, 2017); no regressor is needed, since the channels are gone.
# We draw them again after training.

# %%
STAGE = "layer2"


def maps(network: torch.nn.Module, shown: torch.Tensor) -> np.ndarray:
    """Attention of one stage, a picture each."""
    with torch.no_grad():
        _, kept = features.outputs(network, shown, [STAGE])
    side = kept[STAGE].shape[-1]
    return attention.attention_map(kept[STAGE]).view(-1, side, side).numpy()


def draw_maps(networks: dict[str, torch.nn.Module]):
    """A row of pictures, and a row of attention maps for each network."""
    figure, panels = plt.subplots(1 + len(networks), 8, figsize=(10, 1.3 * (1 + len(networks))))
    for axes, image in zip(panels[0], some.images[:8], strict=True):
        axes.imshow(image.permute(1, 2, 0).squeeze(), cmap="gray")
    for row, (name, network) in zip(panels[1:], networks.items(), strict=True):
        for axes, map in zip(row, maps(network, images[:8]), strict=True):
            axes.imshow(map, cmap="magma")
        row[0].set_title(name, fontsize=8, loc="left")
    for axes in panels.flat:
        axes.axis("off")
    return figure


figures.show(
    draw_maps({"teacher": teacher, "student, untrained": novice}),
    "Pictures and attention maps of teacher and untrained student",
)

# %% [markdown]
# ## 5 · What does a teacher cost?
#
# A student's step is a forward and a backward pass, about three times its MACs; the teacher adds one forward pass of its own.
# *Predict* from the MACs how much longer a step takes, then measure. A teacher that **has looked before**
# ([`remember`](../nnc_utils/distillation/teaching.py)) needs no pass in the step, only a look-up; but its students see fixed augmentations.

# %%
def step_seconds(loss, drawn) -> float:
    """Median seconds of a training step with a loss, without the optimizer."""
    taken = []
    student = copy.deepcopy(novice).train().to(memory_format=torch.channels_last)
    for images, labels in drawn:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=training.fast_bf16(torch.device("cpu"))):
            loss(student, images, labels).backward()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


# %%
device = torch.device("cpu")
few = data.Split(pictures.train.images[:640], pictures.train.labels[:640])
few = replace(pictures, train=few)
size = min(64, len(few.train) // 8)
beside = list(training.batches(few, 1, seed, size, True, device))
memory = teaching.remember(teacher, few, copies=1, seed=seed)
stored = list(training.batches(memory.pictures, 1, seed, size, False, device))
seconds = {
    "alone": step_seconds(training.cross_entropy, beside),
    "teacher beside": step_seconds(teaching.taught_by(teacher, teaching.Recipe(), novice.spec), beside),
    "teacher before": step_seconds(teaching.taught_from(memory, teaching.Recipe(), novice.spec), stored),
}
large = models.build(models.resnet(50, **about))  # untrained: the time is the same
large = teaching.taught_by(large, teaching.Recipe(), novice.spec)
seconds["ResNet-50 beside"] = step_seconds(large, beside)
faster = seconds["ResNet-50 beside"] / seconds["teacher before"]
predicted = 1 + models.macs(teacher.spec) / (3 * models.macs(novice.spec))
print(f"predicted {predicted:.1f} times longer with the teacher beside")
print(f"with a ResNet-50 that has looked before a step is {faster:.1f} times faster than with it beside")
pd.DataFrame(
    {"seconds a step": seconds, "times alone": {n: s / seconds["alone"] for n, s in seconds.items()}}
).round(4)

# %% [markdown]
# **What it means.** MACs predict a larger factor than is measured: a thin student uses a processor worse than its teacher does,
# so its own step takes longer than its MACs say. And no pass is not no time: stored teachings are fetched and checked, which
# shows on pictures as small as these.
#
# **What would fool you.** Reports of distillation count the student's epochs and not the teacher's passes. The table at the end
# has `train_seconds` with the teacher's share in it.
#
# ## Benchmark: the students
#
# All students of a width start from the same weights and see as many pictures; what differs is the loss. Controls: the student
# **alone**; with smoothed labels, which are soft labels without a teacher; with a teacher that speaks of **other pictures**
# (`shuffled`, must not help; where `alpha` is large it ruins the student, so that the student alone is the harder rival); the
# student trained **longer**; the teacher itself trained on for as long (`dense_finetuned`).
# `self`: the teacher is the student alone, of the same size, whose training counts, too. `ensemble`: the teachers of all
# seeds together. `compressed`: the teacher is what chapter 06 made of the baseline: a file that is small enough for this repository,
# and whose looks take less time; `train_seconds` counts what its own row does, not the baselines of other seeds that taught it.

# %%
def untrained(method: str, settings: dict[str, float]) -> models.ResNet:
    """A network before training; students of a width are the same for every method."""
    if method == "dense_finetuned":
        return artifact.load(baseline.artifact("fp32"))
    torch.manual_seed(seed)
    depth, width = (50, 1.0) if method == "resnet50" else (18, settings["width"])
    return models.build(models.resnet(depth, width=width, **about))


@functools.cache
def resnet50() -> tuple[torch.nn.Module, float]:
    """The larger teacher, of an earlier part or trained here, and the seconds that its training took."""
    for earlier in before:
        for row in (row for row in earlier.compression if row.method == "resnet50"):
            return artifact.load(earlier.artifact(row.artifact_sha256)), row.train_seconds
    path, took = saved(next(point for point in controls if point.startswith("resnet50")))
    return artifact.load(path), took["train_seconds"]


# %%
@functools.cache
def teacher_of(method: str, width: float, larger: bool) -> tuple[torch.nn.Module, dict]:
    """Who teaches, and what its training took beyond its own baseline's, which is there anyway."""
    if larger:  # its pictures do not count, as the baselines' do not; its time does
        return resnet50()[0], {"train_seconds": resnet50()[1]}
    if method == "self":
        return made(f"student_alone:width={width:g}")
    made_by = teachers if method == "ensemble" else teachers[:1]
    took = sum(made.row(teaches).train_seconds for made in made_by if made is not baseline)
    members = [teacher, *(artifact.load(made.artifact(teaches)) for made in made_by[1:])]
    return teaching.Ensemble(members) if method == "ensemble" else teacher, {"train_seconds": took}


# %%
@functools.cache
def remembered(who: torch.nn.Module) -> teaching.Remembered:
    """What a teacher said of every training picture, now or in an earlier part."""
    augment = recipe_of_01["augment"]
    options = {"copies": copies if augment else 1, "augment": augment}
    name = f"remembered_{training.network_digest(who)}_{options['copies']}_copies_seed_"
    files = [(e.record.seed, e.folder / f"{name}{e.record.seed}.npz") for e in before]
    kept = [(drawn, file) for drawn, file in files if file.is_file()]
    options["seed"], options["file"] = kept[0] if kept else (seed, run.path(f"{name}{seed}.npz"))
    memory = teaching.remember(who, pictures, **options)
    if not torch.isfinite(memory.logits).all():
        raise training.TrainingError(
            "what the teacher says is beyond half precision: train it longer before it teaches"
        )
    return memory


# %%
batch_size = recipe_of_01["batch_size"]


def lesson(point: str, student: models.Spec):
    """A student's loss, its pictures, whether to augment them, and what the teacher took."""
    method, settings, flags = parsed(point)
    if method not in METHODS:  # the larger teacher, too, is trained by labels
        smoothing = settings.get("smoothing", 0.0)
        loss = teaching.smoothed(smoothing) if smoothing else training.cross_entropy
        return loss, pictures, recipe_of_01["augment"], {}
    who, took = teacher_of(method, settings["width"], "resnet50" in flags)
    if "cached" not in flags:
        return teaching.taught_by(who, recipe(point), student), pictures, recipe_of_01["augment"], took
    memory = remembered(who)
    took = took | {"looked": memory.seconds}
    return teaching.taught_from(memory, recipe(point), student), memory.pictures, False, took


# %%
spent = {}  # point -> seconds of its steps, of its teacher's looks before them, of its teacher's own training


@functools.cache
def made(point: str) -> tuple[torch.nn.Module, dict]:
    """A trained student, and what that took."""
    method, settings, flags = parsed(point)
    student = untrained(method, settings)
    loss, train, augment, took = lesson(point, student.spec)
    hints = method in METHODS and recipe(point).hints
    model = student
    if hints:  # from the student's widths to those of its own teacher
        who, _ = teacher_of(method, settings["width"], "resnet50" in flags)
        model = features.WithRegressors(student, who.spec, teaching.STAGES)
    length = settings.get("epochs", epochs * settings.get("times", 1))
    steps = round(length * (len(pictures.train) // batch_size))
    options = {"loss": loss, "learning_rate": learning_rate, "augment": augment, "batch_size": batch_size}
    options["checkpoint"] = run.path(f"checkpoint_{method}_{named(point)}.pt")
    history = training.fit(
        model, train, epochs=steps / (len(train.train) // batch_size), seed=seed, **options
    )
    own, looked = history.seconds, took.get("looked", 0.0)
    spent[point] = {"steps": own, "looks": looked, "teacher": took.get("train_seconds", 0.0)}
    found = {"train_images": history.images, "train_seconds": own + looked}
    return student.eval(), {key: value + took.get(key, 0) for key, value in found.items()}


# %%
saving = {"mean": pictures.mean, "std": pictures.std, "classes": pictures.classes, "dtype": torch.float16}


@functools.cache
def saved(point: str) -> tuple[Path, dict]:
    """A trained network's file, and what it took."""
    method, *_ = parsed(point)
    network, took = made(f"{method}:{named(point)}".rstrip(":"))
    path = run.path(f"artifacts/{method}_{named(point).replace('=', '').replace(',', '_')}.safetensors")
    file = artifact.save(network, path, **saving)
    print(f"{point}: {file.nbytes:,} bytes, {took['train_seconds']:.0f} s", flush=True)
    return path, took


# %%
CONTROLS = {"shuffled": "shuffled_teacher", "resnet50": "teacher"}
candidates, missing = [], {}
for point in dict.fromkeys([*controls, *points]):
    method, settings, flags = parsed(point)
    try:
        path, took = saved(point)
    except training.TrainingError as error:  # one student that diverges costs no other
        missing[point] = str(error)
        print(f"{point}: {error}", flush=True)
        continue
    control = "" if method in METHODS else CONTROLS.get(method, method)
    row = {"method": method, "point": named(point)}
    row["control"] = CONTROLS["shuffled"] if "shuffled" in flags else control
    row |= {"technique": "distillation", "division": "open"} | took
    model = "resnet50" if method == "resnet50" else reference.model
    candidates.append({"path": path, "width": settings.get("width"), "row": row, "model": model})

# %% [markdown]
# The **validation** pictures decide which method of this run is claimed at each width: the best of those that saw as many
# pictures as the student alone (a run with one method has fixed it before). Beside accuracy stand two things that a teacher may change, too: whether the student is as sure as it is right
# (**expected calibration error**), and how often it says what the teacher of its own seed says.

# %%
def validated(network: torch.nn.Module) -> tuple[float, torch.Tensor]:
    """Validation accuracy in percent, and the logits."""
    about = {"normalize": pictures.normalize, "device": exact_device()}
    said = evaluation.logits(network, pictures.validation, **about)
    return 100 * float((said.argmax(1) == pictures.validation.labels).double().mean()), said


looked, (teacher_right, teacher_said) = [], validated(teacher)
for c in candidates:
    c["validation"], said = validated(artifact.load(c["path"]))
    looked.append({key: c["row"][key] for key in ("method", "point", "control")})
    looked[-1] |= {"validation accuracy": c["validation"]}
    looked[-1]["agrees with the teacher"] = calibration.agreement(said, teacher_said)
    error = calibration.expected_calibration_error(said, pictures.validation.labels)
    looked[-1]["calibration error"] = error
for width in {c["width"] for c in candidates}:
    same = [c for c in candidates if c["width"] == width]
    alone = [c["row"]["train_images"] for c in same if c["row"]["control"] == "student_alone"]
    taught = [c for c in same if not c["row"]["control"] and c["row"]["train_images"] in alone]
    if taught and claim:
        max(taught, key=lambda c: c["validation"])["row"]["headline"] = 1
pd.DataFrame(looked).round(2)

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names. The reference is the uncompressed network, or
# the one that was trained on for as long if validation pictures like that one better.

# %%
scores = scoring.score(
    [c["path"] for c in candidates], dataset=reference.dataset, folder=run.path("predictions")
)
dense = next((c for c in candidates if c["row"]["method"] == "dense_finetuned"), None)
longer = [(e, r.artifact_sha256) for e in before for r in e.compression if r.method == "dense_finetuned"]
against = baseline
if teachers[0] is not baseline:  # what its teacher was held against
    sha256 = teachers[0].row(teaches).reference_sha256
    against = run.made_before(sha256)[0].score(sha256)
elif dense and dense["validation"] > teacher_right:
    [against] = [score for score in scores if Path(score["path"]) == dense["path"]]
elif longer:
    made_before, sha256 = longer[0]
    right, _ = validated(artifact.load(made_before.artifact(sha256)))
    against = made_before.score(sha256) if right > teacher_right else baseline

# %%
rows = [
    results.compression_row(
        score,
        run=run,
        dataset=reference.dataset,
        model=c["model"],
        reference=baseline if c is dense else against,
        **c["row"],
    )
    for c, score in zip(candidates, scores, strict=True)
]
table = pd.DataFrame([row.model_dump() for row in rows])
shown = [
    "method",
    "point",
    "control",
    "params",
    "accuracy",
    "accuracy_delta",
    "train_images",
    "train_seconds",
]
table[[*shown, "headline"]]

# %% [markdown]
# ### What does a teacher cost?
#
# Seconds of each student's training: its own steps, its teacher's looks before them, and its teacher's own training where that was
# made for teaching. Where a student stands here twice, with its teacher beside it and with one that has looked before, the
# second table says how many times faster it learns.

# %%
def cache_pays(spent: dict) -> pd.DataFrame:
    """Students whose teacher looked before against the same with the teacher beside them."""
    rows = []
    for point, own in spent.items():
        beside = spent.get(point.replace(",cached", "")) if ",cached" in point else None
        if beside:
            rows.append({"student": point, "teacher beside (s)": beside["steps"], "before (s)": own["steps"]})
            rows[-1] |= {"its looks (s)": own["looks"], "times faster": beside["steps"] / own["steps"]}
            rows[-1]["with the looks"] = beside["steps"] / (own["steps"] + own["looks"])
    return pd.DataFrame(rows).round(2)


display(pd.DataFrame(spent).T.round(1))
cache_pays(spent) if len(cache_pays(spent)) else "no student stands here twice"

# %%
everything = pd.concat([pd.DataFrame([reference.model_dump()]), table], ignore_index=True)
figures.show(
    figures.parameters_against_accuracy(everything),
    "Test accuracy against parameters, students with and without a teacher, by method, with intervals",
)

# %% [markdown]
# ### Does the teacher help?
#
# On the same test pictures and at the same number of training pictures, each taught student against the student alone and against
# the one with smoothed labels; and what share of the gap to the full network it closes, where that gap is one. "Beats" means that the paired interval is above 0, "below" that it is under 0; "not below" is neither: undecided.

# %%
where = {"predictions": run.path("predictions"), "dataset": reference.dataset}
shutil.copy(baseline.score("fp32")["predictions"], where["predictions"])
display(results.comparisons(everything, **where))
results.gaps(everything, **where)

# %% [markdown]
# **What it means.** In two epochs on digits a teacher may even hurt: `alpha=0.9` leaves the labels a tenth of their weight, while
# $T^2$ enlarges the teacher's term, and there is no gap to close where the student alone is as good as its teacher. The committed results below ask again, with larger
# pictures and longer training.
#
# ### Where do they look now?

# %%
drawn = {"teacher": teacher}
for c in candidates:
    if c["row"]["control"] in ("", "student_alone"):
        drawn[f"{c['row']['method']}, {c['row']['point']}"] = artifact.load(c["path"])
figures.show(
    draw_maps(dict(list(drawn.items())[:5])),
    "Pictures and the attention maps of the teacher and of trained students",
)

# %% [markdown]
# **What would fool you.** A student that is compared with one trained for fewer epochs, or at other hyper-parameters. A teacher
# that helps a student which was trained too briefly, and no longer when both are trained to the end. One seed: how far apart the
# same student ends with another seed is a question to ask before any other.

# %%
files = {f"{c['row']['method']}:{c['row']['point']}": f"artifacts/{c['path'].name}" for c in candidates}
extra = {"validation": looked, "files": files, "step_seconds": seconds, "spent": spent, "missing": missing}
done = run.finish(compression=rows, extra=extra)
print(f"{done.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, by the best profile that has these methods. Profiles train their
# baseline for different times (quick and medium a little more than one epoch, standard twenty): compare a point with the grey
# line of its own figure only.

# %%
committed = results.committed_profile(profiles=results.ALL_PROFILES, technique="distillation")
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    print(f"profile {committed.name}")
    full = figures.read_table(committed / "compression.csv")
    students = full[
        full["technique"].isin(["baseline", "distillation"]) & ~full["control"].str.startswith("small_dense")
    ]
    figures.show(
        figures.parameters_against_accuracy(students),
        f"The committed results of the {committed.name} profile: accuracy against parameters",
    )
    display(results.comparisons(students, committed / "predictions", dataset=full["dataset"].iloc[0]))
    for record in results.Tables(committed).provenance.values():
        if len(faster := cache_pays(record["extra"].get("spent", {}))):
            display(faster)

# %% [markdown]
# ## What you can now measure
#
# What a teacher is worth, at equal training and with its cost counted; whether a loss term does anything at all.
#
# **Try it.** (1) Set `T=1`, then `T=20`: predict which teaches more. (2) Add `"self:width=0.25"`: can a network learn from one no
# better than itself? (3) Give all students three times the `epochs`: does the teacher's advantage grow or shrink? (4) Take
# `alpha=1`: the student never sees a label. How much worse is it?
