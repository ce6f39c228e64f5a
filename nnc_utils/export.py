"""Write an artifact as what a runtime loads: ``python -m nnc_utils.export FILE --to onnx --out net.onnx``.

Beside it lies ``net.onnx.json`` with what a program needs to use it: preprocessing and class names. With
``--to web --out site/`` it is a folder with a page in which the networks of one or more files run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnc_utils import artifact as artifacts
from nnc_utils import image_file, runtimes, web
from nnc_utils.artifact import ArtifactError
from nnc_utils.encoding import Uniform
from nnc_utils.runtimes import qdq
from nnc_utils.web import WebError

TARGETS = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
WEB = "web"  # a page, of one or more files
PRECISIONS = ("fp32", "int8")
BOTH = "both"  # precisions, side by side in a page
SATURATES = (
    "8-bit codes: on x86 without VNNI the usual kernels saturate; there use codes of 7 bits, or in "
    "ONNX Runtime the session option session.x64quantprecision=1"
)


class ExportError(ValueError):
    """What cannot be exported, or not to there."""


def export(path: str | Path, *, to: str, out: str | Path, precision: str = "") -> list[Path]:
    """Write an artifact for a runtime; the files written: what the runtime loads, and the .json.

    Parameters
    ----------
    to : one of `TARGETS`.
    out : the file to write, with the suffix of the target: .onnx, .xml (its weights go into a .bin
        beside it) or .pte.
    precision : "fp32", or "int8" for an artifact with activation ranges; unless given int8 where that
        is possible. The network runs once, to see that it does, and an int8 one in integers.

    Raises
    ------
    ExportError, ArtifactError
        Before anything is written; also for a network that the runtime would not run in integers.
    """
    out = Path(out)
    for what, value, allowed in (
        ("target", to, (*TARGETS, WEB)),
        ("precision", precision or "fp32", PRECISIONS),
    ):
        if value not in allowed:
            raise ExportError(f"unknown {what} {value!r}: one of {', '.join(allowed)}")
    if to == WEB:
        raise ExportError("a page is written by export_page")
    runtime = TARGETS[to]
    if why := runtimes.available(runtime, precision):
        raise ExportError(
            f"{to} needs {runtime}: {why} (workflow/setup_env.py --peers installs what is missing)"
        )
    module = runtimes.adapter(runtime)
    if out.suffix != module.SUFFIX:
        raise ExportError(f"{out} for {to}: the name has to end with {module.SUFFIX}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ExportError(f"{out} cannot be written: it has to be a file in a folder that may be written to")
    network = artifacts.read(path)
    precision = precision or ("int8" if network.ranges else "fp32")
    if precision == "int8" and not network.ranges:
        raise ExportError(f"{path} has no activation ranges: calibrate and save it again, or export fp32")
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        try:
            file = runtimes.convert(runtime, Path(path), precision, Path(scratch))
            session, spec = module.load(file, precision, 1), network.spec
            if precision == "int8":
                qdq.check_integer(spec, session.integer_operators, module.INTEGER)
            # XNNPACK refuses what it has no kernel for only now
            session.predict(np.zeros((1, spec.channels, spec.size, spec.size), np.float32))
        except (qdq.LoweringError, RuntimeError, ImportError) as error:
            raise ExportError(f"{path} as {precision} for {to}: {error}") from None
        written = [out.with_suffix(part.suffix) for part in runtimes.files(runtime, file)]
        for part, target in zip(runtimes.files(runtime, file), written):
            shutil.move(part, target)
    written.append(out.with_name(f"{out.name}.json"))
    usage = _usage(network, precision) | ({"largest_batch": module.MOST} if to == "executorch" else {})
    written[-1].write_text(json.dumps(usage, indent=1) + "\n", encoding="utf-8")
    return written


def export_page(files: Sequence[str], *, out: str | Path, precision: str = "") -> list[Path]:
    """Write a folder with a page in which networks run, see `web`; the files in it.

    Parameters
    ----------
    files : artifacts; NAME=FILE gives one a name of its own in the page, otherwise it is the file's.
    out : a folder that is not there yet, or empty.
    precision : as in `export`; or "both": fp32, and int8 of the artifacts with activation ranges.

    Raises
    ------
    ExportError, ArtifactError, WebError
        Before anything is written.
    """
    web.check(Path(out))
    if precision not in ("", BOTH, *PRECISIONS):
        raise ExportError(f"unknown precision {precision!r}: one of {', '.join((*PRECISIONS, BOTH))}")
    with tempfile.TemporaryDirectory() as scratch:
        networks: list[tuple[Path, dict]] = []
        for given in files:
            name, _, path = given.partition("=")
            if not path or len(Path(name).parts) > 1 or Path(given).exists():  # folders are called seed=1
                name, path = "", given
            label = name or Path(path).stem
            both = ("fp32", "int8") if artifacts.read(path).ranges else ("fp32",)
            for which in both if precision == BOTH else (precision,):
                target = Path(scratch) / f"{len(networks)}.onnx"
                _, described = export(path, to="onnx", out=target, precision=which)
                usage = {"label": label} | json.loads(described.read_text(encoding="utf-8"))
                if any(a["label"] == label and a["precision"] == usage["precision"] for _, a in networks):
                    raise ExportError(f"two networks are called {label}: give them names, NAME={path}")
                networks.append((target, usage))
        return web.write(networks, Path(out))


def _usage(network: artifacts.Artifact, precision: str) -> dict:
    """What a program has to know."""
    codes = [w.codes.abs().max() if isinstance(w, Uniform) else 127 for w in network.weights.values()]
    return {
        "input": "float32 (batch, channels, size, size) of the middle square of the image, "
        "each channel (pixel / 255 - mean) / std",
        "reading": image_file.READING
        | {"colours": "grey" if network.spec.channels == 1 else "red, green, blue"},
        "output": "float32 (batch, classes), the largest is the class",
        "channels": network.spec.channels,
        "size": network.spec.size,
        "mean": list(network.mean),
        "std": list(network.std),
        "classes": list(network.classes),
        "precision": precision,
        "artifact_sha256": network.sha256,
    } | ({"note": SATURATES} if precision == "int8" and max(codes) > qdq.SIGNED_SHIFT // 2 else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a file; exit code 2 and one line on stderr where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.export", description=__doc__.partition(":")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="an artifact; for a page several: NAME=FILE")
    parser.add_argument("--to", required=True, help=", ".join((*TARGETS, WEB)))
    parser.add_argument("--out", required=True, type=Path, help="the file to write; for a page a new folder")
    parser.add_argument(
        "--precision",
        default="",
        help="fp32 or int8; int8 where the artifact allows it; for a page also both",
    )
    options = parser.parse_args(arguments)
    try:
        if options.to == WEB:
            written = export_page(options.files, out=options.out, precision=options.precision)
        elif len(options.files) > 1:
            raise ExportError(f"one file at a time to {options.to}, {len(options.files)} given")
        else:
            written = export(options.files[0], to=options.to, out=options.out, precision=options.precision)
    except (ExportError, ArtifactError, WebError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    for file in written:
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
