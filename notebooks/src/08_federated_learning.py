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
# # 08 · Federated learning: compressing what training sends
#
# The images lie on many devices and stay there. Each device trains a copy of one network and sends what changed. A network is
# sent in every round, to everyone and back: what is compressed here is not a file but the *traffic*. How few bytes are enough?
#
# **You will be able to** train one network over clients that keep their images, round without a bias, and send only the
# largest changes. You will hold back what was lost, tell when that fails, and count bytes where they are sent, both ways.
# **You need** [01](01_baseline.ipynb), and steps and entropy coding of [02](02_quantization.ipynb). **Time:** 60 minutes to
# read, 60 for the seven exercises, a minute to run.
#
# **Contents.**
# [1 · Who has the images?](#1-·-Who-has-the-images?)
# [2 · Averaging](#2-·-How-do-clients-train-one-network?).
# [3 · What a round costs](#3-·-What-does-a-round-cost?).
# [4 · An update](#4-·-What-does-an-update-look-like?).
# [5 · Rounding without a bias](#5-·-Can-a-number-be-rounded-without-a-bias?).
# [6 · Bytes](#6-·-How-many-bytes-are-codes-of-k-bits?).
# [7 · The largest](#7-·-What-if-only-the-largest-are-sent?).
# [8 · Error feedback](#8-·-Where-does-the-rest-go?).
# [9 · The way down](#9-·-And-the-way-down?).
# [10 · When feedback fails](#10-·-When-does-error-feedback-fail?).
# [11 · Accuracy for a megabyte](#11-·-What-does-a-megabyte-buy?).
# [12 · Real processes](#12-·-Does-it-hold-between-real-processes?).
# [13 · Privacy](#13-·-What-does-the-server-learn?).
# Then [the benchmark](#Benchmark),
# [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
dirichlet: float = 0.3  # [0.01, 1000] how alike the clients' classes are: small is unlike, 100 alike
lesson_clients: int = 8  # [2, 100] clients of the lesson, simulated in one process
lesson_rounds: int = 30  # [1, 1000] rounds of each training in the lesson
lesson_rate: float = 0.2  # [0.00001, 1] learning rate of the lesson's clients
seed: int = 1  # [0, 1000000] of the split, the weights, the order and the rounding
# what real processes and the benchmark at the end run
clients: int = 3  # [2, 100] client processes
rounds: int = 7  # [1, 10000] rounds
width: float = 0.125  # (0, 1] of the network, as a share of ResNet-18's channels
local_epochs: float = 1.0  # [0.01, 100] passes over a client's images in a round
batch_size: int = 32  # [2, 4096] images a step
learning_rate: float = 0.1  # [0.00001, 1] of the clients
configurations: list = [
    {"method": "fedavg", "dirichlet": 0.3, "bits": 4, "down_bits": 4},
    {"method": "fedavg", "dirichlet": 0.3, "bits": 4, "share": 0.05, "feedback": True, "down_bits": 4},
]
controls: list = [  # fp32 both ways: as many rounds, and as many bytes
    {"method": "fedavg", "dirichlet": 0.3},
    {
        "method": "fedavg_equal_bytes",
        "of": {"method": "fedavg", "dirichlet": 0.3, "bits": 4, "down_bits": 4},
    },
]
upstream: list = []  # run folders of 01_baseline, own seed first, and of earlier shards; empty: 01's defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
profile: str = "smoke"  # where the result belongs: smoke, quick, federated, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/08_federated_learning

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from bench.session import Bench
from nnc_utils import encoding, figures
from nnc_utils.exercises import check, predictions

bench = Bench("08_federated_learning", globals())

# %% [markdown]
# ## 1 · Who has the images?
#
# Devices, the **clients**, differ: one has mostly 3s, another has few images at all. To study that, a known data set is
# divided unevenly. In a [**Dirichlet split**](../docs/glossary.md#dirichlet-split) each class is divided among the clients in shares that a
# Dirichlet distribution draws ([Yurochkin et al., 2019](https://arxiv.org/abs/1905.12022)). Its parameter α says how alike
# the shares are: with α = 100 they are nearly equal; with α = 0.3 most of a class lies with few clients.
#
# *Predict*: in an equal split the most frequent of ten classes has about 10 % of a client's images. How much with α = 0.3?

# %%
predictions.predict("most frequent class of a client, mean (%)", 10)

# %%
figures.style()
images = bench.images
labels = images.train.labels.long()


def dirichlet_split(alpha: float) -> list[torch.Tensor]:
    """The places of each client's images: each class is divided by a draw from Dirichlet(alpha)."""
    draw = np.random.default_rng(seed)
    parts = [[] for _ in range(lesson_clients)]
    for label in range(len(images.classes)):
        own = draw.permutation(np.flatnonzero(labels == label))
        ends = (draw.dirichlet([alpha] * lesson_clients).cumsum()[:-1] * len(own)).round().astype(int)
        for part, chosen in zip(parts, np.split(own, ends), strict=True):
            part.extend(chosen)
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in parts]


# %% [markdown]
# The package draws in the same way, and again where a client is left without images. From here on its split is used.

# %% tags=["machine-dependent"]
from nnc_utils.federated import split

by_hand = dirichlet_split(dirichlet)
unlike, alike = (
    split.dirichlet(labels, clients=lesson_clients, alpha=alpha, seed=seed) for alpha in (dirichlet, 100)
)
print(f"the package divides alike: {all(map(torch.equal, unlike, by_hand))}")
everyone = torch.cat(unlike).sort().values
print(f"every image has one client: {torch.equal(everyone, torch.arange(len(labels)))}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True, sharey=True)
for axes, parts, alpha in zip(panels, (unlike, alike), (dirichlet, 100), strict=True):
    table = pd.DataFrame(split.counts(labels, parts, len(images.classes)).numpy())
    table.plot.barh(stacked=True, ax=axes, legend=False, width=0.8)
    axes.set(title=f"α = {alpha:g}: who has which classes?", xlabel="images, a colour for each class")
    axes.set_ylabel("client")
figures.show(figure, "Images of each client by class, for two values of α: unequal left, alike right")

# %% tags=["machine-dependent"]
counts = split.counts(labels, unlike, len(images.classes))
most = float((counts.max(1).values / counts.sum(1)).mean())
predictions.measured("most frequent class of a client, mean (%)", 100 * most)

# %% [markdown]
# ## 2 · How do clients train one network?
#
# [**Federated averaging**](../docs/glossary.md#federated-averaging-fedavg) ([McMahan et al., 2017](https://arxiv.org/abs/1602.05629)) repeats a *round*. The
# server sends the weights $w$. Each client trains them on its own images and sends its **update** $u_c$: its weights after
# training less those it got. The server adds the mean, in which a client weighs as much as it has images $n_c$:
#
# $$w \leftarrow w + \sum_c \frac{n_c}{n}\, u_c, \qquad n = \sum_c n_c$$
#
# With one step on all of a client's images its update is minus the learning rate times its gradient, and the mean update
# is a step on all images. With several local steps fewer rounds are needed. But clients with different images walk apart,
# and the mean of where they end is not where all images would have led.
#
# ### Exercise 8.1 · The mean update
#
# `updates` are vectors of the same length, `images` says how many images each client has. Return the mean update. A client
# may have no images.
#
# <details><summary>Hint 1</summary>Multiply each update by its number of images, add them, and divide by the number of all
# images.</details>
# <details><summary>Hint 2</summary><code>zip(updates, images, strict=True)</code> gives the pairs; <code>sum(...)</code> adds tensors,
# too.</details>


# %% tags=["exercise"]
def average(updates: list[torch.Tensor], images: list[int]) -> torch.Tensor:
    """The mean of the clients' updates, weighed by their images."""
    ### BEGIN SOLUTION
    total = sum(update * count for update, count in zip(updates, images, strict=True))
    return total / sum(images)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.1", average)

# %% [markdown]
# The lesson's network is two linear layers, and all its weights are one vector. The benchmark below has a ResNet.

# %%
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

inputs = images.normalize(images.train.images)
held_out, their_labels = images.normalize(images.validation.images), images.validation.labels.long()


def network() -> nn.Module:
    """Two linear layers."""
    pixels = images.channels * images.size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, len(images.classes)))


def local_update(weights: torch.Tensor, part: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """What a pass over a client's own images changes: the weights after it less those before."""
    model = network()
    vector_to_parameters(weights.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lesson_rate)
    for chosen in part[torch.randperm(len(part), generator=draw)].split(32):
        loss = functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters_to_vector(model.parameters()).detach() - weights


# %%
@torch.no_grad()
def accuracy(weights: torch.Tensor) -> float:
    """Percent of the validation images that are right."""
    model = network()
    vector_to_parameters(weights.clone(), model.parameters())
    return 100 * float((model(held_out).argmax(1) == their_labels).float().mean())


def federated(parts: list[torch.Tensor], total: int) -> list[float]:
    """Federated averaging: validation accuracy after each round."""
    draw, weights, curve = torch.Generator().manual_seed(seed), start.clone(), []
    for _ in range(total):
        updates = [local_update(weights, part, draw) for part in parts]
        weights = weights + average(updates, [len(part) for part in parts])
        curve.append(accuracy(weights))
    return curve


torch.manual_seed(seed)
start = parameters_to_vector(network().parameters()).detach()

# %% [markdown]
# *Predict*: a client that joins nobody trains for as many rounds on its own images, which are few and of few classes. How
# accurate is it on all classes?

# %%
predictions.predict("accuracy of the clients, each alone, mean (%)", 80)

# %% tags=["machine-dependent"]
together = {
    f"together, α = {dirichlet:g}": federated(unlike, lesson_rounds),
    "together, α = 100": federated(alike, lesson_rounds),
}
each = np.mean([federated([own], lesson_rounds) for own in unlike], axis=0)
together["each client alone, mean"] = each.tolist()
predictions.measured("accuracy of the clients, each alone, mean (%)", each[-1])

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
for (name, curve), marker in zip(together.items(), "os^", strict=True):
    axes.plot(range(1, lesson_rounds + 1), curve, marker=marker, markevery=5, label=name)
axes.set(title="Does it pay to join?", xlabel="rounds", ylabel="validation accuracy (%)")
axes.legend()
figures.show(figure, "Validation accuracy against rounds: together far above each client alone")

# %% [markdown]
# **What it means.** It pays: together the clients learn all classes, though none has many images of each. Unlike clients
# need more rounds. Here they end as accurate as alike ones.
#
# ## 3 · What does a round cost?
#
# A network of $n$ parameters in fp32 takes $4n$ bytes. In a round each of $C$ clients gets it and sends an update of the same
# length: $2 \cdot 4n \cdot C$ bytes, times the rounds. *Predict* the megabytes of the training above, whose network has about
# 10,000 parameters on the digits. Then build the messages and add up their lengths. A message is what the suite's own files hold: a description in JSON, and streams of bytes.

# %%
predictions.predict("megabytes of the training in fp32", 1)

# %% tags=["machine-dependent"]
import json


def message(encoded: encoding.Encoding) -> int:
    """Bytes of a message: its description as JSON, and its streams."""
    description, streams = encoding.pack(encoded)
    return len(json.dumps(description)) + sum(stream.size for stream in streams.values())


formula = 2 * 4 * len(start) * lesson_clients * lesson_rounds / 1e6
counted = 2 * message(encoding.Dense(start)) * lesson_clients * lesson_rounds / 1e6
print(f"by the formula {formula:.2f} MB, counted {counted:.2f} MB, ratio {counted / formula:.4f}")
predictions.measured("megabytes of the training in fp32", counted)

# %% [markdown]
# Fewer rounds, fewer clients a round, or fewer bits a number: each saves traffic. Fewer rounds need more local steps, and the
# clients walk farther apart. The rest of this notebook is about bits.
#
# ## 4 · What does an update look like?
#
# *Predict*: sort an update's numbers by size. How many percent of them hold 90 % of its squared length?

# %%
predictions.predict("numbers that hold 90 % of an update (%)", 90)

# %% tags=["machine-dependent"]
update = local_update(start, unlike[0], torch.Generator().manual_seed(seed))
energy = update.square().sort(descending=True).values.cumsum(0) / update.square().sum()
holding = 100 * float((energy < 0.9).float().mean())
predictions.measured("numbers that hold 90 % of an update (%)", holding)

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
deviations = (update / update.std()).numpy()
edges = np.linspace(-8, 8, 81)
axes.hist(deviations.clip(-8, 8), edges, density=True, label="an update")
axes.plot(edges, np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi), color="C1", label="normal distribution")
axes.set(
    yscale="log",
    ylim=(1e-4, 5),
    xlabel="update in its standard deviations (beyond 8: at 8)",
    ylabel="density",
)
axes.set_title("Are changes normally distributed?")
axes.legend()
figures.show(figure, "Histogram of an update on a log axis: a high peak at 0 and long tails")

# %% [markdown]
# **What it means.** They are not: most numbers hardly change, a few change much. The largest sets the step of uniform codes
# (the scale of [02](02_quantization.ipynb)). With few bits most of the others are far below a step. That is good for entropy
# coding, and it is where errors come from.
#
# ## 5 · Can a number be rounded without a bias?
#
# A number lies a quarter of a step above a code. Rounding to the nearest takes that code, in every round and at every
# client: what is small is lost for ever. [**Stochastic rounding**](../docs/glossary.md#stochastic-rounding) draws instead:
# up with probability ¼, down with ¾. One message is worse, but the mean of many is right
# ([Alistarh et al., 2017](https://arxiv.org/abs/1610.02132)). With a uniform draw $r$ from 0 to 1
#
# $$q = \left\lfloor \frac{u}{s} + r \right\rfloor, \qquad \mathbb{E}[s\,q] = u$$
#
# ### Exercise 8.2 · Rounding at random
#
# `update` is a tensor, `step` the length $s$ of a step, and `draws` has the update's shape and uniform numbers from 0 to 1.
# Return the codes $q$, whole numbers. Their mean over many draws is update / step, also below 0.
#
# <details><summary>Hint 1</summary>With a fraction of ¼ a draw in [¾, 1) is to round up. Add the draw, then go down to the next whole
# number.</details>
# <details><summary>Hint 2</summary>A conversion to whole numbers cuts towards 0, which is up for negative
# numbers.</details>


# %% tags=["exercise"]
def stochastic_codes(update: torch.Tensor, step: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Whole numbers beside update / step, drawn so that their mean is update / step."""
    ### BEGIN SOLUTION
    return torch.floor(update / step + draws)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.2", stochastic_codes)

# %% [markdown]
# *Predict*: an update is rounded 1,000 times, and the results are averaged. How many times smaller is the error of the mean
# than the error of one?

# %%
predictions.predict("error of one rounding ÷ error of the mean", 1000)

# %% tags=["machine-dependent"]
draw = torch.Generator().manual_seed(seed)
step = update.abs().max() / 7  # codes from −7 to 7: 4 bits
drawn = torch.rand(1000, len(update), generator=draw)
at_random = step * stochastic_codes(update, step, drawn)
once, many = (float((mean - update).norm()) for mean in (at_random[0], at_random.mean(0)))
nearest = float((step * (update / step).round() - update).norm())
print(f"error at random: one {once:.3f}, mean of 1,000 {many:.3f}; to the nearest always {nearest:.3f}")
predictions.measured("error of one rounding ÷ error of the mean", once / many)

# %% [markdown]
# **What it means.** At random, a number can: the error of a mean falls with the root of how many are averaged. To the nearest
# one message is better, and a thousand are no better than one. The server averages over clients and rounds: it gains from
# rounding at random.
#
# ## 6 · How many bytes are codes of k bits?
#
# $k$ bits give codes from $-(2^{k-1}-1)$ to $2^{k-1}-1$, and the largest number of the update sets the step. Then the
# [entropy coder](../docs/glossary.md#entropy-coding) of [02](02_quantization.ipynb) writes them: most are 0, and a 0 costs a fraction of a bit.
#
# *Predict* the bytes from the entropy $H$ of the codes, $nH/8$, and how many times smaller than fp32 a message of 4 bits is.


# %%
def rounded(bits: int, nearest: bool = False):
    """A compressor of vectors to codes of so many bits, drawn at random or the nearest."""
    largest = 2 ** (bits - 1) - 1

    def compress(vector: torch.Tensor, draw: torch.Generator) -> encoding.Encoding:
        step = vector.abs().max() / largest
        draws = 0.5 if nearest else torch.rand(len(vector), generator=draw)
        codes = stochastic_codes(vector, step, draws).clamp(-largest, largest)
        return encoding.Uniform(codes.short(), step, axis=None, bits=bits)

    return compress


def exactly(vector: torch.Tensor, draw: torch.Generator) -> encoding.Encoding:
    """No compression: fp32."""
    return encoding.Dense(vector)


# %%
predictions.predict("message of 4 bits: times smaller than fp32", 8)

# %% tags=["machine-dependent"]
lines = {}
for bits in (8, 4, 3, 2):
    encoded = rounded(bits)(update, torch.Generator().manual_seed(seed))
    shares = encoded.codes.unique(return_counts=True)[1] / len(update)
    entropy, nbytes = float(-(shares * shares.log2()).sum()), message(encoded)
    lines[bits] = [entropy, len(update) * entropy / 8, nbytes, 8 * nbytes / (len(update) * entropy)]
    lines[bits].append(message(encoding.Dense(update)) / nbytes)
headings = ["entropy (bits)", "bytes by the entropy", "bytes", "ratio", "times smaller than fp32"]
predictions.measured("message of 4 bits: times smaller than fp32", lines[4][-1])
pd.DataFrame(lines.values(), index=pd.Index(lines, name="bits"), columns=headings).round(2)

# %% [markdown]
# **What it means.** Far fewer than $nk/8$: the entropy says how many. The rest is description and frequency table. It counts
# where a message is short.
#
# ## 7 · What if only the largest are sent?
#
# Most of an update's length is in few numbers. Send these and their places. The places are a [mask](../docs/glossary.md#mask), entropy-coded, too
# ([Aji and Heafield, 2017](https://arxiv.org/abs/1704.05021); [Lin et al., 2018](https://arxiv.org/abs/1712.01887)).
#
# ### Exercise 8.3 · The largest
#
# Return a mask in the shape of `update`, (numbers,), that is True at exactly `count` places: those where the update is largest
# in size. Several numbers may be equal.
#
# <details><summary>Hint 1</summary>A comparison with the smallest one that is kept goes wrong where several are as large. Look for
# places.</details>
# <details><summary>Hint 2</summary><code>tensor.topk(count).indices</code> are the places of the largest;
# <code>torch.zeros(n, dtype=torch.bool)</code> is a mask to begin with.</details>


# %% tags=["exercise"]
def largest(update: torch.Tensor, count: int) -> torch.Tensor:
    """A mask that is True at the `count` numbers of the largest size."""
    ### BEGIN SOLUTION
    mask = torch.zeros(len(update), dtype=torch.bool)
    mask[update.abs().topk(count).indices] = True
    return mask
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.3", largest)


# %%
def sparse(share: float, bits: int):
    """A compressor that sends this share of a vector, the largest, in so many bits, to the nearest code."""

    def compress(vector: torch.Tensor, draw: torch.Generator) -> encoding.Encoding:
        mask = largest(vector, max(1, round(share * len(vector))))
        kept = rounded(bits, nearest=True)(vector * mask, draw)
        return encoding.Uniform(kept.codes * mask, kept.scale, axis=None, bits=bits, mask=mask)

    return compress


# %% [markdown]
# *Predict*: with 5 % of the numbers, what share of the message says *where* they are, if the numbers have 4 bits?

# %%
predictions.predict("share of a message that says where (%)", 10)

# %% tags=["machine-dependent"]
lines = {}
for share in (0.2, 0.05, 0.01):
    encoded = sparse(share, 4)(update, draw)
    description, streams = encoding.pack(encoded)
    bound = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * len(update) / 8
    where, nbytes = streams["mask"].size, message(encoded)
    lines[f"{100 * share:g} %"] = [bound, where, streams["codes"].size, nbytes, 4 * len(update) / nbytes]
    if share == 0.05:
        predictions.measured("share of a message that says where (%)", 100 * where / nbytes)
headings = [f"{part} (bytes)" for part in ("places by the entropy", "places", "numbers", "message")]
headings.append("times smaller than fp32")
pd.DataFrame(lines.values(), index=pd.Index(lines, name="sent"), columns=headings).round(1)

# %% [markdown]
# **What would fool you.** "1 % of the numbers" is not 1 % of the bytes: places cost more than the numbers do.
#
# ## 8 · Where does the rest go?
#
# What is not sent is lost, in each round anew. A weight that wants to move a little in each round never does.
# [**Error feedback**](../docs/glossary.md#error-feedback) keeps what was lost as a residual $e$ and adds it to the next update
# ([Seide et al., 2014](https://www.microsoft.com/en-us/research/publication/1-bit-stochastic-gradient-descent-and-application-to-data-parallel-distributed-training-of-speech-dnns/);
# [Stich et al., 2018](https://arxiv.org/abs/1809.07599)). With $C$ for compressing and decoding,
#
# $$m_t = C(u_t + e_t), \qquad e_{t+1} = u_t + e_t - m_t$$
#
# Add up the messages: $\sum m_t = \sum u_t - e_T$. Nothing is lost for ever, as long as the residual stays small.
#
# ### Exercise 8.4 · What is held back
#
# `compress` takes a vector and returns what the server will decode of it. It may draw at random, so that each call differs.
# Return two things: what the server receives, and the new residual.
#
# <details><summary>Hint 1</summary>The old residual belongs to what is sent, and so to what may be lost again.</details>
# <details><summary>Hint 2</summary>Call <code>compress(...)</code> once, and keep its result for both lines.</details>


# %% tags=["exercise"]
def feedback(update: torch.Tensor, residual: torch.Tensor, compress) -> tuple[torch.Tensor, torch.Tensor]:
    """What is received of an update with the residual of earlier ones, and the new residual."""
    ### BEGIN SOLUTION
    wanted = update + residual
    received = compress(wanted)
    return received, wanted - received
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.4", feedback)


# %%
class Sender:
    """One end of a line: compresses what it is given, counts bytes, and may hold back what was lost."""

    def __init__(self, compress, holds_back: bool, number: int):
        self.compress, self.holds_back = compress, holds_back
        self.draw = torch.Generator().manual_seed(1000 * seed + number)
        self.residual, self.bytes = torch.zeros_like(start), 0

    def __call__(self, update: torch.Tensor) -> torch.Tensor:
        """What the other end decodes."""

        def through(vector: torch.Tensor) -> torch.Tensor:
            encoded = self.compress(vector, self.draw)
            self.bytes += message(encoded)
            return encoding.decode(encoded)

        if not self.holds_back:
            return through(update)
        received, self.residual = feedback(update, self.residual, through)
        return received


# %% [markdown]
# The package's `Feedback` does the same to each tensor of a network. Three updates, rounded to the nearest: bit for bit?

# %% tags=["nbval-check-output"]
from nnc_utils.federated import compress as package

to_nearest = package.Compressor(bits=4, rounding="nearest")
ours, theirs = torch.zeros_like(update), package.Feedback(to_nearest)
for _ in range(3):
    received, ours = feedback(update, ours, lambda v: encoding.decode(rounded(4, nearest=True)(v, draw)))
    _, decoded = theirs.send({"weight": update[None]}, draw)
    same = torch.equal(received, decoded["weight"][0]), torch.equal(ours, theirs.residual["weight"][0])
    print(f"received the same: {same[0]}, the same residual: {same[1]}")

# %% [markdown]
# ## 9 · And the way down?
#
# The server sends weights to every client in each round: as many bytes as come up. To send fewer, the clients keep what they
# were sent. The server compresses the *difference* from what they hold to what it has. What a message lost is still in the
# next difference. That is error feedback, too, with the server's own weights as its memory
# ([Sattler et al., 2019](https://arxiv.org/abs/1903.02891)).
#
# ### Exercise 8.5 · What clients hold
#
# `weights` are the server's, `shared` is what all clients hold, `compress` is as in exercise 8.4. Return what the clients hold
# after the server's message.
#
# <details><summary>Hint 1</summary>Clients never see <code>weights</code>: they add what arrives to what they hold.</details>


# %% tags=["exercise"]
def broadcast(weights: torch.Tensor, shared: torch.Tensor, compress) -> torch.Tensor:
    """What the clients hold after the compressed message of the server."""
    ### BEGIN SOLUTION
    return shared + compress(weights - shared)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.5", broadcast)

# %% [markdown]
# ## 10 · When does error feedback fail?
#
# The residual goes through the compressor again. It stays small only if less is lost than goes in: the compressor has to be
# [**contracting**](../docs/glossary.md#contracting-compressor),
#
# $$\lVert C(v) - v\rVert^2 \le (1 - \delta)\, \lVert v\rVert^2 \qquad \text{with } \delta > 0$$
#
# ([Karimireddy et al., 2019](https://arxiv.org/abs/1901.09847); [Beznosikov et al., 2020](https://arxiv.org/abs/2002.12410)).
# The largest $k$ of $n$ numbers always are. So is rounding to the nearest: a number that becomes 0 loses itself and no more.
# Rounding at random may make a whole step of a small number. Then more is lost than went in.
#
# ### Exercise 8.6 · Does it contract?
#
# Return $\lVert C(v) - v\rVert^2 / \lVert v\rVert^2$ of a vector, `update`, and what was `received` of it, both (numbers,).
#
# <details><summary>Hint 1</summary>The squared length of a vector is the sum of its squares:
# <code>x.square().sum()</code>.</details>


# %% tags=["exercise"]
def lost(update: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """The squared length of what is lost, as a share of the update's."""
    ### BEGIN SOLUTION
    return (received - update).square().sum() / update.square().sum()
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.6", lost)

# %% [markdown]
# A number $v$ between 0 and a step $s$ becomes $s$ with probability $v/s$: the mean square of its error is $v(s-v)$. With 2 bits
# all numbers lie within one step. Then the share is $s \lVert v\rVert_1 / \lVert v\rVert^2 - 1$. *Predict* it: is it below 1?

# %%
predictions.predict("share that 2 bits at random lose", 1)

# %% tags=["machine-dependent"]
compressors = {
    "4 bits, at random": rounded(4),
    "2 bits, at random": rounded(2),
    "2 bits, to the nearest": rounded(2, nearest=True),
    "5 % in 4 bits": sparse(0.05, 4),
}
shares = {}
for name, compress in compressors.items():
    shares[name] = float(lost(update, encoding.decode(compress(update, draw))))
formula = float(update.abs().max() * update.abs().sum() / update.square().sum() - 1)
print(f"2 bits at random: by the formula {formula:.2f}, measured {shares['2 bits, at random']:.2f}")
predictions.measured("share that 2 bits at random lose", shares["2 bits, at random"])
print("contracting here:", "; ".join(name for name, share in shares.items() if share < 1))
pd.DataFrame({"lost share": shares}).round(3)

# %% [markdown]
# Now the training: the loop of section 2, with a `Sender` for each client and one for the server.


# %%
def train(up=exactly, *, holds_back: bool = False, down=exactly) -> pd.DataFrame:
    """Federated averaging with compressed messages, both ways: a line for each round."""
    draw, weights, shared = torch.Generator().manual_seed(seed), start.clone(), start.clone()
    senders = [Sender(up, holds_back, number) for number in range(len(unlike))]
    server, lines = Sender(down, False, len(unlike)), []
    for _ in range(lesson_rounds):
        updates = [local_update(shared, part, draw) for part in unlike]
        received = [sender(own) for sender, own in zip(senders, updates, strict=True)]
        weights = weights + average(received, [len(part) for part in unlike])
        shared = broadcast(weights, shared, server)
        held = sum(sender.residual.norm() for sender in senders) / sum(own.norm() for own in updates)
        megabytes = [sum(sender.bytes for sender in senders) / 1e6, server.bytes * len(unlike) / 1e6]
        lines.append([accuracy(shared), *megabytes, float(held)])
    columns = ["accuracy (%)", "MB up", "MB down", "residual ÷ update"]
    return pd.DataFrame(lines, columns=columns, index=pd.RangeIndex(1, len(lines) + 1, name="round"))


# %% [markdown]
# *Predict*: after all rounds, how many times as long as an update is the residual of 2 bits at random?

# %%
predictions.predict("residual ÷ update, 2 bits at random", 1)

# %% tags=["machine-dependent"]
runs = {"fp32": train()}
for name, compress in compressors.items():
    runs[name] = train(compress)
    runs[f"{name}, with feedback"] = train(compress, holds_back=True)
last = pd.DataFrame({name: run.iloc[-1] for name, run in runs.items()}).T
grown = last.loc["2 bits, at random, with feedback", "residual ÷ update"]
predictions.measured("residual ÷ update, 2 bits at random", grown)
last.drop(columns="MB down").round(2)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for name, marker in zip(compressors, "os^D", strict=True):
    run = runs[f"{name}, with feedback"]
    left.plot(run.index, run["residual ÷ update"], marker=marker, markevery=5, label=name)
    right.plot(run.index, run["accuracy (%)"], marker=marker, markevery=5, label=name)
left.set(title="Does the residual stop growing?", xlabel="rounds", ylabel="residual ÷ update", yscale="log")
left.yaxis.set_major_formatter("{x:g}")
right.set(title="Does the network learn?", xlabel="rounds", ylabel="validation accuracy (%)")
right.legend(title="with error feedback", fontsize=9)
figures.show(figure, "Residual and accuracy with error feedback: that of 2 bits at random grows on")

# %% [markdown]
# **What it means.** Without feedback rounding at random is right on average, and rounding to the nearest loses what is small.
# With feedback it is the other way round. The residual makes up for a bias, and with a contracting compressor it soon stops
# growing. With 2 bits at random it outgrows the updates: each message carries mostly old errors. The package rounds to the
# nearest wherever there is feedback, and at random elsewhere.
#
# **What would fool you.** The accuracy after the last round: these two layers survive much. Look at the residual.
#
# ## 11 · What does a megabyte buy?
#
# *Predict*: the largest 5 % in 4 bits up, with feedback, and 4 bits down. How many times fewer bytes than fp32, both ways
# together?

# %%
predictions.predict("times fewer bytes, 5 % up and 4 bits down", 20)

# %% tags=["machine-dependent"]
down = rounded(4, nearest=True)  # the server has a memory
both = {
    "fp32": runs["fp32"],
    "4 bits up, fp32 down": runs["4 bits, at random"],
    "4 bits up, 4 bits down": train(rounded(4), down=down),
    "2 bits up with feedback, 4 bits down": train(rounded(2, nearest=True), holds_back=True, down=down),
    "5 % up with feedback, 4 bits down": train(sparse(0.05, 4), holds_back=True, down=down),
}
ends = pd.DataFrame({name: run.iloc[-1, :3] for name, run in both.items()}).T
megabytes = ends["MB up"] + ends["MB down"]
ends["times fewer bytes"] = megabytes["fp32"] / megabytes
fewer = ends["times fewer bytes"].iloc[-1]
predictions.measured("times fewer bytes, 5 % up and 4 bits down", fewer)
ends.round(2)

# %%
figure, axes = plt.subplots(figsize=(8, 3.8))
for (name, run), marker in zip(both.items(), "osD^v", strict=True):
    axes.plot(run["MB up"] + run["MB down"], run["accuracy (%)"], marker=marker, markevery=5, label=name)
axes.set(xscale="log", title="What does a megabyte buy?", xlabel="megabytes, both directions, all clients")
axes.set_ylabel("validation accuracy (%)")
axes.xaxis.set_major_formatter("{x:g}")
axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
figures.show(figure, "Validation accuracy against megabytes on a log axis: compressed far left of fp32")

# %% [markdown]
# **What it means.** With the way down in fp32 no compressor of updates saves more than half. Read the figure upwards, too: for
# the bytes of the lines on the left fp32 gets two rounds at most. The benchmark has that control: fp32 at *equal bytes*.
#
# **What would fool you.** Reports of "100 times fewer bytes" that count one direction, or nominal bits without places,
# tables and descriptions.
#
# ## 12 · Does it hold between real processes?
#
# So far bytes were added up. Now a server and clients run as processes of their own and talk over sockets. Each client gets
# a file of its own images and nothing else, and bytes are counted at the sockets. A message is its length, a checksum, a
# line of JSON and the streams; nothing is unpickled. First a damaged one: a bit flips on the way.

# %% tags=["nbval-check-output"]
import socket

from nnc_utils.federated.messages import Connection, Damaged, frame

ends_of_it = socket.socketpair()
server_end, client_end = (Connection(end) for end in ends_of_it)
damaged = bytearray(frame({"kind": "update", "round": 1}, b"\x00" * 100))
damaged[-1] ^= 1
client_end.send_frame(bytes(damaged))
try:
    server_end.receive()
except Damaged as error:
    print(error)
client_end.send(b"\x00" * 100, kind="update", round=1)
header, body = server_end.receive()
print(f"sent again: {header}, {len(body)} bytes; {server_end.received} bytes came through the socket")
for end in ends_of_it:
    end.close()

# %% [markdown]
# Now trouble on purpose, in a training of a narrow ResNet: in the middle of round 2 client 1 is killed, and in round 3 it is
# started again. *Predict*: in which rounds do two of three clients answer?

# %% tags=["machine-dependent"]
from nnc_utils import models
from nnc_utils.federated.candidates import federation
from nnc_utils.federated.plan import Plan

same = {key: getattr(bench.dense.spec, key) for key in ("channels", "size", "classes", "stem")}
ways = {"up": package.Compressor(4), "down": package.Compressor(4, rounding="nearest")}
plan = Plan(models.resnet(18, width=width, **same), 6, learning_rate, seed=seed, **ways)


def watch(line: str) -> None:
    """Show what the server says, and make trouble."""
    if line == "round 2 of 6: sent":
        processes.kill(1)
    if line == "round 3 of 6: sent":
        processes.start(1, wait=True)  # until it has come to the server's door
    if not line.endswith("sent"):
        print(line)


processes = federation(bench, dirichlet)  # a server and the clients, which stay for the benchmark below
outcome = processes.run(plan, watch=watch)
print(f"finished: {outcome.ledger['agreed']} clients hold the server's network, bit for bit")

# %% [markdown]
# **What it means.** It holds: the mean is over those that answer, and the accuracy swings while rounds are few. Nothing goes
# down in round 1, since all draw the same first weights. Who comes late gets the whole network once, in fp32: a difference is
# of no use to it. That is the jump of the megabytes down.
#
# Batch-norm has statistics beside its weights. The means are averaged like the weights, and the variance is that of all
# clients together: the mean of the variances plus the variance of the means.
#
# ## 13 · What does the server learn?
#
# Images stay, updates go, and an update tells of the images: from the gradient of a few images these can be reconstructed
# ([Zhu et al., 2019](https://arxiv.org/abs/1906.08935)). Compression is no protection. Two things are:
#
# - [**Secure aggregation**](../docs/glossary.md#secure-aggregation) ([Bonawitz et al., 2017](https://eprint.iacr.org/2017/281)): the server
#   learns the sum of the updates and no single one. Each pair of clients shares a secret seed and draws a mask from it: one adds
#   it, the other subtracts it. In the sum all masks cancel.
# - **Differential privacy** ([McMahan et al., 2018](https://arxiv.org/abs/1710.06963)): updates are clipped to a length, and noise
#   is added, so that no client changes the result by much. It costs accuracy. A number, ε, says how strong it is.
#
# ### Exercise 8.7 · Masks that cancel
#
# `codes` are a client's whole numbers, (numbers,). `client` is its number, and `seeds[client][other]` the seed that it shares
# with another client; `seeds` is symmetric. Return the codes with all of the client's masks, as remainders modulo 65,536. The
# sum of all clients' results has the remainder of the sum of their codes.
#
# <details><summary>Hint 1</summary>Of two clients the one with the smaller number adds <code>mask(seed, count)</code>, the other
# subtracts it.</details>
# <details><summary>Hint 2</summary>No client has a mask with itself. <code>%</code> gives a remainder from 0 up, also of negative
# tensors.</details>

# %% tags=["exercise"]
MODULUS = 2**16


def mask(seed: int, count: int) -> torch.Tensor:
    """The mask of a pair of clients: whole numbers from 0 to 65,535."""
    return torch.randint(MODULUS, (count,), generator=torch.Generator().manual_seed(seed))


def hide(codes: torch.Tensor, client: int, seeds: list[list[int]]) -> torch.Tensor:
    """A client's codes, of which only the sum over all clients can be read."""
    ### BEGIN SOLUTION
    hidden = codes.clone()
    for other, seed in enumerate(seeds[client]):
        if other != client:
            hidden += (1 if client < other else -1) * mask(seed, len(codes))
    return hidden % MODULUS
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("8.7", hide)

# %% [markdown]
# *Predict*: what does it cost? Codes of 4 bits were small after entropy coding. How many times larger are masked ones?

# %%
predictions.predict("masked codes ÷ codes, bytes", 1)

# %% tags=["machine-dependent"]
from nnc_utils import entropy

codes = rounded(4)(update, draw).codes.long()
seeds = [[abs(a - b) * (a + b) for b in range(lesson_clients)] for a in range(lesson_clients)]
plain, hidden = (codes + 7).numpy(), hide(codes, 0, seeds).numpy()
sizes = [
    entropy.pack(symbols.astype(np.uint16), largest=most).size
    for symbols, most in ((plain, 14), (hidden, MODULUS - 1))
]
print(f"{sizes[0]:,} bytes of codes, {sizes[1]:,} bytes of masked codes")
predictions.measured("masked codes ÷ codes, bytes", sizes[1] / sizes[0])

# %% [markdown]
# **What it means.** Masked codes look like noise, and noise cannot be compressed. The sum also needs the same numbers in the
# same step of every client, so that none can send its own largest. Few bits and a small modulus still save bytes.
# The package does not mask: its server is trusted.
#
# ## Benchmark
#
# A narrow ResNet, in processes. Controls: fp32 with as many rounds, images and clients, and fp32 with as many bytes, but one
# round at least. What the clients hold at the end is saved as a file. A fresh process scores it on the test images, like
# every network of this course. The last three columns compare it with fp32 after as many rounds.

# %% tags=["benchmark"]
candidates = bench.build(controls + configurations)

# %% tags=["benchmark"]
from bench import federated as tables

rows = bench.measure(candidates)
tables.table(rows, bench)

# %% tags=["benchmark"]
figure, axes = plt.subplots(figsize=(7, 4.6))
grouped = tables.curve(bench).groupby("configuration", sort=False)
for (name, run), marker in zip(grouped, figures.MARKERS):
    axes.plot(run["megabytes"], run["validation (%)"], marker=marker, label=name)
axes.set(xscale="log", xlabel="megabytes, both directions", ylabel="validation accuracy (%)")
axes.set_title("What does a megabyte at the socket buy?")
axes.xaxis.set_major_formatter("{x:g}")
axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.4))
figures.show(figure, "Validation accuracy against megabytes at the sockets, in fp32 and compressed")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# **What would fool you.** The last columns after a few rounds. What is compressed most is some rounds behind fp32, and the
# curves still rise: compare them where they have stopped.
#
# ## The committed results
#
# The same cells, run on Fashion-MNIST with more clients, rounds and seeds. How many times fewer bytes, at which accuracy?

# %% tags=["machine-dependent"]
committed = tables.committed()
if committed is None:
    print("not committed yet: `make benchmark PROFILE=federated` measures them")
committed

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
# - Clients send updates, and the server adds their mean, weighed by images. The images stay; what an update tells of them goes.
# - Rounding at random has no bias: errors cancel over clients and rounds. It needs no memory.
# - Send few bits or the largest few, entropy-coded: places, tables and descriptions count as bytes, too.
# - Error feedback sends later what was lost, if the compressor contracts: to the nearest it does, with 2 bits at random not.
# - Count both directions, at the socket. The rivals are fp32 at equal rounds and fp32 at equal bytes.
#
# <!-- numbers:begin -->
# **In numbers.** FedAvg, Dirichlet 0.3: 3 bits with feedback up, 3 bits down: 20.5× fewer bytes in both directions
# together than in fp32, at +0.14 [-0.08, +0.37] pp. FedAvg, Dirichlet 1: 3 bits with feedback up, 3 bits down: 19.6×
# fewer bytes in both directions together than in fp32, at -0.15 [-0.34, +0.05] pp.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why does a client with twice the images weigh twice?</summary>With one step of all its images its update is a mean
# gradient. Weighed by images, the mean of the updates is the gradient of all images together.</details>
# <details><summary>2. What does a Dirichlet split with a small α imitate, and what does it do to the training?</summary>Devices whose
# images differ: few classes each, unequal numbers. Clients walk apart between rounds, and it takes more rounds.</details>
# <details><summary>3. A number is 0.1 of a step. What arrives of it in 1,000 rounds, to the nearest and at random?</summary>To the nearest
# nothing. At random about 100 whole steps: the sum is right.</details>
# <details><summary>4. Why does the largest number of an update matter so much?</summary>It sets the step. With long tails and few bits
# most of the others are far below a step.</details>
# <details><summary>5. 1 % of the numbers are sent in 4 bits. Why is the message much more than 1 % of 4/32 of fp32?</summary>The places
# have to be sent, too. With 1 % the entropy of the mask is 0.08 bits for each number of the update, sent or not.</details>
# <details><summary>6. What is the sum of all messages with error feedback?</summary>The sum of all updates less the last residual. Nothing
# is lost for ever while the residual stays small.</details>
# <details><summary>7. Why does rounding to the nearest go well with feedback, and rounding at random to 2 bits does not?</summary>To the
# nearest, a number loses at most itself: it contracts. At random a small number may become a whole step. The squared error is
# then larger than what went in, and the residual grows.</details>
# <details><summary>8. Why does the server send a difference, and what is its memory?</summary>A difference is small, and its step is finer.
# Its memory is its own weights: what a message lost is in the next difference.</details>
# <details><summary>9. A report says that updates are 100 times smaller. How much traffic is saved at most if the way down is
# fp32?</summary>Half: the way down has as many bytes as the way up had.</details>
# <details><summary>10. What does a client that comes late need, and why?</summary>The whole network. It does not hold what the differences
# build on.</details>
# <details><summary>11. Are images private because they stay on the device?</summary>No: an update can tell of them. Secure aggregation hides
# single updates, differential privacy bounds what any result tells of one client.</details>
# <details><summary>12. Why does secure aggregation go against entropy coding?</summary>Masked codes are uniform noise: all are as frequent, and
# no code is shorter.</details>
#
# **Try it.** (1) Set `dirichlet = 0.05`: how many rounds more? (2) Replace the 2 bits of section 10 by 3: does the residual grow? (3) Divide
# what 2 bits at random give by 1 plus the share of exercise 8.6. It is no longer right on average: does it contract now?
# (4) Add `{"method": "fedavg", "dirichlet": 0.3, "bits": 8}` to `configurations`: predict megabytes up and down.
#
# **Further reading.** [Kairouz et al., 2021](https://arxiv.org/abs/1912.04977), the field and its open problems;
# [Konečný et al., 2016](https://arxiv.org/abs/1610.05492), the first compressed updates of federated learning;
# [Richtárik et al., 2021](https://arxiv.org/abs/2106.05203), error feedback with a proof for unlike clients.
#
# Next: [09_transfer_learning](09_transfer_learning.ipynb): is a compressed network a worse start for another task?
