"""Configurations of 03 become the networks that they describe."""

import math
import types

import pytest
from small_networks import PLAIN, network, saved

from nnc_utils import configurations, data, encoding, models, training
from nnc_utils.pruning import candidates
from nnc_utils.training import network_digest


class Run:
    """What `bench.Bench` is to builders."""

    seed, shards, images, dense = 1, [], data.load("digits"), network(PLAIN)
    recipe = {"depth": 18, "width": 1.0, "epochs": 0.3, "learning_rate": 0.05}
    recipe |= {"augment": False, "batch_size": 32}
    parameters = {"scoring_images": 32, "train_epochs": 0.2, "learning_rate": 0.01, "steps": 2, "multiple": 4}
    parameters |= {"configurations": [{"method": "channels", "macs": 3}]}

    def __init__(self, folder):
        self.folder, self.candidates = folder, []

    def sample(self, count):
        return self.images.normalize(self.images.train.images[:count]), self.images.train.labels[
            :count
        ].long()

    def fit(self, model, name, **options):
        return training.fit(model, self.images, **{"checkpoint": self.folder / f"{name}.pt"} | options)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def built(bench, **mapping):
    [configuration] = configurations.read([mapping], "pruning")
    candidates.check(configuration, bench)
    return candidates.build(configuration, bench)


@pytest.mark.parametrize("schedule", ["one_shot", "iterative", "gradual"])
def test_all_schedules_train_for_as_many_images_and_end_at_the_same_share(schedule, bench):
    one = built(bench, method="weights", sparsity=0.8, schedule=schedule, train="finetune", reestimate=True)
    masks = [encoding.mask_of(one.network.get_submodule(x.name)) for x in models.layers(PLAIN)]
    assert sum(int((~m).sum()) for m in masks) == round(0.8 * sum(m.numel() for m in masks))
    assert abs(one.train_images - 0.2 * len(bench.images.train)) <= 32


def test_iterative_pruning_is_distilled_from_the_dense_network(bench, monkeypatch):
    """Two removals, half of the training behind each, with what the whole network says in its loss."""
    lessons, online = [], candidates.student_loss.online
    monkeypatch.setattr(
        candidates.student_loss, "online", lambda *given: lessons.append(given) or online(*given)
    )
    mapping = {"method": "channels", "macs": 3, "compensate": True, "normalize": "isomorphic"}
    pruned = built(bench, **mapping, schedule="iterative", train="distill")
    shares = [models.macs(student) / models.macs(PLAIN) for _, _, student in lessons]
    assert pruned.network.spec == lessons[-1][2] and shares[1] <= 1 / 3 < shares[0] <= 3**-0.5
    assert all(network_digest(teacher) == network_digest(bench.dense) for teacher, _, _ in lessons)
    assert abs(pruned.train_images - 0.2 * len(bench.images.train)) <= 64


@pytest.mark.parametrize("method", ["obs", "reconstruct", "two_of_four"])
def test_reconstructed_networks_have_their_zeros(method, bench):
    settings = {"correct": True} if method == "two_of_four" else {"sparsity": 0.5}
    pruned = built(bench, method=method, reestimate=True, **settings).network
    zeros = sum(int((pruned.get_submodule(x.name).weight == 0).sum()) for x in models.layers(PLAIN))
    total = sum(math.prod(x.weight_shape) for x in models.layers(PLAIN))
    assert zeros / total == pytest.approx(0.5, abs=0.01)


def test_channels_meet_their_budget_and_their_architecture_starts_anew(bench):
    pruned, path = built(bench, method="channels", macs=3, compensate=True), bench.folder / "it.safetensors"
    assert models.macs(pruned.network.spec) <= models.macs(PLAIN) / 3 and pruned.train_images == 0
    saved(pruned.network, path)
    [configuration] = configurations.read([{"method": "channels", "macs": 3}], "pruning")
    bench.candidates.append(types.SimpleNamespace(configuration=configuration, path=path))
    anew, rival = built(bench, method="from_scratch", macs=3), built(bench, method="small_dense", macs=3)
    assert anew.network.spec == pruned.network.spec != rival.network.spec
    assert anew.train_images == rival.train_images > 0
    rounded = built(bench, method="channels", macs=3, int8=True)
    assert all(place.scale for place in models.activations(rounded.network).values())


def test_rates_for_layers_use_as_many_bytes(bench):
    rates = {rule: candidates.rates(rule, 0.9, bench) for rule in ("hand", "uniform", "scan")}
    cost, _ = candidates.scan(bench.dense, *bench.sample(32))
    spent = {rule: sum(cost[name][z] for name, z in rates[rule].items()) for rule in ("uniform", "scan")}
    assert spent["scan"] <= spent["uniform"] and set(rates["uniform"].values()) == {0.9}
    assert rates["hand"]["layer4.1.conv2"] == 0.6


def test_blocks_go_until_a_stage_has_one_left(bench):
    assert len(candidates.least_missed(bench, 2)) == 2
    with pytest.raises(ValueError, match="removed: at most 4"):
        built(bench, method="blocks", removed=5)
    with pytest.raises(ValueError, match="name the configuration of channels"):
        built(bench, method="from_scratch", macs=7)
