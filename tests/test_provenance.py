"""Hashes change with what code does, and with nothing else."""

import hashlib
import json
import os
import subprocess

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


def test_the_code_behind_a_notebook_is_what_it_imports(place):
    def names(*cells):
        files = provenance.code_files(place.notebook("n", *cells))
        return {file.relative_to(provenance.PACKAGE).as_posix() for file in files}

    assert names("import torch") == set()
    assert names("from nnc_utils import models") == {"models.py"}
    used = "from nnc_utils.run import start", "from nnc_utils import results, training"
    found = names(*used, "from nnc_utils.reports import committed")
    assert not [name for name in found if name.startswith("reports/")]
    assert {"training.py", "data.py", "models.py"} & found == {"training.py", "data.py"} | (
        found & {"models.py"}
    )
    assert not found & {"run.py", "results.py", "rows.py", "figures.py", "artifact.py"}
    folder = {file.name for file in (provenance.PACKAGE / "quantization").glob("*.py")}
    found = names("%matplotlib inline\ndef f():\n    from nnc_utils.quantization import uniform")
    assert {f"quantization/{name}" for name in folder} <= found  # all of a technique's folder


def test_the_hash_follows_the_files_it_is_of(place, tmp_path, monkeypatch):
    package = tmp_path / "nnc_utils"
    (package / "runtimes").mkdir(parents=True)
    for name, text in {
        "models": "A = 1\n",
        "training": "from nnc_utils import models\n",
        "results": "B = 1\n",
        "runtimes/__init__": "",
        "runtimes/onnxruntime": "C = 1\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    notebook = place.notebook("n", "from nnc_utils import training, results, runtimes")

    def code():
        provenance._files_sha256.cache_clear()
        provenance._imported.cache_clear()
        return provenance.code_sha256(notebook)

    before = code()
    (package / "results.py").write_text("B = 2\n")
    (package / "models.py").write_text("A = 1  # one\n")
    assert code() == before
    for name in ("models", "runtimes/onnxruntime"):
        (package / f"{name}.py").write_text("A = 2\n")
        assert code() != before
        before = code()


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
