"""Channel scores against the loss without the channel; budgets against counting; readers against numpy."""

import copy

import pytest
import torch
from scipy.stats import rankdata
from small_networks import ODD, PLAIN, POOLED, images, network
from torch.nn import functional

from nnc_utils import artifact, batch_norm, data, models
from nnc_utils.pruning import channel_removal, channels


@pytest.fixture(scope="module")
def trained(trained_digits):
    """A network that knows digits, with training images and labels."""
    digits, model = data.load("digits"), artifact.load(trained_digits / "base.safetensors", trainable=True)
    return model.eval(), digits.normalize(digits.train.images[:128]), digits.train.labels[:128].long()


def losses(network, inputs, labels):
    with torch.inference_mode():
        return functional.cross_entropy(network(inputs.double()), labels, reduction="none")


def scaled(model, name, channel, factor):
    """The network with one channel of a group times a factor, behind every layer that writes it."""
    twin = copy.deepcopy(model).double()
    norms = {layer.name: layer.batch_norm for layer in models.layers(model.spec)}
    for writer in channel_removal.groups(model.spec)[name].writers:
        norm = twin.get_submodule(norms[writer])
        norm.weight.data[channel] *= factor
        norm.bias.data[channel] *= factor
    return twin


def test_a_gate_is_a_factor_on_the_channel(trained, monkeypatch):
    """Against finite differences of each image's loss: γ and β of all writers times 1 ± ε."""
    model, inputs, labels = trained[0], trained[1][:8], trained[2][:8]
    monkeypatch.setattr(channels, "BATCH", 3)
    gates, step = channels.gate_gradients(copy.deepcopy(model).double(), inputs.double(), labels), 1e-5
    for name in ("conv1", "layer2.0.conv1", "layer3.0.conv2"):
        for channel in (0, 3):
            more, less = (scaled(model, name, channel, factor) for factor in (1 + step, 1 - step))
            slope = (losses(more, inputs, labels) - losses(less, inputs, labels)) / (2 * step)
            torch.testing.assert_close(gates[name][:, channel], slope, rtol=1e-3, atol=1e-7)


def test_norms_are_those_of_the_filters(trained):
    model = trained[0]
    layers = (model.conv1, model.layer1[0].conv2, model.layer1[1].conv2)
    expected = sum(layer.weight.detach().abs().sum((1, 2, 3)) for layer in layers)
    torch.testing.assert_close(channels.scores(model, "l1")["conv1"], expected)
    scale = channels.scores(model, "bn_scale")["layer2.0.conv1"]
    assert torch.equal(scale, model.layer2[0].bn1.weight.detach().abs())
    square = channels.scores(model, "l2")["layer2.0.conv1"]
    torch.testing.assert_close(square, model.layer2[0].conv1.weight.detach().square().sum((1, 2, 3)).sqrt())


@pytest.mark.parametrize("spec", [ODD, POOLED, PLAIN], ids=["odd", "pooled", "plain"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_budget_is_met_and_used(spec, multiple):
    score = channels.scores(network(spec), "random", seed=1)
    whole = before = models.macs(spec)
    for share in (1.0, 0.6, 0.3) if multiple == 1 else (1.0, 0.8):  # so little has no multiple of 4
        kept = channels.within_macs(spec, score, macs=share * whole, multiple=multiple)
        macs = models.macs(channel_removal.remove_channels(network(spec), kept).spec)
        assert macs <= share * whole and macs <= before
        before = macs
        if (spec, multiple) == (PLAIN, 1):
            assert macs > 0.9 * share * whole
        for name, numbers in kept.items():
            assert len(numbers) % multiple == 0 or len(numbers) == len(score[name])
    assert channels.within_macs(spec, score, macs=whole)["conv1"].tolist() == list(range(len(score["conv1"])))


def test_the_same_share_of_each_group_whatever_the_scores():
    """Scores of one group far above those of another: ranks do not see it, a threshold does."""
    random = channels.scores(network(PLAIN), "random", seed=0)
    spread = {n: (values + 0.1) ** (8 if i % 2 else 1) for i, (n, values) in enumerate(random.items())}
    shares = {}
    for uniform in (True, False):
        kept = channels.within_macs(PLAIN, spread, macs=models.macs(PLAIN) / 3, uniform=uniform)
        shares[uniform] = [len(numbers) / len(spread[name]) for name, numbers in kept.items()]
        for name, numbers in kept.items():  # the best of each
            assert set(numbers.tolist()) == set(spread[name].topk(len(numbers)).indices.tolist())
    narrowest = min(map(len, spread.values()))
    assert max(shares[True]) - min(shares[True]) <= 1 / narrowest  # but for whole channels
    assert max(shares[False]) - min(shares[False]) > 0.3


@pytest.mark.parametrize("spec", [PLAIN, ODD], ids=["ResNet-18", "odd"])
def test_layers_make_up_for_channels_by_least_squares(spec):
    """No other weights of a layer bring its sums nearer to the whole network's: their gradient is 0."""
    model, inputs = network(spec), images(spec, 300)
    widths = {layer.name: layer.out_channels for layer in models.layers(spec)}
    kept = {
        name: torch.randperm(widths[name])[: -(widths[name] // 3)] for name in channel_removal.groups(spec)
    }
    plain, ours = channel_removal.remove_channels(model, kept), channels.compensated(model, kept, inputs)
    exact = channels.compensated(model, kept, inputs, rows=10**7, damping=1e-7)
    written = {w: kept[n].sort().values for n, g in channel_removal.groups(spec).items() for w in g.writers}
    for net in (model, exact):
        for layer in models.layers(spec):
            hook = net.get_submodule(layer.name).register_forward_hook
            hook(lambda module, given, output: setattr(module, "seen", (given[0], output)))
    with torch.no_grad():
        harm = [(net(inputs) - model(inputs)).square().mean() for net in (exact, ours, plain)]
    assert max(harm[:2]) < 0.7 * harm[2]
    for layer in models.layers(exact.spec)[1:]:
        sums = model.get_submodule(layer.name).seen[1][:, written.get(layer.name, slice(None))]
        given, _ = exact.get_submodule(layer.name).seen
        for net in (exact, plain):
            (net.get_submodule(layer.name)(given) - sums).square().sum().backward()
        slopes = [net.get_submodule(layer.name).weight.grad.norm() for net in (exact, plain)]
        assert slopes[0] < 0.01 * slopes[1], layer.name


def test_scores_are_ranked_among_groups_that_are_alike(trained):
    """Inside blocks; residual streams, but for the first, with fewer readers, and the last; against SciPy."""
    spec, score = trained[0].spec, channels.scores(trained[0], "l2")
    known = channel_removal.groups(spec)
    inside = [name for name in known if len(known[name].writers) == 1]
    first, *between, last = [name for name in known if name not in inside]
    ranks = channels.comparable(spec, score, "isomorphic")
    for names in (inside, [first], between, [last]):
        ours, theirs = (torch.cat([values[name] for name in names]) for values in (ranks, score))
        torch.testing.assert_close(ours, torch.from_numpy((rankdata(theirs) - 1) / len(theirs)).float())
    kept = channels.within_macs(spec, score, macs=models.macs(spec) / 3, normalize="isomorphic")
    assert 0 < models.macs(channel_removal.narrowed(spec, kept)) <= models.macs(spec) / 3


def test_a_group_that_no_image_wakes_is_removed_without_harm(trained):
    """All channels of one dead, of another half, and one constant: what compensates has no moment there."""
    model, inputs, labels = copy.deepcopy(trained[0]), *trained[1:]
    for norm, off in ((model.layer2[0].bn1, slice(None)), (model.layer3[0].bn1, slice(0, None, 2))):
        norm.weight.data[off], norm.bias.data[off] = 0, -1
    model.layer1[0].bn1.weight.data[0], model.layer1[0].bn1.bias.data[0] = 0, 1
    model = batch_norm.reestimate(model, inputs)  # what is behind them sees other sums
    score = channels.scores(model, "fisher", images=inputs, labels=labels)
    assert (score["layer2.0.conv1"] == 0).all()
    kept = channels.within_macs(model.spec, score, macs=models.macs(model.spec) / 1.3)
    narrow = batch_norm.reestimate(channels.compensated(model, kept, inputs), inputs)
    with torch.inference_mode():
        before, after = ((net(inputs).argmax(1) == labels).float().mean() for net in (model, narrow))
    assert before > 0.8 and after > before - 0.05


def test_what_makes_no_sense_is_refused():
    model = network(PLAIN)
    with pytest.raises(ValueError, match="the smallest network with 5% of the channels .* has [0-9,]+"):
        channels.within_macs(PLAIN, channels.scores(model, "l1"), macs=100)
    model.bn1.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="gradients are not finite"):
        channels.scores(model, "fisher", images=images(PLAIN, 4), labels=torch.zeros(4, dtype=torch.int64))
