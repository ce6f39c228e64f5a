"""A notebook as a job, without a screen: ``python -m bench run NOTEBOOK OUT PARAMS.json``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat

from bench import folder as folders
from bench import marks
from bench import parameters as declarations
from bench.parameters import ParameterError
from bench.tables import ResultError, read_run
from nnc_utils import processes, provenance
from nnc_utils.processes import LockedError

RUNNER_WAIT = 5  # seconds for another runner of the same folder to end
CELL_TIMEOUT = 4 * 3600  # seconds
MEASURED = {"parameters", "setup", "benchmark"}  # tags of the cells that a benchmark needs
# what these measure is made in their lesson
LESSON_IS_MEASURED = {"00_the_usual_recipe", "01_baseline", "10_report"}
SOCKET_PATH = 90  # characters; systems allow 104 or more, and a suffix is added


def execute(
    notebook: Path,
    folder: Path,
    given: dict[str, Any],
    *,
    timeout: float = CELL_TIMEOUT,
    keep: str = "",
    lesson: bool = True,
) -> bool:
    """Run a notebook with given parameters in a kernel of this interpreter; False where a result was kept.

    The executed notebook stays in the run folder, also after a failure, which is a RuntimeError with its last
    lines; every other error comes before anything ran. `keep` "any" keeps a finished result of the same
    notebook, parameters and upstream results; "current" if also the modules that it used are what they were.
    Without its `lesson` only what a notebook measures is run, where that needs nothing of the lesson.
    """
    notebook, folder = Path(notebook).resolve(), Path(folder).resolve()
    declared = declarations.declared(notebook)
    values = folders.recorded(declared, given, notebook=str(notebook))
    upstream = [read_run(provenance.root() / path) for path in values.get("upstream", [])]
    provenance.notebook_sha256(notebook)  # a cell that is no Python is told before anything runs
    processes.lock(folder / ".runner.lock", wait=RUNNER_WAIT, what=f"the run folder {folder}")
    before = marks.finished(folder) if keep else None
    same = before and marks.is_of(before, notebook, values, upstream)
    if same and (keep == "any" or not marks.is_stale(before.record.code)):
        return False
    marks.remove(folder)
    print(f"{notebook.stem} ({folder.name}): started{_progress(folder)}", flush=True)
    (folder / "error.txt").unlink(missing_ok=True)
    passed = declarations.check(declared, given, notebook=str(notebook))
    if "run_dir" in declared and not passed.get("run_dir"):
        passed["run_dir"] = provenance.relative(folder)
    try:
        _papermill(notebook, folder, passed, timeout, lesson)
        if not (folder / "result.json").is_file():
            raise RuntimeError(f"no result.json in {folder}: does the last cell call run.finish(...)?")
    except Exception as error:
        marks.remove(folder)
        provenance.write_atomically(folder / "error.txt", _last_lines(error))
        message = f"{notebook.stem} failed ({folder / 'executed.ipynb'}):\n{_last_lines(error)}"
        raise RuntimeError(message) from error
    finally:
        processes.end_tree()
    read_run(folder)
    return True


def _progress(folder: Path) -> str:
    """Which run of the benchmark's this is, and how long the rest takes by the last measurement."""
    plan = json.loads(os.environ.get("NNC_PLAN", "{}"))
    if provenance.relative(folder) not in plan:
        return ""
    left = [s for name, s in plan.items() if not (provenance.root() / name / marks.RESULT).is_file()]
    about = f", about {max(1, sum(left) / 60):.0f} min to go" if any(left) else ""
    return f", {len(plan) - len(left) + 1} of {len(plan)}{about}"


def without_lesson(notebook: Path) -> nbformat.NotebookNode:
    """The cells of a notebook that its benchmark needs."""
    content = nbformat.read(notebook, as_version=4)
    content.cells = [cell for cell in content.cells if MEASURED & set(cell.metadata.get("tags", []))]
    return content


def _papermill(notebook: Path, folder: Path, given: dict[str, Any], timeout: float, lesson: bool) -> None:
    import papermill

    connection = Path(tempfile.mkdtemp(prefix="nnc-"))
    processes.remove_at_end(connection)
    executed = notebook
    if not lesson and notebook.stem not in LESSON_IS_MEASURED:
        executed = connection / notebook.name
        nbformat.write(without_lesson(notebook), executed)
    settings = {"NNC_HEADLESS": "1", "NNC_NOTEBOOK": str(notebook), "TQDM_DISABLE": "1"}
    settings["NNC_CALLER"] = os.environ.get("NNC_CALLER") or os.getcwd()
    os.environ.update(folders.environment() | settings)
    try:
        papermill.execute_notebook(
            _plain(executed),
            _plain(folder / "executed.ipynb"),
            parameters=given,
            kernel_name="python3",
            language="python",
            cwd=notebook.parent,
            progress_bar=False,
            stdout_file=_Prefixed(notebook.stem),
            execution_timeout=int(timeout),
            kernel_manager_class=_kernel_manager(connection),
        )
    finally:
        shutil.rmtree(connection, ignore_errors=True)


def _plain(path: Path) -> str:
    """A path for papermill, to which braces mean a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _kernel_manager(folder: Path) -> type:
    """Starts the interpreter that runs this, whatever else calls itself python3 on the machine.

    Over sockets in a private folder: no race for ports, and nobody else on the machine listens.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.connection_file = str(folder / "kernel.json")
            if sys.platform != "win32" and len(self.connection_file) < SOCKET_PATH:
                self.transport, self.ip = "ipc", str(folder / "kernel")

        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    return ThisInterpreter


class _Prefixed:
    """The screen, for what a notebook prints: every line with the notebook's name before it."""

    def __init__(self, name: str) -> None:
        self.name, self.rest = name, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            print(f"  {self.name} | {line.rsplit(chr(13))[-1]}", flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


def _last_lines(error: Exception, lines: int = 12) -> str:
    """What a reader needs of an error: the line of each frame of a notebook's traceback, and its end."""
    traceback = getattr(error, "traceback", None)
    text = "\n".join(traceback) if isinstance(traceback, list) else str(error) or type(error).__name__
    *before, last = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n\n")
    frames = [line for part in before for line in part.splitlines() if re.match(r"Cell In|File|--+> ", line)]
    return "\n".join([*frames, *last.splitlines()][-lines:])


def _given(text: str) -> dict[str, Any]:
    """Parameters by name, of a JSON file or object."""
    try:
        given = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(f"no parameters in {text!r}: {error}. A JSON file or object is needed") from None
    if not isinstance(given, dict):
        raise ParameterError(f"{text}: a JSON object with parameters by name is needed, not {given!r}")
    return given


def main(arguments: list[str]) -> int:
    """``python -m bench run``: its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench run", description="Run one notebook.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path, help="run folder")
    parser.add_argument("parameters", help="a JSON file, or a JSON object")
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT, help="seconds for one cell")
    kinds = "keep a finished result: any, or if its code is current"
    parser.add_argument("--keep", default="", choices=["any", "current"], help=kinds)
    parser.add_argument("--no-lesson", action="store_true", help="run only what is measured")
    options = parser.parse_args(arguments)
    processes.die_with_parent()
    name, begin = f"{options.notebook.stem} ({options.out.name})", time.time()
    try:
        given, limits = _given(options.parameters), {"timeout": options.timeout, "keep": options.keep}
        ran = execute(options.notebook, options.out, given, lesson=not options.no_lesson, **limits)
    except (ParameterError, ResultError, LockedError, RuntimeError, OSError, ValueError) as error:
        print(f"{name}: {error}", flush=True)
        return 1
    end = f"finished in {time.time() - begin:.0f} s" if ran else "was finished before, kept"
    print(f"{name}: {end}", flush=True)
    return 0
