"""Pipelines: stages in any order, budgets that cannot be met, and what is shared between configurations."""

import copy
import types

import pytest
import torch
from small_networks import PLAIN

from nnc_utils import artifact, data, models, pipeline, training
from nnc_utils.configurations import ConfigurationError, read

EPOCHS = {"prune_epochs": 0.1, "quantize_epochs": 0.1, "distill_epochs": 0.2}


class Run(types.SimpleNamespace):
    """What stages ask of a run."""

    __hash__ = object.__hash__


@pytest.fixture
def bench(tmp_path):
    """A run on digits with an untrained network, which remembers what was trained."""
    digits = data.load("digits")
    torch.manual_seed(0)
    dense, fits = models.build(PLAIN).eval(), []
    parameters = {**EPOCHS, "scoring_images": 32, "multiple": 1, "copies": 0, "batch_size": 0, "claim": True}
    parameters |= {"temperature": 4.0, "alpha": 0.5, "learning_rate": 0.01, "runtime": "onnxruntime"}
    recipe = {"depth": 18, "width": 0.25, "epochs": 0.1, "learning_rate": 0.01}
    recipe |= {"augment": False, "batch_size": 64}

    def fit(network, name, **options):
        fits.append(name)
        return training.fit(network, options.pop("images", digits), device=torch.device("cpu"), **options)

    def path(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    def sample(count):
        return digits.normalize(digits.train.images[:count]), digits.train.labels[:count].long()

    about = {"dense": dense, "images": digits, "parameters": parameters, "recipe": recipe, "seed": 1}
    about |= {"others": [], "shards": [], "candidates": [], "extra": {}, "fits": fits}
    about |= {"run": types.SimpleNamespace(upstream=[]), "fit": fit, "path": path, "sample": sample}
    about |= {"trained_before": lambda spec: None, "baseline": types.SimpleNamespace(folder=tmp_path)}
    return Run(**about)


def built(bench, method="pipeline", **settings):
    [configuration] = read([{"method": method, **settings}], "pipeline")
    pipeline.check(configuration, bench)
    return list(pipeline.build(configuration, bench))


def test_each_stage_of_the_first_pipeline_is_kept_and_all_train_equally_long(bench):
    stages = built(bench, macs=2, lambda_=1e-9)
    assert [one.stage for one in stages] == ["prune", "distill", ""]
    last = stages[-1]
    assert models.macs(last.network.spec) <= models.macs(bench.dense.spec) / 2
    assert pipeline.is_rounded(last.network) and not pipeline.is_rounded(stages[1].network)
    assert 0 < stages[0].train_images < last.train_images == stages[1].train_images
    other = built(bench, stages=["prune", "quantize"], macs=2, bits=4)[-1]
    assert abs(other.train_images - last.train_images) <= 2 * 64  # a step of rounding for each stage


def test_configurations_share_what_they_begin_with(bench):
    bench.parameters["claim"] = False
    built(bench, macs=2, lambda_=1e-9)
    before = list(bench.fits)
    built(bench, macs=2, lambda_=1e-8)
    assert bench.fits == before and len(before) == 2


def test_the_three_stage_rival_has_the_macs_of_the_narrow_one_and_fewer_weights(bench):
    settings = {"method": "small_dense", "macs": 2, "lambda_": 1e-9}
    [narrow], [three] = (built(bench, **settings, **family) for family in ({}, {"family": "three_stage"}))
    assert [len(one.network.spec.stages) for one in (narrow, three)] == [4, 3] and len(set(bench.fits)) == 4
    shares = [models.macs(one.network.spec) / models.macs(bench.dense.spec) for one in (narrow, three)]
    assert min(shares) > 0.3 and max(shares) <= 1 / 2
    assert models.parameters(three.network.spec) < models.parameters(narrow.network.spec) / 1.5
    assert pipeline.is_rounded(three.network) and three.train_images == narrow.train_images
    with pytest.raises(ValueError, match="macs 1e[+]06 cannot be met: .* is the nearest"):
        built(bench, **settings | {"macs": 1e6}, family="three_stage")


def test_what_was_rounded_goes_back_to_floats_for_pruning_and_is_rounded_again(bench, tmp_path):
    bench.parameters["claim"] = False
    [one] = built(bench, stages=["quantize", "prune"], macs=2, lambda_=1e-9)
    assert pipeline.is_rounded(one.network)
    digits = bench.images
    about = {"mean": digits.mean, "std": digits.std, "classes": digits.classes}
    assert artifact.save(one.network, tmp_path / "a.safetensors", **about).bits_per_weight < 8


def test_a_pipeline_may_distil_into_three_stages(bench):
    bench.parameters["claim"] = False
    about = {"stages": ["narrow", "distill", "quantize"], "macs": 2, "lambda_": 1e-9, "family": "three_stage"}
    [one] = built(bench, **about)
    assert len(one.network.spec.stages) == 3 and pipeline.is_rounded(one.network)
    [configuration] = read([{"method": "pipeline", **about}], "pipeline")
    assert configuration.title.startswith("narrow → distill → quantize: a three-stage ResNet, 2× fewer MACs")
    with pytest.raises(ConfigurationError, match="family belongs to the stage narrow"):
        read([{"method": "pipeline", "macs": 2, "lambda_": 1e-9, "family": "three_stage"}], "pipeline")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 1e6, "lambda_": 1e-9}, "macs 1e[+]06 cannot be met: .* is the nearest"),
        ({"macs": 2, "size": 1e6}, "size 1e[+]06 cannot be met: .* is the nearest, with 2 bits"),
        ({"macs": 2, "lambda_": 1e-9, "ensemble": True}, "ensemble needs the baselines of other seeds"),
    ],
)
def test_a_budget_that_no_network_meets_is_refused_before_any_training(bench, settings, message):
    with pytest.raises(ValueError, match=message):
        built(bench, **settings)
    assert not bench.fits


def test_a_file_of_a_given_size_is_met(bench, tmp_path):
    bench.parameters["claim"] = False
    [one] = built(bench, stages=["quantize"], size=8)
    digits = bench.images
    about = {"mean": digits.mean, "std": digits.std, "classes": digits.classes, "dtype": torch.float16}
    nbytes = artifact.save(one.network, tmp_path / "a.safetensors", **about).nbytes
    assert 7.5 < artifact.fp32_bytes(bench.dense.spec) / nbytes < 12


def test_torch_pruning_keeps_its_default(monkeypatch):
    """The same share of each group: one ranking of all groups made it a weak rival."""
    asked, tool = {}, types.SimpleNamespace(prune=lambda network, score, **options: asked.update(options))
    monkeypatch.setattr(pipeline, "peers", types.SimpleNamespace(available=lambda _: "", peer=lambda _: tool))
    monkeypatch.setattr(pipeline.batch_norm, "reestimate", lambda *_: None)
    work = types.SimpleNamespace(images=1, labels=2, whole=60)
    pipeline._Work._torch(work, None, types.SimpleNamespace(macs=6, score="magnitude"))
    assert asked == {"images": 1, "labels": 2, "macs": 10, "everywhere": True}


def test_a_training_that_lies_beside_the_reference_is_not_done_again(bench, tmp_path):
    """And one of another length is not taken for it."""
    shape = {key: getattr(PLAIN, key) for key in ("channels", "size", "classes")}
    torch.manual_seed(1)
    network, beside = models.build(models.three_stage(1, **shape)), tmp_path / "beside"
    bench.trained_before = lambda spec: copy.deepcopy(network)
    bench.file_beside = lambda name: beside / name if (beside / name).is_file() else None

    def rival(parameters):
        run = Run(**vars(bench) | {"parameters": bench.parameters | parameters})
        [made] = built(run, "small_dense", macs=2, family="three_stage", lambda_=1e-9)
        return made

    first = rival({})
    [kept] = tmp_path.glob("trained_*.tensors")
    beside.mkdir()
    kept.rename(beside / kept.name)
    again = rival({})
    assert len(bench.fits) == 1
    assert (again.train_images, again.train_seconds) == (first.train_images, first.train_seconds)
    states = (one.network.state_dict() for one in (first, again))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert rival({"distill_epochs": 0.4}).train_images > first.train_images and len(bench.fits) == 2
