"""report.md of a profile and the README's headline: ``report.md.j2`` and ``headline.md.j2`` over `Tables`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench import claims, committed, goals, pairs, papers
from bench.candidates import title
from bench.committed import ALL_PROFILES, Tables, committed_profile
from bench.publish import is_restored, publish, restore
from bench.tables import ResultError, artifact_name, read_run
from nnc_utils import rows
from nnc_utils.provenance import root, write_atomically

FIGURES = {  # in figures/ of a profile, and what they show
    "headline": "Size against accuracy, and accuracy against milliseconds",
    "waterfall": "Bytes, milliseconds and accuracy after each stage of the pipeline",
}
HISTORY = "history.md"  # what the test set had seen before what is claimed was built, in the authors' words
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def report_text(profile_dir: Path) -> str:
    """What ``report.md`` of a profile says, from its tables."""
    return _render("report.md.j2", Tables(profile_dir), place="")


def report(profile_dir: Path) -> str:
    """Write ``report.md`` of a profile, and return its text."""
    text = report_text(profile_dir)
    write_atomically(Path(profile_dir) / "report.md", text + "\n")
    return text


def headline(profile_dir: Path, place: str = "") -> str:
    """Three sentences and a table of at most six rows; `place`: where links to the profile's files lead."""
    return _render("headline.md.j2", Tables(profile_dir), place=place)


def _render(template: str, tables: Tables, **values: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    words = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    history = tables.folder / HISTORY
    words.filters |= {
        "factor": _factor,
        "delta": _delta,
        "within": rows.within,
        "number": lambda value, form="", missing="–": missing if pd.isna(value) else format(value, form),
        "seeds": goals.seeds_text,
        "records": lambda frame: [row for _, row in frame.iterrows()],
        "title": title,
    }
    words.globals |= {
        "others": lambda: [Tables(folder) for folder in _others(tables.folder)],
        "answers": goals.answers,
        "papers": papers.lines,
        "another_teacher": pairs.another_teacher,
        "committed": committed,
        "counted": lambda told: Counter(pair.verdict.removesuffix(pairs.LARGER) for pair in told),
        "figures": {n: alt for n, alt in FIGURES.items() if (tables.folder / f"figures/{n}.png").is_file()},
        "history": history.read_text(encoding="utf-8").strip() if history.is_file() else "",
        "key": lambda row: tuple(row[committed.KEY]),
        "least": rows.NO_LOSS,
        "apart": rows.APART,
        "needed": claims.SEEDS_OF_A_CLAIM,
        "files": _kept_files(tables),
    }
    text = words.get_template(template).render(t=tables, **values).strip()
    return "\n".join(line.rstrip() for line in text.splitlines())


def _delta(row: Any) -> str:
    """A difference with its interval, of a row of either table."""
    return rows.interval_text(
        row if "accuracy_delta" in row else {**row, "accuracy_delta": row["delta_mean"]}
    )


def _factor(value: float | None) -> str:
    """How many times smaller or faster."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _others(folder: Path) -> list[Path]:
    """The committed tables of the other profiles beside these, the best first."""
    folders = [folder.parent / name for name in ALL_PROFILES]
    return [other for other in folders if other != folder and (other / "compression.csv").is_file()]


def _kept_files(tables: Tables) -> list[tuple[str, str]]:
    """The committed networks: what each is called, and its file in the profile's folder."""
    networks = tables.compression.drop_duplicates("artifact_sha256")
    named = [
        (f"{title(row)}, seed {row['seed']}", f"artifacts/{artifact_name(row['artifact_sha256'])}")
        for _, row in networks.iterrows()
    ]
    return [(name, file) for name, file in named if (tables.folder / file).is_file()]


def readme_block(folder: Path) -> str:
    """What the README of a clone shall say between its markers: the best profile that is timed."""
    profile_dir = committed_profile(folder, timed=True) or committed_profile(folder)
    return headline(profile_dir, f"results/{profile_dir.name}/") if profile_dir else ""


def readme_says(folder: Path) -> str:
    """What the README says between its markers now."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultError(f"README.md needs the lines {BEGIN} and {END} once each, in this order")
    return text.split(BEGIN)[1].split(END)[0].strip()


def update_readme(folder: Path) -> bool:
    """Write the headline into the README; True where that changed it."""
    readme_says(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    new = f"{text.split(BEGIN)[0]}{BEGIN}\n{readme_block(folder)}\n{END}{text.split(END)[1]}"
    if new != text:
        write_atomically(path, new)
    return new != text


def main(arguments: list[str]) -> int:
    """Run ``report``: figures, report.md and README from the tables. ``publish`` first makes the tables from
    the profile's finished runs, beside what other machines committed; ``restore`` is the way back.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("command", choices=["report", "publish", "restore"])
    parser.add_argument("--profile", help="default of report: every profile that has tables")
    attempts = "committed runs that fell short: they stay as attempts beside those measured since"
    parser.add_argument("--attempts", nargs="+", default=[], metavar="RUN", help=attempts)
    options = parser.parse_args(arguments)
    if options.command != "report" and not options.profile:
        parser.error(f"{options.command} needs --profile")
    try:
        if options.command == "restore":
            written = [str(run.folder) for run in restore(options.profile)]
            print("\n".join(written or ["every committed run is here"]))
            return 0
        if options.command == "publish":
            publish_finished(options.profile, options.attempts)
    except ResultError as error:
        raise SystemExit(str(error)) from None
    names = [options.profile] if options.profile else [*ALL_PROFILES, "smoke"]
    folders = [
        folder for name in names if ((folder := root() / "results" / name) / "compression.csv").is_file()
    ]
    if not folders:
        raise SystemExit(f"no tables of {', '.join(names)} in {root() / 'results'}: run the benchmark first")
    import matplotlib

    matplotlib.use("Agg")
    from nnc_utils import figures

    for folder in folders:
        figures.write(folder)
        report(folder)
        print(f"{headline(folder)}\n\n{folder / 'report.md'} written")
    if (root() / "README.md").is_file() and update_readme(root()):
        print("README.md updated")
    return 0


def publish_finished(profile: str, attempts: list[str]) -> Path:
    """Make a profile's tables of its finished runs, however many there are."""
    marks = sorted((root() / "results/runs" / profile).glob("*/*/result.json"))
    finished = [read_run(mark.parent) for mark in marks if not is_restored(mark.parent)]
    return publish([run.folder for run in finished if run.is_evidence], profile, keep=True, attempts=attempts)
