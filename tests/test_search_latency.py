"""The model of latency: it finds what made the times, and is tested on what it has not seen."""

import numpy as np
import pytest

from nnc_utils import artifact, measure, models, runtimes
from nnc_utils.quantization import activations, uniform
from nnc_utils.search import latency
from nnc_utils.search.costs import Constraints, Costs, InfeasibleError
from nnc_utils.search.space import around

SPACE = around(channels=1, size=28, classes=10, stem="small_stride2")


def clock(spec):
    """Milliseconds by a law of its own: so much for a call, a convolution, a multiplication."""
    convolutions = [layer for layer in models.layers(spec) if layer.kind == "conv"]
    full = sum(
        -(-layer.out_channels // 16) * 16 * layer.macs / layer.out_channels for layer in convolutions[1:]
    )
    return 0.01 + 0.002 * len(convolutions) + 1e-8 * full


def samples(count, seed):
    random = np.random.default_rng(seed)
    return [SPACE.spec(SPACE.sample(random)) for _ in range(count)]


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
    for wrong in ([], [(seen[0][0], 0.0)], [(seen[0][0], float("nan"))]):
        with pytest.raises(ValueError, match="a time above 0"):
            latency.fit(wrong)


def test_the_error_is_the_mean_of_relative_errors():
    predictor = latency.fit([(spec, clock(spec)) for spec in samples(20, 0)])
    one, two = samples(2, 9)
    times = [(one, predictor.of(one) / 1.1), (two, predictor.of(two) / 0.7)]
    assert predictor.error(times) == pytest.approx(20)


def test_tables_of_a_search_say_what_the_predictor_says():
    predictor = latency.fit([(spec, clock(spec)) for spec in samples(30, 0)])
    costs, random = Costs(SPACE, predictor.part), np.random.default_rng(2)
    for found in [SPACE.smallest, SPACE.largest, *(SPACE.sample(random) for _ in range(20))]:
        assert costs.of(found, "latency_ms") == pytest.approx(predictor.of(SPACE.spec(found)))
    least = costs.of(SPACE.smallest, "latency_ms")
    with pytest.raises(InfeasibleError, match="no network has latency_ms of at most"):
        costs.check(Constraints(latency_ms=0.9 * least))


@pytest.mark.skipif(bool(runtimes.available("onnxruntime")), reason="ONNX Runtime is not installed")
def test_networks_are_timed_in_integers(tmp_path):
    import torch

    paths = []
    for width in (0.0625, 1.0):
        model = models.build(
            models.resnet(18, channels=1, size=8, classes=10, stem="small", width=width)
        ).eval()
        model = uniform.quantize_network(model, bits=7, per_channel=True)
        model = activations.calibrate(model, torch.randn(8, 1, 8, 8))
        paths.append(tmp_path / f"{width}.safetensors")
        artifact.save(model, paths[-1], mean=[0.5], std=[0.5], classes=[str(i) for i in range(10)])
    narrow, wide = measure.milliseconds(
        paths, runtime="onnxruntime", precision="int8", folder=tmp_path, rounds=2, seconds=0.02
    )
    assert 0 < narrow < wide
    with pytest.raises(ValueError, match="unknown runtime"):
        measure.milliseconds(paths, runtime="abacus", precision="int8", folder=tmp_path)
