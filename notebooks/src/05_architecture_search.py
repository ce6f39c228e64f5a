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
# Someone who needs a small network usually scales ResNet-18 down: a quarter of every width. Nothing says that this is the best
# way to spend the multiplications that are left. A search may choose depth, widths, kernels and connections by itself. Two
# things are easily left out of its reports: **random search at equal cost**, and **the hand-made thin network**, trained as
# long. Here both stand beside every method.
#
# The sections are a practitioner's: the space, the objective, the algorithm, the search loop, and the winner retrained.

# %% tags=["parameters"]
widest: float = 0.25  # [0.0625, 1] largest width of a stage as a share of ResNet-18's, in sixteenths
blocks: int = 2  # [1, 4] the most blocks of a stage
macs: float = 32.0  # [0, 10000] constraint: how many times fewer multiplications than ResNet-18; 0: none
latency_ms: float = 0.0  # [0, 1000] constraint: predicted milliseconds a picture in int8; 0: none
latency_networks: int = 20  # [4, 1000] blocks that are timed to predict it; half as many networks test that
runtime: str = "onnxruntime"  # {onnxruntime, openvino} in which they are timed
supernet_epochs: float = 6.0  # [0.001, 10000] of the network that contains all others
supernet_batch: int = 64  # [2, 4096] images in a step of its training
calibration_images: int = 256  # [2, 50000] that re-estimate a candidate's batch-norm
validation_images: int = 200  # [2, 50000] that score a candidate
queries: int = 32  # [4, 10000] candidates that one search may ask for
search_seeds: int = 20  # [1, 1000] repetitions of each search
evaluations: int = 96  # [0, 100000] candidates really looked at; searches then ask a model of them; 0: all
alone: int = 4  # [0, 1000] random architectures trained alone, to see whether shared weights rank them
alone_epochs: float = 1.5  # [0.001, 1000] of those, and of the finalists
finalists: int = 1  # [1, 100] best networks of each method that are trained alone
epochs: float = 2.0  # [0.001, 1000] of the winner's training from scratch, and of its rivals'
learning_rate: float = 0.05  # [0.00001, 1] peak of every training
copies: int = 2  # [1, 64] augmentations of each picture in which the teacher looks
arms: list = ["winner", "thin_resnet18"]  # what is trained from scratch; with " taught": by the teacher
peers: list = []  # searchers of others, such as "optuna_nsga2"
steps: list = ["latency", "search", "retrain"]  # what this run does; an upstream run has done the rest
teaches: str = "fp32"  # the artifact of an upstream run that teaches: the baseline, or one of 06_pipeline
upstream: list = []  # run folders of 01_baseline, own seed first, and of earlier parts; empty: 01's defaults
part: str = ""  # name of this part of a divided benchmark; empty: it is not divided
seed: int = 1  # [0, 1000000] of the supernet, of the weights trained from scratch, of order and augmentation
profile: str = "smoke"  # where the result belongs: smoke, quick, medium, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/05_architecture_search

# %%
import contextlib
import hashlib
import shutil
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import torch

# %%
from nnc_utils import (
    artifact,
    batch_norm,
    data,
    evaluation,
    figures,
    measure,
    models,
    results,
    runtimes,
    scoring,
    training,
)
from nnc_utils import peers as counterparts
from nnc_utils.distillation import teaching
from nnc_utils.quantization import activations, uniform
from nnc_utils.run import start
from nnc_utils.search import gradient, latency, searchers
from nnc_utils.search import space as spaces
from nnc_utils.search import supernet as shared
from nnc_utils.search.costs import Constraints, Costs, InfeasibleError, described
from nnc_utils.search.evaluator import Evaluator

figures.style()
run = start("05_architecture_search", globals(), needs=("01_baseline",))
baseline, *before = run.upstream
reference, recipe_of_01 = baseline.baseline, baseline.record.parameters
pictures = data.load(reference.dataset, size=recipe_of_01["size"] or None)
print(f"the large network: {reference.model} on {reference.dataset}, made by {baseline.run}")

# %%
STEPS, ARMS = ("latency", "search", "retrain"), ("winner", "random_alone", "thin_resnet18")
about = {"channels": pictures.channels, "size": pictures.size, "classes": len(pictures.classes)}
about["stem"] = recipe_of_01["stem"]
full, space = models.resnet(18, **about), spaces.around(**about, widest=widest, blocks=blocks)
earlier = {}  # what upstream parts have found: "search", "latency"
for part_before in before:
    earlier |= {name: value for name, value in part_before.record.extra.items() if name in STEPS}
for given in steps:  # before any work
    if given not in STEPS:
        raise ValueError(f"unknown step {given!r}: one of {', '.join(STEPS)}")
for arm in arms:
    if arm.removesuffix(" taught") not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: one of {', '.join(ARMS)}, alone or with ' taught' behind it")
for given in peers:
    if given not in counterparts.SEARCHERS:
        raise ValueError(f"unknown peer {given!r}: one of {', '.join(counterparts.SEARCHERS)}")
if not macs and not latency_ms:
    raise ValueError("without a constraint the largest network wins: give macs, latency_ms or both")
if latency_ms and "search" in steps and "latency" not in [*steps, *earlier]:
    raise ValueError("nothing predicts latency_ms: add 'latency' to steps, or the run that timed to upstream")
if any(arm.endswith(" taught") for arm in arms):
    whose = run.made_before(teaches)[0]
    teacher = artifact.load(whose.artifact(teaches)).eval()
    teacher_seconds = 0 if whose is baseline else whose.row(teaches).train_seconds
if "retrain" in steps and "search" not in steps and "search" not in earlier:
    raise ValueError("nothing has been searched: add 'search' to steps, or the run that did to upstream")
trained_alone = earlier["search"]["pairs"] if "search" in earlier else alone
wants_alone = any(arm.startswith("random_alone") for arm in arms)
if wants_alone and not trained_alone:
    raise ValueError("no random network is trained alone: drop random_alone from arms, or give alone=16")

# %% [markdown]
# ## 1 · The space: what may a network be?
#
# A residual network is a list of decisions: how wide and how deep each stage is, which kernel a block begins with, and what goes
# around it: the input itself (identity), a 1×1 convolution of it (projection), or nothing. Each decision has a few options; an
# architecture is one small number for each. Decisions about a block that is not there are 0, so that one network has one name.
#
# *Predict*: with four stages of at most two blocks, how many networks is that, roughly: thousands, millions, billions?

# %%
random = np.random.default_rng(0)
pd.DataFrame(
    [
        {"stage": c.stage + 1, "block": c.block + 1 or "", "decision": c.about, "options": c.options}
        for c in space.choices[: 4 * blocks + 4]
    ]
)

# %% tags=["nbval-check-output"]
example = space.sample(np.random.default_rng(1))
print(f"{len(space.choices)} decisions, {space.cardinality:.1e} networks")
print("one of them: ", example)
print("a mutation:  ", space.mutate(example, np.random.default_rng(2)))
print("neighbours:  ", len(set(space.neighbours(example))))

# %% [markdown]
# **What it means.** Trained one by one for a minute each they would take half a century. The question of the whole chapter is how to
# judge a network without training it.
#
# ## 2 · The objective: good, and cheap enough
#
# "Accurate" alone has a boring answer: the largest. The objective is accuracy *within constraints*. What a network costs, its
# multiplications, parameters, bytes in integers, milliseconds, is a sum over its blocks, and each block depends on a few
# decisions. So costs are kept in tables and looked up in microseconds. A constraint that nothing meets is an error that says
# what the smallest network costs:

# %%
costs = Costs(space)
try:
    costs.check(Constraints(macs=1000))
except InfeasibleError as error:
    print(error)
drawn = [space.sample(random) for _ in range(2000)]
counted = np.array([costs.of(found, "macs") for found in drawn]) / 1e6
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.hist(counted, bins=60)
if macs:
    axes.axvline(models.macs(full) / macs / 1e6, color="black")
axes.set(xlabel="million multiplications a picture", ylabel="networks")
axes.set_title("How expensive is a random network? (line: the constraint)")
figures.show(figure, "Histogram of the multiplications of random networks, with the constraint")

# %% [markdown]
# ### Milliseconds: measured once, then predicted
#
# A ratio of multiplications is no speed-up. A search that is to meet a number of milliseconds cannot time every candidate
# either: it would wait for the clock, and the clock would hear the search. So **blocks** are timed beforehand, in integers, alone on
# the machine, and a sum over a network's parts is fitted: so much for a call, a convolution, a multiplication of each kernel
# (channels filled up to what the integer kernels take at once), a byte moved. *Predict*: which error will it have on whole
# networks that it has never seen?


# %%
def timed(specs: list[models.Spec]) -> list[list]:
    """Milliseconds of untrained networks in integers, one thread: weights do not change the time."""
    paths = []
    for number, spec in enumerate(specs):
        torch.manual_seed(number)
        noise = torch.randn(16, spec.channels, spec.size, spec.size)
        network = models.build(spec)
        network.train()(noise)
        network = activations.calibrate(uniform.quantize_network(network, bits=7, per_channel=True), noise)
        paths.append(run.path(f"timed/{number}.safetensors"))
        artifact.save(network, paths[-1], mean=pictures.mean, std=pictures.std, classes=pictures.classes)
    about = {"runtime": runtime, "precision": "int8", "folder": run.path("timed")}
    found = measure.milliseconds(paths, **about)
    shutil.rmtree(run.path("timed"))
    return [[spec.to_json(), milliseconds] for spec, milliseconds in zip(specs, found, strict=True)]


if "latency" in steps and (why := runtimes.available(runtime, "int8")):
    print(f"{runtime}: {why}; times are not predicted")
elif "latency" in steps:
    probes = latency.blocks(space, latency_networks, random)
    whole = [space.spec(found) for found in drawn[: max(2, latency_networks // 2)]]
    measured = timed(probes + whole)
    earlier["latency"] = {
        "runtime": runtime,
        "blocks": measured[: len(probes)],
        "networks": measured[len(probes) :],
    }


# %%
def measured_pairs(timed: dict) -> list[list[tuple[models.Spec, float]]]:
    """The blocks to fit, and the networks to test: each with its milliseconds."""
    return [
        [(models.Spec.from_json(text), milliseconds) for text, milliseconds in timed[kind]]
        for kind in ("blocks", "networks")
    ]


predictor = None
if "latency" in earlier:
    known, unseen = measured_pairs(earlier["latency"])
    predictor = latency.fit(known)
    error = predictor.error(unseen)
    figure, axes = plt.subplots(figsize=(5, 4))
    for pairs, marker, label in ((known, "o", "blocks, fitted"), (unseen, "s", "networks, never seen")):
        axes.plot([m for _, m in pairs], [predictor.of(spec) for spec, _ in pairs], marker, label=label)
    ends = (0, max(m for _, m in known + unseen))
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.set(xlabel="measured milliseconds", ylabel="predicted milliseconds")
    axes.set_title(
        f"int8 in {figures.name(earlier['latency']['runtime'])}: mean error {error:.1f} % on unseen networks"
    )
    axes.legend(fontsize=8)
    figures.show(figure, "Predicted against measured milliseconds of blocks and of networks never seen")

# %%
costs = Costs(space, predictor.part if predictor else None)
limits = {"macs": models.macs(full) / macs if macs else None, "latency_ms": latency_ms or None}
limits = Constraints(**limits)
costs.check(limits)
point = ",".join([f"macs={macs:g}x"] * bool(macs) + [f"latency_ms={latency_ms:g}"] * bool(latency_ms))
if wants_alone and "search" in earlier and earlier["search"]["point"] != point:
    raise ValueError(
        f"the search was within {earlier['search']['point']}, this run is within {point}: give both "
        "the same, since random_alone draws again what the search drew"
    )
share = np.mean([costs.ratio(found, limits) <= 1 for found in drawn])
print(f"{100 * share:.0f} % of random networks are within {point}")

# %% [markdown]
# ## 3 · The algorithm: one network that contains all others
#
# Networks of the space differ in how much of a layer they use. So train *one*, the largest, such that the first $c$ channels of
# each layer, and the middle of each kernel, are a good network, too. In each step the **sandwich rule** takes the largest, one of
# the narrowest and two random networks between them; the largest learns from labels, the others from the largest.
#
# $$L = \text{CE}(z_\text{largest}, y) + \sum_{\text{others}} \text{CE}(z, \text{softmax}(z_\text{largest}))$$
#
# Batch-norm is the trap: mean and variance of a channel depend on which channels came before it. Statistics of one network are
# wrong for another. A candidate therefore gets its own, from a few training pictures. *Predict*: with the statistics of the
# largest network, how accurate will a candidate look?

# %%
searching = "search" in steps


def between(generator: np.random.Generator) -> spaces.Architecture:
    """A network that costs between half of what is allowed and all of it: where the search will be."""
    return costs.draw(limits, generator, least=0.5)


def train_supernet() -> tuple[shared.Supernet, training.History]:
    """The supernet, trained by the sandwich rule."""
    torch.manual_seed(seed)
    network = shared.Supernet(space)
    options = {"learning_rate": 2 * learning_rate, "batch_size": supernet_batch, "seed": seed}
    options |= {"augment": recipe_of_01["augment"], "checkpoint": run.path("checkpoint_supernet.pt")}
    loss = shared.sandwich(space, between)
    history = training.fit(network, pictures, epochs=supernet_epochs, loss=loss, validate=True, **options)
    return network, history


if searching:
    begin = time.perf_counter()
    supernet, history = train_supernet()
    PASSES = 4  # networks a step, each forward and backward; a backward pass counts as two forward
    supernet_images = history.images * PASSES * 3
    print(f"{supernet_images:,} images through the supernet, {time.perf_counter() - begin:.0f} s")


# %%
def draw_training(epochs: list) -> plt.Figure:
    """The loss of the four networks of a step, and the largest one's accuracy."""
    numbers, losses, accuracies = zip(*epochs, strict=True)
    figure, axes = plt.subplots(figsize=(6, 2.8))
    axes.plot(numbers, losses, "o-", label="loss")
    axes.set(xlabel="epoch", ylabel="loss", title="The supernet learns")
    beside = axes.twinx()
    beside.plot(numbers, accuracies, "s-", color="C1")
    beside.set_ylabel("accuracy of the largest (%)", color="C1")
    beside.grid(visible=False)
    return figure


if searching:
    curve = [[epoch.epoch, epoch.loss, epoch.validation] for epoch in history]
elif "search" in earlier:
    curve = earlier["search"]["supernet"]
if searching or "search" in earlier:
    figures.show(
        draw_training(curve), "Loss and validation accuracy of the supernet's largest network by epoch"
    )


# %%
def with_statistics_of(network: models.ResNet, architecture: spaces.Architecture) -> float:
    """Accuracy of a candidate with the batch-norm statistics of another, larger network."""
    candidate = evaluate.supernet.cut(architecture)
    theirs = network.state_dict()
    state = {name: shared.fitted(theirs[name], own.shape) for name, own in candidate.state_dict().items()}
    candidate.load_state_dict(state)
    with torch.no_grad():
        hits = candidate.eval()(evaluate.images).argmax(1) == evaluate.labels
    return 100 * float(hits.double().mean())


if searching:
    settings = {"calibration": calibration_images, "validation": validation_images}
    evaluate = Evaluator(supernet, pictures, file=run.path("evaluations.jsonl"), **settings)
    some = [between(random) for _ in range(4)]
    begin = time.perf_counter()
    own = np.mean([evaluate(found) for found in some])
    seconds = (time.perf_counter() - begin) / len(some)
    largest = batch_norm.take_statistics(evaluate.supernet.cut(space.largest), evaluate.calibration)
    wrong = np.mean([with_statistics_of(largest, found) for found in some])
    trap = {"theirs": float(wrong), "own": float(own)}
    print(f"with the largest network's statistics {wrong:.1f} %, with their own {own:.1f} %")
    print(f"the largest {evaluate(space.largest):.1f} %, the smallest {evaluate(space.smallest):.1f} %")
    print(f"{seconds:.2f} s a candidate: {evaluate.cost:,} images forward")

# %% [markdown]
# ## 4 · The search loop
#
# Four ways to choose what to ask next, the first of which is the one to beat:
#
# - **random**: any network within the constraint; and, as a control, only those that cost at least half of it: networks near
#   the limit are better because they are larger, which takes no method.
# - **evolution**: keep a population; change one decision of the best of a few; the oldest dies (Real et al., 2019).
# - **REINFORCE**: a controller holds a probability for each option; after each batch it moves along
#   $\frac1n\sum_i (R_i - b)\,\nabla \log p(a_i)$, with reward $R = \text{accuracy} \times \max(1, \text{cost}/\text{limit})^{-0.07}$ (MnasNet's
#   exponent; there networks below the limit are rewarded, too) and baseline $b$. With an exponent of −1 the cost would drown all differences in accuracy.
# - **gradient**: decisions are relaxed to probabilities and the loss is differentiated by them (DARTS), drawn by
#   **Gumbel-softmax** and with the cost in the loss in FBNet.
#
# FBNet differentiates the supernet's loss, with every option computed in every step. To repeat a search with twenty seeds we
# differentiate a small **model of the accuracy** instead, fitted to what that search has asked so far. Its images are those of
# its questions, like everyone's. The cost term is exact: of independent decisions the mean cost is a sum of products.
#
# *Predict*: the advantage of a clever method over random search, in points of accuracy?


# %%
def near_the_limit(costs, constraints, evaluate, *, queries, seed):
    """Random networks that cost at least half of what is allowed."""
    generator = np.random.default_rng(seed)
    return [(found, evaluate(found)) for found in (between(generator) for _ in range(queries))]


METHODS = {"random": searchers.random_search, "random_near_limit": near_the_limit}
METHODS |= searchers.SEARCHERS | {"gradient": gradient.gradient_search}
missing = {}
for name in peers:
    if why := counterparts.available(name):
        missing[name] = why
        print(f"{name}: {why}")
    else:
        METHODS[name] = counterparts.peer(name).search

# %% [markdown]
# **Equal cost** means equal images through the supernet: its training, and calibration and validation pictures of each question.
# What another search has asked before is answered from memory, but counts in full; what the same search has asked before is
# free. Otherwise those that come back to what they like, REINFORCE and NSGA-II, would pay for nothing new.


# %%
class EnoughError(Exception):
    """A search has asked as many networks as it may."""


class Asked:
    """Answers the questions of one search, and counts the networks that it has asked."""

    def __init__(self, answer: searchers.Evaluate) -> None:
        self.answer, self.trace = answer, {}

    def __call__(self, found: spaces.Architecture) -> float:
        """The accuracy of a network; a new one is too many where all questions are asked."""
        if found not in self.trace:
            if len(self.trace) == queries:
                raise EnoughError
            self.trace[found] = self.answer(found)
        return self.trace[found]


# %%
REPEATS = dict.fromkeys(("reinforce", *counterparts.SEARCHERS), 4)  # times as many questions, old ones free


def searched(name: str, number: int) -> searchers.Trace:
    """What one search has asked, in order, each network once; one that runs out of ideas repeats its last."""
    asked = Asked(ask)
    with contextlib.suppress(EnoughError):
        METHODS[name](costs, limits, asked, queries=REPEATS.get(name, 1) * queries, seed=number)
    trace = list(asked.trace.items())
    return trace + trace[-1:] * (queries - len(trace))


# %%
def features(found: spaces.Architecture) -> np.ndarray:
    """An architecture for the model of all evaluations: each decision along its options, and the cost."""
    scaled = np.array(found) / np.maximum(space.options - 1, 1)
    return np.append(np.where(space.active(found), scaled, -0.5), 3 * np.log(costs.ratio(found, limits)))


class Model:
    """Kernel ridge regression over evaluated networks: asked where real evaluations are too dear."""

    def __init__(self, known: dict[spaces.Architecture, float], gamma: float = 0.05, ridge: float = 0.3):
        self.inputs, self.gamma = np.stack([features(found) for found in known]), gamma
        values = np.array(list(known.values()))
        self.mean, near = values.mean(), self.closeness(self.inputs)
        self.weights = np.linalg.solve(near + ridge * np.eye(len(known)), values - self.mean)
        self.answers: dict[spaces.Architecture, float] = {}

    def closeness(self, inputs: np.ndarray) -> np.ndarray:
        """A Gaussian of the distance to each evaluated network."""
        return np.exp(-self.gamma * ((inputs[:, None] - self.inputs) ** 2).sum(2))

    def __call__(self, found: spaces.Architecture) -> float:
        """The predicted accuracy."""
        if found not in self.answers:
            self.answers[found] = self.mean + float(self.closeness(features(found)[None])[0] @ self.weights)
        return self.answers[found]


# %%
if searching and evaluations:
    for found in (costs.draw(limits, random, least=0.3) for _ in range(evaluations * 2 // 3)):
        evaluate(found)
    rest = max(4, evaluations - len(evaluate.known))
    searchers.evolution(costs, limits, evaluate, queries=rest, seed=1000)  # where good ones are
    known = {found: value for found, value in evaluate.known.items() if costs.ratio(found, limits) <= 1}
    fitted = {found: value for number, (found, value) in enumerate(known.items()) if number % 5}
    held = {found: value for found, value in known.items() if found not in fitted}
    check = Model(fitted)
    tau_model = scipy.stats.kendalltau([check(found) for found in held], list(held.values())).statistic
    ask = Model(known)
    print(
        f"{len(known)} evaluations; Kendall's tau of the model on {len(held)} "
        f"that it has not seen: {tau_model:.2f}"
    )
elif searching:
    ask = evaluate

# %%
if searching:
    begin, traces = time.perf_counter(), {}
    for name in METHODS:
        traces[name] = [searched(name, number) for number in training.progress(range(search_seeds), name)]
        print(f"{name}: {len(traces[name])} searches, {time.perf_counter() - begin:.0f} s so far", flush=True)
    winners = {  # of each search its best, looked at with real images
        name: [max(trace, key=lambda asked: asked[1])[0] for trace in found] for name, found in traces.items()
    }
    verified = {name: [evaluate(best) for best in found] for name, found in winners.items()}
    so_far = {
        name: np.maximum.accumulate([[value for _, value in trace] for trace in found], axis=1)
        for name, found in traces.items()
    }
    print(f"{len(evaluate.known)} networks looked at, {len(evaluate.known) * evaluate.cost:,} images")

# %%
if searching:
    earlier["search"] = {
        "seed": seed,
        "images": {"supernet": supernet_images, "candidate": evaluate.cost, "asked": queries},
        "curves": {n: np.percentile(c, (25, 50, 75), axis=0).round(3).tolist() for n, c in so_far.items()},
        "verified": {name: [round(value, 3) for value in values] for name, values in verified.items()},
        "modelled": bool(evaluations),
        "looked at": len(evaluate.known),
        "statistics": trap,
        "supernet": curve,
        "point": point,
    }
search = earlier.get("search")


# %%
def draw_curves(search: dict) -> plt.Figure:
    """How good is the best so far, after so many questions?"""
    figure, axes = plt.subplots(figsize=(8, 4))
    for (name, (low, middle, high)), marker in zip(search["curves"].items(), figures.MARKERS, strict=False):
        shown = np.arange(1, len(middle) + 1)
        axes.plot(shown, middle, marker=marker, markevery=0.2, label=figures.name(name))
        axes.fill_between(shown, low, high, alpha=0.15)
    cost, modelled = search["images"], ", as the model predicts" if search["modelled"] else ""
    axes.set_xlabel(
        f"candidates asked, each {cost['candidate']:,} images; the supernet's training {cost['supernet']:,}"
    )
    axes.set(ylabel=f"best so far (%{modelled})", title="Is a clever search better than a random one?")
    axes.legend(fontsize=8)
    return figure


if search:
    figures.show(draw_curves(search), "Best validation accuracy so far against images, medians and quartiles")


# %%
def medians(search: dict) -> pd.DataFrame:
    """What each method's searches end with, against random search."""
    rows, random_ends = [], search["verified"]["random"]
    for name, values in search["verified"].items():
        row = {"method": name, "searches": len(values)}
        if search["modelled"]:
            row["median, by the model"] = search["curves"][name][1][-1]
        row |= dict(
            zip(
                ("lower quartile", "median", "upper quartile"),
                np.percentile(values, (25, 50, 75)),
                strict=True,
            )
        )
        row["above random's median"] = f"{100 * np.mean(np.array(values) > np.median(random_ends)):.0f} %"
        test = scipy.stats.mannwhitneyu(values, random_ends, alternative="greater")
        rows.append(row | {"p, better than random": test.pvalue if name != "random" else np.nan})
    return pd.DataFrame(rows).round(3)


medians(search) if search else print("the search is another part of this benchmark")

# %% [markdown]
# **What it means.** The shaded bands are searches that did the same with other random numbers: a single curve proves nothing.
# p is that of a one-sided Mann-Whitney test against random search: it knows the chance in the searches, not that in the supernet
# or in the validation pictures. A family that does not rise above random search has spent its questions on decisions that do not
# matter here; one that does is ahead in accuracy *with shared weights*, and sections 5 and 6 ask what that is worth. Which
# decisions do matter? The mean accuracy of all
# networks that were looked at, by option; what counts is how far a decision's options lie apart, against the deviation of all:


# %%
def spreads(known: dict[spaces.Architecture, float]) -> list[list]:
    """How far the mean accuracies of a decision's options lie apart, each of at least 5 networks."""
    found, values = np.array(list(known)), np.array(list(known.values()))
    active, rows = np.array([space.active(a) for a in known]), []
    for place, choice in enumerate(space.choices):
        means = []
        for number in range(len(choice.options)):
            chose = active[:, place] & (found[:, place] == number)
            means += [values[chose].mean()] if chose.sum() >= 5 else []
        block = f", block {choice.block + 1}" if choice.block >= 0 else ""
        rows.append(
            [f"stage {choice.stage + 1}{block}: {choice.about}", float(np.ptp(means)) if means else 0.0]
        )
    return sorted(rows, key=lambda row: row[1])[-12:]


# %%
if searching:
    within = {
        found: value for found, value in evaluate.known.items() if 0.3 <= costs.ratio(found, limits) <= 1
    }
    search["spreads"], search["deviation"] = spreads(within), float(np.std(list(within.values())))
if search:
    figure, axes = plt.subplots(figsize=(7, 3.4))
    axes.barh(*zip(*search["spreads"], strict=True))
    axes.axvline(search["deviation"], color="black")
    axes.set(xlabel="percentage points between options (line: deviation of all networks)")
    axes.set_title("Which decisions matter?")
    axes.tick_params(axis="y", labelsize=8)
    figures.show(
        figure, "Differences of mean accuracy between the options of each decision, the largest twelve"
    )

# %% [markdown]
# **What would fool you.** Where a model answered, each search's best was looked at with real pictures afterwards. The harder a
# search tries, the more its best owes to the model's errors (the *winner's curse*): compare the two medians. The full
# profile asks the supernet itself.
#
# ## 5 · Does the supernet rank networks as training alone would?
#
# All of this trusted shared weights. Random networks within the constraint are now trained alone, briefly, and ranked both ways.
# **Kendall's τ** counts pairs: 1 if all are in the same order, 0 if the order means nothing.


# %%
def trained(spec: models.Spec, length: float, loss=None, train=None, augment=None):
    """A network from scratch, by the common recipe; always from the same random numbers."""
    torch.manual_seed(seed)
    network, train = models.build(spec), train or pictures
    batch_size = recipe_of_01["batch_size"]
    taught = "" if loss is None else "taught"
    digest = hashlib.sha256(f"{spec.to_json()} {length} {taught}".encode()).hexdigest()[:12]
    options = {"learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    options |= {"augment": recipe_of_01["augment"] if augment is None else augment}
    options |= {"loss": loss or training.cross_entropy, "checkpoint": run.path(f"checkpoint_{digest}.pt")}
    rounds = round(length * (len(pictures.train) // batch_size))
    history = training.fit(network, train, epochs=rounds / (len(train.train) // batch_size), **options)
    return network.eval(), history


def validated(network: torch.nn.Module) -> float:
    """Validation accuracy in percent, of all validation pictures."""
    return evaluation.accuracy(
        evaluation.predict(network, pictures.validation, normalize=pictures.normalize),
        pictures.validation.labels,
    )


# %%
def kendall(pairs: list) -> tuple[float, float, float]:
    """Tau, and the ends of its 95 % interval from 2,000 bootstrap samples."""
    one, other = np.array(pairs).T
    generator, taus = np.random.default_rng(0), []
    for _ in range(2000):
        some = generator.integers(0, len(one), len(one))
        taus.append(scipy.stats.kendalltau(one[some], other[some]).statistic)
    return scipy.stats.kendalltau(one, other).statistic, *np.nanpercentile(taus, (2.5, 97.5))


def drawn_alone(count: int) -> list[spaces.Architecture]:
    """The random networks that are trained alone, the same ones for every seed of a constraint."""
    generator = np.random.default_rng(7)
    return [between(generator) for _ in range(count)]


if searching:
    pairs = []
    for number, found in enumerate(drawn_alone(alone)):
        network, _ = trained(space.spec(found), alone_epochs)
        pairs.append([evaluate(found), validated(network)])
        print(f"{number + 1} of {alone}: shared {pairs[-1][0]:.2f} %, alone {pairs[-1][1]:.2f} %", flush=True)
    search["pairs"] = pairs
    tau = kendall(pairs) if alone > 2 else (np.nan,)
    # where all are equally good on few pictures there is no order
    search["tau"] = [round(float(value), 3) for value in tau] if np.isfinite(tau).all() else None

# %% [markdown]
# ## 6 · The finalists
#
# A τ well below 1 means that the best by shared weights need not be the best. So each method sends its best into a short training
# of its own, and all validation pictures choose among those of our own methods. (`16:5i3p` is a stage 16 channels wide: a block that begins with 5×5
# and adds its input, then one with 3×3 and a projection; `n` adds nothing.)

# %%
if searching:
    sent = {}  # network -> the method that found it
    for name, found in winners.items():
        best = sorted(zip(verified[name], found, strict=True), reverse=True)
        for network in list(dict.fromkeys(network for _, network in best))[:finalists]:
            sent.setdefault(network, name)
    candidates = []
    for found, name in sent.items():
        network, _ = trained(space.spec(found), alone_epochs)
        row = {
            "method": name,
            "architecture": list(found),
            "shared": evaluate(found),
            "alone": validated(network),
        }
        candidates.append(row | described(costs, found))
    search["finalists"] = candidates
    able = [row for row in candidates if row["method"] not in counterparts.SEARCHERS]
    winner = max(able, key=lambda row: row["alone"])
    search["winner"] = winner | {"spec": space.spec(tuple(winner["architecture"])).to_json()}
pd.DataFrame(search["finalists"]).drop(columns="architecture").round(2) if search else None

# %%
if search:
    figure, axes = plt.subplots(figsize=(6, 4))
    if search["pairs"]:
        axes.plot(*np.array(search["pairs"]).T, "o", color="grey", label="random")
    for row, marker in zip(search["finalists"], figures.MARKERS[1:], strict=False):
        axes.plot(row["shared"], row["alone"], marker, label=f"best of {figures.name(row['method'])}")
    axes.set(xlabel="accuracy with shared weights (%)", ylabel="accuracy trained alone (%)")
    if search["tau"]:
        axes.set_title(
            "Shared weights against training alone: τ = {:.2f} [{:.2f}, {:.2f}]".format(*search["tau"])
        )
    axes.legend(fontsize=8)
    figures.show(figure, "Accuracy with shared weights against accuracy alone, random networks and finalists")

# %% [markdown]
# **What it means.** Look for a grey point above all coloured ones, and whether the winner was the best with shared weights:
# shared weights rank only roughly. Few networks say little about τ: look at its interval.
#
# ## 7 · The winner from scratch, beside the thin network
#
# The winner is an ordinary `Spec`. It is trained with the common recipe, alone and (` taught`) with the large network, or what
# the pipeline made of it (` taught by compressed`), as its teacher, which has looked before. Beside it stands what a search
# without shared weights finds (`random_alone`: the best of section 5's random networks, trained alone), and the hand-made
# rival: ResNet-18 with every width scaled by one factor, the smallest in 64ths with **no fewer** multiplications than these.

# %%
retraining = "retrain" in steps
if search:
    specs = {"winner": models.Spec.from_json(search["winner"]["spec"])}
    if search["pairs"] and wants_alone:
        best = int(np.argmax([alone_accuracy for _, alone_accuracy in search["pairs"]]))
        specs["random_alone"] = space.spec(drawn_alone(best + 1)[best])
    specs["thin_resnet18"] = next(
        spec
        for spec in (models.resnet(18, width=share / 64, **about) for share in range(1, 65))
        if models.macs(spec) >= max(map(models.macs, specs.values()))
    )
    display(
        pd.DataFrame(
            {
                name: {"parameters": models.parameters(spec), "MACs": models.macs(spec)}
                | {f"stage {n}": str([b.widths[0] for b in stage]) for n, stage in enumerate(spec.stages, 1)}
                for name, spec in (specs | {"ResNet-18": full}).items()
            }
        )
    )


# %%
def lesson(spec: models.Spec) -> dict:
    """The loss, pictures and augmentation of a network with a teacher that has looked before."""
    memory = remembered()
    loss = teaching.taught_from(memory, teaching.Recipe(), spec)
    return {"loss": loss, "train": memory.pictures, "augment": False}


memories = []


def remembered() -> teaching.Remembered:
    """What the teacher said of every training picture; it looks once."""
    augment = recipe_of_01["augment"]
    options = {"copies": copies if augment else 1, "augment": augment, "seed": seed}
    if not memories:
        file = run.path(f"remembered_{training.network_digest(teacher)}.npz")
        memories.append(teaching.remember(teacher, pictures, file=file, **options))
    return memories[0]


# %%
saving = {"mean": pictures.mean, "std": pictures.std, "classes": pictures.classes, "dtype": torch.float16}
made = []
for arm in arms if retraining else ():
    name, taught = arm.removesuffix(" taught"), arm.endswith(" taught")
    network, history = trained(specs[name], epochs, **(lesson(specs[name]) if taught else {}))
    path = run.path(f"artifacts/{arm.replace(' ', '_')}.safetensors")
    artifact.save(network, path, **saving)
    seconds = history.seconds + (memories[0].seconds + teacher_seconds if taught else 0)
    lessons = " taught" * taught + " by compressed" * (taught and teaches != "fp32")
    row = {"technique": "search", "division": "open", "point": search["point"] + lessons}
    row |= {"method": search["winner"]["method"] if name == "winner" else name}
    row |= {"control": name if name == "thin_resnet18" else ""}
    row |= {"train_images": history.images, "train_seconds": seconds}
    made.append({"path": path, "row": row, "validation": validated(network)})
    print(f"{arm}: validation {made[-1]['validation']:.2f} %", flush=True)
ours = [m for m in made if not m["row"]["control"]]
if ours:  # what is claimed is chosen on validation pictures
    max(ours, key=lambda m: m["validation"])["row"]["headline"] = 1

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names.

# %%
scores = scoring.score([m["path"] for m in made], dataset=reference.dataset, folder=run.path("predictions"))
options = {"run": run, "dataset": reference.dataset, "model": reference.model, "reference": baseline}
rows = [results.compression_row(s, **options, **m["row"]) for m, s in zip(made, scores, strict=True)]
table = pd.DataFrame([row.model_dump() for row in rows], columns=results.CompressionRow.columns())
table[
    ["method", "point", "control", "params", "macs", "accuracy", "accuracy_delta", "train_images", "headline"]
]

# %% [markdown]
# **Does the winner beat the thin network?** On the same test pictures, trained as long, paired; "not below" is undecided.

# %%
results.comparisons(table, run.path("predictions"), dataset=reference.dataset)

# %%
files = {results.label(row): f"artifacts/{m['path'].name}" for row, m in zip(rows, made, strict=True)}
done = run.finish(
    compression=rows,
    extra={**{n: earlier[n] for n in steps if n in earlier}, "missing": missing, "files": files},
)
print(f"{done.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, by the best profile that has these methods. Profiles train their
# baseline for different times (quick and medium a little more than one epoch, standard twenty): compare a point with the grey
# line of its own figure only.

# %%
committed = results.committed_profile(profiles=results.ALL_PROFILES, technique="search")
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    print(f"profile {committed.name}")
    whole = figures.read_table(committed / "compression.csv")
    plain = (whole["technique"] == "baseline") & (whole["control"] == "")
    own = whole[plain | (whole["technique"] == "search")]
    figure = figures.parameters_against_accuracy(own)
    figure.axes[0].set_title("Does the searched network beat the thin one?")
    figures.show(
        figure,
        f"The committed results of the {committed.name} profile: accuracy against parameters",
    )
    display(results.comparisons(own, committed / "predictions", dataset=whole["dataset"].iloc[0]))

# %% [markdown]
# And the searches of that profile. *median* is of what each search found, looked at with real pictures; where a model answered
# the questions, what that expected stands beside it.

# %%
if committed:
    found = {}
    for record in results.Tables(committed).provenance.values():
        found |= {name: value for name, value in record["extra"].items() if name in STEPS}
    if "latency" in found:
        known, unseen = measured_pairs(found["latency"])
        error = latency.fit(known).error(unseen)
        print(f"milliseconds of {len(unseen)} networks never seen: mean error {error:.1f} %")
    if tau := found.get("search", {}).get("tau"):
        print("shared weights against training alone: τ = {:.2f} [{:.2f}, {:.2f}]".format(*tau))
    if "search" in found:
        figures.show(
            draw_curves(found["search"]),
            f"Searches of the {committed.name} profile: best so far against images, medians and quartiles",
        )
        display(medians(found["search"]))

# %% [markdown]
# ## What you can now measure
#
# Whether a search is worth its cost: against random search with the same images, and against a network that somebody drew in a
# minute.
#
# **Try it.** (1) Set `macs=64`: which stage does the winner give up first? (2) Give each search 200 `queries`: does random search
# catch up? (3) Train the supernet four times as long: what happens to τ? (4) Leave the re-estimation of batch-norm out
# (`calibration_images=2`).
