"""Server and clients: as threads of this process, where messages can be damaged, and as processes."""

import contextlib
import copy
import socket
import threading

import numpy as np
import pytest
import torch

from nnc_utils import data, evaluation, models, training
from nnc_utils.federated import client as clients
from nnc_utils.federated import plan as plans
from nnc_utils.federated import split
from nnc_utils.federated.compress import Compressor, to_bytes
from nnc_utils.federated.federation import Federation
from nnc_utils.federated.messages import Connection, frame
from nnc_utils.federated.server import Server
from nnc_utils.runtimes.children import ChildError

SPEC = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.03)
SMALL = {"up": Compressor(4, 0.2, "nearest"), "down": Compressor(4, rounding="nearest"), "feedback": True}


@pytest.fixture(scope="module")
def images():
    """A few digits: 90 to learn from, 20 to look at."""
    digits = data.load("digits")
    few = {"train": digits.train, "validation": digits.validation, "test": digits.test}
    cut = {
        name: split.Split(part.images[:n], part.labels[:n])
        for (name, part), n in zip(few.items(), (90, 20, 20))
    }
    return data.Data(**{**vars(digits), **cut})


@pytest.fixture(scope="module")
def parts():
    return [torch.arange(0, 50), torch.arange(50, 80), torch.arange(80, 90)]


def a_plan(**other):
    return plans.Plan(SPEC, **{"rounds": 2, "learning_rate": 0.05, "batch_size": 10, **other})


class Threads:
    """A server and clients in this process; `damage` client's first update is sent with one bit changed."""

    def __init__(self, images, parts, folder, damage=None, patience=60):
        split.write_images(folder / "validation", images, images.validation)
        self.server, self.ends, self.threads = Server(folder / "validation", patience), [], []
        self.images, self.parts, self.damage = images, parts, damage
        for name in range(len(parts)):
            self.start(name)

    def start(self, name):
        end = Connection(socket.create_connection(("127.0.0.1", self.server.port())), patience=None)
        if name == self.damage:
            whole, damaged = end.send_frame, []

            def send_frame(message):
                if b'"update"' in message and not damaged:
                    damaged.append(message)
                    message = message[:-1] + bytes([message[-1] ^ 1])
                whole(message)

            end.send_frame = send_frame
        own = split.Split(
            self.images.train.images[self.parts[name]], self.images.train.labels[self.parts[name]]
        )
        own = data.Data(**{**vars(self.images), "train": own})

        def serve():
            with contextlib.suppress(OSError):
                clients.Client(name, own, end).serve()

        self.ends.append(end)
        self.threads.append(threading.Thread(target=serve, daemon=True))
        self.threads[-1].start()

    def run(self, plan, file):
        lines = self.server.begin(plan.to_json(), len(self.parts))["lines"]
        for number in range(1, plan.rounds + 1):
            lines += self.server.send(number)["lines"]
            lines += self.server.collect(number, number == plan.rounds)["lines"]
        done = self.server.end(str(file))
        return self.server.known, lines + done.pop("lines"), done


def averaged_here(plan, images, parts):
    """The same in a few lines: every client from the same network, then the mean by images."""
    network = plan.network()
    for number in range(1, plan.rounds + 1):
        ends = []
        for part in parts:
            own = split.Split(images.train.images[part], images.train.labels[part])
            model = copy.deepcopy(network)
            options = {
                "epochs": 1,
                "batch_size": min(10, len(part) // 2),
                "learning_rate": plan.rate(number),
                "augment": False,
            }
            training.fit(
                model, data.Data(**{**vars(images), "train": own}), seed=1000 + number, threads=1, **options
            )
            ends.append(model.state_dict())
        state, counts = network.state_dict(), np.array([len(part) for part in parts]) / 90
        for name in state:
            if name.endswith("running_var"):
                mean = name.replace("var", "mean")
                squares = sum(c * (end[name] + end[mean] ** 2) for c, end in zip(counts, ends))
                state[name] = squares - sum(c * end[mean] for c, end in zip(counts, ends)) ** 2
            elif state[name].is_floating_point():
                state[name] = sum(c * end[name] for c, end in zip(counts, ends))
        network.load_state_dict(state)
    return network.state_dict()


def test_in_float32_it_is_federated_averaging_and_both_ends_count_the_same_bytes(images, parts, tmp_path):
    plan, threads = a_plan(), Threads(images, parts, tmp_path)
    state, lines, done = threads.run(plan, tmp_path / "network")
    assert lines == [] and done["agreed"] == 3
    expected = averaged_here(plan, images, parts)
    for name, tensor in state.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), name
    assert done["up_bytes"] == sum(end.sent for end in threads.ends)
    assert done["down_bytes"] == sum(end.received for end in threads.ends)
    payload = 2 * 3 * 4 * sum(tensor.numel() for tensor in state.values())
    assert payload < done["up_bytes"] < 1.05 * payload and payload < done["down_bytes"] < 1.2 * payload


def test_a_damaged_update_is_refused_and_told_and_feedback_sends_it_later(images, parts, tmp_path):
    threads = Threads(images, parts, tmp_path, damage=1)
    _, [line], done = threads.run(a_plan(**SMALL), tmp_path / "network")
    assert line.startswith("round 1: an update of client 1 is refused: the checksum of a message of ")
    assert done["agreed"] == 3


def test_nonsense_is_not_let_in_and_not_averaged(images, parts, tmp_path):
    threads = Threads(images, parts[:2], tmp_path)
    stranger = socket.create_connection(("127.0.0.1", threads.server.port()))
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
    liar = Connection(socket.create_connection(("127.0.0.1", threads.server.port())))
    liar.send(kind="hello", name=7, images=5)

    def lie():
        with contextlib.suppress(OSError):
            liar.receive()
            liar.send(kind="ready", digest="")
            liar.receive()
            liar.send(b"no update", kind="update", round=1, seen=1)
            assert liar.receive()[0]["kind"] == "refused"
            liar.receive()
            liar.send(kind="update", round=1, seen=1)
            liar.close()

    threading.Thread(target=lie, daemon=True).start()
    threads.parts = [*threads.parts, []]
    state, lines, done = threads.run(a_plan(), tmp_path / "network")
    said = "\n".join(lines)
    assert "somebody is not let in" in said and "are no update" in said
    assert "round 2: an update of client 7 is refused: 'update' of round 1 is not what was asked" in said
    assert done["agreed"] == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"seen": "many", "kind": "update", "round": 1},
        {"seen": [1], "kind": "update", "round": 1},
        {"seen": float("inf"), "kind": "update", "round": 1},
        ["update", 1],
    ],
    ids=str,
)
def test_what_is_of_another_type_costs_one_update_and_no_run(images, parts, tmp_path, answer):
    threads = Threads(images, parts[2:], tmp_path)
    for hello in (
        {"kind": "hello", "name": 8, "images": float("inf")},
        ["hello"],
        {"name": [7], "images": 1},
    ):
        stranger = Connection(socket.create_connection(("127.0.0.1", threads.server.port())))
        stranger.send_frame(frame(hello))
    liar = Connection(socket.create_connection(("127.0.0.1", threads.server.port())))
    liar.send(kind="hello", name=7, images=5)
    state = plans.floats(a_plan().network())
    whole = to_bytes({name: 0 * tensor for name, tensor in state.items()}, Compressor(), None)[0]

    def lie():
        with contextlib.suppress(OSError):
            liar.receive()
            liar.send(kind="ready", digest=[])
            liar.receive()
            liar.send_frame(frame(answer, whole))
            liar.receive()
            liar.send_frame(frame(["done"]))

    threading.Thread(target=lie, daemon=True).start()
    threads.parts = [*threads.parts, []]
    _, lines, done = threads.run(a_plan(rounds=1), tmp_path / "network")
    said = "\n".join(lines)
    assert said.count("somebody is not let in") == 3 and "an update of client 7 is refused: " in said
    assert done["agreed"] == 1


def test_a_client_with_few_images_takes_a_step_that_is_one(images):
    """One step is the end of a cycle of the learning rate, where it is 0."""
    for count in (4, 12, 63):
        own = split.Split(images.train.images[:count], images.train.labels[:count])
        network = a_plan().network()
        before = network.fc.weight.detach().clone()
        few = data.Data(**{**vars(images), "train": own})
        seen = clients.train(network, few, a_plan(batch_size=64), 1)
        assert (network.fc.weight - before).abs().max() > 1e-4 and count - 1 <= seen <= count


def test_who_does_not_answer_in_time_is_left_out(images, parts, tmp_path):
    threads = Threads(images, parts[:1], tmp_path, patience=3)
    sleeper = Connection(socket.create_connection(("127.0.0.1", threads.server.port())))
    sleeper.send(kind="hello", name=5, images=5)

    def sleep():
        sleeper.receive()
        sleeper.send(kind="ready", digest="")

    threading.Thread(target=sleep, daemon=True).start()
    threads.parts = [*threads.parts, []]
    _, lines, done = threads.run(a_plan(rounds=1), tmp_path / "network")
    assert lines == ["round 1: client 5 is gone (no answer in 3 s): going on with 1"] and done["agreed"] == 1


def test_processes_survive_a_killed_client_and_a_late_one_and_give_the_same_again(images, parts):
    said, plan = [], a_plan(rounds=3, **SMALL)

    def trouble(line):
        said.append(line)
        if line == "round 1 of 3: sent":
            federation.kill(1)
        if line.startswith("round 1 of 3: 2 of 3"):
            federation.start(1, wait=True)

    with Federation(images, parts) as federation:
        first = federation.run(plan)
        assert federation.ready
        disturbed = federation.run(a_plan(rounds=3, local_epochs=10, **SMALL), watch=trouble)
        again = federation.run(plan)
        assert federation.ready
        with pytest.raises(ChildError, match="no client has answered: start some, then run again"):
            federation.run(plan, watch=lambda line: "sent" in line and [federation.kill(c) for c in range(3)])
        assert not federation.ready
    killed, late = disturbed.ledger["said"]
    assert killed.startswith("round 1: client 1 is gone (") and killed.endswith("going on with 2")
    assert late == "round 2: client 1 has come late: it gets the whole network"
    assert [record["clients"] for record in disturbed.ledger["history"]] == [2, 3, 3]
    assert [run.ledger["agreed"] for run in (first, disturbed, again)] == [3, 3, 3] and not again.ledger[
        "said"
    ]
    assert plans.digest(plans.floats(first.network)) == plans.digest(plans.floats(again.network))
    looked = [record["validation"] for record in first.ledger["history"]]
    right = evaluation.predict(first.network, images.validation, normalize=images.normalize)
    assert looked[-1] == evaluation.accuracy(right, images.validation.labels)
