#!/usr/bin/env bash
# flwr 1.42.0: FedAvgM(server_momentum=0.9) and FedAdam, its defaults otherwise, with a network that has batch
# normalization. Arrays as in Flower's PyTorch examples: the whole state dict.
# Expected: the server's optimizer steps on what is trained; running means and variances are averaged, as in FedAvg.
#   In any case a variance stays between the variances that server and clients have.
# Seen: the optimizer takes the running variance for a weight, and its momentum carries it past the clients'. All
#   clients answer 0.02 in each round; with FedAvgM the server's variance is negative in round 2, with FedAdam in
#   round 12. The root of it is NaN, and so is each output of the network in evaluation. The clients compute on with
#   the statistics of their batches and notice nothing. With FedAvg it is 0.02 from round 1 on. No warning.
# Fails where flwr behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flwr==1.42.0
cd "$folder" && HOME="$folder" FLWR_TELEMETRY_ENABLED=0 "$folder/venv/bin/python" - <<'PYTHON'
import logging
from importlib.metadata import version

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity

logging.disable()
ROUNDS, TRAINED = 20, 0.02
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as "flwr run" sets them for its processes


class TwoClients(Grid):
    """Clients whose data has one and the same variance, whatever the server sends."""

    run = set_run = create_message = push_messages = pull_messages = None

    def get_node_ids(self):
        return [1, 2]

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            arrays = {"weight": np.full(1, 0.5, np.float32), "running_var": np.full(1, TRAINED, np.float32)}
            arrays = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})}
            yield Message(RecordDict(content), reply_to=message)


def variances(strategy):
    """The server's running variance behind each round."""
    seen = []
    start = {"weight": np.ones(1, np.float32), "running_var": np.ones(1, np.float32)}
    arrays = ArrayRecord({name: Array(array) for name, array in start.items()})
    strategy.start(
        TwoClients(),
        arrays,
        num_rounds=ROUNDS,
        evaluate_fn=lambda _, arrays: seen.append(arrays["running_var"].numpy().item()),
    )
    return seen[1:]


print("flwr", version("flwr"))
strategies = {
    "FedAvg": (FedAvg(fraction_evaluate=0.0), None),
    "FedAvgM": (FedAvgM(fraction_evaluate=0.0, server_momentum=0.9), 2),
    "FedAdam": (FedAdam(fraction_evaluate=0.0), 12),
}
for name, (strategy, seen) in strategies.items():
    values = variances(strategy)
    negative = next((number for number, value in enumerate(values, start=1) if value < 0), None)
    print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}; negative first in round {negative}")
    assert negative == seen, "another round than was seen"
print("as described")
PYTHON
