"""What is generated of the README and the notebooks' summaries, between markers; a profile's figures."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import yaml

from bench import federated, report
from bench.candidates import title
from bench.committed import NOTEBOOKS, Committed, Tables, committed_profile
from bench.pairs import where
from bench.tables import ResultError, artifact_name
from nnc_utils import figures
from nnc_utils.provenance import write_atomically
from nnc_utils.rows import notebook_of

BLOCKS = ("headline", "usual", "recipes", "times")
FILES = {"README.md": BLOCKS, "README.zh.md": ("zh",)}
NUMBERS = "numbers"  # the marker in a notebook's summary


def draw(profile_dir: Path) -> None:
    """Draw the figures of a profile from its tables."""
    plt.switch_backend("Agg")
    figures.write(profile_dir)
    federated.draw(profile_dir)
    techniques = set(Tables(profile_dir).compression["technique"])
    for technique in techniques & set(NOTEBOOKS) - {"baseline"}:
        figure = Committed(technique, profile_dir).figure()
        figure.savefig(profile_dir / f"figures/{technique}.png", bbox_inches="tight")
        plt.close(figure)


def blocks(folder: Path) -> dict[str, str]:
    """What the READMEs of a clone shall say between their markers: of the best profile that is timed."""
    rendered = _rendered(folder, "readme.md.j2")
    return {name: rendered.get(name, "") for name in said(folder)}


def sentences(folder: Path) -> dict[str, str]:
    """What the summary of each notebook shall say in numbers, of the README's tables: notebook -> text."""
    told = _rendered(folder, "sentences.md.j2")
    wrap = textwrap.TextWrapper(115, break_long_words=False, break_on_hyphens=False)
    return {name.removeprefix("of_"): wrap.fill(" ".join(text.split())) for name, text in told.items()}


def _rendered(folder: Path, name: str) -> dict[str, str]:
    """The blocks of a template, of the best committed tables; {} without any."""
    profile_dir = committed_profile(folder, timed=True) or committed_profile(folder)
    if profile_dir is None:
        return {}
    tables, quick = Tables(profile_dir), folder / "results/quick"
    known, recipe = (_provenance(folder / "results" / profile) for profile in ("quick", "usual"))
    template = report.template(name, tables)
    values = {"t": tables, "place": f"results/{profile_dir.name}/", "files": _kept_files(tables)}
    values |= {"stronger": _stronger(tables, quick)}
    values |= {"recipes": recipes, "usual": lambda: _usual(recipe)}
    values |= {"timed_notebooks": lambda: _seconds(known), "federated": _federated}
    context = template.new_context(values)
    return {name: report.tidy("".join(block(context))) for name, block in template.blocks.items()}


def _stronger(tables: Tables, other: Path) -> Tables | None:
    """Another profile's tables, if its uncompressed network is the more accurate one."""
    if other == tables.folder or not (other / "compression.csv").is_file():
        return None
    others, accuracy = Tables(other), "accuracy_mean"
    is_stronger = others.headline()[0][1][accuracy] > tables.headline()[0][1][accuracy]
    return others if is_stronger and others.pipeline is not None else None


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


def _provenance(folder: Path) -> dict[str, Any]:
    return Tables(folder).provenance if (folder / "provenance.json").is_file() else {}


def _usual(provenance: dict[str, Any]) -> dict[str, Any]:
    """What 00_the_usual_recipe has left: its table, its failures and how many of them are errors."""
    for record in provenance.values():
        if failures := record["extra"].get("failures"):
            errors = sum("Error" in failure["says"].split(":")[0] for failure in failures)
            return record["extra"] | {"errors": errors}
    return {}


def _federated() -> list[dict[str, Any]]:
    """The two committed runs of 08 that save most bytes within half a point of fp32, or any that save."""
    table = federated.committed()
    if table is None:
        return []
    saving = table[(table["times fewer bytes"] > 1) & ~table.index.str.startswith("fp32")]
    within = saving[saving["within 0.5 pp"] == "yes"].sort_values("times fewer bytes", ascending=False)
    return (within if len(within) else saving).reset_index().to_dict("records")[:2]


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
    """What the READMEs say between their markers now; a ResultError where a marker is missing."""
    return {name: _said(path, name) for path, name in _places(folder)}


def _places(folder: Path) -> list[tuple[Path, str]]:
    """Each block's file and name."""
    places = [(folder / file, name) for file, names in FILES.items() for name in names]
    return [(path, name) for path, name in places if path.is_file()]


def _said(path: Path, name: str) -> str:
    text, (begin, end) = path.read_text(encoding="utf-8"), _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultError(f"{path.name} needs the lines {begin} and {end} once each, in this order")
    return text.split(begin)[1].split(end)[0].strip()


def update(folder: Path) -> bool:
    """Write the blocks into the READMEs and the sentences into the notebooks; True where that changed one."""
    changed, wanted = False, blocks(folder)
    for path, name in _places(folder):
        changed |= _write(path, _between(path.read_text(encoding="utf-8"), name, wanted[name]))
    for name, sentence in sentences(folder).items():
        source, notebook = folder / f"notebooks/src/{name}.py", folder / f"notebooks/{name}.ipynb"
        if source.is_file():
            text = _between(source.read_text(encoding="utf-8"), NUMBERS, sentence, "# ")
            content = nbformat.read(notebook, as_version=4)
            for cell in content.cells:
                if _markers(NUMBERS)[0] in cell.source:
                    cell.source = _between(cell.source, NUMBERS, sentence)
            changed |= _write(source, text) | _write(notebook, nbformat.writes(content) + "\n")
    return changed


def _write(path: Path, text: str) -> bool:
    """Write a file unless it says so already; True where it was written."""
    changed = text != path.read_text(encoding="utf-8")
    if changed:
        write_atomically(path, text)
    return changed


def _between(text: str, name: str, block: str, prefix: str = "") -> str:
    """A text with other lines between the markers of a name, each with a prefix."""
    begin, end = _markers(name)
    lines = f"\n{prefix}".join([begin, *block.splitlines(), end])
    return text.split(begin)[0] + lines + text.split(end)[1]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
