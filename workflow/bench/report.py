"""report.md and details.md of a profile, from its `Tables`; the README's parts are in `bench.readme`."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench import claims, committed, federated, goals, pairs, papers, two_data_sets
from bench.candidates import title
from bench.committed import ALL_PROFILES, Tables
from bench.publish import is_restored, publish, restore
from bench.tables import ResultError, read_run
from nnc_utils import figures, rows
from nnc_utils.provenance import root, write_atomically

FIGURES = {  # in figures/ of a profile, and what they show
    "headline": "Size against accuracy, and accuracy against milliseconds",
    "waterfall": "Bytes, milliseconds and accuracy after each stage of the pipeline",
    "quantization": "Quantized networks: times smaller against test accuracy",
    "pruning": "Pruned networks: times fewer multiplications against test accuracy",
    "distillation": "Students: parameters against test accuracy",
    "search": "Searched networks: parameters against test accuracy",
    "federated": "Validation accuracy against megabytes sent in both directions, by Dirichlet value",
    "pipeline": "Pipelines and their rivals: times smaller against test accuracy",
}
HEADINGS = {  # technique -> its heading
    "quantization": "Quantization: fewer bits for each weight",
    "pruning": "Pruning: fewer weights, fewer channels",
    "distillation": "Distillation: a small network learns from a large one",
    "search": "Architecture search: another shape",
    "pipeline": "Pipelines: several stages, one after the other",
}
HISTORY = "history.md"  # what the test set had seen before what is claimed was built, in the authors' words
NAMES = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "scikit-learn's digits"}
TEXTS = ("report", "details")  # .md of a profile


def text(profile_dir: Path, name: str = "report") -> str:
    """What ``report.md`` or ``details.md`` of a profile says; or the headline, without its figure."""
    tables = Tables(profile_dir)
    place = None if name == "headline" else ""
    return tidy(template(f"{name}.md.j2", tables).render(t=tables, place=place))


def write(profile_dir: Path) -> None:
    """Write the texts of a profile."""
    for name in TEXTS:
        write_atomically(Path(profile_dir) / f"{name}.md", text(profile_dir, name) + "\n")


def tidy(rendered: str) -> str:
    """Without spaces at the ends of lines, and with one empty line at most."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in rendered.strip().splitlines()))


def template(name: str, tables: Tables) -> jinja2.Template:
    """A template with the words that it may use."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    words = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    history = tables.folder / HISTORY
    words.filters |= {
        "factor": factor,
        "delta": _delta,
        "within": rows.within,
        "megabytes": lambda count: f"{count / 1e6:.{1 if count >= 1e6 else 2}f} MB",
        "number": lambda value, form="", missing="–": missing if pd.isna(value) else format(value, form),
        "seeds": goals.seeds_text,
        "records": lambda frame: [row for _, row in frame.iterrows()],
        "title": title,
    }
    words.globals |= {
        "others": lambda: [
            its for its in map(Tables, _others(tables.folder)) if its.dataset == tables.dataset
        ],
        "both": two_data_sets.both,
        "side": two_data_sets,
        "answers": goals.answers,
        "goals_of": lambda kind: [goal for goal in goals.read() if goal["kind"] == kind],
        "papers": papers.lines,
        "another_teacher": pairs.another_teacher,
        "committed": committed,
        "rounds": lambda: federated.of(tables.folder),
        "second_tasks": committed.second_tasks,
        "counted": lambda told: Counter(pair.verdict.removesuffix(pairs.LARGER) for pair in told),
        "verdicts": lambda technique: tables.told(technique)[:3],
        "headings": HEADINGS,
        "runtime": figures.name,
        "name_of": lambda dataset: NAMES.get(dataset, dataset),
        "figures": {n: alt for n, alt in FIGURES.items() if (tables.folder / f"figures/{n}.png").is_file()},
        "scaling": lambda: _scaling(tables.profile),
        "history": history.read_text(encoding="utf-8").strip() if history.is_file() else "",
        "key": lambda row: tuple(row[committed.KEY]),
        "least": rows.NO_LOSS,
        "apart": rows.APART,
        "needed": claims.SEEDS_OF_A_CLAIM,
    }
    return words.get_template(name)


def _delta(row: Any) -> str:
    """A difference with its interval, of a row of either table."""
    return rows.interval_text(
        row if "accuracy_delta" in row else {**row, "accuracy_delta": row["delta_mean"]}
    )


def factor(value: float | None) -> str:
    """How many times smaller or faster."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _scaling(profile: str) -> pd.DataFrame | None:
    """What more nodes would save of `full`, a row each; simulated from the seconds of `standard`."""
    file = root() / "docs/scaling.csv"
    if profile != "standard" or not file.is_file():
        return None
    table = pd.read_csv(file)
    return table[table["graph"] == "full"].set_index("nodes")


def _others(folder: Path) -> list[Path]:
    """The committed tables of the other profiles beside these, the best first."""
    folders = [folder.parent / name for name in ALL_PROFILES]
    return [other for other in folders if other != folder and (other / "compression.csv").is_file()]


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
    except (ResultError, OSError) as error:
        raise SystemExit(str(error)) from None
    names = [options.profile] if options.profile else [*ALL_PROFILES, "smoke"]
    folders = [
        folder for name in names if ((folder := root() / "results" / name) / "compression.csv").is_file()
    ]
    if not folders:
        raise SystemExit(f"no tables of {', '.join(names)} in {root() / 'results'}: run the benchmark first")
    from bench import readme  # draws and writes, which no other command needs

    for folder in folders:
        readme.draw(folder)
        write(folder)
        print(f"{text(folder)}\n\n{folder / 'report.md'} written")
    if (root() / "README.md").is_file() and readme.update(root()):
        print("README.md updated")
    return 0


def publish_finished(profile: str, attempts: list[str]) -> Path:
    """Make a profile's tables of its finished runs, however many there are."""
    marks = sorted((root() / "results/runs" / profile).glob("*/*/result.json"))
    finished = [read_run(mark.parent) for mark in marks if not is_restored(mark.parent)]
    return publish([run.folder for run in finished if run.is_evidence], profile, keep=True, attempts=attempts)
