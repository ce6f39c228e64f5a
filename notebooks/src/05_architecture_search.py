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
# # 05 · Architecture search: can a machine draw a better small network?
#
# Someone who needs a small network usually scales ResNet-18 down: a quarter of every width. Nothing says that this is the
# best way to spend the multiplications that are left. A search may choose stages, depths, widths and kernels by itself.
# Its reports easily omit two things: **random search at equal cost**, and **the small networks drawn by
# hand**, with an equal training budget. Here both stand beside every method.
#
# **You will be able to** describe a space of networks, predict what each costs, judge candidates without training them,
# search in four ways, and say whether the search was worth it. **You need** [01](01_baseline.ipynb), which runs first if it
# has not, and the soft labels of [04](04_distillation.ipynb); int8, in section 3, is from [02](02_quantization.ipynb).
# **Time:** an hour to read, an hour for the seven exercises, a minute to run.
#
# **Contents.**
# [1 · What may a network be?](#1-·-What-may-a-network-be?)
# [2 · What does it cost?](#2-·-What-does-a-network-cost?)
# [3 · How long will it take?](#3-·-How-long-will-a-network-take?)
# [4 · Can one network hold all others?](#4-·-Can-one-network-hold-all-others?)
# [5 · Which network next: random, evolution, REINFORCE, gradients](#5-·-Which-network-next?).
# [6 · Do shared weights rank networks?](#6-·-Do-shared-weights-rank-networks?)
# [7 · The benchmark](#7-·-Does-a-search-beat-what-a-person-draws?).
# Then [the committed results](#The-committed-results),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
widest: float = 0.25  # [0.0625, 1] largest width of a stage as a share of ResNet-18's, in sixteenths
macs: float = 32.0  # [0, 10000] limit: how many times fewer MACs than ResNet-18; 0: none
queries: int = 24  # [4, 10000] candidates that one search may ask for
search_seeds: int = 4  # [1, 1000] repetitions of each search
supernet_epochs: float = 4.0  # [0.001, 10000] of the network that contains all others
epochs: float = 4.0  # [0.001, 1000] of the winner's training from scratch, and of its rivals'
# what the benchmark at the end runs
configurations: list = [{"method": "winner", "macs": 32}, {"method": "three_stage", "macs": 32}]
other_searchers: list[str] = []  # {optuna_nsga2} other tools that search, too
steps: list[str] = ["search", "retrain"]  # {latency, search, retrain} a shard did the others
blocks: int = 2  # [2, 4] the most blocks of a stage
latency_ms: float = 0.0  # [0, 1000] limit: predicted milliseconds of an image in int8; 0: none
latency_networks: int = 20  # [4, 1000] blocks that are timed to predict it; half as many networks test that
runtime: str = "onnxruntime"  # {onnxruntime, openvino} in which they are timed
supernet_batch: int = 64  # [2, 4096] images in a step of the supernet's training
calibration_images: int = 256  # [2, 50000] that re-estimate a candidate's batch-norm
validation_images: int = 200  # [2, 50000] that score a candidate
evaluations: int = 48  # [0, 100000] candidates evaluated; searches then ask a model of them; 0: all are
alone: int = 0  # [0, 1000] random networks trained alone, to see whether shared weights rank them
alone_epochs: float = 1.5  # [0.001, 1000] of those, and of the finalists
finalists: int = 1  # [1, 100] best networks of each method that are trained alone
learning_rate: float = 0.05  # [0.00001, 1] peak of every training
copies: int = 2  # [1, 64] augmentations of each image with cached teacher logits
teaches: list = []  # a mapping of 06_pipeline whose network is the compressed teacher
upstream: list = []  # run folders of 01_baseline, own seed first, and of earlier shards; empty: 01's defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
seed: int = 1  # [0, 1000000] of the supernet, of the weights trained from scratch, of order and augmentation
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/05_architecture_search

# %% tags=["setup"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import batch_norm, data, figures, models, training
from nnc_utils.exercises import check, predictions

bench = Bench("05_architecture_search", globals())
figures.style()

# %% [markdown]
# ## 1 · What may a network be?
#
# A search finds nothing that its space does not hold. Is there anything better than a narrow ResNet-18? In section 4.2 of
# their paper [He et al. (2016)](https://arxiv.org/abs/1512.03385) drew another network for small images: **three stages**,
# 16, 32 and 64 wide, and no fourth. *Predict*: with as many MACs, which share of its parameters does the narrow ResNet-18
# keep in its fourth stage?

# %% tags=["nbval-check-output"]
small_images = {"channels": 1, "size": 28, "classes": 10}
for name, spec in (
    ("ResNet-18, ¼ of each width", models.resnet(18, stem="small", width=0.25, **small_images)),
    ("ResNet-20 of three stages", models.three_stage(3, **small_images)),
):
    all_layers, count = models.layers(spec), models.parameters(spec)
    fourth = sum(layer.parameters for layer in all_layers if layer.name.startswith("layer4"))
    print(f"{name}: {models.macs(spec) / 1e6:.0f} million MACs, {count:,} parameters,", end=" ")
    print(f"{100 * fourth / count:.0f} % of them in a fourth stage")

# %% [markdown]
# The fourth stage sees 4×4 pixels, so its wide layers cost few multiplications, but most of the weights. A space that is
# worth searching holds networks with and without it.
#
# A residual network is a list of decisions. Each stage has a width and a depth, the fourth perhaps no block at all. Each
# block has a width of its own between its two convolutions, so that it may expand or narrow, and begins with a 3×3 or a
# 5×5 kernel. An **architecture** is one small number for each decision. With $|W_s|$ widths, at most $D$ blocks and
# $o_{sb}$ ways to fill block $b$ a space has
#
# $$\prod_{s} |W_s| \sum_{d=1}^{D} \prod_{b=1}^{d} o_{sb}$$
#
# networks: one of $d$ blocks has no decisions about the others. (A stage that may be missing adds 1 to its factor.)
#
# *Predict*: four stages of at most two blocks, with three or four widths to choose from: how many digits has the number
# of networks? First the decoder, from numbers to a Spec. In its last line `(1, 0, 0, 1, 0, 0, …)` says of stage 1: width 8,
# the option 1 of `(4, 8)`; one block; 4 wide inside, a 5×5 kernel; and zeros for the second block, which is absent.

# %% tags=["nbval-check-output"]
from nnc_utils.search.space import Space, around

KERNELS = (3, 5)


def decode(numbers: tuple, widths: tuple, most_blocks: int) -> models.Spec:
    """The Spec of an architecture: width and depth of each stage, inner width and kernel of each block."""
    number, stages = iter(numbers), []
    for stage, choices in enumerate(widths):
        width, depth, chosen = choices[next(number)], next(number), []
        if stage < 3:  # only the fourth may have no block
            depth += 1
        for block in range(most_blocks):
            inner, kernel = choices[next(number)], KERNELS[next(number)]
            halves = stage > 0 and block == 0  # the image; then the block's input does not fit its output
            stride, connection = (2, "projection") if halves else (1, "identity")
            if block < depth:
                chosen.append(models.BlockSpec((inner, width), (kernel, 3), stride, connection))
        if chosen:
            stages.append(tuple(chosen))
    return models.Spec(1, 8, 10, "small", stages[0][0].widths[1], "basic", tuple(stages))


decode((1, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0), widths=((4, 8), (4, 8, 12)), most_blocks=2).stages

# %% [markdown]
# ### Exercise 5.1 · How many networks?
#
# A stage has a choice of `widths` widths. It has 1 to `len(ways)` blocks, and `ways[b]` is the number of ways to fill block
# b. Return how many different stages that makes: its factor in the product above. A stage that `may_be_missing` can also
# have no block.
#
# <details><summary>Hint 1</summary>With one block there are <code>ways[0]</code> fillings, with two <code>ways[0] * ways[1]</code>. A network has
# one depth, so the depths add up.</details>
# <details><summary>Hint 2</summary>A stage that is missing has no width: it is one more network, after the multiplication
# by <code>widths</code>.</details>


# %% tags=["exercise"]
def stage_choices(widths: int, ways: tuple, may_be_missing: bool = False) -> int:
    """How many different stages there are, of 1 to len(ways) blocks (or none)."""
    ### BEGIN SOLUTION
    total, fillings = 0, 1
    for of_block in ways:
        fillings *= of_block  # one block more
        total += fillings
    return widths * total + may_be_missing
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.1", stage_choices)

# %% [markdown]
# Now count, in a space so small that every network can be written down.

# %% tags=["nbval-check-output"]
from itertools import product

tiny = Space(1, 8, 10, "small", ((4, 8), (4, 8, 12)), blocks=2)
predicted = stage_choices(2, (2 * 2, 2 * 2)) * stage_choices(3, (3 * 2, 3 * 2))  # inner widths x kernels
counted = {decode(numbers, tiny.widths, 2).to_json() for numbers in product(*map(range, tiny.options))}
print(f"predicted {predicted:,} networks, counted {len(counted):,}: ratio {predicted / len(counted):.3f}")

# %% [markdown]
# **The package does the same.** [`space.py`](../nnc_utils/search/space.py) draws, mutates and decodes; decisions about
# absent blocks are 0, so that one network has one name. 5×5 kernels are omitted where the image has two pixels or fewer.

# %% tags=["nbval-check-output"]
space = around(channels=1, size=8, classes=10, stem="small", widest=widest, blocks=blocks)
random = np.random.default_rng(1)
drawn = [tiny.sample(random) for _ in range(200)]
print("the same Spec from 200 architectures:", all(decode(a, tiny.widths, 2) == tiny.spec(a) for a in drawn))
print("the same count:", tiny.cardinality == len(counted))
years = space.cardinality / (60 * 24 * 365)
print(f"{len(space.choices)} decisions give {space.cardinality:.1e} networks:", end=" ")
print(f"{years:,.0f} years at a minute each")

# %% [markdown]
# **What it means.** Nobody trains them all. The rest of the chapter is about judging networks without training them.
#
# ## 2 · What does a network cost?
#
# "Accurate" alone has a boring answer: the largest. The objective is accuracy *within limits*. A cost, such as MACs, is a
# sum over stem, blocks and classifier, and each of these terms depends on a few decisions $a_t$ only:
#
# $$C(a) = \sum_t T_t[a_t]$$
#
# So each term is a table, filled once. (Peak memory is no such sum, nor is time where a runtime joins layers of two
# blocks.) *Predict*: how many entries do all tables have together, for those networks?
#
# One table by hand: the second block of stage 2, behind the stem and a block of each of the stages 1 and 2. `space.places`
# says where in an architecture a decision stands: `place[1, 1, "inner"]` is that of stage 2, block 2 (both count from 0),
# and −1 instead of a block stands for the stage itself.

# %% tags=["nbval-check-output"]
FIXED = space.smallest  # the decisions that a table is not about


def table(part: int, places: list, depth: int, least: int) -> np.ndarray:
    """MACs of one part of a network for all options of the decisions at these places."""
    entries = np.empty(space.options[places])
    for numbers in np.ndindex(entries.shape):
        architecture = np.array(FIXED)
        architecture[depth], architecture[places] = least, numbers
        entries[numbers] = sum(x.macs for x in parts(space.spec(architecture))[part][0])
    return entries


from nnc_utils.search.costs import Costs, InfeasibleError, Term, parts

place = space.places
second_block = [place[1, -1, "width"], place[1, 1, "inner"], place[1, 1, "kernel"]]  # of stage 2
by_hand = table(1 + 1 + 1, second_block, place[1, -1, "depth"], 1)
inner = [f"{width} inside" for width in space.widths[1]]
pd.DataFrame(by_hand[:, :, 0], index=space.widths[1], columns=inner).rename_axis("width, 3×3 kernel")

# %% [markdown]
# ### Exercise 5.2 · Look up a cost
#
# The package keeps each table as a `Term`. `term.values` is an array with an axis for each decision at `term.places`,
# in this order. A network has this part if its number at `term.depth` is in `term.when`, a Python `range`. Return the
# sum of the entries of the parts that the architecture, a tuple of numbers, has.
#
# The table above, for example, has `places` (6, 10, 11), `depth` 7 and `when` range(1, 2): its entry counts only if
# `architecture[7]` is 1, for two blocks.
#
# <details><summary>Hint 1</summary>An array takes a tuple as its index: <code>values[2, 0, 1]</code> is <code>values[(2, 0, 1)]</code>.</details>
# <details><summary>Hint 2</summary>Collect <code>architecture[place]</code> for each place of the term, as a tuple.</details>


# %% tags=["exercise"]
def look_up(terms: list[Term], architecture: tuple) -> float:
    """The cost of an architecture: the entries of the parts that it has, added up."""
    ### BEGIN SOLUTION
    total = 0.0
    for term in terms:
        if architecture[term.depth] in term.when:
            total += term.values[tuple(architecture[place] for place in term.places)]
    return total
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.2", look_up)

# %% tags=["machine-dependent"]
whole = models.resnet(18, channels=1, size=8, classes=10, stem="small")
costs = Costs(space, {"macs": models.macs(whole) / (macs or 32)})
term = next(term for term in costs.terms["macs"] if term.places == tuple(second_block))
print("the package's table is the same:", np.array_equal(term.values, by_hand))
drawn = [space.sample(np.random.default_rng(number)) for number in range(1000)]
looked_up = np.array([look_up(costs.terms["macs"], a) for a in drawn])
counted = np.array([models.macs(space.spec(a)) for a in drawn])
print("1,000 sums of look-ups are the MACs of the networks:", np.array_equal(looked_up, counted))
entries = sum(term.values.size for term in costs.terms["macs"])
print(f"{entries:,} entries describe {space.cardinality:.1e} networks")

# %% [markdown]
# Is a random network within the limit? Look before you search: a limit that everything meets asks nothing, one that
# nothing meets cannot be answered.

# %% tags=["nbval-check-output"]
within = np.mean(looked_up <= costs.limits["macs"])
print(f"{100 * within:.0f} % of random networks are within {costs.limits['macs'] / 1e6:.2f} million MACs")
try:
    Costs(space, {"macs": 1000})
except InfeasibleError as error:
    print(error)

# %%
figure, axes = plt.subplots(figsize=(7, 2.4))
axes.hist(looked_up / 1e6, bins=60)
axes.axvline(costs.limits["macs"] / 1e6, color="black")
axes.text(costs.limits["macs"] / 1e6, axes.get_ylim()[1], " limit", va="top")
axes.set(xlabel="million MACs of an image", ylabel="networks", title="What does a random network cost?")
figures.show(figure, "Histogram of the MACs of 1,000 random networks; a line marks the limit")

# %% [markdown]
# ## 3 · How long will a network take?
#
# A ratio of MACs is no speed-up, and a search cannot time every candidate. So **blocks** are timed beforehand, in int8, one
# thread, alone on the machine, and a sum of features $f_i$ is fitted: a call of the runtime, the number of convolutions,
# *padded* MACs (integer kernels fill channels up to multiples of 4 and 16), *gathered* inputs (all that a kernel reads,
# over its positions) …
#
# $$\begin{gathered} \hat t(a) = \sum_i c_i f_i(a) \\ c = \arg\min_{c \ge 0} \sum_n \left(\hat t(a_n) / t_n - 1\right)^2 \end{gathered}$$
#
# The errors are *relative*: otherwise the slowest networks decide everything. The times below are the committed ones,
# of ONNX Runtime: 60 blocks to fit, 30 whole networks to test. *Predict*: how far off is a model that knows MACs alone?

# %%
import json

from scipy.optimize import nnls

from nnc_utils.provenance import root
from nnc_utils.search import latency

records = json.loads((root() / "results/standard/provenance.json").read_text())
[timed] = [record["extra"]["latency"] for record in records.values() if "latency" in record["extra"]]
fitted, unseen = latency.read(timed["blocks"]), latency.read(timed["networks"])


def features(spec: models.Spec) -> np.ndarray:
    """A call, convolutions, MACs with channels filled up, gathered inputs, and pixels of few channels."""
    counts = np.array([1.0, 0, 0, 0, 0])
    for x in models.layers(spec)[1:-1]:  # without stem and classifier
        window = x.kernel**2 * x.size_out**2  # pixels that the kernel reads, over all its positions
        padded = 4 * np.ceil(x.in_channels / 4) * 16 * np.ceil(x.out_channels / 16)
        counts[1:] += 1, padded * window, x.in_channels * window, window * (x.in_channels < 16)
    return counts


# %% [markdown]
# ### Exercise 5.3 · Find the bug: the slowest decide
#
# `inputs` are features, (blocks, features), and `times` their milliseconds, (blocks,). This fit has one fault: an error of
# 0.01 ms weighs the same in a block of 0.02 ms and in one of 0.1 ms. Return the coefficients that minimize the sum of
# squared **relative** errors of the formula above.
#
# ```python
# scale = inputs.max(0)  # MACs are millions, calls are ones: the solver wants numbers of one size
# coefficients, _ = nnls(inputs / scale, times)
# return coefficients / scale
# ```
#
# <details><summary>Hint 1</summary><code>nnls(A, b)</code> minimizes the sum of (A c − b)² over c ≥ 0. What are A and b, if the error
# of a block is t̂/t − 1?</details>
# <details><summary>Hint 2</summary>Divide each row by its time: <code>times[:, None]</code> is a column. The target then is the
# same for all blocks.</details>


# %% tags=["exercise"]
def fit_coefficients(inputs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (features,) with the least squared relative errors."""
    ### BEGIN SOLUTION
    scale = inputs.max(0)  # MACs are millions, calls are ones: the solver wants numbers of one size
    coefficients, _ = nnls(inputs / scale / times[:, None], np.ones(len(times)))
    return coefficients / scale
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.3", fit_coefficients)


# %% tags=["machine-dependent"]
def error(measure, fitted: list, unseen: list) -> float:
    """Mean relative error in percent on unseen networks, after a fit of non-negative coefficients."""
    inputs, times = (np.array(column) for column in zip(*[(measure(spec), ms) for spec, ms in fitted]))
    coefficients = fit_coefficients(inputs, times)
    predicted = np.array([measure(spec) @ coefficients for spec, _ in unseen])
    return 100 * np.mean(abs(predicted / [ms for _, ms in unseen] - 1))


alone_macs = error(lambda spec: np.array([models.macs(spec)]), fitted, unseen)
blind = error(lambda spec: features(spec)[:4], fitted, unseen)
print(f"MACs alone are {alone_macs:.0f} % off, four features {blind:.1f} %,", end=" ")
print(f"with the pixels of few channels {error(features, fitted, unseen):.1f} %")

# %% [markdown]
# **The package does the same** with eleven features, [`latency.py`](../nnc_utils/search/latency.py). What would fool you:
# a test on networks that were fitted. The package refuses it.

# %% tags=["nbval-check-output"]
predictor = latency.fit(fitted)
print(f"the package: {predictor.error(unseen):.1f} % on {len(unseen)} networks never seen")
try:
    predictor.error(fitted)
except ValueError as refusal:
    print("on the blocks:", refusal)

# %%
figure, axes = plt.subplots(figsize=(5, 3.6))
for pairs, marker, label in ((fitted, "o", "blocks, fitted"), (unseen, "s", "networks, never seen")):
    axes.plot([ms for _, ms in pairs], [predictor.of(spec) for spec, _ in pairs], marker, label=label)
axes.axline((0, 0), slope=1, color="grey", linewidth=1)
axes.set(xlabel="measured ms", ylabel="predicted ms", title="How long will a network take?")
axes.legend(loc="upper left", fontsize=8)
figures.show(
    figure, "Predicted against measured milliseconds of blocks and of networks never seen, near the diagonal"
)

# %% [markdown]
# ## 4 · Can one network hold all others?
#
# Networks of the space differ in how much of a layer they use. So train *one*, the largest, such that the first $c$
# channels of each layer, and the middle of each kernel, are a good network, too (a [**supernet**](../docs/glossary.md#supernet)). A smaller network is a
# slice. *Predict*: which share of the supernet's weights does the smallest network use?

# %%
predictions.predict("parameters of the smallest network, of the largest (%)", 25)

# %%
import torch.nn.functional as F

from nnc_utils.search.supernet import Supernet, sandwich

torch.manual_seed(seed)
supernet = Supernet(space)
largest, digits = supernet.largest, data.load("digits")
batch, labels = digits.normalize(digits.train.images[:64]), digits.train.labels[:64].long()


def normalized(out: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
    """Batch-norm with the statistics of this batch, and the first scales and shifts."""
    width = out.shape[1]
    return F.batch_norm(out, None, None, norm.weight[:width], norm.bias[:width], training=True)


def first_convolution(images: torch.Tensor, width: int, kernel: int) -> torch.Tensor:
    """What block layer1.0 computes with its first convolution, in a network of this width and kernel."""
    stem = normalized(F.conv2d(images, largest.conv1.weight[:width], padding=1), largest.bn1).relu()
    edge = (5 - kernel) // 2
    weight = largest.layer1[0].conv1.weight[:width, :width, edge : 5 - edge, edge : 5 - edge]
    return normalized(F.conv2d(stem, weight, padding=kernel // 2), largest.layer1[0].bn1).relu()


# %% [markdown]
# **The package does the same**, for every layer: `extract` copies a network out. Its first block says what the slice says.

# %% tags=["nbval-check-output"]
small = supernet.extract(space.smallest).train()
seen = []
small.layer1[0].quant1.register_forward_hook(lambda module, inputs, output: seen.append(output))
with torch.no_grad():
    logits = small(batch)
    by_hand = first_convolution(batch, width=space.widths[0][0], kernel=3)
    print("the slice is the network's own layer:", torch.allclose(by_hand, seen[0], atol=1e-4))
    print(
        "its logits are the supernet's:", torch.allclose(logits, supernet(batch, space.smallest), atol=1e-4)
    )
counts = [models.parameters(space.spec(a)) for a in (space.smallest, space.largest)]
print(f"the smallest has {100 * counts[0] / counts[1]:.1f} % of the largest one's parameters")
predictions.measured("parameters of the smallest network, of the largest (%)", 100 * counts[0] / counts[1])

# %% [markdown]
# ### How does one set of weights learn to be many networks?
#
# By the [**sandwich rule**](../docs/glossary.md#sandwich-rule) ([Yu and Huang, 2019](https://arxiv.org/abs/1903.05134)): each step trains the largest
# network, one of the narrowest (the least widths; depths and kernels are drawn) and two random ones between. The first two
# bound the space: what lies between shares weights with both. The largest learns from labels, the others from its [soft
# labels](../docs/glossary.md#soft-labels):
#
# $$L = \text{CE}(z_\text{largest}, y) + \sum_{\text{others}} \text{CE}(z, \text{softmax}(z_\text{largest}))$$
#
# ### Exercise 5.4 · The loss of a sandwich
#
# `network(images)` gives the logits of the largest network, (images, classes), and `network(images, architecture)` those of
# another one. Return the loss $L$ for the architectures in `others`. The largest must not learn to please the others: its
# soft labels are constants.
#
# <details><summary>Hint 1</summary><code>F.cross_entropy(logits, target)</code> takes class numbers or, as target, probabilities of
# the logits' shape.</details>
# <details><summary>Hint 2</summary><code>.detach()</code> makes a constant of a tensor; each row of soft labels adds up to 1.</details>
# <details><summary>Hint 3</summary>The losses add up. A mean would train each network at a fraction of the learning
# rate.</details>


# %% tags=["exercise"]
def sandwich_by_hand(network, images: torch.Tensor, labels: torch.Tensor, others: list) -> torch.Tensor:
    """The loss of the largest network, from labels, and those of the others, from its soft labels."""
    ### BEGIN SOLUTION
    z = network(images)
    soft_labels = z.detach().softmax(1)  # without detach the largest would learn to please the others
    loss = F.cross_entropy(z, labels)
    for architecture in others:
        loss = loss + F.cross_entropy(network(images, architecture), soft_labels)
    return loss
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.4", sandwich_by_hand)


# %% tags=["nbval-check-output"]
def between(generator: np.random.Generator) -> tuple:
    """A network that costs between half of the limit and all of it: where the search will be."""
    return costs.draw(generator, least=0.5)


torch.manual_seed(7)
theirs = sandwich(space, between)(supernet, batch, labels)
torch.manual_seed(7)  # the package seeds its draws from torch
generator = np.random.default_rng(int(torch.randint(2**31, ())))
others = [space.narrow(generator), between(generator), between(generator)]
print(
    "the package's loss is the same:",
    torch.allclose(sandwich_by_hand(supernet, batch, labels, others), theirs),
)

# %% tags=["machine-dependent"]
options = {"batch_size": 32, "learning_rate": 0.05, "seed": seed, "augment": False}
history = training.fit(supernet, digits, epochs=3.0, loss=sandwich(space, between), **options)

# %% [markdown]
# ### Whose batch-norm statistics?
#
# The trap: mean and variance of a channel depend on which channels came before it. The statistics of one network are
# wrong for another, so each candidate gets its own, from a few training images. *Predict*: how accurate does a candidate
# look with the statistics of the largest network?

# %%
predictions.predict("accuracy with another network's statistics (%)", 80)

# %% tags=["machine-dependent"]
from nnc_utils.search.evaluator import Evaluator
from nnc_utils.search.supernet import sliced

evaluate = Evaluator(supernet, digits, calibration=256, validation=200)
theirs = batch_norm.take_statistics(supernet.extract(space.largest), evaluate.calibration).state_dict()
some, accuracies = [between(np.random.default_rng(number)) for number in range(4)], []
for architecture in some:
    candidate = supernet.extract(architecture)
    state = {name: sliced(theirs[name], own.shape) for name, own in candidate.state_dict().items()}
    candidate.load_state_dict(state)
    with torch.no_grad():
        right = candidate.eval()(evaluate.images).argmax(1) == evaluate.labels
    accuracies.append([100 * right.double().mean().item(), evaluate(architecture)])
borrowed, own = np.mean(accuracies, axis=0)
print(f"four candidates: {borrowed:.1f} % with the largest one's statistics, {own:.1f} % with their own:")
predictions.measured("accuracy with another network's statistics (%)", borrowed)
print(f"{own - borrowed:+.1f} pp for {evaluate.cost - 200} images and no training")

# %% [markdown]
# **What it means.** A candidate is judged in a fraction of a second. **What would fool you:** a supernet that was trained for
# three epochs judges like one. Section 6 asks what such a judgement is worth.
#
# ## 5 · Which network next?
#
# Four ways to choose what to ask: at random, by [evolution or REINFORCE](../docs/glossary.md#evolution-reinforce), by gradients. To see them at work without waiting, ask a **made-up landscape**: each option has a worth,
# and so has each pair of options. It needs no images, and we know its rules; no method does. Only 119 of its networks are
# within the limit, so that the best is known, too.

# %%
field = Space(1, 28, 10, "small_stride2", ((8, 16, 24), (8, 16, 32)), blocks=1)
field_costs = Costs(field, {"macs": 1.2e6})
random = np.random.default_rng(3)
worth = random.normal(size=(len(field.choices), 3))
pairs = 0.3 * random.normal(size=(len(field.choices), 3, len(field.choices), 3))


def landscape(architecture: tuple) -> float:
    """A made-up accuracy in percent."""
    places = range(len(architecture))
    total = sum(worth[place, architecture[place]] for place in places)
    total += sum(pairs[i, architecture[i], j, architecture[j]] for i in places for j in places if i < j)
    return 85 + 0.6 * float(total)


# %% [markdown]
# ### Random search: the rival to beat
#
# Draw networks within the limit, keep the best ([Li and Talwalkar, 2019](https://arxiv.org/abs/1902.07638): hard to beat).
# With $n$ draws the best lies, on average, above a share $n/(n+1)$ of all networks. *Predict*: above which share with 40?


# %%
predictions.predict("share of all networks below the best of 40", 0.9)

# %%
def random_by_hand(costs: Costs, evaluate, queries: int, seed: int) -> list:
    """The networks asked, in order, each with its answer."""
    random = np.random.default_rng(seed)
    return [(a, evaluate(a)) for a in (costs.draw(random) for _ in range(queries))]


# %% tags=["nbval-check-output"]
from nnc_utils.search import gradient, searchers

everything = {field.canonical(numbers) for numbers in product(*map(range, field.options))}
allowed = np.array([landscape(a) for a in everything if field_costs.ratio(a) <= 1])
shares = [
    np.mean(allowed < max(answer for _, answer in random_by_hand(field_costs, landscape, 40, number)))
    for number in range(20)
]
print(f"predicted {40 / 41:.3f}, measured {np.mean(shares):.3f}: ratio {np.mean(shares) / (40 / 41):.3f}")
predictions.measured("share of all networks below the best of 40", np.mean(shares))
theirs = searchers.random_search(field_costs, landscape, queries=40, seed=0)
print("the package asks the same:", random_by_hand(field_costs, landscape, 40, 0) == theirs)

# %% [markdown]
# ### Exercise 5.5 · Choose a budget
#
# You are content with any network among the best share `top` of all (0.05: the best 5 %), but you want to be `sure` (0.95:
# in 95 of 100 searches) to find one. Each query costs a training, so return the **smallest** number of random networks that
# suffices.
#
# <details><summary>Hint 1</summary>A draw misses the best 5 % with probability 0.95. When do all draws miss?</details>
# <details><summary>Hint 2</summary>All of n draws miss with probability (1 − top)ⁿ: at most 1 − sure is asked
# for. Count up, or take logarithms and round up.</details>


# %% tags=["exercise"]
def queries_needed(top: float, sure: float) -> int:
    """The fewest draws of which at least one is among the best share `top`, with probability `sure`."""
    ### BEGIN SOLUTION
    queries = 1
    while (1 - top) ** queries > 1 - sure:
        queries += 1
    return queries
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.5", queries_needed)

# %% [markdown]
# Does the budget keep its promise? Repeat a search of so many queries 5,000 times. *Predict*: how many queries does it take to
# be 95 % sure of one of the best 5 %, and how many to be as sure of the very best?

# %% tags=["nbval-check-output"]
ranked, random = np.sort(allowed)[::-1], np.random.default_rng(0)
for best_networks in (round(0.05 * len(ranked)), 1):
    top = best_networks / len(ranked)
    needed = queries_needed(top, sure=0.95)
    found = random.choice(ranked, (5000, needed)).max(1) >= ranked[best_networks - 1]
    predicted = 1 - (1 - top) ** needed
    print(
        f"one of the best {best_networks} of {len(ranked)}: {needed} queries, predicted {predicted:.3f},",
        end=" ",
    )
    print(f"measured {found.mean():.3f} of the searches: ratio {found.mean() / predicted:.3f}")

# %% [markdown]
# ### Evolution: change the best
#
# Keep the last 12 networks; of five of them the best has a child with one decision changed; the oldest dies
# ([Real et al., 2019](https://arxiv.org/abs/1802.01548)). Dying by age, not by score, forgets what was only lucky. A child
# that was asked before or is too expensive costs no query: it gives way to another one of its parent, or, with probability
# 0.3, to a child of its own.


# %%
def evolution_by_hand(costs: Costs, evaluate, queries: int, seed: int) -> list:
    """Regularized evolution: `population` of 12, a tournament of 5."""
    random = np.random.default_rng(seed)
    trace = random_by_hand(costs, evaluate, 12, seed)
    while len(trace) < queries:
        alive, asked = trace[-12:], {network for network, _ in trace}
        rivals = random.choice(12, 5, replace=False)
        parent = child = max((alive[rival] for rival in rivals), key=lambda member: member[1])[0]
        while child in asked or costs.ratio(child) > 1:  # what is known or too expensive costs no query
            child = costs.space.mutate(child if random.random() < 0.3 else parent, random)
        trace.append((child, evaluate(child)))
    return trace


# %% tags=["nbval-check-output"]
def best(search, seeds: int = 10) -> np.ndarray:
    """The best answer of each of some searches with 40 queries."""
    traces = [search(field_costs, landscape, queries=40, seed=number) for number in range(seeds)]
    return np.array([max(answer for _, answer in trace) for trace in traces])


results = {"random": best(random_by_hand), "evolution": best(evolution_by_hand)}
theirs = searchers.evolution(field_costs, landscape, queries=40, seed=0)
print("the package asks the same:", evolution_by_hand(field_costs, landscape, 40, 0) == theirs)
gain = results["evolution"].mean() - results["random"].mean()
print(f"evolution finds {gain:+.2f} pp on average against random search;", end=" ")
print(f"the best there is: {allowed.max():.2f} %")

# %% [markdown]
# ### REINFORCE: a controller that learns
#
# Each option has a probability $p$; after a batch of answers $R_i$ the logits $z$ move along an estimate of the gradient of
# the expected reward ([Zoph and Le, 2017](https://arxiv.org/abs/1611.01578)), with a baseline $b$ against its noise:
#
# $$\begin{gathered} \nabla_z \mathbb{E}[R] \approx \frac1n \sum_i (R_i - b)\, \nabla_z \log p(a_i) \\ \nabla_z \log p(a) = \text{onehot}(a) - p \end{gathered}$$
#
# *Predict*: two options with rewards 2 and 5 and probabilities 0.67 and 0.33. By hand the gradient of the mean reward is
# $\pm p_1 p_2 (r_1 - r_2)$. Does the baseline change the mean of the estimate, or its spread?

# %% tags=["nbval-check-output"]
chances, rewards = np.array([0.67, 0.33]), np.array([2.0, 5.0])
exact = chances.prod() * (rewards[0] - rewards[1])
chosen = np.random.default_rng(0).choice(2, 100_000, p=chances)
for name, baseline in (("no baseline", 0.0), ("the mean reward", chances @ rewards)):
    estimates = (rewards[chosen] - baseline) * ((chosen == 0) - chances[0])
    print(f"{name}: exact {exact:.3f}, mean {estimates.mean():.3f}, standard deviation {estimates.std():.2f}")

# %% [markdown]
# ### Exercise 5.6 · The gradient of REINFORCE
#
# `chances` are the probabilities $p$, (decisions, options). Of each sample `chosen`, (samples, decisions), has the numbers of
# the options that were drawn. `matters`, a bool of the same shape, says which decisions are about blocks that the network has;
# others get no gradient. `advantages`, (samples,), are $R_i - b$. Return the estimate of the formula above, of `chances`'
# shape.
#
# <details><summary>Hint 1</summary><code>np.eye(options)[chosen]</code> is the one-hot of all choices, (samples, decisions,
# options).</details>
# <details><summary>Hint 2</summary><code>matters[..., None]</code> and <code>advantages[:, None, None]</code> have the axes that are
# missing; the mean is over the samples.</details>


# %% tags=["exercise"]
def policy_gradient(
    chances: np.ndarray, chosen: np.ndarray, matters: np.ndarray, advantages: np.ndarray
) -> np.ndarray:
    """Mean over samples of advantage times the gradient of log-probability by the logits."""
    ### BEGIN SOLUTION
    one_hot = np.eye(chances.shape[1])[chosen]
    log_gradient = (one_hot - chances) * matters[..., None]
    return (advantages[:, None, None] * log_gradient).mean(0)
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.6", policy_gradient)


# %%
def reinforce_by_hand(costs: Costs, evaluate, queries: int, seed: int) -> list:
    """A probability for each option, moved after every 8 answers."""
    random, space, trace, baseline = np.random.default_rng(seed), costs.space, [], None
    logits = np.where(np.arange(space.options.max()) < space.options[:, None], 0.0, -np.inf)
    while len(trace) < queries:
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        samples, rewards, asked = [], [], 0
        while asked < min(8, queries - len(trace)):
            sample = space.sample_from(chances, random)
            ratio, accuracy = costs.ratio(sample), baseline
            if ratio <= 1:  # what is too expensive is known without a query
                accuracy, asked = evaluate(sample), asked + 1
                trace.append((sample, accuracy))
            if accuracy is not None:
                samples.append(sample)
                rewards.append(accuracy * max(1, ratio) ** -0.07)  # MnasNet's reward
        mean = np.mean(rewards)
        baseline = mean if baseline is None else 0.8 * baseline + (1 - 0.8) * mean
        advantages = (np.array(rewards) - baseline) / max(np.std(rewards), 1e-6)
        matters = np.stack([space.active(sample) for sample in samples])
        step = policy_gradient(chances, np.array(samples), matters, advantages.clip(-3, 3))
        logits = logits + 4.0 * step
    return trace


# %% tags=["nbval-check-output"]
results["REINFORCE"] = best(reinforce_by_hand)
theirs = searchers.reinforce(field_costs, landscape, queries=40, seed=0)
ours = reinforce_by_hand(field_costs, landscape, 40, 0)
print("the package asks the same:", [a for a, _ in ours] == [a for a, _ in theirs])
gain = results["REINFORCE"].mean() - results["random"].mean()
print(f"REINFORCE finds {gain:+.2f} pp on average against random search")

# %% [markdown]
# ### Gradients: relax the decisions
#
# Replace each decision by probabilities; then accuracy and cost can be differentiated
# (DARTS, [Liu et al., 2019](https://arxiv.org/abs/1806.09055)). FBNet ([Wu et al., 2019](https://arxiv.org/abs/1812.03443))
# draws them by **Gumbel-softmax** ([Jang et al., 2017](https://arxiv.org/abs/1611.01144)), $\text{softmax}((z + g)/\tau)$
# with $g = -\log(-\log u)$ and $u$ uniform between 0 and 1, and puts the mean cost into the loss. The temperature τ falls, so
# that samples come close to one-hot. Decisions are independent, so that the mean is exact ($d$ are the decisions of a table):
#
# $$\mathbb{E}[C] = \sum_t P(\text{block exists}) \sum_{a_t} T_t[a_t] \prod_{d \in t} p_d[a_{td}]$$
#
# *Predict*: how close is the mean cost of 2,000 sampled networks to this formula?


# %%
def mean_macs(costs: Costs, chances: torch.Tensor) -> torch.Tensor:
    """The exact mean of the MACs of networks drawn by these probabilities, (decisions, options)."""
    total = torch.zeros((), dtype=torch.float64)
    for term in costs.terms["macs"]:
        mean = torch.from_numpy(term.values)
        for place in reversed(term.places):  # one axis of the table after the other
            mean = mean @ chances[place, : mean.shape[-1]]
        total = total + mean * chances[term.depth, list(term.when)].sum()  # that there is this part
    return total


# %% tags=["nbval-check-output"]
logits = gradient.empty_logits(space) + torch.linspace(-1, 1, int(space.options.max()))
chances, random = logits.softmax(1), np.random.default_rng(0)
sampled = np.mean([costs.of(space.sample_from(chances.numpy(), random), "macs") for _ in range(2000)])
exact = mean_macs(costs, chances).item()
print(f"predicted {exact:,.0f} MACs, sampled {sampled:,.0f}: ratio {sampled / exact:.2f}")
relaxed = gradient.Relaxed(costs)
print("the package's mean is the same:", np.isclose(relaxed.cost("macs", chances).item(), exact))

# %% [markdown]
# FBNet differentiates the supernet's loss, with every option computed in every step. To repeat a search many times we
# differentiate a small **model of the accuracy** instead, a ridge regression on what this search has asked so far.


# %%
def descend(costs: Costs, surrogate, generator: torch.Generator, steps: int = 30) -> torch.Tensor:
    """Probabilities that the model of the accuracy likes, within the limit: Adam through Gumbel-softmax."""
    logits = gradient.empty_logits(costs.space).requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.15)
    for step in range(steps):
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        temperature = 2 * 0.15 ** (step / steps)  # samples become more and more one-hot
        sample = ((logits - (-uniform.log()).log()) / temperature).softmax(1)
        excess = (mean_macs(costs, sample) / costs.limits["macs"]).log2().clamp(min=0)
        loss = 20 * excess - surrogate(sample)
        optimizer.zero_grad()
        loss.backward()
        logits.grad.nan_to_num_(0.0)  # of options that there are not
        optimizer.step()
    return logits.detach().softmax(1)


# %% tags=["nbval-check-output"]
relaxed = gradient.Relaxed(field_costs)
surrogate = gradient.Surrogate(relaxed).fit(random_by_hand(field_costs, landscape, 16, 0))
chances = descend(field_costs, surrogate, torch.Generator().manual_seed(0))
start = gradient.empty_logits(field).softmax(1)
print(f"mean cost: {mean_macs(field_costs, start) / 1.2e6:.2f} of the limit before,", end=" ")
print(f"{mean_macs(field_costs, chances) / 1.2e6:.2f} after 30 steps")
ours = 20 * (mean_macs(field_costs, start) / 1.2e6).log2().clamp(min=0) - surrogate(start)
theirs = gradient.relaxed_objective(relaxed, surrogate, start, 20.0)
print("the package's loss is the same:", torch.allclose(ours, theirs))

# %% [markdown]
# ### Who finds more?
#
# The same landscape, limit and 40 queries, ten searches each. Then ask the same of a real supernet in the benchmark.

# %% tags=["machine-dependent"]
results["gradients"] = best(gradient.gradient_search)
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.boxplot(list(results.values()), orientation="horizontal", tick_labels=list(results))
axes.axvline(allowed.max(), color="grey", linewidth=1)
axes.set(xlabel="best of 40 queries (%); line: the best there is", title="Who finds more?")
figures.show(figure, "Best answers of ten searches by random search, evolution, REINFORCE and gradients")
ahead = [name for name, values in results.items() if np.median(values) > np.median(results["random"])]
print(f"above random search in the median: {', '.join(ahead) or 'none'}")

# %% [markdown]
# **What would fool you.** A single search proves nothing: look at the spread. And the landscape has structure for a method
# to learn; where few decisions matter, random search is hard to beat.
#
# ## 6 · Do shared weights rank networks?
#
# A search asks the supernet; you will train the winner alone. **Kendall's τ** says whether both agree on the order:
# over all pairs of networks, concordant minus discordant, ties aside (it is no temperature).
#
# $$\tau = \frac{\sum_{i<j} \text{sign}(x_i - x_j)\,\text{sign}(y_i - y_j)}{\sqrt{n_x n_y}}$$
#
# 1 is the same order, 0 is no relation; $n_x$ and $n_y$ count the pairs that are not tied in $x$ and in
# $y$. It is called tau-b.
#
# ### Exercise 5.7 · Find the bug: ties
#
# Accuracies on a few hundred images are often equal. Then this function gives less than 1 even for τ of `x` with
# itself. Both are arrays (networks,). Return τ as the formula has it.
#
# ```python
# sign_x, sign_y = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
# return (sign_x * sign_y).sum() / (len(x) * (len(x) - 1))
# ```
#
# <details><summary>Hint 1</summary>A tie has the sign 0, so it adds nothing above; it must not count below
# either.</details>
# <details><summary>Hint 2</summary>The square of a sign is 1 where there is no tie. The outer difference holds each pair
# twice, above and below.</details>


# %% tags=["exercise"]
def tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b of paired values."""
    ### BEGIN SOLUTION
    sign_x, sign_y = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    return (sign_x * sign_y).sum() / np.sqrt((sign_x**2).sum() * (sign_y**2).sum())
    ### END SOLUTION


# %% tags=["checks", "nbval-check-output"]
check("5.7", tau)

# %% [markdown]
# The committed run trained 16 random networks alone. *Predict*: which τ? And which interval, if other networks had been
# drawn?

# %% tags=["nbval-check-output"]
[committed] = [record["extra"]["search"] for record in records.values() if "search" in record["extra"]]
shared, trained_alone = np.array(committed["pairs"]).T
random, taus = np.random.default_rng(0), []
for _ in range(2000):  # networks drawn again, with replacement
    some = random.integers(0, len(shared), len(shared))
    taus.append(tau(shared[some], trained_alone[some]))
low, high = np.percentile(taus, (2.5, 97.5))
said = "rank better than chance" if low > 0 else "are not shown to rank at all"
print(f"τ = {tau(shared, trained_alone):.2f} [{low:.2f}, {high:.2f}]: shared weights {said} here")

# %% tags=["nbval-check-output"]
from nnc_utils.search.evaluator import kendall

print("the package: τ = {:.2f} [{:.2f}, {:.2f}]".format(*kendall(committed["pairs"])))
spread = [np.ptp(values) for values in (shared, trained_alone)]
print(f"the 16 networks lie within {spread[0]:.1f} pp (shared weights) and {spread[1]:.1f} pp (alone)")

# %% [markdown]
# **What it means.** Published supernets report τ of 0.5 and more, after hundreds of epochs and over a whole space. Ours was
# trained for four epochs, and the networks near the limit differ by little: their order is mostly noise. So the best by
# shared weights need not be the best. **What would fool you:** to report the search's own score of its winner.
#
# ## 7 · Does a search beat what a person draws?
#
# The benchmark trains a supernet, repeats each search with other seeds at **equal cost** (the same number of networks asked;
# what a search has asked before is free), sends each method's best into a short training of its own, and retrains the
# winner. Its rivals are ResNet-18 and ResNet-20 with all widths scaled by one factor, with **no fewer** MACs than the winner
# and the same epochs. "32× fewer MACs" is the limit of the search: a winner may need less, see *MACs ÷*.
#
# A fifth method, **random near limit**, draws only networks that cost at least half of the limit: how much of a method's
# gain is only that larger networks are better? With `evaluations` above 0, as here, the supernet judges only that many
# networks, and all searches ask a *model* fitted to them, so that they can be repeated in seconds.

# %% tags=["benchmark"]
from nnc_utils import measure, peers
from nnc_utils.search import candidates

others = {name: peers.peer(name).search for name in other_searchers if not peers.available(name)}
candidates.Search(bench, measure.milliseconds, **others).run()
networks = bench.build(candidates.resolved(bench, configurations))

# %% tags=["benchmark"]
rows = bench.measure(networks)
bench.show(rows) if len(rows) else None

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# Does it beat them? On the same test images, paired; "not below" is undecided.

# %% tags=["machine-dependent"]
from bench.pairs import comparisons

if len(rows):
    table = comparisons(rows, bench.path("predictions"), dataset=bench.baseline.dataset)
    for pair in table.to_dict("records"):
        print(f"{pair['ours']}: {pair['verdict']} {pair['theirs']}, {pair['difference (pp) [95 %]']} pp")

# %% [markdown]
# What did the searches find? Lines are medians over the seeds, bands are quartiles, of what the searches were *told*: here
# by the model. The lines printed below are what the **supernet** says of the networks with which they ended, with a
# Mann-Whitney test: p is the chance to see a method so far above random search if it were no better. *Predict*: does the
# highest curve win there, too?


# %%
def draw_curves(search: dict) -> plt.Figure:
    """The best so far of each method, after so many queries."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for (name, (low, middle, high)), marker in zip(search["curves"].items(), figures.MARKERS):
        asked = np.arange(1, len(middle) + 1)
        axes.plot(asked, middle, marker=marker, markevery=0.2, label=figures.name(name))
        axes.fill_between(asked, low, high, alpha=0.12)
    axes.set(
        xlabel="networks asked",
        ylabel="predicted best so far (%)" if search["modelled"] else "best so far (%)",
    )
    axes.set_title("Is a clever search better than a random one?")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def verdict(search: dict) -> str:
    """Who ends above random search, by a one-sided Mann-Whitney test over the searches."""
    random_ends, lines = search["verified"]["random"], []
    for name, ends in search["verified"].items():
        gain, p = (
            np.median(ends) - np.median(random_ends),
            mannwhitneyu(ends, random_ends, alternative="greater").pvalue,
        )
        if name != "random":
            said = "above random search" if p < 0.05 else "not shown to be above it"
            lines.append(f"{figures.name(name)}: {gain:+.2f} pp, {said} (p = {p:.1g})")
    return "\n".join(lines)


# %% tags=["machine-dependent"]
from scipy.stats import mannwhitneyu

if mine := candidates.found(bench, "search"):
    figures.show(draw_curves(mine), "Best validation accuracy so far against networks asked, by method")
    print(verdict(mine))

# %% [markdown]
# ## The committed results
#
# The same search on Fashion-MNIST, with a ResNet-18 trained for twenty epochs. All queries went to the supernet itself.
# The tool Optuna searches, too, by NSGA-II, an evolution. Does a clever search find more than a random one?

# %% tags=["nbval-check-output"]
print(verdict(committed))
images = committed["images"]
print(f"cost of a search: {images['asked'] * images['candidate'] / 1e6:.2f} million images forward;", end=" ")
print(f"of the supernet's training, before any: {images['supernet'] / 1e6:.2f} million")

# %%
figures.show(
    draw_curves(committed), "Committed searches: best so far against networks asked, medians and quartiles"
)

# %% [markdown]
# And does the winner beat what somebody drew in a minute? Test images; differences over the seeds that both have. *Alone*:
# trained from labels; *distilled*: from the soft labels of the compressed network of [06](06_pipeline.ipynb). The
# three-stage ResNet is among the rivals once it has committed rows.

# %% tags=["nbval-check-output"]
NAMES = {committed["winner"]["method"]: "the winner", "random_alone": "the best of 16 random networks"}
NAMES |= {"narrow_resnet18": "the narrow ResNet-18", "three_stage": "the three-stage ResNet"}
table = pd.read_csv(root() / "results/standard/compression.csv", keep_default_na=False)
table = table[table["technique"] == "search"].assign(network=lambda rows: rows["method"].map(NAMES))
table["training"] = np.where(table["settings"].str.contains("distill"), "distilled", "alone")
accuracy = table.pivot(index=["training", "seed"], columns="network", values="accuracy").astype(float)
print(accuracy.groupby("training").mean().round(2).to_string())
found, drawn_by_hand = (
    list(NAMES.values())[:2],
    [name for name in list(NAMES.values())[2:] if name in accuracy],
)
for training_kind, values in accuracy.groupby("training"):
    for name, rival in product(found, drawn_by_hand):
        if not len(gap := (values[name] - values[rival]).dropna()):
            continue
        said = "above" if gap.mean() > 0 else "below"
        seeds = f"{len(gap)} seed{'s' * (len(gap) > 1)}"
        print(f"{training_kind}: {name} is {abs(gap.mean()):.2f} pp {said} {rival} ({seeds})")

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for (kind, values), marker in zip(accuracy.groupby("training"), "os"):
    for place, name in enumerate([*found, *drawn_by_hand]):
        shown = values[name].dropna()
        label = kind if place == 0 else None
        axes.plot(
            shown,
            [place + 0.15 * (marker == "s")] * len(shown),
            marker,
            color=f"C{marker == 's':d}",
            label=label,
        )
axes.margins(y=0.2)
axes.set_yticks(range(len(found + drawn_by_hand)), found + drawn_by_hand)
axes.set(xlabel="test accuracy (%), a mark for each seed", title="Does the winner beat what a person drew?")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
figures.show(
    figure, "Committed test accuracy of winner, best random network and rivals by hand, alone and distilled"
)

# %% [markdown]
# **What it means.** Two questions, two answers: whether a method beats random search *by the supernet's score*, and whether
# its winner beats the networks by hand *when all are trained*. Where shared weights rank badly (section 6), the first says
# little about the second, and a few random networks trained alone are the better search.

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
# - A space is data: numbers for decisions, tables for costs, a fitted sum for milliseconds.
# - A supernet judges a network in a fraction of a second. Check by τ, with its interval, what its judgement is worth.
# - Batch-norm's statistics belong to one network: each candidate gets its own, from a few images and without training.
# - A search's own score of its winner says little: train the winner and its rivals alone, and compare these.
# - A search is worth its cost only if it beats random search at equal cost *and* the small networks drawn by hand; it
#   cannot, where its space does not hold them.
#
# <!-- numbers:begin -->
# **In numbers.** A searched network (16× fewer MACs, random search, each trained alone, distilled from the
# compressed network) is held against a rival (16× fewer MACs, a narrow ResNet-18 by hand, distilled from the
# compressed network): the difference is +0.15 [-0.03, +0.34] pp, and the verdict "undecided, in a larger file". The
# searched network's file is 23.4× smaller than the uncompressed network's.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why does a formula for the size of a space add over depths, but multiply over stages?</summary>A
# stage has one depth at a time, so its depths are alternatives. The stages are chosen independently, so every choice of
# one goes with every choice of another.</details>
# <details><summary>2. Why are the decisions about absent blocks set to 0?</summary>They change nothing in the network.
# With them as drawn, one network would have many names: it would be asked several times and be drawn more
# often.</details>
# <details><summary>3. Why can a table of each part replace the counting of MACs, and for which costs does it
# fail?</summary>The cost is a sum of parts that depend on few decisions each. It fails where parts interact: peak
# memory, or milliseconds if the runtime fuses layers across blocks.</details>
# <details><summary>4. Why are times fitted with relative errors, and on which networks must the fit be
# tested?</summary>With absolute errors a few slow networks decide the coefficients, and the small ones, which the
# search wants, are predicted badly. It must be tested on networks that were not fitted.</details>
# <details><summary>5. Why does the sandwich rule train the largest and one of the narrowest networks in every
# step?</summary>They bound the space: the networks between share weights with both, so they improve with them. The
# largest also gives the soft labels.</details>
# <details><summary>6. What goes wrong without <code>detach</code> in the loss of the sandwich?</summary>The largest network also
# gets a gradient through the soft labels: it moves towards what the weak networks can imitate, not only towards the
# labels.</details>
# <details><summary>7. Why does each candidate need batch-norm statistics of its own, and what do they
# cost?</summary>Mean and variance of a channel depend on which channels feed it. They cost a forward pass of some
# training images and no training.</details>
# <details><summary>8. A search by evolution beats a single random search. Is evolution better?</summary>One pair proves
# nothing: searches vary with the seed. Repeat both at an equal number of queries and compare the
# distributions.</details>
# <details><summary>9. Why does evolution let the oldest die and not the worst?</summary>A network with a lucky score
# would stay forever as a parent. By age it stays only if its children score well, too.</details>
# <details><summary>10. What does a baseline change in REINFORCE, and what not?</summary>It lowers the spread of the
# estimate. Its mean stays the exact gradient, since the gradient of log-probability has the mean 0.</details>
# <details><summary>11. Why is the mean cost of a relaxed architecture exact, but not its accuracy?</summary>The cost is
# a sum of tables over independent decisions, so its mean is a sum of products of probabilities. Accuracy is no such
# sum; it is modelled or sampled.</details>
# <details><summary>12. The interval of τ contains 0. What may you say of the supernet, and of the winner's score by
# it?</summary>That it is not shown to rank networks better than chance. The score then says little: train the winner,
# random networks and the rivals by hand alone, and compare these.</details>
#
# **Try it.** Change parameters at the top and run all cells again. (1) Set `macs = 64`, there and in both
# `configurations`: which stage does the winner narrow first? Predict, then print `mine["winner"]["spec"]`. (2) Leave
# `matters` out of exercise 5.6, and pass over its checker: REINFORCE finds exactly the same in the landscape. Which
# networks does the landscape lack? (3) Put the bug back into exercise 5.3 and print `error(features, fitted, fitted)`, too:
# why are the blocks predicted worse, but not the networks, which are slower? (4) Set `alone = 16`: has your own τ,
# `mine["tau"]`, an interval without 0?
#
# **Further reading.** [Once-for-all](https://arxiv.org/abs/1908.09791) trains a supernet to serve as it is;
# [MnasNet](https://arxiv.org/abs/1807.11626) puts milliseconds into the reward.
#
# Next: [06_pipeline](06_pipeline.ipynb), all techniques in one network.
