"""The table of rules, rules.csv: what keeps a layer in floats or makes it slow, a file large, and what to do.

How a rule on ONNX files is detected stands in onnx_rules.py, on others in the module of their runtime.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate


@dataclass(frozen=True)
class Rule:
    """One row."""

    name: str
    runtime: str  # and the version in which it was seen
    effect: str  # "float", "slow", "accuracy", "bytes", or "share": that is not the whole
    symptom: str
    detected: str
    remedy: str
    fix: str  # "yes" where --fix changes it in an ONNX file


with open(Path(__file__).with_name("rules.csv"), encoding="utf-8", newline="") as _file:
    TABLE = {row["name"]: Rule(**row) for row in csv.DictReader(_file)}


def markdown() -> str:
    """The table for the documentation."""
    columns = ("rule", "seen in", "effect", "symptom", "how it is detected", "remedy", "`--fix`")
    rows = [
        (f"`{r.name}`", r.runtime, r.effect, r.symptom, r.detected, r.remedy, r.fix) for r in TABLE.values()
    ]
    return tabulate(rows, columns, "github", disable_numparse=True)
