"""Rows as files have them: read, edited, invented."""

import csv
import json

import numpy as np
import pandas as pd

from bench import tables
from nnc_utils import rows
from nnc_utils.configurations import settings_json


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def edit(folder, **changes):
    """Change fields of a run's result.json."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(path, where, **values):
    """Change columns of the first row of a CSV that has the values of `where`; a value may be a function."""
    table = read(path)
    row = next(row for row in table if where.items() <= row.items())
    row |= {column: value(row[column]) if callable(value) else value for column, value in values.items()}
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def times(*milliseconds):
    """What is measured of as many rounds as are given; of one, five like it."""
    rounds = milliseconds * (5 if len(milliseconds) == 1 else 1)
    p50 = float(np.median(rounds))
    return {"p50_ms": p50, "p90_ms": max(rounds), "iqr_ms": 0.0, "rounds_p50_ms": " ".join(map(str, rounds))}


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


class Invented:
    """Rows of compression.csv with predictions in a folder; `wrong`: how many of 1,000 images are."""

    def __init__(self, folder):
        self.folder, self.rows = folder, []
        self.labels = (np.arange(1000) % 10).astype(np.uint8)
        np.save(folder / tables.labels_name("digits"), self.labels)

    def add(
        self,
        method,
        wrong=0,
        *,
        technique="pruning",
        control="",
        seed=1,
        size=100,
        images=200,
        run="03_pruning",
        **settings,
    ):
        sha256 = f"{len(self.rows) + 1:016x}" + "0" * 48
        predictions = self.labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(self.folder / rows.evidence(sha256), predictions)
        row = {
            "dataset": "digits",
            "technique": technique,
            "method": method,
            "settings": settings_json(settings),
        }
        row |= {"control": control, "seed": seed, "artifact_bytes": size, "artifact_sha256": sha256}
        self.rows.append(
            row | {"train_images": images, "run": f"quick/{run}/seed={seed}", "division": "open"}
        )

    @property
    def frame(self):
        return pd.DataFrame(self.rows)
