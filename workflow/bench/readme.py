"""The README's generated parts, each between markers of its name, and the figures of a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from bench import report
from bench.candidates import title
from bench.committed import NOTEBOOKS, Committed, Tables, committed_profile
from bench.pairs import where
from bench.tables import ResultError, artifact_name
from nnc_utils import figures
from nnc_utils.provenance import write_atomically
from nnc_utils.rows import notebook_of

BLOCKS = ("headline", "usual", "recipes", "times")


def draw(profile_dir: Path) -> None:
    """Draw the figures of a profile from its tables."""
    plt.switch_backend("Agg")
    figures.write(profile_dir)
    techniques = set(Tables(profile_dir).compression["technique"])
    for technique in techniques & set(NOTEBOOKS) - {"baseline"}:
        figure = Committed(technique, profile_dir).figure()
        figure.savefig(profile_dir / f"figures/{technique}.png", bbox_inches="tight")
        plt.close(figure)


def blocks(folder: Path) -> dict[str, str]:
    """What the README of a clone shall say between its markers: of the best profile that is timed."""
    profile_dir = committed_profile(folder, timed=True) or committed_profile(folder)
    if profile_dir is None:
        return dict.fromkeys(BLOCKS, "")
    tables, quick = Tables(profile_dir), folder / "results/quick"
    known = Tables(quick).provenance if (quick / "provenance.json").is_file() else {}
    template = report.template("readme.md.j2", tables)
    values = {"t": tables, "place": f"results/{profile_dir.name}/", "files": _kept_files(tables)}
    values |= {"recipes": recipes, "usual": lambda: _usual(known), "timed_notebooks": lambda: _seconds(known)}
    context = template.new_context(values)
    return {name: report.tidy("".join(template.blocks[name](context))) for name in BLOCKS}


def recipes(tables: Tables) -> list[dict[str, Any]]:
    """What an engineer may want (``recipes.yaml``), and what these tables have for it.

    Of what was measured the best within 0.3 points, claims first, or else the nearest.
    """
    lines = []
    for line in yaml.safe_load(Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8")):
        points = tables.points[where(tables.points, line["of"])]
        good = points[points["no_loss"] == 1].sort_values(["headline", line["by"]], na_position="first")
        best = good if len(good) else points.sort_values("delta_ci_low")
        for _, point in best.tail(1).iterrows():
            mapping = {"method": point["method"]} | json.loads(point["settings"] or "{}")
            written = yaml.safe_dump(mapping, default_flow_style=True, sort_keys=False, width=999).strip()
            told = {"configuration": written, "point": point, "time": tables.fastest(point)}
            lines.append({k: line[k] for k in ("want", "notebook")} | told)
    return lines


def _usual(provenance: dict[str, Any]) -> dict[str, Any]:
    """What 00_the_usual_recipe has left: its table, its failures and how many of them are errors."""
    for record in provenance.values():
        if failures := record["extra"].get("failures"):
            errors = sum("Error" in failure["says"].split(":")[0] for failure in failures)
            return record["extra"] | {"errors": errors}
    return {}


def _seconds(provenance: dict[str, Any]) -> list[tuple[str, float]]:
    return [(notebook_of(run), record["wall_seconds"]) for run, record in sorted(provenance.items())]


def _kept_files(tables: Tables) -> dict[str, list[tuple[int, str]]]:
    """The committed networks: what each is called -> its seeds, and their files in the profile's folder."""
    kept: dict[str, list[tuple[int, str]]] = {}
    for _, row in tables.compression.drop_duplicates("artifact_sha256").iterrows():
        file = f"artifacts/{artifact_name(row['artifact_sha256'])}"
        if (tables.folder / file).is_file():
            kept.setdefault(title(row), []).append((row["seed"], file))
    return kept


def said(folder: Path) -> dict[str, str]:
    """What the README says between its markers now; a ResultError where a marker is missing."""
    text, told = (folder / "README.md").read_text(encoding="utf-8"), {}
    for name in BLOCKS:
        begin, end = _markers(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ResultError(f"README.md needs the lines {begin} and {end} once each, in this order")
        told[name] = text.split(begin)[1].split(end)[0].strip()
    return told


def update(folder: Path) -> bool:
    """Write the blocks into the README; True where that changed it."""
    said(folder)
    path = folder / "README.md"
    text = before = path.read_text(encoding="utf-8")
    for name, block in blocks(folder).items():
        begin, end = _markers(name)
        text = f"{text.split(begin)[0]}{begin}\n{block}\n{end}{text.split(end)[1]}"
    if text != before:
        write_atomically(path, text)
    return text != before


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
