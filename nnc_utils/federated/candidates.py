"""The network of each configuration of 08: what the clients of a federation hold after the last round."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nnc_utils import models
from nnc_utils.configurations import Built
from nnc_utils.federated import plan as plans
from nnc_utils.federated import split
from nnc_utils.federated.compress import State
from nnc_utils.federated.configurations import EqualBytes, FedAvg, Flower
from nnc_utils.federated.federation import Federation
from nnc_utils.peers import flower


def build(configuration: FedAvg | EqualBytes | Flower, bench: Any) -> Built:
    """Run a configuration's rounds; what they took goes into the run's `extra`.

    Of the run's parameters clients, rounds, width, local_epochs, batch_size and learning_rate count.
    """
    state, ledger = _run(bench, configuration)
    bench.extra.setdefault("federated", {})[configuration.slug] = ledger
    network = _plan(bench, configuration.run).network().eval()
    plans.load(network, state)
    return Built(network, ledger["train_images"], ledger["seconds"], dtype=torch.float32)


def check(configuration: FedAvg | EqualBytes | Flower, bench: Any) -> None:
    """Raise a ValueError, before any work, where not every client can have images."""
    _parts(bench, configuration.run.dirichlet)


def _parts(bench: Any, alpha: float) -> list[torch.Tensor]:
    labels = bench.images.train.labels
    return split.dirichlet(labels, clients=bench.parameters["clients"], alpha=alpha, seed=bench.seed)


def _plan(bench: Any, configuration: FedAvg, **other: Any) -> plans.Plan:
    given = bench.parameters
    same = {key: getattr(bench.dense.spec, key) for key in ("channels", "size", "classes", "stem")}
    options = {key: given[key] for key in ("rounds", "local_epochs", "batch_size", "learning_rate")}
    options |= {"up": configuration.up, "down": configuration.down, "feedback": configuration.feedback}
    options |= {"seed": bench.seed, "augment": bench.recipe["augment"]}
    return plans.Plan(models.resnet(18, width=given["width"], **same), **options | other)


_running: dict[tuple[Any, float], Federation] = {}


def federation(bench: Any, alpha: float) -> Federation:
    """The processes for one way to divide the images; they end when another way is asked for.

    Others take their place where a run was interrupted, or has lost a client.
    """
    if (bench, alpha) not in _running or not _running[bench, alpha].ready:
        while _running:
            _running.popitem()[1].close()
        _running[bench, alpha] = Federation(bench.images, _parts(bench, alpha))
    return _running[bench, alpha]


def _run(bench: Any, configuration: FedAvg | EqualBytes | Flower) -> tuple[State, dict[str, Any]]:
    """The state after a configuration's rounds, and their ledger; what had ended is not run again."""
    file = bench.path(f"checkpoint_{configuration.slug}.safetensors")
    if file.is_file():
        with safe_open(file, "pt") as stored:
            return load_file(file), json.loads(stored.metadata()["ledger"])
    plan = _plan(bench, configuration.run)
    if isinstance(configuration, EqualBytes):
        _, other = _run(bench, configuration.compressed)
        numbers = sum(tensor.numel() for tensor in plans.floats(plan.network()).values())
        a_round = 2 * 4 * numbers * bench.parameters["clients"]
        rounds = max(1, round((other["up_bytes"] + other["down_bytes"]) / a_round))
        plan = _plan(bench, configuration.run, rounds=rounds)
    print(configuration.title, flush=True)
    try:
        if isinstance(configuration, Flower):
            state, ledger = flower.run(plan, bench.images, _parts(bench, configuration.dirichlet))
        else:
            outcome = federation(bench, configuration.run.dirichlet).run(plan, watch=_say)
            state, ledger = plans.floats(outcome.network), outcome.ledger
    except (RuntimeError, subprocess.SubprocessError) as error:  # it costs no other configuration
        raise ValueError(str(error)) from error
    save_file(state, file, {"ledger": json.dumps(ledger)})
    return state, ledger


def _say(line: str) -> None:
    """Print what a round came to, and what happened; not that it begins."""
    if not line.endswith("sent"):
        print(line, flush=True)
