"""A process with one runtime in it, which loads, times and predicts as it is told.

``python -m nnc_utils.runtimes.worker NAME`` reads a JSON object a line from stdin and answers each with
one on stdout. Between orders it is blocked, so it takes nothing from another worker that is being timed.
It imports its runtime and nothing else, so that its memory is the runtime's, and ends with stdin.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil

from nnc_utils import runtimes

FEWEST, MOST = 2, 1000  # samples a visit
SPREAD = 0.05  # seconds in which Linux gives each of a session's threads a core; until then they share one


class Worker:
    """The sessions of one runtime by key; each public method is an order."""

    def __init__(self, runtime: str) -> None:
        self._adapter = runtimes.adapter(runtime)
        self._sessions: dict[str, runtimes.Session] = {}
        self._images: dict[str, np.ndarray] = {}

    def convert(self, *, source: str, precision: str, folder: str) -> str:
        """The file that the runtime loads, made of an artifact."""
        return str(self._adapter.convert(Path(source), precision, Path(folder)))

    def load(self, *, key: str, path: str, precision: str, threads: int) -> dict[str, Any]:
        """Load what `convert` made; `load_ms` is the time of that."""
        start = time.perf_counter_ns()
        session = self._adapter.load(Path(path), precision, threads)
        load_ms = (time.perf_counter_ns() - start) / 1e6
        self._sessions[key] = session
        _settle()
        return {"load_ms": load_ms, "threads": session.threads, "runtime_bytes": session.runtime_bytes}

    def identity(self, *, key: str, shape: list[int], threads: int, folder: str) -> dict[str, Any]:
        """Make a network that gives its input back; what it is compiled to stays in the folder."""
        self._sessions[key] = self._adapter.identity(tuple(shape), threads, Path(folder))
        _settle()
        return {"threads": self._sessions[key].threads}

    def operators(self, *, key: str) -> dict[str, int]:
        """The integer operators of a session."""
        return dict(self._sessions[key].integer_operators)

    def time(self, *, key: str, images: str, batch: int, seconds: float) -> list[int]:
        """Nanoseconds of single predictions for about so many seconds.

        Before them comes a warm-up of a tenth of these, and as long as several threads need to spread.
        """
        session = self._sessions[key]
        inputs = np.take(self._read(images), range(batch), axis=0, mode="wrap")
        spread = SPREAD if seconds and session.threads > 1 else 0.0
        warm_until = time.perf_counter() + max(seconds / 10, spread)
        session.predict(inputs)
        while time.perf_counter() < warm_until:
            session.predict(inputs)
        gc.disable()  # no collection while the clock runs
        samples: list[int] = []
        clock, until = time.perf_counter_ns, time.perf_counter() + 0.9 * seconds
        while len(samples) < FEWEST or (len(samples) < MOST and time.perf_counter() < until):
            start = clock()
            session.predict(inputs)
            samples.append(clock() - start)
        gc.enable()
        return samples

    def predict(
        self, *, key: str, images: str, batch: int, target: str, first: int | None = None
    ) -> dict[str, Any]:
        """Write the class of every image, or of the first ones, uint8, as predicted batch by batch."""
        session, pictures = self._sessions[key], self._read(images)[:first]
        batches = (pictures[start : start + batch] for start in range(0, len(pictures), batch))
        logits = np.concatenate([session.predict(np.ascontiguousarray(inputs)) for inputs in batches])
        if not np.isfinite(logits).all():
            raise ValueError("the runtime's logits are not finite")
        np.save(target, logits.argmax(1).astype(np.uint8))
        return {}

    def memory(self) -> dict[str, float]:
        """The most memory this process has had, in MB (10**6 bytes)."""
        return {"peak_rss_mb": peak_rss() / 1e6}

    def _read(self, images: str) -> np.ndarray:
        if images not in self._images:
            self._images[images] = np.load(images, mmap_mode="r")
        return self._images[images]


def _settle() -> None:
    """What is there by now stays: later collections need not look through it again."""
    gc.collect()
    gc.freeze()


def peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    if sys.platform == "linux":
        # getrusage would give the parent's peak, which a child inherits when it is forked.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _orders() -> Iterator[dict[str, Any]]:
    """Orders as they come; a thread waits for them, so that stdin's end ends a long order, too."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(waiting.get())


def only_answers() -> TextIO:
    """This process's stdout for answers alone: what anything else prints there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return answers


def main(runtime: str) -> None:
    """Serve until stdin ends."""
    answers = only_answers()
    worker = Worker(runtime)
    for order in _orders():
        act: Callable[..., Any] = getattr(worker, order.pop("order"))
        try:
            answer = {"answer": act(**order)}
        except Exception as error:  # told to whoever gave the order
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
