"""Every checker passes two right answers, and says of each wrong one in words what is wrong."""

import ast
import html
import importlib
import inspect
import re
import subprocess
import sys
import traceback
from pathlib import Path

import jupytext
import nbformat
import pytest
from myst_parser.slugs import github_slugify

from bench import course
from nnc_utils import exercises
from nnc_utils.exercises import Wrong, check

BOOK = Path(__file__).parent.parent / "docs/exercises.md"
SOURCES = sorted((Path(__file__).parent.parent / "notebooks/src").glob("0[1-9]_*.py"))


class Exercise:
    """An exercise as it stands in a notebook: the text before it, its cell, and the call that checks it."""

    def __init__(self, notebook, text, cell, call, before):
        self.notebook, self.text, self.cell, self.before = notebook, text, cell, before
        self.number = ast.literal_eval(call.args[0])
        self.answers = [ast.unparse(argument) for argument in call.args[1:]]

    def namespace(self, source=None):
        """What the imports, the earlier exercises and this cell define."""
        names = {}
        for code in (*self.before, source or self.cell.source):
            exec(compile(code, self.number, "exec"), names)
        return names

    def given(self, source=None):
        names = self.namespace(source)
        return [eval(answer, names) for answer in self.answers]


def imports(source):
    lines = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, lines))


def found(path):
    """The exercises of a notebook, in their order."""
    cells, before = jupytext.read(path).cells, []
    for text, cell, checker in zip(cells, cells[1:], cells[2:]):
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            before.append(imports(re.sub(r"(?m)^%.*$", "", cell.source)))
        if "exercise" in cell.metadata.get("tags", []):
            [call] = [s.value for s in ast.parse(checker.source).body if isinstance(s, ast.Expr)]
            assert call.func.id == "check" and "checks" in checker.metadata["tags"], checker.source
            yield Exercise(path.stem, text.source, cell, call, [*before])
            before.append(cell.source)


ALL = [one for path in SOURCES for one in found(path)]


def answers(number):
    module = importlib.import_module(f"exercises.{exercises.MODULES[number.partition('.')[0]]}")
    return module.RIGHT.get(number, []), module.WRONG.get(number, [])


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.number)
class TestExercise:
    @pytest.mark.filterwarnings("error")  # a warning goes to standard error, too
    def test_right_answers_pass(self, one, capfd):
        right, _ = answers(one.number)
        assert right, "a second right answer, written differently, is needed"
        for given in (one.given(), *([answer] for answer in right)):
            check(one.number, *(given if isinstance(given, list | tuple) else [given]))
        said = capfd.readouterr()
        assert said.out == f"Exercise {one.number}: right.\n" * (1 + len(right))
        assert not said.err  # a grader takes anything there for a failure

    def test_wrong_answers_are_told_what_is_wrong(self, one):
        _, wrong = answers(one.number)
        assert len(wrong) >= 3
        for answer, words in wrong:
            with pytest.raises(Wrong, match=re.escape(words)):
                check(one.number, answer)
        assert len({words for _, words in wrong}) == len(wrong)

    def test_a_forgotten_return_is_told(self, one):
        with pytest.raises(Wrong):
            check(one.number, *[lambda *given, **named: None] * len(one.answers))

    def test_the_stub_is_the_solution_without_its_lines(self, one):
        stub = course.cleared(one.cell.source)
        assert course.BEGIN in one.cell.source and course.BEGIN not in stub
        hidden = one.cell.source.count("\n") - stub.count("\n") - 1
        assert 1 <= hidden <= 8, f"{hidden} lines to write"
        given, stubs = one.namespace(), one.namespace(stub)
        for name, value in given.items():
            if inspect.isfunction(value) and value.__module__ is None:
                assert inspect.signature(stubs[name]) == inspect.signature(value)
        with pytest.raises(Wrong, match=f"Exercise {one.number} is still empty"):
            check(one.number, *one.given(stub))

    def test_the_text_asks_and_has_numbered_hints_that_are_folded(self, one):
        assert f"Exercise {one.number} ·" in one.text
        hints = re.findall(r"<details><summary>Hint (\d)</summary>", one.text)
        assert hints and hints == [str(number) for number in range(1, len(hints) + 1)]
        assert one.text.count("<details>") == one.text.count("</details>") == len(hints)

    def test_what_a_hint_names_is_in_the_solution_or_in_the_text(self, one):
        """A hint that names what the solution no longer uses has drifted from it."""
        folded = "".join(re.findall(r"<details>.*?</details>", one.text, flags=re.DOTALL))
        asked = re.sub(r"<details>.*?</details>", "", one.text, flags=re.DOTALL) + one.cell.source
        for code in re.findall(r"<code>(.*?)</code>", folded, flags=re.DOTALL):
            functions = re.findall(r"(\w\w+)\(", html.unescape(code))
            assert all(re.search(rf"\b{name}\b", asked) for name in functions), code


def test_numbers_are_of_their_notebook_and_unique():
    numbers = [one.number for one in ALL]
    assert len(set(numbers)) == len(numbers)
    for path in SOURCES:
        own = [one.number for one in ALL if one.notebook == path.stem]
        assert len(own) >= 5
        assert own == [f"{int(path.stem[:2])}.{k}" for k in range(1, len(own) + 1)]
    for name in exercises.MODULES.values():
        if (Path(exercises.__file__).parent / f"{name}.py").is_file():
            importlib.import_module(f"nnc_utils.exercises.{name}")
    assert sorted(exercises.CHECKERS) == sorted(numbers)


def test_the_first_check_in_a_kernel_writes_nothing_to_standard_error():
    """It imports the checkers, and a grader takes anything there for a failure."""
    names = ", ".join(f"nnc_utils.exercises.{name}" for name in exercises.MODULES.values())
    done = subprocess.run([sys.executable, "-c", f"import {names}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_answer_of_another_kind_is_told_so():
    for answer, words in ((None, "returns nothing"), ("9", "is a str"), ([1.0, 2.0], "shape is (2,)")):
        with pytest.raises(Wrong, match=re.escape(words)):
            exercises.same(answer, 1.0, "It differs.")
    with pytest.raises(Wrong, match="not finite"):
        exercises.same(float("nan"), 1.0, "It differs.")
    assert Wrong("Look again.")._render_traceback_() == ["Not yet. Look again."]


def test_an_error_of_a_learners_function_shows_no_line_of_the_checker():
    with pytest.raises(IndexError) as raised:
        check("5.2", lambda terms, architecture: terms[0].values[99, 99, 99])
    shown = {Path(place.filename).name for place in traceback.extract_tb(raised.tb)}
    assert Path(__file__).name in shown and "search.py" not in shown


def test_the_student_edition_has_the_holes_and_no_answer():
    for path in SOURCES:
        notebook = nbformat.read(path.parents[1] / f"{path.stem}.ipynb", as_version=4)
        edition = course.student(notebook)
        own = [cell for cell in edition.cells if "exercise" in cell.metadata.get("tags", [])]
        assert all(course.STUB in cell.source and course.BEGIN not in cell.source for cell in own)
        assert not any(cell.outputs for cell in own) and len(own) == sum(
            one.notebook == path.stem for one in ALL
        )
        told = [cell for cell in edition.cells if re.search(r"predictions\.(measured|show)", cell.source)]
        assert told and not any(cell.outputs for cell in told)
        graded = [
            cell.metadata["nbgrader"]
            for cell in course.assignment(notebook).cells
            if "nbgrader" in cell.metadata
        ]
        assert sum(cell.get("points", 0) for cell in graded) == len(own)


def table():
    """What the book says of the exercises."""
    lines = [
        "# Exercises",
        "",
        "Each checker passes the solution and another right answer. It has to notice wrong ones, too:",
    ]
    lines += ["the mistakes that learners make. A test holds both.", ""]
    lines += ["| exercise | title | right answers | wrong answers noticed |", "| --- | --- | --- | --- |"]
    total = 0
    for one in ALL:
        right, wrong = answers(one.number)
        name = re.search(rf"### Exercise {one.number} · (.*)", one.text)[1]
        place = f"../notebooks/{one.notebook}.ipynb#{github_slugify(f'Exercise {one.number} · {name}')}"
        lines.append(f"| [{one.number}]({place}) | {name} | {1 + len(right)} | {len(wrong)} |")
        total += len(wrong)
    return "\n".join([*lines, "", f"{len(ALL)} exercises; {total} wrong answers are noticed.", ""])


def test_the_book_has_the_table_of_the_exercises():
    there = BOOK.read_text(encoding="utf-8")
    assert there == table(), "write it: python tests/test_exercises.py"


def test_a_prediction_is_kept_beside_what_was_measured(capsys):
    from nnc_utils.exercises import predictions

    predictions.predict("parameters of the last stage (%)", 25)
    predictions.measured("parameters of the last stage (%)", 75)
    assert "you predicted 25, measured 75: ratio 3.00" in capsys.readouterr().out
    predictions.measured("never asked", 2)
    assert "measured 2; you predicted nothing" in capsys.readouterr().out
    predictions.predict("bytes", 8)
    predictions.measured("bytes", 2)
    figure = predictions.show()
    [axes] = figure.axes
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends == [(1, pytest.approx(3)), (1, pytest.approx(0.25))]
    figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert {"0.5", "1", "2"} <= {text.get_text() for text in shown}
    boxes = [text.get_window_extent() for text in shown]
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:])), "labels overlap"


if __name__ == "__main__":
    BOOK.write_text(table(), encoding="utf-8")
