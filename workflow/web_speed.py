"""How long networks take in a browser: WebAssembly on one thread, fp32 and int8 side by side.

    python workflow/web_speed.py [NAME=]FILE… [--rounds 31] [--rows FILE.json] [--chromium PATH]

FILE is an artifact; name the uncompressed network first: all others are compared with the first one in fp32.
The page of `nnc_utils.export --to web` does the timing, in headless Chromium: in each round it runs a
batch of each network, and a ratio is the median of the ratios within a round. Nothing else may run meanwhile.
`--rows` writes what `measure.latency` would return, as JSON: `rows.latency_rows` takes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tabulate import tabulate

from nnc_utils import export, web

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def timed(site: Path, chromium: str, rounds: int) -> list[list[float]]:
    """Milliseconds an image, of each network of a folder in each round."""
    from playwright.sync_api import sync_playwright

    with web.served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("#measure:enabled, #message:visible").first.wait_for(timeout=120_000)
        if complaint := page.locator("#message").inner_text():
            raise RuntimeError(complaint)
        milliseconds = page.evaluate("(rounds) => inTurn(() => measure(networks, rounds))", rounds)
        browser.close()
    return milliseconds


def record(network: dict, milliseconds: list[float]) -> dict:
    """The columns of latency.csv that measuring knows."""
    low, median, high, p90 = np.percentile(milliseconds, (25, 50, 75, 90))
    times = {"p50_ms": median, "p90_ms": p90, "iqr_ms": high - low, "throughput": 1000 / median}
    return {
        "runtime": "web",
        "precision": network["precision"],
        "batch": 1,
        "threads": 1,
        "rounds": len(milliseconds),
        "rounds_p50_ms": " ".join(f"{value:.6g}" for value in milliseconds),
        "runtime_bytes": network["bytes"],
        "artifact_sha256": network["artifact_sha256"],
    } | {name: round(float(value), 6) for name, value in times.items()}


def table(networks: list[dict], milliseconds: list[list[float]]) -> str:
    """A line for each network: its file, its time, and how many times as fast it is."""
    times = np.array(milliseconds)
    own = {n["label"]: ms for n, ms in zip(networks, times) if n["precision"] == "fp32"}
    lines = []
    for network, ms in zip(networks, times):
        ratios = [np.median(reference / ms) for reference in (own[network["label"]], times[0])]
        sizes = [network["bytes"] / 1e6, network["gzip_bytes"] / 1e6]
        lines.append([network["label"], network["precision"], *sizes, np.median(ms), *ratios])
    first = f"× {networks[0]['label']} {networks[0]['precision']}"
    names = ["network", "numbers", "MB", "MB gzipped", "one image, ms", "× own fp32", first]
    return tabulate(lines, names, tablefmt="github", floatfmt=("", "", ".2f", ".2f", ".3f", ".2f", ".1f"))


def main() -> int:
    """Export, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="an artifact, or NAME=artifact")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--rows", type=Path, help="a JSON file to write")
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
        networks = json.loads((site / web.NETWORKS).read_text(encoding="utf-8"))["networks"]
        milliseconds = timed(site, options.chromium, options.rounds)
    print(table(networks, milliseconds))
    if options.rows:
        records = [record(network, ms) for network, ms in zip(networks, milliseconds)]
        options.rows.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
