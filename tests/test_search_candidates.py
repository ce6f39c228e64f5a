"""The benchmark of the search, in steps as shards take them: what is timed, asked, trained and counted."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from nnc_utils import artifact, configurations, data, models, training
from nnc_utils.search import candidates
from nnc_utils.search.costs import Costs
from nnc_utils.search.space import Space

ABOUT = {"channels": 1, "size": 8, "classes": 10, "stem": "small"}
GIVEN = {
    "widest": 0.125, "blocks": 2, "macs": 100.0, "latency_ms": 1.0, "latency_networks": 6, "runtime": "any",
    "supernet_epochs": 1.0, "supernet_batch": 16, "calibration_images": 16, "validation_images": 12,
    "queries": 6, "search_seeds": 2, "evaluations": 0, "alone": 3, "alone_epochs": 0.5, "finalists": 2,
    "epochs": 1.0, "learning_rate": 0.05, "copies": 1,
    "teaches": [{"method": "pipeline", "macs": 6, "lambda_": 1e-9}],
    "steps": ["latency", "search", "retrain"],
    "configurations": [{"method": "random_alone", "macs": 100.0, "latency_ms": 1.0}],
}  # fmt: skip


class Bench(SimpleNamespace):
    """What candidates ask of a benchmark."""

    __hash__ = object.__hash__

    @property
    def baseline(self):
        return SimpleNamespace(folder=self.folder)

    def fit(self, network, name, **options):
        images = options.pop("images", self.images)
        return training.fit(network, images, seed=self.seed, **options)

    def file_beside(self, name):
        return None

    def path(self, name):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def milliseconds(paths, *, runtime, precision, folder):
    assert (runtime, precision) == ("any", "int8") and len(set(paths)) == len(paths)
    return [0.01 + 1e-8 * models.macs(artifact.load(path).spec) for path in paths]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    images = data.load("digits")
    images = replace(images, train=data.Split(images.train.images[:80], images.train.labels[:80]))
    dense = models.build(models.resnet(18, width=0.0625, **ABOUT)).eval()
    folder = tmp_path_factory.mktemp("run")
    about = {"mean": images.mean, "std": images.std, "classes": images.classes}
    artifact.save(dense, folder / "fp32.safetensors", **about)
    teacher = SimpleNamespace(artifact=lambda sha256: folder / "fp32.safetensors")
    row = SimpleNamespace(artifact_sha256="", train_seconds=1e6)
    recipe = {"augment": False, "batch_size": 16}
    known = {"dense": dense, "images": images, "recipe": recipe, "folder": folder, "others": [], "seed": 1}
    made = Bench(parameters=GIVEN, extra={}, shards=[], rows_of=lambda pipeline: [(teacher, row)], **known)
    searchers = {"theirs": candidates.METHODS["random"]}
    candidates.Search(made, milliseconds, **searchers).run()
    return made


def asked(bench, **settings):
    return configurations.read([{"macs": 100, "latency_ms": 1, **settings}], "search")


def test_blocks_are_timed_and_networks_test_the_model(bench):
    timed = bench.extra["latency"]
    assert (len(timed["blocks"]), len(timed["networks"])) == (6, 3) and 0 <= timed["error"] < 100
    assert not {text for text, _ in timed["blocks"]} & {text for text, _ in timed["networks"]}
    assert not (bench.folder / "timed").exists()


def test_searches_pay_for_what_they_ask(bench):
    search = bench.extra["search"]
    assert set(search["verified"]) == set(search["curves"]) == {*candidates.METHODS, "theirs"}
    assert all(len(values) == 2 for values in search["verified"].values())
    # 5 steps of 16 images train four networks, forward and backward
    assert search["images"] == {"supernet": 5 * 16 * 4 * 3, "candidate": 28, "asked": 6}
    assert len(search["pairs"]) == 3 and (search["tau"] is None or -1 <= search["tau"][0] <= 1)
    ours = [row["alone"] for row in search["finalists"] if row["method"] != "theirs"]
    assert search["winner"]["alone"] == max(ours) and search["limits"] == {"macs": 100.0, "latency_ms": 1.0}


def test_equal_cost_is_equal_networks():
    space = Space(1, 8, 4, "small", ((4, 8), (4, 8, 12)), blocks=1)
    questions = []

    def repeat(costs, ask, *, queries, seed):
        for number in (0, 1, 1, 0, 1):
            ask((number, *space.smallest[1:]))
        assert queries == 12

    def answer(architecture):
        questions.append(architecture)
        return 50.0

    costs = Costs(space, {"macs": 1e9})
    trace = candidates.at_equal_cost(repeat, costs, answer, 3, 4, seed=0)
    assert len(questions) == 2 and [found for found, _ in trace] == [*questions, questions[-1]]
    trace = candidates.at_equal_cost(candidates.METHODS["random"], costs, answer, 3, 4, seed=0)
    assert len(questions) == 5 and len(dict(trace)) == 3


def test_the_surrogate_is_kernel_ridge_regression():
    space = Space(1, 8, 4, "small", ((4, 8), (4, 8, 12)), blocks=2)
    most = models.macs(space.spec(space.largest))
    costs, known = Costs(space, {"macs": most}), {}

    def evaluate(architecture):
        return known.setdefault(architecture, 50.0 + sum(architecture) ** 1.5)

    evaluate.known = known
    predict = candidates.surrogate(costs, evaluate, 30, np.random.default_rng(0))
    assert 24 <= len(known) <= 30

    def inputs(networks):
        rows = []
        for one in networks:
            scaled = np.where(space.active(one), np.array(one) / (space.options - 1), -0.5)
            rows.append([*scaled, 3 * np.log(costs.of(one, "macs") / most)])
        return np.array(rows)

    values = np.array(list(known.values()))
    ridge = KernelRidge(alpha=0.3, kernel="rbf", gamma=0.05).fit(inputs(known), values - values.mean())
    others = [space.sample(np.random.default_rng(seed)) for seed in range(20)]
    predicted = [predict(one) for one in others]
    np.testing.assert_allclose(predicted, ridge.predict(inputs(others)) + values.mean())


def test_a_shard_retrains_what_another_found(bench):
    record, folder = SimpleNamespace(seed=1), bench.folder / "search"
    search = SimpleNamespace(extra=bench.extra, record=record, folder=folder)
    shard = Bench(**vars(bench) | {"extra": {}, "shards": [search]})
    methods = ("winner", "random_alone", "narrow_resnet18", "three_stage")
    settings = [{"method": method} for method in methods]
    settings += [{"method": "winner", "distill": True, "compressed": value} for value in (False, True)]
    wanted = [one for setting in settings for one in asked(shard, **setting)]
    wanted = candidates.resolved(shard, wanted)
    winner, alone, narrow, three, distilled, compressed = (candidates.build(one, shard) for one in wanted)
    found = bench.extra["search"]
    assert wanted[0].method == found["winner"]["method"] and not wanted[0].control and wanted[2].control
    assert winner.network.spec == distilled.network.spec == models.Spec.from_json(found["winner"]["spec"])
    macs = [models.macs(built.network.spec) for built in (winner, alone, narrow, three)]
    assert min(macs[2:]) >= max(macs[:2]) and wanted[3].control == "three_stage"
    assert macs[0] <= models.macs(models.resnet(18, **ABOUT)) / 100
    assert {built.train_images for built in (winner, alone, narrow, three, distilled, compressed)} == {5 * 16}
    assert compressed.train_seconds > 1e6 > distilled.train_seconds  # its teacher's training counts
    kernels = [built.network.conv1.weight.detach().numpy() for built in (winner, distilled)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": ["retrain"]}, "nothing has been searched"),
        ({"macs": 50.0}, "the search is within {'macs': 50.0"),
        ({"alone": 0}, "no random network is trained alone"),
        ({"widest": 0.2}, "sixteenths"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(bench, values, message):
    other = Bench(**vars(bench) | {"extra": {}, "parameters": GIVEN | values})
    with pytest.raises(ValueError, match=message):
        candidates.Search(other).run()
