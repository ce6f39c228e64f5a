"""Before and after --fix: the kept table says what the page and the goals say."""

import csv
import shutil
import sys

import pytest

from nnc_utils import provenance

sys.path.insert(0, str(provenance.PACKAGE.parent / "workflow"))
import doctor_speed  # noqa: E402

DOCS = provenance.PACKAGE.parent / "docs"


def kept():
    with open(DOCS / "doctor_speed.csv", encoding="utf-8", newline="") as file:
        return {
            row.pop("file"): {key: float(value.rstrip("%")) for key, value in row.items()}
            for row in csv.DictReader(file)
        }


def test_the_page_shows_what_was_measured():
    page = (DOCS / "doctor.md").read_text(encoding="utf-8")
    begin, end = doctor_speed.MARKERS
    assert f"{begin}\n{doctor_speed.markdown(DOCS / 'doctor_speed.csv')}\n{end}" in page


def test_repaired_files_meet_the_goals():
    rows = kept()
    for name in ("ort", "nncf"):
        before, after = rows[name], rows[f"{name}_fixed"]
        assert before["MACs in integers"] < 95 <= after["MACs in integers"]
        assert after["agreement"] >= 99.5 and after["times unfixed"] >= 2.5
        assert after["times unfixed"] == pytest.approx(before["ms"] / after["ms"], abs=0.01)
        assert after["times fp32"] == pytest.approx(rows["fp32"]["ms"] / after["ms"], abs=0.01)


def test_what_is_written(tmp_path):
    shutil.copy(DOCS / "doctor.md", tmp_path)
    row = ["ort", "12.3%", "4.567", "1.00", "1.00", "100.00%", "8.90%"]
    doctor_speed.write([row], tmp_path / "doctor_speed.csv")
    before, after = (
        path.read_text(encoding="utf-8") for path in (DOCS / "doctor.md", tmp_path / "doctor.md")
    )
    begin, end = doctor_speed.MARKERS
    assert after.partition(begin)[0] == before.partition(begin)[0]
    assert after.partition(end)[2] == before.partition(end)[2]
    table = after.partition(begin)[2].partition(end)[0].split("\n")
    assert len(table) == 5 and [cell.strip() for cell in table[3].strip("|").split("|")] == row
