"""The floors of the house: a module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import nnc_utils

PACKAGE = Path(nnc_utils.__file__).parent
FLOORS = [
    {"models", "cifar", "image_layout", "devices", "entropy", "parametrizations", "configurations"},
    {"image_file", "image_remarks"},
    {"images", "encoding", "sample"},
    {"data"},
    {"allocation", "artifact", "evaluation", "sensitivity", "batch_norm", "pretrained"},
    {"training"},  # evaluates each epoch
    {"curvature", "baseline"},  # shows its progress as training does
    {"quantization", "pruning", "distillation", "search"},  # a folder each; none knows another
    {"pipeline_configurations"},
    {"runtimes"},
    {"federated"},  # its server is asked as the runtimes' processes are
    {"peers"},  # lower as the runtimes do, and run in theirs
    {"candidates"},  # of each technique: what its benchmark builds may use the others
    # the fifth floor has steps: from processes and hashes over rows and tables to what runs notebooks
    {"processes", "provenance", "web"},
    {"rows"},
    {"scoring"},
    {"measure", "figures"},
    {"inspect", "export", "budgets", "doctor"},
    {"pipeline"},
    {"transfer"},  # starts from what all techniques made
    {"exercises"},  # checkers of what notebooks ask for
]
FLOORS.append({"bench"})  # the benchmark machine, a package of its own above this one
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(source: str) -> set[str]:
    """The parts of the package that a source imports anywhere; "bench" where it looks above the package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the house imports absolutely"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {name.split(".")[1] for name in found if name.startswith("nnc_utils.")}
    return parts | ({"bench"} & {name.split(".")[0] for name in found})


def violations(part: str, source: str) -> list[str]:
    own = {part}  # inside a folder anything goes
    return [
        f"{part} (floor {LEVEL[part]}) imports {other} (floor {LEVEL[other]})"
        for other in sorted(imports(source) - own)
        if LEVEL[other] >= LEVEL[part]
    ]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_from_floors_below(file):
    part = (
        "candidates"
        if file.name == "candidates.py"
        else file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    )
    assert part in LEVEL, f"{part} has no floor: add it to FLOORS"
    assert violations(part, file.read_text(encoding="utf-8")) == []


def test_a_look_upwards_is_found():
    assert violations("models", "from nnc_utils import artifact")
    assert violations("measure", "from bench.folder import start")
    assert violations("quantization", "def f():\n    import nnc_utils.pruning.magnitude")
    assert violations("artifact", "from nnc_utils.training import fit")
    assert violations("evaluation", "from nnc_utils import artifact")
    assert not violations("quantization", "from nnc_utils.quantization.uniform import quantize")
    assert not violations("figures", "from nnc_utils import models\nimport torch")
