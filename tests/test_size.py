"""The house stays small: lines of the package, of the benchmark machine, of the tests, of a module."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 400  # lines of a module
MOST = {"nnc_utils": 11_500, "workflow/bench": 3_700, "tests": 12_000}  # lower them with every cut


@pytest.mark.parametrize("folder", MOST)
def test_no_folder_grows(folder):
    counts = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")
    }
    assert sum(counts.values()) <= MOST[folder]
    if folder != "tests":
        assert max(counts.values()) <= LONGEST, max(counts, key=counts.get)
