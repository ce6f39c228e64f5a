"""The student edition of the notebooks: ``python -m bench course`` writes it to ``build/course``.

The notebooks of the repository hold the solutions, between markers, in cells tagged "exercise". With
``--nbgrader`` the same cells become nbgrader's: a solution cell, and behind it a checker worth a point.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from nnc_utils.provenance import root

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HOLE = re.compile(rf"^( *){BEGIN}\n(.*?)^ *{END}$", re.MULTILINE | re.DOTALL)
STUB = 'raise NotImplementedError("your turn")'


def cleared(source: str) -> str:
    """A cell without its solution: one line stands for it, and says how many it took."""
    return HOLE.sub(lambda hole: f"{hole[1]}{STUB}  # instead of {_lines(hole[2])}", source)


def _lines(solution: str) -> str:
    count = len([line for line in solution.splitlines() if line.strip()])
    return f"{count} line{'s' if count > 1 else ''}"


def student(notebook: NotebookNode) -> NotebookNode:
    """A notebook to work in: without solutions, and without the outputs that answer a question.

    Those are the outputs of exercises, of their checkers, of the cells behind a text that says "Predict",
    and of those that show how near a prediction was. All others stay: they are what is to be expected.
    """
    notebook = copy.deepcopy(notebook)
    is_asked = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            is_asked = "*Predict" in cell.source
        elif is_asked or re.search(r"predictions\.(measured|show)\(", cell.source):
            cell.outputs, cell.execution_count = [], None
    for cell, checker in zip(notebook.cells, notebook.cells[1:]):
        if "exercise" in cell.metadata.get("tags", []):
            cell.source = cleared(cell.source)
            for own in (cell, checker):
                own.outputs, own.execution_count = [], None
    return notebook


def assignment(notebook: NotebookNode) -> NotebookNode:
    """A notebook as nbgrader's source: it clears the solutions itself, and each checker gives a point."""
    notebook = copy.deepcopy(notebook)
    for place, (cell, checker) in enumerate(zip(notebook.cells, notebook.cells[1:])):
        if "exercise" in cell.metadata.get("tags", []):
            common = {"schema_version": 3, "task": False}
            solution = {"grade": False, "solution": True, "locked": False, "grade_id": f"answer-{place}"}
            graded = {
                "grade": True,
                "solution": False,
                "locked": True,
                "grade_id": f"check-{place}",
                "points": 1,
            }
            cell.metadata["nbgrader"], checker.metadata["nbgrader"] = common | solution, common | graded
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def moved(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A notebook whose links lead to the repository's files from this folder, too."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({os.path.relpath(root(), folder)}/")
    return notebook


def main(arguments: list[str]) -> int:
    """``python -m bench course``"""
    parser = argparse.ArgumentParser(prog="python -m bench course", description=__doc__)
    parser.add_argument("--nbgrader", action="store_true", help="nbgrader's sources, in build/nbgrader")
    options = parser.parse_args(arguments)
    made = assignment if options.nbgrader else student
    for path in sorted((root() / "notebooks").glob("*.ipynb")):
        folder = root() / "build" / ("nbgrader/source/" + path.stem if options.nbgrader else "course")
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(moved(made(nbformat.read(path, as_version=4)), folder), folder / path.name)
        print(Path(folder / path.name).relative_to(root()))
    return 0
