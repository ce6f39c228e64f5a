"""Searchers on a space that is scored in a table, and their parts against closed formulas."""

import itertools

import numpy as np
import pytest
import torch

from nnc_utils import peers
from nnc_utils.search import gradient, searchers
from nnc_utils.search.costs import Costs
from nnc_utils.search.space import Space

SPACE = Space(1, 28, 10, "small_stride2", ((8, 16, 24), (8, 16, 32)), blocks=1)
COSTS = Costs(SPACE, {"macs": 1.2e6})
QUERIES, SEEDS = 60, 20
CLEVER = {
    "evolution": searchers.evolution,
    "reinforce": searchers.reinforce,
    "gradient": gradient.gradient_search,
}


@pytest.fixture(scope="module")
def table():
    """Every network's accuracy: what each decision is worth, what pairs are, and something for luck."""
    random = np.random.default_rng(3)
    worth = random.normal(size=(len(SPACE.choices), 3))
    pairs = 0.3 * random.normal(size=(len(SPACE.choices), 3, len(SPACE.choices), 3))
    scored = {}
    numbers = itertools.product(*map(range, SPACE.options))
    for found in dict.fromkeys(map(SPACE.canonical, numbers)):
        alone = sum(worth[place, number] for place, number in enumerate(found))
        two = itertools.combinations(enumerate(found), 2)
        together = sum(pairs[a, m, b, n] for (a, m), (b, n) in two)
        scored[found] = 85 + 0.6 * alone + 0.6 * together + 0.2 * random.normal()
    return scored


def best(search, table, seed):
    asked = []

    def evaluate(found):
        asked.append(found)
        return table[found]

    trace = search(COSTS, evaluate, queries=QUERIES, seed=seed)
    assert [found for found, _ in trace] == asked and len(asked) == QUERIES  # all that was asked, no more
    assert all(COSTS.ratio(found) <= 1 for found in asked)
    return max(value for _, value in trace)


@pytest.fixture(scope="module")
def usual(table):
    return [best(searchers.random_search, table, seed) for seed in range(SEEDS)]


@pytest.mark.parametrize("name", CLEVER)
def test_each_searcher_beats_random_search(name, table, usual):
    found = [best(CLEVER[name], table, seed) for seed in range(SEEDS)]
    assert np.median(found) > np.median(usual)
    optimum = max(value for network, value in table.items() if COSTS.ratio(network) <= 1)
    close = optimum - 1e-9
    assert np.mean(np.array(found) >= close) > np.mean(np.array(usual) >= close)


def test_random_search_is_what_random_draws_give(table, usual):
    allowed = np.array([value for network, value in table.items() if COSTS.ratio(network) <= 1])
    random = np.random.default_rng(0)
    wanted = [max(random.choice(allowed, QUERIES)) for _ in range(2000)]
    assert np.percentile(wanted, 5) < np.median(usual) < np.percentile(wanted, 95)


def test_the_same_seed_asks_the_same(table):
    for search in (searchers.random_search, *CLEVER.values()):
        runs = [search(COSTS, table.__getitem__, queries=14, seed=4) for _ in range(2)]
        assert runs[0] == runs[1]


@pytest.mark.skipif(bool(peers.available("optuna_nsga2")), reason="Optuna is not installed")
def test_optunas_search_keeps_to_the_same_rules(table):
    found = [best(peers.peer("optuna_nsga2").search, table, seed) for seed in range(3)]
    assert min(found) > np.percentile(list(table.values()), 75)


# --- REINFORCE ----------------------------------------------------------------------------------


def test_the_mean_of_reinforce_is_the_exact_gradient():
    """One decision between two options with rewards r: d/dz of p·r is p₁p₂(r₁ - r₂), with any baseline."""
    logits, rewards = np.array([[0.4, -0.3]]), np.array([2.0, 5.0])
    [chances] = searchers.probabilities(logits)
    exact = chances[0] * chances[1] * (rewards[0] - rewards[1]) * np.array([1, -1])
    random = np.random.default_rng(0)
    chosen = random.choice(2, 200_000, p=chances)
    spread = []
    for baseline in (0.0, chances @ rewards):
        estimate = searchers.policy_gradient(
            logits, chosen[:, None], np.ones((len(chosen), 1)), rewards[chosen] - baseline
        )
        np.testing.assert_allclose(estimate[0], exact, atol=0.01)
        each = (rewards[chosen] - baseline) * (np.eye(2)[chosen][:, 0] - chances[0])
        spread.append(each.std())
    assert spread[1] < spread[0]  # what a baseline is for


def test_decisions_that_do_not_matter_get_no_gradient_and_excess_costs_reward():
    logits = np.array([[0.0, 0.0], [0.0, -np.inf]])
    chosen, active = np.array([[1, 0]]), np.array([[False, True]])
    gradient = searchers.policy_gradient(logits, chosen, active, np.array([3.0]))
    np.testing.assert_array_equal(gradient, 0)
    assert searchers.reward(90.0, 0.7) == 90  # MnasNet's equation 3
    assert searchers.reward(90.0, 1.5, exponent=-0.07) == pytest.approx(90 * 1.5**-0.07)


# --- Gradients ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relaxed():
    two = Space(1, 28, 10, "small_stride2", ((8, 16), (8, 24)), blocks=2)
    return gradient.Relaxed(
        Costs(two, {"macs": 0.5 * Costs(two, {"macs": 1e9}).of(two.largest, "macs"), "params": 1e4})
    )


@pytest.mark.parametrize(
    ("name", "widths", "blocks"),
    [
        ("macs", ((8, 16), (8, 24)), 2),
        ("params", ((8,), (8,), (8, 16), (8, 24)), 1),
    ],  # the last may be missing
)
def test_the_expected_cost_is_the_mean_over_all_networks(name, widths, blocks):
    space = Space(1, 28, 10, "small_stride2", widths, blocks)
    costs = Costs(space, {"macs": 1e9})
    relaxed = gradient.Relaxed(costs)
    logits = gradient.empty_logits(space)
    logits = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    chances = logits.softmax(1)
    rows, mean, total = chances.tolist(), 0.0, 0.0
    for numbers in itertools.product(*map(range, space.options)):
        chance = np.prod([row[number] for row, number in zip(rows, numbers, strict=True)])
        mean, total = mean + chance * costs.of(space.canonical(numbers), name), total + chance
    assert total == pytest.approx(1)
    assert float(relaxed.cost(name, chances)) == pytest.approx(mean)


def test_gradients_of_the_relaxed_objective_are_finite_differences(relaxed):
    space, random = relaxed.space, np.random.default_rng(0)
    trace = [(space.sample(random), float(value)) for value in random.normal(80, 3, 40)]
    surrogate = gradient.Surrogate(relaxed).fit(trace)
    generator = torch.Generator().manual_seed(1)
    logits = gradient.empty_logits(space)
    logits = logits + 0.3 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)

    def value(at):
        sample = gradient.gumbel_softmax(at, uniform, 0.7)
        return gradient.relaxed_objective(relaxed, surrogate, sample, 2.0)

    leaf = logits.clone().requires_grad_()
    [found] = torch.autograd.grad(value(leaf), leaf)
    for place, options in enumerate(space.options):
        for number in range(options):
            step = torch.zeros_like(logits)
            step[place, number] = 1e-5
            difference = (value(logits + step) - value(logits - step)) / 2e-5
            assert float(found[place, number]) == pytest.approx(float(difference), rel=1e-4, abs=1e-6)


def test_the_surrogate_is_ridge_regression(relaxed):
    from sklearn.linear_model import Ridge

    space, random = relaxed.space, np.random.default_rng(0)
    trace = [(space.sample(random), float(value)) for value in random.normal(80, 3, 60)]
    surrogate = gradient.Surrogate(relaxed, ridge=0.7).fit(trace)
    chances = [gradient.one_hot(space, found) for found, _ in trace]
    inputs = torch.stack([surrogate._features(chance) for chance in chances]).numpy()
    values = np.array([value for _, value in trace])
    theirs = Ridge(alpha=0.7).fit(inputs, (values - values.mean()) / values.std(ddof=1)).predict(inputs)
    np.testing.assert_allclose([float(surrogate(chance)) for chance in chances], theirs, atol=1e-8)


def test_gumbel_softmax_draws_by_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -torch.inf]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
    samples = gradient.gumbel_softmax(logits.expand(20_000, 3), uniform, 0.01)  # as 20,000 decisions
    torch.testing.assert_close(samples.round().mean(0), logits.softmax(1)[0], atol=0.01, rtol=0)
