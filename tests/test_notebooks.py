"""The notebooks as files: paired, short, checked, and with outputs that belong to the code beside them."""

import ast
import builtins
import functools
import os
import re
import shutil
import subprocess
import symtable
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pandas
import papermill
import pytest

from bench.execute import LESSON_IS_MEASURED, without_lesson
from bench.notebooks import STEPS, source_sha256
from bench.parameters import ParameterError, declared

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED, MACHINE = "nbval-check-output", "machine-dependent"
PLUMBING = {"setup", "benchmark", "checks"}
MOST_PLUMBING = 0.15
LONGEST = 30  # lines of a code cell


@functools.cache
def read(path):
    """A notebook, which no test changes."""
    return nbformat.read(path, as_version=4)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def lines(cell):
    return len([line for line in cell.source.splitlines() if line.strip()])


def texts(cell):
    """What a cell printed or showed as text; a figure's bytes depend on the machine's fonts."""
    shown = [o for o in cell.outputs if o.output_type != "stream" and "image/png" not in o.get("data", {})]
    return shown + [o for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]


def test_each_notebook_has_its_pair_and_each_pair_its_notebook():
    sources = sorted((ROOT / "notebooks" / "src").glob("*.py"))
    assert NOTEBOOKS and [path.stem for path in NOTEBOOKS] == [path.stem for path in sources]


def test_images_have_as_many_pixels_as_figures_and_strides_need():
    size = declared(ROOT / "notebooks/01_baseline.ipynb")["size"]
    assert [size.check(pixels) for pixels in (0, 8, 1024)] == [0, 8, 1024]  # 0: as they are
    with pytest.raises(ParameterError, match="0 or a whole number in"):
        size.check(1)


def test_one_process_of_several_gets_a_whole_notebook():
    import conftest

    scope = object.__new__(conftest._NotebooksInOrder)._split_scope
    assert scope("notebooks/03_pruning.ipynb::Cell 4") == scope("notebooks/03_pruning.ipynb::Cell 5")
    assert scope("tests/test_data.py::a") != scope("tests/test_images.py::a")


def test_one_pass_executes_every_notebook():
    assert sorted(name for step in STEPS for name in step) == [path.stem for path in NOTEBOOKS]


def test_jupyterlab_opens_what_papermill_wrote_after_the_sync_of_make_lab(tmp_path):
    """Alone it refuses a notebook that is newer than its pair and has another cell."""
    from jupytext import TextFileContentsManager
    from tornado.web import HTTPError

    name = "10_report"
    for place, folder in ((NOTEBOOKS[0].parent, "notebooks"), (NOTEBOOKS[0].parent / "src", "notebooks/src")):
        (tmp_path / folder).mkdir()
        [file] = place.glob(f"{name}.*")
        shutil.copy(file, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    notebook, source = tmp_path / f"notebooks/{name}.ipynb", tmp_path / f"notebooks/src/{name}.py"
    papermill.execute_notebook(notebook, notebook, {"trials": 100}, prepare_only=True, progress_bar=False)
    os.utime(source, (1e9, 1e9))
    manager = TextFileContentsManager(root_dir=str(tmp_path))
    with pytest.raises(HTTPError, match="more recent than"):
        manager.get(f"notebooks/{name}.ipynb")
    [sync] = [line for line in (ROOT / "Makefile").read_text().splitlines() if "--sync" in line]
    options = sync.split("-m jupytext ")[1].split(" notebooks/")[0].split()
    subprocess.run([sys.executable, "-m", "jupytext", *options, str(notebook)], cwd=tmp_path, check=True)
    opened = manager.get(f"notebooks/{name}.ipynb")["content"]
    assert [c.source for c in opened.cells if "injected-parameters" in tags(c)] == [
        "# Parameters\ntrials = 100"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_pair_holds_the_same_cells(self, path):
        source = jupytext.read(path.parent / "src" / f"{path.stem}.py")
        pairs = [
            [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in book.cells]
            for book in (read(path), source)
        ]
        assert pairs[0] == pairs[1]

    def test_outputs_are_of_the_code_beside_them(self, path):
        """jupytext keeps a cell's outputs when all of its code has changed."""
        assert read(path).metadata["nnc"]["source_sha256"] == source_sha256(path)

    def test_every_code_cell_was_run_in_order_and_none_failed(self, path):
        cells = code(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]

    def test_nbval_compares_every_cell_that_does_not_depend_on_the_machine(self, path):
        """nbval compares nothing where the outputs are missing, and says nothing."""
        for cell in code(path):
            assert not (CHECKED in tags(cell) and MACHINE in tags(cell)), cell.source
            if CHECKED in tags(cell):
                assert cell.execution_count and cell.outputs, cell.source
            elif texts(cell):
                assert MACHINE in tags(cell) or tags(cell) & PLUMBING, cell.source

    def test_cells_are_short_and_few_are_plumbing(self, path):
        counted = [(lines(cell), tags(cell)) for cell in code(path) if "parameters" not in tags(cell)]
        assert max(len(cell.source.splitlines()) for cell in code(path)) <= LONGEST
        setup = [count for count, tagged in counted if "setup" in tagged]
        benchmark = [count for count, tagged in counted if "benchmark" in tagged]
        assert len(setup) == 1 and setup[0] <= 10
        assert len(benchmark) <= 4 and all(count <= 10 for count in benchmark)
        plumbing = sum(count for count, tagged in counted if tagged & PLUMBING)
        assert plumbing <= MOST_PLUMBING * sum(count for count, _ in counted)

    def test_is_light_and_names_no_machine(self, path):
        assert path.stat().st_size < 500_000
        assert not re.search(r"(/home/|/root/|/Users/|/tmp/|C:\\\\)", path.read_text())

    def test_parameters_are_typed_literals_and_the_readers_come_first(self, path):
        [cell] = [c for c in code(path) if "parameters" in tags(c)]
        for statement in ast.parse(cell.source).body:
            assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
            ast.literal_eval(statement.value)
        first, comment, _ = cell.source.partition("\n# ")
        assert comment and 1 <= len(ast.parse(first).body) <= 6

    def test_papermill_reads_every_parameter_with_its_type(self, path):
        """`papermill --help-notebook` shows them; it cannot read a default that holds an equals sign."""
        [cell] = [c for c in code(path) if "parameters" in tags(c)]
        wanted = [(s.target.id, ast.unparse(s.annotation)) for s in ast.parse(cell.source).body]
        read = papermill.inspect_notebook(str(path))
        assert [(one["name"], one["inferred_type_name"]) for one in read.values()] == wanted

    def test_a_batch_has_two_images_or_more(self, path):
        """Batch-norm in training refuses one image of one pixel."""
        for name, parameter in declared(path).items():
            if name in ("batch_size", "supernet_batch"):
                parameter.check(2)
                with pytest.raises(ParameterError):
                    parameter.check(1)

    def test_no_cell_gives_a_parameter_another_value(self, path):
        """So what differs from the setup cell's is a reader's change, which is told."""
        for cell in code(path):
            if "parameters" not in tags(cell):
                text = "\n".join(line for line in cell.source.splitlines() if line[:1] not in "%!")
                symbols = symtable.symtable(text, "cell", "exec").get_symbols()
                set_here = {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
                assert not set_here & set(declared(path)), cell.source

    def test_what_is_measured_needs_nothing_of_the_lesson(self, path):
        """A benchmark leaves the lesson out."""
        known = set(dir(builtins))
        for cell in () if path.stem in LESSON_IS_MEASURED else without_lesson(path).cells:
            top = symtable.symtable(cell.source, "cell", "exec")
            made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
            tables, used = [top], set()
            for table in tables:  # functions and comprehensions, too
                tables += table.get_children()
                own = (
                    s for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())
                )
                used |= {s.get_name() for s in own}
            assert used <= (known := known | made), cell.source

    def test_no_printed_log_is_long(self, path):
        for cell in code(path):
            printed = "".join(o.text for o in cell.outputs if o.output_type == "stream")
            assert printed.count("\n") <= 30, cell.source


def accuracies(path):
    """(configuration, accuracy) of every table of the benchmark among the stored outputs."""
    for cell in code(path):
        for html in (o["data"].get("text/html", "") for o in cell.outputs if "data" in o):
            heads = [
                re.sub(r"<[^>]+>", "", head)
                for head in re.findall(r"<th[^>]*>.*?</th>", html.split("<tbody>")[0])
            ]
            names = [head for head in heads if head and head != "configuration"]
            if "benchmark" in tags(cell) and "accuracy (%)" in names:
                for row in re.findall(r"<tr>(.*?)</tr>", html.split("<tbody>")[1], re.DOTALL):
                    [title] = re.findall(r"<th>(.*?)</th>", row)
                    yield title, re.findall(r"<td>(.*?)</td>", row)[names.index("accuracy (%)")]


def test_one_configuration_has_one_result_in_all_notebooks():
    known = {}
    for path in NOTEBOOKS:
        for title, accuracy in accuracies(path):
            if title == "the uncompressed network, trained on":  # in each for as long as its other networks
                continue
            assert known.setdefault(title, accuracy) == accuracy, f"{title} in {path.stem}"
    assert len(known) >= 10


def test_03_names_who_is_ahead_only_where_its_images_can_tell(capsys):
    source = (ROOT / "notebooks/src/03_pruning.py").read_text(encoding="utf-8")
    compared = source[source.index("bound = ") :].partition("\n\n\nfor number")[0]
    tuned = source[source.index("before, *after") :].partition("pd.Series")[0]
    for count, winner, effect in (
        (4, "these images cannot tell", "cannot be told"),
        (200, "OBD and Taylor", "helps"),
    ):
        known = {
            "images": SimpleNamespace(validation=range(count)),
            "table": {"before": 50, "a": 52, "b": 75},
        }
        exec(compared, known)
        assert known["ahead"]({"OBD": 75, "Taylor": 74, "magnitude": 50}) == winner
        exec(tuned, known)
        assert capsys.readouterr().out.count(f"peak {effect}") == 2


@pytest.mark.parametrize(
    "count, says", [(4, "one of 4 images is 25.0 pp"), (200, "the network has converged")]
)
def test_01_claims_convergence_only_with_enough_validation_images(count, says, capsys):
    source = (ROOT / "notebooks/src/01_baseline.py").read_text(encoding="utf-8")
    cell = source[source.index("rise = curve") :].partition("\n\n")[0]
    curve = pandas.DataFrame({"validation": [50.0] * 8})
    exec(cell, {"curve": curve, "images": SimpleNamespace(validation=range(count))})
    assert says in capsys.readouterr().out
