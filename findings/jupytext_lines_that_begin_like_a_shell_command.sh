#!/usr/bin/env bash
# jupytext 1.19.6: notebooks paired with scripts (py:percent), and a line that begins with copy, cat, cp, ls, echo or
# the name of another shell command.
# Expected: magic commands (%time, !pip) are commented out in the script, code stays code and comments stay comments.
# Seen: "ls += [16]" becomes a comment, "ls = [8]" does not. The notebook prints two layer sizes, the script one. Both
#   directions are fooled: in a script, the comment "# copy the teacher's weights" becomes a line of code of the
#   notebook, which is none. Through jupytext and back all is as before, so that no round-trip test finds it.
# Where it shows: a script run in place of its notebook trains another network.
# Fails where jupytext behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jupytext==1.19.6
cd "$folder" && "$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io

import jupytext
from nbformat.v4 import new_code_cell, new_notebook

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def output(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().strip()


print("jupytext", jupytext.__version__)
for name, becomes_a_comment in (("sizes", False), ("ls", True)):
    source = f"{name} = [8]\n{name} += [16]\nprint({name})"
    notebook = new_notebook(cells=[new_code_cell(source)], metadata={"kernelspec": KERNEL})
    script = jupytext.writes(notebook, "py:percent")
    (cell,) = jupytext.reads(script, "py:percent").cells
    print(f"a list called {name}: the cell prints {output(source)}, the script {output(script)}")
    assert cell.source == source, "not the same cell after the round trip"
    assert (f"# {name} += [16]" in script) == becomes_a_comment == (output(script) != output(source)), "changed"

for comment, becomes_code in (("clone the teacher's weights", False), ("copy the teacher's weights", True)):
    (cell,) = jupytext.reads(f"# %%\n# {comment}\nsizes = [8]\n", "py:percent").cells
    print(f"the comment {'# ' + comment!r} is in the notebook: {cell.source.splitlines()[0]!r}")
    assert cell.source.startswith(comment) == becomes_code, "changed"
print("as described")
PYTHON
