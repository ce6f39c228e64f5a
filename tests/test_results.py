"""What is written of committed tables, and which profile a reader is shown."""

import re
import shutil
import subprocess
import sys

import pytest

from nnc_utils import provenance, results


def test_the_readme_gets_the_best_profile_between_its_markers(published):
    root = published.parents[1]
    assert results.update_readme(root) and not results.update_readme(root)
    text = (root / "README.md").read_text()
    assert text.startswith("# T\n") and text.endswith("\nrest\n") and "old" not in text
    assert results.table(published) in text and results.verdict(published) in text
    for file in (published / "artifacts").iterdir():
        assert re.search(rf"\[\S+ .*, seed \d\]\(results/quick/artifacts/{file.name}\)", text)
    (published / "figures/headline.png").write_bytes(b"png")
    assert results.update_readme(root)
    assert re.search(
        r"!\[[^\]]{20,}\]\(results/quick/figures/headline.png\)", (root / "README.md").read_text()
    )
    published.rename(root / "results/standard")
    results.update_readme(root)
    assert "results/standard/report.md" in (root / "README.md").read_text()
    (root / "README.md").write_text("no markers")
    with pytest.raises(results.ResultError, match="headline:begin"):
        results.update_readme(root)


def test_make_report_writes_figure_report_and_readme(published):
    root = published.parents[1]
    command = [sys.executable, "-m", "nnc_utils.results", "report"]
    environment = {"NNC_ROOT": str(root), "PYTHONPATH": str(provenance.PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (published / "figures/headline.png").read_bytes().startswith(b"\x89PNG")
    assert "headline.png" in (published / "report.md").read_text()
    assert "results/quick/figures/headline.png" in (root / "README.md").read_text()
    # what is finished, without the workflow: the same tables
    before = (published / "compression.csv").read_bytes()
    (published / "compression.csv").unlink()
    command[-1:] = ["publish", "--profile", "quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (published / "compression.csv").read_bytes() == before
    done = subprocess.run(command[:-2], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "publish needs --profile" in done.stderr
    command[-3:] = ["report", "--attempts", "quick/01_baseline/seed=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "--attempts goes with publish, not with report" in done.stderr


def test_a_profile_is_chosen_by_what_its_table_holds(published):
    root = published.parent.parent
    assert results.committed_profile(root, ("full", "quick")) == published
    assert results.committed_profile(root, ("full", "quick"), technique="quantization") == published
    assert results.committed_profile(root, ("full", "quick"), technique="pruning") is None
    assert results.committed_profile(root, timed=True) == published
    part = published.parent / "standard"  # one without times yet: it is not what the README shows
    shutil.copytree(published, part)
    (part / "latency.csv").write_text((published / "latency.csv").read_text().splitlines()[0] + "\n")
    assert results.committed_profile(root) == part
    assert results.committed_profile(root, timed=True) == published
    assert "results/quick" in results.readme_block(root)
