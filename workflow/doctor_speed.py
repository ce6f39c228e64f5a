"""Before and after --fix, side by side: ``python workflow/doctor_speed.py ARTIFACT [--data fashion_mnist]``.

From an fp32 artifact come the files that ONNX Runtime's `quantize_static` and NNCF's PyTorch quantization
write with their defaults. Each is repaired, and all are timed in turns in one process: fp32, before, after.
`--csv docs/doctor_speed.csv` keeps the table, for docs/doctor.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from tabulate import tabulate

from nnc_utils import artifact, data, doctor
from nnc_utils.runtimes import qdq
from nnc_utils.runtimes.onnxruntime import session_options

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it compiles for minutes at its first use
CALIBRATION, TESTED = 256, 2000
MARKERS = "<!-- speed:begin -->", "<!-- speed:end -->"
COLUMNS = ("file", "MACs in integers", "ms", "times fp32", "times unfixed", "agreement", "accuracy")


class Reader(quantization.CalibrationDataReader):
    """Gives the calibration images once."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = iter([{"images": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def ort_default(stored: artifact.Artifact, images: np.ndarray, target: Path) -> None:
    """`quantize_static` as it comes."""
    source = target.with_name("source.onnx")
    onnx.save(qdq.onnx_model(stored, "fp32"), source)
    quantization.quantize_static(str(source), str(target), Reader(images))


def nncf_default(stored: artifact.Artifact, images: np.ndarray, target: Path) -> None:
    """`nncf.quantize` of the PyTorch network, stripped and exported as documented."""
    from nnc_utils.runtimes import openvino  # noqa: F401, before nncf: no telemetry

    import nncf  # isort: skip

    network, example = artifact.network(stored).eval(), torch.from_numpy(images[:1])
    dataset = nncf.Dataset([torch.from_numpy(image[None]) for image in images])
    stripped = nncf.strip(nncf.quantize(network, dataset), example_input=example)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    axes = {name: {0: "batch"} for name in ("images", "logits")}
    torch.onnx.export(stripped, (example,), str(target), dynamo=False, dynamic_axes=axes, **names)


def timed(files: list[Path], image: np.ndarray, *, threads: int, rounds: int, seconds: float) -> list[float]:
    """Milliseconds of one image: of each file the median of its rounds, which come in turns."""
    sessions = [
        onnxruntime.InferenceSession(file, session_options(threads), providers=["CPUExecutionProvider"])
        for file in files
    ]
    medians: list[list[float]] = [[] for _ in files]
    for turn in range(rounds + 1):
        for session, found in zip(sessions, medians):
            samples, until = [], time.perf_counter() + seconds
            while len(samples) < 5 or time.perf_counter() < until:
                start = time.perf_counter()
                session.run(None, {"images": image})
                samples.append(1e3 * (time.perf_counter() - start))
            if turn:  # the first one warms up
                found.append(float(np.median(samples)))
    return [float(np.median(found)) for found in medians]


def predictions(file: Path, images: np.ndarray) -> np.ndarray:
    """The class of each image."""
    session = onnxruntime.InferenceSession(file, session_options(1), providers=["CPUExecutionProvider"])
    batches = (images[start : start + 100] for start in range(0, len(images), 100))
    return np.concatenate([session.run(None, {"images": batch})[0].argmax(1) for batch in batches])


def markdown(file: Path) -> str:
    """The kept table, as docs/doctor.md shows it."""
    columns, *rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
    return tabulate(rows, columns, "github", disable_numparse=True)


def write(rows: list[list[str]], file: Path) -> None:
    """Keep the table as CSV, and between the markers of the page beside it."""
    with open(file, "w", encoding="utf-8", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *rows])
    page = file.with_name("doctor.md")
    if page.is_file():
        before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        page.write_text(f"{before}{MARKERS[0]}\n{markdown(file)}\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("artifact", type=Path, help="an fp32 network")
    parser.add_argument("--data", default="fashion_mnist", help="the data set of its images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each visit to a file")
    parser.add_argument("--csv", type=Path, help="keep the table in this file, and in a doctor.md beside it")
    options = parser.parse_args()
    if options.csv and not options.csv.parent.is_dir():
        parser.error(f"--csv {options.csv}: {options.csv.parent} is no folder")
    stored, images = artifact.read(options.artifact), data.load(options.data)
    calibration = images.normalize(images.train.images[:CALIBRATION]).numpy()
    tested = images.normalize(images.test.images[:TESTED]).numpy()
    labels = images.test.labels[:TESTED].numpy()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "tested.npy", tested)
        files = [folder / "fp32.onnx"]
        onnx.save(qdq.onnx_model(stored, "fp32"), files[0])
        for name, make in (("ort", ort_default), ("nncf", nncf_default)):
            before, after = folder / f"{name}.onnx", folder / f"{name}_fixed.onnx"
            make(stored, calibration, before)
            doctor.repair(before, after, inputs=str(folder / "tested.npy"), seconds=600)
            files += [before, after]
        settings = {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
        milliseconds = dict(zip(files, timed(files, tested[:1], **settings)))
        classes = {file: predictions(file, tested) for file in files}
        rows = []
        for i, file in enumerate(files):
            unfixed = files[i - 1] if file.stem.endswith("_fixed") else file
            row = [file.stem, f"{doctor.examine(file).share:.1%}", f"{milliseconds[file]:.3f}"]
            row += [f"{milliseconds[files[0]] / milliseconds[file]:.2f}"]
            row += [f"{milliseconds[unfixed] / milliseconds[file]:.2f}"]
            row += [f"{(classes[file] == other).mean():.2%}" for other in (classes[unfixed], labels)]
            rows.append(row)
    print(tabulate(rows, COLUMNS, "simple", disable_numparse=True))
    if options.csv:
        write(rows, options.csv)


if __name__ == "__main__":
    main()
