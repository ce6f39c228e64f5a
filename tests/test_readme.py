"""The README and the notebooks' summaries show the tables that are committed."""

import shutil

import pandas as pd
import pytest

from bench import readme
from bench.committed import Tables
from nnc_utils import provenance

ROOT = provenance.PACKAGE.parent


def test_the_readme_shows_the_committed_tables(monkeypatch, read_once):
    monkeypatch.setenv("NNC_ROOT", str(ROOT))
    assert readme.said(ROOT) == readme.blocks(ROOT), "run `make report`"


def test_the_summaries_of_the_notebooks_show_the_committed_tables(monkeypatch, read_once):
    monkeypatch.setenv("NNC_ROOT", str(ROOT))
    sources = sorted((ROOT / "notebooks/src").glob("*.py"))
    sentences = readme.sentences(ROOT)
    assert sorted(sentences) == [source.stem for source in sources]
    for source in sources:
        text = source.read_text(encoding="utf-8").replace("\n# ", "\n")
        told = text.split("<!-- numbers:begin -->\n")[1].split("\n<!-- numbers:end -->")[0]
        assert told == sentences[source.stem] != "", "run `make report`"


def test_a_summary_follows_its_tables(published):
    root = published.parents[1]
    places = ("notebooks/src/02_quantization.py", "notebooks/02_quantization.ipynb")
    for place in places:
        (root / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, root / place)
    assert readme.update(root) and not readme.update(root)
    ratios = [f"{ratio:.2f}×" for ratio in pd.read_csv(published / "summary.csv")["size_ratio"]]
    for place in places:
        before, told = ((r / place).read_text(encoding="utf-8").split("numbers:")[1] for r in (ROOT, root))
        assert told != before and any(ratio in told for ratio in ratios)


def test_the_summary_of_08_tells_the_runs_that_save_most_within_half_a_point(published, monkeypatch):
    columns = ["configuration", "times fewer bytes", "difference (pp) [95 %]", "within 0.5 pp"]
    lines = [("fp32, both ways", 1.0, "+0.00", "yes"), ("fp32 for the bytes of: A", 20.0, "-9.00", "yes")]
    lines += [(name, 10.0 + number, "-0.10", said) for number, (name, said) in enumerate(zip("ABCD", "ynyy"))]
    table = pd.DataFrame(lines, columns=columns).replace({"y": "yes", "n": "no"}).set_index("configuration")
    for shown, words in (
        (None, "not measured yet"),
        (table, "D: 13.0× fewer bytes in both directions together than in fp32, at -0.10 pp. C: 12.0×"),
        (table[table["within 0.5 pp"] == "no"], "B: 11.0× fewer bytes"),
    ):
        monkeypatch.setattr(readme.federated, "committed", lambda shown=shown: shown)
        told = " ".join(readme.sentences(published.parents[1])["08_federated_learning"].split())
        assert words in told and "A:" not in told


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
