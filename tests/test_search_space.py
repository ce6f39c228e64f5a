"""The space of a search: every tuple is a network, every move stays inside, costs are those of the Spec."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from nnc_utils import models
from nnc_utils.search.costs import Costs, InfeasibleError, described
from nnc_utils.search.space import Space, around

FASHION = around(channels=1, size=28, classes=10, stem="small", widest=0.25)
COLOUR = around(channels=3, size=33, classes=7, stem="imagenet", widest=0.1875, blocks=2)
TINY = Space(1, 8, 4, "small", ((4, 8), (4, 8, 12)), blocks=2)
FOUR = Space(1, 8, 4, "small", ((4,), (4,), (4, 8), (4, 8)), blocks=1)


def test_the_space_is_large_and_its_size_is_what_counting_gives():
    assert FASHION.cardinality >= 1e6
    for space in (TINY, FOUR):
        everything = {space.canonical(numbers) for numbers in itertools.product(*map(range, space.options))}
        assert len(everything) == space.cardinality
        specs = {space.spec(found).to_json() for found in everything}
        assert len(specs) == len(everything)  # one network, one name


@pytest.mark.parametrize("narrow", [models.three_stage, models.resnet])
def test_it_holds_three_stage_and_narrow_networks(narrow):
    """ResNet-20 for small images, and ResNet-18 of a quarter of the width, both 16, 32, 64 wide."""
    about = {"channels": 1, "size": 28, "classes": 10}
    options = {"width": 0.25, "stem": "small"} if narrow is models.resnet else {}
    spec, chosen = narrow(**about, **options), {}
    for stage, blocks in enumerate(spec.stages):
        chosen |= {(stage, -1, "width"): blocks[0].widths[1], (stage, -1, "depth"): len(blocks)}
        chosen |= {(stage, number, "inner"): block.widths[0] for number, block in enumerate(blocks)}
    choices = FASHION.choices
    numbers = [c.options.index(chosen.get((c.stage, c.block, c.kind), c.options[0])) for c in choices]
    assert FASHION.spec(tuple(numbers)) == spec


@pytest.mark.parametrize("space", [FASHION, COLOUR, TINY, FOUR])
def test_samples_and_moves_are_networks_of_the_space(space):
    random = np.random.default_rng(0)
    first = space.sample(random)
    for _ in range(100):
        child = space.mutate(first, random)
        assert child != first and child == space.canonical(child)
        models.layers(space.spec(child))  # raises for what is no network
        first = child


def test_every_option_is_drawn_as_often():
    drawn = np.array([FASHION.sample(np.random.default_rng(seed)) for seed in range(2000)])
    for place, choice in enumerate(FASHION.choices):
        if choice.matters(1) and (choice.stage < 3 or choice.kind == "depth"):  # the others may be missing
            shares = np.bincount(drawn[:, place], minlength=len(choice.options)) / len(drawn)
            assert np.abs(shares - 1 / len(choice.options)).max() < 0.05


def test_kernels_are_no_larger_than_what_they_see():
    space = around(channels=1, size=14, classes=10, stem="small", widest=0.125)
    for layer in models.layers(space.spec(space.largest)):
        if layer.name.startswith("layer") and layer.name.endswith("conv1"):
            assert layer.kernel == (5 if layer.size_in > 2 else 3), layer.name


@pytest.mark.parametrize("space", [FASHION, COLOUR, TINY, FOUR])
def test_costs_are_those_that_are_read_off_the_spec(space):
    costs, random = Costs(space, {"macs": 1e12}), np.random.default_rng(1)
    for found in [space.smallest, space.largest, *(space.sample(random) for _ in range(60))]:
        spec = space.spec(found)
        assert costs.of(found, "macs") == models.macs(spec)
        assert costs.of(found, "params") == models.parameters(spec)
        layers = models.layers(spec)
        weights = sum(np.prod(layer.weight_shape) for layer in layers)
        assert costs.of(found, "int8_bytes") == weights + 8 * sum(layer.out_channels for layer in layers)
        for name in costs.terms:
            assert costs.of(space.smallest, name) <= costs.of(found, name) <= costs.of(space.largest, name)


def test_limits_are_checked_and_an_impossible_one_says_what_the_smallest_costs():
    least = models.macs(FASHION.spec(FASHION.smallest))
    for limits, message in (
        ({}, "without a limit"),
        ({"flops": 1e6}, "known are macs, params, int8_bytes"),
        ({"latency_ms": 1.0}, "latency_ms with a predictor"),
        ({"macs": float("nan")}, "no network has macs"),
        ({"macs": least - 1}, re.escape(f"the smallest of this space has {least:,.6g}")),
    ):
        with pytest.raises(ValueError, match=message):
            Costs(FASHION, limits)
    params = models.parameters(FASHION.spec(FASHION.smallest))
    assert Costs(FASHION, {"macs": least, "params": params}).ratio(FASHION.smallest) == 1
    worse = Costs(FASHION, {"macs": 4 * least, "params": 2 * params})
    assert worse.ratio(FASHION.smallest) == 0.5


def test_draws_keep_the_limits():
    costs, random = Costs(FASHION, {"macs": 8e6, "params": 300_000}), np.random.default_rng(0)
    for _ in range(50):
        spec = FASHION.spec(costs.draw(random, least=0.5))
        shares = models.macs(spec) / 8e6, models.parameters(spec) / 300_000
        assert 0.5 <= max(shares) <= 1
    with pytest.raises(InfeasibleError, match="none of 10 random networks"):
        Costs(FASHION, {"macs": costs.of(FASHION.smallest, "macs")}).draw(random, tries=10)


@pytest.mark.parametrize("widest", [0.03, 0.3, 2.0])
def test_widths_that_are_no_sixteenths_are_refused(widest):
    with pytest.raises(ValueError, match="sixteenths"):
        around(channels=1, size=28, classes=10, stem="small", widest=widest)


def test_an_architecture_in_words():
    words = described(Costs(TINY, {"macs": 1e9}), TINY.smallest)
    assert words["stages"] == "4: 4/3  4: 4/3" and words["macs"] == models.macs(TINY.spec(TINY.smallest))
    assert list(itertools.islice(words, 1, None)) == ["macs", "params", "int8_bytes"]


def test_nobody_else_imports_the_search():
    """Else an edit of search/ would mark the rows of every technique as those of other code."""
    root = Path(models.__file__).parents[1]
    allowed = {"nnc_utils/peers/optuna_nsga2.py", "notebooks/src/05_architecture_search.py"}
    allowed |= {"nnc_utils/exercises/search.py"}  # loaded by the checks of that notebook alone
    tops = ("nnc_utils", "workflow", "notebooks/src")
    files = [file for top in tops for file in (root / top).rglob("*.py")]
    assert len(files) > 50
    importers = {
        file.relative_to(root).as_posix()
        for file in files
        if re.search(r"(from|import) nnc_utils\.search|from nnc_utils import .*\bsearch\b", file.read_text())
    }
    assert {name for name in importers if not name.startswith("nnc_utils/search/")} <= allowed
