"""Rows as files have them: read, edited, made up."""

import csv
import json

import numpy as np

from nnc_utils import rows, tables


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def edit(folder, **changes):
    path = folder / "result.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(record))


def times(*milliseconds):
    """What is measured of as many rounds as are given; of one, five like it."""
    rounds = milliseconds * (5 if len(milliseconds) == 1 else 1)
    p50 = float(np.median(rounds))
    found = {"p50_ms": p50, "p90_ms": max(rounds), "iqr_ms": 0.0}
    return found | {"rounds_p50_ms": " ".join(map(str, rounds))}


def timed_twice(example):
    """Rows of two networks in two runtimes, the second time with other numbers."""
    networks = [row for folder in example.folders for row in tables.read_run(folder).compression]
    base, int8 = (example.scores[name, 1]["sha256"] for name in ("01_baseline", "02_quantization"))
    milliseconds = {
        ("", base, "eager", "fp32"): 4.0,
        ("", base, "onnxruntime", "fp32"): 2.0,
        ("", int8, "onnxruntime", "int8"): 0.5,
        ("again", base, "eager", "fp32"): 8.0,
        ("again", base, "onnxruntime", "fp32"): 2.0,
        ("again", int8, "onnxruntime", "int8"): 0.4,
    }
    measured = [
        {"control": control, "artifact_sha256": sha256, "runtime": runtime, "precision": precision}
        | {**times(ms), "batch": 1, "threads": 1, "rounds": 5}
        for (control, sha256, runtime, precision), ms in milliseconds.items()
    ]
    return rows.latency_rows(measured, networks, reference_sha256=base)
