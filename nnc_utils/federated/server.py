"""The server: a process that averages what clients send, and counts the bytes at its sockets.

`federation` starts it and gives its orders: `begin`, for each round `send` and `collect`, then `end`.
"""

from __future__ import annotations

import argparse
import select
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from nnc_utils import evaluation
from nnc_utils.entropy import EncodingError
from nnc_utils.federated import plan as plans
from nnc_utils.federated.compress import Compressor, State, from_bytes, to_bytes
from nnc_utils.federated.messages import Connection, Damaged
from nnc_utils.federated.split import read_images
from nnc_utils.runtimes.children import serve


@dataclass
class Peer:
    """A client as the server sees it."""

    name: int
    images: int
    connection: Connection
    current: bool = False  # it holds the network that `Server.step` starts from


class Server:
    """Has the validation images, and waits `patience` seconds at most for whatever a client has to do.

    `known` is the network that clients hold, `model` the one that they would hold if nothing were rounded,
    `step` the bytes that lead to `known` from the network of the round before.
    """

    def __init__(self, validation: Path, patience: float) -> None:
        self.validation, self.patience = read_images(validation), patience
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peers: dict[int, Peer] = {}
        self.lines: list[str] = []  # what happened since the last order
        self._gone = [0, 0]  # bytes to and from clients that have gone

    def port(self) -> int:
        """Where clients connect."""
        return self.listener.getsockname()[1]

    def knocked(self) -> bool:
        """Whether somebody wants to be let in; waits for it."""
        return bool(select.select([self.listener], [], [], self.patience)[0])

    # --- Orders: each gives the lines of what happened, and more ---------------------------------

    def begin(self, plan: dict[str, Any], clients: int) -> dict[str, Any]:
        """Begin a run with so many clients, or with those that come in time."""
        self.plan, self.number, self.step = plans.Plan.from_json(plan), 0, b""
        self.network = self.plan.network()
        self.model = self.known = plans.floats(self.network)
        idle = {peer.connection.socket: peer for peer in self.peers.values()}
        for end in select.select([*idle], [], [], 0)[0]:  # nobody has asked it: it has closed
            self._lose(idle[end], "closed since the last run")
        self.before, until = self._bytes(), time.monotonic() + self.patience
        while len(self.peers) < clients and time.monotonic() < until:
            self._admit(1)
        if len(self.peers) < clients:
            self.lines.append(f"{len(self.peers)} of {clients} clients have come in {self.patience:g} s")
        for peer in list(self.peers.values()):
            self._join(peer)
        return self._told()

    def send(self, number: int) -> dict[str, Any]:
        """Begin a round: let in who has come late, and send the network to all."""
        self.number = number
        for peer in self._admit(0):
            self.lines.append(f"round {number}: client {peer.name} has come late: it gets the whole network")
            self._join(peer)
        for peer in list(self.peers.values()):
            self._ask(peer, "round")
        self.asked = list(self.peers.values())
        return self._told()

    def collect(self, number: int, look: bool) -> dict[str, Any]:
        """Wait for the updates and average them; with `look` also the accuracy on the validation images."""
        answers = self._answers()
        if not answers:
            why = "; ".join(self._told()["lines"])
            raise RuntimeError(f"round {number}: no client has answered: start some, then run again. {why}")
        names = sorted(answers)  # the sum must not depend on who was first
        updates, seen = zip(*(answers[name] for name in names), strict=True)
        wanted = plans.average(self.known, list(updates), [self.peers[name].images for name in names])
        # what an earlier step could not carry is in `model`, and so in the next step
        self.model = {name: self.model[name] + wanted[name] - self.known[name] for name in wanted}
        missing = {name: self.model[name] - self.known[name] for name in wanted}
        self.step, step = to_bytes(missing, self.plan.down, self.plan.draws(number, -1))
        self.known = {name: self.known[name] + step[name] for name in step}
        accuracy = None
        if look:
            plans.load(self.network, self.known)
            split, normalize = self.validation.validation, self.validation.normalize
            classes = evaluation.predict(self.network, split, normalize=normalize)
            accuracy = evaluation.accuracy(classes, split.labels)
        took = {"round": number, "asked": len(self.asked), "clients": len(names), "seen": sum(seen)}
        return self._told() | took | {"validation": accuracy}

    def end(self, file: str) -> dict[str, Any]:
        """Send the last step, and write the network; `agreed`: how many clients hold just that."""
        agreed = 0
        for peer in [peer for peer in self.peers.values() if peer.current]:
            self._ask(peer, "end")
            try:
                agreed += peer.connection.receive()[0].get("digest") == plans.digest(self.known)
            except (OSError, Damaged) as error:
                self._lose(peer, error)
        save_file(self.known, file)
        return self._told() | {"agreed": agreed}

    def _told(self) -> dict[str, Any]:
        lines, self.lines = self.lines, []
        down, up = (now - before for now, before in zip(self._bytes(), self.before, strict=True))
        return {"lines": lines, "up_bytes": up, "down_bytes": down}

    def _bytes(self) -> list[int]:
        """Bytes to and from clients so far."""
        ends = [peer.connection for peer in self.peers.values()]
        counts = (self._gone, *((end.sent, end.received) for end in ends))
        return [sum(column) for column in zip(*counts, strict=True)]

    # --- Who takes part -------------------------------------------------------------------------

    def _admit(self, seconds: float) -> list[Peer]:
        """Let in the clients that have connected, or do so in some seconds."""
        new = []
        while select.select([self.listener], [], [], 0 if new else seconds)[0]:
            connection = Connection(self.listener.accept()[0])
            try:
                header, _ = connection.receive()
                peer = Peer(_whole(header["name"]), max(1, _whole(header["images"])), connection)
                connection.patience = self.patience
            except (OSError, Damaged, KeyError) as error:
                self.lines.append(f"round {self.number}: somebody is not let in: {error}")
                connection.close()
                return new
            if peer.name in self.peers:
                self._lose(self.peers[peer.name], "another has come in its name")
            self.peers[peer.name] = peer
            new.append(peer)
        return new

    def _join(self, peer: Peer) -> None:
        """Tell a client the plan. It needs no network where it has made the one that all begin with."""
        try:
            peer.connection.send(kind="begin", plan=self.plan.to_json())
            ready = peer.connection.receive()[0].get("digest")
            peer.current = ready == plans.digest(self.known) and not self.step
        except (OSError, Damaged) as error:
            self._lose(peer, error)

    def _lose(self, peer: Peer, why: object) -> None:
        if self.peers.get(peer.name) is not peer:  # it is gone already
            return
        peer.connection.close()
        self._gone = [self._gone[0] + peer.connection.sent, self._gone[1] + peer.connection.received]
        del self.peers[peer.name]
        left = len(self.peers)
        self.lines.append(f"round {self.number}: client {peer.name} is gone ({why}): going on with {left}")

    def _ask(self, peer: Peer, kind: str) -> None:
        """Send the step, or the whole network to a client that lacks what the step starts from."""
        whole = not peer.current
        try:
            body = to_bytes(self.known, Compressor(), self.plan.draws(0, 0))[0] if whole else self.step
            peer.connection.send(body, kind=kind, round=self.number, whole=whole)
            peer.current = True
        except OSError as error:
            self._lose(peer, error)

    # --- What they answer -----------------------------------------------------------------------

    def _answers(self) -> dict[int, tuple[State, int]]:
        """The updates of those that answer in time, and how many images each has seen."""
        waiting = {peer.connection.socket: peer for peer in self.asked}
        answers, until = {}, time.monotonic() + self.patience
        while waiting:
            ready = select.select([*waiting], [], [], max(0.0, until - time.monotonic()))[0]
            if not ready:
                for peer in waiting.values():
                    self._lose(peer, f"no answer in {self.patience:g} s")
                break
            for peer in [waiting.pop(end) for end in ready]:
                try:
                    answers[peer.name] = self._update(peer)
                except (Damaged, EncodingError, KeyError) as error:
                    self._refuse(peer, error)
                except OSError as error:
                    self._lose(peer, error)
        return answers

    def _update(self, peer: Peer) -> tuple[State, int]:
        header, body = peer.connection.receive()
        if header["kind"] == "failed":
            raise ConnectionError(header["why"])
        if (header["kind"], header["round"]) != ("update", self.number):
            raise Damaged(f"{header['kind']!r:.20} of round {header['round']!r:.20} is not what was asked")
        shapes = {name: tensor.shape for name, tensor in self.known.items()}
        return from_bytes(body, shapes, self.plan.up), _whole(header["seen"])

    def _refuse(self, peer: Peer, why: Exception) -> None:
        self.lines.append(f"round {self.number}: an update of client {peer.name} is refused: {why}")
        try:
            peer.connection.send(kind="refused", why=str(why))
        except OSError as error:
            self._lose(peer, error)


def _whole(given: object) -> int:
    """A count or a name in a header; a `Damaged` for anything else."""
    if type(given) is not int or not 0 <= given < 2**31:
        raise Damaged(f"{given!r:.20} is no whole number from 0 to {2**31 - 1:,}")
    return given


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m nnc_utils.federated.server", description=__doc__)
    parser.add_argument("validation", type=Path, help="a file of federated.split.write_images")
    parser.add_argument("--patience", type=float, default=600, help="seconds")
    given = parser.parse_args(sys.argv[1:])
    serve(Server(given.validation, given.patience))
