"""Reconstruction against torch's least squares, row after row."""

import pytest
import torch
from small_networks import PLAIN, images, network, quantized

from nnc_utils import curvature, encoding
from nnc_utils.pruning import reconstruct, unstructured


@pytest.fixture
def layer():
    """A weight (4, 6), the moment of inputs that it had, and these with the damping written out as inputs."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    moment = inputs.T @ inputs / 400
    small = (reconstruct.DAMPING * moment.diagonal().mean() * 400) ** 0.5 * torch.eye(6)
    return torch.randn(4, 6, generator=generator), moment, torch.cat([inputs, small])


def by_lstsq(weight, kept, inputs):
    """Each row for itself: weights for the kept inputs that come nearest to the old sums."""
    exact = torch.zeros_like(weight)
    for row, stay in enumerate(kept):
        sums = inputs @ weight[row]
        exact[row, stay] = torch.linalg.lstsq(inputs[:, stay], sums[:, None]).solution[:, 0]
    return exact


def test_many_removed_weights_are_made_up_for_exactly(layer):
    weight, moment, inputs = layer
    kept = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    kept[3] = False  # an output channel may be empty
    damped = reconstruct.damped(moment)
    few = reconstruct.corrected(weight, kept, damped, start=weight, iterations=2)
    many = reconstruct.corrected(weight, kept, damped, start=few, iterations=30)
    torch.testing.assert_close(many, by_lstsq(weight, kept, inputs), rtol=1e-3, atol=1e-3)
    errors = [float((inputs @ (w - weight).T).square().sum()) for w in (many, few, weight * kept)]
    assert errors[0] <= errors[1] < errors[2] and (many[~kept] == 0).all()


def test_scores_are_the_squared_error_without_and_with_correction(layer):
    weight, moment, inputs = layer
    without, with_it = (
        weight.square() * reconstruct.importance(reconstruct.damped(moment), kind)
        for kind in ("inputs", "obs")
    )
    for row, column in ((0, 0), (2, 5), (3, 1)):
        kept = torch.ones(4, 6, dtype=torch.bool)
        kept[row, column] = False
        for score, after in ((without, weight * kept), (with_it, by_lstsq(weight, kept, inputs))):
            error = (inputs @ (after - weight).T).square().sum() / 400
            assert float(score[row, column]) == pytest.approx(float(error), rel=1e-2)


@pytest.mark.parametrize("score", ["magnitude", "inputs", "obs", "two of four"])
def test_a_network_keeps_the_logits_better_and_no_layer_loses_more_than_by_magnitude(score):
    model, inputs = network(PLAIN), images(PLAIN, 200)
    magnitude = unstructured.scores(model, "magnitude")
    masks, options = unstructured.masks(magnitude, 0.6), {"sparsity": 0.6, "score": score}
    if score == "two of four":
        masks, options = {n: unstructured.of_four(s) for n, s in magnitude.items()}, {"two_of_four": True}
    pruned = reconstruct.prune_network(model, inputs, **options)
    for name, mask in masks.items():
        kept, weight = encoding.mask_of(pruned.get_submodule(name)), pruned.get_submodule(name).weight
        kept = torch.ones_like(mask) if kept is None else kept
        assert (weight[~kept] == 0).all() and int(kept.sum()) == int(mask.sum()) > 0
        assert score != "two of four" or mask.all() or (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
    with torch.no_grad():
        networks = (pruned, unstructured.masked(model, masks))
        ours, theirs = ((net(inputs) - model(inputs)).square().mean() for net in networks)
    assert ours < 0.6 * theirs


def test_input_moments_are_those_of_the_curvature_and_need_not_all_images():
    model, inputs = network(PLAIN), images(PLAIN, 256)
    full, alone = curvature.curvatures(model, inputs), curvature.input_moments(model, inputs)
    for name in ("layer4.1.conv2", "fc"):  # one output pixel an image
        torch.testing.assert_close(alone[name], full[name].inputs, rtol=1e-3, atol=1e-4)
    for name, moment in alone.items():
        assert float(moment.trace()) == pytest.approx(float(full[name].inputs.trace()), rel=0.2)
    broken = torch.cat([inputs, torch.full_like(inputs, torch.nan)])
    few = curvature.input_moments(model, broken, rows=64)
    assert all(moment.isfinite().all() for moment in few.values())


def test_what_cannot_be_corrected_is_refused():
    model = network(PLAIN)
    masked = unstructured.masked(model, {"fc": torch.rand(model.fc.weight.shape) > 0.5})
    for refused in (masked, quantized(network(PLAIN))):
        with pytest.raises(ValueError, match="masked or quantized: give the network before it was pruned"):
            reconstruct.prune_network(refused, images(PLAIN, 8), sparsity=0.5)
