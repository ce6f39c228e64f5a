"""Flower: its SuperLink, and a SuperNode for each client, as processes of an environment of their own.

Its pins clash with this package's: `workflow/setup_env.py --flower` sets that environment up, which takes
torch from here. A relay between the SuperNodes and the SuperLink counts the bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nnc_utils.data import Data, Split
from nnc_utils.federated.compress import State
from nnc_utils.federated.plan import Plan
from nnc_utils.federated.split import write_images

LIMIT = 3 * 3600  # seconds of a run
START = 300  # seconds that the SuperLink may take to listen: `flwr run` tries only once
BIND = "import os, sys; from nnc_utils.processes import die_with_parent; die_with_parent(gently=True); "
# begins the command of a process that ends when this one does, also where this one is killed
WITH_US = [sys.executable, "-c", BIND + "os.execv(sys.argv[1], sys.argv[1:])"]


def venv() -> Path:
    """Its environment; the environment variable FLOWER_VENV names another folder."""
    return Path(os.environ.get("FLOWER_VENV") or Path(__file__).parents[2] / ".venv-flower")


def missing(name: str = "flower") -> str:
    """Whether its environment has been set up."""
    try:
        failed = json.loads((venv() / "setup.json").read_text())["failed"]
    except (OSError, ValueError, KeyError):
        return "not installed: run workflow/setup_env.py --flower"
    return f"not installed ({failed}): run workflow/setup_env.py --flower --again" if failed else ""


class Relay:
    """Passes connections on to a port of this machine, and counts their bytes in both directions."""

    def __init__(self, port: int) -> None:
        self.target, self.up, self.down, self.counting = port, 0, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(None)  # silence is no error, whatever default a download has set
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # the SuperLink does not listen yet: its nodes try again
                    near.close()
                    continue
                for end in (near, far):
                    end.settimeout(None)
                for ends in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
                with self.counting:
                    setattr(self, way, getattr(self, way) + len(data))
            target.shutdown(socket.SHUT_WR)


def run(plan: Plan, images: Data, parts: list[Tensor]) -> tuple[State, dict[str, Any]]:
    """A plan's rounds in float32: the network's state, and a ledger as `federation.Outcome` has it.

    ImportError without its environment; a RuntimeError holds Flower's own words.
    """
    if missing():
        raise ImportError(f"flower is {missing()}")
    # what Flower starts ends soon after its parent, and may write until then
    scratch_folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with scratch_folder as scratch, contextlib.ExitStack() as running:
        folder = Path(scratch)
        port, *own = _free_ports(1 + len(parts))
        relay = Relay(port)
        running.callback(relay.listener.close)
        link = ["flower-superlink", "--port", str(port), "--disable-runtime-dependency-installation"]
        _wait_for(port, running.enter_context(_process(folder, *link, "--insecure")))
        for number, (part, its) in enumerate(zip(parts, own, strict=True)):
            file = folder / f"{number}.safetensors"
            write_images(file, images, Split(images.train.images[part], images.train.labels[part]))
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{relay.port}"]
            node += ["--port", str(its), "--node-config", f'images="{file}"']
            running.enter_context(_process(folder, *node))
        (folder / "config.toml").write_text(
            f'[superlink.suite]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        (folder / "plan.json").write_text(json.dumps(plan.to_json()))
        (folder / "nodes.json").write_text(json.dumps(len(parts)))
        _submit(folder)
        took = json.loads((folder / "took.json").read_text())
        state = load_file(folder / "network.safetensors")
        sent = {"up_bytes": relay.up, "down_bytes": relay.down, "train_images": took["seen"]}
    ledger = {"rounds": plan.rounds, "clients": len(parts), "agreed": 0, "history": [], "said": []}
    return state, ledger | sent | {"seconds": round(took["seconds"], 2)}


def _submit(folder: Path) -> None:
    """Let `flwr run` start the app, and wait for its end."""
    app = Path(__file__).with_name("flower_app")
    command = [_tool("flwr"), "run", str(app), "suite", "--stream"]
    command += ["--run-config", f'plan="{folder}/plan.json"']
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": LIMIT}
    done = subprocess.run(command, env=_environment(folder), cwd=folder, **pipes)
    if not (folder / "network.safetensors").is_file():
        logs = "".join(file.read_text(errors="replace")[-1500:] for file in sorted(folder.glob("*.log")))
        said = "\n".join((logs + done.stdout + done.stderr).strip().splitlines()[-25:])
        raise RuntimeError(f"Flower has not finished its rounds; it said last:\n{said}")


def _tool(name: str) -> str:
    return str(venv() / ("Scripts" if os.name == "nt" else "bin") / name)


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(_tool("flwr")).parent), os.environ.get("PATH", "")])
    own = {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]), "FLWR_HOME": str(folder)}
    own |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "no_proxy": "*"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def _process(folder: Path, tool: str, *arguments: str) -> Iterator[subprocess.Popen]:
    """A process that ends, with all that it has started, at the end."""
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".log", delete=False) as log:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        command = [*WITH_US, _tool(tool), *arguments]
        process = subprocess.Popen(command, env=_environment(folder), cwd=folder, **quiet)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    """Wait until a process listens on its port, or has ended: then its log tells why."""
    until = time.monotonic() + START
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses just now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
