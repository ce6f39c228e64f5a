"""Bias correction against means that are computed by hand."""

import copy

import pytest
import torch

from nnc_utils.quantization import correction, uniform
from tests import small_networks

IMAGES = small_networks.images(small_networks.PLAIN, 64)


@pytest.fixture
def model():
    return small_networks.network(small_networks.PLAIN)


def test_bias_correction_restores_the_mean_of_each_output(model):
    rounded = uniform.quantize_network(model, bits=3, per_channel=True)
    fixed = correction.correct_bias(rounded, IMAGES, original=model, batch_size=32)
    # the first layer has the same input in both, so its mean behind batch-norm must be the float one's
    with torch.no_grad():
        wanted, off, got = (
            network.bn1(network.conv1(IMAGES)).mean((0, 2, 3)) for network in (model, rounded, fixed)
        )
    assert torch.allclose(got, wanted, atol=1e-5)
    assert float((off - wanted).abs().max()) > 1e-3
    # the classifier alone
    alone = copy.deepcopy(model)
    alone.fc.weight.data = rounded.fc.weight.detach().clone()
    with torch.no_grad():
        wanted = model(IMAGES).mean(0)
        got = correction.correct_bias(alone, IMAGES, original=model)(IMAGES).mean(0)
    assert torch.allclose(got, wanted, atol=1e-4)


def test_too_few_images_are_refused(model):
    with pytest.raises(ValueError, match="at least"):
        correction.correct_bias(model, IMAGES[:0], original=model)
