"""Re-estimated batch-norm against statistics that are computed by hand."""

import copy

import pytest
import torch

from nnc_utils import batch_norm, data, evaluation, models, sample, training
from nnc_utils.pruning import unstructured
from nnc_utils.quantization import uniform
from tests import small_networks

IMAGES = small_networks.images(small_networks.PLAIN, 64)


@pytest.fixture
def model():
    return small_networks.network(small_networks.PLAIN)


def test_batch_norm_gets_the_statistics_of_the_rounded_network(model):
    model.train()
    for norm in (x for x in model.modules() if isinstance(x, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    model(IMAGES)  # now the float network's statistics are those of these images
    model.eval()
    rounded = uniform.quantize_network(model, bits=2, per_channel=True)
    before = copy.deepcopy(rounded.state_dict())
    fixed = batch_norm.reestimate(rounded, IMAGES, original=model, batch_size=64)
    with torch.no_grad():  # by hand, layer after layer in training mode
        by_hand = copy.deepcopy(rounded).train()
        _, kept = sample.with_outputs(by_hand, ["layer2.0.conv2"], IMAGES)
    out = kept["layer2.0.conv2"]
    assert torch.allclose(fixed.layer2[0].bn2.running_mean, out.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(fixed.layer2[0].bn2.running_var, out.var((0, 2, 3)), rtol=1e-3)
    assert all(torch.equal(a, before[name]) for name, a in rounded.state_dict().items())
    assert not fixed.training and fixed.bn1.momentum == model.bn1.momentum


def test_what_the_images_do_not_show_is_kept_in_the_networks_own_deviations(model):
    """By hand, behind the first layer: memory half a deviation above what the images give, twice as wide."""
    with torch.no_grad():
        old = model.conv1(IMAGES)
        model.bn1.running_mean.copy_(old.mean((0, 2, 3)) + 0.5 * old.std((0, 2, 3)))
        model.bn1.running_var.copy_(4 * old.var((0, 2, 3)))
        rounded = uniform.quantize_network(model, bits=2, per_channel=True)
        new = rounded.conv1(IMAGES)
    fixed = batch_norm.reestimate(rounded, IMAGES, original=model).bn1
    wanted = new.mean((0, 2, 3)) + 0.5 * new.std((0, 2, 3))
    assert torch.allclose(fixed.running_mean, wanted, rtol=1e-3, atol=1e-4)
    assert torch.allclose(fixed.running_var, 4 * new.var((0, 2, 3)), rtol=1e-3)


def test_few_images_move_nothing_that_rounding_did_not_move(model):
    fixed = batch_norm.reestimate(copy.deepcopy(model), IMAGES[:8], original=model)
    for name, statistic in model.state_dict().items():
        assert torch.allclose(fixed.state_dict()[name], statistic, rtol=1e-3, atol=1e-4), name


def test_statistics_are_taken_in_place_or_by_a_copy(model):
    """Behind the first layer those of both batches by hand; all as those that a copy gets."""
    momentum, before = model.bn1.momentum, copy.deepcopy(model)
    fixed = batch_norm.reestimate(model, IMAGES, batch_size=32)
    assert fixed.bn1.momentum == momentum and not fixed.training
    with torch.no_grad():
        halves = [model.conv1(half) for half in IMAGES.split(32)]
    assert batch_norm.take_statistics(model, IMAGES, batch_size=32) is model and not model.training
    for statistic, tensor in (("mean", model.bn1.running_mean), ("var", model.bn1.running_var)):
        first, second = (getattr(half, statistic)((0, 2, 3)) for half in halves)
        torch.testing.assert_close(tensor, (first + second) / 2, rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(tensor, fixed.state_dict()[name], msg=name)
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before.state_dict()[name]), name


def test_too_few_images_are_refused(model):
    for original in (model, None):
        with pytest.raises(ValueError, match="at least 2"):
            batch_norm.reestimate(model, IMAGES[:1], original=original)
    with pytest.raises(ValueError, match=r"of shape \(1, 8, 8\)"):
        batch_norm.reestimate(model, torch.zeros(4, 3, 8, 8), original=model)


@pytest.fixture(scope="module")
def trained():
    digits, spec = data.load("digits"), models.resnet(18, channels=1, size=8, classes=10, width=0.25)
    torch.manual_seed(0)
    model = models.build(spec)
    training.fit(model, digits, epochs=4, learning_rate=0.05, augment=False, batch_size=32)
    return model.eval(), digits


def pruned(model):
    return unstructured.masked(model, unstructured.masks(unstructured.scores(model, "magnitude"), 0.7))


def with_rows(change, model):
    """Every eighth output channel of every layer inside the blocks is changed."""
    changed = copy.deepcopy(model)
    for layer in models.layers(model.spec)[1:-1]:
        weight = changed.get_submodule(layer.name).weight
        weight.data[::8] = change(weight.data[::8])
    return changed


CHANGES = {
    "none": lambda model: model,
    "magnitude": pruned,
    "3 bits": lambda model: uniform.quantize_network(model, bits=3, per_channel=True),
    "dead channels": lambda model: with_rows(torch.zeros_like, model),
    "all but dead": lambda model: with_rows(lambda w: w * 1e-4, model),
    "a single value": lambda model: with_rows(lambda w: w.sign() * w.abs().mean(), model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_network_gets_worse(change, trained):
    """A channel that has become constant must get that constant, not its old mean: many deviations now."""
    model, digits = trained
    changed, truth = CHANGES[change](model), digits.validation.labels.numpy()
    fixed = batch_norm.reestimate(changed, digits.normalize(digits.train.images[:64]), original=model)
    options = {"normalize": digits.normalize}
    before, after = (evaluation.predict(x, digits.validation, **options) == truth for x in (changed, fixed))
    assert evaluation.paired_interval(compressed_correct=after, reference_correct=before).high >= 0
