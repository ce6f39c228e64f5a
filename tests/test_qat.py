"""Quantization-aware training: what is trained is what is exported."""

import copy

import onnx
import pytest
import torch

from nnc_utils import artifact, curvature, data, encoding, models, training
from nnc_utils.quantization import activations, hessian_rounding, qat
from nnc_utils.runtimes import qdq

DIGITS = data.load("digits")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    spec = models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.125)
    network = models.build(spec)
    training.fit(network, DIGITS, epochs=2, batch_size=64, augment=False)
    return network


@pytest.fixture(scope="module")
def images():
    return DIGITS.normalize(DIGITS.train.images[:128])


@pytest.mark.parametrize("method", qat.METHODS)
def test_the_exported_integers_are_those_that_were_trained(model, images, method, tmp_path):
    network = qat.prepare(model, images, bits=4, method=method)
    before = {
        n: network.get_submodule(n).parametrizations.weight[0].scale.clone() for n in ("layer1.0.conv1", "fc")
    }
    training.fit(network, DIGITS, epochs=1, batch_size=64, learning_rate=0.01, augment=False)
    after = {name: network.get_submodule(name).parametrizations.weight[0].scale for name in before}
    assert torch.equal(before["layer1.0.conv1"], after["layer1.0.conv1"]) == (method == "ste")
    assert torch.equal(before["fc"], after["fc"])  # of 8 bits: it stays
    network = activations.calibrate(network, images)
    rounded = {
        layer.name: network.get_submodule(layer.name).parametrizations.weight
        for layer in models.layers(model.spec)
    }
    trained = {name: chain[0].codes(chain.original) for name, chain in rounded.items()}
    options = {"mean": DIGITS.mean, "std": DIGITS.std, "classes": DIGITS.classes}
    saved = artifact.save(network, tmp_path / "qat.safetensors", **options)
    graph = qdq.onnx_model(saved, "int8").graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    for name, codes in trained.items():
        assert torch.equal(saved.weights[name].codes, codes)
        assert torch.equal(stored[f"{name}.weight.codes"].abs().int(), codes.abs().int())
        assert saved.weights[name].bits == (8 if name in ("conv1", "fc") else 4)
    # and the reloaded network computes what the trained one did
    with torch.inference_mode():
        assert torch.equal(artifact.load(tmp_path / "qat.safetensors")(images), network(images))


def test_training_with_the_rounding_beats_rounding(model, images):
    """At 2 bits, on the training images' own loss: this is what the method is for."""

    def loss(network):
        with torch.inference_mode():
            return float(training.cross_entropy(network.eval(), images, DIGITS.train.labels[:128]))

    rounded = loss(qat.prepare(model, images, bits=2, method="lsq"))
    for method in qat.METHODS:
        network = qat.prepare(model, images, bits=2, method=method)
        training.fit(network, DIGITS, epochs=2, batch_size=64, learning_rate=0.02, augment=False)
        assert loss(network) < 0.5 * rounded


def test_the_float_weights_are_behind_the_rounding_and_masks_stay(model, images):
    masked = copy.deepcopy(model)
    kept = torch.rand(masked.fc.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    torch.nn.utils.parametrize.register_parametrization(masked.fc, "weight", encoding.ZeroMask(kept))
    network = qat.prepare(masked, images, bits=3, method="ste")
    assert torch.equal(network.conv1.parametrizations.weight.original, model.conv1.weight)
    assert torch.equal(encoding.encoded(network.fc).mask, kept)
    assert torch.equal(model.conv1.weight, masked.conv1.weight)


def test_training_goes_on_with_the_codes_of_another_rounding(model, images):
    known = curvature.curvatures(model, images)
    rounded = hessian_rounding.quantize_network(model, known, lambda_=1e-7)
    layers = [layer.name for layer in models.layers(model.spec)]
    found = {name: encoding.encoded(rounded.get_submodule(name)) for name in layers}
    plain = copy.deepcopy(rounded)
    for name in layers:
        encoding.fold(plain.get_submodule(name))
    scales = {name: code.scale for name, code in found.items()}
    network = qat.prepare(plain, images, bits=hessian_rounding.BITS, method="lsq", scales=scales)
    for name in layers:
        again = encoding.encoded(network.get_submodule(name))
        assert torch.equal(again.codes, found[name].codes) and torch.equal(again.scale, found[name].scale)


def test_widths_of_each_layer_and_bad_input(model, images):
    names = [layer.name for layer in models.layers(model.spec)]
    network = qat.prepare(model, images, bits=dict.fromkeys(names, 4) | {"fc": 5}, method="ste")
    widths = [network.get_submodule(name).parametrizations.weight[0].bits for name in names]
    assert widths == [4] * (len(names) - 1) + [5]
    for options, why in (
        ({"method": "pact"}, "unknown method 'pact': one of ste, lsq"),
        ({"bits": 1}, "from 2 to 16"),
        ({"images": images[:0]}, "at least 1"),
        ({"bits": dict.fromkeys(names[1:], 4)}, "bits must name each layer once; unknown or missing: conv1"),
    ):
        with pytest.raises(ValueError, match=why):
            qat.prepare(**{"model": model, "images": images, "bits": 4, "method": "ste"} | options)
