"""Checkers of 07_deployment: folding, integer layers, fallbacks, speed-ups and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.exercises import exercise, expect, judge, parts, same, tell
from nnc_utils.runtimes import qdq

SPEC = models.resnet(18, channels=3, size=20, classes=7, stem="small", width=1 / 8)
STEPS = qdq.steps(SPEC)


def column(vector: Tensor) -> Tensor:
    """(out,) beside weights (out, in, k, k)."""
    return vector.view(-1, 1, 1, 1)


@exercise("7.1")
def folding(fold: Callable) -> None:
    """`fold` (weight (out, in, k, k), batch-norm) -> weight and bias of one convolution."""
    weight = torch.linspace(-1, 2, 36).view(2, 2, 3, 3)
    norm = nn.BatchNorm2d(2, eps=0.1).eval().requires_grad_(False)
    norm.weight.copy_(torch.tensor([1.5, -0.7]))  # a negative factor in the second channel
    norm.bias.copy_(torch.tensor([0.4, -0.2]))
    norm.running_mean.copy_(torch.tensor([0.8, -0.5]))
    norm.running_var.copy_(torch.tensor([0.3, 2.0]))
    folded, bias = parts(fold(weight, norm), "weight, bias")

    variance = norm.running_var + norm.eps
    factor = norm.weight / variance.sqrt()
    bare = norm.weight / norm.running_var.sqrt()
    mistakes = [
        (weight * column(bare), "ε is missing: `norm.eps` is added to the variance, below the root."),
        (
            weight * column(norm.weight / variance),
            "You divide by the variance: its square root is asked for.",
        ),
        (weight * column(1 / variance.sqrt()), "γ, which is `norm.weight`, is missing in the factor."),
        (
            weight * factor.view(1, -1, 1, 1),
            "That multiplies the input channels: c counts the outputs, axis 0.",
        ),
    ]
    said = "The folded weight is w · γ / √(σ² + ε), for each output channel."
    judge(folded, weight * column(factor), said, mistakes)
    mean = norm.running_mean
    known = [
        (norm.bias, "The running mean is missing in the bias: β − μ · factor."),
        (norm.bias + mean * factor, "The running mean is subtracted, not added."),
        (norm.bias - mean, "The mean goes through batch-norm as well: multiply μ by the factor."),
        ((norm.bias - mean) * factor, "β is added behind the multiplication: it has no factor."),
    ]
    tell(bias, known)
    images = torch.linspace(-1, 1, 50).view(1, 2, 5, 5)
    wanted = norm(functional.conv2d(images, weight))
    said = "The bias is β − μ · γ / √(σ² + ε)."
    same(functional.conv2d(images, folded, torch.as_tensor(bias)), wanted, said)


@exercise("7.2")
def integer_layer(integers: Callable) -> None:
    """`integers` (codes, scale, factor, bias, input_scale) -> codes, scale of the sums, bias in codes."""
    codes = torch.tensor([[5.0, -3.0], [7.0, 2.0], [-1.0, 6.0]]).view(3, 2, 1, 1)
    scale, input_scale = torch.tensor([0.1, 0.2, 0.05]), 0.04
    factor, bias = torch.tensor([2.0, -0.5, 1.5]), torch.tensor([0.31, -1.0, 0.77])
    given = integers(codes.clone(), scale, factor, bias, input_scale)
    own_codes, own_scale, own_bias = parts(given, "codes, scale of the sums, bias")

    wanted = input_scale * scale * factor.abs()
    known = [
        (input_scale * scale * factor, "A scale is positive: the sign of the factor goes into the codes."),
        (scale * factor.abs(), "The input's scale is missing: the sums are products of both codes."),
        (input_scale * scale, "The factor of batch-norm is missing in the scale: the codes stay."),
    ]
    said = "The scale of the sums is s_x · s_w · |factor|, one for each output channel."
    judge(own_scale, wanted, said, known)
    known = [
        (codes, "Where the factor is negative the codes change their signs; yours do not."),
        (codes * column(factor), "Codes stay whole numbers: only the sign of the factor is theirs."),
    ]
    said = "The codes are those of the file, with the factor's sign."
    judge(own_codes, codes * column(factor.sign()), said, known)
    known = [
        (bias / wanted, "The bias is added to whole numbers: round it."),
        ((bias / (scale * factor.abs())).round(), "The bias is added to the sums: divide by s_x as well."),
        ((bias / (input_scale * scale)).round(), "Divide the bias by the folded scale, with |factor|."),
        ((bias / wanted * factor.sign()).round(), "The bias is folded already: its sign stays."),
        ((bias * wanted).round(), "To get codes, divide the bias by the scale; do not multiply."),
    ]
    said = "The bias in codes is round(b' / (s_x · s_w · |factor|))."
    judge(own_bias, (bias / wanted).round(), said, known)


@exercise("7.3")
def border(multiply: Callable) -> None:
    """`multiply` (inputs, codes, bias, zero_point, stride, padding) -> the sums."""
    inputs = (torch.arange(50.0) * 37 % 256).view(1, 2, 5, 5)
    codes = (torch.arange(54.0) * 5 % 15 - 6).view(3, 2, 3, 3)
    bias = torch.tensor([10.0, -20.0, 300.0])
    given = multiply(inputs, codes, bias, 100, 2, 1)

    plain = functional.conv2d(functional.pad(inputs, [1] * 4, value=100), codes, bias, 2)
    zeros = functional.conv2d(functional.pad(inputs, [1] * 4), codes, bias, 2)
    correction = 100 * codes.sum((1, 2, 3)).view(-1, 1, 1)
    wanted = functional.conv2d(inputs - 100, codes, bias, 2, 1)
    border = "Right inside, wrong along the border: the code 0 is not the number 0 there."
    known = [
        (zeros - correction, border),
        (plain, "The zero-point is never subtracted: z_x · Σ q_w is missing."),
        (zeros, "Pad with the zero-point, and subtract z_x · Σ q_w."),
        (plain + correction, "z_x · Σ q_w is subtracted, not added."),
        (plain - 100 * codes.sum(), "Each output channel has a sum of its own codes: sum over three axes."),
        (wanted - bias.view(-1, 1, 1), "The bias is missing."),
    ]
    judge(given, wanted, "Σ (q_x − z_x) q_w + q_b is asked for, at each pixel.", known)
    given = multiply(inputs, codes[:, :, :1, :1], bias, 0, 1, 0)
    wanted = torch.einsum("oi,nihw->nohw", codes[:, :, 0, 0], inputs) + bias.view(-1, 1, 1)
    same(given, wanted, "It has to hold for a 1 × 1 kernel with zero-point 0 and no padding, too.")


@exercise("7.4")
def fallbacks(fall_back: Callable) -> None:
    """`fall_back` (spec, lost) -> names of the steps that write or read the tensor `lost`."""
    cases = {
        "layer1.0.quant_out": ["layer1.0.add", "layer1.1.conv1", "layer1.1.add"],
        "layer2.0.quant_downsample": ["layer2.0.downsample.0", "layer2.0.add"],
        "layer1.1.quant_out": ["layer1.1.add", "layer2.0.conv1", "layer2.0.downsample.0"],
    }
    for lost, wanted in cases.items():
        given = fall_back(SPEC, lost)
        expect(isinstance(given, list | tuple | set), "A list of the names of steps is asked for.")
        given, writer, readers = sorted(given), wanted[0], wanted[1:]
        first = [step.name for step in STEPS if lost in (step.output, step.inputs[0])]
        outputs = sorted(step.output for step in STEPS if step.name in wanted)
        expect(given != [writer], "You name the writer alone: those that read floats fall back as well.")
        expect(given != sorted(readers), "You name the readers: the step that writes floats falls back, too.")
        expect(given == sorted(wanted) or given != sorted(first), "An addition has two inputs: look at both.")
        expect(given != outputs, "Those are tensors: the names of the steps are asked for.")
        expect(not set(given) - set(wanted), "Some of these neither write nor read the tensor.")
        expect(given == sorted(wanted), f"Without {lost} these fall back: {', '.join(wanted)}.")


@exercise("7.5")
def ratios(speedup: Callable) -> None:
    """`speedup` (ms of each round, runtime -> ms of each round in fp32) -> times as fast."""
    own = [1.0, 1.0, 4.0, 1.2, 1.0]  # the machine was slow in the third round
    quick, other = [3.0, 2.0, 9.0, 3.9, 2.2], [3.5, 1.5, 8.0, 4.0, 3.2]
    fp32 = {"eager": [12.0, 9.0, 40.0, 13.0, 11.0], "onnxruntime": quick, "openvino": other}

    def within(reference: Iterable[float]) -> list[float]:
        return [theirs / mine for theirs, mine in zip(reference, own)]

    median = statistics.median
    given = speedup(own, fp32)
    known = [
        (median(within(fp32["eager"])), "That is against eager: the fastest fp32 runtime is asked for."),
        (1 / median(within(quick)), "Turned round: the fp32 time stands above, the compressed below."),
        (median(quick) / median(own), "Those are medians divided: divide within each round first."),
        (sum(quick) / sum(own), "One slow round rules a sum or a mean of times."),
        (statistics.mean(within(quick)), "One odd round moves a mean: take the median of the ratios."),
        (median(within(map(min, quick, other))), "One runtime for all rounds: choose it by its median."),
        (median(within(other)), "That runtime had one quick round: the fastest has the lowest median."),
    ]
    said = "The median, over the rounds, of fp32 ÷ compressed is asked for."
    judge(given, median(within(quick)), said, known)
    two = speedup([1.0, 2.0], {"eager": [2.0, 8.0]})
    same(two, 3.0, "Of two rounds the median is their mean.")
    same(speedup([2.0], {"eager": [1.0]}), 0.5, "A network that became slower has a speed-up below 1.")


@exercise("7.6")
def memory(peak: Callable) -> None:
    """`peak` (steps, numbers of each tensor) -> the most numbers that are needed at once."""
    names = dict.fromkeys(name for step in STEPS for name in (*step.inputs, step.output))
    falling = {name: 1000 - 13 * place for place, name in enumerate(names)}
    image = dict.fromkeys(names, 10) | {"quant_input": 5000, "quant_stem": 400}
    image_said = "The image is there until the first convolution has read it."
    skip_said = "A block's input waits until it is added: it is needed all the while."
    for sizes, second in ((falling, skip_said), (image, image_said)):
        given = peak(STEPS, dict(sizes))
        wanted = max(_needed(number, sizes) for number in range(len(STEPS)))
        if given != wanted:
            pairs = max(sum(sizes[name] for name in {*s.inputs, s.output}) for s in STEPS)
            waiting = max(_needed(number, sizes, reading=False) for number in range(len(STEPS)))
            known = [
                (sum(sizes.values()), "That keeps every tensor to the end: free what nobody reads again."),
                (max(sizes.values()), "That is one tensor: a step needs its inputs and its output at once."),
                (pairs, skip_said),
                (waiting, "A step reads while it writes: free its inputs after its output is counted."),
            ]
            tell(given, known)
        same(given, wanted, second, tolerance=0)


def _needed(number: int, sizes: dict[str, int], *, reading: bool = True) -> int:
    """Numbers that are alive in a step, by the definition: written already, and read now or later."""
    written = {"quant_input", *(step.output for step in STEPS[: number + 1])}
    later = STEPS[number if reading else number + 1 :]
    read = {name for step in later for name in step.inputs} | {STEPS[number].output}
    return sum(sizes[name] for name in written & read)


@exercise("7.7")
def widths(most_bits: Callable) -> None:
    """`most_bits` (bits of the accumulator, products) -> most bits of a weight's code."""
    cases = [(16, 2), (16, 1), (16, 4), (16, 9), (20, 9), (16, 86), (32, 4608), (16, 200)]
    given = [most_bits(accumulator, products) for accumulator, products in cases]
    known = [
        ([8] * len(cases), "You look at one product: several are added."),
        ([8, 8, 7, 5, 8, 2, 8, 2], "The accumulator has a sign: its largest number is 2^(bits − 1) − 1."),
        ([8, 8, 7, 5, 8, 3, 8, 2], "Inputs are unsigned: they reach 255, not 127."),
        ([6, 7, 5, 3, 7, 0, 8, 0], "Weights have a sign: b bits reach 2^(b − 1) − 1, not 2^b − 1."),
        ([8, 9, 7, 5, 9, 3, 9, 2], "That is the first width that overflows: one bit less fits."),
    ]
    tell(given, known)
    for own, wanted, case in zip(given, [7, 8, 6, 4, 8, 2, 8, 0], cases):
        same(own, wanted, f"{case[0]} bits for {case[1]} products: {wanted} bits fit at most, of 2 to 8.")
