"""Answers to the exercises of 01_baseline."""

import numpy as np


def weights(layer, kernel=2):
    return layer.in_channels * layer.out_channels * (layer.kernel**kernel if layer.kind == "conv" else 1)


def per_channel(layer):
    return 2 * layer.out_channels if layer.batch_norm else layer.out_channels


def by_half(accuracy, n):
    return 1.96 * (accuracy * (100 - accuracy) / n) ** 0.5


def counted(batches):
    predictions, labels = (np.concatenate(side) for side in zip(*batches))
    return 100 * np.mean(predictions == labels)


def means(batches):
    return [100 * np.mean(p == y) for p, y in batches]


def ends(right, before, *, sign=1, scale=100.0, added=(1, -1), root=True):
    d = sign * scale * (right.astype(float) - before)
    half = 1.96 * np.append(d, scale * np.array(added)).std(ddof=1) / (len(d) ** 0.5 if root else 1)
    return d.mean() - half, d.mean(), d.mean() + half


def unpaired(right, before):
    mean = 100 * (right.mean() - before.mean())
    half = 196 * ((right.var() + before.var()) / len(right)) ** 0.5
    return mean - half, mean, mean + half


def channels(layers):
    return sum(layer.out_channels for layer in layers if layer.batch_norm)


def numbers(layers):
    return sum(layer.parameters for layer in layers)


RIGHT = {
    "1.1": [lambda layer: weights(layer) + per_channel(layer)],
    "1.2": [lambda x: x.size_out**2 * weights(x)],
    "1.3": [
        lambda layers: sum(4 * x.parameters + (8 * x.out_channels if x.batch_norm else 0) for x in layers)
    ],
    "1.4": [counted],
    "1.5": [by_half],
    "1.6": [ends],
}
WRONG = {
    "1.1": [
        (weights, "weights alone"),
        (lambda x: weights(x) + x.out_channels, "two parameters for each channel"),
        (lambda x: weights(x) + (4 if x.batch_norm else 1) * x.out_channels, "no parameters"),
        (lambda x: weights(x, 1) + per_channel(x), "3 × 3"),
        (lambda x: x.in_channels * x.out_channels * 9 + per_channel(x), "1 × 1"),
        (lambda x: weights(x) + 2 * x.out_channels, "bias for each class"),
    ],
    "1.2": [
        (weights, "one position"),
        (lambda x: weights(x) * x.size_out, "s × s"),
        (lambda x: 2 * weights(x) * x.size_out**2, "a MAC is one"),
        (lambda x: 4 * weights(x) * x.size_out**2 if x.name == "layer2.0.conv1" else x.macs, "not the input"),
        (lambda x: x.in_channels * x.kernel**2 * x.size_out**2, "in × out"),
    ],
    "1.3": [
        (lambda layers: 4 * numbers(layers), "running means and variances"),
        (lambda layers: 4 * (numbers(layers) + channels(layers)), "a mean and a variance"),
        (lambda layers: numbers(layers) + 2 * channels(layers), "four bytes"),
        (lambda layers: 32 * (numbers(layers) + 2 * channels(layers)), "bits"),
        (lambda layers: 2 * (numbers(layers) + 2 * channels(layers)), "Four bytes"),
    ],
    "1.4": [
        (lambda batches: np.mean(means(batches)), "average the batches"),
        (lambda batches: counted(batches[:-1] or batches), "drop the last batch"),
        (lambda batches: counted(batches) / 100, "In percent"),
        (lambda batches: means(batches)[-1], "11 of 12"),
    ],
    "1.5": [
        (lambda p, n: by_half(p, n) / 1.96, "one standard error"),
        (lambda p, n: by_half(p, n) * n**0.5, "spread of one image"),
        (lambda p, n: by_half(p, n) / n**0.5, "root of n"),
        (lambda p, n: 2 * by_half(p, n), "whole width"),
        (lambda p, n: by_half(p, n) / 100, "percentage points"),
    ],
    "1.6": [
        (lambda right, before: ends(right, before, sign=-1), "below 0"),
        (lambda right, before: ends(right, before, scale=1.0), "percentage points"),
        (unpaired, "ignores the pairs"),
        (lambda right, before: ends(right, before, root=False), "divide by"),
        (lambda right, before: ends(right, before, added=()), "one image that is won"),
        (lambda right, before: ends(right, before)[:2], "In this order"),
    ],
}
