"""Ways to choose: random search, evolution, and a controller that learns by REINFORCE.

Each asks `evaluate` for so many architectures within the constraints and returns what it asked, in order. It
neither knows nor cares whether an answer was computed or remembered: a question is a question.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from nnc_utils.search.costs import Constraints, Costs
from nnc_utils.search.space import Architecture

Evaluate = Callable[[Architecture], float]
Trace = list[tuple[Architecture, float]]
TRIES = 200  # changes of one parent before it is given up for being too expensive


def random_search(
    costs: Costs, constraints: Constraints, evaluate: Evaluate, *, queries: int, seed: int
) -> Trace:
    """Random architectures within the constraints."""
    random = np.random.default_rng(seed)
    found = (costs.draw(constraints, random) for _ in range(queries))
    return [(architecture, evaluate(architecture)) for architecture in found]


def evolution(
    costs: Costs,
    constraints: Constraints,
    evaluate: Evaluate,
    *,
    queries: int,
    seed: int,
    population: int = 12,
    tournament: int = 5,
) -> Trace:
    """Regularized evolution (Real et al., 2019): the best of a few is changed, the oldest dies.

    Parameters
    ----------
    population : architectures alive; the first are random.
    tournament : how many of them compete to be the parent.
    """
    random = np.random.default_rng(seed)
    population = min(population, max(2, queries // 3))
    trace = random_search(costs, constraints, evaluate, queries=min(population, queries), seed=seed)
    alive = deque(trace, maxlen=population)
    asked = {architecture for architecture, _ in trace}
    while len(trace) < queries:
        drawn = random.choice(len(alive), min(tournament, len(alive)), replace=False)
        parent = max((alive[place] for place in drawn), key=lambda member: member[1])[0]
        child = _changed(costs, constraints, parent, random, asked)
        asked.add(child)
        trace.append((child, evaluate(child)))
        alive.append(trace[-1])
    return trace


def _changed(
    costs: Costs,
    constraints: Constraints,
    parent: Architecture,
    random: np.random.Generator,
    asked: set[Architecture],
) -> Architecture:
    """A mutation of the parent that is allowed and new; after many tries any that is allowed."""
    child = parent
    for _ in range(TRIES):
        child = costs.space.mutate(child if random.random() < 0.3 else parent, random)
        if child not in asked and costs.ratio(child, constraints) <= 1:
            return child
    return costs.draw(constraints, random)


# --- A controller ------------------------------------------------------------------------------


def reward(accuracy: float, ratio: float, exponent: float = -0.07) -> float:
    """Accuracy times a power of how much too expensive it is (MnasNet, Tan et al., 2019, equation 3).

    Parameters
    ----------
    accuracy : in percent.
    ratio : cost as a share of what is allowed; at most 1 costs nothing.
    exponent : 0 or less.
    """
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
    chosen : (samples, decisions) option numbers.
    active : (samples, decisions) whether the decision mattered; no gradient where not.
    advantages : (samples,) reward minus baseline.

    Returns
    -------
    (decisions, options), in which direction the expected reward grows.
    """
    one_hot = np.eye(logits.shape[1])[chosen]
    gradients = (one_hot - probabilities(logits)) * active[..., None]
    return (advantages[:, None, None] * gradients).mean(0)


def reinforce(
    costs: Costs,
    constraints: Constraints,
    evaluate: Evaluate,
    *,
    queries: int,
    seed: int,
    batch: int = 8,
    rate: float = 4.0,
    momentum: float = 0.8,
    exponent: float = -0.07,
) -> Trace:
    """A controller of one probability for each option, moved towards what was better than usual.

    What costs too much is known without a question: it gets the baseline's accuracy as its own, so that its
    reward is below it, and costs no image.

    Parameters
    ----------
    batch : questions between two steps.
    rate : of a step, at advantages of deviation 1.
    momentum : of the baseline, the moving mean of rewards.
    exponent : of the reward. MnasNet's; a much stronger one drowns differences of accuracy in those of cost.
    """
    random, space = np.random.default_rng(seed), costs.space
    logits = np.where(np.arange(space.options.max()) < space.options[:, None], 0.0, -np.inf)
    trace, baseline, spread = [], None, 1.0
    while len(trace) < queries:
        samples, rewards, asked = [], [], 0
        while asked < min(batch, queries - len(trace)) and len(samples) < TRIES:
            chances = probabilities(logits).cumsum(1)
            numbers = (random.random((len(chances), 1)) > chances).sum(1).clip(max=space.options - 1)
            found = space.canonical(numbers)
            ratio = costs.ratio(found, constraints)
            accuracy = baseline
            if ratio <= 1:
                accuracy, asked = evaluate(found), asked + 1
                trace.append((found, accuracy))
            if accuracy is not None:
                samples.append(found)
                rewards.append(reward(accuracy, ratio, exponent))
        if not asked:  # all that it likes is too expensive
            found = costs.draw(constraints, random)
            samples, rewards = [*samples, found], [*rewards, evaluate(found)]
            trace.append((found, rewards[-1]))
        mean = float(np.mean(rewards))
        spread = max(float(np.std(rewards)), 1e-6)
        baseline = mean if baseline is None else momentum * baseline + (1 - momentum) * mean
        advantages = (np.array(rewards) - baseline) / spread
        active = np.stack([space.active(sample) for sample in samples])
        logits += rate * policy_gradient(logits, np.array(samples), active, advantages.clip(-3, 3))
    return trace


SEARCHERS = {"random": random_search, "evolution": evolution, "reinforce": reinforce}
