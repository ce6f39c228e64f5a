"""Curvature against finite differences and every label in turn."""

import copy

import pytest
import torch
from torch.nn import functional

from nnc_utils import curvature, models, sample
from tests import small_networks

IMAGES = small_networks.images(small_networks.PLAIN, 256)


@pytest.fixture
def model():
    return small_networks.network(small_networks.PLAIN)


def test_the_factor_is_one_of_the_damped_moment():
    found = small_networks.kronecker(3, 20)
    factor = curvature.upper_factor(found.inputs, 0.1)
    wanted = found.inputs + 0.1 * found.inputs.diagonal().mean() * torch.eye(20)
    assert torch.allclose(factor @ factor.T, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_input_moments_are_those_of_the_patches(model):
    found = curvature.curvatures(model, IMAGES, rows=10**6)
    watched = ["layer2.1", "layer3.0.conv1"]
    with torch.no_grad():
        _, kept = sample.with_outputs(model, watched, IMAGES)
    inputs, outputs = (kept[name] for name in watched)
    layer = next(x for x in models.layers(model.spec) if x.name == "layer3.0.conv1")
    # a convolution is a product with patches: try the moment on random weights
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0))
    products = functional.conv2d(inputs, weight, stride=layer.stride, padding=layer.kernel // 2)
    flat = weight.flatten(1)
    got = ((flat @ found["layer3.0.conv1"].inputs) * flat).sum(1)
    assert torch.allclose(got, products.square().mean((0, 2, 3)), rtol=1e-3)
    assert outputs.shape[1] == len(found["layer3.0.conv1"].outputs)


def test_output_curvature_of_the_classifier_is_that_of_the_softmax(model):
    found = curvature.curvatures(model, IMAGES.repeat(16, 1, 1, 1))["fc"].outputs
    with torch.no_grad():
        p = model(IMAGES).softmax(1)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)  # what drawn labels have on average
    assert torch.allclose(found, exact, rtol=0.2, atol=4e-3)


def test_output_curvature_of_a_convolution_is_that_of_every_label_in_turn(model):
    """The Fisher information by its definition: each class's gradient, times its probability."""
    found = curvature.curvatures(model, IMAGES.repeat(16, 1, 1, 1))["layer2.0.conv1"].outputs
    logits, kept = sample.with_outputs(model, ["layer2.0.conv1"], IMAGES)
    exact = torch.zeros_like(found)
    for label in range(logits.shape[1]):
        chance = functional.log_softmax(logits, 1)[:, label].sum()
        (gradient,) = torch.autograd.grad(chance, [*kept.values()], retain_graph=True)
        p = logits.softmax(1)[:, label].detach()
        exact += torch.einsum("i,icyx,idyx->cd", p, gradient, gradient) / len(IMAGES)
    assert float(found.trace() / exact.trace()) == pytest.approx(1, abs=0.1)
    assert torch.linalg.matrix_norm(found - exact) < 0.2 * torch.linalg.matrix_norm(exact)


def test_the_predicted_loss_is_the_measured_one_for_the_classifier(model):
    """Half the second difference of the mean cross-entropy, its expectation over the model's own labels."""
    images = IMAGES
    found = curvature.curvatures(model, images.repeat(8, 1, 1, 1))["fc"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = model(images).softmax(1)
        predicted = measured = 0.0
        for _ in range(20):
            change = 0.02 * torch.randn(model.fc.weight.shape, generator=generator)
            predicted += found.loss(change)
            other = copy.deepcopy(model)
            other.fc.weight += change
            measured += float(functional.kl_div(other(images).log_softmax(1), p, reduction="batchmean"))
    assert measured / predicted == pytest.approx(1, abs=0.35)  # Kronecker factors are an approximation


def test_the_loss_of_an_error_is_the_measured_one_in_any_layer(model):
    """Against the divergence of a network whose one weight was changed, which needs no gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = {x.name: model.get_submodule(x.name).weight.detach() for x in models.layers(model.spec)}
    errors = {n: 0.02 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    predicted = curvature.loss_of_errors(model, errors, IMAGES.repeat(8, 1, 1, 1))
    model.double()
    with torch.no_grad():
        p = model(IMAGES.double()).softmax(1)
        for name, error in errors.items():
            other = copy.deepcopy(model)
            other.get_submodule(name).weight += error
            measured = functional.kl_div(other(IMAGES.double()).log_softmax(1), p, reduction="batchmean")
            assert float(measured) / predicted[name] == pytest.approx(1, abs=0.25), name
