"""K-means against scikit-learn's, and on networks."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from small_networks import PLAIN, images, network
from torch.nn.utils import parametrize

from nnc_utils import artifact, data, encoding, models, training
from nnc_utils.quantization import codebook


def draw(kind, count=5000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal**3,
        "uniform": torch.rand(count, generator=generator),
        "two peaks": normal + 6 * (torch.rand(count, generator=generator) < 0.2),
    }[kind]


def error(values, ours, importance=None):
    centroids, codes = ours
    squares = (values.double() - centroids[codes.int()].double()).square()
    return float(squares.sum() if importance is None else (importance.double() * squares).sum())


def importances(count, seed=1):
    """Over ten orders of magnitude, a fifth of them 0: as a Fisher diagonal is."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 10.0 ** (-10 * torch.rand(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.2, 0.0, drawn)


def scikit_learn(values, levels, importance, **settings):
    weights = None if importance is None else importance.double().numpy()
    return KMeans(levels, tol=0, max_iter=3000, **settings).fit(
        values.double().numpy()[:, None], sample_weight=weights
    )


WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
KINDS = pytest.mark.parametrize("kind", ["normal", "uniform", "two peaks", "heavy tails"])


@WEIGHTED
@KINDS
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_from_the_same_start_scikit_learn_ends_with_the_same_error(kind, levels, weighted):
    values = draw(kind)
    importance = importances(len(values)) if weighted else None
    counted = (values[importance > 0] if weighted else values).double().numpy()
    first = np.linspace(counted.min(), counted.max(), levels)[:, None]
    theirs = scikit_learn(values, levels, importance, init=first, n_init=1)
    ours = codebook.kmeans(values, levels, importance=importance)
    assert error(values, ours, importance) == pytest.approx(theirs.inertia_, rel=0.01)
    # and it does not move from where we ended: the same notion of a cluster and its mean
    ended = scikit_learn(values, levels, importance, init=ours[0].double().numpy()[:, None], n_init=1)
    assert np.allclose(np.sort(ended.cluster_centers_[:, 0]), ours[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two peaks"])
def test_each_value_has_its_nearest_centroid_and_no_level_is_wasted(kind):
    values = draw(kind, 6000).view(20, 10, 5, 6)
    for levels in (1, 3, 32, 256):
        centroids, codes = codebook.kmeans(values, levels)
        assert codes.shape == values.shape and codes.dtype == torch.uint8
        assert centroids.dtype == torch.float32 and (centroids.diff() > 0).all()
        assert len(centroids) == levels == len(codes.unique())
        distances = (values.flatten()[:, None] - centroids).abs()
        assert torch.allclose(distances[range(6000), codes.flatten().long()], distances.amin(1), atol=1e-6)


def test_more_iterations_and_more_levels_never_harm():
    values = draw("heavy tails")
    by_iterations = [error(values, codebook.kmeans(values, 32, iterations=n)) for n in (1, 2, 5, 20, 100)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    by_levels = [error(values, codebook.kmeans(values, 2**bits)) for bits in range(9)]
    assert by_levels == sorted(by_levels, reverse=True)


def test_few_different_values_are_exact():
    values = torch.tensor([[0.5, -1.0, 0.5], [0.0, 0.0, 3.0]])
    centroids, codes = codebook.kmeans(values, 16)
    assert centroids.tolist() == [-1.0, 0.0, 0.5, 3.0]
    assert torch.equal(centroids[codes.int()], values)
    centroids, codes = codebook.kmeans(torch.full((2, 5), -0.37), 4)
    assert torch.equal(centroids, torch.tensor([-0.37])) and not codes.any()
    close = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-22] * 5)
    assert torch.equal(codebook.kmeans(close, 256)[0], close[:3])


def test_importance_moves_the_centroids():
    values = torch.tensor([0.0, 1.0, 10.0, 11.0])
    centroids, _ = codebook.kmeans(values, 2, importance=torch.tensor([3.0, 1.0, 0.0, 2.0]))
    assert centroids.tolist() == [0.25, 11.0]
    # a region that does not matter gets no centroid of its own, and no NaN
    spread = torch.linspace(-5, 5, 1001)
    centroids, codes = codebook.kmeans(spread, 16, importance=(spread.abs() < 1).float())
    assert len(centroids) == 16 and (centroids.abs() < 1).all()
    assert codes[0] == 0 and codes[-1] == 15
    # nothing matters: all count the same
    unweighted = codebook.kmeans(spread, 16)
    for ours, theirs in zip(codebook.kmeans(spread, 16, importance=torch.zeros(1001)), unweighted):
        assert torch.equal(ours, theirs)
    # the unit of the importance does not matter, nor do the smallest numbers break it
    for unit in (1e-38, 1e30):
        ours, _ = codebook.kmeans(spread, 16, importance=torch.full((1001,), unit))
        assert torch.allclose(ours, unweighted[0], atol=1e-6)


def test_channels_of_huge_importance_leave_the_others_their_levels():
    """As in a stem: where importances are not balanced, the others change by more than their own size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1, 3, 3, generator=generator) / 10
    importance = torch.rand(weight.shape, generator=generator) ** 4
    weight[:4], importance[4:], importance[9] = 6 * weight[:4], importance[4:] * 1e-6, 0.0
    lost, counted = [], []
    for options in ({}, {"importance": importance}, {"importance": importance, "balance": False}):
        square = (encoding.decode(codebook.quantize(weight, bits=2, **options)) - weight).square()
        lost.append(float(square[4:].sum() / weight[4:].square().sum()))
        counted.append(float((importance * square).sum()))
    assert lost[1] < 0.6 < 1 < lost[2]
    assert counted[2] < counted[1] < counted[0]


@pytest.mark.parametrize("small", [1e-10, 1e-15, 1e-20])
def test_importances_of_very_different_size_give_means_within_their_clusters(small):
    values = draw("normal", 20_000)
    importance = torch.where(values < 0, 1.0, small)  # what sums of 1 lose of it
    centroids, codes = codebook.kmeans(values, 16, importance=importance)
    assert len(centroids) == 16
    for code, centroid in enumerate(centroids):
        inside = values[codes == code]
        assert inside.min() - 1e-6 <= centroid <= inside.max() + 1e-6


def test_what_k_means_refuses():
    values = torch.ones(2, 3)
    for options, why in (
        ({"values": torch.ones(0, 3)}, "holds nothing"),
        ({"levels": 257}, "from 1 to 256"),
        ({"values": torch.tensor([1.0, float("inf")])}, "1 weights are not finite"),
        ({"importance": torch.ones(3)}, r"for each weight, \(2, 3\)"),
        ({"importance": torch.full((2, 3), float("nan"))}, "a number of at least 0 for each weight"),
        ({"importance": torch.full((2, 3), -1.0)}, "a number of at least 0 for each weight"),
    ):
        with pytest.raises(ValueError, match=why):
            codebook.kmeans(**{"values": values, "levels": 4} | options)


# --- Networks -----------------------------------------------------------------------------------

NAMES = [layer.name for layer in models.layers(PLAIN)]


@pytest.fixture
def model():
    return network(PLAIN)


def test_a_network_computes_with_its_codebooks_and_the_original_is_untouched(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    widths = dict.fromkeys(NAMES, 3) | {"layer4.1.conv2": 1}
    importance = {name: model.get_submodule(name).weight.detach().square() for name in NAMES}
    quantized = codebook.quantize_network(model, bits=widths, importance=importance)
    by_hand = network(PLAIN)
    for name in NAMES:
        weight = by_hand.get_submodule(name).weight.data
        rows = importance[name].flatten(1)
        counts = (rows / rows.mean(1, keepdim=True)).view(weight.shape)
        centroids, codes = codebook.kmeans(weight, 2 ** widths[name], importance=counts)
        weight.copy_(centroids[codes.int()])
        assert len(quantized.get_submodule(name).weight.unique()) == 2 ** widths[name]
    with torch.no_grad():
        assert torch.equal(quantized(images(PLAIN, 4)), by_hand(images(PLAIN, 4)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_and_weights_that_do_not_fit_are_named(model):
    widths = dict.fromkeys(NAMES, 4)
    for options, why in (
        ({"bits": widths | {"layer9": 4}}, "bits must name.*layer9"),
        ({"bits": 4, "importance": {}}, "importance must name.*conv1"),
        ({"bits": 4, "importance": dict.fromkeys(NAMES, torch.ones(1, 1))}, "conv1: importance needs"),
        ({"bits": 9}, "conv1: levels is 512"),
    ):
        with pytest.raises(ValueError, match=why):
            codebook.quantize_network(model, **options)


def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(model):
    """Han et al., 2016, equation 3; divided, when it is trained, by the root of the weights a level."""
    quantized = codebook.trainable(codebook.quantize_network(model, bits=2))
    plain = codebook.quantize_network(model, bits=2)
    for name in NAMES:
        parametrize.remove_parametrizations(plain.get_submodule(name), "weight")
    for each in (quantized, plain):
        each(images(PLAIN, 8)).square().mean().backward()
    layer = quantized.layer3[0].conv1
    attached = layer.parametrizations.weight[-1]
    own, gradient = plain.layer3[0].conv1.weight, plain.layer3[0].conv1.weight.grad
    sums = [float(gradient[own == centroid].sum()) for centroid in attached.codebook.detach()]
    sums = [total / (own.numel() / 4) ** 0.5 for total in sums]
    assert torch.allclose(attached.codebook.grad, torch.tensor(sums), rtol=1e-3, atol=1e-6)


def test_fine_tuning_moves_the_levels_and_leaves_each_weight_its_level(model, tmp_path):
    digits = data.load("digits")
    training.fit(model, digits, epochs=3, learning_rate=0.1, batch_size=32)
    network = codebook.trainable(codebook.quantize_network(model, bits=2))
    before = {name: network.get_submodule(name).weight.detach().clone() for name in NAMES}
    history = training.fit(network, digits, epochs=3, learning_rate=0.1, batch_size=32)
    assert history[-1].loss < 0.9 * history[0].loss  # with the plain sum it rises
    about = {"mean": digits.mean, "std": digits.std, "classes": digits.classes}
    artifact.save(network, tmp_path / "tuned.safetensors", **about)
    loaded = artifact.load(tmp_path / "tuned.safetensors")
    for name in NAMES:
        weight = loaded.get_submodule(name).weight
        pairs = torch.stack([before[name].flatten(), weight.detach().flatten()]).unique(dim=1)
        assert pairs.shape[1] == len(before[name].unique()) == 4 and not torch.equal(*pairs)
    with torch.inference_mode():
        assert torch.equal(loaded(images(PLAIN, 16)), network(images(PLAIN, 16)))


def test_a_mask_stays_and_its_zeros_take_no_part():
    pruned = network(PLAIN)
    masks = {}
    for name in NAMES:
        weight = pruned.get_submodule(name).weight.detach()
        masks[name] = weight.abs() > (weight.abs().median() if name != "fc" else 99)  # fc: nothing is kept
        encoding.attach(
            pruned.get_submodule(name), encoding.Dense(weight.masked_fill(~masks[name], 0), masks[name])
        )
    importance = {name: torch.rand(mask.shape) for name, mask in masks.items()}
    quantized = codebook.quantize_network(pruned, bits=2, importance=importance, balance=False)
    for name, mask in masks.items():
        ours = encoding.encoded(quantized.get_submodule(name))
        assert isinstance(ours, encoding.Codebook) and torch.equal(ours.mask, mask)
        weight = quantized.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
        if name != "fc":
            kept = network(PLAIN).get_submodule(name).weight[mask]
            wanted, _ = codebook.kmeans(kept, 4, importance=importance[name][mask])
            assert torch.equal(weight[mask].unique(), wanted)
