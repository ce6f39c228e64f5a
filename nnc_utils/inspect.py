"""Print what an artifact holds: ``python -m nnc_utils.inspect FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from nnc_utils import artifact, models
from nnc_utils.artifact import Artifact, ArtifactError
from nnc_utils.encoding import Codebook, Dense, Encoding, decode

COLUMNS = ("layer", "shape", "encoding", "bits/weight", "zeros", "bytes", "share")


def describe(network: Artifact) -> str:
    """An artifact as a table of its layers, with what describes the whole file above and below.

    The bytes add up to the file; the share is of the file. Zeros are those of the decoded weight; a mask
    shows in the encoding.
    """
    right = ("left",) * 3 + ("right",) * 4
    table = tabulate(_rows(network), COLUMNS, "simple", colalign=right, disable_numparse=True)
    return "\n".join([*_heading(network), "", table, "", *_ranges(network)])


def _heading(network: Artifact) -> list[str]:
    spec, reference = network.spec, artifact.fp32_bytes(network.spec)
    blocks = ", ".join(str(len(stage)) for stage in spec.stages)
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (network.mean, network.std))
    return [
        f"spec        {spec.block} blocks {blocks}; stem {spec.stem} of width {spec.stem_width}; input "
        f"{spec.channels}x{spec.size}x{spec.size}; {spec.classes} classes",
        f"parameters  {models.parameters(spec):,}, of them {network.nonzeros:,} not zero",
        f"macs        {models.macs(spec):,}",
        f"file        {network.nbytes:,} bytes, {reference / network.nbytes:.2f} times smaller than this "
        f"Spec's state_dict in fp32 ({reference:,} bytes)",
        f"weights     {network.bits_per_weight:.3f} bits each",
        f"simulated   {'yes: no runtime executes the network as stored' if network.simulated else 'no'}",
        f"mean, std   {mean}; {std}",
        # A foreign file may name its classes with characters that control a terminal.
        f"classes     {', '.join(ascii(name) for name in network.classes)}",
        f"sha256      {network.sha256}",
    ]


def _rows(network: Artifact) -> list[tuple[str, ...]]:
    sizes = {name: sum(network.streams[name].values()) for name in network.weights}
    others = {
        "batch-norm, bias": 4 * sum(tensor.numel() for tensor in network.tensors.values()),
        "activation ranges": 5 * len(network.ranges),
    }
    others["header"] = network.nbytes - sum(sizes.values()) - sum(others.values())
    rows = []
    for name, size in (sizes | others).items():
        cells = ("", "", "", "")
        if weight := network.weights.get(name):
            values = decode(weight)
            zeros = 1 - int(values.count_nonzero()) / values.numel()
            shape, bits = "x".join(map(str, weight.shape)), 8 * size / values.numel()
            cells = (shape, _encoding(weight), f"{bits:.3f}", f"{zeros:.1%}")
        rows.append((name, *cells, f"{size:,}", f"{size / network.nbytes:.1%}"))
    return rows


def _encoding(weight: Encoding) -> str:
    if isinstance(weight, Dense):
        text = str(weight.values.dtype).removeprefix("torch.")
    elif isinstance(weight, Codebook):
        text = f"codebook of {len(weight.codebook)}"
    else:
        kind = "" if weight.zero_point is None else " affine"
        text = f"{weight.bits}-bit{kind}, scale per {'tensor' if weight.axis is None else 'channel'}"
    return text + (", mask" if weight.mask is not None else "")


def _ranges(network: Artifact) -> list[str]:
    if not network.ranges:
        return ["activations are floats: no ranges"]
    lines, width = [], max(map(len, network.ranges))
    for name, (scale, zero_point) in network.ranges.items():
        lines.append(f"  {name:<{width}}  {scale:.4g}  {zero_point}")
    return ["activations are unsigned 8-bit integers: name, scale, zero-point", *lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a file's contents; exit code 2 and one line on stderr when it is no artifact."""
    parser = argparse.ArgumentParser(
        prog="python -m nnc_utils.inspect", description="What an artifact holds."
    )
    parser.add_argument("file", type=Path)
    try:
        print(describe(artifact.read(parser.parse_args(arguments).file)), flush=True)
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ArtifactError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
