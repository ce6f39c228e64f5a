"""What is claimed follows from validation images alone: those of one seed, and those of all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import claims, tables
from nnc_utils import data

IMAGES = 4000


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Stand-ins for artifacts: a file's name says which share of the validation images it gets right."""
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
    images = SimpleNamespace(validation=split, test=test, normalize=None)
    return SimpleNamespace(path=lambda name: tmp_path / f"{name}.safetensors", tried=tried, data=images)


def choose(files, wanted, **references):
    races = {key: [files.path(name) for name in names] for key, names in wanted.items()}
    references = {name: files.path(stem) for name, stem in references.items()}
    return claims.choose(races, images=files.data, **references)


def test_the_first_within_the_limit_is_claimed_and_all_are_looked_at(files):
    wanted = {("closed", "bytes"): ["tiny-80", "small-90", "large-90", "huge-99"]}
    chosen = choose(files, wanted, baseline="baseline-90")
    assert {key: path.stem for key, path in chosen.claimed.items()} == {("closed", "bytes"): "small-90"}
    assert list(chosen.looked) == ["tiny-80", "small-90", "large-90", "huge-99"]
    assert chosen.looked["small-90"] == [-0.075, 0, 0.075] and chosen.looked["tiny-80"][1] == pytest.approx(
        -10
    )
    assert len(files.tried) == 5  # each once


def test_the_interval_is_narrowed_to_that_of_the_test_set(files):
    """d is -1 for k of 4,000: mean -0.025 k, half the interval 0.049 sqrt(k + 2), half of that on 16,000."""
    looked = choose(files, {("closed", "bytes"): ["k-89.775"]}, baseline="baseline-90").looked["k-89.775"]
    assert looked == pytest.approx([-0.225 - 0.1625, -0.225, -0.225 + 0.1625], abs=1e-3)
    for lost, claimed in ((8, True), (9, False)):  # -0.2775 and -0.3063; as they are, -0.35 and -0.39
        name = f"k-{90 - 0.025 * lost}"
        assert bool(choose(files, {("closed", "bytes"): [name]}, baseline="baseline-90").claimed) == claimed


def test_the_open_division_is_held_against_the_better_network(files):
    wanted = {("closed", "bytes"): ["a-90"], ("open", "bytes"): ["b-90"]}
    chosen = choose(files, wanted, baseline="baseline-90", dense="dense-95")
    assert chosen.reference.stem == "dense-95"
    assert list(chosen.claimed) == [("closed", "bytes")]
    assert choose(files, wanted, baseline="baseline-90", dense="dense-89").reference.stem == "baseline-90"
    assert choose(files, wanted, baseline="baseline-90").reference.stem == "baseline-90"


def test_all_of_two_seeds_claim_what_the_first_one_chose(example):
    runs = [tables.read_run(folder) for folder in example.folders][::-1]
    rows = [row for run in runs for row in run.compression]
    for chosen in (0, 1):  # by the first seed; the second one liked another configuration
        wanted = {1: chosen, 2: 1 - chosen}
        mixed = [
            run.with_changes(
                compression=[r.model_copy(update={"headline": wanted[r.seed]}) for r in run.compression]
            )
            for run in runs
        ]
        claimed = claims.claimed_once(mixed)
        assert len(claimed) == len(rows) > 2 and {row.headline for row in claimed} == {chosen}
        assert [row.artifact_sha256 for row in claimed] == [row.artifact_sha256 for row in rows]


def looked_at(example, seed, points, *, technique="pipeline"):
    """A run of a seed: a row each (name, MACs, bytes, validation difference); the notebook chose c."""
    dense = next(tables.read_run(f) for f in example.folders if f.parent.name == "01_baseline")
    template = dense.compression[0].model_copy(update={"macs": 1000, "artifact_sha256": "f" * 64})
    rows, files, looked = [template], [], {}
    for name, macs, size, mean in points:
        sha = f"{seed}{name}" * 32
        named = {"technique": technique, "method": name, "settings": "", "seed": seed, "macs": macs}
        named |= {"artifact_bytes": size, "artifact_sha256": sha, "reference_sha256": "f" * 64}
        rows.append(template.model_copy(update=named | {"headline": int(name == "c"), "division": "open"}))
        files.append(tables.ArtifactRecord(path=f"{name}.safetensors", sha256=sha, artifact_sha256=sha))
        if mean is not None:
            looked[name] = (mean - 0.3, mean, mean + 0.3)
    extra = tables.Extra(validation_delta=looked)
    return dense.with_changes(
        run=f"quick/n/seed={seed}", seed=seed, compression=rows, artifacts=files, extra=extra
    )


def chosen_of(runs):
    return {r.method for r in claims.claimed_once(runs) if r.headline and r.technique != "baseline"}


@pytest.mark.parametrize(
    "small, large, chosen",
    [
        ([0.0, -0.5, 0.2], [0.1, 0.1, 0.1], {"a"}),  # lower end -0.1 - 0.17
        ([0.0, -0.7, 0.2], [0.1, 0.1, 0.1], {"b"}),  # -0.17 - 0.17 is below -0.3
        ([0.0, -0.7, 0.2], [-0.9, -0.9, -0.9], {"a"}),  # neither is likely: the nearer one
        ([-0.9, -0.9, -0.9], [0.0, -0.7, 0.2], {"b"}),
        ([0.0, -0.7, 0.2], [0.0, -0.7, 0.2], {"a"}),  # as near: the smaller one
        ([-0.9, -0.9, -0.9], [-0.2, -0.2, -0.2], set()),  # the nearer one is a loss: -0.2 + 0.17 is below 0
        ([0.0, -0.7, 0.2], [None, 0.1, 0.1], {"a"}),  # a seed did not look at the large one
    ],
)
def test_three_seeds_choose_over_all_their_validation_images(example, small, large, chosen):
    def run(seed):
        points = [("a", 10, 100, small[seed - 1]), ("b", 10, 200, large[seed - 1]), ("c", 10, 50, None)]
        return looked_at(example, seed, points)

    assert chosen_of([run(seed) for seed in (3, 1, 2)]) == chosen  # and no more c, which one seed had chosen
    rows = claims.claimed_once([run(seed) for seed in (3, 1, 2)])
    assert [row.seed for row in rows if row.method in chosen and row.headline] == [3, 1, 2] * len(chosen)
    assert chosen_of([run(seed) for seed in (1, 2)]) == {"c"}  # two seeds: as the first one's notebook has it


def test_one_seed_claims_nothing_beside_three(example):
    """Of students no notebook says what validation thinks of a difference: the first seed's choice counts."""
    for seeds, chosen in (((1, 2, 3), {"c"}), ((1, 2), {"c", "d"})):
        runs = [looked_at(example, s, [("c", 10, 50, None)], technique="distillation") for s in seeds]
        rows = runs[0].compression
        more = rows[-1].model_copy(update={"method": "d", "artifact_sha256": "d" * 64})
        assert chosen_of([runs[0].with_changes(compression=[*rows, more]), *runs[1:]]) == chosen


def test_seeds_choose_removed_channels_by_macs_and_masks_by_bytes(example):
    points = [("a", 250, 200, 0.0), ("b", 500, 100, 0.0), ("c", 1000, 50, -0.9), ("d", 1000, 60, 0.0)]
    pruned = [looked_at(example, seed, points, technique="pruning") for seed in (1, 2, 3)]
    assert chosen_of(pruned) == {"a", "d"}
    assert chosen_of([looked_at(example, seed, points) for seed in (1, 2, 3)]) == {"d"}  # by bytes alone


def test_configurations_that_share_a_file_are_both_looked_at(example):
    runs = [looked_at(example, seed, [("a", 10, 100, 0.0), ("b", 10, 90, -0.9)]) for seed in (1, 2, 3)]
    for run in runs:
        run.compression.append(run.compression[1].model_copy(update={"method": "twin of a"}))
    chosen = {key[2]: choice.chosen for key, choice in claims.chosen_over_seeds(runs).items()}
    assert chosen == {"a": True, "twin of a": False, "b": False}
