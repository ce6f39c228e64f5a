"""The book: Sphinx over the repository as it lies there, without running a notebook (`make book`)."""

import json

project = "Neural-network compression, measured"
author = "the authors of the suite"
copyright = "MIT licence"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
root_doc = "docs/index"
exclude_patterns = [".*", "build", "findings", "notebooks/src", "results/runs"]
exclude_patterns += ["results/smoke", "results/*/history.md", "tests"]

nb_execution_mode = "off"  # the outputs are those that are stored
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True}
html_copy_source = False


def _fold_solutions(app, name, source):
    """In the book the solution of an exercise is folded; in the notebook it stands open."""
    if name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if "exercise" in cell["metadata"].get("tags", []):
                cell["metadata"]["tags"].append("hide-input")
        source[0] = json.dumps(notebook)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _fold_solutions)
