"""Print what an artifact holds: ``python -m nnc_utils.inspect FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnc_utils import artifact, models
from nnc_utils.artifact import Artifact, ArtifactError
from nnc_utils.encoding import Codebook, Dense, Encoding, decode

COLUMNS = ("layer", "shape", "encoding", "bits/weight", "zeros", "bytes", "share")


def describe(found: Artifact) -> str:
    """An artifact as a table of its layers, with what describes the whole file above and below.

    The bytes add up to the file; the share is of the file. Zeros are those of the decoded weight; a mask
    shows in the encoding.
    """
    return "\n".join([*_heading(found), "", *_table(_rows(found)), "", *_ranges(found)])


def _heading(found: Artifact) -> list[str]:
    spec, reference = found.spec, artifact.fp32_bytes(found.spec)
    blocks = ", ".join(str(len(stage)) for stage in spec.stages)
    return [
        f"spec        {spec.block} blocks {blocks}; stem {spec.stem} of width {spec.stem_width}; input "
        f"{spec.channels}x{spec.size}x{spec.size}; {spec.classes} classes",
        f"parameters  {models.parameters(spec):,}, of them {found.nonzeros:,} not zero",
        f"macs        {models.macs(spec):,}",
        f"file        {found.nbytes:,} bytes, {reference / found.nbytes:.2f} times smaller than this Spec's "
        f"state_dict in fp32 ({reference:,} bytes)",
        f"weights     {found.bits_per_weight:.3f} bits each",
        f"simulated   {'yes: no runtime executes the network as stored' if found.simulated else 'no'}",
        f"mean, std   {_numbers(found.mean)}; {_numbers(found.std)}",
        # A foreign file may name its classes with characters that control a terminal.
        f"classes     {', '.join(ascii(name) for name in found.classes)}",
        f"sha256      {found.sha256}",
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _rows(found: Artifact) -> list[tuple[str, ...]]:
    rows, rest = [], found.nbytes
    for name, weight in found.weights.items():
        values = decode(weight)
        zeros, size = values.numel() - int(values.count_nonzero()), sum(found.streams[name].values())
        rows.append(
            (
                name,
                "x".join(map(str, weight.shape)),
                _encoding(weight),
                f"{8 * size / values.numel():.3f}",
                f"{zeros / values.numel():.1%}",
                *_share(size, found),
            )
        )
        rest -= size
    others = {
        "batch-norm, bias": 4 * sum(tensor.numel() for tensor in found.tensors.values()),
        "activation ranges": 5 * len(found.ranges),
    }
    others["header"] = rest - sum(others.values())
    rows += [(name, "", "", "", "", *_share(size, found)) for name, size in others.items()]
    return rows


def _share(size: int, found: Artifact) -> tuple[str, str]:
    return f"{size:,}", f"{size / found.nbytes:.1%}"


def _encoding(weight: Encoding) -> str:
    if isinstance(weight, Dense):
        text = str(weight.values.dtype).removeprefix("torch.")
    elif isinstance(weight, Codebook):
        text = f"codebook of {len(weight.codebook)}"
    else:
        kind = "" if weight.zero_point is None else " affine"
        text = f"{weight.bits}-bit{kind}, scale per {'tensor' if weight.axis is None else 'channel'}"
    return text + (", mask" if weight.mask is not None else "")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = []
    for row in (COLUMNS, *rows):
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _ranges(found: Artifact) -> list[str]:
    if not found.ranges:
        return ["activations are floats: no ranges"]
    lines = ["activations are unsigned 8-bit integers: name, scale, zero-point"]
    width = max(map(len, found.ranges))
    return lines + [f"  {name:<{width}}  {scale:.4g}  {zero}" for name, (scale, zero) in found.ranges.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a file's contents; exit code 2 and one line on stderr when it is no artifact."""
    parser = argparse.ArgumentParser(
        prog="python -m nnc_utils.inspect", description="Print what an artifact holds."
    )
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    try:
        print(describe(artifact.read(path)))
    except (ArtifactError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
