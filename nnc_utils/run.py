"""Notebooks as jobs: one of them without a screen, and the command line.

::

    python -m nnc_utils.run notebooks/01_baseline.ipynb OUT PARAMS.json
    python -m nnc_utils.run benchmark --profile quick

Notebooks themselves call `start`, which is offered here, too.
"""

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

from nnc_utils import parameters as declarations
from nnc_utils import processes, provenance
from nnc_utils.notebook import COPY, environment, hashes, recorded, remove_marks, start, upstream_hashes
from nnc_utils.parameters import ParameterError
from nnc_utils.processes import LockedError
from nnc_utils.provenance import root
from nnc_utils.tables import ResultError, read_run

__all__ = ["execute", "main", "recorded", "start"]
RUNNER_WAIT = 5  # seconds for another runner of the same folder to end
CELL_TIMEOUT = 4 * 3600  # seconds
SOCKET_PATH = 90  # characters; systems allow 104 or more, and a suffix is added


# --- One notebook without a screen --------------------------------------------------------------


def execute(
    notebook: Path, folder: Path, given: dict[str, Any], *, timeout: float = CELL_TIMEOUT, keep: str = ""
) -> bool:
    """Run a notebook with given parameters in a kernel of this interpreter; False where a result was kept.

    Parameters
    ----------
    notebook : the .ipynb file; its folder is the working directory, as in JupyterLab.
    folder : the run folder; the executed notebook stays there, also after a failure.
    given : parameters by name; all are checked before anything runs.
    timeout : seconds for one cell.
    keep : a code hash. A finished result of this code, the same notebook, parameters and upstream
        results is kept, and nothing runs.

    Raises
    ------
    ParameterError, ResultError, LockedError
        Before anything ran.
    RuntimeError
        When the notebook failed; the message ends with its last lines.
    """
    notebook, folder = Path(notebook).resolve(), Path(folder).resolve()
    declared = declarations.declared(notebook)
    values = recorded(declared, given, notebook=str(notebook))
    upstream = [read_run(root() / path) for path in values.get("upstream", [])]
    current = hashes(notebook)
    processes.lock(folder / ".runner.lock", wait=RUNNER_WAIT, what=f"the run folder {folder}")
    wanted = {"parameters_sha256": provenance.json_sha256(values), "upstream": upstream_hashes(upstream)}
    if keep and _kept(folder, wanted | current | {"code_sha256": keep}):
        return False
    print(f"{notebook.stem} ({folder.name}): started", flush=True)
    remove_marks(folder)
    (folder / "error.txt").unlink(missing_ok=True)
    passed = declarations.check(declared, given, notebook=str(notebook))
    if "run_dir" in declared and not passed.get("run_dir"):
        passed["run_dir"] = provenance.relative(folder)
    try:
        _papermill(notebook, folder, passed, timeout)
        if not (folder / "result.json").is_file():
            raise RuntimeError(f"no result.json in {folder}: does the last cell call run.finish(...)?")
    except Exception as error:
        remove_marks(folder)
        provenance.write_atomically(folder / "error.txt", _last_lines(error))
        message = f"{notebook.stem} failed ({folder / 'executed.ipynb'}):\n{_last_lines(error)}"
        raise RuntimeError(message) from error
    finally:
        processes.end_tree()
    read_run(folder)
    return True


def _kept(folder: Path, wanted: dict[str, Any]) -> bool:
    copy = folder / COPY
    try:
        if not (folder / "result.json").is_file():
            shutil.copy2(copy, folder / ".result.partial")  # with its time: what is built on it stays newer
            os.replace(folder / ".result.partial", folder / "result.json")
        record = read_run(folder).record.model_dump(include=set(wanted))
    except (OSError, ResultError):
        return False
    return record == wanted


def _papermill(notebook: Path, folder: Path, given: dict[str, Any], timeout: float) -> None:
    import papermill

    connection = Path(tempfile.mkdtemp(prefix="nnc-"))
    processes.remove_at_end(connection)
    settings = {"NNC_HEADLESS": "1", "NNC_NOTEBOOK": str(notebook), "TQDM_DISABLE": "1"}
    os.environ.update(environment() | settings)
    try:
        papermill.execute_notebook(
            notebook,
            folder / "executed.ipynb",
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


def _kernel_manager(folder: Path) -> type:
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        """Starts the interpreter that runs this, whatever else calls itself python3 on the machine.

        Over sockets in a private folder: no race for ports, and nobody else on the machine listens.
        """

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.connection_file = str(folder / "kernel.json")
            if sys.platform != "win32" and len(self.connection_file) < SOCKET_PATH:
                self.transport = "ipc"
                self.ip = str(folder / "kernel")

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
        for line in lines:
            if line.strip():
                print(f"  {self.name} | {line.rsplit(chr(13))[-1]}", flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


def _last_lines(error: Exception, lines: int = 12) -> str:
    """What a reader needs of an error: the line of each frame of a notebook's traceback, and its end."""
    traceback = getattr(error, "traceback", None)
    text = "\n".join(traceback) if isinstance(traceback, list) else str(error) or type(error).__name__
    *before, last = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n\n")
    frames = [
        line for part in before for line in part.splitlines() if line.startswith(("Cell In", "File", "--"))
    ]
    frames = [line for line in frames if not line.startswith("-----") or "> " in line]
    return "\n".join([*frames, *last.splitlines()][-lines:])


# --- The command line ---------------------------------------------------------------------------


def _given(text: str) -> dict[str, Any]:
    try:
        inline = text.lstrip().startswith("{")
        given = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(f"no parameters in {text!r}: {error}. A JSON file or object is needed") from None
    if not isinstance(given, dict):
        raise ParameterError(f"{text}: an object with parameters by name is needed, not {given!r}")
    return given


def _run_one(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nnc_utils.run", description="Run one notebook; `benchmark --help` tells of the whole."
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path, help="run folder")
    parser.add_argument("parameters", help="a JSON file, or a JSON object")
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT, help="seconds for one cell")
    parser.add_argument("--keep", default="", metavar="SHA256", help="keep a finished result of this code")
    options = parser.parse_args(arguments)
    processes.die_with_parent()
    name, begin = f"{options.notebook.stem} ({options.out.name})", time.time()
    try:
        given, limits = _given(options.parameters), {"timeout": options.timeout, "keep": options.keep}
        ran = execute(options.notebook, options.out, given, **limits)
    except (ParameterError, ResultError, LockedError, RuntimeError, OSError, ValueError) as error:
        print(f"{name}: {error}", flush=True)
        return 1
    end = f"finished in {time.time() - begin:.0f} s" if ran else "was finished before, kept"
    print(f"{name}: {end}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one notebook, or with ``benchmark`` the whole workflow of a profile."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if arguments[:1] == ["benchmark"]:
        from nnc_utils import benchmark

        return benchmark.main(arguments[1:])
    return _run_one(arguments)


if __name__ == "__main__":
    sys.exit(main())
