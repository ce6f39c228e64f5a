"""What a report looks like in a terminal."""

from __future__ import annotations

import textwrap

from tabulate import tabulate

from nnc_utils.doctor import Report
from nnc_utils.doctor.rules import TABLE

COLUMNS = ("layer", "kind", "runs as", "in", "MACs", "share", "reason")
MOST_NAMES = 4
UNKNOWN = "unknown: no rule fits"
WIDTH = 110


def render(report: Report) -> str:
    """The layers as a table, the share of integers, then each rule that was found with its remedy."""
    total = sum(layer.macs for layer in report.layers)
    rows = [
        (
            ascii(layer.name)[1:-1],
            layer.kind,
            layer.runs,
            "integers" if layer.integer else "floats",
            f"{layer.macs:,}" if layer.macs else "",
            f"{layer.macs / total:.1%}" if layer.macs else "",
            ", ".join(layer.rules) or ("" if layer.integer or not layer.macs else UNKNOWN),
        )
        for layer in report.layers
    ]
    right = ("left",) * 4 + ("right",) * 2 + ("left",)
    table = tabulate(rows, COLUMNS, "simple", colalign=right, disable_numparse=True)
    parts = [f"{ascii(report.file)[1:-1]} in {report.runtime}", table, summary(report)]
    return "\n\n".join([*parts, *(_rule(name, layers) for name, layers in report.named().items())])


def summary(report: Report) -> str:
    """How many layers and MACs are in integers, as one line."""
    counts = []
    for kinds, name in ((("conv", "linear"), "layers"), (("add",), "additions")):
        layers = [layer for layer in report.layers if layer.kind in kinds]
        if layers:
            counts.append(f"{sum(layer.integer for layer in layers)} of {len(layers)} {name}")
    return f"MACs in integers: {report.share:.1%} ({', '.join(counts)})"


def _rule(name: str, layers: list[str]) -> str:
    rule = TABLE[name]
    where = [ascii(layer)[1:-1] for layer in layers[:MOST_NAMES]]
    more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
    lines = [f"{name}: {', '.join(where)}{more}" if layers else f"{name}: the file"]
    remedy = f"{rule.remedy}{' (--fix does it in an ONNX file)' if rule.fix else ''}"
    for text in (rule.symptom, f"Remedy: {remedy}"):
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def repaired(found: dict) -> str:
    """What was repaired, as one line."""
    changes = ", ".join(f"{name} {count} times" for name, count in found["changes"].items())
    return (
        f"repaired: {changes}; outputs agree for {found['agreement']:.1%} of the inputs, "
        f"within {found['difference']:.2g} standard deviations"
    )
