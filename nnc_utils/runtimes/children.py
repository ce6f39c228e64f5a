"""The other end of `runtimes.worker`: processes that are started, asked and closed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class ChildError(RuntimeError):
    """A process failed; the message holds the end of what it said."""


class Child:
    """A process that answers on stdout, line by line; it ends when its stdin does."""

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._name = " ".join(arguments[:2])
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    def answer(self) -> str:
        """The next line."""
        line = self._process.stdout.readline()
        if line:
            return line
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()[-12:]
        raise ChildError("\n".join([f"{self._name} ended with code {code}; it said last:", *said]))

    def ask(self, order: str, **arguments: Any) -> Any:
        """Give an order to a worker and wait for its answer."""
        with contextlib.suppress(BrokenPipeError):  # it is gone: the answer tells why
            self._process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._process.stdin.flush()
        answer = json.loads(self.answer())
        if "error" in answer:
            raise ChildError(f"{self._name} could not {order}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


@contextlib.contextmanager
def child(arguments: Sequence[str], **environment: str) -> Iterator[Child]:
    """Start a process, with more in its environment, and close it, whatever happens in between."""
    started = Child(arguments, **environment)
    try:
        yield started
    finally:
        started.close()


def worker(
    runtime: str, temporary: Path | None = None, *, beside_others: bool = False
) -> contextlib.AbstractContextManager[Child]:
    """A process with one runtime in it; what that leaves behind when it ends lies in `temporary`.

    What works `beside_others` does so with one thread: OpenMP's threads are slow where they have to share.
    """
    environment = {"TMPDIR": str(temporary)} if temporary else {}
    environment |= {"OMP_NUM_THREADS": "1"} if beside_others else {}
    return child(["nnc_utils.runtimes.worker", runtime], **environment)
