"""The networks of 02's configurations against direct calls of the methods."""

import copy
from types import SimpleNamespace

import pytest
import torch

from nnc_utils import baseline, batch_norm, configurations, curvature, data, encoding, models, sensitivity
from nnc_utils.configurations import ConfigurationError
from nnc_utils.quantization import activations, candidates, codebook, hessian_rounding, uniform
from tests import small_networks

DIGITS = data.load("digits")
PARAMETERS = {"calibration_images": 96, "repair_images": 64, "train_epochs": 0.1, "learning_rate": 0.02}
IMAGES = DIGITS.normalize(DIGITS.train.images[:96])


class Context(SimpleNamespace):
    """As a run, without folders."""

    __hash__ = object.__hash__

    def sample(self, count):
        return IMAGES[:count], DIGITS.train.labels[:count]

    def fit(self, network, name, **options):
        self.trained.append((network, name, options))
        return SimpleNamespace(images=7, seconds=0.5)

    def path(self, name):
        return self.folder / name

    def file(self, configuration):
        raise ValueError(f"there is no network {configuration.title}")


@pytest.fixture
def context(tmp_path):
    dense = small_networks.network(small_networks.PLAIN)
    own = {"dense": dense, "seed": 3, "trained": [], "folder": tmp_path, "images": DIGITS}
    return Context(parameters=PARAMETERS, recipe={"batch_size": 32}, **own)


def built(context, **mapping):
    [configuration] = configurations.read([mapping], "baseline", "quantization")
    return candidates.build(configuration, context)


def codes(network):
    return {x.name: encoding.encoded(network.get_submodule(x.name)) for x in models.layers(network.spec)}


def by_hand(mapping, dense):
    """The rounded network, by the method itself."""
    match mapping:
        case {"method": "uniform", "levels": 5}:
            return uniform.quantize_network(dense, bits=3, levels=5, per_channel=True, clip="mse")
        case {"method": "uniform", "granularity": "tensor"}:
            return uniform.quantize_network(dense, bits=4, per_channel=False, clip="mse")
        case {"method": "kmeans"}:
            fisher = sensitivity.fisher_diagonal(dense, IMAGES, seed=3) if mapping.get("hessian") else None
            return codebook.quantize_network(dense, bits=2, importance=fisher)
        case {"method": "mixed_precision"}:
            widths = {x.name: 4 if x.name == "fc" else 8 for x in models.layers(dense.spec)}
            return uniform.quantize_network(dense, bits=widths, per_channel=True, clip="mse")
    known = curvature.curvatures(dense, IMAGES, seed=3)
    return hessian_rounding.quantize_network(dense, known, lambda_=1e-8)


@pytest.mark.parametrize(
    "mapping",
    [
        {"method": "uniform", "bits": 4, "granularity": "tensor", "reestimate": True},
        {"method": "uniform", "levels": 5},
        {"method": "kmeans", "bits": 2},
        {"method": "kmeans", "bits": 2, "hessian": True, "reestimate": True},
        {"method": "mixed_precision", "rule": "hand"},
        {"method": "hessian_rounding", "lambda_": 1e-8, "activations": "float", "reestimate": True},
    ],
    ids=str,
)
def test_a_configuration_gives_the_network_of_its_method(context, mapping):
    before = copy.deepcopy(context.dense)
    network = built(context, **mapping).network
    wanted = by_hand(mapping, before)
    if mapping.get("reestimate"):
        wanted = batch_norm.reestimate(wanted, IMAGES[:64], original=before)
    if mapping["method"] != "kmeans" and "activations" not in mapping:
        wanted = activations.calibrate(wanted, IMAGES)
    with torch.inference_mode():
        assert torch.equal(network(IMAGES), wanted(IMAGES))
        assert torch.equal(context.dense(IMAGES), before(IMAGES))
    ranges = [place.scale for place in models.activations(network).values()]
    assert ranges == [place.scale for place in models.activations(wanted).values()]


def test_mixed_precision_keeps_to_the_bytes_of_its_budget_with_less_predicted_loss(context):
    known = curvature.curvatures(context.dense, IMAGES, seed=3)
    weights = {n: context.dense.get_submodule(n).weight.detach() for n in known}

    def bytes_and_loss(network):
        own = codes(network)
        losses = [known[n].loss(encoding.decode(own[n]) - weights[n]) for n in own]
        return sum(encoding.payload_bits(one) for one in own.values()) / 8, sum(losses)

    for setting, same in (("budget_bits", {"bits": 3}), ("budget_levels", {"levels": 5})):
        own = built(context, method="mixed_precision", **{setting: next(iter(same.values()))}).network
        size, loss = bytes_and_loss(own)
        everywhere, plain = bytes_and_loss(built(context, method="uniform", **same).network)
        assert size <= everywhere - candidates.HEADER and loss < plain
        assert {one.bits for one in codes(own).values()} <= {2, 3, 4, 8}


FINETUNED = {"method": "kmeans", "bits": 3, "train": "finetune"}


@pytest.mark.parametrize(
    "mapping", [{"method": "qat", "bits": 3}, FINETUNED, {"method": "dense_finetuned"}], ids=str
)
def test_training_starts_from_the_dense_network(context, mapping):
    result = built(context, **mapping)
    [(network, name, options)] = context.trained
    assert (result.train_images, result.train_seconds) == (7, 0.5) and name.startswith(mapping["method"])
    assert options == {"epochs": 0.1, "learning_rate": 0.02, "batch_size": 32, "augment": False}
    assert network is not context.dense
    widths = {getattr(one, "bits", 32) for one in codes(result.network).values()}
    assert widths == {"qat": {3, 8}, "kmeans": {3}, "dense_finetuned": {32}}[mapping["method"]]


def test_what_cannot_be_built_is_named(context, monkeypatch):
    context.baseline = SimpleNamespace(artifact=lambda name: context.folder / name)
    with pytest.raises(ValueError, match="no network 7-bit weights"):
        built(context, method="xz", of={"method": "uniform", "bits": 7})
    monkeypatch.setattr(candidates.peers, "available", lambda name: "not installed")
    with pytest.raises(ValueError, match="not installed"):
        built(context, method="ort_static")
    with pytest.raises(ValueError, match="no network of 'train' is made here"):
        candidates.build(baseline.Train(), context)
    for wrong, why in (
        ({"method": "uniform"}, "one of bits, levels is needed"),
        ({"method": "uniform", "bits": 4, "levels": 5}, "one of bits, levels"),
        (FINETUNED | {"reestimate": True}, "omit reestimate"),
        ({"method": "mixed_precision"}, "budget_bits, budget_levels, rule"),
        ({"method": "hessian_rounding", "lambda_": 0}, "lambda_"),
        ({"method": "xz", "of": {"method": "uniform", "bits": 99}}, "bits"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            built(context, **wrong)
