"""A client: a process that has images, and sends nothing but updates.

python -m nnc_utils.federated.client --server HOST:PORT --images client_0.safetensors --name 0
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import Any

from torch import nn

from nnc_utils import training
from nnc_utils.data import Data
from nnc_utils.federated import plan as plans
from nnc_utils.federated.compress import Compressor, Feedback, from_bytes
from nnc_utils.federated.messages import Connection
from nnc_utils.federated.split import read_images


def train(network: nn.Module, images: Data, plan: plans.Plan, number: int) -> int:
    """A client's share of a round, in place; how many images it has seen.

    It takes two steps at least, in smaller batches where its images are few: one step alone would be the end
    of a cycle of the learning rate, which is 0.
    """
    count = len(images.train)
    batch_size = min(plan.batch_size, max(2, count // 2))  # batch-norm needs two
    options = {"augment": plan.augment, "batch_size": batch_size, "threads": 1}
    options["epochs"] = max(plan.local_epochs, 2 / (count // batch_size))
    options |= {"learning_rate": plan.rate(number), "seed": 1000 * plan.seed + number}
    return training.fit(network, images, **options).images


class Client:
    """What a client knows: its images, and in a run the network that the server has sent."""

    def __init__(self, name: int, images: Data, connection: Connection) -> None:
        self.name, self.images, self.connection = name, images, connection
        connection.send(kind="hello", name=name, images=len(images.train))

    def begin(self, header: dict[str, Any], body: bytes) -> None:
        """A run begins: make the network that all start from."""
        self.plan = plans.Plan.from_json(header["plan"])
        self.network = self.plan.network()
        self.known = plans.floats(self.network)
        self.sender = Feedback(self.plan.up, keep=self.plan.feedback)
        self.connection.send(kind="ready", digest=plans.digest(self.known))

    def take(self, header: dict[str, Any], body: bytes) -> None:
        """Hold what the server wants held: a step from the network of before, or a whole one."""
        shapes = {name: tensor.shape for name, tensor in self.known.items()}
        if header["whole"]:
            self.known = from_bytes(body, shapes, Compressor())
        elif body:
            step = from_bytes(body, shapes, self.plan.down)
            self.known = {name: self.known[name] + step[name] for name in step}

    def round(self, header: dict[str, Any], body: bytes) -> None:
        """Train from the server's network on one's own images, and send the update."""
        self.take(header, body)
        plan, number = self.plan, header["round"]
        plans.load(self.network, self.known)
        seen = train(self.network, self.images, plan, number)
        after = plans.floats(self.network)
        update = {name: after[name] - self.known[name] for name in after}
        sent, _ = self.sender.send(update, plan.draws(number, self.name))
        self.connection.send(sent, kind="update", round=number, seen=seen)

    def refused(self, header: dict[str, Any], body: bytes) -> None:
        """The server could not read the update: nothing of it has arrived."""
        print(f"the server refused the update: {header['why']}")
        self.sender.take_back()

    def end(self, header: dict[str, Any], body: bytes) -> None:
        """The run is over: say which network one holds."""
        self.take(header, body)
        self.connection.send(kind="done", digest=plans.digest(self.known))

    def serve(self) -> None:
        """Do what the server says until it hangs up."""
        orders = {"begin": self.begin, "round": self.round, "refused": self.refused, "end": self.end}
        while True:
            header, body = self.connection.receive()
            orders[header["kind"]](header, body)


def main(arguments: list[str]) -> int:
    """Connect, and serve until the server hangs up."""
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.federated.client", description=__doc__)
    parser.add_argument("--server", required=True, help="HOST:PORT")
    parser.add_argument("--images", required=True, help="a file of federated.split.write_images")
    parser.add_argument("--name", required=True, type=int, help="a number that no other client has")
    given = parser.parse_args(arguments)
    host, _, port = given.server.rpartition(":")
    sys.stdout = sys.stderr
    try:
        images = read_images(given.images)
        connection = Connection(socket.create_connection((host, int(port)), timeout=60), patience=None)
    except Exception as error:  # whatever a file of another kind makes its reader raise
        print(f"client {given.name} cannot start: {error}")
        return 1
    try:
        Client(given.name, images, connection).serve()
    except OSError as error:
        print(f"the server has gone: {error}")
    except (ValueError, KeyError, training.TrainingError) as error:  # diverged, or told nonsense
        print(error)
        connection.send(kind="failed", why=f"{error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
