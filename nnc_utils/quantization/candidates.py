"""The network of each configuration of 02, rounded, repaired, calibrated or trained on."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnc_utils import allocation, batch_norm, curvature, encoding, models, peers, sensitivity
from nnc_utils.configurations import Built, Configuration, read
from nnc_utils.quantization import activations, codebook, hessian_rounding, qat, uniform
from nnc_utils.quantization.configurations import WIDTHS
from nnc_utils.quantization.networks import quantized

HEADER = 500  # bytes that the names of several widths may add to a file, taken off the budget


def build(configuration: Configuration, context: Any) -> Built:
    """Make a configuration's network.

    Parameters
    ----------
    configuration : of `quantization.configurations`, or `baseline.DenseFinetuned`.
    context : the run: its `dense` network, `images`, `sample`, `fit`, `path`, `file`, `recipe`, `seed` and,
        of its `parameters`, calibration_images, repair_images, train_epochs and learning_rate.

    A ValueError: no such tool, codes that no file holds, a budget too small.
    """
    method = configuration.method
    if configuration.technique == "peer":
        return _by_a_tool(configuration, context)
    if configuration.trains and method in ("qat", "dense_finetuned", "kmeans"):
        return _trained(configuration, context)
    if method not in ROUNDED:
        raise ValueError(f"no network of {method!r} is made here: see the notebook that trains it")
    network = ROUNDED[method](configuration, context)
    if configuration.reestimate:
        images = _images(context, "repair_images")
        network = batch_norm.reestimate(network, images, original=context.dense)
    # An int8 runtime computes with codes of equal steps; codebooks keep float activations.
    if method != "kmeans" and getattr(configuration, "activations", "int8") == "int8":
        network = activations.calibrate(network, _images(context, "calibration_images"))
    return Built(network, dtype=torch.float32)


def _uniform(configuration: Configuration, context: Any) -> nn.Module:
    """Few bits clip the range: outliers would waste half of the codes."""
    bits = configuration.bits or configuration.levels.bit_length()
    options = {"levels": configuration.levels, "clip": "max" if bits > 4 else "mse"}
    per_channel = configuration.granularity == "channel"
    return uniform.quantize_network(context.dense, bits=bits, per_channel=per_channel, **options)


def _kmeans(configuration: Configuration, context: Any) -> nn.Module:
    fisher = _fisher(context) if configuration.hessian else None
    return codebook.quantize_network(context.dense, bits=configuration.bits, importance=fisher)


def _hessian_rounding(configuration: Configuration, context: Any) -> nn.Module:
    known = _curvatures(context)
    if configuration.one_sided:  # what a row's error costs, but not what others could compensate
        known = {name: replace(c, outputs=c.outputs.diagonal().diag()) for name, c in known.items()}
    return hessian_rounding.quantize_network(context.dense, known, lambda_=configuration.lambda_)


def _mixed_precision(configuration: Configuration, context: Any) -> nn.Module:
    codes = _rounded_layers(context)
    if configuration.rule:
        bits = {name: 4 if name == "fc" else 8 for name in codes}
    else:
        bits = widths(_curvatures(context), codes, configuration.budget_bits or "levels")
    return quantized(context.dense, lambda name, layer: codes[name][bits[name]])


def widths(
    curvatures: dict[str, curvature.Curvature], codes: dict[str, dict[Any, encoding.Uniform]], like: Any
) -> dict[str, int]:
    """The bits of each layer with the least predicted loss, in the bytes that `like` takes in all layers.

    `codes` are layer -> bits of `WIDTHS` -> its rounded weight, and under "weight" the float one; `like` is a
    key of each layer's.
    """
    cost = {n: {b: encoding.payload_bits(own[b]) / 8 for b in WIDTHS} for n, own in codes.items()}
    loss = {
        n: {b: curvatures[n].loss(encoding.decode(own[b]) - own["weight"]) for b in WIDTHS}
        for n, own in codes.items()
    }
    budget = sum(encoding.payload_bits(own[like]) for own in codes.values()) / 8 - HEADER
    return allocation.allocate(cost, loss, budget=budget)


def _trained(configuration: Configuration, context: Any) -> Built:
    """After more training, with rounding or (dense_finetuned) without: the same images for all."""
    network, parameters = copy.deepcopy(context.dense), context.parameters
    calibration = _images(context, "calibration_images")
    is_rounded = configuration.method == "qat"
    if is_rounded:
        network = qat.prepare(network, calibration, bits=configuration.bits, method=configuration.quantizer)
    elif configuration.method == "kmeans":
        network, images = _kmeans(configuration, context), _images(context, "repair_images")
        network = codebook.trainable(batch_norm.reestimate(network, images, original=context.dense))
    batch = context.recipe["batch_size"]
    epochs = max(parameters["train_epochs"], batch / len(context.images.train))  # a step at least
    options = {"learning_rate": parameters["learning_rate"], "batch_size": batch, "augment": False}
    history = context.fit(network, configuration.slug, epochs=epochs, **options)
    network = activations.calibrate(network, calibration) if is_rounded else network
    return Built(network, history.images, history.seconds, dtype=torch.float32)


def _by_a_tool(configuration: Configuration, context: Any) -> Built:
    name, folder = configuration.method, context.path("peers/x").parent
    if why := peers.available(name):
        raise ValueError(why)
    source, options, images = context.baseline.artifact("fp32"), {}, "calibration_images"
    if name in peers.GENERAL:
        source = context.file(read([configuration.of], "quantization")[0])
    elif name == "nncodec":
        settings = peers.peer(name).RDO if configuration.rdo else None
        options = {"qp": configuration.qp, "reestimate": configuration.reestimate, "settings": settings}
        images = "repair_images"
    elif name == "ort_static":
        options = {"scheme": "S8S8" if configuration.activations == "int8" else "U8S8"}
    file = peers.make(name, source, _images(context, images).numpy(), folder, **options)
    return Built(None, file=file, source=source, tool=name)


# --- What several configurations share ----------------------------------------------------------


def _images(context: Any, count: str) -> Tensor:
    return context.sample(context.parameters[count])[0]


@functools.lru_cache(maxsize=1)
def _fisher(context: Any) -> dict[str, Tensor]:
    return sensitivity.fisher_diagonal(
        context.dense, _images(context, "calibration_images"), seed=context.seed
    )


@functools.lru_cache(maxsize=1)
def _curvatures(context: Any) -> dict[str, curvature.Curvature]:
    return curvature.curvatures(context.dense, _images(context, "calibration_images"), seed=context.seed)


@functools.lru_cache(maxsize=1)
def _rounded_layers(context: Any) -> dict[str, dict[Any, Any]]:
    """Each layer's weight, and its codes of each width and of five levels."""
    options = {"per_channel": True, "clip": "mse"}
    layers = {}
    for layer in models.layers(context.dense.spec):
        weight = context.dense.get_submodule(layer.name).weight.detach()
        codes = {bits: uniform.quantize(weight, bits=bits, **options) for bits in WIDTHS}
        levels = uniform.quantize(weight, bits=3, levels=5, **options)
        layers[layer.name] = codes | {"levels": levels, "weight": weight}
    return layers


ROUNDED = {
    "uniform": _uniform,
    "kmeans": _kmeans,
    "hessian_rounding": _hessian_rounding,
    "mixed_precision": _mixed_precision,
}
