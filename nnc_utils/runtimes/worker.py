"""``python -m nnc_utils.runtimes.worker NAME``: a process with one runtime, which loads, times and predicts.

It imports its runtime and nothing else, so that its memory is the runtime's.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nnc_utils import runtimes
from nnc_utils.runtimes.children import Child, child, serve

FEWEST, MOST = 2, 1000  # samples a visit
SPREAD = 0.05  # seconds in which Linux gives each of a session's threads a core; until then they share one


def worker(
    runtime: str, temporary: Path | None = None, *, beside_others: bool = False
) -> contextlib.AbstractContextManager[Child]:
    """Start one; what the runtime leaves behind when it ends lies in the temporary folder.

    What works `beside_others` does so with one thread: OpenMP's threads are slow where they have to share.
    """
    environment = {"TMPDIR": str(temporary)} if temporary else {}
    environment |= {"OMP_NUM_THREADS": "1"} if beside_others else {}
    return child("nnc_utils.runtimes.worker", runtime, **environment)


class Worker:
    """The sessions of one runtime by key; each public method is an order."""

    def __init__(self, runtime: str) -> None:
        runtimes.adapter(runtime)
        self._runtime, self._sessions, self._images = runtime, {}, {}

    def convert(self, *, source: str, precision: str, folder: str) -> str:
        """The file that the runtime loads, written from an artifact."""
        return str(runtimes.convert(self._runtime, Path(source), precision, Path(folder)))

    def load(self, *, key: str, path: str, precision: str, threads: int) -> dict[str, Any]:
        """Load what `convert` wrote; `load_ms` is the time of that."""
        start = time.perf_counter_ns()
        session = runtimes.adapter(self._runtime).load(Path(path), precision, threads)
        load_ms = (time.perf_counter_ns() - start) / 1e6
        self._keep(key, session)
        return {"load_ms": load_ms, "threads": session.threads, "runtime_bytes": session.runtime_bytes}

    def identity(self, *, key: str, shape: list[int], threads: int, folder: str) -> dict[str, Any]:
        """Load a network that returns its input; its file stays in the folder."""
        session = runtimes.identity(self._runtime, tuple(shape), threads, Path(folder))
        self._keep(key, session)
        return {"threads": session.threads}

    def _keep(self, key: str, session: runtimes.Session) -> None:
        self._sessions[key] = session
        gc.collect()
        gc.freeze()  # what is there by now stays: later collections need not look through it again

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

    def predict(self, *, key: str, images: str, batch: int, target: str, first: int | None = None) -> None:
        """Write the class of every image, or of the first ones, uint8, as predicted batch by batch."""
        session, inputs = self._sessions[key], self._read(images)[:first]
        batches = (inputs[start : start + batch] for start in range(0, len(inputs), batch))
        logits = np.concatenate([session.predict(np.ascontiguousarray(part)) for part in batches])
        if not np.isfinite(logits).all():
            raise ValueError("the runtime's logits are not finite")
        np.save(target, logits.argmax(1).astype(np.uint8))

    def memory(self) -> float:
        """The most memory this process has had, in MB (10**6 bytes)."""
        return peak_rss() / 1e6

    def _read(self, images: str) -> np.ndarray:
        if images not in self._images:
            self._images[images] = np.load(images, mmap_mode="r")
        return self._images[images]


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


if __name__ == "__main__":
    serve(Worker(sys.argv[1]))
