"""The notebooks as files: paired, checkable, light, and honest about what they hold."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_each_notebook_has_its_pair_and_each_pair_its_notebook():
    assert NOTEBOOKS
    sources = sorted((ROOT / "notebooks" / "src").glob("*.py"))
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in sources]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_pair_holds_the_same_cells(self, path):
        notebook = nbformat.read(path, as_version=4)
        source = jupytext.read(path.parent / "src" / f"{path.stem}.py")
        assert [(c.cell_type, c.source) for c in notebook.cells] == [
            (c.cell_type, c.source) for c in source.cells
        ]
        tags = [[cell.metadata.get("tags", []) for cell in book.cells] for book in (notebook, source)]
        assert tags[0] == tags[1]

    def test_checked_cells_have_outputs_and_counts(self, path):
        """nbval compares nothing where the count or the output is missing, and says nothing."""
        notebook = nbformat.read(path, as_version=4)
        checked = [cell for cell in cells(notebook, "code") if CHECKED in cell.metadata.get("tags", [])]
        assert checked, "no cell of this notebook is checked"
        for cell in checked:
            assert cell.execution_count and cell.outputs, cell.source

    def test_every_code_cell_was_run_in_order_and_none_failed(self, path):
        code = cells(nbformat.read(path, as_version=4), "code")
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]

    def test_is_light_and_its_cells_are_short(self, path):
        assert path.stat().st_size < 500_000
        long = [
            c.source.splitlines()[0]
            for c in cells(nbformat.read(path, as_version=4), "code")
            if c.source.count("\n") >= 30
        ]
        assert not long

    def test_outputs_name_no_machine(self, path):
        text = path.read_text()
        assert not re.search(r"(/home/|/root/|/Users/|/tmp/|C:\\\\)", text)

    def test_parameters_are_typed_literals_with_a_text(self, path):
        [cell] = [
            c
            for c in cells(nbformat.read(path, as_version=4), "code")
            if "parameters" in c.metadata.get("tags", [])
        ]
        for line, statement in zip(cell.source.splitlines(), ast.parse(cell.source).body, strict=True):
            assert isinstance(statement, ast.AnnAssign), line
            ast.literal_eval(statement.value)
            assert re.search(r"  # \S", line), line


def check_points(points, peers=(), name="02_quantization", **others):
    """Run the cells of a notebook that read its operating points."""
    from nnc_utils import models
    from nnc_utils import peers as counterparts
    from nnc_utils.distillation import features, teaching
    from nnc_utils.pruning import channels

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    sources = [cell.source for cell in cells(notebook, "code")]
    [first] = [place for place, source in enumerate(sources) if "def parsed(" in source]
    [last] = [place for place, source in enumerate(sources) if "# before any work" in source]
    namespace = {"points": list(points), "peers": list(peers), "counterparts": counterparts, "before": []}
    namespace |= {"channels": channels, "spec": models.resnet(18, channels=1, size=28, classes=10)}
    namespace |= {"teaching": teaching, "features": features, "models": models}
    namespace["teacher"] = SimpleNamespace(spec=namespace["spec"])
    namespace |= {"teachers": [namespace["teacher"]], "teaches": "fp32"}
    namespace |= others
    for source in sources[first - ("METHODS = {" in sources[first - 1]) : last + 1]:
        exec(source, namespace)
    return namespace


@pytest.mark.parametrize("name", ["02_quantization", "03_pruning"])
@pytest.mark.parametrize("profile", ["quick", "medium", "standard", "full"])
def test_every_profile_names_known_operating_points(profile, name):
    path = ROOT / "workflow" / "profiles" / f"{profile}.yaml"
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    given, of, everything = profile["parameters"], {}, []
    for label, part in (profile.get("parts") or {}).get(name, {"": {}}).items():
        values = given[name] | part  # a part may name what earlier ones have made
        before = [*next(iter(of.values()), []), *of.get(part.get("after"), [])]
        check_points([*dict.fromkeys([*before, *values["points"]])], values.get("peers", []), name)
        of[label] = list(values["points"])
        everything = [*everything, *values["points"]]
    if name == "03_pruning" and "07_deployment" in given:  # what 07 times by default has to be there
        declared = (ROOT / "notebooks" / "src" / "07_deployment.py").read_text()
        for wanted in re.findall(r'^(?:narrow|masked): str = "(.+?)"', declared, re.MULTILINE):
            assert any(point.removesuffix(" int8") == wanted for point in everything)


@pytest.mark.parametrize(
    ("points", "peers", "message"),
    [
        (["taylor:macs=4x"], [], "unknown point 'taylor:macs=4x'"),
        (["channels_l3:macs=4x"], [], "unknown point"),
        (["taylor:sparsity=0.9 tunde"], [], "unknown point"),
        (["taylor:sparsity=1.0"], [], r"sparsity is '1.0', needed is a share of zeros in \[0, 1\)"),
        (["taylor:sparsity=much"], [], "sparsity is 'much'"),
        (["channels_l1:macs=4"], [], "macs is '4', needed is how many times fewer, such as 4x"),
        (["from_scratch:macs=4x"], [], "name the point of channels whose widths it takes before it"),
        (["channels_random:macs=4x", "from_scratch:macs=4x"], [], "name the point of channels"),
        (["channels_l2:macs=2x", "from_scratch:macs=4x"], [], "name the point of channels"),
        (["blocks:removed=5"], [], "removed is '5', needed is whole blocks"),
        (["magnitude_layerwise:rates=good"], [], "rates is 'good', needed is hand"),
        (["taylor:sparsity=0.9 iterative"], [], "add 'tuned'"),
        (["taylor:sparsity=0.9 tuned taught"], [], "either tuned or taught"),
        (["torch_pruning_taylor:macs=4x"], [], "belong into points"),
        ([], ["channels_l1:macs=4x"], "belong into points"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(points, peers, message):
    with pytest.raises(ValueError, match=message):
        check_points(points, peers, "03_pruning")


@pytest.mark.parametrize(
    ("points", "peers", "message"),
    [
        (["hessian_rounding:bits=3"], [], "unknown point 'hessian_rounding:bits=3'"),
        (["kmeans"], [], "unknown point 'kmeans'"),
        (["mixed_precision:budget=2bit"], [], "the budget is one of 3bit, 4bit, 8bit"),
        (["mixed_precision:budget=2.5bit bn"], [], "the budget is one of 3bit, 4bit, 8bit"),
        (["uniform_per_channel:levels=4 bn"], [], "levels is an odd number"),
        (["kmeans:bits=3 bnn"], [], "unknown point"),
        (["per_channel:8"], [], "uniform_per_channel:bits"),
        (["xz:bits=7"], [], "belong into points"),
        ([], ["kmeans:bits=3"], "belong into points"),
        ([], ["xz:bits=7"], "add it to points"),
        ([], ["ort_static"], "U8S8 or S8S8"),
    ],
)
def test_operating_points_that_make_no_sense_are_refused(points, peers, message):
    with pytest.raises(ValueError, match=message):
        check_points(points, peers)


@pytest.mark.parametrize(
    ("points", "controls", "message"),
    [
        (["kl:width=0.25"], [], "unknown point 'kl:width=0.25': one of kd:width=...,T=...,alpha=..."),
        (["kd:T=4"], [], "unknown point"),
        (["kd:width=0.25,beta=2"], [], "unknown point"),
        (["attention:width=0.25,cached"], [], "unknown point"),
        (["kd:width=0.25,cached=yes"], [], "unknown point"),
        (["kd:width=0.25,T=0"], [], "temperature is 0.0: a number above 0"),
        (["kd:width=0.25,alpha=3"], [], "alpha is 3.0"),
        (["kd:width=-1"], [], "width is -1.0"),
        (["ensemble:width=0.25"], [], "an ensemble needs fp32 of other seeds"),
        (["kd:width=0.25,resnet50"], [], "put resnet50:epochs=12 into controls"),
        (["self:width=0.25,resnet50"], [], "unknown point"),
        ([], ["resnet50:epochs=0"], "times and epochs in"),
        ([], ["student_longer:width=0.25,times=nan"], "times and epochs in"),
        ([], ["label_smoothing:width=0.25,smoothing=2"], "smoothing is in"),
        ([], ["dense_finetuned:width=0.5"], "unknown point"),
        (["kd:width=small"], [], "settings are numbers, as in width=0.25"),
        (["student_alone:width=0.25"], [], "those without a teacher's help into controls"),
        ([], ["kd:width=0.25"], "taught students belong into points"),
        (["kd:width=0.25,shuffled"], [], "belong into points"),
    ],
)
def test_students_that_make_no_sense_are_refused(points, controls, message):
    with pytest.raises(ValueError, match=message):
        check_points(points, name="04_distillation", controls=controls)
