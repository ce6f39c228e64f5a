"""The non-uniform quantizer: a weight becomes the nearest of a few shared values, found by k-means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nnc_utils import encoding
from nnc_utils.quantization.networks import for_each_layer, quantized

STARTS = ("linear", "density", "random", "split")


def kmeans(
    values: Tensor,
    levels: int,
    *,
    importance: Tensor | None = None,
    start: str = "linear",
    seed: int = 0,
    iterations: int = 3000,
) -> tuple[Tensor, Tensor]:
    """Find the few values that stand for many: minimize ``sum(importance * (values - codebook[codes])**2)``.

    Parameters
    ----------
    values : of any shape.
    levels : 1 to 256 centroids.
    importance : what an error counts for each value, at least 0 and of the same shape; all count the
        same when it is None or 0 everywhere.
    start : "linear" (evenly from the smallest value to the largest), "density" (quantiles), "random"
        (different values, drawn) or "split" (all values in one cluster, which splits grow to `levels`).
    seed : of the random start.
    iterations : at most; fewer when nothing changes any more.

    Returns
    -------
    The codebook, float32 in ascending order, and the codes, uint8 in the shape of the values. There are
    fewer centroids than levels where there are fewer different values of an importance above 0.

    Raises
    ------
    ValueError
        For an unknown start, levels out of range, no values, and what is not finite or negative.

    Notes
    -----
    Lloyd's algorithm (1982); with importances Choi et al., 2017, equation 7; starts after Han et al.,
    2016, section 3.2, and Linde et al., 1980 ("split"). In one dimension a cluster is an interval of the
    sorted values, so that an iteration needs no more than its edges: mean and error of a cluster are
    differences of prefix sums. A cluster that gets no value is dropped; while there are fewer than
    `levels`, each iteration splits the one with the largest error at its mean. The result is a local
    minimum, which far-out values or very unequal importances make depend on the start: "split" ends near
    the best, the others may end at twice its error.
    """
    _check(values, levels, importance, start)
    ordered, weights = _sorted(values, importance)
    sums = np.pad(np.cumsum([weights, weights * ordered, weights * ordered**2], axis=1), ((0, 0), (1, 0)))
    centroids = _first(ordered, levels, start, seed)
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


def quantize(
    weight: Tensor,
    *,
    bits: int,
    importance: Tensor | None = None,
    start: str = "linear",
    seed: int = 0,
    mask: Tensor | None = None,
) -> encoding.Codebook:
    """Replace a weight by codes into a codebook of at most ``2**bits`` values (Han et al., 2016).

    Parameters
    ----------
    weight : of any shape.
    bits : 1 to 8.
    importance, start, seed : see `kmeans`.
    mask : bool in the weight's shape, True = kept. What is not kept takes no part and needs no level.

    Raises
    ------
    ValueError
        For other widths, an empty tensor, weights that are not finite, and what `kmeans` refuses.
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}: a whole number from 1 to 8 is needed")
    settings = {"start": start, "seed": seed}
    if mask is None or not mask.any():
        codebook, codes = kmeans(weight, 2**bits, importance=importance, **settings)
        return encoding.Codebook(codes, codebook, mask)
    kept = None if importance is None else importance[mask]
    codebook, kept_codes = kmeans(weight[mask], 2**bits, importance=kept, **settings)
    codes = torch.zeros_like(mask, dtype=torch.uint8)
    codes[mask] = kept_codes
    return encoding.Codebook(codes, codebook, mask)


def quantize_network(
    model: nn.Module,
    *,
    bits: int | dict[str, int],
    importance: dict[str, Tensor] | None = None,
    start: str = "linear",
    seed: int = 0,
) -> nn.Module:
    """A copy of a network whose convolutions and classifier compute with weights from codebooks.

    Parameters
    ----------
    model : a network of `models.build`; not changed.
    bits : one width for all layers, or a width for each layer by name.
    importance : for each layer by name, in its weight's shape, as `sensitivity.fisher_diagonal` gives it.
    start, seed : see `kmeans`.

    Returns
    -------
    The copy; each weight is a torch parametrization whose codebook can be trained on, and
    `artifact.save` writes the codes. An `encoding.ZeroMask` of the network stays.

    Raises
    ------
    ValueError
        For a width out of range, an unknown or missing layer name, a weight that is not finite, and
        what `kmeans` refuses.
    """
    widths = for_each_layer(model, "bits", bits)
    counts = for_each_layer(model, "importance", importance)

    def rule(name: str, layer: nn.Module) -> encoding.Codebook:
        settings = {"importance": counts[name], "start": start, "seed": seed, "mask": encoding.mask_of(layer)}
        return quantize(layer.weight, bits=widths[name], **settings)

    return quantized(model, rule)


# --- Inside k-means -----------------------------------------------------------------------------


def _check(values: Tensor, levels: int, importance: Tensor | None, start: str) -> None:
    if type(levels) is not int or not 1 <= levels <= 256:
        raise ValueError(f"levels is {levels!r}: a whole number from 1 to 256 is needed")
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}: one of {', '.join(STARTS)}")
    if not values.numel():
        raise ValueError(f"a weight of shape {tuple(values.shape)} holds nothing to quantize")
    if broken := int((~torch.isfinite(values)).sum()):
        raise ValueError(f"{broken} weights are not finite: the training diverged")
    if importance is None:
        return
    if importance.shape != values.shape:
        raise ValueError(
            f"the importance has shape {tuple(importance.shape)}, the weight {tuple(values.shape)}: "
            "one number for each weight is needed"
        )
    if broken := int((~(torch.isfinite(importance) & (importance >= 0))).sum()):
        raise ValueError(f"{broken} importances are negative or not finite: numbers of at least 0 are needed")


def _sorted(values: Tensor, importance: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The values that count, ascending, and what they count; float64."""
    flat = values.detach().cpu().flatten()
    if importance is None or not importance.any():
        ordered = np.sort(flat.numpy()).astype(np.float64)
        return ordered, np.ones_like(ordered)
    weights = importance.detach().cpu().flatten()
    flat, weights = flat[weights > 0], weights[weights > 0]
    order = np.argsort(flat.numpy())
    return flat.numpy()[order].astype(np.float64), weights.numpy()[order].astype(np.float64)


def _first(ordered: np.ndarray, levels: int, start: str, seed: int) -> np.ndarray:
    """Where the centroids start, ascending."""
    if start == "linear":
        return np.linspace(ordered[0], ordered[-1], levels)
    if start == "density":
        return np.quantile(ordered, (np.arange(levels) + 0.5) / levels)
    if start == "split":
        return ordered[:1]
    different = np.unique(ordered)
    drawn = np.random.default_rng(seed).choice(different, min(levels, different.size), replace=False)
    return np.sort(drawn)


def _clusters(ordered: np.ndarray, sums: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the error of each cluster; -1 as the error of equal values, which cannot be split.

    The mean is kept within its cluster: where importances are tiny, the prefix sums cancel to noise.
    """
    low, high = ordered[edges[:-1]], ordered[edges[1:] - 1]
    mass, moment, square = np.diff(sums[:, edges])
    mean = np.divide(moment, mass, out=(low + high) / 2, where=mass > 0).clip(low, high)
    return mean, np.where(low < high, np.maximum(square - moment * mean, 0), -1)
