"""The allocation against all allocations."""

import itertools

import numpy as np
import pytest

from nnc_utils import allocation


def instance(seed, *, unit=1.0, layers=4):
    """Random bytes and harms, some harms negative, neither in the order of the widths."""
    random = np.random.default_rng(seed)
    cost, harm = {}, {}
    for layer in (f"layer{i}" for i in range(layers)):
        widths = random.choice([2, 3, 4, 5, 6, 8], random.integers(1, 6), replace=False).tolist()
        size = 10 ** random.uniform(2, 6)
        cost[layer] = {bits: round(size * bits * random.uniform(0.9, 1.1)) for bits in widths}
        harm[layer] = {
            bits: unit * float(4.0**-bits * random.lognormal() - 0.01 * (random.random() < 0.2))
            for bits in widths
        }
    return cost, harm


def total(table, allocation):
    return sum(table[layer][bits] for layer, bits in allocation.items())


def every_allocation(cost):
    for widths in itertools.product(*cost.values()):
        yield dict(zip(cost, widths))


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("seed", range(4))
def test_no_allocation_harms_less(seed, unit):
    cost, harm = instance(seed, unit=unit)
    costs = sorted(total(cost, chosen) for chosen in every_allocation(cost))
    for budget in (costs[0], costs[len(costs) // 4], costs[len(costs) // 2], costs[-1] - 1, costs[-1]):
        if budget < costs[0]:
            continue
        found = allocation.allocate(cost, harm, budget=budget)
        assert list(found) == list(cost)
        assert total(cost, found) <= budget
        best = min(total(harm, a) for a in every_allocation(cost) if total(cost, a) <= budget)
        assert total(harm, found) == pytest.approx(best, rel=1e-8, abs=1e-9 * unit)


def test_small_differences_beside_a_huge_harm_are_seen():
    """2 bits would ruin the network; among the others 1e-9 decides."""
    random = np.random.default_rng(0)
    cost = {f"layer{i}": {2: 200 + i, 4: 400 + i, 6: 600 + i, 8: 800 + i} for i in range(4)}
    harm = {layer: {2: 50.0} | {b: 1e-9 * random.random() / b for b in (4, 6, 8)} for layer in cost}
    for budget in range(1700, 3300, 200):
        found = allocation.allocate(cost, harm, budget=budget)
        best = min(total(harm, a) for a in every_allocation(cost) if total(cost, a) <= budget)
        assert total(cost, found) <= budget
        assert total(harm, found) == pytest.approx(best, rel=1e-6)


def test_the_budget_is_kept_to_the_byte():
    cost = {f"layer{i}": {4: 1_000_003 + i, 8: 2_000_009 + 7 * i} for i in range(6)}
    harm = {layer: {4: 1.0 + i / 10, 8: 0.0} for i, layer in enumerate(cost)}
    for chosen in list(every_allocation(cost))[::7]:
        for budget in (total(cost, chosen) - 1, total(cost, chosen)):
            if budget < total(cost, dict.fromkeys(cost, 4)):
                continue
            found = allocation.allocate(cost, harm, budget=budget)
            best = min(total(harm, a) for a in every_allocation(cost) if total(cost, a) <= budget)
            assert total(cost, found) <= budget
            assert total(harm, found) == pytest.approx(best, abs=1e-9)


def least_harm(cost, harm):
    """Bytes -> smallest harm, layer by layer over all sums of bytes."""
    reached = {0: 0.0}
    for layer in cost:
        longer = {}
        for spent, suffered in reached.items():
            for bits, price in cost[layer].items():
                now = suffered + harm[layer][bits]
                longer[spent + price] = min(now, longer.get(spent + price, now))
        reached = longer
    return reached


def test_sixteen_layers_whose_bytes_all_buy_about_the_same():
    """Nothing is clearly worth its bytes, so that a solver may stop early; dynamic programming does not."""
    random = np.random.default_rng(0)
    cost, harm = {}, {}
    for layer in (f"layer{i}" for i in range(16)):
        cost[layer] = {bits: int(random.integers(100, 130)) * bits for bits in (2, 3, 4, 6, 8)}
        harm[layer] = {
            bits: 1e-3 * (1100 - price * random.uniform(0.98, 1.02)) for bits, price in cost[layer].items()
        }
    reached = least_harm(cost, harm)
    for budget in (5601, 8000, 9876):
        found = allocation.allocate(cost, harm, budget=budget)
        best = min(suffered for spent, suffered in reached.items() if spent <= budget)
        assert total(cost, found) <= budget
        assert total(harm, found) == pytest.approx(best, rel=1e-8)


def test_of_equal_harm_the_smaller_is_chosen_and_no_budget_means_least_harm():
    cost = {"a": {4: 10, 6: 15, 8: 20}, "b": {4: 10, 8: 20}}
    harm = {"a": {4: 0.5, 6: 0.0, 8: 0.0}, "b": {4: 0.0, 8: 0.0}}
    assert allocation.allocate(cost, harm, budget=float("inf")) == {"a": 6, "b": 4}
    assert allocation.allocate(cost, harm, budget=20) == {"a": 4, "b": 4}


def test_a_budget_below_the_smallest_allocation_says_what_is_possible():
    cost, harm = {"a": {2: 30, 4: 60}, "b": {3: 45, 2: 30}}, {"a": {2: 1, 4: 0}, "b": {3: 0, 2: 1}}
    assert allocation.allocate(cost, harm, budget=60) == {"a": 2, "b": 2}
    for budget in (59, 0, -1, float("nan")):
        with pytest.raises(ValueError, match="smallest allocation takes 60 bytes"):
            allocation.allocate(cost, harm, budget=budget)


def test_tables_that_do_not_fit_are_refused():
    good = {"a": {2: 1.0, 4: 2.0}, "b": {2: 1.0}}
    for cost, harm in ((good, {"a": good["a"]}), ({}, {}), (good, good | {"b": {}})):
        with pytest.raises(ValueError, match="the same layers, each with the same settings"):
            allocation.allocate(cost, harm, budget=9)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"b: the cost of 2 is 1.0, its harm {broken}"):
            allocation.allocate(good, good | {"b": {2: broken}}, budget=9)
    for broken in (float("nan"), -1):
        with pytest.raises(ValueError, match=f"b: the cost of 2 is {broken}"):
            allocation.allocate(good | {"b": {2: broken}}, good, budget=9)
