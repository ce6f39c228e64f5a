"""Checkers of 01_baseline: counting, bytes, accuracy and intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nnc_utils import models
from nnc_utils.exercises import exercise, expect, judge, parts, same

SPEC = models.resnet(18, channels=3, size=20, classes=7, stem="small", width=1 / 8)
LAYERS = {layer.name: layer for layer in models.layers(SPEC)}
STEM, SHORTCUT, LAST = LAYERS["conv1"], LAYERS["layer2.0.downsample.0"], LAYERS["fc"]


@exercise("1.1")
def parameters(parameters_of: Callable) -> None:
    """`parameters_of` (layer) -> number of parameters."""
    weights = STEM.in_channels * STEM.out_channels * 9
    given = parameters_of(STEM)
    expect(
        given != weights, "You count the weights alone: batch-norm has a factor and a shift for each channel."
    )
    expect(given != weights + 4 * STEM.out_channels, "Running means and variances are no parameters.")
    expect(given != weights + STEM.out_channels, "Batch-norm has two parameters for each channel, not one.")
    same(given, STEM.parameters, "A 3 × 3 convolution has in × out × 3 × 3 weights, and its batch-norm's.")
    same(parameters_of(SHORTCUT), SHORTCUT.parameters, "A 1 × 1 convolution has a kernel of one weight.")
    same(
        parameters_of(LAST),
        LAST.parameters,
        "The classifier has no batch-norm: it has a bias for each class.",
    )


@exercise("1.2")
def macs(macs_of: Callable) -> None:
    """`macs_of` (layer) -> multiply-accumulate operations for one image."""
    layer = LAYERS["layer2.0.conv1"]  # of stride 2: what comes in is larger than what goes out
    once = layer.in_channels * layer.out_channels * 9
    given = macs_of(layer)
    expect(given != once, "You count one position: the kernel is applied at each pixel of the output.")
    expect(given != once * layer.size_out, "An output of size s has s × s pixels.")
    expect(given != 2 * layer.macs, "Those are floating-point operations: a MAC is one, not two.")
    expect(
        given != 4 * layer.macs,
        "With stride 2 the kernel is applied at the pixels of the output, not the input.",
    )
    same(given, layer.macs, "in × out × kernel² × pixels of the output is asked for.")
    same(macs_of(LAST), LAST.macs, "The classifier multiplies each input with each output once.")


@exercise("1.3")
def length(file_bytes: Callable) -> None:
    """`file_bytes` (layers) -> bytes of parameters and running statistics in float32."""
    layers = list(LAYERS.values())
    weights = sum(layer.parameters for layer in layers)
    channels = sum(layer.out_channels for layer in layers if layer.batch_norm)
    given = file_bytes(layers)
    expect(given != weights + 2 * channels, "Those are numbers: each takes four bytes.")
    expect(given != 32 * (weights + 2 * channels), "Those are bits: a byte has eight.")
    expect(given != 4 * weights, "Batch-norm's running means and variances are in the file, too.")
    expect(given != 4 * (weights + channels), "Batch-norm keeps a mean and a variance for each channel.")
    same(
        given,
        4 * (weights + 2 * channels),
        "Four bytes for each parameter, running mean and variance.",
        tolerance=0,
    )


@exercise("1.4")
def share_of_right(accuracy: Callable) -> None:
    """`accuracy` (batches of predictions and labels) -> percent of the images."""
    labels = np.arange(10)
    batches = [(labels.copy(), labels), (np.array([0, 9]), np.array([0, 1]))]  # 10 of 10, then 1 of 2
    given = accuracy(batches)
    expect(given is not None, "Your function returns nothing: does it end in `return`?")
    expect(
        abs(given - 75) > 1e-9,
        "You average the batches: the last has 2 images and counts as much as one of 10.",
    )
    expect(abs(given - 100) > 1e-9, "You drop the last batch: it is smaller, and its images count.")
    expect(not 0 < given <= 1, "In percent, please: multiply by 100.")
    same(given, 100 * 11 / 12, "11 of 12 images are right here.")
    same(accuracy(batches[1:]), 50.0, "1 of 2 images is right here.")


@exercise("1.5")
def how_sure(half_width: Callable) -> None:
    """`half_width` (accuracy in percent, images) -> half of the 95 % interval, in percentage points."""
    deviation = 100 * (0.9 * 0.1) ** 0.5
    given = half_width(90.0, 400)
    known = [
        (deviation / 20, "That is one standard error: a 95 % interval takes 1.96 of them."),
        (1.96 * deviation, "That is the spread of one image: the mean of n images varies √n times less."),
        (1.96 * deviation / 400, "The standard error falls with the root of n, not with n."),
        (2 * 1.96 * deviation / 20, "That is the whole width: half of it is asked for."),
        (1.96 * deviation / 2000, "In percentage points, please: multiply by 100."),
    ]
    judge(given, 1.96 * deviation / 20, "1.96 · √(p (1 − p) / n), in percentage points, is asked for.", known)
    same(half_width(50.0, 10_000), 0.98, "At 50 % of 10,000 images it is 0.98 percentage points.")


@exercise("1.6")
def paired(interval: Callable) -> None:
    """`interval` (right, before: bool (n,)) -> lower end, mean and upper end in percentage points."""
    before = np.arange(1000) < 900
    right = before.copy()
    right[:30], right[900:920] = False, True  # 30 lost, 20 won
    low, mean, high = map(float, parts(interval(right, before), "lower end, mean, upper end"))
    expect(
        abs(mean - 1.0) > 1e-9, "Compressed minus reference: the network lost more than it won, so below 0."
    )
    expect(abs(mean + 0.01) > 1e-9, "In percentage points, please: multiply by 100.")
    same(mean, -1.0, "The mean of d is −1 percentage point here.")
    d = 100.0 * right - 100.0 * before
    apart = 1.96 * 100 * ((right.var() + before.var()) / 1000) ** 0.5
    expect(
        abs(high - mean - apart) > 1e-6,
        "That ignores the pairs: take the deviation of d, not of the networks.",
    )
    expect(high - mean < 10, "That is the spread of one image: divide by √n.")
    half = 1.96 * np.append(d, [100, -100]).std(ddof=1) / 1000**0.5
    bare = 1.96 * d.std(ddof=1) / 1000**0.5
    expect(
        abs(high - mean - bare) > 1e-6,
        "Add one image that is won and one that is lost before you take the deviation.",
    )
    same((low, high), (-1 - half, -1 + half), "mean ± 1.96 · sd(d) / √n is asked for.", tolerance=1e-3)
    low, mean, high = interval(before, before)
    expect(
        high - low > 0.5,
        "Two networks that differ nowhere may differ on other images: the interval needs a width.",
    )
