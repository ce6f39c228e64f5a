"""Optimal Brain Surgeon against the exact inverse Hessian of a small layer."""

import pytest
import torch
from small_networks import PLAIN, images, kronecker, network, quantized

from nnc_utils import curvature, encoding
from nnc_utils.pruning import obs, unstructured

DAMPINGS = pytest.mark.parametrize("damping", [(0.0, 0.0), (0.02, 0.7), (0.7, 0.02)])


def layer(damping):
    """A weight (4, 6), its curvature, and its Hessian with both factors damped, written out in float64."""
    of_layer = kronecker(4, 6)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    factors = []
    for moment, share in ((of_layer.outputs, damping[1]), (of_layer.inputs, damping[0])):
        raised = moment.double()
        factors.append(raised + share * raised.diagonal().mean() * torch.eye(len(raised)))
    return weight, of_layer, torch.kron(*factors)


def added(hessian, before, after):
    change = (after - before).flatten().double()
    return float(0.5 * change @ hessian @ change)


@DAMPINGS
def test_a_weights_score_is_the_loss_after_the_others_made_up_for_it(damping):
    weight, of_layer, hessian = layer(damping)
    scores = obs.scores({"a": weight}, {"a": of_layer}, damping=damping)["a"]
    inverse = torch.linalg.inv(hessian)
    for row, column in ((0, 0), (2, 5), (3, 1)):
        place = 6 * row + column
        step = -float(weight[row, column]) / inverse[place, place] * inverse[:, place]
        best = weight + step.view(4, 6).float()
        assert best[row, column].abs() < 1e-5
        assert float(scores[row, column]) == pytest.approx(added(hessian, weight, best), rel=1e-3)
        kept = torch.ones(4, 6, dtype=torch.bool)
        kept[row, column] = False
        corrected = obs.corrected(weight, kept, of_layer, damping=damping, iterations=100)
        torch.testing.assert_close(corrected, best * kept, rtol=1e-2, atol=1e-3)


@DAMPINGS
def test_many_removed_weights_are_made_up_for_exactly(damping):
    weight, of_layer, hessian = layer(damping)
    kept = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.6
    stay, gone = kept.flatten(), ~kept.flatten()
    exact = weight.flatten().double() * stay
    coupling = hessian[stay][:, gone] @ weight.flatten()[gone].double()
    exact[stay] += torch.linalg.solve(hessian[stay][:, stay], coupling)
    many, few = (obs.corrected(weight, kept, of_layer, damping=damping, iterations=n) for n in (200, 3))
    torch.testing.assert_close(many.flatten().double(), exact, rtol=1e-2, atol=1e-2)
    losses = [added(hessian, weight, w) for w in (many, few, weight * kept)]
    assert losses[0] <= losses[1] < losses[2] and (many[~kept] == 0).all()
    onward = obs.corrected(weight, kept, of_layer, damping=damping, iterations=200, start=few)
    torch.testing.assert_close(onward, many, rtol=1e-2, atol=1e-2)


def test_a_network_keeps_the_logits_better_than_the_same_share_of_small_weights():
    model, inputs = network(PLAIN), images(PLAIN, 200)
    pruned = obs.prune_network(model, curvature.curvatures(model, inputs, rows=10**6), sparsity=0.4)
    masks = unstructured.masks(unstructured.scores(model, "magnitude"), 0.4)
    zeros, total = 0, 0
    for name in masks:
        mask, weight = encoding.mask_of(pruned.get_submodule(name)), pruned.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        zeros, total = zeros + int((~mask).sum()), total + mask.numel()
    assert zeros == round(0.4 * total)
    with torch.no_grad():
        networks = (pruned, unstructured.masked(model, masks))
        ours, theirs = ((net(inputs) - model(inputs)).square().mean() for net in networks)
    assert ours < 0.6 * theirs


def test_what_cannot_be_corrected_is_refused():
    model = network(PLAIN)
    masked = unstructured.masked(model, {"fc": torch.rand(model.fc.weight.shape) > 0.5})
    for refused in (masked, quantized(network(PLAIN))):
        with pytest.raises(ValueError, match="masked or quantized: give the network before it was pruned"):
            obs.prune_network(refused, {}, sparsity=0.5)
