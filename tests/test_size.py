"""The house stays small: lines of the package, of the benchmark machine, of the tests, of a module."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 400  # lines of a module
MOST = {  # lower them with every cut; a folder in a folder counts for itself
    "nnc_utils": 13_682,
    "nnc_utils/doctor": 1_421,
    "nnc_utils/exercises": 2_285,
    "nnc_utils/federated": 1_098,
    "tests": 18_650,
    "tests/exercises": 1_947,
    "workflow/bench": 5539,
}


@pytest.mark.parametrize("folder", MOST)
def test_no_folder_grows(folder):
    apart = [ROOT / other for other in MOST if other.startswith(f"{folder}/")]
    files = [path for path in (ROOT / folder).rglob("*.py") if not set(apart) & set(path.parents)]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert sum(counts.values()) <= MOST[folder]
    if not folder.startswith("tests"):
        assert max(counts.values()) <= LONGEST, max(counts, key=counts.get)
