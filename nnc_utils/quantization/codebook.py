"""The non-uniform quantizer: a weight becomes the nearest of a few shared values, found by k-means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nnc_utils import encoding, models
from nnc_utils.quantization.networks import for_each_layer, quantized
from nnc_utils.quantization.uniform import check_weight


def kmeans(
    values: Tensor, levels: int, *, importance: Tensor | None = None, iterations=3000
) -> tuple[Tensor, Tensor]:
    """Find the few values that stand for many: minimize ``sum(importance * (values - codebook[codes])**2)``.

    Parameters
    ----------
    values : finite, of any shape.
    levels : 1 to 256 centroids.
    importance : what an error counts for each value, at least 0; None or 0 everywhere: all the same.
    iterations : at most; fewer when nothing changes any more.

    Returns
    -------
    The codebook, float32 in ascending order, and the codes, uint8 in the shape of the values. Fewer
    centroids than levels where there are fewer different values of an importance above 0.

    Lloyd's algorithm (1982), from levels spread evenly over the values (Han et al., 2016, section 3.2); with
    importances Choi et al., 2017, equation 7. In one dimension a cluster is an interval of the sorted
    values: its mean and error are differences of prefix sums. An empty cluster is dropped; while there are
    fewer than `levels`, the one with the largest error is split at its mean. The result is a local minimum.
    """
    if not 1 <= levels <= 256:
        raise ValueError(f"levels is {levels!r}: a whole number from 1 to 256 is needed")
    ordered, weights = _sorted(values, importance)
    sums = np.pad(np.cumsum([weights, weights * ordered, weights * ordered**2], axis=1), ((0, 0), (1, 0)))
    centroids = np.linspace(ordered[0], ordered[-1], levels)
    edges = None
    for _ in range(iterations):
        middles = (centroids[1:] + centroids[:-1]) / 2
        before, edges = edges, np.r_[0, np.searchsorted(ordered, middles), ordered.size]
        edges = np.unique(edges)  # equal edges: an empty cluster
        centroids, errors = _clusters(ordered, sums, edges)
        if len(centroids) < levels:
            worst = centroids[np.argmax(errors)]
            edges = np.unique(np.r_[edges, np.searchsorted(ordered, worst, side="right")])
            centroids, _ = _clusters(ordered, sums, edges)
        if np.array_equal(edges, before):
            break
    codebook = torch.from_numpy(centroids.astype(np.float32)).unique()
    middles = (codebook[1:].double() + codebook[:-1].double()) / 2
    codes = torch.bucketize(values.detach().double(), middles.to(values.device))
    return codebook, codes.to(torch.uint8)


def _sorted(values: Tensor, importance: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The values that count, ascending, and what they count; float64."""
    check_weight(values)
    flat = values.detach().cpu().flatten().numpy()
    if importance is None or not importance.any():
        ordered = np.sort(flat).astype(np.float64)
        return ordered, np.ones_like(ordered)
    if importance.shape != values.shape or not importance.isfinite().all() or importance.min() < 0:
        raise ValueError(f"importance needs a number of at least 0 for each weight, {tuple(values.shape)}")
    weights = importance.detach().cpu().flatten().numpy()
    flat, weights = flat[weights > 0], weights[weights > 0]
    order = np.argsort(flat)
    return flat[order].astype(np.float64), weights[order].astype(np.float64)


def _clusters(ordered: np.ndarray, sums: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the error of each cluster; -1 as the error of equal values, which cannot be split."""
    low, high = ordered[edges[:-1]], ordered[edges[1:] - 1]
    mass, moment, square = np.diff(sums[:, edges])
    # Kept within the cluster: where importances are tiny, the prefix sums cancel to noise.
    mean = np.divide(moment, mass, out=(low + high) / 2, where=mass > 0).clip(low, high)
    return mean, np.where(low < high, np.maximum(square - moment * mean, 0), -1)


def quantize(
    weight: Tensor, *, bits: int, mask: Tensor | None = None, importance: Tensor | None = None, balance=True
) -> encoding.Codebook:
    """Replace a weight by codes into a codebook of at most ``2**bits`` values (Han et al., 2016).

    Parameters
    ----------
    bits : 1 to 8.
    mask : bool in the weight's shape, True = kept: what is not kept takes no part and needs no level.
    importance : as of `kmeans`.
    balance : let each output channel (row) count the same in all: divide its importances by their mean.
        A second derivative is worth something for small changes. Without this the channels of the largest
        take all levels, and others change by more than their own size, to which batch-norm scales them.
    """
    kept = ... if mask is None or not mask.any() else mask
    if importance is not None and balance:
        rows = importance.flatten(1)
        importance = (rows / rows.mean(1, keepdim=True).clamp(min=1e-30)).view(importance.shape)
    counts = None if importance is None else importance[kept]
    codebook, kept_codes = kmeans(weight[kept], 2**bits, importance=counts)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[kept] = kept_codes
    return encoding.Codebook(codes, codebook, mask)


def quantize_network(
    model: nn.Module, *, bits: int | dict[str, int], importance: dict[str, Tensor] | None = None, balance=True
) -> nn.Module:
    """A copy of a network whose convolutions and classifier compute with weights from codebooks.

    `bits` is one width, or one for each layer by name; `importance` has a tensor for each layer, as
    `sensitivity.fisher_diagonal` gives it; balance as of `quantize`. Codebooks can be trained on. A mask
    stays.
    """
    widths, counts = for_each_layer(model, "bits", bits), for_each_layer(model, "importance", importance)

    def rule(name: str, layer: nn.Module) -> encoding.Codebook:
        own = {"bits": widths[name], "importance": counts[name], "mask": encoding.mask_of(layer)}
        return quantize(layer.weight, **own, balance=balance)

    return quantized(model, rule)


def trainable(network: nn.Module) -> nn.Module:
    """Prepare a network of codebooks for fine-tuning, in place: codes stay, levels and batch-norm train.

    The gradient of a level is the sum of its weights' (Han et al., 2016, section 3). It is divided here by
    the root of the weights a level, as the step's of LSQ is (Esser et al., 2020, section 2.2): a rate that
    suits batch-norm would throw the levels away.
    """
    for layer in models.layers(network.spec):
        attached = network.get_submodule(layer.name).parametrizations.weight[0]
        share = (len(attached.codebook) / attached.codes.numel()) ** 0.5
        attached.codebook.register_hook(lambda gradient, share=share: share * gradient)
    return network
