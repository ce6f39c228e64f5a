"""Processes that leave nothing behind: they end with their parent, and write a folder alone."""

from __future__ import annotations

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
    try:
        family = psutil.Process().children(recursive=True)
    except psutil.Error:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.Error:
            continue
    if also_self:
        for folder in _temporary:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + signal.SIGTERM)


def remove_at_end(folder: Path) -> None:
    """Remove a temporary folder, too, when this process is made to end."""
    _temporary.append(folder)


def die_with_parent(*, gently: bool = False) -> None:
    """End this process, and all below it, when its parent ends; also on SIGTERM and SIGINT.

    Linux tells at once (PR_SET_PDEATHSIG); a thread that looks every half second does it everywhere.

    Parameters
    ----------
    gently : leave the handlers of SIGTERM and SIGINT to someone else (a kernel, Snakemake), so that
        the parent's end is a SIGKILL.
    """
    parent = psutil.Process(os.getppid()) if os.getppid() > 1 else None
    if not gently:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end_on_signal)
    if sys.platform == "linux":
        import ctypes

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

    The operating system owns the lock: when the holder dies in whatever way, it is free again.

    Parameters
    ----------
    path : the lock file; it stays behind, which means nothing.
    wait : seconds to wait for another holder.
    what : what the lock is for, in the error.

    Raises
    ------
    LockedError
        When another process still holds it after the wait; the message names it.
    """
    path = Path(path).absolute()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise LockedError(
            f"{what} is in use by {_holder(path)}: wait for it to end, or end it; nothing was changed"
        ) from None
    _held[path] = held
    # beside the lock, since Windows lets nobody read a locked file
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    path.with_suffix(".owner").write_text(json.dumps(owner))


def unlock(path: Path) -> None:
    """Give a lock back before the process ends."""
    held = _held.pop(Path(path).absolute(), None)
    if held is not None:
        held.release()


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.with_suffix(".owner").read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
