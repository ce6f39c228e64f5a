"""The book: Sphinx over the repository as it lies there, without running a notebook (`make book`)."""

import json
import re
from urllib.parse import unquote

from myst_parser.slugs import github_slugify

project = "Neural-network compression, measured"
author = "the authors of the suite"
copyright = "MIT licence"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
root_doc = "docs/index"
exclude_patterns = [".*", "build", "findings", "notebooks/src", "results/runs"]
exclude_patterns += ["results/smoke", "results/usual", "results/*/history.md", "tests"]

nb_execution_mode = "off"  # the outputs are those that are stored
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show a solution", "Hide the solution"
nb_render_markdown_format = "myst"  # an output that is Markdown may hold a table
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

highlight_language = "none"  # of code blocks that name no language
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True}
html_theme_options["navbar_persistent"] = []  # the side bar has a search box already
DETAILED = ("standard", "quick", "medium", "federated", "headline")
wide = ["docs/doctor", *(f"results/{name}/details" for name in DETAILED)]
html_theme_options["secondary_sidebar_items"] = {"**": ["page-toc"]} | dict.fromkeys(wide, [])
html_context = {"default_mode": "auto"}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["book.css"]


def _for_the_book(app, name, source):
    """Solutions are folded, figures get their text, links the names of headings; badges need a network."""
    source[0] = re.sub(r"(?m)^.*img\.shields\.io.*$", "", source[0])
    if name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if "exercise" in cell["metadata"].get("tags", []):
                cell["metadata"]["tags"].append("hide-input")
            for output in cell.get("outputs", []):  # figures keep their text where only Jupyter looks for it
                if text := output.get("metadata", {}).get("image/png", {}).get("alt"):
                    cell["metadata"]["mystnb"] = {"image": {"alt": text}}
            if cell["cell_type"] == "markdown":
                cell["source"] = re.sub(r"\]\(#(.*?)\)", _link, "".join(cell["source"]))
        source[0] = json.dumps(notebook)


def _link(match):
    return f"](#{github_slugify(unquote(match[1]))})"


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _for_the_book)
