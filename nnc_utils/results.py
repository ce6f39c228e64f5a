"""Results as a notebook or a reader wants them.

Rows (`nnc_utils.rows`), tables (`nnc_utils.tables`) and their text (`nnc_utils.reports`) are made elsewhere
and offered here; here report.md and the README between its markers are written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnc_utils.paired import comparisons, gaps
from nnc_utils.provenance import root, write_atomically
from nnc_utils.publishing import is_restored, publish, restore
from nnc_utils.reports.claimed import HISTORY
from nnc_utils.reports.committed import ALL_PROFILES, EDITED, OLDER, SAME, Tables, committed_profile
from nnc_utils.reports.headline import WORDS, table, verdict
from nnc_utils.reports.sections import FIGURES, report_text
from nnc_utils.reports.times import holding, twice
from nnc_utils.reports.words import STALE, STALE_NOTE
from nnc_utils.rows import (
    AFTER,
    AGAIN,
    CompressionRow,
    LatencyRow,
    SummaryRow,
    compression_row,
    label,
    latency_rows,
)
from nnc_utils.tables import ResultError, artifact_name, read_run

__all__ = [
    "AFTER",
    "AGAIN",
    "ALL_PROFILES",
    "FIGURES",
    "HISTORY",
    "STALE_NOTE",
    "Tables",
    "WORDS",
    "CompressionRow",
    "LatencyRow",
    "ResultError",
    "SummaryRow",
    "committed_profile",
    "comparisons",
    "compression_row",
    "gaps",
    "holding",
    "label",
    "latency_rows",
    "publish",
    "read_run",
    "readme_block",
    "readme_says",
    "report",
    "report_text",
    "table",
    "twice",
    "update_readme",
    "verdict",
    "without_marks",
]

BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def report(profile_dir: Path) -> str:
    """Write ``report.md`` of a profile from its tables, and return its text."""
    text = report_text(profile_dir)
    write_atomically(Path(profile_dir) / "report.md", text + "\n")
    return text


def readme_block(folder: Path) -> str:
    """What the README of a clone shall say between its markers: the best profile that is timed."""
    profile_dir = committed_profile(folder, timed=True) or committed_profile(folder)
    if profile_dir is None:
        return ""
    place = f"results/{profile_dir.name}"
    alt = "Left: test accuracy against times smaller. Right: test accuracy against milliseconds a picture."
    figure = f"![{alt}]({place}/figures/headline.png)\n\n"
    shown = figure if (profile_dir / "figures/headline.png").is_file() else ""
    more = f"{shown}Everything else: [report]({place}/report.md)."
    if files := _kept_files(profile_dir):
        links = [f"[{name}]({place}/artifacts/{file.name})" for name, file in files.items()]
        more += f" Networks that lie in this repository: {', '.join(links)}."
    return "\n\n".join([verdict(profile_dir), table(profile_dir), more])


def _kept_files(profile_dir: Path) -> dict[str, Path]:
    """What the committed networks are called, and where they are."""
    rows = Tables(profile_dir).compression.drop_duplicates("artifact_sha256")
    files = {sha: profile_dir / "artifacts" / artifact_name(sha) for sha in rows["artifact_sha256"]}
    return {
        f"{row['method']} {row['point']}, seed {row['seed']}": files[row["artifact_sha256"]]
        for _, row in rows.iterrows()
        if files[row["artifact_sha256"]].is_file()
    }


def readme_says(folder: Path) -> str:
    """What the README says between its markers now."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultError(f"README.md needs the lines {BEGIN} and {END} once each, in this order")
    return text.split(BEGIN)[1].split(END)[0].strip()


def without_marks(text: str) -> str:
    """A table or report without what it says of older code, which comes and goes with the code around it."""
    text = text.replace(EDITED, SAME).replace(OLDER, SAME).replace(STALE_NOTE, "").replace(STALE, "")
    return text.replace("\n\n\n\n", "\n\n").strip()


def update_readme(folder: Path) -> bool:
    """Write the headline table and figure into the README; True where that changed it."""
    readme_says(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{readme_block(folder)}\n{END}{after}"
    if new != text:
        write_atomically(path, new)
    return new != text


def main() -> None:
    """``python -m nnc_utils.results report``: figure, report.md and README from the tables.

    ``publish`` first makes the tables from the profile's finished runs, however many there are; what
    other machines committed stays beside them. ``restore`` is the way back: it writes run folders from the
    tables, so that another machine goes on where they end, as far as it needs no network but those that
    are committed.
    """
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.results", description=main.__doc__)
    parser.add_argument("command", choices=["report", "publish", "restore"])
    parser.add_argument("--profile", help="default of report: every profile that has tables")
    about = "committed runs whose points fell short: they stay as attempts beside those measured since"
    parser.add_argument("--attempts", nargs="+", default=[], metavar="RUN", help=about)
    options = parser.parse_args()
    if options.command != "report" and not options.profile:
        parser.error(f"{options.command} needs --profile")
    if options.attempts and options.command != "publish":
        parser.error(f"--attempts goes with publish, not with {options.command}")
    if options.command == "restore":
        try:
            written = restore(options.profile)
        except ResultError as error:
            raise SystemExit(str(error)) from None
        print("\n".join([f"{run.folder}" for run in written] or ["every committed run is here"]))
        return
    if options.command == "publish":
        marks = (root() / "results/runs" / options.profile).glob("*/*/result.json")
        try:
            runs = [read_run(mark.parent) for mark in sorted(marks) if not is_restored(mark.parent)]
            folders = [run.folder for run in runs if run.is_evidence]
            publish(folders, options.profile, keep=True, attempts=options.attempts)
        except ResultError as error:
            raise SystemExit(str(error)) from None
    names = [options.profile] if options.profile else [*ALL_PROFILES, "smoke"]
    found = [root() / "results" / name for name in names]
    found = [folder for folder in found if (folder / "compression.csv").is_file()]
    if not found:
        raise SystemExit(f"no tables of {', '.join(names)} in {root() / 'results'}: run the benchmark first")
    import matplotlib

    matplotlib.use("Agg")
    from nnc_utils import figures

    for profile_dir in found:
        figures.write(profile_dir)
        report(profile_dir)
        print(table(profile_dir))
        print(f"\n{profile_dir / 'report.md'} written")
    if (root() / "README.md").is_file() and update_readme(root()):
        print("README.md updated")


if __name__ == "__main__":
    main()
