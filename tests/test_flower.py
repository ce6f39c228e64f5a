"""The peer Flower: what its relay counts, and where its environment is, its rounds beside ours."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
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


@pytest.mark.parametrize("answered", [2, 1, 0])
def test_rounds_in_which_a_node_failed_are_no_result(tmp_path, monkeypatch, answered):
    """Flower goes on without the nodes that fail: if all do, its result is the first network, or none."""

    class App:
        def main(self):
            return lambda function: function

        train = main

    class FedAvg:
        def __init__(self, train_metrics_aggr_fn, **options):
            self.together = train_metrics_aggr_fn

        def start(self, grid, initial_arrays, num_rounds):
            replies = {1: [{"metrics": {"seen": 10}}] * 2, 2: [{"metrics": {"seen": 10}}] * answered}
            metrics = {number: self.together(own, "") for number, own in replies.items() if own}
            arrays = SimpleNamespace(to_torch_state_dict=lambda: initial_arrays)
            return SimpleNamespace(arrays=arrays, train_metrics_clientapp=metrics)

    names = dict.fromkeys(("ArrayRecord", "MetricRecord", "RecordDict", "Context", "Message", "Grid"), dict)
    flwr = SimpleNamespace(**names, ClientApp=App, ServerApp=App, FedAvg=FedAvg)
    for name in ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"):
        monkeypatch.setitem(sys.modules, name, flwr)
    source = Path(flower.__file__).with_name("flower_app") / "rounds.py"
    spec = importlib.util.spec_from_file_location("rounds", source)
    spec.loader.exec_module(rounds := importlib.util.module_from_spec(spec))
    (tmp_path / "plan.json").write_text(json.dumps(plans.Plan(SPEC, rounds=2, learning_rate=0.1).to_json()))
    (tmp_path / "nodes.json").write_text("2")
    context = SimpleNamespace(run_config={"plan": str(tmp_path / "plan.json")})
    if answered == 2:
        rounds.average(None, context)
        assert json.loads((tmp_path / "took.json").read_text())["seen"] == 40
    else:
        with pytest.raises(RuntimeError, match=rf"of 2 nodes .* in each round: \[2, {answered}\]"):
            rounds.average(None, context)
    assert (tmp_path / "network.safetensors").is_file() == (answered == 2)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_process_ends_with_its_parent_also_where_that_is_killed():
    program = "import json, subprocess, sys; command = json.loads(sys.argv[1]); "
    program += "print(subprocess.Popen(command, start_new_session=True).pid, flush=True); input()"
    command = json.dumps([*flower.WITH_US, shutil.which("sleep"), "60"])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", program, command], **pipes)
    process = psutil.Process(int(parent.stdout.readline()))
    until = time.monotonic() + 60
    while process.cmdline()[-1:] != ["60"] or "sleep" not in process.name():
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    parent.communicate()


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
    requests = 3 * 2 * len(state) * 8000  # each tensor is an object of its own, in some HTTP requests
    for way in ("up_bytes", "down_bytes"):
        assert payload < ledger[way] < payload + requests
    assert ledger["train_images"] == ours.ledger["train_images"]
