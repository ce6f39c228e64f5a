"""The model of latency: it finds what made the times, and is tested on what it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest

from nnc_utils import models
from nnc_utils.search import latency
from nnc_utils.search.costs import Costs, InfeasibleError, parts
from nnc_utils.search.space import around

SPACE = around(channels=1, size=28, classes=10, stem="small_stride2")


COMMITTED = Path(__file__).parents[1] / "results/standard/provenance.json"


def clock(spec):
    """Milliseconds by a law of its own: for a call, a convolution, a multiplication, a narrow pixel."""
    convolutions = [layer for layer in models.layers(spec) if layer.kind == "conv"]
    full = sum(-(-x.out_channels // 16) * 16 * x.macs / x.out_channels for x in convolutions[1:])
    narrow = sum((layer.kernel * layer.size_out) ** 2 for layer in convolutions[1:] if layer.in_channels < 16)
    return 0.01 + 0.002 * len(convolutions) + 1e-8 * full + 1e-5 * narrow


def samples(count, seed):
    random = np.random.default_rng(seed)
    return [SPACE.spec(SPACE.sample(random)) for _ in range(count)]


def test_the_features_of_a_block_are_those_counted_by_hand():
    """6 channels of 8x8 to 20 of 4x4: 6 fill up to 8, 20 to 32 as outputs; 5x5, 3x3 and a projection."""
    block = models.BlockSpec((20, 20), (5, 3), 2, "projection")
    spec = models.Spec(1, 8, 10, "small", 6, "basic", ((block,),))
    counts = [latency.features(*part) for part in parts(spec)]
    stem, inside, classifier = (dict(zip(latency.FEATURES, count, strict=True)) for count in counts)
    counted = {"convolutions": 3, "5x5 MACs": 8 * 32 * 25 * 16, "3x3 MACs": 20 * 32 * 9 * 16}
    counted |= {"1x1 MACs": 8 * 32 * 16, "outputs": 3 * 20 * 16, "additions": 1}
    counted |= {"gathered inputs": (6 * 25 + 20 * 9 + 6) * 16, "weights": 20 * (6 * 25 + 20 * 9 + 6)}
    counted |= {"gathered pixels of few channels": (25 + 1) * 16}
    assert {name: value for name, value in inside.items() if value} == counted
    counted = {"network": 1, "convolutions": 1, "stem MACs": 4 * 16 * 9 * 64, "outputs": 6 * 64}
    counted |= {"gathered inputs": 9 * 64, "weights": 54}
    assert {name: value for name, value in stem.items() if value} == counted
    assert {name: value for name, value in classifier.items() if value} == {"outputs": 10, "weights": 200}


def test_errors_are_relative():
    """One network, 1 and 2 ms: c of least (c - 1)^2 + (c/2 - 1)^2 is 1.2; of absolute errors it is 1.5."""
    spec = SPACE.spec(SPACE.smallest)
    assert latency.fit([(spec, 1.0), (spec, 2.0)]).of(spec) == pytest.approx(1.2)


def test_the_committed_times_are_predicted_on_networks_that_were_not_fitted():
    runs = json.loads(COMMITTED.read_text())
    [timed] = [run["extra"]["latency"] for run in runs.values() if "latency" in run["extra"]]
    blocks, networks = latency.read(timed["blocks"]), latency.read(timed["networks"])
    predictor = latency.fit(blocks)
    assert predictor.error(networks) < 2  # 9.7 without the pixels of few channels
    assert timed["error"] == pytest.approx(predictor.error(networks))
    by_hand = [abs(predictor.of(spec) - ms) / ms for spec, ms in networks]
    assert predictor.error(networks) == pytest.approx(100 * sum(by_hand) / len(by_hand))


def test_blocks_tell_how_long_whole_networks_take():
    probes = latency.blocks(SPACE, 60, np.random.default_rng(0))
    assert len({spec.to_json() for spec in probes}) == 60
    assert {len(spec.stages) for spec in probes} == {1, 2}
    predictor = latency.fit([(spec, clock(spec)) for spec in probes])
    assert (predictor.coefficients >= 0).all()
    assert predictor.error([(spec, clock(spec)) for spec in samples(40, 1)]) < 5


def test_the_predictor_never_sees_its_test_architectures():
    seen = [(spec, clock(spec)) for spec in samples(20, 0)]
    predictor = latency.fit(seen)
    with pytest.raises(ValueError, match="1 of 2 networks were fitted to"):
        predictor.error([(samples(1, 5)[0], 1.0), seen[3]])
    with pytest.raises(ValueError, match="0 of 0"):
        predictor.error([])


def test_the_terms_of_a_search_add_up_to_what_the_predictor_says():
    predictor = latency.fit([(spec, clock(spec)) for spec in samples(30, 0)])
    costs, random = Costs(SPACE, {"latency_ms": 10.0}, predictor.part), np.random.default_rng(2)
    for found in [SPACE.smallest, SPACE.largest, *(SPACE.sample(random) for _ in range(20))]:
        assert costs.of(found, "latency_ms") == pytest.approx(predictor.of(SPACE.spec(found)))
    least = costs.of(SPACE.smallest, "latency_ms")
    with pytest.raises(InfeasibleError, match="no network has latency_ms of at most"):
        Costs(SPACE, {"latency_ms": 0.9 * least}, predictor.part)
