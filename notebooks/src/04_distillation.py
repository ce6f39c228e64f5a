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
# # 04 · Distillation: learning from a teacher
#
# A small network, the [**student**](../docs/glossary.md#teacher-and-student), learns from a large one, the **teacher**. It never sees the teacher's weights; it sees
# what the teacher says about each image. Does that help, and what does it cost?
#
# **You will be able to** write the distillation loss, find the bugs that raise no error, compare features of different
# widths, count the teacher's cost, and tell with controls whether a teacher helped. **You need**
# [01](01_baseline.ipynb), and to know softmax and cross-entropy. **Time:** 45 minutes to read, 45 for the seven
# exercises, a minute to run.
#
# **Contents.**
# [1 · What does a teacher know?](#1-·-What-does-a-teacher-know-that-a-label-does-not-say?)
# [2 · Soft labels](#2-·-How-does-a-student-learn-from-probabilities?).
# [3 · Silent bugs](#3-·-Which-bugs-raise-no-error?).
# [4 · Decoupled soft labels](#4-·-Can-the-other-classes-get-a-weight-of-their-own?).
# [5 · Standardized logits and correlations](#5-·-Must-the-student-be-as-sure-as-its-teacher?).
# [6 · Features](#6-·-Can-a-student-compute-what-the-teacher-computes?).
# [7 · Attention](#7-·-Where-does-a-network-look?).
# [8 · Is it the teacher that helps?](#8-·-Is-it-the-teacher-that-helps?)
# [9 · What does a teacher cost?](#9-·-What-does-a-teacher-cost?)
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
width: float = 0.25  # (0, 1] of the student, as a share of ResNet-18's channels
temperature: float = 4.0  # [0.1, 100] of the soft labels
alpha: float = 0.9  # [0, 1] share of the soft labels in the loss
epochs: float = 2.0  # [0.001, 1000] of each student's training
seed: int = 1  # [0, 1000000] of the students' weights, the order and the augmentation
# what the benchmark at the end runs
configurations: list = [{"method": "kd", "width": 0.25}, {"method": "attention", "width": 0.25}]  # distilled
controls: list = [{"method": "student_alone", "width": 0.25}]  # without a teacher's help
learning_rate: float = 0.05  # [0.00001, 1] peak of each training
copies: int = 2  # [1, 64] augmentations of each image with cached teacher logits
teaches: list = []  # a mapping of 06_pipeline whose network is the compressed teacher; empty: the baseline
upstream: list = []  # run folders of 01_baseline, own seed first, and of earlier shards; empty: 01's defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its configurations may be claimed
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/04_distillation

# %% tags=["setup"]
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch.nn import functional

from bench.session import Bench
from nnc_utils import evaluation, figures, models, training
from nnc_utils.exercises import check, predictions

bench = Bench("04_distillation", globals())
teacher, images = bench.dense, bench.images

# %% [markdown]
# ## 1 · What does a teacher know that a label does not say?
#
# A label says "3". The teacher's probabilities say how much like an 8 it is. Most of that is hidden in tiny numbers. A
# **temperature** $T$ brings it out: $p_i = e^{z_i/T} / \sum_j e^{z_j/T}$, with logits $z$.
#
# *Predict*: on an image of which the teacher is 99 % sure, what does the largest of ten probabilities tend to as $T$
# grows?

# %%
figures.style()
some = images.validation.images[:64]
inputs, labels = images.normalize(some), images.validation.labels[:64].long()
with torch.inference_mode():
    teacher_logits = teacher(inputs).clone()
sure = teacher_logits.softmax(1).max(1).values
number = int((sure - 0.99).abs().argmin())
figure, panels = plt.subplots(1, 4, figsize=(11, 2.6))
panels[0].imshow(some[number].permute(1, 2, 0).squeeze(), cmap="gray")
panels[0].set_title(f"label: {images.classes[labels[number]]}")
panels[0].axis("off")
for axes, T in zip(panels[1:], (1, 4, 20), strict=True):
    axes.bar(range(len(images.classes)), (teacher_logits[number] / T).softmax(0))
    axes.set(title=f"T = {T}", xlabel="class", ylim=(0, 1))
panels[1].set_ylabel("probability")
figures.show(figure, "An image, and the teacher's probabilities of its classes at temperatures 1, 4 and 20")

# %% tags=["nbval-check-output"]
logits = torch.tensor([6.0, *[0.0] * 9])
for T in (1, 4, 20, 1000):
    print(f"T = {T:4}: largest of ten probabilities {float((logits / T).softmax(0).max()):.3f}")
print("It tends to 1/10: all classes become alike.")

# %% [markdown]
# ## 2 · How does a student learn from probabilities?
#
# The student's softened probabilities $q$ should match the teacher's, $p$, its [soft labels](../docs/glossary.md#soft-labels)
# ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)). Beside them stands the ordinary loss of the labels $y$:
#
# $$L = (1-\alpha)\,\text{CE}(q^{T=1}, y) + \alpha\, T^2\, \frac1n \sum_{\text{images}} \sum_i p_i \log\frac{p_i}{q_i}$$
#
# Why $T^2$? The gradient of the divergence by the student's logits is $(q-p)/T$, and $q-p$ itself shrinks with $1/T$.
#
# ### Exercise 4.1 · Soft labels
#
# Student and teacher give logits of shape (images, classes). Return the soft term of the loss without its $\alpha$: $T^2$
# times the divergence, as one number. The divergence is a sum over the classes and a mean over the images. It must hold
# for sure networks, too, whose logits differ by 200.
#
# <details><summary>Hint 1</summary>Divide both networks' logits by T, then take the softmax over dimension 1.</details>
# <details><summary>Hint 2</summary><code>functional.kl_div(log_q, p, reduction="batchmean")</code> takes the logarithm of the
# student's probabilities first, then the teacher's probabilities.</details>
# <details><summary>Hint 3</summary>The probability of a class may round to 0. Then
# <code>log_softmax</code> is finite and the logarithm of <code>softmax</code> is not.</details>


# %% tags=["exercise"]
def soft_labels(student_logits: torch.Tensor, teacher_logits: torch.Tensor, T: float) -> torch.Tensor:
    """T² times how far the student's softened probabilities are from the teacher's."""
    ### BEGIN SOLUTION
    log_q = (student_logits / T).log_softmax(1)
    p = (teacher_logits / T).softmax(1)
    return T**2 * functional.kl_div(log_q, p, reduction="batchmean")
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.1", soft_labels)

# %% [markdown]
# *Predict*: from $T = 2$ to $T = 8$, by which factor does the gradient fall without the $T^2$?


# %%
predictions.predict("gradient without T², from T = 2 to T = 8: falls by", 4)

# %%
def gradient(loss, student_logits):
    """The gradient of a loss by the student's logits."""
    leaf = student_logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(0)
ours, theirs = (torch.randn(64, 10, generator=draw) for _ in range(2))
plain = [gradient(lambda s, T=T: soft_labels(s, theirs, T) / T**2, ours).norm() for T in (2.0, 8.0)]
scaled = [gradient(lambda s, T=T: soft_labels(s, theirs, T), ours).norm() for T in (2.0, 8.0)]
print(f"without T²: predicted 16, measured {plain[0] / plain[1]:.1f}")
predictions.measured("gradient without T², from T = 2 to T = 8: falls by", float(plain[0] / plain[1]))
print(f"with T²:    predicted  1, measured {scaled[0] / scaled[1]:.2f}")

# %% tags=["nbval-check-output"]
from nnc_utils.distillation import soft_labels as package

same = torch.allclose(
    soft_labels(ours, theirs, 4.0),
    package.kd(student_logits=ours, teacher_logits=theirs, temperature=4.0),
)
print(f"the package computes the same: {same}")

# %% [markdown]
# ## 3 · Which bugs raise no error?
#
# Distillation that is wrong still trains: the label term carries it. Here are five usual mistakes. What do they do to
# the gradient, compared with the label term's? (`reduction="mean"` divides by the classes, too. A teacher left in train
# mode normalizes with the batch.)

# %%
import copy

torch.manual_seed(seed)
same_input = {key: getattr(teacher.spec, key) for key in ("channels", "size", "classes", "stem")}
student = models.build(models.resnet(18, width=width, **same_input)).eval()
with torch.no_grad():
    student_logits = student(inputs)
    in_train_mode = copy.deepcopy(teacher).train()(inputs)
T = temperature
variants = {
    "right": lambda s: soft_labels(s, teacher_logits, T),
    "mean instead of batchmean": lambda s: soft_labels(s, teacher_logits, T) / s.shape[1],
    "T² omitted": lambda s: soft_labels(s, teacher_logits, T) / T**2,
    "student and teacher swapped": lambda s: soft_labels(teacher_logits, s, T),
    "teacher in train mode": lambda s: soft_labels(s, in_train_mode, T),
    "logits of other images": lambda s: soft_labels(s, teacher_logits.roll(1, 0), T),
}

# %% tags=["machine-dependent"]
hard = gradient(lambda s: functional.cross_entropy(s, labels), student_logits)
gradients = {name: gradient(loss, student_logits) for name, loss in variants.items()}
right = gradients["right"].flatten()
table = pd.DataFrame(
    {
        "size / label term's": {name: float(g.norm() / hard.norm()) for name, g in gradients.items()},
        "cosine to the right one": {
            name: float(functional.cosine_similarity(g.flatten(), right, 0)) for name, g in gradients.items()
        },
    }
)
table.round(3)

# %% [markdown]
# **What it means.** The first column shows which bug weakens the teacher's signal, the second which one changes its
# direction. A teacher in train mode hardly shows on one batch. So the package takes its logits by name only, puts
# teachers into eval mode at every step, and binds cached logits to their images.
#
# ### Exercise 4.2 · Find the bugs: a loss that trains
#
# This loss runs without an error, and its student learns. It has five bugs:
#
# ```python
# student_logits, teacher_logits = student(inputs).float(), teacher(inputs).float()
# hard = functional.cross_entropy(student_logits / T, labels)
# soft = soft_labels(teacher_logits, student_logits, T)
# return alpha * hard + (1 - alpha) * soft
# ```
#
# Return the loss of section 2. Both networks may come in train mode: the student stays in it. `inputs` are (images,
# channels, height, width), `labels` are (images,).
#
# <details><summary>Hint 1</summary>Compare each line with the formula of section 2: where does T stand, and which term has
# α?</details>
# <details><summary>Hint 2</summary>Who comes first in your <code>soft_labels</code>?</details>
# <details><summary>Hint 3</summary>The teacher needs two things: <code>teacher.eval()</code>, and a forward pass under
# <code>torch.no_grad()</code>. The student needs neither.</details>


# %% tags=["exercise"]
def distillation_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    T: float,
    alpha: float,
) -> torch.Tensor:
    """(1 - alpha) times the label term, and alpha times the soft term."""
    ### BEGIN SOLUTION
    teacher.eval()
    with torch.no_grad():
        teacher_logits = teacher(inputs).float()
    student_logits = student(inputs).float()
    hard = functional.cross_entropy(student_logits, labels)
    return (1 - alpha) * hard + alpha * soft_labels(student_logits, teacher_logits, T)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.2", distillation_loss)

# %% [markdown]
# ## 4 · Can the other classes get a weight of their own?
#
# The divergence is a sum of two parts: "right class or not", and $(1 - p_y)$ times the divergence among the *other*
# classes ([Zhao et al., 2022](https://arxiv.org/abs/2203.08679)). A sure teacher has a small $1 - p_y$: it hardly
# teaches what the others are like. **Decoupled** distillation gives that part a weight of its own.
#
# ### Exercise 4.3 · The other classes
#
# Logits are (images, classes), labels (images,). Return the probabilities *among the other classes* at temperature $T$,
# (images, classes): 0 for the label's class; the rest of each row sums to 1. It must work for a network that is so sure
# that its $p_y$ rounds to 1.
#
# <details><summary>Hint 1</summary>Remove the class before the softmax, not after it: which logit gives the probability
# 0?</details>
# <details><summary>Hint 2</summary><code>functional.one_hot(labels, classes).bool()</code> is True at the labels;
# <code>logits.masked_fill(mask, value)</code> puts a value where the mask is True.</details>


# %% tags=["exercise"]
def other_classes(logits: torch.Tensor, labels: torch.Tensor, T: float) -> torch.Tensor:
    """Each image's softened probabilities among the classes that are not its label."""
    ### BEGIN SOLUTION
    right = functional.one_hot(labels, logits.shape[1]).bool()
    return (logits / T).masked_fill(right, -torch.inf).softmax(1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.3", other_classes)

# %% [markdown]
# *Predict*: do the two parts add up to the plain loss?


# %%
def decoupled(student_logits, teacher_logits, labels, T):
    """The two parts: right class or not, and among the others."""
    parts = []
    for logits in (student_logits, teacher_logits):
        of_right = (logits / T).softmax(1).gather(1, labels[:, None])
        others = other_classes(logits, labels, T).clamp(min=1e-12)  # no logarithm of 0
        parts.append((torch.cat([of_right, 1 - of_right], 1), others))
    (q, q_others), (p, p_others) = parts
    right_or_not = (p * (p / q).log()).sum(1)
    among_others = (p_others * (p_others / q_others).log()).sum(1)
    return right_or_not, among_others, p[:, 1]


# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(1)
classes = torch.randint(10, (64,), generator=draw)
right_or_not, among_others, doubt = decoupled(ours, theirs, classes, 4.0)
total = 16 * (right_or_not + doubt * among_others).mean()
print(f"plain {soft_labels(ours, theirs, 4.0):.4f}, the two parts together {total:.4f}")
options = {"student_logits": ours, "teacher_logits": theirs, "labels": classes, "temperature": 4.0}
of_package = package.dkd(**options, target=1.0, others=8.0)
by_hand = 16 * (right_or_not + 8 * among_others).mean()
print(f"the package with weights 1 and 8: {of_package:.3f}; by hand {by_hand:.3f}")

# %% [markdown]
# ## 5 · Must the student be as sure as its teacher?
#
# The divergence asks for the teacher's very probabilities. A small student that ranks the classes as its teacher does,
# but less surely, pays for it. Two losses forgive that:
#
# - **Standardized logits** ([Sun et al., 2024](https://arxiv.org/abs/2403.01427)): each image's logits, of both networks,
#   get mean 0 and deviation 1 before the softmax.
# - **Correlations** (DIST, [Huang et al., 2022](https://arxiv.org/abs/2205.10536)): with $q$ and $p$ as above and
#   Pearson's $r$, the student's probabilities need only be in proportion, over the classes of an image $i$ and over the
#   images of a class $c$:
#
# $$L = T^2 \Bigl(\beta\,\bigl(1 - \overline{r(q_{i\cdot}, p_{i\cdot})}\bigr) + \gamma\,\bigl(1 - \overline{r(q_{\cdot c}, p_{\cdot c})}\bigr)\Bigr)$$
#
# ### Exercise 4.4 · Correlations
#
# `a` and `b` are (rows, columns). Return Pearson's $r$ of each row of `a` with the same row of `b`, (rows,): both rows
# minus their means, then the cosine of the angle between them. A row whose values are all alike has no correlation:
# return 0 for it.
#
# <details><summary>Hint 1</summary><code>x.mean(1, keepdim=True)</code> is the mean of each row, and can be subtracted from
# x.</details>
# <details><summary>Hint 2</summary><code>functional.normalize(x, dim=1)</code> gives each row the length 1, and leaves a row
# of zeros as it is. The cosine is then a sum of products.</details>


# %% tags=["exercise"]
def pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The correlation of each row of one with that of the other."""
    ### BEGIN SOLUTION
    a, b = (functional.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (a, b))
    return (a * b).sum(1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.4", pearson)

# %% [markdown]
# Over the classes of an image the rows are images; over the images of a class they are classes: `q.T`.
#
# *Predict*: a student's logits are half of its teacher's. Which of the three losses is exactly 0?


# %%
def standardized(logits):
    """Each image's logits with mean 0 and deviation 1."""
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)


def correlations(student_logits, teacher_logits, T, inter=2.0, intra=2.0):
    """How far the probabilities are from being in proportion, over classes and over images."""
    q, p = ((logits / T).softmax(1) for logits in (student_logits, teacher_logits))
    return T**2 * (inter * (1 - pearson(q, p)).mean() + intra * (1 - pearson(q.T, p.T)).mean())


rivals = {
    "soft labels": lambda s: soft_labels(s, theirs, 4.0),
    "of standardized logits": lambda s: soft_labels(standardized(s), standardized(theirs), 4.0),
    "correlations": lambda s: correlations(s, theirs, 4.0),
}

# %% tags=["nbval-check-output"]
for name, loss in rivals.items():  # against a student with a ranking of its own
    print(f"{name:23} half as sure: {abs(loss(theirs / 2) / loss(ours)):6.1%} of the loss of another ranking")
pair = {"student_logits": ours, "teacher_logits": theirs, "temperature": 4.0}
of_package = package.kd(**pair, standardize=True), package.dist(**pair)
by_hand = [rivals[name](ours) for name in ("of standardized logits", "correlations")]
print("the package computes the same:", all(map(torch.allclose, by_hand, of_package)))

# %% [markdown]
# **What it means.** Standardizing forgives a factor on the logits completely, correlations almost: a softmax at a high
# temperature is nearly linear.
#
# **What would fool you.** Standardizing divides the gradient by the deviation of the student's logits. With the same
# weight that term hardly speaks, and the method looks weak. The authors weigh it 9 and the labels 0.1, at $T = 2$:
# `"alpha": 0.9, "gain": 10, "temperature": 2`.
#
# ## 6 · Can a student compute what the teacher computes?
#
# The widths of the two differ, so a trained 1×1 convolution stands between them: the **regressor** of FitNets' [hints](../docs/glossary.md#hints-attention-transfer)
# ([Romero et al., 2015](https://arxiv.org/abs/1412.6550)). Its loss is a squared difference. Or only *relations* are
# compared: which images of a batch are alike? With $Q$ the features of a stage, one row an image, the matrix
# $G = QQ^\top$ with rows of length 1 is comparable for any two widths
# ([Tung and Mori, 2019](https://arxiv.org/abs/1907.09682)).
#
# ### Exercise 4.5 · Which images are alike?
#
# Features come as (images, channels, height, width). Return $G$, (images, images), each of its rows with length 1. An image
# whose features are all 0 has a row of zeros.
#
# <details><summary>Hint 1</summary>A row of Q is everything that the stage puts out for one image:
# <code>features.flatten(1)</code>.</details>
# <details><summary>Hint 2</summary>First the product, then the lengths: <code>functional.normalize</code> of G, not of
# Q.</details>


# %% tags=["exercise"]
def relations(features: torch.Tensor) -> torch.Tensor:
    """Which images of the batch are alike: rows of unit length."""
    ### BEGIN SOLUTION
    rows = features.flatten(1)
    return functional.normalize(rows @ rows.T, dim=1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.5", relations)


# %%
def similarity(student_features, teacher_features):
    """The mean squared difference of the two matrices."""
    return (relations(student_features) - relations(teacher_features)).square().mean()


def stage(network, inputs, name):
    """What a stage of a network puts out."""
    kept = {}
    hook = network.get_submodule(name).register_forward_hook(lambda m, i, o: kept.update(out=o.detach()))
    network(inputs)
    hook.remove()
    return kept["out"]


ordered = inputs[labels.argsort(stable=True)]
figure, panels = plt.subplots(1, 2, figsize=(7, 3.4))
for axes, network, name in zip(panels, (teacher, student), ("teacher", "untrained student"), strict=True):
    axes.imshow(relations(stage(network, ordered, "layer4")), cmap="viridis")
    axes.set(title=name, xlabel="image, sorted by class", ylabel="image")
    axes.grid(visible=False)
figures.show(figure, "Similarity of 64 images sorted by class: blocks for the teacher alone")

# %% tags=["nbval-check-output"]
from nnc_utils.distillation import features

draw = torch.Generator().manual_seed(2)
narrow, wide = torch.randn(8, 16, 4, 4, generator=draw), torch.randn(8, 64, 4, 4, generator=draw)
regressor = torch.nn.Conv2d(16, 64, 1)
print(f"16 channels become {tuple(regressor(narrow).shape)[1]}: now hints can be compared")
same = torch.allclose(similarity(narrow, wide), features.similarity(student=narrow, teacher=wide))
print(f"similarity needs no regressor; the package computes the same: {same}")

# %% [markdown]
# **What it means.** The bright blocks are the classes. The teacher's last stage puts images of one class side by side;
# an untrained network does not.
#
# ## 7 · Where does a network look?
#
# Where is a stage active on an image? The mean square over its $C$ channels, $A = \frac1C\sum_c F_c^2$, each map at unit
# length. The student's maps should match the teacher's
# ([Zagoruyko and Komodakis, 2017](https://arxiv.org/abs/1612.03928)). No regressor is needed: the channels are gone.
#
# ### Exercise 4.6 · Attention maps
#
# Features come as (images, channels, height, width). Return each image's map $A$ as a row of its pixels, with length 1:
# (images, height × width). A map of zeros stays one.
#
# <details><summary>Hint 1</summary>Square first, then average over dimension 1: what is active may be negative.</details>
# <details><summary>Hint 2</summary>The length of a row is the root of the sum of its squares;
# <code>functional.normalize(rows, dim=1)</code> divides by it.</details>


# %% tags=["exercise"]
def attention(features: torch.Tensor) -> torch.Tensor:
    """Where a stage is active: (images, pixels), rows of length 1."""
    ### BEGIN SOLUTION
    maps = features.square().mean(1)
    return functional.normalize(maps.flatten(1), dim=1)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.6", attention)

# %%
shown = some[:6]
maps = {
    name: stage(network, inputs[: len(shown)], "layer1")
    for name, network in (("teacher", teacher), ("student", student))
}
figure, panels = plt.subplots(3, len(shown), figsize=(9, 4.4))
for axes, image in zip(panels[0], shown, strict=True):
    axes.imshow(image.permute(1, 2, 0).squeeze(), cmap="gray")
for row, (name, kept) in zip(panels[1:], maps.items(), strict=True):
    side = kept.shape[-1]
    for axes, drawn in zip(row, attention(kept).view(-1, side, side), strict=True):
        axes.imshow(drawn, cmap="magma")
    row[0].set_title(f"{name}, first stage", loc="left", fontsize=9)
for axes in panels.flat:
    axes.axis("off")
figures.show(figure, "Six images, and where the first stage of teacher and untrained student is active")

# %% tags=["nbval-check-output"]
from nnc_utils.distillation.attention import attention_transfer

by_hand = (attention(narrow) - attention(wide)).square().mean()
same = torch.allclose(by_hand, attention_transfer(student=narrow, teacher=wide))
print(f"the package computes the same: {same}")

# %% [markdown]
# ## 8 · Is it the teacher that helps?
#
# A student can improve for many reasons: more images, smoothed labels, a better schedule. A [control](../docs/glossary.md#control) that **must fail**
# tells: a *shuffled* teacher, whose logits are of other images of the batch. With labels in the loss even that student
# learns. So we remove them: $\alpha = 1$, and the teacher is the only source.
#
# *Predict* both accuracies.

# %%
predictions.predict("accuracy without a label, true teacher (%)", 50)

# %% tags=["machine-dependent"]
from dataclasses import replace

from nnc_utils.data import Split


class Shuffled(torch.nn.Module):
    """A teacher that speaks of another image of the batch."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, inputs):
        return self.teacher(inputs).roll(1, 0)


few = replace(images, train=Split(images.train.images[:2000], images.train.labels[:2000]))  # all of digits
right = {}
for name, source in (("true teacher", teacher), ("shuffled teacher", Shuffled(teacher))):

    def no_labels(model, inputs, labels, source=source):
        return distillation_loss(model, source, inputs, labels, temperature, alpha=1.0)

    network = copy.deepcopy(student)
    common = {"batch_size": bench.recipe["batch_size"], "augment": False, "seed": seed}
    training.fit(network, few, epochs=max(2, epochs), learning_rate=learning_rate, loss=no_labels, **common)
    answers = evaluation.predict(network.eval(), images.validation, normalize=images.normalize)
    right[name] = answers == images.validation.labels.numpy()

# %% tags=["machine-dependent"]
for name, correct in right.items():
    print(f"{name}: {100 * correct.mean():.1f} % of validation, and it never saw a label")
helped = right["true teacher"].mean() - right["shuffled teacher"].mean() > 0.3
predictions.measured("accuracy without a label, true teacher (%)", 100 * right["true teacher"].mean())
print("It is the teacher that helps." if helped else "This control does not tell: train longer.")

# %% [markdown]
# **What would fool you.** A distilled student that beats a student alone, where the distilled one saw more images, or a
# lucky seed. The benchmark below holds both to the same images and the same first weights.
#
# ## 9 · What does a teacher cost?
#
# A student's step is a forward and a backward pass, about three times its MACs. An **online** teacher adds one forward
# pass of its own at each step. [**Cached** logits](../docs/glossary.md#cached-logits) are computed once, for some copies of each image in fixed augmentations;
# each step then needs only a look-up.
#
# ### Exercise 4.7 · Choose under a budget
#
# You have a budget in MACs for each training image, and know the MACs of a forward pass of both networks. Which leaves the
# student more epochs: the teacher online, or its logits of `copies` augmentations of each image cached? Return "online" or
# "cached", and the number of epochs, which need not be whole.
#
# <details><summary>Hint 1</summary>An epoch shows each image once: 3 × the student's MACs, and online the teacher's once,
# because it learns nothing.</details>
# <details><summary>Hint 2</summary>Pay for the cache first: the teacher sees each copy once. Divide what is left by the cost
# of the student's epoch.</details>


# %% tags=["exercise"]
def choose(budget: float, student_macs: int, teacher_macs: int, copies: int) -> tuple[str, float]:
    """The better way, "online" or "cached", and the epochs that a budget for each training image buys."""
    ### BEGIN SOLUTION
    step = 3 * student_macs
    epochs = {"online": budget / (step + teacher_macs)}
    epochs["cached"] = (budget - copies * teacher_macs) / step
    way = max(epochs, key=epochs.get)
    return way, epochs[way]
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("4.7", choose)

# %% tags=["nbval-check-output"]
macs = {"student_macs": models.macs(student.spec), "teacher_macs": models.macs(teacher.spec)}
for alone in (2, 10, 20, 50):
    way, length = choose(3 * alone * macs["student_macs"], **macs, copies=copies)
    print(f"{alone:2} epochs of the student alone buy {length:4.1f} with the teacher {way}")

# %% [markdown]
# **What it means.** A short training pays for no cache. The cache pays as soon as the training with an online teacher has
# more epochs than there are copies: then each copy is used more than once.
#
# *Predict* from the [MACs](../docs/glossary.md#macs) how much longer a step takes with the teacher online; then measure.

# %%
predictions.predict("a step with the teacher online ÷ alone", 2)

# %%
import statistics
import time

from nnc_utils.distillation import student_loss


def step_seconds(loss, batches) -> float:
    """Median seconds of forward and backward passes with a loss."""
    model, taken = copy.deepcopy(student).train().to(memory_format=torch.channels_last), []
    for batch, targets in batches:
        begin = time.perf_counter()
        loss(model, batch, targets).backward()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:] or taken)


recipe = student_loss.Recipe(temperature=temperature, alpha=alpha)
cpu = torch.device("cpu")
memory = student_loss.cache_logits(teacher, few, copies=1, augment=False, seed=seed)
plain, cached = (
    list(training.batches(data, 1, seed, 64, False, cpu))[:10] for data in (images, memory.images)
)

# %% tags=["machine-dependent"]
seconds = {
    "alone": step_seconds(training.cross_entropy, plain),
    "teacher online": step_seconds(student_loss.online(teacher, recipe, student.spec), plain),
    "teacher cached": step_seconds(student_loss.cached(memory, recipe, student.spec), cached),
}
predicted = 1 + macs["teacher_macs"] / (3 * macs["student_macs"])
measured = seconds["teacher online"] / seconds["alone"]
print(f"online: predicted {predicted:.1f}× the time of a step, measured {measured:.1f}×")
predictions.measured("a step with the teacher online ÷ alone", measured)
print(f"ratio {measured / predicted:.2f}")
print(f"cached: {seconds['teacher cached'] / seconds['alone']:.2f}× the time of a step")

# %% [markdown]
# **What it means.** A ratio below 1 says that the narrow student uses the processor worse than its teacher does: its own
# step takes longer than its MACs say.
#
# **What would fool you.** Reports that count the student's epochs and not the teacher's passes. The column
# `train_seconds` of the tables has the teacher's share in it.
#
# ## Benchmark
#
# All students of a width start from the same weights and see as many images; what differs is the loss. Controls: the
# student **alone**; with smoothed labels; with a **shuffled** teacher; trained **longer**. Validation images decide what
# is claimed. Then a fresh process scores the test images of each file, once.

# %% tags=["benchmark"]
candidates = bench.build(controls + configurations)

# %% tags=["benchmark"]
rows = bench.measure(candidates)
bench.show(rows)

# %% tags=["benchmark"]
figure = figures.parameters_against_accuracy(bench.with_reference(rows))
figures.show(figure, "Test accuracy against parameters: students with and without a teacher")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 and Fashion-MNIST. Does a teacher help there?

# %% tags=["machine-dependent"]
from bench.committed import committed

results = committed("distillation")
print(f"profile {results.name}")
figures.show(
    results.figure(), "Committed test accuracy against parameters: students with and without a teacher"
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
# - Soft labels carry what the teacher knows of the other classes. $T^2$ keeps their gradient's size.
# - A small student need not be as sure as its teacher: standardized logits and correlations ask for the ranking.
# - Features of different widths can be compared by a regressor, or by what has no channels: similarities and attention.
# - Wrong distillation trains without an error: compare gradients, and keep a control that must fail.
# - A teacher costs time. Cached logits make it cheap, with fixed augmentations.
#
# <!-- numbers:begin -->
# **In numbers.** A student (width 0.125, soft labels of all seeds, compressed, cached) gains +0.58 [+0.34, +0.82] pp
# over the same student alone. Its file is 123.8× smaller than the uncompressed network's.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. What does a teacher's soft label say that the label does not?</summary>How much the image is like
# each of the other classes. Most of it is in tiny probabilities, which a temperature above 1 brings out.</details>
# <details><summary>2. What do the probabilities tend to as T grows, and as T falls to 0?</summary>As T grows all classes
# become alike: 1 divided by the number of classes. As T falls to 0 the largest logit takes everything: a hard
# label.</details>
# <details><summary>3. Why does the soft term have the factor T²?</summary>Its gradient is (q − p)/T, and q − p shrinks with
# 1/T, too. Without the factor, another T would also mean another weight of the teacher.</details>
# <details><summary>4. A colleague uses <code>kl_div</code> with <code>reduction="mean"</code>. What happens?</summary>The
# soft term is divided by the number of classes, too. Its direction is right, its weight is too small: the student trains,
# but hardly from its teacher.</details>
# <details><summary>5. Why must the teacher be in eval mode, and why does one batch hardly show it?</summary>In train mode
# its batch-norm normalizes with the batch: what it says about an image depends on the images beside it, and its running
# statistics drift. Those of one batch are close to the running ones, so the gradient looks right.</details>
# <details><summary>6. Why does a sure teacher hardly teach what the other classes are like?</summary>In the plain
# divergence that part is weighed by 1 minus the probability of the label. Decoupled distillation gives it a weight of its
# own.</details>
# <details><summary>7. A student's logits are half of its teacher's. Which losses forgive that, and why?</summary>That of
# standardized logits, exactly: each image's logits get deviation 1 first. Correlations almost: they forgive a factor on
# the probabilities, and a softmax at a high temperature is nearly linear.</details>
# <details><summary>8. Which ways to compare features need a regressor, and why?</summary>Hints: they compare channel by
# channel, and the widths differ. Similarity compares images with images, attention pixels with pixels; neither has channels
# left.</details>
# <details><summary>9. Why must the shuffled teacher be tried without labels?</summary>With labels in the loss even its
# student learns. Without them it must fail. If it does not, the images or the evaluation leak.</details>
# <details><summary>10. Where α is large, why is the student alone a harder rival than the one with a shuffled
# teacher?</summary>A shuffled teacher does harm: most of the loss pulls towards other images' classes. To beat it says
# little. The student alone has all of its loss from right labels.</details>
# <details><summary>11. When do cached logits pay, and what do they cost the student?</summary>As soon as the training with
# an online teacher has more epochs than there are copies. The student sees the same augmentations again and
# again.</details>
# <details><summary>12. Which comparison would fool you?</summary>One that counts the student's epochs but neither the
# teacher's passes nor its images, or that trusts one seed. The rival of a distilled student is the student alone, from the
# same weights, with as many images, and with the time that the teacher took.</details>
#
# **Try it.** (1) Add `{"method": "kd", "width": 0.25, "alpha": 0.5}` to `configurations`: does the student gain? (2) Add `{"method": "dist", "width": 0.25}` and
# `{"method": "kd", "width": 0.25, "standardize": True, "temperature": 2, "gain": 10}` to `configurations`. (3) Add
# `{"method": "student_longer", "width": 0.25, "times": 2}` to `controls`: is the teacher worth more than twice the
# training?
#
# **Further reading.** [Cho and Hariharan, 2019](https://arxiv.org/abs/1910.01348), when a better teacher does not help;
# [Beyer et al., 2022](https://arxiv.org/abs/2106.05237), long trainings in which teacher and student see the same crops.
#
# Next: [05_architecture_search](05_architecture_search.ipynb): who chooses the student's architecture?
