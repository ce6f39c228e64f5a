"""Ways to choose: random search, evolution, and a controller that learns by REINFORCE.

Each asks `evaluate` for so many architectures within the limits and returns what it asked, in order. It
neither knows nor cares whether an answer was computed or remembered: a query is a query.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from nnc_utils.search.costs import Costs
from nnc_utils.search.space import Architecture

Evaluate = Callable[[Architecture], float]
Trace = list[tuple[Architecture, float]]
TRIES = 200  # changes of one parent before it is given up for being too expensive
POPULATION, TOURNAMENT = 12, 5  # alive in evolution, random ones at first; that compete to be the parent
BATCH, RATE = 8, 4.0  # REINFORCE's queries between two steps, and a step at advantages of deviation 1
MOMENTUM = 0.8  # of its baseline, the moving mean of rewards
EXPONENT = -0.07  # MnasNet's; a much stronger one drowns differences of accuracy in those of cost


def random_search(costs: Costs, evaluate: Evaluate, *, queries: int, seed: int, least: float = 0.0) -> Trace:
    """Random architectures within the limits, but not below this share of them."""
    random = np.random.default_rng(seed)
    drawn = (costs.draw(random, least=least) for _ in range(queries))
    return [(architecture, evaluate(architecture)) for architecture in drawn]


def evolution(costs: Costs, evaluate: Evaluate, *, queries: int, seed: int) -> Trace:
    """Regularized evolution (Real et al., 2019, arXiv:1802.01548): a few compete, the oldest dies."""
    random = np.random.default_rng(seed)
    population = min(POPULATION, max(2, queries // 3))
    trace = random_search(costs, evaluate, queries=min(population, queries), seed=seed)
    alive = deque(trace, maxlen=population)

    def mutations(child: Architecture) -> Iterator[Architecture]:
        for _ in range(TRIES):
            child = costs.space.mutate(child if random.random() < 0.3 else parent, random)
            yield child

    while len(trace) < queries:
        drawn = random.choice(len(alive), min(TOURNAMENT, len(alive)), replace=False)
        parent = max((alive[place] for place in drawn), key=lambda member: member[1])[0]
        child = fresh(costs, trace, mutations(parent), random)
        trace.append((child, evaluate(child)))
        alive.append(trace[-1])
    return trace


def fresh(
    costs: Costs, trace: Trace, proposals: Iterator[Architecture], random: np.random.Generator
) -> Architecture:
    """The first proposal that is allowed and was not asked; where there is none any that is allowed."""
    asked = {architecture for architecture, _ in trace}
    allowed = (child for child in proposals if child not in asked and costs.ratio(child) <= 1)
    return next(allowed, None) or costs.draw(random)


def reward(accuracy: float, ratio: float, exponent: float = EXPONENT) -> float:
    """Accuracy times a power (0 or less) of cost / limit above 1 (MnasNet, Tan et al., 2019, equation 3)."""
    return accuracy * max(1.0, ratio) ** exponent


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of each row; -inf where a decision has no such option."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def policy_gradient(
    logits: np.ndarray, chosen: np.ndarray, active: np.ndarray, advantages: np.ndarray
) -> np.ndarray:
    """REINFORCE (Williams, 1992): mean over samples of advantage times the gradient of log-probability.

    Parameters
    ----------
    logits : (decisions, options), -inf where there is no option.
    chosen, active : (samples, decisions) option numbers, and whether the decision mattered: else no gradient.
    advantages : (samples,) reward minus baseline.
    """
    one_hot = np.eye(logits.shape[1])[chosen]
    gradients = (one_hot - probabilities(logits)) * active[..., None]
    return (advantages[:, None, None] * gradients).mean(0)


def reinforce(costs: Costs, evaluate: Evaluate, *, queries: int, seed: int) -> Trace:
    """A controller of one probability for each option (Zoph and Le, 2017, arXiv:1611.01578).

    It moves towards what was better than usual. What costs too much is known without a query: it gets the
    baseline's accuracy, so that its reward is below it.
    """
    random, space = np.random.default_rng(seed), costs.space
    logits = np.where(np.arange(space.options.max()) < space.options[:, None], 0.0, -np.inf)
    trace, baseline = [], None
    while len(trace) < queries:
        samples, rewards, asked = [], [], 0
        while asked < min(BATCH, queries - len(trace)) and len(samples) < TRIES:
            sample = space.sample_from(probabilities(logits), random)
            ratio, accuracy = costs.ratio(sample), baseline
            if ratio <= 1:
                accuracy, asked = evaluate(sample), asked + 1
                trace.append((sample, accuracy))
            if accuracy is not None:
                samples.append(sample)
                rewards.append(reward(accuracy, ratio))
        if not asked:  # all that it likes is too expensive
            trace.append((sample := costs.draw(random), evaluate(sample)))
            samples, rewards = [*samples, sample], [*rewards, trace[-1][1]]
        mean = float(np.mean(rewards))
        baseline = mean if baseline is None else MOMENTUM * baseline + (1 - MOMENTUM) * mean
        advantages = (np.array(rewards) - baseline) / max(float(np.std(rewards)), 1e-6)
        active = np.stack([space.active(sample) for sample in samples])
        logits += RATE * policy_gradient(logits, np.array(samples), active, advantages.clip(-3, 3))
    return trace
