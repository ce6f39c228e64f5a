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
# # 06 · The pipeline: prune, distill, quantize
#
# Each technique alone makes a network a few times to some tens of times smaller. This notebook joins three of them and
# asks three questions. Do the gains multiply? Does the order matter? Does the result beat a narrow network with an equal
# training budget?
#
# **You will be able to** join compression stages, read off what each stage gives, and test the result against its
# toughest fair rival. **You need** [02](02_quantization.ipynb), [03](03_pruning.ipynb) and [04](04_distillation.ipynb).
# **Time:** about a minute with the defaults.
#
# **Contents.** 1 · Where do we start? 2 · Prune. 3 · Distill. 4 · Round. 5 · Do the gains multiply? 6 · Does the order
# matter? 7 · The narrow rival. 8 · All steps in one picture. Then the benchmark, and the committed results.

# %% tags=["parameters"]
macs: float = 16.0  # [1, 1000] how many times fewer multiplications (MACs) pruning leaves
lambda_: float = 1e-10  # (0, 1) the loss that one bit of the file may cost
epochs: float = 4.0  # [0.01, 1000] of distillation in sections 3 to 7; the rival gets as many more
temperature: float = 4.0  # [0.1, 100] of the teacher's soft labels
alpha: float = 0.9  # [0, 1] share of the soft labels in the loss
seed: int = 1  # [0, 1000000] of new weights, of the images that score, of the order of training
# what the benchmark at the end runs
configurations: list = [{"method": "pipeline", "macs": 16, "lambda_": 1e-10}]  # pipelines
controls: list = [{"method": "small_dense", "macs": 16, "lambda_": 1e-10}]  # rivals
peers: list = []  # other tools, such as {"method": "torch_pruning_nncf", "macs": 16}
prune_epochs: float = 0.5  # [0.001, 1000] of training behind the stage prune
quantize_epochs: float = 0.5  # [0.001, 1000] of training with the rounding
distill_epochs: float = 1.0  # [0.001, 1000] of the stage distill; each network trains for all three
learning_rate: float = 0.01  # [0.00001, 1] peak of these three, and of the trainings in the sections
batch_size: int = 0  # 0 or [2, 4096] images a step of these trainings; 0: as the baseline
copies: int = 0  # [0, 64] augmentations of each image with cached teacher logits; 0: online
scoring_images: int = 256  # [2, 100000] training images for scores, curvature, ranges and batch-norm
multiple: int = 8  # [1, 64] channel counts are multiples of this; smaller layers excepted
runtime: str = "onnxruntime"  # {onnxruntime, openvino, executorch} in which budgets of milliseconds are timed
upstream: list = []  # run folders of 01_baseline (own seed first), 05, earlier shards; empty: 01's defaults
part: str = ""  # name of this shard of a divided benchmark; empty: it is not divided
claim: bool = True  # whether its configurations may be claimed
profile: str = "smoke"  # where the result belongs: smoke, quick, standard or full
run_dir: str = ""  # folder of this run; empty: results/smoke/06_pipeline

# %% tags=["setup"]
import pandas as pd
import torch

from bench.session import Bench
from nnc_utils import artifact, batch_norm, curvature, evaluation, figures, models, pipeline, training

figures.style()
bench = Bench("06_pipeline", globals())
dense, images = bench.dense, bench.images
seen, seen_labels = bench.sample(scoring_images)

# %% [markdown]
# ## 1 · Where do we start?
#
# Every step of this notebook is judged by three numbers: the bytes of a file, the MACs of an image, and the share of
# right answers. `measure` saves a network, loads the file again and counts. It looks at **validation** images only; the
# test images are kept for the end. From here on files hold float16: that factor of 2 is not pruning's.

# %% tags=["machine-dependent"]
steps = {}  # name -> bytes, MACs, accuracy, and which validation images are right


def measure(name: str, network: torch.nn.Module, dtype=torch.float16) -> dict:
    """Bytes, MACs and validation accuracy of a network, of its file."""
    path = bench.path(f"scratch/{name.replace(' ', '_')}.safetensors")
    saved = artifact.save(
        network, path, mean=images.mean, std=images.std, classes=images.classes, dtype=dtype
    )
    loaded = artifact.load(path)
    predictions = evaluation.predict(loaded, images.validation, normalize=images.normalize)
    right = predictions == images.validation.labels.numpy()
    steps[name] = {"bytes": saved.nbytes, "MACs": models.macs(network.spec), "right": right}
    steps[name]["accuracy (%)"] = 100 * right.mean()
    return steps[name]


first = measure("dense", dense, torch.float32)
half = measure("dense, fp16", dense)
print(f"{first['bytes']:,} bytes, {first['MACs']:,} MACs, {first['accuracy (%)']:.2f} % of validation")

# %% [markdown]
# ## 2 · Prune: how much is left at 16 times fewer MACs?
#
# A narrower network is smaller *and* faster, so it comes first. A Fisher score estimates how much the loss rises if a
# channel is removed ([Theis et al., 2018](https://arxiv.org/abs/1801.05787)). Remove the lowest-scoring channels until
# the network has 16 times fewer MACs. Then refit the next layer's remaining weights by least squares, which
# **compensates** for the missing input, and re-estimate batch-norm on the same images. All four steps are built in
# [03](03_pruning.ipynb).
#
# *Predict*: with 16 times fewer MACs, how many times fewer parameters? Most parameters are in the last stage, most MACs
# are not.

# %% tags=["machine-dependent"]
from nnc_utils.pruning import channels


def prune(network: models.ResNet, fewer: float) -> models.ResNet:
    """So many times fewer MACs than the dense network, without any training."""
    scores = channels.scores(network, "fisher", images=seen, labels=seen_labels)
    budget = models.macs(dense.spec) / fewer
    kept = channels.within_macs(network.spec, scores, macs=budget, multiple=multiple)
    return batch_norm.reestimate(channels.compensated(network, kept, seen), seen)


pruned = prune(dense, macs)
row = measure("pruned", pruned)
fewer_parameters = models.parameters(dense.spec) / models.parameters(pruned.spec)
print(f"MACs {macs:g}× fewer asked, {first['MACs'] / row['MACs']:.2f}× measured")
print(f"parameters {fewer_parameters:.1f}× fewer")
print(f"accuracy without any training: {row['accuracy (%)']:.2f} %")

# %% tags=["machine-dependent"]
package = pipeline.prune(dense, seen, seen_labels, macs=models.macs(dense.spec) / macs, multiple=multiple)
some = images.normalize(images.validation.images[:32])
with torch.inference_mode():
    same = torch.equal(pruned(some), package(some))
print(f"the package's stage `prune` gives the same network: {same}")

# %% [markdown]
# **What would fool you.** "90 % pruned" says nothing about bytes or MACs: 90 % of what? Count both, every time.
#
# ## 3 · Distill: how much comes back?
#
# The pruned network has lost most of what it knew. It trains on, with the dense network as its teacher. The loss mixes
# labels $y$ and the teacher's softened probabilities $p$ ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)):
#
# $$L = (1-\alpha)\,\text{CE}(q^{(1)}, y) + \alpha\, T^2\, \text{KL}(p^{(T)} \,\|\, q^{(T)})$$
#
# The student's probabilities are $q$. A superscript is the **temperature** by which logits are divided before the
# softmax: $T$ is `temperature`, and 1 changes nothing. CE is the cross-entropy with the labels, KL how far $q$ is from
# $p$. The share of the teacher, $\alpha$, is `alpha`. Gradients of softened probabilities shrink by $T^2$; the factor
# undoes that.
#
# *Predict*: how much of the lost accuracy comes back in a few epochs?

# %%
import copy
from dataclasses import replace

from torch.nn import functional

from nnc_utils.data import Split

few = replace(images, train=Split(images.train.images[:2000], images.train.labels[:2000]))  # all of digits


def soft_labels(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a student beside the dense network."""
    with torch.no_grad():
        teacher_logits = dense(inputs)
    student_logits = model(inputs).float()
    hard = functional.cross_entropy(student_logits, labels)
    log_q, log_p = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits.float()))
    soft = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - alpha) * hard + alpha * temperature**2 * soft


def trained(
    network: models.ResNet, loss=training.cross_entropy, length: float = epochs, peak: float = learning_rate
):
    """A copy of the network, trained on."""
    network = copy.deepcopy(network).train()
    common = {"augment": bench.recipe["augment"], "batch_size": bench.recipe["batch_size"], "seed": seed}
    training.fit(network, few, epochs=length, learning_rate=peak, loss=loss, **common)
    return network.eval()


# %% tags=["machine-dependent"]
distilled = trained(pruned, soft_labels)
row, before = measure("pruned, distilled", distilled), steps["pruned"]
lost = first["accuracy (%)"] - before["accuracy (%)"]
back = row["accuracy (%)"] - before["accuracy (%)"]
print(f"pruning lost {lost:.2f} percentage points, distillation brought back {back:.2f}")

# %% [markdown]
# ## 4 · Round: what is a bit worth?
#
# Now each weight becomes a small integer. Plain rounding takes the nearest one. **Second-order rounding** takes the one
# for which loss and bits together cost least: $\Delta L + \lambda \cdot \text{bits}$, where $\Delta L$ is estimated from
# the curvature (built in [02](02_quantization.ipynb)). $\lambda$ is the loss that one bit may cost. Entropy coding then
# makes frequent integers cheap. Activations get 8 bits; a few training images **calibrate** their ranges. Files, tables
# and the benchmark call this stage *quantize*.
#
# *Predict*: the file holds 16 bits a weight now. How many will be left?

# %% tags=["machine-dependent"]
from nnc_utils.quantization import activations, hessian_rounding


def quantize(network: models.ResNet) -> models.ResNet:
    """Integers for weights and activations, without any training."""
    curved = curvature.curvatures(network, seen, seed=seed)
    rounded = hessian_rounding.quantize_network(network, curved, lambda_=lambda_)
    rounded = batch_norm.reestimate(rounded, seen, original=network)
    return activations.calibrate(rounded, seen)


joined = quantize(distilled)
row, before = measure("pruned, distilled, rounded", joined), steps["pruned, distilled"]
bits = 8 * row["bytes"] / models.parameters(joined.spec)
print(f"{before['bytes'] / row['bytes']:.1f}× smaller than before; {bits:.1f} bits per parameter in the file")
print(f"accuracy {before['accuracy (%)']:.2f} % before, {row['accuracy (%)']:.2f} % after")

# %% [markdown]
# ## 5 · Do the gains multiply?
#
# Let rounding alone shrink the file $a$ times, and let pruning alone leave $b$ times fewer parameters. If the two were
# independent, together they would make the file $a \cdot b$ times smaller. *Predict* the ratio of measured to
# predicted: above 1 or below?

# %% tags=["machine-dependent"]
alone = measure("rounded only", quantize(dense))
by_rounding = first["bytes"] / alone["bytes"]
predicted = fewer_parameters * by_rounding
measured = first["bytes"] / steps["pruned, distilled, rounded"]["bytes"]
ratio = measured / predicted
print(f"rounding alone {by_rounding:.0f}×, pruning alone {fewer_parameters:.1f}× fewer parameters")
print(f"predicted {predicted:.0f}×, measured {measured:.0f}×, ratio {ratio:.2f}")
overlap = f"The gains overlap: the file is {1 / ratio:.1f} times larger than the product promises."
print("The gains multiply." if ratio > 0.9 else overlap)

# %% [markdown]
# **What it means.** A dense network has many weights that may become 0 for almost nothing, and zeros cost next to no
# bits. Pruning has already removed most of those. So the second stage finds less to gain.
#
# ## 6 · Does the order matter?
#
# Swap the last two steps: round first, then distill. A rounded weight is an integer times its channel's **step**.
# `pipeline.unrounded` gives back the same values as plain floats, which can be trained. *Predict*: after one gradient
# step on them, how many are still an integer times the step?

# %% tags=["machine-dependent"]
rounded_first = quantize(pruned)
layer = rounded_first.get_submodule("layer1.0.conv1")
before = layer.weight.detach().clone()
plain = pipeline.unrounded(rounded_first).train()
functional.cross_entropy(plain(seen[:64]), seen_labels[:64]).backward()
moved = plain.get_submodule("layer1.0.conv1").weight
after = moved - learning_rate * moved.grad
still = (after == before).float().mean()
print(f"{before.unique().numel()} different values before the step, {after.unique().numel()} after it")
print(f"{100 * still:.0f} % of the weights are still on their integer")

# %% [markdown]
# So rounded weights cannot simply train on. **Quantization-aware training** keeps float weights behind the integers and
# learns each channel's step ([LSQ, Esser et al., 2020](https://arxiv.org/abs/1902.08153); built in
# [02](02_quantization.ipynb)). The swapped order goes back to floats, starts LSQ from the steps of the first rounding,
# trains with the rounding in the loop, and rounds once more.

# %% tags=["machine-dependent"]
from nnc_utils import encoding
from nnc_utils.quantization import qat


def train_rounded(network: models.ResNet) -> models.ResNet:
    """Distill with the rounding in the loop, then round once more."""
    layers = {x.name: network.get_submodule(x.name) for x in models.layers(network.spec)}
    scales = {name: encoding.encoded(layer).scale for name, layer in layers.items()}  # where LSQ starts
    floats = pipeline.unrounded(network)
    in_the_loop = qat.prepare(floats, seen, bits=hessian_rounding.BITS, method="lsq", scales=scales)
    return quantize(pipeline.unrounded(trained(in_the_loop, soft_labels)))


measure("pruned, rounded, distilled", train_rounded(rounded_first))
orders = ["pruned, distilled, rounded", "pruned, rounded, distilled"]
pd.DataFrame(steps).T.loc[orders].drop(columns="right")

# %% [markdown]
# Which is better? Both were scored on the same images, so only images on which they differ count. The **paired
# difference**, in percentage points (pp), stands with its 95 % interval, as in [01](01_baseline.ipynb).

# %% tags=["machine-dependent"]
def between(ours: str, theirs: str) -> str:
    """The paired difference of two steps on the validation images, as a sentence."""
    right, reference = steps[ours]["right"], steps[theirs]["right"]
    interval = evaluation.paired_interval(compressed_correct=right, reference_correct=reference)
    low, mean, high = interval.low, interval.mean, interval.high
    verdict = "ours is better" if low > 0 else "ours is worse" if high < 0 else "these images cannot tell"
    smaller = steps[theirs]["bytes"] / steps[ours]["bytes"]
    return f"{mean:+.2f} pp [{low:+.2f}, {high:+.2f}] at {smaller:.2f}× smaller: {verdict}"


print("distill before rounding, against rounding first:", between(*orders))

# %% [markdown]
# **What it means.** If you distill first, rounding sees a repaired network. If you round first, training moves the
# weights, and they must be rounded again. Look at the interval before you believe in either order: a few hundred images
# decide little.
#
# ## 7 · The narrow rival
#
# Anyone would first try something simpler: a **narrow ResNet-18** with as many MACs. It trains from new weights for as
# long as the dense network and the distillation together, without a teacher, and is rounded in the same way. What the
# pipeline is worth is the difference to *this* network, not to the large one.
#
# *Predict*: is the rival above or below?

# %% tags=["machine-dependent"]
from nnc_utils.baseline import narrow_resnet

torch.manual_seed(seed)
narrow = models.build(narrow_resnet(dense.spec, bench.recipe, macs))
narrow = trained(narrow, length=bench.recipe["epochs"] + epochs, peak=bench.recipe["learning_rate"])
measure("narrow", narrow)
measure("narrow, rounded", quantize(narrow))
ours, rival = steps["pruned, distilled, rounded"], steps["narrow, rounded"]
print(f"pipeline {ours['bytes']:,} bytes, rival {rival['bytes']:,} bytes")

# %% tags=["machine-dependent"]
print("pipeline against the narrow rival:", between("pruned, distilled, rounded", "narrow, rounded"))
print("pipeline against the dense network:", between("pruned, distilled, rounded", "dense"))

# %% [markdown]
# ## 8 · All steps in one picture
#
# Right is smaller, up is better.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(8, 4))
for (name, step), marker in zip(steps.items(), figures.MARKERS, strict=False):
    smaller = first["bytes"] / step["bytes"]
    axes.plot(smaller, step["accuracy (%)"], marker, markersize=8)
    axes.annotate(name, (smaller, step["accuracy (%)"]), (6, -12), textcoords="offset points", fontsize=8)
axes.set(xscale="log", xlabel="times smaller (file)", ylabel="validation accuracy (%)")
axes.set(title="What does each step give?", xlim=(0.8, 900))
figures.show(figure, "Validation accuracy against times smaller, after each step, with the rivals")

# %% tags=["machine-dependent"]
table = pd.DataFrame(steps).T.drop(columns="right")
table["times smaller"] = first["bytes"] / table["bytes"]
table.astype(float).round({"accuracy (%)": 2, "times smaller": 1})

# %% [markdown]
# **What would fool you.** You are fooled when a pipeline is compared with the large network only, when its stages train
# longer than the rival, or when a ratio omits the header, batch-norm and scales.
#
# ## Benchmark
#
# A pipeline is data: `{"method": "pipeline", "stages": ["prune", "distill", "quantize"], "macs": 16, "lambda_": 1e-10}`.
# [`pipeline.py`](../nnc_utils/pipeline.py) turns the list of stages into a network, with the functions above. Every
# configuration trains for the same number of images. Validation images decide what is claimed; only then does a fresh
# process score the test images of each file, once.

# %% tags=["benchmark"]
candidates = bench.build(configurations + controls + peers)

# %% tags=["benchmark"]
rows = bench.measure(candidates)
bench.show(rows)

# %% tags=["benchmark"]
figure = figures.size_against_accuracy(bench.with_reference(rows))
figures.show(figure, "Test accuracy against times smaller: pipeline, its stages and rivals")

# %% tags=["benchmark"]
done = bench.finish()

# %% [markdown]
# ## The committed results
#
# The same cells, run on ResNet-18 and Fashion-MNIST. The table says which rivals the pipeline beats there.

# %% tags=["machine-dependent"]
from bench.committed import committed

results = committed("pipeline")
print(f"profile {results.name}")
figures.show(
    results.figure(), "Committed test accuracy against times smaller: pipelines, rivals and other tools"
)

# %% tags=["machine-dependent"]
results.verdicts()

# %% [markdown]
# ## Summary
#
# - Pruning and rounding both profit from the same weights, those that hardly matter: their gains overlap.
# - Training after rounding needs the rounding in the loop, and a second rounding.
# - The rival is a narrow network with an equal training budget and the same rounding. Say what you gain over *it*.
#
# **Questions.** (1) Why is the product of the two factors not reached? (2) What does a removed channel do to the scale
# of the layer that reads it? (3) Why must the rival get the baseline's epochs, too?
#
# **Exercises.** (1) Set `lambda_ = 1e-8`: what is left? `python -m nnc_utils.inspect FILE` shows each layer. (2) Give the
# pipeline `"sparsity": 0.5`, so that half of the weights it keeps become 0: does the
# file shrink by half? (3) Add `{"method": "pipeline", "stages": ["narrow", "distill", "quantize"], "macs": 16,
# "bits": 4}` to `configurations`: what are the large network's weights worth?
#
# Next: [07_deployment](07_deployment.ipynb): what runtimes make of these files.
