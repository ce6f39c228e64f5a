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
# A small network, the **student**, learns from a large one, the **teacher**. It never sees the teacher's weights; it sees
# what the teacher says about each image. Does that help, and what does it cost?
#
# **You will be able to** write the distillation loss, find the bugs that raise no error, compare features of different
# widths, count the teacher's cost, and tell with controls whether a teacher helped. **You need**
# [01](01_baseline.ipynb). **Time:** about a minute with the defaults.
#
# **Contents.** 1 · What does a teacher know? 2 · Soft labels. 3 · Silent bugs. 4 · Decoupled soft labels. 5 ·
# Standardized logits and correlations. 6 · Features. 7 · Attention. 8 · Is it the teacher that helps? 9 · What does a
# teacher cost? Then the benchmark, and the committed results.

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
# The student's softened probabilities $q$ should match the teacher's, $p$
# ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)). Beside them stands the ordinary loss of the labels $y$:
#
# $$L = (1-\alpha)\,\text{CE}(q^{T=1}, y) + \alpha\, T^2\, \frac1n \sum_{\text{images}} \sum_i p_i \log\frac{p_i}{q_i}$$
#
# Why $T^2$? The gradient of the divergence by the student's logits is $(q-p)/T$, and $q-p$ itself shrinks with $1/T$.
# *Predict*: from $T = 2$ to $T = 8$, by which factor does the gradient fall without the $T^2$?

# %%
def kl(student_logits, teacher_logits, T, reduction="batchmean"):
    """How far the student's softened probabilities are from the teacher's."""
    log_q = (student_logits / T).log_softmax(1)
    p = (teacher_logits / T).softmax(1)
    return functional.kl_div(log_q, p, reduction=reduction)


def soft_labels(student_logits, teacher_logits, T):
    """The soft term of the loss."""
    return T**2 * kl(student_logits, teacher_logits, T)


def gradient(loss, student_logits):
    """The gradient of a loss by the student's logits."""
    leaf = student_logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(0)
ours, theirs = (torch.randn(64, 10, generator=draw) for _ in range(2))
plain = [gradient(lambda s, T=T: kl(s, theirs, T), ours).norm() for T in (2.0, 8.0)]
scaled = [gradient(lambda s, T=T: soft_labels(s, theirs, T), ours).norm() for T in (2.0, 8.0)]
print(f"without T²: predicted 16, measured {plain[0] / plain[1]:.1f}")
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
# the gradient, compared with the label term's? (`mean` divides by the classes, too. A teacher left in train mode
# normalizes with the batch.)

# %%
import copy
import warnings

torch.manual_seed(seed)
same_input = {key: getattr(teacher.spec, key) for key in ("channels", "size", "classes", "stem")}
student = models.build(models.resnet(18, width=width, **same_input)).eval()
with torch.no_grad():
    student_logits = student(inputs)
    in_train_mode = copy.deepcopy(teacher).train()(inputs)
T = temperature
variants = {
    "right": lambda s: T**2 * kl(s, teacher_logits, T),
    "mean instead of batchmean": lambda s: T**2 * kl(s, teacher_logits, T, "mean"),
    "T² omitted": lambda s: kl(s, teacher_logits, T),
    "student and teacher swapped": lambda s: T**2 * kl(teacher_logits, s, T),
    "teacher in train mode": lambda s: T**2 * kl(s, in_train_mode, T),
    "logits of other images": lambda s: T**2 * kl(s, teacher_logits.roll(1, 0), T),
}

# %% tags=["machine-dependent"]
warnings.simplefilter("ignore")  # torch warns of `mean`: it is one of the bugs
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
# direction. A teacher in train mode hardly shows on one batch. So the package takes its logits by name only, puts teachers into eval
# mode at every step, and binds cached logits to their images.
#
# ## 4 · Can the other classes get a weight of their own?
#
# The divergence is a sum of two parts: "right class or not", and $(1 - p_y)$ times the divergence among the *other*
# classes ([Zhao et al., 2022](https://arxiv.org/abs/2203.08679)). A sure teacher has a small $1 - p_y$: it hardly
# teaches what the others are like. **Decoupled** distillation gives that part a weight of its own.
#
# *Predict*: do the two parts add up to the plain loss?

# %%
def decoupled(student_logits, teacher_logits, labels, T):
    """The two parts: right class or not, and among the others."""
    parts = []
    for logits in (student_logits, teacher_logits):
        probabilities = (logits / T).softmax(1)
        of_right = probabilities.gather(1, labels[:, None])
        others = logits.masked_fill(functional.one_hot(labels, logits.shape[1]).bool(), -1e9)
        parts.append((torch.cat([of_right, 1 - of_right], 1), (others / T).softmax(1).clamp(min=1e-12)))
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
# *Predict*: a student's logits are half of its teacher's. Which of the three losses is exactly 0?

# %%
def standardized(logits):
    """Each image's logits with mean 0 and deviation 1."""
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)


def pearson(a, b):
    """The correlation of each row of one with that of the other."""
    a, b = (functional.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (a, b))
    return (a * b).sum(1)


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
# The widths of the two differ, so a trained 1×1 convolution stands between them: the **regressor** of FitNets
# ([Romero et al., 2015](https://arxiv.org/abs/1412.6550)). Its loss is a squared difference. Or only *relations* are
# compared: which images of a batch are alike? With $Q$ the features of a stage, one row an image, the matrix
# $G = QQ^\top$ with rows of length 1 is comparable for any two widths
# ([Tung and Mori, 2019](https://arxiv.org/abs/1907.09682)).

# %%
def relations(features):
    """Which images of the batch are alike: rows of unit length."""
    rows = features.flatten(1)
    return functional.normalize(rows @ rows.T, dim=1)


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

# %%
def attention(features):
    """Where a stage is active: (images, pixels), rows of length 1."""
    return functional.normalize(features.square().mean(1).flatten(1), dim=1)


maps = {
    name: stage(network, inputs[:6], "layer1")
    for name, network in (("teacher", teacher), ("student", student))
}
figure, panels = plt.subplots(3, 6, figsize=(9, 4.4))
for axes, image in zip(panels[0], some[:6], strict=True):
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
# A student can improve for many reasons: more images, smoothed labels, a better schedule. A control that **must fail**
# tells: a *shuffled* teacher, whose logits are of other images of the batch. With labels in the loss even that student
# learns. So we remove them: $\alpha = 1$, and the teacher is the only source.
#
# *Predict* both accuracies.

# %% tags=["machine-dependent"]
from dataclasses import replace

from nnc_utils.data import Split


def taught(shuffled: bool):
    """A loss without labels: the teacher alone speaks, of these images or of others."""

    def loss(model, inputs, labels):
        with torch.no_grad():
            said = teacher(inputs).float()
        said = said.roll(1, 0) if shuffled else said
        return soft_labels(model(inputs).float(), said, temperature)

    return loss


few = replace(images, train=Split(images.train.images[:2000], images.train.labels[:2000]))  # all of digits
right = {}
for name, loss in (("true teacher", taught(False)), ("shuffled teacher", taught(True))):
    network = copy.deepcopy(student)
    common = {"batch_size": bench.recipe["batch_size"], "augment": False, "seed": seed}
    training.fit(network, few, epochs=max(2, epochs), learning_rate=learning_rate, loss=loss, **common)
    predictions = evaluation.predict(network.eval(), images.validation, normalize=images.normalize)
    right[name] = predictions == images.validation.labels.numpy()

# %% tags=["machine-dependent"]
for name, correct in right.items():
    print(f"{name}: {100 * correct.mean():.1f} % of validation, and it never saw a label")
helped = right["true teacher"].mean() - right["shuffled teacher"].mean() > 0.3
print("It is the teacher that helps." if helped else "This control does not tell: train longer.")

# %% [markdown]
# **What would fool you.** A distilled student that beats a student alone, where the distilled one saw more images, or a
# lucky seed. The benchmark below holds both to the same images and the same first weights.
#
# ## 9 · What does a teacher cost?
#
# A student's step is a forward and a backward pass, about three times its MACs. An **online** teacher adds one forward
# pass of its own. **Cached** logits need only a look-up, but the student then sees fixed augmentations. *Predict* from
# the MACs how much longer a step takes with the teacher online; then measure.

# %%
import statistics
import time

from nnc_utils.distillation import teaching


def step_seconds(loss, batches) -> float:
    """Median seconds of forward and backward passes with a loss."""
    model, taken = copy.deepcopy(student).train().to(memory_format=torch.channels_last), []
    for batch, targets in batches:
        begin = time.perf_counter()
        loss(model, batch, targets).backward()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:] or taken)


recipe = teaching.Recipe(temperature=temperature, alpha=alpha)
cpu = torch.device("cpu")
memory = teaching.cache_logits(teacher, few, copies=1, augment=False, seed=seed)
plain, cached = (
    list(training.batches(data, 1, seed, 64, False, cpu))[:10] for data in (images, memory.images)
)

# %% tags=["machine-dependent"]
seconds = {
    "alone": step_seconds(training.cross_entropy, plain),
    "teacher online": step_seconds(teaching.online(teacher, recipe, student.spec), plain),
    "teacher cached": step_seconds(teaching.cached(memory, recipe, student.spec), cached),
}
predicted = 1 + models.macs(teacher.spec) / (3 * models.macs(student.spec))
measured = seconds["teacher online"] / seconds["alone"]
print(f"online: predicted {predicted:.1f}× the time of a step, measured {measured:.1f}×")
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
# ## Summary
#
# - Soft labels carry what the teacher knows of the other classes. $T^2$ keeps their gradient's size.
# - A small student need not be as sure as its teacher: standardized logits and correlations ask for the ranking.
# - Wrong distillation trains without an error: compare gradients, and keep a control that must fail.
# - A teacher costs time. Cached logits make it cheap, with fixed augmentations.
#
# **Questions.** (1) What happens to the soft term as $T \to \infty$? (2) Why must the teacher be in eval mode? (3) Why is
# the student alone a harder rival than the shuffled teacher where $\alpha$ is large?
#
# **Exercises.** (1) Set `alpha = 0.5`: does the student gain? (2) Add `{"method": "dist", "width": 0.25}` and
# `{"method": "kd", "width": 0.25, "standardize": True, "temperature": 2, "gain": 10}` to `configurations`. (3) Add `{"method": "student_longer", "width": 0.25, "times": 2}` to `controls`: is the teacher worth
# more than twice the training?
#
# Next: [05_architecture_search](05_architecture_search.ipynb): who chooses the student's architecture?
