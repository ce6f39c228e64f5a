"""Contents lead to headings, and nbgrader's own autograder gives the points that a submission deserves."""

import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bench import course

NOTEBOOK = Path(__file__).parent.parent / "notebooks/01_baseline.ipynb"


@pytest.mark.parametrize("path", sorted(NOTEBOOK.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_contents_of_a_notebook_link_to_its_headings(path):
    prose = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    headings = re.findall(r"(?m)^## (.*)", "\n".join(prose))
    links = [unquote(link) for link in re.findall(r"\]\(#(.*?)\)", prose[0])]
    assert links == [heading.replace(" ", "-") for heading in headings]  # JupyterLab's names of headings


@pytest.fixture(scope="module")
def solved():
    """A notebook of two exercises of 01, with their solutions, as it is in the repository."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    pairs = [pair for pair in zip(cells, cells[1:]) if "exercise" in pair[0].metadata.get("tags", [])]
    chosen = [cell for pair in pairs if pair[1].source[7:10] in ("1.4", "1.5") for cell in pair]
    assert len(chosen) == 4
    return new_notebook(cells=[new_code_cell("from nnc_utils.exercises import check"), *chosen])


def test_solved_half_solved_and_empty_get_two_one_and_no_points(solved, tmp_path, monkeypatch):
    api = pytest.importorskip("nbgrader.apps").NbGraderAPI
    from traitlets.config import Config

    monkeypatch.chdir(tmp_path)
    tools = Path(sys.executable).parent  # nbgrader calls alembic by name
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    config = Config()
    config.CourseDirectory.root, config.CourseDirectory.course_id = str(tmp_path), "compression"
    source = tmp_path / "source/two/two.ipynb"
    source.parent.mkdir(parents=True)
    nbformat.write(course.assignment(solved), source)
    grader = api(config=config)
    assert grader.generate_assignment("two")["success"]
    released = nbformat.read(tmp_path / "release/two/two.ipynb", as_version=4)
    holes = [cell for cell in released.cells if "exercise" in cell.metadata.get("tags", [])]
    assert all(course.BEGIN not in cell.source and "NotImplementedError" in cell.source for cell in holes)
    answers = [cell.source for cell in solved.cells if "exercise" in cell.metadata.get("tags", [])]
    points = {}
    for student, count in (("solved", 2), ("half", 1), ("empty", 0)):
        for cell, answer in zip(holes, answers[:count]):
            cell.source = answer
        place = tmp_path / f"submitted/{student}/two"
        shutil.copytree(tmp_path / "release/two", place)
        nbformat.write(released, place / "two.ipynb")
        for cell in holes:
            cell.source = course.cleared(answers[holes.index(cell)])
        assert grader.autograde("two", student)["success"]
        submission = grader.get_submission("two", student)
        points[student] = submission["score"], submission["max_score"]
    assert points == {"solved": (2, 2), "half": (1, 2), "empty": (0, 2)}
