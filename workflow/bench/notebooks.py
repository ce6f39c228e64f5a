"""All notebooks executed in one pass, so that one configuration has one result everywhere.

Outputs are written beside the code that made them: each notebook keeps the hash of its source.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.folder import environment
from nnc_utils.provenance import code_cells, root

STEPS = (  # what stands in one step can run side by side; each builds on the steps before it
    ("01_baseline",),
    ("02_quantization", "03_pruning", "04_distillation", "05_architecture_search", "06_pipeline"),
    ("07_deployment", "08_federated_learning"),
    ("09_transfer_learning", "00_the_usual_recipe"),
    ("10_report",),
)
CELL_TIMEOUT = 600  # seconds


def source_sha256(notebook: Path) -> str:
    """Hash of a notebook's code cells, of which its stored outputs are."""
    return hashlib.sha256(json.dumps([source for source, _ in code_cells(notebook)]).encode()).hexdigest()


def execute(notebook: Path) -> None:
    """Run a notebook where it stands, with its defaults, and store outputs and the hash of its source."""
    import nbformat
    from nbclient import NotebookClient

    from bench.candidates import NEEDS
    from bench.folder import smoke_run

    needs = NEEDS.get(notebook.stem, ())
    for need in needs.items() if isinstance(needs, dict) else ():
        smoke_run(*need)  # before, so that its log is in no output
    begin, content = time.time(), nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.execute(env=environment() | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    for cell in content.cells:
        cell.metadata.pop("execution", None)
    content.metadata.pop("widgets", None)
    content.metadata["nnc"] = {"source_sha256": source_sha256(notebook)}
    nbformat.write(content, notebook)
    print(f"{notebook.stem}: {time.time() - begin:.0f} s", flush=True)


def execute_all(names: Sequence[str] = ()) -> None:
    """Execute the named notebooks, or all in one pass."""
    for step in STEPS:
        wanted = [root() / "notebooks" / f"{name}.ipynb" for name in step if not names or name in names]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(execute, wanted))


def main(arguments: list[str]) -> int:
    """``python -m bench notebooks``"""
    execute_all(arguments)
    return 0
