"""Checkers of 06_pipeline: its stages, its products, its rival and its training."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from nnc_utils import batch_norm, models
from nnc_utils.exercises import exercise, expect, same, tell
from nnc_utils.pruning import channel_removal, channels

SPEC = models.three_stage(1, channels=1, size=6, classes=3, width=0.5)
BUDGET, MULTIPLE = models.macs(SPEC) / 3, 4


@functools.cache
def small_network() -> tuple[models.ResNet, torch.Tensor, torch.Tensor]:
    """A network whose channels differ in worth, 64 images and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = models.build(SPEC).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.2, 2)
        return network, torch.randn(64, 1, 6, 6), torch.arange(64) % 3


def alike(one: models.ResNet, other: models.ResNet, *, statistics: bool) -> bool:
    """Whether two networks of one Spec have the same weights, or the same running means and variances."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    chosen = [(a, b) for (name, a), b in pairs if ("running" in name) == statistics and a.is_floating_point()]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in chosen)


@exercise("6.1")
def prune(prune_to: Callable) -> None:
    """`prune_to` (network, images, labels, *, macs, multiple) -> a narrower network."""
    network, images, labels = small_network()
    given = prune_to(network, images, labels, macs=BUDGET, multiple=MULTIPLE)
    expect(isinstance(given, models.ResNet), "A network is asked for: return what the fourth step gives.")
    macs = models.macs(given.spec)
    expect(macs <= BUDGET, f"Your network has {macs:,} MACs, at most {BUDGET:,.0f} are allowed.")
    widths = [layer.out_channels for layer in models.layers(given.spec)[:-1]]
    expect(not any(width % MULTIPLE for width in widths), f"Not all widths are multiples of {MULTIPLE}.")
    score = channels.scores(network, "fisher", images=images, labels=labels)
    kept = channels.within_macs(SPEC, score, macs=BUDGET, multiple=MULTIPLE)
    removed = channel_removal.remove_channels(network, kept)
    wanted = channels.compensated(network, kept, images)
    are_fisher = given.spec == wanted.spec and torch.allclose(given.bn1.weight, wanted.bn1.weight)
    expect(are_fisher, "Other channels stay than by the Fisher scores of these images and labels.")
    expect(
        not alike(given, removed, statistics=False),
        "The layers have their old weights: they are not compensated for the inputs they lack.",
    )
    expect(
        not alike(given, removed, statistics=True),
        "Batch-norm has the wide network's statistics: re-estimate them, on the narrow network.",
    )
    expect(
        alike(given, wanted, statistics=False),
        "Compensate the network as it is given: batch-norm comes last.",
    )
    expect(
        alike(given, batch_norm.reestimate(wanted, images), statistics=True),
        "Batch-norm's statistics are not those of all these images in the compensated network.",
    )


@exercise("6.2")
def loss(mixed_loss: Callable) -> None:
    """`mixed_loss` (*, student_logits, teacher_logits, labels, temperature, alpha) -> a number."""
    student = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 4.0, -1.0], [2.0, 2.0, -3.0, 0.0]])
    teacher = np.array([[2.0, -1.0, 0.0, 6.0], [0.5, 5.0, 1.0, -2.0], [1.0, 3.0, -1.0, 0.0]])
    labels, t, alpha = np.array([3, 1, 1]), 3.0, 0.7

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def divergence(ours: np.ndarray, theirs: np.ndarray, temperature: float = t) -> float:
        """The mean over the images of KL(theirs || ours)."""
        log_q, log_p = log_softmax(ours / temperature), log_softmax(theirs / temperature)
        return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())

    def given(a: float, ours: np.ndarray = student) -> float:
        both = {"student_logits": torch.tensor(ours), "teacher_logits": torch.tensor(teacher)}
        value = mixed_loss(**both, labels=torch.tensor(labels), temperature=t, alpha=a)
        expect(value is not None, "Your function returns nothing: does it end in `return`?")
        return float(value)

    hard = float(-log_softmax(student)[range(3), labels].mean())
    same(
        given(0.0),
        hard,
        "With α = 0 the cross-entropy with the labels alone is left: mind which term α weighs.",
    )
    soft, answer = divergence(student, teacher), given(alpha)
    for wrong, said in (
        (soft, "T² is missing: softened gradients are smaller, and the factor undoes that."),
        (t * soft, "The factor is the square of T."),
        (t**2 * soft / 4, "kl_div divides by images × classes: divide by the images alone."),
        (soft / 4, "Two bugs are left: kl_div divides by the classes, too, and the factor T² is missing."),
        (t**2 * soft * 3, "The loss is a sum over the batch: the mean over the images is asked for."),
        (
            t**2 * divergence(teacher, student),
            "Student and teacher are swapped: KL(p ‖ q) has the teacher first.",
        ),
        (t**2 * divergence(student, teacher, 1.0), "Divide both logits by T before the softmax."),
    ):
        expect(abs(answer - (1 - alpha) * hard - alpha * wrong) > 1e-6, said)
    same(answer, (1 - alpha) * hard + alpha * t**2 * soft, "(1 − α) · CE + α · T² · KL is asked for.")
    same(given(1.0, teacher) + 1, 1.0, "A student with its teacher's logits has no loss at α = 1.")


@exercise("6.3")
def price(price_for: Callable) -> None:
    """`price_for` (file_bytes, budget, low, high, steps) -> λ."""
    low, high, steps, calls = 1e-11, 1e-7, 7, []

    def file_bytes(lambda_: float) -> int:
        calls.append(lambda_)
        return round(200_000 * (lambda_ / low) ** -0.25)

    for budget in (50_000, 140_000, 200_000):
        calls.clear()
        given = price_for(file_bytes, budget, low, high, steps)
        expect(given is not None, "Your function returns nothing: does it end in `return`?")
        expect(given < 1, "That is a number of bytes: return the λ.")
        called, nbytes = len(calls), file_bytes(given)
        turned = nbytes > budget and given < 2 * low
        expect(not turned, "You go the wrong way: if the middle fits, go on with the smaller λ.")
        expect(
            nbytes <= budget,
            f"Your file has {nbytes:,} bytes, {budget:,} are allowed: return the end that fits.",
        )
        expect(called <= steps + 2, f"You rounded {called} networks: {steps + 1} are enough.")
        exact = low * (200_000 / budget) ** 4
        expect(
            given <= 1.01 * exact * (high / low) ** (1 / 2**steps),
            f"A smaller λ than {given:.1e} fits, too: is your middle that of a log scale?",
        )
    try:
        price_for(file_bytes, 15_000, low, high, steps)
    except ValueError as error:
        expect("15,000" in str(error) or "15000" in str(error), "Your error does not name the budget.")
    else:
        expect(False, "No λ up to `high` fits 15,000 bytes: raise a ValueError.")


@exercise("6.4")
def product(promised: Callable) -> None:
    """`promised` (sizes) -> times smaller."""
    for header in (0, 100):
        sizes = {"dense": 4000, "dense, fp16": 2000, "pruned": 500, "rounded only": 400}
        sizes["pruned, distilled, rounded"] = 160
        sizes = {name: nbytes + header for name, nbytes in sizes.items()}
        dense, half, pruned, rounded, joined = sizes.values()
        given = promised(sizes)
        known = [
            (dense / rounded * dense / pruned, "The step to float16 is in both factors: it counts twice."),
            (
                half / rounded * half / pruned,
                "The step to float16 is in neither factor: rounding's contains it.",
            ),
            (dense / rounded + half / pruned, "Factors multiply: you add them."),
            (rounded / dense * pruned / half, "Times smaller, please: the old size by the new one."),
            (dense / joined, "That is measured: promised is what the two alone would give."),
        ]
        tell(given, known)
        halved = dense / rounded * dense / pruned / 2
        expect(
            not header or abs(given - halved) > 1e-9,
            "A file's header does not halve: take the file in float16.",
        )
        wanted = dense / rounded * half / pruned
        same(
            given,
            wanted,
            "Rounding's factor from float32 times pruning's between float16 files is asked for.",
        )


@exercise("6.5")
def grid(share_on_grid: Callable) -> None:
    """`share_on_grid` (weight (out, ...), scale (out,)) -> share from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (4, 4, 3, 3), generator=generator).float()
    codes[3] = 0.0  # a channel of zeros is on its grid
    scale = torch.tensor([0.013, 0.029, 0.37, 0.05])
    step = scale.view(-1, 1, 1, 1)
    left = codes.clone()
    left[:, 0] += 0.3  # a quarter has left
    given = share_on_grid(left * step, scale)
    expect(given is not None, "Your function returns nothing: does it end in `return`?")
    expect(float(given) <= 1, "A share from 0 to 1 is asked for, not percent or a count.")
    expect(
        abs(given - 0.25) > 1e-6, "That is the share that has left its integers: count those that are on one."
    )

    def share(steps: torch.Tensor) -> float:
        off = left * step / steps
        return float(((off - off.round()).abs() <= 1e-4).float().mean())

    said = "Each output channel has a step of its own: you take one for all."
    for one in (scale.max(), scale.mean(), scale.min(), scale[0]):
        expect(abs(given - share(one)) > 1e-6, said)
    expect(
        abs(given - share(scale.view(1, -1, 1, 1))) > 1e-6,
        "Your steps lie along the inputs, not the outputs.",
    )
    near = torch.where(codes > 0, codes - 4e-5, codes + 4e-5) * step
    said = "Up to a ten-thousandth of a step to either side is still on the integer."
    same(share_on_grid(near, scale), 1.0, said)
    said = "A weight a hundredth of a step from its integer has left it."
    same(share_on_grid((codes + 0.01) * step, scale), 0.0, said)
    same(given, 0.75, "A quarter of these weights was moved by 0.3 steps: three quarters are on an integer.")
    linear = torch.tensor([[1.0, -2.5], [3.0, 0.0]])
    said = (
        "Of a linear layer (2, 2) three of four weights are on an integer: give the steps as many dimensions."
    )
    same(share_on_grid(linear * scale[1:3, None], scale[1:3]), 0.75, said)


@exercise("6.6")
def width(rival_width: Callable) -> None:
    """`rival_width` (macs_of, budget) -> width."""

    def macs_of(width: float) -> int:
        return models.macs(models.resnet(18, channels=3, size=8, classes=10, stem="small", width=width))

    widths = [1 - 0.005 * step for step in range(200)]
    whole = macs_of(1.0)
    for fewer in (20, 3):
        budget = whole / fewer
        given = rival_width(macs_of, budget)
        expect(given is not None, "Your function returns nothing: does it end in `return`?")
        expect(given <= 1, "A width from 0 to 1 is asked for: return that, not its MACs.")
        expect(
            abs(given - 1 / fewer) > 1e-3, "MACs fall about with the square of the width, not with the width."
        )
        root = fewer**-0.5
        expect(abs(given - root) > 1e-3, "Only about with the square: the stem's MACs do not. Ask `macs_of`.")
        macs = macs_of(given)
        expect(
            macs <= budget,
            f"At width {given:.3f} there are {macs:,} MACs, at most {budget:,.0f} are allowed.",
        )
        wanted = next(width for width in widths if macs_of(width) <= budget)
        expect(abs(given - 0.005) > 1e-6, "That is the narrowest: the largest width that fits is asked for.")
        expect(abs(given - wanted) < 1e-6, f"Width {given:.3f} fits, and so does a larger one of the list.")
    exactly = rival_width(lambda width: round(1000 * width), 500)
    same(exactly, 0.5, "A network with exactly the MACs of the budget fits.")
    none = rival_width(lambda width: 1000, 500)
    same(none, 0.005, "Where no width fits, return the narrowest.")


@exercise("6.7")
def training(lengths: Callable) -> None:
    """`lengths` (stages, epochs, total) -> stage -> epochs."""
    epochs, stages = {"prune": 0.5, "distill": 1.0, "quantize": 0.5}, ["prune", "distill"]
    given = lengths(stages, epochs, 2.0)
    expect(isinstance(given, dict), "A mapping is asked for: stage -> epochs.")
    expect(
        set(given) == set(stages),
        f"Lengths of {', '.join(stages)} are asked for, you give {', '.join(given)}.",
    )
    for wrong, said in (
        ((0.5, 1.0), "These train less than all three stages: share out what the omitted stage leaves."),
        ((1.0, 1.0), "Each gets as much: a stage twice as long by itself stays twice as long."),
        ((0.5, 1.5), "The last stage gets all that is left: each gets its share of it."),
        ((0.75, 1.25), "What is left is halved: multiply all lengths by one factor."),
        ((0.375, 0.75), "The factor is upside down: `total` by the sum of the lengths."),
        ((1.0, 2.0), "Your factor is `total` itself: divide it by the sum of the lengths."),
    ):
        expect(max(abs(given[s] - w) for s, w in zip(stages, wrong)) > 1e-9, said)
    same(
        [given[s] for s in stages],
        [2 / 3, 4 / 3],
        "All lengths are multiplied by one factor; they sum to `total`.",
    )
    longer = lengths(["distill"], epochs, 5.0)
    same(longer["distill"], 5.0, "A stage that stands alone gets all of `total`, here 5 epochs.")
    free = lengths(["narrow", "distill"], epochs, 2.0)
    same([free["narrow"], free["distill"]], [0.0, 2.0], "A stage without an entry trains for 0 epochs.")
