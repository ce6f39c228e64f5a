"""The README shows the tables that are committed."""

import pandas as pd
import pytest

from bench import readme
from bench.committed import Tables
from nnc_utils import provenance

ROOT = provenance.PACKAGE.parent


def test_the_readme_shows_the_committed_tables(monkeypatch):
    monkeypatch.setenv("NNC_ROOT", str(ROOT))
    assert readme.said(ROOT) == readme.blocks(ROOT), "run `make report`"


@pytest.mark.parametrize("changed", ["0.500", "4.00×"])
def test_a_readme_that_differs_from_its_tables_is_noticed(published, changed):
    root = published.parents[1]
    readme.update(root)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme.said(root) == readme.blocks(root) and changed in text
    (root / "README.md").write_text(text.replace(changed, "9.99", 1), encoding="utf-8")
    assert readme.said(root) != readme.blocks(root)


def test_a_recipe_is_the_best_within_the_limit_or_else_the_nearest(published, monkeypatch):
    tables = Tables(published)
    [int8, smallest] = readme.recipes(tables)
    assert int8["configuration"] == smallest["configuration"] == "{method: uniform, bits: 8}"
    assert int8["time"]["p50_ms"] == 0.5 and int8["want"] != smallest["want"]
    tables.points["no_loss"] = 1
    four = tables.points.assign(settings='{"bits":4}', size_ratio=99.0, no_loss=0)
    monkeypatch.setattr(Tables, "points", pd.concat([tables.points, four]))
    assert "bits: 8" in readme.recipes(Tables(published))[1]["configuration"]  # not within 0.3 points
