"""The book is built of what is committed, without a network, and no link in it leads nowhere."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    options = "-q -W --keep-going -c docs -b html ."
    command = [sys.executable, "-m", "sphinx", *options.split(), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a link that leads nowhere is a warning, and so an error
    return out


def test_every_notebook_and_page_is_in_the_book(book):
    pages = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]
    for page in pages:
        assert (book / page.relative_to(ROOT)).with_suffix(".html").is_file(), page


def test_it_needs_no_network(book):
    for page in book.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert loaded == [], page
    assert (book / "_static/mathjax/tex-chtml.js").is_file() and (book / "search.html").is_file()


def test_solutions_are_folded_and_figures_have_a_text(book):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = (book / f"notebooks/{path.stem}.html").read_text(encoding="utf-8")
        solutions = path.read_text(encoding="utf-8").count("### BEGIN SOLUTION")
        assert page.count("tag_hide-input") == solutions, path
        assert "<p>| " not in page, "a table that was not read as one"
        outputs = [one for cell in json.loads(path.read_text())["cells"] for one in cell.get("outputs", [])]
        drawn = [one["metadata"]["image/png"]["alt"] for one in outputs if "image/png" in one.get("data", {})]
        read = [html.unescape(text) for text in re.findall(r'<img alt="([^"]*)"', page)]
        assert drawn and [text for text in read if text in drawn] == drawn, path
        assert all(len(text) >= 20 and not text.endswith(".png") for text in read), path
