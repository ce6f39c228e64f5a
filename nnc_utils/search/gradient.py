"""Search by gradient: every decision a probability, drawn by Gumbel-softmax, with the cost in the loss.

FBNet (Wu et al., 2019) and DARTS differentiate the supernet's own loss by the probabilities, a forward and a
backward pass of *every* option a step. Here the loss is a model of the accuracy that is fitted to the
candidates asked so far, which any number of searches can afford; what is differentiated, Gumbel-softmax
samples and the expected cost, is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnc_utils.search.costs import Constraints, Costs, Tables
from nnc_utils.search.searchers import Evaluate, Trace, random_search
from nnc_utils.search.space import KERNELS, LATER, Architecture, Space


def empty_logits(space: Space) -> Tensor:
    """A logit of 0 for each option of each decision, (decisions, options); -inf where there is none."""
    places = torch.arange(int(space.options.max()))
    return torch.where(places < torch.from_numpy(space.options)[:, None], 0.0, -torch.inf).double()


def gumbel_softmax(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A soft sample of each decision (Jang et al., 2017): probabilities that add up to 1.

    Parameters
    ----------
    logits : (decisions, options), -inf where there is no option.
    uniform : random numbers in (0, 1), same shape.
    temperature : towards 0 the samples become one-hot.
    """
    return ((logits - (-uniform.log()).log()) / temperature).softmax(1)


class Relaxed:
    """Which decisions matter, and the mean cost, of networks whose decisions are drawn independently.

    Parameters
    ----------
    space : of the decisions.
    tables : costs of its parts, from `Costs`; those that are asked for.
    """

    def __init__(self, space: Space, tables: Mapping[str, Tables]) -> None:
        self.space, most, place = space, int(space.options.max()), space.places
        gates = torch.zeros(len(space.choices), len(space.choices), most, dtype=torch.float64)
        for number, choice in enumerate(
            space.choices
        ):  # a block exists where the depth is more than its number
            gates[number, place[choice.stage, -1, "depth"], max(choice.block, 0) : space.blocks] = 1
        self._gates = gates.flatten(1)
        blocks = [(s, b) for s in range(len(space.widths)) for b in range(space.blocks)]
        about = [[place[s if b else max(s - 1, 0), -1, "width"], place[s, -1, "width"]] for s, b in blocks]
        about = [
            row + [place[s, b, "kernel"], place[s, b, "connection"]]
            for row, (s, b) in zip(about, blocks, strict=True)
        ]
        self._about = torch.tensor(about).T
        self._ends = place[0, -1, "width"], place[len(space.widths) - 1, -1, "width"]
        self._tables = {name: self._padded(table, most) for name, table in tables.items()}

    def _padded(self, table: Tables, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stem, blocks (blocks, width before, width, kernel, connection), classifier; zeros behind."""
        whole = torch.zeros(len(self._about[0]), most, most, most, most, dtype=torch.float64)
        arrays = [array for stage in table.blocks for array in stage]
        for number, array in enumerate(arrays):
            array = torch.from_numpy(array if array.ndim == 4 else np.repeat(array[None], most, 0))
            whole[(number, *map(slice, array.shape))] = array
        ends = (
            functional.pad(torch.from_numpy(end), (0, most - len(end)))
            for end in (table.stem, table.classifier)
        )
        stem, classifier = ends
        kernels = len(KERNELS)
        return stem, whole[..., :kernels, : len(LATER)].contiguous(), classifier

    def exists(self, chances: Tensor) -> Tensor:
        """The probability that each decision matters, (decisions,): that its block exists."""
        return self._gates @ chances.flatten()

    def cost(self, name: str, chances: Tensor) -> Tensor:
        """The mean cost, exact; `chances` are probabilities (decisions, options), each row adding up to 1."""
        stem, blocks, classifier = self._tables[name]
        before, width, kernel, link = self._about
        mean = (blocks @ chances[link, None, None, : blocks.shape[4], None]).squeeze(-1)
        mean = (mean @ chances[kernel, None, : blocks.shape[3], None]).squeeze(-1)
        mean = (mean @ chances[width, :, None]).squeeze(-1)
        mean = (mean * chances[before]).sum(1)
        first, last = self._ends
        return (
            (self.exists(chances)[kernel] * mean).sum() + chances[first] @ stem + chances[last] @ classifier
        )


# --- A model of the accuracy -------------------------------------------------------------------


class Surrogate:
    """Accuracy as a sum over decisions: of each option, and of how far along its options it is.

    Linear in the probabilities, so that it is defined (and differentiable) between architectures as well.

    Parameters
    ----------
    relaxed : of the space.
    ridge : how strongly the coefficients are held at 0.
    """

    def __init__(self, relaxed: Relaxed, ridge: float = 1.0) -> None:
        self.relaxed, self.ridge, space = relaxed, ridge, relaxed.space
        options = int(space.options.max())
        along = np.arange(options) / np.maximum(space.options[:, None] - 1, 1)
        self.along = torch.from_numpy(np.where(np.arange(options) < space.options[:, None], along, 0.0))
        self.mean, self.deviation = 0.0, 1.0
        self.coefficients = torch.zeros(len(space.choices) * (options + 1), dtype=torch.float64)

    def fit(self, trace: Trace) -> Surrogate:
        """Ridge regression on what was asked."""
        chances = [one_hot(self.relaxed.space, architecture) for architecture, _ in trace]
        inputs = torch.stack([self._features(chance) for chance in chances])
        values = torch.tensor([value for _, value in trace], dtype=torch.float64)
        self.mean, self.deviation = float(values.mean()), float(values.std()) or 1.0
        self.centre = inputs.mean(0)
        centred, wanted = inputs - self.centre, (values - self.mean) / self.deviation
        square = centred.T @ centred + self.ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
        self.coefficients = torch.linalg.solve(square, centred.T @ wanted)
        return self

    def __call__(self, chances: Tensor) -> Tensor:
        """Predicted accuracy, in deviations of what was asked above its mean, from (decisions, options)."""
        return (self._features(chances) - self.centre) @ self.coefficients

    def _features(self, chances: Tensor) -> Tensor:
        gated = chances * self.relaxed.exists(chances)[:, None]
        # two columns' worth for the trend: of neighbouring widths little is known, of wide and narrow more
        return torch.cat([0.5 * gated.flatten(), 2 * (gated * self.along).sum(1)])


def one_hot(space: Space, architecture: Architecture) -> Tensor:
    """An architecture as probabilities of 0 and 1."""
    return functional.one_hot(torch.tensor(architecture), int(space.options.max())).double()


def relaxed_objective(
    relaxed: Relaxed, constraints: Constraints, surrogate: Surrogate, chances: Tensor, weight: float
) -> Tensor:
    """What is minimized: minus the accuracy, plus a weight times how much too expensive it is.

    Parameters
    ----------
    chances : a soft sample, (decisions, options).
    weight : in deviations of accuracy for a cost of twice what is allowed.
    """
    ratios = [relaxed.cost(name, chances) / limit for name, limit in constraints.limits.items()]
    excess = torch.stack(ratios).log2().clamp(min=0).sum()
    return weight * excess - surrogate(chances)


def gradient_search(
    costs: Costs,
    constraints: Constraints,
    evaluate: Evaluate,
    *,
    queries: int,
    seed: int,
    rounds: int = 5,
    steps: int = 30,
    weight: float = 20.0,
    rate: float = 0.15,
) -> Trace:
    """Fit the model, follow its gradient to probabilities, ask for samples of those, and again.

    Parameters
    ----------
    rounds : the first asks for random architectures.
    steps : of Adam a round, while the temperature falls from 2 to 0.3.
    weight : of the cost, see `relaxed_objective`.
    rate : Adam's.
    """
    share = max(1, round(queries / rounds))
    trace = random_search(costs, constraints, evaluate, queries=min(2 * share, queries), seed=seed)
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    asked = {architecture for architecture, _ in trace}
    relaxed = Relaxed(costs.space, {name: costs.tables[name] for name in constraints.limits})
    while len(trace) < queries:
        surrogate = Surrogate(relaxed).fit(trace)
        logits = empty_logits(costs.space).requires_grad_()
        optimizer = torch.optim.Adam([logits], rate)
        for step in range(steps):
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            sample = gumbel_softmax(logits, uniform, 2 * 0.15 ** (step / steps))
            loss = relaxed_objective(relaxed, constraints, surrogate, sample, weight)
            optimizer.zero_grad()
            loss.backward()
            logits.grad.nan_to_num_(0.0)  # of options that there are not
            optimizer.step()
        chances = logits.detach().softmax(1).numpy()
        for _ in range(min(share, queries - len(trace))):
            found = _sampled(costs, constraints, chances, random, asked)
            asked.add(found)
            trace.append((found, evaluate(found)))
    return trace


def _sampled(
    costs: Costs,
    constraints: Constraints,
    chances: np.ndarray,
    random: np.random.Generator,
    asked: set[Architecture],
    tries: int = 500,
) -> Architecture:
    """An allowed and new architecture by these probabilities, which widen where there is none."""
    space = costs.space
    for attempt in range(tries):
        flat = 1 / (1 + 3 * attempt / tries)  # towards even chances
        powers = np.where(chances > 0, chances, 0) ** flat
        bounds = (powers / powers.sum(1, keepdims=True)).cumsum(1)
        numbers = (random.random((len(bounds), 1)) > bounds).sum(1).clip(max=space.options - 1)
        found = space.canonical(numbers)
        if found not in asked and costs.ratio(found, constraints) <= 1:
            return found
    return costs.draw(constraints, random)
