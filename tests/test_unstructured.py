"""Masks against counting, scores against closed forms and autograd."""

import copy

import pytest
import torch
from small_networks import PLAIN, images, network, quantized, saved
from torch.nn import functional

from nnc_utils import artifact, data, encoding, sensitivity, training
from nnc_utils.pruning import unstructured


@pytest.fixture(scope="module")
def model():
    return network(PLAIN)


@pytest.fixture(scope="module")
def seen():
    return images(PLAIN, 40), torch.arange(40) % 10


def test_scores_are_the_formulas(model, seen, monkeypatch):
    monkeypatch.setattr(unstructured, "BATCH", 16)
    magnitude = unstructured.scores(model, "magnitude")
    assert torch.equal(magnitude["fc"], model.fc.weight.detach().abs())
    options = {"images": seen[0], "labels": seen[1]}
    gradient, taylor = (unstructured.scores(model, kind, **options) for kind in ("gradient", "taylor"))
    twin = copy.deepcopy(model)
    functional.cross_entropy(twin(seen[0]), seen[1]).backward()
    for layer in ("conv1", "layer3.0.downsample.0", "fc"):
        exact = twin.get_submodule(layer).weight.grad
        torch.testing.assert_close(gradient[layer], exact.abs(), rtol=1e-3, atol=1e-6)
        weight = model.get_submodule(layer).weight.detach()
        torch.testing.assert_close(taylor[layer], (exact * weight).abs(), rtol=1e-3, atol=1e-7)


def test_optimal_brain_damage_is_half_the_curvature_times_the_square(model, seen):
    options = {"batch_size": unstructured.BATCH, "seed": 3}
    fisher = sensitivity.fisher_diagonal(model, seen[0], **options)
    hessian = sensitivity.hessian_diagonal(model, *seen, probes=unstructured.PROBES, **options)
    for kind, diagonal in (("obd_fisher", fisher), ("obd_hessian", hessian)):
        score = unstructured.scores(model, kind, images=seen[0], labels=seen[1], seed=3)
        for name, values in score.items():
            weight = model.get_submodule(name).weight.detach()
            torch.testing.assert_close(values, (diagonal[name] * weight**2).abs() / 2)
    assert any((diagonal < 0).any() for diagonal in hessian.values())


def test_masks_remove_exactly_the_lowest_of_all_layers_or_of_each(model):
    score = unstructured.scores(model, "random", seed=3)
    for sparsity in (0.0, 0.5, 0.9):
        kept = torch.cat([mask.flatten() for mask in unstructured.masks(score, sparsity).values()])
        everything = torch.cat([values.flatten() for values in score.values()])
        assert int((~kept).sum()) == round(sparsity * len(kept))
        assert max([0.0, *everything[~kept].tolist()]) <= float(everything[kept].min())
    rates = {name: 0.3 if name == "conv1" else 0.7 if name == "fc" else 0.5 for name in score}
    for name, mask in unstructured.masks(score, rates).items():
        assert int((~mask).sum()) == round(rates[name] * mask.numel())
        assert score[name][~mask].max() <= score[name][mask].min()


def test_two_of_four_neighbouring_inputs_stay(model):
    score = unstructured.scores(model, "magnitude")
    kept = {name: unstructured.of_four(values) for name, values in score.items()}
    assert kept.pop("conv1").all()  # one input channel
    for name, mask in kept.items():
        fours, values = (tensor.movedim(1, -1).reshape(-1, 4) for tensor in (mask, score[name]))
        assert (fours.sum(1) == 2).all()
        assert (values[fours].view(-1, 2).amin(1) >= values[~fours].view(-1, 2).amax(1)).all()


def test_masks_survive_training_saving_and_a_second_pruning(model, tmp_path):
    once = unstructured.masks(unstructured.scores(model, "magnitude"), 0.5)
    pruned = unstructured.masked(model, once)
    before = pruned.layer1[0].conv1.weight.detach().clone()
    training.fit(pruned, data.load("digits"), epochs=0.2, augment=False, learning_rate=0.01)
    for name, mask in once.items():
        weight = pruned.get_submodule(name).weight.detach()
        assert (weight[~mask] == 0).all() and torch.equal(encoding.mask_of(pruned.get_submodule(name)), mask)
    assert not torch.equal(before, pruned.layer1[0].conv1.weight)
    saved(pruned, tmp_path / "pruned.safetensors")
    again = artifact.load(tmp_path / "pruned.safetensors", trainable=True)
    score = unstructured.scores(again, "magnitude")
    assert all((score[name][~mask] == -torch.inf).all() for name, mask in once.items())
    twice = unstructured.masks(score, 0.8)
    assert not any((twice[name] & ~once[name]).any() for name in once)  # what is removed stays removed
    assert (unstructured.masked(again, twice).fc.weight == 0).sum() == (~twice["fc"]).sum()


def test_what_cannot_be_pruned_is_named(model, seen):
    score = unstructured.scores(model, "magnitude")
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"sparsity is {sparsity}: a share of zeros in \[0, 1\)"):
            unstructured.masks(score, sparsity)
    with pytest.raises(ValueError, match="unknown or missing: conv1, fc, layer1, layer1.0.conv1"):
        unstructured.masks(score, {"layer1": 0.5})
    score["conv1"] = torch.full_like(score["conv1"], -1.0)
    with pytest.raises(ValueError, match="conv1 would be empty"):
        unstructured.masks(score, 0.5)
    with pytest.raises(ValueError, match="a bool mask of shape"):
        unstructured.masked(model, {"conv1": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="conv1 is quantized"):
        unstructured.masked(quantized(network(PLAIN)), {"conv1": torch.ones(8, 1, 3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="unknown score 'obd'"):
        unstructured.scores(model, "obd")
    with pytest.raises(ValueError, match="taylor needs images"):
        unstructured.scores(model, "taylor")
    broken = copy.deepcopy(model)
    broken.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        unstructured.scores(broken, "gradient", images=seen[0], labels=seen[1])
