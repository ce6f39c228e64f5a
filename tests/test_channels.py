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
    """Against finite differences of each picture's loss: γ and β of all writers times 1 ± ε."""
    model, pictures, labels = trained
    exact, step = copy.deepcopy(model).double(), 1e-5
    gates = channels.gate_gradients(exact, pictures[:8].double(), labels[:8], batch_size=3)

    def losses(network):
        with torch.inference_mode():
            return functional.cross_entropy(network(pictures[:8].double()), labels[:8], reduction="none")

    for name in ("conv1", "layer2.0.conv1", "layer3.0.conv2"):
        for channel in (0, 3):
            more, less = (losses(scaled(model, name, channel, factor)) for factor in (1 + step, 1 - step))
            slope = (more - less) / (2 * step)
            torch.testing.assert_close(gates[name][:, channel], slope, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_scores_are_means_over_pictures(kind, trained):
    """Of sizes or squares of each picture's slope: pictures that disagree about the sign do not cancel."""
    model, pictures, labels = trained
    found = channels.scores(model, kind, images=pictures[:20], labels=labels[:20], batch_size=7)
    gates = channels.gate_gradients(model, pictures[:20], labels[:20], batch_size=1)
    for name, gate in gates.items():
        wanted = gate.abs().mean(0) if kind == "taylor" else gate.square().mean(0) / 2
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_scores_rank_channels_as_the_pictures_losses_with_less_of_them_do(kind, trained):
    model, pictures, labels = trained
    found = channels.scores(model, kind, images=pictures, labels=labels)

    def losses(network):
        with torch.inference_mode():
            return functional.cross_entropy(network(pictures.double()), labels, reduction="none")

    before = losses(copy.deepcopy(model).double())
    for name in ("layer1.0.conv1", "layer2.1.conv1", "layer3.0.conv2"):
        harms = []
        for channel in range(len(found[name])):
            change = losses(scaled(model, name, channel, 0.99)) - before
            harms.append(float(change.abs().mean() if kind == "taylor" else change.square().mean()))
        assert spearmanr(harms, found[name]).statistic > 0.95


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


def test_the_same_share_of_each_group_whatever_the_scores():
    """Scores of one group a thousand times those of another: ranks do not see it, a threshold does."""
    generator = torch.Generator().manual_seed(0)
    widths = {name: layer.out_channels for name, layer in _layers(PLAIN).items()}
    score = {name: torch.rand(widths[name], generator=generator) + 0.1 for name in structured.groups(PLAIN)}
    spread = {name: values**8 if i % 2 else values for i, (name, values) in enumerate(score.items())}
    budget = models.macs(PLAIN) / 3
    even = channels.within_macs(PLAIN, spread, macs=budget, everywhere=True)
    shares = [len(kept) / widths[name] for name, kept in even.items()]
    assert max(shares) - min(shares) <= 1 / min(widths[name] for name in even)  # but for whole channels
    for name, kept in even.items():  # the best of each
        assert set(kept.tolist()) == set(spread[name].topk(len(kept)).indices.tolist())
    other = channels.within_macs(PLAIN, spread, macs=budget)
    shares = [len(kept) / widths[name] for name, kept in other.items()]
    assert max(shares) - min(shares) > 0.3


def _layers(spec):
    return {layer.name: layer for layer in models.layers(spec)}


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
