"""The quick profile of two commits, side by side in one run: wall time, and what each technique reaches.

    python workflow/compare_quick.py OLD [NEW] [--out build/compare_quick]

Each commit (NEW: the one that is checked out) is cloned into a new folder below `--out` and gets
`make benchmark`, set-up included, one after the other: an hour on two cores, on which nothing else may run.
The clones stay there, with their results. NNC_DATA names the folder of data that need not be fetched twice.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TECHNIQUES = ("baseline", "quantization", "pruning", "distillation", "search", "pipeline")


def measured(commit: str, folder: Path) -> dict[str, str]:
    """What `make benchmark` of a commit takes, and the best row of each technique in its tables."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    begin = time.perf_counter()
    failed = subprocess.run(["make", "benchmark", f"PYTHON={sys.executable}"], cwd=folder).returncode
    told = {"all, with set-up": f"{'failed after ' if failed else ''}{time.perf_counter() - begin:.0f} s"}
    if failed:
        return told
    tables = folder / "results/quick"
    for run, record in sorted(json.loads((tables / "provenance.json").read_text(encoding="utf-8")).items()):
        told[run.split("/")[1]] = f"{record['wall_seconds']:.0f} s"
    with open(tables / "summary.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["control"]]
    for technique in TECHNIQUES:
        own = [row for row in rows if row["technique"] == technique]
        if own:  # as the headline: the smallest that is claimed, or else the nearest to its reference
            claimed = [row for row in own if row["headline"] == "1"]
            best = max(claimed or own, key=lambda r: float(r["size_ratio" if claimed else "delta_ci_low"]))
            told[f"{technique}: accuracy"] = f"{float(best['accuracy_mean']):.2f} %"
            low, high = float(best["delta_ci_low"]), float(best["delta_ci_high"])
            told[f"{technique}: difference"] = f"{float(best['delta_mean']):+.2f} [{low:+.2f}, {high:+.2f}]"
            told[f"{technique}: smaller"] = f"{float(best['size_ratio']):.1f}×"
    return told


def main() -> int:
    """Measure both commits and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", default="HEAD", help="default: what is checked out")
    parser.add_argument("--out", type=Path, default=ROOT / "build/compare_quick")
    options = parser.parse_args()
    commits = []
    for name in (options.old, options.new):
        found = subprocess.run(["git", "rev-parse", name], cwd=ROOT, capture_output=True, text=True)
        if found.returncode:
            parser.error(f"{name!r} is no commit of {ROOT.name}")
        commits.append(found.stdout.strip())
    folders = [options.out / commit[:12] for commit in commits]
    if there := [str(folder) for folder in folders if folder.exists()]:
        parser.error(f"{' and '.join(there)} exists: remove it, or give another --out")
    new, old = (measured(commit, folder) for commit, folder in zip(commits[::-1], folders[::-1], strict=True))
    print(f"| | {commits[0][:12]} | {commits[1][:12]} |\n| --- | --- | --- |")
    for name in dict.fromkeys([*new, *old]):
        print(f"| {name} | {old.get(name, '–')} | {new.get(name, '–')} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
