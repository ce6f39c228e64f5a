"""The networks of 03's configurations: pruned, trained where that is asked for, ready to be saved."""

import copy
import functools
from typing import Any

from torch import Tensor, nn

from nnc_utils import allocation, artifact, batch_norm, encoding, evaluation, models, peers
from nnc_utils.baseline import dense_finetuned, narrow_resnet, trained_from_new_weights
from nnc_utils.configurations import Built, Configuration, of_row
from nnc_utils.data import Split
from nnc_utils.devices import exact_device
from nnc_utils.distillation import student_loss
from nnc_utils.pruning import channel_removal, channels, reconstruct, schedules, unstructured
from nnc_utils.pruning.configurations import SCANNED
from nnc_utils.quantization import activations, uniform
from nnc_utils.sensitivity import loss_increase
from nnc_utils.training import cross_entropy

HAND = {"conv1": 0.5, "layer1": 0.3, "layer2": 0.4, "layer3": 0.5, "layer4": 0.6, "fc": 0.7}
SCAN_IMAGES, BLOCK_IMAGES = 64, 500  # validation images that layers, and blocks, are measured on
NORM_IMAGES = 512  # more change no statistic beside the dense network's by more than noise
Rates = dict[str, dict[float, float]]  # layer -> share of zeros -> bytes, or loss


def build(configuration: Configuration, bench: Any) -> Built:
    """The network of a configuration; a ValueError says why there is none.

    Of the run's parameters scoring_images, train_epochs, learning_rate, steps and multiple count.
    """
    if not getattr(configuration, "int8", False):
        return _float(configuration, bench)
    built = _float(configuration.model_copy(update={"int8": False}), bench)
    network = uniform.quantize_network(built.network, bits=7, per_channel=True)
    network = activations.calibrate(network, bench.sample(bench.parameters["scoring_images"])[0])
    return Built(network, built.train_images, built.train_seconds)


def check(configuration: Configuration, bench: Any) -> None:
    """Raise a ValueError, before any training, for what this network does not have or 03 does not build."""
    if configuration.method == "from_scratch" and configuration.macs not in _architectures(bench):
        mappings = bench.parameters["configurations"]
        if not any(m["method"] == "channels" and m["macs"] == configuration.macs for m in mappings):
            raise ValueError("name the configuration of channels whose widths it takes before it")
    if configuration.method == "small_dense" and set(configuration.settings) - {"macs", "family", "int8"}:
        raise ValueError("here macs, family and int8 are all its settings; 06_pipeline has the others")
    if configuration.method == "blocks":
        most = sum(len(stage) - 1 for stage in bench.dense.spec.stages)
        if configuration.removed > most:
            raise ValueError(f"removed: at most {most} of these blocks can go")


@functools.lru_cache(maxsize=2)  # int8 comes behind its float network
def _float(configuration: Configuration, bench: Any) -> Built:
    parameters, name = bench.parameters, configuration.slug
    if configuration.method == "dense_finetuned":
        return dense_finetuned(bench)
    if configuration.method == "small_dense":
        spec = narrow_resnet(bench.dense.spec, bench.recipe, configuration.macs, configuration.family)
        return trained_from_new_weights(bench, spec, name)
    if configuration.method == "from_scratch":
        if configuration.macs not in (specs := _architectures(bench)):
            raise ValueError(f"no network of channels with {configuration.macs:g}× fewer MACs was made")
        return trained_from_new_weights(bench, specs[configuration.macs], name)
    images, _ = bench.sample(parameters["scoring_images"])
    network, seen, seconds = copy.deepcopy(bench.dense), 0, 0.0
    shares = shares_of(configuration, parameters["steps"])
    for number, share in enumerate(shares):
        network = removed(network.eval(), configuration, share, bench)
        if network.spec != bench.dense.spec:
            network = batch_norm.reestimate(network, images)
        if configuration.trains:
            loss = cross_entropy
            if configuration.train == "distill":
                loss = student_loss.online(copy.deepcopy(bench.dense), student_loss.Recipe(), network.spec)
            history = bench.fit(
                network,
                f"{name}_{number + 1}",
                epochs=parameters["train_epochs"] / len(shares),
                learning_rate=parameters["learning_rate"],
                augment=bench.recipe["augment"],
                batch_size=bench.recipe["batch_size"],
                loss=loss,
                seed=bench.seed + 1_000_003 * number,  # each step sees the images in another order
            )
            seen, seconds = seen + history.images, seconds + history.seconds
    if getattr(configuration, "reestimate", False):
        if seen:
            network = batch_norm.reestimate(network, images)
        else:
            network = batch_norm.reestimate(network, images[:NORM_IMAGES], original=bench.dense)
    return Built(network.eval(), seen, seconds)


def shares_of(configuration: Configuration, steps: int) -> list[float]:
    """The share behind each step of a schedule: of zeros, or of MACs that are left."""
    kind = getattr(configuration, "schedule", "one_shot")
    steps = 1 if kind == "one_shot" else steps
    if hasattr(configuration, "macs"):
        return schedules.shares(1 / configuration.macs, kind, steps)
    return schedules.sparsities(getattr(configuration, "sparsity", None) or 0.5, kind, steps)


def removed(network: nn.Module, configuration: Configuration, share: float, bench: Any) -> nn.Module:
    """The network behind one step: `share` of the weights at 0, or of the dense network's MACs left."""
    method, score = configuration.method, getattr(configuration, "score", "magnitude")
    images, labels = bench.sample(bench.parameters["scoring_images"])
    sample, macs = {"images": images, "labels": labels}, share * models.macs(bench.dense.spec)
    if method == "channels":
        budget = {name: getattr(configuration, name) for name in ("uniform", "normalize")}
        budget |= {"macs": macs, "multiple": bench.parameters["multiple"]}
        scores = channels.scores(network, score, seed=bench.seed, **sample)
        kept = channels.within_macs(network.spec, scores, **budget)
        if configuration.compensate:
            return channels.compensated(network, kept, images)
        return channel_removal.remove_channels(network, kept)
    if method == "torch_pruning":
        if why := peers.available("torch_pruning"):
            raise ValueError(f"Torch-Pruning: {why}")
        prune = peers.peer("torch_pruning").prune
        return prune(network, score, macs=macs, everywhere=configuration.uniform, **sample)
    if method == "blocks":
        return channel_removal.remove_blocks(network, least_missed(bench, configuration.removed))
    if method == "obs":
        return reconstruct.prune_network(network, images, sparsity=share, rounds=1)
    if method == "reconstruct":
        return reconstruct.prune_network(network, images, sparsity=share, score=score)
    if method == "two_of_four" and configuration.correct:
        return reconstruct.prune_network(network, images, two_of_four=True)
    scores = unstructured.scores(network, score, seed=bench.seed, **sample)
    if method == "two_of_four":
        return unstructured.masked(network, {name: unstructured.of_four(s) for name, s in scores.items()})
    if method == "layerwise":
        share = rates(configuration.rule, configuration.sparsity, bench)
    return unstructured.masked(network, unstructured.masks(scores, share))


def rates(rule: str, share: float | None, bench: Any) -> dict[str, float]:
    """A share of zeros for each layer: by hand, the same everywhere, or by a scan of as many bytes."""
    names = [layer.name for layer in models.layers(bench.dense.spec)]
    if rule == "hand":
        return {name: HAND[name.split(".")[0]] for name in names}
    if rule == "uniform":
        return dict.fromkeys(names, share)
    split = bench.images.validation
    images, labels = bench.images.normalize(split.images[:SCAN_IMAGES]), split.labels[:SCAN_IMAGES].long()
    cost, harm = scan(bench.dense, images, labels)
    return allocation.allocate(cost, harm, budget=sum(costs[share] for costs in cost.values()))


def scan(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Rates, Rates]:
    """Bytes (fp16) and added loss of each layer at each share of zeros, while the others stay whole."""
    candidates, cost = {}, {}
    for layer in models.layers(network.spec):
        weight = network.get_submodule(layer.name).weight.detach()
        masks = {s: unstructured.masks({"": weight.abs()}, {"": s})[""] for s in SCANNED}
        candidates[layer.name] = {share: weight * mask for share, mask in masks.items()}
        stored = {share: encoding.Dense((weight * mask).half(), mask) for share, mask in masks.items()}
        cost[layer.name] = {share: encoding.payload_bits(dense) / 8 for share, dense in stored.items()}
    return cost, loss_increase(network, candidates, images, labels)


def least_missed(bench: Any, count: int) -> list[str]:
    """Blocks to remove, one after the other, each the one that validation images miss least."""
    images, blocks = bench.images, dict(models.named_blocks(bench.dense.spec))
    split = Split(images.validation.images[:BLOCK_IMAGES], images.validation.labels[:BLOCK_IMAGES])
    gone: list[str] = []

    def accuracy(name: str) -> float:
        network = channel_removal.remove_blocks(bench.dense, [*gone, name])
        network = batch_norm.reestimate(network, bench.sample(bench.parameters["scoring_images"])[0])
        options = {"normalize": images.normalize, "device": exact_device()}
        return evaluation.accuracy(evaluation.predict(network, split, **options), split.labels)

    while len(gone) < count:
        left = [name for name in blocks if name not in gone]
        stages = [name.split(".")[0] for name in left]
        free = [n for n, s in zip(left, stages) if blocks[n].connection == "identity" and stages.count(s) > 1]
        gone.append(max(free, key=accuracy))
    return gone


def _architectures(bench: Any) -> dict[float, models.Spec]:
    """Times fewer MACs -> the architecture that `channels` has left, here or in an earlier shard."""
    done = [
        (of_row(row.method, row.settings), run.artifact(row.artifact_sha256))
        for run in bench.shards
        for row in run.compression
        if row.method == "channels"
    ]
    done += [(c.configuration, c.path) for c in bench.candidates if c.configuration.method == "channels"]
    return {c.macs: artifact.read(path).spec for c, path in reversed(done) if not c.control}
