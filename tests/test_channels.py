"""Channel scores against the loss that a network without the channel has; budgets against counting."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from small_networks import ODD, PLAIN, POOLED, images, network
from torch.nn import functional

from nnc_utils import data, models, training
from nnc_utils.pruning import channels, structured


@pytest.fixture(scope="module")
def trained():
    """A network that knows digits, with training images and labels."""
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.build(PLAIN)
    training.fit(model, digits, epochs=8, augment=False, batch_size=64, learning_rate=0.05)
    return model, digits.normalize(digits.train.images[:256]), digits.train.labels[:256].long()


def loss(model, pictures, labels):
    with torch.inference_mode():
        return float(functional.cross_entropy(model(pictures), labels))


def scaled(model, name, channel, factor):
    """The network with one channel of a group times a factor, behind every layer that writes it."""
    twin = copy.deepcopy(model).double()
    norms = {layer.name: layer.batch_norm for layer in models.layers(model.spec)}
    for writer in structured.groups(model.spec)[name].writers:
        norm = twin.get_submodule(norms[writer])
        norm.weight.data[channel] *= factor
        norm.bias.data[channel] *= factor
    return twin


def test_a_gate_is_a_factor_on_the_channel(trained):
    """Against a finite difference: γ and β of all writers times 1 ± ε."""
    model, pictures, labels = trained
    exact, step = copy.deepcopy(model).double(), 1e-5
    gates = channels.gate_gradients(exact, pictures[:32].double(), labels[:32], batch_size=32)
    for name in ("conv1", "layer2.0.conv1", "layer3.0.conv2"):
        for channel in (0, 3):
            more, less = (
                loss(scaled(model, name, channel, factor), pictures[:32].double(), labels[:32])
                for factor in (1 + step, 1 - step)
            )
            assert float(gates[name][0, channel]) == pytest.approx((more - less) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_scores_rank_channels_as_the_loss_with_less_of_them_does(kind, trained):
    model, pictures, labels = trained
    found = channels.scores(model, kind, images=pictures, labels=labels, batch_size=len(pictures))
    before = loss(copy.deepcopy(model).double(), pictures.double(), labels)
    for name in ("layer1.0.conv1", "layer2.1.conv1", "layer3.0.conv2"):
        harms = [
            abs(loss(scaled(model, name, channel, 0.99), pictures.double(), labels) - before)
            for channel in range(len(found[name]))
        ]
        assert spearmanr(harms, found[name]).statistic > 0.9


def test_norms_are_those_of_the_filters(trained):
    model = trained[0]
    found = channels.scores(model, "l1")
    layers = (model.conv1, model.layer1[0].conv2, model.layer1[1].conv2)
    expected = sum(layer.weight.detach().abs().sum((1, 2, 3)) for layer in layers)
    torch.testing.assert_close(found["conv1"], expected)
    scale = channels.scores(model, "bn_scale")["layer2.0.conv1"]
    assert torch.equal(scale, model.layer2[0].bn1.weight.detach().abs())
    square = channels.scores(model, "l2")["layer2.0.conv1"]
    torch.testing.assert_close(square, model.layer2[0].conv1.weight.detach().square().sum((1, 2, 3)).sqrt())


@pytest.mark.parametrize("spec", [ODD, POOLED, PLAIN], ids=["odd", "pooled", "plain"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_budget_is_met_and_used(spec, multiple):
    score = channels.scores(network(spec), "random", seed=1)
    whole = models.macs(spec)
    before = whole
    for share in (1.0, 0.6, 0.3) if multiple == 1 else (1.0, 0.8):  # so little has no multiple of 4
        kept = channels.within_macs(spec, score, macs=share * whole, multiple=multiple, least=0.01)
        narrow = structured.remove_channels(network(spec), kept)
        assert models.macs(narrow.spec) <= share * whole and models.macs(narrow.spec) <= before
        before = models.macs(narrow.spec)
        if (spec, multiple) == (PLAIN, 1):
            assert before > 0.9 * share * whole
        for name, numbers in kept.items():
            width = next(layer.out_channels for layer in models.layers(spec) if layer.name == name)
            assert len(numbers) % multiple == 0 or len(numbers) == width
            order = score[name].argsort(descending=True)[: len(numbers)]
            assert set(order.tolist()) == set(numbers.tolist())  # the best of each group stay
    assert channels.within_macs(spec, score, macs=whole)["conv1"].tolist() == list(range(len(score["conv1"])))


def test_what_makes_no_sense_is_refused():
    model = network(PLAIN)
    with pytest.raises(ValueError, match="unknown score 'l3': one of random, l1"):
        channels.scores(model, "l3")
    with pytest.raises(ValueError, match="taylor needs images"):
        channels.scores(model, "taylor")
    score = channels.scores(model, "l1")
    with pytest.raises(ValueError, match="the smallest network with 50% of the channels .* has [0-9,]+"):
        channels.within_macs(PLAIN, score, macs=100, least=0.5)
    with pytest.raises(ValueError, match="least is 0"):
        channels.within_macs(PLAIN, score, macs=1e9, least=0)
    model.bn1.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="gradients are not finite"):
        channels.scores(model, "fisher", images=images(PLAIN, 4), labels=torch.zeros(4, dtype=torch.int64))
