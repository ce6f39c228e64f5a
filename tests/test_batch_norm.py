"""Re-estimated batch-norm against statistics that are computed by hand."""

import copy

import pytest
import torch

from nnc_utils import batch_norm, sample
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


def test_variances_that_grow_are_added_to_and_those_that_fall_shrink_in_proportion(model):
    """By hand, behind the first layer, with statistics that are those of neither network."""
    generator = torch.Generator().manual_seed(0)
    model.bn1.running_var.copy_(torch.rand(model.bn1.running_var.shape, generator=generator) + 0.1)
    rounded = uniform.quantize_network(model, bits=2, per_channel=True)
    with torch.no_grad():
        old, new = (network.conv1(IMAGES).var((0, 2, 3)) for network in (model, rounded))
    fixed = batch_norm.reestimate(rounded, IMAGES, original=model)
    grew = new > old
    assert grew.any() and not grew.all()
    wanted = torch.where(grew, model.bn1.running_var + new - old, model.bn1.running_var * new / old)
    assert torch.allclose(fixed.bn1.running_var, wanted, rtol=1e-3)


def test_few_images_move_nothing_that_rounding_did_not_move(model):
    fixed = batch_norm.reestimate(copy.deepcopy(model), IMAGES[:8], original=model)
    for name, statistic in model.state_dict().items():
        assert torch.allclose(fixed.state_dict()[name], statistic, rtol=1e-5), name


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
