"""Masks against counting, scores against closed forms, finite differences and the loss of single weights."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
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


def loss(model, pictures, labels):
    return float(functional.cross_entropy(model(pictures), labels))


def test_scores_are_the_formulas(model, seen):
    magnitude = unstructured.scores(model, "magnitude")
    assert torch.equal(magnitude["fc"], model.fc.weight.detach().abs())
    gradient, taylor = (
        unstructured.scores(model, kind, images=seen[0], labels=seen[1], batch_size=16)
        for kind in ("gradient", "taylor")
    )
    twin = copy.deepcopy(model)
    functional.cross_entropy(twin(seen[0]), seen[1]).backward()
    for layer in ("conv1", "layer3.0.downsample.0", "fc"):
        exact = twin.get_submodule(layer).weight.grad
        torch.testing.assert_close(gradient[layer], exact.abs(), rtol=1e-3, atol=1e-6)
        weight = model.get_submodule(layer).weight.detach()
        torch.testing.assert_close(taylor[layer], (exact * weight).abs(), rtol=1e-3, atol=1e-7)


def test_optimal_brain_damage_is_half_the_curvature_times_the_square(model, seen):
    about = {"images": seen[0], "labels": seen[1], "seed": 3}
    fisher = sensitivity.fisher_diagonal(model, seen[0], batch_size=64, seed=3)
    settings = {"probes": unstructured.PROBES, "batch_size": 64, "seed": 3}
    hessian = sensitivity.hessian_diagonal(model, *seen, **settings)
    for kind, curved in (("obd_fisher", fisher), ("obd_hessian", hessian)):
        found = unstructured.scores(model, kind, **about)
        for name, score in found.items():
            weight = model.get_submodule(name).weight.detach()
            torch.testing.assert_close(score, (curved[name] * weight**2).abs() / 2)
    assert any((curved < 0).any() for curved in hessian.values())


@torch.no_grad()
def test_taylor_ranks_weights_as_the_loss_with_less_of_them_does(model, seen):
    taylor = unstructured.scores(model, "taylor", images=seen[0], labels=seen[1])["layer2.0.conv1"]
    exact, pictures = copy.deepcopy(model).double(), seen[0].double()
    weight, before = exact.layer2[0].conv1.weight, loss(exact, pictures, seen[1])
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))[:60]
    harms = []
    for place in places.tolist():
        kept = float(weight.view(-1)[place])
        weight.view(-1)[place] = 0.99 * kept
        harms.append(abs(loss(exact, pictures, seen[1]) - before))
        weight.view(-1)[place] = kept
    assert spearmanr(harms, taylor.flatten()[places]).statistic > 0.95


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_global_masks_cut_exactly_the_lowest(model, sparsity):
    score = unstructured.scores(model, "magnitude")
    kept = unstructured.masks(score, sparsity)
    total = sum(values.numel() for values in score.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == total - round(sparsity * total)
    lowest_kept = min(float(score[n][kept[n]].min()) for n in score)
    highest_cut = max((float(score[n][~kept[n]].max()) for n in score if (~kept[n]).any()), default=0.0)
    assert highest_cut <= lowest_kept


def test_layerwise_masks_have_their_rates(model):
    score = unstructured.scores(model, "random", seed=3)
    rates = {name: 0.3 if name == "conv1" else 0.7 if name == "fc" else 0.5 for name in score}
    for name, mask in unstructured.masks(score, rates).items():
        assert int((~mask).sum()) == round(rates[name] * mask.numel())


def test_two_of_four_neighbouring_inputs_stay(model):
    score = unstructured.scores(model, "magnitude")
    kept = unstructured.two_of_four(score)
    assert kept["conv1"].all()  # one input channel
    for name, mask in kept.items():
        if mask.shape[1] % 4:
            continue
        fours = mask.movedim(1, -1).reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
        values = score[name].movedim(1, -1).reshape(-1, 4)
        assert (values[fours].view(-1, 2).amin(1) >= values[~fours].view(-1, 2).amax(1)).all()


def test_masks_survive_training_saving_and_a_second_cut(model, tmp_path):
    digits = data.load("digits")
    once = unstructured.masks(unstructured.scores(model, "magnitude"), 0.5)
    cut = unstructured.masked(model, once)
    before = cut.layer1[0].conv1.weight.detach().clone()
    training.fit(cut, digits, epochs=0.2, augment=False, learning_rate=0.01)
    for name, mask in once.items():
        weight = cut.get_submodule(name).weight.detach()
        assert (weight[~mask] == 0).all() and torch.equal(encoding.mask_of(cut.get_submodule(name)), mask)
    assert not torch.equal(before, cut.layer1[0].conv1.weight)
    saved(cut, tmp_path / "cut.safetensors")
    again = artifact.load(tmp_path / "cut.safetensors", trainable=True)
    score = unstructured.scores(again, "magnitude")
    assert all((score[name][~mask] == -torch.inf).all() for name, mask in once.items())
    twice = unstructured.masks(score, 0.8)
    assert not any((twice[name] & ~once[name]).any() for name in once)  # what is cut stays cut
    assert (unstructured.masked(again, twice).fc.weight == 0).sum() == (~twice["fc"]).sum()


@pytest.mark.parametrize(
    ("sparsity", "said"),
    [
        (1.0, r"sparsity is 1.0: a share of zeros in \[0, 1\)"),
        (-0.1, "sparsity is -0.1"),
        (float("nan"), "sparsity is nan"),
        ({"layer1": 0.5}, "unknown or missing: conv1, fc, layer1, layer1.0.conv1"),
    ],
)
def test_rates_that_make_no_sense_are_named(model, sparsity, said):
    with pytest.raises(ValueError, match=said):
        unstructured.masks(unstructured.scores(model, "magnitude"), sparsity)


def test_what_cannot_be_cut_is_named(model, seen):
    score = unstructured.scores(model, "magnitude")
    score["conv1"] = torch.full_like(score["conv1"], -1.0)
    with pytest.raises(ValueError, match="conv1 would be empty"):
        unstructured.masks(score, 0.5)
    with pytest.raises(ValueError, match=r"layer1 has the layers layer1\.0\.conv1, layer1\.0\.conv2"):
        unstructured.masked(model, {"layer1": torch.ones(1, dtype=torch.bool)})
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
