#!/usr/bin/env bash
# papermill 2.7.0: execute_notebook(parameters=...) with a tuple, or with a dict whose keys are numbers.
# Expected: a tuple or, as JSON has none, a list; the keys as they were given. What papermill cannot pass on it
#   refuses: a set or a number of NumPy's integer types raises a TypeError.
# Seen: the notebook gets a string, "(0.25, 0.5)", and loops over its 11 characters. The parameters that papermill
#   records in the notebook's metadata say [0.25, 0.5]: not what was run. Keys become strings: {8: 0.5} arrives as
#   {"8": 0.5}, so that get(8, default) finds the default. No error, no warning.
# Where it shows: sweeps that give widths as a tuple, or bits of each layer as a dict.
# Fails where papermill behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet papermill==2.7.0 ipykernel nbformat
cd "$folder" && export PATH="$folder/venv/bin:$PATH" JUPYTER_PATH="$folder/venv/share/jupyter"
python -W ignore - 2>errors <<'PYTHON' || { cat errors; exit 1; }
import json

import nbformat
import papermill

SOURCE = """import json
print(json.dumps([type(widths).__name__, len(list(widths)), bits.get(8, "default")]))"""
parameters = nbformat.v4.new_code_cell("widths, bits = None, None", metadata={"tags": ["parameters"]})
kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
notebook = nbformat.v4.new_notebook(
    cells=[parameters, nbformat.v4.new_code_cell(SOURCE)],
    metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
)
nbformat.write(notebook, "in.ipynb")

print("papermill", papermill.__version__)
given = {
    "as lists, string keys": ({"widths": [0.25, 0.5], "bits": {"8": 0.5}}, ["list", 2]),
    "a tuple, a number as key": ({"widths": (0.25, 0.5), "bits": {8: 0.5}}, ["str", 11]),
}
for name, (values, seen) in given.items():
    papermill.execute_notebook("in.ipynb", "out.ipynb", parameters=values, progress_bar=False)
    executed = nbformat.read("out.ipynb", 4)
    outputs = [
        output.text
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    ]
    kind, length, bits = json.loads(outputs[-1])
    recorded = executed.metadata.papermill.parameters
    print(f"{name}: widths arrive as {kind} of {length}, bits.get(8) gives {bits}; recorded: {dict(recorded)}")
    assert [kind, length] == seen and bits == "default", "other values arrive than were seen"
    assert recorded["widths"] == [0.25, 0.5]
print("as described")
PYTHON
