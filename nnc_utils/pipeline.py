"""Pipelines: a list of stages as data, each a function from a network to a network.

`build` makes the network of a configuration of 06. Stages that several of them begin with are made once.
What a list of stages does not use of the training budget, its other stages get: all train for as many images.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnc_utils import batch_norm, curvature, encoding, models, peers
from nnc_utils.baseline import narrow_resnet
from nnc_utils.budgets import Budgets, Planner, sparse
from nnc_utils.configurations import Built, Configuration, read
from nnc_utils.distillation import candidates, student_loss
from nnc_utils.pruning import channels
from nnc_utils.quantization import activations, hessian_rounding, qat, uniform
from nnc_utils.training import cross_entropy, data_digest, network_digest

TRAINED = ("prune", "quantize", "distill", "train")  # their place gives each training other images


def stages_of(configuration: Configuration) -> tuple[str, ...]:
    """The stages of a configuration, in their order."""
    if configuration.method == "pipeline":
        return configuration.stages
    if configuration.method == "small_dense":
        rounding = "quantize" if configuration.bits or configuration.distill else "round"
        return ("narrow", "distill" if configuration.distill else "train", rounding)
    others = {"searched": ("found", "distill", "quantize"), "torch_pruning": ("torch", "train")}
    return others.get(configuration.method, ("train",))


def build(configuration: Configuration, bench: Any) -> Iterator[Built]:
    """The network behind all stages; of a run's first pipeline also those between the stages.

    A ValueError tells of a budget that no network meets, or of a network that is not in upstream.
    """
    if _is_tool(configuration):
        yield _tool(configuration, bench)
        return
    stages, work = stages_of(configuration), _work(bench)
    budgets = work.planner.budgets(configuration, stages)
    scale = work.total / sum(work.epochs(stage, budgets) for stage in stages)
    is_first = not any(c.configuration.method == "pipeline" for c in bench.candidates)
    shown = configuration.method == "pipeline" and is_first and bench.parameters["claim"]
    for number in range(1 if shown else len(stages), len(stages) + 1):
        done = stages[:number]
        cost = work.after(done, budgets.of(done), scale)
        yield Built(*cost, stage=done[-1] if number < len(stages) else "")


def check(configuration: Configuration, bench: Any) -> None:
    """Raise a ValueError, before any training, where no network meets the budgets."""
    if _is_tool(configuration):
        return
    stages, work = stages_of(configuration), _work(bench)
    budgets = work.planner.budgets(configuration, stages)
    if configuration.method == "searched":
        work.found()
    if budgets.ensemble and not bench.others:
        raise ValueError("ensemble needs the baselines of other seeds in upstream")
    if budgets.size and budgets.size > (most := work.planner.smallest(stages, budgets)):
        raise ValueError(
            f"size {budgets.size:g} cannot be met: {most:g} is the nearest, with 2 bits in each layer"
        )


def _is_tool(configuration: Configuration) -> bool:
    return configuration.technique == "peer" and configuration.method != "torch_pruning"


def _tool(configuration: Configuration, bench: Any) -> Built:
    """Another tool's file of one of our networks, and what training that took."""
    tool, options, of = configuration.method, {}, getattr(configuration, "of", None)
    if tool == "torch_pruning_nncf":
        tool, of = "nncf_ptq", {"method": "torch_pruning", "macs": configuration.macs, "train": "finetune"}
    elif tool == "nncodec_pruned":
        tool, options = "nncodec", {"qp": configuration.qp, "reestimate": True}
        of = {"method": "pipeline", "stages": ["prune", "distill"], "macs": configuration.macs}
        of["ensemble"] = configuration.ensemble
    if why := peers.available(tool):
        raise ValueError(f"{tool}: {why}")
    [before] = read([of], "pipeline")
    source, *cost = bench.made(before)
    images = bench.sample(bench.parameters["scoring_images"])[0].numpy()
    file = peers.make(tool, source, images, bench.path("peers/x").parent, **options)
    return Built(None, *cost, file=file, source=source, tool=tool)


@functools.lru_cache(maxsize=1)
def _work(bench: Any) -> _Work:
    return _Work(bench)


class _Work:
    """The stages of one run, and what they have made."""

    def __init__(self, bench: Any) -> None:
        self.bench, self.dense, self.given = bench, bench.dense, bench.parameters
        self.spec, self.whole = bench.dense.spec, models.macs(bench.dense.spec)
        self.images, self.labels = bench.sample(self.given["scoring_images"])
        self.planner = Planner(bench, self.images, self.labels)
        self.total = sum(self.given[f"{stage}_epochs"] for stage in ("prune", "quantize", "distill"))
        self._pruned: dict[tuple[str, float], models.ResNet] = {}

    def epochs(self, stage: str, budgets: Budgets) -> float:
        """A stage's share of the training; rounding at a price needs none."""
        if stage == "train":
            return self.given["prune_epochs"] + self.given["distill_epochs"]
        if stage not in TRAINED or (stage == "quantize" and budgets.lambda_):
            return 0.0
        return self.given[f"{stage}_epochs"]

    @functools.cache  # noqa: B019, one object a run
    def after(self, stages: tuple[str, ...], budgets: Budgets, scale: float) -> tuple[nn.Module, int, float]:
        """The network behind some stages, and the images and seconds of their training."""
        if not stages:
            return self.dense, 0, 0.0
        *earlier, stage = stages
        network, images, seconds = self.after(tuple(earlier), budgets.of(tuple(earlier)), scale)
        network = getattr(self, f"_{stage}")(copy.deepcopy(network), budgets)
        if length := scale * self.epochs(stage, budgets):
            network, (more_images, more_seconds) = self._trained(network.train(), stages, budgets, length)
            images, seconds = images + more_images, seconds + more_seconds
            if is_rounded(network) and budgets.lambda_:  # training moved codes and did not know their price
                network = self._quantize(network, budgets).eval()
        if stage == "round" or is_rounded(network):
            network = activations.calibrate(network, self.images)
        return network, images, seconds

    def _distill(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        return network

    _train = _distill

    def _prune(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        """Channels to the budget, then weights inside what is left; what was rounded is rounded once more."""
        was_rounded = is_rounded(network)
        narrow = sparse(self.pruned(unrounded(network) if was_rounded else network, budgets.macs), budgets)
        return self._quantize(narrow, budgets) if was_rounded else narrow

    def pruned(self, network: models.ResNet, fewer: float) -> models.ResNet:
        """`prune` to so many times fewer MACs than at first, done once for each network."""
        if (key := (network_digest(network), fewer)) not in self._pruned:
            budget = {"macs": self.whole / fewer, "multiple": self.given["multiple"]}
            self._pruned[key] = prune(network, self.images, self.labels, **budget)
        return copy.deepcopy(self._pruned[key])

    def _quantize(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        """Weights and activations rounded in the forward pass; the scales train where training follows."""
        if budgets.lambda_:
            network = self._round(unrounded(network), budgets)
            names = [layer.name for layer in models.layers(network.spec)]
            scales = {name: encoding.encoded(network.get_submodule(name)).scale for name in names}
            options = {"bits": hessian_rounding.BITS, "scales": scales}
            return qat.prepare(unrounded(network), self.images, method="lsq", **options)
        bits = self.planner.planned(unrounded(network), budgets.size) if budgets.size else budgets.bits
        return qat.prepare(network, self.images, bits=bits, method="lsq")

    def _round(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        """Without training: at a price, else as `small_dense` of 03 is."""
        if budgets.lambda_:
            return round_at_price(network, self.images, lambda_=budgets.lambda_, seed=self.bench.seed)
        return uniform.quantize_network(network, bits=7, per_channel=True)

    def _narrow(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        narrow = narrow_resnet(self.spec, self.bench.recipe, budgets.macs, budgets.family)
        return self._from_scratch(narrow, f"{budgets.family}_{budgets.macs:g}")

    def found(self) -> models.Spec:
        """The network of 05, which has to be in upstream."""
        for run in self.bench.run.upstream:
            if "search" in run.extra:
                return models.Spec.from_json(run.extra["search"]["winner"]["spec"])
        raise ValueError("the run of 05_architecture_search has to be in upstream")

    def _found(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        return self._from_scratch(self.found(), "found")

    def _torch(self, network: models.ResNet, budgets: Budgets) -> models.ResNet:
        if why := peers.available("torch_pruning"):
            raise ValueError(f"Torch-Pruning: {why}")
        options = {"images": self.images, "labels": self.labels, "everywhere": True}  # its default
        options["macs"] = self.whole / budgets.macs
        network = peers.peer("torch_pruning").prune(network, budgets.score, **options)
        return batch_norm.reestimate(network, self.images)

    def _from_scratch(self, spec: models.Spec, name: str) -> models.ResNet:
        """New weights with the baseline's training, which the pruned networks had, too."""
        if network := self.bench.trained_before(spec):
            return network.eval()
        torch.manual_seed(self.bench.seed)
        network = models.build(spec)
        options = ("epochs", "learning_rate", "augment", "batch_size")
        self.bench.fit(network, f"{name}_start", **{key: self.bench.recipe[key] for key in options})
        return network.eval()

    def _trained(
        self, network: models.ResNet, stages: tuple[str, ...], budgets: Budgets, length: float
    ) -> tuple[models.ResNet, tuple[int, float]]:
        """A stage's training, by the teacher in `distill`, else by labels; the images and seconds it took."""
        bench, images, loss, seconds, taught = self.bench, self.bench.images, cross_entropy, 0.0, []
        size, augment = self.given["batch_size"] or bench.recipe["batch_size"], bench.recipe["augment"]
        steps = max(1, round(length * (len(images.train) // size)))
        if stages[-1] == "distill":
            lesson = student_loss.Recipe(temperature=self.given["temperature"], alpha=self.given["alpha"])
            teacher = candidates.teacher(bench, "ensemble" if budgets.ensemble else "baseline")
            if self.given["copies"] == 0:
                loss = student_loss.online(teacher, lesson, network.spec)
            else:
                known = candidates.memory(bench, teacher)
                images, augment, seconds = known.images, False, known.seconds
                loss = student_loss.cached(known, lesson, network.spec)
                taught = [student_loss.logits_name(teacher, self.given["copies"], bench.seed), repr(lesson)]
        limits = [
            f"{name}{value}" for name, value in vars(budgets).items() if value != getattr(Budgets, name)
        ]
        options = {"images": images, "loss": loss, "augment": augment, "batch_size": size}
        options["epochs"] = steps / (len(images.train) // size)
        options["learning_rate"] = self.given["learning_rate"]
        options["seed"] = bench.seed + 1_000_003 * (1 + TRAINED.index(stages[-1]))
        name = "_".join([*stages, *limits, f"{length:g}"])
        is_kept = stages == ("narrow", "train") or (stages == ("narrow", "distill") and taught)
        if is_kept and bench.trained_before(network.spec):
            trained, (seen, took) = self._trained_once(network, name, options, taught)
            return trained, (seen, took + seconds)
        history = bench.fit(network, name, **options)
        return network.eval(), (history.images, history.seconds + seconds)

    def _trained_once(
        self, network: models.ResNet, name: str, options: dict[str, Any], taught: list[str]
    ) -> tuple[models.ResNet, tuple[int, float]]:
        """A narrow network's training, kept in 16 bits in the run's folder, or from beside the reference.

        `taught`: by which logits, and how; empty without a teacher.
        """
        told = {key: value for key, value in options.items() if key not in ("images", "loss")}
        call = json.dumps([network_digest(network), data_digest(self.bench.images), told, *taught])
        kept = f"trained_{hashlib.sha256(call.encode()).hexdigest()[:16]}.tensors"
        file = self.bench.file_beside(kept) or self.bench.path(kept)
        if not file.is_file():
            history = self.bench.fit(network, name, **options)
            state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
            cost = {"images": str(history.images), "seconds": repr(history.seconds)}
            save_file(state, file.with_suffix(".partial"), metadata=cost)
            file.with_suffix(".partial").replace(file)
        network.load_state_dict(load_file(file))
        with safe_open(file, "pt") as opened:
            cost = opened.metadata()
        return network.eval(), (int(cost["images"]), float(cost["seconds"]))


def prune(
    network: models.ResNet, images: Tensor, labels: Tensor, *, macs: float, multiple: int = 8
) -> models.ResNet:
    """Channels with the lowest Fisher scores removed, their readers compensated, batch-norm re-estimated.

    Parameters
    ----------
    images, labels : of train, (n, C, H, W) normalized and (n,).
    macs, multiple : how many are left at most, and of what each layer's number of channels is a multiple.
    """
    score = channels.scores(network, "fisher", images=images, labels=labels)
    kept = channels.within_macs(network.spec, score, macs=macs, multiple=multiple)
    return batch_norm.reestimate(channels.compensated(network, kept, images), images)


def round_at_price(network: models.ResNet, images: Tensor, *, lambda_: float, seed: int = 0) -> models.ResNet:
    """Second-order rounding where a bit may cost so much loss, batch-norm re-estimated behind it."""
    known = curvature.curvatures(network, images, seed=seed)
    rounded = hessian_rounding.quantize_network(network, known, lambda_=lambda_)
    return batch_norm.reestimate(rounded, images, original=network)


def is_rounded(network: models.ResNet) -> bool:
    """Whether a network computes with the rounding of its file."""
    return any(place.scale is not None for place in models.activations(network).values())


def unrounded(network: models.ResNet) -> models.ResNet:
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
