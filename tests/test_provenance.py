"""Hashes change with what code does, and with nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types

import psutil
import pytest

from nnc_utils import provenance

SOURCE = '''"""A module."""
import os

LIMIT = "# no comment"  # a comment


def f(x):
    """What it does."""
    return x + 1  # because


class C:
    """It."""
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# because", "# since", True),
        ("What it does.", "Something\n    else.", True),
        ('"""It."""', '"""Another."""', True),
        ("\n\n\ndef", "\n\n\n\n\ndef", True),
        ("A module.", "Module.", True),
        ("x + 1", "x + 2", False),
        ("# no comment", "# a comment", False),
        ("LIMIT", "LIMITS", False),
    ],
)
def test_wording_does_not_count_and_code_does(old, new, same):
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    assert (provenance.meaning(changed) == provenance.meaning(SOURCE)) == same


LOADING = """import os, subprocess, sys
from nnc_utils import provenance
{before}
provenance.watch(sys.argv[1])
{after}
child = "from nnc_utils.pruning import schedules; import os; os.kill(os.getpid(), 9)"
subprocess.run([sys.executable, "-c", child])
"""


ROUNDS = "peers/flower_app/rounds.py"  # run by Flower's interpreter


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A copy of the package, and what two processes loaded of it: a search, and a quantization."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(provenance.PACKAGE, root / "nnc_utils", ignore=shutil.ignore_patterns("__pycache__"))
    code = {}
    for name, before, after in (
        ("search", "from nnc_utils.search import space", "from nnc_utils.search import latency"),
        (
            "quantization",
            "from nnc_utils import allocation, rows",
            "from nnc_utils.peers import flower, nncodec",
        ),
    ):
        source = LOADING.format(before=before, after=after)
        environment = {**os.environ, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", source, root / name], check=True, env=environment, cwd=root)
        code[name] = provenance.loaded(root / name)
    return types.SimpleNamespace(package=root / "nnc_utils", code=code)


def test_a_run_knows_the_modules_that_its_processes_loaded(runs):
    search, quantization = runs.code.values()
    assert {"search/space.py", "search/latency.py", "models.py"} <= set(search)  # before and after the start
    assert {"peers/__init__.py", "peers/nncodec.py", "peers/nncodec_child.py"} <= set(quantization)
    assert all("pruning/schedules.py" in code for code in runs.code.values())  # by a child that was killed
    used = {file.partition("/")[0] for code in runs.code.values() for file in code}
    assert not used & {"__init__.py", "provenance.py", "rows.py"}
    assert not {"search", "peers"} <= {file.partition("/")[0] for file in quantization}


@pytest.mark.parametrize(
    ("file", "line", "stale"),
    [
        ("search/latency.py", "LIMIT = 1", {"search": ["search/latency.py"], "quantization": []}),
        ("search/latency.py", "# a comment", {"search": [], "quantization": []}),
        ("peers/nncodec_child.py", "x = 1", {"search": [], "quantization": ["peers/nncodec_child.py"]}),
        (
            "peers/flower_app/rounds.py",
            "x = 1",
            {"search": [], "quantization": ["peers/flower_app/rounds.py"]},
        ),
        ("peers/nncf_ptq.py", "x = 1", {"search": [], "quantization": []}),
        ("pruning/schedules.py", None, dict.fromkeys(("search", "quantization"), ["pruning/schedules.py"])),
    ],
)
def test_an_edit_marks_the_runs_that_used_the_module(runs, monkeypatch, file, line, stale):
    monkeypatch.setattr(provenance, "PACKAGE", runs.package)
    path = runs.package / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n") if line else path.unlink()
    found = {name: provenance.changed(code) for name, code in runs.code.items()}
    path.write_text(before)
    assert found == stale


def test_a_module_that_was_edited_during_the_run_counts_as_changed(tmp_path):
    log = tmp_path / "log"
    log.write_text("models.py 1 aa\nmodels.py 2 aa\ntraining.py 1 aa\ntraining.py 2 bb\n")
    assert provenance.loaded(log) == {"models.py": "aa", "training.py": "edited"}
    log.write_text("models.py 1 aa\ntraining.py 1trainable.py 2 bb\nmode")  # the disk was full
    assert provenance.loaded(log) == {"models.py": "aa", "training.py": "edited", "mode": "edited"}
    assert provenance.loaded(tmp_path / "none") == {}


def test_a_notebooks_hash_is_of_its_code(place):
    before = provenance.notebook_sha256(place.notebook("n", "x = 1"))
    path = place.notebook("n", "x = 1  # one")
    content = json.loads(path.read_text())
    content["cells"].insert(1, {"cell_type": "markdown", "id": "m", "metadata": {}, "source": ["prose"]})
    content["cells"][2] |= {
        "execution_count": 3,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}],
    }
    path.write_text(json.dumps(content))
    assert provenance.notebook_sha256(path) == before
    assert provenance.notebook_sha256(place.notebook("n", "x = 2")) != before
    with pytest.raises(ValueError, match="no Python"):
        provenance.notebook_sha256(place.notebook("n", "x ="))
    path.write_text("{}")
    with pytest.raises(ValueError, match="no notebook"):
        provenance.notebook_sha256(path)


def test_small_things(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    path.parent.mkdir()
    provenance.write_atomically(path, "text")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        provenance.write_atomically(path, "other")
    assert path.read_text() == "text" and len(list(path.parent.iterdir())) == 1
    assert provenance.file_sha256(path) == hashlib.sha256(b"text").hexdigest()
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    assert provenance.relative(path) == "a/b.txt"
    assert provenance.versions()["python"].startswith("3.")


def test_the_commit_says_when_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "nnc_utils")
    commit = provenance.commit.__wrapped__  # asked once in a process
    assert commit() == "unknown"
    (tmp_path / "nnc_utils").mkdir()
    (tmp_path / "nnc_utils/a.py").write_text("A = 1\n")
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = commit()
    assert len(head) == 40
    (tmp_path / "README.md").write_text("prose")
    assert commit() == head
    (tmp_path / "nnc_utils/a.py").write_text("A = 2\n")
    assert commit() == head + "-dirty"


def test_hardware_says_what_measured():
    hardware = provenance.hardware()
    assert hardware["cpu"] and hardware["cores"] == os.cpu_count() >= hardware["usable_cores"] >= 1
    assert abs(hardware["memory_gb"] - psutil.virtual_memory().total / 1e9) < 0.1
    assert set(hardware["flags"]) <= set(provenance.FLAGS) and len(hardware["load_average"]) == 3


def test_a_module_without_influence_makes_no_row_older():
    assert provenance.changed({"pretrained.py": "0", "rows.py": "0", "doctor/rules.py": "0"}) == []
    assert provenance.changed({"models.py": "0", "gone.py": "0"}) == ["models.py", "gone.py"]
