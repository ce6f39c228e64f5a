"""Processes that leave nothing behind: they end with their parent, and write a folder alone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

_held: dict[Path, FileLock] = {}
_temporary: list[Path] = []


class LockedError(RuntimeError):
    """Another process is writing into the folder."""


def end_tree(*, also_self: bool = False) -> None:
    """Kill every descendant of this process; then, if wanted, the process itself, without clean-up."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    if also_self:
        for folder in _temporary:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + signal.SIGTERM)


def remove_at_end(folder: Path) -> None:
    """Remove a temporary folder, too, when this process is made to end."""
    _temporary.append(folder)


def die_with_parent(*, gently: bool = False) -> None:
    """End this process, and all below it, when its parent ends; also on SIGTERM and SIGINT.

    Linux tells at once (PR_SET_PDEATHSIG), a thread that looks every half second everywhere. `gently` leaves
    the two signals to someone else (a kernel, Snakemake), so that the parent's end is a SIGKILL.
    """
    parent = psutil.Process(os.getppid()) if os.getppid() > 1 else None
    if not gently:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end_on_signal)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        chosen = signal.SIGKILL if gently else signal.SIGTERM
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(chosen), 0, 0, 0)
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), name="follow-parent", daemon=True).start()


def end_on_signal(number: int, frame: object) -> None:
    """A signal handler: end this process with all below it."""
    end_tree(also_self=True)


def _follow(parent: psutil.Process) -> None:
    # On Unix an orphan gets another parent; on Windows it keeps the number of a process that is gone.
    while os.getppid() == parent.pid and parent.is_running():
        time.sleep(0.5)
    end_tree(also_self=True)


def lock(path: Path, *, wait: float, what: str) -> None:
    """Hold a lock file until this process ends (or `unlock`), so that one process writes at a time.

    The operating system owns the lock: when the holder dies in whatever way, it is free again. The file stays
    behind, which means nothing. LockedError names who still holds it (`what` it is for) after the wait (s).
    """
    path = Path(path).absolute()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    held, owner = (
        FileLock(path, thread_local=False),
        path.with_suffix(".owner"),
    )  # Windows reads no locked file
    try:
        held.acquire(timeout=wait)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(owner.read_text())
            holder = f"process {said['pid']} on {said['host']} since {said['since']}"
        raise LockedError(
            f"{what} is in use by {holder}: wait for it to end, or end it; nothing was changed"
        ) from None
    _held[path] = held
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))


def unlock(path: Path) -> None:
    """Give a lock back before the process ends."""
    held = _held.pop(Path(path).absolute(), None)
    if held is not None:
        held.release()
