"""What a notebook calls: `start` in its second cell, `finish` in its last.

A run folder belongs to one writer at a time. ``result.json`` is written last and at once: where it
is, the run is finished.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from pydantic import ValidationError

from nnc_utils import parameters as declarations
from nnc_utils import processes, provenance
from nnc_utils.parameters import Parameter
from nnc_utils.provenance import BEGUN, root
from nnc_utils.rows import CompressionRow, run_name
from nnc_utils.tables import ResultError, Run, RunRecord, read_run

WRITER_WAIT = 30  # seconds, for the kernel of a killed runner to die
COPY = ".finished.json"  # outlives Snakemake, which deletes result.json where it saw no end of a job


@dataclass(frozen=True)
class Current:
    """The run that a notebook is writing: its folder, its parameters, the finished runs it builds on."""

    notebook: str
    folder: Path
    parameters: dict[str, Any]
    upstream: list[Run]
    code: dict[str, str]
    started: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """How rows name this run."""
        return run_name(self.profile, self.notebook, self.seed, self.parameters.get("part", ""))

    @property
    def profile(self) -> str:
        """The profile that it belongs to."""
        return self.parameters.get("profile", "smoke")

    @property
    def seed(self) -> int:
        """The seed; 1 where the notebook declares none."""
        return self.parameters.get("seed", 1)

    @property
    def dataset(self) -> str:
        """The data set's name: the parameter, or what the upstream runs used."""
        return self.parameters.get("dataset") or next((run.dataset for run in self.upstream), "")

    def made_before(self, name: str) -> list[Run]:
        """The upstream runs, own seed first, that have an artifact of this file name or checksum.

        Raises
        ------
        ResultError
            When none has it; the message lists what they have.
        """
        found = [
            run
            for run in self.upstream
            if any(name in (Path(a.path).stem, a.artifact_sha256) for a in run.record.artifacts)
        ]
        if not found:
            names = {run.run: [Path(a.path).stem for a in run.record.artifacts] for run in self.upstream}
            listed = "; ".join(f"{run}: {', '.join(own) or 'none'}" for run, own in names.items())
            raise ResultError(f"no upstream run has an artifact {name!r}. They have {listed}")
        return sorted(found, key=lambda run: run.record.seed != self.seed)

    def path(self, name: str) -> Path:
        """A path in the run folder; the folders on the way to it are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(
        self,
        *,
        compression: Iterable[CompressionRow] = (),
        latency: Iterable[dict[str, Any]] = (),
        artifacts: Iterable[Path] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Run:
        """Check the rows, hash every artifact and write result.json.

        Parameters
        ----------
        compression, latency : from `results.compression_row` and `results.latency_rows`; the latter
            get their columns profile, run, dataset, seed and commit here.
        artifacts : files below the run folder; everything in artifacts/ if not given.
        extra : what later notebooks want to know, as JSON.
        """
        compression = list(compression)
        common = {"profile": self.profile, "run": self.name, "dataset": self.dataset}
        common["commit"] = provenance.commit()
        files = sorted((self.folder / "artifacts").glob("*.safetensors")) if artifacts is None else artifacts
        claimed = {row.artifact_sha256 for row in compression if row.headline}
        try:
            record = RunRecord(
                notebook=self.notebook,
                run=self.name,
                profile=self.profile,
                seed=self.seed,
                parameters=self.parameters,
                parameters_sha256=provenance.json_sha256(self.parameters),
                **self.code,
                commit=common["commit"],
                versions=provenance.versions(),
                hardware=provenance.hardware(),
                upstream=upstream_hashes(self.upstream),
                wall_seconds=round(time.time() - self.started, 2),
                dataset=self.dataset,
                compression=compression,
                latency=[{"seed": self.seed, **row, **common} for row in latency],
                artifacts=[_artifact(self.folder, Path(file), claimed) for file in files],
                extra=extra or {},
            )
        except ValidationError as error:
            raise ResultError(f"{self.name}: a row breaks the protocol: {error}") from None
        text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False)
        provenance.write_atomically(self.folder / COPY, text)
        provenance.write_atomically(self.folder / "result.json", text)
        provenance.write_atomically(self.folder / BEGUN, "finished")
        _remove_checkpoints(self.folder)
        if not _headless():  # an open notebook in JupyterLab keeps nobody waiting
            processes.unlock(self.folder / ".writer.lock")
        return Run(self.folder, record)


def start(notebook: str, namespace: dict[str, Any], needs: Iterable[str] = ()) -> Current:
    """Begin the run of a notebook, in its second cell: ``run = start("01_baseline", globals())``.

    Checks the parameters, finds the upstream runs, and takes the run folder: `run_dir`, else one
    under results/smoke/ that belongs to these parameters.

    Parameters
    ----------
    notebook : its name without suffix.
    namespace : the notebook's globals.
    needs : notebooks whose runs it builds on. Where `upstream` is empty their smoke runs are
        used, which are made first where they are missing, of other code, or built on runs that have been
        made again since.
    """
    if _headless():
        processes.die_with_parent(gently=True)
    path = Path(os.environ.get("NNC_NOTEBOOK", ""))
    path = path if path.stem == notebook else root() / "notebooks" / f"{notebook}.ipynb"
    declared = declarations.declared(path)
    given = {name: namespace[name] for name in declared if name in namespace}
    values = recorded(declared, given, notebook=notebook)
    if values.get("upstream"):
        upstream = [read_run(root() / folder) for folder in values["upstream"]]
    else:
        upstream = [_smoke_run(name) for name in needs]
    folder = root() / given["run_dir"] if given.get("run_dir") else _own_folder(notebook, declared, values)
    processes.lock(folder / ".writer.lock", wait=WRITER_WAIT, what=f"the run folder {folder}")
    remove_marks(folder)
    _clear(folder, provenance.json_sha256([values, hashes(path), upstream_hashes(upstream)]))
    return Current(notebook, folder, values, upstream, hashes(path))


def _clear(folder: Path, identity: str) -> None:
    """Keep what an interrupted run of the same parameters, code and upstream left; remove any other run's."""
    mark = folder / BEGUN
    if mark.is_file() and mark.read_text() != identity:
        for name in ("artifacts", "predictions"):
            shutil.rmtree(folder / name, ignore_errors=True)
        _remove_checkpoints(folder)
    provenance.write_atomically(mark, identity)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint*"):
        checkpoint.unlink()


def recorded(declared: dict[str, Parameter], given: dict[str, Any], *, notebook: str) -> dict[str, Any]:
    """Every parameter's checked value, as it is written into results: where a run is kept is left out."""
    values = {name: parameter.default for name, parameter in declared.items()} | given
    values = declarations.check(declared, values, notebook=notebook)
    values.pop("run_dir", None)
    if values.get("upstream"):
        values["upstream"] = [provenance.relative(root() / folder) for folder in values["upstream"]]
    return values


def _headless() -> bool:
    return bool(os.environ.get("NNC_HEADLESS"))


def hashes(notebook: Path) -> dict[str, str]:
    return {
        "notebook_sha256": provenance.notebook_sha256(notebook),
        "code_sha256": provenance.code_sha256(notebook),
    }


def _own_folder(notebook: str, declared: dict[str, Parameter], values: dict[str, Any]) -> Path:
    own = values != recorded(declared, {}, notebook=notebook)
    return root() / "results/smoke" / (notebook + (f"-{provenance.json_sha256(values)[:8]}" if own else ""))


def remove_marks(folder: Path) -> None:
    for name in ("result.json", COPY):
        (folder / name).unlink(missing_ok=True)


def upstream_hashes(runs: Iterable[Run]) -> dict[str, str]:
    return {provenance.relative(r.folder): provenance.file_sha256(r.folder / "result.json") for r in runs}


def _artifact(folder: Path, file: Path, claimed: set[str]) -> dict[str, Any]:
    with safetensors.safe_open(file, framework="numpy") as stream:
        sha256 = json.loads(stream.metadata()["artifact"])["sha256"]
    path = file.resolve().relative_to(folder.resolve()).as_posix()
    record = {"path": path, "sha256": provenance.file_sha256(file), "artifact_sha256": sha256}
    return record | {"headline": sha256 in claimed}


def _smoke_run(notebook: str) -> Run:
    path = root() / "notebooks" / f"{notebook}.ipynb"
    declared = declarations.declared(path)
    values = recorded(declared, {}, notebook=notebook)
    folder = _own_folder(notebook, declared, values)
    wanted = hashes(path) | {"parameters_sha256": provenance.json_sha256(values)}
    try:
        run = read_run(folder)
        before = upstream_hashes(read_run(root() / name) for name in run.record.upstream)
        if wanted | {"upstream": before} == run.record.model_dump(include={*wanted, "upstream"}):
            return run
    except ResultError:
        pass  # missing, unfinished, changed, or what it was built on has: made again
    print(f"{notebook} is needed first: running it once with its small defaults", flush=True)
    command = [sys.executable, "-m", "nnc_utils.run", str(path), str(folder), "{}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=environment(), **pipes)
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait() != 0:
        raise ResultError(f"{notebook} failed; {folder / 'executed.ipynb'} shows where")
    return read_run(folder)


def environment() -> dict[str, str]:
    """The environment of a child that shall find this package whether or not it is installed."""
    paths = [str(provenance.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NNC_ROOT": str(root())}
