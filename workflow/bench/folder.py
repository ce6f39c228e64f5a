"""What a notebook calls: `start` in its second cell, `finish` in its last.

A run folder belongs to one writer at a time. ``result.json`` is written last and at once: where it
is, the run is finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from pydantic import ValidationError

from bench import interactive, marks
from bench import parameters as declarations
from bench.parameters import Parameter
from bench.tables import ResultError, Run, RunRecord, read_run
from nnc_utils import processes, provenance
from nnc_utils.provenance import json_sha256, root
from nnc_utils.rows import CompressionRow, run_name

SMOKE_WAIT = 300  # seconds for another process to end a run that is needed here
WRITER_WAIT = 30  # seconds, for the kernel of a killed runner to die


@dataclass(frozen=True)
class Current:
    """The run that a notebook is writing: its folder, its parameters, the finished runs it builds on."""

    notebook: str
    folder: Path
    parameters: dict[str, Any]
    upstream: list[Run]
    notebook_sha256: str
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
        """The upstream runs, own seed first, that have an artifact of this file name or checksum."""
        names = {
            run.run: [n for a in run.record.artifacts for n in (Path(a.path).stem, a.artifact_sha256)]
            for run in self.upstream
        }
        having = [run for run in self.upstream if name in names[run.run]]
        if not having:
            listed = "; ".join(f"{run}: {', '.join(own[::2]) or 'none'}" for run, own in names.items())
            raise ResultError(f"no upstream run has an artifact {name!r}. They have {listed}")
        return sorted(having, key=lambda run: run.record.seed != self.seed)

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
        """Check the rows, hash every artifact (all in artifacts/ if none are given) and write result.json.

        Rows are from `rows.compression_row` and `rows.latency_rows`; the latter get their columns profile,
        run, dataset, seed and commit here. `extra` is what later notebooks want to know, as JSON.
        """
        compression = list(compression)
        common = {"profile": self.profile, "run": self.name, "dataset": self.dataset}
        common["commit"] = provenance.commit()
        files = sorted((self.folder / "artifacts").glob("*.safetensors")) if artifacts is None else artifacts
        claimed = {row.artifact_sha256 for row in compression if row.headline}
        try:
            record = RunRecord(
                **common,
                notebook=self.notebook,
                notebook_sha256=self.notebook_sha256,
                seed=self.seed,
                parameters=self.parameters,
                parameters_sha256=json_sha256(self.parameters),
                code=provenance.loaded(self.folder / marks.MODULES),
                versions=provenance.versions(),
                hardware=provenance.hardware(),
                upstream=marks.hashes(self.upstream, self.parameters),
                wall_seconds=round(time.time() - self.started, 2),
                compression=compression,
                latency=[{"seed": self.seed, **row, **common} for row in latency],
                artifacts=[_artifact(self.folder, Path(file), claimed) for file in files],
                extra=extra or {},
            )
        except ValidationError as error:
            raise ResultError(f"{self.name}: a row breaks the protocol: {error}") from None
        text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False)
        marks.finish(self.folder, text)
        os.environ.pop("NNC_MODULES", None)  # what is loaded from now on belongs to no row
        if not interactive.headless():  # an open notebook in JupyterLab keeps nobody waiting
            processes.unlock(self.folder / ".writer.lock")
        return Run(self.folder, record)


def start(
    notebook: str, namespace: dict[str, Any], needs: Iterable[str] | Mapping[str, dict] = ()
) -> Current:
    """Begin the run of a notebook, in its second cell: ``run = start("01_baseline", globals())``.

    Checks the parameters, finds the upstream runs, and takes the run folder: `run_dir`, else one
    under results/smoke/ that belongs to these parameters. It builds on the runs of the notebooks `needs`:
    where `upstream` is empty on their smoke runs, which are made first where they are missing or outdated;
    a mapping tells which parameters these get.
    """
    if interactive.headless():
        processes.die_with_parent(gently=True)
    path = Path(os.environ.get("NNC_NOTEBOOK", ""))
    path = path if path.stem == notebook else root() / "notebooks" / f"{notebook}.ipynb"
    declared = declarations.declared(path)
    given = {name: namespace[name] for name in declared if name in namespace}
    values = recorded(declared, interactive.injected(namespace) | given, notebook=notebook)
    if values.get("upstream"):
        upstream = [read_run(root() / folder) for folder in values["upstream"]]
    else:
        with_parameters = needs if isinstance(needs, Mapping) else dict.fromkeys(needs, {})
        upstream = [smoke_run(*need) for need in with_parameters.items()]
    folder = root() / given["run_dir"] if given.get("run_dir") else _own_folder(notebook, declared, values)
    processes.lock(folder / ".writer.lock", wait=WRITER_WAIT, what=f"the run folder {folder}")
    marks.remove(folder)
    notebook_sha256 = provenance.notebook_sha256(path)
    marks.begin(folder, json_sha256([values, notebook_sha256, marks.hashes(upstream, values)]))
    provenance.watch(folder / marks.MODULES)
    return Current(notebook, folder, values, upstream, notebook_sha256)


def recorded(declared: dict[str, Parameter], given: dict[str, Any], *, notebook: str) -> dict[str, Any]:
    """Every parameter's checked value, as it is written into results: where a run is kept is left out."""
    values = {name: parameter.default for name, parameter in declared.items()} | given
    values = declarations.check(declared, values, notebook=notebook)
    values.pop("run_dir", None)
    if values.get("upstream"):
        values["upstream"] = [provenance.relative(root() / folder) for folder in values["upstream"]]
    return values


def _own_folder(notebook: str, declared: dict[str, Parameter], values: dict[str, Any]) -> Path:
    own = values != recorded(declared, {}, notebook=notebook)
    return root() / "results/smoke" / (notebook + (f"-{json_sha256(values)[:8]}" if own else ""))


def _artifact(folder: Path, file: Path, claimed: set[str]) -> dict[str, Any]:
    with safetensors.safe_open(file, framework="numpy") as stream:
        sha256 = json.loads(stream.metadata()["artifact"])["sha256"]
    path = file.resolve().relative_to(folder.resolve()).as_posix()
    record = {"path": path, "sha256": provenance.file_sha256(file), "artifact_sha256": sha256}
    return record | {"headline": sha256 in claimed}


def smoke_run(notebook: str, given: dict[str, Any] | None = None) -> Run:
    """A notebook's run with its defaults, or others where given: made where it is missing or outdated."""
    path = root() / "notebooks" / f"{notebook}.ipynb"
    declared = declarations.declared(path)
    values = recorded(declared, given or {}, notebook=notebook)
    folder = _own_folder(notebook, declared, values)
    for lock in ("", ".runner.lock", ".writer.lock"):  # somebody else may be making it just now
        if lock:
            processes.lock(folder / lock, wait=SMOKE_WAIT, what=f"the run folder {folder}")
            processes.unlock(folder / lock)
        if run := marks.finished(folder):
            upstream = [marks.finished(root() / name) for name in run.record.upstream]
            of = all(upstream) and marks.is_of(run, path, values, upstream)
            if of and not marks.is_stale(run.record.code):
                return run
    print(f"{notebook} is needed first: running it once with its small defaults", flush=True)
    command = [sys.executable, "-m", "bench", "run", str(path), str(folder), json.dumps(given or {})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=environment(), **pipes)
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait() != 0:
        raise ResultError(f"{notebook} failed; {folder / 'executed.ipynb'} shows where")
    return read_run(folder)


def environment() -> dict[str, str]:
    """The environment of a child that shall find both packages whether or not they are installed."""
    places = [provenance.PACKAGE.parent, Path(__file__).resolve().parents[1], os.environ.get("PYTHONPATH")]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, places))), "NNC_ROOT": str(root())}
    return {name: value for name, value in os.environ.items() if name != "NNC_MODULES"} | paths
