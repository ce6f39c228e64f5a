"""A server and clients as processes of this machine, which stay for several runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nnc_utils import models
from nnc_utils.data import Data, Split
from nnc_utils.federated import plan as plans
from nnc_utils.federated.split import write_images
from nnc_utils.runtimes.children import Child

LOOKS = 5  # at the validation images in a run


@dataclass(frozen=True)
class Outcome:
    """The network that clients hold after the last round, in eval mode, and what the run took.

    `ledger`: rounds, clients, up_bytes, down_bytes (of all, counted at the server's sockets), train_images,
    seconds, `agreed` (clients that hold that network, bit for bit), `history` of the rounds, `said`.
    """

    network: models.ResNet
    ledger: dict[str, Any]


class Federation:
    """A server that has the validation images, and a client for each part of the training images.

    Each process gets a file of its own images, and clients a port. A context manager. `ready`: all wait for
    orders; not so where a run was interrupted or has failed, or one of the clients was lost.
    """

    def __init__(self, images: Data, parts: list[Tensor], *, patience: float = 600) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name).joinpath
        write_images(self._file("validation"), images, images.validation)
        for client, part in enumerate(parts):
            own = Split(images.train.images[part], images.train.labels[part])
            write_images(self._file(f"{client}"), images, own)
        arguments = [str(self._file("validation")), "--patience", str(patience)]
        self._server = Child("nnc_utils.federated.server", *arguments)
        self._port = self._server.ask("port")
        self._clients: dict[int, Child] = {}
        self.ready = True
        for client in range(len(parts)):
            self.start(client)

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, client: int, *, wait: bool = False) -> None:
        """Start a client, or start it again; in a run it comes late. With `wait` it has come to the door."""
        where = ["--server", f"127.0.0.1:{self._port}", "--images", str(self._file(f"{client}"))]
        command = ["nnc_utils.federated.client", *where, "--name", str(client)]
        self._clients[client] = Child(*command, OMP_NUM_THREADS="1")  # all train at the same time
        if wait:
            self._server.ask("knocked")

    def kill(self, client: int) -> None:
        """End a client at once, whatever it is doing."""
        self._clients[client].process.kill()
        self._clients[client].close()

    def close(self) -> None:
        """End all processes; clients end when the server hangs up."""
        for child in (self._server, *self._clients.values()):
            child.close()
        self._folder.cleanup()

    def run(self, plan: plans.Plan, *, watch: Callable[[str], None] = print) -> Outcome:
        """Run a plan with all clients; `watch` gets a line for what happens. Clients that ended start again.

        A `ChildError` where no client is left.
        """
        for client in [name for name, child in self._clients.items() if child.process.poll() is not None]:
            self.start(client)
        said: list[str] = []
        history: list[dict[str, Any]] = []

        def order(name: str, **arguments: Any) -> dict[str, Any]:
            answer = self._server.ask(name, **arguments)
            for line in answer.pop("lines"):
                said.append(line)
                watch(line)
            return answer

        self.ready = False
        began, rounds, file = time.perf_counter(), plan.rounds, str(self._file("network"))
        order("begin", plan=plan.to_json(), clients=len(self._clients))
        for number in range(1, rounds + 1):
            order("send", number=number)
            watch(f"round {number} of {rounds}: sent")
            look = number * LOOKS // rounds > (number - 1) * LOOKS // rounds
            history.append(order("collect", number=number, look=look))
            watch(_line(history[-1], rounds))
        ledger = {"rounds": rounds, "clients": len(self._clients)} | order("end", file=file)
        ledger |= {"train_images": sum(record["seen"] for record in history), "history": history}
        ledger |= {"seconds": round(time.perf_counter() - began, 2), "said": said}
        self.ready = ledger["agreed"] == ledger["clients"]
        network = plan.network().eval()
        plans.load(network, load_file(file))
        return Outcome(network, ledger)


def _line(record: dict[str, Any], rounds: int) -> str:
    """What a round came to, in words."""
    text = f"round {record['round']} of {rounds}: {record['clients']} of {record['asked']} clients, "
    text += f"{record['up_bytes'] / 1e6:.2f} MB up, {record['down_bytes'] / 1e6:.2f} MB down"
    return text + (f", validation {record['validation']:.2f} %" if record["validation"] is not None else "")
