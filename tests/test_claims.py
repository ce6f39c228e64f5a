"""What is claimed follows from validation pictures alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnc_utils import claims, data

IMAGES = 4000


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Stand-ins for artifacts: a file's name says which share of the validation pictures it gets right."""
    labels = torch.zeros(IMAGES, dtype=torch.uint8)
    tried = []

    def predict(path, split, *, normalize, device):
        tried.append(path.stem)
        wrong = IMAGES - round(IMAGES * float(path.stem.split("-")[-1]) / 100)
        return (np.arange(len(split.labels)) < wrong).astype(np.uint8)

    monkeypatch.setattr(claims, "artifact", SimpleNamespace(load=lambda path: path))
    monkeypatch.setattr(claims.evaluation, "predict", predict)
    split = data.Split(torch.zeros(IMAGES, 1, 1, 1), labels)
    test = data.Split(torch.zeros(4 * IMAGES, 1, 1, 1), labels.repeat(4))
    pictures = SimpleNamespace(validation=split, test=test, normalize=None)
    return SimpleNamespace(path=lambda name: tmp_path / f"{name}.safetensors", tried=tried, data=pictures)


def choose(files, wanted, **about):
    orders = {key: [files.path(name) for name in names] for key, names in wanted.items()}
    about = {name: files.path(stem) for name, stem in about.items()}
    return claims.choose(orders, pictures=files.data, **about)


def test_the_first_without_loss_is_claimed_and_none_behind_it_is_looked_at(files):
    wanted = {("closed", "bytes"): ["tiny-80", "small-90", "large-90", "huge-99"]}
    chosen = choose(files, wanted, baseline="baseline-90")
    assert {key: path.stem for key, path in chosen.claimed.items()} == {("closed", "bytes"): "small-90"}
    assert list(chosen.looked) == ["tiny-80", "small-90"]
    assert chosen.looked["small-90"] == [0, 0, 0] and chosen.looked["tiny-80"][1] == pytest.approx(-10)
    assert sorted(files.tried) == ["baseline-90", "small-90", "tiny-80"]  # each once


def test_the_interval_is_narrowed_to_that_of_the_test_set(files):
    """d is -1 for k of 4,000: mean -0.025 k, half the interval 0.049 sqrt(k), half of that on 16,000."""
    looked = choose(files, {("closed", "bytes"): ["k-89.775"]}, baseline="baseline-90").looked["k-89.775"]
    assert looked == pytest.approx([-0.225 - 0.147, -0.225, -0.225 + 0.147], abs=1e-3)
    for lost, claimed in ((9, True), (10, False)):  # -0.2985 and -0.3275; as they are, -0.37 and -0.40
        name = f"k-{90 - 0.025 * lost}"
        assert bool(choose(files, {("closed", "bytes"): [name]}, baseline="baseline-90").claimed) == claimed


def test_the_open_division_is_held_against_the_better_network(files):
    wanted = {("closed", "bytes"): ["a-90"], ("open", "bytes"): ["b-90"]}
    chosen = choose(files, wanted, baseline="baseline-90", dense="dense-95")
    assert chosen.reference.stem == "dense-95"
    assert list(chosen.claimed) == [("closed", "bytes")]
    assert choose(files, wanted, baseline="baseline-90", dense="dense-89").reference.stem == "baseline-90"
    assert choose(files, wanted, baseline="baseline-90").reference.stem == "baseline-90"


def test_an_unknown_division_is_named(files):
    with pytest.raises(ValueError, match="unknown division half: one of closed, open"):
        choose(files, {("half", "bytes"): []}, baseline="baseline-90")
