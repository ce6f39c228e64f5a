"""The README shows the tables that are committed."""

import pytest

from bench import report
from nnc_utils import provenance

ROOT = provenance.PACKAGE.parent


def test_the_readme_shows_the_committed_tables(monkeypatch):
    monkeypatch.setenv("NNC_ROOT", str(ROOT))
    assert report.readme_says(ROOT) == report.readme_block(ROOT), "run `make report`"


@pytest.mark.parametrize("changed", ["0.500", "4.00×"])
def test_a_readme_that_differs_from_its_tables_is_noticed(published, changed):
    root = published.parents[1]
    report.update_readme(root)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert report.readme_says(root) == report.readme_block(root) and changed in text
    (root / "README.md").write_text(text.replace(changed, "9.99", 1), encoding="utf-8")
    assert report.readme_says(root) != report.readme_block(root)
