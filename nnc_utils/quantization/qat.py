"""Quantization-aware training: the network trains with the rounding that its file will have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnc_utils import models
from nnc_utils.parametrizations import UniformWeight
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
    scales=None,
) -> nn.Module:
    """A copy of a network that rounds weights and activations in its forward pass, to be trained on.

    Gradients pass to the float weights behind the rounding as if there were none (the straight-through
    estimator, Bengio et al., 2013). Batch-norm is not folded: weights are rounded before it, as in the
    file, so that a runtime computes with the very integers that were trained.

    Parameters
    ----------
    model : a trained network of `models.build`; not changed. A mask stays.
    images : normalized training images for the 8-bit activations. Calibrate once more after training.
    bits : of the weights, 2 to 16, one number or one for each layer by name.
    method : "ste": the scales stay. "lsq": they are trained, too (Esser et al., 2020).
    ends : bits of the first convolution and the classifier, which suffer most, where `bits` is one number;
        their scales stay.
    scales : float32 (out,) for each layer by name, to start from; None: those of least squared error.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    layers = models.layers(model.spec)
    outer = {layers[0].name, layers[-1].name}
    if not isinstance(bits, Mapping):
        bits = {layer.name: ends if layer.name in outer else bits for layer in layers}
    widths, scales = for_each_layer(model, "bits", bits), for_each_layer(model, "scales", scales)
    trained = activations.calibrate(model, images)
    for layer in layers:
        name, module = layer.name, trained.get_submodule(layer.name)
        scale = scales[name]
        if scale is None:
            scale = uniform.quantize(module.weight, bits=widths[name], per_channel=True, clip="mse").scale
        learn = method == "lsq" and name not in outer
        rounding = UniformWeight(scale, bits=widths[name], learn_scale=learn)
        parametrize.register_parametrization(module, "weight", rounding)
    return trained.train()
