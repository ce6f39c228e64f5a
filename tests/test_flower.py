"""The peer Flower: what its relay counts, and where its environment is, its rounds beside ours."""

import json
import socket
import threading
import time

import pytest
import torch

from nnc_utils import data, evaluation, models
from nnc_utils.federated import plan as plans
from nnc_utils.federated import split
from nnc_utils.federated.federation import Federation
from nnc_utils.peers import flower

SPEC = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.125)


def test_the_relay_counts_what_passes_in_each_direction():
    listener = socket.create_server(("127.0.0.1", 0))
    relay = flower.Relay(listener.getsockname()[1])

    def answer():
        end, _ = listener.accept()
        got = b""
        while part := end.recv(2**16):
            got += part
        end.sendall(got[:1000])
        end.close()

    threading.Thread(target=answer, daemon=True).start()
    with socket.create_connection(("127.0.0.1", relay.port)) as own:
        own.sendall(b"x" * 300_000)
        own.shutdown(socket.SHUT_WR)
        back = b""
        while part := own.recv(2**16):
            back += part
    assert (relay.up, relay.down, len(back)) == (300_000, 1000, 1000)


def test_the_relay_loses_no_byte_to_another_connection_and_waits_in_silence():
    class Slow(flower.Relay):
        def __setattr__(self, name, value):
            time.sleep(0.002 * (name == "up" and value > 0))
            super().__setattr__(name, value)

    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    socket.setdefaulttimeout(0.2)  # as a download may leave it
    try:
        relay = Slow(listener.getsockname()[1])
        time.sleep(0.4)
        ends = [socket.create_connection(("127.0.0.1", relay.port), timeout=10) for _ in range(4)]
        others = [listener.accept()[0] for _ in ends]
        time.sleep(0.4)
    finally:
        socket.setdefaulttimeout(None)

    def talk(end):
        for _ in range(20):
            end.sendall(b"x")
            time.sleep(0.001)
        end.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=talk, args=[end]) for end in ends]
    for thread in threads:
        thread.start()
    arrived = 0
    for end in others:
        end.settimeout(10)
        while part := end.recv(100):
            arrived += len(part)
    assert (arrived, relay.up) == (80, 80)
    for end in [*ends, *others, listener, relay.listener]:
        end.close()


def test_without_its_environment_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWER_VENV", str(tmp_path))
    with pytest.raises(ImportError, match="flower is not installed: run workflow/setup_env.py --flower"):
        flower.run(plans.Plan(SPEC, rounds=1, learning_rate=0.1), None, [])
    (tmp_path / "setup.json").write_text(json.dumps({"failed": "no network"}))
    assert flower.missing() == "not installed (no network): run workflow/setup_env.py --flower --again"


@pytest.mark.slow
@pytest.mark.skipif(bool(flower.missing()), reason=flower.missing())
def test_its_rounds_give_what_ours_give(capsys):
    digits = data.load("digits")
    parts = split.dirichlet(digits.train.labels, clients=2, alpha=1, seed=1)
    plan = plans.Plan(SPEC, rounds=3, learning_rate=0.1, local_epochs=2)
    state, ledger = flower.run(plan, digits, parts)
    with Federation(digits, parts) as federation:
        ours = federation.run(plan, watch=lambda line: None)
    theirs = plan.network().eval()
    plans.load(theirs, state)
    right = [
        evaluation.accuracy(
            evaluation.predict(network, digits.test, normalize=digits.normalize), digits.test.labels
        )
        for network in (ours.network, theirs)
    ]
    payload = 3 * 2 * 4 * sum(tensor.numel() for tensor in state.values())
    with capsys.disabled():
        print(f"\ntest accuracy {right}, ledgers {ours.ledger['seconds']} s, {ledger}")
    assert abs(right[0] - right[1]) < 10 and torch.isfinite(state["fc.weight"]).all()
    assert (
        payload < ledger["up_bytes"] < 1.1 * payload and ledger["train_images"] == ours.ledger["train_images"]
    )
