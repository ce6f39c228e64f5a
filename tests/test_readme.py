"""The README shows the tables that are committed."""

import pytest

from nnc_utils import provenance, results

ROOT = provenance.PACKAGE.parent


def test_the_readme_shows_the_committed_tables(monkeypatch):
    monkeypatch.setenv("NNC_ROOT", str(ROOT))
    says = results.readme_says(ROOT)
    assert results.without_marks(says) == results.without_marks(results.readme_block(ROOT)), (
        "run `make report`"
    )


@pytest.mark.parametrize("changed", ["0.500", "8.00×", "4.09×"])
def test_a_readme_that_differs_from_its_tables_is_found(published, changed):
    root = published.parents[1]
    results.update_readme(root)
    shown = results.without_marks(results.readme_block(root))
    assert results.without_marks(results.readme_says(root)) == shown
    text = (root / "README.md").read_text(encoding="utf-8")
    assert changed in text
    (root / "README.md").write_text(text.replace(changed, "9.99", 1), encoding="utf-8")
    assert results.without_marks(results.readme_says(root)) != shown
