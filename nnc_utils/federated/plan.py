"""What server and clients agree on: the plan of a run, and which numbers of a network are averaged."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnc_utils import models
from nnc_utils.federated.compress import Compressor, State

MEAN, VARIANCE = "running_mean", "running_var"


@dataclass(frozen=True)
class Plan:
    """A run of federated averaging.

    `up` and `down` compress what clients and the server send; with `feedback` clients keep what they did not
    send. The server always does: it knows which network its clients hold.
    """

    spec: models.Spec
    rounds: int
    learning_rate: float
    seed: int = 1
    up: Compressor = Compressor()  # noqa: RUF009, it is frozen
    down: Compressor = Compressor()  # noqa: RUF009
    feedback: bool = False
    local_epochs: float = 1.0
    batch_size: int = 32
    augment: bool = False

    def network(self) -> models.ResNet:
        """The first network, from the seed: the same at both ends, so that nobody need send it."""
        torch.manual_seed(self.seed)
        return models.build(self.spec)

    def rate(self, number: int) -> float:
        """The peak of the learning rate in a round, counted from 1: half a cosine."""
        return self.learning_rate * (1 + math.cos(math.pi * (number - 1) / self.rounds)) / 2

    def draws(self, number: int, client: int) -> torch.Generator:
        """The random numbers of a client, or of the server (-1), in a round."""
        seed = (self.seed * 1_000_003 + number) * 1_000_003 + client
        return torch.Generator().manual_seed(seed % 2**63)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return dataclasses.asdict(self) | {"spec": self.spec.to_json()}

    @staticmethod
    def from_json(given: dict[str, Any]) -> Plan:
        """The plan of another process."""
        own = {name: Compressor(**given[name]) for name in ("up", "down")}
        return Plan(**given | own | {"spec": models.Spec.from_json(given["spec"])})


def floats(network: nn.Module) -> State:
    """Copies of a network's weights, biases and batch-norm; its counters of batches are not sent."""
    state = network.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()}


def load(network: nn.Module, state: State) -> None:
    """Give a network a state. A variance that rounding has made negative is 0."""
    usable = {name: t.clamp(min=0) if name.endswith(VARIANCE) else t for name, t in state.items()}
    network.load_state_dict(network.state_dict() | usable)


def digest(state: State) -> str:
    """Which state it is: a SHA-256."""
    return hashlib.sha256(
        b"".join(tensor.contiguous().numpy().tobytes() for tensor in state.values())
    ).hexdigest()


def average(known: State, updates: list[State], images: list[int]) -> State:
    """The network of federated averaging (McMahan et al., 2017).

    Each client's update of the network that all of them `known` counts as much as it has images. The variance
    of batch-norm is that of all clients' activations together: the mean of their variances plus the variance
    of their means, which differ where the clients' classes do.
    """
    shares = [count / sum(images) for count in images]

    def mean(values: list[Tensor]) -> Tensor:
        return sum(share * value.double() for share, value in zip(shares, values, strict=True)).float()

    ends = [{name: known[name] + update[name] for name in known} for update in updates]
    result = {name: mean([end[name] for end in ends]) for name in known}
    for name in (name for name in known if name.endswith(VARIANCE)):
        center = name.replace(VARIANCE, MEAN)
        squares = mean([end[name].clamp(min=0).double() + end[center].double() ** 2 for end in ends])
        result[name] = squares - result[center] ** 2
    return result
