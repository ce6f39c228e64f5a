"""Processes that are asked and answer, a JSON object a line: `Child` asks, `serve` answers.

A child is a fresh interpreter that gets names of files and numbers, nothing else. Between orders it is
blocked, so it takes nothing from another one that is being timed. It ends when its stdin does: also in the
middle of an order, and whatever way its parent ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ChildError(RuntimeError):
    """A process failed; the message holds the end of what it said."""


class Child:
    """The process ``python -m MODULE ARGUMENTS...``, which has to `serve`."""

    def __init__(self, *command: str, **environment: str) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self.name = " ".join(command[:2])
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed in `close`
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    def ask(self, order: str, **arguments: Any) -> Any:
        """Give an order and wait for its answer."""
        with contextlib.suppress(BrokenPipeError):  # it is gone: its last words tell why
            self.process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip().splitlines()[-12:]
            raise ChildError("\n".join([f"{self.name} ended with code {code}; it said last:", *said]))
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.name} could not {order}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._stderr.close()


@contextlib.contextmanager
def child(*command: str, **environment: str) -> Iterator[Child]:
    """Start a process, with more in its environment, and close it, whatever happens in between."""
    started = Child(*command, **environment)
    try:
        yield started
    finally:
        started.close()


def serve(orders: object) -> None:
    """Answer orders, each a method (or a function of a module) of that name, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what anything else prints goes to stderr
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:  # in a thread, so that stdin's end also ends a long order
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        order = json.loads(waiting.get())
        try:
            answer = {"answer": getattr(orders, order.pop("order"))(**order)}
        except Exception as error:  # told to whoever gave the order
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
