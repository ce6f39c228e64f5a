"""The space of a search: every tuple is a network, every move stays inside, costs are those of the Spec."""

import itertools

import numpy as np
import pytest

from nnc_utils import models
from nnc_utils.search.costs import Constraints, Costs, InfeasibleError, described
from nnc_utils.search.space import Space, around

FASHION = around(channels=1, size=28, classes=10, stem="small_stride2")
COLOUR = around(channels=3, size=33, classes=7, stem="imagenet", widest=0.25, blocks=3)
TINY = Space(1, 8, 4, "small", ((4, 8), (4, 8, 12)), blocks=2)


def test_the_space_is_large_and_its_size_is_what_counting_gives():
    assert FASHION.cardinality >= 1e6
    everything = {TINY.canonical(numbers) for numbers in itertools.product(*map(range, TINY.options))}
    assert len(everything) == TINY.cardinality
    specs = {TINY.spec(found).to_json() for found in everything}
    assert len(specs) == len(everything)  # one network, one name


@pytest.mark.parametrize("space", [FASHION, COLOUR, TINY])
def test_samples_and_moves_are_networks_of_the_space(space):
    random = np.random.default_rng(0)
    first = space.sample(random)
    for _ in range(100):
        child = space.mutate(first, random)
        assert child != first and child == space.canonical(child)
        models.layers(space.spec(child))  # raises for what is no network
        first = child


def test_neighbours_are_all_that_differ_in_one_decision():
    start = TINY.smallest
    found = set(TINY.neighbours(start))
    wanted = set()
    for place, options in enumerate(TINY.options):
        for number in range(options):
            wanted.add(TINY.canonical((*start[:place], number, *start[place + 1 :])))
    assert found == wanted - {start}


def test_every_option_is_drawn_as_often():
    drawn = np.array([FASHION.sample(np.random.default_rng(seed)) for seed in range(2000)])
    for place, choice in enumerate(FASHION.choices):
        if choice.block < 1:  # the others are 0 where there is one block only
            shares = np.bincount(drawn[:, place], minlength=len(choice.options)) / len(drawn)
            assert np.abs(shares - 1 / len(choice.options)).max() < 0.05


def test_kernels_are_no_larger_than_what_they_see():
    size = {f"layer{s}.{b}.conv1": None for s in (1, 2, 3, 4) for b in (0, 1)}
    for layer in models.layers(FASHION.spec(FASHION.largest)):
        if layer.name in size:
            assert layer.kernel == (5 if layer.size_in > 2 else 3), layer.name


@pytest.mark.parametrize("space", [FASHION, COLOUR, TINY])
def test_costs_are_those_that_are_read_off_the_spec(space):
    costs, random = Costs(space), np.random.default_rng(1)
    for found in [space.smallest, space.largest, *(space.sample(random) for _ in range(60))]:
        spec = space.spec(found)
        assert costs.of(found, "macs") == models.macs(spec)
        assert costs.of(found, "params") == models.parameters(spec)
        layers = models.layers(spec)
        weights = sum(np.prod(layer.weight_shape) for layer in layers)
        assert costs.of(found, "int8_bytes") == weights + 8 * sum(layer.out_channels for layer in layers)
        for name in costs.tables:
            assert costs.of(space.smallest, name) <= costs.of(found, name) <= costs.of(space.largest, name)


def test_constraints_are_typed_and_an_impossible_one_says_what_the_smallest_costs():
    with pytest.raises(TypeError, match="flops"):
        Constraints(flops=1e6)
    with pytest.raises(ValueError, match="macs is 0"):
        Constraints(macs=0)
    with pytest.raises(ValueError, match="without a constraint"):
        Constraints()
    costs = Costs(FASHION)
    least = models.macs(FASHION.spec(FASHION.smallest))
    costs.check(Constraints(macs=least))
    with pytest.raises(InfeasibleError, match=f"the smallest of this space has {least:,}"):
        costs.check(Constraints(macs=least - 1))
    with pytest.raises(InfeasibleError, match="nothing predicts it"):
        costs.check(Constraints(latency_ms=1))
    assert costs.ratio(FASHION.smallest, Constraints(macs=2 * least, params=1e3)) > 1  # the worse counts


def test_draws_meet_the_constraints():
    costs, random = Costs(FASHION), np.random.default_rng(0)
    limits = Constraints(macs=8e6, params=300_000)
    for _ in range(50):
        spec = FASHION.spec(costs.draw(limits, random, least=0.5))
        shares = models.macs(spec) / 8e6, models.parameters(spec) / 300_000
        assert 0.5 <= max(shares) <= 1
    with pytest.raises(InfeasibleError, match="none of 10 random networks"):
        costs.draw(Constraints(macs=costs.of(FASHION.smallest, "macs")), random, tries=10)


@pytest.mark.parametrize("widest", [0.03, 0.3, 2.0])
def test_widths_that_are_no_sixteenths_are_refused(widest):
    with pytest.raises(ValueError, match="sixteenths"):
        around(channels=1, size=28, classes=10, stem="small", widest=widest)


def test_what_is_no_architecture_is_refused():
    for wrong in [(), TINY.smallest[:-1], (9, *TINY.smallest[1:]), (-1, *TINY.smallest[1:])]:
        with pytest.raises(ValueError, match="is no architecture of this space"):
            TINY.spec(wrong)
    for widths in ((), ((),), ((8, 8),), ((16, 8),)):
        with pytest.raises(ValueError, match="needed|needs"):
            Space(1, 8, 4, "small", widths)


def test_an_architecture_in_words():
    found = described(Costs(TINY), TINY.smallest)
    assert found["stages"] == "4:3n  4:3n" and found["macs"] == models.macs(TINY.spec(TINY.smallest))
    assert list(itertools.islice(found, 1, None)) == ["macs", "params", "int8_bytes"]
