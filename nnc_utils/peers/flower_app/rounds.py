"""What Flower's processes run: its FedAvg, and between two messages our training.

Runs in Flower's own environment, which finds this package by PYTHONPATH.
"""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from nnc_utils.federated import plan as plans
from nnc_utils.federated.client import train
from nnc_utils.federated.split import read_images

client = ClientApp()  # Flower looks for each name in an assignment of its own
server = ServerApp()


def _plan(context: Context) -> plans.Plan:
    return plans.Plan.from_json(json.loads(Path(context.run_config["plan"]).read_text()))


@client.train()
def train_here(message: Message, context: Context) -> Message:
    """Train the network of a message on this node's images."""
    plan, images = _plan(context), read_images(context.node_config["images"])
    network = plan.network()
    plans.load(network, message.content["arrays"].to_torch_state_dict())
    seen = train(network, images, plan, message.content["config"]["server-round"])
    metrics = MetricRecord({"num-examples": len(images.train), "seen": seen})
    content = RecordDict({"arrays": ArrayRecord(plans.floats(network)), "metrics": metrics})
    return Message(content=content, reply_to=message)


def _seen(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    return MetricRecord({"seen": sum(reply["metrics"]["seen"] for reply in replies), "nodes": len(replies)})


@server.main()
def average(grid: Grid, context: Context) -> None:
    """All rounds; the network and what they took go beside the plan.

    A RuntimeError where a node failed in some round: Flower itself goes on without it, even without all.
    """
    plan, file = _plan(context), Path(context.run_config["plan"])
    nodes = json.loads(file.with_name("nodes.json").read_text())
    options = {"min_train_nodes": nodes, "min_available_nodes": nodes, "train_metrics_aggr_fn": _seen}
    strategy, begin = FedAvg(fraction_evaluate=0.0, **options), time.perf_counter()
    first = ArrayRecord(plans.floats(plan.network()))
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=plan.rounds)
    metrics = result.train_metrics_clientapp
    answered = [metrics[n]["nodes"] if n in metrics else 0 for n in range(1, plan.rounds + 1)]
    if min(answered) < nodes:
        raise RuntimeError(f"of {nodes} nodes so many have trained in each round: {answered}")
    seen = sum(metrics[n]["seen"] for n in metrics)
    took = {"seconds": time.perf_counter() - begin, "seen": seen}
    file.with_name("took.json").write_text(json.dumps(took))
    save_file(result.arrays.to_torch_state_dict(), file.with_name("network.safetensors"))
