"""Search by gradient: every decision a probability, drawn by Gumbel-softmax, with the cost in the loss.

DARTS (Liu et al., 2019, arXiv:1806.09055) and FBNet (Wu et al., 2019, arXiv:1812.03443) differentiate the
supernet's own loss, with *every* option computed in a step. Here the loss is a cheap model of the accuracy,
fitted to the candidates asked so far.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnc_utils.search.costs import Costs
from nnc_utils.search.searchers import Evaluate, Trace, fresh, random_search
from nnc_utils.search.space import Architecture, Space

ROUNDS = 5  # of fitting and asking; the first asks for random architectures
STEPS, RATE = 30, 0.15  # of Adam a round, while the temperature falls from 2 to 0.3
WEIGHT = 20.0  # deviations of accuracy that a cost of twice what is allowed is worth


def empty_logits(space: Space) -> Tensor:
    """A logit of 0 for each option of each decision, (decisions, options); -inf where there is none."""
    numbers = torch.arange(int(space.options.max()))
    return torch.where(numbers < torch.from_numpy(space.options)[:, None], 0.0, -torch.inf).double()


def gumbel_softmax(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A soft sample of each decision (Jang et al., 2017, arXiv:1611.01144): probabilities that add up to 1.

    `logits` are (decisions, options), -inf where there is no option; `uniform`, random numbers in (0, 1), has
    the same shape. Towards temperature 0 the samples become one-hot.
    """
    return ((logits - (-uniform.log()).log()) / temperature).softmax(1)


class Relaxed:
    """Which decisions matter, and the mean costs, of networks whose decisions are drawn independently."""

    def __init__(self, costs: Costs) -> None:
        self.space, self.limits, space = costs.space, costs.limits, costs.space
        self._terms = {
            name: [(term, torch.from_numpy(term.values)) for term in costs.terms[name]]
            for name in costs.terms
        }
        gates = torch.zeros(len(space.choices), len(space.choices), int(space.options.max())).double()
        for number, choice in enumerate(space.choices):
            depth = space.places[choice.stage, -1, "depth"]
            for option, blocks in enumerate(space.choices[depth].options):
                gates[number, depth, option] = choice.matters(blocks)
        self._gates = gates.flatten(1)

    def exists(self, chances: Tensor) -> Tensor:
        """The probability that each decision matters, (decisions,): that its block exists."""
        return self._gates @ chances.flatten()

    def cost(self, name: str, chances: Tensor) -> Tensor:
        """The mean cost, exact; `chances` are probabilities (decisions, options), each row adding up to 1."""
        total = torch.zeros((), dtype=torch.float64)
        for term, mean in self._terms[name]:
            for place in reversed(term.places):
                mean = mean @ chances[place, : mean.shape[-1]]
            total = total + mean * chances[term.depth, list(term.when)].sum()
        return total


class Surrogate:
    """Accuracy as a sum over decisions: of each option, and of how far along its options it is.

    Linear in the probabilities, so that it is defined (and differentiable) between architectures as well;
    `ridge` is how strongly the coefficients are held at 0.
    """

    def __init__(self, relaxed: Relaxed, ridge: float = 1.0) -> None:
        self.relaxed, self.ridge, options = relaxed, ridge, relaxed.space.options[:, None]
        numbers = np.arange(options.max())
        self.along = torch.from_numpy(np.where(numbers < options, numbers / np.maximum(options - 1, 1), 0.0))

    def fit(self, trace: Trace) -> Surrogate:
        """Ridge regression on what was asked."""
        inputs = torch.stack([self._features(one_hot(self.relaxed.space, asked)) for asked, _ in trace])
        values = torch.tensor([value for _, value in trace], dtype=torch.float64)
        values = (values - values.mean()) / (float(values.std()) or 1.0)
        self.centre = inputs.mean(0)
        inputs = inputs - self.centre
        square = inputs.T @ inputs + self.ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
        self.coefficients = torch.linalg.solve(square, inputs.T @ values)
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


def relaxed_objective(relaxed: Relaxed, surrogate: Surrogate, chances: Tensor, weight: float) -> Tensor:
    """What is minimized for a soft sample: minus the accuracy, plus a weight times the excess of cost."""
    ratios = [relaxed.cost(name, chances) / limit for name, limit in relaxed.limits.items()]
    excess = torch.stack(ratios).log2().clamp(min=0).sum()
    return weight * excess - surrogate(chances)


def gradient_search(costs: Costs, evaluate: Evaluate, *, queries: int, seed: int) -> Trace:
    """Fit the model, follow its gradient to probabilities, ask for samples of those, and again."""
    share = max(1, round(queries / ROUNDS))
    trace = random_search(costs, evaluate, queries=min(2 * share, queries), seed=seed)
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    relaxed = Relaxed(costs)
    while len(trace) < queries:
        surrogate = Surrogate(relaxed).fit(trace)
        logits = empty_logits(costs.space).requires_grad_()
        optimizer = torch.optim.Adam([logits], RATE)
        for step in range(STEPS):
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            sample = gumbel_softmax(logits, uniform, 2 * 0.15 ** (step / STEPS))
            loss = relaxed_objective(relaxed, surrogate, sample, WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            logits.grad.nan_to_num_(0.0)  # of options that there are not
            optimizer.step()
        chances = logits.detach().softmax(1).numpy()
        for _ in range(min(share, queries - len(trace))):
            child = fresh(costs, trace, _samples(costs.space, chances, random), random)
            trace.append((child, evaluate(child)))
    return trace


def _samples(
    space: Space, chances: np.ndarray, random: np.random.Generator, tries: int = 500
) -> Iterator[Architecture]:
    """Architectures by these probabilities, which become more and more equal."""
    for attempt in range(tries):
        powers = np.where(chances > 0, chances, 0) ** (1 / (1 + 3 * attempt / tries))
        yield space.sample_from(powers / powers.sum(1, keepdims=True), random)
