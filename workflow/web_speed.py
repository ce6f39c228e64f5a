"""How long networks take in a browser: WebAssembly on one thread, fp32 and int8 side by side.

    python workflow/web_speed.py [NAME=]FILE… [--rounds 31] [--ways] [--out docs] [--chromium PATH]

FILE is an artifact; name the uncompressed network first: all others are compared with the first one in fp32.
The page of `nnc_utils.export --to web` does the timing, in headless Chromium: in each round it runs a
batch of each network, and a ratio is the median of the ratios within a round. Nothing else may run meanwhile.
`--out docs` writes docs/browser.csv and the table in docs/browser.md. `--ways` also times other ways to write
the same integers down (`WAYS`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd
from onnx import numpy_helper
from tabulate import tabulate

from nnc_utils import artifact, export, provenance, web
from nnc_utils.runtimes import qdq

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPENED = """async (options) => {
  for (const [place, network] of networks.entries()) {
    network.session = await ort.InferenceSession.create(await unpacked(network), options[place]);
  }
}"""
MARKERS = ("<!-- speed:begin -->", "<!-- speed:end -->")
HEADINGS = {
    "network": "network",
    "numbers": "numbers",
    "file_mb": "file, MB",
    "gzip_mb": "gzipped, MB",
    "p50_ms": "one image, ms",
    "times_own_fp32": "× its own fp32",
    "times_first": "× the first, fp32",
}
GOALS = (4, 100)
DIGITS = ("", "", ".3f", ".3f", ".3f", ".2f", ".1f")


# --- Ways to write the same integers down ---------------------------------------------------------


def unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """U8 weights with zero-point 128 in place of S8 ones: kernels that take only U8 need not convert."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".weight.codes", ".weight.zero_point")):
            shifted = numpy_helper.to_array(tensor).astype(np.int16) + qdq.SIGNED_SHIFT
            tensor.CopyFrom(numpy_helper.from_array(shifted.astype(np.uint8), tensor.name))
    return model


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Integer operators in place of quantize/dequantize pairs, which the browser then need not match."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        options.log_severity_level = 3
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


WAYS = {  # what is timed beside int8 (U8 activations, S8 weights, pairs) -> its graph, the session's options
    "int8, U8 weights": (lambda network: unsigned_weights(qdq.onnx_model(network, "int8")), {}),
    "int8, pairs folded": (lambda network: folded(qdq.onnx_model(network, "int8")), {}),
    "int8, S8 activations": (
        lambda network: qdq.onnx_model(network, "s8s8"),
        {"extra": {"session": {"qdqisint8allowed": "1"}}},
    ),
    "int8, channels not last": (
        lambda network: qdq.onnx_model(network, "int8"),
        {"graphOptimizationLevel": "extended"},
    ),
}


def add_ways(site: Path, files: Sequence[str]) -> None:
    """Put the other ways of each int8 network into an exported folder."""
    described = json.loads((site / web.NETWORKS).read_text(encoding="utf-8"))
    paths = [Path(file if Path(file).exists() else file.partition("=")[2]) for file in files]
    stored = {network.sha256: network for network in map(artifact.read, paths)}
    for network in [n for n in described["networks"] if n["precision"] == "int8"]:
        for way, (graph, options) in WAYS.items():
            target = site / f"network{len(described['networks']) + 1}.onnx.gz"
            content = graph(stored[network["artifact_sha256"]]).SerializeToString()
            packed = web.packed(content, target)
            described["networks"].append(network | packed | {"precision": way, "options": options})
    (site / web.NETWORKS).write_text(json.dumps(described), encoding="utf-8")


# --- Measure --------------------------------------------------------------------------------------


def timed(site: Path, networks: list[dict], chromium: str, rounds: int) -> tuple[list[list[float]], str]:
    """Milliseconds an image, of each network of a folder in each round; the browser."""
    from playwright.sync_api import sync_playwright

    options = [{"executionProviders": ["wasm"]} | network.get("options", {}) for network in networks]
    with web.served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("#measure:enabled, #message:visible").first.wait_for(timeout=120_000)
        if complaint := page.locator("#message").inner_text():
            raise RuntimeError(complaint)
        page.evaluate(OPENED, options)
        milliseconds = page.evaluate("(rounds) => inTurn(() => measure(networks, rounds))", rounds)
        name = f"Chromium {browser.version}"
        browser.close()
    return milliseconds, name


def rows(networks: list[dict], milliseconds: list[list[float]]) -> pd.DataFrame:
    """A row for each network: its file, its time, and how many times as fast it is."""
    times = np.array(milliseconds)
    own = {n["label"]: ms for n, ms in zip(networks, times) if n["precision"] == "fp32"}
    lines = []
    for network, ms in zip(networks, times):
        low, median, high = np.percentile(ms, (25, 50, 75))
        line = {"network": network["label"], "numbers": network["precision"]}
        line |= {"file_mb": network["bytes"] / 1e6, "gzip_mb": network["gzip_bytes"] / 1e6}
        line |= {"p50_ms": median, "iqr_ms": high - low, "rounds": len(ms)}
        line |= {"times_own_fp32": np.median(own[network["label"]] / ms)}
        line |= {"times_first": np.median(times[0] / ms), "artifact_sha256": network["artifact_sha256"]}
        lines.append(line)
    return pd.DataFrame(lines).round(4)


def text(measured: pd.DataFrame) -> str:
    """What docs/browser.md says of the rows of docs/browser.csv."""
    table = tabulate(
        measured[list(HEADINGS)].values.tolist(),
        list(HEADINGS.values()),
        tablefmt="github",
        floatfmt=DIGITS,
    )
    about, most = measured.iloc[0], measured[measured["numbers"] != "fp32"].max(numeric_only=True)
    lines = [
        f"{about['browser']}, onnxruntime-web {about['runtime']}, one thread, {about['cpu']}. Medians of",
        f"{about['rounds']} rounds; × is the median of the ratios within a round. The goals were int8",
        f"{GOALS[0]} times as fast as its own fp32, and {GOALS[1]} times as fast as the first in fp32;",
        f"the most here is {most['times_own_fp32']:.1f} and {most['times_first']:.1f}.",
    ]
    return "\n".join([table, "", *lines])


def write(measured: pd.DataFrame, folder: Path) -> None:
    """Write browser.csv, and its table between the markers of browser.md."""
    measured.to_csv(folder / "browser.csv", index=False)
    page = folder / "browser.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    page.write_text(f"{before}{MARKERS[0]}\n{text(measured)}\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> int:
    """Export, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="an artifact, or NAME=artifact")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--ways", action="store_true", help="also other ways to write int8 down")
    parser.add_argument("--out", type=Path, help="the folder of browser.csv and browser.md to write")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, BROWSERS)), ""))
    options = parser.parse_args()
    if not options.chromium:
        print("no Chromium here: apt-get install chromium, or name it with --chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        try:
            export.export_page(options.files, out=site, precision=export.BOTH)
        except (export.ExportError, export.ArtifactError, export.WebError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        if options.ways:
            add_ways(site, options.files)
        networks = json.loads((site / web.NETWORKS).read_text(encoding="utf-8"))["networks"]
        milliseconds, browser = timed(site, networks, options.chromium, options.rounds)
    about = {"browser": browser, "runtime": web.VERSION, "cpu": provenance.hardware()["cpu"]}
    measured = rows(networks, milliseconds).assign(**about)
    print(text(measured))
    if options.out:
        write(measured, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
