"""Experiments behind the lessons, as a lab notebook: second order, and what hid its worth.

    python workflow/experiments.py ARTIFACT [--data fashion_mnist] [--images 2048]
                                   [--part batch_norm|pruning|codebooks|speed] [--old CHECKOUT]

ARTIFACT is a trained network of this suite. Whatever was chosen was chosen on validation images. `speed` runs
the package of another checkout (--old) and this one in turns, in processor seconds: a busy machine changes
them little.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from nnc_utils import artifact, batch_norm, curvature, data, encoding, evaluation, sensitivity
from nnc_utils.pruning import schedules, unstructured
from nnc_utils.quantization import codebook

try:
    from nnc_utils.pruning import candidates, reconstruct
    from nnc_utils.pruning.reconstruct import corrected, damped
except ImportError:  # `speed` runs this file with an older package, too
    reconstruct = None

OURS = Path(__file__).resolve().parent.parent


def right(network, images, split):
    """Which images of a split a network gets right."""
    chosen = getattr(images, split)
    return evaluation.predict(network, chosen, normalize=images.normalize) == chosen.labels.numpy()


def clamped_repair(changed, seen, original):
    """The historical fault: a channel without variance keeps a mean that says nothing for it.

    The memory's surplus over these images is added in the *dense* network's units. Where the pruned channel's
    deviation is nearly nothing, that surplus is many of its own deviations: a constant that drowns the rest.
    """
    repaired, new = copy.deepcopy(changed), batch_norm.reestimate(changed, seen)
    for norm, now, before in zip(
        *map(norms, (repaired, new, batch_norm.reestimate(original, seen))), strict=True
    ):
        norm.running_mean += now.running_mean - before.running_mean
        norm.running_var *= ((now.running_var + norm.eps) / (before.running_var + norm.eps)).clamp(max=1)
        norm.running_var += (now.running_var - before.running_var).clamp(min=0)
    return repaired


def norms(network):
    return [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def largest_constant(changed, repaired, seen):
    """The mean of a channel behind its repaired batch-norm, in deviations: the worst of all channels."""
    worst = 0.0
    for norm, new in zip(norms(repaired), norms(batch_norm.reestimate(changed, seen)), strict=True):
        constant = (new.running_mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        worst = max(worst, float(constant.abs().max()))
    return worst


def with_mask(dense, kept, moments):
    """A network with this mask, the weights that stay corrected."""
    network = unstructured.masked(dense, kept)
    for name, mask in kept.items():
        weight, moment = dense.get_submodule(name).weight.detach().flatten(1), damped(moments[name])
        now = corrected(weight, mask.flatten(1), moment, start=weight, iterations=12)
        encoding.attach(network.get_submodule(name), encoding.Dense(now.view_as(mask), mask))
    return network


def over_all_layers(dense, curved, sparsity, rounds=3):
    """Optimal Brain Surgeon with both Kronecker factors and one threshold for the scores of all layers."""
    network, moments = dense, {name: one.inputs for name, one in curved.items()}
    inverse = {n: [damped(m).inverse().diagonal() for m in (c.outputs, c.inputs)] for n, c in curved.items()}
    for share in schedules.sparsities(sparsity, "iterative", rounds):
        score = {}
        for name, (rows, columns) in inverse.items():
            layer = network.get_submodule(name)
            square = layer.weight.detach().flatten(1).square() / rows[:, None] / columns
            mask = encoding.mask_of(layer)
            score[name] = square.view_as(layer.weight)
            score[name] = score[name] if mask is None else score[name].masked_fill(~mask, -torch.inf)
        network = with_mask(dense, unstructured.masks(score, share), moments)
    return network


def batch_norm_part(dense, images, seen, labels):
    """Each network as it is, with the faulty repair, with statistics of these images alone, with ours."""
    curved = curvature.curvatures(dense, seen)
    moments = {name: one.inputs for name, one in curved.items()}
    masks = {
        kind: unstructured.masks(unstructured.scores(dense, kind, images=seen, labels=labels), 0.9)
        for kind in ("magnitude", "taylor", "obd_fisher")
    }
    networks = {kind: unstructured.masked(dense, kept) for kind, kept in masks.items()}
    networks["magnitude, corrected"] = with_mask(dense, masks["magnitude"], moments)
    networks["obd_fisher, corrected"] = with_mask(dense, masks["obd_fisher"], moments)
    networks["obs over all layers"] = over_all_layers(dense, curved, 0.9)
    for name, network in {"dense": dense, **networks}.items():
        faulty = clamped_repair(network, seen, dense)
        repairs = {"as it is": network, "faulty": faulty, "plain": batch_norm.reestimate(network, seen)}
        repairs["ours"] = batch_norm.reestimate(network, seen, original=dense)
        shown = {kind: 100 * right(net, images, "validation").mean() for kind, net in repairs.items()}
        shown["worst constant of the faulty one, in deviations"] = largest_constant(network, faulty, seen)
        yield {"90 % zeros, validation": name, **shown}


def pruning_part(dense, images, seen, labels):
    """Masks and corrections, no gradient step, batch-norm re-estimated; paired differences on test images."""
    moments, whole = curvature.input_moments(dense, seen), right(dense, images, "test")
    for sparsity in (0.8, 0.9, 0.95):
        kept = unstructured.masks(unstructured.scores(dense, "magnitude"), sparsity)
        networks = {"magnitude": unstructured.masked(dense, kept)}
        networks["magnitude, corrected"] = with_mask(dense, kept, moments)
        for score in ("obs", "magnitude", "inputs"):
            network = reconstruct.prune_network(dense, seen, sparsity=sparsity, score=score)
            networks[f"reconstruct by {score}"] = network
        for name, network in networks.items():
            network = batch_norm.reestimate(network, seen, original=dense)
            test = right(network, images, "test")
            plain = test if name == "magnitude" else plain  # noqa: F821, the first one is magnitude
            row = {"zeros": sparsity, "network": name}
            row["validation"], row["test"] = (
                100 * right(network, images, "validation").mean(),
                100 * test.mean(),
            )
            yield row | {"to dense": difference(test, whole), "to magnitude": difference(test, plain)}


def codebooks_part(dense, images, seen, labels):
    """K-means by what weights count: the Fisher, with a floor of so many means, balanced over channels.

    Without one of the two a few channels take all levels: the stem alone then ruins the network at 2 bits.
    """
    fisher = sensitivity.fisher_diagonal(dense, seen, seed=1)
    ways = {"k-means": {}, "Fisher": {"importance": fisher, "balance": False}}
    for floor in (1, 3, 10, 30):
        raised = {name: one + floor * one.mean() for name, one in fisher.items()}
        ways[f"Fisher, floor {floor}"] = {"importance": raised, "balance": False}
    ways["Fisher, balanced"] = {"importance": fisher}
    for bits in (2, 3, 4):
        plain = {}
        for name, options in ways.items():
            rounded = codebook.quantize_network(dense, bits=bits, **options).eval()
            repaired = batch_norm.reestimate(rounded, seen, original=dense)
            for kind, network in (("as it is", rounded), ("re-estimated", repaired)):
                ours = right(network, images, "validation")
                plain.setdefault(kind, ours)  # k-means comes first
                row = {"bits": bits, "levels by": name, "batch-norm": kind, "validation": 100 * ours.mean()}
                yield row | {"to k-means": difference(ours, plain[kind])}
    for name, options in ways.items():
        stem_alone = copy.deepcopy(dense)
        counts = options.get("importance", {}).get("conv1")
        own = {"importance": counts, "balance": options.get("balance", True)}
        encoding.attach(stem_alone.conv1, codebook.quantize(dense.conv1.weight, bits=2, **own))
        stem_alone = batch_norm.reestimate(stem_alone, seen, original=dense)
        accuracy = 100 * right(stem_alone, images, "validation").mean()
        yield {"bits": "2 in the stem alone", "levels by": name, "re-estimated, validation": accuracy}


def difference(ours, theirs):
    """Percentage points between two networks on the same images, with the 95 % interval."""
    found = evaluation.paired_interval(compressed_correct=ours, reference_correct=theirs)
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


PARTS = {"batch_norm": batch_norm_part, "pruning": pruning_part, "codebooks": codebooks_part}


def timed(dense, seen):
    """Processor seconds of curvature, correction and re-estimation at 90 % zeros, of the package at hand."""
    start, enough = time.process_time(), len(seen)
    try:
        from nnc_utils.pruning import obs  # the older package

        network = obs.prune_network(dense, curvature.curvatures(dense, seen), sparsity=0.9, rounds=3)
    except ImportError:
        network, enough = reconstruct.prune_network(dense, seen, sparsity=0.9), candidates.NORM_IMAGES
    middle = time.process_time()
    batch_norm.reestimate(network, seen[:enough], original=dense)
    return {"pruned (s)": middle - start, "re-estimated (s)": time.process_time() - middle}


def in_turns(arguments):
    """The older package and this one, each in a process of its own, one after the other, twice."""
    for _ in range(2):
        for name, root in (("old", arguments.old), ("new", OURS)):
            command = [sys.executable, __file__, arguments.artifact, "--part", "timed"]
            command += ["--images", str(arguments.images), "--data", arguments.data]
            environment = os.environ | {"PYTHONPATH": str(Path(root).resolve())}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            print(name, done.stdout.strip(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--part", choices=[*PARTS, "speed", "timed"])
    parser.add_argument("--old", help="a checkout whose package `speed` holds against this one")
    arguments = parser.parse_args()
    if arguments.part == "speed":
        return in_turns(arguments)
    dense, images = artifact.load(arguments.artifact, trainable=True).eval(), data.load(arguments.data)
    order = torch.randperm(len(images.train.labels), generator=torch.Generator().manual_seed(1))
    chosen = order[: arguments.images]
    seen, labels = images.normalize(images.train.images[chosen]), images.train.labels[chosen].long()
    if arguments.part == "timed":
        return print(timed(dense, seen))
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            for row in part(dense, images, seen, labels):
                print(
                    " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
