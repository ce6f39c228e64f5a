"""Quantization-aware training: the network trains with the rounding that its file will have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnc_utils import models
from nnc_utils.encoding import UniformWeight
from nnc_utils.quantization import activations, uniform
from nnc_utils.quantization.networks import for_each_layer

METHODS = ("ste", "lsq")


def prepare(
    model: nn.Module,
    images: Tensor,
    *,
    bits: int | Mapping[str, int],
    method: str,
    ends: int = 8,
    scales: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a network that rounds weights and activations in its forward pass, to be trained on.

    The float weights stay behind the rounding, and gradients pass to them as if there were none (the
    straight-through estimator, Bengio et al., 2013). Batch-norm is not folded: weights are rounded
    before it, as in the file, so that a runtime, which folds it into the scales, computes with the very
    integers that were trained.

    Parameters
    ----------
    model : a trained network of `models.build`; not changed. An `encoding.ZeroMask` of it stays.
    images : normalized training images, from which the ranges of the 8-bit activations are taken.
        Calibrate once more after training.
    bits : of the weights, 2 to 16, one number or one for each layer by name.
    method : "ste": the scales stay what they are. "lsq": they are trained, too (Esser et al., 2020,
        "Learned step size quantization").
    ends : bits of the first convolution and the classifier, which suffer most, where `bits` is one number;
        their scales stay.
    scales : float32 (out,) for each layer by name, to start from; None: those of least squared error.

    Raises
    ------
    ValueError
        For an unknown method, widths out of range, unknown or missing layer names, scales of another shape,
        no images.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    layers = models.layers(model.spec)
    if not isinstance(bits, Mapping):
        bits = {layer.name: ends if layer in (layers[0], layers[-1]) else bits for layer in layers}
    widths = for_each_layer(model, "bits", bits)
    if scales is not None:
        scales = for_each_layer(model, "scales", scales)
        for layer in layers:
            if scales[layer.name].shape != (layer.out_channels,):
                raise ValueError(
                    f"scales[{layer.name!r}] is {tuple(scales[layer.name].shape)}: one for each of "
                    f"{layer.out_channels} output channels is needed"
                )
    trained = activations.calibrate(model, images)
    for layer in layers:
        module = trained.get_submodule(layer.name)
        inner = layer not in (layers[0], layers[-1])
        width = widths[layer.name]
        if scales is None:
            scale = uniform.quantize(module.weight, bits=width, per_channel=True, clip="mse").scale
        else:
            scale = scales[layer.name]
        rounding = UniformWeight(scale, bits=width, learn_scale=inner and method == "lsq")
        parametrize.register_parametrization(module, "weight", rounding)
    return trained.train()
