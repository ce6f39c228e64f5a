"""Budgets of pipelines: what no network meets is refused before any training, and milliseconds become MACs.

Milliseconds are interpolated between untrained networks: a guide, taken on whatever else the machine does.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnc_utils import allocation, artifact, encoding, measure, models, sensitivity
from nnc_utils.baseline import narrow_resnet
from nnc_utils.configurations import Configuration
from nnc_utils.pruning import channel_removal, channels, unstructured
from nnc_utils.quantization import activations, uniform

TIMED = 8  # networks between which milliseconds are interpolated
WIDTHS = range(2, 9)  # bits among which a file's size is planned
SPARE = 0.97  # of that size: trained codes are coded a little longer or shorter than those of the plan


@dataclass(frozen=True)
class Budgets:
    """What a configuration's stages may use; None where it sets no limit."""

    macs: float | None = None  # times fewer
    bits: int | None = None
    size: float | None = None  # times smaller
    lambda_: float | None = None  # loss for a bit
    sparsity: float | None = None
    family: str = "narrow_resnet18"  # of the narrow network
    ensemble: bool = False
    score: str = ""  # of Torch-Pruning
    uniform: bool = False  # the same

    def of(self, stages: tuple[str, ...]) -> Budgets:
        """Only what these stages look at, so that configurations share what they begin with."""
        names = {
            "prune": ("macs", "sparsity"),
            "quantize": ("bits", "size", "lambda_"),
            "round": ("lambda_",),
        }
        names |= {"narrow": ("macs", "family"), "torch": ("macs", "score", "uniform")}
        names |= {"distill": ("ensemble",)}
        seen = {name for stage in stages for name in names.get(stage, ())}
        return Budgets(**{name: getattr(self, name) for name in seen})


class Planner:
    """What the budgets of one run mean, on its dense network; images and labels of train are for scores."""

    def __init__(self, bench: Any, images: Tensor, labels: Tensor) -> None:
        self.bench, self.dense, self.given = bench, bench.dense, bench.parameters
        self.spec, self.whole = bench.dense.spec, models.macs(bench.dense.spec)
        self.images, self.labels = images, labels

    def budgets(self, configuration: Configuration, stages: tuple[str, ...]) -> Budgets:
        """A configuration's budgets, milliseconds as MACs; a ValueError where they cannot be met."""
        known = {name: getattr(configuration, name, default) for name, default in vars(Budgets()).items()}
        stage = next((s for s in stages if s in ("prune", "narrow")), None)
        if wanted := getattr(configuration, "latency_ms", None):
            fewer, times = self.timed(stage)
            if wanted < times[-1]:
                nearest = f"{times[-1]:.3g} is the nearest ({fewer[-1]:.0f} times fewer MACs)"
                raise ValueError(f"latency_ms {wanted:g} cannot be met in {self.given['runtime']}: {nearest}")
            met = np.exp(np.interp(np.log(wanted), np.log(times[::-1]), np.log(fewer[::-1])))
            known["macs"] = max(1.0, _floor(met))
        if stage == "narrow":
            least = narrow_resnet(self.spec, self.bench.recipe, np.inf, known["family"])
        elif stage:
            least = self.shrunk(stage).spec
        if stage and known["macs"] > (most := self.whole / models.macs(least)):
            raise ValueError(f"macs {known['macs']:g} cannot be met: {_floor(most):g} is the nearest")
        return Budgets(**known)

    @functools.cache  # noqa: B019, one object a run
    def shrunk(self, stage: str, fewer: float = np.inf) -> models.ResNet:
        """The baseline, only narrowed as `prune` or `narrow` will; without a number to the narrowest."""
        narrow = narrow_resnet(self.spec, self.bench.recipe, fewer) if stage == "narrow" else self.spec
        groups, multiple = channel_removal.groups(self.spec), self.given["multiple"]
        widths = {x.name: x.out_channels for x in models.layers(narrow) if x.name in groups}
        if stage == "narrow":
            kept = {name: torch.arange(width) for name, width in widths.items()}
        elif fewer < np.inf:
            kept = channels.within_macs(self.spec, self.scores, macs=self.whole / fewer, multiple=multiple)
        else:  # of channels that are all worth the same go all that may
            equal = {name: torch.zeros(width) for name, width in widths.items()}
            kept = channels.within_macs(self.spec, equal, macs=self.whole - 1, multiple=multiple)
        return channel_removal.remove_channels(self.dense, kept)

    @functools.cached_property
    def scores(self) -> dict[str, torch.Tensor]:
        """What the loss would miss without each channel of the baseline."""
        return channels.scores(self.dense, "fisher", images=self.images, labels=self.labels)

    def timed(self, stage: str) -> tuple[list[float], list[float]]:
        """From the whole network to the narrowest: times fewer MACs, and int8 milliseconds of an image."""
        kept = self.bench.path("checkpoint_timings.json")  # a resumed run goes on with the same networks
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        for run in self.bench.shards:
            known |= run.extra.get("timings", {})
        name = f"{stage} in {self.given['runtime']}"
        if name not in known:
            least = self.whole / models.macs(self.shrunk(stage).spec)
            networks = [self.shrunk(stage, float(f)) for f in np.geomspace(1, least, TIMED)[:-1]]
            networks.append(self.shrunk(stage))
            rounded = [uniform.quantize_network(n, bits=7, per_channel=True) for n in networks]
            paths = [self._saved(n, f"timed/{i}") for i, n in enumerate(rounded)]
            options = {"runtime": self.given["runtime"], "precision": "int8", "folder": paths[0].parent}
            times = measure.milliseconds(paths, **options)
            times = np.maximum.accumulate(times[::-1])[::-1]  # a larger network is not faster
            known[name] = [[self.whole / models.macs(n.spec) for n in networks], times.tolist()]
            kept.write_text(json.dumps(known))
        self.bench.extra["timings"] = known
        return tuple(known[name])

    def _saved(self, network: models.ResNet, name: str, calibrated_on: int = 64) -> Path:
        """A file of a rounded network, with ranges of its activations on so many images."""
        path, images = self.bench.path(f"scratch/{name}.safetensors"), self.bench.images
        network = activations.calibrate(network, self.images[:calibrated_on])
        options = {"mean": images.mean, "std": images.std, "classes": images.classes, "dtype": torch.float16}
        artifact.save(network, path, **options)
        return path

    def smallest(self, stages: tuple[str, ...], budgets: Budgets) -> float:
        """How many times smaller a file can be: with 2 bits in each layer of the network that is rounded."""
        before = stages[: stages.index("quantize")]
        if "found" in before:
            return np.inf  # its weights are not known before its training
        narrowing = [stage for stage in before if stage in ("prune", "narrow")]
        network = sparse(self.shrunk(narrowing[0], budgets.macs) if narrowing else self.dense, budgets)
        rounded = uniform.quantize_network(network, bits=min(WIDTHS), per_channel=True, clip="mse")
        nbytes = self._saved(rounded, "smallest").stat().st_size
        return _floor(SPARE * artifact.fp32_bytes(self.spec) / nbytes)

    def planned(self, network: models.ResNet, smaller: float) -> dict[str, int]:
        """Bits for each layer, so that the file is so many times smaller than the baseline's."""
        layers = {x.name: network.get_submodule(x.name).weight.detach() for x in models.layers(network.spec)}
        options = {"per_channel": True, "clip": "mse"}
        codes = {n: {b: uniform.quantize(w, bits=b, **options) for b in WIDTHS} for n, w in layers.items()}
        cost = {n: {b: encoding.payload_bits(code) / 8 for b, code in c.items()} for n, c in codes.items()}
        values = {n: {b: encoding.decode(code) for b, code in c.items()} for n, c in codes.items()}
        harm = sensitivity.loss_increase(network, values, self.images, self.labels)
        trial = uniform.quantize_network(network, bits=8, **options)
        whole = self._saved(trial, "whole", len(self.images)).stat().st_size
        beside = whole - sum(prices[8] for prices in cost.values())  # what is not weights
        budget = SPARE * artifact.fp32_bytes(self.spec) / smaller - beside
        if budget < (least := sum(min(prices.values()) for prices in cost.values())):
            nearest = _floor(SPARE * artifact.fp32_bytes(self.spec) / (beside + least))
            raise ValueError(f"size {smaller:g} cannot be met by these MACs: {nearest:g} is the nearest")
        return {name: int(bits) for name, bits in allocation.allocate(cost, harm, budget=budget).items()}


def sparse(network: models.ResNet, budgets: Budgets) -> models.ResNet:
    """The smallest weights of all layers set to zero, to the budget's share."""
    if not budgets.sparsity:
        return network
    score = unstructured.scores(network, "magnitude")
    return unstructured.masked(network, unstructured.masks(score, budgets.sparsity))


def _floor(number: float) -> float:
    """Two decimals, never more than the number."""
    return float(np.floor(100 * number) / 100)
