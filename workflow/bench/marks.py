"""The marks of a run folder: whether it is finished, of what, by which code, and who may go on with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.tables import ResultError, Run, read_run
from nnc_utils import provenance
from nnc_utils.provenance import BEGUN

RESULT = "result.json"
MODULES = ".modules"  # what its processes have loaded so far, as `provenance.watch` writes it
COPY = ".finished.json"  # outlives Snakemake, which deletes the result where it saw no end of a job


def begin(folder: Path, identity: str) -> None:
    """Keep what an interrupted run of the same identity and code left in a folder; remove any other run's."""
    mark, modules = folder / BEGUN, folder / MODULES
    begun = mark.read_text() if mark.is_file() else ""
    if begun != identity or provenance.changed(provenance.loaded(modules)):
        if begun:
            for name in ("artifacts", "predictions"):
                shutil.rmtree(folder / name, ignore_errors=True)
            _remove_checkpoints(folder)
        modules.unlink(missing_ok=True)
    provenance.write_atomically(mark, identity)


def finish(folder: Path, result: str) -> None:
    """Write the result, and remove what only an interrupted run needs."""
    for name, content in ((COPY, result), (RESULT, result), (BEGUN, "finished")):
        provenance.write_atomically(folder / name, content)
    _remove_checkpoints(folder)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint*"):
        checkpoint.unlink()


def remove(folder: Path) -> None:
    """Make a run folder unfinished."""
    for name in (RESULT, COPY):
        (folder / name).unlink(missing_ok=True)


def finished(folder: Path) -> Run | None:
    """The run that a folder holds; None where it is unfinished, or a file is not what was measured."""
    try:
        if not (folder / RESULT).is_file():
            shutil.copy2(folder / COPY, folder / ".result.partial")  # with its time: a workflow compares it
            os.replace(folder / ".result.partial", folder / RESULT)
        return read_run(folder)
    except (OSError, ResultError):
        return None


def is_of(run: Run, notebook: Path, values: dict[str, Any], upstream: Iterable[Run]) -> bool:
    """Whether a finished run is of this notebook's code, these parameters and these upstream runs."""
    wanted = provenance.notebook_sha256(notebook), provenance.json_sha256(values), hashes(upstream, values)
    return (run.record.notebook_sha256, run.record.parameters_sha256, run.record.upstream) == wanted


def is_stale(code: dict[str, str] | None) -> bool:
    """Whether a module that a run used (`RunRecord.code`) has changed, or nobody noted which it used."""
    return code is None or bool(provenance.changed(code))


def hashes(runs: Iterable[Run], values: dict[str, Any]) -> dict[str, str]:
    """Folder of each run -> SHA-256 of its result; and of the network that 01 takes instead of training."""
    files = {run.folder: run.folder / RESULT for run in runs}
    if stored := values.get("pretrained"):  # and what lies beside it
        networks = (provenance.root() / stored).parent.glob("*.safetensors")
        files |= {file: file for file in [provenance.root() / stored, *sorted(networks)]}
    return {provenance.relative(name): provenance.file_sha256(file) for name, file in files.items()}
