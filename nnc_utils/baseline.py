"""The networks that others are compared with: the baseline, the same trained on, and narrow ones."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator

from nnc_utils import models
from nnc_utils.configurations import Bits, Built, Configuration, Price, Times
from nnc_utils.data import Data
from nnc_utils.pretrained import load_pretrained


class Train(Configuration):
    """The uncompressed network of 01."""

    method: Literal["train"] = "train"
    technique: ClassVar[str] = "baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    what: ClassVar[str] = "the uncompressed network"


class DenseFinetuned(Configuration):
    """The baseline, trained on for as long as the compressed networks were."""

    method: Literal["dense_finetuned"] = "dense_finetuned"
    technique: ClassVar[str] = "baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    control: ClassVar[str] = "dense_finetuned"
    what: ClassVar[str] = "the uncompressed network, trained on"


class SmallDense(Configuration):
    """A plain narrow ResNet with an equal training budget: the rival of every headline."""

    method: Literal["small_dense"] = "small_dense"
    technique: ClassVar[str] = "baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"training", "calibration"})
    what: ClassVar[str] = "{plain}, {macs:g}× fewer MACs"
    added: ClassVar[dict[str, str]] = {"distilled": "{distilled}", "int8": "int8", "bits": "{bits}-bit QAT"}
    added |= {"lambda_": "second-order rounding, λ = {lambda_:g}"}
    macs: Times
    family: Literal["narrow_resnet18", "three_stage"] = (
        "narrow_resnet18"  # than the baseline's; or ResNet-20's three stages
    )
    int8: bool = False
    bits: Bits | None = None  # of weights in quantization-aware training
    lambda_: Price | None = None  # loss for a bit, in second-order rounding
    distill: bool = False
    ensemble: bool = False  # the baselines of all seeds are its teacher

    @model_validator(mode="after")
    def _one_rounding(self) -> SmallDense:
        if (self.int8, self.bits, self.lambda_).count(None) + (not self.int8) < 2:
            raise ValueError("int8, bits and lambda_ are three ways to round: at most one is needed")
        if self.distill and not (self.bits or self.lambda_):
            raise ValueError("distill goes with bits or lambda_: the student is rounded behind its teacher")
        if self.ensemble and not self.distill:
            raise ValueError("ensemble is about the teacher: it needs distill")
        return self

    @property
    def control(self) -> str:
        if self.distill:
            return "small_dense_distilled"
        return f"small_dense_qat{self.bits}" if self.bits else "small_dense"

    def words(self) -> dict[str, Any]:
        distilled = "distilled from all seeds" if self.ensemble else "distilled" * self.distill
        plain = "three-stage ResNet" if self.family == "three_stage" else "narrow ResNet-18"
        return dict(self) | {"plain": plain, "distilled": distilled}


def spec_of(parameters: dict[str, Any], images: Data) -> models.Spec:
    """The architecture that the parameters of 01 describe, for a data set."""
    own = {"channels": images.channels, "size": images.size, "classes": len(images.classes)}
    return models.resnet(parameters["depth"], stem=parameters["stem"], width=parameters["width"], **own)


def build(configuration: Configuration, bench: Any) -> Built:
    """The uncompressed network by the parameters of 01: trained here, from new weights or from `weights`."""
    given = bench.parameters
    if bench.pretrained:
        network, history, bench.extra["recipe"] = bench.pretrained
    else:
        torch.manual_seed(bench.seed)
        network = models.build(spec_of(given, bench.images))
        if given["weights"]:
            load_pretrained(network, given["weights"])
        options = {key: given[key] for key in ("epochs", "batch_size", "learning_rate", "augment")}
        history = bench.fit(network, configuration.method, validate=True, **options)
    bench.extra["history"] = [vars(epoch) for epoch in history]
    return Built(network, history.images, history.seconds, dtype=torch.float32)


def narrow_resnet(spec: models.Spec, recipe: dict[str, Any], fewer: float, family: str = "") -> models.Spec:
    """The widest plain ResNet with so many times fewer MACs than `spec`; where there is none, the narrowest.

    It is of the baseline's depth and width, which `recipe` has (the parameters of 01), or of the family
    "three_stage" ResNet-20, which has no stage of 512 and so fewer weights for as many MACs.
    """
    same = {key: getattr(spec, key) for key in ("channels", "size", "classes")}
    member, widest = functools.partial(models.resnet, recipe["depth"], stem=spec.stem), recipe["width"]
    if family == "three_stage":
        member, widest = models.three_stage, 4 * widest  # 64, 128 and 256 wide, as ResNet-18 begins
    for width in np.arange(1, 0, -0.005) * widest:
        narrow = member(width=float(width), **same)
        if models.macs(narrow) <= models.macs(spec) / fewer:
            break
    return narrow


def dense_finetuned(bench: Any) -> Built:
    """The baseline with as much more training as the compressed networks of the run get."""
    given, network = bench.parameters, copy.deepcopy(bench.dense)
    options = {key: bench.recipe[key] for key in ("augment", "batch_size")}
    options |= {"epochs": given["train_epochs"], "learning_rate": given["learning_rate"]}
    history = bench.fit(network, "dense_finetuned", **options)
    return Built(network.eval(), history.images, history.seconds)


def trained_from_new_weights(bench: Any, spec: models.Spec, name: str) -> Built:
    """A network that was never compressed, with the baseline's training and the fine-tuning's together."""
    torch.manual_seed(bench.seed)
    network = models.build(spec)
    options = {key: bench.recipe[key] for key in ("augment", "batch_size", "learning_rate")}
    epochs = bench.recipe["epochs"] + bench.parameters["train_epochs"]
    history = bench.fit(network, name, epochs=epochs, **options)
    return Built(network.eval(), history.images, history.seconds)
