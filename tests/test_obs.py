"""Optimal Brain Surgeon against the exact inverse Hessian of a small layer."""

import numpy as np
import pytest
import torch
from small_networks import ODD, PLAIN, images, kronecker, network, quantized

from nnc_utils import curvature, encoding, models
from nnc_utils.pruning import obs, structured, unstructured

NONE = (0.0, 0.0)


@pytest.fixture
def layer():
    """A weight (4, 6), its curvature, and its Hessian written out, float64."""
    found = kronecker(4, 6)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    return weight, found, torch.kron(found.outputs.double(), found.inputs.double())


def added(hessian, before, after):
    change = (after - before).flatten().double()
    return float(0.5 * change @ hessian @ change)


def test_a_cut_weights_score_is_the_loss_after_the_others_made_up_for_it(layer):
    weight, found, hessian = layer
    scores = obs.scores({"a": weight}, {"a": found}, damping=NONE)["a"]
    inverse = torch.linalg.inv(hessian)
    for row, column in ((0, 0), (2, 5), (3, 1)):
        place = 6 * row + column
        step = -float(weight[row, column]) / inverse[place, place] * inverse[:, place]
        best = weight + step.view(4, 6).float()
        assert best[row, column].abs() < 1e-5
        assert float(scores[row, column]) == pytest.approx(added(hessian, weight, best), rel=1e-3)
        kept = torch.ones(4, 6, dtype=torch.bool)
        kept[row, column] = False
        mended = obs.corrected(weight, kept, found, damping=NONE, iterations=100)
        torch.testing.assert_close(mended, best * kept, rtol=1e-2, atol=1e-3)


def test_many_cut_weights_are_made_up_for_exactly(layer):
    weight, found, hessian = layer
    kept = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.6
    stay, gone = kept.flatten(), ~kept.flatten()
    moved = torch.linalg.solve(
        hessian[stay][:, stay], hessian[stay][:, gone] @ weight.flatten()[gone].double()
    )
    wanted = weight.flatten().double() * stay
    wanted[stay] += moved
    mended = obs.corrected(weight, kept, found, damping=NONE, iterations=200)
    torch.testing.assert_close(mended.flatten().double(), wanted, rtol=1e-2, atol=1e-2)
    cut = added(hessian, weight, weight * kept)
    assert added(hessian, weight, mended) < 0.7 * cut
    few = obs.corrected(weight, kept, found, damping=NONE, iterations=3)
    assert (
        added(hessian, weight, mended) <= added(hessian, weight, few) < added(hessian, weight, weight * kept)
    )
    on = obs.corrected(weight, kept, found, damping=NONE, iterations=200, start=few)
    torch.testing.assert_close(on, mended, rtol=1e-2, atol=1e-2)
    assert (mended[~kept] == 0).all()


def test_damping_keeps_the_others_where_they_are(layer):
    weight, found, _ = layer
    kept = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    far = obs.corrected(weight, kept, found, damping=(1e4, 1e4))
    torch.testing.assert_close(far, weight * kept, rtol=1e-3, atol=1e-3)


def test_a_network_keeps_the_logits_better_than_the_same_share_of_small_weights():
    model, pictures = network(PLAIN), images(PLAIN, 400)
    known = curvature.curvatures(model, pictures, rows=10**6)
    pruned = obs.prune_network(model, known, sparsity=0.4)
    masks = unstructured.masks(unstructured.scores(model, "magnitude"), 0.4)
    plain = unstructured.masked(model, masks)
    zeros, total = 0, 0
    for name in masks:
        mask, weight = encoding.mask_of(pruned.get_submodule(name)), pruned.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        zeros, total = zeros + int((~mask).sum()), total + mask.numel()
    assert zeros == round(0.4 * total)
    with torch.no_grad():
        wanted = model(pictures)
        ours, theirs = ((net(pictures) - wanted).square().mean() for net in (pruned, plain))
    assert ours < 0.6 * theirs


def test_what_cannot_be_corrected_is_refused():
    model = network(PLAIN)
    known = curvature.curvatures(model, images(PLAIN, 50))
    cut = unstructured.masked(model, {"fc": torch.rand(model.fc.weight.shape) > 0.5})
    for given in (cut, quantized(network(PLAIN))):
        with pytest.raises(ValueError, match="masked or quantized: give the network before"):
            obs.prune_network(given, known, sparsity=0.5)
    with pytest.raises(ValueError, match=r"a share of zeros in \[0, 1\)"):
        obs.prune_network(model, known, sparsity=1.0)


@pytest.mark.parametrize("spec", [PLAIN, ODD], ids=["ResNet-18", "odd"])
def test_readers_make_up_for_channels_by_least_squares(spec):
    """Against numpy's least squares on what the reader sees, and in the logits of the narrower network."""
    model, pictures = network(spec), images(spec, 300)
    known = curvature.curvatures(model, pictures, rows=10**7)
    layers = {layer.name: layer for layer in models.layers(spec)}
    name = next(name for name, group in structured.groups(spec).items() if "fc" in group.readers)
    kept = torch.arange(layers[name].out_channels)[1::2]
    mended = obs.compensated(model, {name: kept}, known, damping=1e-6)
    with torch.no_grad():
        features = {}
        model.fc.register_forward_hook(lambda module, given, output: features.update(fc=given[0]))
        wanted = model(pictures) - model.fc.bias
    exact = np.linalg.lstsq(features["fc"][:, kept].numpy(), wanted.numpy(), rcond=None)[0].T
    seen = features["fc"][:, kept].numpy()  # channels that are always 0 may have any weight
    found = seen @ mended.fc.weight.detach()[:, kept].numpy().T
    np.testing.assert_allclose(found, seen @ exact.T, rtol=0.01, atol=0.01)
    assert (mended.fc.weight[:, ::2] == 0).all()

    widths = {group: layers[group].out_channels for group in ("conv1", name)}
    kept = {group: torch.arange(width)[: -(width // 3)] for group, width in widths.items()}
    plain = structured.remove_channels(model, kept)
    mended = structured.remove_channels(obs.compensated(model, kept, known), kept)
    with torch.no_grad():
        whole = model(pictures)
        ours, theirs = ((net(pictures) - whole).square().mean() for net in (mended, plain))
    assert mended.spec == plain.spec and ours < theirs
