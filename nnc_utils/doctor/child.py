"""``python -m nnc_utils.doctor.child``: the process that compiles a foreign file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from nnc_utils import processes


def examine(*, path: str, runtime: str, entries: list[str]) -> dict:
    """`nnc_utils.doctor.examine`, in this process."""
    module = importlib.import_module(f"nnc_utils.doctor.in_{runtime}")
    settings = dict(entry.split("=", 1) for entry in entries)
    with tempfile.TemporaryDirectory() as folder:
        if path.endswith(".safetensors"):
            from nnc_utils import runtimes

            path = runtimes.convert(runtime, Path(path), "int8", Path(folder))
        return dataclasses.asdict(module.examine(Path(path), settings))


def fix(*, path: str, out: str, inputs: str) -> dict:
    """`nnc_utils.doctor.fix.fix`, in this process."""
    from nnc_utils.doctor import fix

    return fix.fix(Path(path), Path(out), inputs)


def bound_memory(gigabytes: float) -> None:
    """Let this process fail to allocate more, where the system has such a limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)


def main() -> None:
    """Answer the order on stdin with one line of JSON on stdout; what libraries print goes to stderr."""
    processes.die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.load(sys.stdin)
    bound_memory(order.pop("gigabytes"))
    try:
        answer = {"answer": {"examine": examine, "fix": fix}[order.pop("order")](**order)}
    except MemoryError:
        answer = {"error": "more memory is needed than the process may take"}
    except Exception as error:  # the runtime's own words about a foreign or damaged file
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # some libraries break when they are taken down


if __name__ == "__main__":
    main()
