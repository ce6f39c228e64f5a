"""Contents lead to headings, and nbgrader's own autograder gives the points that a submission deserves."""

import functools
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from myst_parser.slugs import github_slugify
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from bench import course

NOTEBOOK = Path(__file__).parent.parent / "notebooks/01_baseline.ipynb"
EACH = pytest.mark.parametrize("path", sorted(NOTEBOOK.parent.glob("*.ipynb")), ids=lambda path: path.stem)


@functools.cache
def read(path):
    """A notebook, which no test changes."""
    return nbformat.read(path, as_version=4)


@EACH
def test_the_contents_of_a_notebook_link_to_its_headings(path):
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    headings = re.findall(r"(?m)^## (.*)", "\n".join(prose))
    links = [unquote(link) for link in re.findall(r"\]\(#(.*?)\)", prose[0])]
    assert links == [heading.replace(" ", "-") for heading in headings]  # JupyterLab's names of headings


@EACH
def test_a_notebook_begins_with_what_it_takes_and_ends_with_what_it_gave(path):
    cells = read(path).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    top = " ".join(cells[0].source.split())
    assert all(f"**{word}**" in top for word in ("You will be able to", "You need", "Contents."))
    assert re.search(r"\*\*Time:\*\* .* to read, .*a minute to run", top)
    parts = re.split(r"(?m)^## (Your predictions|Summary|Questionnaire)$", prose)
    assert parts[1::2] == ["Your predictions", "Summary", "Questionnaire"]
    _, summary, questions = parts[2::2]
    assert len(re.findall(r"(?m)^- ", summary)) == 5 and "**In numbers.**" in summary
    numbers = re.findall(r"<details><summary>(\d+)\. [^<]", questions)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and 8 <= len(numbers) <= 12
    end = questions[questions.rindex("</details>") :]
    assert "**Try it.**" in end and re.search(r"\*\*Further reading\.\*\*(.|\n)*\]\(https://", end)
    assert end.rstrip().splitlines()[-1].startswith("Next: [")


@EACH
def test_each_prediction_stands_in_an_earlier_cell_than_what_is_measured(path):
    place, cells = {}, read(path).cells
    for number, cell in enumerate(cells):
        for call, what in re.findall(r'predictions\.(predict|measured)\(\s*f?"([^"]+)"', cell.source):
            place.setdefault(what, {})[call] = number
    assert len(place) >= 2
    assert all(one["predict"] < one["measured"] for one in place.values()), place


def test_every_term_of_the_glossary_is_linked_from_a_notebook():
    terms = re.findall(
        r"(?m)^### (.*)", (NOTEBOOK.parents[1] / "docs/glossary.md").read_text(encoding="utf-8")
    )
    prose = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOK.parent.glob("*.ipynb"))
    linked = set(re.findall(r"docs/glossary\.md#([^)]+)\)", prose))
    assert linked == {github_slugify(term) for term in terms}


def test_make_lab_serves_all_that_notebooks_link_to():
    """JupyterLab opens nothing outside of its root, which is a folder that it is given, or else the clone."""
    makefile = (NOTEBOOK.parents[1] / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"-m jupyterlab (.*) \$\(if", makefile)[1].split()
    assert options == ["--LabApp.default_url=/lab/tree/notebooks"]


@EACH
def test_links_of_the_student_edition_lead_to_files(path):
    folder = NOTEBOOK.parents[1] / "build/course"
    notebook = course.moved(course.student(read(path)), folder)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = set(re.findall(r"\]\((\.\./[^)#]*)", prose))
    assert links and all(Path(os.path.normpath(folder / link)).exists() for link in links), links


def test_the_student_edition_shows_no_output_behind_a_question():
    measuring, later = new_code_cell("1"), new_code_cell("2")
    for cell in (measuring, later):
        cell.outputs = [new_output("stream", text="1")]
    texts = new_markdown_cell("*Predict* it."), new_markdown_cell("So.")
    whole = new_notebook(cells=[texts[0], measuring, texts[1], later])
    assert [len(cell.get("outputs", [])) for cell in course.student(whole).cells] == [0, 0, 0, 1]


def exercises(notebook):
    return [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]


def test_answered_exercises_get_their_point_and_empty_ones_none(tmp_path, monkeypatch):
    """Two exercises of 01 as they are in the repository, answered, and the same two once more, left empty."""
    api = pytest.importorskip("nbgrader.apps").NbGraderAPI
    from traitlets.config import Config

    cells = read(NOTEBOOK).cells
    pairs = [pair for pair in zip(cells, cells[1:]) if pair[1].source[7:10] in ("1.4", "1.5")]
    chosen = [cell for pair in pairs for cell in pair]
    copies = [new_code_cell(cell.source, metadata=dict(cell.metadata)) for cell in 2 * chosen]
    solved = new_notebook(cells=[new_code_cell("from nnc_utils.exercises import check"), *copies])
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
    holes = exercises(released)
    assert all(course.BEGIN not in cell.source and "NotImplementedError" in cell.source for cell in holes)
    for hole, answer in zip(holes, exercises(solved)[:2]):
        hole.source = answer.source
    place = tmp_path / "submitted/student/two"
    shutil.copytree(tmp_path / "release/two", place)
    nbformat.write(released, place / "two.ipynb")
    assert grader.autograde("two", "student")["success"]
    submission = grader.get_submission("two", "student")
    assert (submission["score"], submission["max_score"]) == (2, 4)
    with grader.gradebook as book:
        grades = book.find_submission_notebook("two", "two", "student").grades
        points = {grade.name: grade.auto_score for grade in grades}
    assert points == {"check-1": 1, "check-3": 1, "check-5": 0, "check-7": 0}
