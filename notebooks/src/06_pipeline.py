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
# # 06 · The pipeline: prune, quantize, distill
#
# Each technique alone makes a network a few times to some tens of times smaller. What do they make together, in which order, and does the result beat
# what anyone would try first: a thin network, trained as long and quantized in the same way? Nothing new is taught here: a
# **pipeline** is a list of stages, each the function of its own notebook, and budgets.

# %% tags=["parameters"]
points: list = ["prune_distill_quantize:macs=6x,rate=2e-9", "prune_quantize_distill:macs=6x,rate=2e-9"]  # own
controls: list = ["small_dense_qat4:macs=6x"]  # rivals: thin networks, the network of 05
peers: list = []  # production counterparts, such as torch_pruning_nncf:macs=8x
prune_epochs: float = 0.5  # [0.001, 1000] of training behind the cut
quantize_epochs: float = 0.5  # [0.001, 1000] of training with the rounding
distill_epochs: float = 1.0  # [0.001, 1000] of training by the teacher; the three sum up to everyone's budget
learning_rate: float = 0.02  # [0.00001, 1] peak of each of these trainings
batch_size: int = 0  # [0, 4096] pictures a step of these trainings; 0: as the baseline
temperature: float = 4.0  # [0.1, 100] of the teacher's soft labels
alpha: float = 0.9  # [0, 1] share of the soft labels in the loss
copies: int = 2  # [0, 64] augmentations of each picture in which the teacher looks before; 0: at each batch
scoring_images: int = 256  # [2, 100000] training pictures for scores, curvature, ranges and batch-norm
multiple: int = 8  # [1, 64] of which the number of channels is, as far as a layer has so many
runtime: str = "onnxruntime"  # {onnxruntime, openvino, executorch} in which budgets of milliseconds are timed
upstream: list = []  # run folders of 01_baseline (own seed first), 05, earlier parts; empty: 01's defaults
part: str = ""  # name of this part of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its points may be claimed
seed: int = 1  # [0, 1000000] of new weights, which pictures score, the order of training
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/06_pipeline

# %%
import copy
import functools
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

# %%
from nnc_utils import (
    allocation,
    artifact,
    batch_norm,
    claims,
    curvature,
    data,
    encoding,
    figures,
    measure,
    models,
    results,
    scoring,
    sensitivity,
)
from nnc_utils import peers as counterparts
from nnc_utils.distillation import teaching
from nnc_utils.pruning import channels, obs, structured, unstructured
from nnc_utils.quantization import activations, hessian_rounding, qat, uniform
from nnc_utils.run import start
from nnc_utils.training import TrainingError, cross_entropy, fit, network_digest

figures.style()
# %%
run = start("06_pipeline", globals(), needs=("01_baseline",))
baseline, *before = run.upstream
others = [earlier for earlier in before if earlier.record.notebook == "01_baseline"]
parts = [earlier for earlier in before if earlier.record.notebook == "06_pipeline"]
LENGTHS = ("prune_epochs", "quantize_epochs", "distill_epochs", "learning_rate", "batch_size")
for earlier, name in itertools.product(parts, LENGTHS):
    if (given := earlier.record.parameters[name]) != globals()[name]:
        raise ValueError(f"{name} is {globals()[name]}, but {given} in {earlier.run}: parts share it")
settled = {r.reference_sha256 for p in parts for r in p.compression if r.method != "dense_finetuned"}
if len(settled) > 1:
    raise ValueError(
        f"upstream has parts of several references: {', '.join(sorted(settled))}; give those of one"
    )
reference, recipe_of_01 = baseline.baseline, baseline.record.parameters
dense = artifact.load(baseline.artifact("fp32"), trainable=True).eval()
spec = dense.spec
pictures = data.load(reference.dataset, size=spec.size)
order = torch.randperm(len(pictures.train.labels), generator=torch.Generator().manual_seed(seed))
chosen = order[:scoring_images]
seen, seen_labels = pictures.normalize(pictures.train.images[chosen]), pictures.train.labels[chosen].long()
print(f"{reference.model} on {reference.dataset}, made by {baseline.run}")

# %% [markdown]
# ## 1 · A pipeline is data
#
# A point names the order of the stages and their budgets: `prune_quantize_distill:macs=6x,bits=4` has six
# times fewer MACs and weights of 4 bits (8 in the first convolution and the classifier). `size=100x` instead
# of `bits` asks for a file a hundred times smaller, and a bit width for each layer is found; `rate=1e-9`
# names the price of a bit, in loss, and the second-order rounding of [02](02_quantization.ipynb) pays it
# where it is worth it, without any training; `ms=0.25`
# instead of `macs` asks for a network that takes so many milliseconds a picture in integers; `sparsity=0.5`
# sets half of the weights that are left to zero; `ensemble` lets the baselines of all seeds teach together.
# The rivals start from a `thin` ResNet-18 that was trained like the baseline.
#
# All train on for **the same number of pictures**: what a list of stages does not use, the others get.

# %%
STAGES = {  # stage -> the budgets that it needs, those that it can have, its share of the training
    "prune": ({"macs"}, {"sparsity"}, prune_epochs),
    "quantize": ({"bits"}, set(), quantize_epochs),  # none where `rate` is the budget
    "distill": (set(), {"ensemble"}, distill_epochs),
    "train": (set(), set(), prune_epochs + distill_epochs),  # by labels alone
    "thin": ({"macs"}, set(), 0.0),
    "found": (set(), set(), 0.0),  # the network of 05_architecture_search
    "torch": ({"macs"}, set(), 0.0),  # cut by Torch-Pruning
    "round": (set(), {"rate"}, 0.0),  # to 7 bits or at a price, without training
}
ORDERS = ["prune_distill_quantize", "prune_quantize_distill", "distill_prune_quantize"]
ORDERS = {name: tuple(name.split("_")) for name in [*ORDERS, "quantize_prune_distill"]}
FIRST = next(iter(ORDERS))
ORDERS |= {
    "prune_distill": ("prune", "distill"),
    "prune_only": ("prune",),
    "quantize_only": ("quantize",),
    "distill_only": ("thin", "distill"),
}

# %%
RIVALS = {
    "dense_finetuned": ("train",),
    "small_dense": ("thin", "train", "round"),
    "small_dense_qat4": ("thin", "train", "quantize"),
    "small_dense_distilled": ("thin", "distill", "quantize"),
    "searched": ("found", "distill", "quantize"),
    "torch_pruning": ("torch", "train"),
}
PEERS = {  # the same budgets of other tools
    "torch_pruning_nncf": ({"macs"}, set()),
    "nncodec_pruned": ({"macs", "qp"}, {"ensemble"}),
    **dict.fromkeys(counterparts.GENERAL, (set(), set())),  # those of the first order, whose codes they get
}
BUDGET = prune_epochs + quantize_epochs + distill_epochs
INSTEAD = {"size": "bits", "rate": "bits", "ms": "macs"}  # budgets that may stand in place of others


# %%
def parsed(point: str) -> tuple[str, dict[str, str]]:
    """ "prune_only:macs=8x" -> "prune_only", {"macs": "8x"}; a ValueError that says what is allowed."""
    method, _, setting = point.partition(":")
    values = dict(part.partition("=")[::2] for part in setting.split(",") if part)
    stages = (ORDERS | RIVALS).get(method, ORDERS[FIRST] if method in counterparts.GENERAL else ())
    declared = [*(STAGES[stage][:2] for stage in stages), PEERS.get(method, (set(), set()))]
    needed, able = (set().union(*budgets) for budgets in zip(*declared, strict=True))
    if method == "small_dense_qat4":
        needed -= {"bits"}
    able_if = {"ms": {"prune", "thin"} & set(stages), "rate": len(stages) > 1}  # can be timed; trains at all
    instead = {other: key for other, key in INSTEAD.items() if key in needed and able_if.get(other, True)}
    given = [instead.get(key, key) for key in values]
    sensible = needed <= set(given) <= needed | able and len(given) == len(set(given))
    if method not in ORDERS | RIVALS | PEERS or not sensible:
        known = {name: RIVALS.get(name) or ORDERS.get(name, ()) for name in ORDERS | RIVALS}
        known = ", ".join(f"{name} ({', '.join(found)})" for name, found in known.items())
        either = [" or ".join([key, *(o for o in instead if instead[o] == key)]) for key in sorted(needed)]
        budgets = f"; {method} needs {', '.join(either)}" if needed else ""
        raise ValueError(f"unknown point {point!r}: one of {known}; peers {', '.join(PEERS)}{budgets}")
    return method, values


# %%
def looked_at(stages: tuple[str, ...]) -> set[str]:
    """The budgets that these stages look at."""
    found = set().union(*(STAGES[stage][0] | STAGES[stage][1] for stage in stages))
    return found | {other for other in ("size", "rate") if INSTEAD[other] in found}


def epochs_of(stage: str, values: dict[str, str]) -> float:
    """A stage's share of the training."""
    return 0.0 if stage == "quantize" and "rate" in values else STAGES[stage][2]


def times(text: str) -> float:
    """ "8x" -> 8.0"""
    return float(text.removesuffix("x"))


# %%
ALLOWED = {  # whether a budget makes sense, and what would
    "macs": (lambda text: text.endswith("x") and times(text) >= 1, "how many times fewer, such as 8x"),
    "size": (lambda text: text.endswith("x") and times(text) > 1, "how many times smaller, such as 100x"),
    "ms": (lambda text: 0 < float(text) < 1e6, "milliseconds a picture, such as 0.25"),
    "bits": (lambda text: 2 <= int(text) <= 8, "2 to 8"),
    "rate": (lambda text: 0 < float(text) < 1, "the loss that a saved bit may cost, such as 1e-9"),
    "sparsity": (lambda text: 0 <= float(text) < 1, "a share of zeros in [0, 1)"),
    "qp": (lambda text: -60 <= int(text) <= 0, "NNCodec's step, such as -20"),
    "ensemble": (
        lambda text: not text and bool(others),
        "no value, and baselines of other seeds in upstream",
    ),
}
winners = [e.extra["search"]["winner"]["spec"] for e in before if "search" in e.extra]
for place, point in enumerate([*points, *controls, *peers]):  # before any work
    method, values = parsed(point)
    kind = ORDERS if place < len(points) else RIVALS if place < len(points) + len(controls) else PEERS
    if method not in kind:
        raise ValueError(f"{point!r}: pipelines belong into points, rivals into controls, others into peers")
    for key, value in values.items():
        try:
            sensible = ALLOWED[key][0](value)
        except ValueError:
            sensible = False
        if not sensible:
            raise ValueError(f"{point!r}: {key} is {value!r}, needed is {ALLOWED[key][1]}")
    if method == "searched" and not winners:
        raise ValueError(f"{point!r}: the run of 05_architecture_search has to be in upstream")

# %% [markdown]
# ### Can the budgets be met?
#
# A budget that no network meets shall cost a sentence, not a training. The fewest MACs are those of the
# narrowest network that `prune` or `thin` can make; the fewest bytes those of what is to be rounded,
# untrained, with 2 bits in every layer. And **milliseconds** become a ratio of MACs: some untrained networks
# between the whole one and the narrowest are timed in int8, one picture, one thread, and between them the
# time is interpolated. That is a guide, taken on whatever else the machine does: the time that is reported
# is measured in [07](07_deployment.ipynb).


# %%
def thin(fewer: float) -> models.Spec:
    """The plain narrow ResNet of at most so many MACs; where there is none, the narrowest."""
    about = {key: getattr(spec, key) for key in ("channels", "size", "classes", "stem")}
    for width in np.arange(1, 0, -0.005) * recipe_of_01["width"]:
        narrow = models.resnet(recipe_of_01["depth"], width=float(width), **about)
        if models.macs(narrow) <= models.macs(spec) / fewer:
            break
    return narrow


# %%
@functools.cache
def scores_of_dense() -> dict[str, torch.Tensor]:
    """What the loss would miss without each channel of the baseline."""
    return channels.scores(dense, "fisher", images=seen, labels=seen_labels)


def shrunk(stage: str, fewer: float = np.inf) -> torch.nn.Module:
    """The baseline, merely cut to what `prune` or `thin` will have; without a number to the narrowest."""
    layers = models.layers(thin(fewer) if stage == "thin" else spec)
    widths = {x.name: x.out_channels for x in layers if x.name in structured.groups(spec)}
    budget = {"macs": models.macs(spec) / fewer, "multiple": multiple}
    if stage == "thin":
        kept = {name: torch.arange(width) for name, width in widths.items()}
    elif fewer < np.inf:
        kept = channels.within_macs(spec, scores_of_dense(), **budget)
    else:  # of channels that are all worth the same go all that may
        equal = {name: torch.zeros(width) for name, width in widths.items()}
        kept = channels.within_macs(spec, equal, **budget | {"macs": models.macs(spec) - 1})
    return structured.remove_channels(dense, kept)


@functools.cache
def most(stage: str) -> float:
    """How many times fewer MACs a stage can reach."""
    return models.macs(spec) / models.macs(shrunk(stage).spec)


# %%
saving = {"mean": pictures.mean, "std": pictures.std, "classes": pictures.classes, "dtype": torch.float16}
TIMED = 8  # networks
kept_timings = run.path("checkpoint_timings.json")  # so that a resumed run goes on with the same networks
timings = json.loads(kept_timings.read_text()) if kept_timings.is_file() else {}
for earlier in parts:
    timings |= earlier.extra.get("timings", {})


def timed(stage: str) -> list[list[float]]:
    """From the whole network to the narrowest: times fewer MACs, and int8 milliseconds of a picture."""
    name, macs, paths = f"{stage} in {runtime}", [], []
    for number, fewer in enumerate(np.geomspace(1, most(stage), TIMED) if name not in timings else ()):
        network = shrunk(stage, fewer if number < TIMED - 1 else np.inf)
        macs.append(models.macs(network.spec))
        network = activations.calibrate(
            uniform.quantize_network(network, bits=7, per_channel=True), seen[:64]
        )
        paths.append(run.path(f"scratch/timed/{number}.safetensors"))
        artifact.save(network, paths[-1], **saving)
    if paths:
        found = measure.milliseconds(paths, runtime=runtime, precision="int8", folder=paths[0].parent)
        found = np.maximum.accumulate(found[::-1])[::-1]  # a larger network is not faster
        timings[name] = [[models.macs(spec) / count for count in macs], found.tolist()]
        kept_timings.write_text(json.dumps(timings))
    return timings[name]


# %%
def floor(number: float) -> float:
    """Two decimals, never more than the number."""
    return np.floor(100 * number) / 100


def budgets(method: str, values: dict[str, str]) -> dict[str, str]:
    """A point's budgets with milliseconds as MACs; a ValueError where these cannot be met."""
    stage = next((s for s in (ORDERS | RIVALS).get(method, ()) if s in ("prune", "thin")), None)
    if "ms" in values:
        (fewer, took), wanted = timed(stage), float(values["ms"])
        if wanted < took[-1]:
            nearest = f"{took[-1]:.3g} is the nearest ({fewer[-1]:.0f} times fewer MACs)"
            raise ValueError(f"ms={values['ms']} cannot be met in {runtime}: {nearest}")
        met = np.exp(np.interp(np.log(wanted), np.log(took[::-1]), np.log(fewer[::-1])))
        values = values | {"macs": f"{max(1.0, floor(met)):g}x"}
    if stage and times(values["macs"]) > most(stage):
        nearest = f"{floor(most(stage)):g}x is the nearest"
        if stage == "prune":
            nearest += f", with a number of channels that is a multiple of {multiple}"
        raise ValueError(f"macs={values['macs']} cannot be met: {nearest}")
    return values


# %%
WIDTHS = range(2, 9)
SPARE = 0.97  # of the budget: trained codes are coded a little longer or shorter than those of the plan


def sparse(network, values: dict[str, str]) -> torch.nn.Module:
    """A network with this share of its weights set to zero, the smallest."""
    if "sparsity" not in values:
        return network
    score = unstructured.scores(network, "magnitude")
    return unstructured.masked(network, unstructured.masks(score, float(values["sparsity"])))


def smallest(method: str, values: dict[str, str]) -> float:
    """How many times smaller a file can be: with 2 bits in each layer of the network that is rounded."""
    stages = (ORDERS | RIVALS)[method]
    before = stages[: stages.index("quantize")]
    if "found" in before:
        return np.inf  # its weights are not known before its training
    cuts = [stage for stage in before if stage in ("prune", "thin")]
    network = shrunk(cuts[0], times(values["macs"])) if cuts else dense
    network = sparse(network, values) if "prune" in cuts else network
    bits = {layer.name: min(WIDTHS) for layer in models.layers(network.spec)}
    network = uniform.quantize_network(network, bits=bits, per_channel=True, clip="mse")
    path = run.path("scratch/smallest.safetensors")
    saved = artifact.save(activations.calibrate(network, seen[:64]), path, **saving)
    return SPARE * artifact.fp32_bytes(spec) / saved.nbytes


# %%
for point in [*points, *controls]:  # before any training
    method, values = parsed(point)
    try:
        given = budgets(method, values)
        if "size" in given and times(given["size"]) > (able := smallest(method, given)):
            nearest = f"{floor(able):g}x is the nearest, with 2 bits in each layer"
            raise ValueError(f"size={given['size']} cannot be met: {nearest}")
    except ValueError as error:
        raise ValueError(f"{point!r}: {error}") from None
    if "ms" in values:
        print(f"{point}: {given['macs']} fewer MACs, as timed in {runtime}")

# %% [markdown]
# ## 2 · Do the gains multiply?
#
# With $p$ the share of weights that pruning leaves and $b$ bits for each of the rest, the file should be $32 / (p\,b)$ times
# smaller. *Predict* it from the narrower Spec before anything is trained, then round the pruned network and save it: the header
# and batch-norm do not shrink with it, and entropy coding takes less than $b$ bits.


# %%
cuts = {}  # (network, times fewer) -> the cut network


def cut(network, fewer: float) -> torch.nn.Module:
    """Channels removed until there are so many times fewer MACs than at first; the readers mended."""
    if (key := (network_digest(network), fewer)) in cuts:
        return copy.deepcopy(cuts[key])
    budget, about = models.macs(spec) / fewer, {"images": seen, "labels": seen_labels}
    score = channels.scores(network, "fisher", **about)
    kept = channels.within_macs(network.spec, score, macs=budget, multiple=multiple)
    known = curvature.curvatures(network, seen, seed=seed)
    narrow = structured.remove_channels(obs.compensated(network, kept, known), kept)
    cuts[key] = batch_norm.reestimate(narrow, seen)
    return copy.deepcopy(cuts[key])


first = budgets(*parsed(points[0])) if points else {}
fewer = times(first["macs"]) if "macs" in first else min(6.0, most("prune"))
narrow, bits = cut(dense, fewer), int(first.get("bits", 4))
rounded = uniform.quantize_network(narrow, bits=bits, per_channel=True, clip="mse")
file = artifact.save(rounded, run.path("scratch/rounded.safetensors"), **saving)
share = models.parameters(narrow.spec) / models.parameters(spec)
predicted, measured = 32 / (share * bits), artifact.fp32_bytes(spec) / file.nbytes
print(
    f"{share:.1%} of the parameters left, {bits} bits each: predicted {predicted:.0f} times smaller,", end=" "
)
print(f"measured {measured:.0f}, ratio {measured / predicted:.2f}")

# %% [markdown]
# **What it means.** The factors multiply, and what does not shrink begins to count: at a hundred times smaller, batch-norm
# and the description of the network are a part of the file that can be seen.
#
# ## 3 · Which orders are possible at all?
#
# Cut a network that is already in integers. *Predict*: what does a removed input channel do to a scale that was chosen for all?

# %%
few = {name: torch.arange(8) for name in structured.groups(spec)}
in_integers = uniform.quantize_network(dense, bits=4, per_channel=True)

# %% tags=["nbval-check-output"]
try:
    structured.remove_channels(in_integers, few)
except ValueError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# **What it means.** The integers of a file are those of one network; after the cut they would have to be chosen again. So
# `quantize_prune_distill`, the order of many tutorials, has to go back to floats for the cut, and quantizes twice. What the first
# quantization was worth, the order ablation of the `standard` profile measures.
#
# ## 4 · Where should the bits be?
#
# A file of a given size: each layer has a price list (bytes at 2 to 8 bits) and a list of harms (what the loss rises by). The
# [allocation](../nnc_utils/allocation.py) buys the least harm.


# %%
def planned(network, smaller: float) -> dict[str, int]:
    """Bits for each layer, so that the network's file is so many times smaller than the baseline's."""
    layers = {x.name: network.get_submodule(x.name).weight.detach() for x in models.layers(network.spec)}
    options = {"per_channel": True, "clip": "mse"}
    codes = {n: {b: uniform.quantize(w, bits=b, **options) for b in WIDTHS} for n, w in layers.items()}
    cost = {n: {b: encoding.payload_bits(code) / 8 for b, code in c.items()} for n, c in codes.items()}
    values = {n: {b: encoding.decode(code) for b, code in c.items()} for n, c in codes.items()}
    harm = sensitivity.loss_increase(network, values, seen, seen_labels)
    trial = activations.calibrate(uniform.quantize_network(network, bits=8, **options), seen)
    whole = artifact.save(trial, run.path("scratch/whole.safetensors"), **saving).nbytes
    beside = whole - sum(prices[8] for prices in cost.values())
    budget = SPARE * artifact.fp32_bytes(spec) / smaller - beside
    least = beside + sum(min(prices.values()) for prices in cost.values())
    if budget < least - beside:
        nearest = SPARE * artifact.fp32_bytes(spec) / least
        raise ValueError(f"size={smaller:g}x cannot be met by these MACs: {floor(nearest):g}x is the nearest")
    return {name: int(width) for name, width in allocation.allocate(cost, harm, budget=budget).items()}


# %%
plain = planned(narrow, 0.8 * predicted)
figure, axes = plt.subplots(figsize=(9, 3))
axes.bar(range(len(plain)), list(plain.values()))
axes.set_xticks(range(len(plain)), list(plain), rotation=70, fontsize=7)
axes.set(ylabel="bits", title=f"Where are the bits of a file {0.8 * predicted:.0f} times smaller?")
figures.show(figure, "Bits of each layer of the pruned network in a file of a given size")

# %% [markdown]
# ## Benchmark: the stages
#
# Each takes a network and gives one back. `prune` cuts channels by their Fisher score and mends the readers
# ([03](03_pruning.ipynb)); `quantize` trains with the rounding, by LSQ, or, given a `rate`, rounds once to where loss and bits
# together are least ([02](02_quantization.ipynb)); `distill` trains what there is, with its masks, integers and ranges in the loop,
# by the teacher's soft labels ([04](04_distillation.ipynb)).
#
# *Predict*: which order suits a rounding that needs no training, in front of the teacher or behind it? A network that was
# trained behind its rounding is rounded once more, because its weights have moved.


# %%
def is_rounded(network) -> bool:
    """Whether a network computes with the rounding of its file."""
    return any(place.scale is not None for place in models.activations(network).values())


def unrounded(network) -> torch.nn.Module:
    """A network's rounded weights as plain ones, its activations in floats; its masks stay."""
    network = copy.deepcopy(network)
    for layer in models.layers(network.spec):
        module = network.get_submodule(layer.name)
        mask = encoding.mask_of(module)
        encoding.fold(module)
        if mask is not None:
            encoding.attach(module, encoding.Dense(module.weight.detach(), mask))
    for place in models.activations(network).values():
        place.scale = None
    return network.eval()


def prune(network, values: dict[str, str]) -> torch.nn.Module:
    """Channels to the budget, then weights inside what is left; what was rounded is rounded once more."""
    narrow = cut(unrounded(network) if is_rounded(network) else network, times(values["macs"]))
    narrow = sparse(narrow, values)
    return quantize(narrow, values) if is_rounded(network) else narrow


# %%
def priced(network, rate: float) -> torch.nn.Module:
    """Rounded so that loss and bits together are least, at this price of a bit in every layer."""
    known = curvature.curvatures(network, seen, seed=seed)
    rounded = hessian_rounding.quantize_network(network, known, rate=rate)
    return batch_norm.reestimate(rounded, seen, original=network)


def quantize(network, values: dict[str, str]) -> torch.nn.Module:
    """Weights and activations rounded in the forward pass, the scales trained where training follows."""
    if "rate" in values:
        network = priced(unrounded(network), float(values["rate"]))
        layers = {x.name: network.get_submodule(x.name) for x in models.layers(network.spec)}
        scales = {name: encoding.encoded(layer).scale for name, layer in layers.items()}
        bits = hessian_rounding.BITS
        return qat.prepare(unrounded(network), seen, bits=bits, method="lsq", scales=scales)
    bits = planned(unrounded(network), times(values["size"])) if "size" in values else int(values["bits"])
    return qat.prepare(network, seen, bits=bits, method="lsq")


def from_the_start(network: models.Spec, name: str) -> torch.nn.Module:
    """A network with the baseline's training."""
    torch.manual_seed(seed)
    built = models.build(network)
    options = {key: recipe_of_01[key] for key in ("epochs", "learning_rate", "augment", "batch_size")}
    fit(built, pictures, seed=seed, checkpoint=run.path(f"checkpoint_{name}_start.pt"), **options)
    return built.eval()


# %%
@functools.cache
def teacher(together: bool) -> torch.nn.Module:
    """The dense network, or the baselines of all seeds together."""
    if not together:
        return copy.deepcopy(dense)
    return teaching.Ensemble([copy.deepcopy(dense), *(artifact.load(o.artifact("fp32")) for o in others)])


@functools.cache
def memory(together: bool) -> teaching.Remembered:
    """What the teacher said of every training picture."""
    who = teacher(together)
    augment, name = recipe_of_01["augment"], f"remembered_{network_digest(who)}.npz"
    kept = [e.folder / name for e in parts if (e.folder / name).is_file()]
    options = {"copies": copies if augment else 1, "augment": augment, "seed": seed}
    return teaching.remember(who, pictures, file=kept[0] if kept else run.path(name), **options)


# %%
def trained(network, stage: str, values: dict[str, str], length: float, name: str) -> tuple:
    """A stage's training, and what it took: by the teacher in `distill`, else by labels."""
    train, loss, augment, before = pictures, cross_entropy, recipe_of_01["augment"], 0.0
    size = batch_size or recipe_of_01["batch_size"]
    steps = max(1, round(length * (len(pictures.train) // size)))
    lesson, together = teaching.Recipe(temperature=temperature, alpha=alpha), "ensemble" in values
    if stage == "distill" and copies == 0:
        loss = teaching.taught_by(teacher(together), lesson, network.spec)
    elif stage == "distill":
        known = memory(together)
        train, augment, before = known.pictures, False, known.seconds
        loss = teaching.taught_from(known, lesson, network.spec)
    options = {"learning_rate": learning_rate, "augment": augment, "batch_size": size, "loss": loss}
    options |= {"checkpoint": run.path(f"checkpoint_{name}_{length:g}.pt")}
    number = seed + 1_000_003 * (1 + list(STAGES).index(stage))  # each stage sees other pictures
    history = fit(network, train, epochs=steps / (len(train.train) // size), seed=number, **options)
    return network.eval(), {"train_images": history.images, "train_seconds": history.seconds + before}


# %%
def reshaped(network, stage: str, values: dict[str, str], name: str) -> torch.nn.Module | None:
    """What a stage without training of its own makes of a network; None for the others."""
    if stage == "thin":
        return from_the_start(thin(times(values["macs"])), name)
    if stage == "found":
        return from_the_start(models.Spec.from_json(winners[0]), name)
    if stage == "torch":
        if why := counterparts.available("torch_pruning"):
            raise ValueError(f"Torch-Pruning: {why}")
        budget, about = models.macs(spec) / times(values["macs"]), {"images": seen, "labels": seen_labels}
        network = counterparts.peer("torch_pruning").prune(network, "magnitude", macs=budget, **about)
        return batch_norm.reestimate(network, seen)
    if stage == "round":
        if "rate" in values:
            return priced(network, float(values["rate"]))
        return uniform.quantize_network(network, bits=7, per_channel=True)
    return None


# %%
@functools.cache
def after(stages: tuple[str, ...], given: frozenset, scale: float) -> tuple[torch.nn.Module, dict]:
    """The network behind some stages, and what their training took; orders share what they begin with."""
    if not stages:
        return dense, {}
    *earlier, stage = stages
    values = dict(given)
    have = frozenset((k, v) for k, v in given if k in looked_at(tuple(earlier)))
    network, took = after(tuple(earlier), have, scale)
    network, name = copy.deepcopy(network), "_".join([*stages, *(f"{k}{v}" for k, v in sorted(given))])
    untrained = reshaped(network, stage, values, name)
    if untrained is not None:
        return untrained, took
    if stage in ("prune", "quantize"):
        network = {"prune": prune, "quantize": quantize}[stage](network, values)
    if length := scale * epochs_of(stage, values):
        network, more = trained(network.train(), stage, values, length, name)
        took = {key: took.get(key, 0) + value for key, value in more.items()}
        if is_rounded(network) and "rate" in values:  # training has moved codes, and did not know their price
            network = quantize(network, values).eval()
    if is_rounded(network):
        network = activations.calibrate(network, seen)
    return network, took


# %% [markdown]
# The rivals get the baseline's training first, which the pruned networks had, too. `small_dense_qat4` is what anyone would try
# first: a thin ResNet-18, trained as long, in 4 bits. `small_dense` with a `rate` is that thin network with the rounding of
# our pipeline: at about equal bytes, the pipeline minus this one is what pruning and the teacher are worth, and that can be less
# than nothing.


# %%
def candidate(method: str, stages: tuple[str, ...], values: dict[str, str], control: str = "") -> dict:
    """The network behind these stages as a file, and what its row will say."""
    whole = (ORDERS | RIVALS)[method]
    scale = BUDGET / sum(epochs_of(stage, values) for stage in whole)
    given = budgets(method, values) | ({"bits": "4"} if method == "small_dense_qat4" else {})
    given = frozenset((k, v) for k, v in given.items() if k in looked_at(stages))
    network, took = after(stages, given, scale)
    if stages[-1] == "round":
        network = activations.calibrate(network, seen)
    point = ",".join("=".join(filter(None, item)) for item in values.items())
    name = "_".join(filter(None, [method, point.replace("=", "").replace(",", "_"), control]))
    path = run.path(f"artifacts/{name}.safetensors")
    saved = artifact.save(network, path, **saving)
    print(f"{method} {point} {control}: {saved.nbytes:,} bytes", flush=True)
    technique = "pipeline" if method in ORDERS else "peer" if method == "torch_pruning" else "baseline"
    row = {"technique": technique, "method": method, "point": point, "division": "open", **took}
    row["control"] = control or (method if technique == "baseline" else "")
    return {"path": path, "bytes": saved.nbytes, "row": row}


# %%
trained_before = [p for p in parts if "dense_finetuned" in {row.method for row in p.compression}]
wanted = [(*parsed(point), ORDERS, "") for point in points] + [(*parsed(p), RIVALS, "") for p in controls]
if not trained_before and "dense_finetuned" not in controls:
    wanted.insert(0, ("dense_finetuned", {}, RIVALS, ""))
candidates, missing = [], {}
for method, values, kinds, _ in wanted:
    stages = kinds[method]
    try:
        first_pipeline = kinds is ORDERS and not any(c["row"]["method"] in ORDERS for c in candidates)
        for number in range(1, len(stages)) if first_pipeline and claim else ():  # for the waterfall
            label = f"after_{stages[number - 1]}"
            candidates.append(candidate(method, stages[:number], values, label))
        candidates.append(candidate(method, stages, values))
    except (ValueError, TrainingError) as error:  # one point that cannot be made costs no other
        missing[f"{method}:{values}"] = str(error)
        print(f"{method} {values}: {error}", flush=True)

# %% [markdown]
# The **validation** pictures decide what is claimed, before the test set is looked at: the smallest pipeline file that is likely
# without loss on test ([`claims`](../nnc_utils/claims.py)), against the better of the baseline and the dense network trained on
# for as long; with three seeds, their pictures together ([`chosen_over_seeds`](../nnc_utils/over_seeds.py)).

# %%
of_dense = next((c["path"] for c in candidates if c["row"]["method"] == "dense_finetuned"), None)
if settled == {reference.artifact_sha256}:  # validation has preferred the baseline
    of_dense = None
elif trained_before:
    of_dense = trained_before[0].artifact("dense_finetuned")
able = [c for c in candidates if c["row"]["method"] in ORDERS and not c["row"]["control"] and claim]
orders = {("open", "bytes"): [c["path"] for c in sorted(able, key=lambda c: c["bytes"])]}
decided = claims.choose(orders, baseline=baseline.artifact("fp32"), dense=of_dense, pictures=pictures)
print("claimed:", ", ".join(path.stem for path in decided.claimed.values()) or "none is likely without loss")

# %% [markdown]
# Now the test set, once, in a fresh process that gets nothing but the files' names.

# %%
scored = functools.partial(scoring.score, dataset=reference.dataset, folder=run.path("predictions"))
scores = scored([c["path"] for c in candidates])
against = baseline
if decided.reference == of_dense:
    found = [made.score("dense_finetuned") for made in trained_before]
    [against] = found or [s for s in scores if Path(s["path"]) == of_dense]
common = {"run": run, "dataset": reference.dataset, "model": reference.model}
rows = [
    results.compression_row(
        score,
        reference=baseline if c["path"] == of_dense else against,
        headline=c["path"] in decided.claimed.values(),
        **c["row"],
        **common,
    )
    for c, score in zip(candidates, scores, strict=True)
]

# %% [markdown]
# ### Side by side: other tools at the same budget
#
# Torch-Pruning, trained on by labels for the whole budget, then NNCF's int8; NNCodec on our pruned network, taught as long, before
# it is rounded; and what a general compressor makes of our codes.

# %%
files = {f"{r.method}:{r.point}": c["path"] for c, r in zip(candidates, rows, strict=True) if not r.control}
for earlier in parts:
    files |= {name: earlier.folder / path for name, path in earlier.extra["files"].items()}
trainings = {}
for row in [*rows, *(row for earlier in parts for row in earlier.compression)]:
    took = {"train_images": row.train_images, "train_seconds": row.train_seconds}
    trainings[f"{row.method}:{row.point}"] = took


TOOLS = {"torch_pruning_nncf": "nncf_ptq", "nncodec_pruned": "nncodec"}  # the others are called what they are
FROM = {"torch_pruning_nncf": "torch_pruning", "nncodec_pruned": "prune_distill"}


def made(tool: str, source: Path, values: dict[str, str]) -> Path:
    """A peer's file of an artifact; NNCodec gets the same help as our rounding, batch-norm re-estimated."""
    settings = {"qp": int(values["qp"]), "reestimate": True} if tool == "nncodec" else {}
    return counterparts.make(tool, source, seen.numpy(), run.path("peers/x").parent, **settings)


# %%
for point in peers:
    name, values = parsed(point)
    tool, setting = TOOLS.get(name, name), point.partition(":")[2]
    about = ",".join(part for part in setting.split(",") if not part.startswith("qp="))
    needed = f"{FROM.get(name, FIRST)}:{about}"
    if why := counterparts.available(tool) or ("" if needed in files else f"there is no {needed}"):
        missing[point] = why
        print(f"{point}: {why}")
        continue
    [score] = scored([made(tool, files[needed], values)], peer=tool, source=files[needed])
    about = {"technique": "peer", "method": name, "point": setting, "division": "open"}
    rows.append(results.compression_row(score, reference=against, **about, **trainings[needed], **common))

# %%
table = pd.DataFrame([row.model_dump() for row in rows])
shown = ["method", "point", "control", "size_ratio", "macs", "accuracy", "accuracy_delta"]
table[[*shown, "delta_ci_low", "delta_ci_high", "headline"]].sort_values("size_ratio")

# %% [markdown]
# ### What did each stage give?

# %%
everything = pd.concat([pd.DataFrame([reference.model_dump()]), table], ignore_index=True)
if (figure := figures.waterfall(everything)) is not None:
    figures.show(figure, "Bytes, MACs and test accuracy after each stage of the first pipeline")

# %% [markdown]
# What each stage is worth in milliseconds is measured in [07](07_deployment.ipynb) and drawn in [10](10_report.ipynb).

# %%
figures.show(
    figures.size_against_accuracy(everything),
    "Test accuracy against how many times smaller the file is: pipelines, rivals and other tools",
)

# %% [markdown]
# ### Who beats whom?
#
# Each pipeline against each rival and each other order at the same budgets, on the same test pictures.
# "Not below" is undecided.

# %%
where = {"predictions": run.path("predictions"), "dataset": reference.dataset}
versus = results.comparisons(table, **where)
versus if len(versus) else "no two of these points are to be compared"

# %% [markdown]
# **What would fool you.** A pipeline that is compared with the large network only: the thin network beside it, trained as long,
# shows what the pipeline is worth. Stages that each get a training of their own, while the rival gets one. A ratio in which the
# header, batch-norm and scales are left out.

# %%
files = {results.label(row): f"artifacts/{c['path'].name}" for c, row in zip(candidates, rows, strict=False)}
done = run.finish(
    compression=rows,
    extra={"validation_delta": decided.looked, "files": files, "missing": missing, "timings": timings},
)
print(f"{done.run} is finished: {len(rows)} rows")

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 trained on Fashion-MNIST, by the best profile that has these methods. Profiles train their
# baseline for different times (quick and medium a little more than one epoch, standard twenty): compare a point with the grey
# line of its own figure only.

# %%
committed = results.committed_profile(profiles=results.ALL_PROFILES, technique="pipeline")
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    print(f"profile {committed.name}")
    full = figures.read_table(committed / "compression.csv")
    ours = full["run"].str.contains("06_pipeline") & ~full["control"].str.startswith(results.AFTER)
    joined = full[ours | (full["technique"] == "baseline") & (full["control"] == "")]
    figures.show(
        figures.size_against_accuracy(joined),
        f"The committed results of the {committed.name} profile: pipelines, rivals and other tools",
    )
    display(results.comparisons(joined, committed / "predictions", dataset=full["dataset"].iloc[0]))

# %% [markdown]
# ## What you can now measure
#
# What each stage of a pipeline gives in bytes, MACs and points, what the order is worth, and whether all of it beats a thin network.
#
# **Try it.** (1) Ask for `size=100x` instead of `bits=4`: which layers get few bits? (2) Add `sparsity=0.5`: does the file shrink by as
# much as the zeros promise? (3) `distill_only:macs=6x` against `prune_only:macs=6x`: what are the large network's weights worth?
# (4) Your own pictures: give the run of [01_baseline](01_baseline.ipynb) on them as `upstream`.
